"""Expressions to many digits: whether a function is convex, its limits at 0, what floating point is compared with.

The digits are those of a context of their own, so that a program's own mpmath, and other threads, are left alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Logarithms of the rates at which phi is looked at: 1e-30 to 1e30, and 1 itself, where a kink often is, is none.
_SAMPLE = [0.58 * (n + 0.37) for n in range(-119, 119)]
_DIGITS = 120  # so that what cancels there has some left
# Beyond this an exponential is infinite or 0: doubles end at an exponent of 710, and digits would be of no end.
_EXPONENT = 2.0**1000
_HALVINGS, _BESIDE = 200, 1e-40  # how near a boundary is found, and how near to it both sides are looked at
# Log rates by which a limit at 0 is told, and digits for the first two.
_NEAR, _MANY, _FAR = (-500.0, -1000.0), 4000, -1e12
_EVEN = 1e-10  # relative, of two sides that are to be the same: constants of the source are doubles


def numbers(variables: Sequence[Any], *expressions: Any) -> Callable[..., list[Any]]:
    """Values of expressions at values of their variables, to many digits; NaN where there is none."""
    import mpmath
    import sympy
    from sympy.printing.pycode import MpmathPrinter

    context = mpmath.MPContext()

    def exp(v: Any) -> Any:
        if abs(v) > _EXPONENT:
            return context.inf if v > 0 else context.zero
        return context.exp(v)

    def raised(base: Any, exponent: Any) -> Any:
        # By ** a whole exponent, as large ones are, is taken by so many products.
        if base > 0:
            return exp(exponent * context.log(base))
        return context.zero if base == 0 and exponent > 0 else context.nan

    class Printer(MpmathPrinter):
        def _print_Pow(self, expr: Any, rational: bool = False) -> str:
            if expr.exp.is_number:
                return super()._print_Pow(expr, rational=rational)
            return f"raised({self._print(expr.base)}, {self._print(expr.exp)})"

    own = {name: getattr(context, name) for name in dir(context) if not name.startswith("_")}
    own |= {"exp": exp, "raised": raised, "where": lambda test, a, b: a if test else b}
    printer = Printer({"fully_qualified_modules": False, "inline": True, "allow_unknown_functions": True})
    found = [sympy.lambdify(variables, e, modules=[own], printer=printer) for e in expressions]

    def values(*at: Any, digits: int = _DIGITS) -> list[Any]:
        context.dps = digits
        exact = [context.mpf(v) for v in at]
        return [_value(f, exact) for f in found]

    return values


def _value(f: Callable[..., Any], at: list[Any]) -> Any:
    try:
        value = f(*at)
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan
    return math.nan if hasattr(value, "imag") and value.imag != 0 else value


def _is_negative(found: Any, with_more: Callable[[], Any]) -> bool:
    """Whether a number is negative, and not only what cancelling left of it: of twice the digits that is less."""
    return found < 0 and with_more() < found / 2


def check_convex(name: str, x: Any, value: Any, slope: Any, curvature: Any) -> None:
    """That phi of exp(x) is convex, where it is looked at: at a sample of rates, and on both sides of each boundary
    that a condition of its own has between two of them.

    Raises:
        ValueError: it is not, or is no number there; the message names the rate.
    """
    values, sample = numbers([x], value, slope, curvature), list[Any](_SAMPLE)
    for test, at in _boundaries(x, value, slope):
        _check_boundary(name, x, (value, slope, curvature), test, at)
        sample += [at - _BESIDE, at + _BESIDE]
    sample.sort()
    # And once between two boundaries, however near to one another.
    sample = sorted([*sample, *((a + b) / 2 for a, b in itertools.pairwise(sample) if b - a < 0.5)])

    def bend(at: Any) -> Any:
        return values(at, digits=2 * _DIGITS)[2]

    def rise(start: Any, end: Any) -> Any:
        return values(end, digits=2 * _DIGITS)[1] - values(start, digits=2 * _DIGITS)[1]

    before, slope_before, bent = sample[0], -math.inf, False
    for at in sample:
        _, slope_at, curvature_at = _checked(name, values, at)
        if _is_negative(curvature_at, functools.partial(bend, at)):
            told = f"its second derivative is {float(curvature_at):.3g}"
            raise ValueError(f"define: {name} is not convex: {told} at {_rate(at)}")
        if _is_negative(slope_at - slope_before, functools.partial(rise, before, at)):
            raise ValueError(
                f"define: {name} is not convex: its slope falls to {float(slope_at):.3g} before {_rate(at)}"
            )
        before, slope_before, bent = at, slope_at, bent or curvature_at > 0
    if not bent:
        raise ValueError(
            f"define: the second derivative of {name} is 0 wherever it was looked at, so nothing would pull a rate to "
            "its target"
        )


def _rate(x: Any) -> str:
    return f"u = {math.exp(x):.3g}"


def _checked(name: str, values: Callable[..., list[Any]], x: Any) -> list[Any]:
    found = values(x)
    if any(v != v or abs(v) == math.inf for v in found):
        raise ValueError(f"define: {name} or a derivative of it is no number at {_rate(x)}; phi is one of all u > 0")
    return found


def _boundaries(x: Any, *expressions: Any) -> Iterator[tuple[Any, Any]]:
    """(condition, x) where the two sides of a condition of the expressions change their order."""
    import sympy
    from sympy.core.relational import Relational

    tests = set().union(*(e.atoms(Relational) for e in expressions))
    for test in sorted(tests, key=sympy.default_sort_key):
        difference = numbers([x], test.lhs - test.rhs)
        at = [(x_, difference(x_)[0]) for x_ in _SAMPLE]
        for (low, below), (high, above) in itertools.pairwise(at):
            if below * above < 0 or below == 0:
                yield test, _crossing(difference, low, high) if below else low


def _crossing(difference: Callable[..., list[Any]], low: Any, high: Any) -> Any:
    rising = difference(low)[0] < 0
    high = high + 0 * difference(high)[0]  # of so many digits
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = difference(middle)[0]
        if found == 0:
            return middle
        low, high = (middle, high) if (found < 0) == rising else (low, middle)
    return high


def _is_of(test: Any, other: Any) -> bool:
    """Whether two conditions compare the same."""
    difference, others = test.lhs - test.rhs, other.lhs - other.rhs
    return difference == others or difference == -others


def _of_equal(test: Any) -> Any:
    """What a condition is where its two sides are equal."""
    import sympy

    return sympy.true if isinstance(test, (sympy.Eq, sympy.Ge, sympy.Le)) else sympy.false


def _check_boundary(name: str, x: Any, expressions: tuple[Any, Any, Any], test: Any, at: Any) -> None:
    from sympy.core.relational import Relational

    values = numbers([x], *expressions)
    left, right = (_checked(name, values, at + side) for side in (-_BESIDE, _BESIDE))
    # There alone it may be another function; a rate of 1, of which the log rate is 0, is such a place.
    of_equality = {t: _of_equal(t) for e in expressions for t in e.atoms(Relational) if _is_of(t, test)}
    there = _checked(name, numbers([x], *(e.xreplace(of_equality) for e in expressions)), at)
    sides = [left, there, right]
    u = math.exp(at)
    of_value = sum(abs(v) + u * abs(s) for v, s, _ in (left, right))
    of_slope = sum(abs(s) + u * abs(c) for _, s, c in (left, right))
    for (v, s, _), (next_v, next_s, _) in itertools.pairwise(sides):
        if abs(next_v - v) > _EVEN * of_value:
            raise ValueError(
                f"define: {name} is not convex: it jumps from {float(v):.6g} to {float(next_v):.6g} at {_rate(at)}"
            )
        if next_s - s < -_EVEN * of_slope:
            raise ValueError(
                f"define: {name} is not convex: its slope falls from {float(s):.6g} to {float(next_s):.6g} at "
                f"{_rate(at)}"
            )


def _limit(near: Any, nearer: Any, factor: float) -> float | None:
    """What two values go to, of which one is much larger where that is infinite or 0; None where it is neither."""
    if nearer != nearer or abs(near) == math.inf:
        return None
    if abs(nearer - near) <= 1e-3 * abs(nearer):
        return float(nearer)
    if abs(nearer) * factor <= abs(near):
        return 0.0
    if abs(nearer) >= factor * abs(near):
        return math.inf if nearer > 0 else -math.inf
    return None


def at_zero(name: str, x: Any, e: Any) -> float:
    """The limit of an expression at u -> 0; infinite where it grows without one.

    Raises:
        ValueError: what is computed there does not tell it.
    """
    values = numbers([x], e)
    # With so many digits that u beside 1 is not lost, or that a number shows which has cancelled.
    (before,), (near,) = (values(at, digits=_MANY) for at in _NEAR)
    again = [values(at, digits=2 * _MANY)[0] for at in _NEAR]
    if all(abs(v - w) <= 1e-3 * abs(w) for v, w in zip((before, near), again, strict=True)):
        limit = _limit(before, near, 1e3)
        if limit is not None:
            return limit
        # A logarithm comes to its limit so slowly that it is followed to where u is lost, if that agrees with this.
        limit = _limit(near, values(_FAR)[0], 2.0)
        if limit is not None and (abs(near) - abs(before) >= 0) == (limit != 0 and abs(limit) >= abs(near)):
            return limit
    raise ValueError(
        f"define: a limit of a derivative of {name} at a rate of 0 cannot be told: what it is computed by cancels or "
        "is no number there; write phi with log1p or expm1 where it has log(1 + u) or exp(u) - 1"
    )
