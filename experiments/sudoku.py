"""Figures of finished `dam sudoku` runs: their metrics.json, and how the saved models do on another puzzle file.

On all of it, and on the puzzles whose listed solution is none of the training grids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM

from dam.tasks import finetune_sudoku, sudoku


def unseen(puzzles: sudoku.Puzzles) -> sudoku.Puzzles:
    """The puzzles whose listed solution is none of the training grids."""
    training = {tuple(grid) for grid in sudoku.split_grids()[0].tolist()}
    kept = [n for n, grid in enumerate(puzzles.solution.tolist()) if tuple(grid) not in training]
    return sudoku.Puzzles(puzzles.puzzle[kept], puzzles.solution[kept])


def evaluated(model: Any, puzzles: sudoku.Puzzles) -> dict[str, float]:
    filled = finetune_sudoku.fill_in(model, puzzles)
    return {"puzzles": len(filled), **sudoku.metrics(puzzles.puzzle, filled, puzzles.solution)}


def figures(runs: Sequence[Path], puzzles: sudoku.Puzzles | None = None) -> list[dict[str, Any]]:
    """Of each run and, if there are other puzzles, of the base model, which stands last."""
    results = []
    for run in runs:
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        del result["example"]
        result["null_arm"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]["null_arm"]
        if puzzles is not None:
            result |= on_others(AutoModelForMaskedLM.from_pretrained(run), puzzles)
        results.append(result)
    if puzzles is not None:
        results.append({"base": True, **on_others(sudoku.base_model(), puzzles)})
    return results


def on_others(model: Any, puzzles: sudoku.Puzzles) -> dict[str, Any]:
    return {"other_file": evaluated(model, puzzles), "other_file_unseen": evaluated(model, unseen(puzzles))}
