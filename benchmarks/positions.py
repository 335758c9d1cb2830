"""Sudoku's model run at the positions that are read, beside the whole model as transformers runs it.

    python -m benchmarks.positions                          a rollout's calls and training steps, by their rows
    python -m benchmarks.positions --reward-calls 16384     and the rollouts of a shortened `dam sudoku`, in turn
    ... --json FILE                                         its figures, and the sizes that they are of

One thread; time is of this process' CPU, so that other work on the machine shows less. In caches it shows all the same,
and of two whole runs one may meet more of it: so one rollout of a run, with its training steps and an evaluation, goes
one way and the next the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from dam.backends import cpu
from dam.benchmarks import records, report
from dam.benchmarks.equal_rows import alternating, shortened
from dam.models import PreNormRoberta
from dam.tasks import finetune_sudoku, sudoku


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


class InTurn(TrainerCallback):
    """Switches between two ways with each rollout, and takes the time of each; the first of both are not counted."""

    def __init__(self, steps: int):
        self.steps, self.seconds, self._start = steps, [], 0.0

    @property
    def way(self) -> int:
        return len(self.seconds) % 2

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            now = time.process_time()
            self.seconds.append(now - self._start)
            self._start = now

    def figures(self) -> dict[str, float]:
        at, whole = self.seconds[2::2], self.seconds[3::2]
        ratio = statistics.median(second / first for first, second in zip(at, whole, strict=True))
        medians = {"positions": statistics.median(at), "whole": statistics.median(whole)}
        return {**{f"seconds, {name}": value for name, value in medians.items()}, "ratio": ratio, "pairs": len(at)}


def in_turn(reward_calls: int) -> dict[str, float]:
    """Figures of a `dam sudoku` whose rollouts, of an even number, go both ways in turn."""
    turns, own = InTurn(finetune_sudoku.Sudoku.iterations), PreNormRoberta._takes_own_pass
    with (
        mock.patch.object(finetune_sudoku.Sudoku, "callbacks", lambda _: [turns]),
        mock.patch.object(PreNormRoberta, "_takes_own_pass", lambda *given: turns.way == 0 and own(*given)),
    ):
        shortened(reward_calls)
    return turns.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 192, 1024])
    for name, default in {"repeats": 15, "reward-calls": 0}.items():
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
        figures |= {f"dam sudoku, a rollout: {name}": value for name, value in in_turn(args.reward_calls).items()}
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {**records.versions(), "cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        report.write_json(args.json, {**machine, **sizes, "figures": figures})


if __name__ == "__main__":
    main()
