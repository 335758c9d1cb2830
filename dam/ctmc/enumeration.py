"""Exact laws of chains on few coordinates, by enumerating all V^L states in float64: what samples are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dam.ctmc.simulate import Model, Process, checked_log_rates, increasing


def states(size: int, length: int) -> Tensor:
    """All states of L coordinates with V values, int64 [V^L, L], the last coordinate fastest."""
    return torch.arange(size**length)[:, None] // _places(size, length) % size


def index_of(tokens: Tensor, size: int) -> Tensor:
    """Numbers of tokens [..., L] in the order of `states`, int64 [...]."""
    return (tokens * _places(size, tokens.shape[-1]).to(tokens.device)).sum(dim=-1)


def _places(size: int, length: int) -> Tensor:
    """What a coordinate's value counts for in the number of a state, int64 [L]."""
    return size ** torch.arange(length - 1, -1, -1)


class Rates:
    """The generator of a chain under a model at a time, as rates from every state: Q p without a matrix [V^L, V^L]."""

    def __init__(self, process: Process, model: Model, size: int, length: int, time: float):
        every = states(size, length)
        at = every.new_full((len(every),), time, dtype=torch.float64)
        self.rates = checked_log_rates(process, model, every, at).exp()  # [V^L, L, V]
        moved = every[:, None, None, :].expand(-1, length, size, -1).clone()
        for i in range(length):
            moved[:, i, :, i] = torch.arange(size, device=every.device)
        self._to = index_of(moved, size)
        self.escape = self.rates.sum(dim=(1, 2))

    def forward(self, law: Tensor) -> Tensor:
        """d law / dt, for laws [V^L]: what flows in minus what flows out."""
        flow = self.rates * law[:, None, None]
        return torch.zeros_like(law).index_add_(0, self._to.flatten(), flow.flatten()) - self.escape * law

    def backward(self, value: Tensor) -> Tensor:
        """-d value / dt of conditional expectations, value(x) = E[f(X_1) | X_t = x]."""
        return (self.rates * value[self._to]).sum(dim=(1, 2)) - self.escape * value

    def matrix(self) -> Tensor:
        """Q[x, y], float64 [V^L, V^L]."""
        count = len(self.escape)
        matrix = self.escape.new_zeros(count, count)
        rows = torch.arange(count, device=matrix.device)[:, None, None].expand_as(self._to)
        matrix.index_put_((rows.flatten(), self._to.flatten()), self.rates.flatten(), accumulate=True)
        return matrix - torch.diag(self.escape)


def law(
    process: Process, model: Model, initial: Tensor, size: int, length: int, times: Sequence[float] | Tensor
) -> Tensor:
    """Law of X at the last of the times, float64 [V^L], from its law `initial` [V^L] at the first.

    Each interval by uniformisation of the rates at its middle: non-negative, and of second order in its length.
    """
    current = initial.double()
    grid = increasing("law", times)
    for start, end in itertools.pairwise(grid):
        rates = Rates(process, model, size, length, (start + end) / 2)
        current = _uniformised(rates.forward, current, float(rates.escape.max()), end - start)
    return current


def value(
    process: Process, model: Model, terminal: Tensor, size: int, length: int, times: Sequence[float] | Tensor
) -> Tensor:
    """E[terminal(X_1) | X_t = x] for every x, float64 [V^L], t and 1 being the first and the last of the times.

    With terminal = exp(-g) of the base chain this is exp(-V_t), and the discrete adjoint of a trajectory that ends in
    X_1 is it times exp(g(X_1)).

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Thm. 2.2 and Prop. 2.3.
    """
    current = terminal.double()
    grid = increasing("value", times)
    for start, end in zip(grid[-2::-1], grid[:0:-1], strict=True):
        rates = Rates(process, model, size, length, (start + end) / 2)
        current = _uniformised(rates.backward, current, float(rates.escape.max()), end - start)
    return current


def _uniformised(derivative, start: Tensor, rate: float, duration: float, tolerance: float = 1e-14) -> Tensor:  # type: ignore[no-untyped-def]
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
