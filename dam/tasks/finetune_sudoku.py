"""The main job: fine-tune the small Sudoku model by Discrete Adjoint Matching, and report what that did."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dam import plots
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import MaskedLM
from dam.rollout import rollout
from dam.tasks import sudoku
from dam.train import DAMConfig, DAMTrainer, last_checkpoint
from dam.train.callbacks import MetricsFile, OnSave, RolloutProgress, StopOnSignal

PROMPTS, GENERATIONS, ITERATIONS = 64, 16, 8
CALLS_PER_ROLLOUT = PROMPTS * GENERATIONS
REWARDS: dict[str, Any] = {"units": sudoku.units_reward, "cells": sudoku.cell_reward}
EVALUATIONS = 12


@dataclasses.dataclass(frozen=True)
class Options:
    """What one run is asked to do; a run is resumed with the same options only."""

    puzzles: str | None = None
    reward_calls: int = 112 * CALLS_PER_ROLLOUT
    estimator: str = "posterior"
    normalizer: str = "group"
    reward: str = "units"
    blanks: int = 8
    seed: int = 0
    pretrain: bool = False
    null_arm: bool = False


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class _Clock:
    """Seconds spent on a run, over all its parts."""

    def __init__(self, output: Path, options: Options, start: float):
        self.earlier = 0.0
        self._output, self._options, self._start = output, options, start

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self._start

    def record(self) -> None:
        _record(self._output, self._options, self.seconds())


def _record(output: Path, options: Options, seconds: float) -> None:
    _write_json(output / "run.json", {"options": dataclasses.asdict(options), "seconds": seconds})


def resumed_options(output: Path, given: dict[str, Any]) -> Options:
    """The options that the run in `output` was started with, and those given now, which `finetune` compares."""
    record = output / "run.json"
    if not record.exists():
        raise ValueError(f"nothing to resume: {output} holds no run of dam sudoku")
    return Options(**{**json.loads(record.read_text(encoding="utf-8"))["options"], **given})


def next_output(root: Path = Path("runs")) -> Path:
    """A folder for a new run that does not exist yet: runs/sudoku-1, runs/sudoku-2, ..."""
    return root / f"sudoku-{_last_number(root) + 1}"


def last_output(root: Path = Path("runs")) -> Path:
    """The newest folder that `next_output` gave."""
    if _last_number(root) == 0:
        raise ValueError(f"nothing to resume: there is no run in {root}/; name one with --output")
    return root / f"sudoku-{_last_number(root)}"


def _last_number(root: Path) -> int:
    names = [path.name.removeprefix("sudoku-") for path in root.glob("sudoku-*")]
    return max([int(name) for name in names if name.isdigit()], default=0)


def finetune(output: Path, options: Options, *, resume: bool = False) -> dict[str, Any]:
    """Runs the job into the folder `output`; returns and writes the final metrics.

    Raises:
        ValueError: an option or the puzzle file is bad, or `output` holds another run; before any work is done.
        OSError: `output` cannot be written; before any work is done.
        RewardError: see `DAMTrainer`.
        Stopped: on Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    start = time.monotonic()
    if options.reward_calls < CALLS_PER_ROLLOUT:
        raise ValueError(f"reward_calls must be at least {CALLS_PER_ROLLOUT}, one rollout; got {options.reward_calls}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32); got {options.seed}")
    if not 1 <= options.blanks <= sudoku.CELLS:
        raise ValueError(f"blanks must be in [1, {sudoku.CELLS}]; got {options.blanks}")
    plots.figure_class()
    if options.puzzles is None:
        evaluated = sudoku.held_out_puzzles(options.blanks)
    else:
        evaluated = sudoku.read_puzzles(options.puzzles)
    clock = _Clock(output, options, start)
    clock.earlier = _claim(output, options, resume)
    if (output / "metrics.json").exists():
        result: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        return result

    model = sudoku.pretrain_base(options.seed) if options.pretrain else sudoku.base_model()
    base_filled = fill_in(model, evaluated)
    base_metrics = sudoku.metrics(evaluated.puzzle, base_filled, evaluated.solution)
    rollouts = options.reward_calls // CALLS_PER_ROLLOUT
    train_grids, _ = sudoku.split_grids()
    # Easier puzzles among the training ones: a first rollout then already solves some of every kind.
    training = sudoku.draw_puzzles(
        train_grids, rollouts * PROMPTS, (min(3, options.blanks), options.blanks), options.seed
    )
    stop = StopOnSignal()
    trainer = DAMTrainer(
        model=model,
        reward_funcs=REWARDS[options.reward],
        args=_config(output, options, rollouts),
        train_dataset=training.rows(),
        eval_dataset=evaluated.rows(),
        compute_metrics=_compute_metrics,
        callbacks=[stop, OnSave(clock.record), MetricsFile(str(output / "metrics.jsonl"))],
    )
    _use_progress_bar(trainer)
    checkpoint = last_checkpoint(str(output)) if resume else None
    if checkpoint is None:
        (output / "metrics.jsonl").unlink(missing_ok=True)  # what a killed run left
        _append(output / "metrics.jsonl", {"step": 0, "reward_calls": 0, **_prefixed("eval_", base_metrics)})
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; checkpoint saved")

    filled = fill_in(model, evaluated)
    tuned = sudoku.metrics(evaluated.puzzle, filled, evaluated.solution)
    model.config.dam = dataclasses.asdict(options)
    trainer.save_model(str(output))
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(entry["reward_calls"], entry["eval_solved"]) for entry in history if "eval_solved" in entry]
    plots.solved_against_calls(
        output / "plot.png",
        *zip(*curve, strict=True),
        title=f"4x4 Sudoku, {options.estimator} / {options.normalizer}, seed {options.seed}",
    )
    result = {
        **_prefixed("base_", base_metrics),
        **tuned,
        "reward_calls": trainer.reward_calls,
        "seconds": round(clock.seconds(), 1),
        "seed": options.seed,
        "estimator": options.estimator,
        "normalizer": options.normalizer,
        "puzzles": len(evaluated.puzzle),
        "example": _example(evaluated.puzzle, base_filled, filled),
    }
    _write_json(output / "metrics.json", result)
    return result


def _claim(output: Path, options: Options, resume: bool) -> float:
    """Makes sure that `output` can be written and holds this run or none; returns the seconds already spent on it."""
    record = output / "run.json"
    if resume:
        if not record.exists():
            raise ValueError(f"nothing to resume: {output} holds no run of dam sudoku")
        earlier = json.loads(record.read_text(encoding="utf-8"))
        asked = dataclasses.asdict(options)
        changed = [name for name, value in earlier["options"].items() if asked[name] != value]
        if changed:
            listed = ", ".join(f"{name} {earlier['options'][name]!r} (now {asked[name]!r})" for name in changed)
            raise ValueError(f"the run in {output} was started with other options: {listed}")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: continue the run in it with --resume, or name another --output")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass  # fails here, before the work, where the folder cannot be written
    if not resume:
        _record(output, options, 0.0)
        return 0.0
    return float(earlier["seconds"])


def _config(output: Path, options: Options, rollouts: int) -> DAMConfig:
    steps = rollouts * ITERATIONS
    evaluate_every = max(1, rollouts // EVALUATIONS) * ITERATIONS
    return DAMConfig(
        output_dir=str(output),
        beta=0.002,
        max_tilt=0.2,
        target_ess=4.0,
        num_generations=GENERATIONS,
        per_device_train_batch_size=PROMPTS,
        per_device_eval_batch_size=1024,
        rollout_batch_size=CALLS_PER_ROLLOUT,
        num_iterations=ITERATIONS,
        estimator=options.estimator,
        normalizer=options.normalizer,
        null_arm=options.null_arm,
        replay_size=8 * PROMPTS,
        replay_batch_size=32,
        draw_outcomes=192 if options.normalizer == "group" and options.estimator != "first_jump_one" else None,
        eval_temperature=0.0,
        eval_remasking="confidence",
        mask_token_id=sudoku.BLANK,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=ITERATIONS,
        eval_strategy="steps",
        eval_steps=evaluate_every,
        save_steps=10 * ITERATIONS,
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,  # replaced by RolloutProgress
    )


def _use_progress_bar(trainer: DAMTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RolloutProgress())


def fill_in(model: Any, puzzles: sudoku.Puzzles) -> Tensor:
    """The model's completions: likeliest token, most confident cell first. Deterministic."""
    model.eval()
    process = MaskedCTMC(mask_token=sudoku.BLANK)
    return rollout(MaskedLM(model), puzzles.puzzle, process, temperature=0.0, order="confidence", seed=0).final


def _compute_metrics(prediction: Any) -> dict[str, float]:
    arrays = (prediction.inputs, prediction.predictions, prediction.label_ids)
    return sudoku.metrics(*(torch.as_tensor(array) for array in arrays))


def _example(puzzle: Tensor, before: Tensor, after: Tensor) -> dict[str, list[int]]:
    """A puzzle that the base got wrong, preferably one that the fine-tuned model got right."""
    wrong = ~sudoku.satisfied(before).all(dim=1)
    right = sudoku.satisfied(after).all(dim=1)
    shown = int((2 * wrong.long() + right.long()).argmax())
    return {"puzzle": puzzle[shown].tolist(), "base": before[shown].tolist(), "tuned": after[shown].tolist()}


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def _append(path: Path, entry: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """By renaming, so that a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def report(result: dict[str, Any]) -> str:
    """The final table and the example, as text."""
    lines = [f"{'':8}{'base':>12}{'fine-tuned':>12}"]
    for name in ("solved", "exact", "cells"):
        lines.append(f"{name:8}{result['base_' + name]:>12.1%}{result[name]:>12.1%}")
    lines.append(
        f"{result['puzzles']} puzzles, {result['reward_calls']:,} reward calls, {result['seconds']:.0f} s, "
        f"estimator {result['estimator']} / {result['normalizer']}, seed {result['seed']}"
    )
    example = result["example"]
    shown = [sudoku.as_text(example["puzzle"])]
    shown += [sudoku.as_text(example[name], example["puzzle"]) for name in ("base", "tuned")]
    lines += ["", f"{'puzzle':16}{'base':16}{'fine-tuned':16}"]
    lines += ["    ".join(parts) for parts in zip(*shown, strict=True)]
    return "\n".join(lines)
