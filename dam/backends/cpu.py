"""The C++ backend: the extension dam._cpu, and how it takes tensors. Arguments were checked by the ops."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dam.backends import address

DEVICE_TYPE = "cpu"  # of the tensors that the kernels take

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


def isa() -> str:
    """Instruction set that the kernels run with: avx512, avx2 or plain."""
    return kernels.isa()
