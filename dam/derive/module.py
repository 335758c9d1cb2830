"""The module that is written for one derivative: its functions, the names they need, its text."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import math
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch

from dam.derive import changes, flow, functions, runtime, written
from dam.derive.errors import Line
from dam.derive.forward import Forward
from dam.derive.normal import Callee, Normaliser
from dam.derive.reverse import Primal, Reverse, assign, text
from dam.derive.simplify import free, with_shared, without_copies, without_dead
from dam.derive.single import Single
from dam.derive.trees import loads, name, shown, stores

_IMPORTS = {"np": np, "torch": torch, "math": math, "rt": runtime}
# An array of up to this many numbers is written out in the text, a larger one named.
_WRITTEN_OUT = 64
_modules = 0


class Module:
    """Functions that are written together, and what their free names stand for."""

    def __init__(self) -> None:
        self.bound: dict[str, Any] = {}
        self.names: set[str] = {*_IMPORTS}
        self.locals: set[str] = set()
        self.functions: list[ast.FunctionDef] = []
        self.made: dict[Any, Any] = {}
        self.pure: set[str] = set()

    # ---- names

    def unique(self, stem: str) -> str:
        candidate, number = stem, 0
        while candidate in self.names or candidate in self.locals or hasattr(builtins, candidate):
            number += 1
            candidate = f"{stem}_{number}"
        self.names.add(candidate)
        return candidate

    def bind(self, identifier: str, value: Any, hidden: Collection[str] = ()) -> str:
        """A name for a value of the surroundings; the same one each time, unless it is among those that are hidden."""
        if getattr(builtins, identifier, None) is value and value is not None and identifier not in self.locals:
            return identifier
        for short, module in _IMPORTS.items():
            if value is module:
                return short
        for known, other in self.bound.items():
            if other is value and known not in hidden:
                return known
        given = self.unique(identifier)
        self.bound[given] = value
        return given

    # ---- functions

    def _prepared(
        self, callee: Callee, active: frozenset[str], whole: bool, beside: Iterable[str] = ()
    ) -> tuple[Normaliser, Single, set[str], flow.Memory, bool, dict[int, str]]:
        """A function's statements and facts about them; `beside` are parameters that its derivative has and it has not.

        Nothing of the surroundings goes by the name of a parameter.
        """
        own = {*callee.parameters, *beside}
        self.locals |= own
        normal = Normaliser(callee, active, functools.partial(self.bind, hidden=own))
        single = Single(
            normal.out,
            normal.parameters,
            normal.result,
            lambda n: n in self.names or n in self.bound or n in normal.bound_names or n in own,
        )
        self._claim(single)
        names = flow.active(single.statements, active, single.result)
        memory = flow.memory(single.statements)
        writes, in_place = flow.check_memory(single, memory, whole, callee.source.derived, normal.names)
        return normal, single, names, memory, writes, in_place

    def signature(self, callee: Callee, extra: list[str] | None = None, inner: bool = False) -> ast.arguments:
        """A function's parameters, their defaults as they are; of a function of the module's own all by name."""
        source = callee.source
        given = source.node.args
        positional = [] if inner else given.posonlyargs
        arguments = ast.arguments(
            posonlyargs=[ast.arg(a.arg) for a in positional],
            args=[ast.arg(a.arg) for a in (*given.posonlyargs, *given.args)[len(positional) :]],
            kwonlyargs=[ast.arg(a.arg) for a in given.kwonlyargs],
            defaults=[],
            kw_defaults=[],
        )
        if source.defaults or not given.defaults:
            arguments.defaults = [self._default(v) for v in source.defaults]
            keywords = source.keyword_defaults or {}
            arguments.kw_defaults = [
                self._default(keywords[a.arg]) if a.arg in keywords else None for a in given.kwonlyargs
            ]
        else:
            for one in (*given.defaults, *(d for d in given.kw_defaults if d is not None)):
                if not isinstance(one, ast.Constant):
                    raise source.refuse(
                        source.node, "a default of a function defined inside must be a number or a string"
                    )
            arguments.defaults, arguments.kw_defaults = list(given.defaults), list(given.kw_defaults)
        for one_more in extra or ():
            arguments.kwonlyargs.append(ast.arg(one_more))
            arguments.kw_defaults.append(ast.Constant(None))
        return arguments

    def _default(self, value: Any) -> ast.expr:
        if value is None or (
            isinstance(value, (bool, int, float, str)) and value == value and abs(_size(value)) != math.inf
        ):
            return ast.Constant(value)
        return name(self.bind("default", value))

    def define(self, identifier: str, arguments: ast.arguments, body: list[ast.stmt], first: str | None = None) -> None:
        node = ast.FunctionDef(name=identifier, args=arguments, body=body, decorator_list=[])
        node.type_params = []  # type: ignore[attr-defined]
        node.first = first  # type: ignore[attr-defined]
        self.functions.append(node)

    def passes(
        self, body: list[ast.stmt], single: Single, memory: flow.Memory, parameters: list[str]
    ) -> list[ast.stmt]:
        """Dead code out, twice computed values shared."""
        body = without_copies(without_dead(body, frozenset(self.pure)), {*parameters})
        counts = Counter(parameters)
        _count_stores(body, counts)
        changed: set[str] = set()
        for one in flow.walk(single.statements):
            if (where := getattr(one, "name", None)) is not None and type(one).__name__ in ("Store", "Append", "Pop"):
                changed |= memory.mine(where)
        steady = {n for n, count in counts.items() if count == 1 and not memory.all(n) & changed}
        return with_shared(body, single.fresh, steady)

    def primal(self, bind: Callable[[str, Any], str], callee: Callee) -> str:
        """The name of a called function that has no derivative here; `bind` is that of the function that calls it.

        One that may write into its arguments is written anew, which refuses it or checks them when it runs.
        """
        if not callee.local and not callee.captured and callable(callee.key):
            of_library = getattr(callee.key, "__module__", "") == written.__name__
            if callee.source.derived or of_library or not changes.of_function(callee.key, {}):
                return bind(callee.source.name, callee.key)
        known = ("primal", callee.key)
        if known not in self.made:
            self.made[known] = given = self.unique(callee.source.name)
            normal, single, _, _, _, in_place = self._prepared(callee, frozenset(), False)
            calls = functools.partial(self.primal, normal.bind)
            body = Primal(None, set(), calls, in_place).block(single.statements)
            body.append(ast.Return(name(single.result)))
            _uncommented(body)
            self.define(given, self.signature(callee, inner=True), body)
        return self.made[known]

    def _claim(self, single: Single) -> None:
        self.locals |= single.used

    def _reverse(self, callee: Callee, active: frozenset[str], whole: bool, beside: Iterable[str] = ()) -> Any:
        normal, single, names, memory, writes, in_place = self._prepared(callee, active, whole, beside)
        reverse = Reverse(single, names, memory, normal.parameters, self.pair, normal.bind, callee.source.derived)
        if not whole:  # what was passed is put back as it was, for those who passed it
            given = {*normal.parameters}
            for st in flow.walk(single.statements):
                if type(st).__name__ in ("Store", "Append", "Pop") and memory.mine(st.name) & given:  # type: ignore[union-attr]
                    reverse.restored.add(id(st))
        code, state = reverse.run({single.result: True} if single.result in names else {})
        return normal, single, names, memory, writes, in_place, reverse, code, state

    def _primal_body(
        self, single: Single, memory: flow.Memory, reverse: Reverse, in_place: dict[int, str], kept: set[str]
    ) -> list[ast.stmt]:
        primal = Primal(reverse, reverse.restored, functools.partial(self.primal, reverse.bind), in_place)
        for st in flow.walk(single.statements):
            kept |= set(getattr(st, "kept_names", ()))
        primal.kept_anywhere = kept
        body = primal.block(single.statements)
        _uncommented(body)
        restored = [
            st.name for st in flow.walk(single.statements) if id(st) in reverse.restored and hasattr(st, "name")
        ]
        if any(memory.mine(n) & memory.all(single.result) for n in restored):
            body.append(assign(single.result, text("rt.copied(x)", x=name(single.result))))
        return body

    def pair(self, callee: Callee, active: frozenset[str]) -> tuple[str, str]:
        """Names of the two functions of a called one: its result with what is kept, and its backward pass."""
        known = ("pair", callee.key, active)
        if known in self.made:
            return self.made[known]
        stem = callee.source.name
        self.made[known] = forward, backward = self.unique(f"{stem}_forward"), self.unique(f"{stem}_backward")
        self.pure |= {forward, backward}
        normal, single, _, memory, _, in_place, reverse, code, state = self._reverse(callee, active, False)
        returned: list[ast.expr] = []
        for parameter in sorted(active):
            if parameter not in state:
                returned.append(text("rt.zeros_like(x)", x=name(parameter)))
            else:
                returned.append(reverse.whole(parameter, state))
        code.append(ast.Return(returned[0] if len(returned) == 1 else ast.Tuple(returned, ast.Load())))
        seed = reverse.adjoint(single.result)
        kept = sorted((free(code) - {seed}) & (reverse.primal | {*normal.parameters}))
        body = self._primal_body(single, memory, reverse, in_place, {*kept})
        self._claim(single)
        values = ast.Tuple([name(k) for k in kept], ast.Load())
        body.append(ast.Return(ast.Tuple([name(single.result), values], ast.Load())))
        body = self.passes(body, single, memory, normal.parameters)
        self.define(forward, self.signature(callee, inner=True), body, f"{stem}, with what its backward pass needs")
        argument = single.fresh("kept")
        if kept:
            code.insert(0, assign(kept if len(kept) > 1 else [*kept], name(argument)))
        code = self.passes(code, single, memory, [argument, seed])
        arguments = ast.arguments(
            posonlyargs=[], args=[ast.arg(argument), ast.arg(seed)], kwonlyargs=[], defaults=[], kw_defaults=[]
        )
        self.define(backward, arguments, code, f"of the adjoint of its result: those of {', '.join(sorted(active))}")
        return forward, backward

    def reverse(self, callee: Callee, wrt: list[str], preserve_result: bool, seeded: bool) -> str:
        """The gradient function; the name of it."""
        given = self.unique(f"d{callee.source.name}")
        extra = _beside(callee, ["init_grad"]) if seeded else []
        normal, single, _, memory, writes, in_place, reverse, code, state = self._reverse(
            callee, frozenset(wrt), True, extra
        )
        body: list[ast.stmt] = self._checks(wrt, normal.parameters, writes)
        for parameter in wrt:
            b = reverse.adjoint(parameter) if parameter in state else None
            value = ast.Constant(0.0) if b is None else name(b)
            code.append(
                assign(single.fresh(f"gradient_{parameter}"), text("rt.gradient(b, x)", b=value, x=name(parameter)))
            )
        outputs: list[ast.expr] = [code[k - len(wrt)].targets[0] for k in range(len(wrt))]  # type: ignore[attr-defined]
        outputs = [name(o.id) for o in outputs]  # type: ignore[attr-defined]
        primal = self._primal_body(single, memory, reverse, in_place, set())
        b = reverse.adjoint(single.result)
        if seeded:
            start = text("rt.seeded(b, y)", b=name(extra[0]), y=name(single.result))
        elif (summed := flow.summed(single)) is not None and not preserve_result:
            start = text("rt.seed_of_sum(x)", x=summed)  # nobody reads the sum itself
        else:
            start = text("rt.seed(y)", y=name(single.result))
        self._claim(single)
        body += [*primal, assign(b, start), *code]
        # A return shows each gradient once where it is made.
        for _ in wrt:
            body.pop()
        values = [code[len(code) - len(wrt) + k].value for k in range(len(wrt))]  # type: ignore[attr-defined]
        if preserve_result:
            values.append(name(single.result))
        body.append(ast.Return(values[0] if len(values) == 1 else ast.Tuple(values, ast.Load())))
        body = self.passes(body, single, memory, normal.parameters)
        said = f"gradient of {callee.source.name} with respect to {', '.join(wrt)}"
        self.define(given, self.signature(callee, extra), body, said)
        return given

    def _checks(self, wrt: list[str], parameters: list[str], writes: bool) -> list[ast.stmt]:
        body: list[ast.stmt] = [ast.Expr(text("rt.differentiable(x, n)", x=name(p), n=ast.Constant(p))) for p in wrt]
        if writes:
            keywords = [ast.keyword(p, name(p)) for p in parameters]
            body.append(ast.Expr(ast.Call(ast.Attribute(name("rt"), "distinct", ast.Load()), [], keywords)))
        return body

    def _forward(self, callee: Callee, tangents: dict[str, str], whole: bool) -> Any:
        """The statements of a function and of its tangents; those of its active parameters go by the names given."""
        active = frozenset(tangents)
        normal, single, names, memory, writes, in_place = self._prepared(callee, active, whole, tangents.values())
        calls = functools.partial(self.primal, normal.bind)
        forward = Forward(single, names, normal.parameters, self.twin, calls, in_place)
        forward.names |= tangents
        code = forward.block(single.statements)
        # What is not asked for may be written into, or appended to.
        code[:0] = [
            assign(forward.tangent(p), text("rt.zeros_like(x)", x=name(p)))
            for p in normal.parameters
            if p in names and p not in active
        ]
        self._claim(single)
        result = forward.of(name(single.result))
        return normal, single, memory, writes, code, result

    def twin(self, callee: Callee, active: frozenset[str]) -> tuple[str, dict[str, str]]:
        """The name of the function of a called one's result and tangent; by active parameter that of its tangent."""
        known = ("twin", callee.key, active)
        tangents = _tangents(callee, sorted(active))
        if known not in self.made:
            self.made[known] = given = self.unique(f"{callee.source.name}_tangent")
            self.pure.add(given)
            normal, single, memory, _, code, result = self._forward(callee, tangents, False)
            code.append(ast.Return(ast.Tuple([name(single.result), result], ast.Load())))
            extra = [*tangents.values()]
            code = self.passes(code, single, memory, [*normal.parameters, *extra])
            self.define(given, self.signature(callee, extra, inner=True), code, f"{callee.source.name} and its tangent")
        return self.made[known], tangents

    def forward(self, callee: Callee, wrt: list[str], preserve_result: bool) -> str:
        """The function of a result's tangent; the name of it."""
        given = self.unique(f"d{callee.source.name}")
        tangents = _tangents(callee, wrt)
        normal, single, memory, writes, code, result = self._forward(callee, tangents, True)
        body = self._checks(wrt, normal.parameters, writes)
        for parameter, d in tangents.items():
            start = text("rt.tangent(d, x)", d=name(d), x=name(parameter))
            if writes:  # into the tangent as well, which is the caller's
                start = text("rt.copied(d)", d=start)
            body.append(assign(d, start))
        values = [result, name(single.result)] if preserve_result else [result]
        body += [*code, ast.Return(values[0] if len(values) == 1 else ast.Tuple(values, ast.Load()))]
        body = self.passes(body, single, memory, normal.parameters)
        extra = [*tangents.values()]
        said = f"tangent of {callee.source.name} along {', '.join(extra)}"
        self.define(given, self.signature(callee, extra), body, said)
        return given

    # ---- text

    def head(self) -> list[str]:
        """Lines of the text that import, and that state values of the surroundings."""
        read = set().union(*(loads(f) for f in self.functions))
        lines = [_import(short, module) for short, module in _IMPORTS.items() if short in read]
        return lines + [_stated(known, value) for known, value in sorted(self.bound.items()) if known in read]

    def body(self) -> list[str]:
        """Lines of the functions."""
        return [line for node in self.functions for line in ("", "", *_printed(node))]

    def function(self, identifier: str) -> Callable[..., Any]:
        """The function of that name, compiled from the text."""
        global _modules
        _modules += 1
        head, body = self.head(), self.body()
        source = "\n".join([*head, *body]).strip() + "\n"
        file = f"<derived {identifier} {_modules}>"
        space: dict[str, Any] = {**_IMPORTS, **self.bound, "__name__": f"derived_{identifier}"}
        # Names are bound to the very values, not to what the head of the text would make of them.
        lines = [""] * len(head) + body if head else "\n".join(body).strip().split("\n")
        exec(compile("\n".join(lines) + "\n", file, "exec"), space)
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        for node in self.functions:
            space[node.name].__dict__[functions.TEXT] = source
        return space[identifier]


def _beside(callee: Callee, stems: Iterable[str]) -> list[str]:
    """Names of what a derivative takes beside a function's own parameters, told apart from these by a number."""
    found: list[str] = []
    for stem in stems:
        candidate, number = stem, 1
        while candidate in callee.parameters or candidate in found:
            number += 1
            candidate = f"{stem}_{number}"
        found.append(candidate)
    return found


def _tangents(callee: Callee, active: list[str]) -> dict[str, str]:
    """By parameter the name of its tangent."""
    return dict(zip(active, _beside(callee, [f"d_{p}" for p in active]), strict=True))


def _size(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0.0


def _count_stores(body: list[ast.stmt], counts: Counter[str]) -> None:
    for st in body:
        if isinstance(st, (ast.If, ast.For, ast.While)):
            counts.update(stores(st.target) if isinstance(st, ast.For) else ())
            _count_stores(st.body, counts)
            _count_stores(st.orelse, counts)
        else:
            counts.update(stores(st))


def _uncommented(body: list[ast.stmt]) -> None:
    for st in body:
        st.line = None  # type: ignore[attr-defined]
        for block in ("body", "orelse"):
            _uncommented(getattr(st, block, []))


def _import(identifier: str, module: types.ModuleType) -> str:
    if module is runtime:
        return f"from dam.derive import runtime as {identifier}"
    return f"import {module.__name__}" + ("" if module.__name__ == identifier else f" as {identifier}")


def _stated(identifier: str, value: Any) -> str:
    """The line that gives a name its value, where there is one."""
    if inspect.ismodule(value):
        return _import(identifier, value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return f"{identifier} = {value!r}"
    if isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, str, float)) for v in value):
        return f"{identifier} = {value!r}"
    if type(value) is np.ndarray and value.size <= _WRITTEN_OUT and value.dtype.kind in "fiub":
        return f'{identifier} = __import__("numpy").array({value.tolist()!r}, dtype="{value.dtype}")'
    if type(value) is torch.Tensor and value.numel() <= _WRITTEN_OUT and value.device.type == "cpu":
        dtype = str(value.dtype).removeprefix("torch.")
        return f'{identifier} = __import__("torch").tensor({value.tolist()!r}, dtype=__import__("torch").{dtype})'
    where, called = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
    if isinstance(where, str) and called.isidentifier():
        return f"from {where} import {called}" + ("" if called == identifier else f" as {identifier}")
    return f"# {identifier}: {type(value).__name__} of the function's surroundings, to be put here"


def _printed(node: ast.FunctionDef) -> list[str]:
    lines = [f"def {node.name}({ast.unparse(node.args)}):"]
    if first := getattr(node, "first", None):
        lines.append(f'    """{first[0].upper()}{first[1:]}."""')
    said: list[Line | None] = [None]
    _block(node.body, 1, lines, said)
    return lines


def _block(body: list[ast.stmt], depth: int, lines: list[str], said: list[Line | None]) -> None:
    space = "    " * depth
    for st in body:
        line = getattr(st, "line", None)
        comment = f"  # {line.text}" if line is not None and line != said[0] else ""
        said[0] = line
        if isinstance(st, (ast.If, ast.For, ast.While)):
            lines.append(f"{space}{_headed(st)}{comment}")
            _block(st.body, depth + 1, lines, said)
            if isinstance(st, ast.If) and st.orelse:
                lines.append(f"{space}else:")
                _block(st.orelse, depth + 1, lines, said)
            said[0] = None
            continue
        found = _stated_as(st).split("\n")
        lines.append(f"{space}{found[0]}{comment}")
        lines += [f"{space}{one}" for one in found[1:]]


def _stated_as(st: ast.stmt) -> str:
    if isinstance(st, ast.Assign) and len(st.targets) == 1 and isinstance(st.targets[0], (ast.Name, ast.Subscript)):
        return f"{shown(st.targets[0])} = {shown(st.value)}"
    if isinstance(st, ast.Expr):
        return shown(st.value)
    if isinstance(st, ast.Return) and st.value is not None:
        return f"return {shown(st.value)}"
    return ast.unparse(ast.fix_missing_locations(st))


def _headed(st: ast.If | ast.For | ast.While) -> str:
    if isinstance(st, ast.For):
        head = ast.For(st.target, st.iter, [ast.Pass()], [])
        return ast.unparse(ast.fix_missing_locations(head)).splitlines()[0]
    return f"{'if' if isinstance(st, ast.If) else 'while'} {shown(st.test)}:"
