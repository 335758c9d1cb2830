"""rate_ratio: ratios of two models' rates at given jumps and the gap of their escape rates, in one read of both.

Contract: dam/ops/rate_ratio.py.
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


@triton.jit(do_not_specialize=core.VARYING)
def rate_ratio_kernel(
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
    tile_max,  # [T, tiles]
    tile_excess,
    base_max,
    base_excess,
    log_ratio,  # [T, J]
    escape_gap,  # [T]
    rows,
    columns,
    slots,
    tiles,
    split_tiles,
    SUM: tl.constexpr,  # read the logits and keep the summary of each tile
    FINISH: tl.constexpr,  # and then what is asked for
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    if SUM:
        lane_row = first_row + tl.arange(0, ROWS * TILES) // TILES
        valid = lane_row < rows
        lane_row = tl.minimum(lane_row, rows - 1)
        begin = 0
        end = tiles
        if not FINISH:
            begin = tl.program_id(1) * split_tiles
            end = tl.minimum(begin + split_tiles, tiles)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
        core.sum_tiles(
            logits, lane_row * logits_stride, excluded, suppressed, columns, begin, end, tile_max, tile_excess,
            lane_row * tiles, valid, 0.0, 0.0, True, ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip
        core.sum_tiles(
            base_logits, lane_row * base_stride, excluded, suppressed, columns, begin, end, base_max, base_excess,
            lane_row * tiles, valid, 0.0, 0.0, True, ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip
        if FINISH:
            tl.debug_barrier()  # other threads of the program read the summaries
    if FINISH:
        row = first_row + tl.arange(0, ROWS)
        valid = row < rows
        row = tl.minimum(row, rows - 1)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, row, columns)
        gap = core.total_rate(tile_max, tile_excess, row * tiles, tiles, BLOCK)
        gap -= core.total_rate(base_max, base_excess, row * tiles, tiles, BLOCK)
        tl.store(escape_gap + row, gap.to(tl.float32), mask=valid)
        for slot in range(0, slots, SLOTS):
            t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
            x = tl.load(logits + row[:, None] * logits_stride + t, mask=counted, other=-INF).to(tl.float64)
            base = tl.load(base_logits + row[:, None] * base_stride + t, mask=counted, other=-INF).to(tl.float64)
            index = slot + tl.arange(0, SLOTS)[None, :]
            result = tl.where(t < 0, 0.0, base - x).to(tl.float32)
            tl.store(log_ratio + row[:, None] * slots + index, result, mask=valid[:, None] & (index < slots))


def rate_ratio(
    logits: Tensor,  # [T, V]
    base_logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    exclude: Excluded,
) -> tuple[Tensor, Tensor]:
    log_ratio = logits.new_empty(target.shape, dtype=torch.float32)
    escape_gap = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    tiles = triton.cdiv(logits.shape[1], TILE.value)
    tile_max, tile_excess = core.summaries(logits, tiles)
    base_max, base_excess = core.summaries(logits, tiles)
    g = core.geometry("rate_ratio", logits)
    arguments = {
        "logits": logits, "logits_stride": logits.stride(0),
        "base_logits": base_logits, "base_stride": base_logits.stride(0),
        **exclude.arguments,
        "target": target, "target_stride": target.stride(0), "slot_stride": target.stride(1),
        "tile_max": tile_max, "tile_excess": tile_excess, "base_max": base_max, "base_excess": base_excess,
        "log_ratio": log_ratio, "escape_gap": escape_gap, "rows": logits.shape[0], "columns": logits.shape[1],
        "slots": target.shape[1], "tiles": tiles, "split_tiles": g.split_tiles, **g.constants,
        "SLOTS": core.slots_of(target.shape[1]), "BLOCK": core.block_of(tiles), **g.options,
    }  # fmt: skip
    if g.splits == 1:
        launch(rate_ratio_kernel, (g.blocks, 1), SUM=True, FINISH=True, **arguments)
    else:
        launch(rate_ratio_kernel, (g.blocks, g.splits), SUM=True, FINISH=False, **arguments)
        launch(rate_ratio_kernel, (g.blocks, 1), SUM=False, FINISH=True, **arguments)
    return log_ratio, escape_gap
