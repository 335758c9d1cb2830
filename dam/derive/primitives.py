"""What is known of a function: how a call of it is read, and the text of its derivatives.

A derivative is an expression in the names of the call's parameters, `y` for its result, `g` for the adjoint of that,
and `d_x` for the tangent of a parameter x. `m` stands for the module of the function called: one entry serves
numpy, torch and math where a function means the same in all.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dam.derive.trees import KEPT

Signature = inspect.Signature


@dataclass(frozen=True)
class Primitive:
    """A function with a derivative that is known.

    Attributes:
        name: as it is printed, "np.sin"; "" for an operator or a method.
        signature: its parameters, the supported ones alone: others are refused by name.
        partials: by parameter, the partial derivative of an elementwise function; g times it is un-broadcast.
        reverse: by parameter, the adjoint that a call adds to that of the argument.
        forward: the tangent of the result, as a sum over parameters.
        view: whether the result may share memory with an argument.
        shallow: whether what the result holds may, as of a copied list; not the result itself.
        fresh_shape: "same" as its one argument, "scalar", or None where it is not known.
    """

    name: str
    signature: Signature
    module: str = "np"
    partials: Mapping[str, str] = field(default_factory=dict)
    reverse: Mapping[str, str] = field(default_factory=dict)
    forward: Mapping[str, str] = field(default_factory=dict)
    rule: Callable[..., Any] | None = None
    view: bool = False
    shallow: bool = False
    shape: str | None = None
    function: Any = None  # of a rule: what it is the derivative of

    @functools.cached_property
    def differentiable(self) -> set[str]:
        return {*self.partials, *self.reverse}


# Differentiable functions by themselves (their identity), operators by type of node, methods and attributes by name.
FUNCTIONS: dict[Any, Primitive] = {}
OPERATORS: dict[type, Primitive] = {}
METHODS: dict[str, Primitive] = {}
ATTRIBUTES: dict[str, Primitive] = {}
# Functions whose result does not depend on its arguments in a way that has a slope: shapes, indices, comparisons.
WITHOUT_SLOPE: set[Any] = set()
METHODS_WITHOUT_SLOPE: set[str] = set()
ATTRIBUTES_WITHOUT_SLOPE = {"shape", "ndim", "size", "dtype", "device", "itemsize", "nbytes"}
# Functions that are differentiated as another one, written in the supported language.
WRITTEN: dict[Any, Callable[..., Any]] = {}
WRITTEN_METHODS: dict[str, Callable[..., Any]] = {}


def key(function: Any) -> Any:
    """What a function is found by; bound built-ins of the same name are not the same object each time."""
    try:
        hash(function)
    except TypeError:
        return id(function)
    return function


def signature(text: str) -> Signature:
    """Of "x, axis=None, *, keepdims=False"."""
    return _signature(text)


@functools.cache
def _signature(text: str) -> Signature:
    space: dict[str, Any] = {}
    exec(f"def f({text}): pass", space)  # the text is this library's own
    return inspect.signature(space["f"])


class Unsupported(Exception):
    """A call has an argument that its entry does not know; the message says which."""


def bound(primitive: Primitive, node: ast.expr) -> dict[str, ast.expr]:
    """Arguments of a call, operator or attribute by parameter, defaults filled in; of *rest a tuple.

    Raises:
        Unsupported: an argument is not among the parameters.
    """
    if isinstance(node, ast.BinOp):
        return {"x": node.left, "z": node.right}
    if isinstance(node, ast.UnaryOp):
        return {"x": node.operand}
    if isinstance(node, ast.Attribute):
        return {"x": node.value}
    assert isinstance(node, ast.Call)
    known = node.__dict__.get(_BOUND)
    if known is None or known[0] is not primitive:
        known = node.__dict__[_BOUND] = (primitive, _bound(primitive, node))
    return known[1]


_BOUND = f"{KEPT}bound"


def _bound(primitive: Primitive, node: ast.Call) -> dict[str, ast.expr]:
    positional = list(node.args)
    if primitive.name == "":
        assert isinstance(node.func, ast.Attribute)
        positional.insert(0, node.func.value)
    parameters = primitive.signature.parameters
    if not node.keywords and len(positional) == len(parameters):
        plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
        if plain and "keepdims" not in parameters and not any(isinstance(a, ast.Starred) for a in positional):
            return dict(zip(parameters, positional, strict=True))
    keywords = {k.arg: k.value for k in node.keywords if k.arg is not None}
    if len(keywords) != len(node.keywords) or any(isinstance(a, ast.Starred) for a in positional):
        raise Unsupported("a call with * or ** arguments has no derivative here")
    for one, other in (("dim", "axis"), ("keepdim", "keepdims"), ("input", "x"), ("tensors", "l")):
        if one in keywords and one not in parameters:
            keywords[other] = keywords.pop(one)
    try:
        arguments = primitive.signature.bind(*positional, **keywords)
    except TypeError as error:
        takes = str(primitive.signature)
        raise Unsupported(f"{ast.unparse(node.func)}: {error}; what has a derivative here takes {takes}") from None
    flag = arguments.arguments.get("keepdims")
    plain = isinstance(flag, ast.Constant) and isinstance(flag.value, bool)
    if primitive.module != "rt" and any(flag is one for one in positional) and not plain:
        # Of numpy's methods a dtype is in this place, of torch's keepdim.
        raise Unsupported(f"{ast.unparse(node.func)}: what is in the place of keepdims is neither True nor False")
    values: dict[str, ast.expr] = {}
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values[name] = ast.Tuple(list(arguments.arguments.get(name, ())), ast.Load())
        else:
            given = arguments.arguments.get(name)
            values[name] = ast.Constant(parameter.default) if given is None else given
    return values


_LISTED = (ast.List, ast.Tuple, ast.ListComp)


def with_arrays(node: ast.Call, parameters: Mapping[str, inspect.Parameter], lists: Collection[str | None]) -> ast.Call:
    """A call of numpy with np.array around lists that are written out in the place of an array.

    Args:
        node: the call, as it was written.
        parameters: those of the function, in their order.
        lists: parameters that are lists or tuples themselves.
    """
    if not any(isinstance(a, _LISTED) for a in (*node.args, *(k.value for k in node.keywords))):
        return node
    root: ast.expr = node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    if root is node.func:
        return node  # from numpy import f: what its array is called is not known

    def array(name: str | None, value: ast.expr) -> ast.expr:
        if name in lists or not isinstance(value, _LISTED):
            return value
        function = ast.copy_location(ast.Attribute(root, "array", ast.Load()), value)
        return ast.copy_location(ast.Call(function, [value], []), value)

    values = [array(name, value) for name, value in zip(parameters, node.args, strict=False)]
    keywords = [ast.keyword(k.arg, array(k.arg, k.value)) for k in node.keywords]
    return ast.copy_location(ast.Call(node.func, [*values, *node.args[len(values) :]], keywords), node)


def register(functions: Iterable[Any], primitive: Primitive) -> None:
    for function in functions:
        FUNCTIONS[key(function)] = primitive
