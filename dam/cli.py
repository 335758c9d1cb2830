"""The command line: dam train, dam generate, dam eval, dam sudoku, dam countdown, dam bench, dam info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dam
from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.backends import choice, cpu, cuda, triton
from dam.commands import parsers


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command `dam`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dam", description="Discrete Adjoint Matching as fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, and which backends can run here")
    _add_sudoku(commands)
    _add_countdown(commands)
    parsers.add(commands)
    # Its options are those of `python -m benchmarks`.
    bench = "measure the operations against their floors, their peers and a function of yours"
    commands.add_parser("bench", help=bench, add_help=False)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:
        return importlib.import_module("dam.benchmarks.report").main(arguments[1:], "dam bench")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if options.command in parsers.COMMANDS:
        return parsers.run(options)
    return _run_of_a_task(options)


def info() -> str:
    """Version, and which backends can run here and why not the others."""
    lines = [f"dam {dam.__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    for name in choice.BACKENDS:
        reason = choice.why_unavailable(name)
        lines.append(f"{name:7}" + (f"available{_detail(name)}" if reason is None else f"not available: {reason}"))
    return "\n".join(lines)


def _detail(backend: str) -> str:
    """What an available backend runs on."""
    if backend == "cpu":
        return f", instruction set {cpu.isa()}, bfloat16 by {cpu.instructions()}, {torch.get_num_threads()} threads"
    if backend == "triton":
        version = importlib.metadata.version("triton")
        where = "interpreted on the CPU" if triton.INTERPRETED else torch.cuda.get_device_name()
        return f", Triton {version}, {where}"
    if backend == "cuda":
        return ", emulated on the CPU" if cuda.EMULATED else f", {torch.cuda.get_device_name()}"
    return ""


def _add_sudoku(commands: argparse._SubParsersAction) -> None:
    sudoku = commands.add_parser(
        "sudoku",
        help="fine-tune a small masked-diffusion model on 4x4 Sudoku",
        description="Fine-tunes a model that knows rows only until it solves 4x4 Sudoku, from rewards alone.",
        argument_default=argparse.SUPPRESS,  # a resumed run takes what is not given from its first part
    )
    add = sudoku.add_argument
    add("--puzzles", metavar="FILE", help="evaluate on a CSV file Puzzle,Solution instead of the held-out split")
    add("--reward-calls", metavar="N", type=int, help="budget of reward evaluations (default: 114688)")
    add("--reward", choices=("units", "cells"), help="units (default) needs no solution; cells is d1's")
    add("--blanks", metavar="M", type=int, help="blanks of the held-out puzzles (default: 8)")
    add("--pretrain", action="store_true", help="make the base model anew instead of loading the shipped one")
    _add_options_of_a_run(add)


def _add_countdown(commands: argparse._SubParsersAction) -> None:
    countdown = commands.add_parser(
        "countdown",
        help="train a tiny text model on careless sums, and fine-tune it on Countdown",
        description="Trains a tiny text model on careless sums, most of them wrong, then fine-tunes it on Countdown "
        "from the reward of right answers alone.",
        argument_default=argparse.SUPPRESS,
    )
    add = countdown.add_argument
    add("--problems", metavar="FILE", help="evaluate on JSON lines {input, output} instead of the held-out set")
    add("--reward-calls", metavar="N", type=int, help="budget of reward evaluations (default: 65536)")
    add("--pretraining-steps", metavar="N", type=int, help="of the base (default: 2000)")
    add(
        "--reward",
        choices=("correct", "closeness", "constant"),
        help="default: correct; constant is a reward with a bug",
    )
    _add_options_of_a_run(add)


def _add_options_of_a_run(add: Any) -> None:
    add("--output", metavar="DIR", type=Path, default=None, help="folder of the results (default: a new one in runs/)")
    add("--estimator", choices=ESTIMATORS, help="default: posterior")
    add("--normalizer", choices=NORMALIZERS, help="what a group's trajectories share (default: group)")
    add("--seed", metavar="S", type=int, help="default: 0")
    add("--null-arm", action="store_true", help="control: permute the weights within each group")
    add("--resume", action="store_true", default=False, help="continue the run in --output (default: the newest one)")


def _run_of_a_task(arguments: argparse.Namespace) -> int:
    try:
        from dam.tasks import finetune, finetune_countdown, finetune_sudoku
    except ImportError as error:
        print(f"dam {arguments.command}: {error}", file=sys.stderr)
        return 1
    tasks: dict[str, Any] = {task.name: task for task in (finetune_sudoku.Sudoku, finetune_countdown.Countdown)}
    return finetune.command(tasks[arguments.command], arguments)


if __name__ == "__main__":
    sys.exit(main())
