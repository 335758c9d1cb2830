"""What rounding may cost each number of a result: the errors that `correct` allows, by what an operation computes.

To first order, of functions that work in one arithmetic: what a step leaves behind is rounded to its dtype, a logit, an
exponential, a sum, a logarithm; sums within a step are of float32 numbers, in whatever order. Errors of steps add up in
their sizes. Those of a sum's additions have either sign, so that of n numbers they come to some sqrt(n) roundings of
the sum of sizes (Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41(5),
2019); a wrong number hides below them only if it is wrong by as little.

Logits may be off already, by a head's product. Of a row x with log-probabilities log p and entropy H, what comes out as
log p_v is off by

    off_v + sum_w p_w off_w + u (|x_v| + |logsumexp x| + |log p_v| + H + STEPS) + sum(V)

with u a step's rounding and sum(V) that of a sum of V numbers; and p_v by as much, relative to p_v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Roundings of a step whose result has the size of 1: exponentials and logarithms of libraries are right to some units,
# and formulas differ by a step or two.
STEPS = 4.0
# By how much the rounding errors of a sum may exceed sqrt(n) of them: by chance they do in exp(-DEVIATIONS^2 / 2) of
# cases, 1.5e-8, for each of its partial sums.
DEVIATIONS = 6.0
FLOAT32 = torch.finfo(torch.float32).eps / 2


class Arithmetic(NamedTuple):
    """What the results of a function's steps are rounded to."""

    dtype: torch.dtype

    @property
    def step(self) -> float:
        """The largest relative error of a rounding."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def least(self) -> float:
        """What may be lost of a number however small: float32's may be flushed to zero, float16's fall short of it."""
        smallest = torch.finfo(self.dtype).smallest_normal
        return smallest * torch.finfo(self.dtype).eps if self.dtype == torch.float16 else smallest

    def of_result(self, exact: Tensor) -> Tensor:
        """Of each number of a result that is rounded once more."""
        return self.step * exact.abs() + self.least


class Allowed(NamedTuple):
    """Errors of each number of a result, and of the gradient in logits, before these are rounded themselves."""

    values: Sequence[Tensor]
    gradient: Tensor | None = None  # [T, V], of what `correct.Values` differentiates


class Part(NamedTuple):
    """Some rows of a result."""

    exact: Sequence[Tensor]
    rows: int  # of the whole
    off: Mapping[str, Tensor]  # [T, V] by the name of logits: by how much these are before anything is done to them


def of_sum(count: int) -> float:
    """Relative to the sum of the sizes of so many float32 numbers."""
    return DEVIATIONS * math.sqrt(count) * FLOAT32


def of_product(arithmetic: Arithmetic, rows: Tensor, columns: Tensor, inner: int) -> Tensor:
    """Of rows [T, D] times columns [V, D], by their norms [T] and [V]; partial sums are rounded to a step's dtype."""
    return torch.outer(rows, columns) * (of_sum(inner) + arithmetic.step / math.sqrt(inner))


class _Law(NamedTuple):
    """Rows of log-probabilities, and by how much they are off."""

    log_p: Tensor  # [T, V]
    p: Tensor  # [T, V]
    off: Tensor  # [T, V], of log_p; relative, of p
    entropy: Tensor  # [T]
    log_sum: Tensor  # [T]
    log_sum_off: Tensor  # [T]


def _law(arithmetic: Arithmetic, x: Tensor, off: Tensor | None) -> _Law:
    log_p, log_sum = torch.log_softmax(x, dim=1), torch.logsumexp(x, dim=1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=1)
    of_inputs = x.new_zeros(len(x)) if off is None else (p * off).sum(dim=1)
    log_sum_off = of_inputs + arithmetic.step * (log_sum.abs() + entropy + STEPS) + of_sum(x.shape[1])
    own = arithmetic.step * (x.abs() + log_p.abs()) + log_sum_off[:, None]
    return _Law(log_p, p, own if off is None else own + off, entropy, log_sum, log_sum_off)


def _factor(arithmetic: Arithmetic, count: int) -> float:
    """Relative error of a sum of so many products, of numbers that are right."""
    return arithmetic.step * STEPS + of_sum(count)


def _at_targets(target: Tensor, size: Tensor, columns: int) -> Tensor:
    """[T, V] of sizes [T, J] at targets [T, J]; those of a target that repeats add up."""
    return size.new_zeros(len(size), columns).scatter_add_(1, target, size)


def log_prob(arithmetic: Arithmetic, part: Part, *, logits: Tensor, target: Tensor) -> Allowed:
    """The gradient is that of the sum over rows: 1[v = target] - p_v for each target."""
    law = _law(arithmetic, logits, part.off.get("logits"))
    ones = torch.ones_like(target, dtype=logits.dtype)
    at_targets = _at_targets(target, arithmetic.step * STEPS * ones, logits.shape[1])
    return Allowed([law.off.gather(1, target)], target.shape[1] * law.p * law.off + at_targets)


def entropy(arithmetic: Arithmetic, part: Part, *, logits: Tensor) -> Allowed:
    """The gradient is that of the sum over rows: -p_v (log p_v + H)."""
    law, factor = _law(arithmetic, logits, part.off.get("logits")), _factor(arithmetic, logits.shape[1])
    size = law.log_p.abs()
    value = (law.p * law.off * (1.0 + size)).sum(dim=1) + factor * law.entropy
    size = size + law.entropy[:, None]
    return Allowed([value], law.p * (law.off * (1.0 + size) + value[:, None] + arithmetic.step * STEPS * size))


def logsumexp(arithmetic: Arithmetic, part: Part, *, logits: Tensor) -> Allowed:
    return Allowed([_law(arithmetic, logits, part.off.get("logits")).log_sum_off])


def rate_ratio(arithmetic: Arithmetic, part: Part, *, logits: Tensor, base_logits: Tensor, target: Tensor) -> Allowed:
    def escape(name: str, x: Tensor) -> Tensor:
        law = _law(arithmetic, x, part.off.get(name))
        return law.log_sum.exp() * (law.log_sum_off + arithmetic.step * STEPS)

    log_ratio = arithmetic.step * (logits.gather(1, target).abs() + base_logits.gather(1, target).abs())
    return Allowed([log_ratio, escape("logits", logits) + escape("base_logits", base_logits)])


def matching_loss(
    arithmetic: Arithmetic,
    part: Part,
    *,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None = None,
    base_weight: Tensor | None = None,
) -> Allowed:
    """Of the mean over rows, normalised; its gradient is sum_v w(v) p_v - w(v), divided by the number of rows."""
    rows, columns = logits.shape
    law, factor = _law(arithmetic, logits, part.off.get("logits")), _factor(arithmetic, columns)
    size, given = law.log_p.abs(), weight.abs()
    loss = (given * size.gather(1, target)).sum(dim=1)  # in sizes of what is added up
    value = (given * law.off.gather(1, target)).sum(dim=1)
    mass, gradient = given.sum(dim=1, keepdim=True), _at_targets(target, arithmetic.step * STEPS * given, columns)
    if base_logits is not None and base_weight is not None:
        base, of_base = _law(arithmetic, base_logits, part.off.get("base_logits")), base_weight.abs()[:, None]
        loss = loss + (of_base * base.p * size).sum(dim=1)
        value = value + (of_base * base.p * (law.off + base.off * size)).sum(dim=1)
        gradient = gradient + of_base * base.p * (base.off + factor)
        mass = mass + of_base
    gradient = gradient + mass * law.p * (law.off + factor)
    value = value + factor * loss
    return Allowed([value.mean() + _factor(arithmetic, part.rows) * loss.mean()], gradient / rows)


def mean_log_prob(arithmetic: Arithmetic, part: Part, *, logits: Tensor, target: Tensor) -> Allowed:
    """Of the mean of log-probabilities, or of what is its negative."""
    ones = torch.ones_like(target, dtype=logits.dtype)
    return matching_loss(arithmetic, part, logits=logits, target=target, weight=ones)


def adjoint_weights(
    arithmetic: Arithmetic,
    part: Part,
    *,
    log_ratio: Tensor,
    terminal_cost: Tensor,
    escape_gap: Tensor | None = None,
) -> Allowed:
    """Of weight, log_path without its last column, log_normalizer and ess."""
    _, log_path, log_normalizer, ess = part.exact
    steps, trajectories = log_ratio.shape[2], log_ratio.shape[1]
    size = log_ratio.abs() if escape_gap is None else log_ratio.abs() + escape_gap.abs()
    path = _factor(arithmetic, steps) * size.flip(-1).cumsum(-1).flip(-1)
    log_weight = log_path[..., 0] - terminal_cost
    of_weight = path[..., 0] + arithmetic.step * (terminal_cost.abs() + log_path[..., 0].abs() + log_weight.abs())
    law = _law(arithmetic, log_weight, of_weight)
    square = law.p.square()
    relative = 2.0 * (law.p * law.off).sum(dim=1) + 2.0 * (square * law.off).sum(dim=1) / square.sum(dim=1)
    return Allowed(
        [
            trajectories * law.p * (law.off + arithmetic.step * STEPS),
            path,
            law.log_sum_off + arithmetic.step * (math.log(trajectories) + log_normalizer.abs()),
            ess * (relative + 4.0 * _factor(arithmetic, trajectories)),
        ]
    )


def tilt_to_ess(arithmetic: Arithmetic, part: Part, *, reward: Tensor, ess: float, max_tilt: float) -> Allowed:
    """By how much the effective sample size is off, over its slope in the tilt; less where the search ends before."""
    (tilt,) = part.exact
    shifted = reward - reward.amax(dim=1, keepdim=True)
    law = _law(arithmetic, tilt[:, None] * shifted, 2.0 * arithmetic.step * (tilt[:, None] * shifted).abs())
    square = law.p.square()
    square = square / square.sum(dim=1, keepdim=True)
    relative = 2.0 * ((law.p + square) * law.off).sum(dim=1) + 4.0 * _factor(arithmetic, reward.shape[1])
    slope = 2.0 * ((square - law.p) * shifted).sum(dim=1).abs()
    kept = 1.0 / law.p.square().sum(dim=1) > ess * (1.0 + relative)  # with room, at max_tilt
    own = arithmetic.step * STEPS * tilt
    return Allowed([own + torch.where(kept, 0.0, relative / slope)])


def backward_kolmogorov(arithmetic: Arithmetic, part: Part, *, terminal: Tensor, **given: object) -> Allowed:
    """Of terminal values of one sign. A Fourier transform's error is of the size of the row, wherever it is."""
    (value,) = (x.abs() for x in part.exact)
    row = terminal.square().mean(dim=1, keepdim=True).sqrt()
    columns = terminal.shape[1]
    promised = 1e-6  # what the reference keeps, and every backend (`tol`)
    own = (promised + _factor(arithmetic, columns)) * value
    return Allowed([own + arithmetic.step * math.log2(2 * columns) * row])
