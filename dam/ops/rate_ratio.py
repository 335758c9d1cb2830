"""rate_ratio: log ratio of base to model rates at given jumps, and the difference of the escape rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _group, _op, _parallel, _rows
from dam.ops import log_prob as _log_prob_op


class RateRatio(NamedTuple):
    """The two pieces of a path's log weight: at its jumps, and per unit of time between them."""

    log_ratio: Tensor  # like target: log u_base(jump) - log u(jump)
    escape_gap: Tensor  # [...]: escape rate of the model minus that of the base


def rate_ratio(
    logits: Tensor,  # [..., V]
    base_logits: Tensor,  # [..., V]
    target: Tensor,  # [...] or [..., J]
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    rate: Any = None,
    state: Tensor | None = None,
    group: Any = None,
) -> RateRatio:
    """What a path's log weight gains at the jumps `target` and, per unit of time, between jumps.

        log_ratio  = base_logits[target] - logits[target]
        escape_gap = sum_v exp(logits[v]) - sum_v exp(base_logits[v])

    over destinations v that are not excluded. The log weight of a path is the sum of log_ratio over its
    jumps plus the integral of escape_gap over time. Chains whose escape rates agree (masked ones) have no
    integral: for their normalised rates take the difference of two `log_prob`.

    Args:
        logits, base_logits: log rates [..., V] of model and base; any row stride, unit inner stride.
        target: int64 [...] or [..., J]. -1 stands for no jump: log_ratio 0. A target that only one of the chains
            can reach gives +inf or -inf; one that neither can (an excluded or suppressed one among them) gives NaN.
        exclude: destination left out: an int for all rows or int64 [...]; -1 leaves none out.
        suppress: destinations that no row has: a bool mask [V], or ids (a sequence, or int64 [S]).
        rate: another rate than exp, of `dam.rates.define`: logits are then the numbers z of its u(z, y, x), log_ratio
            is log u(base) - log u(model) at the target, and escape_gap the difference of their sums.
        state: int64 [...], the states x, for such a rate of them.
        group: process group whose ranks each have some columns of the vocabulary, as for `jump`.

    Returns:
        RateRatio(log_ratio, escape_gap), float32 (float64 for float64 logits). Not differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Prop. 2.4 and Eq. 13.
    """
    if rate is not None:
        if not hasattr(rate, "ratio"):
            raise TypeError(f"rate_ratio: rate must be of dam.rates.define; got {type(rate).__name__}")
        if _group.is_asked(group, logits):
            raise ValueError("rate_ratio: a rate that was defined takes no group; give whole rows")
        return rate.ratio(logits, base_logits, target, state=state, exclude=exclude, suppress=suppress)
    if state is not None:
        raise ValueError("rate_ratio: state is for a rate of it; give rate=dam.rates.define(u) too")
    if _group.is_asked(group, logits):
        call = _parallel.of_rows("rate_ratio", group, _IMPLEMENTATIONS, logits, exclude, suppress, 1.0, base_logits)
        return over_group(call, target)
    if _excluded.is_nothing(suppress) and _op.at_once(logits, base_logits, target, exclude):
        found = at_once(logits, base_logits, target, exclude)
        if found is not None:
            return found
    x, lead = _checks.rows("rate_ratio", "logits", logits, "V")
    base, _ = _checks.rows("rate_ratio", "base_logits", base_logits, "V")
    _checks.like("rate_ratio", "base_logits", base_logits, "logits", logits)
    targets = _checks.target("rate_ratio", target, lead, x)
    excluded = _excluded.checked("rate_ratio", exclude, suppress, lead, x.shape[1], x)
    targets, never = _excluded.split(targets, excluded)
    backend = choice.choose("rate_ratio", _IMPLEMENTATIONS, x)
    log_ratio, escape_gap = _rate_ratio(x.detach(), base.detach(), targets, *excluded, backend)
    if never is not None:
        log_ratio = torch.where(never, torch.nan, log_ratio)
    return RateRatio(log_ratio.view(target.shape), _rows.unflattened(escape_gap, lead))


def at_once(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: int | Tensor) -> RateRatio | None:
    """What `rate_ratio` returns, by the C++ kernel; None where an argument does not fit."""
    found = cpu.kernels.rate_ratio(logits=logits, exclude=exclude, suppressed=None, base=base_logits, target=target)
    return None if found is None else RateRatio(*found)


@_op.untraced
def over_group(call: _parallel.Call, target: Tensor) -> RateRatio:
    """rate_ratio of the columns that the ranks of a group have."""
    targets = _checks.target(call.op, target, call.lead, call.reference)
    slots = targets.shape[1]

    def make(shards: _group.Shards) -> Tensor:
        """[T, 2 + 2 J]: log escape rates by these columns, logits and base logits of the targets among them."""
        exclude, here = call.left_out.excluded(shards), shards.local(targets)
        found = call.numbers(2 + 2 * slots)
        found[:, :2] = -torch.inf
        for part, logits, base in call.source.chunks():
            assert base is not None
            some = exclude.part(part)
            for i, x in enumerate((logits, base)):
                found[part, i] = _log_prob_op.log_escape_of(call.backend, x, some, 1.0)
                found[part, 2 + i * slots : 2 + (i + 1) * slots] = call.at(x, here[part], some)
        return found

    with torch.no_grad():
        shards, gathered = call.exchanged(make, slots, targets=targets)
        counted = call.left_out.counted(targets)
        x, base = (shards.of_owner(part, targets) for part in gathered[..., 2:].split([slots, slots], dim=2))
        log_ratio = torch.where(counted, base - x, torch.nan).masked_fill_(targets < 0, 0.0).to(call.dtype)
        rates = gathered[..., :2].exp().sum(dim=0)
        escape_gap = (rates[:, 0] - rates[:, 1]).to(call.dtype)
    return RateRatio(log_ratio.view(target.shape), _rows.unflattened(escape_gap, call.lead))


def _torch(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Excluded) -> tuple[Tensor, Tensor]:
    log_ratio, escape_gap = outputs(logits, target)
    for part in _rows.chunks(logits.shape[0], 2 * logits.shape[1] * _rows.REFERENCE_BYTES):
        ex = exclude.part(part)
        x, base = _rows.allowed(logits[part], ex), _rows.allowed(base_logits[part], ex)
        log_ratio[part] = _rows.gather_or(base - x, target[part], 0.0)
        escape_gap[part] = x.exp().sum(dim=1) - base.exp().sum(dim=1)
    return log_ratio, escape_gap


def _cpu(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Excluded) -> tuple[Tensor, Tensor]:
    log_ratio, escape_gap = cpu.taken(
        cpu.kernels.rate_ratio(
            logits=logits,
            exclude=exclude.row,
            suppressed=exclude.suppressed,
            base=base_logits,
            target=target.contiguous(),
        )
    )
    return log_ratio, escape_gap


def _cuda(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Excluded) -> tuple[Tensor, Tensor]:
    log_ratio, escape_gap = outputs(logits, target)
    summaries = cuda.summaries(logits, 2 * cuda.kernels.ROW_SUMMARIES, logits.shape[0])
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.rate_ratio(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        base=address.matrix(base_logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        target=address.targets(target),
        summaries=summaries.data_ptr(),
        log_ratio=log_ratio.data_ptr(),
        escape_gap=escape_gap.data_ptr(),
        where=cuda.where(logits),
    )
    return log_ratio, escape_gap


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("rate_ratio"),
    "cuda": _cuda,
}


def outputs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised log_ratio [T, J] and escape_gap [T]."""
    dtype = _rows.accumulator(logits.dtype)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty(logits.shape[:1], dtype=dtype)


@_op.op("rate_ratio")
def _rate_ratio(
    logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Tensor | None, suppressed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _checks.index_range("rate_ratio", "target", target, logits.shape[1], backend)
    _checks.index_range("rate_ratio", "exclude", exclude, logits.shape[1], backend)
    return _IMPLEMENTATIONS[backend](logits, base_logits, target, Excluded(exclude, suppressed))


@_rate_ratio.register_fake
def _(logits, base_logits, target, exclude, suppressed, backend):
    return outputs(logits, target)
