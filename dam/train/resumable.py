"""Runs of `transformers.Trainer` that rollouts feed, and that lose nothing: what trainers here have in common."""

from __future__ import annotations

import abc
import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from dam.files import usual_modes
from dam.train import card
from dam.train.arguments import OF_ONE_PROCESS
from dam.train.average import WeightAverage, check_average
from dam.train.callbacks import OnBegin, RolloutProgress, UpdateBegun
from dam.train.data import NumberedRows, PromptSampler, Stream, is_stream, outline
from dam.train.lifelines import Lifelines
from dam.train.processes import agree, in_step, is_shared
from dam.train.progress import Progress, last_checkpoint
from dam.train.releases import BaseTrainer, precision_of
from dam.train.replay import Group
from dam.train.terminal import no_bars_in_pipes
from dam.train.timing import PARTS, Timing, waiter


class ResumableTrainer(BaseTrainer):
    """`transformers.Trainer` for runs in which a rollout feeds several training steps.

    What is drawn is keyed by (args.seed, step, what for, row), so that there is nothing of it to save. A run that is
    killed, or that an error ends, goes on from a checkpoint to the same result: beside what transformers saves there
    are the counts, what is kept of rollouts, figures that are not logged yet (`Progress`) and averaged weights.

    Args:
        model: that is trained, as a module.
        args: `TrainingArguments` with ema_decay, shuffle_dataset, prompts_per_rollout and steps_per_rollout.
        progress: what the run keeps beyond what transformers does.
        parts, drawn: what `Timing` tells apart, and counts.
        names: that model and base were loaded from, "" if they were made.
        given: of `transformers.Trainer`.

    Raises:
        ValueError: arguments do not go together, or several processes are to work on the same rows.
    """

    args: Any
    model: Any  # a module; transformers types it loosely

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        progress: Progress,
        *,
        parts: Sequence[str] = PARTS,
        drawn: str = "tokens",
        names: tuple[str, str] = ("", ""),
        **given: Any,
    ):
        self.progress = progress
        self._names = names
        self._network = model
        self._alone = False  # whether this process saves a checkpoint without the others
        _keep_batches_whole(args.accelerator_config)
        with precision_of(args):
            super().__init__(model=model, args=args, **given)
        # The loss is a mean over states: the Trainer divides it by gradient_accumulation_steps.
        self.model_accepts_loss_kwargs = False
        self._update = UpdateBegun()
        self.add_callback(self._update)
        # One callback: of two of a class transformers warns.
        self.add_callback(OnBegin(self._begun))
        self._average: WeightAverage | None = None
        if args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("ema_decay does not go with FSDP or DeepSpeed, whose parameters are divided: set None")
            self._average = WeightAverage(model, args.ema_decay)
            self.add_callback(self._average)
        self._timing = Timing(waiter(self.args.device), parts=parts, drawn=drawn)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RolloutProgress())

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, for processes that each train on rows of their own."""
        super().create_accelerator_and_postprocess()
        check_parallelism(self.accelerator, type(self).__name__)

    def _begun(self) -> None:
        """When a run begins or goes on, before its first step."""
        self._evaluate_at_the_end()

    def _precision(self) -> Any:
        """Context manager: the precision that accelerate has put around the trained model's forward pass.

        No casts of weights are kept in it: one made without a gradient would serve a training step in the same context.
        """
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    @property
    def reward_calls(self) -> int:
        """Completions, or states of flows, rewarded in training so far, over all processes."""
        return self.progress.reward_calls

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batch_size = args.prompts_per_rollout * args.world_size
        steps = max(1, len(dataset) // batch_size * args.steps_per_rollout)  # of an epoch
        return PromptSampler(
            len(dataset),
            batch_size,
            args.gradient_accumulation_steps * args.steps_per_rollout,
            seed if args.shuffle_dataset else None,
            lambda: self.state.global_step // steps,
        )

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, **options: Any
    ) -> Any:
        """As `Trainer._get_dataloader`, of numbered rows; a batch in training has the prompts of a whole rollout."""
        name, args = description.lower(), self.args
        training = name == "training"
        if training:
            batch_size = args.prompts_per_rollout
        if is_stream(dataset):
            _check_stream(args, name)
            repeats = args.gradient_accumulation_steps * args.steps_per_rollout
            rows: Any = Stream(dataset, name, batch_size, repeats) if training else Stream(dataset, name)
        else:
            rows = NumberedRows(dataset, name)
        sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        options.pop("dataloader_key", None)  # by which persistent workers would evaluate an earlier dataset again
        return super()._get_dataloader(rows, description, batch_size, sampler, **options)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`; a row that cannot be read in one process ends all."""
        return in_step(functools.partial(super().get_batch_samples, *args, **kwargs))

    def _seed(self, purpose: int, *more: int, step: int | None = None) -> int:
        """64 bits from the run's seed, the step (this one unless given) and a purpose: nothing to save or share."""
        entropy = [self.args.seed, self.state.global_step if step is None else step, purpose, *more]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _generator(self, purpose: int) -> torch.Generator:
        """For what is drawn on all processes alike."""
        return torch.Generator("cpu").manual_seed(self._seed(purpose) % 2**63)

    # Training

    def _begin_pass(self) -> bool:
        """At the start of a forward and backward pass: whether it is to begin with a rollout."""
        progress, step = self.progress, self.state.global_step
        self._evaluate_if_due()
        progress.begin(step)
        self._timing.begin(step)
        return progress.micro_step == 0 and (step % self.args.steps_per_rollout == 0 or len(progress.replay) == 0)

    @contextlib.contextmanager
    def _dropout(self, purpose: int) -> Iterator[None]:
        """Context manager: what modules draw is of this pass and process; nothing of it is left."""
        seed = self._seed(purpose, self.progress.micro_step, self.args.process_index)
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _evaluate_if_due(self) -> None:
        """Before the next step: what an error cut short."""
        if self.progress.evaluation_due:
            self.evaluate()
            self.progress.evaluation_due = False

    def _evaluate_at_the_end(self) -> None:
        """Where a run that is resumed has no step left, before which it would be: at an epoch's end there is none."""
        if self.state.global_step >= self.state.max_steps:
            self._evaluate_if_due()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer._run_epoch`, which asks only after a step whether it was the last: a resumed run may have it."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the last checkpoint that is whole.

        Raises:
            OtherProcessError: another process has failed; it says which and why.
        """
        lifelines = Lifelines()
        lifelines.begin()
        try:
            return self._train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            failure = lifelines.failure(error)
            if isinstance(failure, Exception):
                self._save_before(failure)
            lifelines.leave(failure)
            if failure is error:
                raise
            raise failure from error
        finally:
            lifelines.close()

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint to resume from in {self.args.output_dir!r}")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("no parameter of the model is trainable")
        agree(self._what_runs(resume_from_checkpoint or None))
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._check_run(checkpoint)
        self._clear()
        if checkpoint is not None:
            self.progress.load(checkpoint, self._check_kept)
            check_average(checkpoint, self.args.ema_decay)
            if self._average is not None:
                self._average.load(checkpoint)
            self._load_beside(checkpoint)
        result = super().train(resume_from_checkpoint or None, *args, **kwargs)
        if self._average is not None:
            self._average.finish()
        return result

    def _check_run(self, checkpoint: str | None) -> None:
        """Before any work: what would end the run later.

        Args:
            checkpoint: that it goes on from, if any.
        """

    def _clear(self) -> None:
        """As at the start of a run."""
        self.progress.clear()
        self._timing.clear()

    def _load_beside(self, checkpoint: str) -> None:
        """What else of a checkpoint the run goes on from."""

    def _check_kept(self, groups: list[Group], checkpoint: str) -> None:
        """That the run can go on with what a checkpoint has kept for its next steps."""

    def _what_runs(self, checkpoint: str | bool | None) -> dict[str, Any]:
        """All that must be the same in every process, by name."""
        given: Any = self.eval_dataset
        evaluated = given if isinstance(given, dict) else {"": given}
        rows = {"train_dataset": self.train_dataset, **{f"eval_dataset {n}".strip(): d for n, d in evaluated.items()}}
        return {
            **{name: value for name, value in self.args.to_dict().items() if name not in OF_ONE_PROCESS},
            "checkpoint": os.path.basename(str(checkpoint)),
            **{name: outline(dataset) for name, dataset in rows.items()},
        }

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the model has its averaged weights, where there are such."""
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As `Trainer._save`; others may read the weights where they may read the rest."""
        modes = usual_modes(output_dir or str(self.args.output_dir)) if self.args.should_save else None
        with no_bars_in_pipes(), modes or contextlib.nullcontext():
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; with ema_decay the averages. Beside them a model card, if nobody has written one."""
        with self._averaged():
            super().save_model(output_dir, _internal_call)
        if not _internal_call:  # not of a checkpoint
            self._write_card(output_dir)

    def _write_card(self, output_dir: str | None = None, **metadata: Any) -> None:
        if self.args.should_save:
            card.write(output_dir or str(self.args.output_dir), self._facts(), **metadata)

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override]
        """The card that `save_model` writes, in output_dir, as `push_to_hub` asks for it.

        Args:
            metadata: of `huggingface_hub.ModelCardData`: license, language, tags, model_name, datasets, ...
        """
        given = {name: value for name, value in metadata.items() if value is not None}
        tags = given.pop("tags", ())
        self._write_card(tags=[tags] if isinstance(tags, str) else list(tags), **given)

    @abc.abstractmethod
    def _facts(self) -> card.Facts:
        """What the model's card tells."""

    def _facts_with(self, method: card.Method, run: dict[str, str], figures: Sequence[str]) -> card.Facts:
        """Those of the trainer, and what all runs have."""
        model = self.accelerator.unwrap_model(self.model)
        # Of a module of somebody's own the weights alone are saved, which no library loads.
        library = "transformers" if isinstance(model, PreTrainedModel) else None
        if getattr(model, "peft_config", None) is not None:
            library = "peft"
        title = Path(str(self.args.output_dir)).resolve().name
        return card.Facts(title, method, *self._names, library, run, figures, self.state.log_history)

    def _save_before(self, ending: Exception) -> None:
        """A checkpoint of a run that an error ends, of where the step that failed began, or of between two steps."""
        step = self.state.global_step
        # Nothing is done yet, or weights may be half-way through an update.
        if not self.progress.has_begun or self._update.step == step:
            return
        alone = not is_shared(ending)  # the other processes are elsewhere, or gone
        if alone and (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.progress.replay.is_shared):
            last = last_checkpoint(str(self.args.output_dir))
            warnings.warn(
                f"no checkpoint of step {step} was saved, as each process has but its part of the run: "
                + ("there is none that is whole" if last is None else f"the last that is whole is {last}"),
                stacklevel=2,
            )
            return
        if alone and not self.args.should_save:
            return
        self.progress.go_back(step, evaluation_due=self.control.should_evaluate)
        strategy = self.args.save_strategy
        try:
            self._alone = alone
            if alone:
                self.args.save_strategy = SaveStrategy.NO  # by others all wait for each other where one may be the best
            self._save_checkpoint(self.model, trial=None)
        except Exception as error:  # the error that ends the run is the one to raise
            warnings.warn(f"no checkpoint of step {step} could be saved: {type(error).__name__}: {error}", stacklevel=2)
        finally:
            self._alone, self.args.save_strategy = False, strategy

    def store_flos(self) -> None:
        """As `Trainer.store_flos`, which sums over processes; what this one counts waits for the next checkpoint."""
        if not self._alone:
            super().store_flos()

    def _load_best_model(self) -> None:
        self._update.step = self.state.global_step  # from here on the weights are those of another step
        super()._load_best_model()
        if self._average is not None:
            self._average.forget()  # those of the best step are loaded

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = os.path.join(self._get_output_dir(trial=trial), name)
        save = functools.partial(self.progress.save, folder, self.args.process_index, self.args.world_size)
        if self.progress.replay.is_shared:
            in_step(save)  # all parts are written before what makes a checkpoint whole
        elif self.args.should_save:
            save()
        if self.args.should_save and self._average is not None:
            self._average.save(folder)
        # Writes the trainer's state last, and only then removes older checkpoints.
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the rollouts since the last log."""
        in_step(functools.partial(self._log, logs, start_time))

    def _log(self, logs: dict[str, float], start_time: float | None) -> None:
        if "loss" in logs:  # of training
            times = self._timing.take(self.state.global_step, self.state.max_steps)
            logs = {**logs, **self.progress.take_metrics(), "reward_calls": self.reward_calls, **times}
        super().log(logs, start_time)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs and returns the figures of a dataset's rows, or of each dataset's in a dict; see the trainer's own."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        with self._timing.part("evaluation"):
            metrics = self._evaluated(self.get_eval_dataloader(dataset), metric_key_prefix)
        metrics["reward_calls"] = self.reward_calls
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @abc.abstractmethod
    def _evaluated(self, loader: Any, prefix: str) -> dict[str, float]:
        """The figures of an evaluation."""


def check_parallelism(accelerator: Any, trainer: str) -> None:
    """That each process trains on rows of its own.

    Raises:
        ValueError: several processes are to train on the same rows, or on parts of one.
    """
    config = getattr(accelerator, "parallelism_config", None)  # of accelerate before 1.10 there is none
    for name in ("tp", "cp", "sp"):
        size = getattr(config, f"{name}_size", 1) or 1
        if size > 1:
            raise ValueError(
                f"{trainer} draws and trains rows of its own in each process; {name}_size = {size} has several work "
                "on the same: divide the model by FSDP2 or DeepSpeed, or call the operations, which take a head that "
                "tensor parallelism divides (docs/scale.md)"
            )


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


def _check_stream(args: Any, name: str) -> None:
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
