"""The Triton backend: launchers of dam.kernels, imported when an op first runs on it, and whether it can run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from dam.kernels.launch import INTERPRETED


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


# Looked up once, and as globals: torch.compile traces the choice of a backend.
_INSTALLED = _found("triton")
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"  # of the tensors that the kernels take


def why_unavailable() -> str | None:
    """Reason why no kernel can run here, or None."""
    if not _INSTALLED:
        return "Triton is not installed: pip install 'discrete-adjoint-matching[triton]'"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU, and TRITON_INTERPRET=1, which interprets the kernels on a CPU, is not set"


def launcher(module: str, name: str | None = None) -> Callable[..., Any]:
    """The function `name` (by default `module`) of dam.kernels.<module>, loaded at its first call."""

    def run(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"dam.kernels.{module}"), name or module)(*arguments, **options)

    return run
