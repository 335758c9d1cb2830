"""The accuracy that every backend owes, against float64 and against what eager torch makes of the same dtype."""

import math

import pytest
import torch
from helpers import allowed, integers, normal, rounding

import dam
from dam.ops import matching_loss as module
from tests import calls

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def logits_of(dtype, scale, peaked, seed):
    """Rows up to +-scale; peaked ones have one token 12 nats above a flat rest, and its log-probability is a tail."""
    if peaked:
        x = normal(40, 3001, seed=seed, scale=1e-2) - 12.0
        x[:, 1700] = 0.0
        return (x * min(scale, 1.0)).to(dtype)
    return normal(40, 3001, seed=seed, scale=scale / 3).clamp(-scale, scale).to(dtype)


def assert_within_units(actual, exact, dtype):
    """4 rounding units of the input dtype, or 1e-6 relative; 1e-12 is what float64 leaves of logits of 1e4."""
    error = (actual.double() - exact).abs()
    bound = exact.abs() * max(4 * rounding(dtype), 1e-6) + 1e-12
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "peaked"), [(1.0, False), (30.0, False), (1e4, False), (1.0, True)])
def test_log_prob(backend, dtype, scale, peaked):
    logits = logits_of(dtype, scale, peaked, seed=1)
    target = torch.cat((integers(0, 3001, 40, 6, seed=2), logits.argmax(1, keepdim=True)), 1)
    exact = torch.log_softmax(allowed(logits), 1).gather(1, target)
    assert_within_units(dam.log_prob(logits, target), exact, dtype)
    drawn = dam.jump(logits, seed=3)
    exact = torch.log_softmax(allowed(logits), 1).gather(1, drawn.target[:, None])[:, 0]
    assert_within_units(drawn.log_prob, exact, dtype)
    assert_within_units(drawn.log_escape, torch.logsumexp(allowed(logits), 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "peaked"), [(1.0, False), (30.0, False), (1e4, False), (1.0, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matching_loss(backend, temperature, dtype, scale, peaked):
    """Weights of one sign: sums that cancel keep the absolute accuracy of their terms only."""
    logits, base = logits_of(dtype, scale, peaked, seed=4), logits_of(dtype, 3.0, False, seed=5)
    target = integers(0, 3001, 40, 3, seed=6)
    weight, base_weight = normal(40, 3, seed=7).abs(), normal(40, seed=8).abs()
    options = {"base_logits": base, "base_weight": base_weight, "temperature": temperature}
    w = torch.zeros(40, 3001, dtype=torch.float64).scatter_add_(1, target, weight.double())
    w += base_weight.double()[:, None] * torch.softmax(allowed(base) / temperature, 1)
    exact = -(w * torch.log_softmax(allowed(logits) / temperature, 1)).sum(1)
    assert_within_units(dam.matching_loss(logits, target, weight, **options), exact.mean(), dtype)
    assert_within_units(dam.matching_loss(logits, target, weight, **options, reduction="none"), exact, dtype)


def assert_at_most_twice(ours, eager, exact):
    """In the root mean square over a gradient, and at its worst element."""
    error, other = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    assert float(error.square().mean()) <= 4 * float(other.square().mean())
    assert float(error.max()) <= 2 * float(other.max())


def gradient(loss, logits, dtype):
    x = logits.detach().to(dtype).requires_grad_()
    loss(x).backward()
    return x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_gradient_of_log_prob(backend, dtype, scale):
    logits, target = logits_of(dtype, scale, False, seed=9), integers(0, 3001, 40, 2, seed=10)
    upstream = normal(40, 2, seed=11)

    def formula(x):
        return (torch.log_softmax(x, 1).gather(1, target) * upstream).sum()

    ours = gradient(lambda x: (dam.log_prob(x, target) * upstream).sum(), logits, dtype)
    assert_at_most_twice(ours, gradient(formula, logits, dtype), gradient(formula, logits, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_matching_loss(backend, temperature, dtype, scale):
    logits, base = logits_of(dtype, scale, False, seed=12), logits_of(dtype, 3.0, False, seed=13)
    target, weight, base_weight = integers(0, 3001, 40, 3, seed=14), normal(40, 3, seed=15), normal(40, seed=16).abs()
    options = {"base_logits": base, "base_weight": base_weight, "temperature": temperature}

    def formula(x):
        w = torch.zeros_like(x).scatter_add_(1, target, weight.to(x.dtype))
        w = w + base_weight[:, None].to(x.dtype) * torch.softmax(base.to(x.dtype) / temperature, 1)
        return -(w * torch.log_softmax(x / temperature, 1)).sum(1).mean()

    ours = gradient(lambda x: dam.matching_loss(x, target, weight, **options), logits, dtype)
    assert_at_most_twice(ours, gradient(formula, logits, dtype), gradient(formula, logits, torch.float64))


# Per family: roundings of float32; of sums of 40 products besides; and float64 rounded once.
TOLERANCE = {
    "rows": {"rtol": 2.0**-20, "atol": 2.0**-18},
    "linear": {"rtol": 2.0**-18, "atol": 2.0**-18},
    "states": {"rtol": 2.0**-23, "atol": 1e-12},
}


@calls.each()
def test_every_op_equals_the_reference(backend, call):
    """On rows whose first, middle and last tiles cannot be reached."""
    if call.family == "rows":
        inputs = call.inputs(4, 19 * 1024, seed=40)
        for row, tiles in enumerate(((0,), (3, 4), (18,), (0, 1, 2, *range(4, 19)))):
            for x, shift in zip(inputs, (0, -1), strict=True):
                x[row].view(19, 1024)[[(tile + shift) % 19 for tile in tiles]] = -INF
    else:
        inputs = call.inputs(4, 5 * 1024, seed=40)
    if call.family == "linear":
        inputs[-1].view(5, 1024)[[0, 2, 4]] = -INF
    ours = call(*inputs, seed=1)
    with dam.backend("torch"):
        expected = call(*inputs, seed=1)
    calls.assert_close(ours, expected, call.terms(*inputs), **TOLERANCE[call.family])
