"""4x4 Sudoku as text: a puzzle of 16 digits, row by row and 0 for a blank, and an answer of 16 digits.

An answer is what <answer>...</answer> or else the last \\boxed{...} holds (`answers.marked`), or else the last 16
digits in a row of the completion, as d1's evaluation takes them. Of an answer only ASCII digits are read, so spaces and
lines between cells do not matter. It is a grid if they are 16, each 1 to 4, and it holds no other kind of digit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dam.tasks import language, sudoku
from dam.tasks.answers import LONGEST, marked, text_of

_IN_A_ROW = re.compile(r"(?<![0-9])[0-9]{16}(?![0-9])")
_TRAINING_PUZZLES, _TRAINING_BLANKS = 4096, (3, 8)  # easier ones among them, as `dam sudoku` trains on

_grids = functools.cache(sudoku.all_grids)


def extract(completion: str) -> str | None:
    """The answer that a completion gives, as it stands there; None where there is none."""
    answer = marked(completion)
    if answer is None:
        runs = _IN_A_ROW.findall(completion[-LONGEST:])
        return runs[-1] if runs else None
    return answer


def cells_of(completion: str) -> list[int]:
    """The digits of the answer, cut to 16 or filled up to 16 with 0, as d1 compares them; all 0 where there is none."""
    digits = [int(character) for character in extract(completion) or "" if character in "0123456789"]
    return (digits + [sudoku.BLANK] * sudoku.CELLS)[: sudoku.CELLS]


def grid_of(completion: str) -> list[int] | None:
    """The answer as a grid: 16 digits, 1 to 4; None where it is none."""
    digits = [character for character in extract(completion) or "" if character.isnumeric()]
    whole = len(digits) == sudoku.CELLS and all(digit in "1234" for digit in digits)
    return [int(digit) for digit in digits] if whole else None


class SudokuText(language.LanguageTask):
    """Rows, rewards and metrics of 4x4 Sudoku as text.

    Rows have `puzzle` and `solution`, 16 digits each. They are made of records with Puzzle and Solution, as of d1's CSV
    files; without a source they are of our own grids, puzzles with 3 to 8 blanks to train on and `held_out_puzzles` to
    test.

    Rewards: `cells`, the fraction of the blanks filled in as in the listed solution, has weight 1 and is d1's
    (dllm-reasoning/d1, diffu-grpo/reward_func.py). `units`, ours, needs no solution: the fraction of the 12 rows,
    columns and boxes that hold 1, 2, 3, 4 once each and keep the puzzle's clues. It, `format` and `correct` have weight
    0: they are logged.

    Metrics, as in `sudoku.metrics`: `solved`, clues kept and all rows, columns and boxes valid, which is what pass@k
    counts; `exact`, equal to the listed solution, one of several at times; `cells`, blanks equal to the listed
    solution's, pooled over puzzles as in d1's evaluation (eval/parse_and_get_acc.py). And `format`: grids.
    """

    name: ClassVar[str] = "sudoku_text"
    dataset: ClassVar[str | None] = None
    reward_weights: ClassVar[tuple[float, ...]] = (0.0, 1.0, 0.0, 0.0)

    @property
    def rewards(self) -> tuple[Any, ...]:
        return self.format, self.cells, self.units, self.correct

    def records(self, split: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
        if split == "test":
            puzzles = sudoku.held_out_puzzles()
        elif split == "train":
            grids, _ = sudoku.split_grids()
            puzzles = sudoku.draw_puzzles(grids, limit or _TRAINING_PUZZLES, _TRAINING_BLANKS, seed=0)
        else:
            raise ValueError(f"{self.name} has splits train and test of its own; got {split!r}")
        pairs = zip(puzzles.puzzle.tolist(), puzzles.solution.tolist(), strict=True)
        return [{"Puzzle": "".join(map(str, cells)), "Solution": "".join(map(str, filled))} for cells, filled in pairs]

    def row(self, record: Mapping[str, Any], *, style: str = "d1") -> dict[str, Any] | None:
        # A CSV file's digits are read as integers, without the zeros in front.
        puzzle, solution = (text.zfill(sudoku.CELLS) for text in language.texts(record, ("Puzzle", "Solution")))
        sudoku.read_pair(puzzle, solution, _grids())
        question = (
            "Solve this 4x4 Sudoku. It is given as 16 digits, row by row from the top, 0 for an empty cell. Fill in 1 "
            "to 4, so that every row, every column and every 2x2 box holds each of 1, 2, 3, 4 once.\n\n"
            f"Sudoku: {puzzle}"
        )
        prompt = language.prompt(question, style, answer="the 16 digits of the whole grid, with nothing between them")
        return {"prompt": prompt, "puzzle": puzzle, "solution": solution}

    def format(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """1 where the answer is a grid."""
        return [float(grid_of(text_of(completion)) is not None) for completion in completions]

    def cells(
        self, completions: Sequence[Any], puzzle: Sequence[str], solution: Sequence[str], **_: Any
    ) -> list[float]:
        """Fraction of the blanks filled in as in the listed solution."""
        filled = [cells_of(text_of(completion)) for completion in completions]
        return sudoku.cell_reward(_cells(puzzle).tolist(), filled, _cells(solution).tolist())

    def units(self, completions: Sequence[Any], puzzle: Sequence[str], **_: Any) -> list[float]:
        """Fraction of the rows, columns and boxes that are right and keep the clues; 0 of what is no grid."""
        return sudoku.satisfied(_answers(completions), _cells(puzzle)).double().mean(dim=-1).tolist()

    def correct(self, completions: Sequence[Any], puzzle: Sequence[str], **_: Any) -> list[float]:
        """1 where all of them are."""
        return sudoku.satisfied(_answers(completions), _cells(puzzle)).all(dim=-1).double().tolist()

    def judge(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> language.Judged:
        puzzle, solution = (_cells([row[name] for row in rows]) for name in ("puzzle", "solution"))
        answers = _answers(texts)
        figures = {
            **sudoku.metrics(puzzle, answers, solution),
            "cells": sudoku.metrics(puzzle, torch.tensor([cells_of(text) for text in texts]), solution)["cells"],
            "format": sum(self.format(texts)) / len(texts),
        }
        return language.Judged(sudoku.satisfied(answers, puzzle).all(dim=-1).tolist(), figures)


def _cells(grids: Sequence[str]) -> Tensor:
    """int64 [N, 16] of texts of 16 digits."""
    return torch.tensor([[int(digit) for digit in grid] for grid in grids])


def _answers(completions: Sequence[Any]) -> Tensor:
    """Grids int64 [N, 16]; all blank where a completion has none, which satisfies nothing."""
    grids = [grid_of(text_of(completion)) for completion in completions]
    return torch.tensor([grid or [sudoku.BLANK] * sudoku.CELLS for grid in grids])


TASK = SudokuText()
