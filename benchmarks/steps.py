"""A step of a rollout, but for its network, beside a call of Sudoku's model: python -m benchmarks.steps [--rows 1 16].

One thread; time of this process' CPU, of both in turn, medians. The rollouts' network costs nothing, and each of their
calls draws one token of every row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dam.backends import cpu
from dam.benchmarks import records, report
from dam.ctmc import MaskedCTMC
from dam.models import Head, as_denoiser
from dam.models.denoiser import hidden_at
from dam.rollout import rollout
from dam.tasks import sudoku

STEPS = 64  # of a rollout
VOCABULARY, HIDDEN = 100, 8


class Free:
    """A network that costs nothing."""

    def __init__(self, rows: int):
        self.states, self.weight = torch.randn(rows, STEPS, HIDDEN), torch.randn(VOCABULARY, HIDDEN)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.states[: len(tokens)]

    def head(self) -> Head:
        return Head(self.weight, None)


def functions(rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many steps of it are one call."""
    masks, process = torch.full((rows, STEPS), VOCABULARY - 1), MaskedCTMC(mask_token=VOCABULARY - 1)
    free, model = Free(rows), as_denoiser(sudoku.base_model().eval())
    puzzles = sudoku.draw_puzzles(sudoku.split_grids()[0], rows, (3, 8), 0).puzzle

    every, first = torch.arange(rows), (puzzles == sudoku.BLANK).long().argmax(dim=1)

    def call() -> Tensor:  # as a rollout's, which reads one position of each row
        with torch.no_grad():
            return hidden_at(model, puzzles, torch.ones_like(puzzles), every, first)

    return {
        "a step": (lambda: rollout(free, masks, process, seed=0), STEPS),
        "a step, with base": (lambda: rollout(free, masks, process, base=free, seed=0), STEPS),
        "Sudoku's model": (call, 1),
    }


def measure(of: dict[str, tuple[Callable[[], Any], int]], repeats: int) -> dict[str, float]:
    """Median seconds of the CPU for one step."""
    seconds: dict[str, list[float]] = {name: [] for name in of}
    for repeat in range(repeats + 1):
        for name, (function, steps) in of.items():
            start = time.process_time()
            for _ in range(STEPS // steps):
                function()
            if repeat:  # the first is to warm up
                seconds[name].append((time.process_time() - start) / STEPS)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    for rows in args.rows:
        medians = measure(functions(rows), args.repeats)
        for name, seconds in medians.items():
            figures[f"{name}, {rows} rows: seconds"] = seconds
        model = medians["Sudoku's model"]
        for name in ("a step", "a step, with base"):
            figures[f"{name}, {rows} rows: of Sudoku's model"] = medians[name] / model
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {"cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        report.write_json(args.json, {**records.versions(), **machine, **sizes, "figures": figures})


if __name__ == "__main__":
    main()
