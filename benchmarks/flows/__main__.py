"""Studies of dam.flows against what is known: python -m benchmarks.flows STUDY [--json FILE] [--help].

Each prints its table. With --json it writes its figures, what they are of and on what they were measured, and beside
the file a plot of the same name, where there is something to plot. One thread.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dam.backends import cpu
from dam.benchmarks import records, report

PROG = "python -m benchmarks.flows"
# Modules of this folder. One is imported where it is asked for: another's may need what is not installed.
STUDIES = {
    "mixtures": "learners toward the tilt of a two-dimensional mixture, over temperatures",
    "samplers": "samplers of densities, beside exact samples",
    "cost": "time and memory of a learner's step, beside a plain loop in torch",
}


class Study(Protocol):
    """What the module of a study has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its sizes and budget: all of them are written into the JSON."""

    def study(self, given: dict[str, Any]) -> dict[str, Any]:
        """Figures for the JSON, by what was given."""

    def text_of(self, found: dict[str, Any]) -> str:
        """Tables of a JSON, as they stand in a page."""

    def draw(self, path: Path, found: dict[str, Any]) -> None:
        """Writes a plot of a JSON, where there is something to plot."""


def of(name: str) -> Study:
    """The module of a study.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    module: Any = importlib.import_module(f"dam.benchmarks.flows.{name}")
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="study", required=True)
    for name, text in STUDIES.items():
        one = parsers.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            one.description = of(name).__doc__
            of(name).add_arguments(one)
        one.add_argument("--json", metavar="FILE", type=Path, help="where its figures go, and a plot beside it")
    options = vars(parser.parse_args(given))
    name, path = options.pop("study"), options.pop("json")
    torch.set_num_threads(1)
    versions, began = records.versions(), time.process_time()
    found = of(name).study(options)
    machine = {"device": report.device(), "cpu": report.cpu_model(), "instruction_set": cpu.isa(), "threads": 1}
    command = ["python", "-m", "benchmarks.flows", *(part for part in given if path is None or part != str(path))]
    found = {
        **versions,
        **machine,
        "command": [part for part in command if part != "--json"],
        "processor_seconds": time.process_time() - began,
        **options,
        **found,
    }
    print(of(name).text_of(found))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(path, found)
        of(name).draw(path.with_suffix(".png"), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
