"""Paths of flows: laws that are simulated, their order in the step, keyed draws, checkpoints and path weights."""

import math
import sys
from typing import NamedTuple

import pytest
import torch

import dam
from dam.diagnostics import kl_path
from dam.flows import (
    AnnealedLangevin,
    FlowProcess,
    GaussianMixture,
    Linear,
    Steps,
    VarianceExploding,
    VariancePreserving,
    simulate,
)

# A false alarm of one test: |z| above it has probability 6e-7.
Z = 5.0
MEAN, SPREAD = 0.6, 0.5
PRESERVING = VariancePreserving(low=0.5, high=6.0)  # of which much of the data is left at time 0


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(mean=MEAN, spread=SPREAD):
    return GaussianMixture(float64(0.0), float64(mean)[:, None], float64(spread**2)[:, None])


def humps():
    return GaussianMixture(float64(0.3, -0.4), float64(-1.0, 1.5)[:, None], float64(0.09, 0.36)[:, None])


class Moments(NamedTuple):
    mean: float
    variance: float
    covariance: torch.Tensor  # [K + 1], of X_k and X_K
    marginal: torch.Tensor  # [K + 1], variance of X_k


def moments(process, law, count, method, exact=True):
    """Of X_K and X_k, exactly: a step of an affine drift is affine in state and noise. X_0 has its law, or is noise."""
    times = process.times(count)
    model = law.model(process.schedule, process.predicts)
    steps = Steps(process, times, method, seed=0, row_ids=torch.arange(3))
    states, noises = float64(0.0, 1.0, 0.0)[:, None], float64(0.0, 0.0, 1.0)[:, None]
    alpha, beta = float(process.schedule.alpha(times[0])) * exact, float(process.schedule.beta(times[0]))
    mean, variance = alpha * MEAN, (alpha * SPREAD) ** 2 + beta**2
    marginal, factors = [variance], []
    for k in range(count):
        shift, with_state, with_noise = steps.step(model, k, states, noises)[:, 0].tolist()
        factor = with_state - shift
        mean, variance = factor * mean + shift, factor**2 * variance + (with_noise - shift) ** 2
        factors.append(factor)
        marginal.append(variance)
    later = [math.prod(factors[k:]) for k in range(count + 1)]
    return Moments(mean, variance, float64(*later) * float64(*marginal), float64(*marginal))


@pytest.mark.parametrize(
    ("schedule", "predicts", "noise"),
    [
        (Linear(), "velocity", 0.0),
        (Linear(), "velocity", 1.0),
        (PRESERVING, "score", 0.0),
        (PRESERVING, "score", 0.5),
        (PRESERVING, "score", 1.0),
        (VarianceExploding(0.05, 5.0), "noise", 0.0),
        (VarianceExploding(0.05, 5.0), "noise", 1.0),
    ],
)
def test_the_law_that_is_simulated_comes_to_the_data_s(schedule, predicts, noise):
    """In first order of the step by Euler-Maruyama and in second by Heun, or faster."""
    process, law = FlowProcess(schedule, predicts, noise), gaussian()
    late = float(schedule.beta(float64(1.0))) ** 2  # that VarianceExploding leaves

    def error(count, method):
        found = moments(process, law, count, method)
        return abs(found.mean - MEAN) + abs(found.variance - SPREAD**2 - late)

    for method, order in (("euler", 1), ("heun", 2)):
        coarse, fine = error(20, method), error(40, method)
        assert fine < 1.15 * 0.5**order * coarse, (method, coarse, fine)
    assert error(40, "heun") < 3e-3


def test_what_the_initial_noise_leaves_out_is_of_second_order():
    """The memoryless SDE forgets all but alpha(0) of the alpha(0) X_1 that its start lacks."""
    for high in (6.0, 12.0):
        process = FlowProcess(VariancePreserving(low=0.5, high=high), "score")
        left = float(process.schedule.alpha(float64(0.0)))
        lacking = moments(process, gaussian(), 40, "heun", exact=False).mean
        off = lacking - moments(process, gaussian(), 40, "heun").mean
        # Cov(X_0, X_1) / Var(X_0), of X_0 with about the variance of the noise, times alpha(0) E[X_1].
        assert off == pytest.approx(-(left**2) * SPREAD**2 * MEAN, rel=0.1)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_memoryless_paths_have_the_joint_law_of_data_and_noise(method):
    """Cov(X_t, X_1) = alpha_t Var(X_1), so none at time 0."""
    law, process = gaussian(), FlowProcess()
    found = moments(process, law, 80, method)
    expected = process.schedule.alpha(process.times(80)) * SPREAD**2
    # A step is 1 / 81; at the first of them Euler's variance is twice what it should be, and Heun's 1.09 times.
    assert float((found.covariance - expected).abs().max()) < {"euler": 5e-3, "heun": 1e-3}[method]
    correlated = []
    for noise in (0.0, 0.3):  # an ODE forgets nothing, and little noise little
        other = moments(FlowProcess(noise=noise), law, 80, method)
        correlated.append(float(other.covariance[0] / (other.marginal[0] * other.variance).sqrt()))
    assert correlated[0] > 1 - 1e-12 and 0.1 < correlated[1] < 0.4


@pytest.mark.parametrize(("predicts", "noise"), [("velocity", 0.0), ("velocity", 1.0), ("noise", 1.0), ("data", 0.0)])
def test_samples_of_a_mixture_have_its_law(predicts, noise):
    """A model that predicts noise or data has no drift at time 1, where the last step of Heun is Euler's."""
    law, process = humps(), FlowProcess(predicts=predicts, noise=noise)
    times = process.times(40)
    initial = process.initial((5000, 1), start=float(times[0]), seed=0, dtype=torch.float64)
    path = simulate(process, law.model(process.schedule, predicts), initial, times=times, seed=1)
    drawn = path.final[:, 0]
    mean, spread = law.moments()
    assert abs(float((drawn.mean() - mean) / spread)) * math.sqrt(len(drawn)) < Z
    grid = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    density = law.log_density(grid[:, None]).exp() * 1e-3
    for edge in (-1.2, -0.9, 0.0, 1.5, 2.2):
        below = float(density[grid < edge].sum())
        z = (float((drawn < edge).double().mean()) - below) / math.sqrt(below * (1 - below) / len(drawn))
        # The bias of 40 steps, up to 0.003 of a probability, is within a standard error.
        assert abs(z) < Z + 1, (edge, z)


def test_langevin_paths_keep_their_law():
    law = humps()
    process = AnnealedLangevin(lambda state, time: law.log_density(state), sigma=1.2)
    initial = law.sample(5000, torch.Generator().manual_seed(3))
    path = simulate(process, None, initial, times=process.times(20), seed=4)
    mean, spread = law.moments()
    assert abs(float((path.final.mean() - mean) / spread)) * math.sqrt(5000) < Z
    assert float((path.final - initial).abs().mean()) > 0.3  # they moved


# ---- draws


def drawn_path(rows=None, count=12, **options):
    """Of six rows in three dimensions, or of some of them."""
    process = FlowProcess()
    ids = torch.arange(100, 106)
    ids = ids if rows is None else ids[rows]
    times = process.times(count)
    generator = torch.Generator().manual_seed(5)
    law = GaussianMixture(
        torch.zeros(2, dtype=torch.float64),
        torch.randn(2, 3, generator=generator, dtype=torch.float64),
        torch.full((2, 3), 0.2, dtype=torch.float64),
    )
    initial = process.initial((len(ids), 3), start=float(times[0]), seed=1, row_ids=ids, dtype=torch.float64)
    model = law.model(process.schedule)
    return simulate(process, model, initial, times=times, seed=2, row_ids=ids, **options)


def test_a_path_depends_on_its_name_and_not_on_the_batch(monkeypatch):
    whole = drawn_path()
    for rows in ([0], [5, 1], [3, 2, 4]):
        # Sums over the parts of a mixture do not depend on the batch here: two of them.
        torch.testing.assert_close(drawn_path(rows).states, whole.states[:, rows], rtol=0, atol=1e-14)
    monkeypatch.setattr(sys.modules["dam.flows.simulate"], "_DRAWN_AT_ONCE", 7)  # a step at a time
    assert torch.equal(drawn_path().states, whole.states)
    assert not torch.equal(whole.states[1] - whole.states[0], whole.states[2] - whole.states[1])


def test_normals_are_standard_and_differ_by_step():
    noises = torch.stack(list(drawn_path().steps.noises(torch.zeros(6, 5000, dtype=torch.float64), range(3))))
    flat = noises.flatten(1)
    assert float((flat.mean(dim=1) * math.sqrt(flat.shape[1])).abs().max()) < Z
    assert float(((flat.square().mean(dim=1) - 1) * math.sqrt(flat.shape[1] / 2)).abs().max()) < Z
    between = flat @ flat.T / flat.shape[1]
    assert float((between - between.diag().diag()).abs().max()) * math.sqrt(flat.shape[1]) < Z
    # Fourth moment, 3 with a variance of 96.
    assert float((flat.pow(4).mean(dim=1) - 3).abs().max()) * math.sqrt(flat.shape[1] / 96) < Z


# ---- what is kept of a path


@pytest.mark.parametrize("every", [2, 5, 12, 20])
def test_states_between_checkpoints_are_made_again_to_the_bit(every):
    whole, path = drawn_path(), drawn_path(checkpoint_every=every)
    assert len(path.kept) == math.ceil(12 / every)
    assert torch.equal(path.states, whole.states)
    assert all(torch.equal(path.state(k), whole.state(k)) for k in (0, 1, 4, 5, 11, 12))
    assert [k for k, _ in path.backwards()] == list(range(12, -1, -1))


def test_a_model_that_was_trained_since_cannot_make_states_again():
    process = FlowProcess()
    network = torch.nn.Linear(2, 2).double()

    def model(state, time):
        return network(state)

    initial = torch.zeros(3, 2, dtype=torch.float64)
    path = simulate(process, model, initial, times=process.times(6), seed=0, checkpoint_every=3)
    path.state(4)
    with torch.no_grad():
        network.bias.add_(1e-3)
    with pytest.raises(ValueError, match="between times 3 and 6 of the path cannot be made again"):
        path.state(4)
    assert torch.equal(path.state(6), path.final)
    with pytest.raises(ValueError, match=r"the path has times 0 \.\. 6; got 7"):
        path.state(7)


# ---- weights


def test_weights_of_paths_are_those_of_the_base():
    """E_u[W] = 1, and E_u[W f(X_1)] = E_base[f(X_1)], of the chains of steps themselves, whatever their length."""
    process, times = FlowProcess(VariancePreserving(), "score"), FlowProcess(VariancePreserving(), "score").times(30)
    base, other = (gaussian(m).model(process.schedule, "score") for m in (0.0, 0.4))
    initial = process.initial((5000, 1), seed=0, dtype=torch.float64)
    options = {"times": times, "method": "euler"}
    path = simulate(process, other, initial, base=base, weights=True, seed=1, **options)
    plain = simulate(process, base, initial, seed=2, **options)
    log_weight = path.log_ratio.sum(dim=1)
    weight = log_weight.exp()
    assert abs(float((weight.mean() - 1) / (weight.std() / math.sqrt(len(weight))))) < Z
    for f in (torch.tanh, torch.square):
        ours, theirs = weight * f(path.final[:, 0]), f(plain.final[:, 0])
        error = math.sqrt(float(ours.var() + theirs.var()) / len(weight))
        assert abs(float(ours.mean() - theirs.mean())) / error < Z
    # The library's weights and figures of chains take them as they are.
    group = dam.adjoint_weights(path.log_ratio[None], torch.zeros(1, len(weight), dtype=torch.float64))
    torch.testing.assert_close(group.weight[0], len(weight) * log_weight.softmax(dim=0), rtol=1e-9, atol=0)
    assert float(kl_path(path.log_ratio[None])) == pytest.approx(-float(log_weight.mean()), rel=1e-12)


def test_a_constant_control_costs_half_its_square():
    process = AnnealedLangevin(lambda state, time: -state.square().sum(dim=1) / 2, sigma=0.5)
    control = float64(0.6, -0.8)
    initial = torch.zeros(4000, 2, dtype=torch.float64)
    path = simulate(
        process,
        lambda x, t: control.expand(len(x), 2),
        initial,
        times=process.times(10),
        method="euler",
        weights=True,
        seed=3,
    )
    # The log ratio of each path is N(-1/2, 1), as |u|^2 = 1 for a time of 1.
    z = (path.log_ratio.sum(dim=1) + 0.5) * 1.0
    assert abs(float(z.mean())) * math.sqrt(4000) < Z
    assert abs(float(z.square().mean()) - 1) * math.sqrt(4000 / 2) < Z


# ---- errors


def broken(value, after):
    return lambda state, time: torch.where(time[:, None] > after, value, 0.0) * torch.ones_like(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk4"}, "method must be one of euler, heun; got 'rk4'"),
        ({"base": broken(0.0, 0.5)}, "base is what paths are weighed against: give weights=True too"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1; got 0"),
        ({"times": [0.5, 0.5]}, "times must increase"),
        ({"times": [0.0, 1.0]}, "FlowProcess has infinite coefficients at time 0; process.times"),
        ({"weights": True}, "weights are of steps that are Gaussian: method='euler'; got 'heun'"),
        ({"weights": True, "method": "euler", "process": FlowProcess().ode()}, "paths without noise have no density"),
        ({"initial": torch.zeros(3)}, r"initial must be states \[B, ...\], at least \[B, 1\]; got \[3\]"),
        (
            {"model": broken(torch.nan, 0.5)},
            r"row 0 is not finite at time 0.6\d* \(step 3 of 5\): the model has diverged",
        ),
        ({"model": lambda state, time: state.sum()}, "a model must predict the shape of its states"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options, message):
    given = {"process": FlowProcess(), "model": broken(0.0, 0.5), "initial": torch.zeros(3, 2), "seed": 0}
    given = {**given, "times": FlowProcess().times(5), **options}
    with pytest.raises(ValueError, match=message):
        simulate(given.pop("process"), given.pop("model"), given.pop("initial"), **given)


def test_the_row_that_diverged_is_named_from_checkpoints_too():
    initial = torch.tensor([[0.0], [1.0], [2.0]])

    def model(state, time):
        return torch.where((state > 1.5) & (time[:, None] > 0.4), torch.inf, 0.0)

    with pytest.raises(ValueError, match=r"row 2 is not finite at time 0.6 \(step 6 of 10\)"):
        simulate(FlowProcess().ode(), model, initial, times=[k / 10 for k in range(11)], seed=0, checkpoint_every=3)


def test_an_empty_batch_and_images_are_states_too():
    process = FlowProcess()
    for shape in ((0, 2), (2, 3, 4, 4)):
        initial = process.initial(shape, seed=0)
        path = simulate(process, lambda x, t: -x.double(), initial, times=process.times(3), seed=0)
        assert path.states.shape == (4, *shape) and path.final.dtype == torch.float32
