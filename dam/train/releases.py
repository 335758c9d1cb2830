"""What `DAMTrainer` and `DAMConfig` need of transformers, whatever its release: 4.49 and later.

A private method that a release never calls is overridden in vain, without a word. So what a release lacks is here,
under the names of 5.x; and what none of this replaces is looked for when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.state import AcceleratorState, is_initialized
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments, training_args
from transformers.trainer_utils import seed_worker

OLDEST = (4, 49)  # as in pyproject.toml


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def check_release(release: str) -> None:
    """That a release of transformers was tried or is newer.

    Raises:
        ImportError: it is older.
    """
    if _number(release) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"dam.train needs transformers {oldest} or later; {release} is installed")


check_release(transformers.__version__)


def loaded(name: str, options: Mapping[str, Any]) -> Any:
    """The masked language model of that name, in float32 unless options say another dtype.

    As TRL does: what is trained in 16 bits loses small steps.
    """
    given = dict(options)
    dtype = given.pop("dtype", given.pop("torch_dtype", torch.float32))
    return AutoModelForMaskedLM.from_pretrained(name, **dtype_argument(dtype), **given)


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """A dtype as `from_pretrained` takes it."""
    return {"dtype" if _number(transformers.__version__) >= (4, 56) else "torch_dtype": dtype}


def fields_of_json(arguments: type[TrainingArguments]) -> Sequence[str]:
    """The fields that a command line gives as JSON. Of 4.49 they are listed in its module, where none can be added."""
    return getattr(arguments, "_VALID_DICT_FIELDS", ())


def read_json(value: Any) -> Any:
    """What a command line gave as JSON, as `TrainingArguments` reads it, where it did not (4.49): see above."""
    if not (isinstance(value, str) and value.startswith("{")):
        return value
    return training_args._convert_str_dict(json.loads(value))


_PRECISION = "ACCELERATE_MIXED_PRECISION"


@contextlib.contextmanager
def precision_of(arguments: TrainingArguments) -> Iterator[None]:
    """Context manager: the mixed precision of these arguments is in the environment, and not afterwards.

    4.x puts it there as they are made, for the accelerator of their trainer to find; left there, it would be that of
    all arguments made later in the process. 5.x keeps it in the arguments.
    """
    if _number(transformers.__version__) >= (5, 0):
        yield
        return
    before, own = os.environ.get(_PRECISION), getattr(arguments, "_dam_precision", None)
    if own is not None:
        os.environ[_PRECISION] = own
    try:
        yield
    finally:
        arguments._dam_precision = os.environ.pop(_PRECISION, None)  # type: ignore[attr-defined]
        if before is not None:
            os.environ[_PRECISION] = before


# Private methods that DAMTrainer overrides, or calls, in every release.
OVERRIDDEN = ("_get_train_sampler", "_load_best_model", "_save_checkpoint")
CALLED = ("_get_output_dir",)


class _DataLoaders:
    """One method that makes the loaders of all datasets, for releases before 4.52, where each has one of its own."""

    args: Any
    accelerator: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    _train_batch_size: int
    _get_train_sampler: Callable[[Any], Any]
    _get_eval_sampler: Callable[[Any], Any]

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        return self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, self._get_train_sampler, is_training=True
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._get_dataloader(dataset, "Evaluation", self.args.eval_batch_size, self._get_eval_sampler)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._get_dataloader(test_dataset, "test", self.args.eval_batch_size, self._get_eval_sampler)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
    ) -> Any:
        """As 5.x makes it of a dataset that is none of `datasets`, whose columns it would look at."""
        args = self.args
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            options["sampler"] = None if sampler_fn is None else sampler_fn(dataset)
            options["drop_last"] = args.dataloader_drop_last
            if is_training:
                options["worker_init_fn"] = seed_worker
        return self.accelerator.prepare(torch.utils.data.DataLoader(dataset, **options))


class _NoStepBeyond:
    """An epoch that begins behind the last step has none, for releases where an epoch is no method to override.

    4.49 to 5.0 do a step more when they resume a run that has done all of them.
    """

    state: Any
    control: Any
    _is_beyond = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._is_beyond = self.state.global_step >= self.state.max_steps
        if self._is_beyond:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Of such an epoch's end there is nothing to log, evaluate or save."""
        return None if self._is_beyond else super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]


class _PrecisionOfModel:
    """Mixed precision is what accelerate puts around the model, and around nothing else, as in 5.x.

    On a CPU, 4.x puts it around all of compute_loss too, and keeps casts of weights in it: those that a rollout makes,
    without a gradient, would serve the training step.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; accelerate has one precision for all trainers, and only 5.x tells it which is asked for.

        Raises:
            ValueError: the one it has is another.
        """
        asked = os.environ.get(_PRECISION, "no")
        if is_initialized() and AcceleratorState().mixed_precision != asked:
            raise ValueError(
                f"mixed_precision is {AcceleratorState().mixed_precision!r} in this process, by a trainer made after "
                f"these arguments, which ask for {asked!r}: make the arguments of a trainer after the one before"
            )
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return contextlib.nullcontext()


def _fitted(trainer: type) -> type:
    """A release's Trainer with what it lacks.

    Raises:
        ImportError: a method that nothing here replaces is missing.
    """
    lacking = [name for name in (*OVERRIDDEN, *CALLED) if not hasattr(trainer, name)]
    if lacking:
        raise ImportError(
            f"dam.train builds on {', '.join(lacking)} of transformers.Trainer, which transformers "
            f"{transformers.__version__} does not have: install a release that was tried (docs/models.md)"
        )
    bases = [trainer]
    if not hasattr(trainer, "_get_dataloader"):
        bases.insert(0, _DataLoaders)
    if not hasattr(trainer, "_run_epoch"):
        bases.insert(0, _NoStepBeyond)
    if _number(transformers.__version__) < (5, 0):
        bases.insert(0, _PrecisionOfModel)
    return trainer if len(bases) == 1 else type("Trainer", tuple(bases), {})


if TYPE_CHECKING:
    BaseTrainer = Trainer
else:
    BaseTrainer = _fitted(Trainer)
