"""Paths of flows and diffusions: Euler-Maruyama and Heun, draws that are keyed, states kept whole or by checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dam.flows.processes import Model, Process
from dam.ops import _checks, _philox
from dam.ops._op import untraced
from dam.ops._philox import Use

METHODS = ("euler", "heun")
# Numbers: those of a few rows and one step would take longer than a small network, and each takes a hundred bytes while
# it is drawn. 2^20 at once are a tenth faster.
_DRAWN_AT_ONCE = 2**16


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a path: which process, when, by which method, and what is drawn. Step k leads from time k to k + 1.

    `euler` is Euler-Maruyama: X + h b(X) + sigma sqrt(h) xi, with everything at the start of the step. `heun` takes the
    mean of the drifts at its start and at what that step leads to, and of the squared diffusions: as these do not
    depend on the state, of weak order 2. Where coefficients are infinite at time 1, as of a model that predicts noise,
    its last step is Euler's.

    A step is a function of its state that autograd can follow.
    """

    process: Process
    times: Tensor  # float64 [K + 1]
    method: str
    seed: int
    row_ids: Tensor  # int64 [B]

    def __len__(self) -> int:
        return len(self.times) - 1

    # Of all steps at once: for one at a time they would take as long as a small network.

    @functools.cached_property
    def length(self) -> list[float]:
        """h of each step."""
        return self.times.diff().tolist()

    @functools.cached_property
    def second_order(self) -> list[bool]:
        """Whether a step looks at its end."""
        return [self.method == "heun" and finite for finite in self.process.finite(self.times[1:]).tolist()]

    @functools.cached_property
    def spread(self) -> list[float]:
        """Standard deviation of what is drawn in a step."""
        variance = self.process.diffusion(self.times).square()
        mean = torch.where(
            torch.tensor(self.second_order, device="cpu"), (variance[:-1] + variance[1:]) / 2, variance[:-1]
        )
        return (self.times.diff() * mean).sqrt().tolist()

    def noises(self, like: Tensor, steps: range) -> Iterator[Tensor]:
        """Standard normals of each step, in the dtype of states [B, ...] and of their shape; many steps at once."""
        each = max(1, _DRAWN_AT_ONCE // max(1, like.numel()))
        for first in range(steps.start, steps.stop, each):
            some = range(first, min(first + each, steps.stop))
            if not any(self.spread[k] for k in some):  # of an ODE
                yield from (torch.zeros_like(like) for _ in some)
                continue
            count = like[0].numel() if len(like) else 0
            drawn = _philox.normals(self.seed, Use.WIENER, self.row_ids, count, some)
            yield from drawn.to(like.dtype).view(len(some), *like.shape)

    def step(self, model: Model | None, k: int, state: Tensor, noise: Tensor, drift: Tensor | None = None) -> Tensor:
        """The state [B, ...] at the end of a step, by its standard normals; `drift` at its start, if it is known."""
        if drift is None:
            drift = self.process.drift(model, state, self.times[k])
        drawn = self.spread[k] * noise
        ahead = state + self.length[k] * drift + drawn
        if not self.second_order[k]:
            return ahead
        return state + self.length[k] / 2 * (drift + self.process.drift(model, ahead, self.times[k + 1])) + drawn


@dataclasses.dataclass(frozen=True)
class Path:
    """B paths on a grid of K steps, with all their states or every m-th, from which the others are made again.

    The log weight of a path against a base, log p_base - log p, is the sum of log_ratio over its steps, as
    `dam.adjoint_weights` and `dam.diagnostics` take them.
    """

    steps: Steps
    model: Model | None  # that drew it
    kept: Tensor  # [ceil(K / m), B, ...]: states at times 0, m, 2 m, ...
    every: int  # m
    final: Tensor  # [B, ...]: at the last time
    log_ratio: Tensor | None = None  # float64 [B, K], of paths that were drawn with a base

    @property
    def times(self) -> Tensor:
        """Float64 [K + 1]."""
        return self.steps.times

    @property
    def states(self) -> Tensor:
        """All states, [K + 1, B, ...]."""
        return torch.stack([state for _, state in self.backwards()][::-1])

    def state(self, k: int) -> Tensor:
        """The state [B, ...] at time k."""
        if not 0 <= k <= len(self.steps):
            raise ValueError(f"the path has times 0 .. {len(self.steps)}; got {k}")
        return self.final if k == len(self.steps) else self._segment(k // self.every)[k % self.every]

    def backwards(self) -> Iterator[tuple[int, Tensor]]:
        """Times and states [B, ...] from the last to the first, no more of them at once than are kept and m.

        Raises:
            ValueError: what is made again does not lead to the next state that was kept.
        """
        yield len(self.steps), self.final
        for segment in reversed(range(len(self.kept))):
            states = self._segment(segment)
            for n in reversed(range(len(states))):
                yield segment * self.every + n, states[n]

    @torch.no_grad()
    def _segment(self, segment: int) -> list[Tensor]:
        """The states from one that is kept on, up to the next."""
        first = segment * self.every
        last = min(first + self.every, len(self.steps))
        state, states = self.kept[segment], [self.kept[segment]]
        if last == first + 1:
            return states
        for k, noise in zip(range(first, last), self.steps.noises(state, range(first, last)), strict=True):
            state = self.steps.step(self.model, k, state, noise)
            states.append(state)
        reached = states.pop()
        if not torch.equal(reached, self.kept[segment + 1] if segment + 1 < len(self.kept) else self.final):
            raise ValueError(
                f"the states between times {first} and {last} of the path cannot be made again: the model is not what "
                "it was when the path was drawn. Use a path before the model is trained on it, with dropout off, or "
                "keep all states (checkpoint_every=1)"
            )
        return states


@untraced
@torch.no_grad()
def simulate(
    process: Process,
    model: Model | None,
    initial: Tensor,  # [B, ...]
    *,
    times: Sequence[float] | Tensor,
    base: Model | None = None,
    weights: bool = False,
    method: str = "heun",
    checkpoint_every: int = 1,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Path:
    """Paths of a process whose drift a model predicts.

    Args:
        process: says what the predictions mean.
        model: called at states [B, ...] and times [B], once in a step of Euler-Maruyama, twice in one of Heun; None
            is the process's reference.
        initial: X at the first of the times.
        times: increasing, at least two, from `process.times` or of your own.
        base: the model that paths are weighed against, with weights=True; None is the process's reference.
        weights: whether paths are weighed against the base, log N(X'; base's step) - log N(X'; the model's step) in
            each step: exact for what is simulated, so only by "euler", whose steps are Gaussian.
        method: "heun" or "euler".
        checkpoint_every: m: every m-th state is kept, and the others are made again by the model where they are asked
            for. Of K steps memory is (K / m + m) B numbers of a state, least at m = sqrt(K), for one more run.
        seed: of the noise: that of a step depends on (seed, row id, step) only, not on the batch.
        row_ids: int64 [B], names each row's stream; 0 .. B-1 unless given.

    Raises:
        ValueError, TypeError: an argument is out of range; the process has no finite coefficients at a time; weights of
            an ODE or by Heun are asked for; or a state is not finite: the message names the row and the time.

    Source: Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992, Sec. 10.2 and 15.1.
    """
    if method not in METHODS:
        raise ValueError(f"simulate: method must be one of {', '.join(METHODS)}; got {method!r}")
    if checkpoint_every < 1:
        raise ValueError(f"simulate: checkpoint_every must be at least 1; got {checkpoint_every}")
    if base is not None and not weights:
        raise ValueError("simulate: base is what paths are weighed against: give weights=True too, or leave it out")
    _checks.floating("simulate", "initial", initial)
    if initial.dim() < 2:
        raise ValueError(f"simulate: initial must be states [B, ...], at least [B, 1]; got {list(initial.shape)}")
    # Times and coefficients are few numbers, which nothing on a GPU should wait for.
    grid = torch.tensor(_checks.increasing("simulate", times), dtype=torch.float64, device="cpu")
    if not (0 <= float(grid[0]) and float(grid[-1]) <= 1):
        raise ValueError(f"simulate: times must be in [0, 1]; got {float(grid[0]):g} to {float(grid[-1]):g}")
    infinite = (~process.finite(grid[:-1])).nonzero()[:, 0]
    if len(infinite):
        raise ValueError(
            f"simulate: {type(process).__name__} has infinite coefficients at time {float(grid[infinite[0]]):g}; "
            "process.times(steps) is a grid without such times"
        )
    steps = Steps(process, grid, method, seed, _philox.row_ids_of(initial.shape[:1], initial.device, row_ids))
    if weights:
        _weighable(steps)
    count = len(steps)
    kept = initial.new_empty((-(-count // checkpoint_every), *initial.shape))
    log_ratio = torch.zeros(len(initial), count, dtype=torch.float64, device=initial.device) if weights else None
    state = initial
    for k, noise in enumerate(steps.noises(initial, range(count))):
        if k % checkpoint_every == 0:
            kept[k // checkpoint_every] = state
            state = kept[k // checkpoint_every]  # laid out as it is when steps are made again
        drift = process.drift(model, state, grid[k])
        if log_ratio is not None:
            control = (drift - process.drift(base, state, grid[k])).double().flatten(1)
            moved = control * (steps.length[k] / steps.spread[k])  # in standard deviations of the step
            log_ratio[:, k] = -(moved * (noise.double().flatten(1) + moved / 2)).sum(dim=1)
        state = steps.step(model, k, state, noise, drift)
    path = Path(steps, model, kept, checkpoint_every, state, log_ratio)
    _finite(path)
    return path


def _weighable(steps: Steps) -> None:
    if steps.method != "euler":
        raise ValueError(f"simulate: weights are of steps that are Gaussian: method='euler'; got {steps.method!r}")
    if min(steps.spread) == 0:
        raise ValueError("simulate: paths without noise have no density to weigh them by; use a process with noise")


def _finite(path: Path) -> None:
    if bool(path.final.isfinite().all()):
        return
    bad = ~torch.cat((path.kept, path.final[None])).flatten(2).isfinite().all(dim=2)  # [states, B]
    at, row = (int(n) for n in bad.nonzero()[0])
    k = at * path.every if at < len(path.kept) else len(path.steps)
    raise ValueError(
        f"simulate: row {row} is not finite at time {float(path.times[k]):g} (step {k} of {len(path.steps)}): the "
        "model has diverged, or steps are too long"
    )
