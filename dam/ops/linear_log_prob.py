"""linear_log_prob: `log_prob` fused with the language-model head, differentiable in head and hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import choice, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _group, _head, _linear, _memory, _op, _parallel, _rows, _softcap
from dam.ops import log_prob as _row_op


@_checks.renamed("weight", "head_weight")
def linear_log_prob(
    hidden: Tensor,  # [..., D]
    head_weight: Tensor,  # [V, D]
    target: Tensor,  # [...] or [..., J]
    bias: Tensor | None = None,  # [V]
    *,
    lora: _head.LoRA | None = None,
    softcap: float | None = None,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    group: Any = None,
) -> Tensor:
    """`log_prob` on logits = hidden @ head_weight^T + bias, without storing them.

    With softcap on logits = softcap * tanh((hidden @ head_weight^T + bias) / softcap).

    Args:
        hidden: hidden states [..., D]; unit inner stride.
        head_weight, bias: the head, [V, D] and [V], of the dtype of hidden.
        target: int64 [...] or [..., J]. -1 stands for no jump: log-probability 0, no gradient.
        lora: an adapter on the head, `dam.LoRA(a [R, D], b [V, R], scale)`, differentiated too: the head's weight is
            then head_weight + scale * b @ a, which is never formed.
        softcap: of the logits, > 0 and in their units, before temperature and exclusion. A bias of -inf then is a logit
            of -softcap: what may not be drawn goes into suppress.
        exclude, suppress, temperature: as for `log_prob`.
        group: process group whose ranks each have some rows of the head, as for `linear_jump`. Gradients of the head's
            tensors are of these rows, those of hidden states are summed over ranks: one all-reduce of [T, D].

    Returns:
        float32 like target (float64 for float64 hidden). The backward pass computes the logits again, unless they are
        few: logits that with their gradient take no more than half of DAM_WORKSPACE_MB are kept for it. Extra memory of
        either pass, beyond the gradients, is bounded by that variable (unless set 256, on a GPU 1.25% of its memory if
        that is more), with what `linear_matching_loss` adds where a 16-bit head is trained; on a CPU it
        is kept as `linear_jump` says.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.
    """
    op = "linear_log_prob"
    if _group.is_asked(group, head_weight):
        temperature = _checks.temperature(op, temperature, zero=False)
        divided = _head.Head(head_weight, bias, lora, softcap)
        call = _parallel.of_head(op, group, _IMPLEMENTATIONS, hidden, divided, exclude, suppress, temperature)
        return _row_op.over_group(call, target)
    if lora is None and _excluded.is_nothing(suppress) and _op.at_once(hidden, head_weight, bias, target, exclude):
        logits = _head.at_once(hidden, head_weight, bias, softcap)
        found = None if logits is None else _row_op.at_once(logits, target, exclude, temperature)
        if found is not None:
            return found
    hidden, lead = _checks.rows(op, "hidden", hidden, "D")
    head = _head.checked(op, hidden, head_weight, bias, lora, softcap)
    targets = _checks.target(op, target, lead, hidden)
    excluded = _excluded.checked(op, exclude, suppress, lead, head_weight.shape[0], hidden)
    targets, never = _excluded.split(targets, excluded)
    temperature = _checks.temperature(op, temperature, zero=False)
    backend = choice.choose(op, _IMPLEMENTATIONS, hidden)
    keep = backend in _KEEPS and _head.keeps_logits(head, _head.needed_of(head), backend)
    value, log_escape, _ = _linear_log_prob(*head, targets, *excluded, temperature, keep, backend)
    value = _excluded.with_never(value, never, log_escape)
    return value if value.shape == target.shape else value.view(target.shape)  # a view is one more node for autograd


def chunked(
    backend: str, head: _head.Projection, target: Tensor, exclude: Excluded, temperature: float
) -> tuple[Tensor, Tensor]:
    """Values and log escape rates by library matmuls over chunks of rows, with the row op after each."""
    rows, out = head.hidden.shape[0], None
    for part, (memory,) in _head.chunks(head, arrays=1, backend=backend):
        found = _row_op._IMPLEMENTATIONS[backend](
            _head.logits(head.part(part), memory),
            _rows.part(target, part),
            exclude.part(part),
            temperature,
        )
        if part == slice(0, rows):
            return found
        out = out or _row_op.outputs(head.hidden, target)
        for whole, piece in zip(out, found, strict=True):
            whole[part] = piece
    return out or _row_op.outputs(head.hidden, target)


def chunked_backward(
    backend: str,
    grad: Tensor,
    head: _head.Projection,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """Gradients of a head's tensors: the logits again, and their gradient in their place or beside them."""
    gradients = _head.Gradients(head, needed, _head.held_for(head, needed, arrays=1, backend=backend))
    dtype = _head.gradient_dtype(head, backend)
    for part, memory in _head.chunks(head, arrays=1, backend=backend, gradient=dtype, held=gradients.held):
        for rows, logits, into in _head.blocks(head, part, memory[0], memory[-1]):
            pull, aim, escape = (_rows.part(x, rows) for x in (grad, target, log_escape))
            _row_op._BACKWARD[backend](pull, logits, aim, escape, exclude.part(rows), temperature, into)
        gradients.add_rows(part, memory[-1])
    return gradients.finish()


def kept_backward(
    backend: str,
    logits: Tensor,
    grad: Tensor,
    head: _head.Projection,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """Gradients of a head's tensors from the logits of all rows, which stay as they are for another backward pass."""
    gradients = _head.Gradients(head, needed)
    dtype = _head.gradient_dtype(head, backend)
    with _memory.work_arrays((logits.shape[0], logits.shape[1]), [dtype], logits.device) as (into,):
        _row_op._BACKWARD[backend](grad, logits, target, log_escape, exclude, temperature, into)
        if head.softcap is not None:
            _softcap.differentiated(into, logits, head.softcap)
        gradients.add_rows(slice(0, logits.shape[0]), into)
    return gradients.finish()


def _triton(head: _head.Projection, *arguments: Any) -> tuple[Tensor, Tensor]:
    return triton.launcher("linear_log_prob")(
        head, *arguments, library=_linear.library(head), workspace=_rows.workspace_bytes(head.hidden.device)
    )


def _triton_backward(
    grad: Tensor,
    head: _head.Projection,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    if not _linear.fused("linear_log_prob", head, needed):
        return chunked_backward("triton", grad, head, target, log_escape, exclude, temperature, needed)
    rows = triton.launcher("linear_log_prob", "rows_of")(grad, target, log_escape, exclude, temperature)
    return _linear.fused_gradients("linear_log_prob", head, None, rows, temperature, needed)


def _cuda_backward(
    grad: Tensor,
    head: _head.Projection,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    if _head.form(head, needed, arrays=1, backend="cuda") != "columns":
        return chunked_backward("cuda", grad, head, target, log_escape, exclude, temperature, needed)
    pull = -grad.double() / temperature
    counted = _rows.drop_excluded(target, exclude) >= 0
    largest = torch.finfo(torch.float32).max
    coefficient = torch.where(counted, pull, 0.0).sum(dim=1).clamp(-largest, largest).float()
    reference = log_escape.double() * temperature
    high = reference.float()
    nothing = torch.zeros_like(high)
    shares = torch.stack((coefficient, high, (reference - high).float(), nothing, nothing, nothing), dim=1)
    return _linear.gradients_by_columns(head, None, target, pull, shares, exclude, temperature, needed)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "torch": functools.partial(chunked, "torch"),
    "cpu": functools.partial(chunked, "cpu"),
    "triton": _triton,
    "cuda": functools.partial(chunked, "cuda"),
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "torch": functools.partial(chunked_backward, "torch"),
    "cpu": functools.partial(chunked_backward, "cpu"),
    "triton": _triton_backward,
    "cuda": _cuda_backward,
}


_KEEPS = ("torch", "cpu", "cuda")  # Triton's forward pass leaves no logits in its fused form, and chunks in the other


@_op.op("linear_log_prob")
def _linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    softcap: float | None,
    target: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, log escape rates, and the logits if they are to be kept, else an empty tensor."""
    _checks.index_range("linear_log_prob", "target", target, weight.shape[0], backend)
    _checks.index_range("linear_log_prob", "exclude", exclude, weight.shape[0], backend)
    head = _head.Projection(hidden, weight, bias, low_hidden, low_weight, softcap)
    excluded = Excluded(exclude, suppressed)
    kept = _memory.lent_array(_kept_shape(hidden, weight, keep), _rows.accumulator(hidden.dtype), hidden.device)
    if keep:
        value, log_escape = _row_op._IMPLEMENTATIONS[backend](_head.logits(head, kept), target, excluded, temperature)
    else:
        value, log_escape = _IMPLEMENTATIONS[backend](head, target, excluded, temperature)
    return value, log_escape, kept


def _kept_shape(hidden: Tensor, weight: Tensor, keep: bool) -> tuple[int, int]:
    return (hidden.shape[0], weight.shape[0]) if keep else (0, 0)


@_linear_log_prob.register_fake
def _(hidden, weight, bias, low_hidden, low_weight, softcap, target, exclude, suppressed, temperature, keep, backend):
    kept = hidden.new_empty(_kept_shape(hidden, weight, keep), dtype=_rows.accumulator(hidden.dtype))
    return *_row_op.outputs(hidden, target), kept


@_op.op("linear_log_prob_backward")
def _linear_log_prob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    softcap: float | None,
    target: Tensor,
    log_escape: Tensor,
    logits: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = _head.Projection(hidden, weight, bias, low_hidden, low_weight, softcap)
    kept = functools.partial(kept_backward, backend, logits)
    backward: Callable[..., Any] = _BACKWARD[backend] if logits.numel() == 0 else kept
    return backward(grad, head, target, log_escape, Excluded(exclude, suppressed), temperature, needed)


@_linear_log_prob_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    low_hidden,
    low_weight,
    softcap,
    target,
    log_escape,
    logits,
    exclude,
    suppressed,
    temperature,
    needed,
    backend,
):
    return _head.fake_gradients(_head.Projection(hidden, weight, bias, low_hidden, low_weight, softcap), needed)


def _setup_context(ctx, inputs, output):
    *head, ctx.softcap, target, exclude, suppressed, ctx.temperature, _, ctx.backend = inputs
    _, log_escape, logits = output
    ctx.mark_non_differentiable(log_escape, logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*head, target, log_escape, logits, exclude, suppressed)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    *head, target, log_escape, logits, exclude, suppressed = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    gradients = _linear_log_prob_backward(
        grad, *head, ctx.softcap, target, log_escape, logits, exclude, suppressed, ctx.temperature, needed, ctx.backend
    )
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *[None] * 7)


_linear_log_prob.register_autograd(_backward, setup_context=_setup_context)
