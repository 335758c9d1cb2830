"""gradient: of the logits of some columns of rows, for ops whose sums over a row were made elsewhere, too.

Contract: dam/ops/_gradient.py.
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
def load_shares(shares, row, HAS_BASE: tl.constexpr):
    """Coefficient and reference of a row's share of the logits and of the base's: float32 and float64 [lanes]."""
    at = shares + row * 4
    coefficient = core.clamp_to_float32(tl.load(at))
    reference = tl.load(at + 1)
    base_coefficient = tl.zeros(row.shape, tl.float32)
    base_reference = tl.zeros(row.shape, tl.float64)
    if HAS_BASE:
        base_coefficient = core.clamp_to_float32(tl.load(at + 2))
        base_reference = tl.load(at + 3)
    return coefficient, reference, base_coefficient, base_reference


@triton.jit(do_not_specialize=[*core.VARYING, "first_column"])
def gradient_kernel(
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
    pull,  # float64 [T, J]
    pull_stride,
    pull_slot_stride,
    shares,  # float64 [T, 4]
    target_gradient,  # [T, J]: the gradient at the targets
    gradient,  # [T, V], may be the logits
    gradient_stride,
    first_column,  # of these in the vocabulary, which exclude and target are columns of
    vocabulary,
    rows,
    columns,
    slots,
    split_tiles,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """share of x - share of base logits - sum_j pull_j 1[v = target_j] over the tiles of a split of the row."""
    HAS_BASE: tl.constexpr = base_logits is not None
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    begin = tl.program_id(1) * split_tiles
    end = tl.minimum(begin + split_tiles, tl.cdiv(columns, TILE))
    left = first_column + begin * TILE
    right = first_column + tl.minimum(end * TILE, columns)
    row = first_row + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, vocabulary)
    coefficient, reference, base_coefficient, base_reference = load_shares(shares, row, HAS_BASE)

    # The targets of these tiles before anything is written: the gradient may take the place of the logits.
    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, vocabulary, SLOTS)
        here = counted & (t >= left) & (t < right)
        at = t - first_column
        x = tl.load(logits + row[:, None] * logits_stride + at, mask=here, other=-INF).to(tl.float32)
        result = core.share(x, coefficient[:, None], reference[:, None], c_high, c_low, UNIT)
        if HAS_BASE:
            b = tl.load(base_logits + row[:, None] * base_stride + at, mask=here, other=-INF).to(tl.float32)
            result -= core.share(b, base_coefficient[:, None], base_reference[:, None], c_high, c_low, UNIT)
        pulled = core.weight_at(
            t, target, target_stride, slot_stride, pull, pull_stride, pull_slot_stride, row, slots, vocabulary, SLOTS
        )
        index = slot + tl.arange(0, SLOTS)[None, :]
        result = (result.to(tl.float64) - pulled).to(tl.float32)
        tl.store(target_gradient + row[:, None] * slots + index, result, mask=valid[:, None] & here)
    tl.debug_barrier()

    lane = tl.arange(0, ROWS * TILES)
    lane_row = first_row + lane // TILES
    lane_valid = lane_row < rows
    lane_row = tl.minimum(lane_row, rows - 1)
    lane_excluded = None
    if exclude is not None:
        lane_excluded = core.load_excluded(exclude, exclude_stride, lane_row, vocabulary) - first_column
    lane_coefficient = core.per_lane(coefficient, TILES)[None, :, None]
    lane_reference = core.per_lane(reference, TILES)[None, :, None]
    lane_base_coefficient = core.per_lane(base_coefficient, TILES)[None, :, None]
    lane_base_reference = core.per_lane(base_reference, TILES)[None, :, None]
    for start in range(begin, end, TILES):
        tile = start + lane % TILES
        x, column = core.load_tiles(logits, lane_row * logits_stride, tile, columns, True, PIECES, WIDTH)
        low, high = start * TILE, (start + TILES) * TILE
        x = core.without_excluded(x, column, lane_excluded, suppressed, columns, low, high, ROWS)
        result = core.share(x, lane_coefficient, lane_reference, c_high, c_low, UNIT)
        if HAS_BASE:
            b, _ = core.load_tiles(base_logits, lane_row * base_stride, tile, columns, True, PIECES, WIDTH)
            b = core.without_excluded(b, column, lane_excluded, suppressed, columns, low, high, ROWS)
            result -= core.share(b, lane_base_coefficient, lane_base_reference, c_high, c_low, UNIT)
        core.store_tiles(gradient, lane_row * gradient_stride, tile, column, columns, end, lane_valid, result)
    tl.debug_barrier()

    for slot in range(0, slots, SLOTS):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, vocabulary, SLOTS)
        here = valid[:, None] & counted & (t >= left) & (t < right)
        index = slot + tl.arange(0, SLOTS)[None, :]
        result = tl.load(target_gradient + row[:, None] * slots + index, mask=here)
        at = gradient + row[:, None] * gradient_stride + t - first_column
        tl.store(at, core.rounded(result, gradient.dtype.element_ty), mask=here)


def gradient(
    logits: Tensor,  # [T, V]
    base_logits: Tensor | None,  # [T, V]
    first_column: int,
    vocabulary: int,
    target: Tensor,  # [T, J]
    pull: Tensor,  # float64 [T, J]
    shares: Tensor,  # float64 [T, 4], contiguous
    exclude: Excluded,
    temperature: float,
    into: Tensor,  # [T, V]
) -> None:
    g = core.geometry("log_prob" if base_logits is None else "matching_loss", logits)
    scale = core.scale_of(temperature)
    launch(
        gradient_kernel, (g.blocks, g.splits),
        logits=logits, logits_stride=logits.stride(0),
        base_logits=base_logits, base_stride=core.stride_of(base_logits),
        **exclude.arguments,
        target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
        pull=pull, pull_stride=pull.stride(0), pull_slot_stride=pull.stride(1), shares=shares,
        target_gradient=logits.new_empty(target.shape, dtype=torch.float32),
        gradient=into, gradient_stride=into.stride(0), first_column=first_column, vocabulary=vocabulary,
        rows=logits.shape[0], columns=logits.shape[1], slots=target.shape[1], split_tiles=g.split_tiles,
        c_high=scale.c_high, c_low=scale.c_low, UNIT=scale.UNIT, **g.constants,
        SLOTS=core.slots_of(target.shape[1]), **g.options,
    )  # fmt: skip
