"""The random numbers: Philox 4x32-10 by its published vectors, and the exponentials made from them."""

import math

import pytest
import scipy.stats
import torch
from helpers import P_VALUE, Z

from dam.ops import _philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


# Random123 1.14, tests/kat_vectors, lines "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter, key, words):
    def tensors(values):
        return tuple(torch.tensor(value) for value in values)

    assert tuple(int(word) for word in _philox.philox(tensors(counter), tensors(key))) == words


def test_counters_broadcast():
    index, row = torch.arange(3)[:, None], torch.arange(4)
    zero = torch.tensor(0)
    words = _philox.philox((index, zero, row, zero), (zero, zero))
    assert all(word.shape == (3, 4) for word in words)
    one = _philox.philox((torch.tensor(2), zero, torch.tensor(3), zero), (zero, zero))
    assert [int(word[2, 3]) for word in words] == [int(word) for word in one]


def test_exponentials_are_accurate_at_the_small_end():
    """The smallest is 2^-65 and keeps its digits; the largest is finite."""
    low = torch.tensor([0, 1, 0, 0xFFFFFFFF])
    high = torch.tensor([0, 0, 1, 0xFFFFFFFF])
    smallest, next_, word, largest = _philox.exponential(high, low).tolist()
    # -log1p(-u) = u (1 + u / 2 + ...); a few roundings of float64.
    assert math.isclose(smallest, 2.0**-65, rel_tol=1e-15) and math.isclose(next_, 1.5 * 2.0**-64, rel_tol=1e-15)
    assert math.isclose(word, -math.log1p(-(2.0**-32 + 2.0**-65)), rel_tol=1e-15)
    assert math.isclose(largest, 53 * math.log(2), rel_tol=1e-15)


def test_exponentials_are_exponential():
    seed, rows = torch.tensor(1), torch.arange(100)
    tile = _philox.tile_exponentials(seed, rows, 10, 100).flatten()
    token = _philox.token_exponentials(seed, rows, torch.zeros(100, 1, dtype=torch.int64), 1024).flatten()
    for noise in (tile, token):
        assert scipy.stats.kstest(noise.numpy(), "expon").pvalue > P_VALUE
        # The mean of n standard exponentials is 1 +- n^-1/2.
        assert abs(float(noise.mean()) - 1) * math.sqrt(noise.numel()) < Z
    # Distinct counters, hence distinct numbers (a tie of 53 bits among 10^5 has probability 1e-6).
    assert len(torch.cat((tile, token)).unique()) == tile.numel() + token.numel()


def test_every_part_of_a_counter_counts():
    """Seed, row id, sample, tile and token, in both 32-bit words where there are two, give other numbers."""

    def noise(seed=3, row=5, sample=0, tile=2):
        tiles = torch.full((1, sample + 1), tile)
        return _philox.token_exponentials(torch.tensor(seed), torch.tensor([row]), tiles, 700)[0, sample]

    variants = [noise(), noise(seed=4), noise(seed=3 + 2**40), noise(row=6), noise(row=5 + 2**40)]
    variants += [noise(sample=1), noise(tile=3), noise(seed=-3), noise(row=-5)]
    assert len(torch.cat(variants).unique()) == 700 * len(variants)


def test_tokens_of_a_narrow_tile_are_the_first_of_a_full_one():
    seed, rows, tile = torch.tensor(1), torch.arange(4), torch.ones(4, 2, dtype=torch.int64)
    full = _philox.token_exponentials(seed, rows, tile, 1024)
    for width in (1, 511, 512, 513, 1023):
        assert torch.equal(_philox.token_exponentials(seed, rows, tile, width), full[..., :width])
