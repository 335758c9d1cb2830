"""The command line: dam sudoku, dam bench, dam info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import dam
from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.backends import choice, cpu, cuda, triton


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command `dam`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dam", description="Discrete Adjoint Matching as fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, and which backends can run here")
    _add_sudoku(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    return _bench(options) if options.command == "bench" else _sudoku(options)


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
        return f", instruction set {cpu.isa()}, {torch.get_num_threads()} threads"
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
    add("--output", metavar="DIR", type=Path, default=None, help="folder of the results (default: a new one in runs/)")
    add("--reward-calls", metavar="N", type=int, help="budget of reward evaluations (default: 114688)")
    add("--estimator", choices=ESTIMATORS, help="default: posterior")
    add("--normalizer", choices=NORMALIZERS, help="what a group's trajectories share (default: group)")
    add("--reward", choices=("units", "cells"), help="units (default) needs no solution; cells is d1's")
    add("--blanks", metavar="M", type=int, help="blanks of the held-out puzzles (default: 8)")
    add("--seed", metavar="S", type=int, help="default: 0")
    add("--pretrain", action="store_true", help="make the base model anew instead of loading the shipped one")
    add("--null-arm", action="store_true", help="control: permute the weights within each group")
    add("--resume", action="store_true", default=False, help="continue the run in --output (default: the newest one)")


def _sudoku(arguments: argparse.Namespace) -> int:
    try:
        from dam.tasks import finetune, finetune_sudoku
    except ImportError as error:
        print(f"dam sudoku: {error}", file=sys.stderr)
        return 1
    return finetune.command(finetune_sudoku.Sudoku, arguments)


_SIZES = {
    "rows": "T",
    "vocabulary": "V",
    "hidden": "D",
    "groups": "G",
    "trajectories": "K, of a group",
    "steps": "S, of a trajectory",
    "sequences": "B, of a rollout",
    "length": "L, of a sequence",
}


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure the operations against their floors and their peers (in a checkout)",
        description="Prints median times, ratios within the run and peak memory, and writes them as JSON and PNG.",
    )
    add = bench.add_argument
    add("ops", nargs="*", metavar="op", help="operations to measure (default: all)")
    for name, meaning in _SIZES.items():
        add(f"--{name}", metavar="N", type=_positive, help=f"{meaning} (default: the op's own)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--threads", metavar="N", type=_positive, default=torch.get_num_threads())
    add("--repeats", metavar="N", type=_positive, default=9, help="calls of each function (default: 9)")
    add("--no-memory", action="store_true", help="leave out peak memory, which takes a process per function")
    add("--no-peers", action="store_true", help="measure dam and its floor alone")
    add("--no-compiled", action="store_true", help="leave out the peers that torch.compile makes")
    add("--output", metavar="DIR", type=Path, help="folder of JSON and PNG (default: benchmarks/results/<device>)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def _bench(arguments: argparse.Namespace) -> int:
    checkout = Path(dam.__file__).parents[1]
    if not (checkout / "benchmarks" / "report.py").is_file():
        print("dam bench: the benchmarks are in dam's source repository; run this in a checkout", file=sys.stderr)
        return 1
    if (reason := choice.why_unavailable("cpu")) is not None:
        print(f"dam bench: {reason}", file=sys.stderr)
        return 1
    sys.path.insert(0, str(checkout))  # an installed command does not look there
    report = importlib.import_module("benchmarks.report")
    options = report.Options(
        sizes={name: value for name in _SIZES if (value := getattr(arguments, name)) is not None},
        dtype=arguments.dtype,
        threads=arguments.threads,
        repeats=arguments.repeats,
        memory=not arguments.no_memory,
        peers=not arguments.no_peers,
        compiled=not arguments.no_compiled,
    )
    try:
        output = report.run(arguments.ops, options, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"dam bench: {error}", file=sys.stderr)
        return 1
    print(f"\nJSON and PNG: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
