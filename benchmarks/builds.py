"""Two builds of the C++ backend in one process: python -m benchmarks builds BEFORE [--rows 512] [--dtype bfloat16].

BEFORE is a checkout of another commit whose extension was built there, by `python setup.py build_ext --inplace`; its
kernels run under this checkout's bindings, alternating with this checkout's own. For changes that leave the bindings
of jump, log_prob and matching_loss as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

import dam
from benchmarks import harness, records, report
from dam.backends import cpu
from dam.ops import log_prob as log_prob_op
from dam.ops import matching_loss as matching_loss_op


def load(checkout: Path) -> ModuleType:
    """The extension that was built in a checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    path = checkout / "dam" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: build it there first")
    spec = importlib.util.spec_from_file_location("before._cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_kernels(module: ModuleType, function: Callable[[], object]) -> Callable[[], object]:
    def call() -> None:
        cpu.kernels = module
        with dam.backend("cpu"):
            function()

    return call


def cases(rows: int, vocabulary: int, dtype: torch.dtype, before: ModuleType) -> list[harness.Case]:
    now = cpu.kernels
    logits, base = (harness.logits(rows, vocabulary, dtype) for _ in range(2))
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)
    _, log_escape = log_prob_op._cpu(logits, target, None, 1.0)
    functions = {
        "jump": lambda: dam.jump(logits),
        "log_prob": lambda: dam.log_prob(logits, target),
        "log_prob's backward": lambda: log_prob_op._cpu_backward(weight, logits, target, log_escape, None, 1.0),
        "matching_loss": lambda: matching_loss_op._cpu(logits, target, weight, None, None, None, None, True, True),
        "matching_loss with base": lambda: matching_loss_op._cpu(
            logits, target, weight, base, base_weight, None, None, True, True
        ),
    }
    return [
        harness.Case(
            label,
            "plain read of the logits",
            with_kernels(now, harness.reading(logits)),
            {"dam": with_kernels(now, function), "before": with_kernels(before, function)},
        )
        for label, function in functions.items()
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks builds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout of the other commit, built in place")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the medians")
    options = parser.parse_args(arguments)
    print(f"T = {options.rows}, V = {options.vocabulary}, {options.dtype}, medians of {options.repeats}")
    measured, now = [], cpu.kernels
    try:
        for case in cases(options.rows, options.vocabulary, getattr(torch, options.dtype), load(options.before)):
            measurement = harness.measure(case, options.repeats)
            seconds, floor = measurement.median_seconds, measurement.median_seconds[measurement.floor_name]
            print(
                f"{measurement.label:26}{1e3 * seconds['before']:9.2f} ms -> {1e3 * seconds['dam']:8.2f} ms"
                f"{seconds['before'] / floor:8.2f} -> {seconds['dam'] / floor:5.2f} of a plain read"
            )
            measured.append(dataclasses.asdict(measurement))
    finally:
        cpu.kernels = now
    if options.json:
        setting = {"rows": options.rows, "vocabulary": options.vocabulary, "dtype": options.dtype}
        setting |= {**records.versions(), "instruction_set": cpu.isa(), "repeats": options.repeats}
        report.write_json(options.json, {**setting, "cases": measured})
    return 0
