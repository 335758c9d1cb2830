"""A divergence from a convex function: its derivatives, how they are written, and where float32 holds them."""

from __future__ import annotations

import ast
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dam import derive
from dam.divergences import texts
from dam.divergences.texts import Range

# Logarithms of the rates at which phi is looked at: 1e-30 to 1e30, and 1 itself, where a kink often is, is none.
_SAMPLE = [0.58 * (n + 0.37) for n in range(-119, 119)]
_DIGITS = 120  # so that what cancels there has some left
# Log rates at which float32 is compared with these digits.
_GRID = sorted(
    [0.5 * n for n in range(-20, 21)]
    + [sign * x for sign in (-1.0, 1.0) for x in (*range(11, 90, 2), 100, 200, 500, 1000, 10_000, 100_000)]
)
# Of an expression that is multiplied out: operations it may have, and terms or degrees that come of it.
_OPERATIONS, _TERMS = 150, 64
_ROUNDING = 2.0**-18  # relative, of a number that a sum or a gradient is made of; the kernels' own exp has 2^-22
_SMALLEST, _LARGEST = 2.0**-120, 2.0**100  # what is 0 to float32, and what 1024 of may be added in it


@dataclass(frozen=True, eq=False)
class Divergence:
    """A Bregman divergence that `define` made of a convex function; `rate_matching_loss` takes it.

    Attributes:
        name: of the function.
        key: hash of what it computes, by which the operator finds it.
        phi, slope, curvature: sources of the function and of its first and second derivative.
        slope_at_zero, force_at_zero: limits of phi'(u) and phi''(u) u at a rate of 0.
        range: log rates for which kernels compute in float32; where a tile of a row has others, in float64.
        cpp, triton: sources of the kernels; triton is None where Triton lacks a function.
        torch: the source of the functions `terms` and `at_target` of log rates.
    """

    name: str
    key: str
    phi: str
    slope: str
    curvature: str
    slope_at_zero: float
    force_at_zero: float
    range: Range
    cpp: str
    triton: str | None
    torch: str
    terms: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)
    at_target: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)


def define(phi: Callable[[Any], Any]) -> Divergence:
    """The Bregman divergence of a convex function of positive numbers, with kernels of its own.

        D(w, u) = sum_v phi(w) - phi(u) - phi'(u) (w - u)

    phi' and phi'' are those of `dam.derive`. The kernels of the CPU are C++, compiled at the first call into a cache
    folder (docs/derive.md); those of Triton are written there. Nothing is run but the derivatives' own text.

    Args:
        phi: a function or lambda of one number u > 0, in math, numpy or torch calls, with assignments, conditions and
            calls of functions of numbers; parameters with defaults keep them. Free names are constants as they are now.

    Returns:
        A `Divergence`, for `rate_matching_loss`.

    Raises:
        DerivativeError: phi is not a function of numbers alone, or has no derivative; the message shows the line.
        ValueError: phi is not convex, or is no number at some u of 1e-30 to 1e30, which the message names.
    """
    import sympy

    from dam.derive import emit, functions, scalar

    source = functions.of(phi)
    x = sympy.Symbol("x", real=True)
    u = sympy.exp(x)
    value = scalar.expression(phi, u)  # first, so that what is refused is shown in its own lines
    slope_of = derive.grad(phi)
    curvature_of = derive.grad(slope_of)
    slope, curvature = scalar.expression(slope_of, u), scalar.expression(curvature_of, u)
    name = "phi" if phi.__name__ == "<lambda>" else source.name
    _check_convex(name, _numbers(x, value, slope, curvature))

    wanted = {"pull": slope * u - value, "curvature": curvature * u**2}
    written, limits = _best(x, wanted)
    at_target = {"slope": slope, "force": curvature * u}
    target, _ = _best(x, at_target)  # computed in float64; what rounds well in float32 does there
    of_zero = [_at_zero(_numbers(x, e)) for e in at_target.values()]
    text = text_of(phi, source)
    parts = texts.Parts(
        name=name,
        phi=text,
        hash=hash_of(text, derive.source(slope_of), derive.source(curvature_of)),
        terms=written,
        at_target=target,
        slope_at_zero=of_zero[0],
        force_at_zero=of_zero[1],
        range=limits,
    )
    cpp, torch_text = texts.cpp(parts), texts.torch(parts)
    try:
        triton: str | None = texts.triton(parts)
    except emit.Unwritable:
        triton = None
    space = functions_of(torch_text)
    made = Divergence(
        name=name,
        key=hash_of(cpp),
        phi=text,
        slope=derive.source(slope_of),
        curvature=derive.source(curvature_of),
        slope_at_zero=of_zero[0],
        force_at_zero=of_zero[1],
        range=limits,
        cpp=cpp,
        triton=triton,
        torch=torch_text,
        terms=space["terms"],
        at_target=space["at_target"],
    )
    return DEFINED.setdefault(made.key, made)


def hash_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


# All that were defined in this process, by key: the operator is given the key.
DEFINED: dict[str, Divergence] = {}


def half_square(u):
    return u * u / 2


# Those that have a name.
SHIPPED: dict[str, Callable[[Any], Any]] = {"l2": half_square}


def defined(key: str) -> Divergence:
    """The divergence of that key, or of that name.

    Raises:
        ValueError: none was defined in this process.
    """
    if key in SHIPPED:
        return _shipped(key)
    if key not in DEFINED:
        raise ValueError(
            f"rate_matching_loss: no divergence with key {key!r} is defined in this process; call "
            "dam.divergences.define here with the same function"
        )
    return DEFINED[key]


@functools.cache
def _shipped(name: str) -> Divergence:
    return define(SHIPPED[name])


def functions_of(text: str) -> dict[str, Any]:
    """The functions of a text that this package wrote, over torch."""
    space: dict[str, Any] = {"torch": torch}
    exec(compile(text, "<dam.divergences>", "exec"), space)
    return space


def text_of(phi: Callable[[Any], Any], source: Any) -> str:
    """The lines of a function, of a lambda its own expression alone."""
    if phi.__name__ == "<lambda>":
        return f"lambda {ast.unparse(source.node.args)}: {ast.unparse(source.node.body[0].value)}"
    first = source.node.lineno - 1
    return "\n".join(source.lines[first : source.node.end_lineno])


# ---- numbers


def _numbers(x: Any, *expressions: Any) -> Callable[[float], list[float]]:
    """Values of expressions at a log rate, to many digits; NaN where there is none."""
    import mpmath
    import sympy

    own = {"where": lambda test, a, b: a if test else b, "log1p": mpmath.log1p, "expm1": mpmath.expm1}
    found = [sympy.lambdify(x, e, modules=[own, "mpmath"]) for e in expressions]

    def values(at: float) -> list[Any]:
        with mpmath.workdps(_DIGITS):
            return [_value(f, mpmath.mpf(at)) for f in found]

    return values


def _value(f: Callable[[Any], Any], at: Any) -> Any:
    try:
        value = f(at)
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan
    return math.nan if hasattr(value, "imag") and value.imag != 0 else value


def _check_convex(name: str, values: Callable[[float], list[Any]]) -> None:
    before, bent = -math.inf, False
    for x in _SAMPLE:
        value, slope, curvature = values(x)
        at = f"u = {math.exp(x):.3g}"
        if any(v != v or abs(v) == math.inf for v in (value, slope, curvature)):
            raise ValueError(f"define: {name} or a derivative of it is no number at {at}; phi is one of all u > 0")
        if curvature < 0:
            raise ValueError(f"define: {name} is not convex: its second derivative is {float(curvature):.3g} at {at}")
        if slope < before:
            raise ValueError(f"define: {name} is not convex: its slope falls to {float(slope):.3g} before {at}")
        before, bent = slope, bent or curvature > 0
    if not bent:
        raise ValueError(
            f"define: the second derivative of {name} is 0 wherever it was looked at, so nothing would pull a rate to "
            "its target"
        )


def _at_zero(values: Callable[[float], list[Any]]) -> float:
    """The limit at u -> 0, infinite where there is none."""
    (near,), (nearer,) = values(-1e6), values(-1e8)
    if abs(nearer - near) <= 1e-3 * max(1.0, abs(nearer)):
        return 0.0 if abs(nearer) < 1e-7 else float(nearer)
    return math.inf if nearer > 0 else -math.inf


# ---- ways to write an expression


def by_branch(e: Any, form: Callable[[Any], Any]) -> Any:
    """A form of each branch, so that no branch is within a sum or a product."""
    import sympy

    from dam.derive.scalar import where

    # In an order that does not change from process to process, or the sources and their hashes would.
    branches = sorted(e.atoms(where), key=sympy.default_sort_key)
    found = next((part for part in branches if not part.args[0].has(where)), None)
    if found is None:
        return form(e)
    test = found.args[0]

    def side(index: int) -> Any:
        return e.replace(lambda part: isinstance(part, where) and part.args[0] == test, lambda part: part.args[index])

    return where(test, by_branch(side(1), form), by_branch(side(2), form))


def _best(x: Any, wanted: Mapping[str, Any]) -> tuple[Any, Range]:
    """The computation of what kernels add up in float32, and where that holds.

    Each expression as it was derived, expanded, and over one denominator: the one that rounds well over most rates, of
    several the shortest.
    """
    import sympy

    from dam.derive import emit

    forms: Sequence[Callable[[Any], Any]] = (lambda e: e, _expanded, _cancelled)
    chosen, limits = {}, Range(-math.inf, math.inf)
    for name, e in wanted.items():
        exact = [float(v[0]) for v in map(_numbers(x, e), _GRID)]
        ways: list[tuple[Any, ...]] = []
        for form in forms:
            try:
                way = by_branch(e, form)
            except (sympy.PolynomialError, NotImplementedError):
                continue
            if any(way == other for *_, other, _ in ways):
                continue
            one = emit.program({name: way}, x)
            holds = _range_of(one, exact)
            span = min(holds.highest, _GRID[-1]) - max(holds.lowest, _GRID[0])
            ways.append((-span, sympy.count_ops(way), len(ways), way, holds))
        *_, chosen[name], holds = min(ways, key=lambda w: w[:3])
        limits = Range(max(limits.lowest, holds.lowest), min(limits.highest, holds.highest))
    if not limits.lowest < 0 < limits.highest:
        limits = Range(math.inf, -math.inf)  # float64 throughout
    return emit.program(chosen, x), limits


def _is_small(e: Any) -> bool:
    """Whether not many terms come of multiplying out."""
    import sympy

    powers = [p for p in e.atoms(sympy.Pow) if p.base.is_Add and p.exp.is_Integer]
    return sympy.count_ops(e) <= _OPERATIONS and all(len(p.base.args) ** abs(int(p.exp)) <= _TERMS for p in powers)


def _expanded(e: Any) -> Any:
    import sympy

    return sympy.expand(e) if _is_small(e) else e


def _cancelled(e: Any) -> Any:
    """Over one denominator, in lowest terms; as it is where powers of the rate have no common root to speak of."""
    import sympy

    e = _expanded(e)
    steps = [k for exp in e.atoms(sympy.exp) if (k := exp.args[0].as_coeff_Mul()[0]).is_Rational]
    root = math.lcm(*(int(k.q) for k in steps))
    return sympy.cancel(e) if _is_small(e) and all(abs(k * root) <= _TERMS for k in steps) else e


def _range_of(one: Any, exact: list[Any]) -> Range:
    """Of the grid the part around 0 on which float32 is close."""
    run = functions_of(texts.torch_function("compute", one))["compute"]
    (found,) = run(torch.tensor(_GRID, dtype=torch.float32, device="cpu"))
    good = []
    for n, (x, ours, theirs) in enumerate(zip(_GRID, found.tolist(), exact, strict=True)):
        around = [*exact[max(n - 1, 0) : n], *exact[n + 1 : n + 2]]
        # Beside a sign's change what counts is the size around it.
        size = max(map(abs, (theirs, *around))) if any(v * theirs <= 0 for v in around) else abs(theirs)
        held = all(float(k) * x <= 86.0 for _, k in one.powers)  # what exp_each takes
        close = abs(ours - theirs) <= _ROUNDING * size + _SMALLEST
        good.append(bool(held and close and abs(ours) <= _LARGEST))
    middle = _GRID.index(0.0)
    if not good[middle]:
        return Range(math.inf, -math.inf)
    low = next((n for n in range(middle, -1, -1) if not good[n]), -1)
    high = next((n for n in range(middle, len(good)) if not good[n]), len(good))
    return Range(
        -math.inf if low < 0 else _GRID[low + 1],
        math.inf if high == len(good) else _GRID[high - 1],
    )
