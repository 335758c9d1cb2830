"""Rates of a user's function in rate_ratio: their kernels against plain formulas in float64, and what is refused."""

import functools
import math
import pickle

import numpy as np
import pytest
import torch

import dam
from dam import rates
from dam.benchmarks.defined import nearby
from dam.derive import DerivativeError
from tests.ops.helpers import assert_close, integers, normal, same, threads

IMPLEMENTATIONS = ("torch", "cpu", "triton")
INF = math.inf
define = functools.cache(rates.define)


def exponential(z):
    return math.exp(z)


def softplus(z):
    return torch.nn.functional.softplus(z)


def to_neighbours(z, y, x, width=50.0):
    """Larger for destinations near the state, and of another form on its other side."""
    near = np.exp(-np.square((y - x) / width))
    if y > x:
        return (1 + near) * np.exp(z)
    return np.exp(0.5 * z) + 0.25


def powers(z, y, x):
    """Of negative numbers, and to a number that a destination has for itself."""
    return (1 + np.exp(z)) ** (1 / (1 + y)) * (2 + ((x - y) / 100) ** 6 + ((x - y) / 1000) ** 7)


def by_hand(rate, z, y, x):
    near = torch.exp(-(((y - x) / 50.0) ** 2))
    return {
        exponential: lambda: z.exp(),
        softplus: lambda: torch.nn.functional.softplus(z, threshold=1e9),
        nearby: lambda: z.exp() / (1 + (y - x) ** 2),
        powers: lambda: (1 + z.exp()) ** (1 / (1 + y)) * (2 + ((x - y) / 100) ** 6 + ((x - y) / 1000) ** 7),
        to_neighbours: lambda: torch.where(y > x, (1 + near) * z.exp(), (z / 2).exp() + 0.25),
    }[rate]()


RATES = [pytest.param(rate, id=rate.__name__) for rate in (exponential, softplus, to_neighbours, nearby, powers)]


def case(rows, columns, dtype=torch.float32, seed=1):
    logits, base = normal(rows, columns, seed=seed, scale=2.0).to(dtype), normal(rows, columns, seed=seed + 1).to(dtype)
    target, state = integers(-1, columns, rows, 4, seed=seed + 2), integers(0, columns, rows, seed=seed + 3)
    logits[1, : columns // 2] = -INF
    return logits, base, target, state


def expected(rate, logits, base, target, state, exclude=-1, suppress=()):
    columns = logits.shape[1]
    every = torch.arange(columns)
    left_out = (every == torch.as_tensor(exclude).expand(len(logits))[:, None]) | torch.isin(
        every, torch.tensor(suppress, dtype=torch.int64)
    )
    found = []
    for z in (logits, base):
        z = z.double().masked_fill(left_out, -INF)
        found.append(by_hand(rate, z, every.double(), state[:, None].double()).masked_fill(z == -INF, 0.0))
    at = target.clamp(min=0)
    log_ratio = found[1].gather(1, at).log() - found[0].gather(1, at).log()
    gap = found[0].sum(dim=1) - found[1].sum(dim=1)
    return torch.where(target < 0, 0.0, log_ratio), gap, found[0].sum(dim=1) + found[1].sum(dim=1)


@pytest.mark.parametrize("rate", RATES)
def test_ratio_and_gap(backend, rate):
    if backend == "cpu" and rate not in (nearby, powers):  # the first is compiled by docs/derive.md too
        pytest.skip("test_more_kernels has it")
    compare(rate)


@pytest.mark.full
@pytest.mark.parametrize("rate", RATES[:3])
def test_more_kernels(rate):
    with dam.backend("cpu"):
        compare(rate)


def compare(rate):
    for dtype in (torch.float32, torch.bfloat16):
        logits, base, target, state = case(5, 2500, dtype)
        for options in ({}, {"exclude": target[:, 0].clone(), "suppress": [0, 3, int(target[2, 1].clamp(min=0))]}):
            found = dam.rate_ratio(logits, base, target, rate=define(rate), state=state, **options)
            log_ratio, gap, size = expected(rate, logits, base, target, state, **options)
            assert found.log_ratio.dtype == found.escape_gap.dtype == torch.float32
            # Computed in float64, so what is left is the rounding of the results, of the gap's terms 1e-14.
            torch.testing.assert_close(
                found.log_ratio.double(), log_ratio, rtol=2.0**-23, atol=2.0**-23, equal_nan=True
            )
            assert bool(((found.escape_gap.double() - gap).abs() <= 2.0**-23 * gap.abs() + 1e-14 * size).all())


def looped(z, y, x, steps=3):
    rate = np.exp(z)
    for k in range(1, steps):
        rate = rate + np.exp(z / k) / (1 + k * (y - x) ** 2)
    return rate


def test_loops_are_written_out():
    z, y, x = torch.linspace(-3, 3, 7, dtype=torch.float64), 4.0, 6.0
    (found,) = define(looped).rate(z, y, x)
    torch.testing.assert_close(found, z.exp() * (1 + 1 / 5) + (z / 2).exp() / 9)
    with pytest.raises(DerivativeError, match=r"range\(y\) is not a range of whole numbers that are known"):
        rates.define(to_itself)


def to_itself(z, y):
    rate = np.exp(z)
    for _ in range(y):
        rate = 2 * rate
    return rate


@pytest.mark.full
def test_exponential_rates_are_the_hand_written():
    logits, base, target, _ = case(4, 3000)
    for room in ("torch", "cpu"):
        with dam.backend(room):
            ours, theirs = (
                dam.rate_ratio(logits, base, target, exclude=7, rate=r) for r in (define(exponential), None)
            )
        torch.testing.assert_close(ours.log_ratio, theirs.log_ratio, rtol=2.0**-22, atol=0.0, equal_nan=True)
        # Of theirs the sums are of float32's exponentials.
        assert_close(ours.escape_gap, theirs.escape_gap, rtol=2.0**-16)


def test_numbers_far_from_0(backend):
    """Without the exponential of what is only compared: a ratio of rates of 1e-300 and 1e+300."""
    if backend == "cpu":
        pytest.skip("test_more_kernels_far_from_0 has it")
    compare_far()


@pytest.mark.full
def test_more_kernels_far_from_0():
    with dam.backend("cpu"):
        compare_far()


def compare_far():
    logits, base = torch.tensor([[-700.0, 0.0, 90.0]]), torch.tensor([[690.0, 0.0, -INF]])
    found = dam.rate_ratio(logits, base, torch.tensor([[0, 2, -1]]), rate=define(exponential))
    assert found.log_ratio.tolist() == [[1390.0, -INF, 0.0]] and found.escape_gap.tolist() == [-INF]
    none = torch.full((1, 3), -INF)
    found = dam.rate_ratio(none, none, torch.tensor([[0]]), rate=define(exponential))
    assert math.isnan(found.log_ratio) and found.escape_gap == 0


def test_threads_shapes_and_opcheck():
    logits, base, target, state = case(2, 80_000)
    found = []
    for count in (1, 3):
        with threads(count), dam.backend("cpu"):
            found.append(dam.rate_ratio(logits, base, target, rate=define(nearby), state=state))
    assert same(*found)
    options = {"rate": define(nearby), "state": state[:, None]}
    one = dam.rate_ratio(logits[:, None], base[:, None], target[:, :1], **options)
    assert one.log_ratio.shape == (2, 1) and torch.equal(one.escape_gap[:, 0], found[0].escape_gap)
    arguments = (logits[:, :40], base[:, :40], target % 40, state, None, None, define(nearby).key, "cpu")
    torch.library.opcheck(rates._defined_rate_ratio.overload, arguments)


def test_sources_hold_what_they_come_from():
    rate = define(to_neighbours)
    for text in (rate.cpp, rate.triton):
        assert "near = np.exp(-np.square((y - x) / width))" in text and "Hash of this: " in text
    assert rate.of_state and not define(softplus).of_state


def test_to_another_process(monkeypatch):
    rate = define(softplus)
    written = pickle.dumps(rate)
    assert pickle.loads(written) is rate
    monkeypatch.setattr(rates, "DEFINED", {})
    other = pickle.loads(written)
    assert other is not rate and rates._defined(rate.key) is other and not other.of_state
    z = normal(5)
    assert same(other.rate(z, 0, 0), rate.rate(z, 0, 0))


def negative(z):
    return z


def vanishing(z, y):
    return y * math.exp(z)


def cancelling(z):
    return 1 - 1 / (1 + math.exp(z - 20))


def overflowing(z):
    return 1 + np.log(np.cosh(np.exp(z)))


def of_four(z, y, x, t):
    return z + y + x + t


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (negative, ValueError, "negative must be positive; it is -20 at z = -20, y = 0, x = 0"),
        (vanishing, ValueError, "vanishing must be positive; it is 0 at z = -20, y = 0, x = 0"),
        (cancelling, ValueError, "float64 does not hold cancelling at z = -20, y = 0, x = 0: it has 0, and -inf for"),
        (
            overflowing,
            ValueError,
            "float64 does not hold overflowing at z = 8.44, .*: it has inf, .* is right; write the rate so",
        ),
        (of_four, DerivativeError, "a rate is a function of z, of z and y, or of z, y and x"),
        (lambda z: np.sum(z), DerivativeError, "np.sum is not a function of numbers"),
    ],
)
def test_refused(rate, error, message):
    with pytest.raises(error, match=message):
        rates.define(rate)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": torch.exp}, TypeError, "rate must be of dam.rates.define"),
        ({"state": torch.zeros(3, dtype=torch.int64)}, ValueError, "state is for a rate of it"),
        ({"rate": to_neighbours}, ValueError, r"to_neighbours is a rate of the state too: give state, int64 \[3\]"),
        ({"rate": to_neighbours, "state": torch.zeros(3)}, ValueError, r"state must be int64 \[3\]; got torch.float32"),
    ],
)
def test_wrong_arguments(options, error, message):
    x = torch.zeros(3, 5)
    if options.get("rate") is to_neighbours:
        options = {**options, "rate": define(to_neighbours)}
    with pytest.raises(error, match=message):
        dam.rate_ratio(x, x, torch.zeros(3, dtype=torch.int64), **options)
