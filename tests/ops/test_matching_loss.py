"""matching_loss: the written formula and its gradient, formed once in the forward pass."""

import itertools
import math

import pytest
import torch
from helpers import allowed, assert_close, assert_near, integers, normal, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.ops import matching_loss as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(
    logits,
    target,
    weight,
    *,
    base_logits=None,
    base_weight=None,
    row_scale=None,
    exclude=-1,
    normalized=True,
    temperature=1.0,
):
    """The docstring's formula in float64, a term per row, differentiable; where w is 0, w log u is dropped."""
    x = allowed(logits, exclude) / temperature
    out = torch.as_tensor(exclude).expand(len(x))[:, None]
    kept = (target >= 0) & (target != out)
    w = torch.zeros_like(x).scatter_add(1, target.clamp(min=0), torch.where(kept, weight.double(), 0.0))
    if base_logits is not None:
        base = allowed(base_logits, exclude) / temperature
        w = w + base_weight.double()[:, None] * (torch.softmax(base, 1) if normalized else base.exp())
    w = w.detach()
    log_rate = torch.log_softmax(x, 1) if normalized else x
    loss = -(torch.where(w == 0, 0.0, w) * log_rate.masked_fill(w == 0, 0.0)).sum(1)
    if not normalized:
        loss = loss + x.exp().sum(1)
    scale = torch.full((len(x),), 1 / max(len(x), 1)) if row_scale is None else row_scale
    return loss * scale.double()


def case(rows=24, columns=1400, targets=3, *, seed=0, dtype=torch.float32, base=False, scale=False, exclude=False):
    """Duplicate, missing and excluded targets; weights negative, zero and large."""
    logits = normal(rows, columns, seed=seed, scale=2.0, dtype=dtype)
    target = integers(-1, columns, rows, targets, seed=seed + 1)
    weight = normal(rows, targets, seed=seed + 2, scale=3.0)
    if targets > 1:
        target[:, 1] = target[:, 0]
        weight[::3, 1] = 0.0
        weight[1::3, 0] *= 100
    options = {}
    if base:
        options["base_logits"] = normal(rows, columns, seed=seed + 3, scale=2.0, dtype=dtype)
        options["base_weight"] = normal(rows, seed=seed + 4)
    if scale:
        options["row_scale"] = normal(rows, seed=seed + 5)
    if exclude:
        options["exclude"] = integers(-1, columns, rows, seed=seed + 6)
        if targets:
            options["exclude"][:4] = target[:4, 0]
    return logits, target, weight, options


def compare(logits, target, weight, options, upstream=1.0):
    x, y = logits.detach().clone().requires_grad_(), logits.detach().double().requires_grad_()
    loss, rows = dam.matching_loss(x, target, weight, **options), reference(y, target, weight, **options)
    (loss * upstream).backward()
    (rows.sum() * upstream).backward()
    dtype = x.dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and x.grad.dtype == dtype
    # Sums of float32 products, good to 2^-19, over rows of either sign.
    assert_close(loss, rows.sum(), rtol=2.0**-22, atol=2.0**-19 * float(rows.detach().abs().sum()))
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # float32 inside: entries where softmax and targets cancel keep 8 roundings of the row's terms.
    scale = options.get("row_scale", torch.full((len(x),), 1 / max(len(x), 1))).double().abs()
    terms = weight.double().abs().sum(1) + options.get("base_weight", torch.zeros(len(x))).double().abs()
    slope = abs(upstream) / options.get("temperature", 1.0)
    terms = slope * (scale * terms)[:, None] + y.grad.abs().amax(1, keepdim=True)
    excess = (x.grad - y.grad).abs() - (rounding(dtype) + 2.0**-20) * y.grad.abs() - 2.0**-21 * terms - tiny
    assert bool((excess <= 0).all())


# ---- the formula


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_matches_float64_autograd(backend, normalized):
    for base, scale, exclude in itertools.product([False, True], repeat=3):
        logits, target, weight, options = case(base=base, scale=scale, exclude=exclude)
        compare(logits, target, weight, {**options, "normalized": normalized})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_dtypes(backend, dtype, normalized):
    logits, target, weight, options = case(seed=10, dtype=dtype, base=True, scale=True, exclude=True)
    compare(logits, target, weight, {**options, "normalized": normalized})


def test_weights_of_any_float_dtype_and_stride(backend):
    logits, target, weight, options = case(rows=8, columns=50, targets=6, seed=20, base=True, scale=True)
    for dtype in (torch.float64, torch.bfloat16):
        options = {k: v.to(dtype) if k in ("base_weight", "row_scale") else v for k, v in options.items()}
        compare(logits, target, weight.to(dtype), options)
    compare(logits, target[:, ::2], weight[:, ::2], options)
    compare(logits, target, weight[:, :1].expand(-1, 6), {"row_scale": torch.tensor(0.5).expand(8)})


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 4),
    columns=st.sampled_from([1, 2, 31, 1023, 1024, 1025, 2500]),
    targets=st.integers(0, 3),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    normalized=st.booleans(),
    base=st.booleans(),
)
def test_shapes_and_strides(rows, columns, targets, padding, dtype, normalized, base):
    wide, target, weight, options = case(rows, columns + padding, targets, seed=30, dtype=dtype, base=base)
    options = {k: v[:, :columns] if k == "base_logits" else v for k, v in options.items()}
    compare(wide[:, :columns], target.clamp(max=columns - 1), weight, {**options, "normalized": normalized})


def test_no_targets_and_no_rows(backend):
    for normalized in (True, False):
        logits, target, weight, options = case(targets=0, seed=40, base=True)
        compare(logits, target, weight, {**options, "normalized": normalized})
        compare(logits, target, weight, {"normalized": normalized})
        compare(logits[:0], target[:0], weight[:0], {"normalized": normalized})


def test_logits_expanded_over_rows(backend):
    row = normal(1, 60, seed=41).requires_grad_()
    _, target, weight, _ = case(rows=5, columns=60, seed=42)
    dam.matching_loss(row.expand(5, -1), target, weight).backward()
    y = row.detach().double().requires_grad_()
    reference(y.expand(5, -1), target, weight).sum().backward()
    assert_close(row.grad, y.grad, rtol=2.0**-19, atol=2.0**-20 * float(y.grad.abs().max()))


def test_the_minimiser_is_the_target_distribution(backend):
    """At p = w (normalised) or rates = w the gradient vanishes."""
    w = torch.softmax(normal(6, 20, seed=43), 1)
    target = torch.arange(20).expand(6, 20)
    for scale, normalized in ((1.0, True), (3.0, False)):
        logits = (scale * w).log().requires_grad_()
        dam.matching_loss(logits, target, scale * w, normalized=normalized, row_scale=torch.ones(6)).backward()
        # Roundings of numbers below 3.
        assert_close(logits.grad, torch.zeros(6, 20), rtol=0, atol=8 * rounding(torch.float32))


# ---- temperature


def partly_unreachable(seed, **kinds):
    """A case in which neither the model nor the base reaches every seventh destination, and no target is one."""
    logits, target, weight, options = case(seed=seed, **kinds)
    dead = torch.arange(0, logits.shape[1], 7)
    for x in (logits, options.get("base_logits", logits)):
        x[:, dead] = -INF
    return logits, torch.where(target % 7 == 0, target + 1, target), weight, options


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_a_temperature_divides_the_logits(backend, normalized, temperature):
    """The base's too. 1400 columns are a whole tile and a part of one."""
    for base, scale, exclude in itertools.product([False, True], repeat=3):
        logits, target, weight, options = partly_unreachable(200, base=base, scale=scale, exclude=exclude)
        options |= {"normalized": normalized, "temperature": temperature}
        compare(logits, target, weight, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_a_temperature_in_every_dtype(backend, dtype, normalized):
    logits, target, weight, options = partly_unreachable(210, dtype=dtype, base=True, scale=True, exclude=True)
    compare(logits, target, weight, {**options, "normalized": normalized, "temperature": 1.6})


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_temperatures_far_from_one(backend, temperature):
    """Nearly all of the probability on the largest logit, or nearly the same on each."""
    logits, target, weight, options = case(rows=6, seed=220, base=True)
    compare(logits, target, weight, {**options, "temperature": temperature})


def test_the_minimiser_at_a_temperature(backend):
    """What a rollout at that temperature draws, exp(logits / temperature), is w where the gradient vanishes."""
    w = torch.softmax(normal(6, 20, seed=221), 1)
    target = torch.arange(20).expand(6, 20)
    for scale, normalized in ((1.0, True), (3.0, False)):
        logits = (2.0 * (scale * w).log()).requires_grad_()
        options = {"normalized": normalized, "temperature": 2.0, "row_scale": torch.ones(6)}
        dam.matching_loss(logits, target, scale * w, **options).backward()
        # Roundings of numbers below 3, as at temperature 1.
        assert_close(logits.grad, torch.zeros(6, 20), rtol=0, atol=8 * rounding(torch.float32))


# ---- reduction


def rows_and_gradient(function, logits, upstream):
    x = logits.detach().clone().requires_grad_()
    rows = function(x)
    (gradient,) = torch.autograd.grad(rows, x, upstream)
    return rows.detach(), gradient


def compare_rows(logits, target, weight, options, upstream):
    """The loss of each row, and its gradient by an upstream gradient per row, against autograd of the formula."""
    plain = {**options, "row_scale": options.get("row_scale", torch.ones(len(logits)))}
    rows, gradient = rows_and_gradient(
        lambda x: dam.matching_loss(x, target, weight, **options, reduction="none"), logits, upstream
    )
    expected, slope = rows_and_gradient(
        lambda x: reference(x, target, weight, **plain), logits.double(), upstream.double()
    )
    assert rows.shape == logits.shape[:1] and gradient.dtype == logits.dtype
    assert rows.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # Tolerances of `compare`, row by row: of what would be the sum of the terms of w if none cancelled.
    terms = weight.double().abs().sum(1)
    if "base_weight" in options:
        base = allowed(options["base_logits"], options["exclude"]) / options.get("temperature", 1.0)
        rates = 1.0 if options["normalized"] else base.exp().sum(1)
        terms = terms + options["base_weight"].double().abs() * rates
    largest = torch.where(torch.isinf(logits), 0.0, logits.double() / options.get("temperature", 1.0)).abs().amax(1)
    terms = plain["row_scale"].double().abs() * terms * (largest + math.log(logits.shape[1]))
    assert_near(rows, expected, rtol=2.0**-19, atol=2.0**-19 * terms)
    terms = weight.double().abs().sum(1) + options.get("base_weight", torch.zeros(len(logits))).double().abs()
    terms = (upstream.double() * plain["row_scale"].double()).abs() / options.get("temperature", 1.0) * terms
    tiny = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    atol = 2.0**-21 * (terms[:, None] + slope.abs().amax(1, keepdim=True)) + tiny
    assert_near(gradient, slope, rtol=rounding(logits.dtype) + 2.0**-20, atol=atol)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_the_loss_of_each_row_and_its_gradient(backend, normalized):
    """By another upstream gradient in each row, which may be strided or expanded."""
    upstreams = (normal(24, seed=231), normal(48, seed=232)[::2], torch.tensor(1.7).expand(24))
    for base, scale, upstream in itertools.product([False, True], [False, True], upstreams):
        logits, target, weight, options = partly_unreachable(230, base=base, scale=scale, exclude=True)
        compare_rows(logits, target, weight, {**options, "normalized": normalized}, upstream)
        compare_rows(logits, target, weight, {**options, "normalized": normalized, "temperature": 0.7}, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_each_row_in_every_dtype(backend, dtype):
    logits, target, weight, options = case(seed=240, dtype=dtype, base=True, scale=True, exclude=True)
    compare_rows(logits, target, weight, {**options, "normalized": True}, normal(24, seed=247))


@pytest.mark.parametrize("scale", [False, True], ids=["", "row_scale"])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_reductions_of_the_same_rows(backend, scale, normalized):
    logits, target, weight, options = case(rows=9, seed=250, base=True, scale=scale)
    options |= {"normalized": normalized, "temperature": 1.4}

    def by(reduction):
        x = logits.clone().requires_grad_()
        loss = dam.matching_loss(x, target, weight, **options, reduction=reduction)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    rows, total, mean, unset = (by(reduction) for reduction in ("none", "sum", "mean", None))
    assert rows[0].shape == (9,)
    # Each row's loss is rounded once more, and a sum once.
    slack = 2 * rounding(torch.float32) * float(rows[0].double().abs().sum())
    assert_close(rows[0].double().sum(), total[0], rtol=0, atol=slack)
    assert_close(mean[0] * 9, total[0], rtol=4 * rounding(torch.float32))
    assert torch.equal(rows[1], total[1])  # the upstream gradient is 1
    # Products of float32 exponentials with another scale, and where they cancel the accuracy of the terms.
    atol = 2.0**-22 * total[1].abs().amax(1, keepdim=True).double()
    assert_near(9 * mean[1].double(), total[1], rtol=2.0**-21, atol=atol)
    today = total if scale else mean
    assert torch.equal(unset[0], today[0]) and torch.equal(unset[1], today[1])


def test_reductions_of_no_rows(backend):
    """A mean of nothing is 0, as it was; what each row has is nothing."""
    empty = (torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2))
    for options in ({}, {"row_scale": torch.ones(0)}):
        for reduction in (None, "sum", "mean"):
            assert dam.matching_loss(*empty, **options, reduction=reduction) == 0
        x = empty[0].clone().requires_grad_()
        rows = dam.matching_loss(x, *empty[1:], **options, reduction="none")
        rows.backward(torch.ones(0))
        assert rows.shape == (0,) and x.grad.shape == (0, 5)


def test_a_row_whose_loss_is_not_used_has_no_gradient(backend):
    """Nor if it is infinite."""
    logits = normal(2, 1500, seed=260)
    logits[0, 2] = -INF
    x, target = logits.requires_grad_(), torch.tensor([[2], [3]])
    rows = dam.matching_loss(x, target, torch.ones(2, 1), reduction="none")
    assert rows[0].item() == INF
    rows.backward(torch.tensor([0.0, 1.0]))
    assert bool((x.grad[0] == 0).all()) and bool((x.grad[1] != 0).any())


def test_backward_passes_of_the_loss_of_each_row(backend):
    """As many as are asked for, as each forms the gradient; none through another."""
    logits, target, weight, _ = case(rows=5, columns=40, seed=261)
    x = logits.requires_grad_()
    rows = dam.matching_loss(x, target, weight, reduction="none")
    with pytest.raises(RuntimeError, match="matching_loss has no double backward"):
        torch.autograd.grad(rows.sum(), x, create_graph=True)
    once, twice = (torch.autograd.grad(rows.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    with torch.no_grad():
        x += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


def test_of_each_row_too_only_logits_are_differentiated(backend):
    logits, target, weight, options = case(rows=5, columns=40, seed=262, base=True, scale=True)
    inputs = [weight, *options.values()]
    for x in inputs:
        x.requires_grad_()
    assert not dam.matching_loss(logits, target, weight, **options, reduction="none").requires_grad
    dam.matching_loss(logits.requires_grad_(), target, weight, **options, reduction="none").sum().backward()
    assert logits.grad is not None and all(x.grad is None for x in inputs)


# ---- zeros and infinities


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_what_weighs_nothing_counts_nothing(backend, normalized):
    """Zero weight at a destination that cannot be reached is 0, not 0 * inf."""
    logits = torch.tensor([[-INF, 0.5, 0.0], [0.0, 1.0, 2.0]])
    target, weight = torch.tensor([[0, 1], [-1, 2]]), torch.tensor([[0.0, 2.0], [5.0, 1.0]])
    compare(logits, target, weight, {"normalized": normalized})
    base = torch.tensor([[-INF, 1.0, 2.0], [0.0, 0.0, 0.0]])  # nor does the base reach it
    compare(logits, target, weight, {"normalized": normalized, "base_logits": base, "base_weight": torch.ones(2)})


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_a_base_of_no_measurable_mass_counts_nothing(backend, normalized):
    """A tile of the base 800 nats below the rest, where the model reaches nothing: 0, not 0 * inf."""
    logits, base = normal(2, 3000, seed=55), normal(2, 3000, seed=56)
    logits[:, 1024:2048] = -INF
    base[:, 1024:2048] -= 800.0
    target, weight = integers(0, 1024, 2, 1, seed=57), torch.ones(2, 1)
    options = {"base_logits": base, "base_weight": torch.ones(2), "normalized": normalized}
    loss = dam.matching_loss(logits, target, weight, **options)
    with dam.backend("torch"):
        expected = dam.matching_loss(logits, target, weight, **options)
    # float32 sums of 3000 terms.
    assert math.isfinite(loss) and math.isclose(loss, expected, rel_tol=2.0**-18)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_weights_that_cancel_count_nothing(backend, normalized):
    """w is the sum over slots: +1 and -1 on an unreachable destination are 0."""
    logits = torch.tensor([[-INF, 0.5, 0.0]])
    compare(logits, torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, -1.0, 2.0]]), {"normalized": normalized})


def test_weight_on_the_unreachable_is_infinite(backend):
    logits = torch.tensor([[-INF, 0.5, 0.0]])
    for sign in (1.0, -1.0):
        assert dam.matching_loss(logits, torch.tensor([[0]]), torch.tensor([[sign]])) == sign * INF
        # What repeats adds up first: not inf - inf.
        assert (
            dam.matching_loss(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[sign, 1.0, -sign / 2]])) == sign * INF
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [True, False])
def test_unreachable_destinations_have_gradient_zero(backend, dtype, normalized):
    """Exactly 0, not something tiny, in whole tiles and in a part of one."""
    logits = normal(5, 2600, seed=30, dtype=dtype)
    dead = torch.tensor([3, 700, 1024, 1999, 2599])
    logits[:, dead] = -INF
    leaf = logits.clone().requires_grad_()
    target, weight = integers(0, 3, 5, 2, seed=31), normal(5, 2, seed=32)
    dam.matching_loss(leaf, target, weight, exclude=40, normalized=normalized).backward()
    assert bool((leaf.grad[:, dead] == 0).all()) and bool((leaf.grad[:, 40] == 0).all())
    assert bool((leaf.grad != 0).sum() > 5 * 2000)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_a_base_of_weight_zero_is_not_looked_at(backend, normalized):
    """Its row may be anything, as padding is."""
    logits, target, weight, _ = case(rows=3, columns=8, seed=44)
    expected = dam.matching_loss(logits, target, weight, normalized=normalized)
    for filler in (-INF, math.nan):
        base = torch.full((3, 8), filler)
        loss = dam.matching_loss(
            logits, target, weight, base_logits=base, base_weight=torch.zeros(3), normalized=normalized
        )
        assert_close(loss, expected, rtol=2.0**-22)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
def test_a_row_without_weight_has_no_gradient(backend, normalized):
    """Nor a NaN where nothing of it can be reached."""
    logits = torch.tensor([[-INF, -INF], [1.0, 2.0]], requires_grad=True)
    loss = dam.matching_loss(logits, torch.tensor([[-1], [0]]), torch.ones(2, 1), normalized=normalized)
    loss.backward()
    assert bool(torch.isfinite(loss)) and logits.grad[0].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(logits.grad).all())


def test_a_row_that_reaches_nothing_is_pulled_by_its_targets_alone(backend):
    """It has no distribution to be pushed down: its gradient is minus the weights, and not NaN."""
    logits = torch.tensor([[-INF, -INF, -INF], [1.0, 2.0, 3.0]], requires_grad=True)
    loss = dam.matching_loss(logits, torch.tensor([[1], [0]]), torch.ones(2, 1))
    assert loss == INF
    loss.backward()
    assert logits.grad[0].tolist() == [0.0, -0.5, 0.0] and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("size", [100.0, 800.0])
def test_rates_overflow_to_infinity(backend, size):
    """exp(100) is no float32, exp(800) no float64 either: inf, not an error; a gradient may stop at the largest."""
    logits = torch.tensor([[size, 0.0], [1.0, 2.0]], requires_grad=True)
    loss = dam.matching_loss(logits, torch.tensor([[-1], [0]]), torch.ones(2, 1), normalized=False)
    assert loss == INF
    loss.backward()
    assert logits.grad[0, 0] >= torch.finfo(torch.float32).max and bool(torch.isfinite(logits.grad[1]).all())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_rate_beyond_float32_leaves_the_other_gradients(backend, temperature):
    """exp(100) is infinite in float32; the row's other entries are what they are. The base's rates likewise."""
    if backend == "cpu":
        pytest.skip("C++ multiplies a whole row by its largest rate, or by the largest float if that is less")
    x = torch.tensor([[100.0, 2.0, 40.0, -1.0]])  # logits / temperature
    base = torch.tensor([[1.0, 3.0, 120.0, 0.0]])
    for base_weight in (0.0, 1.0):
        logits = (x * temperature).requires_grad_()
        options = {"base_logits": base * temperature, "base_weight": torch.full((1,), base_weight)}
        options = {**(options if base_weight else {}), "normalized": False, "temperature": temperature}
        dam.matching_loss(logits, torch.tensor([[1]]), torch.ones(1, 1), **options).backward()
        exact = x.double().exp() - torch.tensor([[0.0, 1.0, 0.0, 0.0]]) - base_weight * base.double().exp()
        gradient = logits.grad[0] * temperature
        # float32 exponentials; entries that cancel keep the accuracy of their terms.
        assert_close(gradient[[1, 3]], exact[0, [1, 3]], rtol=2.0**-18)
        assert gradient[0] == INF and (gradient[2] == -INF if base_weight else gradient[2] > 2e17)


def test_huge_weights_overflow_to_infinity(backend):
    weight = torch.full((1, 1), 1e300, dtype=torch.float64)
    assert dam.matching_loss(torch.zeros(1, 2), torch.tensor([[0]]), weight) == INF


def test_nan_in_nan_out(backend):
    logits = normal(2, 1500, seed=45)
    logits[1, 1300] = math.nan
    assert math.isnan(dam.matching_loss(logits, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)))


# ---- autograd


@pytest.mark.parametrize("upstream", [0.0, -2.5, 1e3])
def test_upstream_gradient(backend, upstream):
    compare(*case(rows=5, columns=40, seed=50, base=True), upstream=upstream)


def test_two_losses_in_one_backward(backend):
    logits, target, weight, _ = case(rows=5, columns=40, seed=51)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (dam.matching_loss(x, target, weight) + 2 * dam.matching_loss(x, target, weight)).backward()
    (3 * dam.matching_loss(y, target, weight)).backward()
    assert_close(x.grad, y.grad, rtol=4 * rounding(torch.float32))


def test_everything_but_logits_is_detached(backend):
    logits, target, weight, options = case(rows=5, columns=40, seed=52, base=True, scale=True)
    inputs = [weight, *options.values()]
    for x in inputs:
        x.requires_grad_()
    assert not dam.matching_loss(logits, target, weight, **options).requires_grad
    dam.matching_loss(logits.requires_grad_(), target, weight, **options).backward()
    assert logits.grad is not None and all(x.grad is None for x in inputs)


def test_no_gradient_is_formed_without_need(backend):
    logits, target, weight, _ = case(rows=5, columns=40, seed=53)
    plain = dam.matching_loss(logits, target, weight)
    with torch.no_grad():
        loss = dam.matching_loss(logits.clone().requires_grad_(), target, weight)
    assert not loss.requires_grad and torch.equal(loss, plain)
    args = (logits, target, weight, *[None] * 5, True, 1.0, False, backend, True)
    assert module._matching_loss(*args)[1].numel() == 0


def test_second_backward_and_double_backward_raise(backend):
    logits, target, weight, _ = case(rows=5, columns=40, seed=54)
    logits.requires_grad_()
    loss = dam.matching_loss(logits, target, weight)
    with pytest.raises(RuntimeError, match="matching_loss has no double backward"):
        torch.autograd.grad(loss, logits, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="matching_loss was differentiated twice"):
        loss.backward()


def test_gradcheck():
    _, target, weight, options = case(rows=4, columns=6, seed=55, dtype=torch.float64, base=True, exclude=True)
    logits = normal(4, 6, seed=56, dtype=torch.float64).requires_grad_()
    for normalized in (True, False):
        loss = dam.matching_loss(logits, target, weight, **options, normalized=normalized)
        (gradient,) = torch.autograd.grad(loss, logits)
        step = 1e-5
        for t, v in ((0, 0), (1, 5), (3, 2)):
            up, down = logits.detach().clone(), logits.detach().clone()
            up[t, v] += step
            down[t, v] -= step
            difference = dam.matching_loss(up, target, weight, **options, normalized=normalized)
            difference -= dam.matching_loss(down, target, weight, **options, normalized=normalized)
            # step^2 times third derivatives, which the weights of some 100 scale, and rounding / step.
            assert abs(difference / (2 * step) - gradient[t, v]) < 1e-6


# ---- torch's own machinery


@pytest.mark.of_the_op
def test_opcheck(backend):
    logits, target, weight, options = case(rows=4, columns=30, seed=57, base=True, scale=True, exclude=True)
    logits.requires_grad_()
    base_logits, base_weight, row_scale, exclude = options.values()
    # overwrite=False: opcheck calls backward more than once.
    tail = (True, backend, False)
    torch.library.opcheck(module._matching_loss.overload, (logits, target, weight, *[None] * 5, True, 1.0, *tail))
    excluding = (exclude, torch.arange(30) % 5 == 2)
    args = (logits, target, weight, base_logits, base_weight, row_scale, *excluding, False, 0.7, *tail)
    torch.library.opcheck(module._matching_loss.overload, args)


@pytest.mark.of_the_op
def test_opcheck_of_each_row(backend):
    logits, target, weight, options = case(rows=4, columns=30, seed=57, base=True, scale=True, exclude=True)
    logits.requires_grad_()
    base_logits, base_weight, row_scale, exclude = options.values()
    for base, normalized in (((base_logits, base_weight), False), ((None, None), True)):
        excluding = (exclude, torch.arange(30) % 5 == 2)
        args = (logits, target, weight, *base, row_scale, *excluding, normalized, 0.7, backend)
        torch.library.opcheck(module._matching_loss_rows.overload, args)


@pytest.mark.parametrize("reduction", [None, "none", "mean"])
@pytest.mark.of_the_op
def test_compiled_equals_eager(backend, reduction):
    logits, target, weight, options = case(rows=6, columns=40, seed=58, base=True, scale=True, exclude=True)
    options |= {"reduction": reduction, "temperature": 0.8 if reduction else 1.0}
    upstream = normal(6, seed=59) if reduction == "none" else torch.tensor(3.0)

    def step(x):
        return dam.matching_loss(x * 1.5, target, weight, **options)

    torch.compiler.reset()  # it compiles a function for so many cases only
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        loss = function(x)
        loss.backward(upstream)
        results.append((loss.detach(), x.grad))
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=2 * rounding(torch.float32))


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \[..., V\]; got \[\]"),
        ({"target": torch.arange(3)}, ValueError, r"target must have shape \[3, J\]; got \[3\]"),
        ({"target": torch.zeros(3, 2)}, TypeError, "target must be int64; got torch.float32"),
        ({"target": torch.full((3, 2), 5)}, ValueError, r"target must be -1 or in \[0, 5\); got 5"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"weight must have the shape of target, \[3, 2\]; got \[3, 1\]"),
        ({"weight": torch.zeros(3, 2).long()}, TypeError, "weight must be .*float.*; got torch.int64"),
        ({"weight": [1.0]}, TypeError, "weight must be .*tensor; got list"),
        ({"row_scale": torch.ones(2)}, ValueError, r"row_scale must have shape \[3\]; got \[2\]"),
        ({"row_scale": 1.0}, TypeError, "row_scale must be a tensor; got float"),
        ({"base_weight": torch.ones(3)}, ValueError, "base_logits and base_weight must be given together"),
        ({"base_logits": torch.ones(3, 5)}, ValueError, "base_logits and base_weight must be given together"),
        (
            {"base_logits": torch.ones(3, 4), "base_weight": torch.ones(3)},
            ValueError,
            r"base_logits must have the shape of logits, \[3, 5\]; got \[3, 4\]",
        ),
        (
            {"base_logits": torch.ones(3, 5).half(), "base_weight": torch.ones(3)},
            TypeError,
            "base_logits must have the dtype of logits, torch.float32; got torch.float16",
        ),
        (
            {"base_logits": torch.ones(3, 5), "base_weight": torch.ones(3, 1)},
            ValueError,
            r"base_weight must have shape \[3\]; got \[3, 1\]",
        ),
        ({"exclude": 7}, ValueError, r"exclude must be -1 or in \[0, 5\); got 7"),
        ({"normalized": "rates"}, TypeError, "normalized must be .*; got str"),
        ({"normalized": None}, TypeError, "normalized must be .*; got NoneType"),
        ({"temperature": 0.0}, ValueError, r"temperature must be in \[1e-30, 1e\+30\]; got 0.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
        ({"reduction": "average"}, ValueError, """reduction must be None, "none", "sum" or "mean"; got 'average'"""),
        ({"reduction": 1}, ValueError, """reduction must be None, "none", "sum" or "mean"; got 1"""),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, 2, dtype=torch.int64), "weight": torch.ones(3, 2)}
    with pytest.raises(error, match=f"^matching_loss: .*{message}"):
        dam.matching_loss(**{**good, **arguments})
