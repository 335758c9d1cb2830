"""Chains that undo uniform noise on a canvas: laws, path weights and losses against enumeration in float64."""

import dataclasses
import itertools
import math

import pytest
import scipy.stats
import torch
from torch import nn

from dam.adjoint import tilted_weights
from dam.canvas import CanvasPaths, Renoised, path_log_prob, path_loss, posterior_loss, renoised, rollout, step_times
from dam.ctmc import Geometric, LatticeCTMC, UniformCTMC, UserSchedule, enumeration
from dam.models import Head
from tests.ops.helpers import peak_bytes
from tests.oracle import kl, random_joint

# A false alarm of one test: |z| above it has probability 6e-7.
Z, P_VALUE = 5.0, 1e-6
SIZE, LENGTH = 3, 2
EVERY = enumeration.states(SIZE, LENGTH)
COUNT = len(EVERY)
PROCESS = UniformCTMC(SIZE, Geometric(1e-4))
NO_PROMPT = torch.zeros(1, 1, dtype=torch.int64)


class Predicted:
    """A canvas denoiser of a function of canvases and times that gives logits [B, C, V]; it counts its calls."""

    canvas_length = LENGTH

    def __init__(self, function, size=SIZE):
        self.function, self.size, self.calls, self.prompts = function, size, 0, 0

    def conditioned(self, prompt, attention_mask=None):
        self.prompts += 1
        return self

    def hidden_states(self, states, time):
        self.calls += 1
        return self.function(states, time)

    def head(self):
        return Head(torch.eye(self.size, dtype=torch.float64), None)


class Posterior:
    """Logits of p(X_1^i | x_t) of data with a law [V^C], by Bayes' rule from the process's kernels."""

    def __init__(self, law, size=SIZE, length=LENGTH):
        self.law, self.size, self.outcomes = law, size, enumeration.states(size, length)

    def joint(self, states, time):
        """p(X_1 | x_t) [B, V^C]."""
        kernel = UniformCTMC(self.size, PROCESS.schedule).kernel(time)  # [B, V, V]
        rows = torch.arange(len(states))[:, None, None]
        likelihood = kernel[rows, self.outcomes[None], states[:, None, :]].prod(dim=2)
        joint = likelihood * self.law
        return joint / joint.sum(dim=1, keepdim=True)

    def __call__(self, states, time):
        values = nn.functional.one_hot(self.outcomes, self.size).double()
        return torch.einsum("bn,nlv->blv", self.joint(states, time), values).log()


def off(function, seed=5, scale=0.7):
    """Wrong by numbers that depend on state and time: predictions of no joint law."""
    noise = scale * torch.randn(COUNT, LENGTH, SIZE, generator=torch.Generator().manual_seed(seed)).double()
    return lambda states, time: (
        function(states, time) + noise[enumeration.index_of(states, SIZE)] * (1 + time[:, None, None])
    )


DATA = random_joint(LENGTH, SIZE, seed=1).flatten()
MODEL, BASE = off(Posterior(DATA), seed=5), off(Posterior(DATA), seed=6)


def prompts(count):
    return NO_PROMPT.expand(count, 1)


def transition(function, start, end):
    """P(x_s | x_t) from the definition, [V^C, V^C]: the predicted data, and the bridge by Bayes' rule from kernels."""
    log_data = function(EVERY, torch.full((COUNT,), start, dtype=torch.float64)).log_softmax(dim=2)  # [x, C, z]
    before, after = (PROCESS.kernel(torch.tensor(time, dtype=torch.float64)) for time in (start, end))
    between = torch.linalg.solve(after, before)  # K_t = K_s K
    bridge = after[:, :, None] * between[None] / before[:, None, :]  # [z, v, w]
    each = torch.einsum("xiz,zvxi->xiv", log_data.exp(), bridge[:, :, EVERY])  # of position i
    return torch.stack([each[:, i, EVERY[:, i]] for i in range(LENGTH)]).prod(dim=0)


def pairs(start, end):
    """Every pair of states as a path of one step."""
    both = torch.cartesian_prod(torch.arange(COUNT), torch.arange(COUNT))
    return CanvasPaths(torch.tensor([start, end], dtype=torch.float64), EVERY[both], torch.zeros(len(both), 1))


def matrix(function, start, end):
    """P(x_s | x_t) as `dam.canvas` has it."""
    log_prob = path_log_prob(Predicted(function), prompts(COUNT**2), pairs(start, end), PROCESS)
    return log_prob.exp().view(COUNT, COUNT)


def matrices(function, steps, process=PROCESS):
    times = step_times(process, steps).tolist()
    return [matrix(function, *times[n : n + 2]) for n in range(steps)]


def law_of(steps):
    """Of the outcome of a chain that begins uniformly."""
    law = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64)
    for step in steps:
        law = law @ step
    return law


# ---- the chain


@pytest.mark.parametrize("times", [(0.0, 0.4), (0.5, 0.6), (0.95, 1.0), (0.0, 1.0)])
def test_steps_are_predicted_data_through_the_bridge(times):
    found = matrix(MODEL, *times)
    torch.testing.assert_close(found, transition(MODEL, *times), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(COUNT).double(), rtol=1e-9, atol=0)


def test_times_leave_as_much_noise_behind_in_each_step():
    for process in (PROCESS, UniformCTMC(SIZE, UserSchedule(lambda t: 1e-4 + (1 - 1e-4) * t**2))):
        times = step_times(process, 7)
        left = process.schedule.alpha(times)
        assert times[0] == 0 and times[-1] == 1
        torch.testing.assert_close(left.diff(), left.diff().mean().expand(7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_outcomes_have_the_law_of_the_chain(steps):
    """Of all the states on the way too: a step's law given the state before is its row of the matrix."""
    paths = rollout(Predicted(MODEL), prompts(20000), PROCESS, steps=steps, seed=3)
    law, chain = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64), matrices(MODEL, steps)
    assert paths.canvas.shape == (20000, steps + 1, LENGTH)
    index = enumeration.index_of(paths.canvas, SIZE)
    for n in range(steps):
        both = torch.bincount(index[:, n] * COUNT + index[:, n + 1], minlength=COUNT**2).double()
        expected = (law[:, None] * chain[n]).flatten() * 20000
        assert scipy.stats.chisquare(both, expected * (20000 / expected.sum())).pvalue > P_VALUE
        law = law @ chain[n]
        torch.testing.assert_close(paths.log_prob[:, n], chain[n].log()[index[:, n], index[:, n + 1]])
    assert torch.equal(paths.final, paths.canvas[:, -1])


def test_fine_steps_are_the_chain_of_the_rates_and_their_weights_have_the_escape_integral():
    """To the law of `UniformCTMC`'s rates, and KL(p || p_base) over paths to that of its rates,

        integral of E[sum_y u log(u / u_base) - (Lambda - Lambda_base)] dt,

    with an error that halves with the steps. Up to a time at which rates are finite.
    """
    end, fine = 0.8, 240
    grid = torch.linspace(0, end, fine + 1, dtype=torch.float64).tolist()
    uniform = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64)
    exact, divergence, of_jumps = uniform, 0.0, 0.0
    for start, stop in itertools.pairwise(grid):
        rates, theirs = (enumeration.Rates(PROCESS, model, SIZE, LENGTH, (start + stop) / 2) for model in (MODEL, BASE))
        step = torch.linalg.matrix_exp(rates.matrix() * (stop - start))
        flow = torch.special.xlogy(rates.rates, rates.rates / theirs.rates).nan_to_num(nan=0.0).sum(dim=(1, 2))
        middle = (exact + exact @ step) / 2
        of_jumps += float(middle @ flow) * (stop - start)
        divergence += float(middle @ (flow - rates.escape + theirs.escape)) * (stop - start)
        exact = exact @ step
    errors = []
    for steps in (15, 30, 60):
        times = torch.linspace(0, end, steps + 1, dtype=torch.float64).tolist()
        law, total = uniform, 0.0
        for start, stop in itertools.pairwise(times):
            ours, base = matrix(MODEL, start, stop), matrix(BASE, start, stop)
            total += float(law @ (ours * (ours / base).log()).sum(dim=1))
            law = law @ ours
        errors.append((float((law - exact).abs().sum()), abs(total - divergence)))
    for kind in zip(*errors, strict=True):
        assert kind[0] > 1.7 * kind[1] > 1.7**2 * kind[2]
    # Without what stays the KL would be another by far.
    assert errors[-1][0] < 5e-3 and errors[-1][1] < 5e-3 < 0.2 * abs(of_jumps - divergence)


# ---- path weights


def test_weights_make_outcomes_of_the_model_those_of_the_base():
    """E[w 1(X_1 = x)] is the law of the base's chain at each x, and E[w] = 1: within standard errors of the mean."""
    steps, count = 3, 40000
    paths = rollout(Predicted(MODEL), prompts(count), PROCESS, steps=steps, base=Predicted(BASE), seed=11)
    weight, index = paths.log_ratio.sum(dim=1).exp(), enumeration.index_of(paths.final, SIZE)
    assert float(weight.std()) > 0.3  # the two chains are not alike
    expected = law_of(matrices(BASE, steps))
    for value, mean in [*enumerate(expected.tolist()), (None, 1.0)]:
        sample = weight if value is None else weight * (index == value)
        assert abs(float(sample.mean()) - mean) < Z * float(sample.std()) / math.sqrt(count)


def test_an_untouched_model_has_weights_of_one():
    paths = rollout(Predicted(MODEL), prompts(50), PROCESS, steps=5, base=Predicted(MODEL), seed=0)
    assert bool((paths.log_ratio == 0).all())
    with pytest.raises(ValueError, match="pass base= to rollout"):
        _ = dataclasses.replace(paths, base_log_prob=None).log_ratio


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_of_the_predicted_data(temperature):
    def tempered(states, time):
        return MODEL(states, time).log_softmax(dim=2) / temperature

    paths = rollout(Predicted(MODEL), prompts(50), PROCESS, steps=3, temperature=temperature, seed=2)
    plain = rollout(Predicted(tempered), prompts(50), PROCESS, steps=3, base=Predicted(tempered), seed=2)
    assert torch.equal(paths.canvas, plain.canvas)
    torch.testing.assert_close(paths.log_prob, plain.log_prob, rtol=1e-9, atol=1e-12)


def test_cold_steps_take_the_likeliest_token():
    """In one step all of it; and in several, where nothing is replaced any more, in the last."""
    paths = rollout(Predicted(MODEL), prompts(50), PROCESS, steps=3, temperature=0, seed=2)
    before, time = paths.canvas[:, -2], paths.times[-2].expand(50)
    assert torch.equal(paths.final, MODEL(before, time).argmax(dim=2))


def test_network_calls_are_one_a_step():
    model, base = Predicted(MODEL), Predicted(BASE)
    rollout(model, prompts(7), PROCESS, steps=6, base=base, seed=0)
    assert (model.calls, base.calls) == (6, 6) and (model.prompts, base.prompts) == (1, 1)


def test_draws_depend_on_seed_row_step_and_position_only():
    def drawn(rows, seed=4, **changes):
        return rollout(Predicted(MODEL), prompts(len(rows)), PROCESS, steps=4, seed=seed, row_ids=rows, **changes)

    whole, part = drawn(torch.arange(60)), drawn(torch.tensor([50, 3, 17]))
    assert torch.equal(whole.canvas[[50, 3, 17]], part.canvas)
    assert not torch.equal(whole.canvas, drawn(torch.arange(60), seed=5).canvas)
    # Another canvas begins alike, whatever is drawn behind.
    longer = rollout(
        Predicted(lambda states, time: torch.zeros(*states.shape, SIZE).double()),
        prompts(60),
        PROCESS,
        steps=4,
        canvas_length=5,
        seed=4,
    )
    assert longer.canvas.shape == (60, 5, 5) and torch.equal(longer.canvas[:, 0, :2], whole.canvas[:, 0])


def test_no_array_holds_the_vocabulary_for_every_position(monkeypatch):
    """Draws and log-probabilities of [B, C] positions, with their base, and gradients, in a bounded workspace."""
    monkeypatch.setenv("DAM_WORKSPACE_MB", "2")
    size, length, batch, width = 20000, 32, 4, 8
    weight = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    embedded = torch.randn(size, width, generator=torch.Generator().manual_seed(1)).requires_grad_()

    class Large(Predicted):
        def head(self):
            return Head(weight, None, softcap=30.0)

    model, process = Large(lambda states, time: embedded[states], size), UniformCTMC(size)

    def step():
        paths = rollout(model, prompts(batch), process, steps=2, base=model, canvas_length=length, seed=0)
        states = renoised(paths.final, process, steps=2)
        ones = torch.ones(batch)
        loss = posterior_loss(model, prompts(batch), states, paths.final, ones, process)
        (loss + path_loss(model, prompts(batch), paths, ones, process)).backward()

    whole = 4 * batch * length * size
    peak, _ = peak_bytes(step)
    # Of [V, D] there are the gradient of the embeddings and its parts.
    assert peak < 0.5 * whole and peak < 3 * 2**20 + 8 * 4 * size * width


# ---- losses


class Table(nn.Module):
    """Logits for every time of a chain and state, as a canvas denoiser: exact."""

    canvas_length = LENGTH

    def __init__(self, times, function):
        super().__init__()
        self.times = times[:-1]
        logits = [function(EVERY, time.expand(COUNT)).log_softmax(dim=2) for time in self.times]
        self.logits = nn.Parameter(torch.stack(logits))

    def conditioned(self, prompt, attention_mask=None):
        return self

    def hidden_states(self, states, time):
        at = (self.times[None] - time[:, None]).abs().argmin(dim=1)
        return self.logits[at, enumeration.index_of(states, SIZE)]

    def head(self):
        return Head(torch.eye(SIZE, dtype=torch.float64), None)


REWARD = torch.randn(COUNT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OPTIMUM = DATA * REWARD.exp() / (DATA * REWARD.exp()).sum()


def posterior_gradient(table, law, steps):
    """The gradient of the loss in expectation: every outcome, time and state as often as it is drawn."""
    weights, states, times, finals = [], [], [], []
    for time in step_times(PROCESS, steps)[:-1]:
        kernel = PROCESS.kernel(time)
        noised = torch.stack([kernel[EVERY[:, i]][:, EVERY[:, i]] for i in range(LENGTH)]).prod(dim=0)  # [X_1, X_t]
        weights.append((law[:, None] * noised).flatten())
        states.append(EVERY.repeat(COUNT, 1))
        finals.append(EVERY.repeat_interleave(COUNT, dim=0))
        times.append(time.expand(COUNT**2))
    final, weight = torch.cat(finals), torch.cat(weights)
    loss = posterior_loss(
        table, prompts(len(final)), Renoised(torch.cat(states), torch.cat(times)), final, weight * COUNT**2, PROCESS
    )
    return torch.autograd.grad(loss, table.logits)[0]


def path_gradient(table, joint_of, steps):
    """Likewise of `path_loss`, with weights that make its pairs of states those of a law: joint_of(n) [x_t, x_s]."""
    times, total = step_times(PROCESS, steps), 0.0
    for n in range(steps):
        loss = path_loss(
            table,
            prompts(COUNT**2),
            pairs(float(times[n]), float(times[n + 1])),
            joint_of(n).flatten() * COUNT**2,
            PROCESS,
        )
        total = total + torch.autograd.grad(loss, table.logits)[0]
    return total


def test_the_posterior_of_the_optimum_is_the_minimum_of_the_posterior_loss():
    """And no other: not the base's."""
    times = step_times(PROCESS, 4)
    found = posterior_gradient(Table(times, Posterior(OPTIMUM)), OPTIMUM, 4)
    assert float(found.abs().max()) < 1e-12  # rounding
    assert float(posterior_gradient(Table(times, Posterior(DATA)), OPTIMUM, 4).abs().max()) > 1e-3


def test_with_that_posterior_the_chain_has_the_optimum_for_its_law():
    """As steps shrink, and weighted outcomes of the base's chain, p_base e^r, likewise."""
    away = []
    for steps in (10, 20, 40, 80):
        base = law_of(matrices(Posterior(DATA), steps)) * REWARD.exp()
        away.append((kl(OPTIMUM, law_of(matrices(Posterior(OPTIMUM), steps))), kl(OPTIMUM, base / base.sum())))
    for kind in zip(*away, strict=True):
        # The KL is of the square of the error, which halves.
        assert all(b < 0.5 * a for a, b in itertools.pairwise(kind)) and kind[-1] < 1e-4


@pytest.mark.parametrize("by_path", [False, True])
def test_training_on_weighted_outcomes_ends_at_the_optimum(by_path):
    """From the model's own trajectories, with the estimators' weights; in KL(p* || p) of outcomes.

    In few steps: by paths at p*, which the chain can all but have, and by the posterior at the chain that has p*'s.
    """
    steps, groups, rounds = 4, 512, 30
    generator, times = torch.Generator().manual_seed(0), step_times(PROCESS, 4)
    base, model = Table(times, Posterior(DATA)).requires_grad_(False), Table(times, Posterior(DATA))
    optimizer = torch.optim.Adam(model.parameters())
    for n in range(rounds):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - n / rounds)
        paths = rollout(model, prompts(groups), PROCESS, steps=steps, base=base, seed=n)
        reward = REWARD[enumeration.index_of(paths.final, SIZE)]
        weight = tilted_weights(paths.log_ratio[None], reward[None], beta=1.0)[0].weight[0]
        if by_path:
            loss = path_loss(model, prompts(groups), paths, weight - 1, PROCESS, generator=generator)
        else:
            states = renoised(paths.final, PROCESS, steps=steps, generator=generator)
            loss = posterior_loss(model, prompts(groups), states, paths.final, weight, PROCESS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        before, found = (law_of(matrices(table.hidden_states, steps)) for table in (base, model))
    optimum = before * REWARD.exp() / (before * REWARD.exp()).sum()
    limit = optimum if by_path else law_of(matrices(Posterior(optimum), steps))
    assert kl(limit, found) < 0.05 * kl(limit, before)


def test_without_a_reward_a_model_stays_by_its_paths_and_drifts_by_re_noised_outcomes():
    """Predictions of no joint law, in few steps."""
    steps, table = 3, Table(step_times(PROCESS, 3), MODEL)
    with torch.no_grad():
        chain = matrices(table.hidden_states, steps)
    gradient = path_gradient(table, lambda n: law_of(chain[:n])[:, None] * chain[n], steps)
    assert float(gradient.abs().max()) < 1e-12
    assert float(posterior_gradient(table, law_of(chain), steps).abs().max()) > 1e-3


def test_the_chain_of_the_optimum_is_the_minimum_of_the_path_loss():
    """Of one position, whose steps no product form restricts: reversal of noise on p*, from exactly uniform noise."""
    size, steps = SIZE, 3
    law = random_joint(1, size, seed=4)
    process = UniformCTMC(size, Geometric(1e-4))
    times = step_times(process, steps)
    states = enumeration.states(size, 1)

    class One(Table):
        canvas_length = 1

        def __init__(self):
            nn.Module.__init__(self)
            self.times = times[:-1]
            exact = Posterior(law, length=1)
            self.logits = nn.Parameter(torch.stack([exact(states, t.expand(size)).log_softmax(2) for t in times[:-1]]))

    table, both = One(), torch.cartesian_prod(torch.arange(size), torch.arange(size))
    for n in range(steps):
        before, after = process.kernel(times[n]), process.kernel(times[n + 1])
        joint = (law[:, None] * after).sum(dim=0)[None, :] * torch.linalg.solve(after, before).t()  # [x_t, x_s]
        paths = CanvasPaths(times[n : n + 2], states[both], torch.zeros(len(both), 1))
        for weight, stays in ((joint.flatten(), True), (joint.flatten() * (both[:, 1] + 1), False)):
            loss = path_loss(table, prompts(len(both)), paths, weight * len(both), process)
            gradient = torch.autograd.grad(loss, table.logits)[0]
            assert (float(gradient.abs().max()) < 1e-12) == stays


def test_re_noised_states_are_of_the_times_that_the_model_is_called_at():
    final = EVERY.repeat(3000, 1)
    states = renoised(final, PROCESS, steps=3, generator=torch.Generator().manual_seed(0))
    times = step_times(PROCESS, 3)[:-1]
    at = (states.time[:, None] == times).double()
    assert bool((at.sum(dim=1) == 1).all())
    assert scipy.stats.chisquare(at.sum(dim=0)).pvalue > P_VALUE
    for n, time in enumerate(times):
        rows = at[:, n] == 1
        kept = (states.canvas[rows] == final[rows]).double()
        expected = float(PROCESS.kernel(time)[0, 0])
        assert abs(float(kept.mean()) - expected) < Z * math.sqrt(expected * (1 - expected) / kept.numel())


def test_log_probs_are_finite_and_differentiable_where_the_last_noise_is_gone():
    """A step to time 1 whose outcome the model is all but certain of, or against."""
    logits = torch.tensor([[0.0, -60.0, -60.0], [-60.0, 0.0, -60.0]]).double().requires_grad_()
    model = Predicted(lambda states, time: logits.expand(len(states), -1, -1))
    paths = CanvasPaths(
        torch.tensor([0.5, 1.0]).double(), EVERY[torch.tensor([[0, 0], [4, 4], [1, 1]])], torch.zeros(3, 1)
    )
    log_prob = path_log_prob(model, prompts(3), paths, PROCESS)
    torch.testing.assert_close(log_prob[:, 0], torch.tensor([-60.0, -60.0, 0.0]).double(), rtol=1e-9, atol=1e-9)
    path_loss(model, prompts(3), paths, torch.ones(3).double(), PROCESS).backward()
    assert bool(logits.grad.isfinite().all()) and float(logits.grad.abs().max()) > 0.1


def test_bad_arguments_are_named():
    model = Predicted(MODEL)
    for process in (LatticeCTMC(SIZE), UniformCTMC(SIZE, predicts="ratio")):
        with pytest.raises(TypeError, match="must be a UniformCTMC with predicts"):
            rollout(model, prompts(2), process, steps=2, seed=0)
    with pytest.raises(ValueError, match="the process has 4 values and the model's head 3 tokens"):
        rollout(model, prompts(2), UniformCTMC(4), steps=2, seed=0)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        rollout(model, prompts(2), PROCESS, steps=0, seed=0)
    with pytest.raises(ValueError, match="canvas_length must be at least 1; got 0"):
        rollout(model, prompts(2), PROCESS, steps=2, canvas_length=0, seed=0)
    with pytest.raises(ValueError, match="row_ids must have shape"):
        rollout(model, prompts(2), PROCESS, steps=2, seed=0, row_ids=torch.arange(3))
    assert model.calls == 0
    paths = rollout(model, prompts(2), PROCESS, steps=2, temperature=0, seed=0)
    for loss in (
        lambda: path_loss(model, prompts(2), paths, torch.ones(2).double(), PROCESS, temperature=0),
        lambda: posterior_loss(
            model,
            prompts(2),
            renoised(paths.final, PROCESS, steps=2),
            paths.final,
            torch.ones(2).double(),
            PROCESS,
            temperature=0,
        ),
    ):
        with pytest.raises(ValueError, match="temperature must be"):
            loss()
