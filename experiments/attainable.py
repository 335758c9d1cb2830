"""What a chain of moves comes to without learning from samples: by the optimum's own rates, and by what is fitted to
them, over all states and with no noise. It tells a network that cannot be the optimum from a learner that does not find
it.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records, report
from dam.ctmc import moves as listing
from experiments import learners, moves
from experiments.invariants import Invariants

OPTIMUM, PAIRS = "optimal rates", "pairs of sites, least squares"
POTENTIALS, NETWORK = "network of the other cases", "network of the case"


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the fits by gradient steps, each on states and times that are drawn from p*."""

    steps: int = 1200
    states: int = 256
    learning_rate: float = 5e-3
    width: int = 64


@dataclasses.dataclass(frozen=True)
class Optimum:
    """log h_t(x) = log E_base[e^{-g(X_1)} | X_t = x] and the law p*_t at the middles of intervals, float64 [N, X]."""

    log_value: Tensor
    law: Tensor


def optimum(case: moves.Case) -> Optimum:
    space, base = case.space, case.process.base
    times = moves.middles().tolist()
    value = torch.stack([space.value(base, case.rewards.exp(), [time, 1.0]) for time in times])
    law = torch.stack([space.law(base, case.initial, [0.0, time]) for time in times]) * value
    return Optimum(value.log(), law / law.sum(dim=1, keepdim=True))


def differences(case: moves.Case, potential: Tensor) -> listing.MoveModel:
    """The model W_t(y) - W_t(x) of numbered states, from W [N, X] at the middles of the intervals."""
    edges = torch.tensor(moves.TIMES, dtype=torch.float64)

    def log_multipliers(states: Tensor, time: Tensor, listed: listing.Moves) -> Tensor:
        interval, number = torch.searchsorted(edges, time) - 1, states[:, 0]
        return potential[interval[:, None], case.space.to[number]] - potential[interval, number][:, None]

    return log_multipliers


def pairs(case: moves.Case, known: Optimum) -> Tensor:
    """The potential of pairs of sites that is nearest to log h under p*_t, float64 [N, X]."""
    held = F.one_hot(case.space.states, case.size)[..., int(case.vacant) :].flatten(1).double()
    both = torch.stack([held[:, i] * held[:, j] for i, j in itertools.combinations(range(held.shape[1]), 2)], dim=1)
    features = torch.cat((torch.ones(len(held), 1, dtype=held.dtype), held, both), dim=1)
    fitted = []
    for log_value, law in zip(known.log_value, known.law, strict=True):
        weight = law.sqrt()[:, None]
        # By singular values: where the composition stays, sums of features are constant.
        solved = torch.linalg.lstsq(features * weight, log_value[:, None] * weight, driver="gelsd")
        fitted.append((features @ solved.solution)[:, 0])
    return torch.stack(fitted)


def fit(case: moves.Case, network: nn.Module, known: Optimum, options: Options) -> nn.Module:
    """The averaged network after steps on the divergence of its rates u from the optimum's,

        sum_y u*(y, x) log(u*(y, x) / u(y, x)) - u*(y, x) + u(y, x)

    at states and intervals from p*, each interval by its length: of all of them together it is KL(p*, p_u) of paths.
    """
    generator = torch.Generator().manual_seed(0)
    duration = torch.tensor(moves.TIMES, dtype=torch.float64).diff()
    chosen = (known.law * duration[:, None]).flatten()
    model, best = case.model(network), differences(case, known.log_value)
    fitting = learners.Fit(network, learning_rate=options.learning_rate, average=8.0)
    for n in range(options.steps):
        at = torch.multinomial(chosen, options.states, replacement=True, generator=generator)
        count = len(case.target)
        states, time = (at % count)[:, None], moves.middles()[at // count]
        listed = case.numbered.process.moves(states)
        found, exact = model(states, time, listed).double(), best(states, time, listed)
        gap = listed.rate * (exact.exp() * (exact - found - 1) + found.exp())
        fitting.step(gap.sum(dim=1).mean(), n / options.steps)
    return fitting.averaged


def study(case_name: str, output: Path) -> str:
    torch.manual_seed(0)
    case, options = moves.case_of(case_name), Options()
    known = optimum(case)
    network = case.network(options.width)
    tried = {
        OPTIMUM: lambda: differences(case, known.log_value),
        PAIRS: lambda: differences(case, pairs(case, known)),
        POTENTIALS: lambda: case.model(fit(case, case.potentials(options.width), known, options)),
        NETWORK: lambda: case.model(fit(case, network, known, options)),
    }
    results = []
    for name, made in tried.items():
        results.append({"rates": name, "tv": case.distance(made())})
        print(f"{name}: TV {results[-1]['tv']:.4f}", flush=True)
    setting = {**records.versions(), "device": report.device(), "case": case_name, "times": moves.TIMES}
    if isinstance(network, Invariants):
        setting.update(classes=len(network.correlations))
    setting.update(dataclasses.asdict(options), results=results)
    report.write_json(output / f"moves-{case_name}-attainable.json", setting)
    return table(results)


def table(results: list[dict[str, str | float]]) -> str:
    lines = ["| rates | TV |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {found['rates']} | {found['tv']:.4f} |" for found in results)])
