"""Autograd for losses whose gradient is formed in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import address, cuda, triton
from dam.ops import _op


def _cuda_scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in place, without waiting for the device to learn the factor."""
    kept = address.readable(factor.reshape(1))
    code = address.DTYPE_CODE[gradient.dtype]
    cuda.kernels.scale(
        gradient=gradient.data_ptr(),
        dtype=code,
        count=gradient.numel(),
        factor=address.values(kept),
        where=cuda.where(gradient),
    )
    return gradient


def _scaled(gradient: Tensor, factor: Tensor, overwrite: bool) -> Tensor:
    if type(gradient) is not Tensor or torch.compiler.is_compiling():
        return gradient * factor  # being traced: a compiler plans the memory itself
    # The usual upstream gradient is exactly 1; on a CPU looking is cheaper than a pass over the gradient, and on a GPU
    # a kernel looks.
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    if not overwrite:
        return gradient * factor
    # float64 is the reference's.
    if gradient.is_cuda and gradient.dtype != torch.float64:
        if triton.why_unavailable() is None:
            return triton.launcher("formed_gradient", "scale")(gradient, factor)
        if cuda.why_unavailable() is None:
            return _cuda_scaled(gradient, factor)
    return gradient.mul_(factor)


def register(op: _op.Op, name: str, inputs: int, differentiable: Sequence[int]) -> None:
    """Registers the backward pass of `op`, whose outputs are (loss, gradient of each differentiable input).

    The gradient of an input that needs none is an empty tensor. The op's last argument, `overwrite`, says
    that its caller drops the gradients: then backward scales them in place and none is ever held twice.
    They are handed out once, so backward runs once.
    """

    def setup_context(ctx, inputs, output):
        _, *gradients = output
        ctx.overwrite = inputs[-1]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.gradients = [
            gradient if ctx.needs_input_grad[i] else None for i, gradient in zip(differentiable, gradients, strict=True)
        ]

    def backward(ctx, grad_loss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no double backward: do not pass create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError(
                f"{name} was differentiated twice. Its gradient is formed in the forward pass and handed out once: "
                "call it again for another backward pass"
            )
        gradients, ctx.gradients = ctx.gradients, None
        result: list[Tensor | None] = [None] * inputs
        for i, gradient in zip(differentiable, gradients, strict=True):
            if gradient is not None and grad_loss is not None:
                result[i] = _scaled(gradient, grad_loss, ctx.overwrite)
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)


def register_rows(
    op: _op.Op,
    name: str,
    gradients: Callable[[Sequence[Any], list[bool], str], Sequence[Tensor]],
    row_scale: int,
    differentiable: Sequence[int],
) -> None:
    """Registers the backward pass of `op`, whose output is the loss of each row, by that of their sum.

    What a row's loss is multiplied by is then known, and goes into row_scale, which is the op's argument of that
    index: `gradients`, of the op's arguments up to its last, the backend, forms the gradients of the differentiable
    ones that are needed.
    """

    def setup_context(ctx, inputs, output):
        *arguments, ctx.backend = inputs
        tensors = [isinstance(x, Tensor) for x in arguments]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x if is_one else None for x, is_one in zip(arguments, tensors, strict=True)))
        ctx.others = [None if is_one else x for x, is_one in zip(arguments, tensors, strict=True)]

    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no double backward: do not pass create_graph=True")
        result: list[Tensor | None] = [None] * (len(ctx.others) + 1)
        if grad is None:
            return tuple(result)
        arguments = [x if y is None else y for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
        arguments[row_scale] = grad.double() * arguments[row_scale]
        needed = [ctx.needs_input_grad[i] for i in differentiable]
        for i, need, gradient in zip(differentiable, needed, gradients(arguments, needed, ctx.backend), strict=True):
            result[i] = gradient if need else None
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)
