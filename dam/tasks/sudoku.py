"""4x4 Sudoku: all grids, puzzles, rewards, metrics, puzzle files, and the base model to fine-tune.

A grid is 16 token ids, row by row: 1 .. 4, and 0, the mask token, for a blank.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.adjoint import estimator_loss, group_targets
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import MaskedLM

SIDE, CELLS = 4, 16
BLANK = 0  # also the mask token
TRAIN_GRIDS, TEST_GRIDS = 200, 88
SPLIT_SEED = 20260207
BASE_MODEL = Path(__file__).parent / "data" / "sudoku_base"


def _units() -> Tensor:
    rows = [[SIDE * r + c for c in range(SIDE)] for r in range(SIDE)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    boxes = [[SIDE * (r + i) + c + j for i in range(2) for j in range(2)] for r in (0, 2) for c in (0, 2)]
    return torch.tensor(rows + columns + boxes)


UNITS = _units()  # int64 [12, 4]: the cells of each row, column and box


def satisfied(grids: Tensor, puzzles: Tensor | None = None) -> Tensor:
    """Which units hold 1, 2, 3, 4 once each, and keep the clues of puzzles if given: bool [..., 12] for [..., 16]."""
    right = (grids[..., UNITS].sort(dim=-1).values == torch.arange(1, SIDE + 1)).all(dim=-1)
    return right if puzzles is None else right & respected(grids, puzzles)[..., UNITS].all(dim=-1)


def respected(grids: Tensor, puzzles: Tensor) -> Tensor:
    """Which cells keep the clues of the puzzles, as blanks do: bool [..., 16]."""
    return (grids == puzzles) | (puzzles == BLANK)


def all_grids() -> Tensor:
    """The 288 complete grids, int64 [288, 16], in lexicographic order."""
    rows = torch.tensor(list(itertools.permutations(range(1, SIDE + 1))))
    halves = rows[torch.cartesian_prod(*[torch.arange(len(rows))] * 2)].flatten(1)
    # Of two rows' grids, those whose boxes are right; few are left to combine.
    halves = halves[(halves[:, UNITS[-4:-2]].sort(dim=-1).values == torch.arange(1, SIDE + 1)).all(dim=-1).all(dim=-1)]
    grids = halves[torch.cartesian_prod(*[torch.arange(len(halves))] * 2)].flatten(1)
    return grids[satisfied(grids).all(dim=-1)]


def split_grids() -> tuple[Tensor, Tensor]:
    """The grids of training and test puzzles, [200, 16] and [88, 16]: no grid is in both."""
    order = torch.randperm(TRAIN_GRIDS + TEST_GRIDS, generator=torch.Generator().manual_seed(SPLIT_SEED))
    grids = all_grids()[order]
    return grids[:TRAIN_GRIDS], grids[TRAIN_GRIDS:]


class Puzzles(NamedTuple):
    """Puzzles and a solution of each, both int64 [N, 16]."""

    puzzle: Tensor
    solution: Tensor

    def rows(self) -> list[dict[str, list[int]]]:
        """Dataset rows for `DAMTrainer`: input_ids, and labels for metrics."""
        pairs = zip(self.puzzle.tolist(), self.solution.tolist(), strict=True)
        return [{"input_ids": puzzle, "labels": solution} for puzzle, solution in pairs]


def draw_puzzles(grids: Tensor, count: int, blanks: tuple[int, int], seed: int) -> Puzzles:
    """`count` puzzles: random grids with a number of blanks drawn uniformly from the range, both ends included."""
    low, high = blanks
    if not 1 <= low <= high <= CELLS:
        raise ValueError(f"blanks must satisfy 1 <= low <= high <= {CELLS}; got {blanks}")
    generator = torch.Generator().manual_seed(seed)
    solution = grids[torch.randint(len(grids), (count,), generator=generator)]
    number = torch.randint(low, high + 1, (count, 1), generator=generator)
    return _blanked(solution, number, generator)


def _blanked(solution: Tensor, number: Tensor | int, generator: torch.Generator) -> Puzzles:
    """Puzzles with `number` blanks at random cells."""
    rank = torch.rand(solution.shape, generator=generator).argsort(dim=1).argsort(dim=1)
    return Puzzles(solution.masked_fill(rank < number, BLANK), solution)


def held_out_puzzles(blanks: int = 8, per_grid: int = 3) -> Puzzles:
    """The test split: `per_grid` puzzles with `blanks` blanks of each of the 88 held-out grids; always the same."""
    if not 1 <= blanks <= CELLS:
        raise ValueError(f"blanks must be in [1, {CELLS}]; got {blanks}")
    _, grids = split_grids()
    return _blanked(grids.repeat(per_grid, 1), blanks, torch.Generator().manual_seed(SPLIT_SEED))


def read_puzzles(path: str | Path) -> Puzzles:
    """Reads a CSV file with the columns Puzzle and Solution, 16 characters each, row by row, 0 for a blank.

    Raises:
        ValueError: names the file, the line and what is wrong with it.
        OSError: the file cannot be read.
    """
    grids = all_grids()
    puzzles, solutions = [], []
    for line, row in _records(path):
        try:
            puzzle, solution = read_pair(row.get("Puzzle"), row.get("Solution"), grids)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        puzzles.append(puzzle)
        solutions.append(solution)
    if not puzzles:
        raise ValueError(f"{path}: no puzzles below the header")
    return Puzzles(torch.stack(puzzles), torch.stack(solutions))


def read_pair(puzzle: str | None, solution: str | None, grids: Tensor) -> tuple[Tensor, Tensor]:
    """A puzzle and its solution, int64 [16] each, of 16 characters each.

    Args:
        puzzle: row by row, 0 for a blank.
        solution: row by row.
        grids: all, `all_grids`.

    Raises:
        ValueError: what is wrong with them.
    """
    cells, filled = _digits("Puzzle", puzzle, "01234"), _digits("Solution", solution, "1234")
    if not bool((cells == BLANK).any()):
        raise ValueError("Puzzle has no blank (0) to fill in")
    if not bool(respected(grids, cells).all(dim=1).any()):
        raise ValueError("Puzzle has no valid completion")
    if not bool(satisfied(filled).all()):
        raise ValueError("Solution is not a valid grid")
    if not bool(respected(filled, cells).all()):
        raise ValueError("Solution contradicts the clues of Puzzle")
    return cells, filled


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and columns of each record of a CSV file with a header; blank lines are passed over."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header: list[str] | None = None
        try:
            for row in reader:
                if not row:
                    continue
                if header is not None:
                    yield reader.line_num, dict(zip(header, row, strict=False))
                    continue
                header = [name.strip() for name in row]
                missing = [name for name in ("Puzzle", "Solution") if name not in header]
                if missing:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: column {' and '.join(missing)} missing; "
                        f"needed: Puzzle,Solution; found: {','.join(header)}"
                    )
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if header is None:
        raise ValueError(
            f"{path}, line 1: column Puzzle and Solution missing; needed: Puzzle,Solution; found: an empty file"
        )


def _digits(column: str, text: str | None, allowed: str) -> Tensor:
    text = (text or "").strip()
    if len(text) != CELLS:
        raise ValueError(f"{column} must have {CELLS} characters; got {len(text)}: {text!r}")
    for position, character in enumerate(text, start=1):
        if character not in allowed:
            raise ValueError(
                f"{column} may hold only {allowed[0]} to {allowed[-1]}; got {character!r} at character {position}"
            )
    return torch.tensor([int(character) for character in text])


def units_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Fraction of the 12 rows, columns and boxes that hold 1, 2, 3, 4 once each. Needs no solution."""
    return satisfied(torch.tensor(completion_ids)).double().mean(dim=-1).tolist()


def cell_reward(
    prompts: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], **_: Any
) -> list[float]:
    """Fraction of the blanks filled in as in the listed solution (d1's reward)."""
    blank = torch.tensor(prompts) == BLANK
    right = torch.tensor(completion_ids) == torch.tensor(labels)
    return ((right & blank).sum(dim=1) / blank.sum(dim=1)).double().tolist()


def metrics(puzzle: Tensor, filled: Tensor, solution: Tensor) -> dict[str, float]:
    """What fraction of puzzles (of blank cells for `cells`) came out right; all tensors int64 [N, 16].

    solved: every clue respected and every row, column and box valid. exact: equal to the listed solution. cells:
    blank cells equal to the listed solution's, pooled over puzzles.
    """
    blank = puzzle == BLANK
    return {
        "solved": float(satisfied(filled, puzzle).all(dim=-1).double().mean()),
        "exact": float((filled == solution).all(dim=1).double().mean()),
        "cells": float((filled == solution)[blank].double().mean()),
    }


def base_model() -> Any:
    """The shipped base model: knows that a row holds 1, 2, 3, 4 once each, nothing of columns or boxes."""
    from transformers import AutoModelForMaskedLM

    # At this size eager attention is faster than sdpa on a CPU.
    return AutoModelForMaskedLM.from_pretrained(BASE_MODEL, attn_implementation="eager")


def pretrain_base(seed: int = 0, *, steps: int = 300, batch_size: int = 192, progress: bool = True) -> Any:
    """Trains the base model anew on grids whose rows are independent random permutations of 1, 2, 3, 4.

    Deterministic for a seed (and a number of threads). About half a minute on 2 cores.
    """
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM, get_cosine_schedule_with_warmup

    from dam.train.terminal import bar

    pad_token = SIDE + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Pre-norm and a wide initialisation: post-norm models of this size learn columns and boxes far more slowly.
        configuration: dict[str, Any] = dict(
            vocab_size=SIDE + 2,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=CELLS + pad_token + 1,  # positions are counted from pad_token + 1
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            pad_token_id=pad_token,
            bos_token_id=None,
            eos_token_id=None,
            mask_token_id=BLANK,
            attn_implementation="eager",  # as in base_model
            architectures=["RobertaPreLayerNormForMaskedLM"],
        )
        model = RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**configuration))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    permutations = torch.tensor(list(itertools.permutations(range(1, SIDE + 1))))
    process, denoiser = MaskedCTMC(mask_token=BLANK), MaskedLM(model)
    weight = torch.ones(batch_size, 1)
    blank = torch.full((batch_size, CELLS), BLANK)
    for _ in bar(steps, iterable=range(steps), desc="pretraining the base", disable=not progress):
        choice = torch.randint(len(permutations), (batch_size, SIDE), generator=generator)
        grids = permutations[choice].flatten(1)
        # Denoising is matching with weight 1: the posterior under the data.
        states = process.remask(blank, grids, generator)
        targets = group_targets("posterior", states[:, None], grids[:, None], weight, process)
        loss = estimator_loss(denoiser, targets, process)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def as_text(grid: Sequence[int], puzzle: Sequence[int] | None = None) -> list[str]:
    """Four lines that show a grid; blanks as dots, and cells that `puzzle` left blank in brackets."""
    lines = []
    for row in range(SIDE):
        cells = []
        for cell in range(SIDE * row, SIDE * (row + 1)):
            value = "." if grid[cell] == BLANK else str(int(grid[cell]))
            cells.append(f"[{value}]" if puzzle is not None and puzzle[cell] == BLANK else f" {value} ")
        lines.append("".join(cells))
    return lines
