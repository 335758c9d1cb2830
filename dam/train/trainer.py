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
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, PredictionOutput, speed_metrics

from dam import diagnostics
from dam.adjoint import (
    MatchingTargets,
    drawn_outcomes,
    estimator_loss,
    group_targets,
    path_targets,
    state_targets,
    tilted_weights,
    without_ended,
)
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import blocks_of, check_left_padding
from dam.models.families import as_denoiser
from dam.rollout import PathLogProbs, blocks_for, path_of
from dam.train.base import DenoiserFactory, with_base
from dam.train.callbacks import UpdateBegun
from dam.train.config import DAMConfig
from dam.train.data import (
    Collator,
    NumberedRows,
    PromptSampler,
    Stream,
    check_rows,
    decoded,
    is_stream,
    label_ids,
    outcomes,
    stacked,
)
from dam.train.processes import each_in_step, in_step, is_shared, together
from dam.train.progress import Progress, last_checkpoint
from dam.train.replay import Group, ReplayBuffer, stacked_groups, unstacked
from dam.train.rewards import Outcomes, RewardFunction, Rewards
from dam.train.rows import RowReader
from dam.train.sampling import Sampler
from dam.train.terminal import show
from dam.train.tokens import limits_of, special_tokens


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


class DAMTrainer(Trainer):
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
    `prompt`, to which `max_completion_length` masks are appended: a string, token ids, or a conversation, messages
    {"role": ..., "content": ...} that go through the tokenizer's chat template. An `attention_mask` of token ids is
    kept. All other columns go to the reward functions, and must not have the names of what these are given besides.
    `labels` may be anything; integers, one for each token (behind a prompt, for the completion's first ones), also go
    to `compute_metrics`, -100 where a row has none. Datasets in memory, and those of `datasets` on disk, are looked
    through before the first step (`dam.train.data.check_rows` says what that costs); rows of others when they come. An
    iterable dataset is read by one process and no workers, pass after pass, each row once a pass; set max_steps.

    A completion ends with the first of `stop_token_ids`, the tokenizer's end-of-text token unless given: what follows
    is neither decoded nor rewarded, and trained on only in states that do not show the end yet
    (`dam.adjoint.without_ended` says why). A sequence given as `input_ids` has no end. Once nothing is masked in front
    of the end, no more network calls are spent on a row, and its rest is filled up with that token: in evaluation, and
    in training with diffusion_steps, block_length or a model that has blocks. Other training re-masks whole outcomes.

    Never drawn are the mask token, `suppress_tokens`, and ids that processing_class does not have, for which many heads
    have rows: rollouts, the base's log-probabilities and the loss are all of the distribution without them.

    The base draws the last `base_generations` trajectories of each group; what is logged of rewards and KL is of the
    model's own.

    Logged: reward and its standard deviation, tilt (the step h toward the optimum), reward_calls, the mean of each
    reward function, and `dam.diagnostics.diagnose`: ess, ess_path, clip_fraction, adjoint_mean, kl_path (KL(p_model ||
    p_base) per prompt of trajectories up to where they end, the order of unmasking included), kl_outcome (of outcomes,
    estimated with a bias: `dam.diagnostics.kl_outcome`), order_variance (of the log ratio between orders at one
    outcome) and split_half. kl_outcome and order_variance come from order_samples trajectories of each group by a
    second order, or from all by num_orders.

    What is drawn for a trajectory depends on (args.seed, step, row of the dataset, number of the trajectory in its
    group, position) only: not on rollout_batch_size, gradient accumulation or the number of processes, as long as the
    prompts and groups of a step are as many. Dropout alone is drawn for each forward pass in training. So a resumed run
    continues to the same result.

    Args:
        model: a masked language model with `get_output_embeddings()`, or a name for `from_pretrained`, or a
            `dam.models.Denoiser`. Models with code of their own (trust_remote_code) are loaded before, by AutoModel or
            AutoModelForCausalLM as their makers say. Before the first rollout a language model's own logits are
            compared with those that the fused operations would train (`dam.models.MaskedLM`).
        reward_funcs: one or more plain Python functions `f(prompts, completions, completion_ids, **columns)` that
            return a number per completion (None: does not apply; -inf: forbidden). With `prompt`, a completion is
            what follows the prompt; with `input_ids`, the whole sequence filled in, less what attention_mask hides.
            Decoded with processing_class if there is one, else lists of token ids; behind a conversation a message,
            [{"role": "assistant", "content": text}], which a last message of the assistant begins, as in TRL.
        args: a `DAMConfig`.
        train_dataset, eval_dataset: rows as above.
        processing_class: tokenizer, for string prompts, conversations and decoded completions. What it puts behind a
            text, [SEP] for one, is not put between prompt and completion.
        callbacks, optimizers, compute_metrics: as for `transformers.Trainer`; `compute_metrics` receives
            EvalPrediction(predictions=filled-in token ids, label_ids=labels, inputs=input_ids). label_ids is None
            where there are no labels, or others than of tokens among them.
        peft_config: trains an adapter (extra `peft`).
        ref_model: the base model. Unless given it is the model as it is now: a frozen copy, or of a PEFT model, whether
            by peft_config or given as one, with an adapter that was trained before, the model itself with a copy of its
            trainable parameters, be they adapters, biases (bias="all"), modules_to_save or tokens. So a run that is
            resumed must be given the model that it began with.
        denoiser: makes a `dam.models.Denoiser` of the model, as accelerate has wrapped it, and of the base; to set an
            option of its family, `functools.partial(dam.models.as_denoiser, block_length=8)`. A model of
            your own that has hidden_states() and head() needs none, and is taken at its word: it has no other logits
            to be compared with.

    Raises:
        ValueError, TypeError: bad arguments, a model whose law they do not fit, or a bad row, which is named with its
            column, before any work.
        RewardError: a reward function misbehaves in training, or a completion cannot be decoded. The rollouts are
            written to output_dir/failed_rollouts.pt.

    Before this or any other error (not KeyboardInterrupt) ends a run that has begun, a checkpoint is saved, so that it
    can be resumed, to the same result; but not in the middle of an update of the weights. Of several processes one that
    fails in the network's own work, out of memory for one, leaves the last checkpoint that was saved: saving needs all.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Alg. 1; estimators in `dam.adjoint`.
    """

    args: DAMConfig
    model: Any  # a module; transformers types it loosely

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DAMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        ref_model: nn.Module | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        denoiser: DenoiserFactory = as_denoiser,
    ):
        args = DAMConfig(output_dir="dam_output") if args is None else args
        if not isinstance(args, DAMConfig):
            raise TypeError(f"args must be a DAMConfig; got {type(args).__name__}")
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: other columns go to the reward functions")
        network: Any = AutoModelForMaskedLM.from_pretrained(model) if isinstance(model, str) else model
        self._rewards = Rewards(reward_funcs, args.reward_weights, str(args.output_dir))
        self.reward_funcs = self._rewards.functions
        limits = limits_of(network)
        own = denoiser(network)  # raises where the model does not fit
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
        template: Any = args.chat_template_kwargs
        self._reader = RowReader(tokens.mask, args.max_completion_length, processing_class, limits, template)
        self._denoiser = denoiser
        self._on_paths = args.on_paths
        if blocks_of(own) is not None:
            blocks_for(own, args.block_length)  # raises where they are others
            args.check_on_paths("a model whose attention has blocks goes")
            self._on_paths = True
        network, base = with_base(network, ref_model, peft_config)
        _check_dtype(network)
        self.sampler = Sampler(denoiser, self.process, args, base, self._precision)
        self.progress = Progress(ReplayBuffer(args.replay_size, tokens.pad))
        self._example: tuple[Any, Any, float] | None = None
        self._compared = self._lengths_differ = False
        _keep_batches_whole(args.accelerator_config)
        super().__init__(
            model=network,
            args=args,
            data_collator=Collator(self._reader, tokens.pad),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a mean over states: the Trainer divides it by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False
        self._update = UpdateBegun()
        self.add_callback(self._update)
        base.to(self.args.device)

    def _precision(self) -> Any:
        """Context manager: the precision that accelerate has put around the trained model's forward pass.

        No casts of weights are kept in it: one made without a gradient would serve a training step in the same context.
        """
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    @property
    def reward_calls(self) -> int:
        """Completions rewarded in training so far, over all processes."""
        return self.progress.reward_calls

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        accumulated = args.gradient_accumulation_steps
        batch_size = self._train_batch_size * accumulated * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return PromptSampler(len(dataset), batch_size, accumulated * args.num_iterations, seed)

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, **options: Any
    ) -> Any:
        """As `Trainer._get_dataloader`, of numbered rows; a batch in training has the prompts of a whole step."""
        name, args = description.lower(), self.args
        training = name == "training"
        if training:
            batch_size *= args.gradient_accumulation_steps
        if is_stream(dataset):
            _check_stream(args, name)
            repeats = args.gradient_accumulation_steps * args.num_iterations
            rows: Any = Stream(dataset, name, batch_size, repeats) if training else Stream(dataset, name)
        else:
            rows = NumberedRows(dataset, name)
        sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        options.pop("dataloader_key", None)  # by which persistent workers would evaluate an earlier dataset again
        return super()._get_dataloader(rows, description, batch_size, sampler, **options)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; a row that cannot be read in one process ends all."""
        return in_step(functools.partial(super().get_batch_samples, *args, **kwargs))

    def _seed(self, purpose: _Draw, *more: int, step: int | None = None) -> int:
        """64 bits from the run's seed, the step (this one unless given) and a purpose: nothing to save or share."""
        entropy = [self.args.seed, self.state.global_step if step is None else step, purpose, *more]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _generator(self, purpose: _Draw) -> torch.Generator:
        """For what is drawn on all processes alike."""
        return torch.Generator("cpu").manual_seed(self._seed(purpose) % 2**63)

    def _compare(self, batch: dict[str, Any]) -> None:
        """What the model and its base say with what is trained and sampled: once, when a run starts."""
        if not self._compared:
            self.sampler.compare(self.model, batch["input_ids"], batch["attention_mask"])
            if self._lengths_differ:  # so that some are padded, if not in this batch
                padded = F.pad(batch["attention_mask"], (1, 0))
                for model in (self._denoiser(self.model), self.sampler.base(self.model)):
                    check_left_padding(model, padded)
            self._compared = True

    # Training

    def _refill(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Rollouts of all processes, rewarded, weighted and put into the replay buffer, which is the same on each."""
        given = together(lambda: self._rolled_out(model, batch))
        groups = stacked_groups([group for groups in given for group in groups], self.progress.replay.pad_token)
        in_step(functools.partial(self._weigh, groups))

    def _weigh(self, rolled_out: Group) -> None:
        """Puts groups with their weights into the replay buffer, and figures of them into the log."""
        args = self.args
        log_ratio, reward = rolled_out["log_ratio"], rolled_out["reward"]
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
        )
        told = diagnostics.diagnose(
            weights,
            log_ratio,
            rolled_out["final"],
            self.process.masked(rolled_out["states"]),
            orders=None if orders is None else PathLogProbs(*(each[:, :drawn_by_model] for each in orders)),
            from_base=from_base,
            generator=self._generator(_Draw.DIAGNOSTICS),
        )
        weight = weights.weight.float()
        if args.null_arm:
            weight = diagnostics.permuted(weight, self._generator(_Draw.NULL_ARM))
        kept = [
            "states",
            "final",
            "first",
            "attention_mask",
            "start",
            *(["position", "call"] if self._on_paths else []),
        ]
        self.progress.replay.extend({"weight": weight, **{name: rolled_out[name] for name in kept}})
        self.progress.reward_calls += reward.numel()
        reward = reward[:, :drawn_by_model]
        finite = reward[reward > -torch.inf]  # what is not forbidden
        parts = {n: value[:, :drawn_by_model] for n, value in rolled_out.items() if n.startswith("rewards/")}
        self.progress.record(
            reward=_mean(reward),
            reward_std=float(finite.std()) if finite.numel() > 1 else 0.0,
            tilt=float(step.mean()),
            # Nothing to correlate is no figure.
            **{name: value for name, value in told._asdict().items() if not math.isnan(value)},
            **{name: _mean(value) for name, value in parts.items()},
        )

    def _rolled_out(self, model: nn.Module, batch: dict[str, Any]) -> list[Group]:
        """A group of rewarded trajectories for each prompt of this process."""
        args, size = self.args, self.args.num_generations
        tokens, attention_mask, number = batch["input_ids"], batch["attention_mask"], batch["number"]
        seed = self._seed(_Draw.ROLLOUT)
        # Re-masked outcomes are states of the exact chain only where all of them was drawn.
        stop_tokens = self._stop if self._on_paths else ()
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
                base=True,
                from_base=from_base,
                temperature=args.temperature,
                stop_tokens=stop_tokens,
                start=batch["start"].repeat_interleave(size),
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
        seen, reward, parts = self._rewarded(batch, trajectories.final, size)
        best = int(torch.where(from_base.to(reward.device), -torch.inf, reward).argmax())
        self._example = (seen["prompts"][best], seen["completions"][best], float(reward[best]))
        of_each = {
            "final": trajectories.final,
            "first": trajectories.position[:, 0],
            "position": trajectories.position,
            "call": trajectories.call,
            "log_ratio": trajectories.log_ratio,
            "reward": reward,
            **{f"rewards/{name}": values for name, values in parts.items()},
        }
        if paths is not None:
            of_each |= {"order_log_prob": paths.log_prob, "order_base_log_prob": paths.base_log_prob}
        groups = {name: value.unflatten(0, (len(tokens), -1)) for name, value in of_each.items()}
        return unstacked({"states": states, "attention_mask": attention_mask, "start": batch["start"], **groups})

    def _rewarded(
        self, batch: dict[str, Any], final: Tensor, repeats: int
    ) -> tuple[Outcomes, Tensor, dict[str, Tensor]]:
        """What reward functions see of a batch that was filled in, its rewards [B * repeats], and each function's."""
        seen = outcomes(batch, final, repeats, self._stop)
        reward, parts = self._rewards(
            seen, self.state.global_step, lambda ids: decoded(batch, ids, self.processing_class)
        )
        return seen, reward, parts

    def _replayed(self) -> tuple[Group, Tensor]:
        """This micro-step's and process's share of the groups of a step, and what names the draws of each, int64 [G].

        With draw_outcomes a group is one outcome, drawn from all of the step.
        """
        args, replay = self.args, self.progress.replay
        parts = args.gradient_accumulation_steps * args.world_size
        part = self.progress.micro_step % args.gradient_accumulation_steps * args.world_size + args.process_index
        generator = self._generator(_Draw.REPLAY)
        places = replay.choose(args.replay_batch_size, parts, generator)
        if args.draw_outcomes is None:
            return replay.batch(places[part]), torch.arange(places.numel(), device="cpu").view(parts, -1)[part]
        weight = replay.batch(places.flatten())["weight"]
        drawn, each = drawn_outcomes(weight, args.draw_outcomes * parts, generator=generator)
        names = torch.arange(len(drawn), device="cpu").view(parts, -1)[part]
        chosen = drawn[names]
        groups = replay.batch(places.flatten()[chosen // weight.shape[1]])
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
        seed, args = self._seed(_Draw.TARGETS), self.args
        states, final, weight = groups["states"], groups["final"], groups["weight"]
        if args.normalizer == "state":
            return state_targets(
                args.estimator, states, final, groups["first"], weight, self.process, seed=seed, row_ids=names
            )
        size = weight.shape[1]
        row_ids = names[:, None] * size + torch.arange(size, device="cpu")
        if self._on_paths:
            paths = path_of(states, final, groups["position"], groups["call"])
            return path_targets(paths, weight, whole_calls=True, seed=seed, row_ids=row_ids.flatten())
        initial = states[:, None].expand_as(final)
        remasked = self.process.remask(initial, final, seed=seed, row_ids=row_ids, stratified=True)
        return group_targets(args.estimator, remasked, final, weight, self.process, seed=seed, row_ids=row_ids)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The matching loss on groups from the replay buffer, after a rollout where one is due."""
        if return_outputs:
            raise ValueError("DAMTrainer.compute_loss has no outputs to return")
        progress = self.progress
        self._evaluate_if_due()
        progress.begin(self.state.global_step)
        due = self.state.global_step % self.args.num_iterations == 0 or len(progress.replay) == 0
        if progress.micro_step == 0 and due:
            self._refill(model, inputs)
        groups, names = self._replayed()
        targets = self._targets(groups, names)
        dropout_seed = self._seed(_Draw.DROPOUT, progress.micro_step, self.args.process_index)
        progress.micro_step += 1
        device = self.args.device
        mask = groups["attention_mask"][targets.group].to(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed)
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

    def _evaluate_if_due(self) -> None:
        """Before the next step: what an error cut short."""
        if self.progress.evaluation_due:
            self.evaluate()
            self.progress.evaluation_due = False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer._run_epoch`, which asks only after a step whether it was the last: a resumed run may have it."""
        if self.state.global_step >= self.state.max_steps:
            self._evaluate_if_due()
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint to resume from in {self.args.output_dir!r}")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("no parameter of the model is trainable")
        self._check_datasets()
        self.progress.clear()
        self._compared = False
        if resume_from_checkpoint:
            self.progress.load(str(resume_from_checkpoint), self.args.num_generations, self._on_paths)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        except Exception as error:
            self._save_before(error)
            raise

    def _check_datasets(self) -> None:
        """Before any work: a row that would end the run later."""
        self._lengths_differ = check_rows(self._reader, self.train_dataset, "training")
        if self.args.eval_strategy != "no" or self.args.eval_on_start:
            given: Any = self.eval_dataset
            for name, dataset in given.items() if isinstance(given, dict) else [("", given)]:
                several = check_rows(self._reader, dataset, f"evaluation {name!r}" if name else "evaluation")
                self._lengths_differ = self._lengths_differ or several

    def _save_before(self, ending: Exception) -> None:
        """A checkpoint of a run that an error ends, of where the step that failed began, or of between two steps."""
        step = self.state.global_step
        # Nothing is done yet, or weights may be half-way through an update.
        if not self.progress.has_begun or self._update.step == step:
            return
        if not is_shared(ending):  # as of no memory: the other processes may be elsewhere, and saving needs them
            warnings.warn(f"no checkpoint of step {step} was saved: other processes may not have failed", stacklevel=2)
            return
        self.progress.go_back(step, evaluation_due=self.control.should_evaluate)
        try:
            self._save_checkpoint(self.model, trial=None)
        except Exception as error:  # the error that ends the run is the one to raise
            warnings.warn(f"no checkpoint of step {step} could be saved: {type(error).__name__}: {error}", stacklevel=2)

    def _load_best_model(self) -> None:
        self._update.step = self.state.global_step  # from here on the weights are those of another step
        super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.progress.save(os.path.join(self._get_output_dir(trial=trial), name))
        # Writes the trainer's state last, and only then removes older checkpoints.
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the rollouts since the last log."""
        in_step(functools.partial(self._log, logs, start_time))

    def _log(self, logs: dict[str, float], start_time: float | None) -> None:
        of_training = "loss" in logs
        if of_training:
            logs = {**logs, **self.progress.take_metrics(), "reward_calls": self.reward_calls}
        super().log(logs, start_time)
        if of_training and self.args.log_completions and self._example is not None and self.is_world_process_zero():
            prompt, completion, reward = self._example
            show(f"prompt: {prompt}\ncompletion: {completion}\nreward: {reward:.4g}")

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Fills in the evaluation prompts once each; logs and returns their mean reward and `compute_metrics`.

        Decoding is set by eval_temperature, eval_remasking, eval_threshold, eval_top_k, eval_top_p and eval_guidance.
        What is drawn for a prompt depends on its place in the
        dataset, not on the batch; each evaluation draws the same, unless eval_redraw is set. These reward calls are not
        counted in reward_calls.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        metrics, _, _ = self._filled_in(self.get_eval_dataloader(dataset), metric_key_prefix)
        metrics["reward_calls"] = self.reward_calls
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        kept: dict[str, list[np.ndarray]] = {"final": [], "input_ids": [], "labels": []}
        label_kinds: list[np.ndarray] = []
        with self.sampler.evaluating(self.model):
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
                _, reward, _ = in_step(functools.partial(self._rewarded, batch, final, 1))
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
        metrics = {f"{prefix}_reward": _mean(torch.cat(rewards))}
        if self.compute_metrics is not None:
            prediction = EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs)
            found = in_step(functools.partial(self.compute_metrics, prediction))
            metrics.update({f"{prefix}_{k}": v for k, v in found.items()})
        metrics.update(speed_metrics(prefix, start, num_samples=len(predictions)))
        return metrics, predictions, labels


def _mean(rewards: Tensor) -> float:
    """Over outcomes that are not forbidden (-inf) and that a function applies to (not NaN); -inf if there are none."""
    counted = rewards[rewards > -torch.inf]
    if counted.numel() > 0:
        return float(counted.mean())
    return math.nan if bool(rewards.isnan().all()) else -math.inf


def _keep_batches_whole(accelerator_config: Any) -> None:
    """A batch is read by the process that uses it: accelerate can send and cut tensors, and not lists of columns.

    Raises:
        ValueError: told otherwise.
    """
    if accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config: dispatch_batches must be False: batches hold more than tensors")
    if accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config: split_batches must be False: per_device_train_batch_size is of each process"
        )
    accelerator_config.dispatch_batches = False  # None sends those of an iterable dataset, if only to this process


def _check_stream(args: DAMConfig, name: str) -> None:
    """An iterable dataset is read in one place, once.

    Raises:
        ValueError: several processes or workers would read it.
    """
    cure = "make it a list or a map-style dataset"
    if args.world_size > 1:
        raise ValueError(
            f"the {name} dataset is iterable: {args.world_size} processes would share its rows by luck; {cure}"
        )
    if args.dataloader_num_workers > 0:
        raise ValueError(
            f"the {name} dataset is iterable: each of {args.dataloader_num_workers} workers would read all of it; set "
            f"dataloader_num_workers=0, or {cure}"
        )


def _check_dtype(network: nn.Module) -> None:
    """That what is trained can be: an update of Adam's in float16 divides by an epsilon that is 0 there.

    Raises:
        ValueError: names the first parameter in float16.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is to be trained in float16, whose range gradients and Adam's epsilon leave: load the model "
                "in float32 and set fp16=True, or load it in bfloat16"
            )
