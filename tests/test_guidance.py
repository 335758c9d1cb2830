"""Samples by guidance: weights that are right in the mean, laws that come to p* with the particles, by enumeration."""

import dataclasses
import math

import pytest
import torch

from dam.ctmc import enumeration
from experiments import guidance
from experiments.densities import Density
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each
TOKENS, LENGTH = 3, 2


@dataclasses.dataclass(frozen=True)
class Peaked(Density):
    """The base's ESS is a third, and one token of a pair says much of the other."""

    tokens = TOKENS
    length = LENGTH

    def log_density(self, x):
        table = torch.tensor([0.0, 2.0, -1.0, 1.0, -2.0, 0.5, -1.0, 0.0, 2.5], dtype=torch.float64)
        return table[enumeration.index_of(x, TOKENS)]


DENSITY = Peaked()
BEST = DENSITY.law()
LOG_Z = float(DENSITY.log_density(enumeration.states(TOKENS, LENGTH)).logsumexp(dim=0)) - LENGTH * math.log(TOKENS)
RUNS = 8_000


def law_of(found):
    """That of an outcome drawn in proportion to the weights, its mean and deviation over runs [V^L]."""
    share = torch.softmax(found.log_weight, dim=1)
    of_run = torch.zeros(len(share), TOKENS**LENGTH, dtype=torch.float64)
    of_run.scatter_add_(1, enumeration.index_of(found.final, TOKENS), share)
    return of_run.mean(dim=0), of_run.std(dim=0) / len(share) ** 0.5


def test_one_particle_is_importance_sampling():
    """Whatever the values on the way: they cancel, here of a proposal that is a joint law."""
    joint = oracle.random_joint(LENGTH, TOKENS, seed=1)
    model = oracle.table(joint)

    def proposal(states):
        return model.logits.detach()[model.index(states)][..., :TOKENS].log_softmax(dim=2)

    for completions, calls in ((0, 1), (1, LENGTH), (3, 3 * (LENGTH - 1) + 1)):
        found = guidance.smc(DENSITY, 500, 1, completions=completions, proposal=proposal, seed=2)
        final = found.final[:, 0]
        weight = DENSITY.log_density(final) - LENGTH * math.log(TOKENS) - joint[tuple(final.T)].log()
        torch.testing.assert_close(found.log_weight[:, 0], weight, rtol=0, atol=1e-12)
        assert found.reward_calls == 500 * calls


@pytest.mark.parametrize(("particles", "completions"), [(2, 0), (4, 1), (16, 2)])
def test_the_mean_weight_is_the_normaliser(particles, completions):
    found = guidance.smc(DENSITY, RUNS, particles, completions=completions, resample_below=0.9, seed=3)
    mean = (found.log_weight.logsumexp(dim=1) - math.log(particles) - LOG_Z).exp()
    assert abs(float((mean.mean() - 1) / mean.std())) * RUNS**0.5 < Z
    assert found.reward_calls == RUNS * particles * (1 + completions * (LENGTH - 1))


def halves(laws):
    """The bias of the outcome that is most off, from each number of particles to twice as many.

    But for terms of the next order, a tenth of it here, and noise.
    """
    number = int((laws[0][0] - BEST).abs().argmax())
    off, noise = ([float(values[k][number]) for values in laws] for k in (0, 1))
    off = [bias - float(BEST[number]) for bias in off]
    for k in range(len(off) - 1):
        assert abs(off[k]) > 10 * noise[k]
        assert abs(off[k + 1] / off[k] - 0.5) < 0.1 + 3 * noise[k + 1] / abs(off[k])  # fixed seeds


def test_the_bias_of_particles_falls_with_their_number():
    laws = [law_of(guidance.smc(DENSITY, 6000, n, resample_below=1.0, seed=4 + n)) for n in (32, 64)]
    halves(laws)


def test_the_bias_of_proposals_falls_with_their_number():
    """One proposal is the base; the law of many is p*, though each value is of one completion."""
    base, spread = law_of(guidance.svdd(DENSITY, RUNS, 1, seed=5))
    assert float(((base - 1 / len(base)) / spread).abs().max()) < Z
    laws = [law_of(guidance.svdd(DENSITY, RUNS, n, seed=6 + n)) for n in (4, 8, 16)]
    halves(laws)
    assert guidance.svdd(DENSITY, 10, 8, completions=2, seed=0).reward_calls == 10 * 8 * (2 * (LENGTH - 1) + 1)


def test_a_run_draws_by_its_weights():
    weight = torch.log(torch.tensor([[1.0, 3.0]], dtype=torch.float64)).expand(RUNS, 2)
    found = guidance.Guided(torch.tensor([[[0], [1]]]).expand(RUNS, 2, 1), weight, 0)
    share = float(found.drawn(torch.Generator().manual_seed(7)).double().mean())
    assert abs(share - 0.75) < Z * (0.75 * 0.25 / RUNS) ** 0.5
