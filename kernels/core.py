"""Numerics that the kernels share: random numbers, exponentials, and sums of exponentials over rows of logits.

The same functions as csrc/core, in float32 where that keeps a relative 1e-7; tests hold both to the same answers.
A row is summed in tiles of 1024 logits. What is kept of a tile, its maximum and `excess`, depends on the tile alone:
not on how many of them a program takes, or how a row is split among programs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, launch

TILE = tl.constexpr(1024)  # tokens raced together; part of the random stream's contract
HALF = tl.constexpr(TILE.value // 2)
NOWHERE = tl.constexpr(2**31 - 1)  # above every tile and column
# Philox' key: (seed low, seed high). Its counter: (index, 1 << 31 | use << 24 | sample, row id low, row id high), whose
# second word is one of these plus the sample. dam/ops/_philox.py says why.
TILE_STREAM = tl.constexpr(0x80000000)
TOKEN_STREAM = tl.constexpr(0x81000000)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WORD = tl.constexpr(2.0**-32)
INF = tl.constexpr(math.inf)
# Parameters whose values differ from call to call: Triton is not to compile a kernel anew for each that is 1 or that 16
# divides. A kernel need not have them all.
VARYING = (
    *("rows", "slots", "samples", "sample_blocks", "tiles", "blocks"),
    *("first", "last", "split_tiles", "row_blocks", "first_row", "last_row"),
)
INTERPRETED = tl.constexpr(launch.INTERPRETED)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


# ---- random numbers


@triton.jit
def words_of(x):
    """Low and high 32-bit word of an int64."""
    return (x & 0xFFFFFFFF).to(tl.uint32), ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def seed_words(seed, low, high):
    """The key: of a seed on the device if there is one, else the two words given as int32."""
    if seed is not None:
        return words_of(tl.load(seed))
    else:
        return low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)


@triton.jit
def exponential(high, low):
    """Standard exponential from 64 random bits: E = -log1p(-u), u = (bits + 1/2) 2^-64, to a relative 2^-22.

    Both u and 1 - u come from the bits, so neither the small end, which decides which improbable token wins, nor the
    large one loses digits.
    """
    u = high.to(tl.float32) * WORD + (low.to(tl.float32) + 0.5) * (WORD * WORD)
    z = (high ^ 0xFFFFFFFF).to(tl.float32) * WORD + ((low ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (WORD * WORD)
    # z = m 2^k with m in [sqrt(1/2), sqrt(2)); k = 0 for u < 0.29, where m - 1 would have lost the small end.
    bits = z.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    f = tl.where(u < 0.29, -u, m - 1.0)
    # log(1 + f) = 2 atanh(f / (2 + f)); the next term of the series is below 3e-9 of the first.
    s = f / (f + 2.0)
    w = s * s
    q = (((w * (1 / 9) + 1 / 7) * w + 1 / 5) * w + 1 / 3) * w + 1.0
    return k.to(tl.float32) * -LN2 - 2.0 * s * q


# ---- exponentials


@triton.jit
def exp_scaled(d, c_high, c_low, UNIT: tl.constexpr):
    """exp(scale * d) for d <= 0, scale * log2(e) = c_high + c_low, or 1 with UNIT. 0 for -inf, 1 for 0, NaN for NaN."""
    if UNIT:
        y = d * LOG2E
    else:
        # Two words, or a scale far from 1 would cost accuracy. Not for -inf, where the sum is NaN.
        y = d * c_high
        y = tl.where(y > -256.0, d * c_low + y, y)
    return tl.exp2(y)


@triton.jit
def pivot(top):
    """What differences are taken to: the maximum, or 0 where there is none to subtract (-inf - -inf is NaN)."""
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def clamp_to_float32(x):
    """float64 to float32, the largest number where it has none: a coefficient of infinity would make 0 * inf."""
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x)).to(tl.float32)


@triton.jit
def share(x, coefficient, reference, c_high, c_low, UNIT: tl.constexpr):
    """coefficient * exp(scale * (x - reference)) in float32, for a float64 reference; 0 for a coefficient of 0."""
    high = reference.to(tl.float32)
    low = (reference - high.to(tl.float64)).to(tl.float32)
    return tl.where(coefficient == 0.0, 0.0, coefficient * exp_scaled((x - high) - low, c_high, c_low, UNIT))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in another dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter cuts digits off instead.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


# ---- rows of logits
#
# A program has `lanes`, each a tile of one of its rows at a time: lane = row * TILES + tile. A block of logits has the
# shape [PIECES, lanes, WIDTH], WIDTH of them being one 16-byte load of each thread of a warp: a warp then owns whole
# tiles, and sums over a tile need no shared memory.


@triton.jit
def addresses(array, offset, column):
    """Pointers to a block [PIECES, lanes, WIDTH] of an array, marked so that warps lie along the lanes.

    The compiler lays warps along the dimension that has most consecutive addresses after the last. Neither has any, and
    which of the two it then takes depends on the release: Triton 3.6 the pieces, so that every sum over a tile crossed
    warps. Nothing else rests on what it is told of the lanes: how much a thread loads at once is read off the last
    dimension, as long as that has most.
    """
    WIDTH: tl.constexpr = column.shape[2]
    pointer = array + offset[None, :, None] + column
    if WIDTH > 2:
        pointer = tl.max_contiguous(pointer, (1, 2, WIDTH))
    return pointer


@triton.jit
def load_tiles(logits, offset, tile, columns, MASKED: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """float32 logits [PIECES, lanes, WIDTH] of one tile per lane, -inf past the row's end, and their columns."""
    piece = tl.arange(0, PIECES)[:, None, None] * WIDTH
    column = (tile * TILE)[None, :, None] + piece + tl.arange(0, WIDTH)[None, None, :]
    pointer = addresses(logits, offset, column)
    if MASKED:
        x = tl.load(pointer, mask=column < columns, other=-INF)
    else:
        x = tl.load(pointer)
    return x.to(tl.float32), column


@triton.jit
def without_excluded(
    x,
    column,
    excluded,  # [lanes], or None
    suppressed,  # uint8 [V], or None
    columns,
    first,  # columns [first, last)
    last,
    ROWS: tl.constexpr,
):
    """x with -inf at the excluded column of each lane, if [first, last) may hold one, and at those of all lanes."""
    if excluded is not None:
        if ROWS == 1:
            # One row: one excluded column, so whole steps without it are known.
            one = tl.max(excluded, axis=0)
            if (one >= first) & (one < last):
                x = tl.where(column == excluded[None, :, None], -INF, x)
        else:
            x = tl.where(column == excluded[None, :, None], -INF, x)
    if suppressed is not None:
        pointer = suppressed + column
        # As much to a thread as of the logits, not 16 bytes: or they would meet through shared memory. See `addresses`.
        PER_THREAD: tl.constexpr = column.shape[2] // 32
        if PER_THREAD > 2:
            pointer = tl.max_contiguous(pointer, (1, 2, PER_THREAD))
        x = tl.where(tl.load(pointer, mask=column < columns, other=0) != 0, -INF, x)
    return x


@triton.jit
def store_tiles(out, offset, tile, column, columns, last, valid, x):
    """Stores x [PIECES, lanes, WIDTH] in the output's dtype, where the lane is valid and its tile below last."""
    inside = (valid & (tile < last))[None, :, None] & (column < columns)
    pointer = addresses(out, offset, column)
    tl.store(pointer, rounded(x, out.dtype.element_ty), mask=inside)


@triton.jit
def per_lane(x, TILES: tl.constexpr):
    """Values of rows [ROWS] repeated for the TILES lanes of each row."""
    ROWS: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None], (ROWS, TILES)), (ROWS * TILES,))


@triton.jit
def max_of_tile(x):
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def sum_of_tile(x):
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def excess_of(total, rest):
    """Sum of exp(x - max) less 1, exact also where it is tiny: log1p of it is log-sum-exp less the maximum.

    total is the float32 sum of all terms and rest that of those below the maximum; their difference is a count. With
    nothing to reach, 0 - 1.
    """
    return rest + (tl.floor(total - rest + 0.5) - 1.0)


@triton.jit
def summary_of_tile(x, c_high, c_low, UNIT: tl.constexpr):
    """Maximum and excess of each lane's tile, and exp(scale * (x - maximum))."""
    top = max_of_tile(x)
    e = exp_scaled(x - pivot(top)[None, :, None], c_high, c_low, UNIT)
    rest = sum_of_tile(tl.where(x == top[None, :, None], 0.0, e))
    return top, excess_of(sum_of_tile(e), rest), e


@triton.jit
def sum_tiles(
    logits,
    offset,  # int64 [lanes], of each lane's row
    excluded,  # [lanes], or None
    suppressed,  # uint8 [V], or None
    columns,
    first,  # tiles [first, last)
    last,
    tile_max,  # [T, tiles of a row]
    tile_excess,
    summary_offset,  # int64 [lanes], of each lane's row
    valid,  # bool [lanes]
    c_high,
    c_low,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Maximum and excess of tiles of logits, stored; excess + 1 = sum of exp(scale * (x - max))."""
    whole = first + (tl.minimum(last, columns // TILE) - first) // TILES * TILES
    for start in range(first, whole, TILES):
        _sum_step(
            logits, offset, excluded, suppressed, columns, start, last, tile_max, tile_excess, summary_offset, valid,
            c_high, c_low, False, UNIT, ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip
    for start in range(whole, last, TILES):
        _sum_step(
            logits, offset, excluded, suppressed, columns, start, last, tile_max, tile_excess, summary_offset, valid,
            c_high, c_low, True, UNIT, ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip


@triton.jit
def _sum_step(
    logits, offset, excluded, suppressed, columns, start, last, tile_max, tile_excess, summary_offset, valid,
    c_high, c_low, MASKED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile = start + tl.arange(0, ROWS * TILES) % TILES
    x, column = load_tiles(logits, offset, tile, columns, MASKED, PIECES, WIDTH)
    x = without_excluded(x, column, excluded, suppressed, columns, start * TILE, (start + TILES) * TILE, ROWS)
    top, excess, _ = summary_of_tile(x, c_high, c_low, UNIT)
    stored = valid & (tile < last)
    tl.store(tile_max + summary_offset + tile, top, mask=stored)
    tl.store(tile_excess + summary_offset + tile, excess, mask=stored)


@triton.jit
def merge_tiles(tile_max, tile_excess, offset, tiles, scale, BLOCK: tl.constexpr):
    """Over whole rows: maximum, float32 [lanes], and sum of exp(scale * (x - maximum)), float64 [lanes].

    A NaN or +inf among the logits shows as a NaN sum, a row with nothing to reach as the sum 0.
    """
    # Reduced after the loops: inside one, Triton 3.6 fails to compile a sum that is used twice.
    index = tl.arange(0, BLOCK)[None, :]
    tops = tl.full((offset.shape[0], BLOCK), -INF, tl.float32)
    for first in range(0, tiles, BLOCK):
        inside = first + index < tiles
        tops = tl.maximum(tops, tl.load(tile_max + offset[:, None] + first + index, mask=inside, other=-INF))
    top = tl.max(tops, axis=1)
    totals = tl.zeros((offset.shape[0], BLOCK), tl.float64)
    reference = pivot(top).to(tl.float64)[:, None]
    for first in range(0, tiles, BLOCK):
        inside = first + index < tiles
        maxima = tl.load(tile_max + offset[:, None] + first + index, mask=inside, other=-INF).to(tl.float64)
        excess = tl.load(tile_excess + offset[:, None] + first + index, mask=inside, other=-1.0).to(tl.float64)
        totals += (1.0 + excess) * tl.exp(scale * (maxima - reference))
    return top, tl.sum(totals, axis=1)


@triton.jit
def total_rate(tile_max, tile_excess, offset, tiles, BLOCK: tl.constexpr):
    """Sum of exp(x) over whole rows, float64 [lanes]."""
    top, total = merge_tiles(tile_max, tile_excess, offset, tiles, 1.0, BLOCK)
    return tl.exp(pivot(top).to(tl.float64)) * total


@triton.jit
def float64_of(high, low):
    """A float64 that came as two float32 arguments: Triton passes numbers as float32."""
    return tl.full((), 0.0, tl.float64) + high + low


# ---- destinations of a row


@triton.jit
def load_slots(
    target,  # [T, J]
    target_stride,
    slot_stride,
    row,  # int64 [lanes]
    excluded,  # [lanes], or None
    first,
    count,
    columns,
    SLOTS: tl.constexpr,
):
    """Targets int64 [lanes, SLOTS] of the slots from `first` on, -1 past the last, and which of them count."""
    slot = first + tl.arange(0, SLOTS)[None, :]
    t = tl.load(target + row[:, None] * target_stride + slot * slot_stride, mask=slot < count, other=-1)
    tl.device_assert((t >= -1) & (t < columns), "target must be -1 or in [0, V)")
    counted = t >= 0
    if excluded is not None:
        counted = counted & (t != excluded[:, None])
    return t, counted


@triton.jit
def load_per_slot(values, row_stride, slot_stride, row, first, count, SLOTS: tl.constexpr):
    """values[row, slot] as float64 [lanes, SLOTS], 0 past the last slot."""
    slot = first + tl.arange(0, SLOTS)[None, :]
    return tl.load(values + row[:, None] * row_stride + slot * slot_stride, mask=slot < count, other=0.0).to(tl.float64)


@triton.jit
def weight_at(
    t,  # [lanes, SLOTS]
    target,
    target_stride,
    slot_stride,
    weight,
    weight_stride,
    weight_slot_stride,
    row,
    count,
    columns,
    SLOTS: tl.constexpr,
):
    """Sum of the weights of all slots of a row whose target is t, float64 [lanes, SLOTS]: targets may repeat."""
    totals = tl.zeros((t.shape[0], SLOTS, SLOTS), tl.float64)
    for first in range(0, count, SLOTS):
        other, _ = load_slots(target, target_stride, slot_stride, row, None, first, count, columns, SLOTS)
        w = load_per_slot(weight, weight_stride, weight_slot_stride, row, first, count, SLOTS)
        totals += tl.where(other[:, None, :] == t[:, :, None], w[:, None, :], 0.0)
    return tl.sum(totals, axis=2)


@triton.jit
def load_excluded(exclude, exclude_stride, row, columns):
    """Excluded column of each lane's row, int64 [lanes]."""
    excluded = tl.load(exclude + row * exclude_stride)
    tl.device_assert((excluded >= -1) & (excluded < columns), "exclude must be -1 or in [0, V)")
    return excluded


# ---- on the host


class Scale(NamedTuple):
    """1 / temperature and its product with log2(e), each in two float32 words."""

    scale_high: float
    scale_low: float
    c_high: float
    c_low: float
    UNIT: bool


def scale_of(temperature: float) -> Scale:
    """Temperature 0 has log-probabilities at temperature 1."""
    scale = 1.0 / (temperature or 1.0)
    return Scale(*two_words(scale), *two_words(scale * LOG2E.value), scale == 1.0)


def two_words(x: float) -> tuple[float, float]:
    """x as a sum of two float32 numbers."""
    high = float(torch.tensor(x, dtype=torch.float32))
    return high, float(torch.tensor(x - high, dtype=torch.float32))


class Geometry(NamedTuple):
    """How programs share rows of logits: see the comment on lanes, and `launch`."""

    tiles: int  # of a row
    blocks: int  # of rows
    splits: int  # of the tiles of a row
    split_tiles: int  # tiles of a split
    elements: int  # logits of a step
    ROWS: int
    TILES: int
    PIECES: int
    WIDTH: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.ROWS, "TILES": self.TILES, "PIECES": self.PIECES, "WIDTH": self.WIDTH}

    @property
    def options(self) -> dict[str, int]:
        return {"warps": self.warps, "stages": self.stages}


def block_of(tiles: int) -> int:
    """Tile summaries that are merged in one step."""
    return min(triton.next_power_of_2(tiles), 1024)


def geometry(op: str, logits: Tensor, columns: int | None = None) -> Geometry:
    """Of a launch over logits [T, V], or over `columns` of them."""
    rows, columns = logits.shape[0], logits.shape[1] if columns is None else columns
    config = configs.lookup(op, logits.device, logits.element_size(), rows, columns)
    width = min(triton.next_power_of_2(columns), TILE.value)
    WIDTH = min(width, 512 // logits.element_size())
    tiles = triton.cdiv(columns, TILE.value)
    TILES = min(triton.next_power_of_2(tiles), max(1, config["elements"] // width))
    # Rows together only as far as enough programs remain.
    most = triton.next_power_of_2(max(1, triton.cdiv(rows, config["programs"])))
    ROWS = max(1, min(most, config["elements"] // (TILES * width)))
    blocks = triton.cdiv(rows, ROWS)
    steps = triton.cdiv(tiles, TILES)
    splits = max(1, min(steps, config["programs"] // max(blocks, 1)))
    split_tiles = triton.cdiv(steps, splits) * TILES
    warps = min(config["warps"], max(1, ROWS * TILES * width // TILE.value))
    return Geometry(
        tiles, blocks, triton.cdiv(tiles, split_tiles), split_tiles, config["elements"], ROWS, TILES, width // WIDTH,
        WIDTH, warps, config["stages"],
    )  # fmt: skip


def slots_of(count: int) -> int:
    """Slots of a row that are looked at together."""
    return max(1, min(triton.next_power_of_2(count), 16))


def summaries(logits: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Uninitialised maximum and excess of each tile of each row, float32 [T, tiles]."""
    shape = (logits.shape[0], tiles)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)


def stride_of(x: Tensor | None) -> int:
    """Stride of the first dimension, 0 for none."""
    return 0 if x is None else x.stride(0)
