"""tilt_to_ess: the largest tilt that keeps an effective sample size."""

import itertools
import math

import pytest
import torch
from helpers import assert_close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.ops import tilt_to_ess as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
# The search is float64 and forgives 1e-12 of the ESS.
SLACK = 1e-11


def ess(reward, tilt):
    """ESS of softmax(tilt * reward) over the feasible, per group."""
    feasible = reward.double() > -INF
    score = torch.where(feasible, tilt[:, None] * reward.double().masked_fill(~feasible, 0.0), -INF)
    return 1 / torch.softmax(score, 1).square().sum(1)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    size=st.integers(1, 33),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    share=st.floats(0.0, 0.95),
    max_tilt=st.sampled_from([0.0, 0.5, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_is_the_largest(size, scale, share, max_tilt, dtype, seed):
    """ESS holds at the tilt, and a hundred-thousandth more breaks it unless that passes max_tilt."""
    reward = normal(5, size, seed=seed, scale=scale, dtype=dtype)
    wanted = 1 + share * (size - 1)
    tilt = dam.tilt_to_ess(reward, wanted, max_tilt=max_tilt)
    assert tilt.dtype == torch.float64 and bool(((tilt >= 0) & (tilt <= max_tilt)).all())
    assert bool((ess(reward, tilt) >= wanted * (1 - SLACK)).all())
    more = tilt * (1 + 1e-5) + 1e-12
    # At share 0, the ESS tends to 1 only in the limit; at size 1 it is 1.
    decided = (more < max_tilt) & (share > 0) & (size > 1)
    assert bool((ess(reward, more)[decided] < wanted).all())


def test_a_tilt_that_leaves_almost_nothing_to_the_others(backend):
    """Two rewards, a gap of 1/2 apart: an ESS of 1 + 2p leaves p, where the tilt is 2 log(1/p)."""
    p = 1e-8
    tilt = dam.tilt_to_ess(torch.tensor([[1.0, 0.5]]), 1 + 2 * p, max_tilt=1e6)
    # ESS = 1 / (1 - 2p + 2p^2), and 1e-12 of it is forgiven: 5e-5 of p.
    assert math.isclose(float(tilt), 2 * math.log(1 / p), rel_tol=1e-5)


def test_large_groups(backend):
    """More rewards than a kernel looks at together."""
    reward = normal(3, 700, seed=20)
    tilt = dam.tilt_to_ess(reward, 100.0, max_tilt=50.0)
    assert bool((ess(reward, tilt) >= 100.0 * (1 - SLACK)).all())
    assert bool((ess(reward, tilt * (1 + 1e-5)) < 100.0).all())


def test_known_tilt(backend):
    """Rewards 0 and 1: ESS = (1 + x)^2 / (1 + x^2) with x = e^h."""
    h = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    x = h.exp()
    reward = torch.tensor([[0.0, 1.0]])
    for wanted, tilt in zip((1 + x) ** 2 / (1 + x * x), h, strict=True):
        # d ESS / dh is 0.1 at h = 0.1, so the 1e-12 forgiven are 2e-11 there.
        assert_close(dam.tilt_to_ess(reward, float(wanted), max_tilt=10.0), tilt[None], rtol=1e-9)


def test_equal_rewards_give_max_tilt(backend):
    reward = torch.full((3, 8), 0.7)
    reward[1] = -1e30
    for wanted in (1.0, 4.0, 8.0):
        assert dam.tilt_to_ess(reward, wanted, max_tilt=12.5).tolist() == [12.5] * 3
    assert dam.tilt_to_ess(normal(2, 1, seed=1), 1.0, max_tilt=3.0).tolist() == [3.0, 3.0]


def test_ties_at_the_top_bound_the_ess_below(backend):
    """Two best trajectories keep ESS above 2 at any tilt."""
    reward = torch.tensor([[1.0, 1.0, 0.0, -2.0]])
    assert dam.tilt_to_ess(reward, 2.0, max_tilt=100.0).tolist() == [100.0]
    assert dam.tilt_to_ess(reward, 2.001, max_tilt=100.0).item() < 100.0


def test_infeasible_trajectories(backend):
    """-inf counts for nothing; too few feasible ones leave no tilt."""
    reward = normal(4, 8, seed=2)
    reward[:, 5:] = -INF
    reward[2] = -INF
    reward[3, 1:] = -INF
    alone = dam.tilt_to_ess(reward[:2, :5], 3.0, max_tilt=50.0)
    tilt = dam.tilt_to_ess(reward, 3.0, max_tilt=50.0)
    assert_close(tilt[:2], alone, rtol=1e-12)
    assert tilt[2:].tolist() == [0.0, 0.0]
    assert dam.tilt_to_ess(reward, 1.0, max_tilt=50.0)[2:].tolist() == [0.0, 50.0]


def test_monotone_and_covariant(backend):
    """More ESS means less tilt; a shift of the reward changes nothing; a factor on it divides the tilt."""
    reward = normal(10, 16, seed=3, dtype=torch.float64)
    tilts = [dam.tilt_to_ess(reward, wanted, max_tilt=1e3) for wanted in (1.5, 4.0, 8.0, 15.0)]
    assert all(bool((a > b).all()) for a, b in itertools.pairwise(tilts))
    assert_close(dam.tilt_to_ess(reward + 1000, 4.0, max_tilt=1e3), tilts[1], rtol=1e-9)
    assert_close(dam.tilt_to_ess(reward * 5, 4.0, max_tilt=1e3), tilts[1] / 5, rtol=1e-9)


@pytest.mark.parametrize("max_tilt", [1e12, 1e30, 1e300])
def test_a_large_max_tilt_costs_no_accuracy(backend, max_tilt):
    """max_tilt may be set to "no limit"."""
    reward = torch.tensor([[0.0, 1.0, 2.0]])
    expected = dam.tilt_to_ess(reward, 2.0, max_tilt=10.0)
    assert_close(dam.tilt_to_ess(reward, 2.0, max_tilt=max_tilt), expected, rtol=1e-6)


def test_no_groups(backend):
    assert dam.tilt_to_ess(torch.zeros(0, 4), 2.0, max_tilt=1.0).shape == (0,)


@pytest.mark.of_the_op
def test_opcheck_and_compile(backend):
    reward = normal(3, 6, seed=4)
    torch.library.opcheck(module._tilt_to_ess.overload, (reward, 2.0, 5.0, True, backend))
    compiled = torch.compile(lambda r: dam.tilt_to_ess(r, 2.0, max_tilt=5.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(reward), dam.tilt_to_ess(reward, 2.0, max_tilt=5.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward": [[1.0]]}, TypeError, "reward must be .*tensor; got list"),
        ({"reward": torch.zeros(2, 4).long()}, TypeError, "reward must be .*; got torch.int64"),
        ({"reward": torch.zeros(4)}, ValueError, r"reward must have shape \[G, K\].*; got \[4\]"),
        ({"reward": torch.full((2, 4), INF)}, ValueError, r"reward\[0, 0\] is inf"),
        ({"reward": torch.full((2, 4), math.nan)}, ValueError, r"reward\[0, 0\] is nan"),
        ({"ess": 0.5}, ValueError, r"ess must be in \[1, 4\]; got 0.5"),
        ({"ess": 5}, ValueError, r"ess must be in \[1, 4\]; got 5"),
        ({"ess": math.nan}, ValueError, r"ess must be in \[1, 4\]; got nan"),
        ({"ess": "2"}, TypeError, "ess must be .*; got str"),
        ({"ess": None}, TypeError, "ess must be .*; got NoneType"),
        ({"max_tilt": -1.0}, ValueError, "max_tilt must be .*; got -1.0"),
        ({"max_tilt": INF}, ValueError, "max_tilt must be .*; got inf"),
        ({"max_tilt": None}, TypeError, "max_tilt must be .*; got NoneType"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"reward": torch.zeros(2, 4), "ess": 2.0, "max_tilt": 1.0}
    with pytest.raises(error, match=f"^tilt_to_ess: .*{message}"):
        dam.tilt_to_ess(**{**good, **arguments})
