"""entropy: of the distribution of a row's next jump, in one read of it, and its gradient.

Contract: dam/ops/entropy.py.
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
def merge_moments(tile_max, tile_excess, tile_moment, offset, tiles, scale, reference, BLOCK: tl.constexpr):
    """Over whole rows: sum of exp(scale (x - reference)) (x - reference), float64 [lanes]."""
    totals = tl.zeros((offset.shape[0], BLOCK), tl.float64)
    index = tl.arange(0, BLOCK)[None, :]
    for first in range(0, tiles, BLOCK):
        inside = first + index < tiles
        at = offset[:, None] + first + index
        top = tl.load(tile_max + at, mask=inside, other=-INF).to(tl.float64)
        mass = tl.exp(scale * (top - reference[:, None]))
        total = 1.0 + tl.load(tile_excess + at, mask=inside, other=-1.0).to(tl.float64)
        moment = tl.load(tile_moment + at, mask=inside, other=0.0).to(tl.float64)
        # Not 0 * -inf for a tile with nothing to reach.
        totals += tl.where(mass == 0.0, 0.0, mass * (moment + total * (top - reference[:, None])))
    return tl.sum(totals, axis=1)


@triton.jit(do_not_specialize=core.VARYING)
def entropy_kernel(
    logits,  # [T, V]
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    tile_max,  # [T, tiles]
    tile_excess,
    tile_moment,  # sum of exp(scale (x - max)) (x - max)
    entropy,  # [T]
    log_escape,  # float64 [T]
    rows,
    columns,
    tiles,
    split_tiles,
    scale_high,
    scale_low,
    c_high,
    c_low,
    SUM: tl.constexpr,  # read the logits and keep what is merged of each tile
    FINISH: tl.constexpr,  # and then merge it
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    if SUM:
        lane = tl.arange(0, ROWS * TILES)
        lane_row = first_row + lane // TILES
        lane_valid = lane_row < rows
        lane_row = tl.minimum(lane_row, rows - 1)
        begin = 0
        end = tiles
        if not FINISH:
            begin = tl.program_id(1) * split_tiles
            end = tl.minimum(begin + split_tiles, tiles)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
        for start in range(begin, end, TILES):
            tile = start + lane % TILES
            x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
            x = core.without_excluded(
                x, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS
            )
            top, excess, rate = core.summary_of_tile(x, c_high, c_low, UNIT)
            term = tl.where(rate == 0.0, 0.0, rate * (x - core.pivot(top)[None, :, None]))  # not 0 * -inf
            at = lane_row * tiles + tile
            stored = lane_valid & (tile < end)
            tl.store(tile_max + at, top, mask=stored)
            tl.store(tile_excess + at, excess, mask=stored)
            tl.store(tile_moment + at, core.sum_of_tile(term), mask=stored)
        if FINISH:
            tl.debug_barrier()  # other threads of the program read what is kept
    if FINISH:
        row = first_row + tl.arange(0, ROWS)
        valid = row < rows
        row = tl.minimum(row, rows - 1)
        scale = core.float64_of(scale_high, scale_low)
        top, total = core.merge_tiles(tile_max, tile_excess, row * tiles, tiles, scale, BLOCK)
        reference = core.pivot(top).to(tl.float64)
        moment = merge_moments(tile_max, tile_excess, tile_moment, row * tiles, tiles, scale, reference, BLOCK)
        log_total = tl.log(total)
        tl.store(log_escape + row, scale * reference + log_total, mask=valid)
        # Two terms of one sign: the entropy of a row that is nearly certain keeps its digits.
        tl.store(entropy + row, (log_total - scale * moment / total).to(tl.float32), mask=valid)


@triton.jit(do_not_specialize=core.VARYING)
def entropy_backward_kernel(
    logits,  # [T, V]
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    entropy,  # float64 [T], as are the next three
    log_escape,
    total,
    slope,
    gradient,  # [T, V]
    gradient_stride,
    rows,
    columns,
    split_tiles,
    scale_high,
    scale_low,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """-p(v) (total + slope (entropy + log p(v))) / temperature over the tiles of a split of the row."""
    begin = tl.program_id(1) * split_tiles
    end = tl.minimum(begin + split_tiles, tl.cdiv(columns, TILE))
    lane = tl.arange(0, ROWS * TILES)
    row = tl.program_id(0).to(tl.int64) * ROWS + lane // TILES
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    scale = core.float64_of(scale_high, scale_low)
    weight = tl.load(slope + row)
    constant = (-scale * (tl.load(total + row) + weight * tl.load(entropy + row))).to(tl.float32)[None, :, None]
    linear = (-scale * scale * weight).to(tl.float32)[None, :, None]
    reference = tl.load(log_escape + row) / scale
    high = reference.to(tl.float32)
    low = (reference - high.to(tl.float64)).to(tl.float32)
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, row * logits_stride, tile, columns, True, PIECES, WIDTH)
        x = core.without_excluded(x, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS)
        relative = (x - high[None, :, None]) - low[None, :, None]  # log p(v) / scale
        probability = core.exp_scaled(relative, c_high, c_low, UNIT)
        result = tl.where(probability == 0.0, 0.0, probability * (constant + linear * relative))
        core.store_tiles(gradient, row * gradient_stride, tile, column, columns, end, valid, result)


def entropy(
    logits: Tensor,  # [T, V]
    exclude: Excluded,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    value = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    log_escape = logits.new_empty(logits.shape[:1], dtype=torch.float64)
    tiles = triton.cdiv(logits.shape[1], TILE.value)
    tile_max, tile_excess = core.summaries(logits, tiles)
    g = core.geometry("entropy", logits)
    arguments = {
        "logits": logits, "logits_stride": logits.stride(0),
        **exclude.arguments,
        "tile_max": tile_max, "tile_excess": tile_excess, "tile_moment": torch.empty_like(tile_max),
        "entropy": value, "log_escape": log_escape, "rows": logits.shape[0], "columns": logits.shape[1],
        "tiles": tiles, "split_tiles": g.split_tiles, **core.scale_of(temperature)._asdict(), **g.constants,
        "BLOCK": core.block_of(tiles), **g.options,
    }  # fmt: skip
    if g.splits == 1:
        launch(entropy_kernel, (g.blocks, 1), SUM=True, FINISH=True, **arguments)
    else:
        launch(entropy_kernel, (g.blocks, g.splits), SUM=True, FINISH=False, **arguments)
        launch(entropy_kernel, (g.blocks, 1), SUM=False, FINISH=True, **arguments)
    return value, log_escape


def entropy_backward(
    logits: Tensor,  # [T, V]
    value: Tensor,  # float64 [T], as are the next three
    log_escape: Tensor,
    total: Tensor,
    slope: Tensor,
    exclude: Excluded,
    temperature: float,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g = core.geometry("entropy", logits)
    launch(
        entropy_backward_kernel, (g.blocks, g.splits),
        logits=logits, logits_stride=logits.stride(0),
        **exclude.arguments, entropy=value, log_escape=log_escape, total=total,
        slope=slope, gradient=gradient, gradient_stride=gradient.stride(0), rows=logits.shape[0],
        columns=logits.shape[1], split_tiles=g.split_tiles, **core.scale_of(temperature)._asdict(), **g.constants,
        **g.options,
    )  # fmt: skip
    return gradient
