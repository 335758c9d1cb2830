"""The normal form of a function: statements with one operation each, on names and constants, without early exits.

A value that depends on an active parameter is split until each statement has one operation that has a derivative. What
does not depend on one stays as it was written. Comprehensions, conditional expressions and iteration over arrays become
the loops and branches that they stand for; functions defined inside get what they capture as keyword arguments.
`dam.derive.single` then gives each value a name of its own.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dam.derive import changes, functions, primitives, runtime, tables
from dam.derive.errors import DerivativeError, Line
from dam.derive.exits import RESULT, without_exits
from dam.derive.functions import Source
from dam.derive.primitives import Primitive
from dam.derive.trees import (
    COMPREHENSIONS,
    KEPT,
    bound_inside,
    children,
    copied,
    filled,
    loads,
    mentions,
    name,
    parsed,
    rebuilt,
    renamed,
    shown,
    stores,
    walk,
)

assert tables.FUNCTIONS  # loaded with this module


@dataclass
class Callee:
    """A Python function that is differentiated too; what it captures of the one around it comes as keywords."""

    source: Source
    key: Any
    captured: tuple[str, ...] = ()
    local: Mapping[str, Callee] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        given = self.source.node.args
        return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


@dataclass
class Let:
    """target = value. Kinds: constant, copy, primitive, call, structure, item."""

    target: str
    value: ast.expr
    line: Line
    kind: str
    variable: str = ""  # the name in the source, before it was told apart
    in_place: bool = False  # an augmented assignment
    container: str = ""  # of one to an item: what the item is in
    within: tuple[str, ...] = ()  # and the variables that this is a part of, which are stored to next
    kept: str = ""  # of a call: what its backward pass needs


@dataclass
class Unpack:
    """targets = value, item by item."""

    targets: list[str]
    value: str
    line: Line


@dataclass
class Store:
    """name[index] = value, in place."""

    name: str
    index: ast.expr
    value: ast.expr
    line: Line
    restores: bool = False  # puts back what a derivative's own backward pass had changed
    within: tuple[str, ...] = ()  # variables that this is a part of, which are stored to next
    saved: str = ""  # what is overwritten, where the backward pass needs it


@dataclass
class Append:
    name: str
    value: ast.expr
    line: Line
    puts_back: bool = False  # what a derivative's own backward pass had popped
    at: int | None = None  # the place where, unless at the end


@dataclass
class Pop:
    target: str
    name: str
    line: Line
    at: int | None = None  # the place of the item, unless the end


@dataclass
class Effect:
    """A statement without a value and without a derivative: print, assert, raise."""

    node: ast.stmt
    line: Line


@dataclass
class If:
    test: ast.expr
    body: list[Statement]
    orelse: list[Statement]
    line: Line


@dataclass
class For:
    target: str
    iter: ast.expr
    body: list[Statement]
    line: Line
    stop: str | None
    carry: list[Let] = field(default_factory=list)  # what the next iteration begins with
    kept: str = ""


@dataclass
class While:
    test: ast.expr
    body: list[Statement]
    line: Line
    stop: str | None
    carry: list[Let] = field(default_factory=list)
    kept: str = ""


@dataclass
class Surgery:
    """A block of the backward pass on the adjoint of a variable."""

    name: str
    alias: str
    body: list[ast.stmt]
    line: Line


Statement = Let | Unpack | Store | Append | Pop | Effect | If | For | While | Surgery

# Methods without a slope that numpy has with a place for the result as their second argument.
_REDUCING_METHODS = {"argmax", "argmin", "any", "all", "round"}


def _assigned(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind in their own scope."""
    found: set[str] = set()
    for one in body:
        if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(one.name)
        elif isinstance(one, (ast.If, ast.For, ast.While, ast.With)):
            found |= _assigned([*one.body, *getattr(one, "orelse", ())])
            found |= stores(one.target) if isinstance(one, ast.For) else set()
            for item in one.items if isinstance(one, ast.With) else ():
                found |= set() if item.optional_vars is None else stores(item.optional_vars)
        else:
            found |= stores(one)
    return found


def _function_of_lambda(identifier: str, node: ast.Lambda) -> ast.FunctionDef:
    body = ast.copy_location(ast.Return(node.body), node)
    made = ast.FunctionDef(name=identifier, args=node.args, body=[body], decorator_list=[])
    made.type_params = []  # type: ignore[attr-defined]
    return ast.copy_location(made, node)


REFUSED: dict[type, str] = {
    ast.Try: "try has no derivative here",
    ast.Global: "a function that assigns globals has no derivative here",
    ast.Nonlocal: "a function that assigns variables of another has no derivative here",
    ast.ClassDef: "a class inside of a function is not supported",
    ast.AsyncFunctionDef: "coroutines have no derivative",
    ast.AsyncFor: "coroutines have no derivative",
    ast.AsyncWith: "coroutines have no derivative",
    ast.Yield: "generators have no derivative; return a list",
    ast.YieldFrom: "generators have no derivative; return a list",
    ast.Await: "coroutines have no derivative",
    ast.NamedExpr: "an assignment inside of an expression is not supported; give it a line of its own",
    ast.Import: "an import inside of a function is not supported; move it to the top of the file",
    ast.ImportFrom: "an import inside of a function is not supported; move it to the top of the file",
    ast.Match: "match is not supported; write if and elif",
}


_VARIES = f"{KEPT}varies"

# What gives names their values.
_FLOWS = {ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.comprehension, ast.Expr}

# Names by which derived source calls modules and functions.
_CALLED = {"np", "torch", "math", "rt", "len", "range", "reversed", "slice"}

# Parameters of functions in dam.derive.written that are lists, and no arrays.
WRITTEN_LISTS = {"arrays", "axis", "condlist", "choicelist"}


def called_by_name(function: str, value: ast.Call) -> ast.Call:
    """A call of a function as its author wrote it, which may have parameters that are given by position only."""
    first = [a.arg for a in value.callee.source.node.args.posonlyargs]  # type: ignore[attr-defined]
    given = {k.arg: k.value for k in value.keywords}
    return ast.Call(
        name(function), [given[p] for p in first if p in given], [k for k in value.keywords if k.arg not in first]
    )


class Normaliser:
    """One function with some of its parameters active, as statements of the normal form."""

    def __init__(self, callee: Callee, active: frozenset[str], bind: Callable[[str, Any], str]) -> None:
        self.source = callee.source
        self.bind = bind  # gives a value of the surroundings a name in the module that is written
        self.functions = dict(callee.local)
        self.key = callee.key
        self.temporaries = 0
        self.rebound: set[str] = set()  # what the loop whose items are being named assigns
        node = self.source.node
        everything = list(walk(node))
        for inner in everything:
            if (reason := REFUSED.get(type(inner))) is not None:
                raise self.refuse(inner, reason)
        arguments = node.args
        if arguments.vararg or arguments.kwarg:
            raise self.refuse(node, "a function with *args or **kwargs has no derivative here; name its parameters")
        self.parameters = callee.parameters
        result = RESULT
        names = {*self.parameters, *(n.id for n in everything if isinstance(n, ast.Name))}
        while result in names:
            result += "_"
        self.result = result
        self.names = frozenset(names)  # those of the source
        self.locals = names
        apart = node.body
        if any(type(n) in COMPREHENSIONS for n in everything):
            apart = [self._told_apart(one) for one in apart]
        body = without_exits(apart, result)
        self.locals = {*self.parameters, *_assigned(body)}
        self._lift(body)
        nodes = [n for one in body for n in walk(one)]
        if called := _CALLED & self.locals:
            at = next((n for n in nodes if isinstance(n, ast.Name) and n.id in called), node)
            raise self.refuse(at, f"a variable may not be called {min(called)}, as derived source calls it; rename it")
        # Names of comprehensions and lambdas, which none of the function's own may get.
        self.bound_names = set().union(
            *(bound_inside(n) for n in nodes if type(n) is ast.Lambda or type(n) in COMPREHENSIONS)
        )
        flows = [n for n in nodes if type(n) in _FLOWS]
        self.displays = self._displays(nodes, flows)
        values = self._assigned_values(flows)
        self.dicts = {n for n, given in values.items() if all(map(self._is_dict, given))}
        self.lists, before = {*values}, -1
        while len(self.lists) != before:
            before = len(self.lists)
            self.lists = {n for n in self.lists if all(map(self._is_list, values[n]))}
        self.varied = self._varied(flows, set(active))
        self.out: list[Statement] = []
        self.known_changes: dict[Any, dict[str, changes.Change]] = {}
        self.computed: dict[str, str] = {}  # by text the name of a value,
        self.made_of: dict[str, list[str]] = {}  # and by name texts that it is in
        self.here: ast.AST = node
        self.block(body)

    def refuse(self, node: ast.AST, message: str) -> DerivativeError:
        return self.source.refuse(node if hasattr(node, "lineno") else self.here, message)

    def _told_apart(self, node: ast.AST) -> Any:
        """Code whose comprehensions have other names for their items than what they go over: [x for x in x].

        What the first `for` goes over is of the scope around, so that one name there means two things.
        """
        if not any(isinstance(n, COMPREHENSIONS) and _shadowed(n) for n in walk(node)):
            return node
        new = rebuilt(
            node,
            lambda part: (
                [self._told_apart(one) if isinstance(one, ast.AST) else one for one in part]
                if isinstance(part, list)
                else self._told_apart(part)
            ),
        )
        if not isinstance(new, COMPREHENSIONS) or not (shadowed := _shadowed(new)):
            return new
        fresh = {n: self.fresh(n) for n in sorted(shadowed)}
        outer = new.generators[0].iter
        inner = _renamed_comprehension(new, fresh)
        inner.generators[0].iter = outer
        return inner

    # ---- functions inside

    def _lift(self, body: list[ast.stmt]) -> None:
        """Finds functions defined inside, also lambdas with a name, and what they capture."""
        defined: dict[str, ast.FunctionDef] = {}
        for inner in (n for one in body for n in _own_statements(one)):
            if isinstance(inner, ast.FunctionDef):
                if inner.decorator_list:
                    raise self.refuse(
                        inner.decorator_list[0], "a decorated function inside of another is not supported"
                    )
                if inner.name in defined:
                    raise self.refuse(inner, f"{inner.name} is defined twice; give each its own name")
                defined[inner.name] = inner
            elif isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Lambda):
                (target,) = inner.targets if len(inner.targets) == 1 else (None,)
                if not isinstance(target, ast.Name) or target.id in defined:
                    raise self.refuse(inner, "a lambda needs one name of its own; write it as a def")
                defined[target.id] = _function_of_lambda(target.id, inner.value)
        self.defined = set(defined)
        if not defined:
            return
        counts: dict[str, int] = {}
        for any_ in (n for one in body for n in walk(one)):
            if isinstance(any_, ast.Name) and isinstance(any_.ctx, ast.Store):
                counts[any_.id] = counts.get(any_.id, 0) + 1
        for identifier, node in defined.items():
            if counts.get(identifier, 0) > 1 or identifier in self.parameters:
                raise self.refuse(
                    node, f"{identifier} is a function here and something else there; give each its own name"
                )
        free = {identifier: _free(node) for identifier, node in defined.items()}
        outer = {k: set(v.captured) for k, v in self.functions.items()}
        captured = {k: {n for n in v if n in self.locals and n not in defined} for k, v in free.items()}
        for _ in defined:
            for identifier, names in captured.items():
                for other in free[identifier]:
                    names |= captured.get(other, set()) | outer.get(other, set())
        for identifier, node in defined.items():
            lifted = copied(node)
            own = {a.arg for a in walk(node.args) if isinstance(a, ast.arg)}
            if lost := captured[identifier] & (own | _assigned(node.body)):
                raise self.refuse(node, f"{sorted(lost)[0]} means two things in {identifier}; rename one of them")
            for one in sorted(captured[identifier]):
                lifted.args.kwonlyargs.append(ast.arg(one))
                lifted.args.kw_defaults.append(None)
            source = Source(
                identifier, lifted, self.source.file, self.source.first, self.source.lines, self.source.namespace
            )
            self.functions[identifier] = Callee(
                source, (self.key, identifier, node.lineno), tuple(sorted(captured[identifier]))
            )
        for identifier in defined:
            self.functions[identifier].local = self.functions

    # ---- what depends on active parameters

    def _varied(self, flows: list[ast.AST], varied: set[str]) -> set[str]:
        """Names that depend on active ones anywhere, whatever the order of statements."""
        self.varied = varied
        while True:
            before = len(varied)
            for node in flows:
                if isinstance(node, ast.Assign) and self.depends(node.value):
                    for target in node.targets:
                        varied |= _roots(target)
                elif isinstance(node, ast.AugAssign) and (self.depends(node.value) or self.depends(node.target)):
                    varied |= _roots(node.target)
                elif isinstance(node, ast.AnnAssign) and node.value is not None and self.depends(node.value):
                    varied |= _roots(node.target)
                elif isinstance(node, (ast.For, ast.comprehension)) and self.depends(node.iter):
                    varied |= _roots(node.target) - self._counters(node)
                elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    call = node.value
                    if (
                        isinstance(call.func, ast.Attribute)
                        and isinstance(call.func.value, ast.Name)
                        and call.func.value.id in self.locals
                    ):
                        given = (*call.args, *(k.value for k in call.keywords))
                        if any(self.depends(a) for a in given) and call.func.attr in ("append", "extend", "update"):
                            varied.add(call.func.value.id)
                    elif self.resolve(call.func) in (runtime.restore, runtime.store_tangent, runtime.put_back) and any(
                        self.depends(a) for a in call.args
                    ):
                        varied |= _roots(call.args[0])
            if len(varied) == before:
                return varied

    def _displays(self, nodes: list[ast.AST], flows: list[ast.AST]) -> dict[str, ast.expr]:
        """Tuples, lists and dicts that are written out, of which code reads items at constants and nothing else."""
        found: dict[str, ast.expr] = {}
        for node in flows:
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Tuple, ast.List, ast.Dict)):
                if isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
                    found[node.targets[0].id] = node.value
        if not found:
            return found
        uses = Counter(n.id for n in nodes if isinstance(n, ast.Name))
        uses.subtract(n for node in nodes if (n := self._of_item(node)) is not None)
        known = {n for n, count in uses.items() if count == 1} - {*self.parameters}
        return {identifier: display for identifier, display in found.items() if identifier in known}

    def _assigned_values(self, flows: list[ast.AST]) -> dict[str, list[ast.expr]]:
        """By name what is assigned to it, of names that get their values by plain assignments alone."""
        found: dict[str, list[ast.expr]] = {}
        others = {*self.parameters}
        for node in flows:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
                found.setdefault(node.targets[0].id, []).append(node.value)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.For)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                others |= {t for target in targets if not isinstance(target, ast.Subscript) for t in _roots(target)}
        return {identifier: values for identifier, values in found.items() if identifier not in others}

    def _made_by(self, value: ast.expr, maker: Any) -> bool:
        return isinstance(value, ast.Call) and self.resolve(value.func) is maker

    def _is_dict(self, node: ast.expr) -> bool:
        return isinstance(node, (ast.Dict, ast.DictComp)) or self._made_by(node, dict)

    def _is_list(self, node: ast.expr) -> bool:
        """Whether a value is a list for certain, and no array."""
        if isinstance(node, ast.Name):
            return node.id in self.lists
        if isinstance(node, ast.Subscript):
            return isinstance(node.slice, ast.Slice) and self._is_list(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._is_list(node.left) and self._is_list(node.right)
        if (repeated := self._repeated(node)) is not None:
            return self._is_list(repeated[0])
        return isinstance(node, (ast.List, ast.ListComp)) or self._made_by(node, list)

    def _of_item(self, node: ast.AST) -> str | None:
        """The name whose item at a constant this is, or whose structure an adjoint gets in a derivative."""
        whole: ast.AST | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant):
            whole = node.value
        elif isinstance(node, ast.Call) and self.resolve(node.func) in (runtime.placed, runtime.add_at):
            whole = node.args[-1]
        return whole.id if isinstance(whole, ast.Name) else None

    def _counters(self, node: ast.For | ast.comprehension) -> set[str]:
        """Of targets of enumerate and items the name of the index, which has no derivative."""
        call = node.iter
        if (
            isinstance(call, ast.Call)
            and isinstance(node.target, ast.Tuple)
            and isinstance(node.target.elts[0], ast.Name)
        ):
            method = isinstance(call.func, ast.Attribute) and call.func.attr == "items"
            if method or self.resolve(call.func) is enumerate:
                return {node.target.elts[0].id}
        return set()

    def resolve(self, node: ast.expr) -> Any:
        """The object that a dotted name of the surroundings stands for, or None."""
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.locals or node.id in self.functions:
            return None
        if node.id not in self.source.namespace:
            return None
        value = self.source.namespace[node.id]
        for attribute in reversed(path):
            if not inspect.ismodule(value) and not isinstance(value, type):
                return None
            value = functions.attribute(value, attribute)
        return value

    def without_slope(self, call: ast.Call) -> bool:
        found = self.resolve(call.func)
        if found is not None:
            return primitives.key(found) in primitives.WITHOUT_SLOPE
        return (
            isinstance(call.func, ast.Attribute)
            and call.func.attr in primitives.METHODS_WITHOUT_SLOPE
            and not self._is_module(call.func.value)
        )

    def _is_module(self, node: ast.expr) -> bool:
        return inspect.ismodule(self.resolve(node))

    def depends(self, node: ast.AST) -> bool:
        """Whether a value has a slope in active ones, as far as names tell."""
        if isinstance(node, ast.Name):
            return node.id in self.varied
        names = loads(node)
        if names.isdisjoint(self.varied) and names.isdisjoint(self.functions):
            return False
        # Names come to depend on active ones, and none ceases to.
        if node.__dict__.get(_VARIES) is self:
            return True
        if found := self._found_to_depend(node):
            node.__dict__[_VARIES] = self
        return found

    def _found_to_depend(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Compare, ast.Lambda)):
            return False
        if isinstance(node, ast.JoinedStr) and self.source.derived:
            return False  # a key: text of active numbers is refused where the function is transformed first
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.BitAnd)):
            return False  # but a | b may be of dicts
        if isinstance(node, ast.Attribute) and node.attr in primitives.ATTRIBUTES_WITHOUT_SLOPE:
            return False
        if isinstance(node, ast.Subscript):
            if (
                isinstance(node.value, ast.Name)
                and node.value.id in self.displays
                and isinstance(node.slice, ast.Constant)
            ):
                item = _item_of(self.displays[node.value.id], node.slice.value)
                if item is not None:
                    return self.depends(item)
            return self.depends(node.value)
        if isinstance(node, ast.IfExp):
            return self.depends(node.body) or self.depends(node.orelse)
        if isinstance(node, ast.Call):
            if self.without_slope(node):
                return False
            if isinstance(node.func, ast.Name) and node.func.id in self.functions:
                if any(one in self.varied for one in self.functions[node.func.id].captured):
                    return True
            elif isinstance(node.func, ast.Attribute) and self.depends(node.func.value):
                return True
            return any(self.depends(a) for a in (*node.args, *(k.value for k in node.keywords)))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            return self._comprehended(node, [node.elt])
        if isinstance(node, ast.DictComp):
            return self._comprehended(node, [node.value])
        return any(self.depends(child) for child in children(node) if isinstance(child, ast.expr))

    def _comprehended(self, node: Any, values: list[ast.expr]) -> bool:
        added = set()
        for generator in node.generators:
            if self.depends(generator.iter):
                added |= _roots(generator.target) - self._counters(generator) - self.varied
        self.varied |= added
        found = any(self.depends(v) for v in values)
        self.varied -= added
        return found

    # ---- expressions

    def fresh(self, stem: str = "t") -> str:
        while True:
            self.temporaries += 1
            made = f"{stem}_{self.temporaries}"
            if made not in self.locals and made not in self.source.namespace:
                return made

    def emit(self, statement: Statement) -> None:
        self.out.append(statement)
        if isinstance(statement, Let) and not statement.in_place:
            for text in self.made_of.pop(statement.target, ()):
                self.computed.pop(text, None)
        else:
            self.computed.clear()  # what is written into may be memory of anything

    def let(self, target: str, value: ast.expr, kind: str, at: ast.AST, in_place: bool = False) -> ast.Name:
        self.locals.add(target)
        self.emit(Let(target, value, self.source.line(at), kind, target, in_place))
        return name(target)

    def constant(self, node: ast.expr) -> ast.expr:
        """A value without a derivative, as written; names of the surroundings get theirs in the module."""
        if isinstance(node, ast.Constant):
            return node
        for inner in walk(node):
            if isinstance(inner, ast.Call):
                self._no_place_for_results(inner)
                if self.resolve(inner.func) in (eval, exec, locals, globals, vars):
                    raise self.refuse(node, f"{ast.unparse(inner.func)} reads variables by their names, which has no "
                                      "derivative here")  # fmt: skip
                if isinstance(inner.func, ast.Name) and inner.func.id in self.functions:
                    raise self.refuse(node, f"{inner.func.id}, defined inside, is called in an expression that has no "
                                      "derivative; call it on a line of its own")  # fmt: skip
                if (
                    isinstance(inner.func, ast.Attribute)
                    and not self._is_module(inner.func.value)
                    and changes.changes_itself(inner.func.attr)
                    and _roots(inner.func.value) & self.locals
                ):
                    raise self.refuse(node, f".{inner.func.attr}() within an expression changes what it is called on")
                self._no_change(inner, node)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and inner.id in self.functions:
                raise self.refuse(node, f"{inner.id}, a function defined inside, is used as a value")
        free = loads(node)
        return renamed(node, {n: self._outside(n, node) for n in dict.fromkeys(mentions(node)) if n in free})

    def _no_change(self, call: ast.Call, node: ast.expr) -> None:
        """Refuses a call without a derivative that writes into a variable, which the backward pass may read again.

        What is one where an argument is an array or a list alone is checked when it runs.
        """
        found = self.resolve(call.func)
        if self.source.derived or (found is None and isinstance(call.func, ast.Name)):
            return
        if not changes.is_pure(call, found):
            self.computed.clear()  # which may change what values were computed of
        line = self.source.line(node)
        for value, change in changes.of_call(call, found, line, self.known_changes):
            if not changes.parts(value, self._itself, self.resolve).own:
                continue
            where = "" if change.line.text == line.text else f" ({change.line.text})"
            said = (
                f"{ast.unparse(call.func)} writes into {ast.unparse(value)}{where}, which has no derivative here; "
                "let it return a new value, or give it a copy"
            )
            plain = loads(value) <= self.locals and not any(isinstance(n, ast.Call) for n in walk(value))
            if not change.maybe or not plain:
                raise self.refuse(node, said)
            self.emit(Effect(_statement("rt.number(x, m)", {"x": value, "m": ast.Constant(said)}), line))

    def _itself(self, identifier: str) -> changes.Parts:
        """Memory of a variable, by its name; one of a comprehension's own may be a part of any."""
        if identifier in self.source.namespace and identifier not in self.locals | self.bound_names:
            if not isinstance(self.source.namespace[identifier], (np.ndarray, torch.Tensor, list, dict)):
                return changes.NOTHING
        return changes.Parts(frozenset({identifier}), frozenset({identifier}))

    def _no_place_for_results(self, call: ast.Call) -> None:
        """Refuses calls of numpy and torch that write their result into an argument."""
        found = self.resolve(call.func)
        named = any(k.arg == "out" for k in call.keywords)
        if isinstance(found, np.ufunc):
            named = named or len(call.args) > found.nin
        elif found is not None and inspect.getmodule(found) is np and len(call.args) > 2 and inspect.isroutine(found):
            with contextlib.suppress(TypeError, ValueError):
                named = named or "out" in inspect.signature(found).bind_partial(*call.args).arguments
        elif found is None and isinstance(call.func, ast.Attribute):
            named = named or (call.func.attr in _REDUCING_METHODS and len(call.args) > 1)
        if named:
            raise self.refuse(call, f"{ast.unparse(call)} writes into an argument; assign its result to a name instead")

    def _outside(self, identifier: str, at: ast.AST) -> str:
        """What a name of the function, or of its surroundings, is called in the module."""
        if identifier in self.locals:
            return identifier
        if identifier not in self.source.namespace:
            raise self.refuse(at, f"{identifier} is not defined")
        return self.bind(identifier, self.source.namespace[identifier])

    def _calls_inside(self, node: ast.expr) -> bool:
        if loads(node).isdisjoint(self.functions):
            return False
        return any(
            isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in self.functions for n in walk(node)
        )

    def simple(self, node: ast.expr) -> bool:
        """Whether an expression may be written twice: it is of names and numbers, and nothing can have changed it."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if isinstance(node, ast.UnaryOp):
            return self.simple(node.operand)
        if isinstance(node, ast.BinOp):
            return self.simple(node.left) and self.simple(node.right)
        if isinstance(node, ast.Tuple):
            return all(self.simple(e) for e in node.elts)
        if isinstance(node, ast.Slice):
            return all(self.simple(e) for e in (node.lower, node.upper, node.step) if e is not None)
        if isinstance(node, ast.Attribute):
            return self.resolve(node) is not None  # np.newaxis, np.pi
        return False

    def atom(self, node: ast.expr) -> ast.expr:
        """A name, a constant, or arithmetic of such without a derivative."""
        if not self.depends(node):
            if self._calls_inside(node):
                return self._split_constant(node)
            plain = self.constant(node)
            return plain if self.simple(node) else self.let(self.fresh(), plain, "constant", node)
        if isinstance(node, ast.Name):
            return name(node.id)
        target = self.fresh()
        self.varied.add(target)
        self.assign(target, node)
        return name(target)

    def operand(self, node: ast.expr, entry: Primitive) -> ast.expr:
        """An atom that is read and no more: of what was computed before in the same run of statements, the name.

        Values that may become a part of something else are computed each time, as one may be written into.
        """
        if isinstance(node, (ast.Name, ast.Constant)) or entry.view or entry.shallow or not self.depends(node):
            return self.atom(node)
        target = self.fresh()
        self.varied.add(target)
        value, kind = self.operation(node)
        made = getattr(value, "primitive", None)
        if kind != "item" and (made is None or made.view or made.shallow or made.rule is not None):
            return self.let(target, value, kind, node)
        text = shown(value)
        if (known := self.computed.get(text)) is not None:
            return name(known)
        self.let(target, value, kind, node)
        self.computed[text] = target
        for one in loads(value):
            self.made_of.setdefault(one, []).append(text)
        return name(target)

    def _split_constant(self, node: ast.expr) -> ast.expr:
        """A value without a derivative in which functions defined inside are called: their results have names first."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            target = self.fresh()
            self.assign(target, node)
            return name(target)
        if isinstance(node, ast.IfExp):  # of its arms one alone is evaluated
            target = self.fresh("chosen")
            branch = ast.If(node.test, [_set(target, node.body)], [_set(target, node.orelse)])
            self._written(branch, node, set())
            return name(target)
        later = node.values if isinstance(node, ast.BoolOp) else []
        if isinstance(node, ast.Compare):
            later = node.comparators
        if any(self._calls_inside(v) for v in later[1:]):
            raise self.refuse(
                node,
                "a function defined inside is called in a part of a condition that may not be evaluated; write an if",
            )
        if isinstance(node, COMPREHENSIONS) and not isinstance(node, ast.SetComp):
            return name(self._loops(node))
        if not isinstance(node, (ast.Lambda, ast.SetComp)):  # which are called, or go on, later
            node = rebuilt(node, self._part_split)
        return self.let(self.fresh(), self.constant(node), "constant", node)

    def _part_split(self, part: Any) -> Any:
        if isinstance(part, list):
            return [self._part_split(one) if isinstance(one, ast.AST) else one for one in part]
        if isinstance(part, (ast.keyword, ast.Starred, ast.Slice, ast.FormattedValue)):
            return rebuilt(part, self._part_split)
        return self._split_constant(part) if isinstance(part, ast.expr) and self._calls_inside(part) else part

    def index(self, node: ast.expr) -> ast.expr:
        """A subscript, each part of it simple."""
        if isinstance(node, ast.Slice):
            parts = (None if e is None else self.index(e) for e in (node.lower, node.upper, node.step))
            return ast.Slice(*parts)
        if isinstance(node, ast.Tuple):
            return ast.Tuple([self.index(e) for e in node.elts], ast.Load())
        if self.depends(node) and not self._calls_inside(node):
            # An index has no slope, whatever it is made of.
            plain = self.constant(node)
            return plain if self.simple(node) else self.let(self.fresh(), plain, "constant", node)
        return self.atom(node)

    def assign(self, target: str, node: ast.expr, in_place: bool = False) -> None:
        """target = node, with whatever comes before."""
        value, kind = self.operation(node)
        self.let(target, value, kind, node, in_place)

    def operation(self, node: ast.expr) -> tuple[ast.expr, str]:
        """One operation on atoms, and its kind."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            return self.call(node, self.functions[node.func.id]), "call"
        if not self.depends(node):
            if self._calls_inside(node):
                return self._split_constant(node), "constant"
            return self.constant(node), "constant"
        if isinstance(node, ast.Name):
            return name(node.id), "copy"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and self._is_list(node):
            return self._starred(_joined_lists(node)), "copy"
        if (repeated := self._repeated(node)) is not None:
            whole, count = repeated
            if self._is_list(whole):
                return name(self._loops(self._repetition(whole, count, node))), "copy"
            if isinstance(whole, ast.Tuple):
                raise self.refuse(node, "a tuple that is repeated has no derivative here; make it a list")
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            entry = primitives.OPERATORS.get(type(node.op))
            if entry is None:
                raise self.refuse(node, f"the operator in {ast.unparse(node)} has no derivative")
            new: ast.expr
            if isinstance(node, ast.BinOp):
                new = ast.BinOp(self.operand(node.left, entry), node.op, self.operand(node.right, entry))
            else:
                new = ast.UnaryOp(node.op, self.operand(node.operand, entry))
            return self.primitive(new, entry), "primitive"
        if isinstance(node, ast.Subscript):
            return ast.Subscript(self.atom(node.value), self.index(node.slice), ast.Load()), "item"
        if isinstance(node, (ast.Tuple, ast.List)):
            if any(isinstance(e, ast.Starred) for e in node.elts):
                if isinstance(node, ast.Tuple):
                    raise self.refuse(node, "a * within a tuple with a derivative is not supported; make it a list")
                return self._starred(node), "copy"
            return type(node)([self.atom(e) for e in node.elts], ast.Load()), "structure"
        if isinstance(node, ast.Dict):
            if any(k is None for k in node.keys):
                raise self.refuse(node, "a ** within a dict with a derivative is not supported")
            keys = [self.atom(k) for k in node.keys if k is not None]
            return ast.Dict(list(keys), [self.atom(v) for v in node.values]), "structure"
        if isinstance(node, ast.Attribute):
            entry = primitives.ATTRIBUTES.get(node.attr)
            if entry is None:
                raise self.refuse(node, f"the attribute .{node.attr} has no derivative here")
            return self.primitive(ast.Attribute(self.atom(node.value), node.attr, ast.Load()), entry), "primitive"
        if isinstance(node, ast.IfExp):
            target = self.fresh("chosen")
            branch = ast.If(node.test, [_set(target, node.body)], [_set(target, node.orelse)])
            self._written(branch, node, {target})
            return name(target), "copy"
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
            return name(self._loops(node)), "copy"
        if isinstance(node, ast.Call):
            return self._call(node)
        raise self.refuse(node, f"{ast.unparse(node)} has no derivative here ({type(node).__name__})")

    def _written(self, statement: ast.stmt, at: ast.AST, varied: set[str]) -> None:
        self.varied |= varied
        for inner in walk(statement):
            if not hasattr(inner, "lineno"):
                ast.copy_location(inner, at)
        self.locals |= _assigned([statement])
        ast.fix_missing_locations(statement)
        self.statement(statement)

    def _loops(self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp) -> str:
        """A comprehension as the loops that it stands for; returns the name of what they fill."""
        target = self.fresh("items")
        fresh = {n: self.fresh(n) for g in node.generators for n in sorted(_roots(g.target))}
        renamed = _renamed_comprehension(node, fresh)
        body: ast.stmt
        if isinstance(renamed, ast.DictComp):
            place = ast.Subscript(name(target), renamed.key, ast.Store())
            body = ast.Assign([place], renamed.value)
            start: ast.expr = ast.Dict([], [])
        else:
            append = ast.Attribute(name(target), "append", ast.Load())
            body = ast.Expr(ast.Call(append, [renamed.elt], []))
            start = ast.List([], ast.Load())
        for generator in reversed(renamed.generators):
            for test in reversed(generator.ifs):
                body = ast.If(test, [body], [])
            body = ast.For(generator.target, generator.iter, [body], [])
            body.stop = None  # type: ignore[attr-defined]
        self.locals.add(target)
        varied = {target}
        for generator in renamed.generators:
            if self.depends(generator.iter):
                found = _roots(generator.target) - self._counters(generator)
                self.varied |= found
                varied |= found
        self.let(target, start, "constant", node)
        self._written(body, node, varied)
        return target

    def _repeated(self, node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
        """Of a product with an integer for certain, which repeats a list, what is repeated and how often."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for whole, count in ((node.left, node.right), (node.right, node.left)):
                if self._made_by(count, len) or (isinstance(count, ast.Constant) and type(count.value) is int):
                    return whole, count
        return None

    def _repetition(self, items: ast.expr, count: ast.expr, node: ast.expr) -> ast.ListComp:
        """l * n of a list as [item for _ in range(n) for item in l], of one l."""
        at, item = self.fresh("k"), self.fresh("item")
        times = ast.comprehension(ast.Name(at, ast.Store()), filled("range(n)", {"n": count}), [], 0)
        each = ast.comprehension(ast.Name(item, ast.Store()), self._named(items), [], 0)
        made = ast.ListComp(name(item), [times, each])
        _placed(made, node)
        return made

    def _starred(self, node: ast.List) -> ast.Name:
        """A list with * in it, filled item by item."""
        target = self.let(self.fresh("items"), ast.List([], ast.Load()), "constant", node)
        self.varied.add(target.id)
        for element in node.elts:
            if isinstance(element, ast.Starred):
                made: ast.stmt = self._each(element.value, lambda item: _appended(target.id, name(item)))
            else:
                made = _appended(target.id, element)
            self._written(made, node, set())
        return name(target.id)

    def primitive(self, node: ast.expr, entry: Primitive) -> ast.expr:
        try:
            values = primitives.bound(entry, node)
        except primitives.Unsupported as error:
            raise self.refuse(self.here, str(error)) from None
        for parameter, value in values.items():
            # What derived source calls takes such for its shape only.
            # A condition has no slope, whatever it is made of.
            condition = parameter == "c" and entry.name.endswith("where")
            if parameter not in entry.differentiable and self.depends(value) and entry.module != "rt" and not condition:
                raise self.refuse(
                    self.here,
                    f"{ast.unparse(node)} has no derivative in its argument {parameter}; "
                    "stop_gradient makes it a constant",
                )
        node.primitive = entry  # type: ignore[attr-defined]
        return node

    def _call(self, node: ast.Call) -> tuple[ast.expr, str]:
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise self.refuse(node, "a call with * or ** arguments has no derivative here; write the arguments out")
        found = self.resolve(node.func)
        if found is None and isinstance(node.func, ast.Attribute) and not self._is_module(node.func.value):
            return self._method(node, node.func)
        if found is None:
            raise self.refuse(node, f"{ast.unparse(node.func)} is not known when the function is transformed")
        special = self._structural(node, found)
        if special is not None:
            return special
        known = primitives.key(found)
        if (written := primitives.WRITTEN.get(known)) is not None:
            if inspect.getmodule(found) is not torch:
                node = primitives.with_arrays(node, inspect.signature(written).parameters, WRITTEN_LISTS)
            return self.call(node, Callee(functions.of(written), written)), "call"
        if found in (np.einsum, torch.einsum) and known not in primitives.FUNCTIONS:
            return self._einsum(node, "np" if found is np.einsum else "torch"), "primitive"
        entry = primitives.FUNCTIONS.get(known)
        if entry is not None and known in (max, min) and len(node.args) != 2:
            raise self.refuse(
                node, f"{ast.unparse(node.func)} of more or fewer than two numbers has no derivative here; use np.max"
            )
        if entry is not None:
            if entry.name.startswith("np.") and found not in (np.array, np.asarray, np.asanyarray):
                others = {"l", *entry.signature.parameters} - (entry.differentiable - {"l"})
                node = primitives.with_arrays(node, entry.signature.parameters, others)
            called = name(self.bind(entry.name, entry.function)) if entry.rule else parsed(entry.name)
            new = ast.Call(
                called,
                [self.operand(a, entry) for a in node.args],
                [ast.keyword(k.arg, self.operand(k.value, entry)) for k in node.keywords],
            )
            return self.primitive(new, entry), "primitive"
        if inspect.isfunction(found):
            return self.call(node, Callee(functions.of_or_refused(found, self, node), found)), "call"
        raise self.refuse(
            node, f"{ast.unparse(node.func)} has no known derivative and no Python source; register one with adjoint"
        )

    def _einsum(self, node: ast.Call, module: str) -> ast.expr:
        """A sum of products: of each operand the adjoint is one too, of the adjoint and of the others."""
        if (
            not node.args
            or not isinstance(node.args[0], ast.Constant)
            or not isinstance(node.args[0].value, str)
            or node.keywords
        ):
            raise self.refuse(
                node, "einsum has a derivative where its subscripts are a string, written out, and nothing else"
            )
        subscripts = node.args[0].value.replace(" ", "")
        inputs, arrow, output = subscripts.partition("->")
        operands = inputs.split(",")
        if not arrow or "." in subscripts or len(operands) != len(node.args) - 1:
            raise self.refuse(
                node, "einsum has a derivative with '->' and without '...', an operand for each subscript"
            )
        if any(len(set(o)) != len(o) for o in operands):
            raise self.refuse(
                node, "einsum with an index twice in one operand has no derivative here; use np.diag first"
            )
        names = [f"x{k}" for k in range(len(operands))]
        reverse, forward = {}, {}
        for k, own in enumerate(operands):
            terms = [(output, "g"), *((o, n) for j, (o, n) in enumerate(zip(operands, names, strict=True)) if j != k)]
            lost = "".join(i for i in own if not any(i in t for t, _ in terms))
            if lost:  # summed in this operand alone
                terms.append((own, f"{module}.ones_like({names[k]})"))
            pattern = ",".join(t for t, _ in terms) + "->" + own
            product = f"{module}.einsum('{pattern}', {', '.join(t for _, t in terms)})"
            # An axis of size 1 is broadcast, of this operand or of what is left of the others.
            reverse[names[k]] = f"rt.broadcast(rt.unbroadcast({product}, {names[k]}), {names[k]})"
            given = ", ".join(f"d_{n}" if j == k else n for j, n in enumerate(names))
            forward[names[k]] = f"{module}.einsum('{subscripts}', {given})"
        entry = Primitive(
            f"{module}.einsum",
            primitives.signature(", ".join(["subscripts", *names])),
            module,
            reverse=reverse,
            forward=forward,
        )
        factors = [self.operand(a, entry) for a in node.args[1:]]
        call = ast.Call(parsed(entry.name), [ast.Constant(subscripts), *factors], [])
        return self.primitive(call, entry)

    def _structural(self, node: ast.Call, found: Any) -> tuple[ast.expr, str] | None:
        """list(x), dict(a=x), sums with a start, extremes of several numbers."""
        if found is sum and len(node.args) == 2 and not node.keywords:
            if self._is_list(node.args[1]) or isinstance(node.args[1], ast.Tuple):
                raise self.refuse(node, "a sum of lists has no derivative here; write [v for l in lists for v in l]")
            total = ast.copy_location(ast.Call(node.func, node.args[:1], []), node)
            return self.operation(ast.copy_location(ast.BinOp(node.args[1], ast.Add(), total), node))
        if found in (max, min) and len(node.args) > 2 and not node.keywords:
            first = ast.copy_location(ast.Call(node.func, node.args[:-1], []), node)
            return self.operation(ast.copy_location(ast.Call(node.func, [first, node.args[-1]], []), node))
        if found is dict:
            if node.args:
                return None
            pairs = [(ast.Constant(k.arg), self.atom(k.value)) for k in node.keywords]
            return ast.Dict([k for k, _ in pairs], [v for _, v in pairs]), "structure"
        if found is list and len(node.args) == 1:
            item = self.fresh("item")
            made = ast.ListComp(name(item), [ast.comprehension(ast.Name(item, ast.Store()), node.args[0], [], 0)])
            for inner in walk(made):
                ast.copy_location(inner, node)
            return name(self._loops(made)), "copy"
        return None

    def _method(self, node: ast.Call, function: ast.Attribute) -> tuple[ast.expr, str]:
        written = primitives.WRITTEN_METHODS.get(function.attr)
        if written is not None:
            plain = ast.copy_location(ast.Call(function.value, [function.value, *node.args], node.keywords), node)
            return self.call(plain, Callee(functions.of(written), written)), "call"
        if (function.attr == "get" and len(node.args) == 1) or (function.attr == "copy" and not node.args):
            if function.attr == "get":
                return ast.Subscript(self.atom(function.value), self.index(node.args[0]), ast.Load()), "item"
        if function.attr == "get" and len(node.args) == 2 and not node.keywords:
            key, default = node.args
            item = ast.Subscript(function.value, key, ast.Load())
            chosen = ast.IfExp(ast.Compare(key, [ast.In()], [function.value]), item, default)
            return self.operation(_placed(chosen, node))
        if function.attr == "values" and not node.args:
            key_of = self.fresh("key")
            keys = ast.Call(ast.Attribute(function.value, "keys", ast.Load()), [], [])
            each = ast.comprehension(ast.Name(key_of, ast.Store()), keys, [], 0)
            return self.operation(_placed(ast.ListComp(_item(function.value, key_of), [each]), node))
        if function.attr in ("to", "type", "float", "items"):
            raise self.refuse(node, f".{function.attr}() has no derivative here")
        if function.attr == "view" and any(
            isinstance(self.resolve(a), (torch.dtype, np.dtype, type)) for a in node.args
        ):
            raise self.refuse(node, f"{ast.unparse(node)} is of a dtype, which has no derivative here")
        entry = primitives.METHODS.get(function.attr)
        if entry is None:
            raise self.refuse(node, f"the method .{function.attr}() has no derivative here")
        new = ast.Call(
            ast.Attribute(self.operand(function.value, entry), function.attr, ast.Load()),
            [self.operand(a, entry) for a in node.args],
            [ast.keyword(k.arg, self.operand(k.value, entry)) for k in node.keywords],
        )
        return self.primitive(new, entry), "primitive"

    def call(self, node: ast.Call, callee: Callee) -> ast.expr:
        """A call of a function that is differentiated too, its arguments in the order of its parameters."""
        arguments = callee.source.node.args
        if arguments.vararg or arguments.kwarg:
            raise self.refuse(node, f"{callee.source.name} takes *args or **kwargs, which has no derivative here")
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise self.refuse(node, "a call with * or ** arguments has no derivative here; write the arguments out")
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        if len(node.args) > len(positional):
            raise self.refuse(node, f"{callee.source.name} takes {len(positional)} arguments")
        given = {**dict(zip(positional, node.args, strict=False)), **{str(k.arg): k.value for k in node.keywords}}
        alias = {"dim": "axis", "keepdim": "keepdims"}
        names = {*positional, *(a.arg for a in arguments.kwonlyargs)}
        given = {(alias[k] if k in alias and k not in names else k): v for k, v in given.items()}
        if any(
            isinstance(v, ast.Constant) and isinstance(v.value, bool) and k in ("axis", "dim") for k, v in given.items()
        ):
            raise self.refuse(node, f"{ast.unparse(node)}: an axis is no bool; name the argument")
        if unknown := given.keys() - names:
            raise self.refuse(node, f"{ast.unparse(node.func)} with {sorted(unknown)[0]}= has no derivative here")
        keywords = [ast.keyword(k, self.atom(v)) for k, v in given.items()]
        keywords += [ast.keyword(k, name(k)) for k in callee.captured]
        new = ast.Call(name(callee.source.name), [], keywords)
        new.callee = callee  # type: ignore[attr-defined]
        if callable(callee.key) and not changes.is_pure(node, callee.key):
            self.computed.clear()  # which may change what values were computed of
        return new

    # ---- statements

    def block(self, body: list[ast.stmt]) -> None:
        for node in body:
            self.statement(node)

    def inner(self, body: list[ast.stmt]) -> list[Statement]:
        saved, self.out, self.computed = self.out, [], {}
        self.block(body)
        found, self.out, self.computed = self.out, saved, {}
        return found

    def statement(self, node: ast.stmt) -> None:
        self.here = node
        method = getattr(self, f"on_{type(node).__name__}", None)
        if method is None:
            raise self.refuse(node, f"{type(node).__name__} is not supported")
        method(node)

    def on_Pass(self, node: ast.Pass) -> None:
        pass

    def on_FunctionDef(self, node: ast.FunctionDef) -> None:
        pass  # lifted

    def on_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Lambda):
            return  # lifted
        if len(node.targets) > 1:
            value = self.atom(node.value)
            for target in node.targets:
                self.target(target, value, node)
            return
        self.target(node.targets[0], node.value, node)

    def on_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.target(node.target, node.value, node)

    def target(self, target: ast.expr, value: ast.expr, at: ast.stmt) -> None:
        if isinstance(target, ast.Name):
            popped = self._popped(value)
            if popped is not None:
                self.emit(Pop(target.id, popped[0], self.source.line(at), popped[1]))
                return
            self.assign(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target, value, at)
        elif isinstance(target, ast.Subscript):
            self._store(target, self.atom(value), at)
        else:
            raise self.refuse(at, f"an assignment to {ast.unparse(target)} has no derivative here")

    def _popped(self, value: ast.expr) -> tuple[str, int | None] | None:
        """Of a call of a list's pop, the list and the place."""
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and value.func.attr == "pop"
            and isinstance(value.func.value, ast.Name)
            and value.func.value.id in self.locals
        ):
            if value.func.value.id in self.dicts:
                raise self.refuse(value, "pop of a key of a dict has no derivative here; leave the key where it is")
            if not value.args and not value.keywords:
                return value.func.value.id, None
            (at,) = value.args if len(value.args) == 1 and not value.keywords else (None,)
            if not isinstance(at, ast.Constant) or type(at.value) is not int:
                raise self.refuse(value, "pop(k) has a derivative of a list, where k is a number, 0 or more")
            return value.func.value.id, at.value
        return None

    def _unpack(self, target: ast.Tuple | ast.List, value: ast.expr, at: ast.stmt) -> None:
        if any(isinstance(e, ast.Starred) for e in target.elts):
            self._unpack_starred(target, value, at)
            return
        if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
            parts: list[ast.expr] = []
            for element in value.elts:
                part = self.atom(element)
                # Names may be assigned before they are read: a, b = b, a.
                if loads(part) & _roots(target):
                    part = self.let(self.fresh(), part, "copy" if self.depends(element) else "constant", at)
                    if self.depends(element):
                        self.varied.add(part.id)
                parts.append(part)
            for one, part in zip(target.elts, parts, strict=True):
                self.target(one, part, at)
            return
        whole = self.atom(value)
        if not isinstance(whole, ast.Name):
            whole = self.let(self.fresh(), whole, "constant", at)
        names = [e.id if isinstance(e, ast.Name) else self.fresh() for e in target.elts]
        self.locals |= {*names}
        self.emit(Unpack(names, whole.id, self.source.line(at)))
        for one, given in zip(target.elts, names, strict=True):
            if not isinstance(one, ast.Name):
                if self.depends(value):
                    self.varied.add(given)
                self.target(one, name(given), at)

    def _unpack_starred(self, target: ast.Tuple | ast.List, value: ast.expr, at: ast.stmt) -> None:
        """a, *b, c = value: items from both ends, and a list of those between."""
        self.locals |= _assigned([at])
        whole = self.let(self.fresh(), self.atom(value), "copy" if self.depends(value) else "constant", at)
        if self.depends(value):
            self.varied.add(whole.id)
        (place,) = (k for k, e in enumerate(target.elts) if isinstance(e, ast.Starred))
        after = len(target.elts) - place - 1
        check = _statement("rt.at_least(x, n)", {"x": whole, "n": ast.Constant(place + after)})
        self.emit(Effect(check, self.source.line(at)))
        for k, one in enumerate(target.elts):
            if isinstance(one, ast.Starred):
                index = self.fresh("k")
                between = filled(
                    "range(n, len(x) - m)", {"n": ast.Constant(place), "m": ast.Constant(after), "x": whole}
                )
                each = ast.comprehension(ast.Name(index, ast.Store()), between, [], 0)
                self._written(ast.Assign([one.value], ast.ListComp(_item(whole, index), [each])), at, set())
                continue
            number = ast.Constant(k) if k < place else ast.UnaryOp(ast.USub(), ast.Constant(len(target.elts) - k))
            self._written(ast.Assign([one], ast.Subscript(whole, number, ast.Load())), at, set())

    def _store(self, target: ast.Subscript, value: ast.expr, at: ast.stmt, within: tuple[str, ...] = ()) -> None:
        base = target.value
        if isinstance(base, ast.Subscript):
            whole = self.atom(base.value)
            place = self.index(base.slice)
            if not isinstance(whole, ast.Name):
                raise self.refuse(at, f"an assignment into {ast.unparse(base)} is not supported")
            inner = self.fresh("part")
            self.emit(Effect(_statement("rt.part(x, i)", {"x": whole, "i": as_value(place)}), self.source.line(at)))
            depends = self.depends(base.value)
            self.let(inner, ast.Subscript(whole, place, ast.Load()), "item", at)
            if depends or self.depends(value):
                self.varied.add(inner)
            within = (*within, *_roots(base), *([whole.id] if isinstance(whole, ast.Name) else []))
            self._store(ast.Subscript(name(inner), target.slice, ast.Store()), value, at, within)
            self._store(ast.Subscript(base.value, base.slice, ast.Store()), name(inner), at, within)
            return
        if not isinstance(base, ast.Name):
            raise self.refuse(at, f"an assignment into {ast.unparse(base)} is not supported")
        if base.id not in self.locals:
            raise self.refuse(
                at, f"{base.id} is not a variable of the function, and writing into it has no derivative here"
            )
        index, line = self.index(target.slice), self.source.line(at)
        if isinstance(index, ast.Slice) and not self.source.derived:
            said = ast.Constant(f"{line.text} changes the length of a list, which has no derivative here")
            names = {"x": name(base.id), "i": as_value(index), "v": value, "m": said}
            if self._is_list(base) or isinstance(value, ast.List) or self._is_list(value):
                self.emit(Effect(_statement("rt.as_long(x, i, v, m)", names), line))
        self.emit(Store(base.id, index, value, line, within=within))

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        read = copied(node.target)
        for inner in walk(read):
            if hasattr(inner, "ctx"):
                inner.ctx = ast.Load()
        if isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add) and self._is_list(node.target):
            call = ast.Call(ast.Attribute(read, "extend", ast.Load()), [node.value], [])
            self.on_Expr(ast.copy_location(ast.Expr(_placed(call, node)), node))
        elif isinstance(node.op, ast.Mult) and self.depends(node.target) and self._is_list(read):
            raise self.refuse(node, "a list that is repeated in place has no derivative here; write l = l * n")
        elif isinstance(node.target, ast.Name):
            value = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
            self.assign(node.target.id, value, in_place=True)
        elif isinstance(node.target, ast.Subscript):
            # The index once, also where it is not simple.
            index = self.index(node.target.slice)
            place = ast.copy_location(ast.Subscript(node.target.value, as_value(index, plain=True), ast.Load()), node)
            whole = self._named(node.target.value)
            varies = self.depends(place)
            kind = "item" if varies else "constant"
            item = self.let(self.fresh(), ast.Subscript(whole, index, ast.Load()), kind, node)
            sum_ = ast.copy_location(ast.BinOp(item, node.op, node.value), node)
            new = self.fresh()
            self.varied |= ({item.id} if varies else set()) | ({new} if varies or self.depends(node.value) else set())
            check = _statement("rt.alone(x, i)", {"x": whole, "i": as_value(index)})
            self.emit(Effect(check, self.source.line(node)))
            made, kind = self.operation(sum_)
            self.locals.add(new)
            line, within = self.source.line(node), tuple(sorted(_roots(node.target)))
            self.emit(Let(new, made, line, kind, new, in_place=True, container=whole.id, within=within))
            self._store(ast.Subscript(node.target.value, place.slice, ast.Store()), name(new), node)
        else:
            raise self.refuse(node, f"an assignment to {ast.unparse(node.target)} has no derivative here")

    def on_Expr(self, node: ast.Expr) -> None:
        value = node.value
        if isinstance(value, ast.Constant):
            return
        if not isinstance(value, ast.Call):
            raise self.refuse(node, "an expression whose value is not used")
        function = value.func
        popped = self._popped(value)
        if popped is not None:
            self.emit(Pop(self.fresh(), popped[0], self.source.line(node), popped[1]))
            return
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            if function.value.id in self.locals:
                if function.attr == "append" and len(value.args) == 1:
                    self.emit(Append(function.value.id, self.atom(value.args[0]), self.source.line(node)))
                    return
                if self._filled_by(value, function.value.id, function.attr, node):
                    return
                raise self.refuse(
                    node, f".{function.attr}() changes {function.value.id} in a way that has no derivative here"
                )
        found = self.resolve(function)
        if found is runtime.put_back:
            whole, back, *place = value.args
            assert isinstance(whole, ast.Name)
            at = next((p.value for p in place if isinstance(p, ast.Constant) and isinstance(p.value, int)), None)
            self.emit(Append(whole.id, self.atom(back), self.source.line(node), puts_back=True, at=at))
            return
        if found in (runtime.restore, runtime.store_tangent):
            whole, index, old = value.args[:3]
            assert isinstance(whole, ast.Name)
            self.emit(Store(whole.id, self.index(index), self.atom(old), self.source.line(node), restores=True))
            return
        if found is not None and (primitives.key(found) in primitives.WITHOUT_SLOPE or inspect.ismodule(found)):
            self.emit(Effect(ast.Expr(self.constant(value)), self.source.line(node)))
            return
        names = {n for a in (*value.args, *(k.value for k in value.keywords)) for n in loads(a)}
        if names & self.locals or found is None:
            raise self.refuse(node, f"{ast.unparse(function)} is called for an effect that is not known")
        self.emit(Effect(ast.Expr(self.constant(value)), self.source.line(node)))

    def _filled_by(self, call: ast.Call, whole: str, method: str, at: ast.stmt) -> bool:
        """A list's extend as appends, a dict's update as stores: of values that are all there before the first."""
        if method == "extend" and len(call.args) == 1 and not call.keywords:
            (items,) = call.args
            if isinstance(items, (ast.List, ast.Tuple)) and not any(isinstance(e, ast.Starred) for e in items.elts):
                for value in [self.atom(e) for e in items.elts]:
                    self.emit(Append(whole, value, self.source.line(at)))
            else:
                self._written(self._each(items, lambda item: _appended(whole, name(item))), at, set())
            return True
        if method == "update" and all(isinstance(a, ast.Dict) and None not in a.keys for a in call.args):
            keys = [k for a in call.args for k in a.keys if k is not None]  # type: ignore[attr-defined]
            values = [v for a in call.args for v in a.values]  # type: ignore[attr-defined]
            keys += [ast.Constant(k.arg) for k in call.keywords]
            values += [k.value for k in call.keywords]
            if len(call.args) <= 1 and all(k.arg is not None for k in call.keywords):
                for key, value in [(self.index(k), self.atom(v)) for k, v in zip(keys, values, strict=True)]:
                    self._store(ast.Subscript(name(whole), key, ast.Store()), value, at)
                return True
        return False

    def _each(self, items: ast.expr, body: Callable[[str], ast.stmt]) -> ast.For:
        """A loop over items, each under a name of its own."""
        item = self.fresh("item")
        if self.depends(items):
            self.varied.add(item)
        else:  # of what it was before: l.extend(l) ends
            items = ast.List([ast.Starred(items, ast.Load())], ast.Load())
        loop = ast.For(ast.Name(item, ast.Store()), items, [body(item)], [])
        loop.stop = None  # type: ignore[attr-defined]
        return loop

    def on_Assert(self, node: ast.Assert) -> None:
        new = copied(node)
        new.test = self.constant(node.test)
        new.msg = None if node.msg is None else self.constant(node.msg)
        self.emit(Effect(new, self.source.line(node)))

    def on_Raise(self, node: ast.Raise) -> None:
        new = copied(node)
        new.exc = None if node.exc is None else self.constant(node.exc)
        new.cause = None if node.cause is None else self.constant(node.cause)
        self.emit(Effect(new, self.source.line(node)))

    def on_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name):
                raise self.refuse(node, "del of a part of something is not supported")

    def test(self, node: ast.expr) -> ast.expr:
        """A condition, which has no derivative itself, with a name of its own."""
        plain = self._condition(node)
        if isinstance(plain, ast.Name):
            return plain
        return self.let(self.fresh("test"), plain, "constant", node)

    def _condition(self, node: ast.expr) -> ast.expr:
        if self._calls_inside(node):
            return self._split_constant(node)
        return self.constant(node)

    def on_If(self, node: ast.If) -> None:
        test = self.test(node.test)
        body, orelse = self.inner(node.body), self.inner(node.orelse)
        self.emit(If(test, body, orelse, self.source.line(node)))

    def on_While(self, node: ast.While) -> None:
        if self._calls_inside(node.test):
            raise self.refuse(
                node, "a function defined inside is called in the condition of a while; call it in the body"
            )
        test = self.constant(node.test)
        body = self.inner(node.body)
        self.emit(While(test, body, self.source.line(node), getattr(node, "stop", None)))

    def on_For(self, node: ast.For) -> None:
        stop = getattr(node, "stop", None)
        call = node.iter
        body = list(node.body)
        if not self.depends(call):
            if self._calls_inside(call):
                iterable: ast.expr = self._split_constant(call)
            else:
                iterable = self.constant(call)
            if isinstance(node.target, ast.Name):
                target = node.target.id
            else:
                target = self.fresh("item")
                body.insert(0, _set_target(node.target, name(target), node))
            self.locals.add(target)
            self.emit(For(target, iterable, self.inner(body), self.source.line(node), stop))
            return
        k = self.fresh("k")
        self.locals.add(k)
        outer, self.rebound = self.rebound, _assigned([node])
        count, first = self._items(call, node.target, k, node)
        self.rebound = outer
        for inner in (n for one in body for n in walk(one)):
            if (
                isinstance(inner, ast.Call)
                and isinstance(inner.func, ast.Attribute)
                and inner.func.attr in ("append", "pop")
                and loads(inner.func.value) & loads(count)
            ):
                raise self.refuse(inner, "a list that changes its length while a loop goes over it; loop over a copy")
        # What is assigned first in the body may itself have a derivative.
        self.locals |= _assigned(first)
        statements = self.inner([*first, *body])
        self.emit(For(k, count, statements, self.source.line(node), stop))

    def _items(self, call: ast.expr, target: ast.expr, k: str, at: ast.stmt) -> tuple[ast.expr, list[ast.stmt]]:
        """Iteration by index: the indices, and the statements that pick items."""
        if isinstance(call, ast.Call):
            function = self.resolve(call.func)
            arguments = call.args
            if function is enumerate and [k_.arg for k_ in call.keywords] == ["start"] and len(arguments) == 1:
                arguments = [*arguments, call.keywords[0].value]
            elif function is enumerate and call.keywords:
                raise self.refuse(call, "enumerate has a derivative as enumerate(x, start=n)")
            if function is reversed and len(arguments) == 1:
                whole = self._named(arguments[0])
                indices = filled("range(len(x) - 1, -1, -1)", {"x": whole})
                return indices, [_set_target(target, _item(whole, k), at)]
            if (
                function is enumerate
                and len(arguments) in (1, 2)
                and isinstance(target, ast.Tuple)
                and len(target.elts) == 2
            ):
                inner = arguments[0]
                if isinstance(inner, ast.Call) and self.resolve(inner.func) is zip and len(arguments) == 1:
                    count, first = self._items(inner, target.elts[1], k, at)
                    return count, [_set_target(target.elts[0], name(k), at), *first]
                whole = self._named(inner)
                shift = self.constant(arguments[1]) if len(arguments) == 2 else ast.Constant(0)
                number = filled("k + n", {"k": name(k), "n": shift}) if len(arguments) == 2 else name(k)
                return filled("range(len(x))", {"x": whole}), [
                    _set_target(target.elts[0], number, at),
                    _set_target(target.elts[1], _item(whole, k), at),
                ]
            if (function is zip and not call.keywords) or (
                function is zip and all(k_.arg == "strict" for k_ in call.keywords)
            ):
                if not isinstance(target, ast.Tuple) or len(target.elts) != len(arguments):
                    raise self.refuse(at, "a loop over zip needs as many names as there are sequences")
                if "min" in self.locals and len(arguments) > 1:
                    raise self.refuse(at, "a variable may not be called min beside a loop over zip; rename it")
                wholes = [self._named(a) for a in arguments]
                lengths = ", ".join(f"len({w.id})" for w in wholes)
                shortest = f"min({lengths})" if len(wholes) > 1 else lengths
                first = [_set_target(one, _item(w, k), at) for one, w in zip(target.elts, wholes, strict=True)]
                return parsed(f"range({shortest})"), first
            if isinstance(call.func, ast.Attribute) and call.func.attr in ("items", "values") and not arguments:
                whole = self._named(call.func.value)
                pick: ast.expr = ast.Subscript(whole, name(k), ast.Load())
                if call.func.attr == "values":
                    return filled("rt.keys(x)", {"x": whole}), [_set_target(target, pick, at)]
                if isinstance(target, ast.Tuple) and len(target.elts) == 2:
                    return filled("rt.keys(x)", {"x": whole}), [
                        _set_target(target.elts[0], name(k), at),
                        _set_target(target.elts[1], pick, at),
                    ]
            if isinstance(call.func, ast.Attribute) and call.func.attr == "keys":
                return self.constant(call), [_set_target(target, name(k), at)]
        whole = self._named(call)
        if isinstance(call, ast.Name) and call.id in self.dicts:
            return filled("rt.keys(x)", {"x": whole}), [_set_target(target, name(k), at)]
        # A dict gives its keys, an array or a list its items.
        return filled("range(len(rt.sequence(x)))", {"x": whole}), [_set_target(target, _item(whole, k), at)]

    def _named(self, node: ast.expr) -> ast.Name:
        """A name for a value, one that a loop over it does not assign: Python evaluates what it goes over once."""
        if isinstance(node, ast.Name) and node.id in self.locals:
            if node.id not in self.rebound:
                return name(node.id)
            varies = self.depends(node)
            held = self.let(self.fresh(node.id), name(node.id), "copy" if varies else "constant", node)
            self.varied |= {held.id} if varies else set()
            return held
        made = self.atom(node)
        if isinstance(made, ast.Name) and made.id in self.locals:
            if self.depends(node):
                self.varied.add(made.id)
            return made
        return self.let(self.fresh(), made, "constant", node)

    def on_With(self, node: ast.With) -> None:
        (item,) = node.items if len(node.items) == 1 else (None,)
        call = None if item is None else item.context_expr
        if not isinstance(call, ast.Call) or self.resolve(call.func) is not runtime.insert_grad_of:
            raise self.refuse(node, "the only with that has a meaning here is that of insert_grad_of")
        assert item is not None
        if (
            len(call.args) != 1
            or not isinstance(call.args[0], ast.Name)
            or not isinstance(item.optional_vars, ast.Name)
        ):
            raise self.refuse(
                node, "insert_grad_of takes a variable and gives its adjoint a name: with insert_grad_of(x) as dx"
            )
        variable, alias = call.args[0].id, item.optional_vars.id
        if variable not in self.varied:
            raise self.refuse(node, f"no derivative flows through {variable}")
        assigned = _assigned(node.body) - {alias}
        fresh = {n: self.fresh(n) for n in assigned}
        fresh[alias] = alias

        names = dict.fromkeys(n for s in node.body for n in mentions(s))
        given = {n: fresh[n] if n in fresh else self._outside(n, node) for n in names}
        body = [renamed(s, given) for s in node.body]
        self.emit(Surgery(variable, alias, body, self.source.line(node)))


def _own_statements(node: ast.stmt) -> list[ast.stmt]:
    """A statement and those inside of it, of the same function."""
    found = [node]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        for child in children(node):
            if isinstance(child, ast.stmt):
                found += _own_statements(child)
    return found


def _free(node: ast.FunctionDef) -> set[str]:
    own = {a.arg for a in walk(node.args) if isinstance(a, ast.arg)} | _assigned(node.body)
    inside: set[str] = set()
    for statement in node.body:
        for inner in walk(statement):
            if isinstance(inner, ast.FunctionDef):
                inside |= _free(inner)
        inside |= loads(statement)
    return inside - own


def _item_of(display: ast.expr, key: Any) -> ast.expr | None:
    """What a display has at a key, where that is certain."""
    if isinstance(display, ast.Dict):
        keys = [k.value if isinstance(k, ast.Constant) else None for k in display.keys]
        known = None not in keys and keys.count(key) == 1
        return display.values[keys.index(key)] if known else None
    assert isinstance(display, (ast.Tuple, ast.List))
    plain = (
        type(key) is int and 0 <= key < len(display.elts) and not any(isinstance(e, ast.Starred) for e in display.elts)
    )
    return display.elts[key] if plain else None


def _roots(node: ast.AST) -> set[str]:
    """Variables that an assignment to this target, or a call on it, changes."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, (ast.Tuple, ast.List)):
        return set().union(*(_roots(e) for e in node.elts))
    if isinstance(node, (ast.Subscript, ast.Attribute, ast.Starred)):
        return _roots(node.value)
    return set()


def _joined_lists(node: ast.expr) -> ast.List:
    """a + b of lists as [*a, *b]."""
    if isinstance(node, ast.BinOp):
        return ast.copy_location(
            ast.List([*_joined_lists(node.left).elts, *_joined_lists(node.right).elts], ast.Load()), node
        )
    return (
        node
        if isinstance(node, ast.List)
        else ast.copy_location(ast.List([ast.Starred(node, ast.Load())], ast.Load()), node)
    )


def _appended(whole: str, value: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Attribute(name(whole), "append", ast.Load()), [value], []))


def _set(target: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(target, ast.Store())], value)


def _placed(new: ast.expr, at: ast.AST) -> ast.expr:
    """An expression that was made of parts of another, at its place."""
    for inner in walk(new):
        if not hasattr(inner, "lineno"):
            ast.copy_location(inner, at)
    return new


def _set_target(target: ast.expr, value: ast.expr, at: ast.AST) -> ast.stmt:
    node = ast.Assign([copied(target)], value)
    for part in (*node.targets, value):
        _placed(part, at)
    return ast.copy_location(node, at)


def _item(whole: ast.expr, k: str) -> ast.expr:
    return ast.Subscript(whole, name(k), ast.Load())


def _statement(text: str, names: Mapping[str, ast.expr]) -> ast.stmt:
    return ast.Expr(filled(text, names))


def as_value(index: ast.expr, plain: bool = False) -> ast.expr:
    """A subscript as a value: slices by their constructor."""
    if plain:
        return index
    if isinstance(index, ast.Slice):
        parts = [e or ast.Constant(None) for e in (index.lower, index.upper, index.step)]
        return ast.Call(name("slice"), list(parts), [])
    if isinstance(index, ast.Tuple):
        return ast.Tuple([as_value(e) for e in index.elts], ast.Load())
    return index


def _shadowed(node: Any) -> set[str]:
    """Of a comprehension's variables those whose names what it goes over has for others."""
    return bound_inside(node) & {*mentions(node.generators[0].iter)}


def _renamed_comprehension(node: Any, fresh: Mapping[str, str]) -> Any:
    new = copied(node)
    for inner in walk(new):
        if isinstance(inner, ast.Name) and inner.id in fresh:
            inner.id = fresh[inner.id]
    return new
