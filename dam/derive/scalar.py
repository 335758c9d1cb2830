"""Functions of numbers as expressions of sympy: their source is followed with symbols in the place of numbers.

Nothing is run. Branches whose test depends on a symbol are both followed to the end of the function, so early returns
and names that one branch lacks need no care. Loops, which unroll.py writes out, arrays, and whatever else is not made
of numbers is refused with its line.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch
from sympy.codegen import cfunctions
from sympy.logic.boolalg import Boolean

from dam.derive import functions
from dam.derive import runtime as rt
from dam.derive.errors import DerivativeError

Expression: TypeAlias = Any  # of sympy, which has no types
_NO_NUMBERS = (sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.I)
_PATHS = 64  # through one function
_DEPTH, _CALLS = 32, 1000  # of calls within one another, and of all
# As a decimal that somebody wrote: 0.3 - 1 is -7/10, not the quotient of two powers of 2 that the double is. Exponents
# that are to cancel then do.
_DENOMINATOR = 10**6


class where(sympy.Function):
    """where(test, a, b), which sympy's own Piecewise would try to solve."""

    nargs = 3

    @classmethod
    def eval(cls, test: Any, a: Any, b: Any) -> Any:
        if test in (sympy.true, sympy.false):
            return a if test == sympy.true else b
        return a if a == b else None


def exact(value: float) -> Expression:
    """A number of the source as a rational.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, (bool, np.bool_)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    near = Fraction(value).limit_denominator(_DENOMINATOR)
    if near == 0 or abs(float(near) - float(value)) > 4 * math.ulp(float(value)):
        near = Fraction(value)
    return sympy.Rational(near.numerator, near.denominator)


def _power(x: Expression, n: Expression) -> Expression:
    return x**n


def _chosen(test: Any, a: Any, b: Any) -> Expression:
    test = sympy.sympify(test)
    if isinstance(test, sympy.Expr) or not isinstance(test, Boolean):  # a symbol is both
        raise ValueError("a condition must be a comparison")
    return where(test, a, b)


def _within(x: Expression, low: Any = None, high: Any = None) -> Expression:
    found = sympy.true
    for bound, test in ((low, lambda b: x >= b), (high, lambda b: x <= b)):
        if bound is not None:
            found = sympy.And(found, test(bound))
    return _chosen(found, sympy.Integer(1), sympy.Integer(0))


def _larger(x: Expression, z: Expression) -> Expression:
    half = _chosen(sympy.Eq(x, z), sympy.Rational(1, 2), sympy.Integer(0))
    return _chosen(x > z, sympy.Integer(1), half)


def _maximum(x: Expression, z: Expression) -> Expression:
    return _chosen(x >= z, x, z)


def _minimum(x: Expression, z: Expression) -> Expression:
    return _chosen(x <= z, x, z)


def _clip(x: Expression, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Expression:
    low, high = a_min if min is None else min, a_max if max is None else max
    x = x if low is None else _maximum(x, low)
    return x if high is None else _minimum(x, high)


def _logaddexp(x: Expression, z: Expression) -> Expression:
    return _chosen(x >= z, x + cfunctions.log1p(sympy.exp(z - x)), z + cfunctions.log1p(sympy.exp(x - z)))


def _sign(x: Expression) -> Expression:
    return _chosen(x > 0, sympy.Integer(1), _chosen(x < 0, sympy.Integer(-1), sympy.Integer(0)))


def _abs(x: Expression) -> Expression:
    return _chosen(x >= 0, x, -x)


def _first(x: Any, *rest: Any, **options: Any) -> Any:
    return x


def _zeros(x: Any) -> Any:
    return tuple(_zeros(one) for one in x) if isinstance(x, tuple) else sympy.Integer(0)


def _full(b: Any, x: Any) -> Any:
    """An adjoint of a tuple, or of a number; 0 may stand for that of a tuple."""
    if not isinstance(x, tuple):
        return b
    return tuple(map(_full, b, x)) if isinstance(b, tuple) else _zeros(x)


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(map(_add, a, b))
    return a if isinstance(a, tuple) else b if isinstance(b, tuple) else a + b


def _placed(g: Any, at: Any, x: Any) -> Any:
    """The adjoint of a tuple of which one item has one."""
    place = range(len(x))[int(at)]
    return tuple(g if n == place else _zeros(one) for n, one in enumerate(x))


# What functions of numpy, torch and math mean for numbers, by name.
_MEANINGS: dict[str, Callable[..., Any]] = {
    "exp": sympy.exp,
    "exp2": lambda x: sympy.Integer(2) ** x,
    "expm1": cfunctions.expm1,
    "log": sympy.log,
    "log1p": cfunctions.log1p,
    "log2": lambda x: sympy.log(x) / sympy.log(2),
    "log10": lambda x: sympy.log(x) / sympy.log(10),
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "square": lambda x: x**2,
    "reciprocal": lambda x: 1 / x,
    "negative neg": lambda x: -x,
    "positive copy clone": _first,
    "abs absolute fabs": _abs,
    "sign": _sign,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tanh": sympy.tanh,
    "sinh": lambda x: (sympy.exp(x) - sympy.exp(-x)) / 2,
    "cosh": lambda x: (sympy.exp(x) + sympy.exp(-x)) / 2,
    "arctan atan": sympy.atan,
    "erf": sympy.erf,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "add": lambda x, z: x + z,
    "subtract sub": lambda x, z: x - z,
    "multiply mul": lambda x, z: x * z,
    "divide true_divide div": lambda x, z: x / z,
    "power pow float_power": _power,
    "maximum fmax": _maximum,
    "minimum fmin": _minimum,
    "clip clamp": _clip,
    "where": _chosen,
    "logaddexp": _logaddexp,
}
_KNOWN: dict[Any, Callable[..., Any]] = {}
for _names, _meaning in _MEANINGS.items():
    for _name in _names.split():
        for _module in (np, torch, math):
            if _function := getattr(_module, _name, None):
                _KNOWN[_function] = _meaning
_KNOWN |= {abs: _abs, float: _first, pow: _power, max: _maximum, min: _minimum, np.float64: _first}
_KNOWN[torch.nn.functional.softplus] = lambda x: _logaddexp(x, sympy.Integer(0))
# Of the differentiator's runtime: of numbers, what undoes broadcasting does nothing.
_KNOWN |= {
    rt.differentiable: lambda x, name: None,
    rt.distinct: lambda **arguments: None,
    rt.seed: lambda y: sympy.Integer(1),
    rt.seeded: lambda b, y: sympy.Integer(1) if b is None else b,
    rt.zeros_like: _zeros,
    rt.full: _full,
    rt.packed: _full,
    rt.unpacked: _full,
    rt.add: _add,
    rt.placed: _placed,
    rt.add_at: lambda b, at, g, x: _add(_full(b, x), _placed(g, at, x)),
    rt.power_slope: lambda x, n: n * x ** (n - 1),
    rt.power_log: lambda x, n: x**n * sympy.log(x),
    rt.log: sympy.log,
    rt.where: _chosen,
    rt.larger: _larger,
    rt.within: _within,
    rt.sign: _sign,
    rt.integral: lambda n: False,
    rt.rebound: lambda x, names, whole=None: None,
    rt.number: lambda x, message: None,
    rt.no_list: lambda x, message: None,
}
for _function in (
    rt.gradient, rt.unbroadcast, rt.unbroadcast_any, rt.broadcast, rt.expand, rt.total, rt.copied,
    rt.reshape_like, rt.stop_gradient,
):  # fmt: skip
    _KNOWN[_function] = _first

_COMPARED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}
_COMPUTED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: _power,
}


def expression(function: Callable[..., Any], *arguments: Expression) -> Expression:
    """What a function of numbers returns for symbols.

    Args:
        function: with source, as `dam.derive.grad` takes it and as it returns it; parameters beyond the arguments keep
            their defaults.
        arguments: expressions of sympy.

    Raises:
        DerivativeError: the function is not one of numbers alone; the message shows the line.
    """
    source = functions.of(function)
    found = _Follower(source, 0, itertools.count(1)).call(arguments, {})
    if not isinstance(found, sympy.Expr):
        raise source.refuse(source.node, f"{source.name} must return one number")
    # sqrt(u^2) is one, of which kernels know the branches.
    return found.replace(sympy.Abs, _abs).replace(sympy.sign, _sign)


class _Follower:
    """One function's source, followed."""

    def __init__(self, source: functions.Source, depth: int, calls: Iterator[int]) -> None:
        self.source, self.depth, self.calls, self.paths = source, depth, calls, 0

    def call(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        return self.block(list(self.source.node.body), self.bound(arguments, keywords), {})

    def bound(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The function's names at its beginning."""
        source, given = self.source, self.source.node.args
        if given.vararg or given.kwarg:
            raise source.refuse(source.node, "*args and **kwargs are no numbers; name the parameters")
        names = [a.arg for a in (*given.posonlyargs, *given.args)]
        if len(arguments) > len(names):
            raise source.refuse(source.node, f"{source.name} takes {len(names)} arguments, not {len(arguments)}")
        defaults: dict[str, Any] = dict(zip(reversed(names), reversed(source.defaults), strict=False))
        defaults |= source.keyword_defaults or {}
        names += [a.arg for a in given.kwonlyargs]
        values = {**dict(zip(names, arguments, strict=False)), **keywords}
        for name in names:
            if name not in values:
                if name not in defaults:
                    raise source.refuse(source.node, f"{source.name} needs a value for its parameter {name}")
                values[name] = self.constant(defaults[name], source.node)
        return values

    def constant(self, value: Any, node: ast.AST) -> Any:
        """A value of the function's surroundings."""
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
            try:
                return exact(value.item() if isinstance(value, np.generic) else value)
            except ValueError as error:
                raise self.source.refuse(node, str(error)) from None
        if isinstance(value, (np.ndarray, torch.Tensor)):
            raise self.source.refuse(node, f"{ast.unparse(node)} is an array; only numbers are taken here")
        return value

    # ---- statements

    def block(self, statements: list[ast.stmt], names: dict[str, Any], known: dict[Any, bool]) -> Any:
        """What the function returns when these statements are what is left of it."""
        for position, st in enumerate(statements):
            match st:
                case ast.Return(value=value):
                    return None if value is None else self.value(value, names, known)
                case ast.Assign(targets=[target], value=value):
                    self.assign(target, self.value(value, names, known), names)
                case ast.AnnAssign(target=target, value=value) if value is not None:
                    self.assign(target, self.value(value, names, known), names)
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                    both = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), op, value), st)
                    names[name] = self.value(both, names, known)
                case ast.If(test=test, body=body, orelse=orelse):
                    rest = statements[position + 1 :]
                    return self.branches(self.value(test, names, known), body, orelse, rest, names, known)
                case ast.Expr(value=ast.Constant()) | ast.Pass():
                    continue
                case ast.Expr(value=value):
                    self.value(value, names, known)
                case _:
                    taken = (
                        "only assignments, if and return are taken of a function of numbers, and for in the one defined"
                    )
                    raise self.source.refuse(st, taken)
        return None

    def assign(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple) and len(value) == len(target.elts):
            for one, part in zip(target.elts, value, strict=True):
                self.assign(one, part, names)
        else:
            raise self.source.refuse(target, "only names are assigned in a function of numbers")

    def branches(
        self,
        test: Any,
        body: list[ast.stmt],
        orelse: list[ast.stmt],
        rest: list[ast.stmt],
        names: dict[str, Any],
        known: dict[Any, bool],
    ) -> Any:
        side = self.decided(test, known)
        if side is not None:
            return self.block([*(body if side else orelse), *rest], names, known)
        self.paths += 1
        if self.paths > _PATHS:
            raise self.source.refuse(body[0], f"more than {_PATHS} ways through {self.source.name}")
        yes = self.block([*body, *rest], dict(names), {**known, test: True})
        no = self.block([*orelse, *rest], dict(names), {**known, test: False})
        return self.joined(test, yes, no, body[0])

    def decided(self, test: Any, known: dict[Any, bool]) -> bool | None:
        if isinstance(test, (bool, type(None), sympy.logic.boolalg.BooleanAtom)):
            return bool(test)
        return known.get(test)

    def joined(self, test: Any, yes: Any, no: Any, node: ast.AST) -> Any:
        """A value of which the test decides; one that a side lacks is read on the other alone."""
        if yes is None or no is None:
            return no if yes is None else yes
        if isinstance(yes, tuple) and isinstance(no, tuple) and len(yes) == len(no):
            return tuple(self.joined(test, a, b, node) for a, b in zip(yes, no, strict=True))
        if isinstance(yes, sympy.Expr) and isinstance(no, sympy.Expr):
            return _chosen(test, yes, no)
        if isinstance(yes, Boolean) and isinstance(no, Boolean):
            return sympy.ITE(test, yes, no)
        raise self.source.refuse(node, "both ways of a branch must give numbers")

    # ---- expressions

    def value(self, node: ast.expr, names: dict[str, Any], known: dict[Any, bool]) -> Any:
        try:
            found = self._value(node, names, known)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            if isinstance(error, DerivativeError):
                raise
            raise self.source.refuse(node, f"this is not made of numbers: {error}") from None
        if isinstance(found, sympy.Expr) and found.has(*_NO_NUMBERS):
            raise self.source.refuse(node, f"{ast.unparse(node)} is no real number")
        return found

    def _value(self, node: ast.expr, names: dict[str, Any], known: dict[Any, bool]) -> Any:
        def of(inner: ast.expr) -> Any:
            return self.value(inner, names, known)

        def number(inner: ast.expr) -> Expression:
            found = of(inner)
            if isinstance(found, sympy.Expr):
                return found
            if isinstance(found, Boolean):
                return _chosen(found, sympy.Integer(1), sympy.Integer(0))
            raise self.source.refuse(inner, f"{ast.unparse(inner)} is no number")

        match node:
            case ast.Constant(value=value):
                return value if isinstance(value, (str, bool, type(None))) else self.constant(value, node)
            case ast.Name(id=name):
                if name in names:
                    return names[name]
                if name not in self.source.namespace:
                    raise self.source.refuse(node, f"the name {name} has no value")
                return self.constant(self.source.namespace[name], node)
            case ast.Attribute():
                found = self.reached(node, names)
                if found is None:
                    raise self.source.refuse(node, f"{ast.unparse(node)} is not a value that an object holds")
                return self.constant(found, node)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED:
                return _COMPUTED[type(op)](number(left), number(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -number(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return number(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                side = self.decided(of(operand), known)
                return sympy.Not(of(operand)) if side is None else not side
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self.compared([left, *others], ops, of, number)
            case ast.BoolOp(op=op, values=values):
                return (sympy.And if isinstance(op, ast.And) else sympy.Or)(*(of(v) for v in values))
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
                return (sympy.And if isinstance(op, ast.BitAnd) else sympy.Or)(of(left), of(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = of(test)
                side = self.decided(condition, known)
                if side is not None:
                    return of(body if side else orelse)
                return self.joined(condition, number(body), number(orelse), node)
            case ast.Tuple(elts=elts):
                return tuple(of(e) for e in elts)
            case ast.Subscript(value=whole, slice=ast.Constant(value=int(at))):
                found = of(whole)
                if isinstance(found, tuple) and -len(found) <= at < len(found):
                    return found[at]
            case ast.Call():
                return self.called(node, names, known)
        raise self.source.refuse(node, f"{ast.unparse(node)} is not made of numbers")

    def compared(self, values: list[ast.expr], ops: list[ast.cmpop], of: Any, number: Any) -> Any:
        if len(ops) == 1 and isinstance(ops[0], (ast.Is, ast.IsNot)):
            same = of(values[0]) is of(values[1])
            return same if isinstance(ops[0], ast.Is) else not same
        found: Any = sympy.true
        for a, op, b in zip(values, ops, values[1:], strict=False):
            if type(op) not in _COMPARED:
                raise self.source.refuse(a, "numbers are compared by < <= > >= == !=")
            found = sympy.And(found, _COMPARED[type(op)](number(a), number(b)))
        return found

    def reached(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """What a dotted name of the surroundings stands for, or None."""
        if isinstance(node, ast.Name):
            return None if node.id in names else self.source.namespace.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            whole = self.reached(node.value, names)
            return None if whole is None else functions.attribute(whole, node.attr)
        return None

    def called(self, node: ast.Call, names: dict[str, Any], known: dict[Any, bool]) -> Any:
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise self.source.refuse(node, "a call with * or ** is not one of numbers")
        arguments = tuple(self.value(a, names, known) for a in node.args)
        keywords = {k.arg: self.value(k.value, names, known) for k in node.keywords if k.arg is not None}
        function = self.reached(node.func, names)
        if function is None and isinstance(node.func, ast.Attribute):
            # A method of a number: u.log(), u.square().
            whole = self.value(node.func.value, names, known)
            function = getattr(torch, node.func.attr, None) or getattr(np, node.func.attr, None)
            arguments = (whole, *arguments)
        try:
            meaning = _KNOWN.get(function)
        except TypeError:
            meaning = None
        if meaning is not None:
            try:
                return meaning(*arguments, **keywords)
            except TypeError as error:
                raise self.source.refuse(node, f"{ast.unparse(node.func)} of these arguments: {error}") from None
        module = getattr(function, "__module__", None) or ""
        if function is None or module == rt.__name__ or module.split(".")[0] in ("numpy", "torch", "math"):
            raise self.source.refuse(node, f"{ast.unparse(node.func)} is not a function of numbers that is known here")
        if self.depth >= _DEPTH or next(self.calls) > _CALLS:
            raise self.source.refuse(node, "more calls than are followed; functions of numbers do not call themselves")
        inner = functions.of_or_refused(function, self.source, node)
        return _Follower(inner, self.depth + 1, self.calls).call(arguments, keywords)
