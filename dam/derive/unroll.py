"""Loops over ranges of constants written out, for functions of numbers, which have no others."""

from __future__ import annotations

import ast
import contextlib
import itertools
import linecache
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dam.derive import functions, trees
from dam.derive.errors import DerivativeError

TURNS = 64  # of all loops of a function: each is code in its kernel
_NUMBER = itertools.count(1)
# What a function carries whose loops were written out: the lines of the one that it was made of, by number.
_OWN = "__derive_own_lines__"


def unrolled(function: Callable[..., Any], variables: int) -> Callable[..., Any]:
    """The function with the turns of its loops one after another; itself where it has none.

    Args:
        function: with source, as `dam.derive.grad` takes it.
        variables: how many of its first parameters are no constants; the others have their defaults.

    Raises:
        DerivativeError: a loop is not `for name in range(...)` of whole numbers that are known here, has break,
            continue or else, or the loops have more than 64 turns; the message shows the line.
    """
    source = functions.of(function)
    if not any(isinstance(node, ast.For) for node in trees.walk(source.node)):
        return function
    given = source.node.args
    arguments = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in given.posonlyargs],
        args=[ast.arg(a.arg) for a in given.args],
        vararg=given.vararg and ast.arg(given.vararg.arg),
        kwonlyargs=[ast.arg(a.arg) for a in given.kwonlyargs],
        kw_defaults=[None for _ in given.kwonlyargs],
        kwarg=given.kwarg and ast.arg(given.kwarg.arg),
        defaults=[],
    )
    body = _Unroller(source, variables).block(source.node.body, {})
    definition = ast.FunctionDef(name=source.name, args=arguments, body=body or [ast.Pass()], decorator_list=[])
    definition.type_params = []  # type: ignore[attr-defined]
    text = ast.unparse(ast.fix_missing_locations(ast.Module([definition], type_ignores=[]))) + "\n"
    file, space = f"<{source.name}, loops written out {next(_NUMBER)}>", dict(source.namespace)
    exec(compile(text, file, "exec"), space)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    made = space[source.name]
    made.__defaults__, made.__kwdefaults__ = source.defaults, source.keyword_defaults
    written = zip(_statements(ast.parse(text).body), _statements([definition]), strict=True)
    made.__dict__[_OWN] = {ours.lineno: source.line(theirs) for ours, theirs in written}
    return made


def _statements(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a block and of those within it, in the order of their lines."""
    for st in block:
        yield st
        for field in ("body", "orelse"):
            yield from _statements(getattr(st, field, []))


@contextlib.contextmanager
def in_own_lines(made: Callable[..., Any]) -> Iterator[None]:
    """Within it an error about a function of `unrolled` shows the line that its author wrote."""
    try:
        yield
    except DerivativeError as error:
        if error.line is None or error.line.file != made.__code__.co_filename or _OWN not in made.__dict__:
            raise
        raise DerivativeError(error.message, made.__dict__[_OWN][error.line.number]) from None


class _Unroller:
    """The statements of one function."""

    def __init__(self, source: functions.Source, variables: int) -> None:
        self.source, self.turns = source, 0
        given = source.node.args
        positional = [a.arg for a in (*given.posonlyargs, *given.args)]
        defaults = dict(zip(reversed(positional), reversed(source.defaults), strict=False))
        defaults |= source.keyword_defaults or {}
        self.assigned = set().union(*map(trees.stores, source.node.body))
        own = {*positional, *(a.arg for a in given.kwonlyargs), *self.assigned}
        self.constants = {name: value for name, value in source.namespace.items() if name not in own}
        for name in set(positional[variables:]) | {a.arg for a in given.kwonlyargs}:
            if name in defaults and name not in self.assigned:
                self.constants[name] = defaults[name]

    def block(self, statements: list[ast.stmt], known: Mapping[str, int]) -> list[ast.stmt]:
        """These statements without loops, where some names are known to be whole numbers."""
        found: list[ast.stmt] = []
        for st in statements:
            if isinstance(st, ast.For):
                found += self.loop(st, known)
            elif isinstance(st, ast.If):
                both = ast.If(st.test, self.block(st.body, known) or [ast.Pass()], self.block(st.orelse, known))
                found.append(ast.copy_location(both, st))
            else:
                found.append(st)
        return found

    def loop(self, st: ast.For, known: Mapping[str, int]) -> list[ast.stmt]:
        jumps = [n for n in trees.walk(st) if isinstance(n, (ast.Break, ast.Continue))]
        if jumps or st.orelse or not isinstance(st.target, ast.Name):
            told = "a loop of a function of numbers is 'for name in range(...)', without break, continue and else"
            raise self.source.refuse(jumps[0] if jumps else st, told)
        turns, name = self.range_of(st, known), st.target.id
        self.turns += len(turns)
        if self.turns > TURNS:
            told = (
                f"the loops of {self.source.name} have more than {TURNS} turns, each of which would be code of its own"
            )
            raise self.source.refuse(st, told)
        found: list[ast.stmt] = []
        again = name in set().union(*map(trees.stores, st.body))
        for value in turns:
            found.append(ast.copy_location(ast.Assign([ast.Name(name, trees.STORE)], ast.Constant(value)), st))
            inside = {n: v for n, v in known.items() if n != name} if again else {**known, name: value}
            found += self.block(st.body, inside)
        return found

    def range_of(self, st: ast.For, known: Mapping[str, int]) -> range:
        told = (
            f"{ast.unparse(st.iter)} is not a range of whole numbers that are known where {self.source.name} is defined"
        )
        match st.iter:
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as bounds, keywords=[]) if len(bounds) <= 3:
                if self.constants.get(name) is range:
                    try:
                        return range(*(self.whole(b, known) for b in bounds))
                    except (TypeError, ValueError, ZeroDivisionError):
                        pass
        raise self.source.refuse(st, told)

    def whole(self, node: ast.expr, known: Mapping[str, int]) -> int:
        """Raises ValueError where it is no whole number, or not known."""
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                return value
            case ast.Name(id=name):
                found = known[name] if name in known else self.constants.get(name)
                if isinstance(found, int) and not isinstance(found, bool):
                    return found
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.whole(operand, known)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() as op, right=right):
                a, b = self.whole(left, known), self.whole(right, known)
                match op:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                return a // b
        raise ValueError(f"{ast.unparse(node)} is not known")
