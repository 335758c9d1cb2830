"""The studies of the method: python -m experiments grid|ising|potts|moves|sudoku|orders|countdown|...

Those before orders ask which estimator learns most from a reward call, by `estimators` and `lattice`, of chains of
listed moves by `moves`; exact holds what is learned on graphs, mazes and sequences to answers that are known; orders
asks what keeps a run from p* whose base is a network, countdown what keeps a text model from learning; ablations and
guidance train nothing; runs prints the figures of finished `dam sudoku` or `dam countdown` runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import options as of_benchmarks
from benchmarks import records, report
from experiments import ablations, attainable, densities, estimators, guidance, lattice, moves
from experiments.densities import Grid
from experiments.exact import study as exact

PROG = "python -m experiments"
RESULTS = Path(__file__).parent / "results"
STUDIES = {
    "grid": "two tokens on a grid",
    "ising": "an Ising lattice",
    "potts": "a Potts lattice",
    "sudoku": "the main job, estimator by estimator",
    "moves": "chains of swaps and hops, against enumeration",
    "exact": "graphs, mazes and sequences whose optimum is known",
    "orders": "a small network as base, against enumeration",
    "countdown": "a text model, one setting after another changed",
}
DESCRIPTION = f"{estimators.__doc__}\n{lattice.__doc__}"
TABLES = {
    "ablations": "what an estimator owes to its parts, on tables where all is known",
    "chain": "the target of a chain of independent positions, by vocabulary and length",
    "guidance": "samples of a 4 x 4 Ising lattice by reward calls at test time",
    "readme": "README's fine-tuning block, as it stands",
}
RUNS = "figures of finished runs of `dam sudoku` or `dam countdown`"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROG, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    on = {name: studies.add_parser(name, help=text) for name, text in {**STUDIES, **TABLES, "runs": RUNS}.items()}
    on["moves"].add_argument("--case", choices=list(moves.CASES), default="occupation", help="default: %(default)s")
    known = "nothing is learned: what the optimum's rates, and what is fitted to them, come to"
    on["moves"].add_argument("--attainable", action="store_true", help=known)
    for name in ("grid", *lattice.LATTICES):
        if name != "potts":
            on[name].add_argument("--base", choices=("masked", "uniform"), default="masked")
        on[name].add_argument("--name", help="of the JSON and PNG (default: by density and base)")
    defaults = {"grid": estimators.Options(), **dict.fromkeys(lattice.LATTICES, lattice.OPTIONS)}
    for name, default in {**defaults, "moves": moves.Options()}.items():
        add = on[name].add_argument
        for field in dataclasses.fields(default):
            value = getattr(default, field.name)
            add(f"--{field.name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    seeds_of = {"grid": 5, "ising": 5, "potts": 5, "moves": 5, "exact": 3, "sudoku": 2, "orders": 2, "countdown": 1}
    for name, seeds in seeds_of.items():
        every = "; ".join(estimators.learners_of({"study": name}))
        on[name].add_argument("--learners", nargs="+", metavar="NAME", help=f"of {every} (default: most of them)")
        on[name].add_argument("--seeds", type=int, default=seeds, help="seeds 0 .. N-1 (default: %(default)s)")
        several = "runs at a time, with a thread each if several (default: %(default)s)"
        on[name].add_argument("--processes", type=int, default=1, help=several)
        on[name].add_argument("--output", metavar="DIR", type=Path, help="default: experiments/results/<device>")
    add = on["grid"].add_argument
    add("--density", choices=densities.DENSITIES, default=Grid.name)
    add("--size", type=int, default=Grid.size, help="points of an axis (default: %(default)s)")
    add("--published-times", type=int, default=1, help="as many rounds for the published estimator (default: 1)")
    for name, density in lattice.LATTICES.items():
        add = on[name].add_argument
        for of in dataclasses.fields(density):
            add(f"--{of.name}", type=type(of.default), default=of.default, help="default: %(default)s")
        add("--samples", type=int, default=16_384, help="that figures are of (default: %(default)s)")
        add("--group-size", type=int, help="K of the group normaliser (default: the batch)")
        seen = "an MLP of all sites, or of what lies around each one (experiments/centred.py; default: %(default)s)"
        add("--network", choices=("mlp", "centred"), default="mlp", help=seen)
        add("--width", type=int, default=256, help="of the network (default: %(default)s)")
        add("--reach", type=int, help="how far a centred network sees along an axis (default: the whole lattice)")
    add = on["exact"].add_argument
    add("--task", choices=exact.CASES, required=True)
    add("--name", help="of the JSON and PNG (default: by the task)")
    for field in dataclasses.fields(estimators.Options):
        kind = type(getattr(estimators.Options(), field.name))
        add(f"--{field.name.replace('_', '-')}", type=kind, help="default: the task's")
    on["sudoku"].add_argument("--calls", type=int, default=28_672, help="reward calls (default: %(default)s)")
    on["countdown"].add_argument("--calls", type=int, default=16_384, help="reward calls (default: %(default)s)")
    add = on["orders"].add_argument
    add("--steps", type=int, default=2400, help="default: %(default)s")
    add("--name", default="orders", help="of the JSON (default: %(default)s)")
    for name in TABLES:
        on[name].add_argument("--output", metavar="DIR", type=Path, help="default: experiments/results/<device>")
    positive = of_benchmarks.positive
    repeats, positions = "groups of K trajectories (default: %(default)s)", "of all sequences (default: %(default)s)"
    on["ablations"].add_argument("--repeats", type=positive, default=2000, help=repeats)
    on["chain"].add_argument("--positions", type=positive, default=256, help=positions)
    on["guidance"].add_argument("--samples", type=positive, default=1024, help="default: %(default)s")
    add = on["runs"].add_argument
    add("runs", nargs="+", metavar="DIR", type=Path, help="folder of a run")
    add("--task", choices=("sudoku", "countdown"), default="sudoku", help="of the runs (default: %(default)s)")
    add("--puzzles", metavar="FILE", help="of Sudoku: another puzzle file")
    add("--problems", metavar="FILE", help="of Countdown: other problems (default: those held out)")
    add("--json", metavar="FILE", type=Path, help="also write the figures")
    given = vars(parser.parse_args(arguments))
    if given["study"] == "runs":
        return print_runs(given)
    if given["study"] in TABLES:
        return print_tables(given)
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
    elif given["study"] == "moves" and given["attainable"]:
        text = attainable.study(given["case"], output)
    elif given["study"] == "moves":
        named = {field.name: given[field.name] for field in dataclasses.fields(moves.Options)}
        text = moves.study(given, moves.Options(**named), output)
    else:
        options = estimators.Options(
            **{field.name: given[field.name] for field in dataclasses.fields(estimators.Options)}
        )
        run = estimators.study_grid if given["study"] == "grid" else lattice.study
        text = run(given, options, output)
    print(f"\n{text}\n\nJSON and PNG: {output}")
    return 0


def print_tables(given: dict[str, Any]) -> int:
    output = given["output"] or RESULTS / report.device()
    output.mkdir(parents=True, exist_ok=True)
    if given["study"] == "ablations":
        text = ablations.study(output, given["repeats"])
    elif given["study"] == "chain":
        text = ablations.study_chain(output, given["positions"])
    elif given["study"] == "readme":
        from experiments import readme

        text = readme.study(output)
    else:
        text = guidance.study(output, given["samples"])
    print(f"\n{text}\n\nJSON: {output}")
    return 0


def print_runs(given: dict[str, Any]) -> int:
    from dam.tasks.sudoku import read_puzzles
    from experiments import countdown, sudoku  # need transformers

    if given["task"] == "countdown":
        figures = countdown.figures(given["runs"], given["problems"])
    else:
        puzzles = given["puzzles"]
        figures = sudoku.figures(given["runs"], None if puzzles is None else read_puzzles(puzzles))
    print(json.dumps(figures, indent=2))
    if given["json"] is not None:
        # Versions are of what evaluates; those of what trained stand in each run's figures, and so does its budget.
        budget = sorted({run["reward_calls"] for run in figures if "base" not in run})
        of_all = {**records.versions(), "device": report.device(), "reward_calls": budget}
        report.write_json(given["json"], {**of_all, "results": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
