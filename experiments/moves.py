"""Chains of moves with a known answer: an occupation chain, a lattice gas and Potts spins of fixed composition.

An independent implementation of Discrete Adjoint Matching published what the paper's estimator came to on them
("Adjoint Schroedinger bridge sampling on structured state spaces via Markov semigroup intertwining", its additional
results). Each chain starts from one state; the target is given, and the terminal cost is what brings the chain to it,

    g(x) = -log pi(x) + log p_base(X_1 = x | x_0),

so that p*(X_1) = pi. All laws are exact, by the forward equation over all states, of the chain as it is simulated.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dam.adjoint import tilted_weights
from dam.ctmc import Moves, MovesCTMC, enumeration, gillespie, matching, moves
from dam.ctmc.matching import MoveTargets
from dam.ops.adjoint_weights import adjoint_weights
from experiments import estimators, learners

INTERVALS = 16
# Shorter toward time 1, where rates change fastest.
TIMES = [1 - (1 - k / INTERVALS) ** 1.5 for k in range(INTERVALS + 1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain of moves from one state, and the target.

    `published` is what the paper's estimator came to in the independent implementation, TV and reward calls.
    """

    name: str
    process: MovesCTMC
    size: int  # what tokens are below
    start: tuple[int, ...]
    log_target: Callable[[Tensor], Tensor]  # log pi [B] of states [B, L], up to a constant
    published: tuple[float, int]

    @functools.cached_property
    def space(self) -> enumeration.MoveSpace:
        return enumeration.MoveSpace(self.process, torch.tensor([self.start]), self.size)

    @functools.cached_property
    def initial(self) -> Tensor:
        """The law of X_0, float64 [X]."""
        law = torch.zeros(len(self.space.states), dtype=torch.float64)
        law[self.space.index_of(torch.tensor(self.start))] = 1.0
        return law

    @functools.cached_property
    def target(self) -> Tensor:
        """pi, float64 [X]."""
        return self.log_target(self.space.states).softmax(dim=0)

    @functools.cached_property
    def rewards(self) -> Tensor:
        """-g of each state, float64 [X]."""
        base = self.space.law(self.process.base, self.initial, [0.0, 1.0])
        return self.target.log() - base.log()

    def reward(self, states: Tensor) -> Tensor:
        return self.rewards[self.space.index_of(states)]

    def law(self, model: moves.MoveModel) -> Tensor:
        """Of X_1 under a model, as `gillespie` simulates it, float64 [X]."""
        return self.space.law(model, self.initial, TIMES, tolerance=1e-9)


def occupation(sites: int = 4, particles: int = 4, total: float = 4.0, shape: float = 0.5) -> Case:
    """Particles that hop between sites at rate total / (sites - 1) each; Dirichlet-multinomial occupation numbers."""

    def log_target(states: Tensor) -> Tensor:
        return (torch.lgamma(states + shape) - torch.lgamma(states + 1.0)).double().sum(dim=1)

    return Case(
        "occupation",
        MovesCTMC(moves.hop(total / (sites - 1)), check=False),
        particles + 1,
        (particles,) + (0,) * (sites - 1),
        log_target,
        (0.0149, 20_889_600),
    )


def support_moves(labels: int, rate: float) -> moves.ListMoves:
    """Of sites with a label 1 .. labels or none, 0: one gets another, or leaves its place for an empty site with any.

    Slots: each of the k labelled sites, in order, times the labels - 1 others; then each of them, each of the empty
    sites and each label.
    """

    def list_moves(tokens: Tensor) -> Moves:
        count = len(tokens)
        labelled = (tokens != 0).nonzero()[:, 1].view(count, -1)
        empty = (tokens == 0).nonzero()[:, 1].view(count, -1)
        k, m = labelled.shape[1], empty.shape[1]
        label = tokens.gather(1, labelled)
        other = torch.arange(1, labels, device=tokens.device).expand(count, k, labels - 1)
        other = (other + (other >= label[..., None]).long()).flatten(1)
        site = labelled.repeat_interleave(labels - 1, dim=1)
        renamed = tokens[:, None].expand(-1, site.shape[1], -1).scatter(2, site[..., None], other[..., None])
        source = labelled.repeat_interleave(m * labels, dim=1)
        there = empty.repeat_interleave(labels, dim=1).repeat(1, k)
        new = torch.arange(1, labels + 1, device=tokens.device).repeat(k * m).expand(count, -1)
        carried = tokens[:, None].expand(-1, source.shape[1], -1).scatter(2, source[..., None], 0)
        carried = carried.scatter(2, there[..., None], new[..., None])
        neighbours = torch.cat((renamed, carried), dim=1)
        return Moves(neighbours, torch.full(neighbours.shape[:2], rate, dtype=torch.float64, device=tokens.device))

    return list_moves


def ising(side: int = 4, coupling: float = 0.5, total: float = 10.0) -> Case:
    """Spins of zero magnetisation on a periodic lattice, any two that differ exchanged at rate total / 64 (4 x 4)."""
    sites = side**2

    def log_target(states: Tensor) -> Tensor:
        s = (2 * states - 1).double().view(-1, side, side)
        return coupling * ((s * s.roll(1, 1)).sum(dim=(1, 2)) + (s * s.roll(1, 2)).sum(dim=(1, 2)))

    up = sites // 2
    return Case(
        "ising",
        MovesCTMC(support_moves(1, total / (up * (sites - up))), check=False),
        2,
        (1,) * up + (0,) * (sites - up),
        log_target,
        (0.0617, 168_960_000),
    )


def potts(length: int = 14, labelled: int = 4, tokens: int = 4, total: float = 10.0) -> Case:
    """A ring with labels at `labelled` sites: random fields, and couplings of neighbours, by the published seed."""
    generator = np.random.default_rng(20260908)
    field = generator.normal(0.0, 0.7, size=(length, tokens))
    coupling = generator.normal(0.0, 0.4, size=(length, tokens, tokens))
    field[:, 0], coupling[:, 0, :], coupling[:, :, 0] = 0.0, 0.0, 0.0
    h, j = torch.from_numpy(field), torch.from_numpy(coupling)
    site = torch.arange(length)

    def log_target(states: Tensor) -> Tensor:
        return -(h[site, states] + j[site, states, states.roll(-1, 1)]).sum(dim=1)

    number = labelled * (tokens - 2) + labelled * (length - labelled) * (tokens - 1)
    return Case(
        "potts",
        MovesCTMC(support_moves(tokens - 1, total / number), check=False),
        tokens,
        (1,) * labelled + (0,) * (length - labelled),
        log_target,
        (0.0829, 20_889_600),
    )


CASES = {"occupation": occupation, "ising": ising, "potts": potts}


class Potentials(nn.Module):
    """Log multipliers of moves that change one site or two, as differences of a potential:

        a_t(y, x) = W_t(y) - W_t(x) + sum over changed sites i of n_i(y_i; x, t) - n_i(x_i; x, t)

    W_t has all pairs of sites, with coefficients that are polynomials of time; n is a network of all sites. All 0 at
    the start.
    """

    def __init__(self, length: int, size: int, width: int, degree: int = 5):
        super().__init__()
        self.length, self.size, self.degree = length, size, degree
        sites = length * size
        self.field = nn.Parameter(torch.zeros(degree, sites))
        self.pair = nn.Parameter(torch.zeros(degree, sites, sites))
        of = torch.arange(sites) // size
        self.register_buffer("other", (of[:, None] != of).float())
        site = torch.arange(length).float()
        self.register_buffer("moments", torch.stack([torch.ones(length), site, site.square()], dim=1))
        self.network = nn.Sequential(
            nn.Linear(sites + degree, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sites)
        )
        last = self.network[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, states: Tensor, time: Tensor, listed: Moves) -> Tensor:
        times, of = time.unique(return_inverse=True)
        power = torch.arange(self.degree, device=time.device)
        basis = (2 * times[:, None] - 1).pow(power).float()  # [N, degree]
        field = basis @ self.field
        symmetric = (self.pair + self.pair.transpose(1, 2)) * self.other
        pair = torch.einsum("nd,dab->nab", basis, symmetric)
        here = F.one_hot(states, self.size).float().flatten(1)
        local = field[of] + self.network(torch.cat((here, basis[of]), dim=1))
        # The pairs' share, for all times at once: a product for each, of which one counts.
        local = local + torch.einsum("bd,bda->ba", basis[of], (here @ symmetric).transpose(0, 1))
        # Mean and spread of the numbers of the changed sites, one or two, name both: cheaper than to look for them.
        sums = (listed.neighbours != states[:, None]).float() @ self.moments
        mean, square = (sums[..., n] / sums[..., 0].clamp(min=1.0) for n in (1, 2))
        spread = (square - mean.square()).clamp(min=0.0).sqrt()
        i, k = (mean - spread).round().long(), (mean + spread).round().long()
        at = [site * self.size for site in (i, k)]
        old = [start + states.gather(1, site) for start, site in zip(at, (i, k), strict=True)]
        new = [
            start + listed.neighbours.gather(2, site[..., None])[..., 0] for start, site in zip(at, (i, k), strict=True)
        ]
        first = local.gather(1, new[0]) - local.gather(1, old[0])
        second = local.gather(1, new[1]) - local.gather(1, old[1])
        flat, sites = pair.flatten(), self.length * self.size
        row = of[:, None] * sites**2
        both = sum(
            sign * flat[row + a * sites + b]
            for sign, a, b in ((1, new[0], new[1]), (-1, new[0], old[1]), (-1, old[0], new[1]), (1, old[0], old[1]))
        )
        return first + torch.where(i == k, 0.0, second + both)


# ---- learning


@dataclasses.dataclass(frozen=True)
class Options:
    """What both learners get alike; tuned for neither."""

    rounds: int = 40
    batch: int = 1024  # reward calls of a round
    steps: int = 10  # gradient steps of a round
    events: int = 2048  # that a step is on: drawn ones, or all where no more are distinct
    width: int = 64
    learning_rate: float = 5e-3


PUBLISHED = learners.PUBLISHED
PATH = "path, baseline"
LEARNERS = (PATH, PUBLISHED)
SIZE = 16  # trajectories of a state, of the published estimator
FEW = 1024  # states whose rates are worth a table for each round
LEAST_ESS = 0.5  # of all trajectories of a round, that a step toward p* leaves


def tabulated(case: Case, model: nn.Module) -> tuple[moves.MoveModel, int]:
    """The model from a table of all states and intervals where these are few, and the states that it was called at."""
    count = len(case.space.states)
    if count > FEW:
        return model, 0
    with torch.no_grad():
        states = case.space.states.repeat(INTERVALS, 1)
        time = middles().repeat_interleave(count)
        table = model(states, time, case.process.moves(states)).view(INTERVALS, count, -1)
    edges = torch.tensor(TIMES, dtype=torch.float64)

    def looked_up(states: Tensor, time: Tensor, listed: Moves) -> Tensor:
        return table[torch.searchsorted(edges, time) - 1, case.space.index_of(states)]

    return looked_up, INTERVALS * count


def middles() -> Tensor:
    """Of the intervals, float64 [INTERVALS]."""
    edges = torch.tensor(TIMES, dtype=torch.float64)
    return (edges[:-1] + edges[1:]) / 2


def path_round(case: Case, model: nn.Module, options: Options, seed: int) -> tuple[MoveTargets, int]:
    """Targets at all events of trajectories from the start, weighed together, and network calls.

    A step toward p* leaves half of the trajectories as effective ones, which later is the whole way.
    """
    drawing, calls = tabulated(case, model)
    start = of_start(case, options.batch)
    path = gillespie(case.process, drawing, start, times=TIMES, base=case.process.base, seed=seed)
    gain = (path.log_ratio + path.escape_gap).sum(dim=1)
    least = LEAST_ESS * options.batch
    weights, _ = tilted_weights(gain[None, :, None], case.reward(path.final)[None], beta=1.0, ess=least)
    return matching.path_targets(path, weights.weight), calls or path.network_calls


def published_round(case: Case, model: nn.Module, options: Options, seed: int) -> tuple[MoveTargets, int]:
    """Of 16 trajectories from each state, at uniform times of trajectories of the model, one's first jump."""
    count = options.batch // SIZE
    generator = torch.Generator().manual_seed(seed)
    drawing, calls = tabulated(case, model)
    whole = gillespie(case.process, drawing, of_start(case, count), times=TIMES, seed=seed)
    first = torch.randint(INTERVALS, (count,), generator=generator)
    assert whole.state is not None
    entered = (whole.time == middles()[first][:, None]).int().argmax(dim=1)
    states = whole.state[torch.arange(count), entered].repeat_interleave(SIZE, dim=0)
    starts = first.repeat_interleave(SIZE)
    # Streams of trajectories that no whole one has.
    ids = torch.arange(count, count + len(states))
    path = gillespie(
        case.process, drawing, states, times=TIMES, base=case.process.base, first=starts, seed=seed, row_ids=ids
    )
    gain = (path.log_ratio + path.escape_gap).view(count, SIZE, -1)
    weight = adjoint_weights(gain, -case.reward(path.final).view(count, SIZE)).weight
    chosen = F.one_hot(torch.randint(SIZE, (count,), generator=generator), SIZE)
    calls = calls or whole.network_calls + path.network_calls
    return matching.path_targets(path, SIZE * chosen * weight, first_jump=True), calls


def of_start(case: Case, count: int) -> Tensor:
    return torch.tensor([case.start]).expand(count, -1)


def run(case_name: str, options: Options, name: str, seed: int) -> dict[str, Any]:
    """Trains; total variation of the exact law of the averaged network, on the way and at the end."""
    torch.manual_seed(seed)
    case = CASES[case_name]()
    fit = learners.Fit(
        Potentials(len(case.start), case.size, options.width), learning_rate=options.learning_rate, average=8.0
    )
    generator = torch.Generator().manual_seed(seed)
    draw = path_round if name == PATH else published_round
    network_calls, curve = 0, []
    for n in estimators.bar(options.rounds, f"{name}, {case_name}, seed {seed}"):
        targets, calls = draw(case, fit.network, options, seed * 10**6 + n)
        network_calls += calls
        teacher = copy.deepcopy(fit.network) if name == PATH else None
        merged = targets.merged()
        for _ in range(options.steps):
            few = len(merged.move) <= options.events
            part = merged if few else targets.drawn(options.events, generator)
            network_calls += len(part.move) * (1 if teacher is None else 2)
            baseline = 0.0 if teacher is None else 1.0
            loss = matching.loss(case.process, fit.network, part, baseline=baseline, teacher=teacher)
            fit.step(loss, n / options.rounds)
        if n + 1 in evaluated(options.rounds):
            tv = float((case.law(fit.averaged) - case.target).abs().sum() / 2)
            cost = {"reward_calls": (n + 1) * options.batch, "network_calls": network_calls}
            curve.append({**cost, "tv": tv})
    return {"curve": curve, "tv": curve[-1]["tv"]}


def evaluated(rounds: int) -> set[int]:
    """Rounds after which the law is solved for: six, at numbers that grow by a factor."""
    return {max(1, round(rounds ** (k / 6))) for k in range(1, 7)}


def study(given: dict[str, Any], options: Options, output: Path) -> str:
    results: list[dict[str, Any]] = []
    case = given["case"]
    published = dict(zip(("tv", "reward_calls"), CASES[case]().published, strict=True))
    setting = {"case": case, "published": published, "times": TIMES, **dataclasses.asdict(options)}
    for found in estimators.run_all(given, functools.partial(run, case, options)):
        results.append(found)
        print(f"{found['learner']}, seed {found['seed']}: TV {found['tv']:.4f}", flush=True)
        estimators.write(output / f"moves-{case}.json", setting, results, given)
    estimators.draw_curves(output / f"moves-{case}.png", results, "tv", "TV of p_u and p*", f"{case}, moves")
    return table(results, published)


def table(results: Sequence[dict[str, Any]], published: dict[str, float]) -> str:
    """Medians over seeds, with least and most of TV; below them what is published."""
    lines = ["| learner | reward calls | network calls | TV |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        calls = [estimators.middle([r["curve"][-1][cost] for r in runs]) for cost in estimators.COSTS]
        tv = estimators.spread([r["tv"] for r in runs], "{:.4f}")
        lines.append(f"| {name} | {' | '.join(calls)} | {tv} |")
    lines.append(f"| published elsewhere | {published['reward_calls']:,} | | {published['tv']} |")
    return "\n".join(lines)
