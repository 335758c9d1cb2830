"""`python -m benchmarks` and `dam bench`: a table, a JSON file and a PNG per op and dtype."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, memory, options, records
from dam import plots
from dam.backends import choice, cpu

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32",)  # unless others are asked for


def main(arguments: Sequence[str], prog: str) -> int:
    """The command `prog`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Prints median times, ratios within the run and peak memory, and writes them as JSON and PNG.",
        epilog="On a GPU: python -m benchmarks gpu. Two builds side by side: python -m benchmarks builds.",
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help="operations to measure (default: all)")
    options.add(add, DTYPES)
    add("--threads", metavar="N", type=options.positive, default=torch.get_num_threads())
    add("--repeats", metavar="N", type=options.positive, default=9, help="calls of each function (default: 9)")
    add("--no-memory", dest="memory", action="store_false", help="leave out peak memory, a process per function")
    add("--no-peers", dest="peers", action="store_false", help="measure dam and its floor alone")
    add("--no-compiled", dest="compiled", action="store_false", help="leave out the peers that torch.compile makes")
    add("--output", metavar="DIR", type=Path, help="folder of JSON and PNG (default: benchmarks/results/<device>)")
    given = parser.parse_args(arguments)
    try:
        if (reason := choice.why_unavailable("cpu")) is not None:
            raise ValueError(reason)
        output = run(given)
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(f"\nJSON and PNG: {output}")
    return 0


def run(given: argparse.Namespace) -> Path:
    """Measures the ops (all, if none is named), prints a table of each and writes JSON and PNG.

    Returns:
        The folder of the results: `given.output`, or one named after this device.

    Raises:
        ValueError: an op or a size that does not exist; the message lists those that do.
        ImportError: there is no matplotlib.
    """
    for op in given.ops:
        if op not in harness.ops():
            raise ValueError(f"no op {op!r} to measure; there are {', '.join(harness.ops())}")
    ops = given.ops or harness.ops()
    sizes = options.sizes(given, ops)
    plots.figure_class()  # missing: to be said before the work
    output = given.output or RESULTS / device()
    output.mkdir(parents=True, exist_ok=True)
    for op in ops:
        for dtype in options.dtypes(given, DTYPES):
            result = measure(op, sizes, dtype, given)
            print(table(result), flush=True)
            write(result, output)
    return output


def measure(op: str, sizes: dict[str, int], dtype: str, given: argparse.Namespace) -> dict[str, Any]:
    """All that is known of an op's cases, as it is written to JSON; `sizes` replace the op's own where it has them."""
    threads, cases = torch.get_num_threads(), harness.cases_of(op)
    sizes = {name: sizes.get(name, size) for name, size in harness.sizes_of(cases).items()}
    torch.set_num_threads(given.threads)
    try:
        found = [
            (
                records.of_case(op, case, sizes, dtype),
                harness.measure(case, given.repeats, peers=given.peers, compiled=given.compiled),
            )
            for case in cases(getattr(torch, dtype), **sizes)
        ]
    finally:
        torch.set_num_threads(threads)
    if given.memory:
        for n, case in enumerate(harness.tiny_cases(cases, getattr(torch, dtype))):
            measurement = found[n][1]
            for name in (name for name in case.functions if name not in measurement.absent):
                try:
                    measurement.peak_bytes[name] = memory.peak_bytes(op, n, name, dtype, given.threads, sizes)
                except RuntimeError as error:
                    print(f"{measurement.label}: peak memory of {name} is absent: {error}", file=sys.stderr)
    return {
        "op": op,
        "sizes": sizes,
        "dtype": dtype,
        "threads": given.threads,
        "repeats": given.repeats,
        "peers": given.peers,
        **records.versions(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "instruction_set": cpu.isa(),
        "bfloat16": cpu.instructions(),  # what multiplies it
        "cases": [records.timed(record, measurement) for record, measurement in found],
    }


def table(result: dict[str, Any]) -> str:
    """The cases of an op: times, and how they compare to dam's and to the floor."""
    sizes = ", ".join(f"{name} {size}" for name, size in result["sizes"].items())
    lines = [f"\n{sizes}, {result['dtype']}, {result['threads']} threads, medians of {result['repeats']}"]
    return "\n".join([*lines, *(case_table(case) for case in result["cases"])])


def case_table(case: dict[str, Any]) -> str:
    seconds = case["median_seconds"]
    floor = seconds[case["floor_name"]]
    width = max(32, *map(len, seconds))
    lines = [
        f"\n{case['label']}",
        f"  {'':{width}}{'ms':>10}{'of dam':>10}{'of floor':>10}{'floor/it':>10}{'peak MB':>10}",
    ]
    for name, time in seconds.items():
        columns = f"{1e3 * time:10.3f}{time / seconds['dam']:9.2f}x{time / floor:9.2f}x{floor / time:10.1%}"
        peak = case["peak_bytes"].get(name)
        lines.append(f"  {name:{width}}{columns}" + (f"{'-':>10}" if peak is None else f"{peak / 2**20:10.1f}"))
    lines += [f"  {name:{width}}    absent: {why}" for name, why in case["absent"].items()]
    return "\n".join(lines)


def write(result: dict[str, Any], folder: Path) -> None:
    """<op>-<dtype>.json and .png, with what differs from the defaults in the name."""
    parts = [result["op"], result["dtype"]]
    defaults = harness.sizes_of(harness.cases_of(result["op"]))
    parts += [f"{name}-{size}" for name, size in result["sizes"].items() if size != defaults[name]]
    if result["threads"] != result["cores"]:
        parts.append(f"threads-{result['threads']}")
    if not result["peers"]:
        parts.append("alone")
    path = folder / "-".join(parts)
    write_json(path.with_suffix(".json"), result)
    panels = [(case["label"], case["median_seconds"], case["floor_name"]) for case in result["cases"]]
    plots.times_and_floor(path.with_suffix(".png"), panels, title=table(result).strip().splitlines()[0])


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def device() -> str:
    """Name of a folder: CPU model, instruction set in use, cores."""
    return f"{slug(cpu_model())}-{cpu.isa()}-{os.cpu_count()}-cores"


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def slug(model: str) -> str:
    """A model without a CPU's maker, trademarks, clock and cores: "AMD EPYC 7763 64-Core Processor" is epyc-7763."""
    noise = r"\((r|tm)\)|@.*|\b(amd|intel|cpu|processor|\d+-core)\b"
    words = re.sub(r"[^a-z0-9]+", " ", re.sub(noise, " ", model.lower())).split()
    return "-".join(words) or "cpu"
