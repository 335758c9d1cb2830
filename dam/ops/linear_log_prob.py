"""linear_log_prob: `log_prob` fused with the language-model head, differentiable in head and hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from dam.ops import _backend, _checks, _head
from dam.ops import log_prob as _row_op


def linear_log_prob(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [T] or [T, J]
    *,
    bias: Tensor | None = None,  # [V]
    exclude: int | Tensor = -1,
    temperature: float = 1.0,
) -> Tensor:
    """`log_prob` on logits = hidden @ weight^T + bias, without storing them.

    Args:
        hidden: hidden states [T, D]; unit inner stride.
        weight: head weight [V, D], of the dtype of hidden.
        target: int64 [T] or [T, J]. -1 stands for no jump: log-probability 0, no gradient.
        bias: head bias [V].
        exclude, temperature: as for `log_prob`.

    Returns:
        float32 like target (float64 for float64 hidden). The backward pass recomputes the logits. Extra memory
        of either pass, beyond the gradients, is bounded by the environment variable DAM_WORKSPACE_MB (256
        unless set); a 16-bit head that is trained accumulates its gradient in float32.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.
    """
    op = "linear_log_prob"
    _checks.matrix(op, "hidden", hidden, "D")
    _checks.head(op, "weight", weight, "bias", bias, "hidden", hidden)
    rows = hidden.shape[0]
    targets = _checks.target(op, target, rows, hidden)
    excluded = _checks.exclude(op, exclude, rows, weight.shape[0], hidden)
    temperature = _checks.temperature(op, temperature, zero=False)
    backend = _backend.choose(op, _row_op._IMPLEMENTATIONS, hidden)
    value, _ = _linear_log_prob(hidden, weight, bias, targets, excluded, temperature, backend)
    return value.view(target.shape)


@torch.library.custom_op("dam::linear_log_prob", mutates_args=())
def _linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    exclude: Tensor | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _checks.index_range("linear_log_prob", "target", target, weight.shape[0])
    _checks.index_range("linear_log_prob", "exclude", exclude, weight.shape[0])
    value, log_escape = _row_op.outputs(hidden, target)
    for part, (memory,) in _head.chunks(hidden.shape[0], weight, arrays=1):
        value[part], log_escape[part] = _row_op._IMPLEMENTATIONS[backend](
            _head.logits(hidden[part], weight, bias, memory),
            target[part],
            None if exclude is None else exclude[part],
            temperature,
        )
    return value, log_escape


@_linear_log_prob.register_fake
def _(hidden, weight, bias, target, exclude, temperature, backend):
    return _row_op.outputs(hidden, target)


@torch.library.custom_op("dam::linear_log_prob_backward", mutates_args=())
def _linear_log_prob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _head.Gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))
    for part, (memory,) in _head.chunks(hidden.shape[0], weight, arrays=1):
        grad_logits = _row_op._BACKWARD[backend](
            grad[part],
            _head.logits(hidden[part], weight, bias, memory),
            target[part],
            log_escape[part],
            None if exclude is None else exclude[part],
            temperature,
            memory,
        )
        gradients.add(part, grad_logits)
    return gradients.finish()


@_linear_log_prob_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    target,
    log_escape,
    exclude,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
    backend,
):
    return _head.fake_gradients(hidden, weight, bias, (need_hidden, need_weight, need_bias))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, target, exclude, ctx.temperature, ctx.backend = inputs
    _, log_escape = output
    ctx.mark_non_differentiable(log_escape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, log_escape, exclude)


def _backward(ctx, grad, _grad_log_escape):
    if grad is None:
        return (None,) * 7
    hidden, weight, bias, target, log_escape, exclude = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    gradients = _linear_log_prob_backward(
        grad, hidden, weight, bias, target, log_escape, exclude, ctx.temperature, *needed, ctx.backend
    )
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None, None)


_linear_log_prob.register_autograd(_backward, setup_context=_setup_context)
