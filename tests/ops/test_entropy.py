"""entropy: its value and gradient, alone and beside log-probabilities, against the plain formula in float64."""

import math

import pytest
import torch
from helpers import allowed, assert_close, integers, normal, rounding

import dam
from dam.ops import entropy as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def plain(logits, exclude=-1, temperature=1.0):
    """- sum p log p in float64, differentiable."""
    log_p = torch.log_softmax(allowed(logits, exclude) / temperature, dim=1)
    # 0 log 0 is 0, and so is its gradient.
    log_p = torch.where(log_p == -INF, 0.0, log_p)
    p = torch.softmax(allowed(logits, exclude) / temperature, dim=1)
    return -(p * log_p).sum(dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 1024, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 40.0])
def test_it_is_the_plain_formula(backend, dtype, columns, temperature):
    logits = normal(6, columns, seed=1, scale=3.0, dtype=dtype)
    logits[2, columns // 2 :] = -INF
    logits[2, 0] = 0.0
    exclude = integers(-1, columns, 6, seed=2) if columns > 1 else -1
    value = dam.entropy(logits, exclude=exclude, temperature=temperature)
    # Exponentials of float32 differences, each within 2^-21 here, against a sum of terms of one sign.
    assert_close(value, plain(logits, exclude, temperature), rtol=2.0**-19, atol=2.0**-22)
    assert value.dtype == torch.float32 and value.shape == (6,)


def test_known_values(backend):
    """log V where all are alike, 0 where one is certain, log 2 of a coin; tiles that cannot be reached count 0."""
    logits = torch.zeros(3, 3000)
    logits[1, :] = -INF
    logits[1, 2999] = 5.0
    logits[2, :] = -INF
    logits[2, [3, 2500]] = 1e4
    expected = torch.tensor([math.log(3000), 0.0, math.log(2)], dtype=torch.float64)
    assert_close(dam.entropy(logits), expected, rtol=2.0**-20)


@pytest.mark.parametrize("nats", [5.0, 12.0, 18.0, 25.0])
def test_a_row_that_is_nearly_certain_keeps_its_digits(backend, nats):
    """Two terms of one sign, log of the sum and the mean difference: nothing cancels."""
    logits = torch.full((1, 4000), -nats)
    logits[0, 77] = 0.0
    tail = 3999 * math.exp(-nats)
    exact = math.log1p(tail) + tail * nats / (1 + tail)
    # An exponential of so many nats is off by as many times 2^-24; the result is rounded once.
    assert_close(dam.entropy(logits), torch.tensor([exact]), rtol=2.0**-21 + nats * 2.0**-22)


def test_rows_without_a_distribution_are_nan(backend):
    logits = torch.zeros(4, 1500)
    logits[0], logits[1, 1200], logits[2, 3] = -INF, math.nan, INF
    assert torch.isnan(dam.entropy(logits)).tolist() == [True, True, True, False]
    value, entropy = dam.log_prob(logits, torch.zeros(4, dtype=torch.int64), entropy=True)
    assert torch.isnan(entropy).tolist() == [True, True, True, False]
    expected = dam.log_prob(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.isnan(value).tolist() == torch.isnan(expected).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_beside_log_probabilities(backend, dtype, temperature):
    """Those of log_prob, missing, excluded and repeated targets among them, and the same entropy, by one read."""
    logits = normal(5, 2500, seed=3, scale=2.0, dtype=dtype)
    logits[:, 11] = -INF
    target, exclude = integers(-1, 2500, 5, 6, seed=4), integers(-1, 2500, 5, seed=5)
    target[:, 0], target[:, 1], target[0, 2], target[:, 3] = -1, target[:, 4], exclude[0].clamp(min=0), 11
    options = {"exclude": exclude, "temperature": temperature}
    out = dam.log_prob(logits, target, entropy=True, **options)
    assert isinstance(out, dam.LogProb)
    # Both round a float64 difference of about 10 once.
    assert_close(out.log_prob, dam.log_prob(logits, target, **options), rtol=2.0**-22, atol=2.0**-22)
    assert torch.equal(out.entropy, dam.entropy(logits, **options))
    single = dam.log_prob(logits, target[:, 5], entropy=True, **options)
    assert torch.equal(single.log_prob, out.log_prob[:, 5]) and single.entropy.shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_targets", "with_entropy"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient(backend, dtype, with_targets, with_entropy, temperature):
    """Of both outputs at once, of either, with targets that repeat, are missing, excluded, likely or at column 0."""
    columns = 3000
    logits = normal(6, columns, seed=6, scale=2.0, dtype=dtype)
    logits[1, 5], logits[4, 100:900] = 12.0, -INF
    target, exclude = integers(0, columns, 6, 5, seed=7), integers(-1, columns, 6, seed=8)
    target[:, 0], target[:, 1], target[1, 2], target[2, 3], target[3, 4] = (
        -1,
        target[:, 2],
        5,
        0,
        exclude[3].clamp(min=0),
    )
    target[4, :] = 7
    upstream, slope = normal(6, 5, seed=9), normal(6, seed=10)
    slope = slope if with_entropy else torch.zeros(6)
    upstream = upstream if with_targets else torch.zeros(6, 5)
    leaf = logits.clone().requires_grad_()
    value, entropy = dam.log_prob(leaf, target, exclude=exclude, temperature=temperature, entropy=True)
    loss = torch.where(torch.isfinite(value), value, 0.0).mul(upstream).sum() + (entropy * slope).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(allowed(exact, exclude) / temperature, dim=1).gather(1, target.clamp(min=0))
    log_p = torch.where((target >= 0) & torch.isfinite(log_p), log_p, 0.0)
    plain_loss = (log_p * upstream.double()).sum() + (plain(exact, exclude, temperature) * slope.double()).sum()
    (expected,) = torch.autograd.grad(plain_loss, exact)
    assert gradient.dtype == dtype
    # Rounded once to the dtype; before, float32 rounding of probabilities times numbers of order 20.
    assert_close(gradient, expected, rtol=2 * rounding(dtype) + 2.0**-19, atol=2.0**-21 + rounding(dtype) * 2.0**-12)


def test_gradients_of_the_reference_are_exact():
    logits, target = normal(3, 9, seed=11, dtype=torch.float64).requires_grad_(), integers(-1, 9, 3, 2, seed=12)
    assert torch.autograd.gradcheck(lambda x: dam.entropy(x, exclude=2, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: tuple(dam.log_prob(x, target, entropy=True)), logits)


def test_a_frozen_row_has_no_gradient():
    assert not dam.entropy(normal(2, 5)).requires_grad
    with pytest.raises(RuntimeError, match="has no gradient"):
        x = normal(2, 5).requires_grad_()
        (gradient,) = torch.autograd.grad(dam.entropy(x).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.of_the_op
def test_compiled(backend):
    logits, target = normal(4, 1500, seed=13), integers(0, 1500, 4, 2, seed=14)

    def function(x):
        value, entropy = dam.log_prob(x, target, exclude=3, entropy=True)
        return value.sum() + (entropy * entropy).sum()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = f(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.of_the_op
def test_opcheck(backend):
    logits = normal(3, 40, seed=15).requires_grad_()
    excluding = (integers(-1, 40, 3, seed=17), torch.arange(40) % 5 == 2)
    arguments = (logits, integers(-1, 40, 3, 2, seed=16), *excluding, 0.9, backend)
    torch.library.opcheck(torch.ops.dam.entropy.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(())}, ValueError, r"entropy: logits must have shape \[..., V\]; got \[\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"exclude": 5}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"exclude": torch.tensor([0, 9, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 9"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dam.entropy(**{"logits": torch.zeros(3, 5), **arguments})


def test_wrong_arguments_of_log_prob():
    with pytest.raises(TypeError, match="log_prob: entropy must be True or False; got int"):
        dam.log_prob(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), entropy=1)
    with pytest.raises(ValueError, match=r"log_prob: target must be -1 or in \[0, 5\); got 5"):
        dam.log_prob(torch.zeros(3, 5), torch.full((3,), 5), entropy=True)


def test_ties_at_a_tiny_temperature_have_the_entropy_of_a_coin(backend):
    found = dam.entropy(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), temperature=1e-30)
    torch.testing.assert_close(found, torch.tensor([math.log(2)]), rtol=2.0**-22, atol=0.0)
