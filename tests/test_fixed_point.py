"""Where weights lead whose base is a network: its conditionals are not those of one joint law. By enumeration."""

import itertools
import math

import pytest
import torch

from dam import diagnostics
from dam.adjoint import estimator_loss, group_targets, tilted_weights
from dam.ctmc import MaskedCTMC
from dam.rollout import PathLogProbs, log_prob_over_orders, rollout
from tests import oracle

N, V = 3, 4
FINALS = oracle.sequences(N, V)
PROCESS = MaskedCTMC(V)
SEEDS = range(5)
Z = 6.0


def paths(seed):
    """log p_base(x | order) [N!, V^N] of an inconsistent base."""
    return oracle.path_log_prob(oracle.inconsistent(N, V, seed), N, V)


def reward_of(seed, scale=1.0):
    return scale * torch.randn(V**N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(base, model, reward, beta, h):
    """The law of weighted outcomes in expectation: every path stands for itself as often as the model draws it."""
    # weight ~ exp(h l) of paths of probability p is that of equally likely ones with l + log(p) / h.
    log_ratio = base - model + model / h
    weights, _ = tilted_weights(log_ratio.view(1, -1, 1), reward.expand_as(base).reshape(1, -1), beta=beta, max_tilt=h)
    law = weights.weight.view_as(base).sum(dim=0)
    return law / law.sum()


def settled(base, reward, beta, h):
    """The law that steps h end at; from the first on the model has the conditionals of one law, by `posterior`."""
    model = base
    for _ in range(int(30 / h)):  # what is left of the start is (1 - h)^(30 / h), or nothing: 1e-13
        model = step(base, model, reward, beta, h).log().expand_as(base)
    return model[0].exp()


def power_mean(base, reward, beta, h):
    law = (base * h).exp().mean(dim=0) ** (1 / h) * (reward / beta).exp()
    return law / law.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_capped_steps_end_at_the_power_mean_over_orders(seed):
    base = paths(seed)
    for reward in (reward_of(seed), torch.zeros(V**N, dtype=torch.float64)):
        optimum = power_mean(base, reward, 0.5, 1.0)
        torch.testing.assert_close(settled(base, reward, 0.5, 1.0), optimum, rtol=1e-9, atol=0)
        away = []
        for h in (0.5, 0.2):
            law = settled(base, reward, 0.5, h)
            torch.testing.assert_close(law, power_mean(base, reward, 0.5, h), rtol=1e-6, atol=0)
            away.append(oracle.kl(optimum, law))
        # Not p*, nor the base's own law where there is no reward; the further, the shorter the steps.
        assert 1e-4 < away[0] < away[1] and away[1] > 1e-3


@pytest.mark.parametrize("h", [1.0, 0.2])
def test_a_model_of_that_law_is_asked_for_nothing_more(h):
    """The gradient of the loss on all re-masked outcomes, weighted in expectation, at the table of the power mean."""
    base, reward = paths(0), reward_of(0)
    law = power_mean(base, reward, 0.5, h)
    weight = step(base, law.log().expand_as(base), reward, 0.5, h)
    subsets = [s for s in itertools.product([False, True], repeat=N) if any(s)]
    states = torch.stack([torch.where(torch.tensor(s), V, FINALS) for s in subsets])  # [subsets, V^N, N]
    # The number of masks is uniform, then the subset.
    share = torch.tensor([1 / N / [3, 3, 1][sum(s) - 1] for s in subsets], dtype=torch.float64)
    model = oracle.table(law.view((V,) * N))
    targets = group_targets(
        "posterior",
        states.view(1, -1, N),
        FINALS.expand_as(states).reshape(1, -1, N),
        (share[:, None] * weight).view(1, -1) * states.shape[0] * states.shape[1],
        PROCESS,
    )
    (gradient,) = torch.autograd.grad(estimator_loss(model, targets, PROCESS), model.logits)
    assert float(gradient.abs().max()) < 1e-12  # rounding of probabilities


def drawn_over_orders(model, base, count):
    """(probability, outcome, PathLogProbs) of every outcome and `count` orders, the first the one it was drawn in."""
    orders = torch.tensor(list(itertools.product(range(len(base)), repeat=count)))  # [P, M]
    every = PathLogProbs(model[orders].transpose(1, 2), base[orders].transpose(1, 2))  # [P, V^N, M]
    return every.log_prob[..., 0].exp() / len(orders), every


@pytest.mark.parametrize("count", [1, 2, 3])
def test_averaged_over_orders_weights_keep_their_mean_and_lose_variance(count):
    """At a model as inconsistent as its base. Weights exp(log_ratio) are p_base(x) in expectation, at every M."""
    model, base = paths(1), paths(0)
    probability, every = drawn_over_orders(model, base, count)
    mean = (probability * every.log_ratio.exp()).sum(dim=0)
    torch.testing.assert_close(mean, base.exp().mean(dim=0), rtol=1e-12, atol=0)
    if count > 1:
        fewer, before = drawn_over_orders(model, base, count - 1)
        moments = [float((p * e.log_ratio.exp() ** 2).sum()) for p, e in ((probability, every), (fewer, before))]
        assert moments[0] < 0.9 * moments[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_of_outcomes_by_a_few_orders(seed):
    """In expectation. Mixtures over M orders fall to the law's KL about as 1 / M: extrapolated, two tell most of it."""
    model, base = paths(seed + 1), paths(seed)
    outcomes = oracle.kl(model.exp().mean(dim=0), base.exp().mean(dim=0))
    path = float((model.exp() * (model - base)).sum() / len(model))
    mixtures, estimates = [path], []
    for count in (2, 3, 4):
        probability, every = drawn_over_orders(model, base, count)
        mixtures.append(-float((probability * every.log_ratio).sum()))
        # What `kl_outcome` computes, of paths and orders as often as they are drawn.
        own = every.base_log_prob[..., 0] - every.log_prob[..., 0]
        estimates.append(path - count / (count - 1) * float((probability * (every.log_ratio - own)).sum()))
    assert mixtures == sorted(mixtures, reverse=True) and mixtures[-1] > outcomes > 0
    errors = [abs(estimate - outcomes) for estimate in estimates]
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.2 * (path - outcomes)
    assert errors[2] < 0.1 * (path - outcomes)


def test_figures_of_orders_are_those_of_what_was_drawn():
    """By hand: of one outcome in two orders, and of one order nothing."""
    two = PathLogProbs(torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.5, -4.0]]).double())
    log_ratio = torch.tensor([[[-0.5]], [[0.7]]], dtype=torch.float64)
    over_both = float(two.base_log_prob.exp().sum().log() - two.log_prob.exp().sum().log())
    assert diagnostics.kl_outcome(log_ratio, two) == pytest.approx(-0.1 - 2 * (over_both - -0.5), rel=1e-12)
    assert diagnostics.order_variance(two) == pytest.approx((-0.5 - -2.0) ** 2 / 2, rel=1e-12)
    one = PathLogProbs(two.log_prob[:, :1], two.base_log_prob[:, :1])
    assert math.isnan(diagnostics.kl_outcome(log_ratio, one)) and math.isnan(diagnostics.order_variance(one))


def test_left_out_weights_have_the_law_of_infinitely_many_trajectories():
    """All 4^3 draws of K = 3 from four outcomes; self-normalised weights pull back to the model."""
    law = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    # No outcome outweighs two others together, where the bound would bind.
    score = torch.tensor([0.0, 0.3, 0.5, 0.6]).double()
    draws = torch.tensor(list(itertools.product(range(4), repeat=3)))
    probability = law[draws].prod(dim=1)
    exact = law * score.exp() / (law * score.exp()).sum()
    errors, short = [], []
    for leave_one_out in (True, False):
        weights, _ = tilted_weights(
            torch.zeros(*draws.shape, 1).double(), score[draws], beta=1.0, leave_one_out=leave_one_out
        )
        found = (
            torch.zeros(4).double().index_add_(0, draws.flatten(), (probability[:, None] * weights.weight).flatten())
        )
        found /= found.sum()
        errors.append(float((found / exact - 1).abs().max()))
        short.append(oracle.kl(found, law) / oracle.kl(exact, law))
    assert errors[0] < 1e-12 and errors[1] > 0.03 and short[1] < 0.7 < short[0]


def test_left_out_weights_are_bounded():
    """By K, and by e^clip, both counted as clipped; forbidden outcomes and equal ones as without."""
    zeros = torch.zeros(4, 4, 1)
    inf = torch.inf
    reward = torch.tensor([[0.0, 0, 0, 9], [-inf, 1, -inf, -inf], [-inf] * 4, [1.0] * 4])
    weights, _ = tilted_weights(zeros, reward, beta=1.0, leave_one_out=True)
    assert weights.weight[0, 3] == weights.weight[1, 1] == 4.0
    torch.testing.assert_close(
        weights.weight[0, :3], torch.full((3,), 3 / (2 + torch.tensor(9.0).exp()).item()).double()
    )
    assert weights.weight[1].tolist() == [0, 4, 0, 0] and weights.weight[2].tolist() == [0.0] * 4
    torch.testing.assert_close(weights.weight[3], torch.ones(4).double())
    assert weights.clipped.tolist() == [0.25, 0.25, 0.0, 0.0]
    clipped, _ = tilted_weights(zeros, reward, beta=1.0, leave_one_out=True, clip=1.0)
    assert float(clipped.weight.max()) == pytest.approx(torch.tensor(1.0).double().exp().item())
    assert clipped.clipped.tolist() == [0.25, 0.25, 0.0, 0.0]


# ---- trajectories that the base drew


def weighed_paths(base, model, reward, h, share):
    """The law of weighted outcomes in expectation, where a share of each group comes from the base; and the weights."""
    log_path, count = (base - model).view(1, -1), base.numel()
    drawn = torch.logaddexp(math.log(1 - share) + model, math.log(share) + base).view(1, -1)
    weights, _ = tilted_weights(
        log_path[..., None],
        # Every path stands for itself, as often as it is drawn, as in `step`.
        reward.expand_as(base).reshape(1, -1) + 0.5 * drawn / h,
        beta=0.5,
        max_tilt=h,
        from_base=(torch.arange(count) < share * count)[None],
    )
    law = weights.weight.view_as(base).sum(dim=0)
    return law / law.sum(), weights


@pytest.mark.parametrize("share", [0.125, 0.5])
@pytest.mark.parametrize("h", [1.0, 0.3])
def test_trajectories_of_the_base_are_weighed_as_those_of_the_mixture(h, share):
    """The same law as with the model's alone, for a model as inconsistent as its base; at h = 1 it is p*."""
    base, model, reward = paths(0), paths(1), reward_of(0)
    law, _ = weighed_paths(base, model, reward, h, share)
    torch.testing.assert_close(law, step(base, model, reward, 0.5, h), rtol=1e-10, atol=0)
    if h == 1.0:
        torch.testing.assert_close(law, power_mean(base, reward, 0.5, 1.0), rtol=1e-10, atol=0)


def test_an_outcome_that_the_model_has_lost_has_a_bounded_weight():
    """At most 1 / s of the base's, whatever the model says; without the base's trajectories it has no bound."""
    base, model = paths(0), paths(1)
    model[:, 5] -= 40.0
    zeros = torch.zeros(V**N, dtype=torch.float64)
    _, weights = weighed_paths(base, model, zeros, 1.0, 0.25)
    assert float(weights.log_path[..., 0].max()) == pytest.approx(math.log(4.0), abs=1e-9)
    alone, _ = tilted_weights((base - model).view(1, -1, 1), zeros.expand_as(base).reshape(1, -1), beta=0.5)
    assert float(alone.log_path.max()) > 35


def test_what_the_base_drew_does_not_shorten_steps():
    """h follows from the ESS of the model's own trajectories, of as many as these are."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 16, 1, generator=generator, dtype=torch.float64)
    reward = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    from_base = (torch.arange(16) >= 12).expand(3, -1)
    far = torch.where(from_base[..., None], log_ratio + 30.0, log_ratio)
    options = {"beta": 0.2, "max_tilt": 1.0}
    found, wanted = [], tilted_weights(log_ratio[:, :12], reward[:, :12], ess=3.0, **options)[1]
    for ratio in (log_ratio, far):
        weights, h = tilted_weights(ratio, reward, ess=4.0, from_base=from_base, **options)
        found.append(h)
        assert bool((weights.weight >= 0).all()) and bool((weights.weight.mean(dim=1) - 1 < 1e-9).all())
    for h in found:
        torch.testing.assert_close(h, wanted, rtol=1e-9, atol=0)
    assert 0 < float(wanted.min()) and float(wanted.max()) < 1
    # None of them: as without.
    none, _ = tilted_weights(log_ratio, reward, ess=4.0, from_base=torch.zeros(3, 16).bool(), **options)
    torch.testing.assert_close(none.weight, tilted_weights(log_ratio, reward, ess=4.0, **options)[0].weight)


def test_figures_of_a_model_leave_out_what_its_base_drew():
    """kl_path is of the model's trajectories; the effective sample size of path weights is of all."""
    log_ratio = torch.tensor([[[-0.5], [-0.7], [2.0], [1.0]]], dtype=torch.float64)
    from_base = torch.tensor([[False, False, True, True]])
    weights, _ = tilted_weights(log_ratio, torch.zeros(1, 4), beta=1.0, from_base=from_base)
    told = diagnostics.diagnose(
        weights, log_ratio, torch.zeros(1, 4, 1).long(), torch.ones(1, 1).bool(), from_base=from_base
    )
    assert told.kl_path == pytest.approx(0.6)
    ratio = log_ratio[0, :, 0].exp()
    weight = ratio / (0.5 + 0.5 * ratio)
    assert told.ess_path == pytest.approx(float(weight.sum() ** 2 / weight.square().sum()), rel=1e-6)
    torch.testing.assert_close(weights.weight[0], 4 * weight / weight.sum())


# ---- other orders of outcomes that were drawn


MODEL, BASE = oracle.inconsistent(N, V, 11), oracle.inconsistent(N, V, 12)


def looked_at(tokens, seed=3, orders=3, **changes):
    row_ids = changes.pop("row_ids", torch.arange(len(tokens)))
    way = rollout(MODEL, tokens, PROCESS, base=BASE, seed=seed, row_ids=row_ids, **changes)
    return way, log_prob_over_orders(MODEL, BASE, way, PROCESS, orders=orders, seed=seed, row_ids=row_ids, **changes)


def test_orders_are_uniform_and_apart_and_log_probs_those_of_the_tables():
    """The path's own and two others: all 6^3 triples are equally likely."""
    way, found = looked_at(torch.full((4000, N), V))
    assert found.log_prob.dtype == torch.float64
    torch.testing.assert_close(found.log_prob[:, 0], way.log_prob.double().sum(dim=1), rtol=0, atol=0)
    torch.testing.assert_close(found.base_log_prob[:, 0], way.base_log_prob.double().sum(dim=1), rtol=0, atol=0)
    outcome = (way.final * torch.tensor([V * V, V, 1])).sum(dim=1)
    every = [oracle.path_log_prob(table, N, V)[:, outcome, None] for table in (MODEL, BASE)]  # [N!, B, 1]
    away = sum((e - f).abs() for e, f in zip(every, found, strict=True))  # [N!, B, 3]
    assert float(away.min(dim=0).values.max()) < 1e-5  # float32, six log-probabilities
    triple = (away.argmin(dim=0) * torch.tensor([36, 6, 1])).sum(dim=1)
    counts = torch.bincount(triple, minlength=216).double()
    assert abs(oracle.chi_square_z(counts, torch.full((216,), 1 / 216, dtype=torch.float64))) < Z


def test_other_orders_depend_on_seed_row_and_number_only():
    tokens = torch.full((50, N), V)
    _, whole = looked_at(tokens)
    _, part = looked_at(tokens[7:20], row_ids=torch.arange(7, 20))
    _, more = looked_at(tokens, orders=4)
    for a, b, c in zip(whole, part, more, strict=True):
        assert torch.equal(a[7:20], b) and torch.equal(a, c[:, :3])
    assert not torch.equal(whole.log_prob, looked_at(tokens, seed=4)[1].log_prob)


def test_other_orders_keep_what_is_given_blocks_and_steps():
    """One mask, one call, or blocks of one position have one order."""
    for tokens, changes in (
        (torch.tensor([[0, V, 2], [1, 1, V]]), {}),
        (torch.full((20, N), V), {"steps": 1}),
        (torch.full((20, N), V), {"block_length": 1}),
    ):
        _, found = looked_at(tokens, **changes)
        for log_prob in found:
            torch.testing.assert_close(log_prob, log_prob[:, :1].expand_as(log_prob), rtol=0, atol=1e-6)
    _, found = looked_at(torch.full((20, N), V), block_length=2)
    assert bool((found.log_prob.var(dim=1) > 0).any())


def test_bad_arguments_of_orders_are_named():
    way = rollout(MODEL, torch.full((2, N), V), PROCESS, seed=0)
    with pytest.raises(ValueError, match="pass base= to rollout"):
        log_prob_over_orders(MODEL, BASE, way, PROCESS, orders=2, seed=0)
    with pytest.raises(ValueError, match="orders must be at least 1; got 0"):
        log_prob_over_orders(MODEL, BASE, way, PROCESS, orders=0, seed=0)
