"""Figures of finished `dam sudoku` runs: python -m benchmarks.sudoku DIR [DIR ...] [--puzzles FILE] [--json FILE].

Prints each run's metrics.json, and how its saved model does on another puzzle file: on all of it, and on the puzzles
whose listed solution is none of the training grids.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="DIR", type=Path)
    parser.add_argument("--puzzles", metavar="FILE", help="another puzzle file")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    other = None if options.puzzles is None else sudoku.read_puzzles(options.puzzles)
    results = []
    for run in options.runs:
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        del result["example"]
        result["null_arm"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]["null_arm"]
        if other is not None:
            model = AutoModelForMaskedLM.from_pretrained(run)
            result["other_file"] = evaluated(model, other)
            result["other_file_unseen"] = evaluated(model, unseen(other))
        results.append(result)
    if other is not None:
        base = sudoku.base_model()
        results.append(
            {"base": True, "other_file": evaluated(base, other), "other_file_unseen": evaluated(base, unseen(other))}
        )
    text = json.dumps(results, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
