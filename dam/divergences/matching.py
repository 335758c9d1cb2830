"""rate_matching_loss: divergences of rates that kernels were written for, and others as torch computes them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, generated, triton
from dam.divergences import definition
from dam.divergences.definition import Divergence
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _formed_gradient, _op, _rows
from dam.ops.log_prob import log_escape_of
from dam.ops.matching_loss import matching_loss, outputs, total, weighted_targets

Convex = Callable[[Tensor], Tensor]


def rate_matching_loss(
    log_rates: Tensor,  # [..., V]
    target: Tensor,  # int64 [..., J]
    weight: Tensor,  # [..., J]
    *,
    divergence: str | Divergence | Convex = "kl",
    row_scale: Tensor | None = None,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    normalized: bool = False,
) -> Tensor:
    """Bregman divergence of a model's rates u = exp(log_rates) to weighted targets w, up to a constant.

    Normalised they are those of its distribution, u = softmax(log_rates) over the destinations that are not left out.

        D(w, u) = sum_v phi(w) - phi(u) - phi'(u) (w - u),      w(v) = sum_j weight_j 1[v = target_j]
        loss    = sum_t row_scale_t ( sum_v [phi'(u) u - phi(u)] - sum_j weight_j phi'(u(target_j)) )

    Whatever the convex phi, the expectation of D over random w is least at u = E[w], normalised where that is a
    distribution; phi decides how much an error of a small or of a large rate counts, and how noise of w does.

        "kl"    phi(u) = u log u - u    the generalised KL, `dam.matching_loss` and its kernels; normalised, less 1
        "l2"    phi(u) = u^2 / 2        (u - w)^2 / 2: the noise of large weights counts in full

    A divergence of `define`, as "l2" is one, has kernels of its own: C++ on a CPU, Triton on a GPU where it is
    installed, else torch in float64 by chunks of rows. Its gradient is formed in the forward pass, so it takes one
    backward pass and no double one. A plain phi is torch's own operations on whole arrays [T, V], in float64.

    Args:
        log_rates: log rates [..., V]; any row stride, unit inner stride. -inf is a destination that cannot be reached,
            and counts 0.
        target: destinations; -1 stands for none. At one that cannot be reached phi' is its limit at 0; weights there
            add up before they multiply an infinite one. To a plain phi a rate below 2e-308, of a log rate below -708 or
            of such a destination, is 2e-308, without a gradient.
        weight: their weights, detached.
        divergence: "kl", "l2", what `define` returns, or a convex function of positive numbers, elementwise, that
            autograd can follow twice.
        row_scale: [...]; 1 / T unless given.
        exclude, suppress: destinations left out, as for `dam.matching_loss`.
        normalized: whether the log rates are logits of a distribution. Kernels then read a row three times, from cache
            where it fits there: for its sum, for the loss and what its gradient shares, for the gradient.

    Returns:
        A scalar, float32 (float64 for float64 log rates), differentiable in log_rates.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype, or the divergence is none.
        RuntimeError: the backend asked for cannot run the divergence.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 11; Holderrieth et al., Generator Matching,
    arXiv 2410.20587 (Bregman divergences).
    """
    op = "rate_matching_loss"
    _checks.boolean(op, "normalized", normalized)
    if divergence == "kl":
        excluding: Any = {"exclude": exclude, "suppress": suppress}
        return matching_loss(log_rates, target, weight, row_scale=row_scale, normalized=normalized, **excluding)
    known = divergence in definition.SHIPPED if isinstance(divergence, str) else callable(divergence)
    if not known and not isinstance(divergence, Divergence):
        raise ValueError(
            f"{op}: divergence must be 'kl', 'l2', what define returns or a convex function; got {divergence!r}"
        )
    x, lead = _checks.rows(op, "log_rates", log_rates, "V")
    target, weight, row_scale = weighted_targets(op, x, lead, target, weight, row_scale)
    excluded = _excluded.checked(op, exclude, suppress, lead, x.shape[1], x)
    target, _ = _excluded.split(target, excluded)
    if not isinstance(divergence, (str, Divergence)):
        return _of_function(divergence, x, target, weight, row_scale, excluded, normalized)
    key = divergence if isinstance(divergence, str) else divergence.key
    backend = choice.choose(op, _IMPLEMENTATIONS, x)
    with_grad = x.requires_grad and torch.is_grad_enabled()
    loss, _ = _rate_matching_loss(x, target, weight, row_scale, *excluded, key, normalized, with_grad, backend, True)
    return loss


def _torch(
    divergence: Divergence,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    exclude: Excluded,
    normalized: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and gradient."""
    rows, columns = logits.shape
    losses, gradient = outputs(logits, with_grad)
    target = _rows.drop_excluded(target, exclude)
    for part in _rows.chunks(rows, columns * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part))
        if normalized:
            x = _normalized(x)
        index, w, scale = target[part].clamp(min=0), weight[part].double(), row_scale[part].double()
        none = x == -torch.inf
        pull, curvature = divergence.terms(x)
        at = x.gather(1, index)
        slope, force = divergence.at_target(at)
        w = torch.where(target[part] >= 0, w, 0.0)
        gain = _weighed(w, target[part], at, slope, divergence.slope_at_zero)
        losses[part] = scale * (pull.masked_fill(none, 0.0).sum(dim=1) - gain.sum(dim=1))
        if with_grad:
            pulled = _weighed(w, target[part], at, force, divergence.force_at_zero)
            change = curvature.masked_fill(none, 0.0).scatter_add_(1, index, -pulled)
            if normalized:
                rate = x.exp()
                outflow = change.sum(dim=1, keepdim=True)
                change = change - torch.where(rate == 0, 0.0, rate * outflow)
            gradient[part] = (change * scale[:, None]).to(gradient.dtype)
    return losses, gradient


def _normalized(x: Tensor) -> Tensor:
    """log_softmax, which is -inf throughout a row that can reach nothing."""
    none = x == -torch.inf
    return x.masked_fill(none.all(dim=1, keepdim=True), 0.0).log_softmax(dim=1).masked_fill(none, -torch.inf)


def _weighed(w: Tensor, target: Tensor, at: Tensor, value: Tensor, at_zero: float) -> Tensor:
    """Weights [T, J] times a value of their target's rate, which is `at_zero` where that cannot be reached."""
    unreached = at == -torch.inf
    if abs(at_zero) == torch.inf:
        # They add up first: to 0 that counts 0, or to what has a sign; not to inf - inf.
        merged = sum((w[:, j, None] * (target[:, j, None] == target) for j in range(w.shape[1])), torch.zeros_like(w))
        w = torch.where(unreached & (w != 0), merged, w)
    return torch.where(w == 0, 0.0, w * value.masked_fill(unreached, at_zero))


@functools.cache
def _compiled(key: str, normalized: bool) -> Any:
    """The C++ kernel of a divergence, of rates or of distributions.

    Raises:
        generated.NoCompiler: it cannot be compiled here.
    """
    divergence = definition.defined(key)
    text = f"#define DAM_NORMALIZED\n{divergence.cpp}" if normalized else divergence.cpp
    kernel = generated.library(divergence.name, text).dam_defined
    pointer, index, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kernel.argtypes = [
        *(index, index, code, code, pointer, index, pointer, index),
        *(pointer, pointer, index, pointer, pointer, pointer, pointer),
    ]
    kernel.restype = None
    return kernel


def _cpu(
    divergence: Divergence,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    exclude: Excluded,
    normalized: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    try:
        kernel = _compiled(divergence.key, normalized)
    except (generated.NoCompiler, OSError) as error:
        generated.without("rate_matching_loss", "cpu", f"kernels of divergences cannot be compiled here: {error}")
        return _torch(divergence, logits, target, weight, row_scale, exclude, normalized, with_grad)
    loss, gradient = outputs(logits, with_grad)
    target, weight = target.contiguous(), weight.double().contiguous()
    row_scale = row_scale.double().contiguous()
    suppressed = address.bits(exclude.suppressed)
    if with_grad:
        cpu.kernels.advise(gradient.data_ptr(), gradient.nbytes)
    kernel(
        *cpu.shape(logits),
        *address.matrix(logits),
        *address.indices(exclude.row),
        address.of(suppressed),
        target.data_ptr(),
        target.shape[1],
        weight.data_ptr(),
        row_scale.data_ptr(),
        loss.data_ptr(),
        gradient.data_ptr() if with_grad else None,
    )
    return loss, gradient


@functools.cache
def _written(key: str) -> Any:
    """The module of a divergence's functions for Triton."""
    divergence = definition.defined(key)
    assert divergence.triton is not None
    return generated.module(divergence.name, divergence.triton)


def _triton(
    divergence: Divergence,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    exclude: Excluded,
    normalized: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (logits, target, weight, row_scale, exclude, normalized, with_grad)
    if divergence.triton is None:
        generated.without("rate_matching_loss", "triton", f"Triton lacks a function that {divergence.name} calls")
        return _torch(divergence, *arguments)
    try:
        module = _written(divergence.key)
    except OSError as error:
        generated.without("rate_matching_loss", "triton", str(error))
        return _torch(divergence, *arguments)
    log_total = None
    if normalized:
        found = log_escape_of("triton", logits, exclude, 1.0)
        log_total = torch.where(found == -torch.inf, 0.0, found)  # a row that can reach nothing stays as it is
    return triton.launcher("defined", "rate_matching_loss")(
        module, logits, target, weight, row_scale, exclude, log_total, with_grad
    )


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"torch": _torch, "cpu": _cpu, "triton": _triton}


@_op.op("rate_matching_loss")
def _rate_matching_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    divergence: str,
    normalized: bool,
    with_grad: bool,
    backend: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    _checks.index_range("rate_matching_loss", "target", target, columns, backend)
    _checks.index_range("rate_matching_loss", "exclude", exclude, columns, backend)
    scale = logits.new_full((rows,), 1.0 / max(rows, 1), dtype=torch.float64) if row_scale is None else row_scale
    arguments = (logits, target, weight, scale, Excluded(exclude, suppressed), normalized, with_grad)
    loss, gradient = _IMPLEMENTATIONS[backend](definition.defined(divergence), *arguments)
    return total(loss, backend).to(_rows.accumulator(logits.dtype)), gradient


@_rate_matching_loss.register_fake
def _(logits, target, weight, row_scale, exclude, suppressed, divergence, normalized, with_grad, backend, overwrite):
    _, gradient = outputs(logits, with_grad)
    return logits.new_empty((), dtype=_rows.accumulator(logits.dtype)), gradient


_formed_gradient.register(_rate_matching_loss, "rate_matching_loss", inputs=11, differentiable=(0,))


def _of_function(
    phi: Convex,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    excluded: Excluded,
    normalized: bool,
) -> Tensor:
    """The loss for a plain function, by torch's operations on whole arrays."""
    op, (rows, columns) = "rate_matching_loss", x.shape
    _checks.index_range(op, "target", target, columns, "torch")
    dtype = _rows.accumulator(x.dtype)
    if excluded.row is not None:
        _checks.index_range(op, "exclude", excluded.row, columns, "torch")
        x = x.masked_fill(torch.arange(columns, device=x.device) == excluded.row[:, None], -torch.inf)
    if excluded.suppressed is not None:
        x = x.masked_fill(excluded.suppressed, -torch.inf)
    target = _rows.drop_excluded(target, excluded)
    x = x.double()
    rates = (_normalized(x) if normalized else x).exp()
    slope, pull = _of_generator(phi, rates)
    outflow = pull.masked_fill(x == -torch.inf, 0.0).sum(dim=1)
    at = slope.gather(1, target.clamp(min=0))
    counted = target >= 0
    gain = torch.where(counted, weight.double() * torch.where(counted, at, 0.0), 0.0).sum(dim=1)
    scale = torch.full_like(outflow, 1.0 / max(rows, 1)) if row_scale is None else row_scale.double()
    return (scale * (outflow - gain)).sum().to(dtype)


def _of_generator(phi: Convex, rates: Tensor) -> tuple[Tensor, Tensor]:
    """phi'(u) and phi'(u) u - phi(u), differentiable in u."""
    # phi and its slope need not be defined at 0; NaN stays.
    positive = rates.clamp(min=torch.finfo(rates.dtype).tiny)
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
