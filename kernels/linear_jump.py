"""linear_jump: `jump` on the logits of a head.

Fused, every block of logits holds a race of its own on the chip, and what is stored of it decides the same two races
that `jump` decides: among the tiles, then among the tokens of one of them. Chunked, the library multiplies and
jump's kernels see the logits chunk by chunk, while they are in the cache.
Contract: dam/ops/linear_jump.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import configs, core, head, jump
from dam.kernels.core import INF, NOWHERE, TILE
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch
from dam.kernels.projection import Projection


@triton.jit
def gather_tiles(
    block_max,  # [T, blocks]
    block_excess,
    tile_max,  # [T, tiles]
    tile_excess,
    row,  # int64 [lanes]
    valid,
    blocks,
    tiles,
    scale,
    PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Summaries of tiles out of those of the PER_TILE blocks of each, stored."""
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        block = (tile[:, None] * PER_TILE + tl.arange(0, PER_TILE)[None, :])[None, :, :]
        at = row[:, None, None] * blocks + block
        top = tl.load(block_max + at, mask=block < blocks, other=-INF)
        excess = tl.load(block_excess + at, mask=block < blocks, other=-1.0).to(tl.float64)
        most = tl.max(top, axis=2)
        difference = (top - core.pivot(most)[:, :, None]).to(tl.float64)
        # Less 1 before it is rounded, so that what is tiny beside the 1 is kept: the largest block has its own excess.
        total = tl.sum((1.0 + excess) * tl.exp(scale * difference), axis=2)
        out = row[:, None] * tiles + tile[None, :]
        stored = valid[:, None] & (tile < tiles)[None, :]
        tl.store(tile_max + out, most, mask=stored)
        tl.store(tile_excess + out, (total - 1.0).to(tl.float32), mask=stored)


@triton.jit(do_not_specialize=[*core.VARYING, "seed_low", "seed_high"])
def race_kernel(
    block_max,  # [T, blocks]
    block_excess,
    time,  # [T, samples, blocks]: when the first token of the block arrived, relative to its maximum
    token,  # [T, samples, blocks]
    logit,  # [T, samples, blocks]
    row_ids,  # [T], or None
    row_ids_stride,
    seed,
    seed_low,
    seed_high,
    tile_max,  # [T, tiles]
    tile_excess,
    target,  # [T, samples]
    log_prob,
    log_escape,  # [T]
    first_bad,  # int64, or None
    rows,
    blocks,
    tiles,
    samples,
    scale_high,
    scale_low,
    GREEDY: tl.constexpr,
    PER_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The races among tiles and among the blocks of one of them, for each sample of a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    scale = core.float64_of(scale_high, scale_low)
    gather_tiles(block_max, block_excess, tile_max, tile_excess, row, valid, blocks, tiles, scale, PER_TILE, BLOCK)
    tl.debug_barrier()  # other threads of the program read the summaries
    row_id = row
    if row_ids is not None:
        row_id = tl.load(row_ids + row * row_ids_stride)
    row_low, row_high = core.words_of(row_id)
    key_low, key_high = core.seed_words(seed, seed_low, seed_high)
    for s in range(0, samples):
        sample = tl.zeros(row.shape, tl.int32) + s
        stream = sample.to(tl.uint32) + core.TILE_STREAM
        tile, _ = jump.race_tiles(
            tile_max, tile_excess, row * tiles, 0, tiles, scale, stream, row_low, row_high, key_low, key_high, GREEDY,
            BLOCK,
        )  # fmt: skip
        block = tile[:, None] * PER_TILE + tl.arange(0, PER_TILE)[None, :]
        inside = block < blocks
        at = (row * samples + sample)[:, None] * blocks + block
        arrived = tl.load(time + at, mask=inside, other=INF)
        if GREEDY:
            key = arrived.to(tl.float64)
        else:
            top = tl.load(block_max + row[:, None] * blocks + block, mask=inside, other=-INF).to(tl.float64)
            key = tl.log(arrived.to(tl.float64)) - scale * top
        key = tl.where(key < INF, key, INF)  # a NaN never arrives
        earliest = tl.min(key, axis=1)
        winner = tl.min(tl.where(key == earliest[:, None], block, NOWHERE), axis=1)
        chosen = (row * samples + sample) * blocks + tl.where(winner < blocks, winner, 0)
        jump.finish(
            tile_max, tile_excess, row * tiles, tiles, row, sample, valid, tl.load(token + chosen).to(tl.int64),
            tl.load(logit + chosen), target, log_prob, log_escape, first_bad, samples, scale, BLOCK,
        )  # fmt: skip


def linear_jump(
    of: Projection,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,  # [T]
    check: bool,
    *,
    library: head.Library,
    workspace: int,  # bytes
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """Its outputs and the first row that cannot be sampled, on the device. `library` writes logits of rows and columns.

    The number of rows if there is none; -1 without a check.
    """
    hidden, rows, columns = of.hidden, of.hidden.shape[0], of.weight.shape[0]
    config = configs.lookup("linear_jump", hidden.device, hidden.element_size(), rows, columns)
    bytes_per_block = 8 + 12 * num_samples
    # Of very many samples not even a row's blocks may fit: then chunked, which keeps nothing for each of them.
    fits = triton.cdiv(columns, config["block_columns"]) * bytes_per_block <= workspace
    fused = fits and head.form_of("linear_jump", hidden, columns) == "fused"
    limit = min(workspace, int(config["chunk_mb"] * 2**20))
    if fused:
        parts = head.summary_chunks("linear_jump", of, bytes_per_block, workspace)
    else:
        parts = head.row_chunks(rows, columns, 4, limit)
        memory = head.chunk_memory(hidden, parts, columns, limit)
    ids = torch.arange(rows, device=hidden.device) if row_ids is None and len(parts) > 1 else row_ids
    out = jump.outputs(hidden, num_samples)
    draws = []
    for part in parts:
        draw = jump.Draw(
            hidden[part], columns, exclude.part(part), temperature, num_samples, seed,
            None if ids is None else ids[part], check, tuple(x[part] for x in out),
        )  # fmt: skip
        if fused:
            _race_on_chip(of.part(part), draw, config["merge_rows"])
        else:
            for first, logits in head.chunked_logits(library, part, columns, limit, memory):
                draw.see(logits, first)
        draws.append(draw)
    if not check or rows == 0:
        return *out, -1
    if len(draws) == 1:
        return *out, draws[0].lowest_bad()
    found = []
    for part, draw in zip(parts, draws, strict=True):
        assert draw.first_bad is not None
        found.append(torch.where(draw.first_bad < draw.rows, draw.first_bad + part.start, rows))
    return *out, torch.stack(found).min()


def _race_on_chip(of: Projection, draw: jump.Draw, merge_rows: int) -> None:
    """Draws from all rows of `of` with two kernels and no logits in memory."""
    blocks = head.blocks_of("linear_jump", of.hidden, draw.rows, draw.columns)
    shape = (draw.rows, draw.samples, blocks.column_blocks)
    race: dict[str, Any] = {
        "row_ids": draw.row_ids, "row_ids_stride": core.stride_of(draw.row_ids), **draw.seed,
        "time": of.hidden.new_empty(shape, dtype=torch.float32),
        "token": of.hidden.new_empty(shape, dtype=torch.int32),
        "logit": of.hidden.new_empty(shape, dtype=torch.float32), "samples": draw.samples, "GREEDY": draw.greedy,
    }  # fmt: skip
    summary = head.summarise("linear_jump", of, draw.exclude, draw.scale, race={**race, "RACE": True})
    ROWS = min(triton.next_power_of_2(draw.rows), merge_rows)
    launch(
        race_kernel, (triton.cdiv(draw.rows, ROWS),), **race, block_max=summary.block_max,
        block_excess=summary.block_excess, tile_max=draw.tile_max, tile_excess=draw.tile_excess, target=draw.target,
        log_prob=draw.log_prob, log_escape=draw.log_escape, first_bad=draw.first_bad, rows=draw.rows,
        blocks=summary.blocks, tiles=draw.tiles, scale_high=draw.scale.scale_high, scale_low=draw.scale.scale_low,
        PER_TILE=TILE.value // blocks.constants["BLOCK_COLUMNS"], ROWS=ROWS, BLOCK=core.block_of(draw.tiles),
    )  # fmt: skip
