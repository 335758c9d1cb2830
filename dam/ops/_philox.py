"""Philox 4x32-10 (Salmon et al., SC 2011) in torch: the one source of randomness of every backend.

A draw depends on (seed, row id, sample, tile or token) and on nothing else, so it is the same
whatever the batch, the order of its rows, the number of threads or the tiling. csrc/core/philox.h
is the same function in C++; tests hold both to the published vectors.

Counter words: (index, 4 * sample + stream, row id low, row id high). Key words: (seed low, seed high).
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1024  # tokens raced together; part of the random stream's contract, so the same everywhere
TILE_STREAM, TOKEN_STREAM = 0, 1

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


def tile_exponentials(seed: Tensor, row_ids: Tensor, num_samples: int, num_tiles: int) -> Tensor:
    """Race noise of whole tiles: float64 [T, num_samples, num_tiles]."""
    device = row_ids.device
    row_low, row_high = _words(row_ids[:, None, None])
    sample = torch.arange(num_samples, device=device)[:, None]
    index = torch.arange(num_tiles, device=device)
    words = philox((index, 4 * sample + TILE_STREAM, row_low, row_high), _words(seed.to(device)))
    return exponential(words[0], words[1])


def token_exponentials(seed: Tensor, row_ids: Tensor, tile: Tensor, width: int) -> Tensor:
    """Race noise of the first `width` tokens of one tile per row and sample: tile [T, S] -> float64 [T, S, width]."""
    device = row_ids.device
    row_low, row_high = _words(row_ids[:, None, None])
    sample = torch.arange(tile.shape[1], device=device)[:, None]
    half = TILE // 2
    index = (tile[..., None] * half + torch.arange(min(width, half), device=device)) & _LOW
    words = philox((index, 4 * sample + TOKEN_STREAM, row_low, row_high), _words(seed.to(device)))
    # One counter serves two tokens half a tile apart, so vector code needs no shuffle.
    lower, upper = exponential(words[0], words[1]), words[2:]
    return lower if width <= half else torch.cat((lower, exponential(*upper)[..., : width - half]), dim=-1)
