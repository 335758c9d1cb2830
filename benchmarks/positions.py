"""Sudoku's model run at the positions that are read, beside the whole model as transformers runs it.

    python -m benchmarks.positions                          a rollout's calls and training steps, by their rows
    python -m benchmarks.positions --reward-calls 8192      and a shortened `dam sudoku`
    ... --json FILE                                         its figures, and the sizes that they are of

One thread; time is of this process' CPU, so that other work on the machine shows less.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, report
from benchmarks.equal_rows import alternating, shortened
from dam.models import PreNormRoberta
from dam.tasks import sudoku


def calls(denoiser: PreNormRoberta, states: Tensor) -> dict[str, Callable[[], Any]]:
    """A rollout's call, which reads one masked position of each row, and a training step's, which reads all."""
    masked = states == sudoku.BLANK
    row, position = torch.nonzero(masked, as_tuple=True)
    one, first, seen = torch.arange(len(states)), masked.long().argmax(dim=1), torch.ones_like(states)

    def drawn() -> Tensor:
        with torch.no_grad():
            return denoiser.hidden_at(states, seen, one, first)

    def trained() -> Tensor:
        denoiser.model.zero_grad()
        hidden = denoiser.hidden_at(states, seen, row, position)
        hidden.square().mean().backward()
        return hidden.detach()

    return {"rollout": drawn, "training": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 192, 1024])
    for name, default in {"repeats": 15, "reward-calls": 0, "runs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser, (grids, _) = PreNormRoberta(sudoku.base_model().eval()), sudoku.split_grids()
    own = PreNormRoberta._takes_own_pass
    difference = (PreNormRoberta, "_takes_own_pass", {"positions": own, "whole": lambda *_: False})
    figures: dict[str, Any] = {}
    for rows in args.rows:
        for name, run in calls(denoiser, sudoku.draw_puzzles(grids, rows, (3, 8), 0).puzzle).items():
            run()  # the trials
            found, (at, whole) = alternating(run, args.repeats, *difference)
            figures |= {f"{name}, {rows} rows: {key}": value for key, value in found.items()}
            figures[f"{name}, {rows} rows: largest difference"] = float((at - whole).abs().max())
    if args.reward_calls:
        shortened(1024)  # imports
        found, results = alternating(functools.partial(shortened, args.reward_calls), args.runs, *difference)
        figures |= {f"dam sudoku: {name}": value for name, value in found.items()}
        for name in ("solved", "cells"):
            figures[f"dam sudoku: {name}, positions and whole"] = tuple(result[name] for result in results)
    for name, value in figures.items():
        print(f"{name}: {value if isinstance(value, tuple) else f'{value:.4g}'}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        report.write_json(args.json, {**records.versions(), **sizes, "figures": figures})


if __name__ == "__main__":
    main()
