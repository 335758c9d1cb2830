"""What a user calls: derivatives of functions as functions whose source can be read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dam.derive import functions, primitives
from dam.derive.errors import DerivativeError
from dam.derive.module import Module
from dam.derive.normal import Callee

Function = Callable[..., Any]


def grad(f: Function, wrt: int | str | Sequence[int | str] = (0,), *, preserve_result: bool = False) -> Function:
    """The gradient of a scalar function, as a function of the same arguments.

    What f's free names stand for is a constant, as it is now. Nothing of f is run.

    Args:
        f: a function or lambda, of numbers, arrays of numpy or torch, and tuples, lists and dicts of these.
        wrt: parameters, by position or by name.
        preserve_result: return f's result too, after the gradients.

    Returns:
        A function that returns the gradient, of the structure and shape of its argument; a tuple for more than one.
        `source` gives its text.

    Raises:
        DerivativeError: f has a statement, a function or an argument without a derivative here; the message shows the
            line. The gradient raises it where the result is no scalar and where an argument holds integers.

    Source: van Merrienboer, Moldovan, Wiltschko, Tangent, arXiv 1809.09569 (derivatives as source code).
    """
    return _derived(f, "reverse", wrt, preserve_result, seeded=False)


def autodiff(
    f: Function,
    mode: str = "reverse",
    wrt: int | str | Sequence[int | str] = (0,),
    *,
    preserve_result: bool = False,
) -> Function:
    """The product of an adjoint with f's Jacobian (reverse), or of the Jacobian with a tangent (forward).

    Args:
        f, wrt: as for `grad`.
        mode: "reverse": it takes the adjoint of the result as `init_grad`, of its structure; a scalar's is 1
            unless given. "forward": it takes a tangent for each parameter x of wrt, as `d_x`, and has no default.
            Where f has a parameter of that name, as a derivative of a derivative may, `init_grad_2` or `d_x_2`.
        preserve_result: return f's result too, at the end.

    Returns:
        A function of f's arguments and of these, which returns adjoints of wrt, or the tangent of the result.

    Raises:
        DerivativeError: as for `grad`; or an adjoint or a tangent has another structure or shape than its value.
        ValueError: mode is neither.
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f"autodiff: mode is 'reverse' or 'forward'; got {mode!r}")
    return _derived(f, mode, wrt, preserve_result, seeded=True)


def _derived(
    f: Function, mode: str, wrt: int | str | Sequence[int | str], preserve_result: bool, *, seeded: bool
) -> Function:
    read = functions.of(f)
    arguments = read.node.args
    if arguments.vararg or arguments.kwarg:
        raise read.refuse(read.node, "a function with *args or **kwargs has no derivative here; name its parameters")
    module, callee = Module(), Callee(read, f)
    names = _names(read.name, callee.parameters, wrt)
    if mode == "forward":
        made = module.forward(callee, names, preserve_result)
    else:
        made = module.reverse(callee, names, preserve_result, seeded)
    return module.function(made)


def _names(function: str, parameters: list[str], wrt: int | str | Sequence[int | str]) -> list[str]:
    found = []
    for one in (wrt,) if isinstance(wrt, (int, str)) else wrt:
        known = one in parameters if isinstance(one, str) else -len(parameters) <= one < len(parameters)
        if not known:
            raise DerivativeError(
                f"{function} has no parameter {one!r} to differentiate in; it has {', '.join(parameters)}"
            )
        found.append(one if isinstance(one, str) else parameters[one])
    if not found or len(set(found)) != len(found):
        raise DerivativeError(f"wrt names parameters, each once; got {wrt!r}")
    return found


def source(f: Function) -> str:
    """The text of a derivative: a module that gives the same numbers where the library's runtime can be imported.

    Arrays of the function's surroundings are written out where they are small; a comment names those that are not.

    Raises:
        DerivativeError: f was not made by `grad` or `autodiff`.
    """
    text = getattr(f, "__dict__", {}).get(functions.TEXT)
    if text is None:
        raise DerivativeError(
            f"{getattr(f, '__name__', f)!r} was not derived; source is of what grad and autodiff return"
        )
    return text


def adjoint(f: Function) -> Callable[[Function], Function]:
    """Registers a derivative for a function, in all that is derived from now on.

        @adjoint(np.sinc)
        def sinc(g, y, x):
            return g * (np.cos(np.pi * x) - y) / x

    The rule takes the adjoint of the result, the result, and f's arguments, and returns the adjoint of each argument; a
    tuple of them where f takes several, with 0.0 for one without a derivative. It replaces what is known of f, and is
    itself differentiated where derivatives are derived again. It is for reverse mode.

    Args:
        f: any function that has a name in the code that calls it: of Python, C, or a library.
    """

    def register(rule: Function) -> Function:
        parameters = list(inspect.signature(rule).parameters.values())[2:]
        if not parameters:
            raise DerivativeError(f"{rule.__name__} must take (adjoint, result, *arguments of the function)")
        signature = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        reverse = {p.name: "" for p in parameters}
        entry = primitives.Primitive(_said(f), signature, reverse=reverse, rule=rule, view=True, function=f)
        primitives.FUNCTIONS[primitives.key(f)] = entry
        primitives.WITHOUT_SLOPE.discard(primitives.key(f))
        primitives.WRITTEN.pop(primitives.key(f), None)
        return rule

    return register


def _said(f: Function) -> str:
    return getattr(f, "__name__", "function").strip("<>") or "function"
