"""The sources of a divergence's kernels, for people to read: C++, Triton, and functions of torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dam.derive import emit


class Range(NamedTuple):
    """Log rates for which float32 computes what a kernel sums and what its gradient is made of."""

    lowest: float
    highest: float


class Parts(NamedTuple):
    """What the sources are made of; `terms` and `at_target` compute (pull, curvature) and (slope, force)."""

    name: str
    phi: str
    hash: str  # of it and of its derivatives' sources
    terms: emit.Program
    at_target: emit.Program
    slope_at_zero: float
    force_at_zero: float
    range: Range


_LARGEST_EXPONENT = 86.0  # of the vectors' exp without care, csrc/core/math.h

_MEANING = {
    "pull": "phi'(u) u - phi(u)",
    "curvature": "phi''(u) u^2",
    "slope": "phi'(u)",
    "force": "phi''(u) u",
}


def _meaning(program: emit.Program) -> str:
    return ", ".join(f"{name} = {_MEANING[name]}" for name, _ in program.outputs)


# ---- torch


def torch_function(name: str, program: emit.Program, variables: str = "x") -> str:
    """A function that returns the program's outputs; the first variable is that of its powers."""
    from dam.derive import emit

    first = variables.split(",")[0]
    lines = _powers(program, f"torch.exp({{}}{first})")
    outputs = ", ".join(output for output, _ in program.outputs)
    lines += [*program.lines(emit.TORCH._replace(broadcast=f"torch.full_like({first}, {{}})")), f"return ({outputs},)"]
    return f"def {name}({variables}):\n" + emit.indented(lines, 1)


def _powers(program: emit.Program, exponential: str) -> list[str]:
    """Statements of the powers of exp of a variable, by products where they are such."""
    lines = []
    for power, k in program.powers:
        base = program.power_of(k)
        lines.append(f"{power} = {exponential.format(_times(k)) if base is None else _product(*base)}")
    return lines


def _product(base: str, times: int) -> str:
    return f"1 / {base}" if times == -1 else " * ".join([base] * times)


def _times(k: Any) -> str:
    return {1: "", -1: "-"}.get(k, f"{float(k)!r} * ")


def torch(parts: Parts) -> str:
    return f"{torch_function('terms', parts.terms)}\n\n{torch_function('at_target', parts.at_target)}"


# ---- C++


def cpp(parts: Parts) -> str:
    return f"""\
// rate_matching_loss for the divergence of a convex function, written by dam.divergences.define:
//
{commented(parts.phi, "//")}
//
// Hash of this and of its derivatives: {parts.hash}
// u = exp(x) is the rate of a destination whose logit is x. The kernel around these functions is csrc/cpu/defined.h.
#include "cpu/defined.h"

DAM_BEGIN

struct Divergence {{
  // Log rates for which floats hold what is computed; for others it is doubles.
  static constexpr float LOWEST = {_constant(parts.range.lowest, "f")}, HIGHEST = {_constant(parts.range.highest, "f")};
  // The size of log rates below which floats need no care.
  static constexpr float NEAR = {_constant(_near(parts), "f")};
  // At a rate of 0.
  static constexpr double SLOPE_AT_ZERO = {_constant(parts.slope_at_zero)};
  static constexpr double FORCE_AT_ZERO = {_constant(parts.force_at_zero)};

{cpp_function("terms", parts.terms, _meaning(parts.terms))}
{cpp_function("at_target", parts.at_target, _meaning(parts.at_target))}}};

DAM_END

DAM_DEFINED(Divergence)
"""


def _near(parts: Parts) -> float:
    """Size of log rates up to which float32 holds what is computed and no exponential is 0 or infinite."""
    exponents = [abs(float(k)) for _, k in parts.terms.powers if parts.terms.power_of(k) is None]
    return min(_LARGEST_EXPONENT / max([1.0, *exponents]), -parts.range.lowest, parts.range.highest)


def _constant(value: float, suffix: str = "") -> str:
    if math.isinf(value):
        return ("-" if value < 0 else "") + ("HUGE_VALF" if suffix else "HUGE_VAL")
    return f"{float(value)!r}{suffix}"


def cpp_function(name: str, program: emit.Program, meaning: str, variables: str = "x") -> str:
    """The same, of C++, over arrays of vectors or of one double."""
    from dam.derive import emit

    outputs, every = [output for output, _ in program.outputs], variables.split(", ")
    taken = ", ".join([f"const F (&{v}s)[N]" for v in every] + [f"F (&{output}s)[N]" for output in outputs])
    before, within = [], [f"[[maybe_unused]] const F {v} = {v}s[i];" for v in every]
    for power, k in program.powers:
        base = program.power_of(k)
        if base is None:
            before += [f"F {power}s[N];", f"fn::raised<IS_NEAR>({power}s, {every[0]}s, {float(k)!r});"]
            within.append(f"const F {power} = {power}s[i];")
        else:
            product = f"T(1) / {base[0]}" if base[1] == -1 else _product(*base)
            within.append(f"const F {power} = {product};")
    within += program.lines(emit.CPP)
    within += [f"{output}s[i] = {output};" for output in outputs]
    body = ["using T [[maybe_unused]] = fn::Number<F>;", *before, "for (int i = 0; i < N; ++i) {"]
    body += [f"  {line}" for line in within] + ["}"]
    text = "".join(f"    {line}\n" for line in body)
    head = f"  // {meaning}\n  template <bool IS_NEAR = false, class F, int N>\n  static void {name}({taken}) {{\n"
    return f"{head}{text}  }}\n"


def commented(text: str, mark: str) -> str:
    # A backslash at the end of a comment of C++ would take the next line into it.
    return "\n".join(f"{mark}     {line}".rstrip("\\ \t") for line in text.splitlines())


# ---- Triton


def triton(parts: Parts) -> str:
    """Raises emit.Unwritable where Triton lacks a function."""
    return f'''\
"""rate_matching_loss for the divergence of a convex function, written by dam.divergences.define:

{commented(quoted(parts.phi), "")}

Hash of this and of its derivatives: {parts.hash}
u = exp(x) is the rate of a destination whose logit is x. The kernel that calls these functions is kernels/defined.py.
"""

import triton
import triton.language as tl

from dam.kernels import defined

LOWEST, HIGHEST = {_python(parts.range.lowest)}, {_python(parts.range.highest)}
SLOPE_AT_ZERO, FORCE_AT_ZERO = {_python(parts.slope_at_zero)}, {_python(parts.force_at_zero)}


{triton_function("terms", parts.terms, _meaning(parts.terms))}

{triton_function("at_target", parts.at_target, _meaning(parts.at_target))}'''


def quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _python(value: float) -> str:
    return f'float("{value}")' if math.isinf(value) else repr(float(value))


def triton_function(name: str, program: emit.Program, meaning: str, variables: str = "x") -> str:
    """The same, of Triton, with what it means."""
    from dam.derive import emit

    first = variables.split(",")[0]
    lines = [f'"""{meaning}."""', *_powers(program, f"tl.exp({{}}{first})")]
    outputs = ", ".join(output for output, _ in program.outputs)
    lines += [*program.lines(emit.TRITON), f"return {outputs}"]
    return f"@triton.jit\ndef {name}({variables}):\n" + emit.indented(lines, 1)
