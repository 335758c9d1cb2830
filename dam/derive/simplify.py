"""Passes on written code: constants folded, products shared, and what nobody reads left out."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable

from dam.derive.primitives import walk

# Writing these again costs nothing, so they are not shared.
_CHEAP = (ast.Name, ast.Constant)
_EFFECTS = {
    "restore",
    "put_back",
    "store_tangent",
    "part",
    "rebound",
    "distinct",
    "differentiable",
    "print",
    "seed",
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


class Fold(ast.NodeTransformer):
    """Arithmetic with 0, 1 and other constants. A product with 0.0 is 0.0: what it multiplies is a slope."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
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
                    return self.visit(ast.UnaryOp(ast.USub(), node.left))
                if left == -1.0:
                    return self.visit(ast.UnaryOp(ast.USub(), node.right))
                if (
                    isinstance(node.right, ast.BinOp)
                    and isinstance(node.right.op, ast.Div)
                    and _number(node.right.left) == 1.0
                ):
                    return ast.BinOp(node.left, ast.Div(), node.right.right)
                if isinstance(node.right, ast.UnaryOp) and isinstance(node.right.op, ast.USub) and right is None:
                    return ast.UnaryOp(ast.USub(), self.visit(ast.BinOp(node.left, ast.Mult(), node.right.operand)))
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

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.USub):
            if isinstance(node.operand, ast.UnaryOp) and isinstance(node.operand.op, ast.USub):
                return node.operand.operand
            if is_zero(node.operand):
                return ast.Constant(0.0)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        called = _called(node)
        if called == "rt.power_slope":
            x, n = node.args
            power = _number(n)
            if power is not None:
                if power == 0:
                    return ast.Constant(0.0)
                return self.visit(ast.BinOp(n, ast.Mult(), self.visit(ast.BinOp(x, ast.Pow(), _constant(power - 1)))))
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


def fold(node: ast.expr) -> ast.expr:
    """The same value with less arithmetic; the tree itself may be changed."""
    return Fold().visit(node)


def _called(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return f"{function.value.id}.{function.attr}"
        if isinstance(function, ast.Name):
            return function.id
    return ""


def names_read(node: ast.AST) -> set[str]:
    return {n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def names_bound(node: ast.AST) -> set[str]:
    return {n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def free(statements: Iterable[ast.stmt]) -> set[str]:
    """Names that code reads before it has bound them for certain."""
    needed: set[str] = set()
    for st in reversed(list(statements)):
        if isinstance(st, ast.For):
            needed |= (free(st.body) - names_bound(st.target)) | names_read(st.iter)
        elif isinstance(st, ast.While):
            needed |= free(st.body) | names_read(st.test)
        elif isinstance(st, ast.If):
            body, orelse = free(st.body), free(st.orelse)
            needed = (needed - (_bound_by(st.body) & _bound_by(st.orelse))) | body | orelse | names_read(st.test)
        else:
            needed = (needed - names_bound(st)) | names_read(st)
    return needed


def _bound_by(statements: list[ast.stmt]) -> set[str]:
    return set().union(*(names_bound(s) for s in statements if isinstance(s, ast.Assign)))


# ---- what nobody reads


def _pure(node: ast.expr, pure_names: frozenset[str]) -> bool:
    """Whether computing a value has no effect, so that it may be left out."""
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
    """Code without assignments that nothing reads, until none is left."""
    own = set().union(*(names_bound(st) for st in statements))
    while True:
        # A list of the surroundings is read by others.
        kept, _ = _alive(statements, _appended(statements) - own, pure_names)
        if _count(kept) == _count(statements):
            return kept
        statements = kept


def _appended(statements: Iterable[ast.stmt]) -> set[str]:
    found: set[str] = set()
    for st in statements:
        if isinstance(st, ast.Expr) and (one := _appends(st)) is not None:
            found.add(one)
        for block in ("body", "orelse"):
            found |= _appended(getattr(st, block, ()))
    return found


def _count(statements: Iterable[ast.stmt]) -> int:
    return sum(1 + _count(getattr(s, "body", ())) + _count(getattr(s, "orelse", ())) for s in statements)


def _alive(statements: list[ast.stmt], live: set[str], pure: frozenset[str]) -> tuple[list[ast.stmt], set[str]]:
    out: list[ast.stmt] = []
    live = set(live)
    for st in reversed(statements):
        if isinstance(st, ast.Assign):
            target = st.targets[0]
            if isinstance(target, (ast.Name, ast.Tuple)):
                bound = names_bound(target)
                if not (bound & live) and _pure(st.value, pure):
                    continue
                live = (live - bound) | names_read(st.value)
            else:
                live |= names_read(st)
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
            live = of_body | of_orelse | names_read(test)
        elif isinstance(st, (ast.For, ast.While)):
            loop, live = _loop_alive(st, live, pure)
            if loop is None:
                continue
            st = loop
        elif isinstance(st, ast.Expr) and _appends(st) is not None:
            if _appends(st) not in live:
                continue
            live |= names_read(st)
        else:
            live |= names_read(st)
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
    head = names_read(st.iter) if isinstance(st, ast.For) else names_read(st.test)
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


def with_shared(statements: list[ast.stmt], fresh: object, steady: set[str]) -> list[ast.stmt]:
    """Calls and powers of steady names that a block has twice, computed once in front of the first.

    Args:
        fresh: gives a new name for a stem.
        steady: names that are assigned once and never written to, so that an expression in them keeps its value.
    """
    out: list[ast.stmt] = []
    for st in statements:
        for block in ("body", "orelse"):
            if isinstance(st, (ast.If, ast.For, ast.While)) and getattr(st, block, None):
                setattr(st, block, with_shared(getattr(st, block), fresh, steady))
        out.append(st)
    counted: dict[str, list[int]] = {}
    for position, st in enumerate(out):
        if isinstance(st, ast.Assign):
            for inner in _shareable(st.value, steady):
                counted.setdefault(ast.unparse(inner), []).append(position)
    twice = {text: places for text, places in counted.items() if len(places) > 1}
    # The largest first: what is within one that is shared is shared with it.
    for text in sorted(twice, key=len, reverse=True):
        places = [p for p in twice[text] if text in {ast.unparse(i) for i in _shareable(_value(out[p]), steady)}]
        if len(places) < 2:
            continue
        first = out[places[0]]
        whole = (
            isinstance(first, ast.Assign)
            and ast.unparse(first.value) == text
            and isinstance(first.targets[0], ast.Name)
        )
        if whole and first.targets[0].id in steady:  # type: ignore[attr-defined]
            name = first.targets[0].id  # type: ignore[attr-defined]
            changed = places[1:]
        else:
            name = fresh("shared")  # type: ignore[operator]
            changed = places
        replace = _Replace(text, name)
        for place in dict.fromkeys(changed):
            target = out[place]
            if isinstance(target, ast.Assign) and not (whole and target is first):
                target.value = replace.visit(target.value)  # type: ignore[assignment]
        if not whole or first.targets[0].id not in steady:  # type: ignore[attr-defined]
            made = ast.Assign([ast.Name(name, ast.Store())], ast.parse(text, mode="eval").body)
            out.insert(places[0], _at(made, first))
            twice = {t: [p + (p >= places[0]) for p in ps] for t, ps in twice.items()}
            steady.add(name)
    return out


def _value(st: ast.stmt) -> ast.expr:
    return st.value if isinstance(st, ast.Assign) else ast.Constant(None)


def _shareable(node: ast.expr, steady: set[str]) -> list[ast.expr]:
    found = []
    for inner in walk(node):
        costs = isinstance(inner, ast.BinOp) and isinstance(inner.op, (ast.Pow, ast.MatMult, ast.Div))
        if isinstance(inner, ast.Call):
            root, _, rest = _called(inner).partition(".")
            costs = root in ("np", "math", "torch") and rest in _SHARED
        if costs and names_read(inner) - {"np", "torch", "math"} <= steady:
            found.append(inner)
    return found  # type: ignore[return-value]


_SHARED = {"sin", "cos", "tan", "exp", "log", "sqrt", "tanh", "sinh", "cosh", "expm1", "log1p"}


class _Replace(ast.NodeTransformer):
    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Call, ast.BinOp)) and ast.unparse(node) == self.text:
            return ast.Name(self.name, ast.Load())
        return self.generic_visit(node)


# ---- copies


def without_copies(statements: list[ast.stmt], fixed: set[str]) -> list[ast.stmt]:
    """`a = value` and `b = a`, the only reader of a, as one assignment; of the two names the shorter stays.

    Args:
        fixed: names that must stay: parameters.
    """
    uses: dict[str, list[ast.Name]] = {}
    for one in statements:
        for n in walk(one):
            if isinstance(n, ast.Name):
                uses.setdefault(n.id, []).append(n)
    for block in _blocks(statements):
        position = 0
        while position < len(block):
            st = block[position]
            position += 1
            if not (
                isinstance(st, ast.Assign) and isinstance(st.targets[0], ast.Name) and isinstance(st.value, ast.Name)
            ):
                continue
            new, old = st.targets[0].id, st.value.id
            if new in fixed or old in fixed or new == old or len(uses[old]) != 2:
                continue
            made = [k for k, one in enumerate(block[: position - 1]) if _assigns(one, old)]
            if len(made) != 1:
                continue
            between = block[made[0] + 1 : position - 1]
            if any(isinstance(n, ast.Name) and n.id == new for one in between for n in walk(one)):
                continue
            keep, drop = (old, new) if len(old) < len(new) else (new, old)
            del block[position - 1]
            position -= 1
            merged = [n for n in (*uses[old], *uses.pop(new)) if n is not st.targets[0] and n is not st.value]
            uses.pop(old, None)
            for n in merged:
                n.id = keep
            uses[keep] = merged
            uses.setdefault(drop, [])
    return statements


def _assigns(st: ast.stmt, identifier: str) -> bool:
    return isinstance(st, ast.Assign) and isinstance(st.targets[0], ast.Name) and st.targets[0].id == identifier


def _blocks(statements: list[ast.stmt]) -> list[list[ast.stmt]]:
    found = [statements]
    for st in statements:
        for block in ("body", "orelse"):
            if isinstance(st, (ast.If, ast.For, ast.While)) and getattr(st, block, None):
                found += _blocks(getattr(st, block))
    return found
