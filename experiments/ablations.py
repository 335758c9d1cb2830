"""What an estimator's target owes to its parts, where target and trajectories are known exactly: no network.

A table of conditionals of five positions and four tokens, the base's of one random joint law, at a low temperature: the
reward is a weighted count of equal neighbours. All trajectories from a state with four masks are enumerated, drawn by
their probabilities, and go through the library's own weights and targets. Then a chain of independent positions, whose
p* is known at any vocabulary and length, through the library's rollouts and loss.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, records, report
from dam import plots
from dam.adjoint import MatchingTargets, estimator_loss, group_targets, state_targets, tilted_weights
from dam.ctmc import MaskedCTMC, enumeration
from dam.models import Head
from dam.rollout import rollout
from experiments import tables

POSITIONS, TOKENS = 5, 4
STATE = torch.tensor([TOKENS, TOKENS, 1, TOKENS, TOKENS])
MASKED = (STATE == TOKENS).nonzero()[:, 0]
PROCESS = MaskedCTMC(TOKENS)
SIZES = (2, 4, 8, 16, 32, 64)
M_MMAP_THRESHOLD = -3  # glibc's mallopt
USUAL = 16  # K of the tables that do not vary it


# ---- a state whose target is known


def reward_of(outcomes: Tensor) -> Tensor:
    """6 times the weighted count of equal neighbours, float64 [B]."""
    weights = 2 * torch.rand(POSITIONS - 1, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    return 6 * ((outcomes[:, 1:] == outcomes[:, :-1]) * weights).sum(dim=1)


def laws() -> tuple[Tensor, Tensor]:
    """Those of the base and of p*, float64 [V^N]."""
    base = tables.random_law(POSITIONS, TOKENS, seed=18)
    return base, torch.softmax(base.log() + reward_of(enumeration.states(TOKENS, POSITIONS)), dim=0)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """All P trajectories from STATE by a sampler, and how likely it makes them."""

    final: Tensor  # int64 [P, N]
    first: Tensor  # int64 [P]: position of the first jump
    log_prob: Tensor  # float64 [P], the order's included
    log_ratio: Tensor  # float64 [P]: log p_base - log p_u
    reward: Tensor  # float64 [P]
    given: Tensor  # float64 [N, V]: p_u(v | i, STATE) where it has masks, else 0

    def drawn(self, groups: int, size: int, generator: torch.Generator) -> Tensor:
        """Trajectories, int64 [G, K]."""
        index = torch.multinomial(self.log_prob.exp(), groups * size, replacement=True, generator=generator)
        return index.view(groups, size)


@dataclasses.dataclass(frozen=True)
class Known:
    """The target at STATE, by samplers from far from it to the optimum: tables of conditionals.

    Noise on every logit makes a table that is of no joint law, as those of networks are.
    """

    proposals: dict[str, Proposal]
    target: Tensor  # float64 [N, V]: p*(v | i, STATE) / m
    completed: Tensor  # float64 [N, V, V^m]: what the base makes of STATE once position i is filled with v

    @staticmethod
    def made() -> Known:
        base, best = (tables.conditionals(law, POSITIONS, TOKENS) for law in laws())

        def noisy(log_prob: Tensor, scale: float) -> Tensor:
            noise = torch.randn(log_prob.shape, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
            return (log_prob + scale * noise).log_softmax(dim=2)

        samplers = {
            "far from the base": noisy(base, 2.0),
            "the base, perturbed": noisy(base, 0.3),
            "the base": base,
            "the optimum, perturbed": noisy(best, 0.3),
            "the optimum": best,
        }
        log_base = tables.path_log_prob(base, TOKENS, STATE)
        orders = MASKED[tables.orders(len(MASKED))]
        outcomes = STATE.repeat(log_base.shape[1], 1)
        outcomes[:, MASKED] = enumeration.states(TOKENS, len(MASKED))
        proposals = {}
        for name, sampler in samplers.items():
            log_prob = tables.path_log_prob(sampler, TOKENS, STATE)
            proposals[name] = Proposal(
                final=outcomes.repeat(len(orders), 1),
                first=orders[:, 0].repeat_interleave(len(outcomes)),
                log_prob=log_prob.flatten() - math.log(len(orders)),
                log_ratio=(log_base - log_prob).flatten(),
                reward=reward_of(outcomes).repeat(len(orders)),
                given=given(sampler),
            )
        fits = nn.functional.one_hot(outcomes, TOKENS).permute(1, 2, 0)  # [N, V, V^m]
        completed = fits * log_base[0].exp()
        return Known(proposals, given(best) / len(MASKED), completed / completed.sum(dim=2, keepdim=True))


def given(log_prob: Tensor) -> Tensor:
    """p(v | i, STATE) where it has masks, else 0, float64 [N, V]."""
    found = log_prob[enumeration.index_of(STATE, TOKENS + 1)].exp()
    return torch.where(PROCESS.masked(STATE)[:, None], found, 0.0)


# ---- estimates of the target, float64 [G, N, V] of G groups of K reward calls

Estimate = Callable[[Known, Proposal, int, int, torch.Generator], Tensor]


def mass(targets: MatchingTargets, groups: int) -> Tensor:
    """Weight that targets put on (position, token) of each state."""
    total = torch.zeros(groups, POSITIONS, TOKENS, dtype=torch.float64)
    used = targets.target >= 0
    row, position = (x[:, None].expand_as(targets.target)[used] for x in (targets.row, targets.position))
    return total.index_put_((row, position, targets.target[used]), targets.weight[used].double(), accumulate=True)


def of_state(estimator: str, *, importance: bool = True, leave_one_out: bool = False) -> Estimate:
    """The library's estimators; without path weights if not `importance`."""

    def estimated(known: Known, proposal: Proposal, groups: int, size: int, generator: torch.Generator) -> Tensor:
        index = proposal.drawn(groups, size, generator)
        log_ratio = float(importance) * proposal.log_ratio[index][..., None]
        weights, _ = tilted_weights(log_ratio, proposal.reward[index], beta=1.0, leave_one_out=leave_one_out)
        final, first = proposal.final[index], proposal.first[index]
        states = STATE.expand(groups, -1)
        targets = state_targets(estimator, states, final, first, weights.weight, PROCESS, generator=generator)
        return mass(targets, groups)

    return estimated


def analytic(completions: int | None) -> Estimate:
    """exp(-r(X_1)) E_base[exp(r) | X = y] at jumps y of the base, X_1 the sampler's, with weights of mean 1.

    Args:
        completions: outcomes of the base that the expectation is by, a reward call each beside that of X_1; None: it
            is known, for no call.

    Source: So et al., arXiv 2602.07132, Prop. 2.3.
    """

    def estimated(known: Known, proposal: Proposal, groups: int, size: int, generator: torch.Generator) -> Tensor:
        count = size // (1 + (completions or 0))
        base = known.proposals["the base"]
        jump = base.drawn(groups, count, generator)
        position = base.first[jump]
        token = base.final[jump, position]
        reward = base.reward[: known.completed.shape[2]]
        if completions is None:
            value = (known.completed * reward.exp()).sum(dim=2).log()[position, token]
        else:
            law = known.completed[position, token].flatten(0, 1)
            drawn = torch.multinomial(law, completions, replacement=True, generator=generator)
            value = reward[drawn].logsumexp(dim=1).view(groups, count)
        ends = proposal.reward[proposal.drawn(groups, count, generator)]
        total = torch.zeros(groups, POSITIONS, TOKENS, dtype=torch.float64)
        where = (torch.arange(groups)[:, None].expand_as(position), position, token)
        return total.index_put_(where, torch.softmax(value - ends, dim=1), accumulate=True)

    return estimated


ESTIMATES: dict[str, Estimate] = {
    "first_jump_one": of_state("first_jump_one"),
    "first_jump": of_state("first_jump"),
    "posterior": of_state("posterior"),
    "posterior, leave one out": of_state("posterior", leave_one_out=True),
    "posterior, no path weights": of_state("posterior", importance=False),
    "adjoint of 7 completions": analytic(7),
    "adjoint, known": analytic(None),
}


def errors(name: str, known: Known, proposal: Proposal, size: int, repeats: int) -> dict[str, float]:
    """Squared error of the estimated target, summed over positions and tokens, and of it what is bias.

    The bias is known up to `spread`, the deviation of its square's estimate, by which that can be below 0.
    """
    generator = torch.Generator().manual_seed(size)
    found = ESTIMATES[name](known, proposal, repeats, size, generator) - known.target
    mean, variance = found.mean(dim=0), found.var(dim=0)
    noise = float(variance.sum()) / repeats
    bias = float(mean.square().sum()) - noise
    spread = 2 * float((mean.square() * variance).sum() / repeats + (variance / repeats).square().sum() / 2) ** 0.5
    return {
        "error": float(found.square().sum(dim=(1, 2)).mean()),
        "bias": bias,
        "spread": spread,
        "variance": float(variance.sum()),
        "most_biased": float(mean.abs().max()),
    }


def effective(proposal: Proposal, size: int, repeats: int) -> float:
    """Mean effective sample size of the weights of K trajectories."""
    index = proposal.drawn(repeats, size, torch.Generator().manual_seed(0))
    weights, _ = tilted_weights(proposal.log_ratio[index][..., None], proposal.reward[index], beta=1.0)
    return float(weights.ess.mean())


# ---- noise of the gradient at the state, by its logits


def gradients(name: str, proposal: Proposal, size: int, repeats: int) -> Tensor:
    """By the logits at STATE, float64 [G, N, V]: of cross-entropies to a target, and of losses with centred weights."""
    index = proposal.drawn(repeats, size, torch.Generator().manual_seed(7))
    log_weight = proposal.log_ratio[index] + proposal.reward[index]
    weight = size * torch.softmax(log_weight, dim=1)
    estimator, weight = {
        "first_jump_one": ("first_jump_one", weight),
        "first_jump": ("first_jump", weight),
        "posterior": ("posterior", weight),
        "path, baseline": ("first_jump", weight - 1),
        "log-variance": ("first_jump", log_weight - log_weight.mean(dim=1, keepdim=True)),
    }[name]
    states, final, first = STATE.expand(repeats, -1), proposal.final[index], proposal.first[index]
    generator = torch.Generator().manual_seed(8)
    asked = mass(state_targets(estimator, states, final, first, weight, PROCESS, generator=generator), repeats)
    return asked - asked.sum(dim=2, keepdim=True) * proposal.given


GRADIENTS = ("first_jump_one", "first_jump", "posterior", "path, baseline", "log-variance")


def noise(name: str, proposal: Proposal, size: int, repeats: int) -> dict[str, float]:
    """Variance of the gradient of K calls, summed over logits, and the squared length of its mean."""
    found = gradients(name, proposal, size, repeats)
    variance = float(found.var(dim=0).sum())
    return {"variance": variance, "signal": float(found.mean(dim=0).square().sum()) - variance / repeats}


# ---- without the divergence from the base


def iterated(rounds: int) -> list[dict[str, float]]:
    """Exact laws p_n proportional to p_{n-1} exp(r) from the base on: what weights without path weights match.

    With them the law stays at p*, the first of these.
    """
    base, best = laws()
    reward = reward_of(enumeration.states(TOKENS, POSITIONS))
    found = []
    for n in range(rounds + 1):
        law = torch.softmax(base.log() + n * reward, dim=0)
        entropy = float(-torch.xlogy(law, law).sum())
        found.append({"round": n, "reward": float(law @ reward), "entropy": entropy, "kl": tables.kl(law, best)})
    return found


# ---- a chain of independent positions


class Independent(nn.Module):
    """p_i(v) = softmax_v(h_i w_v), whatever else is known, as a `Denoiser`."""

    def __init__(self, tokens: int, length: int, width: int = 16, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(torch.randn((length, width), generator=generator) / width**0.25)
        self.weight = nn.Parameter(torch.randn((tokens, width), generator=generator) / width**0.25)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.hidden.expand(len(tokens), -1, -1)

    def head(self) -> Head:
        return Head(self.weight, None)


def on_chain(tokens: int, length: int, positions: int, size: int = USUAL, strength: float = 1.0) -> dict[str, float]:
    """The posterior of K trajectories with the reward sum_i s_i z(x_i) / sqrt(L), s and z signs: p* has independent
    positions too, p*_i(v) proportional to p_i(v) exp(s_i z(v) / sqrt(L)), and the reward a deviation of about 1.

    Args:
        tokens, length: V and L.
        positions: of all groups of K trajectories together.
        size: K.
        strength: a factor of the reward.

    Returns:
        Squared error of the target at a position, sum_v (estimate - p*_i(v))^2, mean over positions; the error of
        E[z] at a position, root mean square; ESS; seconds of rollout and of loss with gradient, and the bytes by which
        the latter grows the process.
    """
    model, process = Independent(tokens, length), MaskedCTMC(tokens)
    generator = torch.Generator().manual_seed(1)
    sign = strength * (torch.randint(2, (length,), generator=generator) * 2.0 - 1)
    told = torch.randint(2, (tokens,), generator=generator) * 2.0 - 1
    groups = max(1, positions // length)
    blank = torch.full((groups * size, length), tokens)
    started = time.perf_counter()
    path = rollout(model, blank, process, seed=2)
    seconds = time.perf_counter() - started
    final = path.final.view(groups, size, length)
    reward = (told[final] * sign).sum(dim=2).double() / length**0.5
    weights, _ = tilted_weights(torch.zeros(groups, size, 1, dtype=torch.float64), reward, beta=1.0)
    share = weights.weight / size
    square, exact = [], []
    for i in range(length):  # no array [L, V]
        with torch.no_grad():
            best = torch.softmax((model.weight @ model.hidden[i]).double() + sign[i] * told / length**0.5, dim=0)
        at = final[:, :, i]
        same = (at[:, :, None] == at[:, None]).double()
        # sum_v (q - p)^2 of weights on K tokens, some of them equal.
        own = (share[:, :, None] * share[:, None] * same).sum(dim=(1, 2))
        square.append(own - 2 * (share * best[at]).sum(dim=1) + best.square().sum())
        exact.append(float(best @ told.double()))
    means = (share[:, :, None] * told[final]).sum(dim=1) - torch.tensor(exact)
    states = process.remask(blank.view_as(final), final, generator)
    targets = group_targets("posterior", states, final, weights.weight, process)
    started = time.perf_counter()
    with memory.Peak() as peak:
        estimator_loss(model, targets, process).backward()
    return {
        "V": tokens,
        "L": length,
        "error": float(torch.stack(square).mean()),
        "mean_error": float(means.square().mean()) ** 0.5,
        "ess": float(weights.ess.mean()),
        "rows": len(targets.row),
        "rollout_seconds": seconds,
        "loss_seconds": time.perf_counter() - started,
        "loss_bytes": peak.grown,
        "logits_bytes": 4 * len(targets.row) * tokens,
    }


VOCABULARIES, LENGTHS = (32, 1024, 32_768, 131_072), (16, 64, 256)


# ---- the studies


def study_chain(output: Path, positions: int) -> str:
    """Writes JSON, and returns the table."""
    # As `memory.environment` has it: else blocks that are freed stay, and what grows into them is not seen.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    found = {
        **records.versions(),
        "device": report.device(),
        "positions": positions,
        "results": [on_chain(tokens, length, positions) for tokens in VOCABULARIES for length in LENGTHS],
    }
    report.write_json(output / "chain.json", found)
    return text_of_chain(found)


def text_of_chain(found: dict[str, Any]) -> str:
    """The table of a study's JSON."""
    lines = [
        [
            *(f"{r[key]:,}" for key in ("V", "L")),
            *(f"{r[key]:.3f}" for key in ("error", "mean_error")),
            f"{r['ess']:.1f}",
            *(f"{r[key]:.2f}" for key in ("rollout_seconds", "loss_seconds")),
            *(f"{r[key] / 2**20:,.1f}" for key in ("loss_bytes", "logits_bytes")),
        ]
        for r in found["results"]
    ]
    header = ["V", "L", "error of the target", "of E[z]", "ESS of 16", "seconds of rollout", "of loss"]
    return tables.markdown([*header, "MiB of loss", "MiB of its logits"], lines)


def study(output: Path, repeats: int) -> str:
    """Of the state whose target is known: writes JSON and PNG, and returns the tables."""
    known = Known.made()
    found: dict[str, Any] = {**records.versions(), "device": report.device(), "repeats": repeats}
    found["sizes"] = [
        {"estimator": name, "sampler": sampler, "K": size, **errors(name, known, proposal, size, repeats)}
        for name in ESTIMATES
        for sampler, proposal in known.proposals.items()
        for size in SIZES
        if not (name == "adjoint of 7 completions" and size < 16)
    ]
    found["effective"] = {name: effective(p, USUAL, repeats) for name, p in known.proposals.items()}
    found["gradients"] = [
        {"estimator": name, "sampler": sampler, "K": USUAL, **noise(name, proposal, USUAL, repeats)}
        for name in GRADIENTS
        for sampler, proposal in known.proposals.items()
    ]
    found["without_divergence"] = iterated(8)
    report.write_json(output / "ablations.json", found)
    draw(output / "ablations.png", found["sizes"])
    return text_of(found)


def text_of(found: dict[str, Any]) -> str:
    """The tables of a study's JSON."""
    by = {(r["estimator"], r["sampler"], r["K"]): r for r in found["sizes"]}
    noises = {(r["estimator"], r["sampler"]): r for r in found["gradients"]}
    samplers, plain, without = list(found["effective"]), "posterior", "posterior, no path weights"

    def error(name: str, sampler: str, size: int) -> str:
        r = by.get((name, sampler, size))
        return "-" if r is None else f"{r['error']:.2g} ({max(0.0, r['bias']):.2g})"

    def calls(name: str, sampler: str) -> str:
        r = noises[name, sampler]
        # The mean of so many repeats is known to this.
        known = r["signal"] > 6 * r["variance"] / found["repeats"]
        return f"{USUAL * r['variance'] / r['signal']:,.0f}" if known else "-"

    names = list(dict.fromkeys(r["estimator"] for r in found["sizes"]))
    best = samplers[-1]
    return "\n\n".join(
        (
            tables.markdown(
                ["from the base, K =", *map(str, SIZES)],
                [[f"`{name}`", *(error(name, "the base", size) for size in SIZES)] for name in names],
            ),
            tables.markdown(
                [f"K = {USUAL}, sampled from", "ESS", *(f"`{name}`" for name in names)],
                [
                    [sampler, f"{found['effective'][sampler]:.1f}", *(error(name, sampler, USUAL) for name in names)]
                    for sampler in samplers
                ],
            ),
            tables.markdown(
                ["sampled from", *(f"{kind} path weights, K = {k}" for kind in ("with", "without") for k in (4, 64))],
                [
                    [sampler, *(error(name, sampler, size) for name in (plain, without) for size in (4, 64))]
                    for sampler in samplers
                ],
            ),
            tables.markdown(
                ["gradient of", *samplers[:-1], f"variance of {USUAL} calls at {best}"],
                [
                    [f"`{name}`", *(calls(name, s) for s in samplers[:-1]), f"{noises[name, best]['variance']:.2g}"]
                    for name in GRADIENTS
                ],
            ),
            tables.markdown(
                ["without the divergence, round", "E[r]", "entropy", "KL(p_n, p*)"],
                [
                    [f"{r['round']}", f"{r['reward']:.2f}", f"{r['entropy']:.3f}", f"{r['kl']:.2g}"]
                    for r in found["without_divergence"]
                ],
            ),
        )
    )


def draw(path: Path, sizes: Sequence[dict[str, Any]]) -> None:
    """Error against K, a panel for each sampler."""
    samplers = list(dict.fromkeys(r["sampler"] for r in sizes))
    figure = plots.figure_class()(figsize=(3.2 * len(samplers), 3.6), layout="constrained")
    for axes, sampler in zip(figure.subplots(1, len(samplers), sharey=True), samplers, strict=True):
        for name in dict.fromkeys(r["estimator"] for r in sizes):
            of = [r for r in sizes if (r["estimator"], r["sampler"]) == (name, sampler)]
            axes.plot([r["K"] for r in of], [r["error"] for r in of], marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="reward calls of a target, K", title=sampler)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("squared error of the target")
    figure.axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
