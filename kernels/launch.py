"""One way to launch a kernel, so that what is launched can also be recorded and compiled without a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# Whether kernels are interpreted on the CPU, as Triton sees it when it is first imported; that is not yet here.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """A kernel and everything that decides how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


_recorder: Callable[[Launch], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 1, **arguments: Any) -> None:
    """Runs `kernel` on a grid of programs; a grid with an empty dimension runs nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along up to three dimensions.
        warps, stages: warps of a program, and stages of its software pipelines.
        arguments: the kernel's parameters by name.
    """
    if 0 in grid:
        return
    options = {
        "num_warps": warps,
        "num_stages": stages,
        # Products are fused with sums: Triton's default, named because later releases change it.
        "enable_fp_fusion": True,
        # Assertions about indices stay in: an index out of range must not become a read out of bounds. Integers wrap
        # on purpose in Philox.
        "debug": True,
        "sanitize_overflow": False,
    }
    if _recorder is not None:
        _recorder(Launch(kernel, grid, arguments, options))
        return
    device = next((x.device for x in arguments.values() if isinstance(x, torch.Tensor)), None)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


@contextlib.contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Context manager: launches inside are handed to `record` and not run."""
    global _recorder
    previous, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = previous
