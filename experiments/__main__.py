"""The studies of the method: python -m experiments grid|ising|sudoku|exact|orders|countdown|runs [--help].

The first three ask which estimator learns most from a reward call, by `estimators`; exact holds what is learned on
graphs and sequences to answers that are known; orders asks what keeps a run from
p* whose base is a network, countdown what keeps a text model from learning; runs prints the figures of finished
`dam sudoku` or `dam countdown` runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from experiments import densities, estimators
from experiments.densities import Grid, Ising
from experiments.exact import study as exact

PROG = "python -m experiments"
RESULTS = Path(__file__).parent / "results"
STUDIES = {
    "grid": "two tokens on a grid",
    "ising": "an Ising lattice",
    "sudoku": "the main job, estimator by estimator",
    "exact": "graphs and sequences whose optimum is known",
    "orders": "a small network as base, against enumeration",
    "countdown": "a text model, one setting after another changed",
}
RUNS = "figures of finished runs of `dam sudoku` or `dam countdown`"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROG, description=estimators.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    on = {name: studies.add_parser(name, help=text) for name, text in {**STUDIES, "runs": RUNS}.items()}
    for name, default in (("grid", estimators.Options()), ("ising", estimators.ISING)):
        add = on[name].add_argument
        add("--base", choices=("masked", "uniform"), default="masked")
        add("--name", help="of the JSON and PNG (default: by density and base)")
        for field in dataclasses.fields(estimators.Options):
            value = getattr(default, field.name)
            add(f"--{field.name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    for name, seeds in (("grid", 5), ("ising", 5), ("sudoku", 2), ("exact", 3), ("orders", 2), ("countdown", 1)):
        every = "; ".join(estimators.learners_of({"study": name}))
        on[name].add_argument(
            "--learners", nargs="+", metavar="NAME", help=f"of {every} (default: all but variants of path)"
        )
        on[name].add_argument("--seeds", type=int, default=seeds, help="seeds 0 .. N-1 (default: %(default)s)")
        several = "runs at a time, with a thread each if several (default: %(default)s)"
        on[name].add_argument("--processes", type=int, default=1, help=several)
        on[name].add_argument("--output", metavar="DIR", type=Path, help="default: experiments/results/<device>")
    add = on["grid"].add_argument
    add("--density", choices=densities.DENSITIES, default=Grid.name)
    add("--size", type=int, default=Grid.size, help="points of an axis (default: %(default)s)")
    add("--published-times", type=int, default=1, help="as many rounds for the published estimator (default: 1)")
    add = on["ising"].add_argument
    for ising in dataclasses.fields(Ising):
        add(f"--{ising.name}", type=type(ising.default), default=ising.default, help="default: %(default)s")
    add("--samples", type=int, default=16_384, help="that figures are of (default: %(default)s)")
    add("--group-size", type=int, help="K of the group normaliser (default: the batch)")
    add = on["exact"].add_argument
    add("--task", choices=exact.CASES, required=True)
    for field in dataclasses.fields(estimators.Options):
        kind = type(getattr(estimators.Options(), field.name))
        add(f"--{field.name.replace('_', '-')}", type=kind, help="default: the task's")
    on["sudoku"].add_argument("--calls", type=int, default=28_672, help="reward calls (default: %(default)s)")
    on["countdown"].add_argument("--calls", type=int, default=16_384, help="reward calls (default: %(default)s)")
    add = on["orders"].add_argument
    add("--steps", type=int, default=2400, help="default: %(default)s")
    add("--name", default="orders", help="of the JSON (default: %(default)s)")
    add = on["runs"].add_argument
    add("runs", nargs="+", metavar="DIR", type=Path, help="folder of a run")
    add("--task", choices=("sudoku", "countdown"), default="sudoku", help="of the runs (default: %(default)s)")
    add("--puzzles", metavar="FILE", help="of Sudoku: another puzzle file")
    add("--problems", metavar="FILE", help="of Countdown: other problems (default: those held out)")
    add("--json", metavar="FILE", type=Path, help="also write the figures")
    given = vars(parser.parse_args(arguments))
    if given["study"] == "runs":
        return print_runs(given)
    for name in ("seeds", "processes"):
        if given[name] < 1:
            parser.error(f"--{name} must be at least 1; got {given[name]}")
    given["learners"] = given["learners"] or estimators.default_learners(given)
    for name in given["learners"]:
        if name not in estimators.learners_of(given):
            parser.error(f"no learner {name!r} in this study; there are {'; '.join(estimators.learners_of(given))}")
    return study(given)


def study(given: dict[str, Any]) -> int:
    """Runs a study and prints its table."""
    output = given["output"] or RESULTS / report.device()
    output.mkdir(parents=True, exist_ok=True)
    with_options_of_its_own = {
        "sudoku": estimators.study_sudoku,
        "exact": exact.study,
        "orders": estimators.study_orders,
        "countdown": estimators.study_countdown,
    }
    if given["study"] in with_options_of_its_own:
        text = with_options_of_its_own[given["study"]](given, output)
    else:
        options = estimators.Options(
            **{field.name: given[field.name] for field in dataclasses.fields(estimators.Options)}
        )
        run = estimators.study_grid if given["study"] == "grid" else estimators.study_ising
        text = run(given, options, output)
    print(f"\n{text}\n\nJSON and PNG: {output}")
    return 0


def print_runs(given: dict[str, Any]) -> int:
    from dam.tasks.sudoku import read_puzzles
    from experiments import countdown, sudoku  # need transformers

    if given["task"] == "countdown":
        figures = countdown.figures(given["runs"], given["problems"])
    else:
        puzzles = given["puzzles"]
        figures = sudoku.figures(given["runs"], None if puzzles is None else read_puzzles(puzzles))
    text = json.dumps(figures, indent=2)
    print(text)
    if given["json"] is not None:
        given["json"].write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
