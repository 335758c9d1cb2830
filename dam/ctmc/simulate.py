"""Trajectories of a chain whose rates depend on time and state, with the weights of their paths against a base.

A model is a function of tokens [B, L] and times [B] that gives numbers [B, L, V]; a process says what rates they mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dam.ops import _checks, _philox
from dam.ops._philox import Use
from dam.ops.jump import jump
from dam.ops.rate_ratio import rate_ratio

Model = Callable[..., Tensor]


class Process(Protocol):
    """What the simulators ask of a chain whose jumps each set a coordinate to a value.

    `MaskedCTMC`, `UniformCTMC` and `LatticeCTMC` are such.
    """

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


class Jumps(Protocol):
    """The jumps out of B states at their times, J out of each: all that a step of `simulate` or `gillespie` needs."""

    def log_rates(self, model: Model) -> Tensor:
        """log rates under a model, float64 [B, J], -inf where there is no such jump.

        Raises:
            ValueError: a rate is NaN or infinite.
        """

    def destination(self, jump: Tensor) -> Tensor:
        """States that jumps int64 [B] lead to, int64 [B, L]; -1 stays."""

    def named(self, jump: Tensor) -> tuple[Tensor, Tensor]:
        """`position` and `token` of `Path`, int64 [B] each, -1 for none."""


@runtime_checkable
class ProcessOfJumps(Protocol):
    """A chain that says itself what its jumps are: `MovesCTMC` is such. Its paths have the states of their events."""

    def jumps(self, tokens: Tensor, time: Tensor) -> Jumps:
        """Those out of states int64 [B, L] at times float64 [B]."""

    def escape_bound(self, start: float, end: float, length: int) -> float:
        """As for `Process`."""


@dataclasses.dataclass
class Path:
    """B trajectories, each of at most S events in the order of time; an event is a jump, or a time that passed.

    The log weight of a path, log p_base - log p, is the sum of log_ratio and escape_gap over its events, as
    `dam.adjoint_weights` takes them. The sum over events of exposure f(state, time) is the integral of f along the
    path, of `simulate` an estimate of it without bias, and of `tau_leap` the integral for each coordinate.
    """

    initial: Tensor  # int64 [B, L]
    final: Tensor  # int64 [B, L]
    time: Tensor  # float64 [B, S]: at which each event's rates were taken, +inf where a trajectory had fewer
    position: Tensor  # int64 [B, S]: coordinate that jumped, or number of the move that was made; -1 for none
    token: Tensor  # int64 [B, S]: where a coordinate went, -1 for none and for moves
    log_ratio: Tensor  # float64 [B, S]: log u_base - log u at jumps, 0 elsewhere
    escape_gap: Tensor  # float64 [B, S]: of the time that passed, 0 at jumps but of `gillespie`
    exposure: Tensor  # float64 [B, S]: time that an event stands for, 0 where a trajectory had fewer
    network_calls: int  # states that the model was evaluated at
    state: Tensor | None = None  # int64 [B, S, L]: before each event, of a `ProcessOfJumps`
    thinned: bool = False  # of `simulate`: the time between events is not in it, exposures stand in for it


@torch.no_grad()
def simulate(
    process: Process | ProcessOfJumps,
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
    grid = _checks.increasing("simulate", times)
    count, length = _checked("simulate", tokens)
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    path = _Recorder(tokens, isinstance(process, ProcessOfJumps))
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
            jumps = _jumps(process, state, time)
            log_rates = jumps.log_rates(model)
            log_escape = torch.logsumexp(log_rates, dim=1)
            _below("model", log_escape, rate, state, time)
            leaves = thinned[rows, n] * rate < log_escape.exp()
            drawn = torch.full_like(rows, -1)
            drawn[leaves] = _destination(log_rates[leaves], seed, jump_ids[rows[leaves], n])
            log_ratio, escape_gap = torch.zeros_like(time), torch.zeros_like(time)
            if base is not None:
                base_rates = jumps.log_rates(base)
                base_escape = torch.logsumexp(base_rates, dim=1)
                _below("base", base_escape, rate, state, time)
                at = drawn[:, None].clamp(min=0)  # -1 where there is no jump
                log_ratio = torch.where(leaves, (base_rates.gather(1, at) - log_rates.gather(1, at))[:, 0], 0.0)
                # A chain that jumps at every event has no thinned ones, so that no logarithm of 0 is used.
                gap = (1 - base_escape.exp() / rate).log() - (1 - log_escape.exp() / rate).log()
                escape_gap = torch.where(leaves, 0.0, gap)
            exposure = torch.full_like(time, 1 / rate)
            path.record(rows, time, *jumps.named(drawn), log_ratio, escape_gap, exposure)
            path.final[rows] = jumps.destination(drawn)
    return dataclasses.replace(path.finish(), thinned=True)


@torch.no_grad()
def gillespie(
    process: Process | ProcessOfJumps,
    model: Model,
    tokens: Tensor,  # [B, L]
    *,
    times: Sequence[float] | Tensor,
    base: Model | None = None,
    first: Tensor | None = None,  # int64 [B]
    most_events: int = 10_000,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Path:
    """Exact trajectories of the chain whose rates in each interval of `times` are those of its middle.

    Gillespie's direct method: a state is left after a time that is exponential at its escape rate, for y with
    probability u(y, x) / Lambda(x); at the end of an interval, where rates change, the time left is drawn anew. No rate
    needs a bound, and the path's weight has the escape integral itself: a jump contributes log(u_base / u), a time d
    that passed (Lambda - Lambda_base) d. So the weights of a chain that is the optimum are constant, which those of
    `simulate` are not.

    As a function of time such rates differ from the model's own in second order of the intervals' length; this chain's
    law is that of `enumeration.law`, or `enumeration.MoveSpace.law`, with the same times.

    Args:
        process, model, tokens, times, base: as for `simulate`; both models have constant rates in an interval.
        first: the interval that each trajectory starts with, at its start; 0 unless given.
        most_events: a trajectory with more is an error, as of a model whose rates run away; below 2^24.
        seed: of times and jumps: a trajectory depends on (seed, row id) and its rates only, not on the batch.
        row_ids: int64 [B], names each trajectory's stream; 0 .. B-1 unless given.

    Returns:
        A path whose events are jumps and ends of intervals; `time` is the middle of the interval.

    Raises:
        ValueError, TypeError: times do not increase; first names no interval; most_events is out of range; row_ids have
            another shape or dtype; or rates are NaN, infinite, so large that float64 cannot tell events apart, or lead
            to more than most_events: the message names the state and the time.

    Source: Gillespie, Exact stochastic simulation of coupled chemical reactions, 1977; weights: So et al.,
    arXiv 2602.07132, Eq. 12.
    """
    edges = torch.tensor(_checks.increasing("gillespie", times), dtype=torch.float64, device=tokens.device)
    count, _ = _checked("gillespie", tokens)
    if not 1 <= most_events < _philox.MAX_SAMPLES:  # draws are keyed by the event
        raise ValueError(f"gillespie: most_events must be in 1 .. {_philox.MAX_SAMPLES - 1}; got {most_events}")
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    interval = _intervals(first, count, len(edges) - 1, tokens.device)
    now = edges[interval]
    path = _Recorder(tokens, isinstance(process, ProcessOfJumps))
    rows = torch.arange(count, device=tokens.device)
    event = 0  # every row that is left has one in each turn
    while len(rows):
        at, state = interval[rows], path.final[rows]
        time = (edges[at] + edges[at + 1]) / 2
        jumps = _jumps(process, state, time)
        log_rates = jumps.log_rates(model)
        if event == most_events:
            raise ValueError(
                f"gillespie: a trajectory has had {most_events} events and is at time {float(now[rows[0]]):g} of "
                f"{float(edges[-1]):g}, in state {state[0].tolist()} with escape rate "
                f"{float(log_rates[0].logsumexp(dim=0).exp()):g}: the model has diverged; or raise `most_events`"
            )
        wait = _philox.exponentials(seed, Use.ARRIVAL, row_ids[rows], 1, sample=event)[:, 0]
        escape = torch.logsumexp(log_rates, dim=1).exp()
        _countable(escape, edges[at + 1] - edges[at], state, time)
        wait = wait / escape  # infinite where nothing leaves
        left = edges[at + 1] - now[rows]
        leaves, exposure = wait < left, torch.minimum(wait, left)
        drawn = torch.full_like(rows, -1)
        jump_ids = _philox.ids(seed, Use.JUMP, row_ids[rows[leaves]], 1, sample=event)[:, 0]
        drawn[leaves] = _destination(log_rates[leaves], seed, jump_ids)
        log_ratio, escape_gap = torch.zeros_like(time), torch.zeros_like(time)
        if base is not None:
            log_ratio, gap = rate_ratio(log_rates, jumps.log_rates(base), drawn)
            escape_gap = gap * exposure
        path.record(rows, time, *jumps.named(drawn), log_ratio, escape_gap, exposure)
        path.final[rows] = jumps.destination(drawn)
        now[rows] = torch.where(leaves, now[rows] + exposure, edges[at + 1])
        interval[rows] += (~leaves).long()
        rows = rows[interval[rows] < len(edges) - 1]
        event += 1
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
    if isinstance(process, ProcessOfJumps):
        raise ValueError(
            f"tau_leap moves every coordinate by itself, which the moves of {type(process).__name__} do not; "
            "use gillespie or simulate"
        )
    grid = _checks.increasing("tau_leap", times)
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
        exposure = torch.full_like(time, duration)
        for i in range(length):
            position = torch.where(jumps[:, i], i, -1)
            path.record(
                rows, time, position, drawn[:, i], log_ratio[:, i], escape_gap[:, i], exposure, evaluated=i == 0
            )
        path.final = torch.where(jumps, drawn, state)
    return path.finish()


class _CoordinateJumps:
    """The jumps of a `Process`: number i V + v sets coordinate i to v."""

    def __init__(self, process: Process, tokens: Tensor, time: Tensor):
        self._process, self._tokens, self._time = process, tokens, time
        self._values = 0  # V, known from the first rates

    def log_rates(self, model: Model) -> Tensor:
        log_rates = checked_log_rates(self._process, model, self._tokens, self._time)
        self._values = log_rates.shape[2]
        return log_rates.flatten(1)

    def destination(self, jump: Tensor) -> Tensor:
        position, token = self.named(jump)
        there = self._tokens.clone()
        rows = (position >= 0).nonzero()[:, 0]
        there[rows, position[rows]] = token[rows]
        return there

    def named(self, jump: Tensor) -> tuple[Tensor, Tensor]:
        none = jump < 0
        return torch.where(none, -1, jump // self._values), torch.where(none, -1, jump % self._values)


def _jumps(process: Process | ProcessOfJumps, tokens: Tensor, time: Tensor) -> Jumps:
    if isinstance(process, ProcessOfJumps):
        return process.jumps(tokens, time)
    return _CoordinateJumps(process, tokens, time)


def _intervals(first: Tensor | None, count: int, most: int, device: torch.device) -> Tensor:
    """The interval that each row starts with, int64 [B]."""
    if first is None:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if first.dtype != torch.int64 or first.shape != (count,):
        raise ValueError(f"gillespie: first must be int64 [{count}]; got {first.dtype} {list(first.shape)}")
    if bool(((first < 0) | (first >= most)).any()):
        raise ValueError(f"gillespie: first must name intervals 0 .. {most - 1}; got {first.unique().tolist()[:4]}")
    return first.clone().to(device)


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


def _countable(escape: Tensor, duration: Tensor, state: Tensor, time: Tensor) -> None:
    above = escape * duration > 2.0**52  # float64 has no more times in an interval, and the chain would never leave it
    if bool(above.any()):
        row = int(above.nonzero()[0])
        raise ValueError(
            f"gillespie: the model's escape rate is {float(escape[row]):g} at state {state[row].tolist()} and time "
            f"{float(time[row]):g}, more events than can be told apart: the model has diverged, or gives no logarithms"
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


class _Recorder:
    """Events of trajectories as they happen, packed at the end; `final` is where they are."""

    def __init__(self, tokens: Tensor, keep_states: bool = False):
        self.initial, self.final = tokens.clone(), tokens.clone()
        self._keep_states, self._evaluated = keep_states, 0
        self._events: list[tuple[Tensor, ...]] = []

    def record(
        self,
        rows: Tensor,
        time: Tensor,
        position: Tensor,
        token: Tensor,
        log_ratio: Tensor,
        escape_gap: Tensor,
        exposure: Tensor,
        evaluated: bool = True,
    ) -> None:
        """An event of each of the rows, before they are moved; with `evaluated`, the model was evaluated for it."""
        state = (self.final[rows],) if self._keep_states else ()
        self._events.append((rows, time, position, token, log_ratio, escape_gap, exposure, *state))
        if evaluated:
            self._evaluated += len(rows)

    def finish(self) -> Path:
        count, length = self.initial.shape
        events = torch.zeros(count, dtype=torch.int64, device=self.initial.device)
        for rows, *_ in self._events:
            events[rows] += 1
        shape = (count, int(events.max()) if count else 0)

        def empty(value: float, dtype: torch.dtype, *last: int) -> Tensor:
            return torch.full((*shape, *last), value, dtype=dtype, device=self.initial.device)

        time, position, token = empty(torch.inf, torch.float64), empty(-1, torch.int64), empty(-1, torch.int64)
        log_ratio, escape_gap, exposure = (empty(0.0, torch.float64) for _ in range(3))
        state = empty(0, self.initial.dtype, length) if self._keep_states else None
        columns = (time, position, token, log_ratio, escape_gap, exposure) + (() if state is None else (state,))
        at = torch.zeros_like(events)
        for rows, *values in self._events:
            for column, value in zip(columns, values, strict=True):
                column[rows, at[rows]] = value
            at[rows] += 1
        return Path(
            self.initial,
            self.final,
            time=time,
            position=position,
            token=token,
            log_ratio=log_ratio,
            escape_gap=escape_gap,
            exposure=exposure,
            network_calls=self._evaluated,
            state=state,
        )
