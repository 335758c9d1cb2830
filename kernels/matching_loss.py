"""matching_loss: the loss of each row in one read, and its gradient in a second.

Contract: dam/ops/matching_loss.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import core
from dam.kernels.core import INF, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch


@triton.jit
def cross_tiles(
    logits,
    logits_offset,  # int64 [lanes], of each lane's row
    base_logits,
    base_offset,
    excluded,  # [lanes], or None
    suppressed,  # uint8 [V], or None
    columns,
    first,  # tiles [first, last)
    last,
    tile_max,  # [T, tiles], of the logits
    tile_excess,
    base_max,
    base_excess,
    tile_cross,
    summary_offset,
    valid,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Summaries of tiles of both logits x and base logits b, and sum of exp(scale (b - max b)) (x - max x), stored."""
    lane = tl.arange(0, ROWS * TILES)
    for start in range(first, last, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, logits_offset, tile, columns, True, PIECES, WIDTH)
        b, _ = core.load_tiles(base_logits, base_offset, tile, columns, True, PIECES, WIDTH)
        x = core.without_excluded(x, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS)
        b = core.without_excluded(b, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS)
        top, excess, _ = core.summary_of_tile(x, c_high, c_low, UNIT)
        b_top, b_excess, rate = core.summary_of_tile(b, c_high, c_low, UNIT)
        # A destination that the base does not reach counts 0 even where x is -inf.
        term = tl.where(rate == 0.0, 0.0, rate * (x - core.pivot(top)[None, :, None]))
        at = summary_offset + tile
        stored = valid & (tile < last)
        tl.store(tile_max + at, top, mask=stored)
        tl.store(tile_excess + at, excess, mask=stored)
        tl.store(base_max + at, b_top, mask=stored)
        tl.store(base_excess + at, b_excess, mask=stored)
        tl.store(tile_cross + at, core.sum_of_tile(term), mask=stored)


@triton.jit
def merge_cross(
    tile_max, base_max, base_excess, tile_cross, offset, tiles, reference, base_top, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """Over whole rows: sum of exp(scale (b - base_top)) scale (x - reference), float64 [lanes]."""
    totals = tl.zeros((offset.shape[0], BLOCK), tl.float64)
    index = tl.arange(0, BLOCK)[None, :]
    for first in range(0, tiles, BLOCK):
        inside = first + index < tiles
        at = offset[:, None] + first + index
        top = core.pivot(tl.load(tile_max + at, mask=inside, other=-INF)).to(tl.float64)
        b_top = tl.load(base_max + at, mask=inside, other=-INF).to(tl.float64)
        b_sum = 1.0 + tl.load(base_excess + at, mask=inside, other=-1.0).to(tl.float64)
        cross = tl.load(tile_cross + at, mask=inside, other=0.0).to(tl.float64)
        mass = tl.exp(scale * (b_top - base_top[:, None]))
        # Not 0 * -inf for a tile of which the base reaches nothing.
        totals += tl.where(mass == 0.0, 0.0, mass * (cross + b_sum * (top - reference[:, None])))
    return scale * tl.sum(totals, axis=1)


@triton.jit
def loss_of_rows(
    target,
    target_stride,
    slot_stride,
    weight,
    weight_stride,
    weight_slot_stride,
    target_logit,  # [T, J]: logits of the targets
    row,
    excluded,
    slots,
    columns,
    top,  # float64 [lanes]: maximum of the logits, 0 if there is none
    total,  # sum of exp(scale (x - top))
    base_weight,
    base_rate,  # of the base's largest logit: 1 / sum, or exp(scale largest) for rates
    cross,
    scale,  # 1 / temperature
    NORMALIZED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Loss before row_scale, outflow (what multiplies the model's distribution in the gradient) and the logarithm of
    the model's rate at its largest logit, float64 [lanes] each."""
    # Of a row that reaches nothing as if it were 1: its costs are infinite, not inf - inf.
    log_total = tl.log(tl.where(total == 0.0, 1.0, total))
    losses = tl.zeros((row.shape[0], SLOTS), tl.float64)
    weights = tl.zeros((row.shape[0], SLOTS), tl.float64)
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        w = core.load_per_slot(weight, weight_stride, weight_slot_stride, row, slot, slots, SLOTS)
        index = slot + tl.arange(0, SLOTS)[None, :]
        at = target_logit + row[:, None] * slots + index
        x = tl.load(at, mask=counted & (index < slots), other=-INF).to(tl.float64)
        pulled = core.weight_at(
            t, target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, row, slots, columns, SLOTS
        )
        if NORMALIZED:
            cost = log_total[:, None] - scale * (x - top[:, None])
        else:
            cost = -scale * x
        counted = counted & (w != 0.0)
        weights += tl.where(counted, w, 0.0)
        # Weights on an unreachable destination add up first: to 0 that counts 0, or to what has a sign, not inf - inf.
        w = tl.where(x == -INF, pulled, w)
        losses += tl.where(counted & (w != 0.0), w * cost, 0.0)
    loss = tl.sum(losses, axis=1)
    outflow = base_weight + tl.sum(weights, axis=1)
    if NORMALIZED:
        log_rate = -log_total
        base_loss = base_weight * (log_total - base_rate * cross)
    else:
        log_rate = scale * top
        loss += tl.exp(log_rate) * total
        outflow = tl.zeros(row.shape, tl.float64) + 1.0
        base_loss = -base_weight * (base_rate * cross)
    return loss + tl.where(base_weight == 0.0, 0.0, base_loss), outflow, log_rate


@triton.jit
def coefficient_of(factor, log_rate, reference, scale):
    """float32 coefficient and float64 reference: coefficient * exp(scale (x - reference)) is to be
    factor * exp(log_rate + scale (x - top)), of which `reference` is the top.

    0 where nothing is asked for, whatever the row holds. What float32 cannot hold goes into the reference: only entries
    that are too large themselves become infinite.
    """
    log_size = tl.log(tl.abs(factor)) + log_rate
    sign = tl.where(factor < 0.0, -1.0, 1.0)
    held = log_size < 69.0  # 1e30
    coefficient = tl.where(factor == 0.0, 0.0, tl.where(held, sign * tl.exp(log_size), sign))
    return coefficient.to(tl.float32), tl.where(held | (factor == 0.0), reference, reference - log_size / scale)


@triton.jit
def finish_rows(
    target,
    target_stride,
    slot_stride,
    weight,
    weight_stride,
    weight_slot_stride,
    base_weight,  # [T], or None
    base_weight_stride,
    row_scale,  # [T], or None for 1/T
    row_scale_stride,
    tile_max,  # [T, tiles]
    tile_excess,
    base_max,
    base_excess,
    tile_cross,
    target_logit,
    row,
    excluded,
    rows,
    columns,
    slots,
    tiles,
    scale,  # 1 / temperature
    NORMALIZED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of whole rows [lanes]: loss, and what makes the gradient: what the weights are multiplied by, reference and
    coefficient of the model and of the base. All float64 but the coefficients."""
    top, total = core.merge_tiles(tile_max, tile_excess, row * tiles, tiles, scale, BLOCK)
    reference = core.pivot(top).to(tl.float64)
    base_reference = tl.zeros(row.shape, tl.float64)
    base_log_rate = tl.zeros(row.shape, tl.float64)
    cross = tl.zeros(row.shape, tl.float64)
    w_base = tl.zeros(row.shape, tl.float64)
    if base_weight is not None:
        w_base = tl.load(base_weight + row * base_weight_stride).to(tl.float64)
        base_top, base_total = core.merge_tiles(base_max, base_excess, row * tiles, tiles, scale, BLOCK)
        base_reference = core.pivot(base_top).to(tl.float64)
        if NORMALIZED:
            base_log_rate = -tl.log(base_total)
            crossed_at = reference
        else:
            base_log_rate = scale * base_reference
            crossed_at = tl.zeros(row.shape, tl.float64)
        cross = merge_cross(
            tile_max, base_max, base_excess, tile_cross, row * tiles, tiles, crossed_at, base_reference, scale, BLOCK
        )
    loss, outflow, log_rate = loss_of_rows(
        target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, target_logit, row, excluded,
        slots, columns, reference, total, w_base, tl.exp(base_log_rate), cross, scale, NORMALIZED, SLOTS,
    )  # fmt: skip
    if row_scale is None:
        factor = (tl.zeros(row.shape, tl.float64) + 1.0) / rows
    else:
        factor = tl.load(row_scale + row * row_scale_stride).to(tl.float64)
    # A row that can reach nothing has no distribution to push down.
    outflow = tl.where(total == 0.0, 0.0, outflow)
    slope = factor * scale
    coefficient, reference = coefficient_of(slope * outflow, log_rate, reference, scale)
    base_coefficient, base_reference = coefficient_of(slope * w_base, base_log_rate, base_reference, scale)
    return factor * loss, slope, reference, coefficient, base_reference, base_coefficient


@triton.jit(do_not_specialize=core.VARYING)
def matching_loss_kernel(
    logits,  # [T, V]
    logits_stride,
    base_logits,  # [T, V], or None
    base_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    weight,  # [T, J]
    weight_stride,
    weight_slot_stride,
    base_weight,  # [T]
    base_weight_stride,
    row_scale,  # [T], or None for 1/T
    row_scale_stride,
    tile_max,  # [T, tiles]
    tile_excess,
    base_max,
    base_excess,
    tile_cross,
    target_logit,  # [T, J]: logits of the targets
    target_gradient,  # [T, J]: the gradient there
    row_loss,  # float64 [T]
    gradient,  # [T, V], or None; may be the logits
    gradient_stride,
    rows,
    columns,
    slots,
    tiles,
    split_tiles,
    scale_high,
    scale_low,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    SUM: tl.constexpr,  # read the logits and keep the summary of each tile
    FINISH: tl.constexpr,  # and then the loss and the gradient
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    begin = 0
    end = tiles
    if (not SUM) or (not FINISH):
        begin = tl.program_id(1) * split_tiles
        end = tl.minimum(begin + split_tiles, tiles)
    lane = tl.arange(0, ROWS * TILES)
    lane_row = first_row + lane // TILES
    lane_valid = lane_row < rows
    lane_row = tl.minimum(lane_row, rows - 1)
    lane_excluded = None
    if exclude is not None:
        lane_excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
    if SUM:
        if base_logits is None:
            core.sum_tiles(
                logits, lane_row * logits_stride, lane_excluded, suppressed, columns, begin, end, tile_max,
                tile_excess, lane_row * tiles, lane_valid, c_high, c_low, UNIT, ROWS, TILES, PIECES, WIDTH,
            )  # fmt: skip
        else:
            cross_tiles(
                logits, lane_row * logits_stride, base_logits, lane_row * base_stride, lane_excluded, suppressed,
                columns, begin, end, tile_max, tile_excess, base_max, base_excess, tile_cross, lane_row * tiles,
                lane_valid, c_high, c_low, UNIT, ROWS, TILES, PIECES, WIDTH,
            )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    if SUM:
        # Kept, since the gradient may take the place of the logits, and all programs of a row need them.
        for slot in range(0, slots, SLOTS):
            t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
            here = counted & (t >= begin * TILE) & (t < end * TILE)
            x = tl.load(logits + row[:, None] * logits_stride + t, mask=here, other=-INF).to(tl.float32)
            index = slot + tl.arange(0, SLOTS)[None, :]
            tl.store(target_logit + row[:, None] * slots + index, x, mask=valid[:, None] & here)
        if FINISH:
            tl.debug_barrier()  # other threads of the program read what was kept
    if FINISH:
        loss, slope, reference, coefficient, base_reference, base_coefficient = finish_rows(
            target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, base_weight,
            base_weight_stride, row_scale, row_scale_stride, tile_max, tile_excess, base_max, base_excess, tile_cross,
            target_logit, row, excluded, rows, columns, slots, tiles, core.float64_of(scale_high, scale_low),
            NORMALIZED, SLOTS, BLOCK,
        )  # fmt: skip
        split = tl.zeros(row.shape, tl.int32) + tl.program_id(1)
        tl.store(row_loss + row, loss, mask=valid & (split == 0))
        if gradient is not None:
            for slot in range(0, slots, SLOTS):
                t, counted = core.load_slots(
                    target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS
                )
                here = counted & (t >= begin * TILE) & (t < end * TILE)
                index = slot + tl.arange(0, SLOTS)[None, :]
                x = tl.load(target_logit + row[:, None] * slots + index, mask=here, other=-INF)
                result = core.share(x, coefficient[:, None], reference[:, None], c_high, c_low, UNIT)
                if base_logits is not None:
                    b = tl.load(base_logits + row[:, None] * base_stride + t, mask=here, other=-INF).to(tl.float32)
                    result -= core.share(
                        b, base_coefficient[:, None], base_reference[:, None], c_high, c_low, UNIT
                    )  # fmt: skip
                pulled = core.weight_at(
                    t, target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, row, slots,
                    columns, SLOTS,
                )  # fmt: skip
                result = (result.to(tl.float64) - slope[:, None] * pulled).to(tl.float32)
                tl.store(target_gradient + row[:, None] * slots + index, result, mask=valid[:, None] & here)
            tl.debug_barrier()

            lane_reference = core.per_lane(reference, TILES)[None, :, None]
            lane_coefficient = core.per_lane(coefficient, TILES)[None, :, None]
            lane_base_reference = core.per_lane(base_reference, TILES)[None, :, None]
            lane_base_coefficient = core.per_lane(base_coefficient, TILES)[None, :, None]
            for start in range(begin, end, TILES):
                tile = start + lane % TILES
                x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
                left, right = start * TILE, (start + TILES) * TILE
                x = core.without_excluded(x, column, lane_excluded, suppressed, columns, left, right, ROWS)
                result = core.share(x, lane_coefficient, lane_reference, c_high, c_low, UNIT)
                if base_logits is not None:
                    b, _ = core.load_tiles(base_logits, lane_row * base_stride, tile, columns, True, PIECES, WIDTH)
                    b = core.without_excluded(b, column, lane_excluded, suppressed, columns, left, right, ROWS)
                    result -= core.share(b, lane_base_coefficient, lane_base_reference, c_high, c_low, UNIT)
                core.store_tiles(gradient, lane_row * gradient_stride, tile, column, columns, end, lane_valid, result)
            tl.debug_barrier()

            for slot in range(0, slots, SLOTS):
                t, counted = core.load_slots(
                    target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS
                )
                here = valid[:, None] & counted & (t >= begin * TILE) & (t < end * TILE)
                index = slot + tl.arange(0, SLOTS)[None, :]
                result = tl.load(target_gradient + row[:, None] * slots + index, mask=here)
                at = gradient + row[:, None] * gradient_stride + t
                tl.store(at, core.rounded(result, gradient.dtype.element_ty), mask=here)


def matching_loss(
    logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    weight: Tensor,  # [T, J]
    base_logits: Tensor | None,  # [T, V]
    base_weight: Tensor | None,  # [T]
    row_scale: Tensor | None,  # [T]
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    with_grad: bool,
    into: Tensor | None = None,  # [T, V]
) -> tuple[Tensor, Tensor]:
    """Loss of each row, float64 [T], and gradient, empty where none is asked for."""
    gradient = logits.new_empty(logits.shape if with_grad else (0,)) if into is None else into
    rows, columns = logits.shape
    tiles = triton.cdiv(columns, TILE.value)
    tile_max, tile_excess = core.summaries(logits, tiles)
    base_max = base_excess = tile_cross = None
    if base_logits is not None:
        base_max, base_excess = core.summaries(logits, tiles)
        tile_cross = torch.empty_like(base_max)
    row_loss = logits.new_empty((rows,), dtype=torch.float64)
    g = core.geometry("matching_loss", logits)
    arguments = {
        "logits": logits, "logits_stride": logits.stride(0),
        "base_logits": base_logits, "base_stride": core.stride_of(base_logits),
        **exclude.arguments,
        "target": target, "target_stride": target.stride(0), "slot_stride": target.stride(1),
        "weight": weight, "weight_stride": weight.stride(0), "weight_slot_stride": weight.stride(1),
        "base_weight": base_weight, "base_weight_stride": core.stride_of(base_weight),
        "row_scale": row_scale, "row_scale_stride": core.stride_of(row_scale),
        "tile_max": tile_max, "tile_excess": tile_excess, "base_max": base_max, "base_excess": base_excess,
        "tile_cross": tile_cross, "target_logit": logits.new_empty(target.shape, dtype=torch.float32),
        "target_gradient": logits.new_empty(target.shape, dtype=torch.float32),
        "row_loss": row_loss, "gradient": gradient if with_grad else None, "gradient_stride": core.stride_of(gradient),
        "rows": rows, "columns": columns, "slots": target.shape[1], "tiles": tiles, "split_tiles": g.split_tiles,
        **core.scale_of(temperature)._asdict(), "NORMALIZED": normalized, **g.constants,
        "SLOTS": core.slots_of(target.shape[1]), "BLOCK": core.block_of(tiles), **g.options,
    }  # fmt: skip
    if g.splits == 1:
        launch(matching_loss_kernel, (g.blocks, 1), SUM=True, FINISH=True, **arguments)
    else:
        launch(matching_loss_kernel, (g.blocks, g.splits), SUM=True, FINISH=False, **arguments)
        launch(matching_loss_kernel, (g.blocks, g.splits if with_grad else 1), SUM=False, FINISH=True, **arguments)
    return row_loss, gradient
