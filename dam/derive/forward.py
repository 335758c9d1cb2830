"""Forward mode: beside each statement that of its tangent, in the same order, so that nothing has to be kept."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from dam.derive import flow, primitives
from dam.derive.errors import DerivativeError
from dam.derive.normal import (
    Append,
    Effect,
    For,
    If,
    Let,
    Pop,
    Statement,
    Store,
    Surgery,
    Unpack,
    While,
    as_value,
    called_by_name,
)
from dam.derive.primitives import Primitive
from dam.derive.reverse import appended, assign, effect_of, popped, text
from dam.derive.simplify import fold, is_zero
from dam.derive.single import Single
from dam.derive.trees import filled, loads, name


class Forward:
    """Statements of a function and of its tangents.

    Args:
        single, active: as for the backward pass.
        twin: the name of the function that gives a called function's result and tangent, for its active parameters, and
            those of their tangents.
        primal_name: that of a called function without a tangent.
        in_place: augmented assignments to be checked when they run.
    """

    def __init__(
        self,
        single: Single,
        active: set[str],
        parameters: list[str],
        twin: Callable[[Any, frozenset[str]], tuple[str, dict[str, str]]],
        primal_name: Callable[[Any], str],
        in_place: dict[int, str],
    ) -> None:
        self.single, self.active = single, active
        self.twin, self.primal_name, self.in_place = twin, primal_name, in_place
        self.shapes = flow.shapes(single.statements, parameters)
        self.writes = any(isinstance(st, (Store, Append, Pop)) for st in flow.walk(single.statements))
        self.names: dict[str, str] = {}

    def tangent(self, value: str) -> str:
        if value not in self.names:
            self.names[value] = self.single.fresh(f"d{value}")
        return self.names[value]

    def block(self, statements: list[Statement]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for st in statements:
            self.statement(st, out)
        return out

    def of(self, node: ast.expr) -> ast.expr:
        """The tangent of an atom."""
        if isinstance(node, ast.Name) and node.id in self.active:
            return name(self.tangent(node.id))
        return text("rt.zeros_like(x)", x=node)

    def statement(self, st: Statement, out: list[ast.stmt]) -> None:
        match st:
            case Let():
                self.let(st, out)
            case Unpack():
                out.append(assign(st.targets, name(st.value)))
                targets = [self.tangent(t) if t in self.active else self.single.fresh("unused") for t in st.targets]
                if any(t in self.active for t in st.targets):
                    out.append(assign(targets, self.of(name(st.value)), st.line))
            case Store():
                self.store(st, out)
            case Append():
                out.append(_plain(appended(st)))
                if st.name in self.active:
                    how = "d.append(v)" if st.at is None else f"d.insert({st.at}, v)"
                    out.append(effect_of(text(how, d=name(self.tangent(st.name)), v=self.of(st.value)), st.line))
            case Pop():
                out.append(assign(st.target, popped(st)))
                if st.name in self.active:
                    item = self.tangent(st.target) if st.target in self.active else self.single.fresh("unused")
                    how = "d.pop()" if st.at is None else f"d.pop({st.at})"
                    out.append(assign(item, text(how, d=name(self.tangent(st.name))), st.line))
                elif st.target in self.active:
                    out.append(assign(self.tangent(st.target), self.of(name(st.target)), st.line))
            case Effect():
                out.append(st.node)
            case If():
                body, orelse = self.block(st.body), self.block(st.orelse)
                out.append(ast.If(test=st.test, body=body or [ast.Pass()], orelse=orelse))
            case For() | While():
                body = self.block([*st.body, *st.carry])
                if st.stop:
                    body.append(ast.If(test=name(st.stop), body=[ast.Break()], orelse=[]))
                if isinstance(st, For):
                    if st.target in self.active:  # a row of a constant, which is written into
                        body.insert(0, assign(self.tangent(st.target), text("rt.zeros_like(x)", x=name(st.target))))
                    target = ast.Name(st.target, ast.Store())
                    out.append(ast.For(target=target, iter=st.iter, body=body or [ast.Pass()], orelse=[]))
                else:
                    out.append(ast.While(test=st.test, body=body or [ast.Pass()], orelse=[]))
            case Surgery():
                raise DerivativeError("insert_grad_of is about the backward pass; forward mode has none", st.line)

    def store(self, st: Store, out: list[ast.stmt]) -> None:
        if st.restores:
            out.append(_plain(text("rt.restore(x, i, v)", x=name(st.name), i=as_value(st.index), v=st.value)))
        else:
            out.append(ast.Assign([ast.Subscript(name(st.name), st.index, ast.Store())], st.value))
        if st.name not in self.active:
            return
        d = name(self.tangent(st.name))
        index, value = as_value(st.index), self.of(st.value)
        out.append(effect_of(text("rt.store_tangent(d, i, v, x)", d=d, i=index, v=value, x=name(st.name)), st.line))

    def let(self, st: Let, out: list[ast.stmt]) -> None:
        if (check := flow.rebound_check(st, self.in_place)) is not None:
            out.append(_plain(check))
        y = st.target
        d = self.tangent(y) if y in self.active else ""
        varied = [n for v in flow.arguments(st).values() for n in loads(v) if n in self.active]
        if st.kind == "call":
            assert isinstance(st.value, ast.Call)
            callee = st.value.callee  # type: ignore[attr-defined]
            wanted = [(str(k.arg), k.value) for k in st.value.keywords if loads(k.value) & self.active]
            if d and wanted:
                twin, called = self.twin(callee, frozenset(p for p, _ in wanted))
                tangents = [ast.keyword(called[p], self.of(v)) for p, v in wanted]
                call = ast.Call(name(twin), [], [*st.value.keywords, *tangents])
                out.append(assign([y, d], call, st.line))
                return
            out.append(assign(y, called_by_name(self.primal_name(callee), st.value)))
        elif d and varied and st.kind in ("copy", "item", "structure") and y in loads(st.value):
            raise AssertionError("a value that is made of itself")
        else:
            out.append(assign(y, st.value))
        if not d:
            return
        if not varied:
            out.append(assign(d, text("rt.zeros_like(y)", y=name(y)), st.line))
        elif st.kind == "primitive":
            made = self.primitive(st)
            entry = st.value.primitive  # type: ignore[attr-defined]
            if self.writes and not entry.view and not isinstance(made, (ast.BinOp, ast.UnaryOp)):
                # As y = x + 1.0 has memory of its own, so must its tangent, which is x's.
                made = text("rt.copied(d)", d=made)
            out.append(assign(d, made, st.line))
        elif st.kind == "copy":
            out.append(assign(d, self.of(st.value), st.line))
        elif st.kind == "item":
            assert isinstance(st.value, ast.Subscript)
            whole, index = self.of(st.value.value), st.value.slice
            item: ast.expr = ast.Subscript(whole, index, ast.Load())
            if _is_whole(index):  # of an array without axes, whose tangent may be a number
                item = text("rt.reshape_like(d, y)", d=whole, y=name(y))
            out.append(assign(d, item, st.line))
        else:
            value = st.value
            if isinstance(value, ast.Dict):
                made = ast.Dict(value.keys, [self.of(v) for v in value.values])
            else:
                assert isinstance(value, (ast.Tuple, ast.List))
                made = type(value)([self.of(v) for v in value.elts], ast.Load())
            out.append(assign(d, made, st.line))

    def primitive(self, st: Let) -> ast.expr:
        entry: Primitive = st.value.primitive  # type: ignore[attr-defined]
        if entry.rule is not None:
            raise DerivativeError("the derivative registered with adjoint is for the backward pass only", st.line)
        bound = primitives.bound(entry, st.value)
        y = name(st.target)
        names: dict[str, ast.expr] = {**bound, "y": y, "m": name(entry.module)}
        terms: list[ast.expr] = []
        whole = False
        for parameter, argument in bound.items():
            if (
                parameter not in entry.differentiable
                or not isinstance(argument, ast.Name)
                or argument.id not in self.active
            ):
                continue
            d = self.of(argument)
            if parameter in entry.partials:
                term = fold(ast.BinOp(d, ast.Mult(), filled(entry.partials[parameter], names)))
                same = self.shapes.get(argument.id, argument.id) == self.shapes.get(y.id, y.id)
                others = {p for p in bound if p in entry.partials} - {parameter}
                whole = whole or same or not others or bool(loads(term) & {n for p in others for n in loads(bound[p])})
            elif parameter in entry.forward:
                term = filled(entry.forward[parameter], {**names, f"d_{parameter}": d})
                whole = True
            else:
                raise DerivativeError(f"{entry.name} has no derivative in forward mode", st.line)
            if not is_zero(term):
                terms.append(term)
        if not terms:
            return text("rt.zeros_like(y)", y=y)
        total = terms[0]
        for term in terms[1:]:
            # Of structures, + would join them.
            total = (
                ast.BinOp(total, ast.Add(), term)
                if entry.partials or not _structured(entry)
                else text("rt.add(a, b)", a=total, b=term)
            )
        return fold(total) if whole else text("rt.broadcast(d, y)", d=fold(total), y=y)


def _is_whole(index: ast.expr) -> bool:
    empty = isinstance(index, ast.Tuple) and not index.elts
    return empty or (isinstance(index, ast.Constant) and index.value is ...)


def _structured(entry: Primitive) -> bool:
    return entry.module == "rt"


def _plain(value: ast.expr) -> ast.stmt:
    return ast.Expr(value)
