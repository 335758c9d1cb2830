"""Peak memory of one call: by how much it grows the resident set of a process that does nothing else (Linux).

`peak_bytes` starts that process, which is this module. `tensor_bytes` counts torch's tensors alone, in any process.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import dam
from dam.benchmarks import harness
from dam.benchmarks.against import Against, load

_MISSING = "peak memory is measured on Linux only"


def peak_bytes(op: str, case: int, name: str, dtype: str, threads: int, sizes: dict[str, int]) -> int:
    """Bytes by which one call of a function of the op's case grows the peak resident set.

    Raises:
        RuntimeError: it could not be measured; the message says why.
    """
    job = json.dumps({"op": op, "case": case, "name": name, "dtype": dtype, "threads": threads, "sizes": sizes})
    done = subprocess.run(
        [sys.executable, "-m", "dam.benchmarks.memory", job],
        capture_output=True,
        text=True,
        cwd=Path(dam.__file__).parents[1],
        env=environment(),
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with status {done.returncode}")
    return int(done.stdout)


def environment() -> dict[str, str]:
    """Of a process whose memory is measured.

    A fixed threshold: glibc raises its own when large blocks are freed, and keeps what is freed from then on.
    """
    found = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]  # modules of the user's own
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "PYTHONPATH": os.pathsep.join(found)}


class Peak:
    """Context manager: by how much the resident set of this process grows within it, at its peak: `grown`, bytes.

    Raises:
        OSError: it is not to be had.
    """

    grown = 0

    def __enter__(self) -> Peak:
        try:
            # The peak from now on. ru_maxrss cannot be set back, and starts at the peak of what started the process.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError as error:
            raise OSError(_MISSING) from error
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.grown = max(_resident("VmHWM") - self._before, 0)


def tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes of torch's tensors on the CPU that a call has at once beyond what there was, its results among
    them: by the profiler's record, the same whatever the allocator keeps.
    """
    gc.collect()  # else what others left behind may be freed meanwhile, and counted against the call
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = function()
    finally:
        gc.enable()
    total = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    del result
    return most


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise OSError(_MISSING)
    return 1024 * int(match[1])


def _measure(op: str, case: int, name: str, dtype: str, threads: int, sizes: dict[str, int]) -> int:
    torch.set_num_threads(threads)
    cases = harness.cases_of(op)
    # Libraries and threads are loaded by the first call of anything.
    _function(harness.tiny_cases(cases, getattr(torch, dtype))[case], name)()
    function = _function(cases(getattr(torch, dtype), **sizes)[case], name)
    with Peak() as peak:
        result = function()
    del result
    return peak.grown


def _function(case: harness.Case, name: str) -> Callable[[], object]:
    if name in case.functions:
        return case.functions[name]
    return Against(frozenset(), {name: load(name)}).of(case).functions[name]


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
