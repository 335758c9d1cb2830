"""rate_ratio: what a jump and the time between jumps add to a path's log weight."""

import math

import pytest
import torch
from helpers import allowed, assert_close, integers, normal, rounding

import dam
from dam.ops import rate_ratio as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_the_formula(backend, dtype):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs on the reference")
    model, base = (normal(30, 1500, seed=s, dtype=dtype) for s in (1, 2))
    target, exclude = integers(-1, 1500, 30, 3, seed=3), integers(-1, 1500, 30, seed=4)
    exclude = torch.where((exclude[:, None] == target).any(1), -1, exclude)
    log_ratio, escape_gap = dam.rate_ratio(model, base, target, exclude=exclude)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_ratio.dtype == escape_gap.dtype == out
    x, b = allowed(model, exclude), allowed(base, exclude)
    expected = torch.where(target < 0, 0.0, (b - x).gather(1, target.clamp(min=0)))
    assert_close(log_ratio, expected, rtol=2 * rounding(out))
    # A difference of two sums near 2500, each good to 2^-22 of itself in float32.
    gap = x.exp().sum(1) - b.exp().sum(1)
    assert_close(escape_gap, gap, rtol=0, atol=8 * rounding(out) * float(x.exp().sum(1).max()))


def test_target_shapes(backend):
    model, base, target = normal(6, 20, seed=5), normal(6, 20, seed=6), integers(0, 20, 6, 2, seed=7)
    both = dam.rate_ratio(model, base, target).log_ratio
    assert torch.equal(dam.rate_ratio(model, base, target[:, 1]).log_ratio, both[:, 1])
    assert dam.rate_ratio(model, base, target[:, :0]).log_ratio.shape == (6, 0)
    empty = dam.rate_ratio(model[:0], base[:0], target[:0])
    assert empty.log_ratio.shape == (0, 2) and empty.escape_gap.shape == (0,)


def test_equal_chains_weigh_nothing(backend):
    logits = normal(6, 2000, seed=8)
    log_ratio, escape_gap = dam.rate_ratio(logits, logits, integers(0, 2000, 6, seed=9))
    assert bool((log_ratio == 0).all()) and bool((escape_gap == 0).all())


def test_swapping_the_chains_flips_the_signs(backend):
    model, base, target = normal(6, 40, seed=10), normal(6, 40, seed=11), integers(0, 40, 6, seed=12)
    for a, b in zip(dam.rate_ratio(model, base, target), dam.rate_ratio(base, model, target), strict=True):
        assert torch.equal(a, -b)


def test_rates_are_not_normalised(backend):
    """Doubling every rate of the model is log 2 at each jump and one escape rate of the base between jumps."""
    base, target = normal(6, 40, seed=13, dtype=torch.float32), integers(0, 40, 6, seed=14)
    log_ratio, escape_gap = dam.rate_ratio(base + math.log(2), base, target)
    # base + log 2 is rounded once, in numbers below 8.
    assert_close(log_ratio, torch.full((6,), -math.log(2)), rtol=0, atol=8 * rounding(torch.float32))
    assert_close(escape_gap, base.double().exp().sum(1), rtol=2.0**-18)


def test_destinations_out_of_reach(backend):
    model = torch.tensor([[0.0, -INF, 0.0, 0.0, -INF]])
    base = torch.tensor([[0.0, 0.0, -INF, 0.0, -INF]])
    log_ratio, escape_gap = dam.rate_ratio(model, base, torch.tensor([[0, 1, 2, -1, 3, 4]]), exclude=3)
    assert log_ratio[0, :4].tolist() == [0.0, INF, -INF, 0.0]
    assert bool(torch.isnan(log_ratio[0, 4:]).all())  # excluded, or reached by neither
    assert escape_gap.tolist() == [0.0]


def test_strides(backend):
    model, base = normal(8, 50, seed=15), normal(4, 60, seed=16)
    target = integers(0, 40, 8, seed=17)[::2]
    strided = dam.rate_ratio(model[::2, :40], base[:, :40], target)
    dense = dam.rate_ratio(model[::2, :40].contiguous(), base[:, :40].contiguous(), target.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
    row = base[:1, :40]
    expanded = dam.rate_ratio(model[::2, :40], row.expand(4, -1), target)
    assert torch.equal(expanded.log_ratio, dam.rate_ratio(model[::2, :40], row.repeat(4, 1), target).log_ratio)


def test_path_weight_has_mean_one(backend):
    """E_u[u_base/u at the jump x exp of the integral] = 1, over the waiting time and the jump, in closed form."""
    model, base = normal(1, 12, seed=18), normal(1, 12, seed=19)
    log_ratio, gap = dam.rate_ratio(model.expand(12, -1), base.expand(12, -1), torch.arange(12))
    jump = model[0].double().exp()
    # integral over t of u(v) e^{-Lambda t} e^{log_ratio + gap t} = u(v) e^{log_ratio} / (Lambda - gap)
    total = (jump * log_ratio.double().exp()).sum() / (jump.sum() - gap[0].double())
    # Sums of 12 numbers that float32 rounds.
    assert abs(float(total) - 1) < 16 * rounding(torch.float32)


def test_is_not_differentiable(backend):
    logits = normal(3, 4).requires_grad_()
    out = dam.rate_ratio(logits, logits, torch.zeros(3, dtype=torch.int64))
    assert not out.log_ratio.requires_grad and not out.escape_gap.requires_grad


@pytest.mark.of_the_op
def test_opcheck_and_compile(backend):
    model, base, target = normal(4, 30, seed=20), normal(4, 30, seed=21), integers(-1, 30, 4, 2, seed=22)
    suppressed = torch.arange(30) % 5 == 2
    suppressed[target[target >= 0]] = False  # as the op is given none
    for excluding in ((None, None), (torch.tensor([0, -1, 3, 29]), suppressed)):
        torch.library.opcheck(module._rate_ratio.overload, (model, base, target, *excluding, backend))
    compiled = torch.compile(lambda m: dam.rate_ratio(m, base, target, exclude=2), fullgraph=True, backend="aot_eager")
    eager = dam.rate_ratio(model, base, target, exclude=2)
    assert all(torch.equal(a, b) for a, b in zip(compiled(model), eager, strict=True) if not a.isnan().any())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \[..., V\]; got \[\]"),
        ({"base_logits": torch.zeros(3, 4)}, ValueError, r"base_logits must have the shape of logits.*got \[3, 4\]"),
        ({"base_logits": torch.zeros(3, 5).half()}, TypeError, "base_logits must have the dtype.*got torch.float16"),
        ({"base_logits": None}, TypeError, "base_logits must be a tensor; got NoneType"),
        ({"target": torch.arange(2)}, ValueError, r"target must have shape \[3\] or \[3, J\]; got \[2\]"),
        ({"target": torch.full((3,), 5)}, ValueError, r"target must be -1 or in \[0, 5\); got 5"),
        ({"exclude": torch.full((3,), 5)}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"logits": torch.zeros(3, 5), "base_logits": torch.zeros(3, 5), "target": torch.arange(3)}
    with pytest.raises(error, match=f"^rate_ratio: .*{message}"):
        dam.rate_ratio(**{**good, **arguments})
