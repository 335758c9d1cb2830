"""Transport costs, normalisers and mode counts against what is known, and POT where it solves the same."""

import math

import numpy as np
import ot
import pytest
import torch

from dam.flows import metrics


def points(count, dimensions, seed):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_of_a_shift_is_its_length():
    left = points(50, 3, 0)
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert metrics.wasserstein(metrics.squared_distances(left, left + shift)) == pytest.approx(25.0, rel=1e-9)
    assert metrics.wasserstein(metrics.squared_distances(left, left.flip(0))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "iterations"), [(1.0, 3), (0.1, 7), (0.1, 200), (1e-3, 100)])
def test_sinkhorn_is_pots_after_as_many_iterations(epsilon, iterations):
    """To rounding: what is left out of sums, below e^-60 of them, cannot be seen. Two clusters, far apart."""
    left, right = points(40, 2, 1), points(30, 2, 2)
    left[:20] += 20
    right[:10] += 20
    cost = metrics.squared_distances(left, right)
    a, b = np.full(40, 1 / 40), np.full(30, 1 / 30)
    _, log = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=iterations, stopThr=0, log=True, warn=False)
    expected = epsilon * (a @ (log["log_u"] - np.log(a)) + b @ (log["log_v"] - np.log(b)))
    found = metrics.sinkhorn(cost, epsilon=epsilon, iterations=iterations, threshold=0)
    assert found.iterations == iterations
    assert found.cost == pytest.approx(float(expected), rel=1e-10)


def test_the_divergence_is_that_of_sinkhorn_without_what_sets_have_of_themselves():
    """By dam's own iterations, to what column sums that are off by 1e-3 leave; far points take POT's logarithms."""
    left, right = points(40, 2, 1), 2 * points(30, 2, 2)
    far = torch.cat((left, torch.full((1, 2), 1e3, dtype=torch.float64)))  # cost / epsilon above 600
    for one in (left, far):
        pairs = [metrics.squared_distances(*pair) for pair in ((one, right), (one, one), (right, right))]
        epsilon = 0.05 * pairs[0].mean()
        between, *alone = (metrics.sinkhorn(pair, epsilon=epsilon, threshold=1e-6).cost for pair in pairs)
        found = metrics.sinkhorn_divergence(one, right)
        assert found == pytest.approx(between - sum(alone) / 2, abs=3e-3 * pairs[0].mean())
        assert found > 0.1
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert metrics.sinkhorn_divergence(left, left.flip(0)) == pytest.approx(0.0, abs=1e-9)
    assert metrics.sinkhorn_divergence(left, left + shift) == pytest.approx(25.0, rel=1e-2)
    assert metrics.sinkhorn_divergence(left[:1], left[:1]) == 0.0
    with pytest.raises(ValueError, match="samples on both sides"):
        metrics.sinkhorn_divergence(left[:0], right)


def test_sinkhorn_stops_where_it_has_converged_near_the_distance():
    """The regulariser is at most epsilon times the logarithm of the number of samples."""
    cost = metrics.squared_distances(points(30, 2, 1), points(30, 2, 2))
    found = metrics.sinkhorn(cost, epsilon=0.02, iterations=100_000)
    exact = metrics.wasserstein(cost)
    assert found.error < 1e-3 and found.iterations < 100_000
    assert exact - 1e-3 * cost.max() < found.cost < exact + 0.02 * math.log(30)


def test_estimates_of_known_weights():
    told = metrics.estimates(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    assert told.log_normalizer == pytest.approx(math.log(2.0))
    assert told.elbo == pytest.approx(math.log(3.0) / 2)
    assert told.ess == pytest.approx(16 / 10 / 2)
    assert metrics.estimates(torch.full((5,), -7.0, dtype=torch.float64)) == pytest.approx((-7.0, -7.0, 1.0))


def test_energies_and_modes():
    left = torch.tensor([3.0, 1.0, 2.0])
    assert metrics.energy_w2(left, left.flip(0) + 2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="as many"):
        metrics.energy_w2(left, left[:2])
    modes = torch.tensor([[0.0], [10.0], [20.0]])
    assert metrics.mode_counts(torch.tensor([[1.0], [2.0], [19.0]]), modes).tolist() == [2, 0, 1]
