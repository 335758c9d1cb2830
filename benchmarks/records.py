"""What a record of a measurement says, whatever took it: of which case, what must move, its floor, and versions."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import dam
from dam.benchmarks import checkout, harness


def of_case(op: str, case: harness.Case, sizes: dict[str, int], dtype: str) -> dict[str, Any]:
    """What is known of a case before it is timed. Calls dam's function, for the bytes of what it returns."""
    results = nbytes(harness.tensors(case.functions["dam"]()))
    return {
        "op": op,
        "label": case.label,
        "sizes": sizes,
        "dtype": dtype,
        "moved_bytes": nbytes(case.reads) + results,  # inputs read as often as they must be, results written once
        "result_bytes": results,
        "floor_name": case.floor_name,
        "versions": versions(),
    }


def timed(record: dict[str, Any], measurement: harness.Measurement) -> dict[str, Any]:
    """The record of a case with what it took; the floor may be another than the case's own."""
    floor = measurement.median_seconds[measurement.floor_name]
    return {**record, **dataclasses.asdict(measurement), "floor_seconds": floor}


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


@functools.cache
def versions() -> dict[str, str | None]:
    """Of what is measured and of what it runs on: Triton's where it is installed, the commit where git tells."""
    found = {"dam": dam.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    return {**found, "commit": checkout.commit()}
