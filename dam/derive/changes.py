"""What plain functions write into, as their source tells: a call without a derivative runs as it is written.

Values are looked at as pairs of sets of names: those whose memory a value may be, and those whose memory may be within
it, as a list has its items'.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dam.derive import functions
from dam.derive.errors import DerivativeError, Line
from dam.derive.functions import Source
from dam.derive.trees import COMPREHENSIONS, children, walk

# Methods that change what they are called on, and have no derivative here.
MUTATORS = {
    "extend", "insert", "remove", "clear", "sort", "reverse", "update", "setdefault", "popitem", "fill", "put",
    "resize", "partition", "shuffle", "itemset", "setflags", "add", "discard",
}  # fmt: skip
_IN_PLACE = {
    *"setitem delitem setattr iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
}
# Functions of libraries that write into their first argument.
_INTO_FIRST = {"put", "copyto", "place", "putmask", "fill_diagonal", "put_along_axis", "shuffle", "setitem", "delitem"}
FRESH_METHODS = {"copy", "clone", "astype", "tolist", "sum", "mean", "dot", "max", "min"}
VIEWS = {"asarray", "asanyarray", "reshape", "ravel", "transpose", "squeeze", "expand_dims", "swapaxes", "moveaxis",
         "broadcast_to", "atleast_1d", "atleast_2d", "diag", "flip", "split", "as_tensor", "from_numpy"}  # fmt: skip
_VIEWING_METHODS = VIEWS | {"view", "get", "items", "values", "detach", "numpy", "diagonal", "flatten", "unsqueeze",
                            "permute", "expand", "contiguous", "chunk", "unbind", "narrow", "select", "t"}  # fmt: skip
_VIEWING_ATTRIBUTES = {"T", "mT", "real", "imag", "flat", "data"}
_NUMBERS = {"shape", "ndim", "size", "dtype", "device"}
# Builtins whose result goes over what they are given, and those that make a new container of its items.
_OVER = {"enumerate", "zip", "reversed", "iter", "map", "filter", "next", "max", "min"}
_CONTAINERS = {"list", "tuple", "dict", "set", "sorted"}
_LIBRARIES = sys.stdlib_module_names | {"numpy", "torch", "scipy", "dam"}


class Change(NamedTuple):
    """A write into an argument; `maybe` where it is one if the argument is an array or a list, and not of others.

    So it is of augmented assignments, of methods that go by the name of one that writes, and of attributes.
    """

    line: Line
    maybe: bool


class Parts(NamedTuple):
    own: frozenset[str]
    within: frozenset[str]

    def item(self) -> Parts:
        both = self.own | self.within
        return Parts(both, both)

    def __or__(self, other: tuple[Any, ...]) -> Parts:
        return Parts(self.own | other[0], self.within | other[1])


NOTHING = Parts(frozenset(), frozenset())


def changes_itself(method: str) -> bool:
    """Whether a method may change what it is called on, by its name: append, sort, add_ of torch, __setitem__."""
    if method.startswith("__"):
        return method[2:-2] in _IN_PLACE
    return method in MUTATORS or method in ("pop", "append") or (method.endswith("_") and method != "requires_grad_")


def parts(node: ast.AST | None, known: Callable[[str], Parts], resolve: Callable[[ast.expr], Any]) -> Parts:
    """What the value of an expression may share memory with."""

    def of(one: ast.AST | None) -> Parts:
        return parts(one, known, resolve)

    def all_of(some: list[Any]) -> Parts:
        found = NOTHING
        for one in some:
            found |= of(one)
        return found

    match node:
        case ast.Name():
            return known(node.id)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return of(value).item()
        case ast.Attribute():
            return NOTHING if node.attr in _NUMBERS else of(node.value).item()
        case ast.IfExp():
            return of(node.body) | of(node.orelse)
        case ast.BoolOp():
            return all_of(node.values)
        case ast.NamedExpr():
            return of(node.value)
        case ast.List() | ast.Tuple() | ast.Set():
            return Parts(frozenset(), all_of(node.elts).item().own)
        case ast.Dict():
            return Parts(frozenset(), all_of(node.values).item().own)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return Parts(frozenset(), of(node.elt).item().own)
        case ast.DictComp():
            return Parts(frozenset(), of(node.value).item().own)
        case ast.BinOp() if any(isinstance(side, (ast.List, ast.Tuple)) for side in (node.left, node.right)):
            return Parts(frozenset(), all_of([node.left, node.right]).within)
        case ast.Call():
            given = [*node.args, *(k.value for k in node.keywords)]
            found = resolve(node.func)
            if found is None and isinstance(node.func, ast.Attribute):
                return of(node.func.value).item() if node.func.attr in _VIEWING_METHODS else NOTHING
            called = getattr(found, "__name__", "")
            if inspect.isfunction(found) and _is_plain(found):
                return all_of(given).item()
            if called in _CONTAINERS:
                return Parts(frozenset(), all_of(given).within)
            return all_of(given).item() if called in VIEWS | _OVER else NOTHING
    return NOTHING


def _is_plain(function: Any) -> bool:
    """Whether it is of no library, and not derived, which puts back what it writes into."""
    return _library(function) not in _LIBRARIES and not hasattr(function, functions.TEXT)


def _library(found: Any) -> str:
    module = getattr(found, "__module__", None)
    return module.split(".")[0] if isinstance(module, str) else ""


def is_pure(call: ast.Call, found: Any) -> bool:
    """Whether a call is of a library's function or method that reads its arguments and no more."""
    if found is None:
        return isinstance(call.func, ast.Attribute) and call.func.attr in FRESH_METHODS | _VIEWING_METHODS
    return isinstance(found, (np.ufunc, type)) or _library(found) in _LIBRARIES


def of_call(
    call: ast.Call, found: Any, line: Line, seen: dict[Any, dict[str, Change]]
) -> Iterator[tuple[ast.expr, Change]]:
    """The arguments of a call that it writes into.

    Args:
        found: what is called, None for a method.
        line: of the call.
        seen: by code object what functions write into that were looked at; added to.
    """
    function = call.func
    if found is None and isinstance(function, ast.Attribute) and changes_itself(function.attr):
        yield function.value, Change(line, True)
    called = function.attr if isinstance(function, ast.Attribute) else getattr(found, "__name__", "")
    of_library = not (inspect.isfunction(found) and _is_plain(found))
    if of_library and called in _INTO_FIRST and call.args:
        yield call.args[0], Change(line, False)
    if of_library:
        yield from ((k.value, Change(line, False)) for k in call.keywords if k.arg == "out")
        if isinstance(found, np.ufunc):
            yield from ((one, Change(line, False)) for one in call.args[found.nin :])
        return
    changed = of_function(found, seen)
    if not changed:
        return
    arguments = inspect.signature(found).parameters
    named = [p for p, one in arguments.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    given: list[tuple[str | None, ast.expr]] = []
    for k, one in enumerate(call.args):
        starred = isinstance(one, ast.Starred) or k >= len(named)
        given.append((None if starred else named[k], one))
    given += [(k.arg, k.value) for k in call.keywords]
    for parameter, value in given:
        if parameter in changed:
            yield value, changed[parameter]
        elif parameter is None or parameter not in arguments:  # one of several
            yield value, next(iter(changed.values()))


def of_function(function: Any, seen: dict[Any, dict[str, Change]]) -> dict[str, Change]:
    """By parameter how a function writes into it; nothing of one without a source."""
    code = function.__code__
    if code not in seen:
        found = seen[code] = {}  # of a call within its own course nothing more is known
        try:
            source = functions.of(function)
        except DerivativeError:
            return found
        _Body(source, found, seen)
    return seen[code]


def _of_attribute(node: ast.expr) -> bool:
    """Whether what is written into is of an object's attribute, which no array has but for its views."""
    return any(isinstance(n, ast.Attribute) and n.attr not in _VIEWING_ATTRIBUTES for n in walk(node))


class _Body:
    """The statements of a function in their order, with what each name may share memory with at the time."""

    def __init__(self, source: Source, changed: dict[str, Change], seen: dict[Any, dict[str, Change]]) -> None:
        self.source, self.changed, self.seen = source, changed, seen
        given = source.node.args
        named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
        self.known = {n: Parts(frozenset({n}), frozenset({n})) for n in named}
        self.block(source.node.body)

    def resolve(self, node: ast.expr) -> Any:
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.known or node.id not in self.source.namespace:
            return None
        value = self.source.namespace[node.id]
        for attribute in reversed(path):
            if not inspect.ismodule(value):
                return None
            value = functions.attribute(value, attribute)
        return value

    def parts(self, node: ast.AST | None) -> Parts:
        return parts(node, lambda n: self.known.get(n, NOTHING), self.resolve)

    def write(self, names: frozenset[str], line: Line, maybe: bool) -> None:
        for n in names:
            if n not in self.changed or (self.changed[n].maybe and not maybe):
                self.changed[n] = Change(line, maybe)

    def bind(self, target: ast.AST, value: Parts, at: ast.AST) -> None:
        match target:
            case ast.Name():
                self.known[target.id] = value
            case ast.Tuple() | ast.List():
                for one in target.elts:
                    self.bind(one, value.item(), at)
            case ast.Starred():
                self.bind(target.value, value, at)
            case ast.Subscript() | ast.Attribute():
                whole = self.parts(target.value)
                if isinstance(target, ast.Subscript):
                    self.write(whole.own, self.source.line(at), _of_attribute(target.value))
                if isinstance(target.value, ast.Name):
                    self.known[target.value.id] = Parts(whole.own, whole.within | value.own | value.within)

    def calls(self, node: ast.AST) -> None:
        for one in walk(node):
            if isinstance(one, COMPREHENSIONS):
                for generator in one.generators:
                    self.bind(generator.target, self.parts(generator.iter).item(), generator.target)
        for one in walk(node):
            if isinstance(one, ast.Call):
                for value, change in of_call(one, self.resolve(one.func), self.source.line(one), self.seen):
                    self.write(self.parts(value).own, change.line, change.maybe)

    def block(self, body: list[ast.stmt]) -> None:
        for one in body:
            self.statement(one)

    def either(self, *blocks: list[ast.stmt]) -> None:
        """Blocks of which any may run, or none."""
        before, found = self.known, dict(self.known)
        for body in blocks:
            self.known = dict(before)
            self.block(body)
            for n, value in self.known.items():
                found[n] = found.get(n, NOTHING) | value
        self.known = found

    def statement(self, node: ast.stmt) -> None:
        for one in children(node):
            if isinstance(one, ast.expr):
                self.calls(one)
        match node:
            case ast.Assign():
                for target in node.targets:
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        if len(target.elts) == len(node.value.elts):
                            values = [self.parts(one) for one in node.value.elts]
                            for one, value in zip(target.elts, values, strict=True):
                                self.bind(one, value, node)
                            continue
                    self.bind(target, self.parts(node.value), node)
            case ast.AnnAssign() if node.value is not None:
                self.bind(node.target, self.parts(node.value), node)
            case ast.AugAssign():
                line = self.source.line(node)
                if not isinstance(node.target, ast.Name):
                    whole = self.parts(node.target.value)
                    self.write(whole.own, line, _of_attribute(node.target))
                    self.write(whole.within, line, True)
                    return
                old, value = self.parts(node.target), self.parts(node.value)
                self.write(old.own, line, True)
                self.known[node.target.id] = Parts(old.own, old.within | value.within)
            case ast.Delete():
                for target in node.targets:
                    if isinstance(target, ast.Subscript):
                        self.write(self.parts(target.value).own, self.source.line(node), _of_attribute(target.value))
            case ast.For():
                self.bind(node.target, self.parts(node.iter).item(), node)
                self.either(node.body * 2, [*node.body, *node.orelse])
            case ast.While():
                self.either(node.body * 2, [*node.body, *node.orelse])
            case ast.If():
                self.either(node.body, node.orelse)
            case ast.With():
                for item in node.items:
                    self.calls(item.context_expr)
                self.block(node.body)
            case ast.Try():
                self.either(node.body, *([*node.body, *one.body] for one in node.handlers), node.orelse)
                self.block(node.finalbody)
            case ast.FunctionDef():  # what it captures it may write into when it is called
                known = dict(self.known)
                self.block(node.body)
                self.known = known
