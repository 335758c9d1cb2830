"""Learners of other papers: what they ask for, by enumeration of all that they could draw, and where they end."""

import dataclasses
import itertools
import math

import pytest
import torch

from dam.ctmc import MaskedCTMC, enumeration
from dam.rollout import Trajectories
from experiments import grid, interface, learners, policy, tables
from experiments.densities import Density, Grid
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each
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


# ---- what they ask for, by autograd through the objectives


def drawn(model, masks, count=200, *, antithetic):
    """Re-masked outcomes, and log p of what is masked as a function [B, M, L] of the table's logits."""
    learner = learners.learner("ESPO", DENSITY, batch=count, seed=4)
    final = OUTCOMES[torch.randint(len(OUTCOMES), (count,), generator=learner.generator)]
    remasked = policy.Remasked.of(learner, model, final, masks, antithetic=antithetic)
    log_prob = model.network.logits[model.network.index(remasked.states)][..., :TOKENS].log_softmax(dim=3)
    return remasked, torch.where(remasked.masked, log_prob.gather(3, remasked.final[..., None])[..., 0], 0.0)


def table():
    """A model whose states are as `MaskedCTMC.remask` draws them."""
    model = Enumerated(OTHER, torch.zeros(1, 1, LENGTH, dtype=torch.bool))
    model.process = MaskedCTMC(TOKENS)
    return model


@pytest.mark.parametrize("antithetic", [False, True])
def test_estimates_of_the_lower_bound_have_its_mean(antithetic):
    model = table()
    remasked, log_prob = drawn(model, 2, 40_000, antithetic=antithetic)
    exact = elbo(model, remasked.final[:, 0]).detach() / LENGTH
    off = (remasked.bound(log_prob) - exact).detach()
    torch.testing.assert_close(remasked.log_prob(model), log_prob.detach(), rtol=0, atol=1e-14)
    assert abs(float(off.mean() / off.std())) * len(off) ** 0.5 < Z and float(off.std()) > 0.05


def test_spg_is_between_two_bounds():
    model, learner = table(), learners.learner("SPG", DENSITY, batch=200, seed=0)
    learner.masks = 3
    remasked, log_prob = drawn(model, 3, antithetic=False)
    advantage = torch.randn(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total = 0.0
    for b in range(200):
        lower = sum(log_prob[b, n][remasked.masked[b, n]].mean() for n in range(3)) / 3
        seen = [i for i in range(LENGTH) if bool(remasked.masked[b, :, i].any())]
        upper = 0.0
        for i in seen:
            of = [n for n in range(3) if bool(remasked.masked[b, n, i])]
            terms = [log_prob[b, n, i].exp() ** 1.5 * LENGTH / remasked.masked[b, n].sum() for n in of]
            upper = upper + (sum(terms) / 3).log() / 1.5 / len(seen)
        total = total + advantage[b] * (lower if advantage[b] > 0 else (lower + upper) / 2)
    asked = remasked.targets(advantage[:, None, None] * learner.gradient(remasked, model, advantage < 0))
    torch.testing.assert_close(model.gradient(model.loss(asked)), model.gradient(-total / 200), rtol=0, atol=1e-14)


def test_espo_clips_the_ratio_to_the_model_that_drew():
    """The second step on a batch, after the model has changed: ratios beyond the clip ask for the KL alone."""
    learner, model = learners.learner("ESPO", DENSITY, batch=400, steps=2, seed=0), table()
    model.masks, model.final = None, OUTCOMES[torch.randint(27, (400,), generator=torch.Generator().manual_seed(6))]
    model.position = ORDERS[:1].expand(400, -1)
    steps = iter(learner.round(model, 0, 0.0).steps)
    next(steps)
    replayed = learners.learner("ESPO", DENSITY, batch=400, steps=2, seed=0)
    remasked = [policy.Remasked.of(replayed, model, model.final, 2, antithetic=True) for _ in range(2)][1]
    old = remasked.bound(remasked.log_prob(model))
    with torch.no_grad():
        model.network.logits += 0.5 * torch.randn(
            model.network.logits.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        )
    log_prob = model.network.logits[model.network.index(remasked.states)][..., :TOKENS].log_softmax(dim=3)
    log_prob = log_prob.gather(3, remasked.final[..., None])[..., 0]
    bound = (log_prob * remasked.share).sum(dim=2).mean(dim=1)
    base = -math.log(TOKENS) * remasked.share.sum(dim=2).mean(dim=1)
    reward = DENSITY.log_density(model.final)
    advantage, ratio = reward - reward.mean(), (bound - old).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    objective = objective - LENGTH / 2 * (bound - base).square()
    expected = model.gradient(-objective.mean())
    assert 0.1 < float(((ratio > 1.2) | (ratio < 0.8)).double().mean()) < 0.9
    torch.testing.assert_close(model.gradient(model.loss(next(steps))), expected, rtol=0, atol=1e-14)


# ---- where they end


class Waves(Grid):
    """Two tokens of four values that say much of each other."""

    def table(self):
        return torch.tensor(
            [[0.0, 1.0, -0.5, 0.3], [1.2, -0.4, 0.8, 0.0], [-0.6, 0.5, 0.2, 1.0], [0.4, -0.2, 0.9, -1.0]]
        )


def trained(name):
    """Laws, of 100 rounds of 512 calls and p*, float64 [4, 4]."""
    torch.manual_seed(0)
    density = Waves("pinwheel", 4)
    model = grid.GridModel(density, learning_rate=1e-2)
    learner = learners.learner(name, density, batch=512, seed=0)
    for n in range(100):
        for targets in learner.round(model, n, n / 100).steps:
            model.step(targets, n / 100)
    return model.law(), density.law().view(4, 4).double()


@pytest.mark.parametrize("name", TO_THE_OPTIMUM)
def test_training_ends_at_the_optimum(name):
    """KL of the base is 0.18; four seeds ended below 4e-4."""
    law, best = trained(name)
    assert grid.divergences(best, law)["kl"] < 1e-3


def test_without_a_divergence_the_best_outcome_is_all_that_is_left():
    law, best = trained("SPG")
    assert law.argmax() == best.argmax() and float(law.max()) > 0.95 > 3 * float(best.max())


def test_outcomes_that_the_negative_law_likes_more_are_lost():
    """DMPO as its code has it: p- ~ 1 / p* here. In a hundred rounds, most of their mass."""
    law, best = trained("DMPO")
    disliked = (1 / best) / (1 / best).sum() > best
    assert float(law[disliked].sum()) < 0.2 * float(best[disliked].sum())
