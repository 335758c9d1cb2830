"""matching_loss: generalised-KL matching of a model's rates to weighted targets, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _formed_gradient, _gradient, _group, _op, _parallel, _rows
from dam.ops import log_prob as _log_prob_op


def matching_loss(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [..., J]
    weight: Tensor,  # [..., J]
    *,
    base_logits: Tensor | None = None,  # [..., V]
    base_weight: Tensor | None = None,  # [...]
    row_scale: Tensor | None = None,  # [...]
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    normalized: bool = True,
    temperature: float = 1.0,
    reduction: str | None = None,
    group: Any = None,
) -> Tensor:
    """Generalised KL between the model's rates and w, up to a constant that does not depend on the model.

        w_t(v) = sum_j weight[t, j] 1[v = target[t, j]] + base_weight[t] p_base(v)
        x_t(v) = logits[t, v] / temperature

        normalized:  loss_t = - sum_v w_t(v) log_softmax(x_t)[v]
        rates:       loss_t = sum_v exp(x_t(v)) - sum_v w_t(v) x_t(v)

    over destinations v that are not excluded; p_base is softmax(base_logits / temperature), or
    exp(base_logits / temperature) for rates. The minimiser of its expectation is E[w]: normalised, or as rates.

    Only logits are differentiated. Their gradient is formed in the forward pass, so the loss takes one
    backward pass; a second one and a double backward raise. In float16 it is rounded before a loss scaler
    multiplies it: put the scale into row_scale instead, or use bfloat16. With reduction "none" what each row's
    loss is multiplied by is known in the backward pass only: each one forms the gradient, and reads the logits
    for it once more, which are kept.

    Args:
        logits: unnormalised log rates [..., V], of T rows in all; any row stride, unit inner stride.
        target: int64 [..., J]; -1 means no target in that slot; targets that repeat add up.
        weight: floating point [..., J]; may be negative, zero or large. Weight on an excluded or suppressed
            target is dropped.
        base_logits, base_weight: a second weighted target over the whole vocabulary, given together.
        row_scale: floating point [...], what each row's loss is multiplied by.
        exclude: destination left out: an int for all rows or int64 [...]; -1 leaves none out.
        suppress: destinations that no row has: a bool mask [V], or ids (a sequence, or int64 [S]).
        normalized: which of the two forms.
        temperature: divides the logits, and the base's; > 0. The loss then fits rollouts drawn at it.
        reduction: "sum": the sum over rows of row_scale_t loss_t; "mean": that divided by T, or 0 without rows;
            "none": row_scale_t loss_t of each row. row_scale is 1 unless given. None: "sum" if row_scale is given,
            else "mean".
        group: process group whose ranks each have some columns of the vocabulary, as for `jump`. The gradient is then
            formed in the backward pass.

    Returns:
        Scalar, or [...] with reduction "none"; float32 (float64 for float64 logits). NaN logits give NaN;
            a weight on what cannot be reached costs infinitely much, in a row that reaches nothing too.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 11 and 14.
    """
    op = "matching_loss"
    _checks.boolean(op, "normalized", normalized)
    if (base_logits is None) != (base_weight is None):
        raise ValueError(f"{op}: base_logits and base_weight must be given together")
    if _group.is_asked(group, logits):
        temperature = _checks.temperature(op, temperature, zero=False)
        call = _parallel.of_rows(op, group, _IMPLEMENTATIONS, logits, exclude, suppress, temperature, base_logits)
        return over_group(call, target, weight, base_weight, row_scale, normalized, reduction)
    x, lead = _checks.rows(op, "logits", logits, "V")
    target, weight, row_scale = weighted_targets(op, x, lead, target, weight, row_scale)
    if base_logits is not None and base_weight is not None:
        base, _ = _checks.rows(op, "base_logits", base_logits, "V")
        _checks.like(op, "base_logits", base_logits, "logits", logits)
        base_weight = _checks.vector(op, "base_weight", base_weight, lead, x).detach()
        base_logits = base.detach()
    excluded = _excluded.checked(op, exclude, suppress, lead, x.shape[1], x)
    target, _ = _excluded.split(target, excluded)
    temperature = _checks.temperature(op, temperature, zero=False)
    row_scale = reduced(op, reduction, row_scale, x)
    backend = choice.choose(op, _IMPLEMENTATIONS, x)
    arguments = (x, target, weight, base_logits, base_weight, row_scale, *excluded, normalized, temperature)
    if reduction == "none":
        return _matching_loss_rows(*arguments, backend).view(lead)
    with_grad = x.requires_grad and torch.is_grad_enabled()
    loss, _ = _matching_loss(*arguments, with_grad, backend, True)
    return loss


def weighted_targets(
    op: str, reference: Tensor, lead: torch.Size, target: Tensor, weight: Tensor, row_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks and detaches the arguments that `matching_loss` and `linear_matching_loss` share."""
    targets = _checks.target(op, target, lead, reference, one=False)
    _checks.floating(op, "weight", weight)
    if weight.shape != target.shape:
        raise ValueError(f"{op}: weight must have the shape of target, {list(target.shape)}; got {list(weight.shape)}")
    _checks.same_device(op, "weight", weight, reference)
    if row_scale is not None:
        row_scale = _checks.vector(op, "row_scale", row_scale, lead, reference).detach()
    return targets, _checks.per_slot(weight.detach(), reference), row_scale


def reduced(op: str, reduction: str | None, row_scale: Tensor | None, reference: Tensor) -> Tensor | None:
    """row_scale with which a sum over rows is the reduction, None for 1/T; that of each row for "none"."""
    _checks.reduction(op, reduction)
    if row_scale is None:
        mean = reduction in (None, "mean")
        return None if mean else reference.new_ones(reference.shape[:1], dtype=torch.float64)
    return row_scale.double() / max(reference.shape[0], 1) if reduction == "mean" else row_scale


@_op.untraced
def over_group(
    call: _parallel.Call,
    target: Tensor,
    weight: Tensor,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    normalized: bool,
    reduction: str | None,
) -> Tensor:
    """matching_loss of the columns that the ranks of a group have."""
    op, backend, reference = call.op, call.backend, call.reference
    target, weight, row_scale = weighted_targets(op, reference, call.lead, target, weight, row_scale)
    scale = reduced(op, reduction, row_scale, reference)
    if scale is None:
        scale = reference.new_full((call.rows,), 1.0 / max(call.rows, 1), dtype=torch.float64)
    of_base = None if base_weight is None else _checks.vector(op, "base_weight", base_weight, call.lead, reference)
    weights = (("weight", weight), ("base_weight", of_base), ("row_scale", row_scale))
    row_scale, slots, temperature = scale.double(), target.shape[1], call.temperature

    def make(shards: _group.Shards) -> Tensor:
        """[T, 3 + J]: log_escape of these columns and of the base's, the base's mean logit, the targets' logits."""
        exclude, here = call.left_out.excluded(shards), shards.local(target)
        found = call.numbers(3 + slots)
        found[:, :2] = -torch.inf
        for part, logits, base in call.source.chunks():
            some = exclude.part(part)
            found[part, 0] = _log_prob_op.log_escape_of(backend, logits, some, call.temperature)
            if base is not None:
                found[part, 1] = _log_prob_op.log_escape_of(backend, base, some, call.temperature)
                found[part, 2] = _mean_logit(backend, logits, base, some, call.temperature, found[part, :2])
            found[part, 3:] = call.at(logits, here[part], some)
        return found

    def run() -> tuple[Tensor, _group.Shards, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        shards, gathered = call.exchanged(make, slots, (normalized, reduction), target, weights=weights)
        log_escape, base_escape = (_parallel.log_escape_of(gathered[..., i]) for i in (0, 1))
        counted = call.left_out.counted(target)
        w = torch.where(counted, weight.double(), 0.0)
        loss = _loss_at_targets(shards.of_owner(gathered[..., 3:], target), target, w, log_escape, normalized)
        total_weight, base_factor = w.sum(dim=1), torch.zeros_like(log_escape)
        if of_base is not None:
            base_factor = of_base.detach().double()
            total_weight = total_weight + base_factor
            # Of the base's distribution, or of its rates; what it does not reach counts 0, wherever its logits are.
            share = (gathered[..., 1] - (base_escape if normalized else 0.0)).exp()
            mean = torch.where(share == 0, 0.0, share * gathered[..., 2]).sum(dim=0)
            cost = (_reached(log_escape) if normalized else 0.0) - mean
            loss = loss + torch.where(base_factor == 0, 0.0, base_factor * cost)
        loss = row_scale * (loss if normalized else loss + log_escape.exp())
        value = (loss if reduction == "none" else total(loss, backend)).to(call.dtype)

        def asked(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            slope = grad.double() * row_scale / temperature
            nothing = torch.zeros_like(slope)
            factor = slope * total_weight if normalized else slope
            model = _gradient.Rate(factor, nothing if normalized else log_escape, log_escape)
            base = None
            if of_base is not None:
                base = _gradient.Rate(slope * base_factor, nothing if normalized else base_escape, base_escape)
            shares = _gradient.shares_of(model, base, temperature)
            return target.where(counted, -1), slope[:, None] * w, shares

        return value, shards, asked

    value = call.differentiable(run)
    return value.view(call.lead) if reduction == "none" else value


def _loss_at_targets(x: Tensor, target: Tensor, weight: Tensor, log_escape: Tensor, normalized: bool) -> Tensor:
    """float64 [T]: sum over targets of weight times cost, for logits x [T, J] of the targets."""
    # Weights on an unreachable destination add up first: to 0 that counts 0, or to what has a sign; not to inf - inf.
    merged = sum(
        (weight[:, j, None] * (target[:, j, None] == target) for j in range(target.shape[1])), torch.zeros_like(x)
    )
    used = torch.where((x == -torch.inf) & (weight != 0), merged, weight)
    cost = (_reached(log_escape)[:, None] if normalized else 0.0) - x
    return torch.where(used == 0, 0.0, used * cost).sum(dim=1)


def _reached(log_escape: Tensor) -> Tensor:
    """0 for a row that reaches nothing: its costs are infinite, not inf - inf."""
    return log_escape.masked_fill(log_escape == -torch.inf, 0.0)


def _mean_logit(
    backend: str, logits: Tensor, base: Tensor, exclude: Excluded, temperature: float, log_escapes: Tensor
) -> Tensor:
    """float64 [T]: of logits / temperature under the base's distribution over these columns."""
    rows = logits.shape[0]
    none = torch.empty((rows, 0), dtype=torch.int64, device=logits.device)
    one = torch.ones(rows, dtype=torch.float64, device=logits.device)
    arguments = (logits, none, none.double(), base, one, one, exclude, True, temperature, False)
    loss, _ = _IMPLEMENTATIONS[backend](*arguments)  # log_escape less the mean
    log_escape, base_escape = log_escapes[:, 0], log_escapes[:, 1]
    nothing = torch.where(base_escape == -torch.inf, 0.0, -torch.inf).where(log_escape == -torch.inf, 0.0)
    return torch.where(log_escape == -torch.inf, nothing, log_escape - loss)


def total(row_loss: Tensor, backend: str) -> Tensor:
    """Sum of the rows' losses, float64 []."""
    # torch promises no order of a sum, and divides a long one among its threads. In the rows' order it does not depend
    # on how many there are; cumsum has no other.
    if backend == "cpu" and row_loss.shape[0] > 0:
        return row_loss.cumsum(0)[-1]
    return row_loss.sum()


def reference_rows(
    x: Tensor,  # float64 [T, V], excluded entries at -inf
    target: Tensor,
    weight: Tensor,
    base: Tensor | None,  # like x
    base_weight: Tensor | None,
    normalized: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and its gradient in x, float64 [T, V]."""
    weight = torch.where(target >= 0, weight.double(), 0.0)
    w = torch.zeros_like(x).scatter_add_(1, target.clamp(min=0), weight)
    if base is not None and base_weight is not None:
        rate = torch.softmax(base, dim=1) if normalized else base.exp()
        base_weight = base_weight.double()[:, None]
        w += torch.where(base_weight == 0, 0.0, base_weight * rate)
    none = x == -torch.inf
    log_rate = x
    if normalized:  # of a row that reaches nothing -inf too, not inf - inf
        log_rate = torch.log_softmax(x, dim=1).masked_fill(none.all(dim=1, keepdim=True), -torch.inf)
    # A destination of rate zero that nothing is matched to counts nothing, not 0 * inf.
    loss = -torch.where(w == 0, 0.0, w * log_rate).sum(dim=1)
    if normalized:
        # exp(-inf - -inf) is no probability: a row that can reach nothing pulls at nothing.
        probability = torch.where(none, 0.0, log_rate.exp())
        return loss, probability * w.sum(dim=1, keepdim=True) - w
    rate = x.exp()
    return loss + rate.sum(dim=1), rate - w


def _torch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    with_grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and gradient, which is written to `into`, if given; it may be the logits."""
    rows, columns = logits.shape
    losses, grad = outputs(logits, with_grad, into)
    scale = logits.new_full((rows,), 1.0 / max(rows, 1), dtype=torch.float64) if row_scale is None else row_scale
    target = _rows.drop_excluded(target, exclude)
    for part in _rows.chunks(rows, columns * _rows.REFERENCE_BYTES):
        ex = exclude.part(part)
        loss, row_grad = reference_rows(
            _rows.allowed(logits[part], ex).div_(temperature),
            target[part],
            weight[part],
            None if base_logits is None else _rows.allowed(base_logits[part], ex).div_(temperature),
            None if base_weight is None else base_weight[part],
            normalized,
        )
        losses[part] = loss * scale[part].double()
        if with_grad:
            grad[part] = row_grad * (scale[part].double()[:, None] / temperature)
    return losses, grad


def _cpu(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    with_grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    loss, gradient = outputs(logits, with_grad, into)
    target, weight = target.contiguous(), weight.double().contiguous()
    scale = (
        torch.full((rows,), 1.0 / max(rows, 1), dtype=torch.float64, device="cpu")
        if row_scale is None
        else row_scale.double().contiguous()
    )
    base_weight = None if base_weight is None else base_weight.double().contiguous()
    suppressed = address.bits(exclude.suppressed)
    cpu.kernels.matching_loss(
        shape=cpu.shape(logits),
        logits=address.matrix(logits),
        base=address.matrix(base_logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        target=target.data_ptr(),
        targets=target.shape[1],
        weight=weight.data_ptr(),
        base_weight=address.of(base_weight),
        row_scale=scale.data_ptr(),
        normalized=normalized,
        temperature=temperature,
        loss=loss.data_ptr(),
        gradient=gradient.data_ptr() if with_grad else 0,
    )
    return loss, gradient


def _cuda(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    with_grad: bool,
    into: Tensor | None = None,
    shares: Tensor | None = None,  # [T, SHARES]; filled with what the gradient depends on
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    numbers = tuple(address.readable(x) for x in (weight, base_weight, row_scale))
    loss, gradient = outputs(logits, with_grad, into)
    arrays = cuda.kernels.ROW_SUMMARIES if base_logits is None else cuda.kernels.BASE_SUMMARIES
    summaries = cuda.summaries(logits, arrays, rows)
    target_logit = logits.new_empty(target.shape, dtype=torch.float32)
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.matching_loss(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        base=address.matrix(base_logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        target=address.targets(target),
        weight=address.values(numbers[0]),
        base_weight=address.values(numbers[1]),
        row_scale=address.values(numbers[2]),
        normalized=normalized,
        scale=1.0 / temperature,
        summaries=summaries.data_ptr(),
        target_logit=target_logit.data_ptr(),
        loss=loss.data_ptr(),
        gradient=address.matrix(gradient if with_grad else None),
        gradient_dtype=address.DTYPE_CODE[gradient.dtype],
        shares=address.of(shares),
        where=cuda.where(logits),
    )
    return loss, gradient


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("matching_loss"),
    "cuda": _cuda,
}


def outputs(logits: Tensor, with_grad: bool, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialised losses of rows, float64 [T], and gradient, which is empty where none is asked for."""
    loss = logits.new_empty(logits.shape[:1], dtype=torch.float64)
    if with_grad and into is not None:
        return loss, into
    return loss, logits.new_empty(logits.shape if with_grad else (0,))


@_op.op("matching_loss")
def _matching_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    normalized: bool,
    temperature: float,
    with_grad: bool,
    backend: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    _checks.index_range("matching_loss", "target", target, logits.shape[1], backend)
    _checks.index_range("matching_loss", "exclude", exclude, logits.shape[1], backend)
    loss, gradient = _IMPLEMENTATIONS[backend](
        logits,
        target,
        weight,
        base_logits,
        base_weight,
        row_scale,
        Excluded(exclude, suppressed),
        normalized,
        temperature,
        with_grad,
    )
    return total(loss, backend).to(_rows.accumulator(logits.dtype)), gradient


@_matching_loss.register_fake
def _(
    logits,
    target,
    weight,
    base_logits,
    base_weight,
    row_scale,
    exclude,
    suppressed,
    normalized,
    temperature,
    with_grad,
    backend,
    overwrite,
):
    _, gradient = outputs(logits, with_grad)
    return logits.new_empty((), dtype=_rows.accumulator(logits.dtype)), gradient


_formed_gradient.register(_matching_loss, "matching_loss", inputs=13, differentiable=(0,))


@_op.op("matching_loss_rows")
def _matching_loss_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    normalized: bool,
    temperature: float,
    backend: str,
) -> Tensor:
    _checks.index_range("matching_loss", "target", target, logits.shape[1], backend)
    _checks.index_range("matching_loss", "exclude", exclude, logits.shape[1], backend)
    loss, _ = _IMPLEMENTATIONS[backend](
        logits,
        target,
        weight,
        base_logits,
        base_weight,
        row_scale,
        Excluded(exclude, suppressed),
        normalized,
        temperature,
        False,
    )
    return loss.to(_rows.accumulator(logits.dtype))


@_matching_loss_rows.register_fake
def _(
    logits, target, weight, base_logits, base_weight, row_scale, exclude, suppressed, normalized, temperature, backend
):
    return logits.new_empty(logits.shape[:1], dtype=_rows.accumulator(logits.dtype))


def _gradients(arguments: Sequence[Any], needed: list[bool], backend: str) -> Sequence[Tensor]:
    return _matching_loss(*arguments, True, backend, True)[1:]


_formed_gradient.register_rows(_matching_loss_rows, "matching_loss", _gradients, row_scale=5, differentiable=(0,))
