"""backward_kolmogorov: closed forms, and walks on lattices as products with matrices made on the fly, in float64.

Contract: dam/ops/backward_kolmogorov.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs
from dam.kernels.core import INF
from dam.kernels.launch import launch

# ---- Uniform and Absorbing: result = stays * terminal + one number per row


@triton.jit
def closed_form_kernel(
    terminal,  # [B, V]
    totals,  # float64 [B, slices], or None where a program has whole rows
    result,  # [B, V]
    rows,  # B
    columns,  # V
    stride,
    slice_columns,
    slices,
    mask_token,
    stays: tl.float64,
    moves: tl.float64,
    ABSORBING: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SUM: tl.constexpr,  # sum rows, or slices of them
    WRITE: tl.constexpr,  # write the result, from the sums of this program or of all slices
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):
    begin = tl.program_id(1) * slice_columns
    end = tl.minimum(begin + slice_columns, columns)
    # Fewer programs than blocks of rows where rows are large, so that what is read again is still in the L2 cache.
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < rows
        source = (terminal + row * stride)[:, None]

        if SUM:
            sums = tl.zeros([ROWS, COLUMNS], tl.float64)
            for start in range(begin, end, COLUMNS):
                column = (start + tl.arange(0, COLUMNS))[None, :]
                mask = inside[:, None] & (column < end)
                x = tl.load(source + column, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float64)
                if ABSORBING:
                    # Summed around the mask token, as subtracting it again would cancel.
                    x = tl.where(column == mask_token, 0.0, x)
                sums += x
            total = tl.sum(sums, 1)
            if not WRITE:
                tl.store(totals + row * slices + tl.program_id(1), total, mask=inside)
        else:
            part = tl.arange(0, SLICES)[None, :]
            sums = tl.load(totals + (row * slices)[:, None] + part, mask=inside[:, None] & (part < slices), other=0.0)
            total = tl.sum(sums, 1)

        if WRITE:
            if ABSORBING:
                at_mask = tl.load(terminal + row * stride + mask_token, mask=inside, other=0.0).to(tl.float64)
                poison = (total + at_mask) * 0.0  # NaN if any entry of the row is not finite
                if TRANSPOSE:
                    term = poison
                    at_mask += total * moves + poison
                else:
                    term = at_mask * moves + poison
                    at_mask += poison
            else:
                term = total / columns * moves + total * 0.0
            # Backward, since of a row larger than its part of the cache the end is still there.
            steps = tl.cdiv(end - begin, COLUMNS)
            for step in range(steps):
                column = (begin + (steps - 1 - step) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                mask = inside[:, None] & (column < end)
                x = tl.load(source + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float64)
                if ABSORBING:
                    mask = mask & (column != mask_token)
                y = x * stays + term[:, None]
                tl.store(result + (row * columns)[:, None] + column, y.to(tl.float32), mask=mask)
            if ABSORBING:
                if (begin <= mask_token) & (mask_token < end):
                    tl.store(result + row * columns + mask_token, at_mask.to(tl.float32), mask=inside)


# ---- Lattice


@triton.jit
def _tap(taps, distance, cycle, radius):
    """Weight of a point at a distance below `cycle`, which goes round it."""
    shorter = tl.minimum(distance, cycle - distance)
    weight = tl.load(taps + shorter, mask=(shorter >= 0) & (shorter <= radius), other=0.0)
    # The point opposite is reached from both sides, each with its weight.
    return tl.where(shorter * 2 == cycle, weight * 2, weight)


@triton.jit
def _position(start, length, PERIODIC: tl.constexpr, DEPTH: tl.constexpr):
    """Points of a line from `start` on, taken round the cycle."""
    point = start + tl.arange(0, DEPTH)
    if PERIODIC:
        point = tl.where(point < 0, point + length, tl.where(point >= length, point - length, point))
    return point


@triton.jit
def _old(
    source_line, inside, start, end, length, inner, PERIODIC: tl.constexpr, ALONG: tl.constexpr, DEPTH: tl.constexpr
):
    """Values from which others are reached, 0 from `end` on: [LINES, DEPTH] or, across the lines, its transpose."""
    live = start + tl.arange(0, DEPTH) < end
    offset = _position(start, length, PERIODIC, DEPTH) * inner
    if ALONG:
        x = tl.load(source_line[:, None] + offset[None, :], mask=inside[:, None] & live[None, :], other=0.0)
    else:
        x = tl.load(source_line[None, :] + offset[:, None], mask=live[:, None] & inside[None, :], other=0.0)
    return x.to(tl.float64)


@triton.jit(do_not_specialize=["lines", "radius"])
def walk_kernel(
    source,  # [B, V], float64 after the first dimension
    result,  # [B, V], float64 before the last dimension
    not_finite,  # int32 [B], set to 1 for rows that hold something not finite
    taps,  # float64 [radius + 1]
    lines,  # B V / length
    row_lines,  # V / length
    stride,  # of the source's rows
    length,
    inner,  # distance of neighbours
    radius,
    PERIODIC: tl.constexpr,
    ALONG: tl.constexpr,  # inner is 1
    POINTS: tl.constexpr,
    LINES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The walk along one dimension, as a product with a matrix of weights: new[i] = sum_j W[i, j] old[j].

    With both points on a cycle W[i, j] = w[their distance]. A line with two ends is one half of a cycle of twice its
    length whose other half mirrors it, so the image of j, at -1 - j, adds its weight.
    """
    tiles = tl.cdiv(length, POINTS)
    first = tl.program_id(0) % tiles * POINTS
    line = (tl.program_id(0) // tiles).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = line < lines
    row = line // row_lines
    within = (line % row_lines).to(tl.int32)
    origin = within // inner * (inner * length) + within % inner
    source_line = source + row * stride + origin
    result_line = result + row * row_lines * length + origin
    point = first + tl.arange(0, POINTS)

    # Points from which others are reached: positions, before those past an end are taken round the cycle.
    begin = first - radius
    end = first + POINTS + radius
    if PERIODIC:
        cycle = length
        mirrored = False
        if end - begin >= length:
            begin = 0
            end = length
    else:
        cycle = 2 * length
        begin = tl.maximum(begin, 0)
        end = tl.minimum(end, length)
        # Where the distances of images, point + other + 1, include one of at most the radius.
        mirrored = (first + begin < radius) | (first + POINTS + end > cycle - radius)

    if ALONG:
        sums = tl.zeros([LINES, POINTS], tl.float64)
    else:
        sums = tl.zeros([POINTS, LINES], tl.float64)
    # Loaded a step ahead. Triton 3.6 also fails to compile a product of values that it sees come from bfloat16.
    ahead = _old(source_line, inside, begin, end, length, inner, PERIODIC, ALONG, DEPTH)
    for start in range(begin, end, DEPTH):
        old = ahead
        ahead = _old(source_line, inside, start + DEPTH, end, length, inner, PERIODIC, ALONG, DEPTH)
        other = _position(start, length, PERIODIC, DEPTH)
        if ALONG:
            weights = _tap(taps, tl.abs(point[None, :] - other[:, None]), cycle, radius)
            if mirrored:
                weights += _tap(taps, point[None, :] + other[:, None] + 1, cycle, radius)
            sums = tl.dot(old, weights, sums, out_dtype=tl.float64)
        else:
            weights = _tap(taps, tl.abs(point[:, None] - other[None, :]), cycle, radius)
            if mirrored:
                weights += _tap(taps, point[:, None] + other[None, :] + 1, cycle, radius)
            sums = tl.dot(weights, old, sums, out_dtype=tl.float64)

    # Any weight, also 0, times what is not finite is not finite: the products of a point's own tile show it.
    wrong = (tl.abs(sums) < INF) == 0
    if ALONG:
        seen = tl.max(wrong.to(tl.int32), 1)
        pointer = result_line[:, None] + point[None, :]
        mask = inside[:, None] & (point < length)[None, :]
    else:
        seen = tl.max(wrong.to(tl.int32), 0)
        pointer = result_line[None, :] + (point * inner)[:, None]
        mask = (point < length)[:, None] & inside[None, :]
    tl.store(pointer, sums.to(result.dtype.element_ty), mask=mask)
    tl.store(not_finite + row, 1, mask=inside & (seen > 0))


@triton.jit
def fill_with_nan_kernel(
    not_finite,  # int32 [B]
    result,  # [B, V]
    rows,  # B
    columns,  # V
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    marked = tl.load(not_finite + row, mask=row < rows, other=0) > 0
    if tl.max(marked.to(tl.int32), 0) > 0:
        for start in range(0, columns, COLUMNS):
            column = (start + tl.arange(0, COLUMNS))[None, :]
            pointer = result + (row * columns)[:, None] + column
            nan = tl.full([ROWS, COLUMNS], float("nan"), tl.float32)
            tl.store(pointer, nan, mask=marked[:, None] & (column < columns))


class Walk(NamedTuple):
    """The walk along one dimension of a lattice."""

    length: int
    inner: int  # distance of neighbours
    periodic: bool
    weights: list[float]  # of a point and of those at distances 1, 2, ... on either side


def lattice(
    terminal: Tensor,  # [B, V]
    walks: list[Walk],  # at least one: each row is looked at
    taps: Tensor,  # float64 [walks, .]: their weights, of an even width, so that one kernel serves all
    *,
    workspace: int,  # bytes
) -> Tensor:
    rows, columns = terminal.shape
    values = configs.lookup("backward_kolmogorov", terminal.device, terminal.element_size(), rows, columns)
    result = terminal.new_empty(terminal.shape, dtype=torch.float32)
    not_finite = torch.zeros(rows, dtype=torch.int32, device=terminal.device)
    buffers = min(len(walks) - 1, 2)
    step = rows
    if buffers > 0:
        memory = min(values["chunk_mb"] * 2**20, workspace)
        step = min(rows, max(1, memory // (buffers * columns * 8)))
    states = torch.empty((buffers, step, columns), dtype=torch.float64, device=terminal.device)
    for start in range(0, rows, max(step, 1)):
        part = slice(start, min(start + step, rows))
        source = terminal[part]
        for i, walk in enumerate(walks):
            last = i == len(walks) - 1
            target = result[part] if last else states[i % 2]
            _launch_walk(source, target, not_finite[part], taps[i], walk, values)
            source = target[: part.stop - start]
    block = _block(rows, columns, values["elements"])
    launch(
        fill_with_nan_kernel,
        (triton.cdiv(rows, block["ROWS"]),),
        warps=values["warps"],
        not_finite=not_finite,
        result=result,
        rows=rows,
        columns=columns,
        **block,
    )
    return result


def _launch_walk(
    source: Tensor, target: Tensor, not_finite: Tensor, taps: Tensor, walk: Walk, values: dict[str, Any]
) -> None:
    rows, columns = source.shape
    lines = rows * (columns // walk.length)
    points = max(16, min(triton.next_power_of_2(walk.length), values["points"]))
    side = min(triton.next_power_of_2(max(lines, 1)), values["lines"])
    launch(
        walk_kernel,
        (triton.cdiv(lines, side) * triton.cdiv(walk.length, points),),
        warps=values["walk_warps"],
        source=source,
        result=target,
        not_finite=not_finite,
        taps=taps,
        lines=lines,
        row_lines=columns // walk.length,
        stride=source.stride(0),
        length=walk.length,
        inner=walk.inner,
        radius=len(walk.weights) - 1,
        PERIODIC=walk.periodic,
        ALONG=walk.inner == 1,
        POINTS=points,
        LINES=side,
        DEPTH=max(16, min(triton.next_power_of_2(walk.length), values["depth"])),
    )


def _block(rows: int, columns: int, elements: int) -> dict[str, int]:
    """Rows and columns that a program takes at once."""
    block_columns = min(triton.next_power_of_2(columns), elements)
    return {
        "ROWS": min(triton.next_power_of_2(max(rows, 1)), elements // block_columns),
        "COLUMNS": block_columns,
    }


def closed_form(
    terminal: Tensor,  # [B, V]
    mask_token: int | None,  # of an absorbing chain; None for a uniform one
    stays: float,  # e^-duration
    moves: float,  # 1 - e^-duration
    transpose: bool,
) -> Tensor:
    rows, columns = terminal.shape
    values = configs.lookup("backward_kolmogorov", terminal.device, terminal.element_size(), rows, columns)
    result = terminal.new_empty(terminal.shape, dtype=torch.float32)
    block = _block(rows, columns, values["elements"])
    blocks = triton.cdiv(rows, block["ROWS"])
    steps = triton.cdiv(columns, block["COLUMNS"])
    slice_steps = triton.cdiv(steps, max(1, min(steps, values["programs"] // max(blocks, 1))))
    slices = triton.cdiv(steps, slice_steps)
    bytes_of_block = block["ROWS"] * columns * terminal.element_size()
    most = max(values["programs"], values["cache_mb"] * 2**20 // bytes_of_block)
    arguments = {
        "terminal": terminal,
        "result": result,
        "rows": rows,
        "columns": columns,
        "stride": terminal.stride(0),
        "slice_columns": slice_steps * block["COLUMNS"],
        "slices": slices,
        "mask_token": mask_token or 0,
        "stays": stays,
        "moves": moves,
        "ABSORBING": mask_token is not None,
        "TRANSPOSE": transpose,
        "SLICES": triton.next_power_of_2(slices),
        **block,
    }
    if slices == 1:
        launch(
            closed_form_kernel,
            (min(blocks, most), 1),
            warps=values["warps"],
            totals=None,
            SUM=True,
            WRITE=True,
            **arguments,
        )
    else:
        totals = torch.empty((rows, slices), dtype=torch.float64, device=terminal.device)
        for final in (False, True):
            launch(
                closed_form_kernel,
                (blocks, slices),
                warps=values["warps"],
                totals=totals,
                SUM=not final,
                WRITE=final,
                **arguments,
            )
    return result
