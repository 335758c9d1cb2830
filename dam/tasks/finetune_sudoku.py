"""The main job: the small Sudoku model, which knows rows only, learns 4x4 Sudoku from rewards alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.models.families import as_denoiser
from dam.rollout import rollout
from dam.tasks import finetune as front
from dam.tasks import sudoku
from dam.train.rewards import RewardFunction

REWARDS: dict[str, Any] = {"units": sudoku.units_reward, "cells": sudoku.cell_reward}


@dataclasses.dataclass(frozen=True)
class Options:
    """What one run is asked to do; a run is resumed with the same options only."""

    puzzles: str | None = None
    reward_calls: int = 112 * front.Task.calls_per_rollout()
    estimator: str = "posterior"
    normalizer: str = "group"
    reward: str = "units"
    blanks: int = 8
    seed: int = 0
    pretrain: bool = False
    null_arm: bool = False


class Sudoku(front.Task):
    """4x4 Sudoku: held-out puzzles, or those of a file, filled in by a model of 274,000 parameters."""

    name, title, headline, options_type = "sudoku", "4x4 Sudoku", "solved", Options
    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        if not 1 <= options.blanks <= sudoku.CELLS:
            raise ValueError(f"blanks must be in [1, {sudoku.CELLS}]; got {options.blanks}")
        if options.puzzles is None:
            self.puzzles = sudoku.held_out_puzzles(options.blanks)
        else:
            self.puzzles = sudoku.read_puzzles(options.puzzles)

    def model(self, output: Path) -> Any:
        return sudoku.pretrain_base(self.options.seed) if self.options.pretrain else sudoku.base_model()

    def training_rows(self) -> list[dict[str, Any]]:
        grids, _ = sudoku.split_grids()
        # Easier puzzles among the training ones: a first rollout then already solves some of every kind.
        blanks = (min(3, self.options.blanks), self.options.blanks)
        return sudoku.draw_puzzles(grids, self.rollouts * self.prompts, blanks, self.options.seed).rows()

    def evaluation_rows(self) -> list[dict[str, Any]]:
        return self.puzzles.rows()

    def reward(self) -> RewardFunction:
        return REWARDS[self.options.reward]

    def config(self) -> dict[str, Any]:
        options = self.options
        by_weight = options.normalizer == "group" and options.estimator != "first_jump_one"
        return {
            "beta": 0.002,
            "max_tilt": 0.2,
            "target_ess": 4.0,
            "per_device_eval_batch_size": 1024,
            "replay_size": 8 * self.prompts,
            "replay_batch_size": 32,
            "draw_outcomes": 192 if by_weight else None,
            "eval_temperature": 0.0,
            "eval_remasking": "confidence",
            "mask_token_id": sudoku.BLANK,
            "learning_rate": 2e-3,
        }

    def fill_in(self, model: Any) -> Tensor:
        return fill_in(model, self.puzzles)

    def metrics(self, final: Tensor) -> dict[str, float]:
        return sudoku.metrics(self.puzzles.puzzle, final, self.puzzles.solution)

    def facts(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        return {"puzzles": len(self.puzzles.puzzle), "example": _example(self.puzzles.puzzle, before, after)}

    @staticmethod
    def report(result: dict[str, Any]) -> str:
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


def finetune(output: Path, options: Options, *, resume: bool = False) -> dict[str, Any]:
    """`dam.tasks.finetune.finetune` of Sudoku."""
    return front.finetune(Sudoku, output, options, resume=resume)


def fill_in(model: Any, puzzles: sudoku.Puzzles) -> Tensor:
    """The model's completions: likeliest token, most confident cell first. Deterministic."""
    model.eval()
    process = MaskedCTMC(mask_token=sudoku.BLANK)
    return rollout(as_denoiser(model), puzzles.puzzle, process, temperature=0.0, order="confidence", seed=0).final


def _example(puzzle: Tensor, before: Tensor, after: Tensor) -> dict[str, list[int]]:
    """A puzzle that the base got wrong, preferably one that the fine-tuned model got right."""
    wrong = ~sudoku.satisfied(before).all(dim=1)
    right = sudoku.satisfied(after).all(dim=1)
    shown = int((2 * wrong.long() + right.long()).argmax())
    return {"puzzle": puzzle[shown].tolist(), "base": before[shown].tolist(), "tuned": after[shown].tolist()}
