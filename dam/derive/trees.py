"""Trees of code that are never changed once they are made: parts are shared, and what is found out is kept on a node.

`ast` has what walks, renames and prints trees too. These give the same, and are what the time of a transformation is
made of: names that a tree reads are asked for again and again, and of most trees most parts stay as they are.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from typing import Any

LOAD, STORE = ast.Load(), ast.Store()
_NOTHING: frozenset[str] = frozenset()
# A node keeps what was found out of it in attributes that begin so.
KEPT = "_kept_"
_LOADS, _STORES, _MENTIONS, _TEXT = f"{KEPT}loads", f"{KEPT}stores", f"{KEPT}mentions", f"{KEPT}text"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
_STORE_NOTHING = {ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp, ast.Expr, ast.Lambda, *COMPREHENSIONS}
# What a node of this library carries besides its fields.
_CARRIED = ("lineno", "col_offset", "end_lineno", "end_col_offset", "primitive", "callee", "line", "stop")


def name(identifier: str) -> ast.Name:
    return ast.Name(identifier, LOAD)


def copied(node: Any) -> Any:
    """A deep copy of a tree, which may be changed, with its positions and whatever else its nodes carry."""
    if isinstance(node, list):
        return [copied(one) for one in node]
    if not isinstance(node, ast.AST):
        return node
    new = node.__class__()
    carried = new.__dict__
    for field, value in node.__dict__.items():
        if not field.startswith(KEPT):
            carried[field] = copied(value) if isinstance(value, (ast.AST, list)) else value
    return new


class _Parts(dict[type, tuple[str, ...]]):
    """By kind of node the fields that may have parts; operators and the contexts of names have none."""

    def __missing__(self, kind: type[ast.AST]) -> tuple[str, ...]:
        found = tuple(f for f in kind._fields if f not in ("ctx", "op", "ops", "id", "attr"))
        self[kind] = found = () if kind is ast.Constant else found
        return found


_PARTS = _Parts()


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree but operators and contexts, in no order."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children(one)


def children(node: ast.AST) -> list[ast.AST]:
    """Parts of a node; operators and contexts are none."""
    kept, found = node.__dict__, []
    for field in _PARTS[type(node)]:
        value = kept.get(field)
        if isinstance(value, ast.AST):
            found.append(value)
        elif isinstance(value, list):
            found += [item for item in value if isinstance(item, ast.AST)]
    return found


@functools.cache
def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


# ---- names


def loads(node: ast.AST) -> frozenset[str]:
    """Names that are read in a tree, those that it binds itself left out."""
    kind = type(node)
    if kind is ast.Name:
        return frozenset((node.id,)) if type(node.ctx) is ast.Load else _NOTHING  # type: ignore[attr-defined]
    if kind is ast.Constant:
        return _NOTHING
    found = node.__dict__.get(_LOADS)
    if found is None:
        found = node.__dict__[_LOADS] = _loaded(node)
    return found


def _loaded(node: ast.AST) -> frozenset[str]:
    # The most frequent kinds first.
    if isinstance(node, ast.BinOp):
        return loads(node.left) | loads(node.right)
    if isinstance(node, ast.Attribute):
        return loads(node.value)
    if isinstance(node, ast.Call) and not node.keywords:
        return loads(node.func).union(*map(loads, node.args))
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
        return loads(node.value)
    if isinstance(node, COMPREHENSIONS):
        return _NOTHING.union(*map(loads, children(node))) - bound_inside(node)
    if isinstance(node, ast.comprehension):
        return loads(node.iter).union(*map(loads, node.ifs))
    if isinstance(node, ast.Lambda):
        return (loads(node.body) - bound_inside(node)) | loads(node.args)
    return _NOTHING.union(*map(loads, children(node)))


def bound_inside(node: ast.AST) -> set[str]:
    """Names that a lambda or a comprehension has for itself."""
    if isinstance(node, ast.Lambda):
        return {a.arg for a in walk(node.args) if isinstance(a, ast.arg)}
    if isinstance(node, COMPREHENSIONS):
        return {n.id for g in node.generators for n in walk(g.target) if isinstance(n, ast.Name)}
    return set()


def stores(node: ast.AST) -> frozenset[str]:
    """Names that code assigns, those that it binds for itself left out."""
    kind = type(node)
    if kind is ast.Name:
        return frozenset((node.id,)) if type(node.ctx) is ast.Store else _NOTHING  # type: ignore[attr-defined]
    if kind in _STORE_NOTHING:
        return _NOTHING
    found = node.__dict__.get(_STORES)
    if found is None:
        if kind is ast.Assign:
            found = _NOTHING.union(*map(stores, node.targets))  # type: ignore[attr-defined]
        elif isinstance(node, (ast.If, ast.For, ast.While)):
            target = stores(node.target) if isinstance(node, ast.For) else _NOTHING
            found = target.union(*map(stores, node.body), *map(stores, node.orelse))
        else:
            found = _NOTHING.union(*map(stores, children(node)))
        node.__dict__[_STORES] = found
    return found


def mentions(node: ast.AST) -> tuple[str, ...]:
    """Every name in a tree, read or assigned, as often as it is there."""
    kind = type(node)
    if kind is ast.Name:
        return (node.id,)  # type: ignore[attr-defined]
    if kind is ast.Constant:
        return ()
    found = node.__dict__.get(_MENTIONS)
    if found is None:
        listed: list[str] = []
        for child in children(node):
            listed += mentions(child)
        found = node.__dict__[_MENTIONS] = tuple(listed)
    return found


def renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A tree with other names, those that it binds itself left alone; the very tree where there is nothing to do."""
    if type(node) is ast.Name:
        new = names.get(node.id, node.id)
        return node if new == node.id else ast.Name(new, node.ctx)
    if isinstance(node, list):
        return [renamed(one, names) for one in node]
    if not isinstance(node, ast.AST) or not _touched(node, names):
        return node
    if own := bound_inside(node):
        names = {old: new for old, new in names.items() if old not in own}
    return rebuilt(node, lambda part: renamed(part, names))


def _touched(node: ast.AST, names: Mapping[str, str]) -> bool:
    read = loads(node)
    if not read.isdisjoint(names) and any(names.get(n, n) != n for n in read):
        return True
    if isinstance(node, ast.expr) and type(getattr(node, "ctx", LOAD)) is ast.Load:
        return False
    stored = stores(node)
    return not stored.isdisjoint(names) and any(names.get(n, n) != n for n in stored)


def rebuilt(node: ast.AST, change: Any) -> Any:
    """A node of the same kind, each of its parts changed."""
    kept = node.__dict__
    new = node.__class__()
    made = new.__dict__
    for field in node._fields:
        value = kept.get(field)
        made[field] = change(value) if isinstance(value, (ast.AST, list)) else value
    for field in _CARRIED:
        if field in kept:
            made[field] = kept[field]
    return new


def filled(text: str, names: Mapping[str, ast.expr]) -> ast.expr:
    """The expression of a text, other expressions in the places of names."""
    return _filled(parsed(text), names)


def _filled(node: Any, names: Mapping[str, ast.expr]) -> Any:
    kind = type(node)
    if kind is ast.Name:
        return names.get(node.id, node)
    if kind is ast.Constant:
        return node
    if kind is list:
        return [_filled(one, names) for one in node]
    if loads(node).isdisjoint(names):
        return node
    if kind is ast.Call and not node.keywords:
        return ast.Call(_filled(node.func, names), [_filled(one, names) for one in node.args], [])
    if kind is ast.BinOp:
        return ast.BinOp(_filled(node.left, names), node.op, _filled(node.right, names))
    return rebuilt(node, lambda part: _filled(part, names))


# ---- text

# Precedences as in ast.unparse.
_ARITHMETIC, _TERM, _FACTOR, _POWER, _ATOM = 1, 2, 3, 4, 5
_OPERATORS: dict[type, tuple[str, int]] = {
    ast.Add: (" + ", _ARITHMETIC),
    ast.Sub: (" - ", _ARITHMETIC),
    ast.Mult: (" * ", _TERM),
    ast.Div: (" / ", _TERM),
    ast.Mod: (" % ", _TERM),
    ast.FloorDiv: (" // ", _TERM),
    ast.MatMult: (" @ ", _TERM),
    ast.Pow: (" ** ", _POWER),
}


def shown(node: ast.expr) -> str:
    """The text of an expression, that of ast.unparse."""
    text = _shown(node, 0)
    return ast.unparse(node) if text is None else text


def _shown(node: ast.expr, precedence: int) -> str | None:
    """The text of names, numbers, arithmetic, calls, attributes and items; None of what has anything else in it."""
    kind = type(node)
    if kind is ast.Name:
        return node.id  # type: ignore[attr-defined]
    if kind is ast.Constant:
        return _of_constant(node, precedence)  # type: ignore[arg-type]
    kept = node.__dict__.get(_TEXT)
    if kept is None:
        kept = node.__dict__[_TEXT] = _made(node)
    text, own = kept
    return f"({text})" if text is not None and own < precedence else text


def _of_constant(node: ast.Constant, precedence: int) -> str | None:
    value = node.value
    plain = value is None or type(value) in (bool, str) or (type(value) is float and value - value == 0.0)
    # 1.x is no attribute of 1.
    if plain or (type(value) is int and precedence < _ATOM):
        return repr(value)
    return None


def _made(node: ast.expr) -> tuple[str | None, int]:
    """A text and how tightly it binds."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sign, own = _OPERATORS[type(node.op)]
        powers = own == _POWER
        left, right = _shown(node.left, own + powers), _shown(node.right, own + (not powers))
        return (None if left is None or right is None else left + sign + right), own
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _shown(node.operand, _FACTOR)
        return (None if operand is None else "-" + operand), _FACTOR
    if isinstance(node, ast.Attribute):
        value = _shown(node.value, _ATOM)
        return (None if value is None else f"{value}.{node.attr}"), _ATOM
    if isinstance(node, ast.Subscript):
        value, index = _shown(node.value, _ATOM), _shown(node.slice, 0)
        return (None if value is None or index is None else f"{value}[{index}]"), _ATOM
    if isinstance(node, ast.Call):
        texts = [_shown(node.func, _ATOM), *[_shown(one, 0) for one in node.args]]
        if not node.keywords and None not in texts:
            return f"{texts[0]}({', '.join(texts[1:])})", _ATOM  # type: ignore[arg-type]
    return None, _ATOM
