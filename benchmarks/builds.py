"""Two builds of the C++ backend side by side: python -m benchmarks builds BEFORE [--rows 512] [--dtype bfloat16].

BEFORE is a checkout of another commit whose extension was built there, by `python setup.py build_ext --inplace`. Each
build runs under its own checkout's Python code, in a process of its own that makes one public call when it is told to:
calls of the two alternate, in an order shuffled anew for every repeat.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkout, harness, records, report
from dam.backends import cpu

FLOOR = "plain read of the logits"


class Build:
    """A process that makes the calls of one checkout.

    Raises:
        FileNotFoundError: the checkout has no extension.
        RuntimeError: its process does not start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        path = folder / "dam" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: build it there first")
        worker = Path(__file__).with_name("build_worker.py")
        command = [sys.executable, str(worker), str(folder), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first = self._answer()
        self.calls: list[str] = json.loads(first)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("a build's process ended; what it said is above")
        return line

    def seconds(self, call: str) -> float:
        """Of one call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


def measure(builds: dict[str, Build], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each call by each build; of two calls in a row the second counts, as caches then hold alike."""
    names = next(iter(builds.values())).calls
    seconds: dict[str, dict[str, list[float]]] = {name: {build: [] for build in builds} for name in names}
    order, shuffle = [(name, build) for name in names for build in builds], random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name, build in order:
            builds[build].seconds(name)
            seconds[name][build].append(builds[build].seconds(name))
    return {name: {b: statistics.median(times) for b, times in of.items()} for name, of in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks builds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout of the other commit, built in place")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the medians")
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("rows", "vocabulary", "dtype", "threads")}
    print(f"T = {options.rows}, V = {options.vocabulary}, {options.dtype}, medians of {options.repeats}")
    builds: dict[str, Build] = {}
    try:
        for name, folder in (("before", options.before), ("dam", checkout.ROOT)):
            builds[name] = Build(folder, settings)
        medians = measure(builds, options.repeats)
    finally:
        for build in builds.values():
            build.close()
    floor = medians[FLOOR]["dam"]
    for call, seconds in medians.items():
        before, now = seconds["before"], seconds["dam"]
        print(f"{call:32}{1e3 * before:10.3f} ms -> {1e3 * now:10.3f} ms, {now / before:.3f} of before")
    if options.json:
        setting = {**settings, **records.versions(), "instruction_set": cpu.isa(), "repeats": options.repeats}
        cases = [
            {"label": call, "floor_name": FLOOR, "floor_seconds": floor, "median_seconds": seconds}
            for call, seconds in medians.items()
        ]
        report.write_json(options.json, {**setting, "cases": cases})
    return 0


if __name__ == "__main__":
    raise SystemExit("the command is python -m benchmarks builds")
