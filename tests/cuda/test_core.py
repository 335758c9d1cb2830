"""The numerics of csrc/core as CUDA's kernels compute them: known answers, and float64."""

import math

import pytest
import torch

from dam.backends import choice, cuda
from dam.ops import _philox
from tests.ops.helpers import integers

if choice.why_unavailable("cuda") is not None:
    pytest.skip(choice.why_unavailable("cuda"), allow_module_level=True)

INF = math.inf
kernels = cuda.kernels


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(choice.DEVICE_TYPE["cuda"]):
        yield


def as_words(x):
    """The low 32 bits of int64 as int32, which torch has where the kernels read uint32."""
    return (x - ((x >> 31) << 32)).to(torch.int32)


def test_philox_is_the_reference_s():
    """Which test_philox.py holds to the published vectors; all words count, and so do both of a key."""
    counters, keys = integers(0, 2**32, 64, 4, seed=1), integers(-(2**63), 2**63 - 1, 8, seed=2)
    counters[:3] = torch.tensor([0, 2**32 - 1, 2**31])[:, None]
    keys[:2] = torch.tensor([0, -1])
    given, out = as_words(counters), torch.empty(64, 4, dtype=torch.int32)
    for key in keys.tolist():
        kernels.probe_philox(given.data_ptr(), key % 2**64, out.data_ptr(), 64, cuda.where(out))
        words = torch.tensor(key & 0xFFFFFFFF), torch.tensor((key >> 32) & 0xFFFFFFFF)
        expected = torch.stack(_philox.philox(tuple(counters.t()), words), dim=1)
        assert torch.equal(out, as_words(expected))


def test_exponentials_are_accurate_at_both_ends():
    """Relative 2^-21 from the smallest, 2^-65, to the largest, where 1 - u is 2^-65."""
    high = torch.cat((integers(0, 2**32, 4000, seed=3), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32)))
    low = torch.cat((integers(0, 2**32, 4000, seed=4), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32)))
    high, low = high.clamp(max=2**32 - 1), low.clamp(max=2**32 - 1)
    high[:400], high[400:800] = 0, 2**32 - 1
    words, out = as_words(torch.stack((high, low), dim=1)), torch.empty(len(high))
    kernels.probe_exponential(words.data_ptr(), out.data_ptr(), len(high), cuda.where(out))
    # -log(1 - u) by whichever of u and 1 - u float64 holds exactly enough.
    u = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    z = (2**32 - 1 - high).double() * 2.0**-32 + (2**32 - 1 - low + 0.5).double() * 2.0**-64
    exact = torch.where(u < 0.5, -torch.log1p(-u), -torch.log(z))
    assert float(((out.double() - exact) / exact).abs().max()) < 2.0**-21


@pytest.mark.parametrize("scale", [1.0, 0.37, 25.0, 1e-6])
def test_exp_scaled(scale):
    """As csrc/core/math.h states it: 2^-22 relative, and the rounding of the scaled argument, 1.25 * 2^-24 of it.

    The emulator has the host's polynomial, and no fused products: 2^-22 of the scaled argument."""
    x = -torch.linspace(0, 86 / scale, 5000, dtype=torch.float64).to(torch.float32)
    x[-4:] = torch.tensor([-INF, math.nan, -1000 / scale, 0.0])
    out = torch.empty_like(x)
    kernels.probe_exp(x.data_ptr(), out.data_ptr(), len(x), scale, cuda.where(out))
    exact = (x.double() * scale).exp()
    per_argument = 2.0**-22 if cuda.EMULATED else 1.25 * 2.0**-24
    tolerance = 2.0**-22 + per_argument * (x.double() * scale).abs()
    assert bool((((out.double() - exact) / exact).abs() < tolerance)[:-4].all())
    assert out[-4] == 0 and math.isnan(out[-3]) and out[-2] == 0 and out[-1] == 1
