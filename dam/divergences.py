"""Matching of rates by other divergences than the generalised KL of `dam.matching_loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.ops import _checks, _excluded, _rows
from dam.ops.matching_loss import matching_loss, weighted_targets

Convex = Callable[[Tensor], Tensor]


def rate_matching_loss(
    log_rates: Tensor,  # [T, V]
    target: Tensor,  # int64 [T, J]
    weight: Tensor,  # [T, J]
    *,
    divergence: str | Convex = "kl",
    row_scale: Tensor | None = None,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Bregman divergence of a model's rates u = exp(log_rates) to weighted targets w, up to a constant.

        D(w, u) = sum_v phi(w) - phi(u) - phi'(u) (w - u),      w(v) = sum_j weight_j 1[v = target_j]

    summed over rows with row_scale. Whatever the convex phi, the expectation of D over random w is least at
    u = E[w]; phi decides how much an error of a small or of a large rate counts, and how noise of w does.

        "kl"    phi(u) = u log u    the generalised KL, `dam.matching_loss(normalized=False)` and its kernels
        "l2"    phi(u) = u^2 / 2    (u - w)^2 / 2: the noise of large weights counts in full

    Others than "kl" are torch's own operations on arrays [T, V].

    Args:
        log_rates: log rates [..., V]; -inf is a destination that cannot be reached. For a phi of yours rates below
            2e-308 count as that number where a target is.
        target: destinations; -1 stands for none.
        weight: their weights, detached.
        divergence: "kl", "l2" or phi, a convex function of positive numbers, elementwise, that autograd can follow
            twice.
        row_scale: [...]; 1 / T unless given.
        exclude, suppress: destinations left out, as for `dam.matching_loss`.

    Returns:
        A scalar, differentiable in log_rates.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype, or the divergence is none.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 11; Holderrieth et al., Generator Matching,
    arXiv 2410.20587 (Bregman divergences).
    """
    op = "rate_matching_loss"
    if divergence == "kl":
        excluding: Any = {"exclude": exclude, "suppress": suppress}
        return matching_loss(log_rates, target, weight, row_scale=row_scale, normalized=False, **excluding)
    if divergence != "l2" and (isinstance(divergence, str) or not callable(divergence)):
        raise ValueError(f"{op}: divergence must be 'kl', 'l2' or a convex function; got {divergence!r}")
    x, lead = _checks.rows(op, "log_rates", log_rates, "V")
    rows, columns = x.shape
    target, weight, row_scale = weighted_targets(op, x, lead, target, weight, row_scale)
    _checks.index_range(op, "target", target, columns, "torch")
    excluded = _excluded.checked(op, exclude, suppress, lead, columns, x)
    if excluded.row is not None:
        _checks.index_range(op, "exclude", excluded.row, columns, "torch")
        x = x.masked_fill(torch.arange(columns, device=x.device) == excluded.row[:, None], -torch.inf)
    if excluded.suppressed is not None:
        x = x.masked_fill(excluded.suppressed, -torch.inf)
    target, _ = _excluded.split(_rows.drop_excluded(target, excluded), excluded)
    rates = x.double().exp()
    if isinstance(divergence, str):
        slope, pull = rates, rates.square() / 2  # phi'(u), and phi'(u) u - phi(u)
    else:
        slope, pull = _of_generator(divergence, rates)
    outflow = torch.where(rates == 0, 0.0, pull).sum(dim=1)  # a destination of rate 0 is none; NaN stays
    at = slope.gather(1, target.clamp(min=0))
    counted = target >= 0
    gain = torch.where(counted, weight.double() * torch.where(counted, at, 0.0), 0.0).sum(dim=1)
    scale = torch.full_like(outflow, 1.0 / max(rows, 1)) if row_scale is None else row_scale.double()
    return (scale * (outflow - gain)).sum().to(torch.promote_types(log_rates.dtype, torch.float32))


def _of_generator(phi: Convex, rates: Tensor) -> tuple[Tensor, Tensor]:
    """phi'(u) and phi'(u) u - phi(u), differentiable in u."""
    # phi and its slope need not be defined at 0; NaN stays.
    positive = torch.where(rates == 0, torch.finfo(rates.dtype).tiny, rates)
    wanted = positive.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        leaf = positive if wanted else positive.clone().requires_grad_()
        value = phi(leaf)
        if value.shape != leaf.shape:
            raise ValueError(
                f"rate_matching_loss: the divergence must be elementwise; it made {list(value.shape)} of "
                f"{list(leaf.shape)}"
            )
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    pull = slope * leaf - value
    return (slope, pull) if wanted else (slope.detach(), pull.detach())
