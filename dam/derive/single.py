"""Each value gets a name of its own, so that none is lost before the backward pass reads it.

Where branches meet, both assign the same new name at their ends. What a loop hands to its next iteration has one name,
assigned in front of the loop and, after all of the body, by the loop's `carry`: the only names that are assigned
again. Writing into an array is no assignment: the array keeps its name, and `dam.derive.reverse` what was overwritten.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

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
)
from dam.derive.trees import loads, name, renamed


def reads(statement: Statement) -> frozenset[str]:
    """Names that a statement itself reads, without those of its blocks."""
    match statement:
        case Let(value=value):
            return loads(value)
        case Unpack(value=whole):
            return frozenset((whole,))
        case Store(name=whole, index=index, value=value):
            return loads(index) | loads(value) | {whole}
        case Append(name=whole, value=value):
            return loads(value) | {whole}
        case Pop(name=whole):
            return frozenset((whole,))
        case Effect(node=node):
            return loads(node)
        case If(test=test) | While(test=test):
            return loads(test)
        case For(iter=iterable):
            return loads(iterable)
        case Surgery(name=whole, body=body):
            return frozenset((whole,)).union(*(loads(s) for s in body))


def writes(statement: Statement) -> set[str]:
    """Names that a statement assigns, those of its blocks too."""
    match statement:
        case Let(target=target):
            return {target}
        case Unpack(targets=targets):
            return {*targets}
        case Pop(target=target):
            return {target}
        case If(body=body, orelse=orelse):
            return written([*body, *orelse])
        case For(target=target, body=body, carry=carry):
            return {target} | written([*body, *carry])
        case While(body=body, carry=carry):
            return written([*body, *carry])
    return set()


def written(statements: Iterable[Statement]) -> set[str]:
    return set().union(*(writes(s) for s in statements))


def live_before(statements: list[Statement], after: set[str]) -> set[str]:
    live = set(after)
    for statement in reversed(statements):
        live = _live_before_one(statement, live)
    return live


def _live_before_one(statement: Statement, live: set[str]) -> set[str]:
    match statement:
        case If(body=body, orelse=orelse):
            return live_before(body, live) | live_before(orelse, live) | reads(statement)
        case For() | While():
            return live_at_head(statement, live) | reads(statement)
    return (live - writes(statement)) | reads(statement)


def live_at_head(loop: For | While, after: set[str]) -> set[str]:
    """Names that are read after the head of a loop, in this iteration, a later one, or after the loop."""
    target = {loop.target} if isinstance(loop, For) else set()
    head = set(after) | (reads(loop) if isinstance(loop, While) else set())
    while True:
        stop = {loop.stop} if loop.stop else set()
        found = head | (live_before(loop.body, head | stop) - target)
        if found == head:
            return head
        head = found


class Single:
    """One function's statements with a name for each value.

    Attributes:
        statements: the result; parameters keep their names.
        variable: of each name the variable of the source that it is a value of.
        result: the name of the function's result.
    """

    def __init__(
        self, statements: list[Statement], parameters: list[str], result: str, taken: Callable[[str], bool]
    ) -> None:
        self.taken = taken
        self.used: set[str] = set(parameters)
        self.variable = {p: p for p in parameters}
        environment = {p: p for p in parameters}
        self.statements = self.block(statements, environment, {result})
        self.result = environment[result]

    def fresh(self, variable: str) -> str:
        candidate, number = variable, 0
        while candidate in self.used or self.taken(candidate):
            number += 1
            candidate = f"{variable}_{number}"
        self.used.add(candidate)
        self.variable[candidate] = variable
        return candidate

    def block(self, statements: list[Statement], environment: dict[str, str], after: set[str]) -> list[Statement]:
        lives, live = [], set(after)
        for statement in reversed(statements):
            lives.append(live)
            live = _live_before_one(statement, live)
        out: list[Statement] = []
        for statement, live in zip(statements, reversed(lives), strict=True):
            self.statement(statement, environment, live, out)
        return out

    def statement(self, st: Statement, environment: dict[str, str], live: set[str], out: list[Statement]) -> None:
        def expression(node: ast.expr) -> ast.expr:
            return renamed(node, environment)

        def of(variable: str) -> str:
            return environment.get(variable, variable)

        def new(variable: str) -> str:
            environment[variable] = self.fresh(variable)
            return environment[variable]

        match st:
            case Let():
                value, container = expression(st.value), of(st.container)
                target = new(st.target)
                made_ = Let(target, value, st.line, st.kind, st.target, st.in_place, container, st.within)
                out.append(made_)
            case Unpack():
                whole = of(st.value)
                out.append(Unpack([new(t) for t in st.targets], whole, st.line))
            case Store():
                index, value = expression(st.index), expression(st.value)
                out.append(Store(of(st.name), index, value, st.line, st.restores, st.within))
            case Append():
                out.append(Append(of(st.name), expression(st.value), st.line, st.puts_back, st.at))
            case Pop():
                whole = of(st.name)
                out.append(Pop(new(st.target), whole, st.line, st.at))
            case Effect():
                out.append(Effect(renamed(st.node, environment), st.line))
            case Surgery():
                inside = dict(environment)
                alias = self.fresh(st.alias)
                inside[st.alias] = alias
                out.append(Surgery(of(st.name), alias, [renamed(s, inside) for s in st.body], st.line))
            case If():
                self._branches(st, environment, live, out)
            case For() | While():
                self._loop(st, environment, live, out)

    def _branches(self, st: If, environment: dict[str, str], live: set[str], out: list[Statement]) -> None:
        test = renamed(st.test, environment)
        sides = []
        for statements in (st.body, st.orelse):
            inside = dict(environment)
            sides.append((self.block(statements, inside, live), inside))
        (body, _), (orelse, _) = sides
        for variable in sorted((written(st.body) | written(st.orelse)) & live):
            ends = [inside.get(variable) for _, inside in sides]
            if ends[0] == ends[1]:
                continue
            merged = self.fresh(variable)
            environment[variable] = merged
            for (statements, _), end in zip(sides, ends, strict=True):
                if end is not None and end in written(statements):
                    substitute(statements, end, merged)
                    continue
                value: ast.expr = ast.Constant(None) if end is None else name(end)
                kind = "constant" if end is None else "copy"
                statements.append(Let(merged, value, st.line, kind, variable))
        out.append(If(test, body, orelse, st.line))

    def _loop(self, st: For | While, environment: dict[str, str], live: set[str], out: list[Statement]) -> None:
        head = live_at_head(st, live) | ({st.stop} if st.stop else set())
        iterable = None if isinstance(st, While) else renamed(st.iter, environment)
        carried = sorted(writes(st) & head)
        before = dict(environment)
        for variable in carried:
            start = before.get(variable)
            value: ast.expr = ast.Constant(None) if start is None else name(start)
            environment[variable] = self.fresh(variable)
            kind = "constant" if start is None else "copy"
            out.append(Let(environment[variable], value, st.line, kind, variable))
        inside = dict(environment)
        made: For | While
        if isinstance(st, While):
            test = renamed(st.test, environment)
            made = While(test, [], st.line, None)
        else:
            inside[st.target] = self.fresh(st.target)
            assert isinstance(iterable, ast.expr)
            made = For(inside[st.target], iterable, [], st.line, None)
        made.body = self.block(st.body, inside, head)
        heads = {environment[v] for v in carried}
        for variable in carried:
            start, end = environment[variable], inside[variable]
            if start == end:
                continue
            if end in heads:  # assigned again in front of being read
                copy = self.fresh(variable)
                made.body.append(Let(copy, name(end), st.line, "copy", variable))
                end = copy
            made.carry.append(Let(start, name(end), st.line, "copy", variable))
        made.stop = environment[st.stop] if st.stop else None
        out.append(made)


def substitute(statements: Iterable[Statement], old: str, new: str) -> None:
    """Another name for a value, in place."""
    names = {old: new}

    def one(identifier: str) -> str:
        return new if identifier == old else identifier

    for st in statements:
        match st:
            case Let():
                st.target, st.value, st.container = one(st.target), renamed(st.value, names), one(st.container)
            case Unpack():
                st.targets, st.value = [one(t) for t in st.targets], one(st.value)
            case Store():
                st.name, st.index, st.value = one(st.name), renamed(st.index, names), renamed(st.value, names)
            case Append():
                st.name, st.value = one(st.name), renamed(st.value, names)
            case Pop():
                st.target, st.name = one(st.target), one(st.name)
            case Effect():
                st.node = renamed(st.node, names)
            case Surgery():
                st.name, st.body = one(st.name), [renamed(s, names) for s in st.body]
            case If():
                st.test = renamed(st.test, names)
                substitute([*st.body, *st.orelse], old, new)
            case For():
                st.target, st.iter = one(st.target), renamed(st.iter, names)
                st.stop = one(st.stop) if st.stop else None
                substitute([*st.body, *st.carry], old, new)
            case While():
                st.test = renamed(st.test, names)
                st.stop = one(st.stop) if st.stop else None
                substitute([*st.body, *st.carry], old, new)
