"""The CUDA backend: the extension dam._cuda, and how it takes tensors, on torch's current stream.

Work memory comes from torch's allocator, and nothing here waits for the device (dam.backends.deferral does, for what a
kernel found wrong with its arguments); so calls can be captured in a CUDA graph. With DAM_EMULATE_CUDA=1 the same
kernels run on CPU tensors, in dam._cuda_emulated.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from dam.backends import address

EMULATED = os.environ.get("DAM_EMULATE_CUDA") == "1"
DEVICE_TYPE = "cpu" if EMULATED else "cuda"  # of the tensors that the kernels take
MODULE = "dam._cuda_emulated" if EMULATED else "dam._cuda"

kernels: Any = None
_IMPORT_ERROR: str | None = None
try:
    kernels = importlib.import_module(MODULE)
except ImportError as error:
    _IMPORT_ERROR = str(error)


def why_unavailable() -> str | None:
    """Reason why no kernel can run here, or None."""
    if _IMPORT_ERROR is not None:
        how = "installed from its sources with DAM_EMULATE_CUDA=1" if EMULATED else "installed where nvcc is found"
        return f"{MODULE} does not import ({_IMPORT_ERROR}); it is built when dam is {how}"
    if EMULATED:
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm; dam._cuda takes NVIDIA GPUs"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def where(x: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    if EMULATED:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def shape(x: Tensor) -> tuple[int, int, int]:
    """Rows, columns and dtype of [T, V]."""
    return x.shape[0], x.shape[1], address.DTYPE_CODE[x.dtype]


def seed(value: Tensor, logits: Tensor) -> tuple[int, int]:
    """Address of a seed on the device, which stays there, and the seed where it is not."""
    if value.device == logits.device and not EMULATED:
        return value.data_ptr(), 0
    return 0, int(value) % 2**64


def summaries(like: Tensor, arrays: int, rows: int) -> Tensor:
    """Work memory for `arrays` numbers per tile of each row."""
    return like.new_empty(kernels.summary_floats(arrays, rows, like.shape[1]), dtype=torch.float32)


def lowest_bad(like: Tensor, count: int, check: bool) -> Tensor | None:
    """Where kernels put the least index, of `count`, of what no result can be given for; None without a check."""
    return torch.full((), count, dtype=torch.int64, device=like.device) if check else None


def unread(lowest: Tensor | None) -> int | Tensor:
    """As `dam.backends.deferral.first_bad` takes it."""
    return -1 if lowest is None else lowest
