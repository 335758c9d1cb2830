"""Rates of chains as functions of a network's numbers, which `dam.rate_ratio` takes: with kernels of their own."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, generated, triton
from dam.divergences import definition, digits, texts
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _op, _rows
from dam.ops.rate_ratio import RateRatio, outputs

_VARIABLES = "z, y, x"
_MEANING = {"rate": "u(z, y, x)", "log_rate": "log u(z, y, x)"}
# Numbers of a network, and destinations and states, at which a rate is looked at.
_ROUNDING, _SMALLEST = 2.0**-30, 1e-300  # relative, and what is 0 to the kernels' exponentials of doubles
_NUMBERS, _PLACES = [-20.0 + 2.37 * n for n in range(18)], (0.0, 1.0, 7.0, 1000.0)


@dataclass(frozen=True, eq=False)
class Rate:
    """A rate that `define` made of a function; `dam.rate_ratio` takes it.

    Attributes:
        name, source: of the function, and its lines.
        key: hash of what it computes.
        of_state: whether it takes the state.
        cpp, triton: sources of the kernels; triton is None where Triton lacks a function.
        torch: the source of the functions `rate` and `log_rate`.
    """

    name: str
    source: str
    key: str
    of_state: bool
    cpp: str
    triton: str | None
    torch: str
    rate: Callable[..., tuple[Tensor]] = field(repr=False)
    log_rate: Callable[..., tuple[Tensor]] = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes and files its texts go; there it is what `define` would make of the same function."""
        return _restored, ({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr},)

    def ratio(
        self,
        logits: Tensor,
        base_logits: Tensor,
        target: Tensor,
        *,
        state: Tensor | None,
        exclude: int | Tensor,
        suppress: Tensor | Sequence[int] | None,
    ) -> RateRatio:
        """`dam.rate_ratio` of this rate."""
        op = "rate_ratio"
        x, lead = _checks.rows(op, "logits", logits, "V")
        base, _ = _checks.rows(op, "base_logits", base_logits, "V")
        _checks.like(op, "base_logits", base_logits, "logits", logits)
        targets = _checks.target(op, target, lead, x)
        if self.of_state and state is None:
            raise ValueError(f"{op}: {self.name} is a rate of the state too: give state, int64 {list(lead)}")
        states = None if state is None or not self.of_state else _state(op, state, lead, x)
        excluded = _excluded.checked(op, exclude, suppress, lead, x.shape[1], x)
        targets, never = _excluded.split(targets, excluded)
        backend = choice.choose(op, _IMPLEMENTATIONS, x)
        log_ratio, gap = _defined_rate_ratio(x.detach(), base.detach(), targets, states, *excluded, self.key, backend)
        if never is not None:
            log_ratio = torch.where(never, torch.nan, log_ratio)
        return RateRatio(log_ratio.view(target.shape), _rows.unflattened(gap, lead))


def _restored(texts_of_rate: dict[str, Any]) -> Rate:
    space = definition.functions_of(texts_of_rate["torch"])
    made = Rate(**texts_of_rate, rate=space["rate"], log_rate=space["log_rate"])
    return DEFINED.setdefault(made.key, made)


def _state(op: str, state: Tensor, lead: torch.Size, reference: Tensor) -> Tensor:
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != lead:
        told = f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"{op}: state must be int64 {list(lead)}; got {told}")
    _checks.same_device(op, "state", state, reference)
    return _checks.flat(state)


def define(rate: Callable[..., Any]) -> Rate:
    """The rate of a jump as a function of the network's number for it, with kernels of its own.

    The kernels compute in float64: C++ on a CPU, compiled at the first call (docs/derive.md), Triton on a GPU.

    Args:
        rate: u(z), u(z, y) or u(z, y, x) > 0 of the network's number z for destination y, and of y and the state x,
            whose indices it is given as numbers; a function or lambda as `dam.divergences.define` takes them.

    Returns:
        A `Rate`, for `dam.rate_ratio(rate=...)`. A number of -inf is a destination that cannot be reached, whatever the
        rate.

    Raises:
        DerivativeError: it is not a function of numbers alone; the message shows the line.
        ValueError: it is not positive at some z of -20 to 20, or float64 does not hold it there; the message names z.
    """
    import sympy

    from dam.derive import emit, functions, scalar, unroll

    source = functions.of(rate)
    symbols = sympy.symbols("z y x", real=True)
    given = source.node.args
    count = len(given.posonlyargs) + len(given.args) - len(source.defaults)
    if not 1 <= count <= 3:
        raise source.refuse(source.node, "a rate is a function of z, of z and y, or of z, y and x")
    written_out = unroll.unrolled(rate, count)
    with unroll.in_own_lines(written_out):
        value = scalar.expression(written_out, *symbols[:count])
    log_value = definition.by_branch(value, lambda e: sympy.expand_log(sympy.log(e)))
    programs = {name: emit.program({name: e}, symbols[0]) for name, e in (("rate", value), ("log_rate", log_value))}
    name = "rate" if rate.__name__ == "<lambda>" else source.name
    text = definition.text_of(rate, source)
    try:
        of_torch = "\n\n".join(texts.torch_function(f, p, _VARIABLES) for f, p in programs.items())
        cpp = _cpp(text, programs)
    except emit.Unwritable as error:
        raise source.refuse(source.node, f"{name} has no kernel: {error}") from None
    try:
        of_triton: str | None = _triton_text(text, programs)
    except emit.Unwritable:
        of_triton = None
    space = definition.functions_of(of_torch)
    _check_positive(name, digits.numbers(symbols, value, log_value), space["rate"], space["log_rate"])
    return _restored(
        {
            "name": name,
            "source": text,
            "key": definition.hash_of(cpp),
            "of_state": count == 3,
            "cpp": cpp,
            "triton": of_triton,
            "torch": of_torch,
        }
    )


# All that were defined in this process, by key.
DEFINED: dict[str, Rate] = {}


def _defined(key: str) -> Rate:
    if key not in DEFINED:
        raise ValueError(f"rate_ratio: no rate with key {key!r} is defined in this process; call dam.rates.define here")
    return DEFINED[key]


def _check_positive(
    name: str, exact: Callable[..., Any], rate: Callable[..., Any], log_rate: Callable[..., Any]
) -> None:
    """That a rate is positive, and that float64 holds it and its logarithm.

    Args:
        exact: both to many digits, for z, y and x.
    """
    z, places = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (_NUMBERS, _PLACES))
    z, y, x = z[:, None, None], places[:, None], places
    computed = (torch.broadcast_to(f(z, y, x)[0], (len(_NUMBERS), 4, 4)).flatten().tolist() for f in (rate, log_rate))
    points = itertools.product(_NUMBERS, _PLACES, _PLACES)
    for at, found, log_found in zip(points, *computed, strict=True):
        u, log_u = map(float, exact(*at))
        where = "z = {:.3g}, y = {:g}, x = {:g}".format(*at)
        if not (0 <= u < math.inf and -math.inf < log_u < math.inf):  # too small for a double is not 0
            raise ValueError(f"define: {name} must be positive; it is {u:.3g} at {where}")
        held = abs(found - u) <= _ROUNDING * u + _SMALLEST
        if not (held and abs(log_found - log_u) <= _ROUNDING * max(1.0, abs(log_u))):
            raise ValueError(
                f"define: float64 does not hold {name} at {where}: it has {found:.6g}, and {log_found:.6g} for the "
                f"logarithm, where {u:.6g} is right; {definition.REMEDY.format('the rate')}"
            )


# ---- sources


def _cpp(text: str, programs: dict[str, Any]) -> str:
    body = "\n".join(texts.cpp_function(name, p, _MEANING[name], _VARIABLES) for name, p in programs.items())
    return f"""\
// rate_ratio for a rate, written by dam.rates.define:
//
{texts.commented(text, "//")}
//
// Hash of this: {definition.hash_of(text)}
// z is the network's number for destination y, x the state. The kernel around these functions is
// csrc/cpu/defined_rate.h.
#include "cpu/defined_rate.h"

DAM_BEGIN

struct UserRate {{
{body}}};

DAM_END

DAM_DEFINED_RATE(UserRate)
"""


def _triton_text(text: str, programs: dict[str, Any]) -> str:
    body = "\n\n".join(texts.triton_function(name, p, _MEANING[name], _VARIABLES) for name, p in programs.items())
    return f'''\
"""rate_ratio for a rate, written by dam.rates.define:

{texts.commented(texts.quoted(text), "")}

Hash of this: {definition.hash_of(text)}
z is the network's number for destination y, x the state. The kernel that calls these functions is
kernels/defined_rate.py.
"""

import triton
import triton.language as tl

from dam.kernels import defined


{body}'''


# ---- implementations


def _torch(
    rate: Rate, logits: Tensor, base: Tensor, target: Tensor, state: Tensor | None, exclude: Excluded
) -> tuple[Tensor, Tensor]:
    log_ratio, escape_gap = outputs(logits, target)
    columns = logits.shape[1]
    every = torch.arange(columns, device=logits.device, dtype=torch.float64)
    for part in _rows.chunks(logits.shape[0], 2 * columns * _rows.REFERENCE_BYTES):
        ex, index = exclude.part(part), target[part].clamp(min=0)
        count = index.shape[0]
        x = logits.new_zeros((count, 1), dtype=torch.float64) if state is None else state[part, None].double()
        logs, escapes = [], []
        for numbers in (base, logits):
            z = _rows.allowed(numbers[part], ex)
            (u,) = rate.rate(z, every, x)
            escapes.append(torch.where(z == -torch.inf, 0.0, u).sum(dim=1))
            at = z.gather(1, index)
            (log_u,) = rate.log_rate(at, index.double(), x)
            logs.append(torch.where(at == -torch.inf, -torch.inf, log_u))
        log_ratio[part] = torch.where(target[part] >= 0, logs[0] - logs[1], 0.0).to(log_ratio.dtype)
        escape_gap[part] = (escapes[1] - escapes[0]).to(escape_gap.dtype)
    return log_ratio, escape_gap


@functools.cache
def _compiled(key: str) -> Any:
    rate = _defined(key)
    kernel = generated.library(rate.name, rate.cpp).dam_defined_rate
    pointer, index, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kernel.argtypes = [
        *(index, index, code, code, pointer, index, pointer, index, pointer, index),
        *(pointer, pointer, index, pointer, index, pointer, pointer),
    ]
    kernel.restype = None
    return kernel


def _cpu(
    rate: Rate, logits: Tensor, base: Tensor, target: Tensor, state: Tensor | None, exclude: Excluded
) -> tuple[Tensor, Tensor]:
    try:
        kernel = _compiled(rate.key)
    except (generated.NoCompiler, OSError) as error:
        generated.without("rate_ratio", "cpu", f"kernels of rates cannot be compiled here: {error}")
        return _torch(rate, logits, base, target, state, exclude)
    log_ratio, escape_gap = outputs(logits, target)
    target, suppressed = target.contiguous(), address.bits(exclude.suppressed)
    kernel(
        *cpu.shape(logits),
        *address.matrix(logits),
        *address.matrix(base),
        *address.indices(exclude.row),
        address.of(suppressed),
        target.data_ptr(),
        target.shape[1],
        *address.indices(state),
        log_ratio.data_ptr(),
        escape_gap.data_ptr(),
    )
    return log_ratio, escape_gap


@functools.cache
def _written(key: str) -> Any:
    rate = _defined(key)
    assert rate.triton is not None
    return generated.module(rate.name, rate.triton)


def _triton(
    rate: Rate, logits: Tensor, base: Tensor, target: Tensor, state: Tensor | None, exclude: Excluded
) -> tuple[Tensor, Tensor]:
    arguments = (logits, base, target, state, exclude)
    if rate.triton is None:
        generated.without("rate_ratio", "triton", f"Triton lacks a function that {rate.name} calls")
        return _torch(rate, *arguments)
    try:
        module = _written(rate.key)
    except OSError as error:
        generated.without("rate_ratio", "triton", str(error))
        return _torch(rate, *arguments)
    return triton.launcher("defined_rate", "rate_ratio")(module, *arguments)


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"torch": _torch, "cpu": _cpu, "triton": _triton}


@_op.op("defined_rate_ratio")
def _defined_rate_ratio(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    state: Tensor | None,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    rate: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _checks.index_range("rate_ratio", "target", target, logits.shape[1], backend)
    _checks.index_range("rate_ratio", "exclude", exclude, logits.shape[1], backend)
    excluded = Excluded(exclude, suppressed)
    return _IMPLEMENTATIONS[backend](_defined(rate), logits, base_logits, target, state, excluded)


@_defined_rate_ratio.register_fake
def _(logits, base_logits, target, state, exclude, suppressed, rate, backend):
    return outputs(logits, target)
