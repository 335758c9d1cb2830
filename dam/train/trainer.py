"""DAMTrainer: Discrete Adjoint Matching on `transformers.Trainer`."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, speed_metrics

from dam import diagnostics
from dam.adjoint import estimator_loss, group_targets, state_targets, tilted_weights
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import MaskedLM
from dam.rollout import Trajectories, rollout
from dam.train.config import DAMConfig
from dam.train.replay import ReplayBuffer
from dam.train.rewards import RewardError, RewardFunction, total_reward

_STATE = "dam_state.pt"
_SEQUENCES = ("input_ids", "attention_mask", "labels")


class _Draw(enum.IntEnum):
    """What a step draws at random; each has a stream of its own."""

    WAY = 0  # how to a partly filled-in state
    STATE = 1
    ROLLOUT = 2
    NULL_ARM = 3
    REPLAY = 4
    REMASK = 5
    DROPOUT = 6
    DIAGNOSTICS = 7


class PromptSampler(torch.utils.data.Sampler[int]):
    """Shuffled prompts, each global batch of them `repeats` times in a row: once per training step it feeds."""

    def __init__(self, num_prompts: int, batch_size: int, repeats: int, seed: int):
        if num_prompts < batch_size:
            raise ValueError(f"the train dataset has {num_prompts} prompts, fewer than the {batch_size} of one rollout")
        self._num_prompts, self._batch_size, self._repeats, self._seed = num_prompts, batch_size, repeats, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_prompts // self._batch_size * self._batch_size * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._num_prompts)
        for start in range(0, len(self) // self._repeats, self._batch_size):
            for _ in range(self._repeats):
                yield from order[start : start + self._batch_size].tolist()


class DAMTrainer(Trainer):
    """Fine-tunes a masked-diffusion model toward a reward that nobody differentiates, staying close to a base.

        min over the model of  E[-reward(X_1)] + beta KL(p_model || p_base)

    A training step: prompts -> rollouts -> rewards -> weights (`dam.adjoint.tilted_weights`) -> replay buffer ->
    re-masked states -> hidden states -> `dam.linear_matching_loss`. No step holds a [batch, length, V] array.

    Shorter sequences of a batch are padded on the left. A model whose positions are absolute and counted over padding
    too (BERT's) then sees other positions: give it sequences of one length. Rotary and RoBERTa's positions are fine.

    The dataset has a column `input_ids`, token ids with the mask token wherever something is to be filled in, or
    `prompt`, a string or token ids to which `max_completion_length` masks are appended. All other columns go to
    the reward functions. `labels`, if present, also goes to `compute_metrics`.

    Logged: reward and its standard deviation, tilt (the step h toward the optimum), reward_calls, the mean of each
    reward function, and `dam.diagnostics.diagnose`: ess, ess_path, clip_fraction, adjoint_mean, kl (an estimate of
    KL(p_model || p_base) per prompt) and split_half.

    Every random choice depends on (args.seed, step) only, so a resumed run continues to the same result.

    Args:
        model: a masked language model with `get_output_embeddings()`, or a name for `from_pretrained`.
        reward_funcs: one or more plain Python functions `f(prompts, completions, completion_ids, **columns)` that
            return a number per completion (None: does not apply; -inf: forbidden). With `prompt`, a completion is
            what follows the prompt; with `input_ids`, the whole sequence filled in. Decoded with
            processing_class if there is one, else lists of token ids.
        args: a `DAMConfig`.
        train_dataset, eval_dataset: rows as above.
        processing_class: tokenizer, for string prompts and decoded completions.
        callbacks, optimizers, compute_metrics: as for `transformers.Trainer`; `compute_metrics` receives
            EvalPrediction(predictions=filled-in token ids, label_ids=labels, inputs=input_ids).
        peft_config: trains an adapter (extra `peft`); the base is then the model with its adapter switched off.
        ref_model: the base model; a frozen copy of `model` unless given.

    Raises:
        ValueError, TypeError: bad arguments, before any work.
        RewardError: a reward function misbehaves in training. Its rollouts are written to
            output_dir/failed_rollouts.pt and a checkpoint is saved, so the run can be resumed.

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
    ):
        args = DAMConfig(output_dir="dam_output") if args is None else args
        if not isinstance(args, DAMConfig):
            raise TypeError(f"args must be a DAMConfig; got {type(args).__name__}")
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: other columns go to the reward functions")
        network: Any = model
        if isinstance(model, str):
            network = AutoModelForMaskedLM.from_pretrained(model)
        self.reward_funcs: list[RewardFunction] = (
            list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]  # type: ignore[list-item]
        )
        if not self.reward_funcs or not all(callable(f) for f in self.reward_funcs):
            raise TypeError("reward_funcs must be a function or a non-empty list of functions")
        self._reward_weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(self._reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one entry per reward function, {len(self.reward_funcs)}; "
                f"got {len(self._reward_weights)}"
            )
        sources = (processing_class, getattr(network, "config", None))
        mask_token = args.mask_token_id
        for source in sources:
            if mask_token is None:
                mask_token = getattr(source, "mask_token_id", None)
        if mask_token is None:
            raise ValueError("the mask token is not known: set mask_token_id in DAMConfig")
        self.process = MaskedCTMC(mask_token)
        # Padding must not look like something to fill in; any other token does, attention_mask being 0 there.
        self._pad_token = int(mask_token == 0)
        for source in reversed(sources):
            pad_token = getattr(source, "pad_token_id", None)
            if pad_token is not None and pad_token != mask_token:
                self._pad_token = pad_token
        MaskedLM(network)  # raises where the model does not fit

        if peft_config is not None:
            if ref_model is not None:
                raise ValueError("with peft_config the base is the model without its adapter: leave ref_model out")
            try:
                from peft import get_peft_model
            except ImportError as error:
                raise ImportError("peft_config needs peft: pip install 'discrete-adjoint-matching[peft]'") from error
            network = get_peft_model(network, peft_config)
        if ref_model is None and not hasattr(network, "disable_adapter"):
            ref_model = copy.deepcopy(network)
        self._ref_model = None if ref_model is None else ref_model.eval().requires_grad_(False)

        self.reward_calls = 0
        self._micro_step = 0
        self._evaluation_failed = False
        self._step_began: dict[str, Any] | None = None
        self._metrics: dict[str, list[float]] = collections.defaultdict(list)
        self._example: tuple[Any, Any, float] | None = None
        self._replay = ReplayBuffer(args.replay_size, self._pad_token)
        super().__init__(
            model=network,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a mean over states: the Trainer divides it by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False
        if self._ref_model is not None:
            self._ref_model.to(self.args.device)

    # Data

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Sequences padded on the left into tensors; what reward functions see beside them under `columns`."""
        prepared = [self._prepared(row) for row in rows]
        length = max(len(row["input_ids"]) for row in prepared)
        fill = {"input_ids": self._pad_token, "attention_mask": 0, "labels": -100}
        batch: dict[str, Any] = {}
        for name in _SEQUENCES:
            if all(name in row for row in prepared):
                batch[name] = torch.tensor(
                    [[fill[name]] * (length - len(row[name])) + list(map(int, row[name])) for row in prepared]
                )
        names = set().union(*(row.keys() for row in prepared)) - {"input_ids", "attention_mask"}
        batch["columns"] = {name: [row.get(name) for row in prepared] for name in sorted(names)}
        return batch

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)
        if "input_ids" not in row:
            if "prompt" not in row:
                raise ValueError(f"a dataset row needs input_ids or prompt; this one has {sorted(row)}")
            prompt = row["prompt"]
            if isinstance(prompt, str):
                tokenizer: Any = self.processing_class
                if tokenizer is None:
                    raise ValueError("string prompts need a tokenizer: pass processing_class")
                prompt = tokenizer(prompt)["input_ids"]
            row["input_ids"] = [*prompt, *[self.process.mask_token] * self.args.max_completion_length]
            row["prompt_length"] = len(prompt)
        row["attention_mask"] = [1] * len(row["input_ids"])
        return row

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        return PromptSampler(len(dataset), batch_size, self.args.num_iterations, self.args.seed)

    def _seed(self, purpose: _Draw) -> int:
        """64 bits from the run's seed, the step, the process and a purpose: nothing to save, nothing shared."""
        entropy = [self.args.seed, self._micro_step, self.args.process_index, purpose]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _generator(self, purpose: _Draw) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose) % 2**63)

    # Rollouts

    @contextlib.contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[None]:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            model.train(was_training)

    def _base(self) -> MaskedLM:
        return MaskedLM(self.model, adapter=False) if self._ref_model is None else MaskedLM(self._ref_model)

    def _rollout(
        self, tokens: Tensor, attention_mask: Tensor, seed: int, *, base: bool, **options: Any
    ) -> Trajectories:
        """`dam.rollout.rollout` in pieces of rollout_batch_size."""
        size = self.args.rollout_batch_size
        pieces = []
        for n, start in enumerate(range(0, len(tokens), size)):
            part = slice(start, start + size)
            pieces.append(
                rollout(
                    MaskedLM(self.model),
                    tokens[part],
                    self.process,
                    base=self._base() if base else None,
                    attention_mask=attention_mask[part],
                    steps=self.args.diffusion_steps,
                    block_length=self.args.block_length,
                    seed=seed + n,
                    **options,
                )
            )
        return Trajectories.concatenate(pieces)

    def _texts(self, batch: dict[str, Any], final: Tensor, repeats: int) -> dict[str, Any]:
        """Prompts, completions and columns as reward functions take them, each prompt `repeats` times."""
        columns = {name: [v for v in values for _ in range(repeats)] for name, values in batch["columns"].items()}
        mask = batch["attention_mask"].repeat_interleave(repeats, dim=0)
        initial = batch["input_ids"].repeat_interleave(repeats, dim=0)
        lengths = columns.pop("prompt_length", [None] * len(final))
        given = columns.pop("prompt", [None] * len(final))
        prompts, completion_ids = [], []
        for row, (length, prompt) in enumerate(zip(lengths, given, strict=True)):
            start = int((mask[row] == 0).sum())
            kept = final[row, start:].tolist()
            completion_ids.append(kept if length is None else kept[length:])
            prompts.append(initial[row, start:].tolist() if prompt is None else prompt)
        completions: list[Any] = completion_ids
        if self.processing_class is not None:
            tokenizer: Any = self.processing_class
            completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}

    def _rewards(self, texts: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """`total_reward`; the rollouts are kept in a file if a function misbehaves."""
        try:
            return total_reward(self.reward_funcs, self._reward_weights, **texts)
        except RewardError as error:
            path = os.path.join(str(self.args.output_dir), "failed_rollouts.pt")
            os.makedirs(str(self.args.output_dir), exist_ok=True)
            torch.save({"step": self.state.global_step, **texts}, path)
            raise RewardError(f"{error}. The rollouts of step {self.state.global_step} are kept in {path}") from error

    def _refill(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """One batch of rollouts, rewarded, weighted and put into the replay buffer."""
        args, size = self.args, self.args.num_generations
        tokens, attention_mask = batch["input_ids"], batch["attention_mask"]
        with self._evaluating(model):
            states = tokens
            if args.normalizer == "state":
                seed = self._seed(_Draw.WAY)
                way = self._rollout(tokens, attention_mask, seed, base=False, temperature=args.temperature)
                generator = self._generator(_Draw.STATE)
                states = self.process.remask(tokens.cpu(), way.final.cpu(), generator).to(tokens.device)
            trajectories = self._rollout(
                states.repeat_interleave(size, dim=0),
                attention_mask.repeat_interleave(size, dim=0),
                self._seed(_Draw.ROLLOUT),
                base=True,
                temperature=args.temperature,
            )
        groups = len(tokens)
        texts = self._texts(batch, trajectories.final, size)
        flat, means = self._rewards(texts)
        reward = flat.view(groups, size)
        log_ratio = trajectories.log_ratio.view(groups, size, -1)
        weights, step = tilted_weights(
            log_ratio.cpu(), reward, beta=args.beta, ess=args.target_ess, max_tilt=args.max_tilt, clip=args.clip
        )
        final = trajectories.final.view(groups, size, -1)
        told = diagnostics.diagnose(
            weights,
            log_ratio.cpu(),
            final.cpu(),
            self.process.masked(states).cpu(),
            generator=self._generator(_Draw.DIAGNOSTICS),
        )
        weight = weights.weight.float()
        if args.null_arm:
            weight = diagnostics.permuted(weight, self._generator(_Draw.NULL_ARM))
        self._replay.extend(
            {
                "states": states,
                "final": final,
                "first": trajectories.position[:, 0].view(groups, size),
                "weight": weight,
                "attention_mask": attention_mask,
            }
        )
        self.reward_calls += reward.numel() * args.world_size
        finite = reward[reward > -torch.inf]
        self._record(
            reward=float(finite.mean()) if finite.numel() else -math.inf,
            reward_std=float(finite.std()) if finite.numel() > 1 else 0.0,
            tilt=float(step.mean()),
            # Nothing to correlate is no figure.
            **{name: value for name, value in told._asdict().items() if not math.isnan(value)},
            **{f"rewards/{name}": value for name, value in means.items()},
        )
        best = int(flat.argmax())
        self._example = (texts["prompts"][best], texts["completions"][best], float(flat[best]))

    def _record(self, **values: float) -> None:
        for name, value in values.items():
            self._metrics[name].append(value)

    # Training

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The matching loss on groups from the replay buffer, after a rollout where one is due."""
        if return_outputs:
            raise ValueError("DAMTrainer.compute_loss has no outputs to return")
        if self._evaluation_failed:  # before this step: do over what a reward function cut short
            self._evaluation_failed = False
            self.evaluate()
        if self._step_began is None or self._step_began["step"] != self.state.global_step:
            self._step_began = {"step": self.state.global_step, **self._progress()}
        if self._micro_step % self.args.num_iterations == 0 or len(self._replay) == 0:
            self._refill(model, inputs)
        batch = self._replay.sample(self.args.replay_batch_size, self._generator(_Draw.REPLAY))
        attention_mask = batch["attention_mask"]
        generator = self._generator(_Draw.REMASK)
        if self.args.normalizer == "state":
            targets = state_targets(
                self.args.estimator,
                batch["states"],
                batch["final"],
                batch["first"],
                batch["weight"],
                self.process,
                generator=generator,
            )
        else:
            initial = batch["states"][:, None].expand_as(batch["final"])
            targets = group_targets(
                self.args.estimator,
                self.process.remask(initial, batch["final"], generator),
                batch["final"],
                batch["weight"],
                self.process,
                draw=self.args.draw_outcomes,
                generator=generator,
            )
        dropout_seed = self._seed(_Draw.DROPOUT)
        self._micro_step += 1
        device = self.args.device
        mask = attention_mask[targets.group].to(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed)
            return estimator_loss(MaskedLM(model), targets.to(device), self.process, mask)

    def _progress(self) -> dict[str, Any]:
        """All that a run has beyond what Trainer saves."""
        return {
            "micro_step": self._micro_step,
            "reward_calls": self.reward_calls,
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "replay": self._replay.state_dict(),
            "evaluation_failed": self._evaluation_failed,
        }

    def _set_progress(self, state: dict[str, Any]) -> None:
        self._micro_step, self.reward_calls = state["micro_step"], state["reward_calls"]
        self._metrics.clear()
        self._metrics.update(state["metrics"])
        self._replay.load_state_dict(state["replay"])
        self._evaluation_failed = state["evaluation_failed"]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint to resume from in {self.args.output_dir!r}")
        self._micro_step, self.reward_calls = 0, 0
        self._step_began, self._evaluation_failed = None, False
        self._metrics.clear()
        if resume_from_checkpoint:
            path = os.path.join(str(resume_from_checkpoint), _STATE)
            if not _is_whole(str(resume_from_checkpoint)):
                raise ValueError(f"{str(resume_from_checkpoint)!r} is no whole DAMTrainer checkpoint")
            self._set_progress(torch.load(path, weights_only=True))
        else:
            self._replay.load_state_dict({"groups": []})
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        except RewardError:
            # Back to where the step that failed began, to go on from there. An evaluation fails between steps.
            if self._step_began is not None and self._step_began["step"] == self.state.global_step:
                self._set_progress(self._step_began)
            else:
                self._evaluation_failed = True
            self._save_checkpoint(self.model, trial=None)
            raise

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            if os.path.exists(os.path.join(folder, TRAINER_STATE_NAME)):
                os.remove(os.path.join(folder, TRAINER_STATE_NAME))  # not whole until it is written again
            torch.save(self._progress(), os.path.join(folder, _STATE))
        # Writes the trainer's state last, and only then removes older checkpoints.
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the rollouts since the last log."""
        if "loss" in logs:
            logs = {**logs, **{name: float(np.nanmean(values)) for name, values in self._metrics.items()}}
            logs["reward_calls"] = self.reward_calls
            self._metrics.clear()
            if self.args.log_completions and self._example is not None and self.is_world_process_zero():
                prompt, completion, reward = self._example
                print(f"prompt: {prompt}\ncompletion: {completion}\nreward: {reward:.4g}")
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Fills in the evaluation prompts once each; logs and returns their mean reward and `compute_metrics`.

        Decoding is set by eval_temperature and eval_remasking. These reward calls are not counted in reward_calls.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        start = time.time()
        rewards: list[Tensor] = []
        finals: list[np.ndarray] = []
        initials: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        with self._evaluating(self.model):
            for batch in self.get_eval_dataloader(dataset):
                final = self._rollout(
                    batch["input_ids"],
                    batch["attention_mask"],
                    self.args.seed,
                    base=False,
                    temperature=self.args.eval_temperature,
                    order=self.args.eval_remasking,
                ).final
                reward, _ = self._rewards(self._texts(batch, final, 1))
                rewards.append(self.accelerator.gather_for_metrics(reward.to(final.device)).cpu())
                for kept, value in ((finals, final), (initials, batch["input_ids"]), (labels, batch.get("labels"))):
                    if value is not None:
                        value = self.accelerator.pad_across_processes(value, dim=1, pad_index=-100, pad_first=True)
                        kept.append(self.accelerator.gather_for_metrics(value).cpu().numpy())
        metrics = {f"{metric_key_prefix}_reward": float(torch.cat(rewards).mean())}
        if self.compute_metrics is not None:
            known: Any = _stack(labels) if labels else None
            prediction = EvalPrediction(predictions=_stack(finals), label_ids=known, inputs=_stack(initials))
            metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self.compute_metrics(prediction).items()})
        count = sum(map(len, rewards))
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=count))
        metrics["reward_calls"] = self.reward_calls
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _stack(batches: list[np.ndarray]) -> np.ndarray:
    """Batches [n, L] of different length, padded on the left with -100 as Trainer does."""
    length = max(batch.shape[1] for batch in batches)
    padded = [np.pad(batch, ((0, 0), (length - batch.shape[1], 0)), constant_values=-100) for batch in batches]
    return np.concatenate(padded)


def last_checkpoint(output_dir: str) -> str | None:
    """The last whole checkpoint in `output_dir`, or None. One that a kill cut short is passed over."""
    found = []
    if os.path.isdir(output_dir):
        for name in os.listdir(output_dir):
            prefix, _, step = name.rpartition("-")
            path = os.path.join(output_dir, name)
            if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() and _is_whole(path):
                found.append((int(step), path))
    return max(found)[1] if found else None


def _is_whole(path: str) -> bool:
    """Whether a checkpoint has all its files: the trainer's state, one JSON object, is written last."""
    try:
        with open(os.path.join(path, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return os.path.exists(os.path.join(path, _STATE))
