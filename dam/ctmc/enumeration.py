"""Exact laws of chains on few coordinates, by enumerating all V^L states in float64: what samples are compared with."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dam.ctmc.moves import MoveJumps, MoveModel, Moves, MovesCTMC
from dam.ctmc.simulate import Model, Process, checked_log_rates
from dam.ops import _checks

_LISTED_ALONE = 32  # states whose slots are checked
_CHUNK = 1024  # states whose moves are looked at together: hundreds out of each fit a cache


def states(size: int, length: int) -> Tensor:
    """All states of L coordinates with V values, int64 [V^L, L], the last coordinate fastest."""
    return torch.arange(size**length)[:, None] // _places(size, length) % size


def index_of(tokens: Tensor, size: int) -> Tensor:
    """Numbers of tokens [..., L] in the order of `states`, int64 [...]."""
    return (tokens * _places(size, tokens.shape[-1]).to(tokens.device)).sum(dim=-1)


def _places(size: int, length: int) -> Tensor:
    """What a coordinate's value counts for in the number of a state, int64 [L]."""
    return size ** torch.arange(length - 1, -1, -1)


class JumpRates:
    """The generator of a chain at a time, as rates of the jumps out of each of X states: Q p without a matrix [X, X].

    Args:
        rates: float64 [X, ...].
        to: like rates, int64, the number of the state that each jump leads to.
    """

    def __init__(self, rates: Tensor, to: Tensor):
        self.rates, self._to = rates, to
        self.escape = rates.flatten(1).sum(dim=1)

    def forward(self, law: Tensor) -> Tensor:
        """d law / dt, for laws [X]: what flows in minus what flows out."""
        gain = torch.zeros_like(law)
        parts = (value.split(_CHUNK) for value in (self.rates.flatten(1), self._to.flatten(1), law[:, None]))
        for rates, to, part in zip(*parts, strict=True):
            gain.index_add_(0, to.flatten(), (rates * part).flatten())
        return gain - self.escape * law

    def backward(self, value: Tensor) -> Tensor:
        """-d value / dt of conditional expectations, value(x) = E[f(X_1) | X_t = x]."""
        return (self.rates * value[self._to]).flatten(1).sum(dim=1) - self.escape * value

    def matrix(self) -> Tensor:
        """Q[x, y], float64 [X, X]."""
        count = len(self.escape)
        matrix = self.escape.new_zeros(count, count)
        rows = torch.arange(count, device=matrix.device).repeat_interleave(self._to[0].numel())
        matrix.index_put_((rows, self._to.flatten()), self.rates.flatten(), accumulate=True)
        return matrix - torch.diag(self.escape)


class Rates(JumpRates):
    """The generator of a chain of L coordinates with V values under a model at a time, over all V^L states."""

    def __init__(self, process: Process, model: Model, size: int, length: int, time: float):
        every = states(size, length)
        at = every.new_full((len(every),), time, dtype=torch.float64)
        moved = every[:, None, None, :].expand(-1, length, size, -1).clone()
        for i in range(length):
            moved[:, i, :, i] = torch.arange(size, device=every.device)
        super().__init__(checked_log_rates(process, model, every, at).exp(), index_of(moved, size))


class MoveSpace:
    """The states that moves lead to from some, X of them, and which move leads where.

    Moves are listed once. A state's moves are in the slots that its listing has them in; where M differs from one batch
    to another, slots of rate 0 follow, up to the most.

    Args:
        process: lists the moves.
        start: states int64 [N, L] to start from.
        size: what tokens are below, for numbers of states: size^L must fit 63 bits.
        most: more states than these are an error.

    Raises:
        ValueError: a token is out of range, states have too many numbers, there are more than `most`, or a state of
            some that are checked has its moves in other slots when it is listed alone.
    """

    def __init__(self, process: MovesCTMC, start: Tensor, size: int, *, most: int = 2**20):
        self.process, self._size = process, size
        if size ** start.shape[1] > 2**63:
            raise ValueError(f"MoveSpace: {size}^{start.shape[1]} numbers of states do not fit 63 bits")
        found = new = self._numbers(start).unique()
        while len(new):
            seen = [
                self._numbers(moves.neighbours[moves.rate > 0])
                for moves in (process.moves(part) for part in self._tokens(new, start.shape[1]).split(_CHUNK))
            ]
            reached = torch.cat([part.unique() for part in seen]).unique()
            new = reached[~torch.isin(reached, found)]
            found = torch.cat((found, new)).unique()
            if len(found) > most:
                raise ValueError(f"MoveSpace: there are more than {most} states; raise `most`, or simulate")
        self._found = found
        self.states = self._tokens(found, start.shape[1])  # int64 [X, L]
        rate, to = [], []
        for part in self.states.split(_CHUNK):
            moves = process.moves(part)
            # A slot without a move leads nowhere: to the first state, at rate 0.
            neighbours = torch.where(moves.rate[..., None] > 0, moves.neighbours, self.states[0])
            rate.append(moves.rate)
            to.append(self.index_of(neighbours))
        self.base_rate = _joined(rate)  # float64 [X, M]
        self.to = _joined(to)  # int64 [X, M]
        self._check_slots()

    def index_of(self, tokens: Tensor) -> Tensor:
        """Numbers of states [..., L] in the order of `states`, int64 [...].

        Raises:
            ValueError: one is not among the states.
        """
        number = self._numbers(tokens)
        index = torch.searchsorted(self._found, number).clamp(max=len(self._found) - 1)
        if not bool((self._found[index] == number).all()):
            raise ValueError("MoveSpace: there is a state that no moves lead to")
        return index

    def rates(self, model: MoveModel, time: float) -> JumpRates:
        """The generator under a model at a time."""
        parts = []
        with torch.no_grad():
            for part in torch.arange(len(self.states), device=self.states.device).split(_CHUNK):
                at = torch.full_like(part, time, dtype=torch.float64)
                jumps = MoveJumps(self.process, self.states[part], at, self._moves(part))
                parts.append(jumps.log_rates(model).exp())
        return JumpRates(torch.cat(parts), self.to)

    def law(
        self, model: MoveModel, initial: Tensor, times: Sequence[float] | Tensor, *, tolerance: float = 1e-14
    ) -> Tensor:
        """As `enumeration.law`: of X at the last of the times, float64 [X], from its law `initial` [X] at the first.

        It is the exact law of `gillespie` with these times.
        """
        return _law(lambda time: self.rates(model, time), initial, times, tolerance)

    def value(
        self, model: MoveModel, terminal: Tensor, times: Sequence[float] | Tensor, *, tolerance: float = 1e-14
    ) -> Tensor:
        """As `enumeration.value`: E[terminal(X_1) | X_t = x] for every x, float64 [X]."""
        return _value(lambda time: self.rates(model, time), terminal, times, tolerance)

    def numbered(self) -> MoveSpace:
        """The same chain on the numbers of its states, int64 [X, 1], in place of the states.

        Its process looks moves up where this one's lists them. Slots are the same, and so trajectories are, but for
        what they are called: the cheap way to simulate and match a chain of many moves whose states fit a table.
        """
        space = copy.copy(self)
        space.process = dataclasses.replace(
            self.process, list_moves=lambda number: space._moves(space._numbers(number)), check=False
        )
        space._size = len(self.states)
        space._found = torch.arange(len(self.states), device=self.states.device)
        space.states = space._found[:, None]
        return space

    def _moves(self, number: Tensor) -> Moves:
        """Those out of the states of these numbers, as they were listed."""
        to = self.to[number]
        neighbours = self.states.index_select(0, to.flatten())  # several times as fast as by an index of two dimensions
        return Moves(neighbours.view(*to.shape, -1), self.base_rate[number])

    def _check_slots(self) -> None:
        """Of some states, listed alone: the one with the fewest moves, which is the first to be shifted where slots are
        those that a batch needs, and others all over.
        """
        fewest = int((self.base_rate > 0).sum(dim=1).argmin())
        spread = torch.linspace(0, len(self.states) - 1, min(len(self.states), _LISTED_ALONE)).long().tolist()
        for number in dict.fromkeys((fewest, *spread)):
            state = self.states[number : number + 1]
            alone, among = self.process.moves(state), self._moves(torch.tensor([number], device=state.device))
            slots = alone.rate.shape[1]
            listed = alone.rate > 0
            if slots > among.rate.shape[1] or not (
                torch.equal(F.pad(alone.rate, (0, among.rate.shape[1] - slots)), among.rate)
                and torch.equal(alone.neighbours[listed], among.neighbours[:, :slots][listed])
            ):
                raise ValueError(
                    f"MoveSpace: list_moves has the moves out of state {state[0].tolist()} in other slots when it is "
                    "listed alone than among others; a state's slots must be its own, and only slots of rate 0 behind "
                    "them may depend on the batch"
                )

    def _numbers(self, tokens: Tensor) -> Tensor:
        if bool(((tokens < 0) | (tokens >= self._size)).any()):
            raise ValueError(
                f"MoveSpace: tokens must be in 0 .. {self._size - 1}; got {int(tokens.min())} to {int(tokens.max())}"
            )
        return index_of(tokens, self._size)

    def _tokens(self, number: Tensor, length: int) -> Tensor:
        place = self._size ** torch.arange(length - 1, -1, -1, device=number.device)
        return number[:, None] // place % self._size


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of [n, M] tensors, with zeros behind those of fewer columns."""
    columns = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, columns - part.shape[1])) for part in parts])


def law(
    process: Process, model: Model, initial: Tensor, size: int, length: int, times: Sequence[float] | Tensor
) -> Tensor:
    """Law of X at the last of the times, float64 [V^L], from its law `initial` [V^L] at the first.

    Each interval by uniformisation of the rates at its middle: non-negative, and of second order in its length.
    """
    return _law(lambda time: Rates(process, model, size, length, time), initial, times)


def value(
    process: Process, model: Model, terminal: Tensor, size: int, length: int, times: Sequence[float] | Tensor
) -> Tensor:
    """E[terminal(X_1) | X_t = x] for every x, float64 [V^L], t and 1 being the first and the last of the times.

    With terminal = exp(-g) of the base chain this is exp(-V_t), and the discrete adjoint of a trajectory that ends in
    X_1 is it times exp(g(X_1)).

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Thm. 2.2 and Prop. 2.3.
    """
    return _value(lambda time: Rates(process, model, size, length, time), terminal, times)


def _law(
    rates_at: Callable[[float], JumpRates], initial: Tensor, times: Sequence[float] | Tensor, tolerance: float = 1e-14
) -> Tensor:
    current = initial.double()
    for start, end in itertools.pairwise(_checks.increasing("law", times)):
        rates = rates_at((start + end) / 2)
        current = _uniformised(rates.forward, current, float(rates.escape.max()), end - start, tolerance)
    return current


def _value(
    rates_at: Callable[[float], JumpRates], terminal: Tensor, times: Sequence[float] | Tensor, tolerance: float = 1e-14
) -> Tensor:
    current = terminal.double()
    grid = _checks.increasing("value", times)
    for start, end in zip(grid[-2::-1], grid[:0:-1], strict=True):
        rates = rates_at((start + end) / 2)
        current = _uniformised(rates.backward, current, float(rates.escape.max()), end - start, tolerance)
    return current


def _uniformised(derivative, start: Tensor, rate: float, duration: float, tolerance: float) -> Tensor:  # type: ignore[no-untyped-def]
    """exp(duration Q) start = sum_k Poisson(k; rate duration) (I + Q / rate)^k start, in parts of few jumps each."""
    if rate == 0.0:
        return start
    parts = max(1, int(rate * duration / 16) + 1)
    mean = rate * duration / parts
    current = start
    for _ in range(parts):
        weight = mass = math.exp(-mean)
        total = term = current * weight
        k = 0
        while 1 - mass > tolerance and k < 200:
            k += 1
            term = (term + derivative(term) / rate) * (mean / k)
            weight *= mean / k
            mass += weight
            total = total + term
        current = total
    return current
