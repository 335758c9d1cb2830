"""adjoint_weights: sums backward along each trajectory in one read, then the weights of each group, in float64.

Contract: dam/ops/adjoint_weights.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, core
from dam.kernels.core import INF
from dam.kernels.launch import launch


@triton.jit
def sum_paths_kernel(
    log_ratio,  # [G, K, S]
    escape_gap,  # [G, K, S] or None
    terminal_cost,  # [G, K]
    log_path,  # [G, K, S + 1]
    log_weight,  # float64 [G, K]; NaN where the path or the cost is
    trajectories,  # G K
    size,  # K
    steps,  # S
    ratio_group_stride,
    ratio_stride,
    gap_group_stride,
    gap_stride,
    cost_group_stride,
    cost_stride,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    # The 64-bit division is done once per program; those of the trajectories fit 32 bits.
    first = tl.program_id(0).to(tl.int64) * ROWS
    k = (first % size).to(tl.int32) + tl.arange(0, ROWS)
    group = first // size + k // size
    k = (k % size).to(tl.int64)
    row = first + tl.arange(0, ROWS)
    inside = row < trajectories
    ratio_row = log_ratio + group * ratio_group_stride + k * ratio_stride
    if escape_gap is not None:
        gap_row = escape_gap + group * gap_group_stride + k * gap_stride
    path_row = log_path + row * (steps + 1)

    sum_after = tl.zeros([ROWS], tl.float64)
    chunks = tl.cdiv(steps, STEPS)
    for chunk in range(chunks):
        step = (chunks - 1 - chunk) * STEPS + tl.arange(0, STEPS)
        mask = inside[:, None] & (step < steps)[None, :]
        gain = tl.load(ratio_row[:, None] + step[None, :], mask=mask, other=0.0).to(tl.float64)
        if escape_gap is not None:
            gain += tl.load(gap_row[:, None] + step[None, :], mask=mask, other=0.0).to(tl.float64)
        path = tl.cumsum(gain, 1, reverse=True) + sum_after[:, None]
        tl.store(path_row[:, None] + step[None, :], path.to(tl.float32), mask=mask)
        sum_after += tl.sum(gain, 1)

    tl.store(path_row + steps, tl.zeros([ROWS], tl.float32), mask=inside)
    cost = tl.load(terminal_cost + group * cost_group_stride + k * cost_stride, mask=inside, other=0.0).to(tl.float64)
    # An outcome of cost +inf is forbidden whatever its path weight, so inf - inf cannot arise.
    forbidden = (cost == INF) & (sum_after == sum_after)
    tl.store(log_weight + row, tl.where(forbidden, -INF, sum_after - cost), mask=inside)


@triton.jit
def weigh_groups_kernel(
    log_weight,  # float64 [G, K]
    weight,  # [G, K]
    log_normalizer,  # [G]
    ess,  # [G]
    clipped,  # [G]
    first_bad,  # int64, or None
    trajectories,  # G K
    groups,  # G
    size,  # K
    clip: tl.float64,
    GROUPS: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    row = log_weight + group * size

    tops = tl.full([GROUPS, TRAJECTORIES], -INF, tl.float64)
    bad = tl.full([GROUPS, TRAJECTORIES], trajectories, tl.int64)
    for start in range(0, size, TRAJECTORIES):
        k = start + tl.arange(0, TRAJECTORIES)
        mask = inside[:, None] & (k < size)[None, :]
        l = tl.load(row[:, None] + k[None, :], mask=mask, other=-INF)
        tops = tl.maximum(tops, l)
        bad = tl.where(l < INF, bad, tl.minimum(bad, (group * size)[:, None] + k[None, :]))
    top = tl.max(tops, 1)
    first = tl.min(tl.min(bad, 1), 0)
    if first_bad is not None:
        tl.atomic_min(first_bad, first, mask=first < trajectories)

    # Relative to the largest first: at log weights of 10^16 and more, log K would be lost beside them.
    pivot = core.pivot(top)
    terms = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    for start in range(0, size, TRAJECTORIES):
        k = start + tl.arange(0, TRAJECTORIES)
        mask = inside[:, None] & (k < size)[None, :]
        l = tl.load(row[:, None] + k[None, :], mask=mask, other=-INF)
        terms += tl.exp(l - pivot[:, None])
    total = tl.sum(terms, 1)
    # A group without a feasible trajectory has weights exp(-inf) whatever is subtracted, so anything finite will do.
    excess = tl.log(tl.where(total > 0.0, total, 1.0) / size)

    sums = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    squares = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    touched = tl.zeros([GROUPS, TRAJECTORIES], tl.float64)
    for start in range(0, size, TRAJECTORIES):
        k = start + tl.arange(0, TRAJECTORIES)
        mask = inside[:, None] & (k < size)[None, :]
        l = tl.load(row[:, None] + k[None, :], mask=mask, other=-INF)
        relative = l - pivot[:, None] - excess[:, None]
        over = relative > clip
        w = tl.exp(tl.where(over, tl.full([1, 1], clip, tl.float64), relative))
        tl.store(weight + (group * size)[:, None] + k[None, :], w.to(tl.float32), mask=mask)
        sums += w
        squares += w * w
        touched += over.to(tl.float64)
    total = tl.sum(sums, 1)
    square = tl.sum(squares, 1)
    tl.store(log_normalizer + group, (top + excess).to(tl.float32), mask=inside)
    tl.store(ess + group, (total * total / tl.where(square > 0.0, square, 1.0)).to(tl.float32), mask=inside)
    tl.store(clipped + group, (tl.sum(touched, 1) / size).to(tl.float32), mask=inside)


def adjoint_weights(
    log_ratio: Tensor,  # [G, K, S]
    terminal_cost: Tensor,  # [G, K]
    escape_gap: Tensor | None,  # [G, K, S]
    clip: float | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int | Tensor]:
    groups, size, steps = log_ratio.shape
    shapes = ((groups, size), (groups, size, steps + 1), (groups,), (groups,), (groups,))
    weight, log_path, log_normalizer, ess, clipped = (log_ratio.new_empty(x, dtype=torch.float32) for x in shapes)
    log_ratio = _unit_inner_stride(log_ratio)
    escape_gap = None if escape_gap is None else _unit_inner_stride(escape_gap)
    log_weight = torch.empty((groups, size), dtype=torch.float64, device=log_ratio.device)
    values = configs.lookup("adjoint_weights", log_ratio.device, log_ratio.element_size(), groups * size, steps)

    block_steps = min(triton.next_power_of_2(max(steps, 1)), values["steps"])
    rows = min(triton.next_power_of_2(max(groups * size, 1)), max(1, values["elements"] // block_steps))
    launch(
        sum_paths_kernel,
        (triton.cdiv(groups * size, rows),),
        warps=values["warps"],
        log_ratio=log_ratio,
        escape_gap=escape_gap,
        terminal_cost=terminal_cost,
        log_path=log_path,
        log_weight=log_weight,
        trajectories=groups * size,
        size=size,
        steps=steps,
        ratio_group_stride=log_ratio.stride(0),
        ratio_stride=log_ratio.stride(1),
        gap_group_stride=0 if escape_gap is None else escape_gap.stride(0),
        gap_stride=0 if escape_gap is None else escape_gap.stride(1),
        cost_group_stride=terminal_cost.stride(0),
        cost_stride=terminal_cost.stride(1),
        ROWS=rows,
        STEPS=block_steps,
    )

    block_size = min(triton.next_power_of_2(size), values["weights"])
    block_groups = min(triton.next_power_of_2(max(groups, 1)), values["weights"] // block_size)
    first_bad = torch.full((), groups * size, dtype=torch.int64, device=log_ratio.device) if check else None
    launch(
        weigh_groups_kernel,
        (triton.cdiv(groups, block_groups),),
        warps=values["warps"],
        log_weight=log_weight,
        weight=weight,
        log_normalizer=log_normalizer,
        ess=ess,
        clipped=clipped,
        first_bad=first_bad,
        trajectories=groups * size,
        groups=groups,
        size=size,
        clip=math.inf if clip is None else clip,
        GROUPS=block_groups,
        TRAJECTORIES=block_size,
    )
    return weight, log_path, log_normalizer, ess, clipped, -1 if first_bad is None else first_bad


def _unit_inner_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
