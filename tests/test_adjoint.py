"""Tabular truth: on tables small enough to enumerate, every estimator matches Q* and nothing else."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dam
from dam.adjoint import (
    ESTIMATORS,
    MatchingTargets,
    estimator_loss,
    group_targets,
    path_targets,
    state_targets,
    tilted_weights,
    without_ended,
)
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import Head
from dam.rollout import path_of, rollout
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


@pytest.mark.parametrize("steps", [None, 2])
def test_targets_on_the_path_are_what_the_model_drew_there(steps):
    """A jump's state is what its network call saw, and the gradient of log p_theta has mean 0 at every state."""
    joint = oracle.random_joint(3, 2, seed=31)
    process, model = oracle.process(joint), oracle.perturbed(oracle.table(joint).float(), 1.0, seed=32).double()
    groups, size = 500, 16
    start = torch.tensor([2, 2, 2]).repeat(groups * size, 1)
    start[::2, 1] = 0  # a prompt fills position 1
    path = rollout(model, start, process, steps=steps, seed=33)
    weight = torch.rand(groups, size, generator=torch.Generator().manual_seed(34), dtype=torch.float64) - 0.5
    targets = path_targets(path, weight, generator=torch.Generator().manual_seed(35))
    assert torch.equal(targets.weight[:, 0], weight.flatten()) and bool((targets.row == torch.arange(len(start))).all())
    assert bool((targets.group == torch.arange(groups).repeat_interleave(size)).all())
    rows = torch.arange(len(start))
    assert bool((targets.states[rows, targets.position] == 2).all()) and bool((targets.target < 2).all())
    assert torch.equal(path.final[rows, targets.position], targets.target[:, 0])
    jump = ((path.position == targets.position[:, None]) & (path.call >= 0)).long().argmax(dim=1)
    for n in (0, 1, 2, 3, 40, 41):
        assert torch.equal(targets.states[n], path.states_before(int(path.call[n, jump[n]]))[n])
    # Each of a trajectory's jumps is as likely to be chosen.
    count = (path.call >= 0).sum(dim=1)
    for m in (2, 3):
        chosen = torch.bincount(jump[count == m], minlength=m).double()
        assert abs(oracle.chi_square_z(chosen, torch.full((m,), 1.0 / m, dtype=torch.float64))) < Z
    # All jumps of a trajectory weigh together as much as the one that is drawn.
    every = path_targets(path, weight, every=True)
    assert len(every.states) == int(count.sum())
    total = torch.zeros(len(start), dtype=torch.float64)
    trajectory = torch.repeat_interleave(torch.arange(len(start)), count)
    total.index_add_(0, trajectory, every.weight[:, 0] / len(every.states))
    torch.testing.assert_close(total, weight.flatten() / len(start), rtol=1e-6, atol=0)  # shares in float32
    assert torch.equal(every.group, trajectory // size) and bool((every.states[every.row, every.position] == 2).all())
    at = torch.stack(
        [every.position == targets.position[trajectory], every.target[:, 0] == targets.target[trajectory, 0]]
    )
    assert torch.equal(every.states[at.all(dim=0)], targets.states)
    ones = path_targets(path, torch.ones_like(weight), generator=torch.Generator().manual_seed(35))
    probability = oracle.log_conditionals(model, ones.states, ones.position)[:, 1].exp().detach()
    score = (ones.target[:, 0] == 1).double() - probability  # the gradient of the logit of token 1
    index = model.index(ones.states) * 3 + ones.position
    for at in index.unique():
        here = score[index == at]
        # A sum of at least 200 centred bounded terms.
        if len(here) >= 200:
            spread = (probability[index == at] * (1 - probability[index == at])).sum() ** 0.5
            assert abs(float(here.sum() / spread)) < Z
    with pytest.raises(ValueError, match="an element per trajectory, 8000"):
        path_targets(path, weight[1:])


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"block_length": 1}, {"block_length": 2}], ids=str)
@pytest.mark.parametrize("whole_calls", [False, True])
def test_targets_on_paths_up_to_an_end_are_those_of_whole_paths(options, whole_calls):
    """Less what is behind the end: to the bit, by what a replay buffer keeps too. No text weighs by its length."""
    model, end, size = oracle.inconsistent(3, 3, seed=41), 2, 16
    process, start = MaskedCTMC(3), torch.full((100 * size, 3), 3)
    start[::2, 0] = 0
    weight = torch.rand(100, size, generator=torch.Generator().manual_seed(42))
    begin = torch.zeros(100, dtype=torch.int64)
    found = {}
    for name, stop in (("whole", []), ("ended", [end])):
        path = rollout(model, start, process, stop_tokens=stop, start=begin.repeat_interleave(size), seed=43, **options)
        path = path_of(start, *(part.unflatten(0, (len(start), 1)) for part in (path.final, path.position, path.call)))
        drawn = path_targets(path, weight, whole_calls=whole_calls, seed=44)
        found[name] = without_ended(drawn, [end], begin)
        every = without_ended(path_targets(path, weight, every=True), [end], begin)
        found[f"every {name}"] = every, every.weight / len(every.states)  # the loss is a mean over states
    for part, whole, ended in zip(MatchingTargets._fields, found["whole"], found["ended"], strict=True):
        if part == "states":  # of what is behind an end nothing is asked
            whole, ended = whole[found["whole"].row], ended[found["whole"].row]
        assert torch.equal(whole, ended), part
    assert len(found["ended"].row.unique()) < len(start) or options == {}
    (whole, share), (ended, other) = found["every whole"], found["every ended"]
    assert torch.equal(whole.states[whole.row], ended.states[ended.row])
    for part in ("position", "target"):
        assert torch.equal(getattr(whole, part), getattr(ended, part))
    torch.testing.assert_close(share, other, rtol=1e-6, atol=0)  # of other numbers of states


def test_a_baseline_on_the_path_changes_the_noise_and_not_the_mean():
    """Of the gradient at the optimum, where weights are 1: none is left of it. At another model the mean stays."""
    joint = oracle.random_joint(3, 3, seed=36)
    optimum, process = oracle.tilted(joint, oracle.neighbour_cost(joint, seed=37)), oracle.process(joint)
    groups, size = 400, 32
    for model, bound in ((oracle.table(optimum), 1e-5), (oracle.perturbed(oracle.table(optimum), 0.3, seed=38), None)):
        path = rollout(model.float(), torch.full((groups * size, 3), 3), process, seed=39)
        log_prob = path.log_prob.double().sum(dim=1)
        # Given the order, which both laws draw alike.
        weight = (optimum[tuple(path.final.T)].log() - log_prob).exp().view(groups, size)
        gradients = []
        for baseline in (0.0, 1.0):
            targets = path_targets(path, weight - baseline, generator=torch.Generator().manual_seed(40))
            noise = target_mass(targets, groups * size, 3, 3).sum(dim=1)
            with torch.no_grad():
                p = oracle.log_conditionals(model.double(), targets.states, targets.position).exp()
            gradients.append(noise - targets.weight.double() * p)  # of the logits of the chosen position
        if bound is not None:
            # float32 log-probabilities; without the baseline it is of order 1.
            assert float(gradients[1].abs().max()) < bound < float(gradients[0].abs().max()) / 1e3
        difference = gradients[0] - gradients[1]
        z = difference.mean(dim=0) / (difference.std(dim=0) / len(difference) ** 0.5)
        assert float(z.abs().max()) < Z


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


def test_no_row_lies_behind_an_end_that_its_state_shows():
    """From the start of the text on; a row whose own position is the last before the end stays, as does all else."""
    mask, end = 9, 8
    states = torch.tensor([[1, mask, end, mask, mask], [end, mask, end, 2, mask], [end, mask, mask, 1, mask]])
    row, position = torch.nonzero(states == mask, as_tuple=True)
    targets = MatchingTargets(
        states, torch.tensor([0, 1, 0]), row, position, torch.arange(len(row))[:, None], torch.rand(len(row), 1)
    )
    kept = without_ended(targets, [7, end], torch.tensor([0, 1]))
    assert list(zip(kept.row.tolist(), kept.position.tolist(), strict=True)) == [(0, 1), (1, 1)]
    assert torch.equal(kept.target, targets.target[[0, 3]]) and torch.equal(kept.weight, targets.weight[[0, 3]])
    assert torch.equal(kept.states, states)  # the mean is over all states
    later = without_ended(targets, [end], torch.tensor([5, 1]))  # nothing ends before the start
    assert later.row.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_without_rows_behind_an_end_the_law_is_still_a_fixed_point():
    """A row that is left has the conditional of its state as target: judged by outcomes it would have another."""
    joint = oracle.random_joint(3, 3, seed=5)
    process, end = oracle.process(joint), 1
    finals = torch.tensor(list(itertools.product(range(3), repeat=3)))
    share = joint[tuple(finals.T)].double()
    states = torch.tensor([[3, end, 3], [3, 3, 3], [2, 3, 3]])
    for state, expected in zip(states, ([0], [0, 1, 2], [1, 2]), strict=True):
        fits = ((finals == state) | (state == 3)).all(dim=1)
        weight = (share[fits] / share[fits].mean())[None]
        remasked = state.expand(1, int(fits.sum()), 3)
        targets = group_targets("posterior", remasked, finals[fits][None], weight, process)
        kept = without_ended(targets, [end], torch.tensor([0]))
        mass = target_mass(kept, int(fits.sum()), 3, 3).mean(dim=0)
        exact = exact_target(joint, state)
        exact[[place for place in range(3) if place not in expected]] = 0
        torch.testing.assert_close(mass, exact)


def test_the_loss_is_that_of_the_law_without_suppressed_tokens():
    """As of a model that gives them no probability."""
    joint, generator = oracle.random_joint(3, 3, seed=0), torch.Generator().manual_seed(26)
    process = dataclasses.replace(oracle.process(joint), suppress=(1,))
    states = torch.tensor([[3, 3, 3], [1, 3, 3]])
    final = torch.tensor([[[0, 2, 2], [2, 0, 2]], [[1, 0, 0], [1, 2, 0]]])
    remasked = states[:, None].expand_as(final)
    weight = torch.tensor([[0.5, 1.5], [1.2, 0.8]])
    targets = group_targets("posterior", remasked, final, weight, process, generator=generator)
    model, without = oracle.table(joint), oracle.table(joint)
    without.logits.data[..., 1] = -1e6  # an infinite one would be NaN in a product with the head's zeros
    losses = [estimator_loss(model, targets, process), estimator_loss(without, targets, oracle.process(joint))]
    gradients = [torch.autograd.grad(loss, m.logits)[0] for loss, m in zip(losses, (model, without), strict=True)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*gradients)
    assert bool((gradients[0][..., 1] == 0).all()) and bool((gradients[0] != 0).any())


def test_a_loss_without_rows_is_zero():
    process, model = oracle.process(oracle.random_joint(3, 3, seed=0)), oracle.table(oracle.random_joint(3, 3, seed=0))
    states = torch.tensor([[1, 3, 3]])
    nothing = torch.empty(0, dtype=torch.int64)
    targets = MatchingTargets(states, torch.tensor([0]), nothing, nothing, nothing[:, None], torch.empty(0, 1))
    loss = estimator_loss(model, targets, process)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not bool(model.logits.grad.any())


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


def test_gradients_in_float16_survive_with_a_scaler_s_scale():
    """Of 2,048 states each gradient is below what float16 holds; formed 65,536 times as large they keep its 11 bits."""

    class Narrow(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.states = torch.nn.Parameter(torch.randn(2048, 1, 16, generator=generator).to(dtype))
            self.weight = torch.randn(300, 16, generator=generator).half().to(dtype)

        def hidden_states(self, tokens, attention_mask=None):
            return self.states

        def head(self):
            return Head(self.weight, None)

    states, each = torch.full((2048, 1), 299), torch.arange(2048)
    targets = MatchingTargets(states, each, each, each * 0, (each % 299)[:, None], torch.full((2048, 1), 1e-2))
    gradients = {}
    exact = Narrow(torch.float16)
    model = Narrow(torch.float32)
    model.states.data = exact.states.detach().float()
    loss = estimator_loss(model, targets, MaskedCTMC(299))
    loss.backward()
    for scale in (1.0, 65536.0):
        narrow = Narrow(torch.float16)
        scaled = estimator_loss(narrow, targets, MaskedCTMC(299), gradient_scale=scale)
        # Sums over tokens of products in float32; hidden states and head are equal.
        torch.testing.assert_close(scaled.detach(), loss.detach(), rtol=2.0**-18, atol=0.0)
        (scaled * 65536.0).backward()
        gradients[scale] = narrow.states.grad.float() / 65536.0
    error = {s: float((g - model.states.grad).norm() / model.states.grad.norm()) for s, g in gradients.items()}
    assert error[65536.0] < 2.0**-11 and error[1.0] > 4 * error[65536.0]


# ---- trajectories that are not kept


def kept_alone(log_ratio, reward, from_base, kept, g, options):
    """The weights of group g, computed of its kept trajectories and nothing else."""
    of = kept[g]
    return tilted_weights(
        log_ratio[g : g + 1, of],
        reward[g : g + 1, of],
        from_base=None if from_base is None else from_base[g : g + 1, of],
        **options,
    )


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("more", [{}, {"ess": 3.0}, {"clip": 0.3}, {"ess": 3.0, "clip": 0.3, "max_tilt": 0.5}])
def test_a_trajectory_that_is_not_kept_counts_as_if_it_had_not_been_drawn(leave_one_out, mixed, more):
    """Whatever it has: another reward, none, a forbidden outcome. That is not the same as a weight of 0."""
    generator = torch.Generator().manual_seed(3)
    log_ratio = torch.randn(5, 8, 4, generator=generator, dtype=torch.float64)
    reward = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    reward[2, 6] = -torch.inf  # kept, and forbidden
    from_base = (torch.arange(8) >= 6).expand(5, -1) if mixed else None
    kept = torch.ones(5, 8, dtype=torch.bool)
    for g, dropped in enumerate([[], [1], [0, 5, 7], [2, 3], [6, 7]]):
        kept[g, dropped] = False
    options = {"beta": 0.5, "leave_one_out": leave_one_out, **more}
    for value in (math.nan, 1e300, -math.inf):
        given = torch.where(kept, reward, value)
        paths = torch.where(kept[..., None], log_ratio, value)
        weights, step = tilted_weights(paths, given, from_base=from_base, kept=kept, **options)
        for g in range(5):
            alone, its_step = kept_alone(log_ratio, reward, from_base, kept, g, options)
            torch.testing.assert_close(weights.weight[g, kept[g]], alone.weight[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(weights.log_path[g, kept[g]], alone.log_path[0], rtol=1e-12, atol=1e-12)
            assert bool((weights.weight[g, ~kept[g]] == 0).all())
            for name in ("log_normalizer", "ess", "clipped"):
                torch.testing.assert_close(getattr(weights, name)[g], getattr(alone, name)[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(step[g], its_step[0], rtol=1e-12, atol=0)
    forbidden, _ = tilted_weights(log_ratio, torch.where(kept, reward, -torch.inf), from_base=from_base, **options)
    assert not torch.allclose(forbidden.weight[1], weights.weight[1])


def test_fewer_kept_trajectories_than_the_effective_sample_size_leave_the_model_where_it_is():
    kept = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    reward = torch.where(kept, torch.tensor([1.0, 0.0, 0.0, 0.0]), math.nan)
    weights, step = tilted_weights(torch.zeros(3, 4, 1), reward, beta=0.1, ess=3.0, kept=kept)
    # An ESS of 2 of 2 is held up to rounding, which steps of 1e-7 keep.
    wanted = torch.tensor([[1, 1, 0, 0], [0] * 4, [0] * 4], dtype=torch.float64)
    torch.testing.assert_close(weights.weight, wanted, rtol=0, atol=1e-5)
    assert float(step.max()) < 1e-6 and weights.ess.tolist() == pytest.approx([2, 0, 0])
    with pytest.raises(ValueError, match="log weight nan"):
        tilted_weights(torch.zeros(3, 4, 1), reward, beta=0.1)
