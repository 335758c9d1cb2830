"""The source of a function, without running any of it: its tree, its lines, and what its free names stand for."""

from __future__ import annotations
import __future__

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
        lines, first, tree = text.splitlines(), 1, None
    else:
        try:
            found, first, tree = _lines(function)
        except (OSError, TypeError) as error:
            raise DerivativeError(f"the source of {named} cannot be got ({error}); define it in a file") from error
        lines, first = textwrap.dedent("".join(found)).splitlines(), max(first, 1)
    if code.co_name == "<lambda>":
        node = _lambda(named, code, lines, Line(code.co_filename, first, lines[0].strip()))
    else:
        node = _definition(named, code.co_name, tree or _tree(named, lines))
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
    # pytest writes the asserts of its test files anew; such a function is taken for what its file says.
    if text is None and "@pytest_ar" not in code.co_names and not _alike(_code_of(node, code), code):
        raise source.refuse(node, f"the source found for {named} is another function's; has the file changed?")
    return source


def _lines(function: types.FunctionType) -> tuple[list[str], int, ast.Module | None]:
    """Those of inspect.getsourcelines, whose tokenizer is left out where a definition ends by its indentation.

    Returns:
        The lines, the number of the first, and their tree where it was made on the way.
    """
    everything, start = inspect.findsource(function)
    head = everything[start]
    if not head.lstrip().startswith("def "):
        return *inspect.getsourcelines(function), None
    indent = len(head) - len(head.lstrip())
    end = start + 1
    while end < len(everything):
        text = everything[end].lstrip()
        if text and text[0] not in "#)]}" and len(everything[end]) - len(text) <= indent:
            break
        end += 1
    found = everything[start:end]
    try:
        tree = ast.parse(textwrap.dedent("".join(found)))
    except SyntaxError:  # a line that begins further left goes on with one before it
        return *inspect.getsourcelines(function), None
    return found, start + 1, tree


def attribute(whole: Any, name: str) -> Any:
    """What an object holds under a name, without running what its class may compute it by; None where that is all.

    Of libraries a module's own lookup is taken, by which parts of them load when they are first asked for.
    """
    if inspect.ismodule(whole):
        of_library = whole.__name__.split(".")[0] in ("numpy", "torch", "dam")
        return getattr(whole, name, None) if of_library else vars(whole).get(name)
    found = inspect.getattr_static(whole, name, None)
    computed = isinstance(found, property) or isinstance(getattr(type(found), "__get__", None), types.FunctionType)
    if computed or isinstance(type(whole).__getattribute__, types.FunctionType):
        return None
    return getattr(whole, name, None)


def _tree(named: str, lines: list[str]) -> ast.Module:
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise DerivativeError(f"the source of {named} cannot be parsed: {error}") from error


def _definition(named: str, name: str, tree: ast.Module) -> ast.FunctionDef:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.AsyncFunctionDef) and node.name == name:
            raise DerivativeError(f"{named} is a coroutine, which has no derivative")
    raise DerivativeError(f"no 'def {name}' where the source of {named} should be; has its file changed?")


def _lambda(named: str, code: types.CodeType, lines: list[str], line: Line) -> ast.FunctionDef:
    """The lambda of these lines that compiles to the code; lines may begin or end within a statement."""
    text, tree = "\n".join(lines), None
    within = (text.lstrip(".,)]} "), f"({text}", f"{text})", f"({text})", f"dict({text})", f"[{text}]")
    for attempt in (text, f"{text}\n    pass", f"if 0: pass\n{text}\n    pass", *within):  # a head goes with a body
        try:
            tree = ast.parse(attempt)
            break
        except SyntaxError:
            continue
    if tree is None:
        raise DerivativeError(f"the lines of {named} cannot be parsed by themselves; write it as a def", line)
    found: dict[str, ast.Lambda] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            if _alike(_code_of(node, code), code):
                found[ast.dump(node)] = node
    if len(found) != 1:
        many = "more than one lambda of its lines could be it" if found else "no lambda of its lines is it"
        raise DerivativeError(f"{named}: {many}; write it as a def", line)
    (node,) = found.values()
    body: ast.stmt = ast.Return(value=node.body)
    definition = ast.FunctionDef(name="function", args=node.args, body=[body], decorator_list=[])
    definition.type_params = []  # type: ignore[attr-defined]
    ast.copy_location(body, node.body)
    return ast.copy_location(definition, node)


def _alike(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two codes compute the same."""
    return _exactly(one) == _exactly(other) or _likeness(one) == _likeness(other)


def _exactly(code: types.CodeType) -> tuple[Any, ...]:
    """All that a code is made of: where two agree in it, so they do in their likeness, which takes longer to find."""
    names = code.co_varnames, code.co_cellvars, code.co_freevars, code.co_names
    return code.co_code, repr(code.co_consts), names, code.co_argcount, code.co_kwonlyargcount


def _likeness(code: types.CodeType) -> tuple[Any, ...]:
    """What a function computes, as its code says it.

    How a method is called and where code jumps to depend on the imports around, names of inner functions on where they
    are: these are left out.
    """
    steps = []
    for step in dis.get_instructions(code):
        if step.opname in ("PUSH_NULL", "EXTENDED_ARG", "NOP"):
            continue
        operand: Any = step.argval
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            operand = None
        elif isinstance(operand, types.CodeType):
            operand = _likeness(operand)
        elif isinstance(operand, str) and ".<locals>." in operand:
            operand = None
        elif isinstance(operand, frozenset):
            operand = sorted(map(repr, operand))
        steps.append((step.opname.replace("LOAD_METHOD", "LOAD_ATTR"), repr(operand)))
    return tuple(steps), code.co_varnames, code.co_argcount, code.co_kwonlyargcount, code.co_freevars


def _code_of(node: ast.Lambda | ast.FunctionDef, like: types.CodeType) -> types.CodeType:
    """Code of a function's source, compiled where the free names of another's code are bound around it."""
    own: ast.stmt
    if isinstance(node, ast.Lambda):
        own = ast.Expr(ast.copy_location(ast.Lambda(_without_values(node.args), node.body), node))
        ast.copy_location(own, node)
    else:
        bare = {**dict(ast.iter_fields(node)), "decorator_list": [], "returns": None, "type_params": []}
        own = ast.FunctionDef(**{**bare, "args": _without_values(node.args)})
        ast.copy_location(own, node)
    module = ast.Module([own], type_ignores=[])
    free = like.co_freevars
    if free:
        (around,) = ast.parse(f"def around({', '.join(free)}):\n    pass\n").body
        assert isinstance(around, ast.FunctionDef)
        hidden: list[ast.stmt] = (
            [] if like.co_name in free or isinstance(node, ast.Lambda) else [ast.Global([node.name])]
        )
        around.body, module.body = [*hidden, own], [around]
        for one in hidden:
            ast.copy_location(one, around)
    flags = like.co_flags & __future__.annotations.compiler_flag
    code = compile(module, like.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(2 if free else 1):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    return code


def _without_values(given: ast.arguments) -> ast.arguments:
    """Parameters without what belongs to the code around a function: values of defaults, annotations."""

    def bare(one: ast.arg | None) -> Any:
        return one and ast.copy_location(ast.arg(one.arg), one)

    return ast.arguments(
        posonlyargs=[*map(bare, given.posonlyargs)],
        args=[*map(bare, given.args)],
        vararg=bare(given.vararg),
        kwonlyargs=[*map(bare, given.kwonlyargs)],
        kw_defaults=[None for _ in given.kwonlyargs],
        kwarg=bare(given.kwarg),
        defaults=[],
    )


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
