"""Tasks whose optimum is known exactly, learned from rewards: a random instance for each seed, figures beside p*'s."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import estimators, learners
from experiments.estimators import Options
from experiments.exact import learner
from experiments.exact.dna import Sites
from experiments.exact.graphs import Cut, IndependentSet, random_edges
from experiments.exact.maze import Maze
from experiments.exact.task import Task


def independent_set(seed: int) -> Task:
    return IndependentSet(random_edges("erdos-renyi", 16, 4, seed), 16)


def cut(seed: int) -> Task:
    return Cut(random_edges("regular", 16, 3, seed), 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """How a task is played."""

    title: str
    instance: Callable[[int], Task]  # of a seed
    options: Options
    samples: int  # that the figures at the end are of


_OPTIONS = Options(rounds=100, batch=128, steps=8, learning_rate=4e-3, power=1.0)
CASES = {
    "mis": Case("maximum independent set, 16 nodes of mean degree 4", independent_set, _OPTIONS, 1024),
    "maxcut": Case("maximum cut, 16 nodes of degree 3", cut, _OPTIONS, 1024),
    "maze": Case("ways through 4 x 4 cells, 12 moves of a random walk", Maze, _OPTIONS, 1024),
    "dna": Case("binding sites in 20 letters, Markov base of order 3", Sites, _OPTIONS, 1024),
}
COMMON = {"kl": ("KL(p_u, p*)", "{:.3f}"), "ess": ("ESS", "{:.3f}"), "log_z_error": ("log Z off by", "{:+.3f}")}


@torch.no_grad()
def figures(task: Task, model: learners.Model, samples: int, seed: int) -> dict[str, float]:
    """Of the averaged network, by samples: the task's own, and those of the paths' weights p*(X_1) / p_u(path).

    KL(p_u || p*) is that of paths, at least that of outcomes; ESS a share of the samples; log Z by the mean weight.
    """
    network, model.network = model.network, model.averaged
    try:
        path = model.sampled(model.blank(samples), 10**9 + seed)
    finally:
        model.network = network
    log_weight = task.log_density(path.final) - path.log_prob.double().sum(dim=1) - task.log_z
    mean = log_weight.logsumexp(dim=0) - torch.tensor(samples).log()
    return {
        **task.figures(path.final),
        "kl": float(-log_weight.mean()),
        "ess": float(1 / torch.softmax(log_weight, dim=0).square().sum() / samples),
        "log_z_error": float(mean),
    }


def run(case: str, options: Options, name: str, seed: int) -> dict[str, Any]:
    """An instance, its exact figures, and those of a learner: at the end, and of fewer samples on the way."""
    chosen = CASES[case]
    task, samples = chosen.instance(seed), chosen.samples
    torch.manual_seed(seed)
    model = learners.DenoiserModel(task.denoiser(), task, **estimators.fitting(options))
    by = learner.learner(name, task, **estimators.playing(options), seed=seed)
    references = task.references(samples)
    base, best = (references[law]["reward"] for law in ("the base", "p*"))

    def evaluate() -> dict[str, float]:
        found = figures(task, model, samples // 8, seed)
        gained = (found["reward"] - base) / (best - base)
        return {"kl": found["kl"], "reward": found["reward"], "gained": gained}

    curve = estimators.play(by, model, options, evaluate, f"{name}, {case}, seed {seed}")
    return {"figures": figures(task, model, samples, seed), "references": references, "curve": curve}


def study(given: dict[str, Any], output: Path) -> str:
    case, name = CASES[given["task"]], given["name"] or f"exact-{given['task']}"
    asked = {field.name: given[field.name] for field in dataclasses.fields(Options)}
    options = dataclasses.replace(case.options, **{k: v for k, v in asked.items() if v is not None})
    task = case.instance(0)
    of_instance = {key: value for key, value in vars(task).items() if key != "seed" and isinstance(value, int | float)}
    setting = {"task": given["task"], "title": case.title, **of_instance, **dataclasses.asdict(options)}
    setting["samples"] = case.samples
    results: list[dict[str, Any]] = []
    for found in estimators.run_all(given, functools.partial(run, given["task"], options)):
        results.append(found)
        last = found["figures"]
        print(f"{found['learner']}, seed {found['seed']}: E[r] {last['reward']:.3f}, KL {last['kl']:.3g}", flush=True)
        estimators.write(output / f"{name}.json", setting, results, given)
    estimators.draw_curves(output / f"{name}.png", results, "kl", "KL(p_u || p*)", case.title)
    axis = "E[r], from the base's 0 to 1 at p*"
    estimators.draw_curves(output / f"{name}-reward.png", results, "gained", axis, case.title, log=False)
    return table(results, task.columns)


def table(results: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Medians over seeds, with least and most: of what learns nothing, of p*, and of the learners."""
    columns = {**columns, **COMMON}
    lines = [f"| | reward calls | {' | '.join(header for header, _ in columns.values())} |"]
    lines += ["| --- " * (len(columns) + 2) + "|"]
    first = [r for r in results if r["learner"] == results[0]["learner"]]

    def row(name: str, calls: str, found: Sequence[dict[str, float]]) -> str:
        cells = [
            estimators.spread([f[key] for f in found], form) if key in found[0] else ""
            for key, (_, form) in columns.items()
        ]
        return f"| {' | '.join((name, calls, *cells))} |"

    for name in first[0]["references"]:
        lines.append(row(name, "", [r["references"][name] for r in first]))
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        calls = estimators.middle([r["curve"][-1]["reward_calls"] for r in runs])
        lines.append(row(f"`{name}`", calls, [r["figures"] for r in runs]))
    return "\n".join(lines)
