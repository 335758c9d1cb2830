"""Passes on written code: constants folded, products shared, and what nobody reads left out."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dam.derive.trees import KEPT, children, loads, mentions, name, rebuilt, renamed, shown, stores, walk

_EFFECTS = {
    "restore",
    "put_back",
    "store_tangent",
    "part",
    "rebound",
    "at_least",
    "distinct",
    "differentiable",
    "print",
    "seed",
    "seed_of_sum",
    "seeded",
    "tangent",
    "gradient",
}


def _number(node: ast.expr) -> float | int | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return None if inner is None else -inner
    return None


def _constant(value: float | int) -> ast.expr:
    if value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def is_zero(node: ast.expr) -> bool:
    return _number(node) == 0


_FOLDED = f"{KEPT}folded"


def fold(node: ast.expr) -> ast.expr:
    """The same value with less arithmetic: with 0, 1 and other constants.

    A product with 0.0 is 0.0: what it multiplies is a slope.
    """
    if isinstance(node, (ast.Name, ast.Constant)):
        return node
    found = node.__dict__.get(_FOLDED)
    if found is None:
        found = node.__dict__[_FOLDED] = _folded(node)
        found.__dict__[_FOLDED] = found
    return found


def _folded(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.BinOp):
        left, right = fold(node.left), fold(node.right)
        same = left is node.left and right is node.right
        return _of_binary(node if same else ast.BinOp(left, node.op, right))
    if isinstance(node, ast.UnaryOp):
        operand = fold(node.operand)
        return _of_unary(node if operand is node.operand else ast.UnaryOp(node.op, operand))
    parts = [child for child in children(node) if isinstance(child, ast.expr)]
    if any(fold(part) is not part for part in parts):
        node = rebuilt(node, _parts_folded)  # type: ignore[assignment]
    return _of_call(node) if isinstance(node, ast.Call) else node


def _parts_folded(part: ast.AST | list[ast.AST]) -> ast.AST | list[ast.AST]:
    if isinstance(part, list):
        return [fold(one) if isinstance(one, ast.expr) else one for one in part]
    return fold(part) if isinstance(part, ast.expr) else part


def _of_binary(node: ast.BinOp) -> ast.expr:
    left, right = _number(node.left), _number(node.right)
    if left is not None and right is not None:
        value = _computed(node.op, left, right)
        return node if value is None else _constant(value)
    match node.op:
        case ast.Mult():
            if left == 0.0 or right == 0.0:
                return ast.Constant(0.0)
            if left == 1.0:
                return node.right
            if right == 1.0:
                return node.left
            if right == -1.0:
                return fold(ast.UnaryOp(ast.USub(), node.left))
            if left == -1.0:
                return fold(ast.UnaryOp(ast.USub(), node.right))
            if (
                isinstance(node.right, ast.BinOp)
                and isinstance(node.right.op, ast.Div)
                and _number(node.right.left) == 1.0
            ):
                return ast.BinOp(node.left, ast.Div(), node.right.right)
            if isinstance(node.right, ast.UnaryOp) and isinstance(node.right.op, ast.USub) and right is None:
                return ast.UnaryOp(ast.USub(), fold(ast.BinOp(node.left, ast.Mult(), node.right.operand)))
        case ast.Div():
            if right == 1.0:
                return node.left
            if left == 0.0:
                return ast.Constant(0.0)
        case ast.Add():
            if left == 0.0:
                return node.right
            if right == 0.0:
                return node.left
            if isinstance(node.right, ast.UnaryOp) and isinstance(node.right.op, ast.USub) and right is None:
                return ast.BinOp(node.left, ast.Sub(), node.right.operand)
        case ast.Sub():
            if right == 0.0:
                return node.left
        case ast.Pow():
            if right == 1:
                return node.left
    return node


def _of_unary(node: ast.UnaryOp) -> ast.expr:
    if isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.UnaryOp) and isinstance(node.operand.op, ast.USub):
            return node.operand.operand
        if is_zero(node.operand):
            return ast.Constant(0.0)
    return node


def _of_call(node: ast.Call) -> ast.expr:
    called = _called(node)
    if called == "rt.power_slope":
        x, n = node.args
        power = _number(n)
        if power is not None:
            if power == 0:
                return ast.Constant(0.0)
            return fold(ast.BinOp(n, ast.Mult(), fold(ast.BinOp(x, ast.Pow(), _constant(power - 1)))))
    if called == "rt.unbroadcast" and is_zero(node.args[0]):
        return node.args[0]
    return node


def _computed(op: ast.operator, left: float, right: float) -> float | None:
    try:
        match op:
            case ast.Add():
                value = left + right
            case ast.Sub():
                value = left - right
            case ast.Mult():
                value = left * right
            case ast.Div():
                value = left / right
            case ast.Pow():
                value = left**right
            case _:
                return None
    except (ArithmeticError, ValueError):
        return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _called(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return f"{function.value.id}.{function.attr}"
        if isinstance(function, ast.Name):
            return function.id
    return ""


def free(statements: Iterable[ast.stmt]) -> set[str]:
    """Names that code reads before it has bound them for certain."""
    needed: set[str] = set()
    for st in reversed(list(statements)):
        if isinstance(st, ast.For):
            needed |= (free(st.body) - stores(st.target)) | loads(st.iter)
        elif isinstance(st, ast.While):
            needed |= free(st.body) | loads(st.test)
        elif isinstance(st, ast.If):
            needed -= _bound_by(st.body) & _bound_by(st.orelse)
            needed |= free(st.body) | free(st.orelse) | loads(st.test)
        else:
            needed -= stores(st)
            needed |= loads(st)
    return needed


def _bound_by(statements: list[ast.stmt]) -> set[str]:
    return set().union(*(stores(s) for s in statements if isinstance(s, ast.Assign)))


# ---- what nobody reads


def _pure(node: ast.expr, pure_names: frozenset[str]) -> bool:
    """Whether computing a value has no effect, so that it may be left out."""
    if isinstance(node, (ast.Name, ast.Constant)):
        return True
    for inner in walk(node):
        if isinstance(inner, ast.Call):
            called = _called(inner)
            root, _, rest = called.partition(".")
            if root in ("np", "torch", "math", "rt") and rest.split(".")[-1] not in _EFFECTS:
                continue
            if called in pure_names or called in (
                "len",
                "range",
                "float",
                "abs",
                "min",
                "max",
                "sum",
                "list",
                "slice",
                "reversed",
            ):
                continue
            if isinstance(inner.func, ast.Attribute) and root not in ("np", "torch", "math", "rt"):
                if inner.func.attr in _PURE_METHODS:
                    continue
            if _is_linalg(inner.func):
                continue
            return False
    return True


_PURE_METHODS = {
    "sum", "mean", "dot", "reshape", "ravel", "transpose", "max", "min", "prod", "copy", "clone", "T", "squeeze",
    "flatten", "view", "permute", "t", "swapaxes", "cumsum", "exp", "log", "sin", "cos", "sqrt", "tanh", "astype",
    "keys", "items", "matmul", "pow", "clip", "clamp", "abs", "sigmoid", "relu", "square",
}  # fmt: skip


def _is_linalg(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "linalg"
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id in ("np", "torch")
    )


def without_dead(statements: list[ast.stmt], pure_names: frozenset[str] = frozenset()) -> list[ast.stmt]:
    """Code without assignments that nothing reads: what reads is known when what it reads is come to, from the end."""
    # A list of the surroundings is read by others.
    appended = _appended(statements)
    others = appended.difference(*map(stores, statements)) if appended else appended
    return _alive(statements, others, pure_names)[0]


def _appended(statements: Iterable[ast.stmt]) -> set[str]:
    found: set[str] = set()
    for st in statements:
        if isinstance(st, ast.Expr):
            if (one := _appends(st)) is not None:
                found.add(one)
        elif isinstance(st, (ast.If, ast.For, ast.While)):
            found |= _appended(st.body) | _appended(st.orelse)
    return found


def _alive(statements: list[ast.stmt], live: set[str], pure: frozenset[str]) -> tuple[list[ast.stmt], set[str]]:
    """Of a block what has an effect or is read, and the names that are read after its head."""
    out: list[ast.stmt] = []
    live = set(live)
    for st in reversed(statements):
        if isinstance(st, ast.Assign):
            target = st.targets[0]
            if isinstance(target, ast.Name):
                if target.id not in live and _pure(st.value, pure):
                    continue
                live.discard(target.id)
                live |= loads(st.value)
            elif isinstance(target, ast.Tuple):
                bound = stores(target)
                if live.isdisjoint(bound) and _pure(st.value, pure):
                    continue
                live -= bound
                live |= loads(st.value)
            else:
                live |= loads(st)
        elif isinstance(st, ast.If):
            body, of_body = _alive(st.body, live, pure)
            orelse, of_orelse = _alive(st.orelse, live, pure)
            if not body and not orelse:
                if _pure(st.test, pure):
                    continue
                body = [_at(ast.Pass(), st)]
            test = st.test
            if not body:
                test, body, orelse = ast.UnaryOp(ast.Not(), st.test), orelse, []
                if isinstance(st.test, ast.UnaryOp) and isinstance(st.test.op, ast.Not):
                    test = st.test.operand
            st = _at(ast.If(test=test, body=body, orelse=orelse), st)
            live = of_body | of_orelse | loads(test)
        elif isinstance(st, (ast.For, ast.While)):
            loop, live = _loop_alive(st, live, pure)
            if loop is None:
                continue
            st = loop
        elif isinstance(st, ast.Expr) and _appends(st) is not None:
            if _appends(st) not in live:
                continue
            live |= loads(st)
        else:
            live |= loads(st)
        out.append(st)
    out.reverse()
    return out, live


def _appends(st: ast.Expr) -> str | None:
    """The list that a statement appends to."""
    call = st.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "append":
        return call.func.value.id if isinstance(call.func.value, ast.Name) else None
    return None


def _loop_alive(
    st: ast.For | ast.While, live: set[str], pure: frozenset[str]
) -> tuple[ast.For | ast.While | None, set[str]]:
    head = loads(st.iter) if isinstance(st, ast.For) else loads(st.test)
    around = set(live) | (head if isinstance(st, ast.While) else set())
    while True:
        body, inside = _alive(st.body, around, pure)
        if inside <= around:
            break
        around |= inside
    new: ast.For | ast.While
    if isinstance(st, ast.For):
        if not body and _pure(st.iter, pure):
            return None, live
        new = ast.For(target=st.target, iter=st.iter, body=body or [_at(ast.Pass(), st)], orelse=[])
    else:
        new = ast.While(test=st.test, body=body or [_at(ast.Pass(), st)], orelse=[])
    _at(new, st)
    return new, around | head


def _at(new: ast.stmt, old: ast.stmt) -> ast.stmt:
    if hasattr(old, "line"):
        new.line = old.line  # type: ignore[attr-defined]
    return new


# ---- what is computed twice


def with_shared(statements: list[ast.stmt], fresh: Callable[[str], str], steady: set[str]) -> list[ast.stmt]:
    """Calls and powers of steady names that a block has twice, computed once in front of the first.

    Args:
        fresh: gives a new name for a stem.
        steady: names that are assigned once and never written to, so that an expression in them keeps its value.
    """
    out = [_with_blocks(st, lambda block: with_shared(block, fresh, steady)) for st in statements]
    counted: dict[str, list[int]] = {}
    for position, st in enumerate(out):
        for one in _shareable(st, steady):
            counted.setdefault(shown(one), []).append(position)
    twice = {text: places for text, places in counted.items() if len(places) > 1}
    # The largest first: what is within one that is shared is shared with it.
    for text in sorted(twice, key=len, reverse=True):
        places = [p for p in twice[text] if text in map(shown, _shareable(out[p], steady))]
        if len(places) < 2:
            continue
        first = out[places[0]]
        assert isinstance(first, ast.Assign)
        target = first.targets[0]
        known = isinstance(target, ast.Name) and target.id in steady and shown(first.value) == text
        shared = target.id if known else fresh("shared")  # type: ignore[attr-defined]
        value = next(one for one in _shareable(first, steady) if shown(one) == text)
        for place in dict.fromkeys(places[known:]):
            changed = out[place]
            if isinstance(changed, ast.Assign):
                out[place] = _at(ast.Assign(changed.targets, _replaced(changed.value, text, shared)), changed)
        if not known:
            out.insert(places[0], _at(ast.Assign([ast.Name(shared, ast.Store())], value), first))
            twice = {t: [p + (p >= places[0]) for p in ps] for t, ps in twice.items()}
            steady.add(shared)
    return out


def _with_blocks(st: ast.stmt, change: Callable[[list[ast.stmt]], list[ast.stmt]]) -> ast.stmt:
    """A statement with other blocks."""
    if type(st) is ast.Assign:  # as most are
        return st
    if isinstance(st, ast.If):
        return _at(ast.If(st.test, change(st.body), change(st.orelse)), st)
    if isinstance(st, ast.For):
        return _at(ast.For(st.target, st.iter, change(st.body), []), st)
    return _at(ast.While(st.test, change(st.body), []), st) if isinstance(st, ast.While) else st


def _shareable(st: ast.stmt, steady: set[str]) -> list[ast.expr]:
    """Expressions of an assigned value that cost something and keep their value.

    Not the whole value of a name that is written to, which would have the memory of what shares it.
    """
    if not isinstance(st, ast.Assign) or not (costly := _costly(st.value)):
        return []
    own = isinstance(st.targets[0], ast.Name) and st.targets[0].id not in steady
    return [one for one in costly if loads(one) - {"np", "torch", "math"} <= steady and not (own and one is st.value)]


def _costly(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.Name, ast.Constant)):
        return []
    found: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Pow, ast.MatMult, ast.Div)):
            found.append(node)
        return found + _costly(node.right) + _costly(node.left)
    if isinstance(node, ast.Call):
        root, _, rest = _called(node).partition(".")
        if root in ("np", "math", "torch") and rest in _SHARED:
            found.append(node)
        parts: Sequence[ast.AST] = (*node.args, *node.keywords)
    else:
        parts = children(node)
    for part in reversed(parts):
        found += _costly(part)
    return found


_SHARED = {"sin", "cos", "tan", "exp", "log", "sqrt", "tanh", "sinh", "cosh", "expm1", "log1p"}


def _replaced(node: Any, text: str, identifier: str) -> Any:
    """A tree with a name in the place of what has that text."""
    if isinstance(node, (ast.Call, ast.BinOp)) and shown(node) == text:
        return name(identifier)
    if isinstance(node, list):
        return [_replaced(one, text, identifier) for one in node]
    if isinstance(node, (ast.Name, ast.Constant)) or not isinstance(node, ast.AST):
        return node
    return rebuilt(node, lambda part: _replaced(part, text, identifier))


# ---- copies


def without_copies(statements: list[ast.stmt], fixed: set[str]) -> list[ast.stmt]:
    """`a = value` and `b = a`, the only reader of a, as one assignment; of the two names the shorter stays.

    Args:
        fixed: names that must stay: parameters.
    """
    copies = {
        n.id
        for block in _blocks(statements)
        for st in block
        if isinstance(st, ast.Assign) and isinstance(st.value, ast.Name)
        for n in (st.value, st.targets[0])
        if isinstance(n, ast.Name)
    }
    touching = [st for st in statements if not copies.isdisjoint(loads(st)) or not copies.isdisjoint(stores(st))]
    uses = Counter(n for st in touching for n in mentions(st))
    names: dict[str, str] = {}  # what is called otherwise now
    return _named(_without_copies(statements, fixed, uses, names), names)


def _without_copies(
    statements: list[ast.stmt], fixed: set[str], uses: Counter[str], names: dict[str, str]
) -> list[ast.stmt]:
    made: dict[str, list[int]] = {}  # where names are assigned, in what is done of the block
    done: list[ast.stmt] = []

    def now(identifier: str) -> str:
        while identifier in names:
            identifier = names[identifier]
        return identifier

    for st in statements:
        if isinstance(st, ast.Assign) and isinstance(st.targets[0], ast.Name):
            new = now(st.targets[0].id)
            if isinstance(st.value, ast.Name):
                old = now(st.value.id)
                at = made.get(old, [])
                if (
                    new != old
                    and fixed.isdisjoint((new, old))
                    and uses[old] == 2
                    and len(at) == 1
                    and not any(_touches(one, new, now) for one in done[at[0] + 1 :])
                ):
                    keep, drop = (old, new) if len(old) < len(new) else (new, old)
                    uses[keep] = uses[old] + uses[new] - 2
                    uses[drop] = 0
                    names[drop] = keep
                    made[keep] = sorted([*made.get(new, []), *made.pop(old)])
                    continue
            made.setdefault(new, []).append(len(done))
        done.append(st)
    return [_with_blocks(st, lambda block: _without_copies(block, fixed, uses, names)) for st in done]


def _touches(st: ast.stmt, identifier: str, now: Callable[[str], str]) -> bool:
    return any(now(n) == identifier for n in (*loads(st), *stores(st)))


def _blocks(statements: list[ast.stmt]) -> list[list[ast.stmt]]:
    found = [statements]
    for st in statements:
        if isinstance(st, (ast.If, ast.For, ast.While)):
            found += _blocks(st.body) + _blocks(st.orelse)
    return found


def _named(statements: list[ast.stmt], names: dict[str, str]) -> list[ast.stmt]:
    if not names:
        return statements
    final = {}
    for old, new in names.items():
        while new in names:
            new = names[new]
        final[old] = new
    gone = final.keys()
    return [
        st if loads(st).isdisjoint(gone) and stores(st).isdisjoint(gone) else renamed(st, final) for st in statements
    ]
