"""Which estimator learns most from a reward call: python -m benchmarks.estimators ising [--help].

A model learns to sample an Ising lattice from the energy alone: the base is a masked chain that knows nothing, so that
p* proportional to exp(-beta E) is its optimum at g = beta E. Every estimator gets the same network, start, batches and
number of reward calls. Truth is by enumeration; beside each figure stands what as many exact samples would have.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import report
from dam import plots
from dam.adjoint import ESTIMATORS, estimator_loss, group_targets, tilted_weights
from dam.ctmc import MaskedCTMC, enumeration
from dam.models.denoiser import Head
from dam.rollout import rollout

SPINS, MASK = 2, 2
PROCESS = MaskedCTMC(MASK)
# ESS and TV of Zhu et al., MDNS: Masked Diffusion Neural Sampler, arXiv 2508.10684, at the default setting.
PUBLISHED = {"MDNS by weighted denoising cross-entropy": (0.9644, 0.0799), "best of MDNS": (0.9713, 0.0748)}


@dataclasses.dataclass(frozen=True)
class Ising:
    """E(x) = -sum of s s' over neighbours on a periodic square lattice - field sum of s, for spins s = 2x - 1."""

    side: int = 4
    beta: float = 0.28
    field: float = 0.1

    @property
    def length(self) -> int:
        return self.side**2

    def log_density(self, x: Tensor) -> Tensor:
        """-beta E(x), up to a constant log p*(x), float64 [B] for x [B, L]: the reward."""
        s = self.spins(x)
        pairs = (s * s.roll(1, 1)).sum(dim=(1, 2)) + (s * s.roll(1, 2)).sum(dim=(1, 2))
        return self.beta * (pairs + self.field * s.sum(dim=(1, 2)))

    def spins(self, x: Tensor) -> Tensor:
        return (2 * x - 1).double().view(-1, self.side, self.side)

    def observables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnetisation per spin, and the correlation of neighbours, float64 [B]."""
        s = self.spins(x)
        return s.mean(dim=(1, 2)), ((s * s.roll(1, 1)) + (s * s.roll(1, 2))).mean(dim=(1, 2)) / 2

    def law(self) -> Tensor:
        """p*, float64 [2^L], in the order of `enumeration.states`."""
        return torch.softmax(self.log_density(enumeration.states(SPINS, self.length)), dim=0)


class Network(nn.Module):
    """p(v | position, tokens) by a residual MLP of all tokens, as a `Denoiser`; uniform at the start."""

    def __init__(self, length: int, width: int = 256, depth: int = 2):
        super().__init__()
        self.first = nn.Linear(length * (SPINS + 1), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, length * 32)
        self.output = nn.Linear(32, SPINS + 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(F.one_hot(tokens, SPINS + 1).float().flatten(1)))
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        return F.gelu(self.last(h)).view(*tokens.shape, 32)

    def head(self) -> Head:
        return Head(self.output.weight, self.output.bias)


@dataclasses.dataclass(frozen=True)
class Options:
    """What every estimator gets alike."""

    calls: int = 614_400  # reward calls
    groups: int = 16  # of a rollout
    size: int = 64  # K, trajectories of a group
    states: int = 4  # gradient steps on a rollout, each at states re-masked anew
    learning_rate: float = 2e-3  # falls to 0 along a line
    average: float = 0.995  # of the weights that are evaluated, over gradient steps
    samples: int = 16_384  # that figures are of
    checks: int = 8  # evaluations on the way, of an eighth of the samples


def train(model: Ising, estimator: str, options: Options, seed: int) -> dict[str, Any]:
    """Trains a network with one estimator; its figures at the end and on the way."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(model.length)
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    batch = options.groups * options.size
    rounds = max(1, options.calls // batch)
    initial = torch.full((batch, model.length), MASK)
    base = -math.log(SPINS)  # of every token
    curve, step, started = [], 0, time.perf_counter()
    for n in tqdm(range(rounds), desc=f"{estimator}, seed {seed}", leave=False, disable=not sys.stderr.isatty()):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - n / rounds)
        path = rollout(network, initial, PROCESS, seed=seed * 10**6 + n)
        shape = (options.groups, options.size, -1)
        log_ratio = (base * (path.position >= 0) - path.log_prob.double()).view(shape)
        reward = model.log_density(path.final).view(shape[:2])
        weights, _ = tilted_weights(log_ratio, reward, beta=1.0)
        for _ in range(options.states):
            states = PROCESS.remask(initial, path.final, generator)
            targets = group_targets(
                estimator,
                states.view(shape),
                path.final.view(shape),
                weights.weight.float(),
                PROCESS,
                generator=generator,
            )
            optimizer.zero_grad()
            estimator_loss(network, targets, PROCESS).backward()
            optimizer.step()
            step += 1
            with torch.no_grad():
                for mean, now in zip(averaged.parameters(), network.parameters(), strict=True):
                    mean.lerp_(now, 1 - min(options.average, step / (step + 10)))
        if (n + 1) % max(1, rounds // options.checks) == 0:
            found = figures(model, averaged, options.samples // 8, seed)
            curve.append({"reward_calls": (n + 1) * batch, "ess": found["ess"]})
    return {
        "estimator": estimator,
        "seed": seed,
        **figures(model, averaged, options.samples, seed),
        "reward_calls": rounds * batch,
        "curve": curve,
        "seconds": time.perf_counter() - started,
    }


def figures(model: Ising, network: Network, samples: int, seed: int) -> dict[str, Any]:
    """ESS of the network's weighted samples, and its samples against p*, with what exact samples have in [1]."""
    pieces = [min(16_384, samples - at) for at in range(0, samples, 16_384)]
    finals, log_weights = [], []
    for n, count in enumerate(pieces):
        initial = torch.full((count, model.length), MASK)
        path = rollout(network, initial, PROCESS, seed=10**9 + seed * 1000 + n)
        finals.append(path.final)
        log_weights.append(model.log_density(path.final) - path.log_prob.double().sum(dim=1))
    final, weight = torch.cat(finals), torch.softmax(torch.cat(log_weights), dim=0)
    law = model.law()
    exact = torch.multinomial(law, samples, replacement=True, generator=torch.Generator().manual_seed(seed))
    every = enumeration.states(SPINS, model.length)
    truth = [float((law * x).sum()) for x in model.observables(every)]

    def compared(index: Tensor) -> tuple[float, float, float]:
        share = torch.bincount(index, minlength=len(law)).double() / len(index)
        means = [float(x.mean()) for x in model.observables(every[index])]
        return float((share - law).abs().sum() / 2), *(abs(m - t) for m, t in zip(means, truth, strict=True))

    ours, floor = compared(enumeration.index_of(final, SPINS)), compared(exact)
    names = ("tv", "magnetisation_error", "correlation_error")
    return {
        "ess": float(1 / weight.square().sum() / samples),
        **dict(zip(names, zip(ours, floor, strict=True), strict=True)),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown, those of exact samples in parentheses."""
    names = ("tv", "magnetisation_error", "correlation_error")
    lines = ["| estimator | seed | reward calls | ESS | TV | magnetisation off by | correlation off by | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in results:
        against = (f"{r[name][0]:.4f} ({r[name][1]:.4f})" for name in names)
        cells = (
            r["estimator"],
            r["seed"],
            f"{r['reward_calls']:,}",
            f"{r['ess']:.4f}",
            *against,
            f"{r['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(path: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """1 - ESS against reward calls: the mean over seeds of each estimator, with a band of all of them."""
    figure = plots.figure_class()(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(r["estimator"] for r in results):
        curves = [r["curve"] for r in results if r["estimator"] == name]
        calls = [point["reward_calls"] for point in curves[0]]
        lost = torch.tensor([[1 - point["ess"] for point in curve] for curve in curves])
        (line,) = axes.plot(calls, lost.mean(dim=0), marker="o", markersize=3, label=name)
        axes.fill_between(calls, lost.amin(dim=0), lost.amax(dim=0), alpha=0.2, color=line.get_color())
    axes.set_yscale("log")
    axes.set_xlabel("reward calls")
    axes.set_ylabel("1 - ESS")
    axes.set_title(title, fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__)
    ising = parser.add_subparsers(dest="study", required=True).add_parser("ising", help="an Ising lattice, masked base")
    add = ising.add_argument
    add("--estimators", nargs="+", choices=ESTIMATORS, default=list(reversed(ESTIMATORS)))
    add("--seeds", type=int, default=2, help="seeds 0 .. N-1 (default: %(default)s)")
    for field in dataclasses.fields(Ising):
        add(f"--{field.name}", type=type(field.default), default=field.default)
    for field in dataclasses.fields(Options):
        name = field.name.replace("_", "-")
        add(f"--{name}", type=type(field.default), default=field.default)
    add("--output", metavar="DIR", type=Path, help="folder of JSON and PNG (default: benchmarks/results/<device>)")
    given = vars(parser.parse_args(arguments))
    model = Ising(**{f.name: given[f.name] for f in dataclasses.fields(Ising)})
    options = Options(**{f.name: given[f.name] for f in dataclasses.fields(Options)})
    output = given["output"] or report.RESULTS / report.device()
    output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for estimator in given["estimators"]:
        for seed in range(given["seeds"]):
            results.append(train(model, estimator, options, seed))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    setting = {**dataclasses.asdict(model), **dataclasses.asdict(options)}
    report.write_json(output / "ising.json", {**report.versions(), **setting, "results": results})
    draw(output / "ising.png", results, f"{model.side} x {model.side} Ising, beta {model.beta}, masked base")
    print(f"\n{table(results)}\n\nJSON and PNG: {output}")
    if model == Ising():
        print("Published, ESS and TV:", "; ".join(f"{name} {ess}, {tv}" for name, (ess, tv) in PUBLISHED.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
