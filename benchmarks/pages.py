"""What new memory costs, in pages of 4 KiB and of 2 MiB, soon and long after it was given back.

    python -m benchmarks.pages [--megabytes 256] [--json FILE]

Maps memory, writes all of it and unmaps it, after each of some waits. Linux only. Where a virtual machine gives free
memory back to its host (`dam._cpu.memory_goes_back()`), pages of 2 MiB cost many times more after some seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import time
from pathlib import Path

from dam.benchmarks import records, report

WAITS = (0.0, 0.5, 3.0, 6.0)  # seconds


def milliseconds(nbytes: int, large: bool) -> float:
    """Of writing to memory that is mapped anew; pages of 2 MiB are asked for if `large`."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large:
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = (ctypes.c_char * nbytes).from_buffer(memory)
    start = time.perf_counter()
    ctypes.memset(view, 1, nbytes)
    took = 1e3 * (time.perf_counter() - start)
    del view
    memory.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for wait in WAITS:
            for large in (False, True):
                time.sleep(wait)
                name = f"{'2 MiB' if large else '4 KiB'}, {wait:g} s later"
                found.setdefault(name, []).append(milliseconds(args.megabytes * 2**20, large))
    for name, took in found.items():
        print(f"{name}: {', '.join(f'{x:.0f}' for x in took)} ms")
    if args.json:
        setting = {"megabytes": args.megabytes, "repeats": args.repeats, "cpu": report.cpu_model()}
        goes_back = importlib.import_module("dam._cpu").memory_goes_back()
        report.write_json(
            args.json, {**records.versions(), **setting, "memory_goes_back": goes_back, "milliseconds": found}
        )


if __name__ == "__main__":
    main()
