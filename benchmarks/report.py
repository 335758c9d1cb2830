"""`python -m benchmarks` and `dam bench`: a table, a JSON file and a PNG per op, dtype and sizes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dam import plots
from dam.backends import choice, cpu
from dam.benchmarks import checkout, harness, memory, options, peers, records
from dam.benchmarks.against import Against, chosen
from dam.benchmarks.machine import COPY, Gpu, Machine, copying, on_default
from dam.kernels import configs

RESULTS = checkout.ROOT / "benchmarks" / "results"
DTYPES = ("float32",)  # unless others are asked for
EPILOG = """\
peers of --against:
{groups}
  module:function, or file.py:function: one of yours, called with the same inputs by name (docs/bench.md)

In a checkout, every operation on a GPU: python -m benchmarks gpu. Two builds: python -m benchmarks builds"""


def main(arguments: Sequence[str], prog: str) -> int:
    """The command `prog`; returns the exit status."""
    given = _options(arguments, prog)
    try:
        failed, output = run(given)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    for path in output:
        print(f"\n{path}")
    for line in failed:
        print(f"{prog}: {line}", file=sys.stderr)
    return 1 if failed else 0


def _options(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    width = max(map(len, peers.GROUPS))
    groups = "\n".join(f"  {name:{width}}  {group.what}" for name, group in peers.GROUPS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compares what each function computes with float64, then prints median times, ratios within the\n"
        "run, peak memory and the largest error, and writes them as JSON and PNG.",
        epilog=EPILOG.format(groups=groups),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="operations to measure (default: all)")
    add = parser.add_argument_group("what").add_argument
    options.add(add, DTYPES)
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    add("--against", metavar="NAME", type=lambda text: text.split(","), action="extend", default=[], help="see below")
    add("--no-peers", dest="peers", action="store_false", help="measure dam and its floor alone")
    add("--no-compiled", dest="compiled", action="store_false", help="leave out the peers that torch.compile makes")
    add = parser.add_argument_group("how").add_argument
    add("--threads", metavar="N", type=options.positive, default=torch.get_num_threads(), help="of the CPU")
    add("--repeats", metavar="N", type=options.positive, default=9, help="calls of each function (default: 9)")
    add("--no-memory", dest="memory", action="store_false", help="leave out peak memory, a process per function")
    add = parser.add_argument_group("results (default: a new folder in runs/)").add_argument
    add("--json", metavar="FILE", type=Path, help="all figures in one file")
    add("--png", metavar="FILE", type=Path, help="one plot, of a sweep against the size that it goes over")
    add("--output", metavar="DIR", type=Path, help="a JSON file and a PNG per op, dtype and sizes")
    add("--reference", action="store_true", help="overwrite this device's files in the checkout's benchmarks/results")
    given = parser.parse_args(arguments)
    if given.against and not given.peers:
        parser.error("--no-peers leaves out what --against asks for: give one of them")
    if "compile" in given.against and not given.compiled:
        parser.error("--no-compiled leaves out what --against compile asks for: give one of them")
    if given.reference and given.output:
        parser.error("--reference is a folder of its own: give it or --output")
    return given


def run(given: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """Measures the ops (all, if none is named), prints a table of each and writes what was asked for.

    Returns:
        What of --against is wrong or failed, a line for each; files and folders of the results.

    Raises:
        ValueError: an op, a size or a peer that does not exist; the message lists those that do.
        FileNotFoundError: there is no folder for a file.
        ImportError: there is no matplotlib.
        ArithmeticError: dam's own result is wrong.
    """
    for op in given.ops:
        if op not in harness.ops():
            raise ValueError(f"no op {op!r} to measure; there are {', '.join(harness.ops())}")
    machine = machine_of(given.device)
    if machine.device.type == "cpu" and (reason := choice.why_unavailable("cpu")) is not None:
        raise ValueError(reason)
    ops = given.ops or harness.ops()
    sizes = options.sizes(given, ops)
    against = chosen(given.against, ops, machine.device)
    folder = folder_of(given, machine)
    if folder is not None or given.png is not None:
        plots.figure_class()  # missing: to be said before the work
    for path in (given.json, given.png):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.absolute().parent} for {path.name}")
    results = []
    for op, dtype in itertools.product(ops, options.dtypes(given, DTYPES)):
        for of_run in options.sweep(op, sizes):
            results.append(measure(op, of_run, dtype, given, against, machine))
            print(table(results[-1]), flush=True)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write(results[-1], folder)
    if given.json is not None:
        write_json(given.json, {"results": results})
    if given.png is not None:
        plot(given.png, results, list(sizes))
    return failures(results, given.against), [x for x in (folder, given.json, given.png) if x is not None]


def machine_of(device: str | None) -> Machine:
    """Where to measure: what is asked for, or a GPU where there is one.

    Raises:
        ValueError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return Gpu() if device != "cpu" and torch.cuda.is_available() else Machine()


def folder_of(given: argparse.Namespace, machine: Machine) -> Path | None:
    """Where files of their own for every op, dtype and sizes go; None: nowhere, as a file was asked for.

    Raises:
        ValueError: the reference is asked for where there is no checkout.
    """
    if given.reference:
        if not checkout.is_one():
            raise ValueError("--reference: the committed figures are in a checkout of dam's repository; run this there")
        return RESULTS / (device() if machine.device.type == "cpu" else slug(machine.facts()["gpu"]))
    if given.output is not None or given.json is not None or given.png is not None:
        return given.output
    return Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"


def measure(
    op: str, sizes: dict[str, int], dtype: str, given: argparse.Namespace, against: Against, machine: Machine
) -> dict[str, Any]:
    """All that is known of an op's cases at some sizes, as it is written to JSON."""
    threads, cases, found = torch.get_num_threads(), harness.cases_of(op), []
    on_gpu = machine.device.type == "cuda"
    torch.set_num_threads(given.threads)
    try:
        with torch.device(machine.device):
            made = cases(getattr(torch, dtype), **sizes)
        for case in made:
            with on_default(machine) if on_gpu else contextlib.nullcontext():
                record = records.of_case(op, case, sizes, dtype)
                if on_gpu:
                    case = _on_gpu(case, op, record["moved_bytes"], machine)
                case = against.of(case)
                measured = harness.measure(
                    case, given.repeats, peers=given.peers, compiled=given.compiled, timer=machine, checked=True
                )
                if on_gpu and given.memory:
                    functions = {**case.functions, **case.compiled}
                    peaks = {
                        name: machine.peak_bytes(functions[name])
                        for name in functions
                        if name in measured.median_seconds
                    }
                    measured.peak_bytes |= {name: peak for name, peak in peaks.items() if peak is not None}
            found.append((record, case, measured))
    finally:
        torch.set_num_threads(threads)
    if given.memory and not on_gpu:
        for n, (_, case, measured) in enumerate(found):
            for name in (name for name in case.functions if name in measured.median_seconds):
                try:
                    measured.peak_bytes[name] = memory.peak_bytes(op, n, name, dtype, given.threads, sizes)
                except RuntimeError as error:
                    print(f"{measured.label}: peak memory of {name} is absent: {error}", file=sys.stderr)
    return {
        "op": op,
        "sizes": sizes,
        "dtype": dtype,
        "threads": given.threads,
        "repeats": given.repeats,
        "peers": given.peers,
        "against": given.against,
        **records.versions(),
        "device": machine.device.type,
        **(machine.facts() if on_gpu else {}),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        **({} if on_gpu else {"instruction_set": cpu.isa(), "bfloat16": cpu.instructions()}),  # what multiplies it
        "cases": [{**records.timed(record, measured), "groups": case.groups()} for record, case, measured in found],
    }


def _on_gpu(case: harness.Case, op: str, moved_bytes: int, machine: Machine) -> harness.Case:
    """The case with what runs on a GPU only, and a floor there."""
    if op not in configs.LINEAR_OPS and op != "rollout":
        case = dataclasses.replace(case, floor_name=COPY, floor=copying(moved_bytes, machine.device))
    return dataclasses.replace(case, compiled=case.compiled | case.on_gpu)


def failures(results: Sequence[Mapping[str, Any]], asked: Sequence[str]) -> list[str]:
    """Of what was asked for by name: what is wrong, or could not be measured in any case."""
    cases = [case for result in results for case in result["cases"]]
    lines = []
    for name in asked:
        found = [(case, f) for case in cases for f, groups in case["groups"].items() if name in (f, *groups)]
        wrong = [(case, f) for case, f in found if f in case["wrong"]]
        lines += [f"{f} in {case['label']}, {options.text(case['sizes'])}: {case['wrong'][f]}" for case, f in wrong]
        if not wrong and not any(f in case["median_seconds"] for case, f in found):
            reason = next(f"{f}: {case['absent'][f]}" for case, f in found)
            lines.append(f"--against {name}: nothing of it was measured; {reason}")
    return lines


def table(result: dict[str, Any]) -> str:
    """The cases of an op: times, and how they compare to dam's and to the floor."""
    where = f"{result['threads']} threads" if result["device"] == "cpu" else result["gpu"]
    lines = [f"\n{options.text(result['sizes'])}, {result['dtype']}, {where}, medians of {result['repeats']}"]
    return "\n".join([*lines, *(case_table(case) for case in result["cases"])])


def case_table(case: dict[str, Any]) -> str:
    seconds = case["median_seconds"]
    floor = seconds[case["floor_name"]]
    width = max(32, *map(len, (*seconds, *case["wrong"])))
    lines = [
        f"\n{case['label']}",
        f"  {'':{width}}{'ms':>10}{'of dam':>10}{'of floor':>10}{'floor/it':>10}{'peak MiB':>10}{'error':>10}",
    ]
    for name, time_ in seconds.items():
        columns = f"{1e3 * time_:10.3f}{time_ / seconds['dam']:9.2f}x{time_ / floor:9.2f}x{floor / time_:10.1%}"
        peak, errors = case["peak_bytes"].get(name), case["errors"].get(name, {})
        columns += f"{'-':>10}" if peak is None else f"{peak / 2**20:10.1f}"
        columns += f"{max(errors.values()):10.1e}" if errors else f"{'-':>10}"
        lines.append(f"  {name:{width}}{columns}  {case['arithmetic'].get(name, '')}".rstrip())
    lines += [f"  {name:{width}}    {why}" for name, why in case["wrong"].items()]
    lines += [f"  {name:{width}}    absent: {why}" for name, why in case["absent"].items()]
    return "\n".join(lines)


def write(result: dict[str, Any], folder: Path) -> None:
    """<op>-<dtype>.json and .png, with what differs from the defaults in the name."""
    parts = [result["op"], result["dtype"]]
    defaults = harness.sizes_of(harness.cases_of(result["op"]))
    parts += [f"{name}-{size}" for name, size in result["sizes"].items() if size != defaults[name]]
    if result["device"] == "cpu" and result["threads"] != result["cores"]:
        parts.append(f"threads-{result['threads']}")
    if not result["peers"]:
        parts.append("alone")
    path = folder / "-".join(parts)
    write_json(path.with_suffix(".json"), result)
    plot(path.with_suffix(".png"), [result], [])


def plot(path: Path, results: Sequence[dict[str, Any]], swept: Sequence[str]) -> None:
    """Bars of one result's times; of several lines over the first size that they differ in, a panel for the others."""
    title = table(results[0]).strip().splitlines()[0]
    over = next((name for name in swept if len({r["sizes"].get(name) for r in results}) > 1), None)
    if over is None:
        panels = [
            (
                case["label"] if len(results) == 1 else f"{case['label']}, {result['dtype']}",
                case["median_seconds"],
                case["floor_name"],
            )
            for result in results
            for case in result["cases"]
        ]
        return plots.times_and_floor(path, panels, title=title)
    lines: dict[str, dict[int, Mapping[str, float]]] = {}
    floors = {}
    for result in results:
        for case in result["cases"]:
            rest = {name: size for name, size in result["sizes"].items() if name != over}
            panel = ", ".join(part for part in (case["label"], options.text(rest), result["dtype"]) if part)
            # An op without that size has a panel of one point.
            lines.setdefault(panel, {})[result["sizes"].get(over, 1)] = case["median_seconds"]
            floors[panel] = case["floor_name"]
    panels_over = [(panel, times, floors[panel]) for panel, times in lines.items()]
    plots.times_over_sizes(path, panels_over, xlabel=options.SIZES[over][0])


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
