"""DAMTrainer: Discrete Adjoint Matching on `transformers.Trainer`."""

from __future__ import annotations

import enum
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import (
    EvalPrediction,
    PredictionOutput,
    speed_metrics,
)

from dam import diagnostics
from dam.adjoint import (
    MatchingTargets,
    drawn_outcomes,
    estimator_loss,
    group_targets,
    joined,
    path_targets,
    state_targets,
    tilted_weights,
    without_ended,
)
from dam.ctmc import MaskedCTMC
from dam.engines import RolloutEngine
from dam.models.denoiser import Denoiser, blocks_of, check_left_padding
from dam.models.families import as_denoiser
from dam.rollout import PathLogProbs, blocks_for, path_of
from dam.train import card, fsdp, grpo
from dam.train.base import DenoiserFactory, with_base
from dam.train.completions import Completions
from dam.train.config import DAMConfig
from dam.train.data import (
    Collator,
    check_rows,
    decoded,
    label_ids,
    outcomes,
    stacked,
)
from dam.train.networks import check_dtype, without_dropout
from dam.train.processes import each_in_step, in_step, together
from dam.train.progress import Progress
from dam.train.releases import loaded
from dam.train.replay import Group, ReplayBuffer, check_groups, stacked_groups, unstacked
from dam.train.resumable import ResumableTrainer
from dam.train.reward_model import RewardModel, move, with_models
from dam.train.rewards import (
    Failed,
    Outcomes,
    Rewarded,
    RewardError,
    RewardFunction,
    Rewards,
    failure_figures,
    names_of,
    told_failures,
)
from dam.train.rows import RowReader
from dam.train.sampling import Sampler
from dam.train.terminal import show
from dam.train.tokens import limits_of, special_tokens
from dam.train.zero import check_checkpoint, check_whole, check_zero, with_own_steps

_METHOD = card.Method(
    "Discrete Adjoint Matching",
    "https://arxiv.org/abs/2602.07132",
    "toward a reward, close to the base, as min E[-reward] + beta KL(model || base)",
    ("discrete-adjoint-matching", "masked-diffusion"),
)
_OF_CARD = ("reward", "reward_std", "ess", "kl_path", "kl_outcome", "order_variance", "tilt")  # what is logged
# Entries of a group that has one for each of its trajectories.
_OF_TRAJECTORIES = ("final", "weight", "first", "position", "call")


class _Draw(enum.IntEnum):
    """What a step draws at random; each has a stream of its own."""

    STATE = 0  # the partly filled-in one that the trajectories of a group start from
    ROLLOUT = 1
    NULL_ARM = 2
    REPLAY = 3
    TARGETS = 4
    DROPOUT = 5
    DIAGNOSTICS = 6
    EVALUATION = 7


class DAMTrainer(ResumableTrainer):
    """Fine-tunes a masked-diffusion model toward a reward that nobody differentiates, staying close to a base.

        min over the model of  E[-reward(X_1)] + beta KL(p_model || p_base)

    A training step: prompts -> rollouts -> rewards -> weights (`dam.adjoint.tilted_weights`) -> replay buffer ->
    re-masked states -> hidden states -> `dam.linear_matching_loss`. No step holds a [batch, length, V] array.

    Shorter sequences of a batch are padded on the left. A model whose positions are absolute and counted over padding
    too (BERT's) would see other positions: it must be given sequences of one length, or is refused. Rotary and
    RoBERTa's positions are fine.

    Of families of diffusion language models (`dam.models.as_denoiser`) shift, scale and attention are known by
    `config.model_type`. Where attention has blocks, they are filled one after another and training is at states that
    trajectories went through, as with block_length: estimator "posterior" and normalizer "group".

    The dataset has a column `input_ids`, token ids with the mask token wherever something is to be filled in, or
    `prompt`, to which `max_completion_length` masks are appended, and with `whole_blocks` some more: a string, token
    ids, or a conversation, messages {"role": ..., "content": ...} that go through the tokenizer's chat template. An
    `attention_mask` of token ids is kept. All other columns go to the reward functions, and must not have the names of
    what these are given besides. `labels` may be anything; integers, one for each token (behind a prompt, for the
    completion's first ones), also go to `compute_metrics`, -100 where a row has none. Datasets in memory, and those of
    `datasets` on disk, are looked through before the first step (`dam.train.data.check_rows` says what that costs);
    rows of others when they come. An iterable dataset is read by one process and no workers, pass after pass, each row
    once a pass; set max_steps.

    A completion ends with the first of `stop_token_ids`, the tokenizer's end-of-text token unless given: what follows
    is neither decoded nor rewarded, and trained on only in states that do not show the end yet
    (`dam.adjoint.without_ended` says why). A sequence given as `input_ids` has no end. Once nothing is masked in front
    of the end, no more network calls are spent on a row, and its rest is filled up with that token: in evaluation, and
    in training at states of trajectories (block_length, a model that has blocks, or more masks than diffusion_steps).
    Other training re-masks whole outcomes.

    Never drawn are the mask token, `suppress_tokens`, and ids that processing_class does not have, for which many heads
    have rows: rollouts, the base's log-probabilities and the loss are all of the distribution without them.

    The base draws the last `base_generations` trajectories of each group; what is logged of rewards and KL is of the
    model's own.

    Logged, by TRL's names where these are there: reward and reward_std, rewards/<function>/mean and /std,
    frac_reward_zero_std (of groups), completions/mean_length and its like in tokens (clipped_ratio: without a stop
    token; none of sequences given as input_ids); tilt (the step h toward the optimum), reward_calls, and
    `dam.diagnostics.diagnose`: ess, ess_path, clip_fraction, adjoint_mean, kl_path (KL(p_model || p_base) per prompt of
    trajectories up to where they end, the order of unmasking included), kl_outcome (of outcomes, estimated with a bias:
    `dam.diagnostics.kl_outcome`), order_variance (of the log ratio between orders at one outcome) and split_half.
    kl_outcome and order_variance come from order_samples trajectories of each group by a second order, or from all by
    num_orders. Of time (`dam.train.timing.Timing`): time/rollout_share, time/reward_share, time/evaluation_share and
    time/training_share of the time since the last log, which add up to 1, tokens_per_second drawn by training's
    rollouts in that time, of all processes, and time/eta_seconds until the end.

    With reward_timeout or reward_workers also rewards/failed, the fraction of completions that have no reward, which
    all else that is logged leaves out, and rewards/failed_<kind> for each of `dam.workers.KINDS`; of an evaluation
    eval_rewards/failed.

    Where the log tells why a run does not learn, a constant reward for one, it is said once, as a warning
    (`dam.diagnostics.findings`).

    What is drawn for a trajectory depends on (args.seed, step, row of the dataset, number of the trajectory in its
    group, position) only: not on rollout_batch_size, gradient accumulation or the number of processes, as long as the
    prompts and groups of a step are as many. Dropout alone is drawn for each forward pass in training. So a resumed run
    continues to the same result.

    Args:
        model: a masked language model with `get_output_embeddings()`, or a name for `from_pretrained`, or a
            `dam.models.Denoiser`. A name is loaded in float32, or as args.model_init_kwargs say. Models with code of
            their own (trust_remote_code) are loaded before, by AutoModel or AutoModelForCausalLM as their makers say.
            Before the first rollout a language model's own logits are compared with those that the fused operations
            would train (`dam.models.MaskedLM`).
        reward_funcs: one or more plain Python functions, async ones too, `f(prompts, completions, completion_ids,
            trainer_state, **columns)` that return a number per completion (None: does not apply; -inf: forbidden), or
            sequence classifiers of one output, or their names (`dam.train.reward_model.RewardModel`). Where they are
            called in worker processes (`DAMConfig.reward_timeout`), trainer_state has numbers and text only. With
            `prompt`, a completion is what follows the prompt; with `input_ids`, the whole sequence filled in, less what
            attention_mask hides. Decoded with processing_class if there is one, else lists of token ids; behind a
            conversation a message, [{"role": "assistant", "content": text}], which a last message of the assistant
            begins, as in TRL.
        args: a `DAMConfig`.
        train_dataset, eval_dataset: rows as above.
        processing_class: tokenizer, for string prompts, conversations and decoded completions. What it puts behind a
            text, [SEP] for one, is not put between prompt and completion.
        reward_processing_classes: the tokenizer of each reward function that is a model, or of the only one; None
            loads it by the model's name.
        callbacks, optimizers, compute_metrics: as for `transformers.Trainer`; `compute_metrics` receives
            EvalPrediction(predictions=filled-in token ids, label_ids=labels, inputs=input_ids). label_ids is None
            where there are no labels, or others than of tokens among them.
        peft_config: trains an adapter (extra `peft`).
        ref_model: the base model, which accelerate may have offloaded (accelerate.cpu_offload) or divided over devices.
            Unless given it is the model as it is now: a frozen copy of at most 8 GiB, or of a PEFT model, whether
            by peft_config or given as one, with an adapter that was trained before, the model itself with a copy of its
            trainable parameters, be they adapters, biases (bias="all"), modules_to_save or tokens. So a run that is
            resumed must be given the model that it began with.
        denoiser: makes a `dam.models.Denoiser` of the model, as accelerate has wrapped it, and of the base; to set an
            option of its family, `functools.partial(dam.models.as_denoiser, block_length=8)`. A model of
            your own that has hidden_states() and head() needs none, and is taken at its word: it has no other logits
            to be compared with.
        rollout_engine: draws the trajectories of training that the model draws, as `dam.engines.SGLangEngine` by a
            server; unless given this process does. It is sent the weights before each rollout. The base's
            log-probabilities, its own trajectories, and evaluation stay in this process.

    Raises:
        ValueError, TypeError: bad arguments, a model whose law they do not fit, or a bad row, which is named with its
            column, before any work.
        RewardError: a reward function misbehaves in training, or, with reward_timeout or reward_workers, does so at
            more than max_reward_failures of a rollout; or a completion cannot be decoded. The rollouts are written to
            output_dir/failed_rollouts.pt.
        EngineError: rollout_engine did not take the weights, is gone, or answers too late or something else.

    Before this or any other error (not KeyboardInterrupt) ends a run that has begun, a checkpoint is saved, so that it
    can be resumed, to the same result; but not in the middle of an update of the weights. When one of several processes
    fails alone or is killed, all end, and what each raises says which and why (`dam.train.lifelines`); the checkpoint
    is then the first process's, or where FSDP or DeepSpeed divide the model the last one that was saved.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Alg. 1; estimators in `dam.adjoint`.
    """

    args: DAMConfig
    progress: Progress[ReplayBuffer]

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardFunction | nn.Module | str | Sequence[RewardFunction | nn.Module | str],
        args: DAMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        peft_config: Any = None,
        ref_model: nn.Module | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        denoiser: DenoiserFactory = as_denoiser,
        rollout_engine: RolloutEngine | None = None,
        **others: Any,
    ):
        grpo.refuse(others, grpo.TRAINER, "GRPOTrainer", type(self).__name__)
        if others:
            raise TypeError(f"{type(self).__name__} does not take {', '.join(others)}")
        args = DAMConfig(output_dir="dam_output") if args is None else args
        if not isinstance(args, DAMConfig):
            raise TypeError(f"args must be a DAMConfig; got {type(args).__name__}")
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: other columns go to the reward functions")
        template: Any = args.chat_template_kwargs
        network: Any = _loaded(model, args.model_init_kwargs)
        functions = with_models(
            reward_funcs,
            reward_processing_classes,
            reads_text=processing_class is not None,
            batch_size=args.per_device_eval_batch_size,
            model_init_kwargs=args.model_init_kwargs,  # type: ignore[arg-type]
            chat_template_kwargs=template,
        )
        self._rewards = Rewards(
            functions,
            args.reward_weights,
            str(args.output_dir),
            timeout=args.reward_timeout,
            workers=args.reward_workers,
            stays=[isinstance(function, RewardModel) for function in functions],
        )
        self.reward_funcs = self._rewards.functions
        check_whole("model", [network])
        check_whole("ref_model", [] if ref_model is None else [ref_model])
        check_whole("reward model", [each.model for each in functions if isinstance(each, RewardModel)])
        limits = limits_of(network)
        own = denoiser(network)  # raises where the model does not fit
        if hasattr(own, "canvas_length"):
            raise TypeError(
                f"{type(network).__name__} knows no mask token: it undoes uniform noise on a canvas, where DAMTrainer "
                "fills in masks. Train it in a loop of your own by dam.canvas: rollout, dam.adjoint.tilted_weights, "
                "and path_loss or posterior_loss (docs/models.md)"
            )
        tokens = special_tokens(
            args.mask_token_id,
            processing_class,
            getattr(network, "config", None),
            own,
            stop=args.stop_token_ids,
            suppress=args.suppress_tokens,
            ids=limits.ids,
        )
        self.process = MaskedCTMC(tokens.mask, suppress=tokens.suppress, vocabulary=tokens.vocabulary)
        self._stop = tokens.stop
        multiple = _multiple(args, own)
        self._reader = RowReader(tokens.mask, args.max_completion_length, processing_class, limits, template, multiple)
        self._denoiser = denoiser
        self._in_blocks = args.block_length is not None
        if blocks_of(own) is not None:
            blocks_for(own, args.block_length)  # raises where they are others
            args.check_on_paths("a model whose attention has blocks goes")
            self._in_blocks = True
        self._keeps_paths = self._in_blocks or args.diffusion_steps is not None
        names = (card.name_of(network), card.name_of(network if ref_model is None else ref_model))
        network, base = with_base(network, ref_model, peft_config)
        if args.disable_dropout:
            without_dropout(network)
        check_dtype(network)
        self.sampler = Sampler(denoiser, self.process, args, base, self._precision, rollout_engine)
        self._seen: Outcomes = {}  # what reward functions saw of this process's last rollout
        self._failed: list[Failed] = []  # where they failed
        self._completions: Completions | None = None  # of all processes' last rollout
        self._told: set[str] = set()  # names of findings
        self._compared = self._lengths_differ = False
        super().__init__(
            network,
            args,
            Progress(ReplayBuffer(args.replay_size, tokens.pad)),
            names=names,
            data_collator=Collator(self._reader, tokens.pad),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:  # else each process has all that the first needs to save a checkpoint alone
            self.progress.replay.share(args.process_index, args.world_size)
        base.to(self.args.device, self._dtype_of_engine())
        move(self.reward_funcs, self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, and FSDP2 on a CPU too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = fsdp.prepare_plugin(self.accelerator, self.args, self._network)

    def _begun(self) -> None:
        super()._begun()
        self._part_steps()

    def _dtype_of_engine(self) -> torch.dtype | None:
        """What DeepSpeed makes of the model's weights; None without it, or where it leaves them.

        Raises:
            ValueError: what DeepSpeed is told does not fit.
        """
        if not self.is_deepspeed_enabled:
            return None
        config: Any = self.accelerator.state.deepspeed_plugin.deepspeed_config
        check_zero(config, self.args.max_grad_norm)
        return torch.bfloat16 if config.get("bf16", {}).get("enabled", False) else None

    def _compare(self, batch: dict[str, Any]) -> None:
        """What the model and its base say with what is trained and sampled: once, when a run starts."""
        if not self._compared:
            tokens, attention_mask = batch["input_ids"], batch["attention_mask"]
            if self.sampler.is_divided(self.model):  # so that processes try the same, whichever has rows to pad
                tokens, attention_mask = tokens.clone(), attention_mask.clone()
                tokens[:, 0], attention_mask[:, 0] = self.progress.replay.pad_token, 0
            self.sampler.compare(self.model, tokens, attention_mask)
            if self._lengths_differ:  # so that some are padded, if not in this batch
                padded = F.pad(batch["attention_mask"], (1, 0))
                for model in (self._denoiser(self.model), self.sampler.base(self.model)):
                    check_left_padding(model, padded)
            self._compared = True

    # Training

    def _refill(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Rollouts of all processes, rewarded, weighted and put into the replay buffer, the same on each or shared."""
        masks = int(self.process.masked(batch["input_ids"]).sum(dim=1).max())
        in_step(lambda: self.args.check_steps(masks))
        with self._timing.part("rollout"):
            self.sampler.send(self.model, self.state.global_step)
            given = together(lambda: self._rolled_out(model, batch))
        groups = stacked_groups([group for groups in given for group in groups], self.progress.replay.pad_token)
        if self._rewards.isolated:
            failed = together(lambda: self._failed)
            in_step(functools.partial(self._count_failed, failed, groups["reward"]))
        seen = together(lambda: (self._seen["prompts"], self._seen["completions"])) if self.args.log_completions else []
        in_step(functools.partial(self._weigh, groups, seen))

    def _count_failed(self, failed: list[list[Failed]], reward: Tensor) -> None:
        """Into the log, of completions without a reward.

        Args:
            failed: of each process.
            reward: [G, K] of all.

        Raises:
            RewardError: they are too many, or no group can be weighted. The first process that has some keeps its
                rollouts.
        """
        args, figures = self.args, failure_figures(failed, reward.numel())
        lost = figures["rewards/failed"]
        told = f"reward functions failed at {lost:.3g} of {reward.numel()} completions"
        if lost > args.max_reward_failures:
            told += f", more than max_reward_failures, {args.max_reward_failures}"
        elif bool(self._can_be_weighted(~reward.isnan()).any()):
            self.progress.record(**figures)
            return
        else:
            told += ", which leaves no group that can be weighted"
        error = RewardError(f"{told}: {told_failures([each for part in failed for each in part])}")
        if args.process_index == next(process for process, part in enumerate(failed) if part):
            seen = {**self._seen, "failed": [(f.function, f.completion, *f.failure) for f in self._failed]}
            error = self._rewards.with_outcomes_kept(error, seen, self.state)
        raise error

    def _can_be_weighted(self, kept: Tensor) -> Tensor:
        """Which groups have two trajectories, one of them drawn by the model: bool [G]."""
        return (kept.sum(dim=1) >= 2) & kept[:, : self.args.from_model].any(dim=1)

    def _weigh(self, rolled_out: Group, seen: list[tuple[list[Any], list[Any]]]) -> None:
        """Puts groups with their weights into the replay buffer, and figures of them into the log.

        A trajectory without a reward counts for nothing, and its place is taken by another of its group.

        Args:
            rolled_out: groups of all processes.
            seen: prompts and completions of each process, where they are to be shown.
        """
        args = self.args
        self.progress.reward_calls += rolled_out["reward"].numel()
        self._timing.drew(int((rolled_out["position"] >= 0).sum()))
        all_rewards = {name: value for name, value in rolled_out.items() if name.startswith("reward")}
        usable = self._can_be_weighted(~rolled_out["reward"].isnan())
        rolled_out = {name: value[usable] for name, value in rolled_out.items()}
        log_ratio, reward = rolled_out["log_ratio"], rolled_out["reward"]
        kept = ~reward.isnan()
        rolled_out["length"] = torch.where(kept, rolled_out["length"], torch.nan)
        orders = None
        if "order_log_prob" in rolled_out:
            orders = PathLogProbs(rolled_out["order_log_prob"], rolled_out["order_base_log_prob"])
        drawn_by_model = args.from_model  # of each group the first ones
        from_base = (torch.arange(args.num_generations, device="cpu") >= drawn_by_model).expand_as(reward)
        ess, max_tilt = args.step_limits(self.state.global_step / max(1, self.state.max_steps))
        weights, step = tilted_weights(
            orders.log_ratio[..., None] if orders is not None and args.num_orders > 1 else log_ratio,
            reward,
            beta=args.beta,
            ess=ess,
            max_tilt=max_tilt,
            clip=args.clip,
            leave_one_out=args.leave_one_out,
            from_base=from_base,
            kept=kept,
        )
        told = diagnostics.diagnose(
            weights,
            log_ratio,
            rolled_out["final"],
            self.process.masked(rolled_out["states"]),
            orders=None if orders is None else PathLogProbs(*(_own(each, kept, drawn_by_model) for each in orders)),
            from_base=from_base,
            kept=kept,
            generator=self._generator(_Draw.DIAGNOSTICS),
        )
        weight = weights.weight.float()
        mean = torch.where(kept, weight, 0.0).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
        weight = weight - args.centering * mean
        member, share = _in_place_of_dropped(kept)
        weight = weight.gather(1, member) * share
        if args.null_arm:
            weight = diagnostics.permuted(weight, self._generator(_Draw.NULL_ARM))
        names = [
            "states",
            "final",
            "first",
            "attention_mask",
            "start",
            "exact",
            *(["position", "call"] if self._keeps_paths else []),
        ]
        at = (torch.arange(len(member), device="cpu")[:, None], member)
        groups = {name: rolled_out[name][at] if name in _OF_TRAJECTORIES else rolled_out[name] for name in names}
        self.progress.replay.extend({"weight": weight, **groups})
        if seen:
            shown = torch.zeros(usable.shape + weight.shape[1:], device="cpu")
            shown[usable] = torch.zeros_like(weight).scatter_add(1, member, weight) * kept.float().mean(1, keepdim=True)
            self._completions = _to_show(seen, {**all_rewards, "weight": shown})
        logged = {**_reward_figures(rolled_out, drawn_by_model), **told._asdict(), "tilt": float(step.mean())}
        # Nothing to correlate is no figure.
        self.progress.record(**{name: value for name, value in logged.items() if not math.isnan(value)})

    def _rolled_out(self, model: nn.Module, batch: dict[str, Any]) -> list[Group]:
        """A group of rewarded trajectories for each prompt of this process."""
        args, size = self.args, self.args.num_generations
        tokens, attention_mask, number = batch["input_ids"], batch["attention_mask"], batch["number"]
        seed = self._seed(_Draw.ROLLOUT)
        # Re-masked outcomes are states of the exact chain only where all of them was drawn.
        exact = self._of_exact_chain(tokens)
        start = torch.where(exact, tokens.shape[1], batch["start"])
        row_ids = (number[:, None] * size + torch.arange(size, device=number.device)).flatten()
        masks = attention_mask.repeat_interleave(size, dim=0)
        # All of a group by num_orders, or a few of it by two.
        orders, taken = (args.num_orders, size) if args.num_orders > 1 else (2, args.order_samples)
        chosen = torch.arange(len(row_ids), device=number.device).view(-1, size)[:, :taken].flatten()
        from_base = torch.arange(len(row_ids), device=number.device) % size >= args.from_model
        with self.sampler.evaluating(model):
            self._compare(batch)
            states = tokens
            if args.normalizer == "state":
                states = self.sampler.states(
                    self.model, tokens, attention_mask, seed=self._seed(_Draw.STATE), row_ids=number
                )
            trajectories = self.sampler.rollout(
                self.model,
                states.repeat_interleave(size, dim=0),
                masks,
                seed=seed,
                row_ids=row_ids,
                served=True,
                base=True,
                from_base=from_base,
                temperature=args.temperature,
                stop_tokens=self._stop,
                start=start.repeat_interleave(size),
            )
            paths = None
            if taken > 0:
                paths = self.sampler.over_orders(
                    self.model,
                    trajectories[chosen],
                    masks[chosen],
                    orders=orders,
                    seed=seed,
                    row_ids=row_ids[chosen],
                    temperature=args.temperature,
                )
        seen, (reward, parts, failed) = self._rewarded(batch, trajectories.final, size)
        self._seen, self._failed = seen, failed
        of_each = {
            "final": trajectories.final,
            "first": trajectories.position[:, 0],
            "position": trajectories.position,
            "call": trajectories.call,
            "log_ratio": trajectories.log_ratio,
            "reward": reward,
            "length": _lengths(seen["completion_ids"], batch["start"] < tokens.shape[1], size),
            "terminated": torch.tensor([ids[-1] in self._stop for ids in seen["completion_ids"]], device="cpu"),
            **{f"rewards/{name}": values for name, values in parts.items()},
        }
        if paths is not None:
            of_each |= {"order_log_prob": paths.log_prob, "order_base_log_prob": paths.base_log_prob}
        groups = {name: value.unflatten(0, (len(tokens), -1)) for name, value in of_each.items()}
        given = {"states": states, "attention_mask": attention_mask, "start": batch["start"], "exact": exact}
        return unstacked({**given, **groups})

    def _rewarded(self, batch: dict[str, Any], final: Tensor, repeats: int) -> tuple[Outcomes, Rewarded]:
        """What reward functions see of a batch that was filled in, and its rewards [B * repeats]."""
        seen = outcomes(batch, final, repeats, self._stop)
        with self._timing.part("reward"):
            rewarded = self._rewards(seen, self.state, lambda ids: decoded(batch, ids, self.processing_class))
        return seen, rewarded

    def _replayed(self) -> tuple[Group, Tensor]:
        """This micro-step's and process's share of the groups of a step, and what names the draws of each, int64 [G].

        With draw_outcomes a group is one outcome, drawn from all of the step. Where groups are fewer than parts would
        share equally, parts are filled up with some that count for nothing there: the step is that of one part.
        """
        args, replay = self.args, self.progress.replay
        parts = args.gradient_accumulation_steps * args.world_size
        part = self.progress.micro_step % args.gradient_accumulation_steps * args.world_size + args.process_index
        generator = self._generator(_Draw.REPLAY)
        places = replay.choose(args.replay_batch_size, parts, generator)
        distinct = len(places.unique())  # the first ones
        of_all = slice(part - args.process_index, part - args.process_index + args.world_size)  # parts, in this pass
        if args.draw_outcomes is None:
            names = torch.arange(places.numel(), device="cpu").view(parts, -1)[part]
            groups = replay.batch(places[part], list(places[of_all]))
            # In this order: a truth times a number would be of the default dtype.
            groups["weight"] = groups["weight"] * (names < distinct)[:, None] * (places.numel() / distinct)
            return groups, names
        weight = replay.weights(places.flatten()[:distinct])
        drawn, each = drawn_outcomes(weight, args.draw_outcomes * parts, generator=generator)
        names = torch.arange(len(drawn), device="cpu").view(parts, -1)[part]
        chosen, wanted = drawn[names], places.flatten()[drawn.view(parts, -1) // weight.shape[1]]
        groups = replay.batch(wanted[part], list(wanted[of_all]))
        member = (chosen % weight.shape[1])[:, None]
        for name in ("final", "position", "call"):
            if name in groups:
                groups[name] = groups[name].take_along_dim(member[..., None], dim=1)
        groups["first"], groups["weight"] = groups["first"].gather(1, member), each[names][:, None]
        return groups, names

    def _targets(self, groups: Group, names: Tensor) -> MatchingTargets:
        """What the loss of groups from the replay buffer matches; their draws are those of `names` [G]."""
        targets = self._estimated(groups, names)
        return without_ended(targets, self._stop, groups["start"]) if self._stop else targets

    def _estimated(self, groups: Group, names: Tensor) -> MatchingTargets:
        if self.args.normalizer == "state":
            return self._at_states(groups, names)
        groups, row_ids = self._replicated(groups, names)
        exact = groups["exact"]  # as drawn: a run that is resumed may have other diffusion_steps
        return joined(
            [
                (targets({name: value[of] for name, value in groups.items()}, row_ids[of]), of)
                for targets, of in ((self._at_outcomes, exact), (self._on_paths, ~exact))
                if bool(of.any())
            ]
        )

    def _replicated(self, groups: Group, names: Tensor) -> tuple[Group, Tensor]:
        """Groups with each trajectory num_replicates times, one after another, and ids of all [G, K num_replicates]."""
        size, times = groups["weight"].shape[1], self.args.num_replicates
        row_ids = names[:, None] * size + torch.arange(size, device="cpu")
        if times == 1:
            return groups, row_ids
        groups = {
            name: value.repeat(1, times, *[1] * (value.dim() - 2)) if name in _OF_TRAJECTORIES else value
            for name, value in groups.items()
        }
        number = torch.arange(times, device="cpu").repeat_interleave(size)
        return groups, row_ids.repeat(1, times) * times + number

    def _of_exact_chain(self, states: Tensor) -> Tensor:
        """Which groups, that begin at states [G, L], have a position filled by each call, in no blocks: bool [G]."""
        masks = self.process.masked(states).sum(dim=1)
        if self._in_blocks:
            return torch.zeros_like(masks, dtype=torch.bool)
        return masks <= (self.args.diffusion_steps or masks)

    def _at_states(self, groups: Group, names: Tensor) -> MatchingTargets:
        states, final, first, weight = (groups[name] for name in ("states", "final", "first", "weight"))
        seed = self._seed(_Draw.TARGETS)
        return state_targets(self.args.estimator, states, final, first, weight, self.process, seed=seed, row_ids=names)

    def _at_outcomes(self, groups: Group, row_ids: Tensor) -> MatchingTargets:
        """At outcomes re-masked."""
        final, weight, seed = groups["final"], groups["weight"], self._seed(_Draw.TARGETS)
        initial, antithetic = groups["states"][:, None].expand_as(final), self.args.antithetic
        remasked = self.process.remask(
            initial, final, seed=seed, row_ids=row_ids, stratified=True, antithetic=antithetic
        )
        if antithetic:  # states without masks are among them, and count for nothing
            masks = self.process.masked(groups["states"]).sum(dim=1, keepdim=True)
            weight = weight * (masks + 1) / masks
        return group_targets(self.args.estimator, remasked, final, weight, self.process, seed=seed, row_ids=row_ids)

    def _on_paths(self, groups: Group, row_ids: Tensor) -> MatchingTargets:
        """At the states that the network was called at."""
        paths = path_of(groups["states"], groups["final"], groups["position"], groups["call"])
        seed = self._seed(_Draw.TARGETS)
        return path_targets(paths, groups["weight"], whole_calls=True, seed=seed, row_ids=row_ids.flatten())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The matching loss on groups from the replay buffer, after a rollout where one is due."""
        if return_outputs:
            raise ValueError("DAMTrainer.compute_loss has no outputs to return")
        if self._begin_pass():
            self._refill(model, inputs)
        groups, names = self._replayed()
        targets = self._targets(groups, names)
        device = self.args.device
        mask = groups["attention_mask"][targets.group].to(device)
        with self._dropout(_Draw.DROPOUT):
            self.progress.micro_step += 1
            scaler = getattr(self.accelerator, "scaler", None)  # of fp16=True
            scale = 1.0 if scaler is None else scaler.get_scale()
            return estimator_loss(
                self._denoiser(model),
                targets.to(device),
                self.process,
                mask,
                temperature=self.args.temperature,
                gradient_scale=scale,
            )

    def _what_runs(self, checkpoint: str | bool | None) -> dict[str, Any]:
        return {**super()._what_runs(checkpoint), "reward functions": ", ".join(names_of(self.reward_funcs))}

    def _check_run(self, checkpoint: str | None) -> None:
        self._check_datasets()
        if checkpoint is not None:
            self._check_parts(checkpoint)

    def _clear(self) -> None:
        super()._clear()
        self._told.clear()
        self._compared = False

    def _check_kept(self, groups: list[Group], checkpoint: str) -> None:
        check_groups(groups, checkpoint, self.args.num_generations, self._keeps_paths)

    def _check_parts(self, checkpoint: str) -> None:
        """That as many processes saved a checkpoint as DeepSpeed needs."""
        if not self.is_deepspeed_enabled:
            return check_checkpoint(checkpoint, None)
        config: Any = self.accelerator.state.deepspeed_plugin.deepspeed_config
        universal = config.get("checkpoint", {}).get("load_universal", False)
        return check_checkpoint(checkpoint, self.args.world_size, universal)

    def _part_steps(self) -> None:
        """Once DeepSpeed has loaded a checkpoint."""
        if self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            # In stage 0 it is the optimizer itself.
            with_own_steps(getattr(engine.optimizer, "optimizer", engine.optimizer))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As a `ResumableTrainer`'s, of a model that FSDP2 has divided too."""
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            self._write_card(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _facts(self) -> card.Facts:
        args, history = self.args, self.state.log_history
        names = names_of(self.reward_funcs)
        weights = zip(names, args.reward_weights or [1.0] * len(names), strict=True)
        run = {
            "reward functions": ", ".join(f"`{name}` (weight {weight:g})" for name, weight in weights),
            "beta": f"{args.beta:g}",
            "estimator, normalizer": f"{args.estimator}, {args.normalizer}",
            "trajectories per prompt": f"{args.num_generations}",
            "budget": card.budget(self.reward_calls, history),
            "seed": f"{args.seed}",
        }
        if args.null_arm:
            run["null arm"] = "weights permuted within each group: a control, whose gain is not the reward's doing"
        return self._facts_with(_METHOD, run, _OF_CARD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As `Trainer._load_from_checkpoint`, from a model that FSDP2 divided to a whole one and back."""
        if fsdp.is_divided(resume_from_checkpoint) == self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.is_fsdp_enabled:
            fsdp.load_whole_weights(self.model, resume_from_checkpoint)
        else:
            fsdp.load_divided_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `_load_from_checkpoint`."""
        scheduler = os.path.join(checkpoint or "", SCHEDULER_NAME)
        if checkpoint is None or fsdp.is_divided(checkpoint) == self.is_fsdp_enabled or not os.path.isfile(scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load = fsdp.load_whole_optimizer if self.is_fsdp_enabled else fsdp.load_divided_optimizer
        load(self.model, self.optimizer, checkpoint)
        scheduled: Any = self.lr_scheduler
        scheduled.load_state_dict(torch.load(scheduler, weights_only=True))

    def _check_datasets(self) -> None:
        """Before any work: a row that would end the run later."""
        self._lengths_differ, masks = check_rows(self._reader, self.train_dataset, "training")
        self.args.check_steps(masks)
        if self.args.eval_strategy != "no" or self.args.eval_on_start:
            given: Any = self.eval_dataset
            for name, dataset in given.items() if isinstance(given, dict) else [("", given)]:
                seen = check_rows(self._reader, dataset, f"evaluation {name!r}" if name else "evaluation")
                self._lengths_differ = self._lengths_differ or seen.lengths_differ

    def _log(self, logs: dict[str, float], start_time: float | None) -> None:
        super()._log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            self._tell_findings()
            if self._completions is not None:
                self._show_completions(self._completions)

    def _tell_findings(self) -> None:
        """Why the run does not learn, each once."""
        for name, message in diagnostics.findings(self.state.log_history):
            if name not in self._told:
                self._told.add(name)
                warnings.warn(f"step {self.state.global_step}, {name}: {message}", stacklevel=2)

    def _show_completions(self, completions: Completions) -> None:
        args, step = self.args, self.state.global_step
        if args.log_unique_prompts:
            completions = completions.of_unique_prompts()
        printed = completions.some(args.num_completions_to_print, [args.seed, step])
        show(printed.as_text(f"step {step}"))
        if "wandb" in (args.report_to or ()):
            completions.to_wandb(step)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Fills in the evaluation prompts once each; logs and returns their mean reward and `compute_metrics`.

        Decoding is set by eval_temperature, eval_remasking, eval_threshold, eval_top_k, eval_top_p and eval_guidance.
        What is drawn for a prompt depends on its place in the dataset, not on the batch; each evaluation draws the
        same, unless eval_redraw is set. These reward calls are not counted in reward_calls.
        """
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _evaluated(self, loader: Any, prefix: str) -> dict[str, float]:
        return self._filled_in(loader, prefix)[0]

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Fills in prompts once each, as `evaluate` does, and returns the token ids; logs nothing.

        Returns:
            PredictionOutput(predictions int64 [N, L], label_ids int64 [N, L] or None, metrics): whole sequences, filled
            up with the token that ended a completion, and with -100 on the left of shorter ones. Labels are None where
            there are none, or others than of tokens.
        """
        metrics, predictions, labels = self._filled_in(self.get_test_dataloader(test_dataset), metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=predictions, label_ids=labels, metrics=metrics)

    def _filled_in(self, loader: Any, prefix: str) -> tuple[dict[str, float], np.ndarray, Any]:
        """Prompts filled in: metrics (mean reward, `compute_metrics`, time), and tokens and labels [N, L]."""
        start = time.time()
        seed = self._seed(_Draw.EVALUATION, step=None if self.args.eval_redraw else 0)
        rewards: list[Tensor] = []
        failed: list[Failed] = []
        kept: dict[str, list[np.ndarray]] = {"final": [], "input_ids": [], "labels": []}
        label_kinds: list[np.ndarray] = []
        with self._averaged(), self.sampler.evaluating(self.model):
            for batch in each_in_step(loader):
                self._compare(batch)
                final = self.sampler.rollout(
                    self.model,
                    batch["input_ids"],
                    batch["attention_mask"],
                    seed=seed,
                    row_ids=batch["number"],
                    decoding=self.args.decoding,
                    stop_tokens=self._stop,
                    start=batch["start"],
                ).final
                _, (reward, _, lost) = in_step(functools.partial(self._rewarded, batch, final, 1))
                failed += lost
                rewards.append(self.accelerator.gather_for_metrics(reward.to(final.device)).cpu())
                label_kinds.append(self.accelerator.gather_for_metrics(batch["label_kind"]).cpu().numpy())
                for name, parts in kept.items():
                    value = {**batch, "final": final}[name]
                    value = self.accelerator.pad_across_processes(value, dim=1, pad_index=-100, pad_first=True)
                    parts.append(self.accelerator.gather_for_metrics(value).cpu().numpy())
        if not rewards:
            raise ValueError("there are no rows to fill in: the dataset is empty")
        predictions, inputs = stacked(kept["final"]), stacked(kept["input_ids"])
        labels: Any = label_ids(kept["labels"], label_kinds)
        reward = torch.cat(rewards)
        metrics = {f"{prefix}_reward": _mean(reward)}
        if self._rewards.isolated:
            metrics[f"{prefix}_rewards/failed"] = float(reward.isnan().double().mean())
            if failed:
                warnings.warn(f"reward functions failed in evaluation: {told_failures(failed)}", stacklevel=2)
        if self.compute_metrics is not None:
            prediction = EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs)
            found = in_step(functools.partial(self.compute_metrics, prediction))
            metrics.update({f"{prefix}_{k}": v for k, v in found.items()})
        metrics.update(speed_metrics(prefix, start, num_samples=len(predictions)))
        return metrics, predictions, labels


def _multiple(args: DAMConfig, denoiser: Denoiser) -> int:
    """What prompt and completion together are a multiple of.

    Raises:
        ValueError: whole blocks are asked for of a model that has none, counted from the sequence's start.
    """
    blocks = blocks_of(denoiser)
    if not args.whole_blocks:
        return 1
    if blocks is None or blocks.origin != "sequence":
        raise ValueError(
            "whole_blocks is for models whose attention has blocks from the sequence's start (SDAR, LLaDA 2)"
        )
    return blocks.length


def _own(of_orders: Tensor, kept: Tensor, drawn_by_model: int) -> Tensor:
    """Of a sample of each group [G, N, M] those that the model drew and that are kept, [number, M]."""
    own = of_orders[:, :drawn_by_model]
    return own[kept[:, : own.shape[1]]]


def _in_place_of_dropped(kept: Tensor) -> tuple[Tensor, Tensor]:
    """A trajectory for each place of a group: those that are kept at theirs, and in turn at those of the others.

    So that what is trained on, and drawn from the replay buffer, holds no other, and groups stay as large.

    Args:
        kept: bool [G, K], one at least in each group.

    Returns:
        Which, int64 [G, K], and by how much to multiply its weight, [G, K]: a trajectory counts in the mean over K
        places, at all its own together, as in the mean over the kept ones.
    """
    size = kept.shape[1]
    count = kept.sum(dim=1, keepdim=True)
    in_turn = (~kept).long().argsort(dim=1, stable=True).gather(1, ((~kept).cumsum(dim=1) - 1) % count)
    member = torch.where(kept, torch.arange(size, device=kept.device), in_turn)
    places = torch.zeros_like(member).scatter_add(1, member, torch.ones_like(member)).gather(1, member)
    return member, size / (count * places).float()  # of two integers it would be of the default dtype


def _to_show(seen: list[tuple[list[Any], list[Any]]], figures: Group) -> Completions:
    """Prompts and completions of each process, with rewards and weights [G, K] of all."""
    prompts, completions = ([each for part in parts for each in part] for parts in zip(*seen, strict=True))
    shown = {n.removeprefix("rewards/"): value for n, value in figures.items() if n.startswith("rewards/")}
    if len(shown) > 1:
        shown["reward"] = figures["reward"]
    shown["weight"] = figures["weight"]
    return Completions(prompts, completions, {name: value.flatten().tolist() for name, value in shown.items()})


def _mean(rewards: Tensor) -> float:
    """Over outcomes that are not forbidden (-inf) and that a function applies to (not NaN); -inf if there are none."""
    counted = rewards[rewards > -torch.inf]
    if counted.numel() > 0:
        return float(counted.mean())
    return math.nan if bool(rewards.isnan().all()) else -math.inf


def _std(rewards: Tensor) -> float:
    """As `_mean`, of the standard deviation; 0 of less than two."""
    counted = rewards[rewards > -torch.inf]
    return float(counted.std()) if counted.numel() > 1 else 0.0


def _lengths(completion_ids: list[list[int]], behind_a_prompt: Tensor, repeats: int) -> Tensor:
    """Tokens of each completion, float64 [B * repeats]; NaN of a sequence that was given as input_ids."""
    lengths = torch.tensor([float(len(ids)) for ids in completion_ids], dtype=torch.float64, device="cpu")
    return torch.where(behind_a_prompt.cpu().repeat_interleave(repeats), lengths, torch.nan)


def _reward_figures(rolled_out: Group, drawn_by_model: int) -> dict[str, float]:
    """What the log says of rewards and lengths, by TRL's names; NaN where there is nothing to tell.

    Args:
        rolled_out: tensors [G, K] of groups.
        drawn_by_model: of each group the first ones, which alone are counted.
    """
    own = {name: value[:, :drawn_by_model] for name, value in rolled_out.items() if value.dim() == 2}
    reward, length = own["reward"], own["length"]
    lowest = torch.where(reward.isnan(), torch.inf, reward).amin(dim=1)
    highest = torch.where(reward.isnan(), -torch.inf, reward).amax(dim=1)
    figures = {
        "reward": _mean(reward),
        "reward_std": _std(reward),
        "frac_reward_zero_std": float((lowest == highest).double().mean()),
    }
    for name in (name for name in own if name.startswith("rewards/")):
        figures |= {f"{name}/mean": _mean(own[name]), f"{name}/std": _std(own[name])}
    known = ~length.isnan()
    ended = own["terminated"][known].bool()
    for kind, lengths in (("", length[known]), ("terminated_", length[known][ended])):
        if lengths.numel() > 0:
            for of, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
                figures[f"completions/{of}_{kind}length"] = float(value)
    if ended.numel() > 0:
        figures["completions/clipped_ratio"] = float((~ended).double().mean())
    return figures


def _loaded(model: Any, kwargs: Any) -> Any:
    """The model, by its name too.

    Raises:
        ValueError: arguments to load it with, and nothing to load.
    """
    if isinstance(model, str):
        return loaded(model, kwargs or {})
    if kwargs:
        raise ValueError("model_init_kwargs go with a model that is given by name; this one is loaded already")
    return model
