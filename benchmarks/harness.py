"""What the benchmarks share: a case, how it is measured, and random inputs.

A file bench_<op>.py defines `cases(dtype, *, sizes...)`, the comparisons of one op on fresh random inputs; its
keyword arguments are the sizes that `options` can set, with the defaults of the published tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dam.backends import cpu

SHORT = 0.1  # seconds; a function that takes less runs once more, untimed, before each timed call
SLOW = 20.0  # seconds; a peer that needs longer for its first call is stopped, and absent
COMPILES = 60.0  # seconds; the same of one that its first call compiles
_HAS_ALARM = hasattr(signal, "setitimer")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class Case:
    """Functions of the same inputs, to be called alternately."""

    label: str
    floor_name: str
    floor: Callable[[], object]  # what no implementation can undercut: reading the inputs, or the bare matmuls
    functions: dict[str, Callable[[], object]]  # "dam" first, then what it is measured against
    compiled: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)  # likewise, by torch.compile
    on_gpu: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)  # likewise, where there is a GPU
    reads: tuple[Tensor, ...] = ()  # inputs that any implementation must read from memory, as often as it must


@dataclasses.dataclass
class Measurement:
    """What a case took: seconds of its floor and of each function, and why the others are absent."""

    label: str
    floor_name: str
    median_seconds: dict[str, float]
    absent: dict[str, str]
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # by which one call grew the resident set


def ops() -> list[str]:
    """Names of the ops that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def cases_of(op: str) -> Callable[..., list[Case]]:
    return importlib.import_module(f"benchmarks.bench_{op}").cases


def sizes_of(cases: Callable[..., list[Case]]) -> dict[str, int]:
    """The sizes that a benchmark has, and their defaults."""
    parameters = inspect.signature(cases).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def tiny_cases(cases: Callable[..., list[Case]], dtype: torch.dtype) -> list[Case]:
    """The same cases at sizes of next to nothing: for their names, and to load what a first call loads."""
    return cases(dtype, **{name: min(size, 8) for name, size in sizes_of(cases).items()})


class Timer:
    """How long calls take, by the clock of the CPU that runs them."""

    short = SHORT

    def first(self, function: Callable[[], object]) -> float:
        """Seconds until the results of a call are there, with all that it has to load or compile."""
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of a call whose function has run before."""
        return self.first(function)

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds of a call, of a short one right after another."""
        took = self.once(function)
        # What the one before has just freed, gigabytes with some peers, the system is clearing for a while.
        return took if took >= self.short else self.once(function)


def measure(
    case: Case, repeats: int, *, peers: bool = True, compiled: bool = True, timer: Timer | None = None
) -> Measurement:
    """Median seconds of the floor and of each function, called alternately, after one call each to warm up.

    Alternately, so that a machine which is slow for a while is slow for all of them. A function that fails its first
    call, or takes very long, is absent with its reason; the floor and dam must not fail, and may take as long as they
    need. Without peers nothing disturbs these two: what others have just freed the system may be clearing for a while.
    """
    timer = timer or Timer()
    functions = {case.floor_name: case.floor, **case.functions, **case.compiled}
    absent = {} if compiled else dict.fromkeys(case.compiled, "left out: --no-compiled")
    if not peers:
        absent = {name: "left out: --no-peers" for name in functions if name not in (case.floor_name, "dam")}
    for name in absent:
        del functions[name]
    for name, function in list(functions.items()):
        required = name in (case.floor_name, "dam")
        limit = math.inf if required else COMPILES if name in case.compiled else SLOW
        try:
            with stopped_after(limit):
                took = timer.first(function)
            if took > limit:
                raise TimeoutError(f"its first call took {took:.0f} s")
        except Exception as error:
            if required:
                raise
            absent[name] = reason(error)
            del functions[name]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(timer(functions[name]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Measurement(case.label, case.floor_name, medians, absent)


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, as soon as it returns to Python; only in the main thread, and where the
    system has such signals.
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread() or not _HAS_ALARM:
        yield
        return

    def stop(*arguments: object) -> None:
        raise TimeoutError(f"its first call took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def tensors(result: object) -> list[Tensor]:
    """All tensors of a function's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def reading(*tensors: Tensor) -> Callable[[], object]:
    """The floor of an op that must see all of its inputs: a plain read of these very tensors, which are contiguous."""

    def read() -> None:
        for x in tensors:
            cpu.kernels.read(x.data_ptr(), x.nbytes // 8, torch.get_num_threads())

    return read


def normal(rows: int, columns: int, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """Random: zeros are multiplied and raced faster. Filled in place, since inputs can be gigabytes."""
    return torch.empty(rows, columns, dtype=dtype).normal_(std=scale)


def logits(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return normal(rows, vocabulary, dtype, scale=3.0)


def head(hidden: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """A head [V, D] that makes logits of the same spread out of standard normal hidden states."""
    return normal(vocabulary, hidden, dtype, scale=3.0 / hidden**0.5)


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> Sequence[Tensor]:
    """Forward and backward of a scalar loss: its gradients in `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def bare_matmuls(
    states: Tensor,  # [T, D]
    head: Tensor,  # [V, D]
    *,
    logits: int,
    states_gradient: bool = False,
    head_gradient: bool = False,
) -> tuple[str, Callable[[], object]]:
    """The floor of an op on a head, its name first: torch.mm of its shapes.

    Logits go into memory that is there already; gradients, which the op must return, into new arrays.

    On a CPU in float32, but bfloat16 where there are instructions for it: without these torch takes many times as long
    for 16-bit products, which would be no floor.

    Args:
        logits: how often the logits of all rows are computed.
        states_gradient, head_gradient: whether the logits' gradient is carried on to either.
    """
    if states.device.type == "cpu" and not cpu.is_fast(states.dtype):
        states, head = states.float(), head.float()
    product = states.new_empty(states.shape[0], head.shape[0])
    count, dtype = logits + states_gradient + head_gradient, str(states.dtype).removeprefix("torch.")

    def multiply() -> None:
        for _ in range(logits):
            torch.mm(states, head.t(), out=product)
        if states_gradient:
            torch.mm(product, head)
        if head_gradient:
            torch.mm(product.t(), states)

    return (f"bare matmul in {dtype}" if count == 1 else f"{count} bare matmuls in {dtype}"), multiply
