"""The arguments that runs of trainers here have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from dam.train.releases import precision_of

# Arguments that may be others in each process of a run: where it is, and where and how it writes.
OF_ONE_PROCESS = (
    *("local_rank", "output_dir", "logging_dir", "run_name", "report_to", "log_level", "log_level_replica"),
    *("disable_tqdm", "hub_token", "push_to_hub_token"),
)


@dataclasses.dataclass
class RunConfig(TrainingArguments):
    """Arguments of a `dam.train.resumable.ResumableTrainer`, on top of those of `transformers.TrainingArguments`."""

    # Defaults of transformers' own arguments.
    logging_steps: float = field(
        default=10, metadata={"help": "Training steps between two logs; below 1 a share of the run."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16. None is True on a GPU that has it, unless fp16 is set, False on "
            "a CPU."
        },
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "No dropout in training, in the model and its adapter."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Exponential moving average of the trained weights, below 1: after step n of the run each average "
            "moves to the weight by 1 - min(ema_decay, (1 + n) / (10 + n)). Evaluated and saved, and what the model "
            "has after the run, are the averages; rollouts and training go on with the weights themselves."
        },
    )
    shuffle_dataset: bool = field(
        default=True, metadata={"help": "Shuffle the prompts of each epoch. An iterable dataset keeps its own order."}
    )
    eval_redraw: bool = field(
        default=False, metadata={"help": "Draw anew in each evaluation, instead of the same each time."}
    )
    report_to: list[str] | str | None = field(
        default="none",
        metadata={"help": "Where to report, besides output_dir; nowhere unless given, whatever is installed."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: other columns go to the reward functions."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        with precision_of(self):
            super().__post_init__()
        if self.device.type == "cpu":  # as with use_cpu: there is none to pin memory for, which loaders would warn of
            self.dataloader_pin_memory = False
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1) or None; got {self.ema_decay}")


def check_counts(args: RunConfig, *names: str, optional: Sequence[str] = ()) -> None:
    """That arguments are at least 1.

    Args:
        args: that have them.
        names: of those that must be numbers.
        optional: of those that may be None.

    Raises:
        ValueError: one is not; names it.
    """
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(args, name)}")
    for name in optional:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1 or None; got {getattr(args, name)}")
