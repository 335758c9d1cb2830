"""Learners of other papers: what they ask for, by enumeration of all that they could draw, and where they end."""

import dataclasses
import itertools
import math

import pytest
import torch

from dam.ctmc import MaskedCTMC, enumeration
from dam.rollout import Trajectories
from experiments import interface, learners, policy, tables
from experiments.densities import Density
from tests import oracle

TOKENS, LENGTH = 3, 3
OUTCOMES = enumeration.states(TOKENS, LENGTH)
ORDERS = torch.tensor(list(itertools.permutations(range(LENGTH))))
# How often each outcome is drawn: a batch in which each is as often is the law itself.
BEST = torch.tensor([3, 1, 5, 2, 9, 1, 1, 4, 2, 1, 6, 1, 2, 2, 1, 8, 1, 3, 1, 1, 2, 4, 1, 1, 3, 1, 7])
OTHER = torch.tensor([2, 3, 2, 3, 4, 2, 4, 2, 3, 2, 2, 3, 4, 2, 3, 3, 2, 2, 3, 2, 4, 3, 2, 4, 2, 2, 3])


@dataclasses.dataclass(frozen=True)
class Known(Density):
    """log p* is a table of V^L numbers."""

    table: torch.Tensor
    tokens = TOKENS
    length = LENGTH

    def log_density(self, x):
        return self.table[enumeration.index_of(x, TOKENS)]


DENSITY = Known(BEST.double().log())


def singles():
    """Masks of a state as often as `MaskedCTMC.remask` draws them: 1 to 3, then which."""
    return [mask for mask in itertools.product((False, True), repeat=LENGTH) for _ in range((0, 1, 1, 3)[sum(mask)])]


def pairs():
    """Masks of two states that complete each other, the number of those of the first from 0 to 3."""
    times = (3, 1, 1, 3)
    masks = [mask for mask in itertools.product((False, True), repeat=LENGTH) for _ in range(times[sum(mask)])]
    return [(mask, tuple(not here for here in mask)) for mask in masks]


def configurations(learner):
    """All that re-masking an outcome may give, bool [R, M, L], each as likely."""
    if isinstance(learner, policy.SandwichedPolicyGradient):
        return torch.tensor(list(itertools.product(singles(), repeat=learner.masks)))
    if isinstance(learner, policy.DistributionMatching | policy.SequencePolicy):
        several = itertools.product(pairs(), repeat=learner.masks // 2)
        return torch.tensor([[one for one, _ in drawn] + [two for _, two in drawn] for drawn in several])
    return torch.zeros(1, 1, LENGTH, dtype=torch.bool)


@dataclasses.dataclass(frozen=True)
class EveryMask(MaskedCTMC):
    """Gives the n-th outcome the n-th of all masks."""

    masks: torch.Tensor = None

    def remask(self, initial, final, generator=None, *, antithetic=False):
        del generator, antithetic
        return torch.where(self.masks.repeat(len(final) // len(self.masks), 1, 1), initial, final)


class Enumerated(interface.DenoiserModel):
    """Draws every outcome as often as it is likely, by every order or, if outcomes are re-masked, with all masks."""

    def __init__(self, counts, masks, density=DENSITY):
        joint = (counts.double() / counts.sum()).view((TOKENS,) * LENGTH)
        super().__init__(oracle.table(joint), density, learning_rate=1e-2)
        self.process = EveryMask(TOKENS, masks=masks)
        # The model is consistent: how likely an outcome is does not depend on the order.
        position = ORDERS if len(masks) == 1 else ORDERS[:1].expand(len(masks), -1)
        self.final = OUTCOMES.repeat_interleave(counts, dim=0).repeat_interleave(len(position), dim=0)
        self.position = position.repeat(int(counts.sum()), 1)

    def sampled(self, initial, seed):
        assert len(initial) == len(self.final)
        path = Trajectories(
            initial=initial,
            final=self.final,
            position=self.position,
            token=self.final.gather(1, self.position),
            call=torch.arange(LENGTH).expand_as(self.position),
            log_prob=torch.zeros(self.position.shape, dtype=torch.float64),
        )
        return dataclasses.replace(path, log_prob=self.path_log_prob(path))

    def gradient(self, loss):
        (found,) = torch.autograd.grad(loss, self.network.logits)
        return found

    def asked(self, learner):
        """The gradient of a learner's expected loss at its first step."""
        return self.gradient(self.loss(next(iter(learner.round(self, 0, 0.0).steps))))


def elbo(model, outcomes):
    """E over masks of (L / m) sum_i log p(x_i | i, state), of each outcome, differentiable."""
    total = torch.zeros(len(outcomes), dtype=torch.float64)
    for mask in singles():
        state = torch.where(torch.tensor(mask), TOKENS, outcomes)
        log_prob = model.network.logits[model.network.index(state)][..., :TOKENS].log_softmax(dim=2)
        told = log_prob.gather(2, outcomes[..., None])[..., 0]
        total = total + told[:, torch.tensor(mask)].sum(dim=1) * LENGTH / sum(mask) / len(singles())
    return total


def made(name, counts=BEST, **options):
    learner = learners.learner(name, DENSITY, batch=1, seed=0)
    for key, value in options.items():
        setattr(learner, key, value)
    model = Enumerated(counts, configurations(learner))
    learner.batch = len(model.final)
    return learner, model


TO_THE_OPTIMUM = ("log-variance", "trajectory balance", "DMPO, mean", "SPG, KL")


@pytest.mark.parametrize("name", TO_THE_OPTIMUM)
def test_nothing_is_asked_at_the_optimum(name):
    """On no trajectory, so that the gradient has no noise there; elsewhere something is."""
    learner, model = made(name)
    if name == "trajectory balance":
        learner.log_z = float(BEST.sum().double().log() - LENGTH * math.log(TOKENS))
    for targets in learner.round(model, 0, 0.0).steps:
        # Float64 rounding of logarithms and of a softmax over 6,000 and more.
        assert float(targets.weight.abs().max()) < 1e-11
    learner, model = made(name, OTHER)
    assert float(model.asked(learner).abs().max()) > 1e-3


def test_losses_of_paths_have_the_gradient_of_the_divergence_of_paths():
    law = (BEST.double() / BEST.sum()).log() - math.log(len(ORDERS))
    _, model = made("log-variance", OTHER)
    log_prob = model.network.logits[..., :TOKENS].log_softmax(dim=2)
    log_prob = tables.path_log_prob(log_prob, TOKENS) - math.log(len(ORDERS))
    divergence = model.gradient((log_prob.exp() * (log_prob - law)).sum() / LENGTH)
    for name in ("log-variance", "trajectory balance"):
        learner, model = made(name, OTHER)
        torch.testing.assert_close(model.asked(learner), divergence, rtol=0, atol=1e-13)
    assert float(divergence.abs().max()) > 1e-3


def test_trajectory_balance_learns_the_normaliser():
    """Of base and reward: log of the mean of exp(r) over the base."""
    learner, model = made("trajectory balance")
    learner.steps = 20
    list(learner.round(model, 0, 0.0).steps)
    exact = float(DENSITY.table.logsumexp(dim=0) - LENGTH * math.log(TOKENS))
    assert math.isclose(learner.log_z, exact, rel_tol=0.75**19)


@pytest.mark.parametrize(("name", "sign"), [("DMPO, mean", 0), ("DMPO", -1)])
def test_the_centred_cross_entropy_is_of_two_laws(name, sign):
    """-E[ELBO] of p* plus that of what is subtracted: the model's own law, or the one that dislikes the reward."""
    learner, model = made(name, OTHER)
    best, away = BEST.double() / BEST.sum(), OTHER.double() / OTHER.sum()
    if sign:
        away = torch.softmax(-DENSITY.table, dim=0)
    expected = model.gradient(((away - best) * elbo(model, OUTCOMES)).sum() / LENGTH)
    torch.testing.assert_close(model.asked(learner), expected, rtol=0, atol=1e-13)
    assert float(expected.abs().max()) > 1e-3


def test_what_espo_is_off_by_is_the_covariance_of_its_estimates():
    """At p* its gradient is not 0, and half as large with twice the pairs of masks."""
    two, four = (model.asked(learner) for learner, model in (made("ESPO"), made("ESPO", masks=4)))
    assert float(two.abs().max()) > 1e-3
    torch.testing.assert_close(four, two / 2, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", policy.ELSEWHERE)
def test_the_fixed_point_of_these_is_another(name):
    learner, model = made(name)
    asked = model.asked(learner)
    assert float(asked.abs().max()) > 1e-3
    if name == "d1":  # its likelihood is of one state
        rest = torch.ones(len(asked), dtype=torch.bool)
        rest[-1] = False
        assert bool((asked[rest] == 0).all())
