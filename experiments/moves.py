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
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dam.adjoint import tilted_weights
from dam.ctmc import Moves, MovesCTMC, Path, enumeration, gillespie, matching, moves
from dam.ctmc.matching import MoveTargets
from dam.ops.adjoint_weights import adjoint_weights
from experiments import estimators, learners
from experiments.invariants import Invariants

INTERVALS = 16
# Shorter toward time 1, where rates change fastest.
TIMES = [1 - (1 - k / INTERVALS) ** 1.5 for k in range(INTERVALS + 1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain of moves from one state, and the target.

    `vacant` says that token 0 stands for nothing, so that a network needs no numbers for it. `published` is what the
    paper's estimator came to in the independent implementation, TV and reward calls.
    """

    name: str
    process: MovesCTMC
    size: int  # what tokens are below
    start: tuple[int, ...]
    log_target: Callable[[Tensor], Tensor]  # log pi [B] of states [B, L], up to a constant
    published: tuple[float, int]
    vacant: bool = True
    side: int | None = None  # of a lattice whose symmetries the network is given

    @functools.cached_property
    def space(self) -> enumeration.MoveSpace:
        return enumeration.MoveSpace(self.process, torch.tensor([self.start]), self.size)

    @functools.cached_property
    def numbered(self) -> enumeration.MoveSpace:
        """The chain that learners play with: to list 128 moves of 14 sites costs more than to look them up."""
        return self.space.numbered()

    @functools.cached_property
    def changes(self) -> tuple[Tensor, Tensor]:
        """`changed` of all states, int16, without columns of which none is needed."""
        every = [
            [part.short() for part in changed(x, self.space.states[to], self.size, self.vacant)]
            for x, to in zip(self.space.states.split(4096), self.space.to.split(4096), strict=True)
        ]
        removed, added = (torch.cat(parts) for parts in zip(*every, strict=True))
        none = len(self.start) * (self.size - self.vacant)
        return removed[:, (removed != none).any(dim=2).any(dim=0)], added[:, (added != none).any(dim=2).any(dim=0)]

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

    def of_start(self, count: int) -> Tensor:
        """The state to start from, by its number, int64 [B, 1]."""
        return self.space.index_of(torch.tensor([[self.start]])).expand(count, -1)

    def network(self, width: int) -> nn.Module:
        if self.side is None:
            return self.potentials(width)
        return Invariants(self.side, self.start, self.space.states, self.space.to, width)

    def potentials(self, width: int) -> Potentials:
        return Potentials(len(self.start), self.size, self.vacant, width)

    def model(self, network: nn.Module) -> moves.MoveModel:
        """A network of tokens, times and what moves change, as a model of the chain of numbers."""

        def log_multipliers(states: Tensor, time: Tensor, listed: Moves) -> Tensor:
            number = states[:, 0]
            if isinstance(network, Invariants):
                found: Tensor = network(number, time)
                return found
            removed, added = (part[number].long() for part in self.changes)
            return network(self.space.states[number], time, removed, added)

        return log_multipliers

    def law(self, model: moves.MoveModel) -> Tensor:
        """Of X_1 under a model of numbered states, as `gillespie` simulates it, float64 [X]."""
        return self.numbered.law(model, self.initial, TIMES, tolerance=1e-7)

    def distance(self, model: moves.MoveModel) -> float:
        """Total variation of that law and the target."""
        return float((self.law(model) - self.target).abs().sum() / 2)


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
        vacant=False,  # a site without particles is as good as any
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
        side=side,
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


@functools.cache
def case_of(name: str) -> Case:
    """What is found out of a case once: its states, and the law of its base."""
    return CASES[name]()


def changed(tokens: Tensor, neighbours: Tensor, size: int, vacant: bool) -> tuple[Tensor, Tensor]:
    """What moves that change one site or two take away and put in its place, int64 [B, 2, M] each.

    A token at a site has the number site * size + token, or with `vacant`, where token 0 stands for nothing,
    site * (size - 1) + token - 1. The number behind the last stands for nothing, and comes last.

    Args:
        tokens: int64 [B, L].
        neighbours: int64 [B, M, L].
    """
    length, least = tokens.shape[1], int(vacant)
    differs = (neighbours != tokens[:, None]).byte()
    first, last = differs.argmax(dim=2), length - 1 - differs.flip(2).argmax(dim=2)

    def numbers(site: Tensor, token: Tensor) -> Tensor:
        number = site * (size - least) + token - least
        return torch.where(token < least, length * (size - least), number)

    def both(tokens_at: Callable[[Tensor], Tensor]) -> Tensor:
        one, other = numbers(first, tokens_at(first)), numbers(last, tokens_at(last))
        other = torch.where(first == last, length * (size - least), other)
        return torch.stack((one, other), dim=1).sort(dim=1).values

    return (
        both(lambda site: tokens.gather(1, site)),
        both(lambda site: neighbours.gather(2, site[..., None])[..., 0]),
    )


class Potentials(nn.Module):
    """Log multipliers of moves, as differences of a potential:

        a_t(y, x) = W_t(y) - W_t(x) + sum n_b(x, t) - sum n_a(x, t)

    with sums over what the move takes away, a, and puts in its place, b, each a token at a site. W_t has all pairs of
    sites, with coefficients that are polynomials of time; n is a network of all sites. All 0 at the start.

    Args:
        length, size: L, and what tokens are below.
        vacant: as for `changed`.
        width: of the network.
        degree: number of coefficients of a polynomial.
    """

    def __init__(self, length: int, size: int, vacant: bool, width: int, degree: int = 5):
        super().__init__()
        self.size, self.least, self.degree = size, int(vacant), degree
        self.sites = sites = length * (size - self.least)
        self.field = nn.Parameter(torch.zeros(degree, sites))
        self.pair = nn.Parameter(torch.zeros(degree, sites, sites))
        of = torch.arange(sites) // (size - self.least)
        self.register_buffer("other", (of[:, None] != of).float())
        self.network = nn.Sequential(
            nn.Linear(sites + degree, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sites)
        )
        last = self.network[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, time: Tensor, removed: Tensor, added: Tensor) -> Tensor:
        """[B, M] of states int64 [B, L], times [B] and `changed` moves int64 [B, any, M]."""
        times, of = time.unique(return_inverse=True)
        power = torch.arange(self.degree, device=time.device)
        basis = (2 * times[:, None] - 1).pow(power).float()  # [N, degree]
        here = F.one_hot(tokens, self.size)[..., self.least :].float().flatten(1)
        network = self.network(torch.cat((here, basis[of]), dim=1))
        symmetric = (self.pair + self.pair.transpose(1, 2)) * self.other
        # What all pairs of a site have to do with its change, for all powers of time by one product.
        near = (basis[of][:, :, None] * here[:, None]).flatten(1) @ symmetric.flatten(0, 1)
        # The number behind the last stands for nothing.
        local = F.pad(network + (basis @ self.field)[of] + near, (0, 1))
        out = sum(local.gather(1, part) for part in added.unbind(dim=1))
        out = out - sum(local.gather(1, part) for part in removed.unbind(dim=1))
        pair = F.pad((basis @ symmetric.flatten(1)).view(-1, self.sites, self.sites), (0, 1, 0, 1)).flatten()
        row = of[:, None] * (self.sites + 1) ** 2
        parts = [(sign, part) for sign, of_sign in ((-1, removed), (1, added)) for part in of_sign.unbind(dim=1)]
        for (sign, one), (other_sign, other) in itertools.combinations(parts, 2):
            # gather, whose backward pass is several times as fast here as that of an index.
            at = row + one * (self.sites + 1) + other
            out = torch.add(out, pair.gather(0, at.flatten()).view_as(at), alpha=sign * other_sign)
        return out


# ---- learning


@dataclasses.dataclass(frozen=True)
class Options:
    """What both learners get alike; tuned for neither."""

    rounds: int = 40
    batch: int = 1024  # reward calls of a round
    steps: int = 10  # gradient steps of a round
    events: int = 2048  # that a step is on: drawn ones, or all where no more are distinct
    together: int = 64  # trajectories that a step on their variance is on
    width: int = 64
    learning_rate: float = 5e-3
    checks: int = 6  # evaluations, which for many states cost more than learning


PUBLISHED = learners.PUBLISHED
PATH, VARIANCE = "path, baseline", "path, then variance"
LEARNERS = (PATH, VARIANCE, PUBLISHED)
# Losses of a round's gradient steps, each made when it is taken, and the states that the network sees for it.
Steps = Iterator[tuple[Tensor, int]]
SIZE = 16  # trajectories of a state, of the published estimator
FEW = 1024  # states whose rates are worth a table for each round
LEAST_ESS = 0.5  # of all trajectories of a round, that a step toward p* leaves


def tabulated(case: Case, network: nn.Module) -> tuple[moves.MoveModel, int]:
    """The model from a table of all states and intervals where these are few, and the states that it was called at."""
    model, states = case.model(network), case.numbered.states
    count = len(states)
    if count > FEW:
        return model, 0
    with torch.no_grad():
        every = states.repeat(INTERVALS, 1)
        table = model(every, middles().repeat_interleave(count), case.numbered.process.moves(every))
    table = table.view(INTERVALS, count, -1)
    edges = torch.tensor(TIMES, dtype=torch.float64)

    def looked_up(states: Tensor, time: Tensor, listed: Moves) -> Tensor:
        return table[torch.searchsorted(edges, time) - 1, states[:, 0]]

    return looked_up, INTERVALS * count


def middles() -> Tensor:
    """Of the intervals, float64 [INTERVALS]."""
    edges = torch.tensor(TIMES, dtype=torch.float64)
    return (edges[:-1] + edges[1:]) / 2


def path_round(
    case: Case, network: nn.Module, options: Options, seed: int, generator: torch.Generator, variance: bool
) -> tuple[int, Steps]:
    """Network calls, and steps at all events of trajectories from the start, weighed together.

    A step toward p* leaves half of the trajectories as effective ones, which later is the whole way. With `variance`
    the loss from then on is the variance of the logarithms of the weights, over a share of the trajectories for each.
    """
    process = case.numbered.process
    drawing, calls = tabulated(case, network)
    path = gillespie(process, drawing, case.of_start(options.batch), times=TIMES, base=process.base, seed=seed)
    gain = (path.log_ratio + path.escape_gap).sum(dim=1)
    least, reward = LEAST_ESS * options.batch, case.rewards[path.final[:, 0]]
    weights, tilt = tilted_weights(gain[None, :, None], reward[None], beta=1.0, ess=least)
    if variance and bool(tilt == 1):
        steps = variance_steps(case, network, options, path, generator)
    else:
        targets = matching.path_targets(path, weights.weight)
        steps = matching_steps(case, network, options, targets, generator, baseline=1.0)
    return calls or path.network_calls, steps


def matching_steps(
    case: Case,
    network: nn.Module,
    options: Options,
    targets: MoveTargets,
    generator: torch.Generator,
    *,
    baseline: float = 0.0,
) -> Steps:
    model, process = case.model(network), case.numbered.process
    # The model that drew, which several steps need beside a baseline.
    teacher = case.model(copy.deepcopy(network)) if baseline else None
    merged = targets.merged()
    for _ in range(options.steps):
        part = merged if len(merged.move) <= options.events else targets.drawn(options.events, generator)
        loss = matching.loss(process, model, part, baseline=baseline, teacher=teacher)
        yield loss, len(part.move) * (1 if teacher is None else 2)


def variance_steps(case: Case, network: nn.Module, options: Options, path: Path, generator: torch.Generator) -> Steps:
    model, reward = case.model(network), case.rewards[path.final[:, 0]]
    for rows in torch.randperm(options.batch, generator=generator).split(options.together):
        log_weight = matching.log_ratio(case.numbered.process, model, path, rows) + reward[rows]
        yield log_weight.var(), int((path.exposure[rows] > 0).sum())


def published_round(
    case: Case, network: nn.Module, options: Options, seed: int, generator: torch.Generator
) -> tuple[int, Steps]:
    """Of 16 trajectories from each state, at uniform times of trajectories of the model, one's first jump."""
    count = options.batch // SIZE
    choosing = torch.Generator().manual_seed(seed)
    process = case.numbered.process
    drawing, calls = tabulated(case, network)
    whole = gillespie(process, drawing, case.of_start(count), times=TIMES, seed=seed)
    first = torch.randint(INTERVALS, (count,), generator=choosing)
    assert whole.state is not None
    entered = (whole.time == middles()[first][:, None]).int().argmax(dim=1)
    states = whole.state[torch.arange(count), entered].repeat_interleave(SIZE, dim=0)
    starts = first.repeat_interleave(SIZE)
    # Streams of trajectories that no whole one has.
    ids = torch.arange(count, count + len(states))
    path = gillespie(process, drawing, states, times=TIMES, base=process.base, first=starts, seed=seed, row_ids=ids)
    gain = (path.log_ratio + path.escape_gap).view(count, SIZE, -1)
    weight = adjoint_weights(gain, -case.rewards[path.final[:, 0]].view(count, SIZE)).weight
    chosen = F.one_hot(torch.randint(SIZE, (count,), generator=choosing), SIZE)
    calls = calls or whole.network_calls + path.network_calls
    targets = matching.path_targets(path, SIZE * chosen * weight, first_jump=True)
    return calls, matching_steps(case, network, options, targets, generator)


def run(case_name: str, options: Options, name: str, seed: int) -> dict[str, Any]:
    """Trains; total variation of the exact law of the averaged network, on the way and at the end."""
    torch.manual_seed(seed)
    case = case_of(case_name)
    network = case.network(options.width)
    fit = learners.Fit(network, learning_rate=options.learning_rate, average=8.0)
    generator = torch.Generator().manual_seed(seed)
    draw = {
        PATH: functools.partial(path_round, variance=False),
        VARIANCE: functools.partial(path_round, variance=True),
        PUBLISHED: published_round,
    }[name]
    network_calls, curve = 0, []
    for n in estimators.bar(options.rounds, f"{name}, {case_name}, seed {seed}"):
        calls, steps = draw(case, network, options, seed * 10**6 + n, generator)
        network_calls += calls
        for loss, calls in steps:
            network_calls += calls
            fit.step(loss, n / options.rounds)
        if n + 1 in evaluated(options):
            tv = case.distance(case.model(fit.averaged))
            cost = {"reward_calls": (n + 1) * options.batch, "network_calls": network_calls}
            curve.append({**cost, "tv": tv})
    return {"curve": curve, "tv": curve[-1]["tv"]}


def evaluated(options: Options) -> set[int]:
    """Rounds after which the law is solved for: the last of six, at numbers that grow by a factor."""
    return {max(1, round(options.rounds ** (k / 6))) for k in range(7 - options.checks, 7)}


def study(given: dict[str, Any], options: Options, output: File) -> str:
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
