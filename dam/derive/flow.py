"""What is active, what may share memory, which values have the same shape: facts about single-name statements."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dam.derive import changes, primitives
from dam.derive.errors import DerivativeError
from dam.derive.normal import Append, Effect, For, If, Let, Pop, Statement, Store, Unpack, While
from dam.derive.single import Single, reads, writes
from dam.derive.trees import KEPT, children, filled, loads, renamed, shown
from dam.derive.trees import walk as tree_walk

SCALAR = "()"
_ARGUMENTS = f"{KEPT}arguments"


def walk(statements: Iterable[Statement]) -> Iterator[Statement]:
    """All statements, those of blocks after the one that has them, a loop's carry last."""
    for st in statements:
        yield st
        match st:
            case If():
                yield from walk(st.body)
                yield from walk(st.orelse)
            case For() | While():
                yield from walk(st.body)
                yield from st.carry


def arguments(st: Let) -> dict[str, ast.expr]:
    """What a statement's value has a slope in, by parameter or position."""
    value = st.value
    if st.kind == "copy":
        return {"x": value}
    if st.kind == "item":
        assert isinstance(value, ast.Subscript)
        return {"x": value.value}
    if st.kind == "structure":
        if isinstance(value, ast.Dict):
            return {str(k): v for k, v in enumerate(value.values)}
        assert isinstance(value, (ast.Tuple, ast.List))
        return {str(k): v for k, v in enumerate(value.elts)}
    if st.kind == "call":
        assert isinstance(value, ast.Call)
        return {str(k.arg): k.value for k in value.keywords}
    if st.kind == "primitive":
        found = value.__dict__.get(_ARGUMENTS)
        if found is None:
            entry = value.primitive  # type: ignore[attr-defined]
            bound = primitives.bound(entry, value)
            found = value.__dict__[_ARGUMENTS] = {p: bound[p] for p in bound if p in entry.differentiable}
        return found
    return {}


def edges(st: Statement) -> list[tuple[str, str]]:
    """Pairs (from, to) of names along which a derivative flows."""
    match st:
        case Let():
            return [(n, st.target) for v in arguments(st).values() for n in loads(v)]
        case Unpack():
            return [(st.value, t) for t in st.targets]
        case Store() | Append():
            return [(n, st.name) for n in loads(st.value)]
        case Pop():
            return [(st.name, st.target)]
    return []


def active(statements: list[Statement], inputs: Iterable[str], result: str) -> set[str]:
    """Names that depend on an input and that the result depends on."""
    forward: dict[str, set[str]] = {}
    backward: dict[str, set[str]] = {}
    for st in walk(statements):
        for one, other in edges(st):
            forward.setdefault(one, set()).add(other)
            backward.setdefault(other, set()).add(one)
    return _reached(forward, inputs) & _reached(backward, [result])


def _reached(graph: dict[str, set[str]], start: Iterable[str]) -> set[str]:
    found, waiting = set(start), list(start)
    while waiting:
        for other in graph.get(waiting.pop(), ()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


# ---- memory


@dataclass
class Memory:
    """Which memory a name may be of: its own, or within it as a list has its items'."""

    own: dict[str, set[str]] = field(default_factory=dict)
    reach: dict[str, set[str]] = field(default_factory=dict)
    acquired: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (name, memory): by which statements

    def mine(self, identifier: str) -> set[str]:
        return self.own.setdefault(identifier, {identifier})

    def within(self, identifier: str) -> set[str]:
        return self.reach.setdefault(identifier, set())

    def all(self, identifier: str) -> set[str]:
        return self.mine(identifier) | self.within(identifier)


_DISPLAYS = (ast.List, ast.Tuple, ast.Dict, ast.ListComp, ast.DictComp, ast.GeneratorExp)


def _may_be_view(value: ast.expr) -> bool:
    """Whether a value without a derivative may share memory with what it is made of."""
    if isinstance(value, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.BoolOp, ast.JoinedStr, ast.ListComp)):
        return False
    if isinstance(value, ast.Call):
        function = value.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if isinstance(function, ast.Attribute) and called in changes.FRESH_METHODS:
            return False
        return called in changes.VIEWS or not isinstance(function, (ast.Attribute, ast.Name)) or called not in _FRESH
    return True


_FRESH = {
    *"zeros ones empty zeros_like ones_like empty_like full full_like array arange eye linspace len range".split(),
    *"float int rand randn tensor shape copied saved argsort argmax argmin seed count among larger where abs".split(),
}


def _is_number(value: ast.expr) -> bool:
    """Whether a value without a derivative is a number or a shape, which are of no array's memory."""
    if isinstance(value, ast.Subscript):
        return _is_number(value.value)
    if isinstance(value, ast.BinOp):
        return all(isinstance(side, ast.Constant) or _is_number(side) for side in (value.left, value.right))
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in ("len", "range", "int", "float")
    return isinstance(value, ast.Attribute) and value.attr in ("shape", "ndim", "size")


def _makes_array(st: Let) -> bool:
    """Whether a value is a new array for certain, or a number: nothing is within one."""
    call = st.value if st.kind == "constant" else None
    if st.kind == "primitive":
        entry: primitives.Primitive = st.value.primitive  # type: ignore[attr-defined]
        if isinstance(st.value, ast.BinOp):
            of_lists = isinstance(st.value.op, (ast.Add, ast.Mult)) and not _has_float(st.value)
            return bool(entry.partials) and not of_lists
        return bool(entry.partials) and not entry.view
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("np", "torch")
        and call.func.attr in ("zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like")
    )


def _is_copy(st: Statement) -> bool:
    entry = getattr(st.value, "primitive", None) if isinstance(st, Let) and st.kind == "primitive" else None
    return entry is not None and entry.shallow


class _Share(NamedTuple):
    """That memory of `source` is memory of `target` too: of its own, or within it."""

    target: str
    own: bool
    source: str
    all: bool  # the source's own and what is within it, or one of these
    of_own: bool = False


def memory(statements: list[Statement]) -> Memory:
    """Which names may be of one memory; of code that writes into nothing no more than each its own, as nobody asks."""
    found = Memory()
    if not any(isinstance(st, (Store, Append, Pop)) or getattr(st, "in_place", False) for st in walk(statements)):
        return found
    steps: list[tuple[int, list[str], list[_Share]]] = []
    nothing: set[str] = set()
    # Of arrays a copy has nothing, of lists the items.
    again = assigned_again(statements)
    arrays = {st.target for st in walk(statements) if isinstance(st, Let) and _makes_array(st)} - again
    for st in walk(statements):
        changed = [*writes(st)] if not isinstance(st, (If, For, While)) else []
        changed += [st.target] if isinstance(st, For) else []
        changed += [st.name] if isinstance(st, (Store, Append)) else []
        for n in changed:
            found.own.setdefault(n, {n})
            found.acquired.setdefault((n, n), set()).add(id(st))
        if isinstance(st, Let) and st.target in arrays:  # of memory of its own, and nothing within
            continue
        shared = [s for s in _shared(st) if not (_is_copy(st) and s.source in arrays)]
        if shared := [s for s in shared if s.own or s.target not in arrays]:
            steps.append((id(st), changed, shared))
    while True:  # containers may be filled after they are read, in a loop or under another name
        grown = False
        for statement, changed, shared in steps:
            before: dict[str, set[str]] | None = None
            for target, own, source, all_, of_own in shared:
                values = found.mine(source) if all_ or of_own else found.reach.get(source, nothing)
                if all_ and source in found.reach:
                    values = values | found.reach[source]
                if not values:
                    continue
                into = found.mine(target) if own else found.within(target)
                if not values <= into:
                    before = {n: found.all(n) for n in changed} if before is None else before
                    into |= values
                    grown = True
            for n, old in (before or {}).items():
                for memory_ in found.all(n) - old:
                    found.acquired.setdefault((n, memory_), set()).add(statement)
        if not grown:
            return found


def _arguments(value: ast.expr) -> frozenset[str]:
    """Names in a value, those of what is called and of an index left out: they are no memory of the result."""
    if isinstance(value, ast.Name):
        return loads(value)
    if isinstance(value, ast.Subscript):
        return _arguments(value.value)
    calls = [n.func for n in tree_walk(value) if isinstance(n, ast.Call)]
    return loads(value) - _MODULES - {f.id for f in calls if isinstance(f, ast.Name)}


_MODULES = {"np", "torch", "math", "rt"}


def _shared(st: Statement) -> list[_Share]:
    match st:
        case Let():
            return _shared_by_let(st)
        case Unpack(targets=targets, value=whole):
            found = []
            for target in targets:
                found += [_Share(target, True, whole, True), _Share(target, False, whole, False)]
            return found
        case Pop(target=target, name=whole):
            return [_Share(target, True, whole, False), _Share(target, False, whole, False)]
        case Store(name=whole, value=value) | Append(name=whole, value=value):
            return [_Share(whole, False, n, True) for n in loads(value)]
        case For(target=target, iter=iterable):
            if not (
                isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and iterable.func.id == "range"
            ):
                return [_Share(target, True, n, True) for n in _arguments(iterable)]
    return []


def _shared_by_let(st: Let) -> list[_Share]:
    target, kind, value = st.target, st.kind, st.value
    names = _arguments(value)
    if not names:
        return []
    found: list[_Share] = []
    constant = kind == "constant"
    if constant and _is_number(value):
        return []
    if constant and isinstance(value, (ast.BinOp, ast.ListComp, ast.DictComp, ast.GeneratorExp)):
        if any(isinstance(n, _DISPLAYS) for n in tree_walk(value)):  # [x] * 2, [x for _ in y]
            found += [_Share(target, False, n, True) for n in names]
    if kind == "copy" or (constant and isinstance(value, ast.Name)):
        for n in names:
            found += [_Share(target, True, n, False, of_own=True), _Share(target, False, n, False)]
    elif kind == "structure" or (constant and isinstance(value, (ast.List, ast.Tuple, ast.Dict))):
        elements = value.values if isinstance(value, ast.Dict) else value.elts  # type: ignore[attr-defined]
        for one in elements:
            whole = not isinstance(one, (ast.BinOp, ast.UnaryOp))
            found += [_Share(target, False, n, whole) for n in _arguments(one)]
    else:
        entry = value.primitive if kind == "primitive" else None  # type: ignore[attr-defined]
        fresh = not _may_be_view(value) if constant else entry is not None and not entry.view
        for n in names:
            found.append(_Share(target, False, n, entry is not None and entry.shallow))
            if not fresh:
                found.append(_Share(target, True, n, True))
    return found


@dataclass(frozen=True)
class _Place:
    number: int
    loops: tuple[int, ...]  # which loops it is in, outermost first


def check_memory(
    single: Single, found: Memory, whole: bool, derived: bool, known: Container[str]
) -> tuple[bool, dict[int, str]]:
    """That no array is written to while another name for its memory is still to be read.

    Derived code passes: it puts back what it wrote before it reads a value again, so that each is what it was when it
    got its name.

    Args:
        whole: of a function that is not called by another that is derived with it.
        derived: of a derivative.
        known: names that the function's source has.

    Returns:
        Whether an argument is written to; and, by the identity of an augmented assignment, the name that makes one of
        arrays wrong, to be checked when it runs.

    Raises:
        DerivativeError: such a write.
    """
    if derived:
        return False, {}
    places: dict[int, _Place] = {}
    read_at: dict[str, list[_Place]] = {}
    made_at: dict[str, list[_Place]] = {}
    counter = 0

    def visit(statements: Iterable[Statement], loops: tuple[int, ...]) -> None:
        nonlocal counter
        for st in statements:
            counter += 1
            place = _Place(counter, loops)
            places[id(st)] = place
            inner = (*loops, counter)
            if isinstance(st, While):
                place = _Place(counter, inner)
            for n in reads(st):
                read_at.setdefault(n, []).append(place)
            if not isinstance(st, (If, For, While)):
                for n in writes(st):
                    made_at.setdefault(n, []).append(place)
            match st:
                case If():
                    visit(st.body, loops)
                    visit(st.orelse, loops)
                case For():
                    made_at.setdefault(st.target, []).append(_Place(counter, inner))
                    visit(st.body, inner)
                    visit(st.carry, inner)
                case While():
                    visit(st.body, inner)
                    visit(st.carry, inner)

    visit(single.statements, ())
    counter += 1
    read_at.setdefault(single.result, []).append(_Place(counter, ()))
    parameters = {n for n in single.variable if single.variable[n] == n and n not in made_at}

    def read_later(identifier: str, at: _Place) -> bool:
        made = made_at.get(identifier, [_Place(0, ())])
        for place in read_at.get(identifier, ()):
            if place.number > at.number:
                # What is made between the write and the read sees what was written.
                if not all(at.number < m.number <= place.number for m in made):
                    return True
                continue
            common = [a for a, b in zip(place.loops, at.loops, strict=False) if a == b]
            # Read earlier in a loop that comes round again, unless it is made anew in front of that each time.
            if common and not all(m.loops[: len(common)] == tuple(common) and m.number <= place.number for m in made):
                return True
        return False

    def by_then(other: str, memory_: str, at: _Place) -> bool:
        """Whether a name may have that memory when it is written to, since it was made."""
        made = made_at.get(memory_, [])
        if len(made) != 1:
            return True
        (start,) = made
        for statement in found.acquired.get((other, memory_), ()):
            place = places[statement]
            common = tuple(a for a, b in zip(place.loops, at.loops, strict=False) if a == b)
            if not (start.number < at.number < place.number and common == start.loops):
                return True
        return False

    def sharing(identifier: str, at: _Place, exempt: tuple[str, ...]) -> set[str]:
        """Names that may share its memory when it is written to, and are read later."""
        changed = found.mine(identifier)
        variable = single.variable.get(identifier, identifier)
        return {
            other
            for other in {*found.own, *found.reach}
            if single.variable.get(other, other) not in (variable, *exempt)
            and other != identifier
            and any(by_then(other, m, at) for m in found.all(other) & changed)
            and read_later(other, at)
        }

    def others(identifier: str, at: _Place, exempt: tuple[str, ...]) -> list[str]:
        return sorted({said(o) for o in sharing(identifier, at, exempt)}, key=lambda n: (n not in known, n))

    made_by: dict[str, list[Statement]] = {}
    for st in walk(single.statements):
        for n in () if isinstance(st, (If, For, While)) else writes(st):
            made_by.setdefault(n, []).append(st)

    def said(identifier: str) -> str:
        """A name as the source has it; of what has none there how it is computed, or the line."""
        variable = single.variable.get(identifier, identifier)
        if variable in known or identifier not in made_by:
            return variable
        maker = made_by[identifier][0]
        if isinstance(maker, Let):
            names = {n: single.variable.get(n, n) for n in loads(maker.value)}
            if all(n in known for n in names.values()):
                return shown(renamed(maker.value, names))
        return f"a value of '{maker.line.text}'"

    checks: dict[int, Effect] = {}
    writes_argument = False
    in_place: dict[int, str] = {}
    for st in walk(single.statements):
        if isinstance(st, (Store, Append, Pop)):
            exempt = st.within if isinstance(st, Store) else ()
            if isinstance(st, Pop):
                exempt = (single.variable.get(st.target, st.target),)
            shared = sharing(st.name, places[id(st)], exempt)
            variable = said(st.name)
            if variable not in known and isinstance(st, Store) and st.within:
                variable = f"an item of {st.within[0]}"
            # An item may be a number, and arithmetic be of no lists, which share nothing: that shows when it runs.
            items = {o for o in shared if made_by.get(o) and all(_is_item(m) for m in made_by[o])}
            new = shared - items - found.mine(st.name)  # of which it is no view
            made = {o for o in new if made_by.get(o) and all(_is_arithmetic(m) for m in made_by[o])}
            for o in sorted(items | made):
                what = f"{variable} is written to ({st.line.text}) while {said(o)}, a part of it, is still to be read; "
                check = {"x": ast.Name(o, ast.Load()), "m": ast.Constant(what + "copy one")}
                for maker in made_by[o]:
                    effect = ast.Expr(filled("rt.number(x, m)" if o in items else "rt.no_list(x, m)", check))
                    checks.setdefault(id(maker), Effect(effect, maker.line))
            names = sorted({said(o) for o in shared - items - made}, key=lambda n: (n not in known, n))
            if names:
                raise DerivativeError(
                    f"{variable} is written to while {names[0]}, which may share its memory, is still to be read; "
                    "copy one",
                    st.line,
                )
            if outside := [n for n in found.mine(st.name) if n not in single.variable]:
                raise DerivativeError(
                    f"{variable} may be {outside[0]} of the surroundings, which is written to; copy it", st.line
                )
            if found.mine(st.name) & parameters:
                writes_argument = True
                if not whole:
                    raise DerivativeError(
                        f"a function that is called writes into its argument {variable}; let it return a new array",
                        st.line,
                    )
        elif isinstance(st, Let) and st.in_place and isinstance(st.value, ast.BinOp):
            for n in loads(st.value.left):
                names = others(n, places[id(st)], (single.variable.get(st.target, st.target), *st.within))
                mine = found.mine(n) & parameters
                outside = [o for o in found.mine(n) if o not in single.variable]
                if outside:
                    names.append(outside[0])
                if mine:
                    writes_argument = True
                    if not whole:
                        names.append("its argument")
                if names:
                    in_place[id(st)] = names[0]
    _insert_after(single.statements, checks)
    return writes_argument, in_place


def _is_arithmetic(st: Statement) -> bool:
    """Whether a statement is a sum or a product, which is an array of its own unless it is of lists."""
    return isinstance(st, Let) and st.kind == "primitive" and isinstance(st.value, ast.BinOp)


def _is_item(st: Statement) -> bool:
    """Whether a statement picks one item, by no slice."""
    return (
        isinstance(st, Let)
        and isinstance(st.value, ast.Subscript)
        and not any(isinstance(n, ast.Slice) for n in tree_walk(st.value.slice))
    )


def _insert_after(statements: list[Statement], effects: dict[int, Effect]) -> None:
    for st in list(statements):
        match st:
            case If():
                _insert_after(st.body, effects)
                _insert_after(st.orelse, effects)
            case For() | While():
                _insert_after(st.body, effects)
        if id(st) in effects:
            statements.insert(statements.index(st) + 1, effects[id(st)])


def rebound_check(st: Let, in_place: dict[int, str]) -> ast.expr | None:
    """Of an augmented assignment that would be wrong of arrays, the check that it is of numbers."""
    if id(st) not in in_place or not isinstance(st.value, ast.BinOp):
        return None
    names: dict[str, ast.expr] = {"x": st.value.left}
    if not st.container:
        said = ast.Constant(f"{st.variable} and {in_place[id(st)]}")
        return filled("rt.rebound(x, n)", {**names, "n": said})
    said = ast.Constant(f"an item of {st.within[0] if st.within else st.container} and {in_place[id(st)]}")
    whole = ast.Name(st.container, ast.Load())
    return filled("rt.rebound(x, n, whole)", {**names, "n": said, "whole": whole})


# ---- shapes and kinds


def assigned_again(statements: list[Statement]) -> set[str]:
    """Names with more than one assignment: where branches meet, and what loops carry."""
    seen: set[str] = set()
    again: set[str] = set()
    for st in walk(statements):
        for n in () if isinstance(st, (If, For, While)) else writes(st):
            (again if n in seen else seen).add(n)
    return again


def shapes(statements: list[Statement], parameters: Iterable[str]) -> dict[str, str]:
    """By name a symbol: two values with the same one have the same shape."""
    found = {p: p for p in parameters}
    again = assigned_again(statements)

    def of(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return SCALAR
        return found.get(node.id) if isinstance(node, ast.Name) else None

    for st in walk(statements):
        if not isinstance(st, Let) or st.target in again:
            continue
        value, symbol = st.value, None
        if st.kind in ("copy", "constant"):
            symbol = of(value)
        elif st.kind == "primitive":
            entry = value.primitive  # type: ignore[attr-defined]
            bound = primitives.bound(entry, value)
            if entry.shape == "same":
                symbol = of(bound["x"])
            elif entry.partials:
                # Bounds of clip have no slope, and broadcast as well.
                given = {of(v) for v in bound.values() if not (isinstance(v, ast.Constant) and v.value is None)}
                symbol = next(iter(given - {SCALAR} or {SCALAR})) if len(given - {SCALAR}) <= 1 else None
            elif entry.module != "rt" and "axis" in bound and "keepdims" in bound:
                plain = [isinstance(bound[p], ast.Constant) and not bound[p].value for p in ("axis", "keepdims")]  # type: ignore[attr-defined]
                axis = bound["axis"]
                if all(plain) and isinstance(axis, ast.Constant) and axis.value is None:
                    symbol = SCALAR
        found[st.target] = symbol or st.target
    return found


def summed(single: Single) -> ast.expr | None:
    """What a function's result is numpy's sum of, over all axes, if it is one."""
    steps = (st for st in reversed(single.statements) if not (isinstance(st, Let) and st.kind == "constant"))
    last = next(steps, None)  # but for what says that the function has returned
    if not isinstance(last, Let) or last.target != single.result or last.kind != "primitive":
        return None
    entry: primitives.Primitive = last.value.primitive  # type: ignore[attr-defined]
    if entry.name != "np.sum":
        return None
    bound = primitives.bound(entry, last.value)
    plain = (ast.dump(bound["axis"]), ast.dump(bound["keepdims"])) == ("Constant(value=None)", "Constant(value=False)")
    return bound["x"] if plain and isinstance(bound["x"], ast.Name) else None


def _has_float(value: ast.expr) -> bool:
    kind = type(value)
    if kind is ast.Name:
        return False
    if kind is ast.Constant:
        return type(value.value) is float  # type: ignore[attr-defined]
    if kind is ast.BinOp:
        return _has_float(value.left) or _has_float(value.right)  # type: ignore[attr-defined]
    return any(_has_float(part) for part in children(value) if isinstance(part, ast.expr))


def lists(statements: list[Statement]) -> set[str]:
    """Names of what may be a list: written out, appended to, or what a function returned, and copies of such."""
    found: set[str] = set()
    copies: list[tuple[str, str]] = []
    for st in walk(statements):
        if isinstance(st, Append):
            found.add(st.name)
        elif isinstance(st, Let) and st.kind in ("structure", "call"):
            found.add(st.target)
        elif isinstance(st, Let) and st.kind == "copy" and isinstance(st.value, ast.Name):
            copies.append((st.value.id, st.target))
    while grown := {target for value, target in copies if value in found} - found:
        found |= grown
    return found


def numbers(statements: list[Statement], derived: bool) -> set[str]:
    """Names of numbers and arrays, never of structures: what arithmetic is done with.

    Args:
        derived: of statements of a derivative, where 0.0 may be the adjoint of a structure.
    """
    found: set[str] = set()
    groups: list[set[str]] = []  # of which all are numbers where one is
    for st in walk(statements):
        if not isinstance(st, Let):
            continue
        value = st.value
        if st.kind == "constant":
            if isinstance(value, ast.Constant) and isinstance(value.value, float):
                if not (derived and value.value == 0.0):
                    found.add(st.target)
        elif st.kind == "copy" or (st.kind == "primitive" and value.primitive.partials):  # type: ignore[attr-defined]
            names = {st.target, *(n for v in arguments(st).values() for n in loads(v))}
            plain = st.kind == "copy" or (isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Add, ast.Mult)))
            if not plain or _has_float(value):
                found |= names
            else:
                groups.append(names)
    while True:
        left = []
        for names in groups:
            if names.isdisjoint(found):
                left.append(names)
            else:
                found |= names
        if len(left) == len(groups):
            return found
        groups = left
