"""Adjoint Sampling and NAAS where everything is known: Gaussian targets, log Z, controls in closed form."""

import dataclasses
import math

import pytest
import torch

from dam.flows import adjoint_targets, cost_gradient, matching, simulate
from dam.flows.annealed import Annealing, clipped
from dam.flows.brownian import Brownian, gaussian_log_density, projected_targets
from dam.flows.matching import Targets
from dam.flows.networks import ParticleNetwork, Perceptron, Preconditioned
from dam.flows.samplers import (
    AdjointMatching,
    AdjointSampling,
    AnnealedSampling,
    Buffer,
    Counted,
    EnergyError,
    Settings,
)

Z = 5.0  # a false alarm of one test: |z| above it has probability 6e-7
MEAN = torch.tensor([1.2, -0.7], dtype=torch.float64)
VARIANCE = torch.tensor([0.3, 0.8], dtype=torch.float64)


def gaussian_energy(state):
    """Of N(MEAN, VARIANCE), less its normaliser."""
    return ((state - MEAN).square() / VARIANCE).sum(dim=1) / 2


LOG_Z = float((2 * math.pi * VARIANCE).log().sum()) / 2


def brownian(steps=20, ratio=4.0, deviation=1.5):
    process = Brownian.reaching(deviation, ratio, steps)
    return process, process.times(steps)


def from_zero(process, times, model, rows, seed=0):
    zero = torch.zeros(rows, 2, dtype=torch.float64)
    return simulate(process, model, zero, times=times, weights=True, method="euler", seed=seed)


def optimal(process, times):
    """The control that makes a walk on this grid end in the target: its steps are those of the walk's bridges to it.

    Given X_k = x, X_K has the target's density times N(X_K; x, left) / N(X_K; 0, all), and the mean of the next step is
    that of the bridge to it.
    """
    clock = process.clock(times)

    def model(state, time):
        k = int((times - float(time[0])).abs().argmin())
        left, all_ = clock[-1] - clock[k], clock[-1]
        precision = 1 / VARIANCE + 1 / left - 1 / all_
        mean = (MEAN / VARIANCE + state / left) / precision
        return (mean - state) / left

    return model


def by_time(targets, times, count):
    """Least squares of predictions on the state and 1, of each time and coordinate: [K, 2 (slope, constant), D]."""
    found = []
    for k in range(count):
        at = targets.time == times[k]
        state, prediction = targets.state[at], targets.prediction[at]
        columns = []
        for d in range(2):
            design = torch.stack((state[:, d], torch.ones_like(state[:, d])), dim=1)
            columns.append(torch.linalg.lstsq(design, prediction[:, d : d + 1]).solution[:, 0])
        found.append(torch.stack(columns, dim=1))
    return torch.stack(found)


def test_a_walk_has_the_variance_that_is_asked_for_and_its_bridges_are_those_of_the_walk():
    """Moments of X_k given X_K of a walk, from the regression of 40,000 of them, and of what is drawn of their ends."""
    process, times = brownian(steps=12)
    assert float(process.clock(times)[-1]) == pytest.approx(1.5**2, rel=1e-12)
    assert process.largest / process.smallest == pytest.approx(4.0)
    path = from_zero(process, times, None, 20_000)
    final = path.final
    count = final.numel()
    assert float(final.square().mean()) / 1.5**2 == pytest.approx(1, abs=Z * math.sqrt(2 / count))
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clock = process.clock(times)
    for k in (1, 5, 11):
        drawn = process.bridged(times, final, torch.full((len(final),), k), noise)
        spread = float((clock[k] * (1 - clock[k] / clock[-1])).sqrt())
        for state in (path.state(k), drawn):
            rest = state - clock[k] / clock[-1] * final
            assert float(rest.mean()) == pytest.approx(0, abs=Z * spread / math.sqrt(count))
            assert float((rest * final).mean()) == pytest.approx(0, abs=Z * spread * 1.5 / math.sqrt(count))
            assert float(rest.square().mean()) / spread**2 == pytest.approx(1, abs=Z * math.sqrt(2 / count))


def test_the_optimal_control_of_a_gaussian_target_draws_it():
    """Of moments of 10,000 ends; a step of the optimum has less variance than the walk's, so X_1 has a little more."""
    process, times = brownian(steps=50)
    path = from_zero(process, times, optimal(process, times), 10_000)
    deviation = VARIANCE.sqrt()
    assert ((path.final.mean(dim=0) - MEAN) / deviation * math.sqrt(10_000)).abs().max() < Z
    error = path.final.var(dim=0) / VARIANCE - 1
    assert error.abs().max() < Z * math.sqrt(2 / 10_000) + 0.03


@pytest.mark.parametrize("control", ["none", "half", "optimal"])
def test_the_mean_weight_of_a_walk_is_the_normaliser_whatever_the_control(control):
    process, times = brownian(steps=8)
    best = optimal(process, times)
    model = {"none": None, "half": lambda x, t: best(x, t) / 2, "optimal": best}[control]
    path = from_zero(process, times, model, 40_000, seed=3)
    cost = process.terminal_cost(gaussian_energy, times)
    weight = torch.exp(path.log_ratio.sum(dim=1) - cost(path.final) - LOG_Z)
    assert abs(float(weight.mean()) - 1) < Z * float(weight.std()) / math.sqrt(40_000)
    assert control != "optimal" or float(weight.std()) < 0.7  # and the optimum's varies by its 8 steps only


def test_projection_has_the_minimiser_of_matching_on_whole_paths():
    """Both regressions give the optimal control at every time: on bridges to exact samples, whatever drew these, and on
    the optimum's own paths. The optimum is linear, so that least squares have all of it; bounds are 5 standard errors.
    """
    process, times = brownian(steps=10)
    best, rows = optimal(process, times), 20_000
    cost = process.terminal_cost(gaussian_energy, times)
    path = from_zero(process, times, best, rows)
    on_paths = adjoint_targets(process, None, path, cost_gradient(cost, path.final))
    generator = torch.Generator().manual_seed(5)
    final = MEAN + VARIANCE.sqrt() * torch.randn(10 * rows, 2, generator=generator, dtype=torch.float64)
    slope = cost_gradient(cost, final)
    projected = projected_targets(process, times, final, slope, generator=generator)
    balanced = projected_targets(process, times, final, slope, mode_width=0.4, generator=generator)
    assert torch.isclose(projected.weight.sum(), on_paths.weight.sum(), rtol=0.02)
    for targets in (on_paths, projected, balanced):
        fit = by_time(targets, times, 10)
        for k in range(1, 10):  # at time 0 all states are the same
            at = targets.time == times[k]
            state, prediction = targets.state[at], targets.prediction[at]
            one = torch.ones(1, dtype=torch.float64)
            constant = best(torch.zeros(1, 2, dtype=torch.float64), times[k] * one)[0]
            slope = best(torch.ones(1, 2, dtype=torch.float64), times[k] * one)[0] - constant
            rest = prediction - (slope * state + constant)
            error = rest.std(dim=0) / state.std(dim=0) / math.sqrt(int(at.sum()))
            # On its own paths the optimum of continuous time is met up to the length of a step.
            slack = 0.03 * slope.abs() if targets is on_paths else 0
            assert ((fit[k, 0] - slope).abs() < Z * error + slack).all(), k


def test_targets_of_the_width_of_a_gaussian_have_no_noise():
    """Of N(0, w^2) the gradient and the bridge's slope balance each other in each row, to rounding: what is left is the
    optimum's control.
    """
    process, times = brownian(steps=10)
    width = 0.6
    cost = process.terminal_cost(lambda x: x.square().sum(dim=1) / (2 * width**2), times)
    generator = torch.Generator().manual_seed(5)
    final = width * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    slope = cost_gradient(cost, final)
    targets = projected_targets(process, times, final, slope, mode_width=width, generator=generator)
    clock = process.clock(times)
    left = (clock[-1] - clock[torch.searchsorted(times, targets.time)])[:, None]
    reached = clock[-1] - left
    # The slope of the bridge to the mean of X_1 given X_k, which is linear: their covariance over the variance of X_k.
    toward = (
        reached
        / clock[-1]
        * width**2
        / ((reached / clock[-1] * width) ** 2 + reached * left / clock[-1]).clamp_min(1e-9)
    )
    best = (toward - 1) * targets.state / left
    assert torch.allclose(targets.prediction, best, atol=1e-10)
    noise = projected_targets(process, times, final, slope, generator=generator).prediction
    assert float(noise.square().mean()) > 1


def test_training_by_projection_reaches_a_gaussian_target():
    """Policy iteration with the exact regression, a line for each time: mean and deviation to 1e-2 + 5 errors."""
    process, times = brownian(steps=20)
    cost = process.terminal_cost(gaussian_energy, times)
    fit = torch.zeros(20, 2, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def model(state, time):
        k = int((times - float(time[0])).abs().argmin())
        return fit[k, 0] * state + fit[k, 1]

    for n in range(12):
        final = from_zero(process, times, model, 1000, seed=n).final.repeat(20, 1)
        targets = projected_targets(process, times, final, cost_gradient(cost, final), generator=generator)
        fit = fit + (by_time(targets, times, 20) - fit) / 2
    final = from_zero(process, times, model, 10_000, seed=99).final
    assert ((final.mean(dim=0) - MEAN).abs() < 1e-2 + 6 * VARIANCE.sqrt() / math.sqrt(1000)).all()
    assert ((final.std(dim=0) / VARIANCE.sqrt() - 1).abs() < 0.06).all()


# ---- annealing

SIGMA, START, END = 1.3, 1.5, 0.6  # sigma, and deviations of pi_0 and of the target


def centred_energy(state):
    return state.square().sum(dim=1) / (2 * END**2)


def annealing(power=1.0):
    return Annealing(centred_energy, START, SIGMA, power)


def riccati(power, count=10_000):
    """A_t of V_t(x) = A_t |x|^2 / 2 + c_t by the HJB equation, at a fine grid of times from 0 to 1:

    -A' = d/dt (1 / v_t) - sigma^2 A / v_t - sigma^2 A^2, A_1 = 0, where pi_t = N(0, v_t).
    """
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    share = times**power
    precision = ((1 - share) / START**2 + share / END**2).tolist()
    slope = (power * times ** (power - 1) * (1 / END**2 - 1 / START**2)).tolist()
    value, found = 0.0, [0.0]
    for k in range(count, 0, -1):
        value += (slope[k] - SIGMA**2 * value * (precision[k] + value)) / count
        found.append(value)
    return times, torch.tensor(found[::-1], dtype=torch.float64)


@pytest.mark.parametrize("power", [2.0, pytest.param(1.0, marks=pytest.mark.full)])
def test_the_annealed_optimum_starts_and_ends_where_it_should_and_its_lean_adjoints_are_the_gradient(power):
    """From pi_0 e^(-V_0) the control -sigma A_t x draws the target, and E[a_t | x] = A_t x along its paths.

    100 steps of Euler: deviations within 4%, slopes within 6%, and what 2,000 rows leave.
    """
    process = annealing(power).process
    fine, value = riccati(power)
    times = process.times(100)

    def model(state, time):
        return -SIGMA * float(value[round(float(time[0]) * (len(fine) - 1))]) * state

    deviation = 1 / math.sqrt(1 / START**2 + float(value[0]))
    generator = torch.Generator().manual_seed(0)
    start = deviation * torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    path = simulate(process, model, start, times=times, method="euler", seed=0)
    assert float(path.final.std()) / END == pytest.approx(1, abs=0.04 + Z / math.sqrt(2 * 4000))
    running = annealing(power).running
    targets = adjoint_targets(process, None, path, torch.zeros_like(start), running=running)
    for k in (0, 30, 60):
        at = targets.time == times[k]
        state, adjoint = targets.state[at], targets.prediction[at] / -SIGMA
        slope = float((state * adjoint).sum() / state.square().sum())
        rest = adjoint - slope * state
        error = float(rest.std() / state.std()) / math.sqrt(state.numel())
        expected = float(value[round(float(times[k]) * (len(fine) - 1))])
        assert slope == pytest.approx(expected, abs=0.06 * expected + Z * error), k


@pytest.mark.parametrize("control", [0.0, -0.7])
def test_the_mean_weight_of_annealed_paths_is_the_normaliser_whatever_the_control(control):
    """Exactly so on a grid of 6 steps, where the integral of the running cost is off by far more."""
    anneal = annealing()
    start = START * torch.randn(40_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(x, t):
        return control * x

    path = simulate(anneal.process, model, start, times=anneal.process.times(6), method="euler", seed=2)
    weight = torch.exp(anneal.log_weights(path) - math.log(2 * math.pi * END**2))
    error = float(weight.std()) / math.sqrt(40_000)
    assert error < 0.02
    assert abs(float(weight.mean()) - 1) < Z * error


def test_without_a_control_and_with_short_steps_weights_are_those_of_jarzynski():
    anneal = annealing(2.0)
    start = START * torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = anneal.process.times(400)
    path = simulate(anneal.process, None, start, times=times, method="euler", seed=2)
    f = torch.stack([anneal.running(x, t.expand(len(x))) for x, t in zip(path.states, times, strict=True)])
    integral = ((f[1:] + f[:-1]) / 2 * times.diff()[:, None]).sum(dim=0)
    gap = anneal.log_weights(path) + integral
    # The sum over 400 steps of what each has in O(h^1.5), at random.
    assert gap.abs().max() < 0.1 < integral.abs().max()


# ---- the learners


def linear(scale=1.0):
    """A line in the state with coefficients that are lines in the time: enough for what is asked of it here."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(2, 5, 2, dtype=torch.float64))

        def forward(self, state, time):
            powers = torch.stack([time**n for n in range(5)], dim=1)
            slope, constant = (powers @ part for part in self.table)
            return scale * (slope * state + constant)

    return Linear()


SETTINGS = Settings(
    rounds=25, paths=300, updates=25, batch=800, kept=5, steps=15, deviation=1.5, sigma=1.3, learning_rate=0.15
)
# Paths are drawn anew after few updates, and steps are short: lean adjoints on paths have the bias of Euler's, which
# bridges to outcomes do not.
FRESH = dataclasses.replace(SETTINGS, rounds=60, updates=6, kept=1, steps=30, learning_rate=0.05)
# By weights the control is that of the optimum's own steps, which end too wide: by 13% in 15 of them, 6% in 30.
SHORT = dataclasses.replace(SETTINGS, steps=30)


def learner(kind, settings=SETTINGS, energy=gaussian_energy):
    if kind == "reweighted":
        settings = dataclasses.replace(settings, reweighted=0.8, mode_width=0.6)
    if kind in ("as", "reweighted"):
        return AdjointSampling(energy, 2, linear(), settings)
    if kind == "am":
        return AdjointMatching(energy, 2, linear(), dataclasses.replace(settings, kept=1))
    return AnnealedSampling(energy, 2, linear(), linear(), settings)


@pytest.mark.parametrize("kind", ["as", "reweighted", "am", "naas"])
def test_learners_reach_a_gaussian_target_and_its_normaliser(kind):
    """What a control gains: the effective sample size, from below a half. Bounds are of the noise of kept outcomes."""
    settings = {"am": FRESH, "reweighted": SHORT}.get(kind, SETTINGS)
    sampler = learner(kind, settings)
    before = sampler.sample(4000, seed=10**6)
    assert sampler.energy.calls == 0  # of samples nothing is counted
    for _ in range(settings.rounds):
        logged = sampler.round()
    after = sampler.sample(4000, seed=10**6)

    def share(w):
        return float(torch.exp(2 * w.logsumexp(0) - (2 * w).logsumexp(0))) / len(w)

    assert share(before.log_weight) < 0.5 and share(after.log_weight) > 0.6
    error = after.final.mean(dim=0) - MEAN
    assert (error.abs() < 0.1 * VARIANCE.sqrt()).all()
    assert ((after.final.std(dim=0) / VARIANCE.sqrt() - 1).abs() < 0.1).all()
    log_mean = float(after.log_weight.logsumexp(0)) - math.log(4000)
    assert log_mean == pytest.approx(LOG_Z, abs=0.05)
    paths = settings.paths * (settings.rounds - 1 + settings.kept)  # the first round fills what is kept
    assert logged["energy_calls"] == paths * {"naas": 3 * settings.steps, "reweighted": 2}.get(kind, 1)


@pytest.mark.parametrize("kind", ["as", "reweighted", "am", "naas"])
def test_a_run_that_is_resumed_is_the_run(kind):
    """To the bit: networks, what is kept, draws and counts are in the state."""
    settings = Settings(rounds=4, paths=20, updates=3, batch=16, kept=2, steps=5)
    whole, first, second = (learner(kind, settings) for _ in range(3))
    for _ in range(4):
        logged = whole.round()
    for _ in range(2):
        first.round()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        resumed = second.round()
    assert logged == resumed
    assert torch.equal(whole.sample(5, seed=1).final, second.sample(5, seed=1).final)


def test_outcomes_that_are_reweighted_have_the_law_of_the_target_whatever_drew_them():
    """Ends of a walk without a control, a Gaussian around 0: their shares have the target's mean and variance, within 5
    errors. A row with half of all weight is left with N^(-1/2) of it; a part that is drawn alike is alike.
    """
    settings = Settings(paths=20_000, kept=1, steps=8, deviation=1.5, updates=1, reweighted=1.0)
    sampler = learner("as", settings)
    sampler.round()
    final, slope, log_weight = sampler.outcomes.rows
    shares = sampler._shares()
    for moment, known in ((final, MEAN), ((final - MEAN).square(), VARIANCE)):
        found = shares @ moment
        error = (shares.square() @ (moment - known).square()).sqrt()
        assert ((found - known).abs() < Z * error).all() and bool((error < 0.02).all())
    ahead = torch.arange(len(final)) == 7
    sampler.outcomes.rows = (final, slope, torch.where(ahead, 50.0, log_weight * 0))
    assert float(sampler._shares()[7]) == pytest.approx(1)  # the others' weights are nothing beside it
    sampler.outcomes.rows = (final, slope, torch.where(ahead, math.log(20_000), log_weight * 0))
    most = 20_000**-0.5  # its share was about a half
    assert float(sampler._shares()[7]) == pytest.approx(most / (0.5 + most), rel=1e-3)
    sampler.settings = dataclasses.replace(settings, reweighted=0.25)
    assert float(sampler._shares().min()) == pytest.approx(0.75 / 20_000 + 0.25 / 40_000 / (0.5 + most), rel=1e-3)
    assert float(sampler._shares().sum()) == pytest.approx(1)
    drawn = sampler.outcomes.drawn(100, sampler.generator, (torch.arange(20_000) == 7).double())
    assert torch.equal(drawn[0], final[7].expand(100, 2))


@pytest.mark.parametrize("kind", ["as", "reweighted", "am", "naas"])
def test_an_energy_that_is_no_number_is_named_and_leaves_what_was(kind):
    def broken(state):
        return torch.where(state[:, 0] > 0.5, float("nan"), gaussian_energy(state))

    sampler = learner(kind, energy=broken)
    with pytest.raises(EnergyError, match=r"the energy of row \d+ is nan: an energy must be finite"):
        sampler.round()
    assert sampler.round_number == 0
    assert all(bool((parameter == 0).all()) for parameter in sampler.models.parameters())


def test_adjoint_matching_has_states_of_its_last_paths_alone():
    """All of them, each with the gradient at the end of its own path; earlier ones are refused by name."""
    settings = Settings(rounds=2, paths=20, updates=3, batch=16, kept=1, steps=5)
    sampler = learner("am", settings)
    sampler.round()
    (path,) = sampler._draw(20, seed=settings.seed * 1_000_003 + 1)  # as its second round will
    states, slope = path.states, cost_gradient(sampler.cost, path.final)
    sampler.round()
    state, time, prediction = sampler.states.rows
    assert len(time) == 20 * 5
    for k in range(5):
        now = time == path.times[k]
        assert torch.equal(state[now], states[k])
        torch.testing.assert_close(prediction[now], -slope)
    with pytest.raises(ValueError, match="kept must be 1"):
        AdjointMatching(gaussian_energy, 2, linear(), dataclasses.replace(settings, kept=2))
    for given in ({"reweighted": 0.5}, {"mode_width": 0.1}):
        with pytest.raises(ValueError, match="reweighted and mode_width are of outcomes that are kept"):
            AdjointMatching(gaussian_energy, 2, linear(), dataclasses.replace(settings, **given))


def test_a_path_that_diverges_is_named():
    def steep(x):
        return 1e4 * x.square().square().sum(dim=1)

    with pytest.raises((EnergyError, ValueError), match="steps are too long"):
        learner("naas", energy=steep).round()


def test_buffers_keep_the_last_rows():
    buffer = Buffer(3)
    with pytest.raises(ValueError, match="no rows"):
        buffer.drawn(1, torch.Generator())
    buffer.add(torch.arange(2), torch.arange(2) * 10)
    buffer.add(torch.arange(2, 4), torch.arange(2, 4) * 10)
    assert buffer.rows[0].tolist() == [1, 2, 3] and buffer.rows[1].tolist() == [10, 20, 30]
    one, ten = buffer.drawn(100, torch.Generator().manual_seed(0))
    assert set(one.tolist()) == {1, 2, 3} and torch.equal(ten, one * 10)


def test_gradients_are_cut_in_norm_and_counted():
    slope = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    cut, share = clipped(slope, 1.0)
    assert torch.allclose(cut, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64))
    assert share == pytest.approx(1 / 3)
    assert torch.equal(clipped(slope, math.inf)[0], slope)


def test_energies_are_counted_by_rows():
    energy = Counted(gaussian_energy)
    energy(torch.zeros(7, 2, dtype=torch.float64))
    cost_gradient(energy, torch.zeros(3, 2, dtype=torch.float64))
    assert energy.calls == 10


# ---- networks


def test_a_gradient_beside_a_network_is_cut_counted_and_left_out_at_time_0():
    energy = Counted(gaussian_energy)
    network = Preconditioned(linear(), energy, largest=2.0).double()
    state = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    assert bool((network(state, time) == 0).all())  # it begins as the reference
    torch.nn.init.ones_(network.strength[-1].bias)
    before = energy.calls
    found = network(state, time)
    assert energy.calls - before == 4
    slope = (state - MEAN) / VARIANCE
    assert bool((slope.norm(dim=1) > 2).any()) and bool((slope.norm(dim=1) < 2).any())
    expected = -clipped(slope, 2.0)[0] * (time > 0)[:, None]
    torch.testing.assert_close(found, expected)
    found.sum().backward()  # its parameters are learned, the gradient is as it is
    assert all(parameter.grad is not None for parameter in network.parameters())
    sampler = AdjointSampling(energy, 2, network, Settings(rounds=1, paths=10, updates=2, batch=8, kept=1, steps=4))
    before = energy.calls
    assert sampler.energy is energy
    sampler.round()
    in_paths, at_ends = 10 * 3, 10  # at time 0 there is none
    assert in_paths + at_ends <= energy.calls - before <= in_paths + at_ends + 2 * 8


@pytest.mark.parametrize("layers", [1, 2])
def test_networks_begin_at_zero_and_particles_turn_shift_and_swap_with_their_prediction(layers):
    assert bool((Perceptron(2, scale=1.0, output=3.0, octaves=2)(torch.randn(4, 2), torch.rand(4)) == 0).all())
    torch.manual_seed(0)
    network = ParticleNetwork(4, 2, scale=2.0, output=1.0, hidden=16, layers=layers).double()
    torch.nn.init.normal_(network.pair[-1].weight)
    state = 3 * torch.randn(5, 4, 2, dtype=torch.float64)
    time = torch.rand(5, dtype=torch.float64)

    def flat(x):
        return network(x.reshape(5, 8), time).view(5, 4, 2)

    moved = flat(state)
    assert bool((moved.abs() > 0.01).any())
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(flat(state @ turn + 7.0), moved @ turn, atol=1e-10)
    assert torch.allclose(flat(state[:, order]), moved[:, order], atol=1e-10)
    assert moved.mean(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Brownian(2.0, 1.0), "0 < smallest <= largest"),
        (lambda: Brownian.reaching(0.0, 2.0, 5), "deviation must be > 0"),
        (lambda: Annealing(gaussian_energy, 0.0), "deviation must be > 0"),
        (lambda: Annealing(gaussian_energy, 1.0, 0.0), "sigma must be > 0"),
        (lambda: Annealing(gaussian_energy, 1.0, 1.0, 0.5), "power must be at least 1"),
        (lambda: Settings(rounds=0), "rounds must be at least 1"),
        (lambda: Settings(sigma=0.0), "sigma must be > 0"),
        (lambda: Settings(ratio=0.5), "ratio must be at least 1"),
        (lambda: Settings(grid=0.5), "grid must be at least 1"),
        (lambda: Settings(reweighted=1.5), r"reweighted must be in \[0, 1\]"),
        (lambda: Settings(mode_width=1.0), "mode_width must be at least 0 and below deviation"),
        (lambda: Preconditioned(linear(), gaussian_energy, largest=0.0), "largest must be > 0"),
        (lambda: Buffer(0), "capacity must be at least 1"),
    ],
)
def test_what_is_refused(make, fault):
    with pytest.raises(ValueError, match=fault):
        make()


def test_weights_of_other_paths_are_refused():
    anneal = annealing()
    start = torch.zeros(2, 2, dtype=torch.float64)
    times = anneal.process.times(3)
    with pytest.raises(ValueError, match="method='euler'"):
        anneal.log_weights(simulate(anneal.process, None, start, times=times, seed=0))
    with pytest.raises(ValueError, match="another process"):
        anneal.log_weights(simulate(annealing(2.0).process, None, start, times=times, method="euler", seed=0))
    process, times = brownian()
    with pytest.raises(ValueError, match="shape of final"):
        projected_targets(process, times, start, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        projected_targets(process, times, start, start + math.nan)
    with pytest.raises(ValueError, match="must be at least 0 and below the reference"):
        projected_targets(process, times, start, start, mode_width=1.6)


def test_the_density_of_a_gaussian_is_torchs():
    state = torch.randn(3, 2, dtype=torch.float64)
    law = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), math.sqrt(0.7))
    assert torch.allclose(gaussian_log_density(state, 0.7), law.log_prob(state).sum(dim=1))
    assert isinstance(matching.loss(lambda x, t: x, Targets(state, state[:, 0], state, state[:, 0])).item(), float)
