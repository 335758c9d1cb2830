"""The row kernel of rate_matching_loss for a divergence that a generated module defines, in one read of the logits.

Contract: dam/divergences/matching.py. The module has functions `terms` and `at_target` of log rates, of float32 or of
float64, and constants; this one has what they call beside Triton's own.
"""

from __future__ import annotations

import types

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import core
from dam.kernels.core import INF, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch

# ---- functions that Triton does not have everywhere


@triton.jit
def power(x, n):
    """x ** n for x >= 0."""
    return tl.exp(n * tl.log(x))


@triton.jit
def log1p(x):
    """log(1 + x), also where 1 + x rounds much of x away: the quotient makes up for it (Kahan)."""
    u = 1.0 + x
    rounded = tl.where(u == 1.0, 1.0, u - 1.0)
    found = tl.where(u == 1.0, x, tl.log(u) * (x / rounded))
    return tl.where(u == INF, u, found)


@triton.jit
def expm1(x):
    """exp(x) - 1, near 0 by the same means."""
    u = tl.exp(x)
    near = (x > -1.0) & (x < 1.0) & (u != 1.0)
    log_u = tl.where(near, tl.log(tl.where(near, u, 2.0)), 1.0)
    return tl.where(u == 1.0, x, tl.where(near, (u - 1.0) * (x / log_u), u - 1.0))


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, e / (e + 2.0), -e / (e + 2.0))


# ---- the kernel


@triton.jit
def _narrow(x, scale, TERMS: tl.constexpr):
    pull, curvature = TERMS(x)
    total = core.sum_of_tile(tl.where(x == -INF, 0.0, pull)).to(tl.float64)
    return total, tl.where(x == -INF, 0.0, core.clamp_to_float32(scale) * curvature)


@triton.jit
def _wide(x, scale, TERMS: tl.constexpr):
    pull, curvature = TERMS(x.to(tl.float64))
    total = core.sum_of_tile(tl.where(x == -INF, 0.0, pull))
    return total, tl.where(x == -INF, 0.0, scale * curvature).to(tl.float32)


@triton.jit
def _of_step(x, scale, TERMS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Of log rates [PIECES, lanes, WIDTH]: sum of a lane's pull, float64 [lanes], and scale * curvature, float32.

    In float32 where that holds, else in float64; log rates of -inf are no destinations.
    """
    outside = ((x > HIGHEST) | ((x < LOWEST) & (x != -INF))).to(tl.int32)
    if tl.sum(core.sum_of_tile(outside), axis=0) > 0:
        total, change = _wide(x, scale, TERMS)
    else:
        total, change = _narrow(x, scale, TERMS)
    return total, change


@triton.jit(do_not_specialize=core.VARYING)
def defined_kernel(
    logits,  # [T, V]
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    weight,  # [T, J]
    weight_stride,
    weight_slot_stride,
    row_scale,  # [T]
    row_scale_stride,
    tile_pull,  # float64 [T, tiles]
    row_gain,  # float64 [T]
    gradient,  # [T, V], or None
    gradient_stride,
    rows,
    columns,
    slots,
    tiles,
    split_tiles,
    TERMS: tl.constexpr,
    AT_TARGET: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SLOPE_AT_ZERO: tl.constexpr,
    FORCE_AT_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    begin = tl.program_id(1) * split_tiles
    end = tl.minimum(begin + split_tiles, tiles)
    lane = tl.arange(0, ROWS * TILES)
    lane_row = first_row + lane // TILES
    lane_valid = lane_row < rows
    lane_row = tl.minimum(lane_row, rows - 1)
    lane_excluded = None
    if exclude is not None:
        lane_excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
    lane_scale = tl.load(row_scale + lane_row * row_scale_stride).to(tl.float64)[None, :, None]
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
        left, right = start * TILE, (start + TILES) * TILE
        x = core.without_excluded(x, column, lane_excluded, suppressed, columns, left, right, ROWS)
        total, change = _of_step(x, lane_scale, TERMS, LOWEST, HIGHEST)
        tl.store(tile_pull + lane_row * tiles + tile, total, mask=lane_valid & (tile < end))
        if gradient is not None:
            core.store_tiles(gradient, lane_row * gradient_stride, tile, column, columns, end, lane_valid, change)
    tl.debug_barrier()  # what other threads of the program stored is written over where the targets are

    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    scale = tl.load(row_scale + row * row_scale_stride).to(tl.float64)[:, None]
    gains = tl.zeros((ROWS, SLOTS), tl.float64)
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        w = core.load_per_slot(weight, weight_stride, weight_slot_stride, row, slot, slots, SLOTS)
        pulled = core.weight_at(
            t, target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, row, slots, columns, SLOTS
        )
        x = tl.load(logits + row[:, None] * logits_stride + t, mask=counted, other=0.0).to(tl.float64)
        none = x == -INF
        slope, force = AT_TARGET(x)
        # Weights on an unreachable destination of infinite cost add up first: to 0, or to what has a sign.
        if (SLOPE_AT_ZERO == -INF) | (SLOPE_AT_ZERO == INF):
            w = tl.where(none & (w != 0.0), pulled, w)
        slope = tl.where(none, SLOPE_AT_ZERO, slope)
        gains += tl.where(counted & (w != 0.0), w * slope, 0.0)
        if gradient is not None:
            _, curvature = TERMS(x)
            curvature = tl.where(none, 0.0, curvature)
            force = tl.where(none, FORCE_AT_ZERO, force)
            result = scale * (curvature - tl.where(pulled == 0.0, 0.0, pulled * force))
            here = valid[:, None] & counted & (t >= begin * TILE) & (t < end * TILE)
            at = gradient + row[:, None] * gradient_stride + t
            tl.store(at, core.rounded(result.to(tl.float32), gradient.dtype.element_ty), mask=here)
    split = tl.zeros(row.shape, tl.int32) + tl.program_id(1)
    tl.store(row_gain + row, tl.sum(gains, axis=1), mask=valid & (split == 0))


def rate_matching_loss(
    module: types.ModuleType,
    logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    weight: Tensor,  # [T, J]
    row_scale: Tensor,  # [T]
    exclude: Excluded,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and gradient, empty where none is asked for."""
    rows, columns = logits.shape
    gradient = logits.new_empty(logits.shape if with_grad else (0,))
    tiles = triton.cdiv(columns, TILE.value)
    tile_pull = logits.new_empty((rows, tiles), dtype=torch.float64)
    row_gain = logits.new_empty((rows,), dtype=torch.float64)
    g = core.geometry("matching_loss", logits)
    launch(
        defined_kernel, (g.blocks, g.splits),
        logits=logits, logits_stride=logits.stride(0), **exclude.arguments,
        target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
        weight=weight, weight_stride=weight.stride(0), weight_slot_stride=weight.stride(1),
        row_scale=row_scale, row_scale_stride=row_scale.stride(0), tile_pull=tile_pull, row_gain=row_gain,
        gradient=gradient if with_grad else None, gradient_stride=core.stride_of(gradient),
        rows=rows, columns=columns, slots=target.shape[1], tiles=tiles, split_tiles=g.split_tiles,
        TERMS=module.terms, AT_TARGET=module.at_target, LOWEST=module.LOWEST, HIGHEST=module.HIGHEST,
        SLOPE_AT_ZERO=module.SLOPE_AT_ZERO, FORCE_AT_ZERO=module.FORCE_AT_ZERO,
        **g.constants, SLOTS=core.slots_of(target.shape[1]), **g.options,
    )  # fmt: skip
    return row_scale.double() * (tile_pull.sum(dim=1) - row_gain), gradient
