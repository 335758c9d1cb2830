"""What a step of Adjoint Matching costs by dam.flows, beside a plain loop in torch of the same equations.

A step: paths of the model by Euler-Maruyama, the gradient of the cost, lean adjoints by the base, the loss at all
states and its gradient. The plain loop is what a user of torch would write for straight lines (alpha = t) and a
velocity, with `autograd.grad` for products with the Jacobian. The floor is what neither can do without: the network's
calls. All are called alternately, and with the same noise the gradients of both are compared first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dam import flows
from dam.benchmarks import harness, memory, options
from dam.flows import matching

PROCESS = flows.FlowProcess()
Function = Callable[[], object]
FLOOR = "the network's calls"
TOLERANCE = 1e-5  # of float32 gradients, sums of some thousand terms in another order, relative to the largest
GROWN = {"steps": "K", "rows": "B", "dimension": "d", "width": "width"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large a step is."""

    steps: int = 40  # K
    rows: int = 64  # B
    dimension: int = 32  # d
    width: int = 256  # of the network's two hidden layers


class Network(torch.nn.Module):
    """A velocity of states [B, d] and times [B]: two hidden layers."""

    def __init__(self, setting: Setting):
        super().__init__()
        dimension, width = setting.dimension, setting.width
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(dimension + 1, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, dimension),
        )

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat((state, time[:, None]), dim=1))


class Step:
    """A model, a base, and what a step of training is called with; gradients are left in `model`."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.setting, self.model, self.base = setting, Network(setting), Network(setting).requires_grad_(False)
        self.times = PROCESS.times(setting.steps)
        first = float(self.times[0])
        self.start = PROCESS.initial((setting.rows, setting.dimension), start=first, seed=1)
        self.seed = 0

    @staticmethod
    def cost(state: Tensor) -> Tensor:
        """g, [B], of some price."""
        return (state - 1).square().sum(dim=1) / 2 + torch.cos(3 * state).sum(dim=1)

    def calls(self) -> Function:
        """The floor: the network at all states of the paths, the base with a product, the model with its gradient."""
        rows, steps = self.setting.rows, self.setting.steps
        time, all_times = torch.full((rows,), 0.5), torch.full((rows * steps,), 0.5)
        every = self.start.repeat(steps, 1)

        def run() -> None:
            with torch.no_grad():
                for _ in range(steps):
                    self.model(self.start, time)
            state = self.start.clone().requires_grad_()
            for _ in range(steps):
                torch.autograd.grad(self.base(state, time), state, self.start)
            self.model.zero_grad()
            self.model(every, all_times).square().sum().backward()

        return run

    def _or_own(self, model: Any, base: Any) -> tuple[Any, Any]:
        # A compiled module has a length that raises: it is not asked whether it is true.
        return self.model if model is None else model, self.base if base is None else base

    def dam(self, model: Any = None, base: Any = None) -> Function:
        model, base = self._or_own(model, base)

        def run() -> Tensor:
            path = flows.simulate(PROCESS, model, self.start, times=self.times, method="euler", seed=self.seed)
            terminal = flows.cost_gradient(self.cost, path.final)
            targets = flows.adjoint_targets(PROCESS, base, path, terminal)
            self.model.zero_grad()
            value = matching.loss(model, targets)
            value.backward()
            return value.detach()

        return run

    def plain(self, model: Any = None, base: Any = None, noises: Tensor | None = None) -> Function:
        """The same in a loop; noises [K, B, d], drawn by torch unless given."""
        model, base = self._or_own(model, base)
        times, rows = self.times.tolist(), self.setting.rows

        def run() -> Tensor:
            states, state = [], self.start
            with torch.no_grad():
                for k, (t, after) in enumerate(itertools.pairwise(times)):
                    states.append(state)
                    h, sigma = after - t, (2 * (1 - t) / t) ** 0.5
                    noise = torch.randn_like(state) if noises is None else noises[k]
                    drift = 2 * model(state, state.new_full((rows,), t)) - state / t
                    state = state + h * drift + sigma * h**0.5 * noise
            final = state.clone().requires_grad_()
            (adjoint,) = torch.autograd.grad(self.cost(final).sum(), final)
            targets, weights = [], []
            for k in reversed(range(len(states))):
                t, h = times[k], times[k + 1] - times[k]
                state = states[k].clone().requires_grad_()
                velocity = base(state, state.new_full((rows,), t))
                (pulled,) = torch.autograd.grad(2 * velocity - state / t, state, adjoint)
                adjoint = adjoint + h * pulled
                targets.append(velocity.detach() - (1 - t) / t * adjoint)
                weights.append(h * t / (1 - t) / rows)
            every = torch.cat(states[::-1])
            at = every.new_tensor(times[:-1][::-1]).repeat_interleave(rows)
            weight = every.new_tensor(weights).repeat_interleave(rows)
            self.model.zero_grad()
            value = (weight * (model(every, at) - torch.cat(targets)).square().sum(dim=1)).sum()
            value.backward()
            return value.detach()

        return run

    def gradients(self, run: Function) -> Tensor:
        """Of all parameters, after a step, in one row."""
        run()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def off(self) -> float:
        """How far both gradients are apart with the same noise, relative to the largest entry."""
        path = flows.simulate(PROCESS, self.model, self.start, times=self.times, method="euler", seed=self.seed)
        noises = torch.stack(list(path.steps.noises(self.start, range(self.setting.steps))))
        ours, theirs = self.gradients(self.dam()), self.gradients(self.plain(noises=noises))
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def adjoints(self) -> Function:
        """Paths and their adjoints, one after another, without what a loss needs."""

        def run() -> object:
            path = flows.simulate(PROCESS, self.model, self.start, times=self.times, method="euler", seed=self.seed)
            for entry in flows.backwards(PROCESS, self.base, path, flows.cost_gradient(self.cost, path.final)):
                del entry
            return path

        return run

    def through(self) -> Function:
        """The gradient of the cost in the model by autograd through the whole path, kept: what has no adjoint."""

        def run() -> None:
            path = flows.simulate(PROCESS, self.model, self.start, times=self.times, method="euler", seed=self.seed)
            self.model.zero_grad()
            flows.draft_loss(path, self.model, self.cost, recompute=False).backward()

        return run


def case_of(step: Step) -> harness.Case:
    """What is timed: the step as it is, with the networks compiled, and compiled as a whole."""
    functions = {"dam": step.dam(), "plain loop": step.plain()}
    of_networks: dict[str, Any] = {}

    def networks() -> tuple[Any, Any]:
        if not of_networks:  # at the first call, which compiles
            of_networks.update(model=torch.compile(step.model), base=torch.compile(step.base))
        return of_networks["model"], of_networks["base"]

    whole: dict[str, Any] = {}

    def at_once(name: str, function: Function) -> Function:
        def run() -> object:
            return whole.setdefault(name, torch.compile(function))()

        return run

    compiled: dict[str, Function] = {
        "dam, networks compiled": lambda: step.dam(*networks())(),
        "plain loop, networks compiled": lambda: step.plain(*networks())(),
        "dam, the step compiled": at_once("dam", step.dam()),
        "plain loop, the step compiled": at_once("plain", step.plain()),
    }
    return harness.Case("step", FLOOR, step.calls(), functions, compiled)


def growth(setting: Setting) -> dict[str, dict[str, int]]:
    """Peak bytes of tensors of paths with their adjoints, and of autograd through the path; with each size doubled."""
    found = {}
    sizes = {"": setting, **{n: dataclasses.replace(setting, **{n: 2 * getattr(setting, n)}) for n in GROWN}}
    for name, size in sizes.items():
        step = Step(size)
        step.adjoints()()
        found[name or "as it is"] = {
            "adjoints": memory.tensor_bytes(step.adjoints()),
            "through": memory.tensor_bytes(step.through()),
            "path": 4 * (size.steps + 1) * size.rows * size.dimension,
        }
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for field in dataclasses.fields(Setting):
        add(f"--{field.name}", type=options.positive, default=field.default, help="default: %(default)s")
    add("--repeats", type=options.positive, default=15, help="default: %(default)s")
    add("--no-compiled", action="store_true", help="leave out torch.compile")


def study(given: dict[str, Any]) -> dict[str, Any]:
    """Raises ArithmeticError where the two gradients differ."""
    setting = Setting(**{field.name: given[field.name] for field in dataclasses.fields(Setting)})
    step = Step(setting)
    if (off := step.off()) > TOLERANCE:
        raise ArithmeticError(f"the gradients of the step and of the plain loop are {off:.1e} apart")
    case = case_of(step)
    measured = harness.measure(case, given["repeats"], compiled=not given["no_compiled"])
    functions = {FLOOR: case.floor, **case.functions, **case.compiled}
    return {
        "gradients_apart": off,
        "median_seconds": measured.median_seconds,
        "absent": measured.absent,
        "peak_bytes": {name: memory.tensor_bytes(functions[name]) for name in measured.median_seconds},
        "growth": growth(setting),
    }


def text_of(found: dict[str, Any]) -> str:
    seconds, peaks = found["median_seconds"], found["peak_bytes"]
    lines = ["| a step | time, of the floor | of the plain loop | peak memory |", "| --- | --- | --- | --- |"]
    for name, took in seconds.items():
        ratios = f"{took / seconds[FLOOR]:.2f} | {took / seconds['plain loop']:.2f}"
        lines.append(f"| {name} | {ratios} | {peaks[name] / 2**20:.1f} MiB |")
    table = [
        "| | states of the path | paths and adjoints | autograd through the path |",
        "| --- | --- | --- | --- |",
    ]
    for name, entry in found["growth"].items():
        label = f"{GROWN[name]} doubled" if name in GROWN else name
        mib = [f"{entry[kind] / 2**20:.2f} MiB" for kind in ("path", "adjoints", "through")]
        table.append(f"| {label} | {' | '.join(mib)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(table)


def draw(path: Path, found: dict[str, Any]) -> None:
    """Nothing: two tables say it."""
