"""The command line: dam train, dam generate, dam eval, dam sampler, dam sudoku, dam countdown, dam bench, dam info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dam
from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.backends import choice, cpu, cuda, triton
from dam.commands import parsers
from dam.kernels import environment

# That the commands use, of the extras too.
_PACKAGES = ("torch", "numpy", "triton", "transformers", "accelerate", "peft", "safetensors", "datasets", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command `dam`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dam", description="Discrete Adjoint Matching as fused kernels.")
    parser.add_argument("--version", action="version", version=f"dam {dam.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("info", help="versions, which backends can run here, and DAM_* variables that are wrong")
    told.add_argument("--json", action="store_true", help="the same as a JSON object")
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
        found = info()
        print(json.dumps(found, indent=2) if options.json else as_text(found))
        return 1 if found["faults"] else 0
    if faults := environment.faults():
        print(f"dam {options.command}: {'; '.join(faults)}", file=sys.stderr)
        return 1
    if options.command in parsers.COMMANDS:
        return parsers.run(options)
    return _run_of_a_task(options)


def info() -> dict[str, Any]:
    """What is installed, which backends can run here and why not the others, and what the environment sets.

    Returns:
        dam, python, and a version of each package of `_PACKAGES` (None: not installed); backends, by name either
        {"available": True, "detail": what it runs on} or {"available": False, "reason": ...}; environment, the DAM_*
        variables that are set; faults, what is wrong with them; unread, which of them nothing reads.
    """
    return {
        "dam": dam.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "backends": {name: _backend(name) for name in choice.BACKENDS},
        "environment": {name: text for name, text in sorted(os.environ.items()) if name in environment.VARIABLES},
        "faults": environment.faults(),
        "unread": environment.unread(),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What `info` found, in lines."""
    lines = [f"dam {found['dam']}, torch {found['torch']}, Python {found['python']}"]
    for name, backend in found["backends"].items():
        if backend["available"]:
            lines.append(f"{name:7}available" + (f", {backend['detail']}" if backend["detail"] else ""))
        else:
            lines.append(f"{name:7}not available: {backend['reason']}")
    lines.append("with   " + ", ".join(f"{name} {found[name]}" for name in _PACKAGES[1:] if found[name] is not None))
    if found["environment"]:
        lines.append("environment: " + ", ".join(f"{name}={text}" for name, text in found["environment"].items()))
    lines += [f"error: {fault}" for fault in found["faults"]]
    lines += [f"note: {name} is set, and nothing in dam reads it" for name in found["unread"]]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with what it was built for behind a plus sign
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> dict[str, Any]:
    reason = choice.why_unavailable(name)
    if reason is None:
        try:
            return {"available": True, "detail": _detail(name)}
        except (RuntimeError, ValueError) as error:  # instructions that are asked for and not there
            reason = str(error)
    return {"available": False, "reason": reason}


def _detail(backend: str) -> str:
    """What an available backend runs on."""
    if backend == "cpu":
        return f"instruction set {cpu.isa()}, bfloat16 by {cpu.instructions()}, {torch.get_num_threads()} threads"
    if backend == "triton":
        where = "interpreted on the CPU" if triton.INTERPRETED else torch.cuda.get_device_name()
        return f"Triton {_version('triton')}, {where}"
    if backend == "cuda":
        return "emulated on the CPU" if cuda.EMULATED else torch.cuda.get_device_name()
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
