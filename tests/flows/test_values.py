"""VGG-Flow against its own optimum, that of an ODE: a linear-quadratic regulator is known in closed form."""

import dataclasses

import pytest
import torch

from dam import flows
from dam.flows import matching

FLOW = flows.FlowProcess().ode()
PREDICTS = ("velocity", "data", "noise", "score")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def mixture(*parts):
    means, variances = (torch.tensor(rows, dtype=torch.float64) for rows in zip(*parts, strict=True))
    return flows.GaussianMixture(torch.zeros(len(parts), dtype=torch.float64), means, variances)


MIXTURE = mixture(([-1.0, 0.4], [0.2, 0.3]), ([1.5, 0.5], [0.3, 0.1]))


class Regulator:
    """A Gaussian base N(m, s^2) of each coordinate and a cost q x^2 / 2 - l x, by the flow of straight lines.

    The base's flow takes x at t to m + (x - t m) s / S, S^2 = t^2 s^2 + (1 - t)^2. The value is P (x - y)^2 / 2, of the
    gap to the path y of the base that ends at the least cost, l / q, and with it

        1 / P = S^2 (1 / (q s^2) + I),    I = integral from t to 1 of 1 / S^2
    """

    mean, spread = float64(0.6, -1.0), float64(0.5, 1.4)
    linear, quadratic = float64(3.0, 1.0), float64(2.0, 0.5)

    def __init__(self):
        self.base = flows.GaussianMixture(float64(0.0), self.mean[None], self.spread.square()[None])

    def cost(self, state):
        return state.square() @ self.quadratic / 2 - state @ self.linear

    def parts(self, time):
        """S and 1 / (q s^2) + I at times [B], [B, 2] each."""
        t, s = time[:, None], self.spread
        width = (t.square() * s.square() + (1 - t).square()).sqrt()

        def angle(t):
            return torch.atan(((s.square() + 1) * t - 1) / s) / s

        return width, 1 / (self.quadratic * s.square()) + angle(torch.ones_like(t)) - angle(t)

    def value(self, state, time):
        """grad V."""
        width, total = self.parts(time)
        nearest = time[:, None] * self.mean + width / self.spread * (self.linear / self.quadratic - self.mean)
        return (state - nearest) / (width.square() * total)

    def moments(self):
        """Mean and standard deviation of X_1 at the optimum, from standard normals at time 0."""
        width, start = (part[0] for part in self.parts(float64(0.0)))
        _, end = (part[0] for part in self.parts(float64(1.0)))
        aim = self.linear / self.quadratic
        shrink = self.spread / width * end / start
        return aim + shrink * (aim - self.mean) * -width / self.spread, shrink


REGULATOR = Regulator()


def drawn(process, model, rows=6, count=12, seed=0):
    times = process.times(count)
    start = process.initial((rows, 2), start=float(times[0]), seed=seed, dtype=torch.float64)
    return flows.simulate(process, model, start, times=times, seed=seed)


def optimum(state, time):
    return REGULATOR.base.model(FLOW.schedule)(state, time) - REGULATOR.value(state, time)


def scattered(count=40):
    generator = torch.Generator().manual_seed(0)
    state = 2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return state, torch.rand(count, generator=generator, dtype=torch.float64)


# ---- the value


def test_the_closed_form_is_that_of_the_objective():
    """The optimum draws the moments of the closed form, and no change of the control costs less."""
    path = drawn(FLOW, optimum, rows=500, count=40)
    mean, spread = REGULATOR.moments()
    # Affine in X_0: by its own moments, to the error of 40 steps of second order.
    own_mean, own_spread = path.state(0).mean(dim=0), path.state(0).std(dim=0)
    torch.testing.assert_close(path.final.mean(dim=0), mean + spread * own_mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(path.final.std(dim=0), spread * own_spread, rtol=0, atol=1e-3)

    def objective(scale, shift):
        def control(state, time):
            return -scale * REGULATOR.value(state, time) + shift

        def model(state, time):
            return REGULATOR.base.model(FLOW.schedule)(state, time) + control(state, time)

        path = drawn(FLOW, model, rows=100, count=40)
        effort = [control(state, path.times[k].expand(100)).square().sum(dim=1) / 2 for k, state in path.backwards()]
        return float(
            (torch.trapezoid(torch.stack(effort[::-1]), path.times, dim=0) + REGULATOR.cost(path.final)).mean()
        )

    least = objective(1.0, 0.0)
    for change in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):
        assert objective(*change) > least + 1e-3  # 0.005 = 0.1^2 / 2 to first order, less what the outcome regains


def test_consistency_is_zero_at_the_value_s_gradient_and_nowhere_near():
    state, time = scattered()
    base = REGULATOR.base.model(FLOW.schedule)
    assert float(flows.consistency_loss(FLOW, base, REGULATOR.value, state, time)) < 1e-24  # rounding, squared
    # A quotient is off by its difference, here times second derivatives of the order of 10.
    quotient = flows.consistency_loss(FLOW, base, REGULATOR.value, state, time * 0.99, difference=1e-5)
    assert 1e-24 < float(quotient) < 1e-6
    for other in (
        lambda x, t: 1.05 * REGULATOR.value(x, t),
        lambda x, t: REGULATOR.value(x, t) + 0.1,
        lambda x, t: REGULATOR.value(x, 0.95 * t),
    ):
        assert float(flows.consistency_loss(FLOW, base, other, state, time)) > 1e-4


@pytest.mark.parametrize("predicts", PREDICTS)
def test_what_is_left_is_the_gradient_of_the_equation_of_hamilton_jacobi_and_bellman(predicts):
    """grad (dV/dt + grad V . b_base - |grad V|^2 / 2) of any V, by autograd, whatever the base predicts."""
    process = flows.FlowProcess(flows.VariancePreserving(0.5, 8.0), predicts).ode()
    base = MIXTURE.model(process.schedule, predicts)

    def potential(state, time):
        return torch.sin(state[:, 0] + 2 * time) * state[:, 1] + time * state.square().sum(dim=1)

    state, time = scattered()
    time = 0.1 + 0.8 * time
    x, t = state.clone().requires_grad_(), time.clone().requires_grad_()
    slope, rate = torch.autograd.grad(potential(x, t).sum(), (x, t), create_graph=True)
    equation = rate + (slope * process.drift(base, x, t)).sum(dim=1) - slope.square().sum(dim=1) / 2
    (left,) = torch.autograd.grad(equation.sum(), x)
    value = flows.gradient_of(potential)
    found = flows.consistency_loss(process, base, value, state, time)
    torch.testing.assert_close(found, left.square().sum(dim=1).mean(), rtol=1e-10, atol=0)


def test_losses_are_differentiable_in_the_value_through_every_term():
    """By central differences of the whole loss in a scale of the value, and of the boundary's."""
    state, time = scattered()
    base = MIXTURE.model(FLOW.schedule)
    path = drawn(FLOW, base)
    terminal = flows.cost_gradient(REGULATOR.cost, path.final)

    def losses(scale):
        def value(x, t):
            return scale * torch.sin(x) * (1 + t[:, None])

        return [
            flows.consistency_loss(FLOW, base, value, state, time),
            flows.consistency_loss(FLOW, base, value, state, 0.9 * time, difference=1e-3),
            flows.boundary_loss(value, path, terminal),
        ]

    scale = torch.nn.Parameter(float64(0.8)[0])
    for n, value in enumerate(losses(scale)):
        (slope,) = torch.autograd.grad(value, scale)
        above, below = losses(0.8 + 1e-5)[n], losses(0.8 - 1e-5)[n]
        assert float(slope) == pytest.approx(float(above - below) / 2e-5, rel=1e-7)


def test_the_gradient_of_a_network_of_one_number_is_one():
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

    def potential(state, time):
        return network(torch.cat((state, time[:, None]), dim=1))[:, 0]

    state, time = scattered(5)
    x = state.clone().requires_grad_()
    (slope,) = torch.autograd.grad(potential(x, time).sum(), x)
    value = flows.gradient_of(potential)
    torch.testing.assert_close(value(state, time), slope, rtol=1e-12, atol=1e-14)
    flows.consistency_loss(FLOW, MIXTURE.model(FLOW.schedule), value, state, time).backward()
    assert all(p.grad.abs().sum() > 0 for p in network[:2].parameters())


# ---- forward looking


def test_a_forward_looking_value_is_the_cost_s_gradient_where_the_base_would_arrive():
    """x + (1 - t) v on straight lines; it ends in grad g; derivatives go through it, gradients only to the residual."""
    weight, other = (torch.nn.Parameter(float64(0.3)[0]) for _ in range(2))

    def base(state, time):
        return other * MIXTURE.model(FLOW.schedule)(state, time)

    def cost(state):
        return torch.cos(2 * state).sum(dim=1)

    value = flows.forward_looking(FLOW, base, cost, lambda x, t: weight * x * t[:, None])
    state, time = scattered()
    ahead = state + (1 - time)[:, None] * base(state, time)
    expected = time.square()[:, None] * -2 * torch.sin(2 * ahead) + weight * state * time[:, None]
    torch.testing.assert_close(value(state, time), expected, rtol=1e-12, atol=1e-12)
    one = torch.ones_like(time)
    slope = flows.cost_gradient(cost, state)
    torch.testing.assert_close(value(state, one) - weight * state, slope, rtol=1e-12, atol=1e-12)
    loss = flows.consistency_loss(FLOW, MIXTURE.model(FLOW.schedule), value, state, 0.9 * time)
    near = flows.consistency_loss(FLOW, MIXTURE.model(FLOW.schedule), value, state, 0.9 * time, difference=1e-6)
    torch.testing.assert_close(loss, near, rtol=1e-4, atol=0)
    loss.backward()
    assert weight.grad is not None and other.grad is None
    linear = flows.forward_looking(FLOW, base, cost, schedule=lambda time: time)
    bare = flows.forward_looking(FLOW, base, cost)
    torch.testing.assert_close(linear(state, time) * time[:, None], bare(state, time), rtol=1e-12, atol=1e-12)


# ---- targets


@pytest.mark.parametrize("predicts", PREDICTS)
def test_targets_are_the_base_less_the_value_s_gradient(predicts):
    """b of the predictions is b_base - grad V, and the loss the integral of |b - b_base + grad V|^2 / 2."""
    process = flows.FlowProcess(predicts=predicts).ode()
    base = MIXTURE.model(process.schedule, predicts)
    path = drawn(process, base, rows=5)

    def value(state, time):
        return torch.sin(state) * time[:, None]

    targets = flows.value_targets(process, base, value, path)
    state, time = targets.state, targets.time
    found = process.drift(lambda *_: targets.prediction, state, time)
    torch.testing.assert_close(found, process.drift(base, state, time) - value(state, time), rtol=1e-9, atol=1e-9)
    expected = sum(
        path.steps.length[k] / 2 * value(path.state(k), path.times[k].expand(5)).square().sum(dim=1).mean()
        for k in range(12)
    )
    torch.testing.assert_close(matching.loss(base, targets), expected, rtol=1e-10, atol=0)
    halves = [flows.value_targets(process, base, value, path, at=range(n, 12, 2)) for n in (0, 1)]
    parts = sum(matching.loss(base, half) for half in halves) / 2
    torch.testing.assert_close(parts, expected, rtol=1e-10, atol=0)


def test_along_optimal_paths_the_lean_adjoint_is_the_value_s_gradient_in_second_order():
    """Row by row, without noise: Pontryagin's principle. Along the base's paths it is not."""
    base = REGULATOR.base.model(FLOW.schedule)
    off = {}
    for count in (20, 40):
        for name, model in (("optimum", optimum), ("base", base)):
            path = drawn(FLOW, model, count=count)
            targets = flows.pontryagin_targets(FLOW, base, path, flows.cost_gradient(REGULATOR.cost, path.final))
            gap = targets.prediction - optimum(targets.state, targets.time)
            off[name, count] = float(gap.abs().max())
    assert off["optimum", 40] < 0.3 * off["optimum", 20] < 3e-3
    assert off["base", 40] > 0.5


# ---- training


class Polynomial(torch.nn.Module):
    """Of each coordinate shift(t) + slope(t) x, Chebyshev polynomials of the time: a base's residual, or a value."""

    def __init__(self, degree=7):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, degree + 1, 2, dtype=torch.float64))

    def forward(self, state, time):
        angle = 2 * time - 1
        terms = [torch.ones_like(angle), angle]
        for _ in range(self.weight.shape[1] - 2):
            terms.append(2 * angle * terms[-1] - terms[-2])
        shift, slope = torch.einsum("nk,ckd->cnd", torch.stack(terms, dim=1), self.weight)
        return shift + slope * state


def minimised(parameters, loss, steps):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    optimizer.step(closure)


@pytest.mark.parametrize("learner", ["value", "forward-looking value", "pontryagin"])
def test_the_learned_control_is_the_optimum_of_the_relaxed_objective(learner):
    """Moments of what is drawn, and the control where paths are, to 1e-2, from a base that is far from it."""
    base = REGULATOR.base.model(FLOW.schedule)
    looks_forward = learner == "forward-looking value"
    # What looks forward has less left to learn.
    control, residual = (Polynomial(5 if looks_forward else 7) for _ in range(2))
    value = flows.forward_looking(FLOW, base, REGULATOR.cost, residual) if looks_forward else residual

    def model(state, time):
        return base(state, time) + control(state, time)

    for n in range(6 if learner == "pontryagin" else 2):
        path = drawn(FLOW, model, rows=12, count=24, seed=n)
        terminal = flows.cost_gradient(REGULATOR.cost, path.final)
        if learner == "pontryagin":
            targets, before = flows.pontryagin_targets(FLOW, base, path, terminal), control.weight.detach().clone()
            minimised([control.weight], lambda targets=targets: matching.loss(model, targets), 15)
            with torch.no_grad():  # not the whole step, which leaves the paths that its adjoints are of
                control.weight.lerp_(before, 0.3)
            continue
        at = flows.value_targets(FLOW, base, value, path, at=range(n, 24, 2))

        def of_value(at=at, path=path, terminal=terminal):
            consistency = flows.consistency_loss(FLOW, base, value, at.state, at.time)
            return consistency + flows.boundary_loss(value, path, terminal)

        minimised([residual.weight], of_value, (30, 20)[n] if looks_forward else (50, 30)[n])
        targets = flows.value_targets(FLOW, base, value, path)
        minimised([control.weight], lambda targets=targets: matching.loss(model, targets), 20)
    mean, spread = REGULATOR.moments()
    path = drawn(FLOW, model, rows=400, count=40, seed=9)
    own_mean, own_spread = path.state(0).mean(dim=0), path.state(0).std(dim=0)
    torch.testing.assert_close(path.final.mean(dim=0), mean + spread * own_mean, rtol=0, atol=1e-2)
    torch.testing.assert_close(path.final.std(dim=0), spread * own_spread, rtol=0, atol=1e-2)
    targets = flows.value_targets(FLOW, base, REGULATOR.value, path)
    effort = matching.loss(base, targets)  # of the optimum
    assert float(matching.loss(model, targets)) < 1e-4 * float(effort)  # (1e-2)^2
    assert float((REGULATOR.base.moments()[0] - mean).abs().min()) > 0.3


# ---- what is refused


def test_what_is_no_ode_is_refused_by_name():
    sde = flows.FlowProcess()
    model = MIXTURE.model(sde.schedule)
    path = drawn(sde, model)
    for refused in (
        lambda: flows.value_targets(sde, model, model, path),
        lambda: flows.pontryagin_targets(sde, model, path, torch.ones_like(path.final)),
        lambda: flows.consistency_loss(sde, model, model, *scattered(3)),
    ):
        with pytest.raises(
            ValueError, match=r"FlowProcess has noise, and VGG-Flow is about an ODE: draw .*process\.ode"
        ):
            refused()
    langevin = flows.AnnealedLangevin(lambda state, time: -state.square().sum(dim=1))
    with pytest.raises(ValueError, match="AnnealedLangevin has noise"):
        flows.consistency_loss(langevin, None, model, *scattered(3))


def test_paths_and_values_that_do_not_go_together_are_refused():
    model = MIXTURE.model(FLOW.schedule)
    path = drawn(FLOW, model)
    other = dataclasses.replace(FLOW, schedule=flows.Trigonometric())
    with pytest.raises(ValueError, match="value_targets: the path is of another process"):
        flows.value_targets(other, model, model, path)
    with pytest.raises(ValueError, match=r"value_targets: at must name times of 0 \.\. 11; got \[12\]"):
        flows.value_targets(FLOW, model, model, path, at=[12])

    def broken(state, time):
        return torch.where((time > 0.5)[:, None] & (state > 0), torch.nan, state)

    with pytest.raises(ValueError, match=r"the value's gradient of row \d is not finite at time 0\.9"):
        flows.value_targets(FLOW, model, broken, path)
    short = flows.simulate(FLOW, model, path.state(0), times=[0.0, 0.4, 0.8], seed=0)
    for refused in (
        lambda: flows.boundary_loss(model, short, torch.ones_like(short.final)),
        lambda: flows.pontryagin_targets(FLOW, model, short, torch.ones_like(short.final)),
    ):
        with pytest.raises(ValueError, match=r"must end at time 1, where the cost is; got 0\.8"):
            refused()
    with pytest.raises(ValueError, match=r"terminal must have the shape of the states, \[6, 2\]; got \[6\]"):
        flows.boundary_loss(model, path, torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="must predict the shape of its states"):
        flows.value_targets(FLOW, model, lambda state, time: state[:, :1], path)
