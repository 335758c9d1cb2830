"""The numerics of kernels/core.py against those of dam.ops and csrc/core: known answers, and float64."""

import math

import pytest
import torch

from dam.backends import choice
from dam.ops import _philox
from tests.ops.helpers import integers, normal

if choice.why_unavailable("triton") is not None:
    pytest.skip(choice.why_unavailable("triton"), allow_module_level=True)

import triton
import triton.language as tl

from dam.kernels import core, formed_gradient
from dam.kernels.launch import launch


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(choice.DEVICE_TYPE["triton"]):
        yield


@triton.jit
def words_kernel(counters, keys, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    c = tl.load(counters + i).to(tl.uint32)
    c1 = tl.load(counters + COUNT + i).to(tl.uint32)
    c2 = tl.load(counters + 2 * COUNT + i).to(tl.uint32)
    c3 = tl.load(counters + 3 * COUNT + i).to(tl.uint32)
    low, high = core.words_of(tl.load(keys + i))
    x, y, z, w = tl.philox_impl(c, c1, c2, c3, low, high)
    tl.store(out + i, x.to(tl.int64))
    tl.store(out + COUNT + i, y.to(tl.int64))
    tl.store(out + 2 * COUNT + i, z.to(tl.int64))
    tl.store(out + 3 * COUNT + i, w.to(tl.int64))


def test_philox_is_the_reference_s():
    """Which test_philox.py holds to the published vectors; all words count, and so do both of a key."""
    counters, keys = integers(0, 2**32, 4, 64, seed=1), integers(-(2**63), 2**63 - 1, 64, seed=2)
    counters[:, :3] = torch.tensor([0, 2**32 - 1, 2**31])
    keys[:2] = torch.tensor([0, -1])
    out = torch.empty(4, 64, dtype=torch.int64)
    launch(words_kernel, (1,), counters=counters, keys=keys, out=out, COUNT=64)
    key = (keys & 0xFFFFFFFF, (keys >> 32) & 0xFFFFFFFF)
    assert torch.equal(out, torch.stack(_philox.philox(tuple(counters), key)))


@triton.jit
def exponential_kernel(high, low, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, core.exponential(tl.load(high + i).to(tl.uint32), tl.load(low + i).to(tl.uint32)))


def test_exponentials_are_accurate_at_both_ends():
    """Relative 2^-21 from the smallest, 2^-65, to the largest, where 1 - u is 2^-65."""
    high = torch.cat((integers(0, 2**32, 4000, seed=3), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32)))
    low = torch.cat((integers(0, 2**32, 4000, seed=4), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32)))
    high[:400], high[400:800] = 0, 2**32 - 1
    out = torch.empty(4096)
    pad = (0, 4096 - len(high))
    high, low = (torch.nn.functional.pad(x, pad) for x in (high, low))
    launch(exponential_kernel, (1,), high=high, low=low, out=out, COUNT=4096)
    # -log(1 - u) by whichever of u and 1 - u float64 holds exactly enough.
    u = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    z = (2**32 - 1 - high).double() * 2.0**-32 + (2**32 - 1 - low + 0.5).double() * 2.0**-64
    exact = torch.where(u < 0.5, -torch.log1p(-u), -torch.log(z))
    assert float(((out.double() - exact) / exact).abs().max()) < 2.0**-21


@triton.jit
def summary_kernel(logits, top, excess, c_high, c_low, UNIT: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.arange(0, ROWS)
    x, _ = core.load_tiles(logits, lane.to(tl.int64) * 1024, lane * 0, 1024, False, 4, 256)
    m, e, _ = core.summary_of_tile(x, c_high, c_low, UNIT)
    tl.store(top + lane, m)
    tl.store(excess + lane, e)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0, 1e-30, 1e30])
def test_tile_summaries(temperature):
    """Maximum and excess in float64's opinion, of flat, peaked, repeated, empty and NaN tiles."""
    x = normal(8, 1024, seed=5, scale=4.0)
    x[1] = -40.0
    x[1, 77] = 0.0  # excess 4e-15: nothing beside a 1 in float32
    x[2, 100:103] = 50.0
    x[3] = -math.inf
    x[4] = -math.inf
    x[4, 5] = 3.0
    x[5] = 1e4 + normal(1024, seed=6)
    x[6, 9] = math.nan
    top, excess = torch.empty(8), torch.empty(8)
    scale = core.scale_of(temperature)
    launch(
        summary_kernel, (1,), logits=x, top=top, excess=excess, c_high=scale.c_high, c_low=scale.c_low,
        UNIT=scale.UNIT, ROWS=8,
    )  # fmt: skip
    wide = x.double()
    maximum = wide.amax(1)
    e = torch.where(wide == maximum[:, None], 0.0, ((wide - maximum[:, None]) / temperature).exp())
    exact = e.sum(1) + ((wide == maximum[:, None]).sum(1) - 1.0)
    exact[3] = -1.0
    finite = torch.tensor([0, 1, 2, 3, 4, 5, 7])
    assert torch.equal(top[finite], maximum[finite].float())
    # Sums of float32 terms: 2^-22 of each exponential, and the argument's rounding times its size.
    error = (excess[finite].double() - exact[finite]).abs()
    # float32 has nothing below 2^-126.
    assert bool((error <= 2.0**-20 * exact[finite].abs() + 2.0**-120).all()), error
    assert math.isnan(float(excess[6]))


@triton.jit
def rounding_kernel(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, core.rounded(tl.load(x + i), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(dtype):
    """As torch's, ties and infinities among them."""
    x = normal(1024, seed=7, scale=100.0)
    x[:256] = (1 + torch.arange(256) / 256 / 2 ** (7 if dtype == torch.bfloat16 else 10)) * 3.0
    x[256:260] = torch.tensor([math.inf, -math.inf, 1e38, -0.0])
    out = torch.empty(1024, dtype=dtype)
    launch(rounding_kernel, (1,), x=x, out=out, COUNT=1024)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, math.inf])
def test_scaling_of_a_formed_gradient(dtype, factor):
    """As torch's product; by 1 it is not touched, so that a NaN's bits stay."""
    x = normal(33, 1000, seed=8, dtype=dtype)
    expected = x * factor
    assert torch.equal(formed_gradient.scale(x, torch.tensor(factor)), expected)


def test_constants_are_those_of_the_stream():
    """Which csrc/core/philox.h states for C++ and CUDA, as test_cpu_backend.py sees by its draws."""
    assert (core.TILE.value, core.TILE_STREAM.value, core.TOKEN_STREAM.value) == (
        _philox.TILE,
        _philox.TILE_STREAM,
        _philox.TOKEN_STREAM,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-30, 1e30, 3.3])
def test_scales_come_in_two_words(temperature):
    """48 bits of 1 / temperature and of its product with log2(e)."""
    scale = core.scale_of(temperature)
    assert math.isclose(scale.scale_high + scale.scale_low, 1 / temperature, rel_tol=2.0**-46)
    assert math.isclose(scale.c_high + scale.c_low, math.log2(math.e) / temperature, rel_tol=2.0**-46)
