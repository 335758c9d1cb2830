"""tilt_to_ess: the largest tilt that keeps a set effective sample size."""

from __future__ import annotations

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, deferral, triton
from dam.ops import _checks, _op


def tilt_to_ess(reward: Tensor, ess: float, *, max_tilt: float, check: bool = True) -> Tensor:
    """The largest h in [0, max_tilt] with ESS(softmax_k(h reward[g, k])) >= ess, for each group g.

    The ESS falls as h grows, from K at h = 0 (the number of trajectories that are feasible at all, if some
    have reward -inf), so h is found by bisection.

    Args:
        reward: floating point [G, K]; -inf marks an infeasible trajectory.
        ess: effective sample size to keep, in [1, K].
        max_tilt: upper end of the search, >= 0 and finite.
        check: raise if reward holds a NaN or +inf; on a GPU that waits for the result, or in `dam.deferred_checks()`
            for all calls of a block at its end. With False the tilt of such a group is unspecified.

    Returns:
        float64 [G]; 0 for a group with fewer than `ess` feasible trajectories. Not differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or range, or (with check) reward holds a NaN or
            +inf; the message names the first.

    Source: tilting in steps, after Discrete Tilt Matching, arXiv 2604.18739.
    """
    op = "tilt_to_ess"
    _checks.floating(op, "reward", reward)
    if reward.dim() != 2 or reward.shape[1] < 1:
        raise ValueError(f"{op}: reward must have shape [G, K] with K >= 1; got {list(reward.shape)}")
    ess = _checks.number(op, "ess", ess, 1, reward.shape[1])
    max_tilt = _checks.number(op, "max_tilt", max_tilt, 0, _checks.LARGEST)
    _checks.boolean(op, "check", check)
    backend = choice.choose(op, _IMPLEMENTATIONS, reward, float64=True)
    return _tilt_to_ess(reward.detach(), ess, max_tilt, check, backend)


def _torch(reward: Tensor, ess: float, max_tilt: float, check: bool) -> tuple[Tensor, int]:
    """The tilts and the first reward, as g * K + k, that is NaN or +inf, or -1; there it stops."""
    reward = reward.double()
    bad = ~(reward < torch.inf)
    if check and bool(bad.any()):
        return outputs(reward), int(bad.flatten().nonzero()[0])
    best = reward.amax(dim=1, keepdim=True)
    shifted = torch.where(reward == -torch.inf, -torch.inf, reward - best)

    def keeps(tilt: Tensor) -> Tensor:
        # -inf stays infeasible at tilt 0, the limit of small tilts.
        weight = torch.where(shifted == -torch.inf, 0.0, (tilt[:, None] * shifted).exp())
        # Rounding must not cost a group of equal rewards its full tilt.
        return weight.sum(dim=1).square() >= ess * (1 - 1e-12) * weight.square().sum(dim=1)

    feasible = (best[:, 0] > -torch.inf) & keeps(torch.zeros_like(best[:, 0]))
    low, high = torch.zeros_like(best[:, 0]), torch.full_like(best[:, 0], max_tilt)
    low = torch.where(keeps(high), high, low)
    # From this tilt on only the best trajectories have weight at all in float64, and the ESS stays.
    gap = torch.where(shifted < 0, -shifted, torch.inf).amin(dim=1)
    high = torch.where(keeps(high), high, torch.minimum(high, 800 / gap))
    while True:
        middle = low + (high - low) / 2
        if not bool(((low < middle) & (middle < high)).any()):
            break  # neighbours
        kept = keeps(middle)
        low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
    return torch.where(feasible, low, 0.0), -1


def _cpu(reward: Tensor, ess: float, max_tilt: float, check: bool) -> tuple[Tensor, int]:
    tilt, reward = outputs(reward), reward.double().contiguous()
    groups, size = reward.shape
    bad = cpu.kernels.tilt_to_ess(
        groups=groups,
        size=size,
        threads=torch.get_num_threads(),
        reward=reward.data_ptr(),
        ess=ess,
        max_tilt=max_tilt,
        tilt=tilt.data_ptr(),
    )
    return tilt, bad if check else -1


def _cuda(reward: Tensor, ess: float, max_tilt: float, check: bool) -> tuple[Tensor, int | Tensor]:
    tilt = outputs(reward)
    lowest_bad = cuda.lowest_bad(reward, reward.numel(), True)  # the kernel puts it somewhere in any case
    groups, size = reward.shape
    cuda.kernels.tilt_to_ess(
        groups=groups,
        size=size,
        reward=address.values(reward),
        ess=ess,
        max_tilt=max_tilt,
        tilt=tilt.data_ptr(),
        first_bad=address.of(lowest_bad),
        where=cuda.where(reward),
    )
    return tilt, cuda.unread(lowest_bad if check else None)


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("tilt_to_ess"),
    "cuda": _cuda,
}


def outputs(reward: Tensor) -> Tensor:
    """Uninitialised tilt [G]."""
    return reward.new_empty(reward.shape[:1], dtype=torch.float64)


@_op.op("tilt_to_ess")
def _tilt_to_ess(reward: Tensor, ess: float, max_tilt: float, check: bool, backend: str) -> Tensor:
    size = reward.shape[1]
    tilt, bad = _IMPLEMENTATIONS[backend](reward, ess, max_tilt, check)

    def later(bad: int) -> str:
        return f"tilt_to_ess: reward[{bad // size}, {bad % size}] is a NaN or +inf; it must be finite or -inf"

    bad = deferral.first_bad(bad, reward.numel(), later)
    if bad >= 0:
        g, k = divmod(bad, size)
        raise ValueError(f"tilt_to_ess: reward[{g}, {k}] is {float(reward[g, k])}; it must be finite or -inf")
    return tilt


@_tilt_to_ess.register_fake
def _(reward, ess, max_tilt, check, backend):
    return outputs(reward)
