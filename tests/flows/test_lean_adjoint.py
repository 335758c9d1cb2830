"""The lean adjoint against closed forms, autograd through paths and the value function, and the memory it takes."""

import math

import pytest
import torch

from dam.benchmarks import memory
from dam.flows import (
    AnnealedLangevin,
    FlowProcess,
    GaussianMixture,
    Trigonometric,
    VariancePreserving,
    backwards,
    cost_gradient,
    lean_adjoint,
    simulate,
)

Z = 5.0  # a false alarm of one test: |z| above it has probability 6e-7
FLOW = FlowProcess()


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(mean, spread):
    return GaussianMixture(float64(0.0), mean[None], spread.square()[None])


BASE = gaussian(float64(0.6, -1.0), float64(0.5, 1.4))
MIXTURE = GaussianMixture(
    float64(0.3, -0.4),
    torch.tensor([[-1.0, 0.5], [1.5, -0.5]]).double(),
    torch.tensor([[0.3, 0.1], [0.4, 0.9]]).double(),
)


def quadratic(state):
    """Of which the gradient is state - (1, 2)."""
    return (state - float64(1.0, 2.0)).square().sum(dim=1) / 2


def drawn(process, model, count, rows=4, seed=0, **options):
    times = process.times(count)
    initial = process.initial((rows, 2), start=float(times[0]), seed=seed, dtype=torch.float64)
    return simulate(process, model, initial, times=times, seed=seed + 1, **options)


def lean(process, base, path, cost=quadratic, **options):
    return lean_adjoint(process, base, path, cost_gradient(cost, path.final), **options)


# ---- closed forms


def of_gaussian(schedule, count, first):
    """Lean adjoints along a path of another model than the base, and what they are by the regression of X_1 on X_t:
    a_t = Cov(X_t, X_1) / Var(X_t) grad g(X_1).
    """
    process = FlowProcess(schedule, "score" if schedule != FLOW.schedule else "velocity")
    base = BASE.model(schedule, process.predicts)
    times = torch.linspace(first, 1, count + 1, dtype=torch.float64)
    path = simulate(process, None, float64(0.3, 1.0)[None], times=times, seed=0)
    variance = BASE.variance[0]
    alpha, beta = schedule.alpha(times)[:, None, None], schedule.beta(times)[:, None, None]
    regression = alpha * variance / (alpha.square() * variance + beta.square())
    slope = path.final - float64(1.0, 2.0)
    return lean(process, base, path) / slope, regression, slope


@pytest.mark.parametrize(
    "schedule", [FLOW.schedule, VariancePreserving(0.5, 6.0), pytest.param(Trigonometric(), marks=pytest.mark.full)]
)
def test_of_a_gaussian_base_it_is_the_regression_of_the_outcome(schedule):
    """In second order of the step, by whoever's path; at no step at all, by extrapolation from two, to 1e-6."""
    coarse, regression, _ = of_gaussian(schedule, 80, first=0.2)
    fine, *_ = of_gaussian(schedule, 160, first=0.2)
    assert float((fine[::2] - regression).abs().max()) < 0.3 * float((coarse - regression).abs().max()) < 1e-3
    assert float(((4 * fine[::2] - coarse) / 3 - regression).abs().max()) < 1e-6


@pytest.mark.full
def test_of_a_gaussian_base_it_is_the_closed_form_to_1e_6_by_steps_alone():
    found, regression, slope = of_gaussian(FLOW.schedule, 2000, first=0.1)
    assert float((slope * (found - regression)).abs().max()) < 1e-6


def test_of_langevin_on_a_gaussian_it_decays_and_adds_up_the_running_cost():
    """Drift -c x and cost q x: a_t = e^(-c (1 - t)) (a_1 - q / c) + q / c."""
    process = AnnealedLangevin(lambda state, time: -0.7 * state.square().sum(dim=1), sigma=1.5)
    c, q = 1.5**2 / 2 * 1.4, 0.8
    path = simulate(process, None, torch.ones(3, 2, dtype=torch.float64), times=process.times(120), seed=0)
    found = lean(process, None, path, running=lambda state, time: q * state.sum(dim=1))
    decay = torch.exp(-c * (1 - path.times))[:, None, None]
    expected = decay * (path.final - float64(1.0, 2.0) - q / c) + q / c
    # (h c)^2 / 6 of second order, h = 1 / 120, times numbers of the order of 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


# ---- autograd


def replayed(path, model, rate=None, method="euler"):
    """Gradient of the cost from each time on in the state there, by autograd through all steps and their noise."""
    states = [path.state(0).clone().requires_grad_()]
    for k, noise in enumerate(path.steps.noises(states[0], range(len(path.steps)))):
        states.append(path.steps.step(model, k, states[k], noise))
    total = quadratic(states[-1])
    if rate is not None:
        rates = [rate(state, time.expand(len(state))) for state, time in zip(states, path.times, strict=True)]
        for k, length in enumerate(path.steps.length):
            total = total + length * (rates[k] if method == "euler" else (rates[k] + rates[k + 1]) / 2)
    slopes = list(torch.autograd.grad(total.sum(), states))
    if rate is not None and method == "heun":  # half of the rate at a state is of the step in front of it
        for k, length in enumerate(path.steps.length):
            slopes[k + 1] = (
                slopes[k + 1]
                - length
                / 2
                * torch.autograd.grad(
                    rate(states[k + 1], path.times[k + 1].expand(len(states[0]))).sum(), states[k + 1]
                )[0]
            )
    return torch.stack(slopes)


def rate(state, time):
    return time * torch.sin(state).sum(dim=1)


@pytest.mark.parametrize(
    ("base", "method"), [(MIXTURE, "euler"), (BASE, "euler"), (BASE, "heun")], ids=["mixture", "affine", "affine-heun"]
)
def test_along_a_path_of_the_base_it_is_the_gradient_by_autograd(base, method):
    model = base.model(FLOW.schedule)
    path = drawn(FLOW, model, 20, method=method)
    expected = replayed(path, model, rate, method)
    # The same sums in float64, in another order.
    torch.testing.assert_close(lean(FLOW, model, path, running=rate), expected, rtol=1e-11, atol=1e-11)
    kept = drawn(FLOW, model, 20, method=method, checkpoint_every=6)
    assert torch.equal(lean(FLOW, model, kept, running=rate), lean(FLOW, model, path, running=rate))


def test_by_heun_along_a_path_of_a_mixture_it_comes_to_the_gradient_as_steps_shrink():
    """Jacobians are taken at states, not at what Heun's first half leads to."""
    model = MIXTURE.model(FLOW.schedule)
    errors = []
    for count in (8, 64):
        path = drawn(FLOW, model, count, rows=32)
        errors.append(float((lean(FLOW, model, path) - replayed(path, model)).abs().mean()))
    assert errors[0] > 4 * errors[1], errors


def test_a_model_that_predicts_noise_has_its_last_step_by_euler_on_the_way_back_too():
    process = FlowProcess(predicts="noise")
    model = BASE.model(process.schedule, "noise")
    path = drawn(process, model, 20)
    assert not path.steps.second_order[-1] and all(path.steps.second_order[:-1])
    torch.testing.assert_close(lean(process, model, path), replayed(path, model), rtol=1e-11, atol=1e-11)


def test_at_the_optimum_both_adjoints_have_the_value_s_gradient_for_their_mean():
    """E[a_t | X_t = x] = grad V_t(x), of the lean adjoint and that of cost and control; path by path they differ.

    grad V = (v_base - v*) / eta, of the velocities of the base and of its tilt.
    """
    linear, width = float64(1.0, 2.0), float64(1.0, 1.0)
    optimum = BASE.tilted(linear, width)  # e^(-quadratic), up to a constant
    base, best = BASE.model(FLOW.schedule), optimum.model(FLOW.schedule)
    rows, first = 2000, 0.4
    state = float64(0.5, -0.2).expand(rows, 2)
    times = torch.linspace(first, 1, 31, dtype=torch.float64)
    path = simulate(FLOW, best, state, times=times, seed=7)
    when = float64(first)
    value_slope = (base(state[:1], when[None]) - best(state[:1], when[None])) / FLOW.schedule.eta(when)
    found = lean(FLOW, base, path)[0]

    def effort(state, time):  # |u|^2 / 2
        return (2 / FLOW.schedule.eta(time) * (best(state, time) - base(state, time)).square().sum(dim=1)) / 2

    moving = state.clone().requires_grad_()
    at, total = moving, torch.zeros(rows, dtype=torch.float64)
    for k, noise in enumerate(path.steps.noises(state, range(30))):
        before, start = effort(at, times[k].expand(rows)), at
        at = path.steps.step(best, k, start, noise)
        after = effort(at, times[k + 1].expand(rows)) if k < 29 else before  # eta is 0 at time 1, and so is |u|^2
        total = total + path.steps.length[k] * (before + after) / 2
    (full,) = torch.autograd.grad((total + quadratic(at)).sum(), moving)
    assert float((full - found).abs().mean()) > 0.05
    for adjoint in (found, full):
        z = (adjoint.mean(dim=0) - value_slope[0]) / (adjoint.std(dim=0) / math.sqrt(rows))
        # The bias of 30 steps is below half a standard error.
        assert float(z.abs().max()) < Z + 0.5, z


# ---- memory


def test_memory_grows_with_the_path_and_not_with_the_network():
    """More steps take their states more, and activations of the network are those of one evaluation."""
    rows, dimension, width = 16, 4, 1000
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(dimension, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(),
        torch.nn.Linear(width, dimension),
    )  # fmt: skip

    def model(state, time):
        return 0.1 * network(state)

    initial = FLOW.initial((rows, dimension), seed=0)
    state_bytes, activation = 4 * rows * dimension, 4 * rows * width

    def run(count, autograd=False, every=1, method="euler"):
        times = FLOW.times(count)
        path = simulate(FLOW, model, initial, times=times, method=method, seed=1, checkpoint_every=every)
        if autograd:
            state = initial.clone().requires_grad_()
            for k, noise in enumerate(path.steps.noises(state, range(count))):
                state = path.steps.step(model, k, state, noise)
            return torch.autograd.grad(state.sum(), initial if not state.requires_grad else state)
        for entry in backwards(FLOW, model, path, torch.ones_like(initial)):
            del entry
        return path

    run(2)
    few, many = (memory.tensor_bytes(lambda count=count: run(count)) for count in (4, 24))
    # Per step a state and its noise, and what Python keeps of times; an activation is 500 states.
    assert many - few < 20 * 6 * state_bytes < activation, (few, many)
    graph_few, graph_many = (memory.tensor_bytes(lambda count=count: run(count, autograd=True)) for count in (4, 8))
    assert graph_many - graph_few > 4 * 2 * activation
    # Heun's step has two evaluations, of which the first is let go before the second.
    assert memory.tensor_bytes(lambda: run(4, method="heun")) - few < activation
    sparse = memory.tensor_bytes(lambda: run(24, every=5))
    assert sparse <= many


def test_no_graph_is_left_behind():
    network = torch.nn.Linear(2, 2).double()

    def model(state, time):
        return network(state)

    path = drawn(FLOW, model, 5)
    for entry in backwards(FLOW, model, path, torch.ones_like(path.final)):
        assert not entry.adjoint.requires_grad and entry.adjoint.grad_fn is None
        assert entry.prediction is None or entry.prediction.grad_fn is None
    assert network.weight.grad is None


# ---- errors


def test_a_cost_says_what_is_wrong_with_it():
    state = float64(1.0, 0.0, 2.0)[:, None]
    with pytest.raises(ValueError, match=r"one number for each row, \[3\]; got \[\]"):
        cost_gradient(lambda x: x.sum(), state)
    with pytest.raises(ValueError, match="does not depend on the states in a way that autograd can follow"):
        cost_gradient(lambda x: x.detach().sum(dim=1), state)
    with pytest.raises(ValueError, match="not finite at row 1, where the cost is 0"):
        cost_gradient(lambda x: x.sum(dim=1).sqrt(), state)
    with torch.no_grad():
        assert torch.equal(cost_gradient(lambda x: 3 * x.sum(dim=1), state), torch.full_like(state, 3))


def test_terminal_gradients_and_adjoints_are_checked():
    model = BASE.model(FLOW.schedule)
    path = drawn(FLOW, model, 5)
    with pytest.raises(ValueError, match=r"terminal must have the shape of the states, \[4, 2\]; got \[4\]"):
        lean_adjoint(FLOW, model, path, torch.ones(4, dtype=torch.float64))

    def steep(state, time):
        return 1e200 * (1e200 * state)

    with pytest.raises(ValueError, match="the lean adjoint of row 0 is not finite at the first time"):
        lean_adjoint(FLOW, steep, path, torch.ones_like(path.final))
