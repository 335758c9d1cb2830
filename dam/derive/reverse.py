"""The backward pass: the adjoint of each statement, from the last to the first.

An adjoint has a name only from its first contribution on; a statement whose target has none adds nothing and is left
out. Three things are kept for it, and only where it reads them: of a loop the values of each iteration, in a list that
the backward loop goes through from its end; of a call what the called function returned for the purpose; and of a
write into an array what it overwrote, which is put back in front of the write's adjoint.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any

from dam.derive import flow, primitives
from dam.derive.errors import Line
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
from dam.derive.simplify import fold, free, is_zero
from dam.derive.single import Single, written
from dam.derive.trees import STORE, copied, filled, loads, mentions, name, renamed, walk

# Of adjoints in the course of the pass: whether it has the shape of its value for certain.
State = dict[str, bool]


def assign(target: str | list[str], value: ast.expr, line: Line | None = None) -> ast.stmt:
    if isinstance(target, str):
        left: ast.expr = ast.Name(target, STORE)
    else:
        left = ast.Tuple([ast.Name(t, STORE) for t in target], STORE)
    node = ast.Assign([left], value)
    node.line = line  # type: ignore[attr-defined]
    return node


def text(code: str, **names: ast.expr) -> ast.expr:
    return filled(code, names)


def at_place(code: str, st: Append | Pop, **names: ast.expr) -> ast.expr:
    """The expression of a text, with the place of an item where {} is, unless it is the end."""
    return text(code.format("" if st.at is None else f", {st.at}"), **names)


def appended(st: Append) -> ast.expr:
    return at_place("rt.put_back(x, v{})" if st.puts_back else "x.append(v)", st, x=name(st.name), v=st.value)


def popped(st: Append | Pop) -> ast.expr:
    return text("x.pop()" if st.at is None else f"x.pop({st.at})", x=name(st.name))


class Reverse:
    """The backward pass of one function.

    Args:
        single: its statements, a name for each value.
        active: the names with an adjoint.
        pair: names of the forward and the backward function of a call, for the parameters that are active.
        bind: gives an object a name in the module.
        derived: whether the function is itself a derivative.
    """

    def __init__(
        self,
        single: Single,
        active: set[str],
        memory: flow.Memory,
        parameters: list[str],
        pair: Callable[[Any, frozenset[str]], tuple[str, str]],
        bind: Callable[[str, Any], str],
        derived: bool,
    ) -> None:
        self.single, self.active, self.memory = single, active, memory
        self.pair, self.bind = pair, bind
        self.shapes = flow.shapes(single.statements, parameters)
        self.numbers = flow.numbers(single.statements, derived)
        self.lists = flow.lists(single.statements) - self.numbers
        self.names: dict[str, str] = {}
        self.restored: set[int] = set()
        self.read = {id(st): self._read(st) for st in flow.walk(single.statements) if isinstance(st, Let)}
        self.known: dict[Any, tuple[list[ast.stmt], State]] = {}
        self.writes = any(isinstance(st, (Store, Append, Pop)) for st in flow.walk(single.statements))
        self.primal = {*parameters, *written(single.statements)}

    def adjoint(self, value: str) -> str:
        if value not in self.names:
            self.names[value] = self.single.fresh(f"b{value}")
        return self.names[value]

    def run(self, seeds: State) -> tuple[list[ast.stmt], State]:
        """The backward pass from adjoints that are there; what is restored is found by trying."""
        while True:
            self._forget(self.single.statements)
            state = dict(seeds)
            code = self.block(self.single.statements, state)
            if not self.writes:
                return code, state
            needed = free(code) | self._kept_names(self.single.statements)
            memory = set().union(*(self.memory.all(n) for n in needed & self.primal))
            changed = {
                id(st)
                for st in flow.walk(self.single.statements)
                if isinstance(st, (Store, Append, Pop)) and self.memory.mine(st.name) & memory
            }
            if changed <= self.restored:
                return code, state
            self.restored |= changed

    def _kept_names(self, statements: Iterable[Statement]) -> set[str]:
        found: set[str] = set()
        for st in flow.walk(statements):
            if isinstance(st, (For, While)):
                found |= set(getattr(st, "kept_names", ()))
        return found

    def _forget(self, statements: Iterable[Statement]) -> None:
        for st in flow.walk(statements):
            if isinstance(st, (For, While)):
                st.kept_names = []  # type: ignore[union-attr]
                st.keeps = False  # type: ignore[union-attr]

    # ---- contributions

    def add(self, value: str, expression: ast.expr, full: bool, line: Line, state: State, out: list[ast.stmt]) -> None:
        if value not in self.active:
            return
        expression = fold(expression)
        if is_zero(expression):
            return
        b = self.adjoint(value)
        if value not in state:
            if not (isinstance(expression, ast.Name) and expression.id == b):
                out.append(assign(b, expression, line))
            state[value] = full
            return
        if value in self.numbers:
            total: ast.expr = ast.BinOp(name(b), ast.Add(), expression)
        else:
            total = text("rt.add(b, c)", b=name(b), c=expression)
        out.append(assign(b, fold(total), line))
        state[value] = state[value] or full

    def whole(self, value: str, state: State) -> ast.expr:
        """The adjoint of a value in the value's shape."""
        b = name(self.adjoint(value))
        return b if state[value] else text("rt.full(b, y)", b=b, y=name(value))

    # ---- statements

    def block(self, statements: list[Statement], state: State) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for st in reversed(statements):
            self.statement(st, state, out)
        return out

    def statement(self, st: Statement, state: State, out: list[ast.stmt]) -> None:
        match st:
            case Let():
                if st.target in state and st.target in self.active:
                    self.let_or_known(st, state, out)
                    state.pop(st.target, None)
            case Unpack():
                self.unpack(st, state, out)
            case Store():
                self.store(st, state, out)
            case Append():
                self.append(st, state, out)
            case Pop():
                self.pop(st, state, out)
            case If():
                self.branches(st, state, out)
            case For() | While():
                self.loop(st, state, out)
            case Surgery():
                self.surgery(st, state, out)
            case Effect():
                pass

    def _read(self, st: Let) -> tuple[str, ...] | None:
        """Names whose adjoints a statement's adds to; None where its code is another each time."""
        if st.kind == "call" or (st.kind == "primitive" and st.value.primitive.rule is not None):  # type: ignore[attr-defined]
            return None
        return tuple(n for v in flow.arguments(st).values() for n in loads(v) if n in self.active)

    def let_or_known(self, st: Let, state: State, out: list[ast.stmt]) -> None:
        """The adjoint of a statement, which is the same each time that it is come to with the same adjoints there."""
        read = self.read[id(st)]
        if read is None:
            self.let(st, state, out)
            return
        situation = (id(st), state[st.target], *(state.get(n) for n in read))
        found = self.known.get(situation)
        if found is None:
            code: list[ast.stmt] = []
            self.let(st, state, code)
            found = self.known[situation] = code, {n: state[n] for n in read if n in state}
        code, after = found
        out += code
        state |= after

    def let(self, st: Let, state: State, out: list[ast.stmt]) -> None:
        y, value = st.target, st.value
        g, full = name(self.adjoint(y)), state[y]
        match st.kind:
            case "copy":
                assert isinstance(value, ast.Name)
                self.add(value.id, g, full, st.line, state, out)
            case "item":
                assert isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name)
                self.item(value.value.id, as_value(value.slice), g, st.line, state, out)
            case "structure":
                whole = self.whole(y, state)
                keys: list[ast.expr]
                if isinstance(value, ast.Dict):
                    keys, values = [k for k in value.keys if k is not None], value.values
                else:
                    assert isinstance(value, (ast.Tuple, ast.List))
                    values = value.elts
                    keys = [ast.Constant(k) for k in range(len(values))]
                for key, one in zip(keys, values, strict=True):
                    if isinstance(one, ast.Name):
                        self.add(one.id, ast.Subscript(whole, key, ast.Load()), False, st.line, state, out)
            case "primitive":
                self.primitive(st, state, out)
            case "call":
                self.call(st, state, out)

    def item(self, x: str, index: ast.expr, g: ast.expr, line: Line, state: State, out: list[ast.stmt]) -> None:
        """Adds g to the adjoint of x at an index."""
        if x not in self.active:
            return
        b = self.adjoint(x)
        if x in state:
            new = text("rt.add_at(b, i, g, x)", b=name(b), i=index, g=g, x=name(x))
        else:
            new = text("rt.placed(g, i, x)", i=index, g=g, x=name(x))
        out.append(assign(b, new, line))
        state[x] = True

    def primitive(self, st: Let, state: State, out: list[ast.stmt]) -> None:
        entry: Primitive = st.value.primitive  # type: ignore[attr-defined]
        bound = primitives.bound(entry, st.value)
        y = st.target
        if entry.rule is not None:
            self.ruled(st, entry, bound, state, out)
            return
        for parameter, argument in bound.items():
            if parameter not in entry.differentiable or not isinstance(argument, ast.Name):
                continue  # an expression has no slope
            if argument.id not in self.active:
                continue
            if parameter in entry.partials:
                self.add(argument.id, self.elementwise(st, parameter, argument), state[y], st.line, state, out)
            else:
                names = {**bound, "y": name(y), "m": name(entry.module), "g": self.whole(y, state)}
                # Of adjoints of structures, an item may be 0.0 still.
                full = not (entry.module == "rt" and entry.view)
                self.add(argument.id, filled(entry.reverse[parameter], names), full, st.line, state, out)

    def elementwise(self, st: Let, parameter: str, argument: ast.Name) -> ast.expr:
        """What an elementwise function adds to the adjoint of an argument."""
        entry: Primitive = st.value.primitive  # type: ignore[attr-defined]
        y = st.target
        g = name(self.adjoint(y))
        names = {**primitives.bound(entry, st.value), "y": name(y), "m": name(entry.module), "g": g}
        partial = entry.partials[parameter]
        expression = g if partial == "1.0" else fold(ast.BinOp(g, ast.Mult(), filled(partial, names)))
        same = self.shapes.get(argument.id, argument.id) == self.shapes.get(y, y)
        # A product with an integer repeats a list, which unbroadcast refuses.
        same = same and not (argument.id in self.lists and isinstance(getattr(st.value, "op", None), ast.Mult))
        if not same and not is_zero(expression):
            expression = text("rt.unbroadcast(g, x)", g=expression, x=argument)
        return expression

    def ruled(self, st: Let, entry: Primitive, bound: dict[str, ast.expr], state: State, out: list[ast.stmt]) -> None:
        """A derivative that a user registered: a function of (adjoint, result, *arguments)."""
        assert entry.rule is not None
        rule = self.bind(getattr(entry.rule, "__name__", "rule").strip("_") or "rule", entry.rule)
        parts = [name(self.adjoint(st.target)) if state[st.target] else self.whole(st.target, state), name(st.target)]
        call = ast.Call(name(rule), [*parts, *bound.values()], [])
        wanted = [(k, v.id) for k, v in enumerate(bound.values()) if isinstance(v, ast.Name) and v.id in self.active]
        if len(bound) == 1:
            self.add(wanted[0][1], call, True, st.line, state, out)
            return
        temporary = self.single.fresh(f"b{st.target}_arguments")
        out.append(assign(temporary, call, st.line))
        for k, x in wanted:
            self.add(x, ast.Subscript(name(temporary), ast.Constant(k), ast.Load()), True, st.line, state, out)

    def active_parameters(self, value: ast.expr) -> list[tuple[str, str]]:
        """Of a call, parameters and the names that are active there."""
        assert isinstance(value, ast.Call)
        return [
            (str(k.arg), k.value.id)
            for k in value.keywords
            if isinstance(k.value, ast.Name) and k.value.id in self.active
        ]

    def call(self, st: Let, state: State, out: list[ast.stmt]) -> None:
        wanted = self.active_parameters(st.value)
        parameters = frozenset(p for p, _ in wanted)
        _, backward = self.pair(st.value.callee, parameters)  # type: ignore[attr-defined]
        if not st.kept:
            st.kept = self.single.fresh(f"{st.target}_kept")
            self.primal.add(st.kept)
            self.memory.own[st.kept] = {st.kept}
            self.memory.reach[st.kept] = self.memory.all(st.target).union(
                *(self.memory.all(n) for n in loads(st.value))
            )
        call = ast.Call(name(backward), [name(st.kept), self.whole(st.target, state)], [])
        order = sorted(wanted)
        # One argument may be given twice.
        temporary = [self.single.fresh(f"b{x}_of_{st.target}") for _, x in order]
        out.append(assign(temporary if len(temporary) > 1 else temporary[0], call, st.line))
        for (_, x), one in zip(order, temporary, strict=True):
            self.add(x, name(one), True, st.line, state, out)

    def unpack(self, st: Unpack, state: State, out: list[ast.stmt]) -> None:
        if st.value in self.active and any(t in state for t in st.targets):
            items: list[ast.expr] = [name(self.adjoint(t)) if t in state else ast.Constant(0.0) for t in st.targets]
            whole = text("rt.packed(items, x)", items=ast.Tuple(items, ast.Load()), x=name(st.value))
            self.add(st.value, whole, True, st.line, state, out)
        for target in st.targets:
            state.pop(target, None)

    def store(self, st: Store, state: State, out: list[ast.stmt]) -> None:
        index = as_value(st.index)
        if id(st) in self.restored:
            if not st.saved:
                st.saved = self.single.fresh(f"{st.name}_saved")
                self.primal.add(st.saved)
            out.append(effect_of(text("rt.restore(x, i, old)", x=name(st.name), i=index, old=name(st.saved)), st.line))
        if st.name not in state or st.name not in self.active:
            return
        b, x = name(self.adjoint(st.name)), name(st.name)
        if isinstance(st.value, ast.Name) and st.value.id in self.active:
            value = text("rt.stored(b, i, x, v)", b=b, i=index, x=x, v=st.value)
            self.add(st.value.id, value, False, st.line, state, out)
        out.append(assign(b.id, text("rt.zeroed(b, i, x)", b=b, i=index, x=x), st.line))

    def append(self, st: Append, state: State, out: list[ast.stmt]) -> None:
        if id(st) in self.restored:
            out.append(effect_of(popped(st), st.line))
        if st.name not in state or st.name not in self.active:
            return
        b = name(self.adjoint(st.name))
        if isinstance(st.value, ast.Name):
            self.add(st.value.id, at_place("rt.last(b{})", st, b=b), False, st.line, state, out)
        out.append(assign(b.id, at_place("rt.without_last(b{})", st, b=b), st.line))

    def pop(self, st: Pop, state: State, out: list[ast.stmt]) -> None:
        if id(st) not in self.restored and st.target in state:
            self.restored.add(id(st))
        if id(st) in self.restored:
            self.primal.add(st.target)
            out.append(effect_of(at_place("rt.put_back(x, v{})", st, x=name(st.name), v=name(st.target)), st.line))
        if st.name in self.active and (st.target in state or st.name in state):
            b = self.adjoint(st.name)
            old: ast.expr = name(b) if st.name in state else ast.Constant(0.0)
            item: ast.expr = name(self.adjoint(st.target)) if st.target in state else ast.Constant(0.0)
            out.append(assign(b, at_place("rt.with_last(b, g, x{})", st, b=old, g=item, x=name(st.name)), st.line))
            state[st.name] = True
        state.pop(st.target, None)

    def branches(self, st: If, state: State, out: list[ast.stmt]) -> None:
        sides = []
        for statements in (st.body, st.orelse):
            inside = dict(state)
            sides.append((self.block(statements, inside), inside))
        (body, of_body), (orelse, of_orelse) = sides
        assigned = {True: written(st.body), False: written(st.orelse)}
        inner = assigned[True] | assigned[False]
        after = {v for v in of_body.keys() | of_orelse.keys() if v not in inner}
        for code, inside in sides:
            for value in sorted(after - inside.keys()):
                code.append(assign(self.adjoint(value), ast.Constant(0.0), st.line))
        state.clear()
        state.update({v: of_body.get(v, False) and of_orelse.get(v, False) for v in sorted(after)})
        if body or orelse:
            node = ast.If(test=st.test, body=body or [ast.Pass()], orelse=orelse)
            node.line = st.line  # type: ignore[attr-defined]
            out.append(node)

    def loop(self, st: For | While, state: State, out: list[ast.stmt]) -> None:
        start = dict(state)
        phis = {c.target for c in st.carry}
        local = written(st.body) | ({st.target} if isinstance(st, For) else set()) - phis
        while True:
            inside = dict(start)
            code: list[ast.stmt] = []
            for copy in reversed(st.carry):
                self.statement(copy, inside, code)
            code += self.block(st.body, inside)
            inside = {v: f for v, f in inside.items() if v not in local}
            grown = dict(start)
            for value, is_full in inside.items():
                if value not in start:
                    grown[value] = False
                elif not is_full:
                    grown[value] = False
            for value in start:
                if value not in inside:
                    grown[value] = False
            if grown == start:
                break
            start = grown
        ended = sorted(start.keys() - inside.keys())  # a body may do no more than set these to constants
        if not code and not ended:
            return
        for value in ended:
            code.append(assign(self.adjoint(value), ast.Constant(0.0), st.line))
        for value in sorted(start.keys() - state.keys()):
            out.append(assign(self.adjoint(value), ast.Constant(0.0), st.line))
        state.clear()
        state.update(start)
        out.append(self._backward_loop(st, code))

    def _backward_loop(self, st: For | While, code: list[ast.stmt]) -> ast.stmt:
        """The loop over what was kept, or over the range itself where its index is all that is read."""
        assigned = _values(st)
        needed = sorted(free(code) & assigned)
        target: ast.expr
        if isinstance(st, For) and _is_range(st.iter) and set(needed) <= {st.target} and not st.stop:
            target = ast.Name(st.target if needed else "_", ast.Store())
            iterable = text("reversed(r)", r=st.iter)
        else:
            if not st.kept:
                st.kept = self.single.fresh("kept")
                self.primal.add(st.kept)
                self.memory.own[st.kept] = {st.kept}
            st.kept_names, st.keeps = needed, True  # type: ignore[union-attr]
            self.memory.reach[st.kept] = set().union(*(self.memory.all(n) for n in needed))
            if len(needed) == 1:
                target = ast.Name(needed[0], ast.Store())
            elif needed:
                target = ast.Tuple([ast.Name(n, ast.Store()) for n in needed], ast.Store())
            else:
                target = ast.Name("_", ast.Store())
            iterable = text("reversed(kept)", kept=name(st.kept))
        node = ast.For(target=target, iter=iterable, body=code, orelse=[])
        node.line = st.line  # type: ignore[attr-defined]
        return node

    def surgery(self, st: Surgery, state: State, out: list[ast.stmt]) -> None:
        if st.name not in self.active:
            return
        b = self.adjoint(st.name)
        start: ast.expr = self.whole(st.name, state) if st.name in state else text("rt.zeros_like(x)", x=name(st.name))
        # The block may write into it, and the adjoint may be another value's too.
        out.append(assign(st.alias, text("rt.copied(b)", b=start), st.line))
        for inner in st.body:
            made = copied(inner)
            made.line = st.line
            out.append(made)
        out.append(assign(b, name(st.alias), st.line))
        state[st.name] = True


def effect_of(value: ast.expr, line: Line) -> ast.stmt:
    node = ast.Expr(value)
    node.line = line  # type: ignore[attr-defined]
    return node


def _is_range(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and all(isinstance(a, (ast.Name, ast.Constant)) or _is_plain(a) for a in node.args)
    )


def _is_plain(node: ast.expr) -> bool:
    return all(isinstance(n, (ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp)) for n in walk(node))


def _values(st: For | While) -> set[str]:
    """Names whose values are of one iteration: what its body assigns, keeps and saves."""
    found = written([st])
    for inner in flow.walk(st.body):
        for attribute in ("kept", "saved"):
            if extra := getattr(inner, attribute, ""):
                found.add(extra)
    return found


class Primal:
    """The statements of the function itself as code, with what its backward pass needs kept on the way."""

    def __init__(
        self, reverse: Reverse | None, restored: set[int], primal_name: Callable[[Any], str], in_place: dict[int, str]
    ) -> None:
        self.reverse, self.restored = reverse, restored
        self.primal_name, self.in_place = primal_name, in_place

    def block(self, statements: list[Statement]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for st in statements:
            self.statement(st, out)
        return out

    def statement(self, st: Statement, out: list[ast.stmt]) -> None:
        match st:
            case Let():
                if (check := flow.rebound_check(st, self.in_place)) is not None:
                    out.append(effect_of(check, st.line))
                if st.kind == "call":
                    self.call(st, out)
                else:
                    out.append(assign(st.target, st.value, st.line))
            case Unpack():
                out.append(assign(st.targets, name(st.value), st.line))
            case Store():
                if id(st) in self.restored and st.saved:
                    saved = text("rt.saved(x, i)", x=name(st.name), i=as_value(st.index))
                    out.append(assign(st.saved, saved, st.line))
                if st.restores:
                    restore = text("rt.restore(x, i, v)", x=name(st.name), i=as_value(st.index), v=st.value)
                    out.append(effect_of(restore, st.line))
                else:
                    node = ast.Assign([ast.Subscript(name(st.name), st.index, ast.Store())], st.value)
                    node.line = st.line  # type: ignore[attr-defined]
                    out.append(node)
            case Append():
                out.append(effect_of(appended(st), st.line))
            case Pop():
                out.append(assign(st.target, popped(st), st.line))
            case Effect():
                node_ = copied(st.node)
                node_.line = st.line
                out.append(node_)
            case If():
                body, orelse = self.block(st.body), self.block(st.orelse)
                branch = ast.If(test=st.test, body=body or [ast.Pass()], orelse=orelse)
                branch.line = st.line  # type: ignore[attr-defined]
                self._undefined(st, out)
                out.append(branch)
            case For() | While():
                self.loop(st, out)
            case Surgery():
                pass

    def _undefined(self, st: If, out: list[ast.stmt]) -> None:
        """What a loop or a caller keeps of one branch is None after the other."""
        if self.reverse is None:
            return
        wanted = self.kept_anywhere
        extra = set()
        for inner in flow.walk([*st.body, *st.orelse]):
            extra |= {getattr(inner, a, "") for a in ("kept", "saved")} - {""}
        body, orelse = written(st.body), written(st.orelse)
        for one in sorted(((body | orelse) - (body & orelse) | extra) & wanted):
            out.append(assign(one, ast.Constant(None), st.line))

    kept_anywhere: set[str] = frozenset()  # type: ignore[assignment]

    def call(self, st: Let, out: list[ast.stmt]) -> None:
        assert isinstance(st.value, ast.Call)
        callee = st.value.callee  # type: ignore[attr-defined]
        if self.reverse is not None and st.kept:
            parameters = frozenset(p for p, _ in self.reverse.active_parameters(st.value))
            forward, _ = self.reverse.pair(callee, parameters)
            out.append(assign([st.target, st.kept], ast.Call(name(forward), [], st.value.keywords), st.line))
            return
        out.append(assign(st.target, called_by_name(self.primal_name(callee), st.value), st.line))

    def loop(self, st: For | While, out: list[ast.stmt]) -> None:
        keeps = bool(getattr(st, "keeps", False))
        body = self.block(st.body)
        carry = [assign(c.target, c.value, c.line) for c in st.carry]
        if keeps:
            out.append(assign(st.kept, ast.List([], ast.Load()), st.line))
            names = st.kept_names  # type: ignore[union-attr]
            values: list[ast.expr] = [name(n) for n in names]
            kept = values[0] if len(values) == 1 else ast.Tuple(values, ast.Load())
            append = effect_of(text("kept.append(v)", kept=name(st.kept), v=kept), st.line)
            heads = {c.target for c in st.carry}
            if set(names) <= heads | ({st.target} if isinstance(st, For) else set()):
                body.insert(0, append)
            else:
                body.append(append)
        body, carry = _joined(body, carry)
        body += carry
        if st.stop:
            leave = ast.If(test=name(st.stop), body=[ast.Break()], orelse=[])
            leave.line = st.line  # type: ignore[attr-defined]
            body.append(leave)
        node: ast.For | ast.While
        if isinstance(st, For):
            node = ast.For(target=ast.Name(st.target, ast.Store()), iter=st.iter, body=body or [ast.Pass()], orelse=[])
        else:
            node = ast.While(test=st.test, body=body or [ast.Pass()], orelse=[])
        node.line = st.line  # type: ignore[union-attr]
        out.append(node)


def _joined(body: list[ast.stmt], carry: list[ast.stmt]) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Assigns what the next iteration begins with at once, where nothing reads the old value afterwards."""
    rest: list[ast.stmt] = []
    for copy in carry:
        assert (
            isinstance(copy, ast.Assign) and isinstance(copy.value, ast.Name) and isinstance(copy.targets[0], ast.Name)
        )
        old, new = copy.value.id, copy.targets[0].id
        at = [k for k, s in enumerate(body) if isinstance(s, ast.Assign) and _is_name(s.targets[0], old)]
        count = sum(mentions(s).count(old) for s in [*body, *carry])
        later = body[at[0] + 1 :] if len(at) == 1 else []
        reads_new = any(new in mentions(s) for s in later)
        others = any(new in mentions(s) for s in carry if s is not copy)
        inside = sum(mentions(s).count(old) for s in later)
        if len(at) == 1 and not reads_new and not others and count == inside + 2:
            body = [*body[: at[0]], *(renamed(s, {old: new}) for s in body[at[0] :])]
        else:
            rest.append(copy)
    return body, rest


def _is_name(node: ast.expr, identifier: str) -> bool:
    return isinstance(node, ast.Name) and node.id == identifier
