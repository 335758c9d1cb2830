"""Scaling of a gradient that was formed in the forward pass, by a factor that only the device knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, core
from dam.kernels.launch import launch


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    # The usual upstream gradient is exactly 1: then nothing is read or written.
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < count).to(tl.float32)
        tl.store(gradient + at, core.rounded(x * by, gradient.dtype.element_ty), mask=at < count)


def scale(
    gradient: Tensor,  # contiguous
    factor: Tensor,  # []
) -> Tensor:
    """gradient * factor in place, without waiting for the device to learn the factor."""
    config = configs.lookup("formed_gradient", gradient.device, gradient.element_size(), 0, 0)
    launch(
        scale_kernel, (triton.cdiv(gradient.numel(), config["elements"]),), gradient=gradient, factor=factor,
        count=gradient.numel(), BLOCK=config["elements"], warps=config["warps"],
    )  # fmt: skip
    return gradient
