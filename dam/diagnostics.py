"""Whether trajectories can teach a model: figures of path weights, and the controls that tell signal from noise.

Each is one call in a loop of your own; `DAMTrainer` logs them, and `dam.plots.training` draws what it logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.ops.adjoint_weights import AdjointWeights, adjoint_weights
from dam.rollout import PathLogProbs, log_mixture


class Diagnostics(NamedTuple):
    """Means over groups."""

    ess: float  # effective sample size of the weights, of K
    ess_path: float  # that of the path weights alone, without the terminal cost
    clip_fraction: float  # trajectories whose weight was clipped
    adjoint_mean: float  # mean weight: 1 but for clipping, groups without a feasible outcome, and leave_one_out
    kl_path: float  # KL(p_u || p_base) of trajectories, the order of unmasking included
    kl_outcome: float  # that of outcomes; NaN without other orders
    order_variance: float  # of the log ratio between orders at one outcome; NaN without other orders
    split_half: float  # reliability of the targets, NaN where there is nothing to correlate


def diagnose(
    weights: AdjointWeights,
    log_ratio: Tensor,  # [G, K, S]
    final: Tensor,  # int64 [G, K, L]
    maskable: Tensor,  # bool [G, L]
    *,
    escape_gap: Tensor | None = None,  # [G, K, S]
    orders: PathLogProbs | None = None,  # [..., M]
    from_base: Tensor | None = None,  # bool [G, K]
    kept: Tensor | None = None,  # bool [G, K]
    generator: torch.Generator | None = None,
) -> Diagnostics:
    """All figures of K trajectories of each of G groups at once.

    Args:
        weights: of the trajectories, from `dam.adjoint_weights` or `dam.adjoint.tilted_weights`.
        log_ratio, escape_gap: log u_base - log u at the jumps, and the gap of the escape rates between them.
        final: the outcomes X_1.
        maskable: which positions were filled in.
        orders: outcomes, those of the trajectories or a sample of them, by M orders of unmasking; drawn by the model.
        from_base: which trajectories the base drew, in each group as many. Path weights are then those of the mixture
            (`dam.rollout.log_mixture`), and `kl_path` is of what the model drew.
        kept: which trajectories there are, as for `dam.adjoint.tilted_weights`, one of the model's at least in each
            group; the others count for nothing.
        generator: divides the trajectories into halves.
    """
    gain = log_ratio if escape_gap is None else log_ratio.double() + escape_gap.double()
    kept = torch.ones_like(weights.weight, dtype=torch.bool) if kept is None else kept
    path = gain.double().sum(dim=2)
    by_model = kept if from_base is None else kept & ~from_base
    own = (torch.where(by_model, path, 0.0).sum(dim=1) / by_model.sum(dim=1))[:, None, None]
    if from_base is not None:
        gain = torch.cat((gain.double(), -log_mixture(path, from_base, kept)[..., None]), dim=2)
    return Diagnostics(
        ess=float(weights.ess.mean()),
        ess_path=float(ess_by_step(gain, kept=kept)[0]),
        clip_fraction=float(weights.clipped.mean()),
        adjoint_mean=float(weights.weight[kept].mean()),
        kl_path=float(kl_path(own).mean()),
        kl_outcome=float("nan") if orders is None else kl_outcome(own, orders),
        order_variance=float("nan") if orders is None else order_variance(orders),
        split_half=split_half_reliability(weights.weight, final, maskable, kept=kept, generator=generator),
    )


def ess_by_step(log_ratio: Tensor, *, escape_gap: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """Effective sample size of the path weights from each step on, a mean over groups: float64 [S + 1].

    The last entry is K, as nothing is left to weigh; where it falls first is where model and base part. With `kept`,
    bool [G, K], trajectories that are not do not count.
    """
    cost = log_ratio.new_zeros(log_ratio.shape[:2], dtype=torch.float64)
    log_path = adjoint_weights(log_ratio, cost, escape_gap=escape_gap).log_path.double()
    if kept is not None:
        log_path = torch.where(kept[..., None], log_path, -torch.inf)
    weight = torch.softmax(log_path, dim=1)
    return (1 / weight.square().sum(dim=1)).mean(dim=0)


def kl_path(log_ratio: Tensor, *, escape_gap: Tensor | None = None) -> Tensor:
    """KL(p_u || p_base) of trajectories, estimated from each group's, the mean of -log W: float64 [G].

    Of masked chains that of outcomes together with their order of unmasking, which is no less than that of outcomes;
    of trajectories from `dam.ctmc.simulate` that of paths with their thinned events, which is no less either.
    """
    gain = log_ratio.double() if escape_gap is None else log_ratio.double() + escape_gap.double()
    return -gain.sum(dim=2).mean(dim=1)


def kl_outcome(log_ratio: Tensor, orders: PathLogProbs) -> float:
    """KL(p_u || p_base) of outcomes, estimated; NaN for one order.

        mean of -log W over all paths  -  M / (M - 1) mean over the sample of (log ratio over M orders - of its own)

    Without the factor this has as its mean the KL between mixtures over the same M orders, averaged over their draw:
    that of paths at M = 1, never less than that of outcomes, to which it falls about as 1 / M. The factor extrapolates
    to infinitely many orders, not to the last: on eight tables of 3 positions and 4 tokens, of which the KL of paths
    is 0.5 to 1.7 above that of outcomes, the mean of the estimate is 0.02 to 0.18 above it with two orders, and within
    0.06 with four.

    Args:
        log_ratio: of trajectories of a masked chain in the order in which they were drawn, [G, K, S].
        orders: these outcomes, or some of them, by M orders, the first that in which they were drawn.
    """
    count = orders.log_prob.shape[-1]
    if count < 2:
        return float("nan")
    own = (orders.base_log_prob - orders.log_prob)[..., 0]
    return float(kl_path(log_ratio).mean() - count / (count - 1) * (orders.log_ratio - own).mean())


def order_variance(orders: PathLogProbs) -> float:
    """Variance of log p_base(x | order) - log p_u(x | order) between orders, the mean over outcomes; NaN for one order.

    0 where the conditionals of both are those of joint laws. It is what an order adds to the variance of log weights,
    and what makes steps short of p* end elsewhere: see `dam.adjoint.tilted_weights`.
    """
    if orders.log_prob.shape[-1] < 2:
        return float("nan")
    return float((orders.base_log_prob - orders.log_prob).var(dim=-1).mean())


def permuted(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The null arm: weights [G, K] permuted within each group. What still improves is not the reward's doing."""
    order = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device=weight.device).argsort(dim=1)
    return weight.gather(1, order)


def split_half_reliability(
    weight: Tensor,  # [G, K]
    final: Tensor,  # int64 [G, K, L]
    maskable: Tensor,  # bool [G, L]
    *,
    kept: Tensor | None = None,  # bool [G, K]
    generator: torch.Generator | None = None,
) -> float:
    """Correlation of what two halves of each group's trajectories say that the reward changes.

    A half's target at a position is the weighted share of each token among its outcomes; less the unweighted share,
    it is what the weights ask for. Over all groups, positions and tokens these of one half are correlated with those
    of the other, whose trajectories are independent: near 0 says that K is too small, or the reward too coarse, to
    teach.

    Returns:
        In [-1, 1]; NaN with fewer than two trajectories in all halves, where no weights differ, and for weights of NaN.
    """
    order = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device=weight.device)
    half = torch.full_like(weight[:, :1], weight.shape[1] // 2, dtype=torch.int64)
    if kept is not None:
        order = torch.where(kept, order, torch.inf)
        half = kept.sum(dim=1, keepdim=True) // 2
    half = torch.where(half < 2, 0, half)  # such a group says nothing
    counted = half > 0 if kept is None else kept & (half > 0)
    keys, index = torch.unique(torch.where(counted[..., None], _cells(final, maskable), -1), return_inverse=True)
    rank = order.argsort(dim=1).argsort(dim=1)
    asked = []
    for first in (0 * half, half):
        within = (rank >= first) & (rank < first + half)
        w = torch.where(within, weight.double(), 0.0)
        total = w.sum(dim=1, keepdim=True)
        share = torch.where(total > 0, w / total, 1.0 / half) - 1.0 / half
        share = torch.where(within, share, 0.0)[..., None].expand(index.shape)
        sums = torch.zeros(len(keys), dtype=torch.float64, device=weight.device)
        asked.append(sums.index_add_(0, index.flatten(), share.flatten())[keys >= 0])
    # What rounding leaves of equal weights is nothing to correlate.
    if not all(len(x) and float(x.abs().max()) > 1e-9 for x in asked) or bool(weight.isnan().any()):
        return float("nan")
    centred = [x - x.mean() for x in asked]
    return float(centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm()))


def _cells(final: Tensor, maskable: Tensor) -> Tensor:
    """A number for each (group, position, token) of the outcomes [G, K, L]; -1 where nothing was filled in."""
    groups, _, length = final.shape
    place = torch.arange(groups * length, device=final.device).view(groups, 1, length)
    cells = place * (int(final.max()) + 1 if final.numel() else 1) + final
    return torch.where(maskable[:, None, :], cells, -1)


class Finding(NamedTuple):
    """Why a run may not learn."""

    name: str  # in a few words, for a program
    message: str  # with the figures that show it, and what to do


# Entries of a log that one finding looks at, and bounds of what it takes for a fault.
_WINDOW = 4
_ENOUGH = 2 * _WINDOW  # before which a reward that has not risen says little
_MOSTLY = 0.8
_NOISE = 0.05
_SHORT = 0.02
_STILL = 0.01
_FAR = 0.5


def findings(history: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Why a run does not learn, as far as its log tells; none where it does, or where it is too early to say.

    "constant reward": no group's trajectories have ever differed, from two entries on. Others only where the reward of
    the second half of all entries is not two standard errors above that of the first quarter. "few groups tell": in
    more than 4 of 5 groups they do not, lately. And from eight entries on: "targets are noise", split_half below 0.05;
    "moves without learning", a KL of paths above 0.5 nats; "stands still", one below 0.01 that has not doubled over the
    last entries.

    Args:
        history: what `DAMTrainer` logged (`trainer.state.log_history`), entry by entry.
    """
    logged = [entry for entry in history if "reward" in entry and "loss" in entry]
    if len(logged) < 2:
        return []
    last = logged[-_WINDOW:]
    equal = _means(last, "frac_reward_zero_std")
    if _means(logged, "frac_reward_zero_std") == 1.0:
        values = sorted({float(entry["reward"]) for entry in last})
        seen = ", ".join(f"{value:.4g}" for value in values[:3])
        # All others would be but its consequences.
        return [
            Finding(
                "constant reward",
                f"all trajectories of every group have had one reward ({seen} lately): nothing is to be learned from "
                "it. Call the reward function on a right and a wrong completion by hand; or the prompts are all too "
                "easy or too hard",
            )
        ]
    rise = _rise(logged)
    if rise > 2.0:
        return []
    found = []
    if equal > _MOSTLY:
        found.append(
            Finding(
                "few groups tell",
                f"in {equal:.0%} of the groups all rewards are equal, and these only hold the model where it is: give "
                "easier prompts among the others, a reward with partial credit, or more num_generations",
            )
        )
    if len(logged) < _ENOUGH:
        return found
    agreement, step, kl = _means(last, "split_half"), _means(last, "tilt"), _means(last, "kl_path")
    if agreement < _NOISE:
        found.append(
            Finding(
                "targets are noise",
                f"two halves of a group ask for other things (split_half {agreement:.2f}): more num_generations, or a "
                "reward with more steps between right and wrong",
            )
        )
    if kl > _FAR:
        found.append(
            Finding(
                "moves without learning",
                f"the KL of paths to the base is {kl:.2f} nats, and the reward has not risen since the first logs "
                f"({logged[0]['reward']:.3g} to {last[-1]['reward']:.3g}): steps follow the noise of few groups. A "
                "smaller learning_rate, more groups a step (replay_batch_size), or max_tilt and beta both smaller, so "
                "that weights of paths count for less beside the reward",
            )
        )
    elif kl < _STILL and not kl > 2 * _means(logged[-2 * _WINDOW : -_WINDOW], "kl_path"):
        found.append(
            Finding(
                "stands still",
                f"the KL of paths to the base is {kl:.1e} nats and the reward has not risen: a larger learning_rate"
                + (f", or a smaller target_ess: steps go {step:.1g} of the way only" if step < _SHORT else ""),
            )
        )
    return found


def _means(entries: Sequence[Mapping[str, Any]], name: str) -> float:
    """Of a figure over entries that have it; NaN where none has."""
    values = [float(entry[name]) for entry in entries if name in entry]
    return sum(values) / len(values) if values else math.nan


def _rise(logged: Sequence[Mapping[str, Any]]) -> float:
    """How far the reward's second half is above its first quarter, in standard errors by the spread of the former.

    Not above the first half: a run that learns at once stays where it is from then on.
    """
    rewards = [float(entry["reward"]) for entry in logged if math.isfinite(entry["reward"])]
    if len(rewards) < 4:
        return 0.0
    first = torch.tensor(rewards[: len(rewards) // 4], dtype=torch.float64)
    second = torch.tensor(rewards[-(len(rewards) // 2) :], dtype=torch.float64)
    error = float(second.std()) * math.sqrt(1 / len(first) + 1 / len(second))
    return float(second.mean() - first.mean()) / max(error, 1e-12)
