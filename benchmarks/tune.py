"""Measures candidates for the rows of kernels/configs.py, and prints the fastest as rows to paste there.

One axis of values after another, each from the best so far: the product of all would take hours to compile.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.benchmarks import harness
from dam.benchmarks.machine import Machine
from dam.kernels import configs

Function = Callable[[], object]
Values = dict[str, Any]

FORM_KEYS = ("form", "frozen_form", "trained_form")  # of a forward pass, and of gradients
GAIN = 0.98  # a candidate that takes more than this of the time before it gains nothing but noise


class Variant(NamedTuple):
    """Values that stay, and axes: on each, candidates to be tried in each other's place."""

    values: Values
    axes: tuple[tuple[Values, ...], ...]


class Job(NamedTuple):
    """One case of an op, to be tuned at some sizes; the fastest of the variants is kept."""

    op: str
    variants: tuple[Variant, ...]
    buckets: tuple[int, ...] = ()  # of rows, each measured at its upper end; the last stands for all above too
    sizes: dict[str, int] = {}  # noqa: RUF012
    case: int = 0
    dtype: torch.dtype = torch.bfloat16


def axis(name: str, *values: Any) -> tuple[Values, ...]:
    return tuple({name: value} for value in values)


ROWS = (
    Variant(
        {},
        (
            axis("elements", 4096, 8192, 16384),
            axis("warps", 4, 8, 16),
            axis("programs", 128, 256, 512, 1024, 2048),
            axis("stages", 1, 2, 3),
        ),
    ),
)
BLOCKS = tuple(
    {"block_rows": rows, "block_columns": columns, "block_depth": depth, "warps": warps}
    for rows, columns, depth, warps in (
        (16, 128, 128, 4),
        (64, 128, 64, 4),
        (64, 256, 64, 4),
        (128, 128, 64, 4),
        (128, 128, 64, 8),
        (128, 256, 64, 8),
        (256, 128, 64, 8),
    )
)
CHUNKS = (axis("chunk_mb", 8, 16, 32, 64, 128),)
PROGRAMS = (BLOCKS, axis("stages", 2, 3, 4, 5), axis("group", 1, 4, 8, 16), axis("merge_rows", 1, 4, 16))


def forms(key: str, chunked: Sequence = (), fused: Sequence = ()) -> tuple[Variant, ...]:
    """Both forms of a linear op, or of its gradient, each with axes of its own."""
    return Variant({key: "chunked"}, tuple(chunked)), Variant({key: "fused"}, tuple(fused))


ADJOINT = (
    Variant({}, (axis("elements", 1024, 2048, 4096, 8192), axis("warps", 2, 4, 8), axis("weights", 256, 512, 1024))),
)
TILT = (Variant({}, (axis("elements", 512, 1024, 2048), axis("warps", 2, 4, 8))),)
UNIFORM = (
    Variant(
        {}, (axis("elements", 2048, 4096, 8192, 16384), axis("warps", 4, 8, 16), axis("programs", 66, 132, 264, 528))
    ),
)
LATTICE = (
    Variant(
        {},
        (
            axis("points", 32, 64, 128),
            axis("lines", 16, 32, 64, 128),
            axis("depth", 16, 32, 64),
            axis("walk_warps", 2, 4, 8),
            axis("chunk_mb", 16, 32, 64),
        ),
    ),
)


def jobs(vocabulary: int = 126_464, hidden: int = 4096) -> list[Job]:
    head = {"vocabulary": vocabulary, "hidden": hidden}
    found = [Job(op, ROWS, (1, 64, 1024, 8192), {"vocabulary": vocabulary}) for op in configs.ROW_OPS]
    found += [Job("linear_jump", forms("form", CHUNKS, PROGRAMS), (16, 64, 128, 256, 512, 1024, 4096), head)]
    # The blocks of an op serve its gradients too, so they are tuned once.
    found += [
        Job(op, forms(key, (), axes), (64, 1024, 8192), head, case)
        for op, key, axes, case in (
            ("linear_log_prob", "form", PROGRAMS, 0),
            ("linear_log_prob", "frozen_form", (), 1),
            ("linear_log_prob", "trained_form", (), 2),
            ("linear_matching_loss", "trained_form", PROGRAMS, 2),
            ("linear_matching_loss", "frozen_form", (), 0),
        )
    ]
    found += [Job("adjoint_weights", ADJOINT, dtype=torch.float32), Job("tilt_to_ess", TILT, dtype=torch.float32)]
    found += [
        Job("backward_kolmogorov", variants, case=n, dtype=torch.float32)
        for n, variants in enumerate((UNIFORM, LATTICE))
    ]
    return found


@dataclasses.dataclass
class Tuning:
    """Rows for the table, what was tried for them, as fractions of the table's time or reasons, and what was not."""

    rows: list[str] = dataclasses.field(default_factory=list)
    tried: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


def tune(machine: Machine, found: Sequence[Job], repeats: int, out_of_time: Callable[[], bool]) -> Tuning:
    """Tunes the jobs one after another, printing the rows of each; those that the time does not reach are left out."""
    tuning = Tuning()
    for job in found:
        chosen: dict[int | None, Values] = {}
        for bucket in job.buckets or (None,):
            if out_of_time():
                tuning.left_out.append(f"{described(job, bucket)}: the time was spent")
                continue
            try:
                chosen[bucket] = _tuned(machine, job, bucket, repeats, out_of_time, tuning)
            except Exception as error:
                tuning.failures.append(f"{described(job, bucket)}: {harness.reason(error)}")
            machine.free()
        lines = rows(machine, job, chosen)
        print("\n".join(lines) or f"# {job.op}, case {job.case}: nothing is faster than the table", flush=True)
        tuning.rows += lines
    return tuning


def described(job: Job, bucket: int | None) -> str:
    return f"{job.op}, case {job.case}" + ("" if bucket is None else f", rows {bucket}")


def rows(machine: Machine, job: Job, chosen: Mapping[int | None, Values]) -> list[str]:
    """Lines for the table, the largest bucket first: the last row that fits a launch counts.

    Each names all that any of them does, since the rows of larger buckets hold for smaller ones too.
    """
    names = dict.fromkeys(name for values in chosen.values() for name in values)
    if not names:
        return []
    lines = []
    for bucket in sorted(chosen, key=lambda b: math.inf if b is None else b, reverse=True):
        values = {name: chosen[bucket][name] for name in names if name in chosen[bucket]}
        table = _table_values(machine, job, bucket)
        values = {name: values.get(name, table.get(name)) for name in names}
        text = json.dumps({name: value for name, value in values.items() if value is not None})
        fields = [f'"{job.op}"', text, f"gpu={json.dumps(part_of_name(configs.device_name(machine.device)))}"]
        fields.append(f"element_bytes=({job.dtype.itemsize},)")
        if bucket is not None and bucket != max(job.buckets):
            fields.append(f"rows={bucket}")
        lines.append(f"    Row({', '.join(fields)}),")
    return lines


def part_of_name(gpu: str) -> str:
    """The part of a GPU's name that says which chip it has: "NVIDIA H100 80GB HBM3" is an H100."""
    match = re.search(r"\b[A-Z]+\d+[A-Z]*\b", gpu)
    return match[0] if match else gpu


def _table_values(machine: Machine, job: Job, bucket: int | None) -> Values:
    sizes = harness.sizes_of(harness.cases_of(job.op)) | job.sizes
    count = sizes.get("rows", 1) if bucket is None else bucket
    return configs.lookup(job.op, machine.device, job.dtype.itemsize, count, sizes.get("vocabulary", 1))


def _tuned(
    machine: Machine, job: Job, bucket: int | None, repeats: int, out_of_time: Callable[[], bool], tuning: Tuning
) -> Values:
    """The fastest values, or none where nothing is faster than the table."""
    sizes = job.sizes if bucket is None else {**job.sizes, "rows": bucket}
    with torch.device(machine.device):
        function = harness.cases_of(job.op)(job.dtype, **sizes)[job.case].functions["dam"]
    best, best_time = {}, GAIN
    for variant in job.variants:
        try:
            # Forms may draw differently; that each draws rightly, and they agree in the rest, the tests of the op hold.
            expected = _seeded(with_values(job.op, variant.values, function))
        except Exception as error:
            if not variant.values:
                raise
            entry = {"op": job.op, "case": job.case, "sizes": sizes, "values": variant.values}
            tuning.tried.append(entry | {"reason": harness.reason(error)})
            continue
        values, least = dict(variant.values), math.inf if variant.values else 1.0
        for candidates in ((variant.values,) if variant.values else (), *variant.axes):
            if out_of_time():
                tuning.left_out.append(f"{described(job, bucket)}: the time was spent before {json.dumps(candidates)}")
                break
            tried = _times(machine, job.op, function, expected, [values | c for c in candidates], repeats)
            for candidate, outcome in tried:
                tuning.tried.append({"op": job.op, "case": job.case, "sizes": sizes, "values": candidate} | outcome)
                if outcome.get("of_table", math.inf) < GAIN * least:
                    values, least = candidate, outcome["of_table"]
        if least < best_time:
            best, best_time = values, least
    return best


def _times(
    machine: Machine, op: str, function: Function, expected: list[Tensor], candidates: list[Values], repeats: int
) -> list[tuple[Values, dict[str, Any]]]:
    """Of each candidate, its time as a fraction of the table's, alternating; or why it has none."""
    outcomes: dict[str, dict[str, Any]] = {}
    functions: dict[str, Function] = {}
    for candidate in candidates:
        name, call = json.dumps(candidate), with_values(op, candidate, function)
        try:
            wrong = difference(expected, _seeded(call))
        except Exception as error:
            wrong = harness.reason(error)
        if wrong is None:
            functions[name] = call
        else:
            outcomes[name] = {"reason": wrong}
    if functions:
        measured = harness.measure(harness.Case(op, "table", function, functions), repeats, timer=machine)
        seconds = measured.median_seconds
        outcomes |= {name: {"reason": why} for name, why in measured.absent.items()}
        for name in functions.keys() & seconds.keys():
            outcomes[name] = {"seconds": seconds[name], "of_table": seconds[name] / seconds["table"]}
    return [(candidate, outcomes[json.dumps(candidate)]) for candidate in candidates]


def with_values(op: str, values: Mapping[str, Any], function: Function) -> Function:
    """The function, with these values instead of the table's for launches of `op`."""

    def call() -> object:
        with configs.override(op, **values):
            return function()

    return call


def _seeded(function: Function) -> list[Tensor]:
    """The results of a call that draws with the same seed each time."""
    torch.manual_seed(0)
    return harness.tensors(function())


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str | None:
    """What tells results apart that only rounding may, or None. Draws may differ in one row of a hundred, by ties."""
    if [x.shape for x in expected] != [x.shape for x in actual]:
        return "results of other shapes"
    same = None
    for a, b in zip(expected, actual, strict=True):
        if not a.dtype.is_floating_point:
            same = a == b if same is None else same & (a == b)
    if same is not None and float(same.double().mean()) < 0.99:
        return f"other draws in {1 - float(same.double().mean()):.1%} of the rows"
    for a, b in zip(expected, actual, strict=True):
        if a.dtype.is_floating_point and a.numel():
            # The probability of another draw is another one.
            kept = slice(None) if same is None or same.shape != a.shape else same
            tolerance = 1e-3 if a.dtype.itemsize > 2 else 2**-6
            a, b = a[kept].double(), b[kept].double()
            error, most = float((a - b).abs().max()), float(a.abs().max())
            if not error <= tolerance * most:
                return f"results that are off by {error:.3g} of {most:.3g}"
    return None
