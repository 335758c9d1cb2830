"""Adjoint Matching ends in the tilt of the base: targets at the optimum, training, and the baselines beside it."""

import math

import pytest
import torch

from dam import flows
from dam.flows import (
    FlowProcess,
    GaussianMixture,
    Steps,
    VariancePreserving,
    adjoint_targets,
    cost_gradient,
    draft_loss,
    lean_adjoint,
    matching,
    refl_loss,
    simulate,
)

Z = 5.0  # a false alarm of one test: |z| above it has probability 6e-7
FLOW = FlowProcess()


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


class Tilt:
    """A base and a reward linear . x - quadratic x^2 / 2 of each coordinate, beta = 1: the tilt is a mixture too."""

    def __init__(self, base, linear, quadratic):
        self.base, self.linear, self.quadratic = base, linear, quadratic
        self.optimum = base.tilted(linear, quadratic)

    def cost(self, state):
        return state.square() @ self.quadratic / 2 - state @ self.linear


GAUSSIAN = Tilt(
    GaussianMixture(float64(0.0), float64(0.6, -1.0)[None], float64(0.25, 2.0)[None]),
    float64(3.0, 1.0),
    float64(2.0, 0.5),
)
FOUR = Tilt(
    GaussianMixture(
        float64(0.0, 0.4, -0.3, 0.1),
        torch.tensor([[-1.2, -1.0], [1.0, -1.1], [-1.0, 1.2], [1.3, 0.9]]).double(),
        torch.tensor([[0.10, 0.20], [0.15, 0.10], [0.20, 0.15], [0.10, 0.25]]).double(),
    ),
    float64(1.0, 0.4),
    float64(0.5, 0.2),
)
TWO = Tilt(
    GaussianMixture(
        float64(0.0, 0.3),
        torch.tensor([[-1.0, -0.5], [1.0, 0.6]]).double(),
        torch.tensor([[0.20, 0.30], [0.30, 0.15]]).double(),
    ),
    float64(0.6, 0.4),
    float64(0.6, 0.3),
)


def drawn(process, model, count, rows, seed, **options):
    times = process.times(count)
    initial = process.initial((rows, 2), start=float(times[0]), seed=seed, dtype=torch.float64)
    return simulate(process, model, initial, times=times, seed=seed + 1, **options)


def targets_of(tilt, process, path, **options):
    base = tilt.base.model(process.schedule, process.predicts)
    return adjoint_targets(process, base, path, cost_gradient(tilt.cost, path.final), **options)


# ---- targets


@pytest.mark.parametrize(
    ("process", "tilt"),
    [
        (FLOW, FOUR),
        (FlowProcess(VariancePreserving(0.5, 8.0), "score"), FOUR),
        pytest.param(FLOW, GAUSSIAN, marks=pytest.mark.full),
        pytest.param(FlowProcess(predicts="data"), GAUSSIAN, marks=pytest.mark.full),
    ],
    ids=["flow-mixture", "score-mixture", "flow-gaussian", "data-gaussian"],
)
def test_on_paths_of_the_optimum_targets_are_its_predictions_in_the_mean(process, tilt):
    """E[(target - v*(X_t)) phi(X_t)] = 0 for functions phi, at times early and late; with the base for v* it is not."""
    best = tilt.optimum.model(process.schedule, process.predicts)
    base = tilt.base.model(process.schedule, process.predicts)
    rows = 2000
    path = drawn(process, best, 40, rows, seed=3)
    targets = targets_of(tilt, process, path)
    lost = []
    for k in (1, 10, 20, 30, 38):
        at = slice((39 - k) * rows, (40 - k) * rows)  # targets come from the last time to the first
        state, time = targets.state[at], targets.time[at]
        assert float(time[0]) == float(path.times[k]) and torch.equal(state, path.state(k))
        for model, found in ((best, []), (base, lost)):
            residual = targets.prediction[at] - model(state, time)
            for phi in (torch.ones_like(state), state, torch.tanh(3 * state.flip(1))):
                product = residual * phi
                found.append(float((product.mean(dim=0) / (product.std(dim=0) / math.sqrt(rows))).abs().max()))
            if model is best:
                # The bias of 40 steps is below a standard error.
                assert max(found) < Z + 1, (k, found)
    assert max(lost) > 15


def test_targets_are_the_base_less_the_adjoint_and_the_loss_is_the_integral_of_the_paper():
    """1/2 integral |u + sigma a|^2 dt over paths, u = 2 (v - v_base) / sigma, sigma^2 = 2 eta."""
    base, model = GAUSSIAN.base.model(FLOW.schedule), FOUR.base.model(FLOW.schedule)
    path = drawn(FLOW, model, 10, rows=5, seed=0)
    terminal = cost_gradient(GAUSSIAN.cost, path.final)
    targets = adjoint_targets(FLOW, base, path, terminal)
    adjoint = lean_adjoint(FLOW, base, path, terminal)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(10):
        time = path.times[k].expand(5)
        sigma = (2 * FLOW.schedule.eta(path.times[k])).sqrt()
        control = 2 * (model(path.state(k), time) - base(path.state(k), time)) / sigma
        expected += path.steps.length[k] / 2 * (control + sigma * adjoint[k]).square().sum(dim=1).mean()
    torch.testing.assert_close(matching.loss(model, targets), expected, rtol=1e-12, atol=0)
    # Parts of it stand for all, each for its share.
    halves = [adjoint_targets(FLOW, base, path, terminal, at=at) for at in (range(0, 10, 2), range(1, 10, 2))]
    parts = sum(matching.loss(model, half) for half in halves) / 2
    torch.testing.assert_close(parts, expected, rtol=1e-12, atol=0)


def test_drawn_targets_are_the_same_loss_in_expectation():
    model = FOUR.base.model(FLOW.schedule)
    targets = targets_of(GAUSSIAN, FLOW, drawn(FLOW, model, 10, rows=5, seed=0))
    whole = float(matching.loss(model, targets))
    generator = torch.Generator().manual_seed(0)
    losses = float64(*[float(matching.loss(model, targets.drawn(20, generator))) for _ in range(200)])
    assert abs(float(losses.mean()) - whole) / (float(losses.std()) / math.sqrt(200)) < Z
    empty = matching.Targets(*(value[:0] for value in targets))
    with pytest.raises(ValueError, match="there are no targets to draw from"):
        empty.drawn(3)


def test_a_float32_network_is_matched_in_float32():
    network = torch.nn.Linear(3, 2)

    def model(state, time):
        return network(torch.cat((state, time[:, None]), dim=1))

    times = FLOW.times(4)
    path = simulate(FLOW, model, FLOW.initial((6, 2), start=float(times[0]), seed=0), times=times, seed=1)
    targets = adjoint_targets(FLOW, lambda state, time: -state, path, torch.ones_like(path.final))
    value = matching.loss(model, targets)
    value.backward()
    assert value.dtype == torch.float32 and network.weight.grad.isfinite().all()


@pytest.mark.full
def test_a_compiled_network_is_taken_as_it_is():
    """By every function, to the same numbers; of torch's compilers by the one that needs no C++."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def model(state, time):
        return network(torch.cat((state, time[:, None]), dim=1))

    found = []
    for one in (model, torch.compile(model, backend="aot_eager")):
        path = drawn(FLOW, one, 4, rows=3, seed=0)
        targets = adjoint_targets(FLOW, one, path, torch.ones_like(path.final))
        slopes = torch.autograd.grad(matching.loss(one, targets), list(network.parameters()))
        found.append([path.final, targets.prediction, *slopes])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "learner", ["adjoint matching", *(pytest.param(n, marks=pytest.mark.full) for n in ("value", "direct"))]
)
def test_a_step_that_is_compiled_whole_is_the_same(learner):
    """Paths and adjoints run as they are inside, of any number of steps; what is around them is traced. To roundings of
    another order.
    """
    network, value = (torch.nn.Linear(3, 2).double() for _ in range(2))
    modules = torch.nn.ModuleList((network, value))
    process = FLOW.ode() if learner == "value" else FLOW

    def model(state, time):
        return network(torch.cat((state, time[:, None]), dim=1)).tanh()

    def gradient(state, time):
        return value(torch.cat((state, time[:, None]), dim=1))

    def cost(state):
        return state.square().sum(dim=1) / 2

    def step(count):
        path = drawn(process, model, count, rows=3, seed=0)
        if learner == "direct":
            late = flows.refl_loss(FLOW, model, path.state(3), path.times[3], cost)
            loss = late + flows.draft_loss(path, model, cost)
        else:
            terminal = flows.cost_gradient(cost, path.final)
            if learner == "value":
                targets = flows.value_targets(process, model, gradient, path)
                loss = matching.loss(model, targets) + flows.boundary_loss(gradient, path, terminal)
                loss = loss + flows.consistency_loss(process, model, gradient, targets.state, targets.time)
            else:
                loss = matching.loss(model, adjoint_targets(FLOW, model, path, terminal))
        slopes = torch.autograd.grad(loss, list(modules.parameters()), materialize_grads=True, allow_unused=True)
        return loss, *slopes

    compiled = torch.compile(step, backend="aot_eager")
    for count in (4, 5):
        for plain, found in zip(step(count), compiled(count), strict=True):
            torch.testing.assert_close(plain, found, rtol=1e-12, atol=1e-12)


def test_a_compiled_and_frozen_base_serves_batches_of_any_size():
    """Its graph of many sizes gives away activations on the way back, which can then be gone but once."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    network.requires_grad_(False)

    def base(state, time):
        return network(torch.cat((state, time[:, None]), dim=1))

    compiled = torch.compile(base, backend="aot_eager")
    for rows in (1, 4, 5):
        path = drawn(FLOW, base, 4, rows=rows, seed=0)
        targets = [adjoint_targets(FLOW, one, path, path.final).prediction for one in (base, compiled)]
        torch.testing.assert_close(*targets, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (FLOW.ode(), {}, "with noise=0 a velocity that is matched to adjoints is not that of the tilted law"),
        (FlowProcess(noise=0.5), {}, "draw paths and match with noise=1"),
        (FLOW, {"at": [4]}, r"at must name times of 0 \.\. 3; got \[4\]"),
        (FLOW, {"at": []}, r"got \[\]"),
    ],
)
def test_what_would_not_end_in_the_tilt_is_refused(process, options, message):
    path = drawn(process, GAUSSIAN.base.model(process.schedule), 4, rows=2, seed=0)
    with pytest.raises(ValueError, match=message):
        targets_of(GAUSSIAN, process, path, **options)


# ---- training


class Affine(torch.nn.Module):
    """The base's velocity and what is affine in the state, of its own at each time of a grid: the optimum is such."""

    def __init__(self, base, times):
        super().__init__()
        self.base, self.times = base, times
        self.shift = torch.nn.Parameter(torch.zeros(len(times) - 1, 2, dtype=torch.float64))
        self.slope = torch.nn.Parameter(torch.zeros(len(times) - 1, 2, dtype=torch.float64))

    def forward(self, state, time):
        k = torch.searchsorted(self.times, time)
        last = len(self.times) - 1
        extra = self.shift[k.clamp(max=last - 1)] + self.slope[k.clamp(max=last - 1)] * state
        return self.base(state, time) + torch.where((k == last)[:, None], 0.0, extra)  # where no control can be

    @torch.no_grad()
    def fit(self, targets):
        """The loss's minimiser: a regression on the state by itself for each time."""
        residual = targets.prediction - self.base(targets.state, targets.time)
        x, y = (part.view(len(self.slope), -1, 2).flip(0) for part in (targets.state, residual))
        x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
        slope = ((x - x_mean) * (y - y_mean)).mean(dim=1) / (x - x_mean).square().mean(dim=1)
        self.slope.copy_(slope)
        self.shift.copy_(y_mean[:, 0] - slope * x_mean[:, 0])


def affine_moments(process, model, times):
    """Mean and standard deviation of X_K, exactly: of steps that are affine in each coordinate and its noise."""
    steps = Steps(process, times, "heun", seed=0, row_ids=torch.arange(3))
    states, noises = (float64(*rows)[:, None].expand(3, 2) for rows in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    mean = torch.zeros(2, dtype=torch.float64)
    variance = mean + process.schedule.beta(times[0]).square()
    for k in range(len(steps)):
        with torch.no_grad():
            shift, with_state, with_noise = steps.step(model, k, states, noises)
        mean = (with_state - shift) * mean + shift
        variance = (with_state - shift).square() * variance + (with_noise - shift).square()
    return mean, variance.sqrt()


def test_a_gaussian_base_is_trained_to_the_exact_tilt():
    """Mean and standard deviation of what the trained model draws, to 1e-2."""
    times = FLOW.times(20)
    model = Affine(GAUSSIAN.base.model(FLOW.schedule), times)
    tables = []
    for n in range(7):
        targets = targets_of(GAUSSIAN, FLOW, drawn(FLOW, model, 20, rows=3000, seed=10 + 2 * n))
        model.fit(targets)
        tables.append([table.detach().clone() for table in model.parameters()])
    slopes = torch.autograd.grad(matching.loss(model, targets), list(model.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-9  # of fewer than 1e6 terms, to rounding
    with torch.no_grad():  # of the last four, so that less of the noise of each batch is left
        for table, *found in zip(model.parameters(), *tables[3:], strict=True):
            table.copy_(torch.stack(found).mean(dim=0))
    mean, spread = GAUSSIAN.optimum.moments()
    before = GAUSSIAN.base.moments()
    assert float((before[0] - mean).abs().min()) > 0.2 and float((before[1] - spread).abs().min()) > 0.08
    for process, near in ((FLOW, 1e-2), (FLOW.ode(), 3e-2)):
        found = affine_moments(process, model, times)
        # An ODE forgets nothing, not that alpha X_1 is lacking at the first time of this grid, 1 / 21.
        torch.testing.assert_close(found[0], mean, rtol=0, atol=near)
        torch.testing.assert_close(found[1], spread, rtol=0, atol=1e-2)


def family(parameters):
    """The velocity of a mixture of which everything is trained."""
    return lambda state, time: GaussianMixture(parameters[0], parameters[1], parameters[2].exp()).model(FLOW.schedule)(
        state, time
    )


def kl(law, other, size=5.0, points=161):
    axis = torch.linspace(-size, size, points, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_law = law.log_density(grid)
    return float((log_law.exp() * (log_law - other.log_density(grid))).sum() * (axis[1] - axis[0]).square())


def test_a_mixture_of_the_plane_is_trained_to_the_exact_tilt():
    """KL(model || tilt) at most 0.01, from a base that is far from it, in a family that has the optimum."""
    base = TWO.base
    parameters = [p.clone().requires_grad_() for p in (base.log_weight, base.mean, base.variance.log())]
    model = family(parameters)
    for n, rows in enumerate((500, 500, 2500)):  # of the last as many as the noise asks for: about 5 / rows
        targets = targets_of(TWO, FLOW, drawn(FLOW, model, 20, rows, seed=30 + 2 * n))
        optimizer = torch.optim.LBFGS(parameters, max_iter=10, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, targets=targets):
            optimizer.zero_grad()
            value = matching.loss(model, targets)
            value.backward()
            return value.detach()

        optimizer.step(closure)
    trained = GaussianMixture(*(p.detach() for p in parameters[:2]), parameters[2].detach().exp())
    assert kl(base, TWO.optimum) > 0.3
    assert kl(trained, TWO.optimum) < 0.01


# ---- direct gradients


def test_the_direct_gradient_is_that_of_the_whole_sampler():
    """By central differences, through all steps and through the last; kept or computed again, the same to the bit."""
    tilt, count = GAUSSIAN, 6
    scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    base = tilt.base.model(FLOW.schedule)

    def model(state, time):
        return scale * base(state, time)

    for process in (FLOW, FLOW.ode()):
        path = drawn(process, model, count, rows=8, seed=0)

        def outcome(value, last, path=path):
            """The mean cost where the last steps alone have another scale."""
            with torch.no_grad():
                state, steps = path.state(count - last), range(count - last, count)
                for k, noise in zip(steps, path.steps.noises(state, steps), strict=True):
                    state = path.steps.step(lambda x, t: value * base(x, t), k, state, noise)
                return float(tilt.cost(state).mean())

        for last in (None, 1, 3):
            gradients = []
            for recompute in (True, False):
                value = draft_loss(path, model, tilt.cost, last=last, recompute=recompute)
                assert value.item() == pytest.approx(tilt.cost(path.final).mean().item(), rel=1e-13)
                gradients.append(torch.autograd.grad(value, scale)[0])
            assert torch.equal(*gradients)
            numeric = (outcome(1 + 1e-5, last or count) - outcome(1 - 1e-5, last or count)) / 2e-5
            assert float(gradients[0]) == pytest.approx(numeric, rel=1e-7, abs=1e-8)
    with pytest.raises(ValueError, match=r"last must be in 1 \.\. 6, the steps of the path; got 7"):
        draft_loss(path, model, tilt.cost, last=7)


def test_the_one_step_gradient_is_that_of_the_predicted_outcome():
    """d/d scale of g(x + (1 - t) scale v), of the straight lines of the linear schedule."""
    tilt = GAUSSIAN
    scale = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    base = tilt.base.model(FLOW.schedule)

    def model(state, time):
        return scale * base(state, time)

    path = drawn(FLOW, model, 6, rows=8, seed=0)
    state, time = path.state(4), path.times[4]
    value = refl_loss(FLOW, model, state, time, tilt.cost)
    velocity = base(state, time.expand(8))
    data = state + (1 - time) * 1.3 * velocity
    assert value.item() == pytest.approx(tilt.cost(data).mean().item(), rel=1e-12)
    expected = (cost_gradient(tilt.cost, data) * (1 - time) * velocity).sum(dim=1).mean()
    torch.testing.assert_close(torch.autograd.grad(value, scale)[0], expected, rtol=1e-11, atol=0)


def test_direct_gradients_narrow_what_matching_keeps():
    """Of a Gaussian's own mean and spread: DRaFT goes on to the reward's maximum, and below the spread of the tilt."""
    tilt, count = GAUSSIAN, 10
    law = tilt.base
    parameters = [p.clone().requires_grad_() for p in (law.log_weight, law.mean, law.variance.log())]
    optimizer = torch.optim.Adam(parameters, lr=0.2)
    for n in range(20):
        path = drawn(FLOW.ode(), family(parameters), count, rows=64, seed=2 * n)
        optimizer.zero_grad()
        draft_loss(path, family(parameters), tilt.cost, recompute=False).backward()
        optimizer.step()
    spread = (parameters[2].detach() / 2).exp()[0]
    assert float((spread / tilt.optimum.moments()[1]).max()) < 0.7
