"""log_prob: values, gradients, and what autograd and torch.compile make of them."""

import math

import pytest
import torch
from helpers import assert_close, integers, log_softmax, normal, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.ops import log_prob as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(logits, target, exclude=-1, temperature=1.0):
    """float64 log-probabilities [T, J], 0 where target is -1; differentiable."""
    value = log_softmax(logits, exclude, temperature).gather(1, target.clamp(min=0))
    return torch.where(target < 0, 0.0, value)


def gradients(logits, target, upstream, **options):
    """Gradient of log_prob in logits, and the one of the float64 formula."""
    x, y = logits.detach().clone().requires_grad_(), logits.detach().double().requires_grad_()
    dam.log_prob(x, target, **options).backward(upstream)
    reference(y, target, **options).backward(upstream.double())
    return x.grad, y.grad


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, -300.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_matches_float64(backend, dtype, offset, temperature):
    """A large common offset leaves the digits of the result; 1e-6 is 8 roundings of a float32 sum of exponentials."""
    logits = (normal(40, 1500, seed=1, scale=3.0) + offset).to(dtype)
    target, exclude = integers(-1, 1500, 40, 3, seed=2), integers(-1, 1500, 40, seed=3)
    exclude = torch.where((exclude[:, None] == target).any(1), -1, exclude)
    value = dam.log_prob(logits, target, exclude=exclude, temperature=temperature)
    assert value.dtype == torch.float32
    expected = reference(logits, target, exclude, temperature)
    assert_close(value, expected, rtol=1e-6, atol=4 * rounding(torch.float32))


def test_wide_range_of_magnitudes(backend):
    """Logits up to 1e4 of either sign: results up to -2e4, and small ones beside them."""
    logits = normal(60, 300, seed=4, scale=3000.0).clamp(-1e4, 1e4)
    logits[:, 7] = 1e4
    logits[:, 8] = 1e4 - 3
    target = torch.cat((integers(0, 300, 60, 2, seed=5), torch.tensor([[7, 8]]).expand(60, -1)), 1)
    assert_close(dam.log_prob(logits, target), reference(logits, target), rtol=1e-6, atol=4 * rounding(torch.float32))


def test_a_certain_destination_keeps_the_digits_of_the_rest(backend):
    """log_prob of the top token is minus the mass of the others, 1e-13 here: far below one float32 rounding of 1."""
    logits = torch.full((1, 1000), -37.0)
    logits[0, 500] = 0.0
    expected = -math.log1p(999 * math.exp(-37.0))
    # The reference subtracts in float64, which keeps 3 of these digits.
    assert_close(dam.log_prob(logits, torch.tensor([500])), torch.tensor([expected]), rtol=2e-3)


def test_vector_and_matrix_targets_agree(backend):
    logits, target = normal(20, 50, seed=6), integers(0, 50, 20, 4, seed=7)
    together = dam.log_prob(logits, target)
    assert together.shape == (20, 4)
    for j in range(4):
        assert torch.equal(dam.log_prob(logits, target[:, j]), together[:, j])
    assert dam.log_prob(logits, target[:, :0]).shape == (20, 0)


def test_no_target_and_excluded_target(backend):
    """-1 is log-probability 0; an excluded target is -inf; neither has a gradient."""
    logits = normal(3, 10, seed=8).requires_grad_()
    value = dam.log_prob(logits, torch.tensor([-1, 4, 5]), exclude=4)
    assert value[:2].tolist() == [0.0, -INF]
    value.sum().backward()
    assert bool((logits.grad[:2] == 0).all()) and bool((logits.grad[2] != 0).sum() == 9) and logits.grad[2, 4] == 0


def test_no_target_needs_nothing_of_its_row(backend):
    """A row with nothing to reach and no jump, as padding may be, has gradient 0 and not NaN."""
    logits = torch.tensor([[-INF, -INF], [1.0, 2.0]], requires_grad=True)
    value = dam.log_prob(logits, torch.tensor([-1, 0]))
    value.sum().backward()
    assert value[0] == 0 and logits.grad[0].tolist() == [0.0, 0.0] and bool(torch.isfinite(logits.grad).all())


def test_unreachable_destinations(backend):
    logits = torch.tensor([[0.0, -INF, 1.0]], requires_grad=True)
    value = dam.log_prob(logits, torch.tensor([[1, 2]]))
    assert value[0, 0] == -INF
    value[0, 1].backward()
    # Upstream gradient 0 for the -inf; 4 roundings of numbers below 1.
    assert_close(logits.grad, torch.tensor([[-0.268941421, 0, 0.268941421]]), rtol=0, atol=4 * rounding(torch.float32))


def test_nan_in_nan_out(backend):
    logits = normal(3, 2000, seed=9)
    logits[1, 1700] = math.nan
    value = dam.log_prob(logits, torch.zeros(3, dtype=torch.int64))
    assert torch.isnan(value).tolist() == [False, True, False]


# ---- gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_matches_float64(backend, dtype, temperature):
    """Up to rounding to dtype (its smallest numbers too), with an upstream gradient of its own for each value."""
    logits = normal(30, 1300, seed=10, scale=2.0, dtype=dtype)
    target, exclude = integers(-1, 1300, 30, 3, seed=11), integers(-1, 1300, 30, seed=12)
    target[:, 2] = target[:, 1]  # a target that repeats adds up
    exclude = torch.where((exclude[:, None] == target).any(1), -1, exclude)
    upstream = normal(30, 3, seed=13)
    actual, expected = gradients(logits, target, upstream, exclude=exclude, temperature=temperature)
    assert actual.dtype == dtype
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # float32 adds what rounding log_escape (below 16) does to exp; a sum that cancels leaves 8 roundings of its terms.
    assert_close(actual, expected, rtol=rounding(dtype) + 2.0**-19, atol=tiny + 2.0**-21)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_gradient_does_not_depend_on_a_common_offset(backend, offset):
    # Multiples of 2^-8, so that adding the offset is exact.
    logits = (normal(64, 37, seed=14) * 512).round() / 256
    target = integers(0, 37, 64, 1, seed=15)
    upstream = torch.ones(64, 1)
    plain, _ = gradients(logits, target, upstream)
    moved, expected = gradients(logits + offset, target, upstream)
    assert_close(moved, expected, rtol=2.0**-20, atol=2.0**-22)
    assert_close(moved, plain, rtol=2.0**-20, atol=2.0**-22)


def test_upstream_gradients_of_any_stride(backend):
    logits, target = normal(12, 40, seed=16), integers(0, 40, 12, 2, seed=17)
    for upstream in (
        torch.ones(1, 1).expand(12, 2),
        normal(12, 1, seed=18).expand(12, 2),
        normal(2, 12, seed=19).t(),
        normal(24, 4, seed=20)[::2, ::2],
    ):
        actual, expected = gradients(logits, target, upstream)
        assert_close(actual, expected, rtol=2.0**-20, atol=2.0**-21)
        dense, _ = gradients(logits, target, upstream.contiguous())
        assert torch.equal(actual, dense)
    # What sum() and mean() hand back, for a vector of targets.
    x = logits.clone().requires_grad_()
    dam.log_prob(x, target[:, 0]).mean().backward()
    _, expected = gradients(logits, target[:, :1], torch.full((12, 1), 1 / 12))
    assert_close(x.grad, expected, rtol=2.0**-20, atol=2.0**-23)


def test_gradient_reaches_strided_and_expanded_logits(backend):
    wide = normal(9, 50, seed=21).requires_grad_()
    target = integers(0, 40, 18, 1, seed=22)
    dam.log_prob(wide[:, :40], target[:9]).sum().backward()
    _, expected = gradients(wide[:, :40], target[:9], torch.ones(9, 1))
    assert_close(wide.grad[:, :40], expected, rtol=2.0**-20, atol=2.0**-21)
    assert bool((wide.grad[:, 40:] == 0).all())
    row = normal(1, 40, seed=23).requires_grad_()
    dam.log_prob(row.expand(18, -1), target).sum().backward()
    _, expected = gradients(row.expand(18, -1), target, torch.ones(18, 1))
    # 18 float32 terms below 1 add up.
    assert_close(row.grad, expected.sum(0, keepdim=True), rtol=2.0**-20, atol=18 * 2.0**-21)


def test_gradient_runs_twice(backend):
    """Unlike a loss that forms its gradient in the forward pass."""
    logits = normal(3, 9, seed=24).requires_grad_()
    loss = dam.log_prob(logits, integers(0, 9, 3, seed=25)).sum()
    (a,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (b,) = torch.autograd.grad(loss, logits)
    assert torch.equal(a, b)


def test_gradcheck():
    logits = normal(4, 6, seed=26, dtype=torch.float64).requires_grad_()
    target, exclude = torch.tensor([[0, -1], [1, 1], [5, 2], [3, 4]]), torch.tensor([2, -1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: dam.log_prob(x, target, exclude=exclude, temperature=0.7), logits)


# ---- shapes


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from([1, 2, 33, 1023, 1024, 1025, 2500]),
    padding=st.integers(0, 3),
    targets=st.integers(0, 3),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_shapes_and_strides(rows, columns, padding, targets, dtype):
    wide = normal(rows, columns + padding, seed=27, dtype=dtype)
    wide[:, columns:] = 60.0  # would show if it were read
    target = integers(-1, columns, rows, 2 * targets, seed=28)[:, ::2]
    logits = wide[:, :columns]
    value = dam.log_prob(logits, target)
    assert value.shape == target.shape and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(value, reference(logits, target), rtol=1e-6, atol=4 * rounding(torch.float32))


# ---- torch's own machinery


@pytest.mark.of_the_op
def test_opcheck(backend):
    logits, target = normal(4, 30, seed=29).requires_grad_(), integers(-1, 30, 4, 2, seed=30)
    excluding = (torch.tensor([0, -1, 3, 29]), torch.arange(30) % 5 == 2)
    for args in ((logits, target, None, None, 1.0), (logits, target[:, :0], *excluding, 0.5)):
        torch.library.opcheck(module._log_prob.overload, (*args, backend))
    grad, log_escape = normal(4, 2, seed=31), normal(4, seed=32)
    torch.library.opcheck(
        module._log_prob_backward.overload, (grad, logits.detach(), target, log_escape, None, None, 1.0, backend)
    )


@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    def step(logits, target):
        return (dam.log_prob(logits * 1.5, target, exclude=3) * 2).sum()

    target = torch.tensor([0, 1, -1, 5])
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits = normal(4, 11, seed=33).requires_grad_()
        loss = function(logits, target)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \[..., V\]; got \[\]"),
        ({"logits": torch.zeros(3, 5).int()}, TypeError, "logits must be float32.*got torch.int32"),
        ({"target": [0, 1, 2]}, TypeError, "target must be a tensor; got list"),
        ({"target": torch.arange(4)}, ValueError, r"target must have shape \[3\] or \[3, J\]; got \[4\]"),
        ({"target": torch.arange(3).int()}, TypeError, "target must be int64; got torch.int32"),
        ({"target": torch.tensor([0, 5, 0])}, ValueError, r"target must be -1 or in \[0, 5\); got 5"),
        ({"target": torch.tensor([0, -2, 0])}, ValueError, r"target must be -1 or in \[0, 5\); got -2"),
        ({"target": torch.arange(3, device="meta")}, ValueError, "target must be on cpu .*; got meta"),
        ({"exclude": 5}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"exclude": torch.tensor([0, 9, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 9"),
        ({"temperature": 0}, ValueError, "temperature must be .*; got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be .*; got nan"),
        ({"temperature": None}, TypeError, "temperature must be a number; got NoneType"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^log_prob: .*{message}"):
        dam.log_prob(**{"logits": torch.zeros(3, 5), "target": torch.arange(3), **arguments})


def test_ties_at_a_tiny_temperature_and_infinite_rows(backend):
    """Of two largest logits each has half; a row with +inf, as one with NaN, has no log-probabilities."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    target, half = torch.tensor([1]), torch.tensor([-math.log(2)])
    for scale in (1.0, 1e20):
        found = dam.log_prob(logits * scale, target, temperature=1e-30)
        torch.testing.assert_close(found, half, rtol=2.0**-22, atol=0.0)
    for bad in (INF, math.nan):
        assert bool(dam.log_prob(torch.tensor([[0.0, bad]]), torch.tensor([[0, 1]])).isnan().all())


@pytest.mark.parametrize("rows", [3, 64, 65, 400])
@pytest.mark.parametrize("index", [-2, 5])
def test_an_index_out_of_range_is_found_among_few_and_among_many(rows, index):
    """Few are looked through in Python, many by an operation, one for all rows once."""
    target = torch.zeros(rows, dtype=torch.int64)
    target[rows // 2] = index
    for name, indices in (
        ("target", {"target": target}),
        ("exclude", {"target": torch.zeros_like(target), "exclude": target}),
        ("exclude", {"target": torch.zeros_like(target), "exclude": torch.tensor(index).expand(rows)}),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be -1 or in \[0, 5\); got {index}"):
            dam.log_prob(torch.zeros(rows, 5), **indices)
    dam.log_prob(torch.zeros(rows, 5), torch.full((rows,), 4), exclude=torch.tensor(-1).expand(rows))
