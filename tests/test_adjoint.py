"""Tabular truth: on tables small enough to enumerate, every estimator matches Q* and nothing else."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import dam
from dam.adjoint import ESTIMATORS, MatchingTargets, estimator_loss, group_targets, state_targets, tilted_weights
from dam.rollout import rollout
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each


def enumerated(joint, state):
    """Outcome and first jump of all trajectories from `state`; the order of later jumps is summed over."""
    tokens = joint.shape[0]
    masked = (state == tokens).nonzero().flatten().tolist()
    finals = []
    for values in itertools.product(range(tokens), repeat=len(masked)):
        final = state.clone()
        final[masked] = torch.tensor(values)
        finals.extend([final] * len(masked))
    return torch.stack(finals), torch.tensor(masked).repeat(len(finals) // len(masked))


def target_mass(targets, states, positions, tokens):
    """Weight that targets put on (position, token) of each state: [states, N, V]."""
    mass = torch.zeros(states, positions, tokens, dtype=torch.float64)
    rows = targets.row[:, None].expand_as(targets.target)
    where = targets.position[:, None].expand_as(targets.target)
    used = targets.target >= 0
    mass.index_put_((rows[used], where[used], targets.target[used]), targets.weight[used].double(), accumulate=True)
    return mass


def exact_target(joint, state):
    """(1/m) p(v | i, state) at masked positions, 0 elsewhere."""
    masked = state == joint.shape[0]
    return oracle.conditional(joint, state) * masked[:, None] / masked.sum()


def merged(batches):
    """Targets of several states as one; slots that a state does not use stay empty."""
    width = max(targets.target.shape[1] for targets in batches)
    empty = [width - targets.target.shape[1] for targets in batches]
    return MatchingTargets(
        states=torch.cat([targets.states for targets in batches]),
        group=torch.arange(len(batches)),
        row=torch.cat([targets.row + n for n, targets in enumerate(batches)]),
        position=torch.cat([targets.position for targets in batches]),
        target=torch.cat([F.pad(t.target, (0, e), value=-1) for t, e in zip(batches, empty, strict=True)]),
        weight=torch.cat([F.pad(t.weight, (0, e)) for t, e in zip(batches, empty, strict=True)]),
    )


STATES = [torch.tensor(s) for s in ([3, 3, 3], [3, 1, 3], [0, 3, 3], [2, 2, 3])]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_exact_loss_is_minimised_at_the_optimum(estimator):
    joint = oracle.random_joint(3, 3, seed=2)
    cost = oracle.neighbour_cost(joint, seed=3)
    optimum, process = oracle.tilted(joint, cost), oracle.process(joint)
    model = oracle.table(optimum)
    for state in STATES:
        final, first = enumerated(joint, state)
        # Every trajectory with its probability under p*: the limit of many samples.
        share = optimum[tuple(final.T)] / optimum[tuple(final.T)].sum()
        weight = (len(share) * share)[None]
        loss = torch.zeros((), dtype=torch.float64)
        if estimator == "first_jump_one":  # its expectation over the trajectory that is picked
            for k in range(len(share)):
                picked = state_targets(
                    estimator,
                    state[None],
                    final[None, k : k + 1],
                    first[None, k : k + 1],
                    weight[:, k : k + 1],
                    process,
                )
                loss = loss + estimator_loss(model, picked, process) / len(share)
        else:
            targets = state_targets(estimator, state[None], final[None], first[None], weight, process)
            loss = estimator_loss(model, targets, process)
        (gradient,) = torch.autograd.grad(loss, model.logits)
        # Zero up to float64 rounding of sums of numbers of order one: a stationary point of a convex loss.
        assert float(gradient.abs().max()) < 1e-13
        away = oracle.perturbed(model, 0.1, seed=4)
        targets = state_targets("posterior", state[None], final[None], first[None], weight, process)
        with torch.no_grad():
            assert estimator_loss(away, targets, process) > estimator_loss(model, targets, process)


def test_training_on_the_exact_loss_reaches_the_optimum():
    joint = oracle.random_joint(3, 3, seed=5)
    cost = oracle.neighbour_cost(joint, seed=6)
    optimum, process = oracle.tilted(joint, cost), oracle.process(joint)
    model = oracle.table(joint)
    start = oracle.kl(optimum, oracle.generated(model, 3, 3))
    states = torch.stack([s for s in oracle.sequences(3, 4) if bool((s == 3).any())])
    optimizer = torch.optim.Adam([model.logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    batches = []
    for state in states:
        final, first = enumerated(joint, state)
        # Under the model, weight p_u times path weight p_base / p_u times e^{-g}: the model drops out.
        log_weight = joint[tuple(final.T)].log() - cost[tuple(final.T)]
        weights = dam.adjoint_weights(torch.zeros(1, len(final), 0, dtype=torch.float64), -log_weight[None])
        batches.append(state_targets("posterior", state[None], final[None], first[None], weights.weight, process))
    everything = merged(batches)
    for _ in range(300):
        loss = estimator_loss(model, everything, process)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert start > 1e-2
    assert oracle.kl(optimum, oracle.generated(model, 3, 3)) < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampled_targets_average_to_the_optimum_when_the_model_is_the_optimum(estimator):
    """At the optimum weights are constant, so the normaliser has no bias and the mean is exactly (1/m) p*(v | i, x)."""
    joint = oracle.random_joint(4, 3, seed=7)
    cost = oracle.neighbour_cost(joint, seed=8)
    optimum, process = oracle.tilted(joint, cost), oracle.process(joint)
    base, model = oracle.table(joint).float(), oracle.table(optimum).float()
    state, groups, size = torch.tensor([3, 1, 3, 3]), 2000, 8
    trajectories = rollout(model, state.expand(groups * size, 4), process, base=base, seed=9)
    final = trajectories.final.view(groups, size, 4)
    reward = -cost[tuple(final.flatten(0, 1).T)].view(groups, size)
    weights, tilt = tilted_weights(trajectories.log_ratio.view(groups, size, -1), reward, beta=1.0, ess=4.0)
    assert bool((tilt == 1).all())
    torch.testing.assert_close(weights.weight, torch.ones_like(weights.weight), rtol=0, atol=1e-5)  # float32 log-probs
    targets = state_targets(
        estimator,
        state.expand(groups, 4),
        final,
        trajectories.position[:, 0].view(groups, size),
        weights.weight,
        process,
        generator=torch.Generator().manual_seed(10),
    )
    mass = target_mass(targets, groups, 4, 3)
    exact = exact_target(optimum, state)
    z = (mass.mean(0) - exact) / (mass.std(0) / groups**0.5).clamp(min=1e-12)
    assert float(z[state == 3].abs().max()) < Z
    assert float(mass[:, state != 3].abs().max()) == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_targets_are_the_optimums_conditionals_at_every_state(estimator):
    joint = oracle.random_joint(3, 2, seed=11)
    process, model = oracle.process(joint), oracle.table(joint).float()
    groups, size = 6000, 4
    generator = torch.Generator().manual_seed(12)
    blank = torch.full((groups * size, 3), 2)
    final = rollout(model, blank, process, seed=13).final.view(groups, size, 3)
    states = process.remask(torch.full_like(final, 2), final, generator)
    targets = group_targets(estimator, states, final, torch.ones(groups, size), process, generator=generator)
    expected_states = groups if estimator == "first_jump_one" else groups * size
    assert len(targets.states) == expected_states
    # Each state's rows weigh 1 in all.
    total = torch.zeros(expected_states).index_add_(0, targets.row, targets.weight[:, 0])
    torch.testing.assert_close(total, torch.ones(expected_states))
    seen = 0
    index = model.index(targets.states[targets.row])
    for state in oracle.sequences(3, 3):
        for i in (state == 2).nonzero().flatten().tolist():
            rows = (index == model.index(state)) & (targets.position == i)
            count = int(rows.sum())
            if count < 50:
                continue
            seen += 1
            share = float((targets.target[rows, 0] == 1).double().mean())
            expected = float(oracle.conditional(joint, state)[i, 1])
            assert abs(share - expected) < Z * (expected * (1 - expected) / count) ** 0.5
    assert seen >= 20  # of the 27 pairs of a state and a masked position of it


def test_drawn_outcomes_have_the_expectation_of_weighted_ones():
    process = oracle.process(oracle.random_joint(2, 3, seed=14))
    final = torch.tensor([[[0, 1], [1, 2], [2, 0]]])
    states = torch.full_like(final, 3)
    weight = torch.tensor([[0.0, 0.6, 2.4]])
    draws = 20_000
    targets = group_targets(
        "posterior", states, final, weight, process, draw=draws, generator=torch.Generator().manual_seed(15)
    )
    drawn = target_mass(targets, draws, 2, 3).mean(0)
    weighted = target_mass(group_targets("posterior", states, final, weight, process), 3, 2, 3).mean(0)
    # A share of 0.8 of 20,000 draws has standard deviation 0.003, times at most 1/2 for two positions.
    torch.testing.assert_close(drawn, weighted, rtol=0, atol=Z * 0.003 / 2)
    assert float(drawn[0, 0]) == 0, "an outcome of weight zero was drawn"


def estimation_errors(sampler, base, optimum, cost, state, size=16, repeats=1000):
    """Total squared error of each estimator's target at one state, and the mean of the weight first_jump_one uses."""
    process, positions, tokens = oracle.process(optimum), optimum.dim(), optimum.shape[0]
    trajectories = rollout(sampler, state.expand(repeats * size, positions), process, base=base, seed=16)
    final = trajectories.final.view(repeats, size, positions)
    reward = -cost[tuple(final.flatten(0, 1).T)].view(repeats, size)
    weights, _ = tilted_weights(trajectories.log_ratio.view(repeats, size, -1), reward, beta=1.0)
    first = trajectories.position[:, 0].view(repeats, size)
    exact = exact_target(optimum, state)
    errors, picked = {}, None
    for estimator in ESTIMATORS:
        targets = state_targets(
            estimator,
            state.expand(repeats, positions),
            final,
            first,
            weights.weight,
            process,
            generator=torch.Generator().manual_seed(17),
        )
        mass = target_mass(targets, repeats, positions, tokens)
        errors[estimator] = float((mass - exact).square().sum(dim=(1, 2)).mean())
        picked = targets.weight[:, 0] if estimator == "first_jump_one" else picked
    return errors, picked


def test_error_table_of_the_estimators():
    """The error table of the design, in kind: each estimator is quieter by the stated factors than the one before.

    Five positions, four tokens, a random consistent joint, weighted count of equal neighbours as cost, one of five
    positions known, K = 16.
    """
    joint = oracle.random_joint(5, 4, seed=18)
    cost = -6 * oracle.neighbour_cost(joint, seed=19)  # equal neighbours are wanted: a low temperature
    optimum = oracle.tilted(joint, cost)
    base, best = oracle.table(joint).float(), oracle.table(optimum).float()
    state = torch.tensor([4, 4, 1, 4, 4])
    samplers = {"base": base, "perturbed": oracle.perturbed(base, 0.3, seed=20).float(), "optimum": best}
    errors = {}
    for name, sampler in samplers.items():
        errors[name], picked = estimation_errors(sampler, base, optimum, cost, state)
        # E[a] = 1: first_jump_one's weight is that of a uniformly chosen member of its own group.
        z = (picked.mean() - 1) / (picked.std() / len(picked) ** 0.5).clamp(min=1e-6)
        assert abs(float(z)) < Z
    for name in ("base", "perturbed"):
        one, first, posterior = (errors[name][e] for e in ESTIMATORS)
        assert one > 8 * first > 8 * 3 * posterior, (name, errors[name])
        assert one > 40 * posterior, (name, errors[name])
    one, first, posterior = (errors["optimum"][e] for e in ESTIMATORS)
    assert one > 10 * first and one > 100 * posterior, errors["optimum"]
    for estimator in ESTIMATORS:
        assert errors["optimum"][estimator] < errors["base"][estimator]


def test_training_on_samples_approaches_the_optimum():
    joint = oracle.random_joint(3, 3, seed=21)
    cost = oracle.neighbour_cost(joint, seed=22)
    optimum, process = oracle.tilted(joint, cost), oracle.process(joint)
    base, model = oracle.table(joint).float(), oracle.table(joint).float()
    optimizer = torch.optim.Adam([model.logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    generator = torch.Generator().manual_seed(23)
    groups, size = 32, 16
    start = oracle.kl(optimum, oracle.generated(model, 3, 3))
    for step in range(80):
        trajectories = rollout(model, torch.full((groups * size, 3), 3), process, base=base, seed=step)
        final = trajectories.final.view(groups, size, 3)
        reward = -cost[tuple(final.flatten(0, 1).T)].view(groups, size)
        weights, _ = tilted_weights(trajectories.log_ratio.view(groups, size, -1), reward, beta=1.0, ess=4.0)
        states = process.remask(torch.full_like(final, 3), final, generator)
        targets = group_targets("posterior", states, final, weights.weight, process, generator=generator)
        optimizer.zero_grad()
        estimator_loss(model, targets, process).backward()
        optimizer.step()
        schedule.step()
    # What is left is the noise of the last steps and the bias of a 16-sample normaliser.
    assert oracle.kl(optimum, oracle.generated(model, 3, 3)) < start / 20


def test_tilted_weights_stop_at_the_ess_and_at_the_optimum():
    generator = torch.Generator().manual_seed(24)
    reward = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    log_ratio = 0.3 * torch.randn(5, 16, 4, generator=generator, dtype=torch.float64)
    weights, tilt = tilted_weights(log_ratio, reward, beta=0.01, ess=4.0)
    torch.testing.assert_close(weights.ess, torch.full((5,), 4.0, dtype=torch.float64))  # bisection to rounding
    assert bool((tilt > 0).all() and (tilt < 1).all())
    free, tilt = tilted_weights(log_ratio, reward, beta=1e6, ess=4.0)
    assert bool((tilt == 1).all())
    expected = 16 * (log_ratio.sum(2) + reward / 1e6).softmax(1)
    torch.testing.assert_close(free.weight, expected)
    _, tilt = tilted_weights(log_ratio, reward, beta=1e6, ess=4.0, max_tilt=0.25)
    assert bool((tilt == 0.25).all())
    # Adding a constant to the cost changes nothing.
    shifted, _ = tilted_weights(log_ratio, reward + 7, beta=0.01, ess=4.0)
    torch.testing.assert_close(shifted.weight, weights.weight)


def test_a_forbidden_outcome_has_weight_zero_at_any_tilt():
    reward = torch.tensor([[0.0, -torch.inf, 1.0, 1.0], [-torch.inf] * 4])
    weights, tilt = tilted_weights(torch.zeros(2, 4, 1), reward, beta=1e-3, ess=3.0)
    assert float(weights.weight[0, 1]) == 0
    assert weights.weight[1].tolist() == [0.0] * 4
    assert not bool(torch.isnan(weights.weight).any())
    assert float(tilt[1]) == 0


def test_bad_arguments_are_named():
    process = oracle.process(oracle.random_joint(2, 2, seed=25))
    final = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="estimator must be one of"):
        group_targets("reinforce", final, final, torch.ones(1, 2), process)
    with pytest.raises(ValueError, match=r"weight must have shape \[groups, trajectories\]"):
        group_targets("posterior", final, final, torch.ones(2), process)
    with pytest.raises(ValueError, match="beta must be > 0"):
        tilted_weights(torch.zeros(1, 2, 1), torch.zeros(1, 2), beta=0.0)
    with pytest.raises(ValueError, match="max_tilt must be in"):
        tilted_weights(torch.zeros(1, 2, 1), torch.zeros(1, 2), beta=1.0, max_tilt=1.5)
