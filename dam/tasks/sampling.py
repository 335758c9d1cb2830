"""One run of a sampler of a density: train it into a folder, look at it on the way, and go on after a kill.

Which learner, with which settings, is good for a target was tried out; the table here says it once, for the command
line and for the benchmarks.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dam import files, plots
from dam.flows import metrics
from dam.flows.brownian import gaussian_log_density
from dam.flows.networks import ParticleNetwork, Perceptron, Preconditioned
from dam.flows.samplers import (
    AdjointMatching,
    AdjointSampling,
    AnnealedSampling,
    Counted,
    Sampler,
    Samples,
    Settings,
)
from dam.tasks.energies import TARGETS, Energy, ManyWell, Particles, aligned_squares, metropolis

LEARNERS = ("naas", "adjoint-sampling", "adjoint-matching")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a learner on a target, and of its networks.

    Args:
        settings: of training.
        output: of the networks' predictions; the start's of NAAS, and Adjoint Sampling's, is a gradient's.
        hidden: their width.
        octaves: of sines of states, see `Perceptron`.
        layers: of messages of particles, see `ParticleNetwork`.
        langevin: norm that the gradient is cut to which the network has beside it, see `Preconditioned`; infinite for
            no cut, None for no gradient. The start's of NAAS has none.
    """

    settings: Settings
    output: float = 1.0
    hidden: int = 64
    octaves: int = 0
    layers: int = 1
    langevin: float | None = None


_PRESETS: dict[tuple[str, str], Preset] = {
    # Noise that is strong for the wells' distance lets the reference itself balance them. What is left for the control
    # to spoil is in its fit to noisy adjoints: many paths, a small network, and gradients that are cut early.
    ("many-well-5", "naas"): Preset(
        Settings(
            rounds=4,
            paths=1024,
            updates=60,
            batch=4096,
            kept=16,
            steps=120,
            deviation=1.0,
            sigma=3.0,
            power=2.0,
            grid=2.0,
            learning_rate=1e-3,
            largest_slope=2.5,
        ),
        hidden=32,
    ),
    # The cut is above all but a thousandth of the gradients of exact samples.
    ("many-well-5", "adjoint-sampling"): Preset(
        Settings(
            rounds=40,
            paths=512,
            updates=60,
            batch=512,
            kept=16,
            steps=60,
            deviation=2.0,
            ratio=8.0,
            learning_rate=3e-3,
            largest_slope=40.0,
            reweighted=0.8,
            mode_width=0.2,
        ),
        output=3.0,
        langevin=40.0,
    ),
    # Adjoints between modes grow beyond bounds in few paths: cut at 1, half a percent of them is.
    ("gmm-40", "naas"): Preset(
        Settings(
            rounds=3,
            paths=512,
            updates=50,
            batch=2048,
            kept=8,
            steps=200,
            deviation=40.0,
            sigma=40.0,
            power=2.0,
            grid=2.0,
            learning_rate=1e-3,
            largest_slope=1.0,
        ),
        hidden=32,
        octaves=2,
    ),
    # With gradients of up to 20, a network that is multiplied by sigma^2, 7,000, sends paths out of all bounds.
    ("gmm-40", "adjoint-sampling"): Preset(
        Settings(
            rounds=30,
            paths=512,
            updates=40,
            batch=2048,
            kept=16,
            steps=60,
            deviation=35.0,
            ratio=20.0,
            learning_rate=1e-3,
            largest_slope=3.0,
        ),
        octaves=3,
    ),
    # By the ratio what is left of the noise falls by about the same factor in each step. Who is near whom is decided
    # while a tenth to a half of the variance is left: that takes a network in which a pair knows of all distances.
    ("dw-4", "adjoint-sampling"): Preset(
        Settings(
            rounds=140,
            paths=256,
            updates=50,
            batch=512,
            kept=48,
            steps=60,
            deviation=2.0,
            ratio=16.0,
            learning_rate=5e-3,
            largest_slope=40.0,
            reweighted=0.9,
            mode_width=0.25,
        ),
        output=3.0,
        hidden=64,
        layers=3,
        langevin=30.0,
    ),
    # Coordinates that are no wells are N(0, 1), as the start is: only five are to be learned.
    ("many-well-50", "naas"): Preset(
        Settings(
            rounds=3,
            paths=256,
            updates=60,
            batch=2048,
            kept=8,
            steps=100,
            deviation=1.0,
            sigma=2.0,
            power=2.0,
            grid=1.5,
            learning_rate=1e-3,
            largest_slope=3.0,
        ),
        hidden=32,
    ),
    # It loses wells in most runs: shown, not recommended (docs/samplers.md). Almost no gradient is cut.
    ("many-well-50", "adjoint-matching"): Preset(
        Settings(
            rounds=150,
            paths=512,
            updates=10,
            batch=1024,
            kept=1,
            steps=50,
            deviation=1.0,
            learning_rate=1e-3,
            largest_slope=100.0,
        ),
        output=5.0,
    ),
}


def tried(target: str) -> list[str]:
    """Learners with a preset for a target."""
    return [learner for learner in LEARNERS if (target, learner) in _PRESETS]


def preset(target: str, learner: str) -> Preset:
    """What was tried out for a learner on a target.

    Raises:
        ValueError: there is no such target or learner, or it was not tried out.
    """
    if target not in TARGETS:
        raise ValueError(f"there are the targets {', '.join(TARGETS)}; got {target!r}")
    if learner not in LEARNERS:
        raise ValueError(f"there are the learners {', '.join(LEARNERS)}; got {learner!r}")
    if (target, learner) not in _PRESETS:
        tried = ", ".join(f"{target} with {learner}" for target, learner in _PRESETS)
        raise ValueError(f"no settings are known for {target} with {learner}. There are {tried}")
    return _PRESETS[target, learner]


def sampler(target: str, learner: str, **changes: Any) -> Sampler:
    """A learner with untrained networks.

    Args:
        target, learner: of `TARGETS` and `LEARNERS`.
        changes: of the preset's settings.
    """
    chosen = preset(target, learner)
    settings = dataclasses.replace(chosen.settings, **changes)
    energy = TARGETS[target]()
    cost = Counted(energy.lifted(settings.deviation) if isinstance(energy, Particles) else energy)

    def against_start(state: Tensor) -> Tensor:
        """Of the target against the Gaussian that is there without a control. It does not move particles' centre."""
        return cost(state) + gaussian_log_density(state, settings.deviation**2)

    def network() -> nn.Module:
        sizes: dict[str, Any] = {"scale": settings.deviation, "output": chosen.output, "hidden": chosen.hidden}
        if isinstance(energy, Particles):
            return ParticleNetwork(energy.count, energy.dimensions, layers=chosen.layers, **sizes)
        return Perceptron(energy.dim, octaves=chosen.octaves, **sizes)

    def model() -> nn.Module:
        if chosen.langevin is None:
            return network()
        return Preconditioned(network(), against_start, largest=chosen.langevin)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if learner == "naas":
            return AnnealedSampling(cost, energy.dim, network(), model(), settings)
        kind = AdjointMatching if learner == "adjoint-matching" else AdjointSampling
        return kind(cost, energy.dim, model(), settings)


def reference(energy: Energy, count: int, seed: int) -> Tensor:
    """Samples of the law to hold others to, float64 [count, D]: exact ones, or those of long chains."""
    drawn = energy.sample(count, torch.Generator().manual_seed(seed))
    if drawn is not None:
        return drawn
    assert isinstance(energy, Particles)
    return metropolis(energy, count, steps=20_000, length=0.25 if energy.dim < 10 else 0.05, seed=seed)


def measured(energy: Energy, samples: Samples, law: Tensor, deviation: float) -> dict[str, float]:
    """What weights tell, see `told`, and how far samples are from those of the law, see `distances`."""
    found = told(energy, samples, deviation)
    return {**found, **distances(energy, samples.final.detach().double(), law)}


def told(energy: Energy, samples: Samples, deviation: float) -> dict[str, float]:
    """What weights tell.

    Args:
        energy: of the target.
        samples: of a sampler.
        deviation: of the Gaussian that the learner starts from, for the centre of mass of particles.

    Returns:
        ess, a share; log_z and elbo, and log_z_error where log Z is known.
    """
    log_weight = samples.log_weight
    if isinstance(energy, Particles):
        log_weight = log_weight - energy.centre_log_normalizer(deviation)
    estimated = metrics.estimates(log_weight)
    found = {"ess": estimated.ess, "log_z": estimated.log_normalizer, "elbo": estimated.elbo}
    if energy.log_normalizer is not None:
        found["log_z_error"] = estimated.log_normalizer - energy.log_normalizer
    return found


def distances(energy: Energy, final: Tensor, law: Tensor) -> dict[str, float]:
    """How far samples are from as many of the law.

    Args:
        energy: of the target.
        final, law: samples, float64 [N, D].

    Returns:
        w2 and energy_w2, not squared; w2_assigned, of arrangements in the plane, see `aligned_squares`; where there are
        no arrangements to align, sinkhorn_divergence, of squared distances; modes, those whose cells hold at least a
        fifth of their share; of wells, share_error, the mean over coordinates of how far the share on the right is
        from 1/2, and lost_wells, coordinates in which a well has less than a fifth of its share. Particles in space
        have energy_w2 only.
    """
    found: dict[str, float] = {}
    if isinstance(energy, Particles):
        final = energy.centred(final)
        if energy.dimensions == 2:
            for name, assigned in (("w2", False), ("w2_assigned", True)):
                squares = aligned_squares(final.numpy(), law.numpy(), assigned=assigned)
                found[name] = metrics.wasserstein(squares) ** 0.5
    else:
        squares = metrics.squared_distances(final, law)
        found["w2"] = metrics.wasserstein(squares) ** 0.5
        found["sinkhorn_divergence"] = metrics.sinkhorn_divergence(final, law)
    found["energy_w2"] = metrics.energy_w2(energy(final), energy(law))
    if energy.modes is not None:
        counts = metrics.mode_counts(final, energy.modes)
        found["modes"] = int((counts * 5 * len(counts) >= len(final)).sum())
    if isinstance(energy, ManyWell):
        shares = energy.right_shares(final)
        found["share_error"] = float((shares - 0.5).abs().mean())
        found["lost_wells"] = int((torch.minimum(shares, 1 - shares) < 0.1).sum())
    return found


# ---- a folder

STATE = "sampler.pt"


def run(
    output: Path,
    target: str,
    learner: str,
    *,
    changes: dict[str, Any],
    samples: int = 500,
    looks: int = 10,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a sampler into a folder, or goes on with the one that is there; what it came to.

    The folder holds sampler.pt, all that a run goes on from, written by renaming; metrics.jsonl; and samples.png, the
    last look at samples beside those of the law.

    Args:
        output: new, or of a run with the same arguments.
        target, learner, changes: see `sampler`.
        samples: drawn at each look.
        looks: over the whole run; each writes a checkpoint.
        say: is given a line at each look.

    Raises:
        ValueError: an argument is out of range; an energy is no number or paths diverged, when the run goes on from its
            last checkpoint as if nothing had been.
    """
    one = sampler(target, learner, **changes)
    energy = TARGETS[target]()
    law = reference(energy, samples, seed=2**31)
    asked = {"target": target, "learner": learner, "samples": samples, **dataclasses.asdict(one.settings)}
    history: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    if (output / STATE).exists():
        state = torch.load(output / STATE, weights_only=True)
        files.refuse_changes(state["asked"], asked, f"the run in {output}")
        one.load_state_dict(state["sampler"])
        history = state["history"]
    rounds = one.settings.rounds
    between = max(1, rounds // looks)
    while one.round_number < rounds:
        logged = one.round()
        if one.round_number % between == 0 or one.round_number == rounds:
            drawn = one.sample(samples, seed=2**40 + one.round_number)
            found = measured(energy, drawn, law, one.settings.deviation)
            history.append({**logged, **found})
            say(f"round {one.round_number}/{rounds}: " + ", ".join(f"{n} {v:.4g}" for n, v in found.items()))
            _save(output, one, asked, history)
            _draw(output / "samples.png", energy, drawn.final.double(), law, f"{target}, {learner}")
    return history[-1]


def _save(output: Path, one: Sampler, asked: dict[str, Any], history: list[dict[str, Any]]) -> None:
    part = output / f"{STATE}.part"
    torch.save({"sampler": one.state_dict(), "asked": asked, "history": history}, part)
    os.replace(part, output / STATE)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (output / "metrics.jsonl").write_text(lines, encoding="utf-8")


def _draw(path: Path, energy: Energy, final: Tensor, law: Tensor, title: str) -> None:
    if isinstance(energy, Particles):
        panels = {"distances": (energy.distances(final).flatten(), energy.distances(law).flatten())}
    elif energy.dim == 2:
        panels = {"samples": (final, law)}
    else:
        panels = {f"coordinate {n}": (final[:, n], law[:, n]) for n in (0, 1)}
    panels["energy"] = (energy(final), energy(law))
    plots.samples_against_law(
        path, {name: (left.numpy(), right.numpy()) for name, (left, right) in panels.items()}, title=title
    )
