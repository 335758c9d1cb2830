"""Fine-tuning a flow of a two-dimensional mixture toward a smooth reward, over temperatures, against the exact tilt.

The base is the velocity of four Gaussians on a ring, which is known, and a model is this and a network's residual.
Every learner may call the reward's gradient as often as every other. The density of what a model draws by its ODE is
exact but for the steps, by the change of variables, so that divergences from the tilt p* ~ p_base exp(r / beta) are
sums over a grid or means over samples of evenly spread noise, and nothing is fitted. Figures are medians over seeds,
least and most in brackets.

VGG-Flow and VGG-Flow-PMP go after another objective than the tilt, without noise. DRaFT and ReFL go after the reward
alone, at no temperature: they are trained once for each seed, and what they draw is held to the tilt of each beta.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dam import flows, plots
from dam.benchmarks import options
from dam.flows import matching

SDE = flows.FlowProcess()
ODE = SDE.ode()
MODES, RADIUS, SPREAD = 4, 1.3, 0.45
TOP = (1.3, 0.4)  # of the reward's hill
BETAS = (4.0, 2.0, 1.0)
EXTENT, POINTS = 3.6, 49  # of the grid: 0.15 apart, a third of a mode's width
STEPS = 12  # of Runge and Kutta's method, from one end of time to the other
SAMPLES = 2048  # that a model draws from evenly spread noise, for what is a mean over them
FIRST_SEED = 1_000  # of these


def centres() -> Tensor:
    """Of the modes, [4, 2]."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)


def mixture() -> flows.GaussianMixture:
    return flows.GaussianMixture(torch.zeros(MODES), centres(), torch.full((MODES, 2), SPREAD**2))


def reward(state: Tensor) -> Tensor:
    """A hill near one of the modes, and waves: [B] of states [B, 2]."""
    return torch.cos(2 * state[:, 1]) / 4 - (state - state.new_tensor(TOP)).square().sum(dim=1) / 6


class Network(torch.nn.Module):
    """Of states [B, 2] and times [B], with waves of the time among its inputs; 0 at first."""

    def __init__(self, width: int = 64, waves: int = 4):
        super().__init__()
        self.waves = torch.arange(1, waves + 1) * math.pi
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3 + waves, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, 2),
        )
        for parameter in self.layers[-1].parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        time = time[:, None]
        return self.layers(torch.cat((state, time, torch.cos(self.waves * time)), dim=1))


class Model(torch.nn.Module):
    """The base's velocity and a network's residual, which may have to vanish at time 1."""

    def __init__(self, vanishes: bool):
        super().__init__()
        self.base, self.residual, self.vanishes = mixture().model(SDE.schedule), Network(), vanishes

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        residual = self.residual(state, time)
        return self.base(state, time) + ((1 - time)[:, None] * residual if self.vanishes else residual)


# ---- what a model draws


def tilt(beta: float, grid: Tensor) -> Tensor:
    """log p* at the points of a grid, normalised on it."""
    log_density = mixture().log_density(grid) + reward(grid) / beta
    return log_density - log_density.logsumexp(dim=0) - math.log(cell())


def points() -> Tensor:
    axis = torch.linspace(-EXTENT, EXTENT, POINTS)
    return torch.cartesian_prod(axis, axis)


def cell() -> float:
    return (2 * EXTENT / (POINTS - 1)) ** 2


def along(model: Any, state: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Where the ODE takes states, and the integral of the divergence of its velocity along the way, [B]."""
    total, length = torch.zeros(len(state)), (end - start) / STEPS

    def rates(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        velocity = model(x, x.new_full((len(x),), t))
        slopes = [torch.autograd.grad(velocity[:, n].sum(), x, retain_graph=n == 0)[0][:, n] for n in range(2)]
        return velocity.detach(), slopes[0] + slopes[1]

    for n in range(STEPS):
        t = start + n * length
        first = rates(state, t)
        second = rates(state + length / 2 * first[0], t + length / 2)
        third = rates(state + length / 2 * second[0], t + length / 2)
        fourth = rates(state + length * third[0], t + length)
        mean = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(first, second, third, fourth, strict=True)]
        state, total = state + length * mean[0], total + length * mean[1]
    return state, total


def normals(count: int, seed: int) -> Tensor:
    """Standard normals of the plane, spread evenly, [count, 2]: means are off by far less than 1 / sqrt(count).

    Source: Owen, Scrambled Net Variance for Integrals of Smooth Functions, 1997.
    """
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(min=2**-53)).float()


def log_normal(state: Tensor) -> Tensor:
    return -(state.square() + math.log(2 * math.pi)).sum(dim=1) / 2


def figures(model: Any, beta: float, seed: int) -> dict[str, float]:
    """Of what the model's ODE draws."""
    grid = points()
    log_best = tilt(beta, grid)
    start, integral = along(model, grid, 1.0, 0.0)
    log_density = log_normal(start) + integral
    best = log_best.exp() * cell()
    drawn = normals(SAMPLES, seed)
    final, integral = along(model, drawn, 0.0, 1.0)
    log_own = log_normal(drawn) - integral
    log_z = float((mixture().log_density(grid) + reward(grid) / beta).logsumexp(dim=0)) + math.log(cell())
    log_ratio = log_own - mixture().log_density(final) - reward(final) / beta + log_z
    return {
        "kl": float(log_ratio.mean()),
        "reverse_kl": float((best * (log_best - log_density)).sum()),
        "reward": float(reward(final).mean()),
        "entropy": float(-log_own.mean()),
        "modes": float(kept(shares(final), shares(grid, best))),
    }


def shares(state: Tensor, weight: Tensor | None = None) -> Tensor:
    """What part of them, by weight, is nearest to each of the modes."""
    nearest = torch.cdist(state, centres()).argmin(dim=1)
    weight = torch.full((len(state),), 1 / len(state)) if weight is None else weight
    return torch.zeros(MODES).index_add_(0, nearest, weight)


def kept(found: Tensor, expected: Tensor) -> int:
    """How many modes have at least half of what they should."""
    return int((found >= expected / 2).sum())


def of_tilt(beta: float) -> dict[str, float]:
    """The same figures of p*."""
    grid = points()
    log_best = tilt(beta, grid)
    best = log_best.exp() * cell()
    return {
        "reward": float((best * reward(grid)).sum()),
        "entropy": float(-(best * log_best).sum()),
        "modes": float(MODES),
    }


# ---- learners


@dataclasses.dataclass
class Counted:
    """g = -r / beta, and how many states it was called at: each for a gradient."""

    beta: float
    calls: int = 0

    def __call__(self, state: Tensor) -> Tensor:
        self.calls += len(state)
        return -reward(state) / self.beta


class Learner:
    """A model on its way, and how a round of paths teaches it.

    Rows of a round, what follows them and the learning rate were tried at beta 1, with one seed.
    """

    rows, steps, learning_rate, process = 256, 10, 4e-3, ODE
    knows_beta = True  # or goes after the reward alone

    def __init__(self, beta: float, calls: int, seed: int):
        torch.manual_seed(seed)
        self.cost, self.budget, self.seed, self.rounds = Counted(beta), calls, seed, 0
        # A control of the SDE does where its noise does.
        self.model = Model(vanishes=bool(self.process.noise))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def run(self) -> Any:
        while self.cost.calls + self.calls_of_a_round() <= self.budget:
            spent = self.cost.calls / self.budget
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * spent)) / 2
            self.rounds += 1
            self.round()
        return self.model

    def calls_of_a_round(self) -> int:
        return self.rows

    def path(self) -> flows.Path:
        times, seed = self.process.times(self.steps), 10_000 * self.seed + self.rounds
        start = self.process.initial((self.rows, 2), start=float(times[0]), seed=seed)
        return flows.simulate(self.process, self.model, start, times=times, seed=seed)

    def minimise(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()

    def round(self) -> None:
        raise NotImplementedError


class AdjointMatching(Learner):
    rows, steps, learning_rate, process = 1024, 20, 1e-2, SDE
    passes = 16  # steps of the optimizer by the paths of a round
    of_path = staticmethod(flows.adjoint_targets)

    def round(self) -> None:
        path = self.path()
        targets = self.of_path(self.process, self.model.base, path, flows.cost_gradient(self.cost, path.final))
        for _ in range(self.passes):
            self.minimise(lambda: matching.loss(self.model, targets.drawn(2048)))


class Pontryagin(AdjointMatching):
    rows, steps, passes, process = 2048, 10, 12, ODE
    of_path = staticmethod(flows.pontryagin_targets)


class Values(Learner):
    """VGG-Flow: a value that looks forward, and a model matched to it, both at some states of each round's paths."""

    rows = 64
    passes, states, times = 4, 64, 2  # steps of the optimizer, states for each, and times of the model's targets

    def __init__(self, beta: float, calls: int, seed: int):
        torch.manual_seed(seed)
        self.correction = Network()
        super().__init__(beta, calls, seed)
        self.value = flows.forward_looking(ODE, self.model.base, self.cost, self.correction)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.correction.parameters()]

    def calls_of_a_round(self) -> int:
        # The value is asked for at every state of a path that starts a step, whatever is used of it.
        return self.rows * (1 + self.steps) + self.passes * (2 * self.states + self.rows)

    def round(self) -> None:
        path = self.path()
        terminal = flows.cost_gradient(self.cost, path.final)
        at = torch.randperm(self.steps)[: self.times].tolist()
        targets = flows.value_targets(ODE, self.model.base, self.value, path, at=at)
        for _ in range(self.passes):
            self.minimise(lambda: self.loss(targets, path, terminal))

    def loss(self, targets: flows.Targets, path: flows.Path, terminal: Tensor) -> Tensor:
        some = targets.drawn(self.states)
        consistency = flows.consistency_loss(ODE, self.model.base, self.value, some.state, some.time)
        return consistency + flows.boundary_loss(self.value, path, terminal) + matching.loss(self.model, targets)


class DRaFT(Learner):
    knows_beta = False

    def round(self) -> None:
        self.minimise(lambda: flows.draft_loss(self.path(), self.model, self.cost, recompute=False))


class ReFL(Learner):
    knows_beta = False

    def round(self) -> None:
        path = self.path()
        k = int(torch.randint(self.steps // 2, self.steps, ()))  # of the last half
        self.minimise(lambda: flows.refl_loss(ODE, self.model, path.state(k), path.times[k], self.cost))


LEARNERS: dict[str, type[Learner]] = {
    "Adjoint Matching": AdjointMatching,
    "VGG-Flow-PMP": Pontryagin,
    "VGG-Flow": Values,
    "DRaFT": DRaFT,
    "ReFL": ReFL,
}


# ---- the study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    calls = "of the reward's gradient, for each learner (default: %(default)s)"
    parser.add_argument("--calls", type=options.positive, default=32_768, help=calls)
    parser.add_argument("--seeds", type=options.positive, default=3, help="seeds 0 .. N-1 (default: %(default)s)")
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS), help="default: %(default)s")
    listed = f"of {'; '.join(LEARNERS)} (default: all)"
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS), metavar="NAME", help=listed)


def study(given: dict[str, Any]) -> dict[str, Any]:
    results = []
    for seed in range(given["seeds"]):
        for name in given["learners"]:
            kind = LEARNERS[name]
            for beta in given["betas"] if kind.knows_beta else [1.0]:
                began = time.process_time()
                learner = kind(beta, given["calls"], seed)
                model = learner.run()
                run = {
                    "learner": name,
                    "seed": seed,
                    "calls": learner.cost.calls,
                    "processor_seconds": time.process_time() - began,
                }
                for held_to in [beta] if kind.knows_beta else given["betas"]:
                    results.append({**run, "beta": held_to, **figures(model, held_to, FIRST_SEED + seed)})
                    print(f"{name}, beta {held_to:g}, seed {seed}: KL {results[-1]['kl']:.4f}", file=sys.stderr)
    base = mixture().model(SDE.schedule)
    return {
        "results": results,
        "base": [{"beta": beta, **figures(base, beta, FIRST_SEED)} for beta in given["betas"]],
        "tilt": [{"beta": beta, **of_tilt(beta)} for beta in given["betas"]],
    }


COLUMNS = {"kl": "KL(p_u, p*)", "reverse_kl": "KL(p*, p_u)", "reward": "reward", "entropy": "entropy", "modes": "modes"}


def text_of(found: dict[str, Any]) -> str:
    """A row for each learner and beta; between rows of a beta those of the base and of p*."""
    lines = [f"| beta | | {' | '.join(COLUMNS.values())} |", f"|{' --- |' * (2 + len(COLUMNS))}"]
    for base, tilt in zip(found["base"], found["tilt"], strict=True):
        beta = base["beta"]
        for name in found["learners"]:
            runs = [run for run in found["results"] if (run["learner"], run["beta"]) == (name, beta)]
            lines.append(_row(beta, name, runs))
        lines += [_row(beta, "the base", [base]), _row(beta, "p*", [{"kl": 0.0, "reverse_kl": 0.0, **tilt}])]
    return "\n".join(lines)


def _row(beta: float, name: str, runs: list[dict[str, Any]]) -> str:
    cells = []
    for column in COLUMNS:
        values, digits = [run[column] for run in runs], {"modes": 0, "reward": 2, "entropy": 2}.get(column, 4)
        shown = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
        cells.append(shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})")
    return f"| {beta:g} | {name} | {' | '.join(cells)} |"


def draw(path: Path, found: dict[str, Any]) -> None:
    """KL to the tilt, and entropy, against beta."""
    figure = plots.figure_class()(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("kl", "entropy"), strict=True):
        for name in found["learners"]:
            runs = [run for run in found["results"] if run["learner"] == name]
            of = [[run[column] for run in runs if run["beta"] == beta] for beta in found["betas"]]
            medians = [statistics.median(values) for values in of]
            off = [
                [m - min(v) for m, v in zip(medians, of, strict=True)],
                [max(v) - m for m, v in zip(medians, of, strict=True)],
            ]
            axes.errorbar(found["betas"], medians, off, marker="o", markersize=3, capsize=2, label=name)
        axes.set(xscale="log", xlabel="beta", title=COLUMNS[column])
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].axhline(0.01, color="black", linewidth=0.8, linestyle=":")
    for name in ("base", "tilt"):
        panels[1].plot(
            *zip(*((one["beta"], one["entropy"]) for one in found[name]), strict=True),
            "k:" if name == "base" else "k--",
            label={"base": "the base", "tilt": "p*"}[name],
        )
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
