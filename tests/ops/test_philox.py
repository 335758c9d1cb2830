"""The random numbers: Philox 4x32-10 by its published vectors, and the exponentials made from them."""

import functools
import math

import pytest
import scipy.stats
import torch
from helpers import P_VALUE, Z

import dam
from dam.ops import _philox
from dam.ops._philox import Use

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


def cuda_words(seed, count, offset=0):
    """The first words of torch's CUDA generator: key = seed, counter = (offset / 4, element), two words each."""
    element, at = torch.arange(count), torch.tensor(offset // 4)
    counter = (at & 0xFFFFFFFF, at >> 32, element & 0xFFFFFFFF, element >> 32)
    return _philox.philox(counter, (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)))[0]


def every_draw(seed, rows):
    """A call of each function that draws, for each use; by name of the use."""
    seeds = torch.tensor(seed)
    yield Use.TILE, lambda: _philox.tile_exponentials(seeds, rows, 3, 5)
    yield Use.TOKEN, lambda: _philox.token_exponentials(seeds, rows, torch.zeros(len(rows), 3, dtype=torch.int64), 1024)
    for use in Use:
        for draw in (_philox.uniform, _philox.exponentials, _philox.ids):
            yield use, functools.partial(draw, seed, use, rows, 5, sample=_philox.MAX_SAMPLES - 1)


def test_no_counter_is_one_of_torchs_or_of_another_use(monkeypatch):
    """The second word tells: torch's, an offset / 4 of 62 bits' upper half, has no bit 31; of ours 7 are the use's.

    The emulation of torch's CUDA generator gives what torch.manual_seed(0); torch.rand(8, device="cuda") prints.
    """
    published = [0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967, 0.4150, 0.8203]
    assert [round(float(word) / 2**32, 4) for word in cuda_words(0, 8)] == published
    seen = []
    real = _philox.philox
    monkeypatch.setattr(_philox, "philox", lambda counter, key: seen.append((counter, key)) or real(counter, key))
    for use, draw in every_draw(seed=7 - 2**63, rows=torch.tensor([0, 1, -1])):
        seen.clear()
        with dam.backend(
            "torch"
        ):  # whose counters can be looked at; the kernel's words are the same (test_cpu_backend.py)
            draw()
        assert seen
        for (index, second, _, _), (low, high) in seen:
            assert bool((second >> 24 == 128 + use).all()) and bool((index >> 32 == 0).all())
            assert (int(low), int(high)) == (7, 2**31)  # distinct counters are of one key, so blocks are distinct too


def test_words_are_not_those_of_torchs_cuda_generator():
    torchs = cuda_words(0, 4096).double() * 2.0**-32
    for _, draw in every_draw(seed=0, rows=torch.arange(4096)):
        ours = draw().double()
        if ours.max() > 2.0**33:
            ours = (draw() >> 32 & 0xFFFFFFFF).double() * 2.0**-32
        elif ours.max() > 1:
            ours = -torch.expm1(-ours)
        # Words of 32 bits: by chance one of 4,096 is within 2^-32 of another's with probability 4,096 2^-31 a draw.
        close = (ours.reshape(4096, -1) - torchs[:, None]).abs() < 2.0**-32
        assert int(close.sum()) < 3


def test_uniforms_and_exponentials_of_rows():
    rows = torch.arange(2000)
    uniform, exponential = (draw(5, Use.ORDER, rows, 100) for draw in (_philox.uniform, _philox.exponentials))
    assert scipy.stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > P_VALUE
    # One uniform in 52 and in 64 bits.
    torch.testing.assert_close(exponential, -torch.log1p(-uniform), rtol=1e-10, atol=2.0**-52)
    for other in (
        _philox.uniform(6, Use.ORDER, rows, 100),
        _philox.uniform(5, Use.ARRIVAL, rows, 100),
        _philox.uniform(5, Use.ORDER, rows + 2000, 100),
        _philox.uniform(5, Use.ORDER, rows, 100, sample=1),
    ):
        # The correlation of n independent pairs is 0 +- n^-1/2.
        pair = torch.stack((uniform.flatten(), other.flatten()))
        assert abs(float(torch.corrcoef(pair)[0, 1])) * math.sqrt(uniform.numel()) < Z
    assert torch.equal(_philox.uniform(5, Use.ORDER, rows[7:9], 3), uniform[7:9, :3])
    assert torch.equal(
        _philox.uniform(5 - 2**64 + 2**63, Use.ORDER, rows, 3), _philox.uniform(5 + 2**63, Use.ORDER, rows, 3)
    )
    ids = _philox.ids(5, Use.JUMP, rows, 100)
    assert ids.dtype == torch.int64 and len(ids.unique()) == ids.numel()


@pytest.mark.parametrize(
    ("seed", "count", "sample"), [(2**64, 1, 0), (-(2**63) - 1, 1, 0), (0, 2**32 + 1, 0), (0, 1, 2**24)]
)
def test_what_does_not_fit_is_refused(seed, count, sample):
    with pytest.raises(ValueError, match="fit"):
        _philox.uniform(seed, Use.ORDER, torch.arange(1), count, sample)


def test_normals_of_many_samples_are_those_of_each():
    """By the inverse of the normal law of the same bits as `uniform` has, whichever samples are asked for at once."""
    rows = torch.tensor([[5, 2**40], [0, 7]])
    many = _philox.normals(3, Use.WIENER, rows, 6, range(4, 9))
    assert many.shape == (5, 2, 2, 6)
    for n, sample in enumerate(range(4, 9)):
        uniform = _philox.uniform(3, Use.WIENER, rows, 6, sample)
        assert torch.equal(many[n], torch.special.ndtri(uniform))
    normals = _philox.normals(1, Use.START, torch.arange(200), 500, range(1)).flatten()
    assert scipy.stats.kstest(normals.numpy(), "norm").pvalue > P_VALUE
    with pytest.raises(ValueError, match="numbers of sample 16777216 do not fit the counter"):
        _philox.normals(1, Use.WIENER, rows, 1, range(2**24, 2**24 + 1))
