"""Registers the ops with torch, at a lower price of each call than torch.library.custom_op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("dam", "FRAGMENT")


class Op:
    """The op dam::<name> of a function of tensors, numbers and strings that changes none of its arguments.

    torch.library.custom_op puts several calls of Python around each of its ops, and an autograd kernel that costs more
    than a small op itself. Here the dispatcher calls the function, and a gradient comes from an autograd.Function; a
    compiler, which pays once, sees the formula that `register_autograd` tells torch. Calls take positional arguments,
    all of them.
    """

    def __init__(self, name: str, function: Callable):
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.name = f"dam::{name}"
        self.overload = getattr(torch.ops.dam, name).default
        self._function = _function(self.name, self.overload, self._refuse, None)
        self._registered = False  # an autograd kernel, to be stepped over

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return self._function.apply(*args)
        if not self._registered:
            return self.overload(*args)
        if getattr(forward_ad, "_current_level", -1) >= 0:
            return self._function.apply(*args)  # which refuses; the dispatcher would call the tangent 0
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _refuse(self, ctx, *grads):
        raise RuntimeError(f"{self.name} has no gradient")

    def register_fake(self, fake: Callable) -> Callable:
        return torch.library.register_fake(self.name, fake, lib=_LIBRARY)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library.register_autograd; no tensor in a list of them has a gradient."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)
        self._function, self._registered = _function(self.name, self.overload, backward, setup_context), True


def _function(
    name: str, overload: Callable, backward: Callable, setup_context: Callable | None
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            gradients = result if isinstance(result, tuple) else (result,)
            return tuple(None if isinstance(gradient, list) else gradient for gradient in gradients)

    Function.__name__ = Function.__qualname__ = name
    return Function


def op(name: str) -> Callable[[Callable], Op]:
    """Decorator: `Op` of a function."""
    return lambda function: Op(name, function)
