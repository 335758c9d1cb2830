"""One run of a task: fine-tune its model by Discrete Adjoint Matching into a folder, and report what that did.

A task says what is learned (`Task`); what all runs have in common is here: the folder, which holds one run and can be
resumed; evaluations of base and model; metrics, plot and report; the command line's errors and exit codes.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dam import plots
from dam.files import last_output, next_output, refuse_changes, unused
from dam.train import DAMConfig, DAMTrainer, RewardError, card, last_checkpoint
from dam.train.callbacks import MetricsFile, OnSave, RolloutProgress, StopOnSignal
from dam.train.rewards import RewardFunction
from dam.train.terminal import show


class Options(Protocol):
    """What one run is asked to do: a frozen dataclass with defaults; a run is resumed with the same options only."""

    @property
    def reward_calls(self) -> int: ...
    @property
    def estimator(self) -> str: ...
    @property
    def normalizer(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def null_arm(self) -> bool: ...


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class Task(abc.ABC):
    """What a run fine-tunes, and on what; made of the run's options, before any work.

    Raises:
        ValueError, OSError: an option or a file that it names is bad.
    """

    name: ClassVar[str]  # of the command, and of folders of runs
    title: ClassVar[str]  # of the plot
    headline: ClassVar[str]  # the metric that the plot shows, a share of `of_what`
    of_what: ClassVar[str] = "puzzles"
    options_type: ClassVar[type]
    # A rollout is `prompts` prompts of `generations` trajectories, and feeds `iterations` training steps.
    prompts: ClassVar[int] = 64
    generations: ClassVar[int] = 16
    iterations: ClassVar[int] = 8
    evaluations: ClassVar[int] = 12  # during a run

    def __init__(self, options: Options):
        if options.reward_calls < self.calls_per_rollout():
            raise ValueError(
                f"reward_calls must be at least {self.calls_per_rollout()}, one rollout; got {options.reward_calls}"
            )
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32); got {options.seed}")
        self.options = options

    @classmethod
    def calls_per_rollout(cls) -> int:
        return cls.prompts * cls.generations

    @property
    def rollouts(self) -> int:
        return self.options.reward_calls // self.calls_per_rollout()

    @abc.abstractmethod
    def model(self, output: Path) -> Any:
        """The base model, which is then trained in place; one that is made is kept in the run's folder `output`."""

    def processing_class(self) -> Any:
        """The tokenizer, of a task whose rows are text."""
        return None

    @abc.abstractmethod
    def training_rows(self) -> list[dict[str, Any]]:
        """Prompts of all rollouts, as `DAMTrainer` takes them."""

    @abc.abstractmethod
    def evaluation_rows(self) -> list[dict[str, Any]]:
        """Prompts that are filled in to evaluate, in the order of `metrics`."""

    @abc.abstractmethod
    def reward(self) -> RewardFunction:
        """What the model learns from."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Arguments of `DAMConfig` beyond those that every run has."""

    @abc.abstractmethod
    def fill_in(self, model: Any) -> Tensor:
        """The model's completions int64 [N, L] of the evaluation prompts; deterministic."""

    @abc.abstractmethod
    def metrics(self, final: Tensor) -> dict[str, float]:
        """Of `fill_in`'s completions of the evaluation prompts; `headline` among them."""

    def sampled_metrics(self, model: Any) -> dict[str, float]:
        """What takes longer, and is measured of the base and of the final model only; deterministic."""
        return {}

    def callbacks(self) -> list[Any]:
        """Of the trainer, besides those that every run has."""
        return []

    @abc.abstractmethod
    def facts(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """What the final metrics say besides, out of `fill_in` of the base and of the model: an example, for one."""

    @staticmethod
    @abc.abstractmethod
    def report(result: dict[str, Any]) -> str:
        """The final table and the example, as text."""


class _Clock:
    """Seconds spent on a run, over all its parts."""

    def __init__(self, output: Path, task: Task, start: float):
        self.earlier = 0.0
        self._output, self._task, self._start = output, task, start

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self._start

    def record(self) -> None:
        _record(self._output, self._task, self.seconds())


def _as_dict(options: Options) -> dict[str, Any]:
    return dataclasses.asdict(options)  # type: ignore[call-overload]


def _record(output: Path, task: Task, seconds: float) -> None:
    write_json(output / "run.json", {"task": task.name, "options": _as_dict(task.options), "seconds": seconds})


def resumed_options(task: type[Task], output: Path, given: dict[str, Any]) -> Any:
    """The options that the run in `output` was started with, and those given now, which `finetune` compares."""
    return task.options_type(**{**_recorded(task, output)["options"], **given})


def _recorded(task: type[Task] | Task, output: Path) -> dict[str, Any]:
    """What is recorded of the run in a folder.

    Raises:
        ValueError: it holds none of this task.
    """
    path = output / "run.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if record.get("task") != task.name:
        raise ValueError(f"nothing to resume: {output} holds no run of dam {task.name}")
    return record


def finetune(task_type: type[Task], output: Path, options: Any, *, resume: bool = False) -> dict[str, Any]:
    """Runs a task into the folder `output`; returns and writes the final metrics.

    Raises:
        ValueError: an option or a file is bad, or `output` holds another run; before any work is done.
        OSError: `output` cannot be written; before any work is done.
        RewardError: see `DAMTrainer`.
        Stopped: on Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    start = time.monotonic()
    task = task_type(options)
    plots.figure_class()
    clock = _Clock(output, task, start)
    clock.earlier = _claim(task, output, resume)
    if (output / "metrics.json").exists():
        result: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        return result

    model = task.model(output)
    clock.record()  # a base that was made took its time
    base_filled = task.fill_in(model)
    base_metrics = {**task.metrics(base_filled), **task.sampled_metrics(model)}
    stop = StopOnSignal()
    trainer = DAMTrainer(
        model=model,
        reward_funcs=task.reward(),
        args=config(task, output),
        train_dataset=task.training_rows(),
        eval_dataset=task.evaluation_rows(),
        processing_class=task.processing_class(),
        compute_metrics=lambda prediction: task.metrics(torch.as_tensor(prediction.predictions)),
        callbacks=[stop, OnSave(clock.record), MetricsFile(str(output / "metrics.jsonl")), *task.callbacks()],
    )
    _use_progress_bar(trainer)
    checkpoint = last_checkpoint(str(output)) if resume else None
    if checkpoint is None:
        (output / "metrics.jsonl").unlink(missing_ok=True)  # what a killed run left
        _append(output / "metrics.jsonl", {"step": 0, "reward_calls": 0, **_prefixed("eval_", base_metrics)})
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; checkpoint saved")

    filled = task.fill_in(model)
    tuned = {**task.metrics(filled), **task.sampled_metrics(model)}
    if hasattr(model, "config"):
        model.config.dam = _as_dict(options)
    trainer.save_model(str(output))
    _plot(task, output)
    result = {
        **_prefixed("base_", base_metrics),
        **tuned,
        "reward_calls": trainer.reward_calls,
        "seconds": round(clock.seconds(), 1),
        "seed": options.seed,
        "estimator": options.estimator,
        "normalizer": options.normalizer,
        "versions": card.versions(),
        **task.facts(base_filled, filled),
    }
    write_json(output / "metrics.json", result)
    return result


def _claim(task: Task, output: Path, resume: bool) -> float:
    """Makes sure that `output` can be written and holds this run or none; returns the seconds already spent on it."""
    seconds = 0.0
    if resume:
        earlier = _recorded(task, output)
        refuse_changes(earlier["options"], _as_dict(task.options), f"the run in {output}")
        seconds = float(earlier["seconds"])
    else:
        unused(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass  # fails here, before the work, where the folder cannot be written
    if not resume:
        _record(output, task, seconds)
    return seconds


def config(task: Task, output: Path) -> DAMConfig:
    """Arguments of a run: those that all tasks have, and the task's own."""
    options = task.options
    values = {
        "num_generations": task.generations,
        "per_device_train_batch_size": task.calls_per_rollout(),
        "rollout_batch_size": task.calls_per_rollout(),
        "num_iterations": task.iterations,
        "estimator": options.estimator,
        "normalizer": options.normalizer,
        "null_arm": options.null_arm,
        "max_steps": task.rollouts * task.iterations,
        "logging_steps": task.iterations,
        "eval_strategy": "steps",
        "eval_steps": max(1, task.rollouts // task.evaluations) * task.iterations,
        "save_steps": 10 * task.iterations,
        "save_total_limit": 2,
        "seed": options.seed,
        "data_seed": options.seed,
        "report_to": [],
        "bf16": False,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "use_cpu": True,
        "disable_tqdm": True,  # replaced by RolloutProgress
    }
    return DAMConfig(output_dir=str(output), **{**values, **task.config()})


def _use_progress_bar(trainer: DAMTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RolloutProgress(writes=False))


def _plot(task: Task, output: Path) -> None:
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = f"eval_{task.headline}"
    curve = [(entry["reward_calls"], entry[shown]) for entry in history if shown in entry]
    options = task.options
    plots.solved_against_calls(
        output / "plot.png",
        *zip(*curve, strict=True),
        title=f"{task.title}, {options.estimator} / {options.normalizer}, seed {options.seed}",
        what=task.of_what,
    )


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def _append(path: Path, entry: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """By renaming, so that a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def command(task: type[Task], arguments: argparse.Namespace) -> int:
    """`dam <task>`: a run by what was parsed, `output`, `resume` and options that were given; the exit status."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of every file saved; the run has a bar of its own
    fields = {field.name for field in dataclasses.fields(task.options_type)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    prog = f"dam {task.name}"
    try:
        output = arguments.output or (last_output(task.name) if arguments.resume else next_output(task.name))
        options = resumed_options(task, output, given) if arguments.resume else task.options_type(**given)
        result = finetune(task, output, options, resume=arguments.resume)
    except (ValueError, OSError, ImportError, RewardError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"{prog}: {stop}. Continue with: {prog} --resume --output {output}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{prog}: interrupted. Continue with the same command and --resume", file=sys.stderr)
        return 130
    show(f"{task.report(result)}\n\nmodel, metrics and plot: {output}")
    return 0
