"""Where `benchmarks.gpu` runs, and how it times: a GPU, by its own clock; or the CPU, to try it without one."""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import dam
from dam.backends import choice
from dam.benchmarks import harness
from dam.kernels import configs

Function = Callable[[], object]

COPY = "copy of as many bytes"  # a floor

SHORT_CALL = 2e-3  # seconds; below it what a call costs besides its kernels is measured too
COPIED_AT_ONCE = 2**28  # words; many times a cache, and little enough to have beside the inputs


class Machine(harness.Timer):
    """The CPU. Kernels run in Triton's interpreter there, so its times say nothing of the kernels."""

    device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        """What tells this machine and its software from others."""
        return {"gpu": configs.device_name(self.device)}

    def peak_bytes(self, function: Function) -> int | None:
        """Bytes by which one call raises the most that was allocated at a time, its results included."""
        return None

    def parts(self, function: Function) -> dict[str, float | bool | str]:
        """More figures of a short call, or for each the reason why there is none."""
        return {}

    def waits(self, function: Function) -> bool:
        """Whether the call waits for the GPU, to look at a result."""
        return False

    def graph_seconds(self, functions: Sequence[Function]) -> float:
        """Seconds of each of the calls, one after another without the host: the median of replaying them as one CUDA
        graph.
        """
        return self.first(lambda: [function() for function in functions]) / len(functions)

    def free(self) -> None:
        """Gives back what nothing refers to any more."""
        gc.collect()

    def answers(self) -> bool:
        """Whether it can go on after an error."""
        return True


class Gpu(Machine):
    """The current GPU, timed by events around a call, which finds the L2 cache full of what it does not read."""

    device = torch.device("cuda")
    # Seconds. What a short call needs is taken from memory that the same call has just given back: to take it from the
    # system, or from what another function left, can last longer than the call.
    short = 0.02

    # A GPU that is busy for a millisecond has a call's launches queued when it comes to them, so that a call's time is
    # that of the GPU, unless the call waits for a result.
    _BUSY_CYCLES = 2_000_000

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(self.device)
        cache = getattr(self._properties, "L2_cache_size", 0) or 64 * 2**20
        self._other = torch.empty(cache, dtype=torch.float32, device=self.device).normal_()  # 4 times as large

    def first(self, function: Function) -> float:
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def once(self, function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._BUSY_CYCLES)
        self._displace()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _displace(self) -> None:
        # By reading: what is written to the cache would have to leave it while the next call is timed.
        self._other.sum()

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
        }

    def peak_bytes(self, function: Function) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def parts(self, function: Function) -> dict[str, float | bool | str]:
        found: dict[str, float | bool | str] = {}
        figures = (self.waits, self.kernel_seconds, self.replay_seconds, self.call_seconds)
        for figure in figures:
            try:
                if figure == self.replay_seconds and found["waits"] is not False:
                    raise RuntimeError("a call that waits for the GPU cannot be captured")
                found[figure.__name__] = figure(function)
            except Exception as error:
                found[figure.__name__] = harness.reason(error)
        return found

    def waits(self, function: Function) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def kernel_seconds(self, function: Function) -> float:
        """Seconds that the GPU's kernels and copies ran in one call, by the profiler."""
        self._displace()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        on_gpu = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and "Sync" not in e.name()]
        if not on_gpu:
            raise RuntimeError("the profiler saw no kernel")
        return sum(e.duration_ns() for e in on_gpu) / 1e9

    def replay_seconds(self, function: Function) -> float:
        """Median seconds of replaying the call as a CUDA graph."""
        return self.graph_seconds([function])

    def graph_seconds(self, functions: Sequence[Function]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in functions:
                function()  # what is set up by a first call on a stream must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for function in functions:
                function()
        return statistics.median(self(graph.replay) for _ in range(5)) / len(functions)

    def call_seconds(self, function: Function) -> float:
        """Seconds per call of 20 calls in a row, by the CPU's clock: what a loop that does nothing else takes."""
        return self.first(lambda: [function() for _ in range(20)]) / 20

    def free(self) -> None:
        super().free()
        with contextlib.suppress(RuntimeError):  # of a call that failed: `answers` tells
            torch.cuda.empty_cache()

    def answers(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def default_backend() -> str:
    """The backend that most operations on a GPU's tensors get, where none is asked for by name."""
    return next(name for name in choice.FAST["cuda"] if name == "triton" or choice.why_unavailable(name) is None)


def on_default(machine: Machine) -> contextlib.AbstractContextManager[None]:
    """What makes "dam" the default backend of a GPU's tensors, whatever the machine."""
    backend = default_backend()
    # Asked for by name Triton is an error where it is missing, rather than figures of the reference.
    by_default = machine.device.type == "cuda" and backend != "triton"
    return contextlib.nullcontext() if by_default else dam.backend(backend)


def copying(nbytes: int, device: torch.device) -> Function:
    """A copy that moves that many bytes, half of them read and half written; much at a time, if not all."""
    words = max(1, nbytes // 8)
    source = torch.empty(min(words, COPIED_AT_ONCE), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        for done in range(0, words, len(source)):
            part = slice(min(len(source), words - done))
            target[part].copy_(source[part])

    return copy


def bandwidths(machine: Machine, nbytes: int, repeats: int = 9) -> dict[str, float]:
    """Bytes per second of a large copy, counting what is read and what is written, and of reading alone."""
    copy = copying(2 * nbytes, machine.device)
    source = torch.empty(nbytes // 4, dtype=torch.float32, device=machine.device).normal_()

    def rate(moved: int, function: Function) -> float:
        machine.first(function)
        return moved / statistics.median(machine(function) for _ in range(repeats))

    copied = rate(2 * nbytes, copy)
    # A reduction slower than the copy is bound by something else than reading.
    return {"copy": copied, "read": max(copied, rate(nbytes, source.sum), rate(nbytes, source.amax))}
