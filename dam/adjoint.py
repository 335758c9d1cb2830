"""From trajectories and costs to weighted targets of the matching loss: the estimators.

At the model whose p(v | i, x) is that of p* no estimator asks for a change, if the base's p(v | i, x) are those of one
joint law. No network's are: `tilted_weights` says where `posterior` then ends; the first jumps also ask for another
order of unmasking, which no p(v | i, x) can follow. They differ in how much of what K trajectories tell they use, from
the paper's (noisiest) to the terminal posterior (quietest):

    first_jump_one   the first jump of one of the K trajectories, drawn uniformly
    first_jump       the first jumps of all K
    posterior        all K trajectories at all masked positions

and in what the weights are normalised over: "state", K trajectories from one state X_t; or "group", K from
one prompt, with a state X_t for each by re-masking its outcome. `path_targets` stays at the states that trajectories
went through themselves, where the weights' mean can be subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.models.denoiser import Denoiser, check_left_padding, equal_rows, hidden_at
from dam.models.equal_rows import distinct, given
from dam.ops import _philox
from dam.ops._philox import Use
from dam.ops.adjoint_weights import AdjointWeights, adjoint_weights
from dam.ops.linear_matching_loss import linear_matching_loss
from dam.ops.tilt_to_ess import tilt_to_ess
from dam.rollout import Trajectories, log_mixture

ESTIMATORS = ("first_jump_one", "first_jump", "posterior")
NORMALIZERS = ("state", "group")


def tilted_weights(
    log_ratio: Tensor,  # [G, K, S]
    reward: Tensor,  # [G, K]
    *,
    beta: float,
    ess: float | None = None,
    max_tilt: float = 1.0,
    clip: float | None = None,
    leave_one_out: bool = False,
    from_base: Tensor | None = None,  # bool [G, K]
    kept: Tensor | None = None,  # bool [G, K]
) -> tuple[AdjointWeights, Tensor]:
    """Weights of K trajectories of each of G groups toward p*, no further than their effective sample size allows.

        l_k = sum_s log_ratio[k, s] + reward_k / beta,      weight = K softmax_k(h l),      0 <= h <= max_tilt

    h = 1 is p* itself. With `ess`, h is the largest that keeps ESS(softmax(h l)) >= ess in its group: a step from the
    model toward p*. Such steps have p* as their fixed point only where the base's conditionals p(v | i, x) are those
    of one joint law, so that l is constant at p*. No network's are: how likely an outcome is depends on the order in
    which it was unmasked. With the posterior estimator steps h then end at

        p_u(x) ~ exp(r(x) / beta) M_h(x),      M_h(x) = (mean over orders of p_base(x | order)^h)^(1/h)

    the power mean over orders, with a reward of zero too: M_1 is the law that the base's sampler has, and gives p*;
    M_h for h -> 0 is the geometric mean. So let h end at 1, or average over orders
    (`dam.rollout.log_prob_over_orders`), which shrinks the variance of l between orders and with it the bias. That
    variance also keeps h below 1 where `ess` asks for more than it leaves at p* itself, about K exp(-var(l)).

    A second bias is of finite K: a trajectory that weighs much raises its own normaliser, so that the weights pull back
    toward the model, by a share of order 1 / K. `leave_one_out` takes it away.

    And an outcome that the model has lost is not drawn, so nothing brings it back, and no figure of what is drawn shows
    it. Where the base draws a share s of each group, `from_base`, trajectories are those of the mixture
    (1 - s) model + s base (`dam.rollout.log_mixture`), and are weighed against it:

        weight = K softmax_k(h l - log(1 - s + s exp(sum_s log_ratio)))

    Then nothing is lost that the base has, and no path weight is above 1 / s at h = 1.

    Args:
        log_ratio: log u_base - log u at each jump, whichever of them drew it; zero for steps a trajectory did not take.
        reward: r(X_1) = -beta g(X_1); -inf forbids an outcome.
        beta: temperature, the weight of the KL to the base relative to the reward; > 0.
        ess: effective sample size to keep, in [1, K]; None takes h = max_tilt.
        max_tilt: largest h, in (0, 1]. Below 1 it damps the noise of log_ratio at a model that is still learning.
        clip: as for `adjoint_weights`.
        leave_one_out: normalise each trajectory by the mean over the other K - 1, on which it does not depend:

                weight_k = min(K, (K - 1) s_k / (1 - s_k)),      s = softmax(h l)

            At an h that does not depend on the trajectories the weighted outcomes then have the law of infinite K, but
            for the bound K, which binds where one outweighs all the others together and counts as clipped. The mean is
            above 1. With from_base, whose trajectories are as many in each group, a share of order 1 / K of the
            difference between the mean weights of base and model is left.
        from_base: which trajectories the base drew and not the model; they do not count in `ess`, and its K are
            those that the model drew.
        kept: which trajectories there are; the weights of each group are those of its kept ones alone, of mean 1 over
            them, as if the others had not been drawn. Not so a reward of -inf, which says that an outcome is
            forbidden. For those whose reward is not known, if that says nothing of what they are: what is matched is
            p* among outcomes that are rewarded, up to a factor between what base and model drew if the rewards of one
            are lost more often. A group of fewer than two has weight 0.

    Returns:
        The weights, and h [G] in float64. With from_base log_path has a step more, the last: less the mixture. Of those
        that are not kept the weight is 0 and log_path NaN.
    """
    if kept is not None and not bool(kept.all()):
        options: dict[str, Any] = {"beta": beta, "max_tilt": max_tilt, "clip": clip, "leave_one_out": leave_one_out}
        return _of_kept(log_ratio, reward, from_base, kept, ess, options)
    if not beta > 0:
        raise ValueError(f"beta must be > 0; got {beta}")
    if not 0 < max_tilt <= 1:
        raise ValueError(f"max_tilt must be in (0, 1]; got {max_tilt}")
    log_ratio, reward = log_ratio.double(), reward.double()
    path = log_ratio.sum(dim=2)
    score = torch.where(reward == -torch.inf, -torch.inf, path + reward / beta)
    if from_base is not None:
        score = torch.where(from_base, -torch.inf, score)
        ess = None if ess is None else max(1.0, ess * float((~from_base).double().mean(dim=1).min()))
    step = torch.full_like(score[:, 0], max_tilt) if ess is None else tilt_to_ess(score, ess, max_tilt=max_tilt)
    # A step of 0 still keeps what is forbidden out: cost +inf, not 0 * inf.
    cost = torch.where(reward == -torch.inf, torch.inf, -step[:, None] * reward / beta)
    gain = step[:, None, None] * log_ratio
    if from_base is not None:
        gain = torch.cat((gain, -log_mixture(path, from_base)[..., None]), dim=2)
    weights = adjoint_weights(gain, cost, clip=None if leave_one_out else clip)
    return (_left_out(weights, clip) if leave_one_out else weights), step


def step_limits(
    done: float, *, ess: float | None, max_tilt: float, full_tilt_from: float | None
) -> tuple[float | None, float]:
    """`ess` and `max_tilt` for `tilted_weights` once a fraction `done` of a run is over, which is to end at h = 1.

    Args:
        done: in [0, 1].
        ess, max_tilt: at the start; None is no limit.
        full_tilt_from: the fraction from which on steps go all the way: until then max_tilt rises to 1 and ess falls to
            1 linearly. None keeps both as they are.
    """
    if full_tilt_from is None:
        return ess, max_tilt
    if done >= full_tilt_from:
        return None, 1.0
    share = done / full_tilt_from
    return None if ess is None else ess + share * (1.0 - ess), max_tilt + share * (1.0 - max_tilt)


def _of_kept(
    log_ratio: Tensor,
    reward: Tensor,
    from_base: Tensor | None,
    kept: Tensor,
    ess: float | None,
    options: dict[str, Any],
) -> tuple[AdjointWeights, Tensor]:
    """`tilted_weights` of the trajectories that are kept, in groups that have as many of them at a time."""
    groups, size, steps = log_ratio.shape
    of_base = torch.zeros_like(kept) if from_base is None else from_base & kept
    counts = torch.stack((kept.sum(dim=1), of_base.sum(dim=1)), dim=1)
    first_kept = (~kept).long().argsort(dim=1, stable=True)
    like = log_ratio.new_empty(0, dtype=torch.float64)  # as tilted_weights has it
    weights = AdjointWeights(
        weight=like.new_zeros((groups, size)),
        log_path=like.new_full((groups, size, steps + 1 + (from_base is not None)), torch.nan),
        log_normalizer=like.new_full((groups,), -torch.inf),
        ess=like.new_zeros(groups),
        clipped=like.new_zeros(groups),
    )
    step = like.new_zeros(groups)
    for count in counts.unique(dim=0):
        if count[0] < 2:
            continue
        number = int(count[0])
        of = (counts == count).all(dim=1).nonzero()[:, 0]
        at = (of[:, None], first_kept[of, :number])
        part, step[of] = tilted_weights(
            log_ratio[at],
            reward[at],
            ess=None if ess is None else min(ess, number),
            from_base=None if from_base is None else from_base[at],
            **options,
        )
        weights.weight[at], weights.log_path[at] = part.weight, part.log_path
        weights.log_normalizer[of], weights.ess[of], weights.clipped[of] = part.log_normalizer, part.ess, part.clipped
    return weights, step


def _left_out(weights: AdjointWeights, clip: float | None) -> AdjointWeights:
    """Each weight over the mean of the others in its group, bounded; `ess` stays that of the shares."""
    size = weights.weight.shape[1]
    share = weights.weight / size
    weight = (size - 1) * share / (1 - share).clamp(min=1e-12)
    bound = float(size) if clip is None else min(float(size), math.exp(clip))
    return weights._replace(weight=weight.clamp(max=bound), clipped=(weight > bound).to(weight.dtype).mean(dim=1))


class MatchingTargets(NamedTuple):
    """What to match where: N states, and R rows that each name a state, a position and J weighted tokens.

    Weights are such that the loss is the mean over states of the sum over their rows.
    """

    states: Tensor  # int64 [N, L]
    group: Tensor  # int64 [N]: the group that each state belongs to
    row: Tensor  # int64 [R]: state of the row
    position: Tensor  # int64 [R]: masked position of that state
    target: Tensor  # int64 [R, J], -1 where a slot is empty
    weight: Tensor  # float [R, J]

    def to(self, device: torch.device | str) -> MatchingTargets:
        return MatchingTargets(*(value.to(device) for value in self))


def _check(estimator: str, weight: Tensor) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    _check_weight(weight)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [groups, trajectories]; got {list(weight.shape)}")


def state_targets(
    estimator: str,
    states: Tensor,  # int64 [G, L]
    final: Tensor,  # int64 [G, K, L]
    first: Tensor,  # int64 [G, K]
    weight: Tensor,  # [G, K]
    process: MaskedCTMC,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    row_ids: Tensor | None = None,  # int64 [G]
) -> MatchingTargets:
    """Targets at the G states from which K trajectories each were drawn (normaliser "state").

    Args:
        estimator: "first_jump_one", "first_jump" or "posterior".
        states: the states X_t.
        final: the outcomes X_1 of their trajectories.
        first: the position of each trajectory's first jump.
        weight: the trajectories' weights with mean 1 over each group, from `adjoint_weights`.
        process: names the mask token.
        generator, seed, row_ids: as for `MaskedCTMC.remask`; draw the trajectory that first_jump_one uses.

    Source: So et al., arXiv 2602.07132, Alg. 1 and Prop. 2.5.
    """
    _check(estimator, weight)
    groups, size = weight.shape
    group = torch.arange(groups, device=weight.device)
    if estimator == "first_jump_one":
        chosen = _members(weight, generator, seed, row_ids)
        position = first[group, chosen]
        target = final[group, chosen, position][:, None]
        return MatchingTargets(states, group, group, position, target, weight[group, chosen][:, None])
    masked = process.masked(states)
    row, position = torch.nonzero(masked, as_tuple=True)
    target = final[row, :, position]  # [R, K]
    share = weight[row] / size
    if estimator == "first_jump":
        target = torch.where(first[row] == position[:, None], target, -1)
    else:
        share = share / masked.sum(dim=1)[row, None]
    return MatchingTargets(states, group, row, position, target, share)


def group_targets(
    estimator: str,
    states: Tensor,  # int64 [G, K, L]
    final: Tensor,  # int64 [G, K, L]
    weight: Tensor,  # [G, K]
    process: MaskedCTMC,
    *,
    draw: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    row_ids: Tensor | None = None,  # int64 [G, K]
) -> MatchingTargets:
    """Targets at states made by re-masking the outcomes of K trajectories of each of G prompts (normaliser "group").

    Given outcome and state, the next position to unmask is uniform among the masked ones; first_jump
    draws it, posterior averages over it.

    Args:
        estimator: "first_jump_one", "first_jump" or "posterior".
        states: re-masked outcomes, from `MaskedCTMC.remask`.
        final: the outcomes X_1.
        weight: their weights with mean 1 over each group, from `adjoint_weights`.
        process: names the mask token.
        draw: use that many outcomes, drawn in proportion to their weights, instead of all G K weighted ones: the
            same expectation, at a fraction of the network's cost where most weights are small. Weights must not be
            negative, and first_jump_one has a draw of its own.
        generator, seed, row_ids: as for `MaskedCTMC.remask`; draw first jumps and the trajectory that first_jump_one
            uses. Outcomes are drawn by a generator only, see `drawn_outcomes`.
    """
    _check(estimator, weight)
    if draw is not None and estimator == "first_jump_one":
        raise ValueError("first_jump_one draws a trajectory of each group: draw= does not go with it")
    groups, size = weight.shape
    flat, outcome, w = states.flatten(0, 1), final.flatten(0, 1), weight.flatten()
    ids = None if row_ids is None else row_ids.flatten()
    group = torch.arange(groups, device=weight.device).repeat_interleave(size)
    if estimator == "first_jump_one":
        chosen = _members(weight, generator, seed, None if row_ids is None else row_ids[:, 0])
        chosen = chosen + size * torch.arange(groups, device=weight.device)
        flat, outcome, w, group = flat[chosen], outcome[chosen], w[chosen], group[chosen]
        ids = None if ids is None else ids[chosen]
    elif draw is not None:
        chosen, w = drawn_outcomes(weight, draw, generator=generator)
        flat, outcome, group = flat[chosen], outcome[chosen], group[chosen]
        ids = None if ids is None else ids[chosen]
    masked = process.masked(flat)
    if estimator == "posterior":
        row, position = torch.nonzero(masked, as_tuple=True)
        w = w / masked.sum(dim=1)
    else:
        row = torch.arange(flat.shape[0], device=weight.device)
        time = _philox.drawn(Use.NEXT_POSITION, flat.shape, flat.device, generator, seed, ids)
        position = torch.where(masked, time, torch.inf).argmin(dim=1)
    return MatchingTargets(flat, group, row, position, outcome[row, position][:, None], w[row][:, None])


def drawn_outcomes(
    weight: Tensor,  # [G, K]
    draw: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`draw` of the G K outcomes, in proportion to their weights, int64 [draw], and the weight that each has [draw].

    That weight is the mean of those drawn from, so that sums over the drawn and over all have one expectation.

    Raises:
        ValueError: a weight is negative.
    """
    if bool((weight < 0).any()):
        raise ValueError("outcomes are drawn in proportion to their weights, which must not be negative")
    w = weight.flatten()
    # Where nothing has a weight, what is drawn has none either.
    chosen = torch.multinomial(w if bool((w > 0).any()) else torch.ones_like(w), draw, True, generator=generator)
    return chosen, w.mean().expand(draw)


def _members(weight: Tensor, generator: torch.Generator | None, seed: int | None, row_ids: Tensor | None) -> Tensor:
    """One of the K trajectories of each group, int64 [G]."""
    groups, size = weight.shape
    uniform = _philox.drawn(Use.MEMBER, torch.Size((groups, 1)), weight.device, generator, seed, row_ids)[:, 0]
    return (uniform * size).long().clamp(max=size - 1)


def path_targets(
    trajectories: Trajectories,  # B = G K of them
    weight: Tensor,  # [G, K]
    *,
    every: bool = False,
    whole_calls: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    row_ids: Tensor | None = None,  # int64 [B]
) -> MatchingTargets:
    """Targets at states that the trajectories went through: of each one a jump, drawn uniformly, where it was made.

    Trajectories of fewer network calls than jumps, or filled block by block, have no other states to be trained at:
    what follows a state that no call saw is not of the law p(v | i, x) that the calls draw from, and at re-masked
    outcomes a model drifts away without any reward.

    The token of a jump is drawn from p_theta(v | i, x), so that E[grad log p_theta(v | i, x)] = 0 at each state: any
    baseline may be subtracted from the weights. With `weight - 1` the noise of the gradient vanishes as the model
    comes to p*, where all weights are 1, while that of the other estimators, the noise of drawn outcomes, stays. Not
    so at re-masked states: what was drawn there came from other states, and as long as the model's conditionals are
    not those of one joint law, weights less 1 drive it away. Nor for a model that is not the one that drew any more:
    take one step, or few, on a batch, or add the baseline's share of a cross-entropy to the model that drew it.

    Negative weights only push away from what was drawn, so a model that has lost a mode does not find it again, and
    the effective sample size of its own trajectories does not tell. Draw a share s of the trajectories from the base:
    with q = (1 - s) p_theta + s p_base over paths, p*/q are bounded weights, p*/q - p_theta/q those with baseline.

    Args:
        trajectories: of `dam.rollout` in random order, at temperature 1. Of one that ended early, at a stop token, a
            jump is drawn among all that there were masks for, and nothing is matched where it was not made: jumps up to
            the end are as likely to be drawn as without it. Else those of short texts would weigh more, by what comes
            after them.
        weight: any number for each.
        every: all jumps instead of a drawn one; the loss is then the expectation over the drawn one.
        whole_calls: with the drawn jump those of the same network call, drawn at the same state; each has its
            share of the weight.
        generator, seed, row_ids: as for `MaskedCTMC.remask`; draw the jumps.

    Source: So et al., arXiv 2602.07132, Eq. 14 at the states of Alg. 1; defensive mixtures: Hesterberg, Weighted
    average importance sampling and defensive mixture distributions, 1995.
    """
    _check_weight(weight)
    made = trajectories.call >= 0
    count = (trajectories.initial != trajectories.final).sum(dim=1)  # of masks, more than jumps where a text ended
    if count.shape[0] != weight.numel():
        raise ValueError(f"weight must have an element per trajectory, {len(count)}; got {list(weight.shape)}")
    if every:
        path, jump = torch.nonzero(made, as_tuple=True)
        share = len(path) / (len(count) * count[path])  # the mean over states is to be one over trajectories
        rows, at = torch.arange(len(path), device=path.device), jump
    else:
        path = torch.arange(len(count), device=count.device)
        shape = torch.Size((len(count), 1))
        uniform = _philox.drawn(Use.NEXT_POSITION, shape, count.device, generator, seed, row_ids)[:, 0]
        jump = (uniform * count).long().clamp(max=count - 1)
        chosen = torch.zeros_like(trajectories.call, dtype=torch.bool)
        chosen[path, jump] = True
        if whole_calls:
            chosen = trajectories.call == trajectories.call[path, jump][:, None]
        chosen &= made
        rows, at = torch.nonzero(chosen, as_tuple=True)
        share = 1.0 / chosen.sum(dim=1)[rows]
    states = trajectories.initial[path].clone()
    # A network call sees what the calls before it filled in.
    call = trajectories.call[path]
    earlier = (call >= 0) & (call < trajectories.call[path, jump][:, None])
    row, before = torch.nonzero(earlier, as_tuple=True)
    states[row, trajectories.position[path[row], before]] = trajectories.token[path[row], before]
    return MatchingTargets(
        states,
        group=path // weight.shape[1],
        row=rows,
        position=trajectories.position[path[rows], at],
        target=trajectories.token[path[rows], at][:, None],
        weight=(weight.flatten()[path[rows]] * share.to(weight.dtype))[:, None],
    )


def without_ended(targets: MatchingTargets, stop: Sequence[int], start: Tensor) -> MatchingTargets:
    """Targets without the rows whose state shows an end of the text in front of their position.

    What a model writes there counts for nothing: it is neither decoded nor rewarded. A row is judged by its state
    alone, as a model that writes from left to right sees the end before what follows it. Where the end itself is still
    masked, the row stays, although the outcome has the position behind an end: to leave out rows by their outcomes
    would teach p(v | i, x, no end in front of i), which is not p(v | i, x): texts then grow longer and longer even
    with a constant reward, for which nothing is to be learned. Here p* stays the fixed point at all rows that are left.
    Path weights are those of the whole sequence, what follows the end included: the objective is still that of the
    whole sequence, whose reward does not look behind the end. Where rollouts end there (`dam.rollout.rollout` with
    stop_tokens) they are those of the jumps up to the end: their mean over what might follow, with less noise.

    Args:
        targets: of G groups.
        stop: tokens that end a text.
        start: int64 [G], the position from which on they do, in the states of each group.
    """
    states = targets.states
    end = torch.isin(states, torch.tensor(stop, dtype=states.dtype, device=states.device))
    end &= torch.arange(states.shape[1], device=states.device) >= start.to(states.device)[targets.group, None]
    ended = end.cumsum(dim=1) > end.long()
    kept = ~ended[targets.row, targets.position]
    row, position, target, weight = (part[kept] for part in targets[2:])
    return MatchingTargets(states, targets.group, row, position, target, weight)


def joined(parts: Sequence[tuple[MatchingTargets, Tensor]]) -> MatchingTargets:
    """Targets of several estimators, as one: the mean is over the states of all.

    Args:
        parts: targets, and bool [G] which of all groups, of sequences of one length, are theirs, in their order.
    """
    before, rows = 0, []
    for targets, _ in parts:
        rows.append(targets.row + before)
        before += len(targets.states)
    group = torch.cat([of.nonzero()[:, 0][targets.group] for targets, of in parts])
    states, _, _, *rest = (torch.cat(values) for values in zip(*(targets for targets, _ in parts), strict=True))
    return MatchingTargets(states, group, torch.cat(rows), *rest)


def estimator_loss(
    denoiser: Denoiser,
    targets: MatchingTargets,
    process: MaskedCTMC,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    gradient_scale: float = 1.0,
) -> Tensor:
    """The matching loss of `targets` under the model: the mean over states of their weighted cross-entropies.

    States that are equal are run once, where the denoiser says that this changes nothing (`Denoiser.equal_rows`).

    Args:
        denoiser: the model.
        targets: of an estimator.
        process: names the mask token.
        attention_mask: [N, L], passed on to the model.
        temperature: that the trajectories were drawn at: what is trained is the model at it.
        gradient_scale: of a loss scaler, `torch.amp.GradScaler.get_scale()`. Gradients are formed in the forward pass,
            in the dtype of the hidden states, where float16 would lose what the scaler is there to keep: they are
            formed that many times as large. The loss and its gradient stay what they are.

    Source: So et al., arXiv 2602.07132, Eq. 14.
    """
    check_left_padding(denoiser, attention_mask)
    states, row = targets.states, targets.row
    if equal_rows(denoiser, states, attention_mask):
        first, of = distinct(given(states, attention_mask))
        states, row = states[first], of[row]
        attention_mask = None if attention_mask is None else attention_mask[first]
    hidden, head = hidden_at(denoiser, states, attention_mask, row, targets.position), denoiser.head()
    scale = targets.weight.new_full(targets.row.shape, gradient_scale / max(1, targets.states.shape[0]))
    scaled = linear_matching_loss(
        hidden,
        target=targets.target,
        weight=targets.weight,
        **head.arguments(hidden.dtype),
        row_scale=scale,
        **process.left_out(head.weight.shape[0]),
        temperature=temperature,
    )
    return scaled / gradient_scale
