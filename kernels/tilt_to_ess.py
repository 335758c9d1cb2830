"""tilt_to_ess: a program bisects the tilts of its groups, in float64. Contract: dam/ops/tilt_to_ess.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs
from dam.kernels.core import INF
from dam.kernels.launch import launch


@triton.jit
def _shifted(
    reward_row,  # [GROUPS, 1], pointers
    stride,
    best,  # [GROUPS]
    inside,  # [GROUPS]
    start,
    size,
    TRAJECTORIES: tl.constexpr,
):
    """Rewards of a block of trajectories relative to the best of their group, [GROUPS, TRAJECTORIES]."""
    k = start + tl.arange(0, TRAJECTORIES)
    mask = inside[:, None] & (k < size)[None, :]
    x = tl.load(reward_row + (k.to(tl.int64) * stride)[None, :], mask=mask, other=-INF).to(tl.float64)
    return tl.where(x == -INF, -INF, x - best[:, None])


@triton.jit
def _keeps(
    reward_row,  # [GROUPS, 1], pointers
    stride,
    best,  # [GROUPS]
    inside,  # [GROUPS]
    tilt,  # [GROUPS]
    size,
    least_ess,
    GROUPS: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
):
    """Whether the tilt leaves a group its effective sample size, [GROUPS]."""
    sums = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    squares = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    for start in range(0, size, TRAJECTORIES):
        x = _shifted(reward_row, stride, best, inside, start, size, TRAJECTORIES)
        # -inf stays infeasible at tilt 0, the limit of small tilts.
        weight = tl.where(x == -INF, 0.0, tl.exp(tilt[:, None] * x))
        sums += weight
        squares += weight * weight
    total = tl.sum(sums, 1)
    return total * total >= tl.sum(squares, 1) * least_ess


@triton.jit
def tilt_to_ess_kernel(
    reward,  # [G, K]
    tilt,  # float64 [G]
    first_bad,  # int64, or None
    entries,  # G K
    groups,  # G
    size,  # K
    group_stride,
    stride,
    least_ess: tl.float64,
    max_tilt: tl.float64,
    GROUPS: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    row = (reward + group * group_stride)[:, None]

    tops = tl.full([GROUPS, TRAJECTORIES], -INF, tl.float64)
    bad = tl.full([GROUPS, TRAJECTORIES], entries, tl.int64)
    for start in range(0, size, TRAJECTORIES):
        k = start + tl.arange(0, TRAJECTORIES)
        mask = inside[:, None] & (k < size)[None, :]
        x = tl.load(row + (k.to(tl.int64) * stride)[None, :], mask=mask, other=-INF).to(tl.float64)
        tops = tl.maximum(tops, x)
        bad = tl.where(x < INF, bad, tl.minimum(bad, (group * size)[:, None] + k[None, :]))
    best = tl.max(tops, 1)
    first = tl.min(tl.min(bad, 1), 0)
    if first_bad is not None:
        tl.atomic_min(first_bad, first, mask=first < entries)

    gaps = tl.full([GROUPS, TRAJECTORIES], INF, tl.float64)
    for start in range(0, size, TRAJECTORIES):
        x = _shifted(row, stride, best, inside, start, size, TRAJECTORIES)
        gaps = tl.where(x < 0.0, tl.minimum(gaps, -x), gaps)
    gap = tl.min(gaps, 1)

    low = tl.zeros([GROUPS], tl.float64)
    high = tl.full([GROUPS], max_tilt, tl.float64)
    feasible = (best > -INF) & _keeps(row, stride, best, inside, low, size, least_ess, GROUPS, TRAJECTORIES)
    kept = _keeps(row, stride, best, inside, high, size, least_ess, GROUPS, TRAJECTORIES)
    low = tl.where(kept, high, low)
    # From this tilt on only the best trajectories have weight at all in float64, and the ESS stays.
    high = tl.where(kept, high, tl.minimum(high, 800.0 / gap))
    middle = low + (high - low) / 2
    while tl.max(((low < middle) & (middle < high)).to(tl.int32), 0) > 0:  # else they are neighbours
        kept = _keeps(row, stride, best, inside, middle, size, least_ess, GROUPS, TRAJECTORIES)
        low = tl.where(kept, middle, low)
        high = tl.where(kept, high, middle)
        middle = low + (high - low) / 2
    tl.store(tilt + group, tl.where(feasible, low, 0.0), mask=inside)


def tilt_to_ess(
    reward: Tensor,  # [G, K]
    ess: float,
    max_tilt: float,
    check: bool,
) -> tuple[Tensor, int | Tensor]:
    tilt = reward.new_empty(reward.shape[:1], dtype=torch.float64)
    groups, size = reward.shape
    values = configs.lookup("tilt_to_ess", reward.device, reward.element_size(), groups, size)
    block_size = min(triton.next_power_of_2(size), values["elements"])
    block_groups = min(triton.next_power_of_2(max(groups, 1)), values["elements"] // block_size)
    first_bad = torch.full((), groups * size, dtype=torch.int64, device=reward.device) if check else None
    launch(
        tilt_to_ess_kernel,
        (triton.cdiv(groups, block_groups),),
        warps=values["warps"],
        reward=reward,
        tilt=tilt,
        first_bad=first_bad,
        entries=groups * size,
        groups=groups,
        size=size,
        group_stride=reward.stride(0),
        stride=reward.stride(1),
        # Rounding must not cost a group of equal rewards its full tilt.
        least_ess=ess * (1 - 1e-12),
        max_tilt=max_tilt,
        GROUPS=block_groups,
        TRAJECTORIES=block_size,
    )
    return tilt, -1 if first_bad is None else first_bad
