"""Two builds of the C++ backend, or two releases of torch, side by side.

    python -m benchmarks builds BEFORE [--rows 512] [--dtype bfloat16]
    python -m benchmarks builds . --python ANOTHER/bin/python --threads 1 --cpu-time --fill 0.002

BEFORE is a checkout whose extension was built there, by `python setup.py build_ext --inplace`: one of another commit,
or this one, to be run under this interpreter beside another with a torch of its own. Each build runs under its own
checkout's Python code, in a process of its own that makes public calls when it is told to: calls of the two take turns,
in an order shuffled anew for every repeat. Printed are medians, and the median of the ratios of each repeat's two times
with the interval that holds it in 95 of 100 runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dam.backends import cpu
from dam.benchmarks import checkout, harness, records, report

FLOOR = "plain read of the logits"


class Build:
    """A process that makes the calls of one checkout, under an interpreter whose torch may be another.

    Raises:
        FileNotFoundError: the checkout has no extension, or there is no such interpreter.
        RuntimeError: its process does not start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], python: str = sys.executable):
        if not any((folder / "dam").glob("_cpu.*")):
            raise FileNotFoundError(f"no {folder / 'dam' / '_cpu'}.*: build it there first")
        worker = Path(__file__).with_name("build_worker.py")
        command = [python, str(worker), str(folder), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first = json.loads(self._answer())
        self.calls: list[str] = first["calls"]
        self.versions: dict[str, str] = first["versions"]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("a build's process ended; what it said is above")
        return line

    def seconds(self, call: str, number: int = 1, *, cpu_time: bool = False) -> float:
        """Of one call, made `number` times in a row; of the clock, or of the process' CPU."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number} {call}\n")
        self._process.stdin.flush()
        return float(self._answer().split()[cpu_time])

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


def measure(
    builds: dict[str, Build], repeats: int, *, only: str = "", fill: float = 0.0, cpu_time: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call by each build, of every repeat: of all calls, or of those with `only` in their names.

    Of two measurements in a row the second counts, as caches then hold alike. A measurement is of as many calls in a
    row as take `fill` seconds, at least one.
    """
    first = next(iter(builds.values()))
    names = [name for name in first.calls if only in name or name == FLOOR]
    seconds: dict[str, dict[str, list[float]]] = {name: {build: [] for build in builds} for name in names}
    number = {name: max(1, math.ceil(fill / first.seconds(name))) for name in names}
    order, shuffle = list(builds), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(names)
        for name in names:
            shuffle(order)
            for build in order:
                builds[build].seconds(name, number[name], cpu_time=cpu_time)
                seconds[name][build].append(builds[build].seconds(name, number[name], cpu_time=cpu_time))
    return seconds


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of a sample, and the two of its values between which the distribution's lies in 95 of 100 samples.

    Each value is below the distribution's median with probability 1/2, whatever the distribution: the number of those
    below is binomial, within 1.96 sqrt(n) / 2 of n / 2.
    """
    ordered, n = sorted(values), len(values)
    low = max(0, math.floor((n - 1) / 2 - 0.98 * math.sqrt(n)))
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What is reported of a call's seconds by each build."""
    ratios = [now / before for before, now in zip(seconds["before"], seconds["dam"], strict=True)]
    ratio, *interval = median_and_interval(ratios)
    medians = {build: statistics.median(times) for build, times in seconds.items()}
    return {"median_seconds": medians, "ratio": ratio, "ratio_interval": interval}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks builds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout of the other commit, built in place")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", metavar="TEXT", default="", help="calls with TEXT in their names")
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="interpreter of this checkout's build")
    parser.add_argument("--fill", metavar="S", type=float, default=0.0, help="time calls in a row that take S seconds")
    parser.add_argument("--cpu-time", action="store_true", help="the CPU's time, which other work does not lengthen")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write medians and ratios")
    options = parser.parse_args(arguments)
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time is the sum of all threads' times: it needs --threads 1")
    settings = {name: getattr(options, name) for name in ("rows", "vocabulary", "hidden", "dtype", "threads")}
    sizes = f"T = {options.rows}, V = {options.vocabulary}, D = {options.hidden}, {options.dtype}"
    builds: dict[str, Build] = {}
    try:
        builds["before"] = Build(options.before, settings)
        builds["dam"] = Build(checkout.ROOT, settings, options.python)
        torches = " -> ".join(build.versions["torch"] for build in builds.values())
        print(f"{sizes}, medians of {options.repeats}, torch {torches}")
        found = measure(builds, options.repeats, only=options.only, fill=options.fill, cpu_time=options.cpu_time)
    finally:
        for build in builds.values():
            build.close()
    floor = statistics.median(found[FLOOR]["dam"])
    cases = [
        {"label": call, "floor_name": FLOOR, "floor_seconds": floor, **compared(seconds)}
        for call, seconds in found.items()
    ]
    for case in cases:
        before, now = (1e3 * case["median_seconds"][name] for name in builds)
        low, high = case["ratio_interval"]
        ratio = f"{case['ratio']:.3f} of before, {low:.3f} to {high:.3f}"
        print(f"{case['label']:51}{before:10.3f} ms -> {now:10.3f} ms, {ratio}")
    if options.json:
        machine = {**records.versions(), "cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        setting = {**settings, **machine, "repeats": options.repeats}
        how = {"fill": options.fill, "cpu_time": options.cpu_time}
        versions = {name: build.versions for name, build in builds.items()}
        report.write_json(options.json, {**setting, **how, "builds": versions, "cases": cases})
    return 0


if __name__ == "__main__":
    raise SystemExit("the command is python -m benchmarks builds")
