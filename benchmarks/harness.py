"""What the benchmarks share: a case, how it is measured, and random inputs.

A file bench_<op>.py defines `cases(dtype, *, sizes...)`, the comparisons of one op on fresh random inputs; its
keyword arguments are the sizes that `options` can set, with the defaults of the published tables. What is compared is
called with the same inputs by name, and `correct` says whether it computes what it should.
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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.backends import cpu

SHORT = 0.1  # seconds; a function that takes less runs once more, untimed, before each timed call
SLOW = 20.0  # seconds; a peer that needs longer for its first call is stopped, and absent
COMPILES = 60.0  # seconds; the same of one that its first call compiles
_HAS_ALARM = hasattr(signal, "setitimer")
YOURS = "yours"
DTYPES = ("float32", "bfloat16", "float16")


class Check(NamedTuple):
    """How far a result is from what it should be."""

    what: str
    error: float  # by which functions are compared: relative, or a distance
    share: float  # of what is allowed, which may differ from number to number: the largest; at most 1 if it is right
    arithmetic: str = ""  # whose rounding is allowed, where it is not that of float32

    @property
    def passed(self) -> bool:
        return self.share <= 1.0  # not for NaN

    def __str__(self) -> str:
        by = f" in {self.arithmetic}" if self.arithmetic else ""
        word = "ok" if self.passed else "WRONG"
        return f"{word}: {self.what}: error {self.error:.2e}, {self.share:.3g} times what is allowed{by}"


def fingerprint(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Of each tensor the sum of its bits: another after it was written over."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(x.view(integers[x.element_size()]).sum(dtype=torch.int64))
        for name, x in inputs.items()
        if isinstance(x, Tensor)
    }


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of some inputs, called without an argument: forward, or forward and backward for its gradients.

    A function whose gradients are asked for returns what autograd can differentiate, summed if it is no scalar; or a
    tuple of that and its gradients in `wrt`, which it formed itself.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, Any]  # by the names that the function has for them
    wrt: tuple[str, ...] = ()  # those in which gradients are asked for
    groups: tuple[str, ...] = ()  # of `peers.GROUPS`, by which it is chosen; YOURS of a user's own
    passed: tuple[str, ...] = ()  # those that it takes; none: all
    overwrites: str = ""  # the one that it writes over, of which it has a copy of its own
    check: Callable[[Call], Sequence[Check]] | None = None  # in the place of its case's
    own: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False)

    def __call__(self) -> object:
        """Its result, or its gradients."""
        return self.with_gradients()[1] if self.wrt else self.function(**self._arguments())

    def with_gradients(self) -> tuple[Any, Sequence[Tensor]]:
        """Its result, and its gradients in `wrt`."""
        arguments = self._arguments()
        if not self.wrt:
            return self.function(**arguments), ()
        leaves = [arguments[name].detach().requires_grad_() for name in self.wrt]
        found = self.function(**arguments | dict(zip(self.wrt, leaves, strict=True)))
        if isinstance(found, (tuple, list)) and len(found) == 1 + len(self.wrt):
            return found[0], found[1:]
        return found, torch.autograd.grad(found if found.ndim == 0 else found.sum(), leaves)

    def anew(self) -> Call:
        """The same, of inputs that it has not written over yet."""
        return dataclasses.replace(self, own={})

    def _arguments(self) -> dict[str, Any]:
        given = {name: self.inputs[name] for name in self.passed} if self.passed else dict(self.inputs)
        if self.overwrites:  # copied when it is first called: a peer that never is needs no memory
            if not self.own:
                self.own[self.overwrites] = given[self.overwrites].clone()
            given |= self.own
        return given


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every function of a case gets, by name."""

    given: Mapping[str, Any]
    wrt: tuple[str, ...] = ()

    def call(
        self,
        function: Callable[..., Any],
        *groups: str,
        takes: tuple[str, ...] = (),
        overwrites: str = "",
        check: Callable[[Call], Sequence[Check]] | None = None,
        **others: Any,
    ) -> Call:
        """`function` of them; of `others` in their place, of those that it `takes` if it does not take all."""
        return Call(function, {**self.given, **others}, self.wrt, groups, takes, overwrites, check)


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
    inputs: Inputs | None = None  # of another's function; None: the case takes none
    check: Callable[[Call], Sequence[Check]] | None = None  # of `correct`: what a function computes, against float64

    def checked(self, function: Callable[[], object]) -> Sequence[Check]:
        """What a function of the case computes, against float64; nothing of a floor."""
        if not isinstance(function, Call):
            return ()
        check = function.check or self.check
        return () if check is None else check(function.anew())

    def groups(self) -> dict[str, list[str]]:
        """Of every function, by name."""
        every = {**self.functions, **self.compiled}
        return {name: list(f.groups) if isinstance(f, Call) else [] for name, f in every.items()}

    def yours(self) -> list[str]:
        """Names of the functions that are the user's own."""
        return [name for name, groups in self.groups().items() if YOURS in groups]


@dataclasses.dataclass
class Measurement:
    """What a case took: seconds of its floor and of each function, and why the others are absent."""

    label: str
    floor_name: str
    median_seconds: dict[str, float]
    absent: dict[str, str]
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # by which one call grew the resident set
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by function, and what was compared
    arithmetic: dict[str, str] = dataclasses.field(default_factory=dict)  # of functions that are right in 16 bits only
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)  # functions that are not timed, and their error


def ops() -> list[str]:
    """Names of the ops that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def cases_of(op: str) -> Callable[..., list[Case]]:
    return importlib.import_module(f"dam.benchmarks.bench_{op}").cases


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
    case: Case,
    repeats: int,
    *,
    peers: bool = True,
    compiled: bool = True,
    timer: Timer | None = None,
    checked: bool = False,
) -> Measurement:
    """Median seconds of the floor and of each function, called alternately, after one call each to warm up.

    Alternately, so that a machine which is slow for a while is slow for all of them. A function that fails its first
    call, or takes very long, is absent with its reason; the floor and dam must not fail, and may take as long as they
    need. Without peers nothing disturbs these two: what others have just freed the system may be clearing for a while.

    Args:
        checked: compare what each function computes with float64 first; one that is wrong is not timed.

    Raises:
        ArithmeticError: dam's own result is wrong.
        ValueError: a function writes over its inputs, which are those of the others too.
    """
    timer = timer or Timer()
    kept = fingerprint(case.inputs.given) if checked and case.inputs is not None else {}
    functions = {case.floor_name: case.floor, **case.functions, **case.compiled}
    absent = {} if compiled else dict.fromkeys(case.compiled, "left out: --no-compiled")
    if not peers:
        absent = {name: "left out: --no-peers" for name in functions if name not in (case.floor_name, "dam")}
    for name in absent:
        del functions[name]
    measured = Measurement(case.label, case.floor_name, {}, absent)
    for name, function in list(functions.items()):
        required = name in (case.floor_name, "dam")
        limit = math.inf if required else COMPILES if name in case.compiled else SLOW
        try:
            with stopped_after(limit):
                took = timer.first(function)
            if took > limit:
                raise TimeoutError(f"its first call took {took:.0f} s")
            if checked and (found := case.checked(function)):
                measured.errors[name] = {one.what: one.error for one in found}
                if by := [one.arithmetic for one in found if one.arithmetic and one.passed]:
                    measured.arithmetic[name] = by[0]
                if bad := [str(one) for one in found if not one.passed]:
                    measured.wrong[name] = "; ".join(bad)
        except Exception as error:
            if required:
                raise
            absent[name] = explained(error) if name in case.yours() else reason(error)
            del functions[name]
        if kept and case.inputs is not None and (now := fingerprint(case.inputs.given)) != kept:
            written = ", ".join(given for given in kept if now[given] != kept[given])
            raise ValueError(f"{name} writes over {written}, an input of all functions: let it work on a copy")
    if "dam" in measured.wrong:
        raise ArithmeticError(f"{case.label}: dam is not measured: {measured.wrong['dam']}")
    for name in measured.wrong:
        del functions[name]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(timer(functions[name]))
    measured.median_seconds |= {name: statistics.median(values) for name, values in seconds.items()}
    return measured


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


def explained(error: Exception) -> str:
    """An error with the line of the user's code that it came from: the last that is neither a library's nor ours."""
    libraries = (Path(torch.__file__).parents[1], Path(__file__).resolve().parents[1], Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file()
        and not any(folder in Path(frame.filename).resolve().parents for folder in libraries)
        and Path(importlib.__file__).parent not in Path(frame.filename).parents
    ]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {reason(error)}"
    if not frames:
        return reason(error)
    last = frames[-1]
    return f"{last.filename}:{last.lineno} in {last.name}: {last.line}: {reason(error)}"


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
