"""ising, potts: a periodic lattice, learned from its energy by a masked or uniform chain whose base knows nothing.

log Z and observables are exact, by the transfer matrix; beside each figure stands what as many exact samples have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dam.adjoint import tilted_weights
from dam.ctmc import Geometric, UniformCTMC, enumeration, tau_leap
from dam.models.denoiser import Head
from dam.rollout import outcome_log_prob
from experiments import learners, replay
from experiments.centred import Centred
from experiments.densities import Density, Ising, Lattice, Potts
from experiments.estimators import (
    COSTS,
    Options,
    bar,
    checked,
    draw_curves,
    fitting,
    middle,
    play,
    playing,
    run_all,
    spread,
    write,
)

LATTICES: dict[str, type[Ising] | type[Potts]] = {"ising": Ising, "potts": Potts}
OPTIONS = Options(rounds=100, batch=1024, steps=4, power=1.0)
SITES = 2**15  # of the samples of an evaluation before the end, and of `kl_over_orders`


class Network(nn.Module):
    """p(v | position, tokens) by a residual MLP of all tokens, as a `Denoiser`; uniform at the start."""

    def __init__(self, density: Density, width: int = 256, depth: int = 2):
        super().__init__()
        self.values = density.tokens + 1  # and the mask
        self.first = nn.Linear(density.length * self.values, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, density.length * 32)
        self.output = nn.Linear(32, self.values)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def trunk(self, tokens: Tensor) -> Tensor:
        h = F.gelu(self.first(F.one_hot(tokens, self.values).float().flatten(1)))
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        return h

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return F.gelu(self.last(self.trunk(tokens))).view(*tokens.shape, 32)

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        """Half of the multiplications of hidden_states, where few positions of a row are read."""
        order = position.argsort(stable=True)
        parts = self.trunk(tokens)[row[order]].split(torch.bincount(position, minlength=tokens.shape[1]).tolist())
        weight, bias = self.last.weight.view(-1, 32, self.last.in_features), self.last.bias.view(-1, 32)
        found = torch.cat([F.linear(part, weight[i], bias[i]) for i, part in enumerate(parts)])
        return F.gelu(found)[order.argsort()]

    def head(self) -> Head:
        return Head(self.output.weight, self.output.bias)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a study on a lattice has beside the options that every study has."""

    samples: int = 16_384  # that figures are of
    group_size: int | None = None  # K of the group normaliser; None: the batch
    network: str = "mlp"  # or "centred"
    width: int = 256  # of it
    reach: int | None = None  # of a centred one; None: it sees the whole lattice

    def made(self, density: Lattice) -> Network | Centred:
        return Network(density, self.width) if self.network == "mlp" else Centred(density, self.width, reach=self.reach)


def on_lattice(
    density: Lattice, name: str, options: Options, seed: int, setting: Setting
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains on a masked chain; the curve, of few samples, and the figures at the end."""
    torch.manual_seed(seed)
    model = learners.DenoiserModel(setting.made(density), density, **fitting(options))
    learner = learner_of(name, density, options, setting.group_size, seed)

    def evaluate() -> dict[str, float]:
        found = of_weights(averaged(density, model, min(setting.samples, on_the_way(density)), seed)[1])
        return {"ess": found["ess"], "kl": found["kl"]}

    curve = play(learner, model, options, evaluate, f"{name}, beta {density.beta}, seed {seed}")
    return curve, figures(density, model, setting.samples, seed)


def learner_of(name: str, density: Lattice, options: Options, size: int | None, seed: int) -> learners.Learner:
    if name in replay.LEARNERS:
        return replay.learner(name, density, **playing(options), seed=seed)
    return learners.learner(name, density, **playing(options), size=size, seed=seed)


OBSERVED = ("magnetisation_error", "correlation_error")
ORDERS = 16  # of unmasking, of `kl_over_orders`


def on_the_way(density: Density) -> int:
    """Samples of such an evaluation."""
    return max(256, SITES // density.length)


def averaged(density: Lattice, model: learners.Model, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """`weighed` samples of the averaged network of a masked chain."""

    def sampled(count: int, seed: int) -> tuple[Tensor, Tensor]:
        path = model.sampled(model.blank(count), seed)
        return path.final, -density.length * math.log(density.tokens) - path.log_prob.double().sum(dim=1)

    network, model.network = model.network, model.averaged
    try:
        return weighed(density, sampled, samples, seed)
    finally:
        model.network = network


def figures(density: Lattice, model: learners.DenoiserModel, samples: int, seed: int) -> dict[str, Any]:
    """All figures of the averaged network of a masked chain."""
    over_orders = kl_over_orders(density, model, min(samples, on_the_way(density)), seed)
    return {**lattice_figures(density, *averaged(density, model, samples, seed), seed), "kl_over_orders": over_orders}


@functools.cache
def known(density: Lattice) -> tuple[float, tuple[float, float]]:
    return density.known()


def weighed(
    density: Lattice, sampled: Callable[[int, int], tuple[Tensor, Tensor]], samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Samples [N, L], from what draws so many with log p_base - log p_u of their paths, and log p* - log p_u [N]."""
    finals, log_weights = [], []
    for n, at in enumerate(range(0, samples, 16_384)):
        final, log_ratio = sampled(min(16_384, samples - at), 10**9 + seed * 1000 + n)
        finals.append(final)
        log_weights.append(log_ratio + density.length * math.log(density.tokens) + density.log_density(final))
    return torch.cat(finals), torch.cat(log_weights) - known(density)[0]


def of_weights(log_weight: Tensor) -> dict[str, float]:
    """ESS of the weights of N samples to p* in [1 / N, 1], KL(p_u || p*) of paths by their mean, and the error of the
    log Z that they give.
    """
    count = len(log_weight)
    return {
        "ess": float(1 / torch.softmax(log_weight, dim=0).square().sum() / count),
        "kl": float(-log_weight.mean()),
        "log_z_error": float(log_weight.logsumexp(dim=0)) - math.log(count),
    }


def lattice_figures(density: Lattice, final: Tensor, log_weight: Tensor, seed: int) -> dict[str, Any]:
    """`of_weights`, and observables against p*, each with what exact samples have in [1]; total variation likewise,
    where states can be enumerated.
    """
    found: dict[str, Any] = of_weights(log_weight)
    truth = known(density)[1]
    if density.enumerable:
        law, generator = density.law(), torch.Generator().manual_seed(seed)
        index = torch.multinomial(law, len(final), replacement=True, generator=generator)
        exact = enumeration.states(density.tokens, density.length)[index]
        found["tv"] = [total_variation(law, enumeration.index_of(x, density.tokens)) for x in (final, exact)]
    else:
        exact = density.exact(len(final), seed)
    means = [[float(o.mean()) for o in density.observables(x)] for x in (final, exact)]
    for n, name in enumerate(OBSERVED):
        found[name] = [abs(mean[n] - truth[n]) for mean in means]
    return found


def total_variation(law: Tensor, index: Tensor) -> float:
    """Of a law [N] and the shares of samples int64 [B]."""
    share = torch.bincount(index, minlength=len(law)).double() / len(index)
    return float((share - law).abs().sum() / 2)


def kl_over_orders(density: Lattice, model: learners.DenoiserModel, samples: int, seed: int) -> float:
    """E[log (1/M sum_j p_u(x | order_j)) - log p*(x)], x drawn by the first of M orders, of the averaged network.

    The divergence of (x, orders) from p* with M uniform orders, one of which drew x: between that of paths, M = 1, and
    that of outcomes, M without end, and not below it at any M.

    Source: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, ICLR 2016, Thm. 1, of p_u.
    """
    network, model.network = model.network, model.averaged
    try:
        path = model.sampled(model.blank(samples), 2 * 10**9 + seed)
    finally:
        model.network = network
    others = outcome_log_prob(
        model.averaged, path.initial, path.final, model.process, orders=ORDERS - 1, seed=3 * 10**9 + seed
    )
    log_prob = torch.cat((path.log_prob.double().sum(dim=1, keepdim=True), others), dim=1)
    mean = log_prob.logsumexp(dim=1) - math.log(ORDERS)
    return float((mean - density.log_density(path.final)).mean()) + known(density)[0]


class TimedNetwork(nn.Module):
    """What the other spins and the time say of each one: log-odds [B, L, 2], 0 at the start; a residual MLP."""

    def __init__(self, density: Ising, width: int = 256, depth: int = 2):
        super().__init__()
        self.first = nn.Linear(density.length + 3, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, density.length * 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens: Tensor, left: Tensor) -> Tensor:
        times = torch.stack([left, left.square(), left.clamp(min=1e-4).log() / 8], dim=1)
        h = F.gelu(self.first(torch.cat([2.0 * tokens - 1, times], dim=1).float()))
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        return self.last(h).view(*tokens.shape, 2)


# Of the uniform chain of spins: weights over as many events as `simulate` would make of them vary too much.
LEAPS = [1 - 10 ** (-4 * k / 40) for k in range(41)]


class UniformLattice:
    """A uniform chain of spins: p(X_1^i = w | x, t) in proportion to K_t[w, x_i] and what a network adds to it."""

    def __init__(self, density: Ising, options: Options):
        self.density, self.process = density, UniformCTMC(density.tokens, Geometric(1e-3))
        self._fit = learners.Fit(TimedNetwork(density), **fitting(options))

    def base(self, tokens: Tensor, time: Tensor) -> Tensor:
        return self.process.kernel(time).transpose(1, 2)[torch.arange(len(tokens))[:, None], tokens].log()

    def prediction(self, network: nn.Module, tokens: Tensor, time: Tensor) -> Tensor:
        left = self.process.schedule.alpha(time.double())
        return self.base(tokens, time) + network(tokens, left).double()

    def step(self, final: Tensor, weight: Tensor, progress: float, generator: torch.Generator) -> None:
        """A gradient step on outcomes re-noised to times at which what is left of them is uniform in (0, 1)."""
        time = self.process.schedule.inverse(torch.rand(len(final), generator=generator, dtype=torch.float64))
        time = time.clamp(min=0.0)
        states = self.process.noise(final, time, generator)
        log_prob = self.prediction(self._fit.network, states, time).log_softmax(dim=2)
        loss = -(weight * log_prob.gather(2, final[..., None]).sum(dim=(1, 2))).mean() / self.density.length
        self._fit.step(loss, progress)

    def sampled(self, count: int, seed: int, *, averaged: bool = False) -> tuple[Tensor, Tensor]:
        """Outcomes [B, L], and log p_base - log p_u of their paths."""
        network = self._fit.averaged if averaged else self._fit.network
        start = self.process.initial((count, self.density.length), torch.Generator().manual_seed(seed + 2**40))
        path = tau_leap(
            self.process,
            lambda x, t: self.prediction(network, x, t),
            start,
            times=LEAPS,
            base=self.base,
            seed=seed,
        )
        return path.final, (path.log_ratio + path.escape_gap).sum(dim=1)


def on_uniform_lattice(
    density: Ising, name: str, options: Options, seed: int, setting: Setting
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains on a uniform chain; the curve, of few samples, and the figures at the end.

    What is matched is the exact chain's, and what samples the one of tau-leaping, which p* is not quite a law of.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, curve, at = UniformLattice(density, options), [], checked(options.rounds)
    sampled = functools.partial(model.sampled, averaged=True)
    label = f"{name}, uniform base, beta {density.beta}, seed {seed}"
    for n in bar(options.rounds, label):
        final, log_ratio = model.sampled(options.batch, seed * 10**6 + n)
        reward = density.log_density(final)
        shape = (-1, setting.group_size or options.batch)
        weights, _ = tilted_weights(log_ratio.view(*shape, 1), reward.view(shape), beta=1.0)
        for _ in range(options.steps):
            model.step(final, weights.weight.flatten(), n / options.rounds, generator)
        if n + 1 in at:
            found = of_weights(weighed(density, sampled, on_the_way(density), seed)[1])
            # A trajectory is a call for every leap.
            calls = (n + 1) * options.batch * (len(LEAPS) - 1 + options.steps)
            cost = {"reward_calls": (n + 1) * options.batch, "network_calls": calls}
            curve.append({**cost, "ess": found["ess"], "kl": found["kl"]})
    return curve, lattice_figures(density, *weighed(density, sampled, setting.samples, seed), seed)


def run(density: Lattice, base: str, options: Options, setting: Setting, name: str, seed: int) -> dict[str, Any]:
    if base == "masked":
        curve, found = on_lattice(density, name, options, seed, setting)
    else:
        assert isinstance(density, Ising)
        curve, found = on_uniform_lattice(density, name, options, seed, setting)
    return {**found, "curve": curve}


def study(given: dict[str, Any], options: Options, output: Path) -> str:
    made = LATTICES[given["study"]]
    density = made(**{field.name: given[field.name] for field in dataclasses.fields(made)})
    base = given.get("base", "masked")
    chosen = Setting(**{field.name: given[field.name] for field in dataclasses.fields(Setting)})
    run_one = functools.partial(run, density, base, options, chosen)
    results: list[dict[str, Any]] = []
    stem = given["name"] or f"{given['study']}-{density.beta:g}-{base}"
    setting = {**dataclasses.asdict(density), "base": base, **dataclasses.asdict(options), **dataclasses.asdict(chosen)}
    for found in run_all(given, run_one):
        results.append(found)
        print(f"{found['learner']}, seed {found['seed']}: ESS {found['ess']:.4f}, KL {found['kl']:.3g}", flush=True)
        write(output / f"{stem}.json", setting, results, given)
    title = f"{density.side} x {density.side} {made.__name__}, beta {density.beta}, {base} base"
    lost = [{**r, "curve": [{**point, "lost": 1 - point["ess"]} for point in r["curve"]]} for r in results]
    draw_curves(output / f"{stem}.png", lost, "lost", "1 - ESS", title)
    return f"{lattice_table(results)}\n\n{network_calls_table(results)}"


COLUMNS = ["reward calls", "network calls", "ESS", "KL(p_u, p*)", "over orders", "log Z off by"]
OBSERVED_AS = {"tv": "TV", "magnetisation_error": "magnetisation off by", "correlation_error": "correlation off by"}


def lattice_table(results: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, those of exact samples in brackets."""
    observed = [name for name in ("tv", *OBSERVED) if name in results[0]]
    lines = head_of(["learner", *COLUMNS, *(OBSERVED_AS[name] for name in observed)])
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        lines.append(f"| {' | '.join([name, *cells_of(runs, observed)])} |")
    return "\n".join(lines)


def lattices_table(files: Sequence[dict[str, Any]]) -> str:
    """The same of several lattices, each study's JSON after another's."""
    lines = head_of(["lattice", "learner", *COLUMNS, *(OBSERVED_AS[name] for name in OBSERVED)])
    for found in files:
        kind = f"Potts, {found['colours']} colours" if "colours" in found else f"Ising, field {found['field']:g}"
        lattice = f"{kind}, {found['side']} x {found['side']}, beta {found['beta']:g}"
        for name in dict.fromkeys(r["learner"] for r in found["results"]):
            runs = [r for r in found["results"] if r["learner"] == name]
            lines.append(f"| {' | '.join([lattice, name, *cells_of(runs, OBSERVED)])} |")
    return "\n".join(lines)


def head_of(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def cells_of(runs: Sequence[dict[str, Any]], observed: Sequence[str]) -> list[str]:
    """Those of COLUMNS, and of what is observed."""
    cells = [middle([r["curve"][-1][cost] for r in runs]) for cost in COSTS]
    cells += [spread([r["ess"] for r in runs], "{:.4f}"), spread([r["kl"] for r in runs], "{:.2g}")]
    over_orders = [r["kl_over_orders"] for r in runs if "kl_over_orders" in r]
    cells += [spread(over_orders, "{:.2g}") if over_orders else "-"]
    cells += [spread([r["log_z_error"] for r in runs], "{:+.4f}")]
    for figure in observed:
        ours, exact = (statistics.median(r[figure][k] for r in runs) for k in (0, 1))
        cells.append(f"{ours:.4f} [{exact:.4f}]")
    return cells


def network_calls_table(results: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds at the last evaluation on the way within the network calls of the learner with the fewest.

    Their learning rates have not fallen as far then as those of a run of that length would have.
    """
    limit = min(r["curve"][-1]["network_calls"] for r in results)
    lines = ["| learner | network calls | reward calls | ESS | KL(p_u, p*) |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["learner"] for r in results):
        curves = [r["curve"] for r in results if r["learner"] == name]
        points = [[point for point in curve if point["network_calls"] <= limit][-1] for curve in curves]
        cells = [name, *(middle([point[cost] for point in points]) for cost in reversed(COSTS))]
        for figure, form in (("ess", "{:.4f}"), ("kl", "{:.2g}")):
            cells.append(spread([point[figure] for point in points], form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
