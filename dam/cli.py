"""The command line: dam sudoku, dam info."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import dam
from dam.ops import _backend, _cpu


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command `dam`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dam", description="Discrete Adjoint Matching as fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, and which backends can run here")
    _add_sudoku(commands)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    return _sudoku(options)


def info() -> str:
    """Version, and which backends can run here and why not the others."""
    lines = [f"dam {dam.__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    for name in _backend.BACKENDS:
        reason = _backend.why_unavailable(name)
        detail = f", instruction set {_cpu.isa()}, {torch.get_num_threads()} threads" if name == "cpu" else ""
        lines.append(f"{name:7}" + (f"available{detail}" if reason is None else f"not available: {reason}"))
    return "\n".join(lines)


def _add_sudoku(commands: argparse._SubParsersAction) -> None:
    sudoku = commands.add_parser(
        "sudoku",
        help="fine-tune a small masked-diffusion model on 4x4 Sudoku",
        description="Fine-tunes a model that knows rows only until it solves 4x4 Sudoku, from rewards alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sudoku.add_argument(
        "--puzzles", metavar="FILE", help="CSV file Puzzle,Solution to evaluate on instead of the held-out split"
    )
    sudoku.add_argument(
        "--output", metavar="DIR", type=Path, help="where results go (a new folder in runs/ unless given)"
    )
    sudoku.add_argument("--reward-calls", metavar="N", type=int, default=114688, help="budget of reward evaluations")
    sudoku.add_argument("--estimator", choices=("posterior", "first_jump", "first_jump_one"), default="posterior")
    sudoku.add_argument("--normalizer", choices=("group", "state"), default="group")
    sudoku.add_argument(
        "--reward", choices=("units", "cells"), default="units", help="units needs no solution; cells is d1's"
    )
    sudoku.add_argument("--blanks", metavar="M", type=int, default=8, help="blanks of the held-out puzzles")
    sudoku.add_argument("--seed", type=int, default=0)
    sudoku.add_argument(
        "--pretrain", action="store_true", help="make the base model anew instead of loading the shipped one"
    )
    sudoku.add_argument("--null-arm", action="store_true", help="control: permute the weights within each group")
    sudoku.add_argument("--resume", action="store_true", help="continue the run in --output (or the newest one)")


def _sudoku(arguments: argparse.Namespace) -> int:
    try:
        from dam.tasks import finetune_sudoku as job
        from dam.train.rewards import RewardError
    except ImportError as error:
        print(f"dam sudoku: {error}", file=sys.stderr)
        return 1
    fields = {field.name for field in dataclasses.fields(job.Options)}
    options = job.Options(**{name: value for name, value in vars(arguments).items() if name in fields})
    try:
        output = arguments.output or (job.last_output() if arguments.resume else job.next_output())
        result = job.finetune(output, options, resume=arguments.resume)
    except (ValueError, OSError, RewardError) as error:
        print(f"dam sudoku: {error}", file=sys.stderr)
        return 1
    except job.Stopped as stop:
        print(f"dam sudoku: {stop}. Continue with: dam sudoku --resume --output {output}", file=sys.stderr)
        return 130
    print(job.report(result))
    print(f"\nmodel, metrics and plot: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
