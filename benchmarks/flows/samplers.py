"""Samplers of densities from their energies alone: how far what they draw is from the law, for how many energy calls.

A learner by its preset (dam.tasks.sampling), one run for each seed, each looked at by so many samples at its end. The
row of exact samples is two independent sets of them, looked at in the same way: what no sampler can beat but by chance.
The row of the reference alone is NAAS before it has learned: what its control has to better.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from dam.flows import metrics
from dam.flows.samplers import Sampler
from dam.tasks import sampling
from dam.tasks.energies import TARGETS, Particles

EXACT = "exact samples"
REFERENCE = "reference of naas alone"
COLUMNS = {
    "modes": "modes",
    "lost wells": "lost_wells",
    "shares off by": "share_error",
    "W2": "w2",
    "W2, assigned": "w2_assigned",
    "S": "sinkhorn_divergence",
    "OT at 1e-3": "sinkhorn",
    "energy W2": "energy_w2",
    "ESS": "ess",
    "log Z off by": "log_z_error",
    "ELBO": "elbo",
    "energy calls": "energy_calls",
    "processor s": "processor_seconds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=list(TARGETS), default="many-well-5")
    parser.add_argument(
        "--learners", metavar="NAME", nargs="+", choices=sampling.LEARNERS, help="default: those with a preset"
    )
    parser.add_argument("--seeds", metavar="S", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", metavar="N", type=int, default=2000, help="of each look (default: 2000)")
    parser.add_argument("--rounds", metavar="N", type=int, help="instead of the preset's")
    parser.add_argument("--deviation", metavar="S", type=float, help="of the start, instead of the preset's")
    parser.add_argument(
        "--sinkhorn", action="store_true", help="also 2,000 iterations of entropic transport at epsilon = 1e-3: minutes"
    )


def study(given: dict[str, Any]) -> dict[str, Any]:
    energy = TARGETS[given["target"]]()
    if given["sinkhorn"] and isinstance(energy, Particles):
        raise ValueError(f"--sinkhorn is of states, and those of {given['target']} are arrangements: leave it out")
    count = given["samples"]
    law = sampling.reference(energy, count, seed=2**31)
    changes = {name: given[name] for name in ("rounds", "deviation") if given[name] is not None}
    results: list[dict[str, Any]] = []

    def apart(final: Tensor) -> dict[str, float]:
        found = sampling.distances(energy, final, law)
        if given["sinkhorn"]:
            found["sinkhorn"] = metrics.sinkhorn(metrics.squared_distances(final, law)).cost
        return found

    def look(one: Sampler) -> dict[str, float]:
        drawn = one.sample(count, seed=2**40)
        told = sampling.told(energy, drawn, one.settings.deviation)
        return {**told, **apart(drawn.final.double())}

    for learner in given["learners"] or sampling.tried(given["target"]):
        for seed in given["seeds"]:
            one = sampling.sampler(given["target"], learner, seed=seed, **changes)
            if learner == "naas" and seed == given["seeds"][0]:
                results.append({"learner": REFERENCE, "seed": seed, **look(one)})
            began = time.process_time()
            curve = [one.round() for _ in range(one.settings.rounds)]
            seconds = time.process_time() - began
            figures = {**look(one), "energy_calls": one.energy.calls, "processor_seconds": seconds}
            entry = {"learner": learner, "seed": seed, "settings": dataclasses.asdict(one.settings), **figures}
            results.append({**entry, "curve": curve})
    other = sampling.reference(energy, count, seed=2**31 + 1)
    results.append({"learner": EXACT, "seed": 0, **apart(other)})
    return {"results": results, "log_normalizer": energy.log_normalizer}


def text_of(found: dict[str, Any]) -> str:
    """A row for each learner: the mean over seeds, and the least and the most."""
    learners = list(dict.fromkeys(run["learner"] for run in found["results"]))
    shown = {head: name for head, name in COLUMNS.items() if any(name in run for run in found["results"])}
    lines = ["| | " + " | ".join(shown) + " |", "| --- " * (len(shown) + 1) + "|"]
    for learner in learners:
        runs = [run for run in found["results"] if run["learner"] == learner]
        lines.append(f"| {learner} | " + " | ".join(_cell(runs, name) for name in shown.values()) + " |")
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    if name in ("energy_calls", "modes", "lost_wells"):
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"
    digits = {"processor_seconds": 0, "log_z_error": 2, "elbo": 2}.get(name, 3)
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(path: Path, found: dict[str, Any]) -> None:
    """Nothing: samples are drawn by `dam sampler`."""
