"""The source of a function, without running any of it: its tree, its lines, and what its free names stand for."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dam.derive.errors import DerivativeError, Line

# What a derived function carries: the whole text that it was made of.
TEXT = "__derive_text__"


@dataclass(frozen=True)
class Source:
    """A function as its source: a tree, its lines, and the values of names that are not its own.

    Values are those of the moment when the function is transformed, as they are for a closure over constants.
    """

    name: str
    node: ast.FunctionDef
    file: str
    first: int  # number of the line in the file that is line 1 of the tree
    lines: tuple[str, ...]
    namespace: Mapping[str, Any]
    defaults: tuple[Any, ...] = ()
    keyword_defaults: Mapping[str, Any] | None = None
    derived: bool = False

    def line(self, node: ast.AST) -> Line:
        number = getattr(node, "lineno", self.node.lineno)
        text = self.lines[number - 1].strip() if number <= len(self.lines) else ""
        return Line(self.file, self.first + number - 1, text)

    def refuse(self, node: ast.AST, message: str) -> DerivativeError:
        return DerivativeError(message, self.line(node))


def of(function: Callable[..., Any]) -> Source:
    """The source of a Python function or lambda.

    Raises:
        DerivativeError: there is none to be had: a C function, a method, a decorated function, a lambda that cannot be
            told from another in its lines, a function typed into a prompt.
    """
    named = getattr(function, "__qualname__", None) or repr(function)
    if isinstance(function, types.MethodType):
        raise DerivativeError(f"{named} is a method; give a function of its arguments instead")
    if not isinstance(function, types.FunctionType):
        raise DerivativeError(
            f"{named} has no Python source ({type(function).__name__}); register its derivative with adjoint"
        )
    if hasattr(function, "__wrapped__"):
        raise DerivativeError(f"{named} is decorated; give the function beneath (its __wrapped__)")
    code = function.__code__
    text = function.__dict__.get(TEXT)
    if text is not None:
        lines, first = text.splitlines(), 1
    else:
        try:
            found, first = _lines(function)
        except (OSError, TypeError) as error:
            raise DerivativeError(f"the source of {named} cannot be got ({error}); define it in a file") from error
        lines, first = textwrap.dedent("".join(found)).splitlines(), max(first, 1)
    node = _lambda(named, code, lines) if code.co_name == "<lambda>" else _definition(named, code.co_name, lines)
    source = Source(
        name=node.name,
        node=node,
        file=code.co_filename,
        first=first,
        lines=tuple(lines),
        namespace=_namespace(function),
        defaults=function.__defaults__ or (),
        keyword_defaults=function.__kwdefaults__,
        derived=text is not None,
    )
    # Decorators of the definition do not matter: the function at hand is what its own code says, whoever handed it on.
    if code.co_name == "<lambda>":
        return source
    if tuple(_parameters(node)) != code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        raise source.refuse(node, f"the source found for {named} is another function's; has the file changed?")
    return source


def _lines(function: types.FunctionType) -> tuple[list[str], int]:
    """Those of inspect.getsourcelines, whose tokenizer is left out where a definition ends by its indentation."""
    everything, start = inspect.findsource(function)
    head = everything[start]
    if not head.lstrip().startswith("def "):
        return inspect.getsourcelines(function)
    indent = len(head) - len(head.lstrip())
    end = start + 1
    while end < len(everything):
        text = everything[end].lstrip()
        if text and text[0] not in "#)]}" and len(everything[end]) - len(text) <= indent:
            break
        end += 1
    found = everything[start:end]
    try:
        ast.parse(textwrap.dedent("".join(found)))
    except SyntaxError:  # a line that begins further left goes on with one before it
        return inspect.getsourcelines(function)
    return found, start + 1


def _parameters(node: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _definition(named: str, name: str, lines: list[str]) -> ast.FunctionDef:
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise DerivativeError(f"the source of {named} cannot be parsed: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise DerivativeError(f"the source of {named} has no 'def {name}' (coroutines have no derivative)")


def _lambda(named: str, code: types.CodeType, lines: list[str]) -> ast.FunctionDef:
    """The lambda of these lines that compiles to the code; lines may begin or end within a statement."""
    text, tree = "\n".join(lines), None
    for attempt in (text, text.lstrip(".,)]} "), f"({text}", f"{text})", f"({text})", f"dict({text})", f"[{text}]"):
        try:
            tree = ast.parse(attempt)
            break
        except SyntaxError:
            continue
    if tree is None:
        raise DerivativeError(f"the lambda in {lines[0].strip()!r} cannot be parsed by itself; write it as a def")
    found: dict[str, ast.Lambda] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            inner = _compiled(node, code.co_freevars)
            if _likeness(inner) == _likeness(code):
                found[ast.dump(node)] = node
    if len(found) != 1:
        many = "more than one lambda of its lines could be it" if found else "no lambda of its lines is it"
        raise DerivativeError(f"{named} in {lines[0].strip()!r}: {many}; write it as a def")
    (node,) = found.values()
    body: ast.stmt = ast.Return(value=node.body)
    definition = ast.FunctionDef(name="function", args=node.args, body=[body], decorator_list=[])
    definition.type_params = []  # type: ignore[attr-defined]
    ast.copy_location(body, node.body)
    return ast.copy_location(definition, node)


def _likeness(code: types.CodeType) -> tuple[Any, ...]:
    """What tells functions of a few lines apart; how a method is called depends on imports around, and is left out."""
    steps = tuple(
        (i.opname.replace("LOAD_METHOD", "LOAD_ATTR"), i.argrepr if i.opname in ("BINARY_OP", "COMPARE_OP") else "")
        for i in dis.get_instructions(code)
        if i.opname != "PUSH_NULL"
    )
    constants = tuple(repr(c) for c in code.co_consts if not isinstance(c, (types.CodeType, str)))
    return steps, code.co_names, code.co_varnames, constants


def _compiled(node: ast.Lambda, free: tuple[str, ...]) -> types.CodeType:
    """Code of a lambda, with the free names of the original bound around it."""
    around = f"def around({', '.join(free)}):\n    return None\n"
    module = ast.parse(around)
    assert isinstance(module.body[0], ast.FunctionDef) and isinstance(module.body[0].body[0], ast.Return)
    module.body[0].body[0].value = node
    outer = compile(ast.fix_missing_locations(module), "<lambda>", "exec").co_consts[0]
    return next(c for c in outer.co_consts if isinstance(c, types.CodeType))


def _namespace(function: types.FunctionType) -> dict[str, Any]:
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not assigned yet; using it will say so
            continue
    return {**vars(builtins), **function.__globals__, **cells}


def of_or_refused(function: Any, where: Any, node: ast.AST) -> Source:
    """The source of a function that is called, with the line of the call where there is none."""
    try:
        return of(function)
    except DerivativeError as error:
        if error.line is not None:
            raise
        raise where.refuse(node, str(error)) from None
