"""Logits of a block of rows and columns out of hidden states and head, on the chip: what the fused linear_* ops share.

    x = hidden @ weight^T + low_hidden @ low_weight^T + bias;  logits = x, or softcap tanh(x / softcap)

The second product, of a low rank, is that of a LoRA adapter on the head. Every fused op makes two passes at most, each
with the matmul: `summary_kernel` keeps of each block of logits its maximum and sum of exponentials and what an op wants
of single logits; `gradient_kernel` makes the logits again and stores their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, core, forms
from dam.kernels import softcap as soft
from dam.kernels.core import HALF, INF, NOWHERE, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch
from dam.kernels.projection import Projection

Library = Callable[[slice, slice, Tensor], object]  # writes the logits of rows and columns


@triton.jit
def add_product(
    logits,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    hidden,  # [T, D]
    hidden_stride,
    weight,  # [V, D]
    weight_stride,
    row,
    column,
    depth,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # depth is a multiple of BLOCK_DEPTH
    PRECISION: tl.constexpr,
):
    """logits + hidden[row] @ weight[column]^T, summed in float32."""
    k = tl.arange(0, BLOCK_DEPTH)
    left = hidden + row[:, None] * hidden_stride + k[None, :]
    right = weight + column.to(tl.int64)[None, :] * weight_stride + k[:, None]
    for start in range(0, depth, BLOCK_DEPTH):
        if WHOLE:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=k[None, :] < depth - start, other=0.0)
            b = tl.load(right, mask=k[:, None] < depth - start, other=0.0)
        if core.INTERPRETED:  # whose products of bfloat16 are products of their bits
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
        left += BLOCK_DEPTH
        right += BLOCK_DEPTH
    return logits


@triton.jit
def logits_of(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    low_hidden,  # [T, R], or None
    low_hidden_stride,
    low_weight,  # [V, R], or None
    low_weight_stride,
    bias,  # [V], or None
    softcap,  # or None
    excluded,  # [BLOCK_ROWS], or None
    suppressed,  # uint8 [V], or None
    row,
    column,
    columns,
    depth,
    low_depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW_BLOCK_DEPTH: tl.constexpr,
    LOW_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 logits [BLOCK_ROWS, BLOCK_COLUMNS], -inf where excluded or past the last column."""
    inside = tl.minimum(column, columns - 1)
    logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    logits = add_product(
        logits, hidden, hidden_stride, weight, weight_stride, row, inside, depth, BLOCK_DEPTH, WHOLE, PRECISION
    )
    if low_hidden is not None:
        logits = add_product(
            logits, low_hidden, low_hidden_stride, low_weight, low_weight_stride, row, inside, low_depth,
            LOW_BLOCK_DEPTH, LOW_WHOLE, PRECISION,
        )  # fmt: skip
    if bias is not None:
        logits += tl.load(bias + inside).to(tl.float32)[None, :]
    if softcap is not None:
        logits = soft.capped(logits, softcap)
    kept = column < columns
    if suppressed is not None:
        kept = tl.load(suppressed + column, mask=kept, other=1) == 0
    reachable = kept[None, :]
    if excluded is not None:
        reachable = reachable & (column[None, :] != excluded[:, None])
    return tl.where(reachable, logits, -INF)


@triton.jit
def block_of_program(row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column block of this program: GROUP row blocks go along the columns together, and share the head's."""
    program = tl.program_id(0)
    per_group = GROUP * column_blocks
    first = program // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = program % per_group
    return first + within % size, within // size


@triton.jit
def summary_of_rows(x, c_high, c_low, UNIT: tl.constexpr):
    """Maximum and excess of each row of a block, and exp(scale * (x - maximum))."""
    top = tl.max(x, axis=1)
    e = core.exp_scaled(x - core.pivot(top)[:, None], c_high, c_low, UNIT)
    rest = tl.sum(tl.where(x == top[:, None], 0.0, e), axis=1)
    return top, core.excess_of(tl.sum(e, axis=1), rest), e


@triton.jit(do_not_specialize=[*core.VARYING, "seed_low", "seed_high"])
def summary_kernel(
    hidden,  # [T, D]
    hidden_stride,
    weight,  # [V, D]
    weight_stride,
    low_hidden,  # [T, R], or None
    low_hidden_stride,
    low_weight,  # [V, R], or None
    low_weight_stride,
    bias,  # [V], or None
    softcap,  # or None
    base_hidden,  # [T, D'], or None
    base_hidden_stride,
    base_weight,  # [V, D'], or None
    base_weight_stride,
    base_bias,  # [V], or None
    base_softcap,  # or None
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J], or None
    target_stride,
    slot_stride,
    target_logit,  # [T, J]: logits of the targets
    row_ids,  # [T], or None
    row_ids_stride,
    seed,
    seed_low,
    seed_high,
    block_max,  # [T, blocks]
    block_excess,
    base_max,
    base_excess,
    cross,  # [T, blocks]: sum of exp(scale (b - max b)) (x - max x) over base logits b
    time,  # [T, samples, blocks]: when the first token of the block arrived, relative to its maximum
    token,  # [T, samples, blocks]
    logit,  # [T, samples, blocks]
    rows,
    columns,
    depth,
    low_depth,
    base_depth,
    slots,
    samples,
    row_blocks,
    column_blocks,
    c_high,
    c_low,
    RACE: tl.constexpr,
    GREEDY: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW_BLOCK_DEPTH: tl.constexpr,
    LOW_WHOLE: tl.constexpr,
    BASE_WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = block_of_program(row_blocks, column_blocks, GROUP)
    row = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    x = logits_of(
        hidden, hidden_stride, weight, weight_stride, low_hidden, low_hidden_stride, low_weight, low_weight_stride,
        bias, softcap, excluded, suppressed, row, column, columns, depth, low_depth, BLOCK_ROWS, BLOCK_COLUMNS,
        BLOCK_DEPTH, WHOLE, LOW_BLOCK_DEPTH, LOW_WHOLE, PRECISION,
    )  # fmt: skip
    top, excess, rate = summary_of_rows(x, c_high, c_low, UNIT)
    at = row * column_blocks + column_block
    tl.store(block_max + at, top, mask=valid)
    tl.store(block_excess + at, excess, mask=valid)
    if target is not None:
        for slot in range(0, slots):
            t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, 1)
            t = tl.reshape(t, (BLOCK_ROWS,))
            here = valid & tl.reshape(counted, (BLOCK_ROWS,))
            here = here & (t >= column_block * BLOCK_COLUMNS) & (t < (column_block + 1) * BLOCK_COLUMNS)
            # Few blocks hold a target of their rows.
            if tl.max(here.to(tl.int32), axis=0) > 0:
                chosen = tl.sum(tl.where(column[None, :] == t[:, None], x, 0.0), axis=1)
                tl.store(target_logit + row * slots + slot, chosen, mask=here)
    if base_hidden is not None:
        b = logits_of(
            base_hidden, base_hidden_stride, base_weight, base_weight_stride, None, 0, None, 0, base_bias,
            base_softcap, excluded, suppressed, row, column, columns, base_depth, 0, BLOCK_ROWS, BLOCK_COLUMNS,
            BLOCK_DEPTH, BASE_WHOLE, LOW_BLOCK_DEPTH, True, PRECISION,
        )  # fmt: skip
        b_top, b_excess, b_rate = summary_of_rows(b, c_high, c_low, UNIT)
        # A destination that the base does not reach counts 0 even where x is -inf.
        term = tl.where(b_rate == 0.0, 0.0, b_rate * (x - core.pivot(top)[:, None]))
        tl.store(base_max + at, b_top, mask=valid)
        tl.store(base_excess + at, b_excess, mask=valid)
        tl.store(cross + at, tl.sum(term, axis=1), mask=valid)
    if RACE:
        row_id = row
        if row_ids is not None:
            row_id = tl.load(row_ids + row * row_ids_stride)
        row_low, row_high = core.words_of(row_id)
        key_low, key_high = core.seed_words(seed, seed_low, seed_high)
        # The token's counter in the random stream; a block lies in one half of a tile.
        counter = (column // TILE * HALF + column % HALF).to(tl.uint32)
        upper = column[None, :] % TILE >= HALF
        for sample in range(0, samples):
            if GREEDY:
                arrival = -x
            else:
                stream = (tl.zeros((1, 1), tl.int32) + sample).to(tl.uint32) + core.TOKEN_STREAM
                low_first, low_second, up_first, up_second = tl.philox_impl(
                    counter[None, :], stream, row_low[:, None], row_high[:, None], key_low, key_high
                )
                noise = core.exponential(tl.where(upper, up_first, low_first), tl.where(upper, up_second, low_second))
                arrival = noise / rate
            first = tl.min(arrival, axis=1)
            winner = tl.min(tl.where(arrival == first[:, None], column[None, :], NOWHERE), axis=1)
            won = tl.sum(tl.where(column[None, :] == winner[:, None], x, 0.0), axis=1)
            out = (row * samples + sample) * column_blocks + column_block
            tl.store(time + out, first, mask=valid)
            tl.store(token + out, winner, mask=valid)
            tl.store(logit + out, won, mask=valid)


@triton.jit
def base_share(
    base_hidden,
    base_hidden_stride,
    base_weight,
    base_weight_stride,
    base_bias,
    base_softcap,
    base_reference,
    base_coefficient,
    excluded,
    suppressed,
    row,
    column,
    columns,
    base_depth,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BASE_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """base_coefficient exp(scale (b - base_reference)) for base logits b."""
    b = logits_of(
        base_hidden, base_hidden_stride, base_weight, base_weight_stride, None, 0, None, 0, base_bias, base_softcap,
        excluded, suppressed, row, column, columns, base_depth, 0, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BASE_WHOLE,
        BLOCK_DEPTH, True, PRECISION,
    )  # fmt: skip
    base_factor = tl.load(base_coefficient + row)[:, None]
    return core.share(b, base_factor, tl.load(base_reference + row)[:, None], c_high, c_low, UNIT)


@triton.jit(do_not_specialize=core.VARYING)
def gradient_kernel(
    hidden,  # [T, D]
    hidden_stride,
    weight,  # [V, D]
    weight_stride,
    low_hidden,  # [T, R], or None
    low_hidden_stride,
    low_weight,  # [V, R], or None
    low_weight_stride,
    bias,  # [V], or None
    softcap,  # or None
    base_hidden,  # [T, D'], or None
    base_hidden_stride,
    base_weight,  # [V, D'], or None
    base_weight_stride,
    base_bias,  # [V], or None
    base_softcap,  # or None
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    target,  # [T, J]
    target_stride,
    slot_stride,
    pull,  # float64 [T, J]
    reference,  # float64 [T]
    coefficient,  # [T]
    base_reference,  # [T], or None
    base_coefficient,  # [T], or None
    gradient,  # [rows, columns from first_column on]
    gradient_stride,
    first_row,
    last_row,
    first_column,
    last_column,
    columns,
    depth,
    low_depth,
    base_depth,
    slots,
    row_blocks,
    column_blocks,
    c_high,
    c_low,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW_BLOCK_DEPTH: tl.constexpr,
    LOW_WHOLE: tl.constexpr,
    BASE_WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """coefficient exp(scale (x - reference)) - base_coefficient exp(scale (b - base_reference)) - sum_j pull_j
    1[v = target_j] for rows and columns of a chunk, times the derivative of the cap."""
    row_block, column_block = block_of_program(row_blocks, column_blocks, GROUP)
    row = first_row + row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < last_row
    row = tl.minimum(row, last_row - 1)
    column = first_column + column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    if softcap is not None:
        if base_hidden is not None:
            # Before the logits, which the cap's derivative needs to the end: registers hold two blocks, not three.
            taken = base_share(
                base_hidden, base_hidden_stride, base_weight, base_weight_stride, base_bias, base_softcap,
                base_reference, base_coefficient, excluded, suppressed, row, column, columns, base_depth, c_high, c_low,
                UNIT, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BASE_WHOLE, PRECISION,
            )  # fmt: skip
    x = logits_of(
        hidden, hidden_stride, weight, weight_stride, low_hidden, low_hidden_stride, low_weight, low_weight_stride,
        bias, softcap, excluded, suppressed, row, column, columns, depth, low_depth, BLOCK_ROWS, BLOCK_COLUMNS,
        BLOCK_DEPTH, WHOLE, LOW_BLOCK_DEPTH, LOW_WHOLE, PRECISION,
    )  # fmt: skip
    factor = tl.load(coefficient + row)[:, None]
    result = core.share(x, factor, tl.load(reference + row)[:, None], c_high, c_low, UNIT)
    if base_hidden is not None:
        if softcap is None:
            taken = base_share(
                base_hidden, base_hidden_stride, base_weight, base_weight_stride, base_bias, base_softcap,
                base_reference, base_coefficient, excluded, suppressed, row, column, columns, base_depth, c_high, c_low,
                UNIT, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BASE_WHOLE, PRECISION,
            )  # fmt: skip
        result -= taken
    for slot in range(0, slots):
        t, counted = core.load_slots(target, target_stride, slot_stride, row, excluded, slot, slots, columns, 1)
        begin = first_column + column_block * BLOCK_COLUMNS
        here = counted & (t >= begin) & (t < begin + BLOCK_COLUMNS)
        if tl.max(tl.max(here.to(tl.int32), axis=1), axis=0) > 0:
            pulled = tl.load(pull + row[:, None] * slots + slot).to(tl.float32)
            result -= tl.where(here & (column[None, :] == t), pulled, 0.0)
    if softcap is not None:
        result *= soft.slope(x, softcap)
    out = gradient + (row - first_row)[:, None] * gradient_stride + (column - first_column)[None, :]
    inside = valid[:, None] & (column < last_column)[None, :]
    tl.store(out, core.rounded(result, gradient.dtype.element_ty), mask=inside)


# ---- on the host


class Blocks(NamedTuple):
    """How programs share the logits, and what they are launched with."""

    row_blocks: int
    column_blocks: int
    constants: dict[str, Any]
    options: dict[str, int]


def form_of(op: str, hidden: Tensor, columns: int, *, key: str = "form") -> str:
    """How an op that contains the matmul runs, fused or chunked: as DAM_LINEAR_FORM says, else the table."""
    asked = forms.asked("triton")
    if asked is None:
        return configs.lookup(op, hidden.device, hidden.element_size(), hidden.shape[0], columns)[key]
    return "fused" if asked == "fused" else "chunked"


def blocks_of(op: str, hidden: Tensor, rows: int, columns: int) -> Blocks:
    config = configs.lookup(op, hidden.device, hidden.element_size(), rows, columns)
    block_rows = min(config["block_rows"], max(16, triton.next_power_of_2(rows)))  # 16 is the least of a product
    constants = {
        "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": config["block_columns"], "BLOCK_DEPTH": config["block_depth"],
        "WHOLE": hidden.shape[1] % config["block_depth"] == 0, "GROUP": config["group"],
        # Products of float32 numbers in float32, not in the matrix units' shorter format.
        "PRECISION": "ieee",
    }  # fmt: skip
    options = {"warps": config["warps"], "stages": config["stages"]}
    return Blocks(triton.cdiv(rows, block_rows), triton.cdiv(columns, config["block_columns"]), constants, options)


def arguments_of(head: Projection, base: Projection | None, blocks: Blocks) -> dict[str, Any]:
    """What summary_kernel and gradient_kernel take alike."""
    step = blocks.constants["BLOCK_DEPTH"]
    low_depth = 0 if head.low_hidden is None else head.low_hidden.shape[1]
    base_depth = 0 if base is None else base.hidden.shape[1]
    low_step = min(step, max(16, triton.next_power_of_2(low_depth)))
    return {
        "hidden": head.hidden, "hidden_stride": head.hidden.stride(0),
        "weight": head.weight, "weight_stride": head.weight.stride(0),
        "low_hidden": head.low_hidden, "low_hidden_stride": core.stride_of(head.low_hidden),
        "low_weight": head.low_weight, "low_weight_stride": core.stride_of(head.low_weight),
        "bias": None if head.bias is None else head.bias.contiguous(), "softcap": head.softcap,
        "base_hidden": None if base is None else base.hidden,
        "base_hidden_stride": 0 if base is None else base.hidden.stride(0),
        "base_weight": None if base is None else base.weight,
        "base_weight_stride": 0 if base is None else base.weight.stride(0),
        "base_bias": None if base is None or base.bias is None else base.bias.contiguous(),
        "base_softcap": None if base is None else base.softcap,
        "depth": head.hidden.shape[1], "low_depth": low_depth, "base_depth": base_depth,
        "row_blocks": blocks.row_blocks, "column_blocks": blocks.column_blocks, **blocks.constants,
        "LOW_BLOCK_DEPTH": low_step, "LOW_WHOLE": low_depth % low_step == 0, "BASE_WHOLE": base_depth % step == 0,
    }  # fmt: skip


class Summary(NamedTuple):
    """What the first pass keeps of each block of logits [T, blocks]."""

    blocks: int
    block_max: Tensor
    block_excess: Tensor
    base_max: Tensor | None
    base_excess: Tensor | None
    cross: Tensor | None


def summarise(
    op: str,
    head: Projection,
    exclude: Excluded,
    scale: core.Scale,
    *,
    base: Projection | None = None,
    target: Tensor | None = None,
    target_logit: Tensor | None = None,
    race: dict[str, Any] | None = None,
) -> Summary:
    """Runs summary_kernel. Logits of targets go to `target_logit`; `race` holds by name what a race takes and gives."""
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    blocks = blocks_of(op, head.hidden, rows, columns)
    block_max, block_excess = core.summaries(head.hidden, blocks.column_blocks)
    base_max = base_excess = cross = None
    if base is not None:
        base_max, base_excess = core.summaries(head.hidden, blocks.column_blocks)
        cross = torch.empty_like(base_max)
    nothing = dict.fromkeys(("row_ids", "seed", "time", "token", "logit"))
    nothing |= dict.fromkeys(("row_ids_stride", "seed_low", "seed_high", "samples"), 0)
    nothing |= {"RACE": False, "GREEDY": False}
    launch(
        summary_kernel, (blocks.row_blocks * blocks.column_blocks,), **arguments_of(head, base, blocks),
        **exclude.arguments, target=target, target_stride=core.stride_of(target),
        slot_stride=0 if target is None else target.stride(1), target_logit=target_logit, block_max=block_max,
        block_excess=block_excess, base_max=base_max, base_excess=base_excess, cross=cross, rows=rows,
        columns=columns, slots=0 if target is None else target.shape[1], c_high=scale.c_high, c_low=scale.c_low,
        UNIT=scale.UNIT, **(nothing if race is None else race), **blocks.options,
    )  # fmt: skip
    return Summary(blocks.column_blocks, block_max, block_excess, base_max, base_excess, cross)


class Rows(NamedTuple):
    """What gradient_kernel must know of each row: see its formula."""

    exclude: Excluded
    target: Tensor  # [T, J]
    pull: Tensor  # float64 [T, J]
    reference: Tensor  # float64 [T]
    coefficient: Tensor  # [T]
    base_reference: Tensor | None = None  # [T]
    base_coefficient: Tensor | None = None  # [T]


def gradient(
    op: str,
    of: Projection,
    base: Projection | None,
    of_rows: Rows,
    scale: core.Scale,
    rows: slice,
    columns: slice,
    out: Tensor,
) -> Tensor:
    """The gradient of the logits of these rows and columns, stored in `out`, [rows, columns] of any float dtype."""
    blocks = blocks_of(op, of.hidden, rows.stop - rows.start, columns.stop - columns.start)
    target = of_rows.target
    launch(
        gradient_kernel, (blocks.row_blocks * blocks.column_blocks,), **arguments_of(of, base, blocks),
        **of_rows.exclude.arguments, target=target, target_stride=target.stride(0), slot_stride=target.stride(1),
        pull=of_rows.pull, reference=of_rows.reference,
        coefficient=of_rows.coefficient, base_reference=of_rows.base_reference,
        base_coefficient=of_rows.base_coefficient, gradient=out, gradient_stride=out.stride(0),
        first_row=rows.start, last_row=rows.stop, first_column=columns.start, last_column=columns.stop,
        columns=of.weight.shape[0], slots=target.shape[1], c_high=scale.c_high, c_low=scale.c_low, UNIT=scale.UNIT,
        **blocks.options,
    )  # fmt: skip
    return out


def summary_chunks(op: str, of: Projection, bytes_per_block: int, limit: int) -> list[slice]:
    """Rows that are summarised together, so that what is kept of their blocks fits in `limit` bytes."""
    rows, columns = of.hidden.shape[0], of.weight.shape[0]
    blocks = blocks_of(op, of.hidden, rows, columns).column_blocks
    step = max(1, limit // (blocks * bytes_per_block))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def row_chunks(rows: int, columns: int, bytes_per_logit: int, limit: int) -> list[slice]:
    """Rows whose logits are made together, so that 8 tiles of columns, if there are as many, fit in `limit` bytes:
    a matmul of few rows still has columns to share among its programs."""
    tiles = min(8, triton.cdiv(columns, TILE.value))
    step = max(1, min(rows, limit // (bytes_per_logit * tiles * TILE.value)))
    if step > 256:
        step -= step % 128  # whole blocks of a library's matmul
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def column_chunks(rows: int, columns: int, bytes_per_logit: int, limit: int) -> list[slice]:
    """Whole tiles of columns of which those rows' logits fit in `limit` bytes, one tile at the least."""
    step = max(1, limit // (bytes_per_logit * rows * TILE.value)) * TILE.value
    return [slice(at, min(at + step, columns)) for at in range(0, columns, step)]


def chunk_memory(hidden: Tensor, parts: list[slice], columns: int, limit: int) -> Tensor:
    """float32 memory that serves every chunk of logits of these rows, one after another."""
    most = parts[0].stop if parts else 1  # the first parts are the largest
    return hidden.new_empty(most * column_chunks(most, columns, 4, limit)[0].stop, dtype=torch.float32)


def chunked_logits(
    library: Library, rows: slice, columns: int, limit: int, memory: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """The first tile of each chunk of columns and its logits [rows, .], valid until the next one is taken."""
    count = rows.stop - rows.start
    for piece in column_chunks(count, columns, 4, limit):
        logits = memory[: count * (piece.stop - piece.start)].view(count, piece.stop - piece.start)
        library(rows, piece, logits)
        yield piece.start // TILE.value, logits
