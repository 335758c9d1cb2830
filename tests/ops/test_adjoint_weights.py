"""adjoint_weights: path sums backward in time, and weights over a group that are never NaN."""

import math

import pytest
import torch
from helpers import assert_close, normal, rounding

import dam
from dam.ops import adjoint_weights as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
FLOAT32 = rounding(torch.float32)


def reference(log_ratio, terminal_cost, escape_gap=None, clip=INF):
    """The docstring's formulas, a loop over steps and float64."""
    gain = log_ratio.double() + (0.0 if escape_gap is None else escape_gap.double())
    path = torch.zeros(*gain.shape[:2], gain.shape[2] + 1, dtype=torch.float64)
    for s in reversed(range(gain.shape[2])):
        path[..., s] = path[..., s + 1] + gain[..., s]
    l = path[..., 0] - terminal_cost.double()
    normalizer = torch.logsumexp(l, 1) - math.log(l.shape[1])
    relative = l - normalizer[:, None]
    weight = relative.clamp(max=clip).exp()
    return weight, path, normalizer, weight.sum(1) ** 2 / (weight**2).sum(1), (relative > clip).double().mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("steps", [0, 1, 17])
def test_matches_the_formulas(backend, dtype, clip, steps):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs on the reference")
    log_ratio, gap = (normal(7, 12, steps, seed=s, scale=0.5, dtype=dtype) for s in (1, 2))
    cost = normal(7, 12, seed=3)
    out = dam.adjoint_weights(log_ratio, cost, escape_gap=gap, clip=clip)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    expected = reference(log_ratio, cost, gap, INF if clip is None else clip)
    for actual, wanted in zip(out, expected, strict=True):
        # float64 inside, rounded once at the end; sums of numbers near 1 that may cancel keep 1e-13.
        assert actual.dtype == result
        assert_close(actual, wanted, rtol=2 * rounding(result) + 1e-13, atol=1e-13)


@pytest.mark.parametrize(("groups", "size", "steps"), [(3, 5, 300), (2, 300, 33), (1, 1100, 129)])
def test_long_trajectories_and_large_groups(backend, groups, size, steps):
    """Sums that kernels carry from one block of steps, or of trajectories, to the next."""
    log_ratio, gap = (normal(groups, size, steps, seed=s, scale=0.2) for s in (11, 12))
    cost = normal(groups, size, seed=13)
    out = dam.adjoint_weights(log_ratio, cost, escape_gap=gap, clip=1.0)
    for actual, wanted in zip(out, reference(log_ratio, cost, gap, 1.0), strict=True):
        # As above, with sums of up to 300 numbers.
        assert_close(actual, wanted, rtol=2 * FLOAT32 + 1e-12, atol=1e-12)


def test_path_sums_run_backward_from_zero(backend):
    log_ratio = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    out = dam.adjoint_weights(log_ratio, torch.tensor([[3.0]]))
    assert out.log_path.tolist() == [[[7.0, 6.0, 4.0, 0.0, 0.0]]]
    assert out.log_normalizer.tolist() == [4.0] and out.weight.tolist() == [[1.0]] and out.ess.tolist() == [1.0]


def test_weights_have_mean_one_and_ess_its_bounds(backend):
    out = dam.adjoint_weights(normal(50, 16, 8, seed=4, scale=2.0), normal(50, 16, seed=5, scale=3.0))
    # 16 numbers rounded to float32.
    assert_close(out.weight.double().mean(1), torch.ones(50), rtol=2 * FLOAT32)
    assert bool(((out.ess >= 1 - FLOAT32) & (out.ess <= 16 * (1 + FLOAT32))).all())
    equal = dam.adjoint_weights(torch.zeros(1, 16, 3), torch.full((1, 16), 2.5))
    assert bool((equal.weight == 1).all()) and equal.ess.tolist() == [16.0] and equal.log_normalizer.tolist() == [-2.5]


@pytest.mark.parametrize("constant", [-1e6, 700.0, 1e6])
def test_a_constant_cost_moves_the_normalizer_only(backend, constant):
    cost = (normal(9, 8, seed=6) * 256).round() / 256  # so that adding the constant is exact in float64
    log_ratio = normal(9, 8, 5, seed=7)
    plain = dam.adjoint_weights(log_ratio, cost.double(), clip=0.3)
    moved = dam.adjoint_weights(log_ratio, cost.double() + constant, clip=0.3)
    # Near 1e6 float64 resolves 1e-10, above float32's rounding of nothing but weights of about 1.
    assert_close(moved.weight, plain.weight, rtol=4 * FLOAT32, atol=1e-9)
    assert_close(moved.ess, plain.ess, rtol=4 * FLOAT32)
    assert torch.equal(moved.log_path, plain.log_path) and torch.equal(moved.clipped, plain.clipped)
    assert_close(moved.log_normalizer, plain.log_normalizer.double() - constant, rtol=2 * FLOAT32, atol=1e-6)


def test_order_of_trajectories_and_groups(backend):
    log_ratio, cost = normal(5, 6, 4, seed=8), normal(5, 6, seed=9)
    out = dam.adjoint_weights(log_ratio, cost)
    flipped = dam.adjoint_weights(log_ratio.flip(0, 1), cost.flip(0, 1))
    assert_close(flipped.weight, out.weight.flip(0, 1), rtol=2 * FLOAT32)
    alone = dam.adjoint_weights(log_ratio[2:3], cost[2:3])
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, out, strict=True))


def test_strided_inputs(backend):
    log_ratio, cost = normal(4, 5, 6, seed=10), normal(5, 4, seed=11).t()
    strided = dam.adjoint_weights(log_ratio.transpose(0, 1)[:4, :, ::2], cost[:, :4].contiguous().t()[:, :4].t()[:4])
    dense = dam.adjoint_weights(log_ratio.transpose(0, 1)[:4, :, ::2].contiguous(), cost[:4, :4].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


# ---- hard constraints


def test_infinite_cost_forbids(backend):
    """Weight 0 for it, and the others share the group's K."""
    log_ratio, cost = normal(3, 4, 5, seed=12), normal(3, 4, seed=13)
    cost[:, 1] = INF
    log_ratio[0, 1, 2] = INF  # whatever its path weight
    out = dam.adjoint_weights(log_ratio, cost)
    assert bool((out.weight[:, 1] == 0).all())
    keep = [0, 2, 3]
    others = dam.adjoint_weights(log_ratio[:, keep], cost[:, keep])
    assert_close(out.weight[:, keep], others.weight.double() * 4 / 3, rtol=4 * FLOAT32)
    assert_close(out.ess, others.ess, rtol=4 * FLOAT32)
    normalizer = others.log_normalizer.double() + math.log(3 / 4)
    assert_close(out.log_normalizer, normalizer, rtol=4 * FLOAT32, atol=4 * FLOAT32)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("how", ["cost", "path"])
def test_infeasible_groups_are_zero_not_nan(backend, clip, how):
    log_ratio, cost = normal(3, 4, 5, seed=14), normal(3, 4, seed=15)
    before = dam.adjoint_weights(log_ratio, cost, clip=clip)
    if how == "cost":
        cost[1] = INF
    else:
        log_ratio[1, :, 2] = -INF
    out = dam.adjoint_weights(log_ratio, cost, clip=clip)
    assert (
        bool((out.weight[1] == 0).all()) and out.ess[1] == 0 and out.log_normalizer[1] == -INF and out.clipped[1] == 0
    )
    assert not any(bool(torch.isnan(x).any()) for x in out)
    assert torch.equal(out.weight[::2], before.weight[::2])


def test_extreme_log_weights(backend):
    """Log-weights past 700 overflow no exponential."""
    cost = torch.tensor([[-5000.0, 5000.0, 0.0], [3e38, -3e38, 0.0]])
    out = dam.adjoint_weights(torch.zeros(2, 3, 1), cost)
    assert out.weight.tolist() == [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]] and out.ess.tolist() == [1.0, 1.0]


# ---- clip


def test_clip_bounds_the_weights(backend):
    log_ratio, cost = normal(20, 8, 6, seed=16, scale=2.0), torch.zeros(20, 8)
    free = dam.adjoint_weights(log_ratio, cost)
    out = dam.adjoint_weights(log_ratio, cost, clip=0.7)
    bound = math.exp(0.7)
    touched = free.weight.double() > bound
    assert bool(touched.any()) and not bool(touched.all())
    assert_close(out.weight, torch.where(touched, bound, free.weight.double()), rtol=2 * FLOAT32)
    assert_close(out.clipped, touched.double().mean(1), rtol=2 * FLOAT32)
    assert bool((out.ess >= free.ess * (1 - FLOAT32)).all())  # clipping evens out
    loose = dam.adjoint_weights(log_ratio, cost, clip=math.log(8))  # no weight exceeds K
    assert bool((loose.clipped == 0).all()) and torch.equal(loose.weight, free.weight)


# ---- torch's own machinery


@pytest.mark.of_the_op
def test_opcheck_and_compile(backend):
    log_ratio, cost, gap = normal(2, 3, 4, seed=17), normal(2, 3, seed=18), normal(2, 3, 4, seed=19)
    for args in ((log_ratio, cost, None, None), (log_ratio, cost, gap, 1.0), (log_ratio[:, :, :0], cost, None, None)):
        torch.library.opcheck(module._adjoint_weights.overload, (*args, True, backend))
    compiled = torch.compile(
        lambda x: dam.adjoint_weights(x, cost, escape_gap=gap, clip=1.0), fullgraph=True, backend="aot_eager"
    )
    eager = dam.adjoint_weights(log_ratio, cost, escape_gap=gap, clip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(compiled(log_ratio), eager, strict=True))


def test_is_not_differentiable(backend):
    out = dam.adjoint_weights(torch.zeros(1, 2, 3).requires_grad_(), torch.zeros(1, 2).requires_grad_())
    assert not any(x.requires_grad for x in out)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_ratio": [0.0]}, TypeError, "log_ratio must be .*tensor; got list"),
        ({"log_ratio": torch.zeros(2, 3, 4).long()}, TypeError, "log_ratio must be .*; got torch.int64"),
        ({"log_ratio": torch.zeros(2, 3)}, ValueError, r"log_ratio must have shape \[G, K, S\].*; got \[2, 3\]"),
        ({"log_ratio": torch.zeros(2, 0, 4)}, ValueError, r"log_ratio must have .* K >= 1; got \[2, 0, 4\]"),
        ({"terminal_cost": torch.zeros(2, 4)}, ValueError, r"terminal_cost must have shape \[2, 3\]; got \[2, 4\]"),
        ({"terminal_cost": torch.zeros(2, 3).long()}, TypeError, "terminal_cost must be .*; got torch.int64"),
        ({"escape_gap": torch.zeros(2, 3, 5)}, ValueError, r"escape_gap must have the shape .*; got \[2, 3, 5\]"),
        ({"clip": INF}, ValueError, "clip must be a finite number or None; got inf"),
        ({"clip": "1"}, ValueError, "clip must be a finite number or None; got '1'"),
        ({"terminal_cost": torch.full((2, 3), -INF)}, ValueError, "trajectory 0 of group 0 has log weight inf"),
        ({"log_ratio": torch.full((2, 3, 4), INF)}, ValueError, "trajectory 0 of group 0 has log weight inf"),
        ({"log_ratio": torch.full((2, 3, 4), math.nan)}, ValueError, "trajectory 0 of group 0 has log weight nan"),
        ({"terminal_cost": torch.full((2, 3), math.nan)}, ValueError, "trajectory 0 of group 0 has log weight nan"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"log_ratio": torch.zeros(2, 3, 4), "terminal_cost": torch.zeros(2, 3)}
    with pytest.raises(error, match=f"^adjoint_weights: .*{message}"):
        dam.adjoint_weights(**{**good, **arguments})


def test_a_nan_is_an_error_whatever_the_cost():
    log_ratio = torch.zeros(1, 2, 3)
    log_ratio[0, 1, 1] = math.nan
    with pytest.raises(ValueError, match=r"trajectory 1 of group 0.*nan"):
        dam.adjoint_weights(log_ratio, torch.tensor([[0.0, INF]]))
