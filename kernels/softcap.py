"""Soft-capped logits: softcap * tanh(x / softcap), and the gradient through the cap.

Inside the kernels of head.py, where logits are on the chip, and of chunks of logits in one read and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, core
from dam.kernels.launch import launch


@triton.jit
def tanh(x):
    """To a relative 2^-21; +-1 for +-inf, NaN for NaN."""
    # An odd polynomial of least relative error, 2^-27, where 1 - exp(-2 |x|) would cancel.
    w = x * x
    p = (((w * -0.00570404 + 0.02063786) * w - 0.05373916) * w + 0.13331432) * w - 0.33333281
    near = x + x * w * p
    e = tl.exp2(tl.abs(x) * (-2.0 * core.LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(x, softcap):
    return softcap * tanh(x / softcap)


@triton.jit
def slope(z, softcap):
    """Derivative of z = softcap * tanh(x / softcap) in x; 0 where z is -inf, as of what a row may not have."""
    # Differences that are exact near saturation; the rounding of z leaves an error of 3 * 2^-24.
    below = (softcap - z) / softcap
    return tl.where(z == -core.INF, 0.0, below * ((softcap + z) / softcap))


@triton.jit(do_not_specialize=["count"])
def cap_kernel(logits, softcap, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < count, other=0.0)
    tl.store(logits + at, capped(x, softcap), mask=at < count)


@triton.jit(do_not_specialize=["count"])
def differentiate_kernel(gradient, logits, softcap, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + at, mask=at < count, other=0.0)
    x = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(gradient + at, core.rounded(x * slope(z, softcap), gradient.dtype.element_ty), mask=at < count)


# ---- on the host


def cap(
    logits: Tensor,  # float32, contiguous
    softcap: float,
) -> Tensor:
    """softcap * tanh(logits / softcap) in place."""
    config = configs.lookup("softcap", logits.device, logits.element_size(), 0, 0)
    launch(
        cap_kernel, (triton.cdiv(logits.numel(), config["elements"]),), logits=logits, softcap=softcap,
        count=logits.numel(), BLOCK=config["elements"], warps=config["warps"],
    )  # fmt: skip
    return logits


def differentiate(
    gradient: Tensor,  # contiguous, in capped logits
    logits: Tensor,  # float32, contiguous: capped
    softcap: float,
) -> Tensor:
    """gradient times the derivative of the cap, in place."""
    config = configs.lookup("softcap", logits.device, logits.element_size(), 0, 0)
    launch(
        differentiate_kernel, (triton.cdiv(logits.numel(), config["elements"]),), gradient=gradient, logits=logits,
        softcap=softcap, count=logits.numel(), BLOCK=config["elements"], warps=config["warps"],
    )  # fmt: skip
    return gradient
