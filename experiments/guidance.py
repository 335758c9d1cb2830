"""Guidance at test time: samples of p* proportional to p_base exp(r) without training, by more reward calls for each.

What a state is worth, E_base[exp(r) | state], is estimated by outcomes that the base completes it to; an outcome is
worth exp(r) itself. Nothing is learned, so that every sample costs as many calls as the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dam
from benchmarks import records, report
from dam.ctmc import MaskedCTMC
from experiments import lattice, tables
from experiments.densities import Density, Ising


class Guided(NamedTuple):
    """Outcomes of R runs of N particles, and what they weigh."""

    final: Tensor  # int64 [R, N, L]
    log_weight: Tensor  # float64 [R, N]: exp of it has the mean E_base[exp(r)]
    reward_calls: int

    def drawn(self, generator: torch.Generator) -> Tensor:
        """An outcome of each run, in proportion to its weight, int64 [R, L]."""
        chosen = torch.multinomial(torch.softmax(self.log_weight, dim=1), 1, generator=generator)[:, 0]
        return self.final[torch.arange(len(chosen)), chosen]


@dataclasses.dataclass
class Lookahead:
    """log of the mean of exp(r) over outcomes that the base completes a state to: the value, without a bias.

    Args:
        completions: outcomes of a state; of a finished one, one call.
    """

    density: Density
    completions: int
    generator: torch.Generator
    reward_calls: int = 0

    def __call__(self, states: Tensor) -> Tensor:
        """float64 [...] of states [..., L] with as many masks each."""
        masked = states == self.density.tokens
        count = self.completions if bool(masked.any()) else 1
        shape = (count, *states.shape)
        drawn = torch.randint(self.density.tokens, shape, generator=self.generator)
        outcome = torch.where(masked, drawn, states)
        self.reward_calls += outcome[..., 0].numel()
        reward = self.density.log_density(outcome.flatten(0, -2)).view(shape[:-1])
        return reward.logsumexp(dim=0) - math.log(count)


def uniform(density: Density) -> Callable[[Tensor], Tensor]:
    """log p(v | i, state) of the base, [B, L, V]."""
    return lambda states: torch.full((*states.shape, density.tokens), -math.log(density.tokens), dtype=torch.float64)


def svdd(density: Density, count: int, proposals: int, *, completions: int = 1, seed: int) -> Guided:
    """SVDD: of each state the base draws `proposals` next ones, of which one is kept in proportion to its value.

    From one proposal it is the base. The law comes to p* as the proposals become many, values by few completions
    included, as these are right in the mean; with finitely many, likely outcomes are not likely enough. Calls of a
    sample: proposals (completions (L - 1) + 1).

    Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
    Decoding, arXiv 2408.08252, Alg. 1, by Monte Carlo values.
    """
    generator = torch.Generator().manual_seed(seed)
    value = Lookahead(density, completions, generator)
    states = torch.full((count, density.length), density.tokens)
    row = torch.arange(count)
    for _ in range(density.length):
        proposed, _ = jumped(density, states.repeat_interleave(proposals, dim=0), uniform(density), generator)
        proposed = proposed.view(count, proposals, -1)
        kept = torch.multinomial(torch.softmax(value(proposed), dim=1), 1, generator=generator)[:, 0]
        states = proposed[row, kept]
    return Guided(states[:, None], torch.zeros(count, 1, dtype=torch.float64), value.reward_calls)


def smc(
    density: Density,
    runs: int,
    particles: int,
    *,
    completions: int = 1,
    resample_below: float = 0.5,
    proposal: Callable[[Tensor], Tensor] | None = None,
    seed: int,
) -> Guided:
    """Sequential Monte Carlo: particles are weighed by how much each jump has raised their value, and resampled.

        w_s = w_{s-1} (p_base / q)(jump) V(x_s) / V(x_{s-1}),     V(x_L) = exp(r),     V(x_0) = 1

    The mean weight is E_base[exp(r)] without a bias, whatever V and the number of particles; an outcome drawn in
    proportion to the weights has a law whose bias falls as 1 / N. Of one particle the weight is that of importance
    sampling.

    Args:
        runs, particles: R independent runs of N particles.
        completions: that V is estimated by, at as many calls a jump but the last; 0: V = 1 on the way, one call each.
        resample_below: effective sample size, as a share of N, below which a run resamples.
        proposal: log q(v | i, state), [B, L, V] of states [B, L]; None is the base.

    Source: Wu et al., Twisted Diffusion Sampler, arXiv 2306.17775; Singhal et al., Feynman-Kac steering,
    arXiv 2501.06848, whose potentials are those of differences of rewards.
    """
    generator = torch.Generator().manual_seed(seed)
    value = Lookahead(density, completions, generator)
    states = torch.full((runs, particles, density.length), density.tokens)
    weight = torch.zeros(runs, particles, dtype=torch.float64)  # since the last resampling
    before = torch.zeros_like(weight)
    settled = torch.zeros(runs, 1, dtype=torch.float64)  # log of the mean weights that were resampled away
    for step in range(density.length):
        last = step + 1 == density.length
        moved, log_prob = jumped(density, states.flatten(0, 1), proposal or uniform(density), generator)
        states = moved.view_as(states)
        worth = value(states) if last or completions else torch.zeros_like(weight)
        weight = weight + worth - before - math.log(density.tokens) - log_prob.view_as(weight)
        before = worth
        if last:
            break
        share = torch.softmax(weight, dim=1)
        few = 1 / share.square().sum(dim=1) < resample_below * particles
        chosen = torch.multinomial(share, particles, replacement=True, generator=generator)
        chosen = torch.where(few[:, None], chosen, torch.arange(particles))
        mean = weight.logsumexp(dim=1, keepdim=True) - math.log(particles)
        states, before = states.gather(1, chosen[..., None].expand_as(states)), before.gather(1, chosen)
        settled = settled + torch.where(few[:, None], mean, 0.0)
        weight = torch.where(few[:, None], 0.0, weight)
    return Guided(states, weight + settled, value.reward_calls)


def jumped(
    density: Density, states: Tensor, proposal: Callable[[Tensor], Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States [B, L] after a jump each, and its log-probability [B]: of any masked position, to a token of q."""
    row = torch.arange(len(states))
    position = MaskedCTMC(density.tokens).jump_times(states, generator).argmin(dim=1)
    log_prob = proposal(states)[row, position].double()
    token = dam.jump(log_prob, seed=int(torch.randint(2**62, (), generator=generator))).target
    states = states.clone()
    states[row, position] = token
    return states, log_prob[row, token]


# ---- the study

SAMPLERS: dict[str, tuple[Callable[..., Guided], dict[str, int]]] = {
    "svdd, 5 proposals": (svdd, {"proposals": 5}),
    "svdd, 20 proposals": (svdd, {"proposals": 20}),
    "importance sampling, one of 64": (smc, {"particles": 64, "completions": 0}),
    "smc, one of 16": (smc, {"particles": 16}),
    "smc, one of 64": (smc, {"particles": 64}),
}
OBSERVED = ("tv", *lattice.OBSERVED)


def sampled(density: Ising, name: str, samples: int, seed: int) -> dict[str, Any]:
    """Figures of samples of one of SAMPLERS, each of a run of its own, and in [1] those of as many exact ones."""
    sampler, options = SAMPLERS[name]
    found = sampler(density, samples, **options, seed=seed)
    outcomes = found.drawn(torch.Generator().manual_seed(seed))
    log_z = lattice.known(density)[0] - density.length * math.log(density.tokens)
    figures = lattice.lattice_figures(density, outcomes, found.log_weight.flatten() - log_z, seed)
    return {
        "sampler": name,
        "seed": seed,
        "calls_of_a_sample": found.reward_calls // samples,
        "log_z_error": figures["log_z_error"] if sampler is smc else None,
        **{figure: figures[figure] for figure in OBSERVED},
    }


def study(output: Path, samples: int) -> str:
    """Samples the 4 x 4 lattice, writes JSON and returns the table."""
    density = Ising()
    found = {
        **records.versions(),
        "device": report.device(),
        **dataclasses.asdict(density),
        "samples": samples,
        "results": [sampled(density, name, samples, seed=0) for name in SAMPLERS],
    }
    report.write_json(output / "guidance.json", found)
    return text_of(found)


def text_of(found: dict[str, Any]) -> str:
    """The table of a study's JSON; in brackets what as many exact samples have."""
    lines = []
    for r in found["results"]:
        off = ["{:.3f} [{:.3f}]".format(*r[figure]) for figure in OBSERVED]
        log_z = "-" if r["log_z_error"] is None else f"{r['log_z_error']:+.4f}"
        lines.append([r["sampler"], f"{r['calls_of_a_sample']:,}", *off, log_z])
    return tables.markdown(
        ["sampler", "calls a sample", "TV", "magnetisation off by", "correlation off by", "log Z off by"], lines
    )
