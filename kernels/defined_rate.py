"""The row kernel of rate_ratio for a rate that a generated module defines, in float64, in one read of both.

Contract: dam/ops/rate_ratio.py. The module has functions `rate` and `log_rate` of number, destination and state.
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


@triton.jit
def _of_tiles(
    logits, offset, tile, start, state, excluded, suppressed, columns, RATE: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum of the rates of each lane's tile, float64 [lanes]."""
    z, column = core.load_tiles(logits, offset, tile, columns, True, PIECES, WIDTH)
    z = core.without_excluded(z, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS)
    rate = RATE(z.to(tl.float64), column.to(tl.float64), state[None, :, None])
    return core.sum_of_tile(tl.where(z == -INF, 0.0, rate))


@triton.jit
def _log_rate_at(logits, row_offset, t, state, counted, LOG_RATE: tl.constexpr):
    z = tl.load(logits + row_offset + t, mask=counted, other=-INF).to(tl.float64)
    found = LOG_RATE(tl.where(z == -INF, 0.0, z), t.to(tl.float64), state[:, None])
    return tl.where(z == -INF, -INF, found)


@triton.jit(do_not_specialize=core.VARYING)
def defined_rate_kernel(
    logits,  # [T, V]
    logits_stride,
    base_logits,  # [T, V]
    base_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    state,  # [T], or None
    state_stride,
    tile_gap,  # float64 [T, tiles]
    log_ratio,  # [T, J]
    rows,
    columns,
    slots,
    tiles,
    split_tiles,
    RATE: tl.constexpr,
    LOG_RATE: tl.constexpr,
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
    lane_state = tl.zeros(lane_row.shape, tl.float64)
    if state is not None:
        lane_state = tl.load(state + lane_row * state_stride).to(tl.float64)
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        gap = _of_tiles(
            logits, lane_row * logits_stride, tile, start, lane_state, lane_excluded, suppressed, columns, RATE, ROWS,
            TILES, PIECES, WIDTH,
        )  # fmt: skip
        gap -= _of_tiles(
            base_logits, lane_row * base_stride, tile, start, lane_state, lane_excluded, suppressed, columns, RATE,
            ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip
        tl.store(tile_gap + lane_row * tiles + tile, gap, mask=lane_valid & (tile < end))
    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    row_state = tl.zeros(row.shape, tl.float64)
    if state is not None:
        row_state = tl.load(state + row * state_stride).to(tl.float64)
    stored = valid & (tl.zeros(row.shape, tl.int32) + tl.program_id(1) == 0)  # by one program of a row's
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        of_base = _log_rate_at(base_logits, row[:, None] * base_stride, t, row_state, counted, LOG_RATE)
        of_model = _log_rate_at(logits, row[:, None] * logits_stride, t, row_state, counted, LOG_RATE)
        index = slot + tl.arange(0, SLOTS)[None, :]
        result = tl.where(t < 0, 0.0, of_base - of_model).to(tl.float32)
        tl.store(log_ratio + row[:, None] * slots + index, result, mask=stored[:, None] & (index < slots))


def rate_ratio(
    module: types.ModuleType,
    logits: Tensor,  # [T, V]
    base_logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    state: Tensor | None,  # [T]
    exclude: Excluded,
) -> tuple[Tensor, Tensor]:
    rows, columns = logits.shape
    log_ratio = logits.new_empty(target.shape, dtype=torch.float32)
    tiles = triton.cdiv(columns, TILE.value)
    tile_gap = logits.new_empty((rows, tiles), dtype=torch.float64)
    g = core.geometry("rate_ratio", logits)
    launch(
        defined_rate_kernel, (g.blocks, g.splits),
        logits=logits, logits_stride=logits.stride(0), base_logits=base_logits, base_stride=base_logits.stride(0),
        **exclude.arguments, target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
        state=state, state_stride=core.stride_of(state), tile_gap=tile_gap, log_ratio=log_ratio,
        rows=rows, columns=columns, slots=target.shape[1], tiles=tiles, split_tiles=g.split_tiles,
        RATE=module.rate, LOG_RATE=module.log_rate, **g.constants, SLOTS=core.slots_of(target.shape[1]), **g.options,
    )  # fmt: skip
    return log_ratio, tile_gap.sum(dim=1).float()
