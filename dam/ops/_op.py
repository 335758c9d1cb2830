"""Registers the ops with torch, at a lower price of each call than torch.library.custom_op."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dam.backends import choice, cpu


def _private(name: str) -> Any:
    """What torch has under a name below `torch` that it does not promise to keep.

    Raises:
        ImportError: it is gone. Doing without it would go unnoticed: gradients or tangents taken for 0.
    """
    found: Any = torch
    for part in name.split("."):
        if not hasattr(found, part):
            raise ImportError(
                f"dam rests on torch.{name}, which torch {torch.__version__} does not have: install a release of torch "
                "that dam's README says was tried"
            )
        found = getattr(found, part)
    return found


# Every name of that kind; `make test-versions` tries them on the oldest and the newest torch.
_transforms_active = _private("_C._are_functorch_transforms_active")
_BelowAutograd = _private("_C._AutoDispatchBelowAutograd")
_destroy = _private("library.Library._destroy")
_COMPLIANT = _private("Tag.pt2_compliant_tag")
_private("autograd.forward_ad._current_level")  # changes, so calls read it where it is
_keys_of = _private("_C._dispatch_keys")
_keys_of_thread = _private("_C._dispatch_tls_local_include_set")
_function_modes = _private("_C._len_torch_function_stack")
_profiled = _private("_C._autograd._profiler_enabled")
_KeySet, _Key = _private("_C.DispatchKeySet"), _private("_C.DispatchKey")
# Decorator of what torch.compile calls as it is. torch.compiler.disable would load the compiler when dam is imported.
untraced = _private("_compile._disable_dynamo")
assert_async = _private("_assert_async")  # on a GPU a device-side assertion
is_wrapper = _private("utils._python_dispatch.is_traceable_wrapper_subclass")

_libraries: dict[str, torch.library.Library] = {}


def _keys(*names: str) -> int:
    keys = _KeySet(getattr(_Key, names[0]))
    for name in names[1:]:
        keys |= _KeySet(getattr(_Key, name))
    return keys.raw_repr()


if cpu.kernels is not None:
    # Of a dense tensor on the CPU that is not named, a view to be negated, a transform's or the like; and of a thread
    # without modes, transforms or a tracer. Those of autograd lack in inference mode.
    cpu.kernels.watch(
        keys_of=_keys_of,
        keys_of_thread=_keys_of_thread,
        function_modes=_function_modes,
        profiled=_profiled,
        forward_ad=forward_ad,
        plain=[_keys("CPU", "AutocastCPU"), _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")],
        no_modes=[_keys("BackendSelect"), _keys("BackendSelect", "ADInplaceOrView")],
    )


def ordinary(*args: Any) -> int:
    """1 if torch's dispatcher would do nothing with a call but call the op's function; 2 if also record it; else 0.

    Nothing of torch's sees what an op's function is then called without: neither modes, subclasses nor a profiler.
    """
    if torch.compiler.is_compiling() or cpu.kernels is None:
        return 0
    return cpu.kernels.ordinary(*args) or 0


def at_once(*args: Any) -> bool:
    """Whether an op's C++ kernel may be called before its checks: an ordinary call, and no backend asked for by name.

    The kernel looks at its arguments and returns None if one does not fit; then the checks find what that is.
    """
    return ordinary(*args) == 1 and choice.is_free()


def _schema(function: Callable) -> str:
    """The function's arguments and results in the language of torch's schemas."""
    hints = typing.get_type_hints(function)
    for name, hint in hints.items():
        if typing.get_origin(hint) is list:  # torch 2.6 knows it by its old name only
            hints[name] = typing.List[typing.get_args(hint)]  # type: ignore[misc]  # noqa: UP006
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=hints[name]) for name, parameter in signature.parameters.items()]

    def prototype():
        raise NotImplementedError  # only its signature is looked at

    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=hints["return"]
    )
    return torch.library.infer_schema(prototype, mutates_args=())


class Op:
    """The op dam::<name> of a function of tensors, numbers and strings that changes none of its arguments.

    torch.library.custom_op puts several calls of Python around each of its ops, and an autograd kernel that costs more
    than a small op itself. Here the dispatcher calls the function, and the gradient of an eager call comes from an
    autograd.Function; what traces calls, and pays once, gets the op with an autograd kernel by the same formulas. An
    op without `register_autograd` refuses a gradient. An `ordinary` call on a CPU is one of the function itself. Calls
    take positional arguments, all of them.
    """

    def __init__(self, name: str, function: Callable):
        if name in _libraries:  # its module is being loaded again
            _destroy(_libraries.pop(name))
        library = _libraries[name] = torch.library.Library("dam", "FRAGMENT")
        library.define(name + _schema(function), tags=(_COMPLIANT,))
        library.impl(name, function, "CompositeExplicitAutograd")
        self.name, self.function = f"dam::{name}", function
        self.overload = getattr(torch.ops.dam, name).default
        self._library = library
        self._backward: Callable = self._refuse
        self._setup_context: Callable | None = None
        torch.library.register_autograd(self.name, self._gradient, setup_context=self._keep, lib=library)
        self._differentiable = _autograd_function(self)

    def __call__(self, *args: Any) -> Any:
        kind = ordinary(*args)
        if kind == 2:
            return self._differentiable.apply(*args)
        if kind == 1:
            with _BelowAutograd():
                return self.function(*args)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.overload(*args)
        if self._setup_context is not None and forward_ad._current_level >= 0:
            return self._differentiable.apply(*args)  # which refuses; the dispatcher would call the tangent 0
        if _transforms_active():
            return self.overload(*args)  # a tensor inside vmap does not say that the one around it requires a gradient
        if torch.is_grad_enabled():
            for x in args:  # not any(...): a generator costs a small call a microsecond
                if isinstance(x, Tensor) and x.requires_grad:
                    return self._differentiable.apply(*args)
        with _BelowAutograd():
            return self.overload(*args)

    def register_fake(self, fake: Callable) -> Callable:
        return torch.library.register_fake(self.name, fake, lib=self._library)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library.register_autograd; no tensor in a list of them has a gradient."""
        self._backward, self._setup_context = backward, setup_context

    def _gradient(self, ctx, *grads):
        return self._backward(ctx, *grads)

    def _keep(self, ctx, inputs, output):
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _refuse(self, ctx, *grads):
        raise RuntimeError(f"{self.name} has no gradient")


def _autograd_function(op: Op) -> type[torch.autograd.Function]:
    def forward(ctx, *inputs):
        with _BelowAutograd():
            output = (op.function if ordinary(*inputs) else op.overload)(*inputs)
        op._keep(ctx, inputs, output)
        return output

    def backward(ctx, *grads):
        result = op._gradient(ctx, *grads)
        gradients = result if isinstance(result, tuple) else (result,)
        return tuple(None if isinstance(gradient, list) else gradient for gradient in gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # Named when it is made: torch's node, which anomaly mode speaks of, takes its name then.
    return type(op.name.replace("::", "_"), (torch.autograd.Function,), methods)


def op(name: str) -> Callable[[Callable], Op]:
    """Decorator: `Op` of a function."""
    return lambda function: Op(name, function)
