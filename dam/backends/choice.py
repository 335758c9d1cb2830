"""Which implementation of an op runs: by device and dtype, unless a backend is asked for by name."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch

from dam.backends import cpu, cuda, triton
from dam.kernels import environment

BACKENDS = environment.BACKENDS

# Process-wide rather than a context variable: torch.compile can guard on a module global.
_requested: str | None = os.environ.get("DAM_BACKEND") or None

# What is wrong with the environment: an error of the first operation, not of `import dam`, as `dam info` tells it too.
_faults: str | None = "; ".join(environment.faults()) or None

# Type of the devices whose tensors a backend takes; the reference takes all.
DEVICE_TYPE = {"cpu": cpu.DEVICE_TYPE, "triton": triton.DEVICE_TYPE, "cuda": cuda.DEVICE_TYPE}

# Of a tensor's device, the fast backends in the order in which they are taken where none is asked for by name. The CUDA
# kernels were ahead of Triton's on an H100 (benchmarks/notes.md). Kernels are interpreted or emulated only on request.
FAST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def why_unavailable(name: str) -> str | None:
    """Reason why backend `name` cannot run on this machine, or None if it can.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in BACKENDS:
        meant = environment.nearest(name, BACKENDS)
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}{meant}")
    if name == "torch":
        return None
    if name == "cpu":
        return cpu.why_unavailable()
    return triton.why_unavailable() if name == "triton" else cuda.why_unavailable()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager: every op inside runs on backend `name`, or raises if it cannot.

    The choice is process-wide. The environment variable `DAM_BACKEND` sets it for a whole run.

    Args:
        name: "torch" (reference, any device and dtype), "cpu" (C++), "triton" (GPUs; CPU tensors where
            TRITON_INTERPRET=1 was set at start) or "cuda" (NVIDIA GPUs; CPU tensors where DAM_EMULATE_CUDA=1 was).

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend cannot run here; the message says why.
    """
    global _requested
    reason = why_unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def is_free() -> bool:
    """Whether a CPU tensor that no backend is asked for by name goes to the C++ kernels, if the op has one."""
    return _requested is None and _faults is None and cpu.why_unavailable() is None


def is_asked_for(name: str) -> bool:
    """Whether that backend is asked for by name."""
    return _requested == name


def _reason_against(
    name: str, op: str, implementations: Mapping[str, Callable], tensor: torch.Tensor, float64: bool
) -> str | None:
    reason = why_unavailable(name)
    if reason is not None:
        return reason
    if name not in implementations:
        return f"{op} has no {name} implementation yet (it has: {', '.join(implementations)})"
    if name in DEVICE_TYPE:
        if tensor.device.type != DEVICE_TYPE[name]:
            return f"it runs on {DEVICE_TYPE[name].upper()} tensors; got a tensor on {tensor.device}"
        if tensor.dtype == torch.float64 and not float64:
            return "it takes float32, bfloat16 and float16; float64 runs on backend 'torch'"
    return None


def choose(
    op: str,
    implementations: Mapping[str, Callable],
    tensor: torch.Tensor,
    *,
    float64: bool = False,
    first: str | None = None,
) -> str:
    """Name of the backend that runs `op` on `tensor`; `float64` says that every implementation takes that dtype.

    `first` is a backend that is tried before the others of the device, if it is one of them and none is asked for.

    Raises:
        ValueError, RuntimeError: the backend asked for cannot run this call, or a DAM_* variable of the environment is
            wrong; the message says why.
    """
    if _faults is not None:
        raise ValueError(_faults)
    if _requested is not None:
        reason = _reason_against(_requested, op, implementations, tensor, float64)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {_requested!r} cannot run this call: {reason}")
        return _requested
    fast = [name for name in FAST.get(tensor.device.type, ()) if name in implementations]
    if not fast or (tensor.dtype == torch.float64 and not float64):
        return "torch"
    if first in fast:
        fast = [first, *(name for name in fast if name != first)]
    reasons = []
    for name in fast:
        reason = why_unavailable(name)
        if reason is None:
            return name
        reasons.append(reason)
    warnings.warn(
        f"dam: {'; '.join(reasons)}; the slower reference backend 'torch' runs instead of "
        f"{' or '.join(repr(name) for name in fast)}.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "torch"
