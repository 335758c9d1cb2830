"""Callbacks of a run: its progress bar, its record, and a way to stop without losing anything."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dam.train.processes import together
from dam.train.terminal import bar, show

SHOWN = ("reward", "ess", "kl_path", "tilt")
DRAWN = ("tokens", "paths")


def progress_line(logs: Mapping[str, Any]) -> str:
    """What a log of training says in a line: reward, ESS, KL, tilt, what is drawn a second, and where time goes."""
    told = [f"{name} {logs[name]:.3g}" for name in SHOWN if name in logs]
    told += [f"{logs[f'{drawn}_per_second']:,.0f} {drawn}/s" for drawn in DRAWN if f"{drawn}_per_second" in logs]
    of_parts = {
        name[5:-6]: share for name, share in logs.items() if name.startswith("time/") and name.endswith("_share")
    }
    shares = [f"{share:.0%} {part}" for part, share in of_parts.items() if share > 0]
    return ", ".join(told) + (f" ({', '.join(shares)})" if shares else "")


def log_line(logs: Mapping[str, Any]) -> str:
    """What a log of any kind says in a line: `progress_line` of training, else each of its numbers."""
    left_out = ("epoch", "total_flos")
    numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float)) and name not in left_out}
    told = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in numbers.items()]
    return progress_line(logs) or ", ".join(told)


class RolloutProgress(ProgressCallback):
    """A progress bar with `progress_line` of the last log, whose time left is by the pace of the whole run.

    Where standard error is no terminal there is no bar but a line now and then (`dam.train.terminal.bar`), or, where
    logs are written, these alone.

    Args:
        writes: writes a line of each log, also of evaluations, to standard output.
    """

    def __init__(self, writes: bool = True):
        super().__init__()
        self._writes = writes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = bar(
                total=state.max_steps,
                initial=state.global_step,  # steps of before a run was resumed took none of its time
                smoothing=0,  # a step with a rollout takes many times one without
                disable=self._writes and not sys.stderr.isatty(),
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self.training_bar is not None and (line := progress_line(logs)):
            self.training_bar.set_postfix_str(line, refresh=sys.stderr.isatty())
        if self._writes:
            with tqdm.external_write_mode():
                of = f"/{state.max_steps}" if state.max_steps else ""  # before a run there is none
                show(f"step {state.global_step}{of}: {log_line(logs)}")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Evaluation is short; it has no bar of its own."""


class MetricsFile(TrainerCallback):
    """Writes everything that is logged to a file, one JSON object a line; a resumed run continues it.

    Args:
        path: the file; entries from beyond the step that a run resumes at are dropped.
    """

    def __init__(self, path: str):
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as file:
                # A run that was killed may have left half a line.
                lines = [line for line in file if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        # By renaming, so that a kill in between loses nothing.
        with open(self._path + ".part", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(self._path + ".part", self._path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class OnSave(TrainerCallback):
    """Calls a function at every checkpoint.

    Args:
        function: takes nothing.
    """

    def __init__(self, function: Callable[[], None]):
        self._function = function

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._function()


class OnBegin(TrainerCallback):
    """Calls functions when a run begins or goes on, before its first step.

    Args:
        functions: take nothing; called in this order.
    """

    def __init__(self, *functions: Callable[[], None]):
        self._functions = functions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for function in self._functions:
            function()


class UpdateBegun(TrainerCallback):
    """Knows which step last began to update weights: they are of no step until it ends."""

    def __init__(self) -> None:
        self.step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    Of several processes all stop at the step at whose end one has had the signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()  # a second signal acts as it would without this callback

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped = any(together(lambda: self.stopped))
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore()
