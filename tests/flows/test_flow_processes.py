"""Schedules, processes and mixtures: the equations that drifts, predictions and laws must satisfy, by autograd."""

import dataclasses
import functools
import math

import pytest
import torch

from dam.flows import (
    AnnealedLangevin,
    FlowProcess,
    GaussianMixture,
    Linear,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)

SCHEDULES = (Linear(), Trigonometric(), VariancePreserving(), VarianceExploding())
PREDICTS = ("velocity", "score", "noise", "data")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def mixture():
    """Two unequal humps of the line."""
    return GaussianMixture(float64(0.3, -0.4), float64(-1.0, 1.5)[:, None], float64(0.09, 0.36)[:, None])


def slope(function):
    """The derivative of a function of numbers, each by itself, as a function of them."""
    return torch.func.grad(lambda x: function(x).sum())


def fokker_planck(log_density, drift, diffusion, state):
    """d/dt log p of a law under a process, (-d/dx (b p) + sigma^2 / 2 d^2/dx^2 p) / p."""
    score = slope(log_density)
    curvature = slope(score)(state) + score(state).square()
    return -slope(drift)(state) - drift(state) * score(state) + diffusion.square() / 2 * curvature


def drift_on_line(process, model, time, state):
    return process.drift(model, state[:, None], time)[:, 0]


def log_marginal(law, schedule, time, state):
    """log density of alpha X_1 + beta eps for X_1 of a mixture, written out: the library's own is what is tested."""
    alpha, beta = schedule.alpha(time), schedule.beta(time)
    weight = law.log_weight.log_softmax(dim=0)
    parts = [
        torch.distributions.Normal(alpha * m[0], (alpha.square() * v[0] + beta.square()).sqrt()).log_prob(state)
        for m, v in zip(law.mean, law.variance, strict=True)
    ]
    return torch.logsumexp(weight[:, None] + torch.stack(parts), dim=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_derivatives_of_schedules_are_those_of_autograd(schedule):
    time = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    alpha_slope, beta_slope = slope(schedule.alpha)(time), slope(schedule.beta)(time)
    # Rounding of a few float64 operations on numbers below 500.
    torch.testing.assert_close(schedule.alpha_derivative(time), alpha_slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.beta_derivative(time), beta_slope, rtol=1e-12, atol=1e-12)
    kappa, beta = alpha_slope / schedule.alpha(time), schedule.beta(time)
    torch.testing.assert_close(schedule.kappa(time), kappa, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.eta(time), beta * (kappa * beta - beta_slope), rtol=1e-10, atol=1e-12)
    assert float(schedule.alpha(float64(1.0))) == 1.0
    assert bool((schedule.beta(time).diff() < 0).all())


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_every_prediction_gives_the_drift_of_the_marginals(schedule, noise):
    """By d/dt log p of the law that X_t is to have."""
    law = mixture()
    generator = torch.Generator().manual_seed(0)
    time = 0.1 + 0.8 * torch.rand(32, generator=generator, dtype=torch.float64)
    spread = (schedule.alpha(time).square() + schedule.beta(time).square()).sqrt()
    state = spread * torch.randn(32, generator=generator, dtype=torch.float64)
    for predicts in PREDICTS:
        process = FlowProcess(schedule, predicts=predicts, noise=noise)
        model = law.model(schedule, predicts)
        change = fokker_planck(
            functools.partial(log_marginal, law, schedule, time),
            functools.partial(drift_on_line, process, model, time),
            process.diffusion(time),
            state,
        )
        rate = slope(lambda t: log_marginal(law, schedule, t, state))(time)
        # Terms of up to 1e4 that cancel, of VarianceExploding's small noise.
        torch.testing.assert_close(change, rate, rtol=1e-8, atol=1e-8)


def test_langevin_keeps_the_density_that_it_is_given():
    """Where it does not change with time."""
    law = mixture()
    process = AnnealedLangevin(lambda state, time: law.log_density(state), sigma=0.8)
    state = torch.linspace(-3, 3, 41, dtype=torch.float64)
    time = torch.full_like(state, 0.5)
    flow = fokker_planck(
        lambda x: law.log_density(x[:, None]),
        functools.partial(drift_on_line, process, None, time),
        process.diffusion(time),
        state,
    )
    torch.testing.assert_close(flow, torch.zeros_like(flow), rtol=0, atol=1e-10)


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_one_step_outcome_is_the_mean_of_the_data(schedule, predicts):
    """E[X_1 | x] by quadrature over x_1."""
    law, process = mixture(), FlowProcess(schedule, predicts=predicts)
    data = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for t in (0.3, 0.7):
        time = float64(t)
        state = float64(-0.7, 0.1, 1.1)
        gap = (state[:, None] - schedule.alpha(time) * data) / schedule.beta(time)
        log_joint = law.log_density(data[:, None]) - gap.square() / 2
        expected = (log_joint.softmax(dim=1) * data).sum(dim=1)
        prediction = law.model(schedule, predicts)(state[:, None], time.expand(3))
        outcome = process.data(prediction, state[:, None], time)[:, 0]
        # The rule is exact to rounding for what is smooth and vanishes at the ends, but VarianceExploding's noise of
        # 0.13 at time 0.7 multiplies rounding.
        torch.testing.assert_close(outcome, expected, rtol=1e-9, atol=1e-9)
    # At time 1 it is the state, where noise falls infinitely fast too, but for what is left of it times a score < 5.
    time = float64(1.0)
    end = process.data(law.model(schedule, predicts)(state[:, None], time.expand(3)), state[:, None], time)[:, 0]
    torch.testing.assert_close(end, state, rtol=1e-12, atol=1e-12 + 5 * float(schedule.beta(time)) ** 2)


def test_noised_is_the_law_given_the_data():
    process = FlowProcess(Trigonometric())
    data, noise = float64(1.0, 2.0, 3.0, 4.0).view(2, 1, 2), float64(0.5, 0.5, -1.0, 1.0).view(2, 1, 2)
    time = float64(0.2, 0.6)
    expected = [math.sin(0.1 * math.pi) * 2.0 + math.cos(0.1 * math.pi) * 0.5]
    assert process.noised(data, time, noise)[0, 0, 1].item() == pytest.approx(expected[0], rel=1e-15)
    assert process.noised(data, float64(1.0, 1.0), noise).allclose(data, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("process", "first", "last"),
    [
        (FlowProcess(), 1 / 5, True),
        (FlowProcess(noise=0.0), 0.0, True),
        (FlowProcess(predicts="noise"), 1 / 5, False),
        (FlowProcess(VariancePreserving(), predicts="noise"), 0.0, False),
        (FlowProcess(VariancePreserving(), predicts="score"), 0.0, True),
        (FlowProcess(VarianceExploding(), predicts="data"), 0.0, True),
        (AnnealedLangevin(lambda x, t: -x.square().sum(dim=1)), 0.0, True),
    ],
)
def test_grids_begin_where_coefficients_are_finite(process, first, last):
    times = process.times(4)
    assert times.dtype == torch.float64 and len(times) == 5
    assert float(times[0]) == first and float(times[-1]) == 1.0
    torch.testing.assert_close(times.diff(), torch.full_like(times[1:], (1 - first) / 4), rtol=1e-14, atol=0)
    assert bool(process.finite(times[:-1]).all()) and bool(process.finite(times[-1])) == last


def test_initial_noise_is_standard_and_named_by_rows():
    process = FlowProcess(VarianceExploding(largest=3.0))
    drawn = process.initial((4000, 2, 3), seed=1, dtype=torch.float64)
    assert drawn.shape == (4000, 2, 3)
    count = drawn.numel()
    # z scores of mean and variance, a false alarm of 6e-7 each.
    assert abs(float(drawn.mean())) / 3 * math.sqrt(count) < 5
    assert abs(float(drawn.square().mean()) / 9 - 1) * math.sqrt(count / 2) < 5
    later = FlowProcess().initial((4000, 2, 3), start=0.25, seed=1, dtype=torch.float64)
    torch.testing.assert_close(later, drawn * 0.25, rtol=1e-14, atol=0)
    ids = torch.tensor([7, 3])
    some = process.initial((2, 2, 3), seed=1, row_ids=ids, dtype=torch.float64)
    assert torch.equal(some, drawn[ids])
    assert process.initial((2, 5), seed=1).dtype == torch.get_default_dtype()


def test_dependence_is_the_ratio_of_data_to_noise():
    assert FlowProcess().dependence(0.0) == 0.0
    assert FlowProcess().dependence(0.2) == pytest.approx(0.25)
    assert FlowProcess(VarianceExploding(largest=20.0)).dependence() == pytest.approx(0.05)
    left = math.exp(-20.1 / 4)
    assert FlowProcess(VariancePreserving()).dependence() == pytest.approx(left / math.sqrt(1 - left**2), rel=1e-12)


def test_tilted_mixture_is_the_density_times_the_tilt():
    generator = torch.Generator().manual_seed(2)
    law = GaussianMixture(
        torch.randn(3, generator=generator, dtype=torch.float64),
        torch.randn(3, 2, generator=generator, dtype=torch.float64),
        0.2 + torch.rand(3, 2, generator=generator, dtype=torch.float64),
    )
    linear, quadratic = float64(0.7, -0.3), float64(0.5, -0.4)  # wider along one axis
    tilted = law.tilted(linear, quadratic)
    state = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    reward = state @ linear - state.square() @ quadratic / 2
    ratio = tilted.log_density(state) - law.log_density(state) - reward
    # The same constant everywhere, -log Z, to rounding; and the tilt is a density.
    assert float(ratio.max() - ratio.min()) < 1e-12
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = tilted.log_density(grid).exp() * (axis[1] - axis[0]).square()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    mean, spread = tilted.moments()
    torch.testing.assert_close((mass[:, None] * grid).sum(dim=0), mean, rtol=1e-8, atol=1e-8)
    second = (mass[:, None] * (grid - mean).square()).sum(dim=0)
    torch.testing.assert_close(second.sqrt(), spread, rtol=1e-8, atol=1e-8)
    drawn = tilted.sample(20_000, generator)
    z = (drawn.mean(dim=0) - mean) / (spread / math.sqrt(len(drawn)))
    assert float(z.abs().max()) < 5
    with pytest.raises(ValueError, match="cannot be normalised"):
        law.tilted(linear, float64(0.5, -9.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowProcess(predicts="flow"), "predicts must be one of velocity, score, noise, data; got 'flow'"),
        (lambda: FlowProcess(noise=-1.0), "noise must be finite and at least 0; got -1"),
        (lambda: VariancePreserving(low=0.0), "rates must be 0 < low <= high; got 0.0 and 20.0"),
        (lambda: VarianceExploding(smallest=2.0, largest=1.0), "must be 0 < smallest < largest; got 2.0 and 1.0"),
        (lambda: AnnealedLangevin(lambda x, t: x, sigma=0.0), "sigma must be > 0 and finite; got 0"),
        (lambda: FlowProcess().times(0), "steps must be at least 1; got 0"),
        (lambda: mixture().model(Linear(), "flow"), "got 'flow'"),
        (lambda: dataclasses.replace(mixture(), variance=float64(1.0)), r"shapes must be \[M\], \[M, D\] and \[M, D\]"),
        (
            lambda: FlowProcess().drift(lambda x, t: x[:, :1], torch.zeros(2, 3), float64(0.5)),
            r"a model must predict the shape of its states, \[2, 3\]; got \[2, 1\]",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
