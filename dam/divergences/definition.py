"""A divergence from a convex function: its derivatives, how they are written, and where float32 holds them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dam import derive
from dam.divergences import digits, texts
from dam.divergences.texts import Range

# Log rates at which floating point is compared with many digits.
_GRID = sorted(
    [0.5 * n for n in range(-20, 21)]
    + [sign * x for sign in (-1.0, 1.0) for x in (*range(11, 90, 2), 100, 200, 500, 1000, 10_000, 100_000)]
)
# Of an expression that is multiplied out: operations it may have, and terms or degrees that come of it.
_OPERATIONS, _TERMS = 150, 64
_ROUNDING = 2.0**-18  # relative, of a number that a sum or a gradient is made of; the kernels' own exp has 2^-22
_SMALLEST, _LARGEST = 2.0**-120, 2.0**100  # what is 0 to float32, and what 1024 of may be added in it
# Of doubles it is beside what a rate of about 1 adds to the same sum, of which there may be 2^17.
_NEGLIGIBLE = 2.0**-40
# Log rates that float64 should hold: of the ways to write an expression the one is taken that holds most of the first,
# and a message says what does not hold all of the second.
REMEDY = "write {} so that nothing cancels or overflows, by log1p, expm1, logaddexp or softplus"
_TRUSTED, _ORDINARY = 100.0, 25.0


@dataclass(frozen=True, eq=False)
class Divergence:
    """A Bregman divergence that `define` made of a convex function; `rate_matching_loss` takes it.

    Attributes:
        name: of the function.
        key: hash of what it computes, by which the operator finds it.
        phi, slope, curvature: sources of the function and of its first and second derivative.
        slope_at_zero, force_at_zero: limits of phi'(u) and phi''(u) u at a rate of 0.
        range: log rates for which kernels compute in float32; where a tile of a row has others, in float64.
        doubles: log rates for which float64 holds what is computed, to a relative 2^-18.
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
    doubles: Range
    cpp: str
    triton: str | None
    torch: str
    terms: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)
    at_target: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes and files its texts go; there it is what `define` would make of the same function."""
        return _restored, ({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr},)


def _restored(texts_and_limits: dict[str, Any]) -> Divergence:
    space = functions_of(texts_and_limits["torch"])
    made = Divergence(**texts_and_limits, terms=space["terms"], at_target=space["at_target"])
    return DEFINED.setdefault(made.key, made)


def define(phi: Callable[[Any], Any]) -> Divergence:
    """The Bregman divergence of a convex function of positive numbers, with kernels of its own.

        D(w, u) = sum_v phi(w) - phi(u) - phi'(u) (w - u)

    phi' and phi'' are those of `dam.derive`. The kernels of the CPU are C++, compiled at the first call into a cache
    folder (docs/derive.md); those of Triton are written there. Nothing is run but the derivatives' own text.

    Args:
        phi: a function or lambda of one number u > 0, in math, numpy or torch calls, with assignments, conditions,
            loops over ranges of constants, of 64 turns in all, and calls of functions of numbers; parameters with
            defaults keep them. Free names are constants as they are now.

    Returns:
        A `Divergence`, for `rate_matching_loss`.

    Raises:
        DerivativeError: phi is not a function of numbers alone, or has no derivative; the message shows the line.
        ValueError: phi is not convex, or is no number at some u of 1e-30 to 1e30, which the message names; or float64
            does not hold what is derived of it at a rate of 1.

    Warns:
        RuntimeWarning: float64 does not hold it at all log rates of -25 to 25.
    """
    import sympy

    from dam.derive import emit, functions, scalar, unroll

    source, written_out = functions.of(phi), unroll.unrolled(phi, 1)
    x = sympy.Symbol("x", real=True)
    u = sympy.exp(x)
    with unroll.in_own_lines(written_out):
        value = scalar.expression(written_out, u)  # first, so that what is refused is shown in its own lines
        slope_of = derive.grad(written_out)
        curvature_of = derive.grad(slope_of)
        slope, curvature = scalar.expression(slope_of, u), scalar.expression(curvature_of, u)
    name = "phi" if phi.__name__ == "<lambda>" else source.name
    digits.check_convex(name, x, value, slope, curvature)

    pull = slope * u - value
    written, limits, doubles = _best(x, {"pull": pull, "curvature": curvature * u**2})
    at_target = {"slope": slope, "force": curvature * u}
    # Computed in float64. Beside a slope counts the pull, to which weights of a rate's size add it.
    target, _, of_target = _best(x, at_target, {"slope": pull / u})
    doubles = _common(doubles, of_target)
    _check_doubles(name, doubles)
    of_zero = [digits.at_zero(name, x, e) for e in at_target.values()]
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
    try:
        cpp, torch_text = texts.cpp(parts), texts.torch(parts)
    except emit.Unwritable as error:
        raise source.refuse(source.node, f"{name} has no kernel: {error}") from None
    try:
        triton: str | None = texts.triton(parts)
    except emit.Unwritable:
        triton = None
    return _restored(
        {
            "name": name,
            "key": hash_of(cpp),
            "phi": text,
            "slope": derive.source(slope_of),
            "curvature": derive.source(curvature_of),
            "slope_at_zero": of_zero[0],
            "force_at_zero": of_zero[1],
            "range": limits,
            "doubles": doubles,
            "cpp": cpp,
            "triton": triton,
            "torch": torch_text,
        }
    )


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


def functions_of(text: str, library: Any = torch) -> dict[str, Any]:
    """The functions of a text that this package wrote, over torch or what has its functions."""
    space: dict[str, Any] = {"torch": library}
    exec(compile(text, "<dam.divergences>", "exec"), space)
    return space


def text_of(phi: Callable[[Any], Any], source: Any) -> str:
    """The lines of a function, of a lambda its own expression alone."""
    if phi.__name__ == "<lambda>":
        return f"lambda {ast.unparse(source.node.args)}: {ast.unparse(source.node.body[0].value)}"
    first = source.node.lineno - 1
    return "\n".join(source.lines[first : source.node.end_lineno])


class _Flushing:
    """torch's functions, to which what is below 2^-125 is 0: to kernels powers of a rate are, on a GPU all may be."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def flushed(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.masked_fill(value.abs() < 2.0**-125, 0.0)

        return lambda *arguments: flushed(getattr(torch, name)(*map(flushed, arguments)))


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


def _best(x: Any, wanted: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> tuple[Any, Range, Range]:
    """The computation of what kernels add up, and where float32 and float64 hold it.

    Each expression as it was derived, expanded, and over one denominator: the one that float64 holds at most rates, of
    several the one that float32 does, of several the shortest.

    Args:
        beside: expressions whose size counts too in that of one that is wanted, where these are for targets.
    """
    import sympy
    from sympy.codegen.cfunctions import expm1

    from dam.derive import emit

    forms: list[Callable[[Any], Any]] = [lambda e: e, _expanded, _cancelled]
    if any(e.has(expm1) for e in wanted.values()):
        forms.append(_of_exponentials)
    chosen, limits, doubles = {}, Range(-math.inf, math.inf), Range(-math.inf, math.inf)
    for name, e in wanted.items():
        values = digits.numbers([x], e, beside.get(name, sympy.Integer(0)) if beside else sympy.Integer(0))
        exact, sizes = zip(*(map(float, values(at)) for at in _GRID), strict=True)
        ways: list[tuple[Any, ...]] = []
        for form in forms:
            try:
                way = by_branch(e, form)
            except (sympy.PolynomialError, NotImplementedError):
                continue
            if any(way == other for *_, other, _, _ in ways):
                continue
            one = emit.program({name: way}, x)
            holds, wide = (
                _range_of(one, exact, sizes, beside is not None, dtype) for dtype in (torch.float32, torch.float64)
            )
            ways.append(
                (-_span(wide, _TRUSTED), -_span(holds, _GRID[-1]), sympy.count_ops(way), len(ways), way, holds, wide)
            )
        *_, chosen[name], holds, wide = min(ways, key=lambda w: w[:4])
        limits, doubles = _common(limits, holds), _common(doubles, wide)
    if not limits.lowest < 0 < limits.highest:
        limits = Range(math.inf, -math.inf)  # float64 throughout
    return emit.program(chosen, x), limits, doubles


def _span(found: Range, within: float) -> float:
    return min(found.highest, within) - max(found.lowest, -within)


def _common(a: Range, b: Range) -> Range:
    return Range(max(a.lowest, b.lowest), min(a.highest, b.highest))


def _check_doubles(name: str, found: Range) -> None:
    how = REMEDY.format("phi")
    if not found.lowest <= 0 <= found.highest:
        raise ValueError(f"define: float64 does not hold what is derived of {name} at a rate of 1; {how}")
    if found.lowest > -_ORDINARY or found.highest < _ORDINARY:
        warnings.warn(
            f"dam: float64 holds what is derived of {name} only for log rates of {found.lowest:g} to "
            f"{found.highest:g}, and others are computed wrongly: keep to these, or {how}.",
            RuntimeWarning,
            stacklevel=3,
        )


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


def _of_exponentials(e: Any) -> Any:
    """The same without expm1, whose 1 may cancel with another."""
    import sympy
    from sympy.codegen.cfunctions import expm1

    return _expanded(e.replace(expm1, lambda a: sympy.exp(a) - 1))


def _range_of(one: Any, exact: Sequence[float], beside: Sequence[float], weighed: bool, dtype: torch.dtype) -> Range:
    """Of the grid the part around 0 on which floating point is close to the exact values.

    Args:
        beside: sizes that count beside theirs.
        weighed: whether they are added times a target's weight.
    """
    narrow = dtype == torch.float32
    text, grid = texts.torch_function("compute", one), torch.tensor(_GRID, dtype=dtype, device="cpu")
    # Floats are held if it does not matter whether the smallest are kept, which kernels do some way and some the other.
    ways = [functions_of(text, library)["compute"](grid)[0] for library in (torch, _Flushing())[: 1 + narrow]]
    small = _NEGLIGIBLE * max(abs(v) for x, v in zip(_GRID, exact, strict=True) if abs(x) <= 1.0)
    good = []
    for n, (x, theirs, *all_of_ours) in enumerate(zip(_GRID, exact, *(way.tolist() for way in ways), strict=True)):
        around = [*exact[max(n - 1, 0) : n], *exact[n + 1 : n + 2]]
        # Beside a sign's change what counts is the size around it.
        size = max(map(abs, (theirs, *around))) if any(v * theirs <= 0 for v in around) else abs(theirs)
        # A weight may be 1, or of the rate's size.
        least = _SMALLEST if narrow else small * (math.exp(-min(max(x, 0.0), 700.0)) if weighed else 1.0)
        bound = _ROUNDING * (size + abs(beside[n])) + least
        close = all(ours == theirs or abs(ours - theirs) <= bound for ours in all_of_ours)
        exponents = all(float(k) * x <= 86.0 for _, k in one.powers)  # what exp_each takes
        held = exponents and all(abs(ours) <= _LARGEST for ours in all_of_ours)
        good.append(bool(close and (held or not narrow)))
    middle = _GRID.index(0.0)
    if not good[middle]:
        return Range(math.inf, -math.inf)
    low = next((n for n in range(middle, -1, -1) if not good[n]), -1)
    high = next((n for n in range(middle, len(good)) if not good[n]), len(good))
    return Range(
        -math.inf if low < 0 else _GRID[low + 1],
        math.inf if high == len(good) else _GRID[high - 1],
    )
