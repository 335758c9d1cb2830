"""Divergences of a user's convex function: their kernels against closed forms in float64, and what is refused."""

import copy
import functools
import json
import math
import pickle
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
import sympy
import torch
from sympy.codegen.cfunctions import expm1

import dam
from dam.backends import generated
from dam.benchmarks.defined import NORMALIZED, generalised_kl, squared_hellinger, table
from dam.derive import DerivativeError
from dam.divergences import definition, digits, matching, rate_matching_loss, texts
from tests.ops.helpers import assert_close, integers, normal, rounding, same, threads

IMPLEMENTATIONS = ("torch", "cpu", "triton")
define = functools.cache(definition.define)  # takes a second
INF = math.inf
ALPHA = 0.3


def chi_square(u):
    return (u - 1) * (u - 1)


def alpha_divergence(u):
    return (u**ALPHA - ALPHA * u + ALPHA - 1) / (ALPHA * (ALPHA - 1))


def jensen_shannon(u):
    return u * torch.log(u) - (1 + u) * torch.log(1 + u)


def of_small_exponentials(u):
    return torch.log(torch.exp(-u) + torch.exp(-3 * u)) + u * u


def quadratic_above_2(u):
    if u <= 2:
        return 4 * u - 4
    squared = u * u
    return squared


# phi'(u) u - phi(u), phi'(u), phi''(u) u^2 and phi''(u) u by hand, of x = log u.
BY_HAND = {
    generalised_kl: lambda x: (x.exp(), x, x.exp(), torch.ones_like(x)),
    squared_hellinger: lambda x: ((x / 2).exp() - 1, 1 - (-x / 2).exp(), (x / 2).exp() / 2, (-x / 2).exp() / 2),
    chi_square: lambda x: ((2 * x).exp() - 1, 2 * x.exp() - 2, 2 * (2 * x).exp(), 2 * x.exp()),
    alpha_divergence: lambda x: (
        ((ALPHA * x).exp() - 1) / ALPHA,
        (((ALPHA - 1) * x).exp() - 1) / (ALPHA - 1),
        (ALPHA * x).exp(),
        ((ALPHA - 1) * x).exp(),
    ),
    jensen_shannon: lambda x: (
        torch.nn.functional.softplus(x),
        -torch.nn.functional.softplus(-x),
        torch.sigmoid(x),
        torch.sigmoid(-x),
    ),
    quadratic_above_2: lambda x: (
        torch.where(x > math.log(2), (2 * x).exp(), 4.0),
        torch.where(x > math.log(2), 2 * x.exp(), 4.0),
        torch.where(x > math.log(2), 2 * (2 * x).exp(), 0.0),
        torch.where(x > math.log(2), 2 * x.exp(), 0.0),
    ),
}
# A kernel of C++ takes seconds to compile.
COMPILED = (generalised_kl, squared_hellinger)


def case(rows, columns, dtype=torch.float32, seed=1):
    """Log rates [T, V], targets with one that repeats and with gaps, weights of both signs, and options."""
    x, target = normal(rows, columns, seed=seed).to(dtype), integers(-1, columns, rows, 4, seed=seed + 1)
    target[:, 1] = target[:, 0]
    x[1, columns // 2 :] = -INF
    options = {
        "row_scale": normal(rows, seed=seed + 3),
        "exclude": target[:, 2].clone(),
        "suppress": [0, columns - 1, int(target[0, 3])],
    }
    reached = x.gather(1, target.clamp(min=0)) > -INF
    return x, target, torch.where(reached, normal(rows, 4, seed=seed + 2), 0.0), options


def by_hand(phi, x, target, weight, row_scale=None, exclude=None, suppress=()):
    """Loss, gradient, and the sums of what is added up in either, float64."""
    rows, columns = x.shape
    x, w = x.double(), torch.where(target >= 0, weight.double(), 0.0)
    if exclude is not None:
        x = x.masked_fill(torch.arange(columns) == exclude[:, None], -INF)
        w = torch.where(target == exclude[:, None], 0.0, w)
    left_out = torch.isin(torch.arange(columns), torch.tensor(suppress, dtype=torch.int64))
    w = torch.where(left_out[target.clamp(min=0)], 0.0, w)
    x = x.masked_fill(left_out, -INF)
    none, index = x == -INF, target.clamp(min=0)
    pull, _, curvature, _ = (v.masked_fill(none, 0.0) for v in BY_HAND[phi](x.masked_fill(none, 0.0)))
    at = x.gather(1, index)
    _, slope, _, force = BY_HAND[phi](torch.where(w == 0, 0.0, at))
    scale = torch.full((rows,), 1.0 / rows, dtype=torch.float64) if row_scale is None else row_scale.double()
    loss = (scale * (pull.sum(dim=1) - (w * slope).sum(dim=1))).sum()
    gradient = scale[:, None] * curvature.clone().scatter_add_(1, index, -w * force)
    size = scale.abs()[:, None] * curvature.abs().scatter_add_(1, index, (w * force).abs())
    return loss, gradient, (scale.abs() * (pull.abs().sum(dim=1) + (w * slope).abs().sum(dim=1))).sum(), size


def result(phi, x, *arguments, factor=1.0, **options):
    leaf = x.detach().requires_grad_()
    loss = rate_matching_loss(leaf, *arguments, divergence=define(phi), **options)
    (gradient,) = torch.autograd.grad(factor * loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phi", [pytest.param(phi, id=phi.__name__) for phi in BY_HAND])
def test_loss_and_gradient(backend, phi, dtype, request):
    if backend == "cpu" and phi not in COMPILED:
        pytest.skip("test_loss_and_gradient_of_more_kernels has it")
    compare(phi, dtype)


@pytest.mark.full
@pytest.mark.parametrize("phi", [pytest.param(phi, id=phi.__name__) for phi in BY_HAND if phi not in COMPILED])
def test_loss_and_gradient_of_more_kernels(phi):
    with dam.backend("cpu"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(phi, dtype)


def compare(phi, dtype):
    """Without options, with all, with a temperature's upstream factor; several tiles, the last one short."""
    x, target, weight, options = case(5, 2500, dtype)
    for given in ({}, options):
        loss, gradient = result(phi, x, target, weight, factor=3.0, **given)
        expected, slope, terms, sizes = by_hand(phi, x, target, weight, **given)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        # An exponential is within 2^-22 |x| or so, and so is what is added of them.
        assert abs(float(loss) - float(expected)) <= 2.0**-20 * float(terms)
        excess = (gradient.double() - 3 * slope).abs() - 3 * (2.0**-20 + 2 * rounding(dtype)) * sizes
        # Beside that the spacing of float16's small numbers.
        assert float(excess.max()) <= (2.0**-24 if dtype == torch.float16 else 0.0)


ELEMENTARY = [
    lambda u: u * np.arctan(u),
    lambda u: u * torch.erf(u) + torch.exp(-u * u) / math.sqrt(math.pi),
    lambda u: torch.nn.functional.softplus(u) + np.expm1(-u),
    lambda u: (1 + u * u) ** 0.5 + (1 + u) ** 1.7,
    lambda u: u + math.log(1 + math.exp(-2 * u)) + np.square(u) / 4,
    lambda u: 2 * u * u + np.sin(u) * np.cos(u),
    lambda u: np.maximum(u, 1.0) ** 2 + abs(u - 3) + np.where(u > 2, (u - 2) ** 2, 0.0),
    lambda u: np.tanh(u) + u**2,
]


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(ELEMENTARY)))
def test_elementary_functions(number):
    """Whatever a kernel computes them by: as torch does in float64, which is autograd's gradient of the formula."""
    phi = ELEMENTARY[number]
    divergence, (x, target, weight, options) = define(phi), case(4, 1500)
    x[3] += 3.0
    leaf = x.double().requires_grad_()
    with dam.backend("torch"):
        expected = rate_matching_loss(leaf, target, weight, divergence=divergence, **options)
        (slope,) = torch.autograd.grad(expected, leaf)
    pull, _ = divergence.terms(x.double())
    for room in ("cpu", "triton"):
        if room == "triton" and divergence.triton is None:
            continue
        with dam.backend(room):
            loss, gradient = result(phi, x, target, weight, **options)
        scale = options["row_scale"].double()[:, None]
        terms = (scale * pull).nan_to_num(0.0, 0.0, 0.0).abs().sum()
        assert abs(float(loss) - float(expected.detach())) <= 2.0**-17 * float(terms)
        assert_close(gradient, slope, rtol=2.0**-16, atol=2.0**-16)


def test_float64_is_the_reference():
    x, target, weight, options = case(4, 300, torch.float64)
    for phi in BY_HAND:
        loss, gradient = result(phi, x, target, weight, **options)
        expected, slope, terms, sizes = by_hand(phi, x, target, weight, **options)
        assert loss.dtype == gradient.dtype == torch.float64
        assert abs(float(loss - expected)) <= 1e-13 * float(terms)
        assert float(((gradient - slope).abs() - 1e-13 * sizes).max()) <= 0


def test_the_generalised_kl_is_the_hand_written():
    x, target, weight, options = case(6, 3000)
    for given in ({}, options):
        loss, gradient = result(generalised_kl, x, target, weight, **given)
        leaf = x.clone().requires_grad_()
        expected = rate_matching_loss(leaf, target, weight, divergence="kl", **given)
        (slope,) = torch.autograd.grad(expected, leaf)
        assert_close(loss, expected.detach(), rtol=2.0**-20)
        _, _, _, sizes = by_hand(generalised_kl, x, target, weight, **given)
        assert float(((gradient - slope).abs() - 2.0**-20 * sizes).max()) <= 0  # two exponentials of 2^-22 each


def test_rates_that_float32_does_not_hold(backend):
    """A tile with a log rate for which an expression overflows, or loses its digits, is computed in float64."""
    x, target, weight, _ = case(3, 2500)
    # A rate of 1e41 is beyond float32, its loss and gradient with this row_scale are not.
    x[0, 3], x[2], weight[2] = 95.0, x[2] - 300.0, 0.0
    options = {"row_scale": torch.tensor([1e-6, 1.0, 1.0])}
    for phi in (generalised_kl, squared_hellinger):
        loss, gradient = result(phi, x, target, weight, **options)
        expected, slope, terms, sizes = by_hand(phi, x, target, weight, **options)
        assert abs(float(loss) - float(expected)) <= 2.0**-20 * float(terms)
        assert float(((gradient.double() - slope).abs() - 2.0**-20 * sizes - 2.0**-120).max()) <= 0


def test_targets_that_cannot_be_reached(backend):
    """Cost the limit of phi' at 0; where that is infinite, weights add up first; the rest's gradient stays."""
    x = torch.tensor([[0.5, -INF, 1.0]])
    target = torch.tensor([[1, 1]])
    for phi, none, some in ((generalised_kl, 0.0, INF), (squared_hellinger, 0.0, INF)):
        without, rest = result(phi, x, torch.tensor([[-1, -1]]), torch.ones(1, 2))
        loss, gradient = result(phi, x, target, torch.tensor([[2.0, -2.0]]))
        assert loss - without == none and torch.equal(gradient, rest)
        loss, gradient = result(phi, x, target, torch.tensor([[2.0, -1.0]]))
        assert loss == some and torch.equal(gradient[:, [0, 2]], rest[:, [0, 2]])
        assert gradient[0, 1] == {generalised_kl: -1.0, squared_hellinger: -INF}[phi]


def test_a_gradient_beyond_float32(backend):
    """Has the sign of the sum where both its parts are beyond float32, with opposite ones; is 0 where they cancel."""
    x, weight, scale = torch.tensor([[80.0, 100.0, 0.0]]), torch.tensor([[2e38, 1e38, 1.0]]), torch.tensor([1e25])
    _, gradient = result(squared_hellinger, x, torch.tensor([[0, 1, 2]]), weight, row_scale=scale)
    for n, (curvature, force) in enumerate(((math.exp(40), math.exp(-40)), (math.exp(50), math.exp(-50)))):
        assert 1e25 * min(curvature, float(weight[0, n]) * force) / 2 > 3.5e38
    assert gradient.tolist() == [[-INF, INF, 0.0]]


def small_exponentials():
    with pytest.warns(RuntimeWarning, match="float64 holds what is derived of of_small_exponentials only"):
        return definition.define(of_small_exponentials)


def test_float32_is_where_small_numbers_do_not_matter():
    """At a log rate of 4.5 the logarithm of exp(-90) is taken, a subnormal float that a GPU may take for 0."""
    assert small_exponentials().range == (-INF, 4.0)


@pytest.mark.full
def test_the_logarithm_of_a_small_exponential(backend):
    divergence, u = small_exponentials(), math.exp(4.47)
    loss = rate_matching_loss(torch.tensor([[4.47]]), torch.tensor([[-1]]), torch.ones(1, 1), divergence=divergence)
    assert float(loss) == pytest.approx(u * (2 * u - 1) - (u * u - u), rel=2.0**-20)  # exp(-2 u) is nothing beside 1


def test_not_a_number_stays(backend):
    x, target, weight, _ = case(3, 1500)
    x[0, 7] = math.nan
    loss, gradient = result(generalised_kl, x, target, weight)
    assert math.isnan(loss) and int(gradient.isnan().sum()) == 1 and math.isnan(gradient[0, 7])
    loss, gradient = result(squared_hellinger, x, target, weight, normalized=True)
    assert math.isnan(loss) and bool(gradient[0].isnan().all()) and not bool(gradient[1:].isnan().any())


@pytest.mark.parametrize("at", [3, 600, 1023])
def test_a_log_rate_far_from_others(at):
    """Costs its tile the short way, whether it lies in its first vectors or after: none of it is lost there."""
    odd = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)  # a NaN with digits
    far = torch.tensor([-INF, -90.0, -300.0, 85.9, 86.0, 95.0, odd.item()])
    x, target, weight, _ = case(len(far), 3 * 1024)
    x[1], x[:, 1024 + at] = normal(3 * 1024), far
    weight = torch.where(x.gather(1, target.clamp(min=0)).isfinite(), weight, 0.0)
    weight[x.isnan().any(dim=1)] = 0.0
    options = {"row_scale": torch.full((len(far),), 1e-6)}
    with dam.backend("cpu"):
        for phi in COMPILED:
            loss, gradient = result(phi, x, target, weight, **options)
            assert math.isnan(loss) and gradient.isnan().nonzero().tolist() == [[len(far) - 1, 1024 + at]]
            loss, gradient = result(phi, x[:-1], target[:-1], weight[:-1], row_scale=options["row_scale"][:-1])
            expected, slope, terms, sizes = by_hand(phi, x[:-1], target[:-1], weight[:-1], options["row_scale"][:-1])
            assert abs(float(loss) - float(expected)) <= 2.0**-20 * float(terms)
            assert float(((gradient.double() - slope).abs() - 2.0**-20 * sizes - 2.0**-120).max()) <= 0


def normalized_by_hand(phi, x, target, weight, row_scale=None, exclude=None, suppress=()):
    """As by_hand, of softmax(x): through autograd's log_softmax in float64, and in bounds for either sum."""
    leaf = x.double().detach().requires_grad_()
    left_out = torch.isin(torch.arange(x.shape[1]), torch.tensor(suppress, dtype=torch.int64)).expand(x.shape)
    if exclude is not None:
        left_out = left_out | (torch.arange(x.shape[1]) == exclude[:, None])
    log_rates = leaf.masked_fill(left_out, -INF).log_softmax(dim=1)
    loss, slope, terms, sizes = by_hand(phi, log_rates.detach(), target, weight, row_scale, exclude, suppress)
    (gradient,) = torch.autograd.grad(log_rates, leaf, slope)
    u = log_rates.detach().exp()
    return loss, gradient, terms, sizes + u * sizes.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phi", [pytest.param(phi, id=phi.__name__) for phi in BY_HAND])
def test_normalized(backend, phi, dtype, request):
    """Of softmax(logits), in the value and through the gradient; what a row's logits have in common changes nothing."""
    if backend == "cpu" and phi is not squared_hellinger:
        pytest.skip("test_normalized_by_more_kernels has it")
    compare_normalized(phi, dtype)


@pytest.mark.full
@pytest.mark.parametrize("phi", [pytest.param(phi, id=phi.__name__) for phi in BY_HAND if phi is not squared_hellinger])
def test_normalized_by_more_kernels(phi):
    with dam.backend("cpu"):
        for dtype in (torch.float32, torch.bfloat16):
            compare_normalized(phi, dtype)


def compare_normalized(phi, dtype):
    x, target, weight, options = case(5, 2500, dtype)
    x[3] += 64.0
    x[4, 2047] = 30.0  # nearly all of its row
    for given in ({}, options):
        loss, gradient = result(phi, x, target, weight, factor=3.0, normalized=True, **given)
        expected, slope, terms, sizes = normalized_by_hand(phi, x, target, weight, **given)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        # Exponentials of up to twice a log rate that was rounded at 2^-24 of its 35 or so, beside their own 2^-20.
        assert abs(float(loss) - float(expected)) <= 2.0**-17 * float(terms)
        excess = (gradient.double() - 3 * slope).abs() - 3 * (2.0**-17 + 2 * rounding(dtype)) * sizes
        assert float(excess.max()) <= 0.0


def test_normalized_rates_that_are_0_to_float32(backend):
    """Their gradient is what the outflow makes of them, which an unlikely target's is large enough for."""
    x, target = torch.tensor([[0.0, -87.0, -87.5, -88.0], [0.0, -110.0, -110.5, -111.0]]), torch.tensor([[1], [1]])
    for scale in (torch.ones(2), torch.tensor([1.0, 1e-12])):
        weight = torch.full((2, 1), 1e9)
        loss, gradient = result(squared_hellinger, x, target, weight, row_scale=scale, normalized=True)
        expected, slope, terms, _ = normalized_by_hand(squared_hellinger, x, target, weight, scale)
        assert abs(float(loss) - float(expected)) <= 2.0**-20 * float(terms)
        # In float64 but for the logits, of which 2^-24 of 111 is lost where they are made log rates.
        assert_close(gradient, slope, rtol=2.0**-16)


def test_row_scales_that_are_no_floats(backend):
    """Beyond what float32 holds, or so small that it has lost digits of them; the gradient itself is one."""
    x, target, weight, _ = case(2, 1500)
    weight[:] = 0.0
    for size in (1e40, 1e-43):
        scale, at = torch.full((2,), size, dtype=torch.float64), x - 2 * math.copysign(10.0, math.log(size))
        for normalized, of in ((False, by_hand), (True, normalized_by_hand)):
            _, gradient = result(squared_hellinger, at, target, weight, row_scale=scale, normalized=normalized)
            _, slope, _, sizes = of(squared_hellinger, at, target, weight, scale)
            inside = slope.abs() < 3e38
            excess = (gradient.double() - slope).abs() - 2.0**-17 * sizes - 2.0**-149
            assert bool(inside.any()) and float(excess[inside].max()) <= 0


def test_normalized_in_float64():
    x, target, weight, options = case(4, 300, torch.float64)
    for phi in BY_HAND:
        for given in ({}, options):
            loss, gradient = result(phi, x, target, weight, normalized=True, **given)
            expected, slope, terms, sizes = normalized_by_hand(phi, x, target, weight, **given)
            assert abs(float(loss - expected)) <= 1e-13 * float(terms)
            assert float(((gradient - slope).abs() - 1e-13 * sizes).max()) <= 0


def test_the_normalized_generalised_kl_is_the_hand_written():
    """But for what the rates of a distribution add up to."""
    x, target, weight, options = case(6, 3000)
    scale = options["row_scale"]
    with dam.backend("torch"):
        loss, gradient = result(generalised_kl, x, target, weight, normalized=True, **options)
    leaf = x.clone().requires_grad_()
    expected = rate_matching_loss(leaf, target, weight, divergence="kl", normalized=True, **options)
    (slope,) = torch.autograd.grad(expected, leaf)
    _, _, terms, sizes = normalized_by_hand(generalised_kl, x, target, weight, **options)
    assert abs(float(loss) - float(scale.double().sum()) - float(expected.detach())) <= 2.0**-20 * float(terms)
    assert float(((gradient - slope).abs() - 2.0**-19 * sizes).max()) <= 0


def test_normalized_targets_that_cannot_be_reached(backend):
    """Cost infinitely much, and pull at all of the row where phi''(u) u is infinite at 0; weights add up first. A row
    that can reach nothing has no gradient."""
    x, target = torch.tensor([[0.5, -INF, 1.0]]), torch.tensor([[1, 1]])
    without, rest = result(squared_hellinger, x, torch.tensor([[-1, -1]]), torch.ones(1, 2), normalized=True)
    loss, gradient = result(squared_hellinger, x, target, torch.tensor([[2.0, -2.0]]), normalized=True)
    assert loss == without and torch.equal(gradient, rest)
    loss, gradient = result(squared_hellinger, x, target, torch.tensor([[2.0, -1.0]]), normalized=True)
    assert loss == INF and gradient.tolist() == [[INF, -INF, INF]]
    loss, gradient = result(squared_hellinger, x - INF, target, torch.zeros(1, 2), normalized=True)
    assert loss == 0 and gradient.tolist() == [[0.0, 0.0, 0.0]]
    for divergence in ("kl", define(squared_hellinger)):
        assert rate_matching_loss(x - INF, target, torch.ones(1, 2), divergence=divergence, normalized=True) == INF


def test_normalized_of_a_plain_function():
    x, target, weight, options = case(3, 50, torch.float64)
    found = []
    for divergence in (lambda u: (torch.sqrt(u) - 1) ** 2, define(squared_hellinger)):
        leaf = x.clone().requires_grad_()
        loss = rate_matching_loss(leaf, target, weight, divergence=divergence, normalized=True, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for plain, defined in zip(*found, strict=True):
        assert_close(plain, defined, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_plain_function_of_a_rate_that_underflows(normalized):
    """Counts what phi has near 0, as it does in a kernel; only a log rate of -inf is no destination."""
    x, none = torch.tensor([[0.0, -2000.0, -INF]]), (torch.tensor([[-1]]), torch.ones(1, 1))
    found = []
    for divergence in (squared_hellinger, define(squared_hellinger)):
        leaf = x.clone().requires_grad_()
        loss = rate_matching_loss(leaf, *none, divergence=divergence, normalized=normalized)
        found.append([float(loss.detach()), *torch.autograd.grad(loss, leaf)[0].flatten().tolist()])
    assert found[0] == found[1] == [-1.0, 0.0 if normalized else 0.5, 0.0, 0.0]


def test_no_rows_no_targets_and_any_strides(backend):
    x, target, weight, _ = case(4, 60)
    empty, gradient = result(generalised_kl, x[:0], target[:0], weight[:0])
    assert empty == 0 and gradient.shape == (0, 60)
    none, _ = result(generalised_kl, x, target[:, :0], weight[:, :0])
    assert_close(none, x.double().exp().sum() / 4, rtol=2.0**-20)
    wide = torch.cat([x, normal(4, 7, seed=9)], dim=1)
    strided = result(generalised_kl, wide[:, :60], target.t().contiguous().t(), weight)
    assert same(strided, result(generalised_kl, x, target, weight))
    loss, gradient = result(generalised_kl, x.view(2, 2, 60), target.view(2, 2, 4), weight.view(2, 2, 4))
    assert same((loss, gradient.view(4, 60)), result(generalised_kl, x, target, weight))


def test_threads_change_nothing():
    x, target, weight, options = case(2, 80_000)
    for phi, normalized in ((generalised_kl, False), (squared_hellinger, True)):
        found = []
        for count in (1, 3):
            with threads(count), dam.backend("cpu"):
                found.append(result(phi, x, target, weight, normalized=normalized, **options))
        assert same(*found)


# ---- torch's own machinery


SIMULATED = [pytest.param(name, marks=pytest.mark.full) for name in ("torch", "triton")]


@pytest.mark.parametrize("room", ["cpu", *SIMULATED])
def test_opcheck(room):
    x, target, weight, options = case(3, 40)
    excluding = (options["exclude"], torch.arange(40) % 5 == 2)
    target = target.where(target % 5 != 2, -1)
    # overwrite=False: opcheck calls backward more than once.
    args = (x.requires_grad_(), target, weight, options["row_scale"], *excluding, define(generalised_kl).key)
    for normalized in (False, True):
        torch.library.opcheck(matching._rate_matching_loss.overload, (*args, normalized, True, room, False))


@pytest.mark.parametrize("room", ["cpu", *SIMULATED])
def test_compiled_equals_eager(room):
    x, target, weight, options = case(4, 40)
    divergence = define(generalised_kl)

    def step(x):
        return rate_matching_loss(x * 1.5, target, weight, divergence=divergence, **options)

    torch.compiler.reset()
    found = []
    with dam.backend(room):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            loss = function(leaf)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, rtol=2 * rounding(torch.float32))


def test_one_backward_pass():
    x, target, weight, _ = case(2, 20)
    leaf = x.requires_grad_()
    loss = rate_matching_loss(leaf, target, weight, divergence="l2")
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="rate_matching_loss was differentiated twice"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(RuntimeError, match="has no double backward"):
        torch.autograd.grad(rate_matching_loss(leaf, target, weight, divergence="l2"), leaf, create_graph=True)
    with torch.no_grad():
        assert not rate_matching_loss(leaf, target, weight, divergence="l2").requires_grad


# ---- what is written


def test_sources_hold_what_they_come_from():
    divergence = define(squared_hellinger)
    for text in (divergence.cpp, divergence.triton):
        assert re.search(r"Hash of this and of its derivatives: [0-9a-f]{24}\n", text)
        assert "def squared_hellinger(u):" in text and "return (torch.sqrt(u) - 1) ** 2" in text
    assert "root - T(1)" in divergence.cpp and "root - 1" in divergence.triton
    assert divergence.slope.count("\n") > 3 and "dsquared_hellinger" in divergence.slope
    assert define(lambda u: u * u).phi == "lambda u: u * u"


def test_a_source_stays_in_its_comment():
    """Whatever it ends its lines with, of which C++ would make one of two."""
    for line in ("u \\", "u \\ \\", "u\\\t", "u \\\r int x;"):
        for commented in texts.commented(f"{line}\nv", "//").splitlines():
            assert commented.startswith("//") and not commented.endswith(("\\", " ", "\t"))


def test_one_definition_one_key():
    """The same function is the same divergence; another constant is another."""

    def scaled(by):
        def phi(u):
            return by * u**2

        return definition.define(phi)

    assert scaled(2.0) is scaled(2.0) and scaled(2.0).key != scaled(3.0).key
    with pytest.raises(ValueError, match=r"no divergence with key 'other' is defined in this process"):
        definition.defined("other")


def test_forms_are_chosen_by_rounding():
    """What cancels is cancelled: no logarithm in the generalised KL, and no difference of large numbers."""
    assert "log" not in define(generalised_kl).torch
    kernel = define(jensen_shannon)
    assert "log1p(u)" in kernel.cpp and kernel.range.lowest == -INF and kernel.range.highest >= 80
    # u^2 overflows: float32 holds it up to a log rate of 44, and sums of 1024 to less.
    assert 30 <= define(chi_square).range.highest <= 40


TERMS = 3


def series(u, first=2):
    """u^2 / 2 + u^3 / 6 + u^4 / 24, and what is beyond 1."""
    total, term = 0.0, u
    for k in range(first, TERMS + first):
        term = term * u / k
        total += term
    for k in range(2):
        for j in range(1, k + 1):
            if u > j:
                total = total + k * (u - j) ** 2
    return total


def test_loops_are_written_out():
    """As if somebody had: constants, nested ones that depend on the outer, and a condition within."""
    written = define(lambda u: u**2 / 2 + u**3 / 6 + u**4 / 24 + np.where(u > 1, (u - 1) ** 2, 0.0))
    looped = define(series)
    assert looped.phi.startswith("def series(u, first=2):") and "for k in range" in looped.cpp
    x = normal(50, seed=3)
    for ours, theirs in zip(
        (*looped.terms(x), *looped.at_target(x)), (*written.terms(x), *written.at_target(x)), strict=True
    ):
        assert_close(ours, theirs, rtol=2.0**-20)
    assert "for" not in looped.slope


def test_the_page_has_the_figures_of_its_records():
    root = Path(__file__).parents[1]
    results, page = root / "benchmarks/results/epyc-avx2-2-cores", (root / "docs/derive.md").read_text(encoding="utf-8")
    of_rates, again = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in ("defined", "defined-normalised")
    )
    assert table(of_rates) in page
    for found in of_rates["sizes"].values():
        assert max(found["of_hand_written"].values()) < 1.5 and min(found["torch_compile"].values()) > 3
    normalized = {rows: found for rows, found in again["sizes"].items() if rows.endswith(NORMALIZED)}
    assert table({"sizes": normalized}, "normalised rows") in page
    rates = [found for rows, found in again["sizes"].items() if rows not in normalized]
    bounds = [
        f(f(one[of].values()) for one in rates) for of in ("of_hand_written", "torch_compile") for f in (min, max)
    ]
    said = "took {:.2f} to {:.2f} of the\nhand-written kernel's time and were {:.1f} to {:.1f} times as fast"
    assert said.format(*bounds) in page


# ---- without a compiler, or a function of Triton's


def test_without_a_compiler(monkeypatch):
    """The reference runs, which one message says, or an error where the C++ backend is asked for by name."""
    x, target, weight, _ = case(2, 30)

    def none():
        raise generated.NoCompiler("there is no C++ compiler here")

    monkeypatch.setattr(generated, "compiler", none)
    monkeypatch.setattr(matching, "_compiled", matching._compiled.__wrapped__)
    generated.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="there is no C\\+\\+ compiler here; the slower reference") as said:
        for _ in range(2):
            loss, gradient = result(generalised_kl, x, target, weight)
    assert len(said) == 1
    with dam.backend("torch"):
        assert same((loss, gradient), result(generalised_kl, x, target, weight))
    with dam.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' cannot run this call"):
        result(generalised_kl, x, target, weight)


def test_a_function_that_triton_lacks():
    if dam.backends.choice.why_unavailable("triton") is not None:
        pytest.skip("without Triton")
    divergence = define(lambda u: u * torch.atan(u))
    assert divergence.triton is None
    x, target, weight, _ = case(2, 30)
    with dam.backend("triton"), pytest.raises(RuntimeError, match="Triton lacks a function that phi calls"):
        rate_matching_loss(x, target, weight, divergence=divergence)


def test_a_backend_without_it():
    x, target, weight, _ = case(2, 30)
    if dam.backends.choice.why_unavailable("cuda") is not None:
        pytest.skip("without the CUDA kernels")
    with dam.backend("cuda"), pytest.raises(RuntimeError, match="rate_matching_loss has no cuda implementation"):
        rate_matching_loss(x, target, weight, divergence="l2")


# ---- what is refused


def array_sum(u):
    return np.sum(u)


def item(u):
    return u[0]


def endless(u):
    while u > 2:
        u = u / 2
    return u


def loop_to_its_rate(u):
    total = 0.0
    for _ in range(u):
        total = total + u * u
    return total


def long_loop(u):
    total = 0.0
    for _ in range(8):
        for _ in range(9):
            total = total + u * u
    return total


def loop_with_break(u):
    for k in range(3):
        if u > k:
            break
    return u * u


def loop_elsewhere(u):
    return long_loop(u)


def sum_in_a_loop(u):
    total = 0.0
    for k in range(2):
        if u > k:
            total = total + k
        total = total + np.sum(u)
    return total


def of_two(u, v):
    return u * v


def concave(u):
    return np.sqrt(u)


def concave_kink(u):
    return min(u, 1.0)


def convex_somewhere(u):
    return (u - 1) ** 3


def undefined(u):
    return math.log(u - 1)


def linear(u):
    return 3 * u - 1


def constant(u):
    return 2.0


def kink_between_samples(u):
    return u * u - 0.3 * abs(u - 1.3)


def jump(u):
    return np.where(u > 1.3, u * u - 0.2, u * u)


def another_nearby(u):
    if 1.30 < u < 1.35:
        return u * u - 1e-3 * np.sin(u)
    return u * u


def another_at_one_rate(u):
    return np.where(u == 1.3, 100.0, u * u)


def flat_at_one_rate(u):
    return np.where(u == 1, 1.0, u * u)


@pytest.mark.parametrize(
    ("phi", "error", "message"),
    [
        (kink_between_samples, ValueError, "not convex: its slope falls from 2.9 to 2.6 at u = 1.3"),
        (jump, ValueError, "not convex: it jumps from 1.69 to 1.49 at u = 1.3"),
        (another_nearby, ValueError, "not convex: it jumps from 1.69 to 1.68904 at u = 1.3"),
        (another_at_one_rate, ValueError, "not convex: it jumps from 1.69 to 100 at u = 1.3"),
        (flat_at_one_rate, ValueError, "not convex: its slope falls from 2 to 0 at u = 1"),
        (array_sum, DerivativeError, r"return np.sum\(u\)\n.*np.sum is not a function of numbers"),
        (item, DerivativeError, r"return u\[0\]\n.*not made of numbers"),
        (endless, DerivativeError, r"while u > 2:\n.*only assignments, if and return"),
        (
            loop_to_its_rate,
            DerivativeError,
            r"for _ in range\(u\):\n.*range\(u\) is not a range of whole numbers that are known",
        ),
        (long_loop, DerivativeError, r"the loops of long_loop have more than 64 turns"),
        (loop_with_break, DerivativeError, r"break\n.*without break, continue and else"),
        (sum_in_a_loop, DerivativeError, r"test_defined\.py:\d+: total = total \+ np\.sum\(u\)\n.*np\.sum is not"),
        (loop_elsewhere, DerivativeError, r"for _ in range\(8\):\n.*and for in the one defined"),
        (of_two, DerivativeError, "of_two needs a value for its parameter v"),
        (concave, ValueError, "concave is not convex: its second derivative is -.* at u = 1"),
        (concave_kink, ValueError, "concave_kink is not convex: its slope falls from 1 to 0.5 at u = 1"),
        (convex_somewhere, ValueError, "convex_somewhere is not convex"),
        (undefined, ValueError, "no number at u = 1.31e-30; phi is one of all u > 0"),
        (linear, ValueError, "the second derivative of linear is 0"),
        (constant, ValueError, "the second derivative of constant is 0"),
        (math.log, DerivativeError, "has no Python source"),
    ],
)
def test_refused(phi, error, message):
    with pytest.raises(error, match=message):
        define(phi)


# ---- digits


X = sympy.Symbol("x", real=True)
U = sympy.exp(X)


def test_noise_of_the_digits_is_no_dent():
    """The second derivative of softplus is 1e-178 at u = 409, of which 120 digits leave -1e-121."""
    slope = U / (1 + U).subs(U, sympy.exp(U)) * sympy.exp(U) / U
    curvature = sympy.exp(U) / (1 + sympy.exp(U)) - (sympy.exp(U) / (1 + sympy.exp(U))) ** 2
    assert any(digits.numbers([X], curvature)(x)[0] < 0 for x in digits._SAMPLE if 5 < x < 7)
    digits.check_convex("softplus", X, sympy.log(1 + sympy.exp(U)), slope, curvature)
    with pytest.raises(ValueError, match=r"softplus is not convex: its second derivative is -2.5e-09"):
        digits.check_convex("softplus", X, sympy.log(1 + sympy.exp(U)), slope, -curvature / 10**8)


@pytest.mark.parametrize(
    ("e", "limit"),
    [
        (sympy.Rational(1, 10**9) * (2 * U - 2), -2e-9),
        (X / 10**12, -INF),
        (sympy.Rational(1, 10**12), 1e-12),
        (10**12 * U * X, 0.0),
        (1 / X, 0.0),
        (-sympy.exp(U) / (sympy.exp(U) - 1), -INF),
        ((sympy.exp(U) - 1 - U) / U**2, 0.5),
    ],
    ids=str,
)
def test_limits_at_zero(e, limit):
    """Whatever the scale of phi, and where the digits lose u beside 1."""
    assert digits.at_zero("phi", X, e) == pytest.approx(limit, rel=1e-12)


def test_a_limit_that_cannot_be_told():
    """It is 1, by way of 1 + 1 / x, and 0 where the digits have lost u beside 1; or it is no number."""
    for e in (1 / X + (sympy.exp(U) - 1) / U, sympy.sqrt(U - 1)):
        with pytest.raises(ValueError, match="a limit of a derivative of phi at a rate of 0 cannot be told"):
            digits.at_zero("phi", X, e)


def test_digits_are_nobody_elses():
    """A program's own mpmath is left alone, and what it or another thread sets there changes nothing."""
    values = digits.numbers([X], sympy.log(1 + U))
    found = values(0.3)
    with mpmath.workdps(5):
        assert values(0.3) == found and mpmath.mp.dps == 5
    assert digits.numbers([X], sympy.log(1 + U))(0.3)[0] == found[0] and found[0].context is not mpmath.mp


def test_digits_come_to_an_end():
    """A power of a rate to a rate of exp(1e5) has no digits to be counted; it is infinite."""
    (found,) = digits.numbers([X], (1 + U) ** U)(1e5)
    assert found == INF
    (found,) = digits.numbers([X], (1 + U) ** U)(1.0)
    assert math.isclose(found, (1 + math.e) ** math.e, rel_tol=1e-15)


def test_forms_hold_in_float64():
    """phi'(u) u - phi(u) of expm1(-u) + u is 1 for large u, where what is derived has the difference of two u."""
    less = expm1(-U)
    written, _, doubles = definition._best(X, {"pull": -U * less - less - U})
    assert doubles.lowest == -INF and doubles.highest >= 200
    space = definition.functions_of(texts.torch_function("compute", written))
    (pull,) = space["compute"](torch.tensor([-10.0, 3.0, 40.0, 100.0], dtype=torch.float64))
    u = np.exp([-10.0, 3.0])
    expected = [*(-u * np.expm1(-u) - np.expm1(-u) - u), 1.0, 1.0]
    assert_close(pull, torch.tensor(expected), rtol=1e-6, atol=1e-14)


def test_what_float64_does_not_hold_is_said():
    """sqrt(u^2 + 1) - u is 1 / (2 u) for large u, of which 2^-53 u is lost."""
    *_, found = definition._best(X, {"pull": sympy.sqrt(U**2 + 1) - U})
    assert found.lowest == -INF and 9 <= found.highest <= 15
    with pytest.warns(RuntimeWarning, match="float64 holds what is derived of phi only for log rates of -inf to 9"):
        definition._check_doubles("phi", texts.Range(-INF, 9.0))
    with pytest.raises(ValueError, match="float64 does not hold what is derived of phi at a rate of 1; write phi so"):
        definition._check_doubles("phi", texts.Range(INF, -INF))


def test_to_another_process(monkeypatch):
    """By pickle, as torch.save and workers of a DataLoader do; where it was not defined, it is then."""
    divergence = define(chi_square)
    written = pickle.dumps(divergence)
    assert pickle.loads(written) is divergence and copy.deepcopy(divergence) is divergence
    monkeypatch.setattr(definition, "DEFINED", {})
    other = pickle.loads(written)
    assert other is not divergence and definition.defined(divergence.key) is other and other.cpp == divergence.cpp
    x = normal(5)
    assert same(other.terms(x), divergence.terms(x)) and other.range == divergence.range
