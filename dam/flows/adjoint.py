"""The lean adjoint: how a cost along a path changes with its states, if the base alone moved them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dam.flows.processes import Model, Process, for_each
from dam.flows.simulate import Path
from dam.ops._op import untraced

Cost = Callable[[Tensor], Tensor]  # g: states [B, ...] to [B]
RunningCost = Callable[[Tensor, Tensor], Tensor]  # f: states [B, ...] and times [B] to [B]


class Adjoint(NamedTuple):
    """What there is at a time of a path, on the way back."""

    k: int  # the time's number
    state: Tensor  # [B, ...]
    adjoint: Tensor  # [B, ...]
    prediction: Tensor | None  # [B, ...], the base's; None at the last time, where no drift is needed


def costs(cost: Cost, state: Tensor) -> Tensor:
    """g at states [B, ...], [B], of which it is checked that they are so many."""
    value = cost(state)
    if value.shape != state.shape[:1]:
        raise ValueError(f"a cost must be one number for each row, [{len(state)}]; got {list(value.shape)}")
    return value


@untraced
def cost_gradient(cost: Cost, state: Tensor) -> Tensor:
    """grad g at states [B, ...], of each row's own cost.

    For a reward r at temperature beta, g = -r / beta.

    Raises:
        ValueError: the cost has another shape than [B], does not depend on the states, or the gradient of a row is not
            finite: the message names it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = state.detach().clone().requires_grad_()
        value = costs(cost, leaf)
        if not value.requires_grad:
            raise ValueError("the cost does not depend on the states in a way that autograd can follow")
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if slope is None:
            raise ValueError("the cost does not depend on the states in a way that autograd can follow")
    finite = slope.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"the gradient of the cost is not finite at row {row}, where the cost is {float(value.detach()[row]):g}"
        )
    return slope


@untraced
def lean_adjoint(
    process: Process,
    base: Model | None,
    path: Path,
    terminal: Tensor,  # [B, ...]
    *,
    running: RunningCost | None = None,
) -> Tensor:
    """The lean adjoint at every time of a path, [K + 1, B, ...]; `backwards` gives one after another.

        -d/dt a_t = (grad b_base(X_t, t))^T a_t + grad f(X_t, t),      a_1 = grad g(X_1)

    It is the adjoint of the cost along the path without what the control adds: that has a mean of zero at the optimum,
    where E[a_t | X_t] = grad V_t(X_t) and u* = -sigma grad V.

    Args:
        process, base: give the base's drift; None is the process's reference. The path may be of any model.
        path: of `dam.flows.simulate`, by whose method and steps it is solved. By Euler's this is the gradient of the
            discrete cost sum h f(X_k) + g(X_K) from each time on, along a path of the base, exactly; by Heun's, of the
            cost with the trapezoidal rule, where the drift is affine in the state, and elsewhere up to what is of the
            order of a step.
        terminal: grad g(X_1), from `cost_gradient`.
        running: f, differentiable by autograd; none unless given.

    Raises:
        ValueError: terminal has another shape than the states; it or an adjoint is not finite; the path is of another
            process; or autograd cannot follow the base.

    Source: Domingo-Enrich et al., arXiv 2409.08861, Sec. 5.
    """
    found = [entry.adjoint for entry in backwards(process, base, path, terminal, running=running)]
    return torch.stack(found[::-1])


@torch.no_grad()
def backwards(
    process: Process,
    base: Model | None,
    path: Path,
    terminal: Tensor,  # [B, ...]
    *,
    running: RunningCost | None = None,
) -> Iterator[Adjoint]:
    """The lean adjoint from the last time to the first: see `lean_adjoint`.

    Of the base's network what one evaluation needs is held at a time, whatever the path's length. An evaluation for
    each state, and for each step one product of a vector with its Jacobian by Euler's method, two by Heun's.
    """
    steps = path.steps
    if terminal.shape != path.final.shape:
        raise ValueError(
            f"terminal must have the shape of the states, {list(path.final.shape)}; got {list(terminal.shape)}"
        )
    if process != steps.process:
        raise ValueError("the path is of another process: its steps are not those that the adjoint would be solved by")
    if not bool(terminal.isfinite().all()):
        raise ValueError("terminal has entries that are not finite")
    terminal = terminal.detach().to(path.final.dtype)

    def slope_of(k: int, state: Tensor) -> Tensor:
        if running is None:
            return torch.zeros_like(state)
        time = for_each(steps.times[k], state)
        return cost_gradient(lambda x: running(x, time), state)

    states = path.backwards()
    k, state = next(states)
    adjoint = terminal
    yield Adjoint(k, state, adjoint, None)
    slope = slope_of(k, state) if steps.second_order[-1] else None
    pull = linearised(process, base, state, steps.times[k])[0] if steps.second_order[-1] else None
    for k, state in states:
        length = steps.length[k]
        if pull is None or slope is None:  # Euler's step
            pull, _, prediction = linearised(process, base, state, steps.times[k])
            slope = slope_of(k, state)
            adjoint = adjoint + length * (pull(adjoint) + slope)
        else:  # the transpose of Heun's
            late = adjoint + length / 2 * slope
            pulled = pull(late)
            pull = None  # the network's activations at the step's end, before there are those at its start
            pull, _, prediction = linearised(process, base, state, steps.times[k])
            slope = slope_of(k, state)
            adjoint = late + length / 2 * (pulled + pull(late + length * pulled) + slope)
        yield Adjoint(k, state, adjoint, prediction)
        if k == 0 or not steps.second_order[k - 1]:
            pull = slope = None
    if not bool(adjoint.isfinite().all()):
        row = int((~adjoint.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(
            f"the lean adjoint of row {row} is not finite at the first time: the base's drift is too steep"
        )


def linearised(
    process: Process, base: Model | None, state: Tensor, time: Tensor, *, create_graph: bool = False
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """v -> (grad b)^T v at states [B, ...], the drift b there, and the base's predictions, of both no graph.

    By autograd and not by `torch.func.vjp`, under which a compiled network is run as it was written, and each of its
    operations takes longer. A graph that one product uses up, as that of a compiled network may be, is made anew for
    the next.

    Args:
        create_graph: whether autograd follows the products in v.

    Raises:
        ValueError: autograd cannot follow the base.
    """

    def evaluated() -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            return leaf, *process.drift_and_prediction(base, leaf, time)

    leaf, drift, prediction = evaluated()
    if base is not None and not prediction.requires_grad:
        raise ValueError(
            "the base's prediction does not depend on its states in a way that torch can follow, as under "
            "torch.no_grad: call it without; parameters may be frozen by requires_grad_(False)"
        )
    graph: tuple[Tensor, ...] | None = (leaf, drift)

    def product(of: tuple[Tensor, ...], vector: Tensor, retain: bool) -> Tensor:
        return torch.autograd.grad(
            of[1], of[0], vector, retain_graph=retain, create_graph=create_graph, materialize_grads=True
        )[0]

    def pull(vector: Tensor) -> Tensor:
        nonlocal graph
        if not drift.requires_grad:  # of a reference that is zero
            return torch.zeros_like(state)
        graph = graph or evaluated()[:2]
        try:
            return product(graph, vector, retain=True)
        except RuntimeError as error:
            # A compiled network may give its activations away on the way back: each of its graphs has one product.
            if create_graph or "donated buffers" not in str(error):
                raise
        used, graph = graph, None
        return product(used, vector, retain=False)

    return pull, drift.detach(), prediction.detach()
