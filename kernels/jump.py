"""jump: one read of a row gives the mass of each tile; a race among the tiles chooses one, a race inside it the token.

Contract: dam/ops/jump.py; random stream: dam/ops/_philox.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import core
from dam.kernels.core import HALF, INF, NOWHERE, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch


@triton.jit
def race_tiles(
    tile_max,
    tile_excess,
    offset,  # int64 [lanes], of each lane's row
    first,  # tiles [first, last)
    last,
    scale,
    stream,  # uint32 [lanes], sample + TILE_STREAM
    row_low,
    row_high,
    seed_low,
    seed_high,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first tile to arrive, int32 [lanes], and the logarithm of when, float64: +inf for never.

    The logarithm, since then nothing has to be known of the rest of the row: what arrives first among some tiles can
    be compared with what does among others.
    """
    time = tl.full(offset.shape, INF, tl.float64)
    winner = tl.zeros(offset.shape, tl.int32) + first
    for start in range(first, last, BLOCK):
        tile = start + tl.arange(0, BLOCK)[None, :]
        top = tl.load(tile_max + offset[:, None] + tile, mask=tile < last, other=-INF).to(tl.float64)
        if GREEDY:
            key = -top
        else:
            excess = tl.load(tile_excess + offset[:, None] + tile, mask=tile < last, other=-1.0).to(tl.float64)
            high, low, _, _ = tl.philox_impl(
                tile.to(tl.uint32), stream[:, None], row_low[:, None], row_high[:, None], seed_low, seed_high
            )
            key = tl.log(core.exponential(high, low).to(tl.float64) / (1.0 + excess)) - scale * top
        key = tl.where(key < INF, key, INF)  # a NaN never arrives
        earliest = tl.min(key, axis=1)
        at = tl.min(tl.where(key == earliest[:, None], tile, NOWHERE), axis=1)
        winner = tl.where(earliest < time, at, winner)
        time = tl.minimum(earliest, time)
    return winner, time


@triton.jit
def race_tokens(
    logits,
    offset,  # int64 [lanes], of each lane's row
    excluded,  # [lanes], or None
    suppressed,  # uint8 [V], or None
    columns,
    tile,  # int32 [lanes]
    c_high,
    c_low,
    stream,  # uint32 [lanes], sample + TOKEN_STREAM
    row_low,
    row_high,
    seed_low,
    seed_high,
    GREEDY: tl.constexpr,
    UNIT: tl.constexpr,
    NARROW: tl.constexpr,  # columns that a row has at most, if they are fewer than a tile
):
    """The first token of a tile to arrive, its column, int32 [lanes]."""
    place = tl.arange(0, min(NARROW, HALF))[None, :]
    column = tile[:, None] * TILE + place
    x = _load_tokens(logits, offset, excluded, suppressed, columns, column)
    top = tl.max(x, axis=1)
    # One counter serves two tokens half a tile apart.
    high, low, upper_high, upper_low = tl.philox_impl(
        (tile[:, None] * HALF + place).to(tl.uint32), stream[:, None], row_low[:, None], row_high[:, None],
        seed_low, seed_high,
    )  # fmt: skip
    if NARROW > HALF:
        upper = _load_tokens(logits, offset, excluded, suppressed, columns, column + HALF)
        top = tl.maximum(top, tl.max(upper, axis=1))
    reference = core.pivot(top)[:, None]
    if GREEDY:
        time = -x
    else:
        time = core.exponential(high, low) / core.exp_scaled(x - reference, c_high, c_low, UNIT)
    earliest = tl.min(time, axis=1)
    if NARROW > HALF:
        if GREEDY:
            upper_time = -upper
        else:
            rate = core.exp_scaled(upper - reference, c_high, c_low, UNIT)
            upper_time = core.exponential(upper_high, upper_low) / rate
        earliest = tl.minimum(earliest, tl.min(upper_time, axis=1))
    winner = tl.min(tl.where(time == earliest[:, None], column, NOWHERE), axis=1)
    if NARROW > HALF:
        late = tl.min(tl.where(upper_time == earliest[:, None], column + HALF, NOWHERE), axis=1)
        winner = tl.minimum(winner, late)
    # Nowhere in a row that holds a NaN: column 0 stands for what is not looked at.
    return tl.where(winner == NOWHERE, 0, winner)


@triton.jit
def _load_tokens(logits, offset, excluded, suppressed, columns, column):
    x = tl.load(logits + offset[:, None] + column, mask=column < columns, other=-INF).to(tl.float32)
    if excluded is not None:
        x = tl.where(column == excluded[:, None], -INF, x)
    if suppressed is not None:
        x = tl.where(tl.load(suppressed + column, mask=column < columns, other=0) != 0, -INF, x)
    return x


@triton.jit
def finish(
    tile_max,
    tile_excess,
    offset,  # int64 [lanes], of each lane's row
    tiles,
    row,
    sample,
    valid,
    token,  # int64 [lanes]
    logit,  # of the token
    target,  # [T, samples]
    log_prob,
    log_escape,  # [T]
    first_bad,  # int64, or None
    samples,
    scale,
    BLOCK: tl.constexpr,
):
    """Normalises what was drawn and stores it; a row that nothing can be drawn from gets target -1."""
    top, total = core.merge_tiles(tile_max, tile_excess, offset, tiles, scale, BLOCK)
    reachable = total > 0.0  # false for NaN
    log_total = tl.log(total)
    value = scale * (logit.to(tl.float64) - top.to(tl.float64)) - log_total
    at = row * samples + sample
    tl.store(target + at, tl.where(reachable, token, -1), mask=valid)
    tl.store(log_prob + at, tl.where(reachable, value, -INF).to(tl.float32), mask=valid)
    once = valid & (sample == 0)
    tl.store(log_escape + row, (scale * core.pivot(top).to(tl.float64) + log_total).to(tl.float32), mask=once)
    if first_bad is not None:
        tl.atomic_min(first_bad + tl.zeros(row.shape, tl.int32), row, mask=once & (reachable == 0))


@triton.jit(do_not_specialize=[*core.VARYING, "seed_low", "seed_high"])
def jump_kernel(
    logits,  # [T, columns of tiles first .. last]
    logits_stride,
    exclude,  # [T], or None
    exclude_stride,
    suppressed,  # uint8 [V], or None
    row_ids,  # [T], or None
    row_ids_stride,
    seed,
    seed_low,
    seed_high,
    tile_max,  # [T, tiles]
    tile_excess,
    time,  # [T, samples]: when the earliest of the tiles so far arrived
    target,  # [T, samples]
    log_prob,  # [T, samples]; until the last tiles were seen, the logit of the target so far
    log_escape,  # [T]
    first_bad,  # int64, or None
    rows,
    columns,
    samples,
    sample_blocks,
    first,
    last,
    tiles,
    split_tiles,
    scale_high,
    scale_low,
    c_high,
    c_low,
    SUM: tl.constexpr,  # read the logits and keep the summary of each tile
    RACE: tl.constexpr,  # and then draw
    GREEDY: tl.constexpr,
    UNIT: tl.constexpr,
    OPENS: tl.constexpr,  # these are the row's first tiles
    CLOSES: tl.constexpr,  # these are its last
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Blocks of samples lie in the first dimension of the grid too: the others hold 65,535 programs only.
    first_row = (tl.program_id(0) // sample_blocks).to(tl.int64) * ROWS
    if SUM:
        lane_row = first_row + tl.arange(0, ROWS * TILES) // TILES
        valid = lane_row < rows
        lane_row = tl.minimum(lane_row, rows - 1)
        begin = first
        end = last
        if not RACE:
            begin = first + tl.program_id(1) * split_tiles
            end = tl.minimum(begin + split_tiles, last)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, lane_row, columns)
        core.sum_tiles(
            logits, lane_row * logits_stride - first.to(tl.int64) * TILE, excluded, suppressed, columns, begin, end,
            tile_max, tile_excess, lane_row * tiles, valid, c_high, c_low, UNIT, ROWS, TILES, PIECES, WIDTH,
        )  # fmt: skip
        if RACE:
            tl.debug_barrier()  # other threads of the program read the summaries
    if RACE:
        lane = tl.arange(0, ROWS * SAMPLES)
        row = first_row + lane // SAMPLES
        sample = tl.program_id(0) % sample_blocks * SAMPLES + lane % SAMPLES
        valid = (row < rows) & (sample < samples)
        row = tl.minimum(row, rows - 1)
        offset = row * logits_stride - first.to(tl.int64) * TILE
        scale = core.float64_of(scale_high, scale_low)
        row_id = row
        if row_ids is not None:
            row_id = tl.load(row_ids + row * row_ids_stride)
        row_low, row_high = core.words_of(row_id)
        key_low, key_high = core.seed_words(seed, seed_low, seed_high)
        excluded = None
        if exclude is not None:
            excluded = core.load_excluded(exclude, exclude_stride, row, columns)
        stream = sample.to(tl.uint32)
        tile, arrived = race_tiles(
            tile_max, tile_excess, row * tiles, first, last, scale, stream + core.TILE_STREAM, row_low, row_high,
            key_low, key_high, GREEDY, BLOCK,
        )  # fmt: skip
        at = row * samples + sample
        before = tl.full(row.shape, INF, tl.float64)
        token = tl.full(row.shape, -1, tl.int64)
        logit = tl.full(row.shape, -INF, tl.float32)
        if not OPENS:
            before = tl.load(time + at, mask=valid, other=INF)
            token = tl.load(target + at, mask=valid, other=-1)
            logit = tl.load(log_prob + at, mask=valid, other=-INF)
            tl.debug_barrier()  # other threads of the program write there
        earlier = arrived < before
        if tl.max(earlier.to(tl.int32), axis=0) > 0:
            drawn = race_tokens(
                logits, offset, excluded, suppressed, columns, tile, c_high, c_low, stream + core.TOKEN_STREAM,
                row_low, row_high, key_low, key_high, GREEDY, UNIT, PIECES * WIDTH,
            )  # fmt: skip
            token = tl.where(earlier, drawn.to(tl.int64), token)
            new = tl.load(logits + offset + drawn, mask=earlier, other=-INF).to(tl.float32)
            logit = tl.where(earlier, new, logit)
        if CLOSES:
            finish(
                tile_max, tile_excess, row * tiles, tiles, row, sample, valid, token, logit, target, log_prob,
                log_escape, first_bad, samples, scale, BLOCK,
            )  # fmt: skip
        else:
            tl.store(time + at, tl.minimum(arrived, before), mask=valid)
            tl.store(target + at, token, mask=valid)
            tl.store(log_prob + at, logit, mask=valid)


@triton.jit(do_not_specialize=["count", "samples", "seed_low", "seed_high"])
def arrival_kernel(
    target,  # [T, samples]
    logit,  # [T, samples], of the targets
    time,  # [T, samples], when their tiles arrived
    row_ids,  # [T], or None
    row_ids_stride,
    seed,
    seed_low,
    seed_high,
    arrival,  # float64 [T, samples, 2]
    count,
    samples,
    scale_high,
    scale_low,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logarithms of when a draw's tile and the draw itself arrived."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    row = at // samples
    row_id = row
    if row_ids is not None:
        row_id = tl.load(row_ids + row * row_ids_stride, mask=valid, other=0)
    row_low, row_high = core.words_of(row_id)
    key_low, key_high = core.seed_words(seed, seed_low, seed_high)
    token = tl.load(target + at, mask=valid, other=-1)
    x = tl.load(logit + at, mask=valid, other=-INF).to(tl.float64)
    if GREEDY:
        token_time = -x
    else:
        place = token % TILE
        high, low, upper_high, upper_low = tl.philox_impl(
            (token // TILE * HALF + place % HALF).to(tl.uint32), (at % samples).to(tl.uint32) + core.TOKEN_STREAM,
            row_low, row_high, key_low, key_high,
        )  # fmt: skip
        upper = place >= HALF
        noise = core.exponential(tl.where(upper, upper_high, high), tl.where(upper, upper_low, low))
        token_time = tl.log(noise.to(tl.float64)) - core.float64_of(scale_high, scale_low) * x
    nothing = token < 0
    tile_time = tl.load(time + at, mask=valid, other=INF)
    tl.store(arrival + 2 * at, tl.where(nothing, INF, tile_time), mask=valid)
    tl.store(arrival + 2 * at + 1, tl.where(nothing, INF, token_time), mask=valid)


class Draw:
    """Draws from rows whose logits come in one piece, or in chunks of whole tiles, one after another.

    What is kept between chunks is the summary of each tile, and the earliest arrival so far.
    """

    def __init__(
        self,
        like: Tensor,  # [T, .], gives T and the device
        columns: int,
        exclude: Excluded,
        temperature: float,
        num_samples: int,
        seed: Tensor,
        row_ids: Tensor | None,
        check: bool,
        out: tuple[Tensor, ...] | None = None,
        goes_on: bool = False,  # elsewhere, with tiles that are not seen here
    ):
        self.rows, self.columns, self.samples = like.shape[0], columns, num_samples
        self.tiles = triton.cdiv(columns, TILE.value) + goes_on
        self.exclude, self.row_ids = exclude, row_ids
        self.greedy, self.scale = temperature == 0.0, core.scale_of(temperature)
        self.tile_max, self.tile_excess = core.summaries(like, self.tiles)
        self.target, self.log_prob, self.log_escape = outputs(like, num_samples) if out is None else out
        self.time: Tensor | None = None
        self.first_bad = like.new_full((), self.rows, dtype=torch.int64) if check else None
        # A seed on the device stays there, or reading it would wait for the device.
        on_device = seed.device == like.device and like.device.type != "cpu"
        low, high = (0, 0) if on_device else signed_words(int(seed))
        self.seed: dict[str, Any] = {"seed": seed if on_device else None, "seed_low": low, "seed_high": high}

    def see(self, logits: Tensor, first: int = 0) -> None:
        """Takes the logits of the tiles from `first` on, [T, .]: all of the rest or a multiple of 1024 columns."""
        last = first + triton.cdiv(logits.shape[1], TILE.value)
        g = core.geometry("jump", logits)
        opens, closes = first == 0, last == self.tiles
        if not (opens and closes) and self.time is None:
            self.time = logits.new_empty((self.rows, self.samples), dtype=torch.float64)
        # Half as many as a step of the read has tiles: noise and arrivals take more registers than logits.
        most = max(1, g.elements // (2 * g.ROWS * g.PIECES * g.WIDTH))
        SAMPLES = min(triton.next_power_of_2(self.samples), most)
        together = g.splits == 1 and self.samples <= SAMPLES
        arguments = {
            "logits": logits, "logits_stride": core.stride_of(logits),
            **self.exclude.arguments,
            "row_ids": self.row_ids, "row_ids_stride": core.stride_of(self.row_ids), **self.seed,
            "tile_max": self.tile_max, "tile_excess": self.tile_excess, "time": self.time, "target": self.target,
            "log_prob": self.log_prob, "log_escape": self.log_escape, "first_bad": self.first_bad,
            "rows": self.rows, "columns": self.columns, "samples": self.samples, "first": first, "last": last,
            "tiles": self.tiles, "split_tiles": g.split_tiles, **self.scale._asdict(), "GREEDY": self.greedy,
            "OPENS": opens, "CLOSES": closes, **g.constants, "SAMPLES": SAMPLES,
            "BLOCK": core.block_of(self.tiles),
        }  # fmt: skip
        if together:
            launch(jump_kernel, (g.blocks, 1), SUM=True, RACE=True, sample_blocks=1, **arguments, **g.options)
        else:
            split = (g.blocks, g.splits)
            launch(jump_kernel, split, SUM=True, RACE=False, sample_blocks=1, **arguments, **g.options)
            count = triton.cdiv(self.samples, SAMPLES)
            grid = (g.blocks * count, 1)
            launch(jump_kernel, grid, SUM=False, RACE=True, sample_blocks=count, **arguments, **g.options)

    def lowest_bad(self) -> int | Tensor:
        """The first row that cannot be sampled, or `rows`: int64 [] on the device. Without a check -1."""
        return -1 if self.first_bad is None else self.first_bad


def outputs(like: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised target, log_prob [T, num_samples] and log_escape [T]."""
    rows = like.shape[0]
    return (
        like.new_empty((rows, num_samples), dtype=torch.int64),
        like.new_empty((rows, num_samples), dtype=torch.float32),
        like.new_empty((rows,), dtype=torch.float32),
    )


def signed_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed as int32, which is how Triton passes small integers."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def jump(
    logits: Tensor,  # [T, V]
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,  # [T]
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    draw = Draw(logits, logits.shape[1], exclude, temperature, num_samples, seed, row_ids, check)
    draw.see(logits)
    return draw.target, draw.log_prob, draw.log_escape, draw.lowest_bad()


def jump_part(
    logits: Tensor,  # [T, .], of the tiles from first_tile on
    first_tile: int,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,  # [T]
) -> tuple[Tensor, Tensor, Tensor]:
    """target int64 [T, num_samples], arrival float64 [T, num_samples, 2] and log_escape float64 [T] of these tiles."""
    # The kernels count columns from tile 0 on.
    rows, before = logits.shape[0], first_tile * TILE.value
    columns = before + logits.shape[1]
    row = None if exclude.row is None else torch.where(exclude.row < 0, -1, exclude.row + before)
    mask = None if exclude.suppressed is None else torch.nn.functional.pad(exclude.suppressed, (before, 0))
    exclude = Excluded(row, mask)
    draw = Draw(logits, columns, exclude, temperature, num_samples, seed, row_ids, False, goes_on=True)
    # As if the tiles before had brought nothing.
    draw.time = logits.new_full((rows, num_samples), INF.value, dtype=torch.float64)
    draw.target.fill_(-1)
    draw.log_prob.fill_(-INF.value)
    draw.see(logits, first_tile)
    arrival = logits.new_empty((rows, num_samples, 2), dtype=torch.float64)
    count, BLOCK = rows * num_samples, 128
    launch(
        arrival_kernel, (triton.cdiv(count, BLOCK),), target=draw.target, logit=draw.log_prob, time=draw.time,
        row_ids=row_ids, row_ids_stride=row_ids.stride(0), **draw.seed, arrival=arrival, count=count,
        samples=num_samples, scale_high=draw.scale.scale_high, scale_low=draw.scale.scale_low, GREEDY=draw.greedy,
        BLOCK=BLOCK,
    )  # fmt: skip
    seen = slice(first_tile, draw.tiles - 1)
    scale = 1.0 / (temperature or 1.0)
    tops, excess = draw.tile_max[:, seen].double(), draw.tile_excess[:, seen].double()
    log_escape = torch.logsumexp(scale * tops + excess.log1p(), dim=1)
    return torch.where(draw.target < 0, -1, draw.target - before), arrival, log_escape
