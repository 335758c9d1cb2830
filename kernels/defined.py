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
from dam.kernels.core import INF, LARGEST, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch

SMALLEST_NORMAL = tl.constexpr(2.0**-126)  # of float32
LEAST_EXPONENT = tl.constexpr(-86.6)  # of which float32's exp is no less than 2^-125

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
def _narrow(x, scale, outflow, TERMS: tl.constexpr, NORMALIZED: tl.constexpr):
    pull, curvature = TERMS(x)
    none = x == -INF
    total = core.sum_of_tile(tl.where(none, 0.0, pull)).to(tl.float64)
    bend = total
    change = core.clamp_to_float32(scale) * curvature
    if NORMALIZED:
        bend = core.sum_of_tile(tl.where(none, 0.0, curvature)).to(tl.float64)
        change -= core.clamp_to_float32(scale * outflow) * tl.exp(x)
    return total, bend, tl.where(none, 0.0, change)


@triton.jit
def _wide(x, scale, outflow, TERMS: tl.constexpr, NORMALIZED: tl.constexpr):
    pull, curvature = TERMS(x)
    none = x == -INF
    total = core.sum_of_tile(tl.where(none, 0.0, pull))
    bend = total
    change = curvature
    if NORMALIZED:
        bend = core.sum_of_tile(tl.where(none, 0.0, curvature))
        rate = tl.exp(x)
        change -= tl.where(rate == 0.0, 0.0, rate * outflow)
    return total, bend, tl.where(none, 0.0, scale * change).to(tl.float32)


@triton.jit
def _of_step(
    x, scale, outflow, wide, lowest,
    TERMS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Of log rates [PIECES, lanes, WIDTH]: sums of a lane's pull and, with NORMALIZED, of its curvature, float64
    [lanes], and scale * (curvature - outflow * rate), float32.

    In float32 where that holds, else in float64; log rates of -inf are no destinations. `wide` [lanes] is not 0 where
    factors are none of float32; below `lowest` [1, lanes, 1] rates that are 0 in float32 count.
    """
    outside = (x > HIGHEST) | ((x < LOWEST) & (x != -INF))
    if NORMALIZED:
        outside = outside | (x < lowest)  # those of -inf too, to spare registers
    count = wide + core.sum_of_tile(outside.to(tl.int32))
    if tl.sum(count, axis=0) > 0:
        total, bend, change = _wide(x.to(tl.float64), scale, outflow, TERMS, NORMALIZED)
    else:
        total, bend, change = _narrow(x, scale, outflow, TERMS, NORMALIZED)
    return total, bend, change


@triton.jit
def _weighed(w, merged, value, none, counted, AT_ZERO: tl.constexpr):
    """Weights times a value of their target's rate, which is AT_ZERO where that cannot be reached."""
    # They add up first where that is infinite: to 0, or to what has a sign.
    if (AT_ZERO == -INF) | (AT_ZERO == INF):
        w = tl.where(none & (w != 0.0), merged, w)
    return tl.where(counted & (w != 0.0), w * value, 0.0)


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
    log_total,  # float64 [T]: what is taken off logits, or None
    outflow,  # float64 [T]: what of the gradient every rate has, or None
    tile_pull,  # float64 [T, tiles]
    tile_bend,  # float64 [T, tiles]
    row_gain,  # float64 [T]
    row_force,  # float64 [T]
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
    NORMALIZED: tl.constexpr,
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
    scale = tl.load(row_scale + lane_row * row_scale_stride).to(tl.float64)
    lane_scale = scale[None, :, None]
    # Factors of the gradient that are infinite in float32, which would be the largest number, or lose digits.
    wide = (tl.abs(scale) > LARGEST) | ((scale != 0.0) & (tl.abs(scale) < SMALLEST_NORMAL))
    lowest = tl.zeros_like(scale).to(tl.float32) - INF
    lane_total = tl.zeros_like(lane_scale)
    lane_outflow = tl.zeros_like(lane_scale)
    if NORMALIZED:
        lane_total = tl.load(log_total + lane_row)[None, :, None]
    total_high = lane_total.to(tl.float32)
    total_low = (lane_total - total_high.to(tl.float64)).to(tl.float32)
    if outflow is not None:
        flow = tl.load(outflow + lane_row)
        lane_outflow = flow[None, :, None]
        wide = wide | (tl.abs(scale * flow) > LARGEST)
        # A rate that is 0 in float32 has a gradient where the outflow makes more of it than 2^-120, which counts as 0.
        lowest = tl.where(tl.abs(flow) > 32.0, LEAST_EXPONENT, lowest)
    lane_wide, lane_lowest = wide.to(tl.int32), lowest[None, :, None]
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
        left, right = start * TILE, (start + TILES) * TILE
        x = core.without_excluded(x, column, lane_excluded, suppressed, columns, left, right, ROWS)
        if NORMALIZED:
            x = (x - total_high) - total_low
        total, bend, change = _of_step(
            x, lane_scale, lane_outflow, lane_wide, lane_lowest, TERMS, LOWEST, HIGHEST, NORMALIZED
        )
        at = lane_row * tiles + tile
        tl.store(tile_pull + at, total, mask=lane_valid & (tile < end))
        if NORMALIZED:
            tl.store(tile_bend + at, bend, mask=lane_valid & (tile < end))
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
    total = tl.zeros_like(scale)
    flow = tl.zeros_like(scale)
    if log_total is not None:
        total = tl.load(log_total + row)[:, None]
    if outflow is not None:
        flow = tl.load(outflow + row)[:, None]
    gains = tl.zeros((ROWS, SLOTS), tl.float64)
    forces = tl.zeros((ROWS, SLOTS), tl.float64)
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        w = core.load_per_slot(weight, weight_stride, weight_slot_stride, row, slot, slots, SLOTS)
        pulled = core.weight_at(
            t, target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, row, slots, columns, SLOTS
        )
        x = tl.load(logits + row[:, None] * logits_stride + t, mask=counted, other=0.0).to(tl.float64) - total
        none = x == -INF
        slope, force = AT_TARGET(x)
        slope = tl.where(none, SLOPE_AT_ZERO, slope)
        force = tl.where(none, FORCE_AT_ZERO, force)
        gains += _weighed(w, pulled, slope, none, counted, SLOPE_AT_ZERO)
        forces += _weighed(w, pulled, force, none, counted, FORCE_AT_ZERO)
        if gradient is not None:
            _, curvature = TERMS(x)
            rate = tl.exp(x)
            curvature = tl.where(none, 0.0, curvature - tl.where(rate == 0.0, 0.0, rate * flow))
            result = scale * (curvature - tl.where(pulled == 0.0, 0.0, pulled * force))
            here = valid[:, None] & counted & (t >= begin * TILE) & (t < end * TILE)
            at = gradient + row[:, None] * gradient_stride + t
            tl.store(at, core.rounded(result.to(tl.float32), gradient.dtype.element_ty), mask=here)
    split = tl.zeros(row.shape, tl.int32) + tl.program_id(1)
    tl.store(row_gain + row, tl.sum(gains, axis=1), mask=valid & (split == 0))
    tl.store(row_force + row, tl.sum(forces, axis=1), mask=valid & (split == 0))


def rate_matching_loss(
    module: types.ModuleType,
    logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    weight: Tensor,  # [T, J]
    row_scale: Tensor,  # [T]
    exclude: Excluded,
    log_total: Tensor | None,  # float64 [T]: logsumexp, of logits that are to be normalised
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and gradient, empty where none is asked for."""
    rows, columns = logits.shape
    gradient = logits.new_empty(logits.shape if with_grad else (0,))
    tiles = triton.cdiv(columns, TILE.value)
    tile_pull, tile_bend = (logits.new_empty((rows, tiles), dtype=torch.float64) for _ in range(2))
    row_gain, row_force = (logits.new_empty((rows,), dtype=torch.float64) for _ in range(2))
    g = core.geometry("matching_loss", logits)

    def run(into: Tensor | None, outflow: Tensor | None) -> None:
        launch(
            defined_kernel, (g.blocks, g.splits),
            logits=logits, logits_stride=logits.stride(0), **exclude.arguments,
            target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
            weight=weight, weight_stride=weight.stride(0), weight_slot_stride=weight.stride(1),
            row_scale=row_scale, row_scale_stride=row_scale.stride(0), log_total=log_total, outflow=outflow,
            tile_pull=tile_pull, tile_bend=tile_bend, row_gain=row_gain, row_force=row_force,
            gradient=into, gradient_stride=core.stride_of(gradient),
            rows=rows, columns=columns, slots=target.shape[1], tiles=tiles, split_tiles=g.split_tiles,
            TERMS=module.terms, AT_TARGET=module.at_target, LOWEST=module.LOWEST, HIGHEST=module.HIGHEST,
            SLOPE_AT_ZERO=module.SLOPE_AT_ZERO, FORCE_AT_ZERO=module.FORCE_AT_ZERO, NORMALIZED=log_total is not None,
            **g.constants, SLOTS=core.slots_of(target.shape[1]), **g.options,
        )  # fmt: skip

    formed = gradient if with_grad else None
    run(formed if log_total is None else None, None)
    loss = row_scale.double() * (tile_pull.sum(dim=1) - row_gain)
    if log_total is not None and with_grad:
        run(formed, tile_bend.sum(dim=1) - row_force)  # what every rate's gradient has is known now
    return loss, gradient
