"""Samplers of densities from their energies alone: how far what they draw is from the law, for how many energy calls.

A learner by its preset (dam.tasks.sampling), one run for each seed, each looked at by so many samples at its end. The
row of exact samples is two independent sets of them, looked at in the same way: what no sampler can beat but by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

from dam.tasks import sampling
from dam.tasks.energies import TARGETS

EXACT = "exact samples"
COLUMNS = {
    "modes": "modes",
    "W2": "w2",
    "Sinkhorn": "sinkhorn",
    "energy W2": "energy_w2",
    "ESS": "ess",
    "log Z off by": "log_z_error",
    "ELBO": "elbo",
    "energy calls": "energy_calls",
    "processor s": "processor_seconds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=list(TARGETS), default="many-well-5")
    parser.add_argument("--learners", metavar="NAME", nargs="+", choices=sampling.LEARNERS, default=sampling.LEARNERS)
    parser.add_argument("--seeds", metavar="S", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", metavar="N", type=int, default=2000, help="of each look (default: 2000)")
    parser.add_argument("--rounds", metavar="N", type=int, help="instead of the preset's")


def study(given: dict[str, Any]) -> dict[str, Any]:
    energy = TARGETS[given["target"]]()
    count = given["samples"]
    law = sampling.reference(energy, count, seed=2**31)
    changes = {} if given["rounds"] is None else {"rounds": given["rounds"]}
    results: list[dict[str, Any]] = []
    for learner in given["learners"]:
        for seed in given["seeds"]:
            began = time.process_time()
            one = sampling.sampler(given["target"], learner, seed=seed, **changes)
            curve = [one.round() for _ in range(one.settings.rounds)]
            seconds = time.process_time() - began
            drawn = one.sample(count, seed=2**40)
            figures = sampling.measured(energy, drawn, law, one.settings.deviation)
            figures.update(energy_calls=one.energy.calls, processor_seconds=seconds)
            entry = {"learner": learner, "seed": seed, "settings": dataclasses.asdict(one.settings), **figures}
            results.append({**entry, "curve": curve})
    other = sampling.reference(energy, count, seed=2**31 + 1)
    exact = sampling.distances(energy, other, law)
    results.append({"learner": EXACT, "seed": 0, **exact})
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
    if name in ("energy_calls", "modes"):
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"
    digits = 0 if name == "processor_seconds" else 3 if name in ("w2", "sinkhorn", "energy_w2") else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(path: Path, found: dict[str, Any]) -> None:
    """Nothing: samples are drawn by `dam sampler`."""
