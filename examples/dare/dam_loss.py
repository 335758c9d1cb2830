"""Discrete Adjoint Matching in DARE: what a rollout says of itself, weights of each prompt's group, and the loss.

Goes to verl/trainer/ppo/dam_loss.py of DARE (README.md here; `install.py` puts it there). It needs `dam` with its extra
`train`, and of verl nothing: a batch is anything with `batch`, tensors by name, `non_tensor_batch` and `meta_info`.

Not run here: DARE's trainer and workers, Ray, a GPU. Run here on a CPU: these functions, by
tests/examples/test_dare.py on batches of the shapes that DARE at commit 83ae8a3 hands over, and by
tests/examples/dare_itself.py on DARE's own DataProto.

The method is `dam.train.DAMTrainer`'s, by the same functions, on the newest batch: estimator "posterior", normalizer
"group". Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Alg. 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dam.adjoint import (
    MatchingTargets,
    estimator_loss,
    group_targets,
    path_targets,
    step_limits,
    tilted_weights,
    without_ended,
)
from dam.ctmc import MaskedCTMC
from dam.diagnostics import diagnose
from dam.models import Denoiser
from dam.rollout import Trajectories, jump_log_prob
from dam.train import DAMConfig

LAW = "dam"  # of meta_info: the `Law` of a batch
CALL = "unmask_call"  # of batch: the network call that filled each position of the response, int64 [B, R]
WEIGHT = "path_weight"  # of batch: float32 [B]


class Law(NamedTuple):
    """By which law a rollout drew: what else computes with its trajectories must take the same."""

    mask_token: int
    temperature: float
    exact: bool  # one position per call in random order, in no blocks: re-masked outcomes are states of that chain
    stop: tuple[int, ...] = ()  # end a text
    suppress: tuple[int, ...] = ()  # are never drawn
    vocabulary: int | None = None  # ids from this one on are not drawn either

    @property
    def process(self) -> MaskedCTMC:
        return MaskedCTMC(self.mask_token, suppress=self.suppress, vocabulary=self.vocabulary)

    @staticmethod
    def of(meta_info: Mapping[str, Any]) -> Law:
        """That of a batch.

        Raises:
            ValueError: another rollout made it, or its temperature is not the one that DARE goes by.
        """
        law = meta_info.get(LAW)
        if not isinstance(law, Law):
            raise ValueError(
                f"the batch's meta_info has no {LAW!r}: only rollouts of dam_rollout.DAMRollout say in which order and "
                "by which law they drew; set actor_rollout_ref.rollout.name=hf and algorithm.name=dam in both places"
            )
        if meta_info.get("temperature", law.temperature) != law.temperature:
            raise ValueError(
                f"the rollout was drawn at temperature {law.temperature}, and meta_info has "
                f"{meta_info['temperature']}: log-probabilities would be of another law"
            )
        return law


def network_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """What the network sees [B, L]: of the prompt what attention_mask says, of the response all, as in the rollout.

    The response's part of attention_mask says where the text ends, for rewards and lengths.
    """
    mask = batch["attention_mask"].clone()
    mask[:, -batch["responses"].shape[1] :] = 1
    return mask


def trajectories_of(batch: Mapping[str, Tensor], law: Law) -> Trajectories:
    """The trajectories of B rows whose whole response was filled in, R jumps each, without log-probabilities."""
    final, call = batch["input_ids"], batch[CALL]
    length = call.shape[1]
    call, order = call.sort(dim=1, stable=True)
    position = order + final.shape[1] - length
    initial = final.clone()
    initial[:, -length:] = law.mask_token
    return Trajectories(
        initial=initial,
        final=final,
        position=position,
        token=final.gather(1, position),
        call=call,
        log_prob=torch.zeros(call.shape, dtype=torch.float32, device=call.device),
    )


def response_log_prob(denoiser: Denoiser, batch: Mapping[str, Tensor], law: Law) -> Tensor:
    """Log-probability [B, R] of each token of the response, in the call that drew it, under a model: `jump_log_prob`.

    Their sum is that of the path. As many network calls as the rollout made; the head runs at the B R positions.
    """
    paths = trajectories_of(batch, law)
    value = jump_log_prob(denoiser, paths, law.process, attention_mask=network_mask(batch), temperature=law.temperature)
    start = paths.final.shape[1] - value.shape[1]
    return torch.zeros_like(value).scatter(1, paths.position - start, value)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of `dam.train.DAMConfig` that weights go by, with its defaults: config.algorithm.dam."""

    beta: float = DAMConfig.beta
    target_ess: float | None = DAMConfig.target_ess
    max_tilt: float = DAMConfig.max_tilt
    full_tilt_from: float | None = DAMConfig.full_tilt_from
    clip: float | None = DAMConfig.clip
    leave_one_out: bool = DAMConfig.leave_one_out

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> Settings:
        known = [field.name for field in dataclasses.fields(Settings)]
        unknown = [name for name in given or {} if name not in known]
        if unknown:
            raise ValueError(f"algorithm.dam has no {', '.join(unknown)}; it has {', '.join(known)}")
        return Settings(**dict(given or {}))


def groups_of(uid: np.ndarray) -> Tensor:
    """Rows of each prompt's group, int64 [G, K], wherever they are in the batch, which verl may have reordered.

    Raises:
        ValueError: groups are not of one size, or of less than two.
    """
    _, group, size = np.unique(uid.astype(str), return_inverse=True, return_counts=True)
    if size.min() != size.max() or size.min() < 2:
        raise ValueError(
            f"each prompt must have as many responses as each other, 2 or more; got {size.min()} to {size.max()}: set "
            "actor_rollout_ref.rollout.n, and do not filter rows of a group"
        )
    return torch.from_numpy(group.reshape(-1).argsort(kind="stable").reshape(len(size), size[0]))


def weigh(data: Any, given: Mapping[str, Any] | None, done: float) -> dict[str, float]:
    """Puts the weight of each trajectory into the batch, `WEIGHT` [B], of mean near 1 over its prompt's group.

    On the driver, where groups are whole; `dam.adjoint.tilted_weights` of log u_base - log u and the rewards. The
    batch must have `old_log_probs` and `ref_log_probs` [B, R], of `response_log_prob` under model and base.

    Args:
        data: verl's DataProto behind its advantages.
        given: config.algorithm.dam, or None.
        done: fraction of the run that is over.

    Returns:
        Figures for the log, `dam/...`, of `dam.diagnostics.diagnose`; and `dam/tilt`, the step h.

    Raises:
        ValueError: no base, a reward that is NaN or has a KL in it, groups of several sizes, or bad settings.
    """
    settings, law, batch = Settings.of(given), Law.of(data.meta_info), data.batch
    if "ref_log_probs" not in batch.keys():  # a TensorDict is no dict
        raise ValueError(
            "weights need the base's log-probabilities: set actor_rollout_ref.actor.use_kl_loss=True, by which verl "
            "makes a reference policy, and kl_loss_coef=0.0"
        )
    scores = batch["token_level_scores"]
    if bool(scores.isnan().any()):
        raise ValueError("a reward is NaN: reward functions must give a number for each response")
    if not torch.equal(batch["token_level_rewards"], scores):
        raise ValueError("the weights hold the KL to the base already: set algorithm.use_kl_in_reward=False")
    members = groups_of(data.non_tensor_batch["uid"])
    reward = scores.sum(dim=-1)[members]
    log_ratio = (batch["ref_log_probs"] - batch["old_log_probs"])[members]
    ess, max_tilt = step_limits(
        done, ess=settings.target_ess, max_tilt=settings.max_tilt, full_tilt_from=settings.full_tilt_from
    )
    weights, step = tilted_weights(
        log_ratio,
        reward,
        beta=settings.beta,
        ess=None if ess is None else min(ess, float(members.shape[1])),
        max_tilt=max_tilt,
        clip=settings.clip,
        leave_one_out=settings.leave_one_out,
    )
    batch[WEIGHT] = torch.empty(members.numel()).index_put((members.flatten(),), weights.weight.float().flatten())
    masked = law.process.masked(trajectories_of(batch, law).initial)
    final = batch["input_ids"][members]
    told = diagnose(weights, log_ratio, final, masked[members[:, 0]], generator=torch.Generator().manual_seed(0))
    figures = {**told._asdict(), "tilt": float(step.mean())}
    return {f"dam/{name}": value for name, value in figures.items() if not math.isnan(value)}


def targets_of(batch: Mapping[str, Tensor], law: Law, *, seed: int, row_ids: Tensor) -> MatchingTargets:
    """What to match where: as DAMTrainer, at re-masked outcomes of the exact chain, else where the network was called.

    Args:
        batch: B rows, with their weights.
        law: of the rollout.
        seed: of the states.
        row_ids: int64 [B], names each row's draws.
    """
    paths, weight, process = trajectories_of(batch, law), batch[WEIGHT][:, None], law.process
    if law.exact:
        states = process.remask(paths.initial, paths.final, seed=seed, row_ids=row_ids)
        targets = group_targets("posterior", states[:, None], paths.final[:, None], weight, process)
    else:
        targets = path_targets(paths, weight, whole_calls=True, seed=seed, row_ids=row_ids)
    if not law.stop:
        return targets
    start = torch.full_like(row_ids, paths.final.shape[1] - batch[CALL].shape[1])
    return without_ended(targets, law.stop, start)


def matching_loss(denoiser: Denoiser, batch: Mapping[str, Tensor], law: Law, *, seed: int, row_ids: Tensor) -> Tensor:
    """The loss of B rows, the mean over them: `dam.adjoint.estimator_loss`, `linear_matching_loss` at masked positions.

    Arguments as for `targets_of`, and the model.
    """
    targets = targets_of(batch, law, seed=seed, row_ids=row_ids)
    mask = network_mask(batch)[targets.group]
    return estimator_loss(denoiser, targets, law.process, mask, temperature=law.temperature)
