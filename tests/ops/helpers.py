"""Inputs, plain float64 formulas and thresholds that the tests of several ops share."""

import contextlib

import pytest
import torch

from dam.backends import cuda, triton

# |z| above it has probability 6e-7 under the hypothesis: the false alarm of one test.
Z = 5.0
P_VALUE = 1e-6


def slow(backend):
    """Whether a backend is to be spared large inputs: the reference, Triton's interpreter, the emulator of CUDA."""
    simulated = {"triton": triton.INTERPRETED, "cuda": cuda.EMULATED}
    return backend == "torch" or simulated.get(backend, False)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    """Standard normal numbers times scale, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return x.to(torch.get_default_device(), dtype)


def integers(low, high, *shape, seed=0):
    """int64 in [low, high), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.get_default_device())


def allowed(logits, exclude=-1):
    """float64 logits with the excluded destination of each row at -inf; differentiable."""
    x = logits.double()
    exclude = torch.as_tensor(exclude, device=x.device).expand(x.shape[0])
    columns = torch.arange(x.shape[1], device=x.device)
    return x.masked_fill(columns == exclude[:, None], -torch.inf)


def far(rows, columns, dtype):
    """An array whose rows lie 2^30 elements apart, of memory that is not touched between them."""
    stride = 2**30 + 8
    if torch.get_default_device().type == "cuda":
        pytest.skip("tests/ops/test_large.py has whole arrays")  # where untouched memory is memory too
    return torch.empty((rows - 1) * stride + columns, dtype=dtype).as_strided((rows, columns), (stride, 1))


def log_softmax(logits, exclude=-1, temperature=1.0):
    return torch.log_softmax(allowed(logits, exclude) / temperature, dim=1)


def rounding(dtype):
    """Largest relative error of rounding to dtype: half its epsilon."""
    return torch.finfo(dtype).eps / 2


def same(a, b):
    """Whether tensors are equal bit for bit, NaN included."""
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def assert_close(actual, expected, *, rtol, atol=0.0):
    """Compares in float64; infinities must match, NaN fails."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_slack(backend, dtype, grad_logits, factor):
    """What grad_logits @ factor may lose where a backend multiplies the logits' gradient on in bfloat16: each of its
    entries was rounded once."""
    if backend in ("triton", "cuda") and dtype == torch.bfloat16:
        return rounding(dtype) * (grad_logits.abs() @ factor.double().abs())
    return torch.zeros(())


def assert_near(actual, expected, *, rtol, atol):
    """Compares in float64, with a tolerance for each entry."""
    excess = (actual.double() - expected.double()).abs() - rtol * expected.double().abs() - atol
    assert bool((excess <= 0).all()), f"{float(excess.max())} beyond the tolerance"


def peak_bytes(function):
    """Largest number of bytes that `function` has allocated at once through torch, and its result.

    On a GPU `function` runs once before: a thread's first product with cuBLAS takes a workspace through torch, 32 MB
    on an H100, which the thread keeps. A backward pass has a thread of its own, so its graph must outlive a call.
    """
    if torch.get_default_device().type == "cuda":
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return torch.cuda.max_memory_allocated() - before, result
    allocations, result = _allocations(function)
    live = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def largest_bytes(function):
    """Bytes of the largest tensor that `function` allocates through torch on the CPU, in ops too, and its result."""
    allocations, result = _allocations(function)
    return max(event.nbytes() for event in allocations), result


def _allocations(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"], result
