"""log_prob: the log-probability of given destinations in one read of a row, and its gradient in another.

Contract: dam/ops/log_prob.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import core
from dam.kernels.core import INF, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch


@triton.jit(do_not_specialize=core.VARYING)
def log_prob_kernel(
    logits,  # [T, columns of tiles first .. last], or None: then `value` holds the logits of all targets
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    tile_max,  # [T, tiles]
    tile_excess,
    value,  # [T, J]; until the last tiles were seen, the logits of the targets so far
    log_escape,  # float64 [T]
    rows,
    columns,
    slots,
    first,
    last,
    tiles,
    split_tiles,
    scale_high,
    scale_low,
    c_high,
    c_low,
    SUM: tl.constexpr,  # read the logits and keep the summary of each tile
    FINISH: tl.constexpr,  # and then look the targets up
    UNIT: tl.constexpr,
    OPENS: tl.constexpr,  # these are the row's first tiles
    CLOSES: tl.constexpr,  # these are its last
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    shift = first.to(tl.int64) * TILE
    if SUM:
        lane_row = first_row + tl.arange(0, ROWS * TILES) // TILES
        valid = lane_row < rows
        lane_row = tl.minimum(lane_row, rows - 1)
        begin = first
        end = last
        if not FINISH:
            begin = first + tl.program_id(1) * split_tiles
            end = tl.minimum(begin + split_tiles, last)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
        core.sum_tiles(
            logits, lane_row * logits_stride - shift, excluded, suppressed, columns, begin, end, tile_max,
            tile_excess, lane_row * tiles, valid, c_high, c_low, UNIT, ROWS, TILES, PIECES, WIDTH,
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
        scale = core.float64_of(scale_high, scale_low)
        top = tl.zeros(row.shape, tl.float32)
        total = tl.zeros(row.shape, tl.float64)
        if CLOSES:
            top, total = core.merge_tiles(tile_max, tile_excess, row * tiles, tiles, scale, BLOCK)
            top = core.pivot(top)
            tl.store(log_escape + row, scale * top.to(tl.float64) + tl.log(total), mask=valid)
        log_total = tl.log(total)
        for slot in range(0, slots, SLOTS):
            t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
            index = slot + tl.arange(0, SLOTS)[None, :]
            at = value + row[:, None] * slots + index
            stored = valid[:, None] & (index < slots)
            if logits is None:
                x = tl.load(at, mask=stored & counted, other=-INF)
            else:
                here = counted & (t >= shift) & (t < last.to(tl.int64) * TILE)
                x = tl.load(logits + (row * logits_stride - shift)[:, None] + t, mask=here, other=-INF).to(tl.float32)
                if not OPENS:
                    x = tl.where(here, x, tl.load(at, mask=stored & counted & (t < shift), other=-INF))
            if CLOSES:
                result = scale * (x.to(tl.float64) - top.to(tl.float64)[:, None]) - log_total[:, None]
                # An excluded target cannot be reached, whatever its logit; no target is no jump.
                result = tl.where(t < 0, 0.0, tl.where(counted | (result != result), result, -INF))
                tl.store(at, result.to(tl.float32), mask=stored)
            else:
                tl.store(at, x, mask=stored & here)


@triton.jit(do_not_specialize=core.VARYING)
def log_prob_backward_kernel(
    grad,  # [T, J], any strides
    grad_stride,
    grad_slot_stride,
    logits,  # [T, V]
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    log_escape,  # [T]
    target_gradient,  # [T, J]: the gradient at the targets
    gradient,  # [T, V], may be the logits
    gradient_stride,
    rows,
    columns,
    slots,
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
    SLOTS: tl.constexpr,
):
    """sum_j grad_j (1[v = target_j] - p(v)) / temperature over the tiles of a split of the row."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    begin = tl.program_id(1) * split_tiles
    end = tl.minimum(begin + split_tiles, tl.cdiv(columns, TILE))
    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    scale = core.float64_of(scale_high, scale_low)
    reference = tl.load(log_escape + row).to(tl.float64) / scale
    asked = tl.zeros((ROWS, SLOTS), tl.float64)
    for slot in range(0, slots, SLOTS):
        _, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        upstream = core.load_per_slot(grad, grad_stride, grad_slot_stride, row, slot, slots, SLOTS)
        asked += tl.where(counted, upstream, 0.0)
    coefficient = core.clamp_to_float32(scale * tl.sum(asked, axis=1))

    # The targets of these tiles before anything is written: the gradient may take the place of the logits.
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        here = counted & (t >= begin * TILE) & (t < end * TILE)
        x = tl.load(logits + row[:, None] * logits_stride + t, mask=here, other=-INF).to(tl.float32)
        pulled = core.weight_at(
            t, target, target_stride, slot_stride, grad, grad_stride, grad_slot_stride, row, slots, columns, SLOTS
        )
        pushed = core.share(x, coefficient[:, None], reference[:, None], c_high, c_low, UNIT)
        index = slot + tl.arange(0, SLOTS)[None, :]
        result = (scale * pulled - pushed.to(tl.float64)).to(tl.float32)
        tl.store(target_gradient + row[:, None] * slots + index, result, mask=valid[:, None] & here)
    tl.debug_barrier()

    lane = tl.arange(0, ROWS * TILES)
    lane_row = first_row + lane // TILES
    lane_valid = lane_row < rows
    lane_row = tl.minimum(lane_row, rows - 1)
    lane_excluded = None
    if exclude is not None:
        lane_excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
    lane_coefficient = core.per_lane(coefficient, TILES)[None, :, None]
    lane_reference = core.per_lane(reference, TILES)[None, :, None]
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
        x = core.without_excluded(
            x, column, lane_excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS
        )
        result = -core.share(x, lane_coefficient, lane_reference, c_high, c_low, UNIT)
        core.store_tiles(gradient, lane_row * gradient_stride, tile, column, columns, end, lane_valid, result)
    tl.debug_barrier()

    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, SLOTS)
        here = valid[:, None] & counted & (t >= begin * TILE) & (t < end * TILE)
        index = slot + tl.arange(0, SLOTS)[None, :]
        result = tl.load(target_gradient + row[:, None] * slots + index, mask=here)
        tl.store(
            gradient + row[:, None] * gradient_stride + t, core.rounded(result, gradient.dtype.element_ty), mask=here
        )


class Lookup:
    """Log-probabilities of targets in rows whose logits come in one piece, or in chunks of whole tiles."""

    def __init__(
        self,
        like: Tensor,  # [T, .], gives T and the device
        columns: int,
        target: Tensor,  # [T, J]
        exclude: Excluded,
        temperature: float,
        out: tuple[Tensor, Tensor] | None = None,  # [T, J] and float64 [T]
    ):
        self.rows, self.columns = like.shape[0], columns
        self.tiles = triton.cdiv(columns, TILE.value)
        self.target, self.exclude, self.scale = target, exclude, core.scale_of(temperature)
        self.value, self.log_escape = out or (
            like.new_empty(target.shape, dtype=torch.float32),
            like.new_empty(like.shape[:1], dtype=torch.float64),
        )
        self.like = like
        self.summaries: tuple[Tensor, Tensor] | None = None  # of the tiles seen so far

    def see(self, logits: Tensor, first: int = 0) -> None:
        """Takes the logits of the tiles from `first` on, [T, .]: all of the rest or a multiple of 1024 columns."""
        if self.summaries is None:
            self.summaries = core.summaries(self.like, self.tiles)
        last = first + triton.cdiv(logits.shape[1], TILE.value)
        g = core.geometry("log_prob", logits)
        arguments = {
            **self._arguments(g, *self.summaries), "logits": logits,
            "logits_stride": core.stride_of(logits), "first": first, "last": last, "OPENS": first == 0,
            "CLOSES": last == self.tiles,
        }  # fmt: skip
        if g.splits == 1:
            launch(log_prob_kernel, (g.blocks, 1), SUM=True, FINISH=True, **arguments)
        else:
            launch(log_prob_kernel, (g.blocks, g.splits), SUM=True, FINISH=False, **arguments)
            launch(log_prob_kernel, (g.blocks, 1), SUM=False, FINISH=True, **arguments)

    def finish(self, block_max: Tensor, block_excess: Tensor) -> None:
        """From summaries [T, blocks] of logits that are gone, and those of the targets, which `value` holds."""
        g = core.geometry("log_prob", self.like, self.columns)
        launch(
            log_prob_kernel, (g.blocks, 1), SUM=False, FINISH=True, **self._arguments(g, block_max, block_excess),
            logits=None, logits_stride=0, first=0, last=0, OPENS=True, CLOSES=True,
        )  # fmt: skip

    def _arguments(self, g: core.Geometry, summary_max: Tensor, summary_excess: Tensor) -> dict[str, Any]:
        summaries = summary_max.shape[1]
        return {
            **self.exclude.arguments,
            "target": self.target, "target_stride": self.target.stride(0), "slot_stride": self.target.stride(1),
            "tile_max": summary_max, "tile_excess": summary_excess, "value": self.value,
            "log_escape": self.log_escape, "rows": self.rows, "columns": self.columns,
            "slots": self.target.shape[1], "tiles": summaries, "split_tiles": g.split_tiles, **g.constants,
            **g.options, **self.scale._asdict(), "SLOTS": core.slots_of(self.target.shape[1]),
            "BLOCK": core.block_of(summaries),
        }  # fmt: skip


def log_prob(
    logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    exclude: Excluded,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    lookup = Lookup(logits, logits.shape[1], target, exclude, temperature)
    lookup.see(logits)
    return lookup.value, lookup.log_escape


def log_prob_backward(
    grad: Tensor,  # [T, J]
    logits: Tensor,  # [T, V]
    target: Tensor,  # [T, J]
    log_escape: Tensor,  # [T]
    exclude: Excluded,
    temperature: float,
    into: Tensor | None = None,  # [T, V]
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    g = core.geometry("log_prob", logits)
    launch(
        log_prob_backward_kernel, (g.blocks, g.splits),
        grad=grad, grad_stride=grad.stride(0), grad_slot_stride=grad.stride(1),
        logits=logits, logits_stride=logits.stride(0),
        **exclude.arguments,
        target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
        log_escape=log_escape.contiguous(), target_gradient=grad.new_empty(grad.shape, dtype=torch.float32),
        gradient=gradient, gradient_stride=gradient.stride(0), rows=logits.shape[0], columns=logits.shape[1],
        slots=target.shape[1], split_tiles=g.split_tiles, **core.scale_of(temperature)._asdict(), **g.constants,
        SLOTS=core.slots_of(target.shape[1]), **g.options,
    )  # fmt: skip
    return gradient
