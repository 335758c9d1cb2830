"""Adjoint Matching: regression of a model's predictions to the lean adjoints of its own paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dam.flows.adjoint import Adjoint, RunningCost, backwards
from dam.flows.processes import Model, Process, predicted
from dam.flows.simulate import Path
from dam.ops._op import untraced


class Targets(NamedTuple):
    """What a model is to predict where: a weighted regression, whose loss any loop of training can call."""

    state: Tensor  # [N, ...]
    time: Tensor  # float64 [N]
    prediction: Tensor  # [N, ...]: to be predicted there, in the mean
    weight: Tensor  # float64 [N]: of the squared distance to it

    def drawn(self, count: int, generator: torch.Generator | None = None) -> Targets:
        """`count` of them, drawn uniformly with replacement: the same loss in expectation, for less of a network.

        Raises:
            ValueError: there are none to draw from.
        """
        number = len(self.time)
        if number == 0:
            raise ValueError("there are no targets to draw from")
        device = None if generator is None else generator.device
        at = torch.randint(number, (count,), generator=generator, device=device).to(self.time.device)
        state, time, prediction, weight = (value[at] for value in self)
        return Targets(state, time, prediction, weight * (number / count))


@untraced
def adjoint_targets(
    process: Process,
    base: Model | None,
    path: Path,
    terminal: Tensor,  # [B, ...]
    *,
    running: RunningCost | None = None,
    at: Sequence[int] | None = None,
) -> Targets:
    """Targets at the states of B paths of the current model, from the lean adjoint a_t on them:

        prediction = base(X_t, t) - sigma^2 / gain a_t,      weight = (gain / sigma)^2 h / (2 B)

    so that `loss` is the mean over paths of 1/2 integral |u_t(X_t) + sigma a_t|^2 dt. Of a velocity
    the prediction is v_base - eta a_t. Where the model that drew the paths is its minimiser, it is the optimum of

        min over u of  E[g(X_1) + integral f(X_t, t) + |u_t(X_t)|^2 / 2 dt],   p*(X) ~ p_base(X) e^(-g - integral f)

    whose X_1 is the base's, tilted by e^(-g) = e^(r / beta), if X_0 and X_1 are independent under the base.
    Of each time there are B in a row, in the order of the paths.

    Args:
        process, base, terminal, running: as for `dam.flows.lean_adjoint`.
        path: of the model that is trained, drawn anew after a few steps of an optimizer at the most.
        at: numbers of the times whose states are used, of 0 .. K - 1; all unless given. They then stand for all.

    Raises:
        ValueError: the process is not one whose optimum is the tilt, or not that of the path; the path ends before
            time 1; it has no noise in a step; or `at` names no times.

    Source: Domingo-Enrich et al., arXiv 2409.08861, Sec. 5.
    """
    refusal = process.why_not_matched()
    if refusal is not None:
        raise ValueError(f"adjoint_targets: {refusal}")
    ends_with_cost("adjoint_targets", path)
    used = used_times("adjoint_targets", path, at)
    gain, sigma = (f(path.times[:-1]).tolist() for f in (process.gain, process.diffusion))
    still = [k for k in sorted(used) if not (gain[k] and sigma[k])]
    if still:
        raise ValueError(
            f"adjoint_targets: at time {float(path.times[still[0]]):g} of the path there is no noise or no model: a "
            "control has nothing to be matched by"
        )
    return joined(path, backwards(process, base, path, terminal, running=running), used, gain, sigma)


def ends_with_cost(name: str, path: Path) -> None:
    """Refuses a path that ends before time 1, where the cost is; `name` is of who asks."""
    if float(path.times[-1]) != 1:
        raise ValueError(f"{name}: the path must end at time 1, where the cost is; got {float(path.times[-1]):g}")


def used_times(name: str, path: Path, at: Sequence[int] | None) -> set[int]:
    """Numbers of the times whose states are used, all but the last unless given; `name` is of who asks.

    Raises:
        ValueError: there are none, or one is no time of the path's steps.
    """
    count = len(path.steps)
    used = set(range(count)) if at is None else set(at)
    if not used or not used <= set(range(count)):
        raise ValueError(f"{name}: at must name times of 0 .. {count - 1}; got {sorted(used)[:8]}")
    return used


def joined(
    path: Path, entries: Iterable[Adjoint], used: set[int], gain: Sequence[float], sigma: Sequence[float]
) -> Targets:
    """Targets of a control -sigma a, b = b_base + sigma u, by adjoints a and the base's predictions at some times.

    Args:
        gain, sigma: of each step's start.
    """
    found, count = [], len(path.steps)
    for k, state, adjoint, prediction in entries:
        if k in used and prediction is not None:
            weight = (gain[k] / sigma[k]) ** 2 * path.steps.length[k] / 2 / max(1, len(state)) * count / len(used)
            per_row = torch.full((2, len(state)), weight, dtype=torch.float64, device=state.device)
            per_row[0] = float(path.times[k])
            found.append(Targets(state, per_row[0], prediction - sigma[k] ** 2 / gain[k] * adjoint, per_row[1]))
    return Targets(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def loss(model: Model, targets: Targets) -> Tensor:
    """sum over targets of weight |model(state, time) - prediction|^2, a scalar in at least float32.

    At its least it is not zero but the variance of the targets given their states.
    """
    prediction = predicted(model, targets.state, targets.time)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    square = (prediction.to(wide) - targets.prediction.to(wide)).square().flatten(1).sum(dim=1)
    return (targets.weight.to(wide) * square).sum()
