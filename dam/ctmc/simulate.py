"""Trajectories of a chain whose rates depend on time and state, with the weights of their paths against a base.

A model is a function of tokens [B, L] and times [B] that gives numbers [B, L, V]; a process says what rates they mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dam.ops import _philox
from dam.ops._philox import Use
from dam.ops.jump import jump

Model = Callable[[Tensor, Tensor], Tensor]


class Process(Protocol):
    """What the simulators ask of a chain: `MaskedCTMC`, `UniformCTMC` and `LatticeCTMC` are such."""

    def log_rates(self, prediction: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """log u_t(y, x) of each jump of a coordinate to a value, [B, L, V], in any floating dtype.

        -inf where there is no such jump, as to the value that the coordinate has.

        Args:
            prediction: of the model at these states and times, [B, L, V].
            tokens: int64 [B, L], the states x.
            time: float64 [B].
        """

    def escape_bound(self, start: float, end: float, length: int) -> float:
        """What no state's escape rate exceeds on [start, end]: the sum of its rates over all `length` coordinates.

        A multiple of it, `bound`, is the rate at which `simulate` proposes events. An escape rate above that is an
        error, so a bound too low is noticed; one too high costs network calls and changes no law.
        """


@dataclasses.dataclass
class Path:
    """B trajectories, each of at most S events in the order of time; an event is a jump, or a time that passed.

    The log weight of a path, log p_base - log p, is the sum of log_ratio and escape_gap over its events, as
    `dam.adjoint_weights` takes them.
    """

    initial: Tensor  # int64 [B, L]
    final: Tensor  # int64 [B, L]
    time: Tensor  # float64 [B, S]: of each event, +inf where a trajectory had fewer
    position: Tensor  # int64 [B, S]: coordinate that jumped, -1 for none
    token: Tensor  # int64 [B, S]: where it went, -1 for none
    log_ratio: Tensor  # float64 [B, S]: log u_base - log u at jumps, 0 elsewhere
    escape_gap: Tensor  # float64 [B, S]: of times that passed without a jump, 0 elsewhere
    network_calls: int  # states that the model was evaluated at


@torch.no_grad()
def simulate(
    process: Process,
    model: Model,
    tokens: Tensor,  # [B, L]
    *,
    times: Sequence[float] | Tensor,
    base: Model | None = None,
    bound: float = 1.0,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Path:
    """Exact trajectories: events at a rate that the escape rate never exceeds, each a jump or a thinned one.

    In each interval of `times` events arrive at rate M = bound * process.escape_bound(...). At an event the chain jumps
    with probability Lambda_t(x) / M, to y with probability u_t(y, x) / Lambda_t(x), and else stays: Gillespie's
    algorithm by thinning, and with rates that are constant in an interval uniformisation. The law does not depend on
    M or on the intervals, which only decide how many events are thinned.

    The path's weight is unbiased: a jump contributes log(u_base / u), an event that was thinned
    log(M - Lambda_base) - log(M - Lambda), the escape integral's stand-in, whose exponential has for its mean over the
    thinned events that of the integral of Lambda - Lambda_base. It weighs the path with its thinned events: so weights
    spread more, and KL estimates come out larger, than the chain's own, by what falls as `bound` grows.

    Args:
        process: names rates and their bound.
        model: gives what the process makes rates of; called at the states and times of the events.
        tokens: int64 X at the first of the times.
        times: increasing, at least two.
        base: the model that paths are weighed against; None leaves log_ratio and escape_gap 0.
        bound: multiplies the process's bound, for models whose rates may pass it (those that predict ratios).
        seed: of times, thinning and jumps: a trajectory depends on (seed, row id) and its rates only, not on the batch.
        row_ids: int64 [B], names each trajectory's stream; 0 .. B-1 unless given.

    Raises:
        ValueError, TypeError: times do not increase; row_ids have another shape or dtype; or rates are NaN, infinite,
            or pass the bound: the message names the state and the time.

    Source: Lewis and Shedler, Simulation of nonhomogeneous Poisson processes by thinning, 1979; uniformisation:
    Jensen, 1953; weights: So et al., arXiv 2602.07132, Eq. 12.
    """
    grid = increasing("simulate", times)
    count, length = _checked("simulate", tokens)
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    path = _Recorder(tokens)
    for interval, (start, end) in enumerate(itertools.pairwise(grid)):
        rate = bound * process.escape_bound(start, end, length)
        if not 0 <= rate < float("inf"):
            raise ValueError(
                f"simulate: the bound of escape rates on [{start:g}, {end:g}] is {rate}; end before rates are infinite"
            )
        arrival = _arrivals(rate, start, end, seed, row_ids, interval)
        events = (arrival < end).sum(dim=1)
        most = int(events.max()) if count else 0
        thinned = _philox.uniform(seed, Use.THINNING, row_ids, most, sample=interval)
        jump_ids = _philox.ids(seed, Use.JUMP, row_ids, most, sample=interval)
        for n in range(most):
            rows = (events > n).nonzero()[:, 0]
            state, time = path.final[rows], arrival[rows, n]
            log_rates = checked_log_rates(process, model, state, time).flatten(1)
            log_escape = torch.logsumexp(log_rates, dim=1)
            _below("model", log_escape, rate, state, time)
            jumps = thinned[rows, n] * rate < log_escape.exp()
            drawn = torch.full_like(rows, -1)
            drawn[jumps] = _destination(log_rates[jumps], seed, jump_ids[rows[jumps], n])
            log_ratio, escape_gap = torch.zeros_like(time), torch.zeros_like(time)
            if base is not None:
                base_rates = checked_log_rates(process, base, state, time).flatten(1)
                base_escape = torch.logsumexp(base_rates, dim=1)
                _below("base", base_escape, rate, state, time)
                at = drawn[:, None].clamp(min=0)  # -1 where there is no jump
                log_ratio = torch.where(jumps, (base_rates.gather(1, at) - log_rates.gather(1, at))[:, 0], 0.0)
                # A chain that jumps at every event has no thinned ones, so that no logarithm of 0 is used.
                gap = (1 - base_escape.exp() / rate).log() - (1 - log_escape.exp() / rate).log()
                escape_gap = torch.where(jumps, 0.0, gap)
            values = log_rates.shape[1] // length
            path.record(rows, time, jumps, drawn // values, drawn % values, log_ratio, escape_gap)
    return path.finish()


@torch.no_grad()
def tau_leap(
    process: Process,
    model: Model,
    tokens: Tensor,  # [B, L]
    *,
    times: Sequence[float] | Tensor,
    base: Model | None = None,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Path:
    """Trajectories whose rates stay what they are at the start of each interval, every coordinate by itself.

    In an interval of length d a coordinate stays with probability exp(-Lambda^i d), else moves once, to v with
    probability u(v) / Lambda^i. One network call an interval, whatever happens in it: a chain in discrete time, whose
    law tends to the exact one as the intervals shrink, and whose path weights against the base's, sampled the same way,
    are exact at any length.

    Arguments and errors are those of `simulate`; nothing is thinned, so there is no bound. Events are one per
    coordinate and interval.

    Source: Gillespie, Approximate accelerated stochastic simulation of chemically reacting systems, 2001.
    """
    grid = increasing("tau_leap", times)
    count, length = _checked("tau_leap", tokens)
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    path = _Recorder(tokens)
    rows = torch.arange(count, device=tokens.device)
    for interval, (start, end) in enumerate(itertools.pairwise(grid)):
        duration = end - start
        time = torch.full((count,), start, dtype=torch.float64, device=tokens.device)
        state = path.final.clone()
        log_rates = checked_log_rates(process, model, state, time)
        log_escape = torch.logsumexp(log_rates, dim=2)  # [B, L]
        u = _philox.uniform(seed, Use.THINNING, row_ids, length, sample=interval)
        jumps = u < -torch.expm1(-duration * log_escape.exp())
        jumping = jumps.flatten().nonzero()[:, 0]
        drawn = torch.full((count * length,), -1, dtype=torch.int64, device=tokens.device)
        jump_ids = _philox.ids(seed, Use.JUMP, row_ids, length, sample=interval).flatten()
        drawn[jumping] = _destination(log_rates.flatten(0, 1)[jumping], seed, jump_ids[jumping])
        drawn = drawn.view(count, length)
        log_ratio, escape_gap = (torch.zeros((count, length), dtype=torch.float64, device=u.device) for _ in range(2))
        if base is not None:
            base_rates = checked_log_rates(process, base, state, time)
            base_escape = torch.logsumexp(base_rates, dim=2)
            at = drawn[..., None].clamp(min=0)

            def log_jump(rates: Tensor, log_total: Tensor, at: Tensor = at, duration: float = duration) -> Tensor:
                moved = (-torch.expm1(-duration * log_total.exp())).log()
                rate = rates.gather(2, at)[..., 0]
                return torch.where(rate == -torch.inf, rate, rate - log_total + moved)  # not -inf + inf

            log_ratio = torch.where(jumps, log_jump(base_rates, base_escape) - log_jump(log_rates, log_escape), 0.0)
            escape_gap = torch.where(jumps, 0.0, duration * (log_escape.exp() - base_escape.exp()))
        for i in range(length):
            coordinate = torch.full_like(rows, i)
            path.record(
                rows, time, jumps[:, i], coordinate, drawn[:, i], log_ratio[:, i], escape_gap[:, i], evaluated=i == 0
            )
    return path.finish()


def checked_log_rates(process: Process, model: Model, tokens: Tensor, time: Tensor) -> Tensor:
    """log u_t(y, x) of a model, float64 [B, L, V].

    Raises:
        ValueError: a rate is NaN or infinite; the message names the state and the time. Or the shape is another.
    """
    # float64 once and for all: sums, thinning and the recorded log ratios are in it, whatever the process gives.
    log_rates = process.log_rates(model(tokens, time), tokens, time).double()
    if log_rates.dim() != 3 or log_rates.shape[:2] != tokens.shape:
        raise ValueError(
            f"log_rates of {type(process).__name__} must give {[*tokens.shape, 'V']}; got {list(log_rates.shape)}"
        )
    bad = ~(log_rates < torch.inf)
    if bool(bad.any()):
        row, position, value = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"the rate of coordinate {position} to {value} is {float(log_rates[row, position, value].exp())} at state "
            f"{tokens[row].tolist()} and time {float(time[row]):g}; rates must be finite and not negative"
        )
    return log_rates


def _below(whose: str, log_escape: Tensor, rate: float, state: Tensor, time: Tensor) -> None:
    above = log_escape.exp() > rate
    if bool(above.any()):
        row = int(above.nonzero()[0])
        raise ValueError(
            f"simulate: the {whose}'s escape rate {float(log_escape[row].exp()):g} passes the bound {rate:g} at state "
            f"{state[row].tolist()} and time {float(time[row]):g}; raise `bound`"
        )


def _arrivals(rate: float, start: float, end: float, seed: int, row_ids: Tensor, interval: int) -> Tensor:
    """Times of events of a Poisson process on [start, end) for each row, in order, float64 [B, S]; S is enough."""
    mean = rate * (end - start)
    count = int(mean + 6 * math.sqrt(mean)) + 8  # rarely too few
    while True:
        gaps = _philox.exponentials(seed, Use.ARRIVAL, row_ids, count, sample=interval)
        # A chain that does not move has no events.
        times = start + gaps.cumsum(dim=1) / rate if rate > 0 else torch.full_like(gaps, torch.inf)
        if not len(times) or bool((times[:, -1] >= end).all()):
            return times
        count *= 2


def _destination(log_rates: Tensor, seed: int, row_ids: Tensor) -> Tensor:
    """A column of each row, in proportion to the rates; -1 for a row without any."""
    return jump(log_rates.float(), seed=seed, row_ids=row_ids, check=False).target


def _checked(op: str, tokens: Tensor) -> tuple[int, int]:
    """B and L of int64 tokens [B, L]."""
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"{op}: tokens must be int64 [B, L]; got {tokens.dtype} {list(tokens.shape)}")
    return tokens.shape[0], tokens.shape[1]


def increasing(op: str, times: Sequence[float] | Tensor) -> list[float]:
    grid = [float(t) for t in times]
    if len(grid) < 2 or any(not a < b for a, b in itertools.pairwise(grid)):
        raise ValueError(f"{op}: times must increase, and be at least two; got {grid[:4]}{'...' if grid[4:] else ''}")
    return grid


class _Recorder:
    """Events of trajectories as they happen, packed at the end."""

    def __init__(self, tokens: Tensor):
        self.initial, self.final = tokens.clone(), tokens.clone()
        self._evaluated = 0
        self._events: list[tuple[Tensor, ...]] = []

    def record(
        self,
        rows: Tensor,
        time: Tensor,
        jumps: Tensor,
        position: Tensor,
        token: Tensor,
        log_ratio: Tensor,
        escape_gap: Tensor,
        evaluated: bool = True,
    ) -> None:
        """An event of each of the rows; with `evaluated`, the model was evaluated for it."""
        self.final[rows[jumps], position[jumps]] = token[jumps]
        none = torch.full_like(position, -1)
        self._events.append(
            (rows, time, torch.where(jumps, position, none), torch.where(jumps, token, none), log_ratio, escape_gap)
        )
        if evaluated:
            self._evaluated += len(rows)

    def finish(self) -> Path:
        count = len(self.initial)
        length = torch.zeros(count, dtype=torch.int64, device=self.initial.device)
        for rows, *_ in self._events:
            length[rows] += 1
        shape = (count, int(length.max()) if count else 0)

        def empty(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.initial.device)

        time, position, token = empty(torch.inf, torch.float64), empty(-1, torch.int64), empty(-1, torch.int64)
        log_ratio, escape_gap = empty(0.0, torch.float64), empty(0.0, torch.float64)
        columns = (time, position, token, log_ratio, escape_gap)
        at = torch.zeros_like(length)
        for rows, *values in self._events:
            for column, value in zip(columns, values, strict=True):
                column[rows, at[rows]] = value
            at[rows] += 1
        return Path(self.initial, self.final, *columns, self._evaluated)
