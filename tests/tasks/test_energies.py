"""Targets of samplers: samples, normalisers and modes against quadrature and closed forms; particles' symmetries."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import torch

from dam.tasks import energies
from dam.tasks.energies import TARGETS, ManyWell, aligned_squares, dw_4, gmm_40, lj_13, metropolis

Z = 5.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_published_means_of_the_40_gaussians():
    mean = gmm_40().law.mean
    assert torch.allclose(mean[:2], torch.tensor([[-0.2995, 21.4577], [-32.9218, -29.4376]]).double(), atol=5e-5)
    assert math.sqrt(float(gmm_40().law.variance[0, 0])) == pytest.approx(1.3133, abs=5e-5)


@pytest.mark.parametrize("name", ["gmm-40", "funnel-10", "many-well-5", "many-well-50"])
def test_exact_samples_are_of_the_energy(name):
    """E[x . grad E] is D for the law e^(-E) / Z, by parts, if that falls off at infinity: for another law it is not."""
    energy = TARGETS[name]()
    state = energy.sample(20_000, generator()).requires_grad_()
    (slope,) = torch.autograd.grad(energy(state).sum(), state)
    virial = (state * slope).sum(dim=1)
    assert abs(float(virial.detach().mean()) - energy.dim) < Z * float(virial.detach().std()) / math.sqrt(20_000)


def test_the_normaliser_of_many_wells_is_that_of_one_to_a_power():
    axis = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]
    one = float(torch.trapezoid(torch.exp(-ManyWell(1, 1)(axis)), axis[:, 0]))
    assert ManyWell().log_normalizer == pytest.approx(5 * math.log(one), abs=1e-9)
    assert ManyWell(7, 5).log_normalizer == pytest.approx(5 * math.log(one) + math.log(2 * math.pi), abs=1e-9)
    plane = torch.cartesian_prod(*[torch.linspace(-60, 60, 241, dtype=torch.float64)] * 2)
    assert float(torch.exp(-gmm_40()(plane)).sum() * 0.5**2) == pytest.approx(1, abs=1e-6)
    law = torch.distributions.Normal(torch.zeros(()).double(), 3.0)
    x = torch.randn(4, 10, generator=generator(), dtype=torch.float64)
    rest = torch.distributions.Normal(torch.zeros(4, 1).double(), torch.exp(x[:, :1] / 2))
    expected = law.log_prob(x[:, 0]) + rest.log_prob(x[:, 1:]).sum(dim=1)
    assert torch.allclose(-energies.Funnel()(x), expected)


def test_many_wells_have_their_modes_and_equal_shares():
    energy = ManyWell()
    assert energy.modes.shape == (32, 5) and float(energy(energy.modes).abs().max()) < 1e-24
    state = energy.sample(20_000, generator())
    share = (state > 0).double().mean(dim=0)
    assert (share - 0.5).abs().max() < Z * 0.5 / math.sqrt(20_000)
    with pytest.raises(ValueError, match=r"wells must be in 1 \.\. 5"):
        ManyWell(5, 6)


@pytest.mark.parametrize("make", [dw_4, lj_13])
def test_particles_do_not_know_where_they_are_and_which_is_which(make):
    energy = make()
    x = 2 * torch.randn(6, energy.count, energy.dimensions, generator=generator(), dtype=torch.float64)
    value = energy(x.flatten(1))
    assert torch.allclose(energy((x + 3.0).flatten(1)), value)
    assert torch.allclose(energy(x.flip(1).flatten(1)), value)
    lifted = energy.lifted(1.7)
    centre = energy.count * x.mean(dim=1).square().sum(dim=1) / (2 * 1.7**2)
    assert torch.allclose(lifted(x.flatten(1)), energy(energy.centred(x.flatten(1))) + centre)


def test_energies_of_known_arrangements():
    """Four in a square of side 4 with diagonals of 4 sqrt 2; two at a distance of 1 in the potential of 13."""
    square = torch.tensor([[0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]], dtype=torch.float64)
    gap = 4 * math.sqrt(2) - 4
    assert float(dw_4()(square)) == pytest.approx(2 * (0.9 * gap**4 - 4 * gap**2))
    pair = energies.Particles(2, 3, energies._lennard_jones, pull=1.0)
    apart = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(pair(apart)) == pytest.approx(-2 + 0.25)


def test_long_chains_of_two_particles_have_the_law_of_their_distance():
    """Of two particles in the plane the density of the distance d is in proportion to d e^(-pair(d)): means of d, and
    of the energy, which tells the temperature.
    """
    two = energies.Particles(2, 2, energies._double_well)
    grid = torch.linspace(0.01, 9, 20_000, dtype=torch.float64)
    height = grid * torch.exp(-energies._double_well(grid))
    distance = two.distances(metropolis(two, 800, steps=600, length=0.7, seed=0))
    for figure in (lambda d: d, energies._double_well):
        expected = float((figure(grid) * height).sum() / height.sum())
        spread = math.sqrt(float((figure(grid).square() * height).sum() / height.sum()) - expected**2)
        assert abs(float(figure(distance).mean()) - expected) < Z * spread / math.sqrt(800)


def test_aligned_distances_are_the_least_over_turns_mirrors_and_swaps():
    """Of a turned, mirrored and swapped copy it is 0; of others no more than at any of many turns of any swap."""
    state = dw_4().centred(torch.randn(3, 8, generator=generator(), dtype=torch.float64))
    x = state.view(3, 4, 2)
    c, s = math.cos(0.7), math.sin(0.7)
    copy = (x[:, [2, 0, 3, 1]] * torch.tensor([1.0, -1.0])) @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    assert np.abs(np.diag(aligned_squares(state.numpy(), copy.flatten(1).numpy()))).max() < 1e-12
    found = aligned_squares(state[:1].numpy(), state[1:2].numpy())[0, 0]
    tried = []
    for order, angle in itertools.product(itertools.permutations(range(4)), np.linspace(0, 2 * math.pi, 61)):
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        for mirror in (1.0, -1.0):
            other = (x[1, list(order)] * torch.tensor([1.0, mirror])) @ turn.double()
            tried.append(float((x[0] - other).square().sum()))
    assert found <= min(tried) + 1e-12
    assert found == pytest.approx(min(tried), rel=2e-2)


def test_assigned_distances_are_of_particles_that_are_swapped_as_they_lie_and_turned_then():
    """By scipy's assignment of distances and the turn or mirror of the singular value decomposition, pair by pair."""
    state = dw_4().centred(2 * torch.randn(12, 8, generator=generator(), dtype=torch.float64))
    left, right = state[:5].numpy(), state[5:].numpy()
    found, least = aligned_squares(left, right, assigned=True), aligned_squares(left, right)
    for (i, one), (j, other) in itertools.product(enumerate(left), enumerate(right)):
        x, y = one.reshape(4, 2), other.reshape(4, 2)
        _, order = scipy.optimize.linear_sum_assignment(scipy.spatial.distance.cdist(x, y))
        u, _, v = np.linalg.svd(y[order].T @ x)
        assert found[i, j] == pytest.approx(((x - y[order] @ u @ v) ** 2).sum(), abs=1e-10)
    assert (found >= least - 1e-12).all() and (found > least + 0.1).any()
