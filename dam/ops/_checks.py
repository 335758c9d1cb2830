"""Argument checks shared by the ops: every message names the argument, what it got and what it needs."""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FEW = 64  # numbers that Python looks through as fast as an operation of torch is called
LARGEST = sys.float_info.max  # read here: the compiler of torch 2.6 cannot


def renamed(old: str, new: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: keyword `old` still stands for `new`, with a warning; for one release."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                name = function.__name__
                if new in kwargs:
                    raise TypeError(f"{name}: {old} is the old name of {new}; both were given")
                warnings.warn(f"{name}: {old} is now called {new}", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def _is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")


def floating(op: str, name: str, value: Tensor) -> None:
    """A tensor of one of the floating-point dtypes that the ops take."""
    _is_tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64; got {value.dtype}")


def matrix(op: str, name: str, value: Tensor, columns: str) -> None:
    """A 2-D floating-point tensor with unit inner stride and at least one column."""
    floating(op, name, value)
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape [rows, {columns}]; got {list(value.shape)}")
    _inner_dimension(op, name, value)


def rows(op: str, name: str, value: Tensor, columns: str, *, least: int = 1) -> tuple[Tensor, torch.Size]:
    """Floating-point rows [..., columns], at least so many, with unit inner stride as a matrix, and leading dimensions.

    The matrix is a view, or a copy where no row stride describes the leading dimensions.
    """
    floating(op, name, value)
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have shape [..., {columns}]; got []")
    _inner_dimension(op, name, value, least)
    lead = value.shape[:-1]
    return value if len(lead) == 1 else value.reshape(lead.numel(), value.shape[-1]), lead


def _inner_dimension(op: str, name: str, value: Tensor, least: int = 1) -> None:
    if value.shape[-1] < least:
        raise ValueError(f"{op}: {name} must have at least one column; got shape {list(value.shape)}")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} must have stride 1 in its last dimension; got strides {list(value.stride())}. "
            "Call .contiguous() first"
        )


def like(op: str, name: str, value: Tensor, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """Same dtype and device (and shape) as another argument."""
    _is_tensor(op, name, value)
    if shape and value.shape != other.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other_name}, {list(other.shape)}; got {list(value.shape)}"
        )
    if value.dtype != other.dtype:
        kind = value.device.type
        casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        cure = "; autocast casts no argument of this op" if casting else ""
        raise TypeError(f"{op}: {name} must have the dtype of {other_name}, {other.dtype}; got {value.dtype}{cure}")
    same_device(op, name, value, other)


def same_device(op: str, name: str, value: Tensor, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{op}: {name} must be on {reference.device} like the other inputs; got {value.device}")


def head(
    op: str,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    hidden_name: str,
    hidden: Tensor,
    *,
    least: int = 1,
) -> None:
    """A head weight [V, D] of at least so many rows (and bias [V]) that fits hidden [T, D]."""
    matrix(op, weight_name, weight, "D")
    like(op, weight_name, weight, hidden_name, hidden, shape=False)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: {weight_name} must have shape [V, {hidden.shape[1]}] to fit {hidden_name} {list(hidden.shape)}; "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] < least:
        raise ValueError(f"{op}: {weight_name} must have at least one row; got shape {list(weight.shape)}")
    if bias is not None:
        like(op, bias_name, bias, weight_name, weight, shape=False)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: {bias_name} must have shape [{weight.shape[0]}]; got {list(bias.shape)}")


def vector(op: str, name: str, value: Tensor, lead: torch.Size, reference: Tensor) -> Tensor:
    """Floating-point numbers with one entry per row, as a vector."""
    _is_tensor(op, name, value)
    if value.shape != lead:
        raise ValueError(f"{op}: {name} must have shape {list(lead)}; got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point; got {value.dtype}")
    same_device(op, name, value, reference)
    return flat(value)


def flat(value: Tensor) -> Tensor:
    """One entry per row, [...], as a vector."""
    return value if value.dim() == 1 else value.reshape(-1)


def target(op: str, value: Tensor, lead: torch.Size, reference: Tensor, *, one: bool = True) -> Tensor:
    """int64 targets, J per row or (with `one`) one, as [T, J]. Their range is checked where the op runs."""
    _is_tensor(op, "target", value)
    single = one and value.shape == lead
    if not single and (value.dim() != len(lead) + 1 or value.shape[:-1] != lead):
        slots = ", ".join([*map(str, lead), "J"])
        raise ValueError(
            f"{op}: target must have shape {f'{list(lead)} or ' if one else ''}[{slots}]; got {list(value.shape)}"
        )
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64; got {value.dtype}")
    same_device(op, "target", value, reference)
    return value.reshape(reference.shape[0], 1) if single else per_slot(value, reference)


def per_slot(value: Tensor, reference: Tensor) -> Tensor:
    """[..., J] as [T, J]."""
    return value if value.dim() == 2 else value.reshape(reference.shape[0], value.shape[-1])


def exclude(op: str, value: int | Tensor, lead: torch.Size, columns: int, reference: Tensor) -> Tensor | None:
    """Excluded destination per row as int64 [T], or None when every row keeps all of them."""
    if isinstance(value, Tensor):
        if value.shape != lead:
            raise ValueError(
                f"{op}: exclude must be an int or a tensor of shape {list(lead)}; got shape {list(value.shape)}. What "
                "no row may have, however much it is, goes into suppress"
            )
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: exclude must be int64; got {value.dtype}")
        same_device(op, "exclude", value, reference)
        return flat(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: exclude must be an int or an int64 tensor; got {type(value).__name__}")
    if not -1 <= value < columns:
        raise ValueError(f"{op}: exclude must be -1 or in [0, {columns}); got {value}")
    if value == -1:
        return None
    return torch.full((1,), value, dtype=torch.int64, device=reference.device).expand(lead.numel())


def boolean(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {type(value).__name__}")


def number(op: str, name: str, value: float, low: float, high: float, *, zero: bool = False) -> float:
    """A number in [low, high]; with `zero`, also 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if not (low <= value <= high or (zero and value == 0)):
        raise ValueError(f"{op}: {name} must be {'0 or ' if zero else ''}in [{low:g}, {high:g}]; got {value}")
    return float(value)


def temperature(op: str, value: float, *, zero: bool) -> float:
    """Far beyond any use, and within what float32 can scale by."""
    return number(op, "temperature", value, 1e-30, 1e30, zero=zero)


def reduction(op: str, value: str | None) -> None:
    """How the losses of rows become one, or None for what the op does by itself."""
    if value not in (None, "none", "sum", "mean"):
        raise ValueError(f'{op}: reduction must be None, "none", "sum" or "mean"; got {value!r}')


def index_range(op: str, name: str, value: Tensor | None, columns: int, backend: str) -> None:
    """Entries of an index tensor lie in [0, V) or are -1.

    Reads the data, so it runs inside the op, out of a compiler's sight. Reading a GPU's would wait for it: there the
    kernels of a fast backend look, and an index out of range is a device-side assertion, as in torch's own ops.
    """
    if value is None or value.numel() == 0 or (value.device.type != "cpu" and backend != "torch"):
        return
    if value.dim() == 1 and value.stride(0) == 0:  # an int for all rows
        low = high = int(value[0])
    elif value.numel() <= _FEW:
        numbers = value.flatten().tolist()
        low, high = min(numbers), max(numbers)
    else:
        low, high = (int(bound) for bound in torch.aminmax(value))
    if low < -1 or high >= columns:
        raise ValueError(f"{op}: {name} must be -1 or in [0, {columns}); got {low if low < -1 else high}")


def increasing(op: str, times: Sequence[float] | Tensor) -> list[float]:
    """Times of a process, at least two, each later than the one before."""
    grid = [float(t) for t in times]
    if len(grid) < 2 or any(not a < b for a, b in itertools.pairwise(grid)):
        raise ValueError(f"{op}: times must increase, and be at least two; got {grid[:4]}{'...' if grid[4:] else ''}")
    return grid
