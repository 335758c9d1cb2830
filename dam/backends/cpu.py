"""The C++ backend: the extension dam._cpu, and how it takes tensors. Arguments were checked by the ops."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from dam.backends import address
from dam.kernels import environment

DEVICE_TYPE = "cpu"  # of the tensors that the kernels take
_ROWS_AT_ONCE = 8192  # of a product over rows

kernels: Any = None
_IMPORT_ERROR: str | None = None
try:
    # After torch, so that it joins the OpenMP thread pool that torch has loaded.
    kernels = importlib.import_module("dam._cpu")
except ImportError as error:
    _IMPORT_ERROR = str(error)


def why_unavailable() -> str | None:
    """Reason why no kernel can run here, or None."""
    return None if _IMPORT_ERROR is None else f"the C++ extension dam._cpu does not import: {_IMPORT_ERROR}"


def shape(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, columns and dtype of [T, V], and the number of threads."""
    return x.shape[0], x.shape[1], address.DTYPE_CODE[x.dtype], torch.get_num_threads()


def taken(results: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """What a kernel that looks at its arguments returned, of arguments that were checked."""
    assert results is not None, "the C++ backend does not take what the op's checks let through"
    return results


def isa() -> str:
    """Instruction set that the kernels run with: avx512, avx2 or plain."""
    return kernels.isa()


@functools.cache
def _instructions() -> dict[str, int]:
    """Names of what can multiply bfloat16 here, best first, and their numbers; asking the system takes a while."""
    return dict(kernels.instructions())


@functools.cache
def instructions() -> str:
    """What multiplies 16-bit hidden states with a head: amx or avx512_bf16, of bfloat16, or float32.

    The best that this machine has; the environment variable DAM_CPU_PRODUCT asks for one by name.

    Raises:
        ValueError, RuntimeError: there are no such instructions, or this machine does not have them.
    """
    here = _instructions()
    wanted = environment.value("DAM_CPU_PRODUCT") or next(iter(here))
    if wanted not in here:
        raise RuntimeError(f"DAM_CPU_PRODUCT must be one of {', '.join(here)} on this machine; got {wanted!r}")
    return wanted


def is_fast(dtype: torch.dtype) -> bool:
    """Whether there are instructions for products of numbers of this 16-bit dtype."""
    return dtype == torch.bfloat16 and instructions() != "float32"


def has_tiles() -> bool:
    """Whether bfloat16 is multiplied by AMX."""
    return kernels is not None and instructions() == "amx"


def product(hidden: Tensor, weight: Tensor, out: Tensor, by: str | None = None) -> Tensor:
    """hidden [T, D] @ weight [V, D]^T into float32 `out` [T, V], of 16-bit arrays, summed in float32.

    By the instructions of that name, else by `instructions()`; float16 always by float32's.

    By bfloat16's instructions numbers below 1.2e-38 count as 0. The result does not depend on the number of threads.
    """
    name = (by or instructions()) if hidden.dtype == torch.bfloat16 else "float32"
    kernels.product(
        shape=(hidden.shape[0], weight.shape[0], address.DTYPE_CODE[hidden.dtype], torch.get_num_threads()),
        depth=hidden.shape[1],
        instructions=_instructions()[name],
        hidden=address.matrix(hidden),
        weight=address.matrix(weight),
        result=out.data_ptr(),
        result_stride=out.stride(0),
    )
    return out


def product_hidden(gradient: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """gradient float32 [T, V] @ weight bfloat16 [V, D] into float32 `out` [T, D], by tiles.

    Each number of the gradient goes in as two of bfloat16, which leave out at most 2^-16 of it. A row's result depends
    neither on the others nor on the number of threads.
    """
    kernels.product_hidden(
        shape=(*gradient.shape, address.DTYPE_CODE[weight.dtype], torch.get_num_threads()),
        depth=weight.shape[1],
        gradient=address.matrix(gradient),
        weight=address.matrix(weight),
        result=out.data_ptr(),
        result_stride=out.stride(0),
    )
    return out


def product_weight(gradient: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
    """gradient float32 [T, V], transposed, @ hidden bfloat16 [T, D], by tiles, as `product_hidden` does.

    Into bfloat16 `out` [V, D]; to a float32 one it is added. Work memory is some 2 D bytes a row: of many more rows
    than columns it is bounded by parts of them, which are added in float32.
    """
    rows, columns = gradient.shape
    step = max(_ROWS_AT_ONCE, 2 * columns)
    if rows > step:
        total = out if out.dtype == torch.float32 else torch.zeros(out.shape, dtype=torch.float32, device="cpu")
        for part in (slice(at, at + step) for at in range(0, rows, step)):
            product_weight(gradient[part], hidden[part], total)
        return out if total is out else out.copy_(total)
    kernels.product_weight(
        shape=(*gradient.shape, address.DTYPE_CODE[hidden.dtype], torch.get_num_threads()),
        depth=hidden.shape[1],
        gradient=address.matrix(gradient),
        hidden=address.matrix(hidden),
        result=out.data_ptr(),
        result_dtype=address.DTYPE_CODE[out.dtype],
        result_stride=out.stride(0),
    )
    return out
