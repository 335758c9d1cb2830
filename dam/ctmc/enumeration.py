"""Exact laws of chains on few coordinates, by enumerating all V^L states in float64: what samples are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dam.ctmc.moves import MoveModel, MovesCTMC
from dam.ctmc.simulate import Model, Process, checked_log_rates
from dam.ops import _checks

_CHUNK = 8192  # states whose moves are listed at a time


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
        flow = self.rates.flatten(1) * law[:, None]
        return torch.zeros_like(law).index_add_(0, self._to.flatten(), flow.flatten()) - self.escape * law

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

    Args:
        process: lists the moves.
        start: states int64 [N, L] to start from.
        size: what tokens are below, for numbers of states: size^L must fit 63 bits.
        most: more states than these are an error.

    Raises:
        ValueError: a token is out of range, states have too many numbers, or there are more than `most`.
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
        self.base_rate = torch.cat(rate)  # float64 [X, M]
        self.to = torch.cat(to)  # int64 [X, M]

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
        with torch.no_grad():
            parts = [
                self.process.jumps(part, part.new_full((len(part),), time, dtype=torch.float64)).log_rates(model).exp()
                for part in self.states.split(_CHUNK)
            ]
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

    def _numbers(self, tokens: Tensor) -> Tensor:
        if bool(((tokens < 0) | (tokens >= self._size)).any()):
            raise ValueError(
                f"MoveSpace: tokens must be in 0 .. {self._size - 1}; got {int(tokens.min())} to {int(tokens.max())}"
            )
        return index_of(tokens, self._size)

    def _tokens(self, number: Tensor, length: int) -> Tensor:
        place = self._size ** torch.arange(length - 1, -1, -1, device=number.device)
        return number[:, None] // place % self._size


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
