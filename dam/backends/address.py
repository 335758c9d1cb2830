"""Tensors as the extensions take them: tuples of an address (0: absent), a dtype where it may vary, and strides.

The extensions know nothing of torch. A tensor must be held by a name until the call that reads its address is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as csrc/core/dtype.h has them


def of(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def matrix(x: Tensor | None) -> tuple[int, int]:
    """Address and row stride of [T, V] with unit inner stride."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def indices(x: Tensor | None) -> tuple[int, int]:
    """Address and stride of int64 [T]."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def bits(x: Tensor | None) -> Tensor | None:
    """bool [V] as uint8, a bit each, the lowest first, and zeros up to whole tiles of 1024."""
    if x is None:
        return None
    padded = x.new_zeros(x.shape[0] + -x.shape[0] % 1024)
    padded[: x.shape[0]] = x
    # Eight bytes of 0 or 1 in a word: the product has byte k's in bit 56 + k, and nothing is carried into these.
    return (padded.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def cube(x: Tensor | None) -> tuple[int, int, int]:
    """Address and the first two strides of [G, K, S] with unit inner stride."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def targets(x: Tensor) -> tuple[int, int, int, int]:
    """Address, strides and J of int64 [T, J]."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]


def readable(x: Tensor | None) -> Tensor | None:
    """Numbers of a dtype that `values` can name."""
    return x if x is None or x.dtype in DTYPE_CODE else x.double()


def values(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, dtype and strides of numbers [], [T] or [T, J] of any floating-point dtype."""
    if x is None:
        return 0, 0, 0, 0
    strides = (*x.stride(), 0, 0)
    return x.data_ptr(), DTYPE_CODE[x.dtype], strides[0], strides[1]
