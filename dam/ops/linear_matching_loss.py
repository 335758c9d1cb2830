"""linear_matching_loss: `matching_loss` fused with the language-model head, forward and gradient in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import choice, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _formed_gradient, _group, _head, _linear, _op, _parallel, _rows
from dam.ops import matching_loss as _row_op


def linear_matching_loss(
    hidden: Tensor,  # [..., D]
    head_weight: Tensor,  # [V, D]
    target: Tensor,  # [..., J]
    weight: Tensor,  # [..., J]
    bias: Tensor | None = None,  # [V]
    *,
    lora: _head.LoRA | None = None,
    softcap: float | None = None,
    base_hidden: Tensor | None = None,  # [..., D']
    base_head_weight: Tensor | None = None,  # [V, D']
    base_bias: Tensor | None = None,  # [V]
    base_softcap: float | None = None,
    base_weight: Tensor | None = None,  # [...]
    row_scale: Tensor | None = None,  # [...]
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    normalized: bool = True,
    temperature: float = 1.0,
    reduction: str | None = None,
    group: Any = None,
) -> Tensor:
    """`matching_loss` on logits = hidden @ head_weight^T + bias, without storing them.

    With softcap on logits = softcap * tanh((hidden @ head_weight^T + bias) / softcap), which are differentiated through
    the cap.

    hidden, head_weight, bias and lora's factors are differentiated, each only if it requires grad: a frozen head
    costs no gradient matmul. Gradients are formed in the forward pass, so the loss takes one backward pass; a
    second one and a double backward raise. In float16 they are rounded before a loss scaler multiplies
    them: put the scale into row_scale instead, or use bfloat16. With reduction "none" what each row's loss is
    multiplied by is known in the backward pass only: each one forms the gradients, and makes the logits' matmul
    for it once more, and the base's.

    Args:
        hidden: hidden states [..., D]; unit inner stride.
        head_weight, bias: the head, [V, D] and [V], of the dtype of hidden.
        lora: an adapter on the head, `dam.LoRA(a [R, D], b [V, R], scale)`: its weight is then
            head_weight + scale * b @ a, which is never formed. The base has none.
        softcap: of the logits, > 0 and in their units, before temperature and exclusion. A bias of -inf then is a logit
            of -softcap: what may not be drawn goes into suppress.
        target, weight: as for `matching_loss`.
        base_hidden, base_head_weight, base_bias, base_softcap: make the base's logits in the same way; base_head_weight
            may be head_weight itself. Its soft cap is its own: base_softcap=None caps nothing.
        base_weight, row_scale, exclude, suppress, normalized, temperature, reduction: as for `matching_loss`.
        group: process group whose ranks each have some rows of the head, and the same of the base's, as for
            `linear_log_prob`. Gradients are then formed in the backward pass.

    Returns:
        Scalar, or [...] with reduction "none"; float32 (float64 for float64 hidden). Extra memory beyond the
        gradients is bounded by the environment variable DAM_WORKSPACE_MB (unless set 256, on a GPU 1.25% of its
        memory if that is more). Where a 16-bit head is trained and its rows do not fit that, the gradient of
        logits is held, 2 V bytes a row in bfloat16, 4 V in float32, up to the larger of DAM_WORKSPACE_MB and 4 V D
        bytes; the head's gradient in float32, 4 V D, is accumulated if these are not all rows, or nothing is held.
        DAM_LINEAR_FORM chooses other ways.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 11 and 14.
    """
    op = "linear_matching_loss"
    _checks.boolean(op, "normalized", normalized)
    base = (base_hidden, base_head_weight, base_weight)
    if any(value is None for value in base) and any(value is not None for value in (*base, base_bias, base_softcap)):
        raise ValueError(f"{op}: base_hidden, base_head_weight and base_weight must be given together")
    if _group.is_asked(group, head_weight):
        temperature = _checks.temperature(op, temperature, zero=False)
        divided = _head.Head(head_weight, bias, lora, softcap)
        of_base = None if base_head_weight is None else _head.Head(base_head_weight, base_bias, None, base_softcap)
        call = _parallel.of_head(
            op, group, _IMPLEMENTATIONS, hidden, divided, exclude, suppress, temperature, base_hidden, of_base
        )
        return _row_op.over_group(call, target, weight, base_weight, row_scale, normalized, reduction)
    hidden, lead = _checks.rows(op, "hidden", hidden, "D")
    head = _head.checked(op, hidden, head_weight, bias, lora, softcap)
    columns = head_weight.shape[0]
    target, weight, row_scale = _row_op.weighted_targets(op, hidden, lead, target, weight, row_scale)
    if base_hidden is not None and base_head_weight is not None and base_weight is not None:
        names = ("base_hidden", "base_head_weight", "base_bias", "base_softcap")
        base_hidden, base_lead = _checks.rows(op, "base_hidden", base_hidden, "D")
        base_softcap = _head.checked(
            op, base_hidden, base_head_weight, base_bias, softcap=base_softcap, names=names
        ).softcap
        _checks.like(op, "base_hidden", base_hidden, "hidden", hidden, shape=False)
        if base_lead != lead:
            wanted = ", ".join([*map(str, lead), "D"])
            got = [*base_lead, base_hidden.shape[1]]
            raise ValueError(f"{op}: base_hidden must have shape [{wanted}] like hidden; got {got}")
        if base_head_weight.shape[0] != columns:
            raise ValueError(
                f"{op}: base_head_weight must have {columns} rows like head_weight; got {list(base_head_weight.shape)}"
            )
        base_weight = _checks.vector(op, "base_weight", base_weight, lead, hidden)
        base_hidden, base_head_weight, base_weight = (
            base_hidden.detach(),
            base_head_weight.detach(),
            base_weight.detach(),
        )
        base_bias = None if base_bias is None else base_bias.detach()
    excluded = _excluded.checked(op, exclude, suppress, lead, columns, hidden)
    target, _ = _excluded.split(target, excluded)
    temperature = _checks.temperature(op, temperature, zero=False)
    row_scale = _row_op.reduced(op, reduction, row_scale, hidden)
    backend = choice.choose(op, _IMPLEMENTATIONS, hidden)
    arguments = (
        *head,
        target,
        weight,
        base_hidden,
        base_head_weight,
        base_bias,
        base_softcap,
        base_weight,
        row_scale,
        *excluded,
        normalized,
        temperature,
    )
    if reduction == "none":
        return _linear_matching_loss_rows(*arguments, backend).view(lead)
    loss, *_ = _linear_matching_loss(*arguments, list(_head.needed_of(head)), backend, True)
    return loss


def chunked(
    backend: str,
    head: _head.Projection,
    target: Tensor,
    weight: Tensor,
    base: _head.Projection | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    needed: _head.Needed,
    per_row: bool,
    shares: Tensor | None = None,  # [T, .]; filled by the row op, if it takes them
) -> tuple[Tensor, ...]:
    """Loss and gradients by library matmuls over chunks of rows, with the row op between them.

    The loss is a sum over rows, or with `per_row` that of each, float64 [T].
    """
    rows = head.hidden.shape[0]
    dtype = _head.gradient_dtype(head, backend) if any(needed) else None
    arrays = 1 if base is None else 2
    gradients = _head.Gradients(head, needed, _head.held_for(head, needed, arrays=arrays, backend=backend))
    if row_scale is None:
        row_scale = head.hidden.new_full((rows,), 1.0 / max(rows, 1), dtype=torch.float64)
    losses = head.hidden.new_zeros((rows,) if per_row else (), dtype=torch.float64)
    for part, memory in _head.chunks(head, arrays=arrays, backend=backend, gradient=dtype, held=gradients.held):
        base_logits = None if base is None else _head.logits(base.part(part), memory[1])
        gradient = (memory[arrays] if len(memory) > arrays else memory[0]) if any(needed) else None
        row_losses = []
        for some, logits, into in _head.blocks(head, part, memory[0], gradient):
            loss, _ = _row_op._IMPLEMENTATIONS[backend](
                logits,
                _rows.part(target, some),
                _rows.part(weight, some),
                None if base_logits is None else base_logits[some.start - part.start : some.stop - part.start],
                None if base_weight is None else _rows.part(base_weight, some),
                _rows.part(row_scale, some),
                exclude.part(some),
                normalized,
                temperature,
                any(needed),
                into,
                *(() if shares is None else (shares[some],)),
            )
            row_losses.append(loss)
        # Of the whole chunk, so that the order of its sum does not depend on blocks, nor these on threads' number.
        loss = row_losses[0] if len(row_losses) == 1 else torch.cat(row_losses)
        if per_row:
            losses[part] = loss
        else:
            losses += _row_op.total(loss, backend).to(_rows.accumulator(head.hidden.dtype))
        if gradient is not None:
            gradients.add_rows(part, gradient)
    return losses, *gradients.finish()


def _triton(
    head: _head.Projection,
    target: Tensor,
    weight: Tensor,
    base: _head.Projection | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    needed: _head.Needed,
    per_row: bool,
) -> tuple[Tensor, ...]:
    arguments = (head, target, weight, base, base_weight, row_scale, exclude, normalized, temperature)
    if not _linear.fused("linear_matching_loss", head, needed, 1 if base is None else 2):
        return chunked("triton", *arguments, needed, per_row)
    if row_scale is None:
        count = head.hidden.shape[0]
        row_scale = head.hidden.new_full((count,), 1.0 / max(count, 1), dtype=torch.float64)
    loss, rows = triton.launcher("linear_matching_loss")(
        head,
        target,
        weight,
        base,
        base_weight,
        row_scale,
        exclude,
        normalized,
        temperature,
        workspace=_rows.workspace_bytes(head.hidden.device),
    )
    gradients = _linear.fused_gradients("linear_matching_loss", head, base, rows, temperature, needed)
    return loss if per_row else _row_op.total(loss, "triton"), *gradients


def _cuda(
    head: _head.Projection,
    target: Tensor,
    weight: Tensor,
    base: _head.Projection | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    needed: _head.Needed,
    per_row: bool,
) -> tuple[Tensor, ...]:
    """By rows; by columns the gradient is made in a second pass."""
    arguments = (head, target, weight, base, base_weight, row_scale, exclude, normalized, temperature)
    if _head.form(head, needed, arrays=1 if base is None else 2, backend="cuda") != "columns":
        return chunked("cuda", *arguments, needed, per_row)
    rows = head.hidden.shape[0]
    shares = head.hidden.new_empty((rows, cuda.kernels.SHARES), dtype=torch.float32)
    loss, *_ = chunked("cuda", *arguments, (False,) * 5, per_row, shares)
    scale = 1.0 / rows if row_scale is None else row_scale.double()[:, None]
    return loss, *_linear.gradients_by_columns(
        head, base, target, weight.double() * scale / temperature, shares, exclude, temperature, needed
    )


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "torch": functools.partial(chunked, "torch"),
    "cpu": functools.partial(chunked, "cpu"),
    "triton": _triton,
    "cuda": _cuda,
}


@_op.op("linear_matching_loss")
def _linear_matching_loss(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    softcap: float | None,
    target: Tensor,
    weight: Tensor,
    base_hidden: Tensor | None,
    base_head_weight: Tensor | None,
    base_bias: Tensor | None,
    base_softcap: float | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    normalized: bool,
    temperature: float,
    needed: list[bool],
    backend: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = head_weight.shape[0]
    _checks.index_range("linear_matching_loss", "target", target, columns, backend)
    _checks.index_range("linear_matching_loss", "exclude", exclude, columns, backend)
    head = _head.Projection(hidden, head_weight, bias, low_hidden, low_weight, softcap)
    base = _base_of(base_hidden, base_head_weight, base_bias, base_softcap)
    loss, *gradients = _IMPLEMENTATIONS[backend](
        head,
        target,
        weight,
        base,
        base_weight,
        row_scale,
        Excluded(exclude, suppressed),
        normalized,
        temperature,
        needed,
        False,
    )
    return loss.to(_rows.accumulator(hidden.dtype)), *gradients


def _base_of(
    hidden: Tensor | None, head_weight: Tensor | None, bias: Tensor | None, softcap: float | None
) -> _head.Projection | None:
    if hidden is None or head_weight is None:
        return None
    return _head.Projection(hidden, head_weight, bias, softcap=softcap)


@_linear_matching_loss.register_fake
def _(
    hidden,
    head_weight,
    bias,
    low_hidden,
    low_weight,
    softcap,
    target,
    weight,
    base_hidden,
    base_head_weight,
    base_bias,
    base_softcap,
    base_weight,
    row_scale,
    exclude,
    suppressed,
    normalized,
    temperature,
    needed,
    backend,
    overwrite,
):
    gradients = _head.fake_gradients(
        _head.Projection(hidden, head_weight, bias, low_hidden, low_weight, softcap), needed
    )
    return hidden.new_empty((), dtype=_rows.accumulator(hidden.dtype)), *gradients


_formed_gradient.register(_linear_matching_loss, "linear_matching_loss", inputs=21, differentiable=(0, 1, 2, 3, 4))


@_op.op("linear_matching_loss_rows")
def _linear_matching_loss_rows(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    softcap: float | None,
    target: Tensor,
    weight: Tensor,
    base_hidden: Tensor | None,
    base_head_weight: Tensor | None,
    base_bias: Tensor | None,
    base_softcap: float | None,
    base_weight: Tensor | None,
    row_scale: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    normalized: bool,
    temperature: float,
    backend: str,
) -> Tensor:
    columns = head_weight.shape[0]
    _checks.index_range("linear_matching_loss", "target", target, columns, backend)
    _checks.index_range("linear_matching_loss", "exclude", exclude, columns, backend)
    head = _head.Projection(hidden, head_weight, bias, low_hidden, low_weight, softcap)
    base = _base_of(base_hidden, base_head_weight, base_bias, base_softcap)
    loss, *_ = _IMPLEMENTATIONS[backend](
        head,
        target,
        weight,
        base,
        base_weight,
        row_scale,
        Excluded(exclude, suppressed),
        normalized,
        temperature,
        (False,) * 5,
        True,
    )
    return loss.to(_rows.accumulator(hidden.dtype))


@_linear_matching_loss_rows.register_fake
def _(
    hidden,
    head_weight,
    bias,
    low_hidden,
    low_weight,
    softcap,
    target,
    weight,
    base_hidden,
    base_head_weight,
    base_bias,
    base_softcap,
    base_weight,
    row_scale,
    exclude,
    suppressed,
    normalized,
    temperature,
    backend,
):
    return hidden.new_empty(hidden.shape[:1], dtype=_rows.accumulator(hidden.dtype))


def _gradients(arguments: Sequence[Any], needed: list[bool], backend: str) -> Sequence[Tensor]:
    return _linear_matching_loss(*arguments, needed, backend, True)[1:]


_formed_gradient.register_rows(
    _linear_matching_loss_rows, "linear_matching_loss", _gradients, row_scale=13, differentiable=(0, 1, 2, 3, 4)
)
