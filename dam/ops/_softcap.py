"""Soft-capped logits, softcap * tanh(x / softcap), and the gradient through the cap, in place on chunks of logits.

The derivative of z = c tanh(x / c) is 1 - (z / c)^2. It cancels near saturation, where what is left is the rounding of
z, at most 3 * 2^-24 of the gradient before the cap: a derivative below that, at |x| > 9 c, is noise or 0, and one of
1e-3, at 4 c, has a relative error of 1e-4, as in a model that is differentiated through tanh in float32. The relative
accuracy of 4 e / (1 + e)^2, e = exp(-2 |x| / c), would take an array more, of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dam.backends import triton

# Logits that several operations pass over one after another. In a CPU's cache, for each thread: of 1/8, 1/2 and 2 MB
# all took 0.8 to 1.0 ns for each logit, and whole chunks 1.4. On a GPU without Triton what is allocated is small.
_BLOCK_BYTES = 2**19
_BLOCK_BYTES_ON_GPU = 2**24


def step(logits: Tensor) -> int:
    """Logits of a block."""
    size = _BLOCK_BYTES * torch.get_num_threads() if logits.device.type == "cpu" else _BLOCK_BYTES_ON_GPU
    return size // logits.element_size()


def _by_triton(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32 and triton.why_unavailable() is None


def capped(
    logits: Tensor,  # float32 or float64, contiguous
    softcap: float,
) -> Tensor:
    """The same array, with softcap * tanh(logits / softcap) in it."""
    if _by_triton(logits):
        return triton.launcher("softcap", "cap")(logits, softcap)
    for block in logits.view(-1).split(step(logits)):
        block.mul_(1.0 / softcap).tanh_().mul_(softcap)
    return logits


def differentiated(
    gradient: Tensor,  # in capped logits, contiguous, of any floating dtype; overwritten
    capped_logits: Tensor,  # float32 or float64, contiguous
    softcap: float,
) -> Tensor:
    """`gradient` times the derivative of the cap. One in bfloat16, as on GPUs, is rounded a second time."""
    if _by_triton(capped_logits):
        return triton.launcher("softcap", "differentiate")(gradient, capped_logits, softcap)
    size = max(1, step(capped_logits) // 2)  # of two arrays
    cap = torch.tensor(softcap, dtype=capped_logits.dtype, device="cpu")
    memory = capped_logits.new_empty(2, min(size, capped_logits.numel()))
    pieces = zip(gradient.view(-1).split(size), capped_logits.view(-1).split(size), strict=True)
    for piece, z in pieces:
        # As (c - z) (c + z) / c^2, whose differences are exact near saturation.
        below = torch.sub(cap, z, out=memory[0, : z.numel()])
        above = torch.add(z, cap, out=memory[1, : z.numel()])
        piece.mul_(below.mul_(above).mul_(softcap**-2))
    return gradient


def capped_and_ratio(block: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Caps a block in place; tanh(block / softcap), which its derivative needs, into `out`, of the same shape."""
    torch.tanh(block.mul_(1.0 / softcap), out=out)
    torch.mul(out, softcap, out=block)
    return out


def differentiated_by_ratio(gradient: Tensor, ratio: Tensor) -> Tensor:
    """`gradient` times 1 - ratio^2, in place, where both are of one dtype."""
    return torch.ops.aten.tanh_backward.grad_input(gradient, ratio, grad_input=gradient)
