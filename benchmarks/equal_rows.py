"""Rollouts of groups of trajectories that run equal rows of a network call once, beside ones that run each.

    python -m benchmarks.equal_rows                          of Sudoku's model and its base, 64 puzzles by 16
    python -m benchmarks.equal_rows --reward-calls 8192      and a shortened `dam sudoku`
    ... --json FILE                                          its figures, and the sizes that they are of

One thread; time is of this process' CPU, so that other work on the machine does not show.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dam.backends import cpu
from dam.benchmarks import records, report
from dam.ctmc import MaskedCTMC
from dam.models import MaskedLM
from dam.rollout import Trajectories, rollout
from dam.tasks import finetune_sudoku, sudoku


def alternating(
    run: Callable[[], Any], repeats: int, owner: type, method: str, ways: dict[str, Any]
) -> tuple[dict[str, float], list[Any]]:
    """Median seconds of two ways, their ratio, second to first, and what the last run of each gave.

    Args:
        run: what is timed.
        repeats: pairs.
        owner, method: what makes the difference.
        ways: by name, what stands for the method.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        results = []
        for name, kept in ways.items():
            with mock.patch.object(owner, method, kept):
                start = time.process_time()
                results.append(run())
                times[name].append(time.process_time() - start)
    ratio = statistics.median(second / first for first, second in zip(*times.values(), strict=True))
    return {**{f"seconds, {name}": statistics.median(each) for name, each in times.items()}, "ratio": ratio}, results


def shortened(reward_calls: int) -> dict[str, Any]:
    """A `dam sudoku` of so many reward calls; its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        options = finetune_sudoku.Options(reward_calls=reward_calls)
        return finetune_sudoku.finetune(Path(folder) / "run", options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prompts": 64, "generations": 16, "repeats": 5, "reward-calls": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    process = MaskedCTMC(mask_token=sudoku.BLANK)
    model, base = (MaskedLM(sudoku.base_model().eval()) for _ in range(2))
    grids, _ = sudoku.split_grids()
    tokens = sudoku.draw_puzzles(grids, args.prompts, (3, 8), 0).puzzle.repeat_interleave(args.generations, dim=0)

    def drawn() -> Trajectories:
        return rollout(model, tokens, process, base=base, seed=0)

    drawn()  # the trial
    difference = (MaskedLM, "equal_rows", {"once": MaskedLM.equal_rows, "each": lambda *_: False})
    figures, (once, each) = alternating(drawn, args.repeats, *difference)
    for name in ("final", "log_prob", "base_log_prob"):
        figures[f"largest difference of {name}"] = float((getattr(once, name) - getattr(each, name)).abs().max())
    if args.reward_calls:
        trained = functools.partial(shortened, args.reward_calls)
        found, (once, each) = alternating(trained, max(1, args.repeats // 3), *difference)
        figures |= {f"dam sudoku: {name}": value for name, value in found.items()}
        figures |= {f"dam sudoku: {name}, once and each": (once[name], each[name]) for name in ("solved", "cells")}
    for name, value in figures.items():
        print(f"{name}: {value if isinstance(value, tuple) else f'{value:.4g}'}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {**records.versions(), "cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        report.write_json(args.json, {**machine, **sizes, "figures": figures})


if __name__ == "__main__":
    main()
