"""Elementary functions of floats in csrc/core/math.h, as kernels of C++ have them, against doubles at all exponents."""

import ctypes

import numpy as np
import pytest

from dam.backends import cpu, generated

FUNCTIONS = ("exp", "log", "log1p", "expm1", "tanh", "sqrt")
# Largest errors in units in the last place, as that file states them.
ULP = {"exp": 5.5, "log": 0.9, "log1p": 1.0, "expm1": 4.7, "tanh": 3.0, "sqrt": 0.5}
NEAR = {"exp": 2.2, "expm1": 2.0}  # for |x| < 1
# Arguments near which a search of all floats found the largest.
WORST = (-86.25186, 88.57675, 0.5315869, 0.39094573, 0.2723735, -0.30137613, 0.40184623, -0.29342473)
WORST += (0.38747272, 88.71921, 0.38704365, 0.7051713, 0.7058912, 0.062353585, 0.062424507)
SOURCE = """\
#include "cpu/defined.h"

DAM_BEGIN

template <class Function>
static void over(const float* x, float* out, int64_t count, Function function) {
  for (int64_t i = 0; i + LANES <= count; i += LANES) store(out + i, function(load<f32>(x + i)));
}

DAM_END

extern "C" __attribute__((visibility("default"))) void apply(int which, const float* x, float* out, int64_t count) {
  using namespace dam;
  switch (which) {
%s
  }
}
"""
CASES = "\n".join(
    f"    case {n}: return over(x, out, count, [](f32 a) {{ return fn::{name}(a); }});"
    for n, name in enumerate(FUNCTIONS)
)


@pytest.fixture(scope="module", params=["in use", "plain"])
def apply(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(cpu, "isa", lambda: "plain")
        kernel = generated.library("elementary", SOURCE % CASES).apply
    kernel.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def of(name, x):
        assert x.dtype == np.float32 and x.size % 16 == 0
        out = np.empty_like(x)
        kernel(FUNCTIONS.index(name), x.ctypes.data, out.ctypes.data, x.size)
        return out

    return of


def sweep():
    """Floats of every exponent, subnormal ones among them, and of both signs."""
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.uniform(1, 2, (276, 2000)), np.arange(-149, 127)[:, None]).astype(np.float32).ravel()
    ends = [rng.uniform(low, high, 80_000) for low, high in ((-90, 0), (0, 90), (-105, -86))]
    near = np.array(WORST, dtype=np.float32).view(np.int32)[:, None] + np.arange(-800, 800, dtype=np.int32)
    return np.concatenate([x, -x, *(end.astype(np.float32) for end in ends), near.view(np.float32).ravel()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(apply, name):
    x = sweep()
    with np.errstate(all="ignore"):
        found, exact = apply(name, x).astype(np.float64), getattr(np, name)(x.astype(np.float64))
    largest = float(np.finfo(np.float32).max)
    real, inside = ~np.isnan(exact), np.abs(exact) <= largest
    assert np.array_equal(np.isnan(found), ~real)
    beyond = np.abs(exact) > largest * (1 + 2.0**-20)
    assert np.array_equal(found[beyond], np.copysign(np.inf, exact[beyond]))
    # exp's subnormal results are among those that are held: of a sum of two its logarithm may be taken.
    held = inside & (np.abs(exact) >= (0.0 if name == "exp" else 2.0**-126))
    error = np.abs(found[held] - exact[held]) / np.spacing(np.abs(exact[held]).astype(np.float32))
    assert error.max() <= ULP[name], x[held][error.argmax()]
    assert error[np.abs(x[held]) < 1].max() <= NEAR.get(name, ULP[name])
    assert np.abs(found[inside & ~held]).max(initial=0.0) <= 2.0**-123


def test_values_at_the_ends(apply):
    at = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 88.7, 88.73, -87.0, 0.5, 2.0, 1e-45, -1e-45, -0.5, 2e-38]
    x = np.array(at, dtype=np.float32)
    for name in FUNCTIONS:
        with np.errstate(all="ignore"):
            exact = getattr(np, name)(x.astype(np.float64))
        exact = np.where(np.abs(exact) > np.finfo(np.float32).max, np.copysign(np.inf, exact), exact)
        np.testing.assert_allclose(apply(name, x).astype(np.float64), exact, rtol=ULP[name] * 2.0**-23, atol=2.0**-123)
