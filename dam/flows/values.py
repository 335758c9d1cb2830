"""VGG-Flow: an ODE whose velocity is matched to a value's gradient, and that gradient learned from the HJB equation.

    min over v of  E[g(X_1) + integral |b_t(X_t) - b_base(X_t)|^2 / 2 dt],      dX = b_t(X) dt

has, with the value V_t(x) = the least of this from x at t on, the optimum b = b_base - grad V. With a = grad V, the
equation of Hamilton, Jacobi and Bellman, differentiated in x, and its end are

    d/dt a_t + (grad a_t) (b_base - a_t) + (grad b_base)^T a_t = 0,      a_1 = grad g

No path has noise here, so that this is not the objective of Adjoint Matching, and what is drawn is not the tilt of the
base by e^(-g). For a reward r and the source's lambda, g = -r / lambda, and a is 1 / lambda of its value gradient.

Source: Liu et al., Value Gradient Guidance for Flow Matching Alignment, arXiv 2512.05116.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.flows.adjoint import Adjoint, Cost, RunningCost, backwards, costs, linearised
from dam.flows.matching import Targets, ends_with_cost, joined, used_times
from dam.flows.processes import FlowProcess, Model, Process, for_each, over, predicted
from dam.flows.simulate import Path
from dam.ops._op import untraced


@untraced
def value_targets(
    process: Process, base: Model | None, value: Model, path: Path, *, at: Sequence[int] | None = None
) -> Targets:
    """Targets at the states of B paths of the current model, from the gradient of a value:

        prediction = base(X_t, t) - value(X_t, t) / gain,      weight = gain^2 h / (2 B)

    so that `dam.flows.matching.loss` is the mean over paths of 1/2 integral |b - b_base + value|^2 dt. Of a velocity
    the prediction is v_base - value. The value gets no gradient of it.

    Args:
        process: an ODE, as of `FlowProcess.ode`, by whose steps the path was drawn.
        base: whose drift b_base is; None is the process's reference.
        value: grad V, a function of states [B, ...] and times [B] as models are.
        path: of the model that is trained.
        at: numbers of the times whose states are used, of 0 .. K - 1; all unless given. They then stand for all.

    Raises:
        ValueError: the process has noise, or is not that of the path; the model has no part in the drift at a time;
            `at` names no times; or the value is not finite: the message names the row and the time.

    Source: Liu et al., arXiv 2512.05116, Eq. 14.
    """
    return _matched("value_targets", process, path, at, _valued(process, base, value, path))


@untraced
def pontryagin_targets(
    process: Process,
    base: Model | None,
    path: Path,
    terminal: Tensor,  # [B, ...]
    *,
    running: RunningCost | None = None,
    at: Sequence[int] | None = None,
) -> Targets:
    """The same with the lean adjoint of each path for the gradient of the value, which needs no network: VGG-Flow-PMP.

    Where the model that drew the paths meets its targets, they satisfy Pontryagin's maximum principle: without noise
    the lean adjoint is grad V along an optimal path, and not only in the mean.

    Args:
        process, base, path, at: as for `value_targets`; the path ends at time 1.
        terminal, running: as for `dam.flows.lean_adjoint`.

    Raises:
        ValueError: as `value_targets` and `lean_adjoint`; or the path ends before time 1.

    Source: Liu et al., arXiv 2512.05116, Prop. 3.
    """
    ends_with_cost("pontryagin_targets", path)
    entries = backwards(process, base, path, terminal, running=running)
    return _matched("pontryagin_targets", process, path, at, entries)


@untraced
def consistency_loss(
    process: Process,
    base: Model | None,
    value: Model,
    state: Tensor,  # [N, ...]
    time: Tensor,  # float64 [N] or []
    *,
    difference: float | None = None,
) -> Tensor:
    """The mean square over states of what is left of the HJB equation's gradient, differentiable in the value:

        d/ds value(x + s (b_base - value), t + s) + (grad b_base)^T value,      at s = 0

    It is 0 for grad V, and for other gradients too that do not end in grad g: `boundary_loss` goes with it.

    Args:
        process, base, value: as for `value_targets`.
        state, time: of paths of the model, as the `state` and `time` of what `Targets.drawn` gives.
        difference: s of a difference quotient in the place of the exact derivative by `torch.func.jvp`, for networks
            that this cannot differentiate; off by the order of s, and t + s is to be a time of the value.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: the process has noise; or autograd cannot follow the base.

    Source: Liu et al., arXiv 2512.05116, Eq. 12.
    """
    _without_noise("consistency_loss", process, time)
    state = state.detach()
    when = for_each(time, state)
    pull, drift, _ = linearised(process, base, state, time, create_graph=True)
    gradient = predicted(value, state, time)
    direction = drift - gradient
    if difference is None:
        derivative: Any = torch.func.jvp(value, (state, when), (direction, torch.ones_like(when)))
        change = derivative[1]
    else:
        change = (predicted(value, state + difference * direction, when + difference) - gradient) / difference
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (change.to(wide) + pull(gradient.to(state.dtype)).to(wide)).square().flatten(1).sum(dim=1).mean()


def boundary_loss(value: Model, path: Path, terminal: Tensor) -> Tensor:
    """The mean over rows of |value(X_1, 1) - grad g(X_1)|^2, differentiable in the value.

    Args:
        value: grad V, a function of states and times.
        path: that ends at time 1.
        terminal: grad g(X_1), [B, ...], from `dam.flows.cost_gradient`.

    Raises:
        ValueError: the path ends before time 1, or terminal has another shape than the states.

    Source: Liu et al., arXiv 2512.05116, Eq. 13.
    """
    ends_with_cost("boundary_loss", path)
    if terminal.shape != path.final.shape:
        raise ValueError(
            f"terminal must have the shape of the states, {list(path.final.shape)}; got {list(terminal.shape)}"
        )
    found = predicted(value, path.final, path.times[-1])
    wide = torch.promote_types(found.dtype, torch.float32)
    return (found.to(wide) - terminal.detach().to(wide)).square().flatten(1).sum(dim=1).mean()


def forward_looking(
    process: FlowProcess,
    model: Model,
    cost: Cost,
    residual: Model | None = None,
    *,
    schedule: Callable[[Tensor], Tensor] = torch.square,
) -> Model:
    """A value's gradient that begins with what the one-step outcome costs, and a residual that is learned:

        value(x, t) = schedule(t) grad g(E[X_1 | X_t = x]) + residual(x, t)

    Without a Jacobian of the outcome, which the source stops too. With schedule(1) = 1 it ends in grad g, but for the
    residual, so that a residual that starts at 0 meets the boundary from the first step on. Each state that the value
    is asked for is a call of the cost's gradient.

    Args:
        process: says what the model's predictions mean.
        model: that predicts the outcome: the base, or what is trained; neither it nor the cost gets gradients of this.
        cost: g, of states [B, ...], [B], which torch.func can differentiate.
        residual: a function of states and times as models are; none unless given.
        schedule: what the outcome counts at times [B]; t^2 unless given.

    Source: Liu et al., arXiv 2512.05116, Eq. 16.
    """

    def value(state: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():  # which forward derivatives, those of `consistency_loss`, go through
            outcome = process.data(predicted(model, state, time), state, time)
            slope = over(schedule(time), state) * torch.func.grad(lambda x: costs(cost, x).sum())(outcome)
        return slope if residual is None else slope + residual(state, time)

    return value


def gradient_of(potential: RunningCost) -> Model:
    """A value's gradient by a network of one number: grad V of V(states [B, ...], times [B]), [B].

    What is learned is then a gradient for certain, at the price of a derivative of higher order.
    """

    def value(state: Tensor, time: Tensor) -> Tensor:
        return torch.func.grad(lambda x: potential(x, time).sum())(state)

    return value


# ---- what they share


@torch.no_grad()
def _valued(process: Process, base: Model | None, value: Model, path: Path) -> Iterator[Adjoint]:
    """What `backwards` gives of an adjoint, of a value's gradient."""
    states = path.backwards()
    next(states)  # of the last time, which no step starts from
    for k, state in states:
        gradient = predicted(value, state, path.times[k])
        finite = gradient.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"the value's gradient of row {row} is not finite at time {float(path.times[k]):g}")
        yield Adjoint(k, state, gradient, process.drift_and_prediction(base, state, path.times[k])[1])


def _matched(name: str, process: Process, path: Path, at: Sequence[int] | None, entries: Iterator[Adjoint]) -> Targets:
    used = used_times(name, path, at)
    if process != path.steps.process:
        raise ValueError(f"{name}: the path is of another process")
    _without_noise(name, process, path.times[:-1])
    gain = process.gain(path.times[:-1]).tolist()
    still = [k for k in sorted(used) if not gain[k]]
    if still:
        raise ValueError(f"{name}: at time {float(path.times[still[0]]):g} the model has no part in the drift")
    return joined(path, entries, used, gain, [1.0] * len(gain))


def _without_noise(name: str, process: Process, time: Tensor) -> None:
    if bool(process.diffusion(time).any()):
        raise ValueError(
            f"{name}: {type(process).__name__} has noise, and VGG-Flow is about an ODE: draw and match by "
            "process.ode(); with noise there are adjoint_targets"
        )
