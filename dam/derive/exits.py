"""Bodies without return, break and continue: what follows goes into the other branch, or under a flag.

A `return` in the middle becomes an assignment to RESULT. Where one branch of an `if` always leaves, the rest of
the block moves into the other; where it only may leave, a flag is set and the rest is guarded by it. A loop that may
be left early keeps the name of its flag in the attribute `stop`: it is tested once, at the end of the loop's body.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

RESULT = "result"
RETURNED = "returned"


class _Level(NamedTuple):
    """A loop, or the function: flags that guard the rest of a block of it."""

    stop: str
    skip: str | None  # of `continue`
    outer: _Level | None


class _Block(NamedTuple):
    statements: list[ast.stmt]
    always: bool  # control never reaches its end
    flags: frozenset[str]  # those of its level that it may have set


def without_exits(body: list[ast.stmt], result: str = RESULT) -> list[ast.stmt]:
    """The body of a function, which ends with its result in the variable `result`."""
    found = _Exits(result)
    block = found.block(body, _Level(RETURNED, None, None))
    first = body[0]
    start = [_assign(RETURNED, ast.Constant(False), first)] if RETURNED in block.flags else []
    if not block.always:
        start.append(_assign(result, ast.Constant(None), first))
    return [*start, *block.statements]


def _assign(name: str, value: ast.expr, at: ast.stmt) -> ast.stmt:
    node = ast.Assign(targets=[ast.Name(name, ast.Store())], value=value)
    return ast.fix_missing_locations(ast.copy_location(node, at))


def _at(new: ast.stmt, old: ast.stmt, *made: ast.expr) -> ast.stmt:
    """A statement, and expressions made for it, at the place of another; what else is in it has its own."""
    for one in made:
        ast.fix_missing_locations(ast.copy_location(one, old))
    return ast.copy_location(new, old)


class _Exits:
    def __init__(self, result: str) -> None:
        self.result = result
        self.loops = 0

    def block(self, statements: list[ast.stmt], level: _Level) -> _Block:
        done: list[ast.stmt] = []
        flags: frozenset[str] = frozenset()
        for position, node in enumerate(statements):
            rest = statements[position + 1 :]
            if isinstance(node, ast.Return):
                done.append(_assign(self.result, node.value or ast.Constant(None), node))
                at: _Level | None = level
                while at is not None:
                    done.append(_assign(at.stop, ast.Constant(True), node))
                    at = at.outer
                return _Block(done, True, flags | {level.stop})
            if isinstance(node, ast.Raise):
                return _Block([*done, node], True, flags)
            if isinstance(node, (ast.Break, ast.Continue)):
                flag = level.stop if isinstance(node, ast.Break) else level.skip
                assert flag is not None  # Python itself refuses these outside of loops
                return _Block([*done, _assign(flag, ast.Constant(True), node)], True, flags | {flag})
            if isinstance(node, ast.If):
                body, other = self.block(node.body, level), self.block(node.orelse, level)
                leaves = body.flags | other.flags
                consumed = True
                if body.always and other.always:
                    pass
                elif body.always and not other.flags:
                    other = self.block([*node.orelse, *rest], level)
                elif other.always and not body.flags:
                    body = self.block([*node.body, *rest], level)
                else:
                    consumed = False
                after = ast.If(test=node.test, body=body.statements or [ast.Pass()], orelse=other.statements)
                done.append(_at(after, node))
                flags |= body.flags | other.flags
                if consumed:
                    return _Block(done, body.always and other.always, flags)
                if leaves and rest:
                    return self._guarded(done, rest, leaves, flags, level, node)
                continue
            if isinstance(node, (ast.For, ast.While)):
                leaves = self._loop(node, level, done)
                flags |= leaves
                if leaves and rest:
                    return self._guarded(done, rest, leaves, flags, level, node)
                continue
            done.append(node)
        return _Block(done, False, flags)

    def _guarded(
        self,
        done: list[ast.stmt],
        rest: list[ast.stmt],
        leaves: frozenset[str],
        flags: frozenset[str],
        level: _Level,
        at: ast.stmt,
    ) -> _Block:
        remaining = self.block(rest, level)
        names: list[ast.expr] = [ast.Name(flag, ast.Load()) for flag in sorted(leaves)]
        left = names[0] if len(names) == 1 else ast.BoolOp(ast.Or(), names)
        test = ast.UnaryOp(ast.Not(), left)
        done.append(_at(ast.If(test=test, body=remaining.statements, orelse=[]), at, test))
        return _Block(done, remaining.always, flags | remaining.flags)

    def _loop(self, node: ast.For | ast.While, level: _Level, done: list[ast.stmt]) -> frozenset[str]:
        """Appends the loop; returns the flags of the level around it that it may set."""
        self.loops += 1
        own = _Level(f"stop_{self.loops}", f"skip_{self.loops}", level)
        body = self.block(node.body, own)
        statements = body.statements
        if own.skip in body.flags:
            statements = [_assign(str(own.skip), ast.Constant(False), node), *statements]
        stops = own.stop in body.flags
        if stops or node.orelse:
            done.append(_assign(own.stop, ast.Constant(False), node))
        loop: ast.For | ast.While
        if isinstance(node, ast.For):
            loop = ast.For(target=node.target, iter=node.iter, body=statements, orelse=[])
        else:
            loop = ast.While(test=node.test, body=statements, orelse=[])
        loop.stop = own.stop if stops else None  # type: ignore[union-attr]
        done.append(_at(loop, node))
        returns = _returns(node)
        if node.orelse:
            test = ast.UnaryOp(ast.Not(), ast.Name(own.stop, ast.Load()))
            other = self.block(node.orelse, level)
            done.append(_at(ast.If(test=test, body=other.statements, orelse=[]), node, test))
            return other.flags | ({level.stop} if returns else frozenset())
        return frozenset({level.stop}) if returns else frozenset()


def _returns(node: ast.stmt) -> bool:
    """Whether a statement has a return of its own function."""
    if isinstance(node, ast.Return):
        return True
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return any(_returns(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
