"""Argument checks shared by the ops: every message names the argument, what it got and what it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if value.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have at least one column; got shape {list(value.shape)}")
    if value.stride(1) != 1 and value.shape[1] > 1:
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
        raise TypeError(f"{op}: {name} must have the dtype of {other_name}, {other.dtype}; got {value.dtype}")
    same_device(op, name, value, other)


def same_device(op: str, name: str, value: Tensor, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{op}: {name} must be on {reference.device} like the other inputs; got {value.device}")


def head(
    op: str, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None, hidden_name: str, hidden: Tensor
) -> None:
    """A head weight [V, D] (and bias [V]) that fits hidden [T, D]."""
    matrix(op, weight_name, weight, "D")
    like(op, weight_name, weight, hidden_name, hidden, shape=False)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: {weight_name} must have shape [V, {hidden.shape[1]}] to fit {hidden_name} {list(hidden.shape)}; "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: {weight_name} must have at least one row; got shape {list(weight.shape)}")
    if bias is not None:
        like(op, bias_name, bias, weight_name, weight, shape=False)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: {bias_name} must have shape [{weight.shape[0]}]; got {list(bias.shape)}")


def vector(op: str, name: str, value: Tensor, rows: int, reference: Tensor) -> None:
    """A floating-point vector with one entry per row."""
    _is_tensor(op, name, value)
    if value.shape != (rows,):
        raise ValueError(f"{op}: {name} must have shape [{rows}]; got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point; got {value.dtype}")
    same_device(op, name, value, reference)


def target(op: str, value: Tensor, rows: int, reference: Tensor, *, dims: Sequence[int] = (1, 2)) -> Tensor:
    """int64 targets [T] or [T, J]; returns them as [T, J]. Their range is checked where the op runs."""
    _is_tensor(op, "target", value)
    if value.dim() not in dims or value.shape[0] != rows:
        wanted = " or ".join(f"[{rows}]" if d == 1 else f"[{rows}, J]" for d in dims)
        raise ValueError(f"{op}: target must have shape {wanted}; got {list(value.shape)}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64; got {value.dtype}")
    same_device(op, "target", value, reference)
    return value if value.dim() == 2 else value[:, None]


def exclude(op: str, value: int | Tensor, rows: int, columns: int, reference: Tensor) -> Tensor | None:
    """Excluded destination per row as int64 [T], or None when every row keeps all of them."""
    if isinstance(value, Tensor):
        if value.shape != (rows,):
            raise ValueError(
                f"{op}: exclude must be an int or a tensor of shape [{rows}]; got shape {list(value.shape)}"
            )
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: exclude must be int64; got {value.dtype}")
        same_device(op, "exclude", value, reference)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: exclude must be an int or an int64 tensor; got {type(value).__name__}")
    if not -1 <= value < columns:
        raise ValueError(f"{op}: exclude must be -1 or in [0, {columns}); got {value}")
    if value == -1:
        return None
    return torch.full((1,), value, dtype=torch.int64, device=reference.device).expand(rows)


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


def index_range(op: str, name: str, value: Tensor | None, columns: int, backend: str) -> None:
    """Entries of an index tensor lie in [0, V) or are -1.

    Reads the data, so it runs inside the op, out of a compiler's sight. Reading a GPU's would wait for it: there the
    kernels of a fast backend look, and an index out of range is a device-side assertion, as in torch's own ops.
    """
    if value is None or value.numel() == 0 or (value.device.type != "cpu" and backend != "torch"):
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < -1 or high >= columns:
        raise ValueError(f"{op}: {name} must be -1 or in [0, {columns}); got {low if low < -1 else high}")
