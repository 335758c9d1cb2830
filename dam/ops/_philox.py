"""Philox 4x32-10 (Salmon et al., SC 2011) in torch: the one source of randomness of every backend.

A draw depends on (seed, row id, sample, tile or token) and on nothing else, so it is the same
whatever the batch, the order of its rows, the number of threads or the tiling. csrc/core/philox.h
is the same function in C++; tests hold both to the published vectors.

    key      (seed low, seed high)
    counter  (index, 1 << 31 | use << 24 | sample, row id low, row id high)

`Use` says what a word is drawn for, so that no two uses share one. The bit 1 << 31 keeps all of them apart from the
words of torch's generators under the same seed: that of CUDA counts with (offset / 4, element) in 62 and 64 bits, the
offset first, and Triton's `rand` with an index in the first word, so both have second words below 2^31; that of the
CPU is no Philox.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from dam.backends import cpu
from dam.ops import _op

TILE = 1024  # tokens raced together; part of the random stream's contract, so the same everywhere
_SAMPLE_BITS = 24
MAX_SAMPLES = 2**_SAMPLE_BITS
_MAX_INDEX = 2**32


class Use(enum.IntEnum):
    """What a word is for; 7 bits."""

    TILE = 0  # the tiles' race of a jump
    TOKEN = 1  # the tokens' race inside a tile
    ORDER = 2  # in which positions unmask
    REMASK_COUNT = 3
    REMASK_ORDER = 4
    NEXT_POSITION = 5  # the one that unmasks next in a re-masked state
    MEMBER = 6  # which trajectory of a group stands for it
    ARRIVAL = 7  # of events
    THINNING = 8  # whether an event, or a coordinate in an interval, jumps
    JUMP = 9  # the row ids under which `jump` draws the tokens of trajectories
    OTHER_ORDER = 10  # in which the positions of an outcome might have unmasked too
    REMASK_STRATUM = 11  # which share of the numbers of masks a re-masked outcome of a group draws from
    NOISE = 12  # uniform tokens: of the first canvas, and of each step what a token is replaced with
    START = 13  # states that diffusions start from
    WIENER = 14  # increments of a Wiener process, those of a step being a sample


def stream_of(use: Use) -> int:
    """The second counter word of a use's first sample."""
    return 1 << 31 | use << _SAMPLE_BITS


TILE_STREAM, TOKEN_STREAM = stream_of(Use.TILE), stream_of(Use.TOKEN)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64 in [0, 2^32), for each counter; inputs broadcast and are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap in int64, which leaves their bits right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & _LOW, p0 & _LOW
        high1, low1 = (p1 >> 32) & _LOW, p1 & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """Standard exponential in float64 from 64 random bits, accurate at its small end.

    E = -log1p(-u), u = (bits + 1/2) 2^-64. The small end decides which improbable token wins, so it
    keeps full relative accuracy down to 2^-65; the large end is capped at 36.7.
    """
    u = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    return -torch.log1p(-u.clamp(max=1.0 - 2.0**-53))


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _LOW, (value >> 32) & _LOW


def tile_exponentials(seed: Tensor, row_ids: Tensor, num_samples: int, num_tiles: int, first_tile: int = 0) -> Tensor:
    """Race noise of whole tiles, which are numbered from first_tile on: float64 [T, num_samples, num_tiles]."""
    device = row_ids.device
    row_low, row_high = _words(row_ids[:, None, None])
    sample = torch.arange(num_samples, device=device)[:, None]
    index = torch.arange(first_tile, first_tile + num_tiles, device=device)
    words = philox((index, TILE_STREAM + sample, row_low, row_high), _words(seed.to(device)))
    return exponential(words[0], words[1])


def token_exponentials(seed: Tensor, row_ids: Tensor, tile: Tensor, width: int) -> Tensor:
    """Race noise of the first `width` tokens of one tile per row and sample: tile [T, S] -> float64 [T, S, width]."""
    device = row_ids.device
    row_low, row_high = _words(row_ids[:, None, None])
    sample = torch.arange(tile.shape[1], device=device)[:, None]
    half = TILE // 2
    index = (tile[..., None] * half + torch.arange(min(width, half), device=device)) & _LOW
    words = philox((index, TOKEN_STREAM + sample, row_low, row_high), _words(seed.to(device)))
    # One counter serves two tokens half a tile apart, so vector code needs no shuffle.
    lower, upper = exponential(words[0], words[1]), words[2:]
    return lower if width <= half else torch.cat((lower, exponential(*upper)[..., : width - half]), dim=-1)


def _blocks(seed: int, use: Use, row_ids: Tensor, count: int, sample: int | range) -> tuple[Tensor, Tensor]:
    """The first 64 bits of `count` counters of each row, as two words [..., count]; of samples, [S, ..., count]."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits; got {seed}")
    last = sample[-1] if isinstance(sample, range) else sample
    if not (0 <= count <= _MAX_INDEX and 0 <= last < MAX_SAMPLES):
        raise ValueError(f"{count} numbers of sample {last} do not fit the counter")
    if _op.at_once(row_ids):
        return _blocks_at_once(seed, use, row_ids, count, sample)
    row_low, row_high = _words(row_ids[..., None])
    index = torch.arange(count, device=row_ids.device)
    if isinstance(sample, range):
        second = torch.arange(sample.start, sample.stop, device=row_ids.device) + stream_of(use)
        second = second.view(-1, *[1] * row_low.dim())
    else:
        second = torch.tensor(stream_of(use) + sample, device=row_ids.device)
    key = torch.tensor([seed & _LOW, (seed >> 32) & _LOW], device=row_ids.device)
    words = philox((index, second, row_low, row_high), (key[0], key[1]))
    return words[0], words[1]


def _blocks_at_once(seed: int, use: Use, row_ids: Tensor, count: int, sample: int | range) -> tuple[Tensor, Tensor]:
    """As `_blocks`, by the C++ kernel: the ten rounds are some hundred operations of torch."""
    several = isinstance(sample, range)
    samples = sample if isinstance(sample, range) else range(sample, sample + 1)
    shape = (*([len(samples)] if several else []), *row_ids.shape, count)
    high, low = (torch.empty(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    ids = row_ids.contiguous()
    cpu.kernels.random_words(
        rows=ids.numel(),
        samples=len(samples),
        count=count,
        threads=torch.get_num_threads(),
        seed=seed % 2**64,
        stream=stream_of(use) + samples.start,
        row_ids=ids.data_ptr(),
        high=high.data_ptr(),
        low=low.data_ptr(),
    )
    return high, low


def uniform(seed: int, use: Use, row_ids: Tensor, count: int, sample: int = 0) -> Tensor:
    """`count` uniforms of each row, float64 [..., count] in (0, 1) with 52 bits, for row_ids int64 [...]."""
    return _centred(*_blocks(seed, use, row_ids, count, sample))


def _centred(high: Tensor, low: Tensor) -> Tensor:
    """Uniforms in (0, 1) of 52 of 64 bits, each in the middle of what it stands for."""
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def exponentials(seed: int, use: Use, row_ids: Tensor, count: int, sample: int = 0) -> Tensor:
    """`count` standard exponentials of each row, float64 [..., count]."""
    return exponential(*_blocks(seed, use, row_ids, count, sample))


def normals(seed: int, use: Use, row_ids: Tensor, count: int, samples: range) -> Tensor:
    """`count` standard normals of each row for each sample, float64 [S, ..., count], none beyond 8.2."""
    high, low = _blocks(seed, use, row_ids, count, samples)
    return torch.special.ndtri(_centred(high, low))


def ids(seed: int, use: Use, row_ids: Tensor, count: int, sample: int = 0) -> Tensor:
    """`count` row ids for `jump` of each row, int64 [..., count], alike by a coincidence of 64 bits only."""
    high, low = _blocks(seed, use, row_ids, count, sample)
    return (high << 32) | low


def row_ids_of(rows: torch.Size, device: torch.device, row_ids: Tensor | None) -> Tensor:
    """The ids given, int64 [...], or 0, 1, ...

    Raises:
        TypeError, ValueError: those given have another dtype or shape.
    """
    if row_ids is None:
        return torch.arange(rows.numel(), device=device).view(rows)
    if row_ids.dtype != torch.int64:
        raise TypeError(f"row_ids must be int64; got {row_ids.dtype}")
    if row_ids.shape != rows:
        raise ValueError(f"row_ids must have shape {list(rows)}; got {list(row_ids.shape)}")
    return row_ids.to(device)


def drawn(
    use: Use,
    shape: torch.Size,
    device: torch.device,
    generator: torch.Generator | None,
    seed: int | None,
    row_ids: Tensor | None,
) -> Tensor:
    """Uniforms [..., L] by torch's generator, in float32, or by a seed and ids of rows [...], in float64.

    By a seed a number depends on (seed, row id, position from the end), so that padding in front changes nothing.

    Raises:
        TypeError, ValueError: a generator and a seed, row_ids without a seed, or of another dtype or shape.
    """
    if seed is None:
        if row_ids is not None:
            raise ValueError("row_ids name streams of a seed: give one too")
        return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
    if generator is not None:
        raise ValueError("a generator and a seed exclude each other: give one of them")
    return uniform(seed, use, row_ids_of(shape[:-1], device, row_ids), shape[-1]).flip(-1)
