"""The figures of the studies, in experiments/README.md, README and docs, are those of the JSON beside them."""

import json
import math
import re
import statistics
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch

from dam.tasks import countdown_base, finetune_countdown
from experiments import ablations, attainable, guidance, invariants, lattice, moves
from experiments.estimators import grid_table, reached, seconds_table
from experiments.exact import study as exact
from experiments.exact.learner import KEPT, STEPPED
from tests import pages, provenance
from tests.measurements import differences
from tests.tables import NUMBER, agrees, is_figure, wrong

RESULTS = pages.ROOT / "experiments" / "results"
STUDY = "experiments/README.md"
# Pages whose tables are of the studies, all of them or none.
STUDIED = (STUDY, "docs/learning.md", "docs/choosing.md", "docs/rewards.md")


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def linked(table):
    """Results that the paragraph in front of a table links to, or in front of one above it in the same section."""
    above = [t for t in pages.tables(table.page) if t.heading == table.heading and t.line <= table.line]
    every = [re.findall(r"\]\(([^)\s]+\.json)\)", t.before) for t in above]
    last = next((found for found in reversed(every) if found), [])
    folder = (pages.ROOT / table.page).parent
    return tuple(str((folder / path).resolve().relative_to(RESULTS)) for path in last)


def of_page(tables):
    return [pytest.param(table, id=f"{table.page}:{table.line}") for table in tables]


# ---- tables as their study prints them


def of_results(*printers):
    """Prints tables of all results of some files."""
    return lambda *files: "\n\n".join(made([run for one in files for run in one["results"]]) for made in printers)


def of_exact(*files):
    columns = exact.CASES[files[0]["task"]].instance(0).columns
    return exact.table([run for one in files for run in one["results"]], columns)


# What prints the tables under a link to a JSON, by its path; it is given all that the same paragraph links to.
PRINTED = {
    "epyc-avx2-2-cores/chain.json": ablations.text_of_chain,
    "epyc-avx2-2-cores/exact-dna.json": of_exact,
    "epyc-avx2-2-cores/exact-maxcut-kept.json": of_exact,
    "epyc-avx2-2-cores/exact-maze.json": of_exact,
    "epyc-avx2-2-cores/exact-mis-kept.json": of_exact,
    "epyc-avx2-2-cores/ablations.json": ablations.text_of,
    "epyc-avx2-2-cores/guidance.json": guidance.text_of,
    "epyc-avx2-2-cores/ising-0.28-256000.json": of_results(lattice.lattice_table, lattice.network_calls_table),
    "epyc-avx2-2-cores/ising-0.4407-256000.json": of_results(lattice.lattice_table),
    "epyc-avx2-2-cores/potts-1.005-128000-mlp.json": of_results(lattice.lattice_table),
    "epyc-avx2-2-cores/potts-1.005-128000.json": lambda *files: lattice.lattices_table(files),
    **{
        f"epyc-avx2-2-cores/moves-{case}.json": lambda found: moves.table(found["results"], found["published"])
        for case in moves.CASES
    },
    "epyc-avx2-2-cores/moves-ising-attainable.json": lambda found: attainable.table(found["results"]),
    "epyc-avx2-2-cores/pinwheel-9-learners.json": of_results(grid_table, seconds_table),
    "epyc-avx2-2-cores/pinwheel-9-learners-network.json": of_results(grid_table),
}
# Every table of figures in the page of the studies.
FIGURES = [table for table in pages.tables(STUDY) if any(is_figure(cell) for row in table.rows for cell in row)]


@cache
def printed(files):
    return pages.tables_of(pages.parsed(PRINTED[files[0]](*map(read, files))))


def as_printed(table):
    return bool(linked(table)) and linked(table)[0] in PRINTED


@pytest.mark.parametrize("table", of_page(filter(as_printed, FIGURES)))
def test_tables_are_as_their_json_is_printed(table):
    files = linked(table)
    same = [other for other in printed(files) if other.head == table.head]
    assert len(same) == 1, f"{table.page}:{table.line}: of {files} no table with such columns is printed"
    assert table.rows == same[0].rows


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_of_a_json_stands_in_the_page(name):
    shown = [(linked(table), table.head) for table in FIGURES]
    (files,) = {files for files, _ in shown if files and files[0] == name}
    assert [head for other, head in shown if other == files] == [table.head for table in printed(files)]


# ---- a row for each learner: median over seeds, least and most, and what exact samples have


def last(figure):
    return lambda run: run["curve"][-1][figure]


def calls_to(level):
    return lambda run: reached(run["curve"], "kl", level)


def of_samples(figure):
    """What a run has, of [its own, exact samples'], or the last of its curve."""
    return lambda run: run[figure][0] if figure in run else run["curve"][-1][figure]


COLUMNS = {
    "reward calls": last("reward_calls"),
    "network calls": last("network_calls"),
    "KL(p*, p_u)": last("kl"),
    "calls to KL 1e-2": calls_to(1e-2),
    "to 1e-3": calls_to(1e-3),
    "to 1e-4": calls_to(1e-4),
    "ESS": lambda run: run["ess"],
    "KL(p_u, p*)": lambda run: run["kl"],
    "TV": of_samples("tv"),
    "magnetisation off by": of_samples("magnetisation_error"),
    "correlation off by": of_samples("correlation_error"),
    "solved": lambda run: run["solved"],
    "greedy": lambda run: run["greedy"],
    "sampled": lambda run: run["sampled"],
    "pass@16": lambda run: run["pass@16"],
    "KL of paths": lambda run: run["log"][-1]["kl_path"],
}
IN_BRACKETS = {"TV": "tv", "magnetisation off by": "magnetisation_error", "correlation off by": "correlation_error"}
# Columns that say which run it is, or what it is about.
WORDS = {"learner", "estimator", "normalizer", "normaliser", "case", "finding", "", "what it is for"}
# Rows by other words than the learner's name in the JSON. A row that is called "..." goes on with the one above.
ROWS = {
    "... without trajectories of the base": "path, baseline, no base",
    "... without the baseline": "path",
}
# Rows of another JSON than the first that the paragraph links to: the rows' words, and how that one's path ends.
OTHER_FILE = {
    "... outcomes re-masked 16 times": "pinwheel-31-replicates-16.json",
    "`posterior`, beta 0.4407": "ising-0.4407-uniform.json",
}


def learner_of(table, row, above):
    """The learner that a row is of, by its name in the JSON."""
    cells = dict(zip(table.head, row, strict=True))
    named = next(iter(cells.values())).replace("`", "")
    if table.head[0].startswith("estimator") and len(table.head) > 2:
        return f"{named.split(',')[0]}, {cells.get('normaliser', cells.get('normalizer'))}"
    if named in ROWS:
        return ROWS[named]
    if named.startswith("... "):
        return above
    return re.sub(r", beta [\d.]+$", "", named)


OF_LEARNERS = [
    *(table for table in FIGURES if not as_printed(table)),
    *(table for page in STUDIED[1:] for table in pages.tables(page) if set(table.head) & set(COLUMNS)),
]


@pytest.mark.parametrize("table", of_page(OF_LEARNERS))
def test_tables_of_learners_are_those_of_their_json(table):
    files, above = linked(table), None
    assert files, f"{table.page}:{table.line}: the paragraph in front of a table links to its JSON"
    for row in table.rows:
        above = name = learner_of(table, row, above)
        ending = OTHER_FILE.get(row[0])
        file = next(path for path in files if ending is None or path.endswith(ending))
        runs = [run for run in read(file)["results"] if run["learner"] == name]
        if row[0] == "the base":
            check_base(row, table, read(file)["results"][0]["base"])
            continue
        assert runs, f"{table.page}:{table.line}: {file} has no {name!r}"
        for head, cell in zip(table.head, row, strict=True):
            column = head if head in COLUMNS else head.split(",")[0]
            if column in WORDS or cell == "" or head == table.head[0]:
                continue
            assert column in COLUMNS, f"{table.page}:{table.line}: what is {head!r}? tests/test_figures.py, COLUMNS"
            values = [COLUMNS[column](run) for run in runs]
            if cell == "-":
                assert statistics.median(values) == math.inf, (row[0], head)
                continue
            exact = [run[IN_BRACKETS[column]][1] for run in runs] if column in IN_BRACKETS and "[" in cell else None
            told = wrong(cell, values, exact and statistics.median(exact))
            assert told is None, f"{table.page}:{table.line}, {row[0]}, {head}: {told}"


def check_base(row, table, base):
    for head, cell in zip(table.head, row, strict=True):
        if head in base:
            assert agrees(cell, base[head]), (row[0], head)


# ---- figures of other people, in a table


def test_published_figures_of_chains_of_moves_are_those_of_the_study():
    """What a run is held to is what the page says; states are counted: particles at sites, and sites of each kind."""
    states = {"occupation": math.comb(7, 3), "ising": math.comb(16, 8), "potts": math.comb(14, 4) * 3**4}
    table = table_with("published: TV, reward calls, trajectories K")
    rows = {row[0].strip("`"): dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert list(rows) == list(moves.CASES)
    for name, row in rows.items():
        case = moves.CASES[name]()
        assert row["states"].startswith(f"{states[name]:,}: ")
        tv, calls = case.published
        assert row[table.head[-1]].startswith(f"{tv}, {calls:,}, K = ")
        # A hop's rate is for each particle of the site that it leaves.
        start = torch.tensor([case.start])
        rate = case.process.moves(start).rate.max() / start.max()
        (shown,) = re.findall(r"\d+/\d+", row["moves"])
        assert float(Fraction(shown)) == pytest.approx(float(rate), rel=1e-12)  # quotients of a few roundings


# ---- runs of the command line, a column each


def table_with(*heads):
    """The one table, in README or docs, whose columns are called so."""
    found = [t for page in pages.PAGES for t in pages.tables(page) if t.head[-len(heads) :] == list(heads)]
    assert len(found) == 1, (heads, [(t.page, t.line) for t in found])
    return found[0]


OF_RUNS = (
    ("base", "seed 0", "seed 1", "null control, seed 0"),
    ("base, seeds 0, 1, 2", "fine-tuned", "null control, seed 0"),
)


def of_runs(name):
    """The runs of `python -m experiments runs`, without the base that may stand last."""
    return [run for run in read(name)["results"] if "base" not in run]


def test_sudoku_is_what_its_runs_came_to():
    table = table_with(*OF_RUNS[0])
    *runs, null, base = read(PUZZLES)["results"]
    assert [run["seed"] for run in (*runs, null)] == [0, 1, 0] and null["null_arm"] and base["base"]
    figures = {
        "solved": [runs[0]["base_solved"], *[run["solved"] for run in (*runs, null)]],
        "equal": [runs[0]["base_exact"], *[run["exact"] for run in (*runs, null)]],
        "blank": [runs[0]["base_cells"], *[run["cells"] for run in (*runs, null)]],
        "the same": [run["other_file"]["solved"] for run in (base, *runs, null)],
    }
    assert len(table.rows) == len(figures)
    for (first, values), row in zip(figures.items(), table.rows, strict=True):
        assert row[0].startswith(first)
        for value, cell in zip(values, row[1:], strict=True):
            assert agrees(cell, value), (first, cell, value)


def test_countdown_is_what_its_runs_came_to():
    table = table_with(*OF_RUNS[1])
    *runs, null = of_runs(TEXT_RUNS)
    assert [run["seed"] for run in (*runs, null)] == [0, 1, 2, 0] and null["null_arm"]
    for first, figure in (("greedy", "greedy"), ("sampled", "sampled"), ("pass@16", "pass@16"), ("the same", None)):
        (row,) = [row for row in table.rows if row[0].startswith(first)]
        if figure is None:
            others = [run["other_problems"] for run in (*runs, null)]
            before, after = ([other[name]["greedy"] for other in others] for name in ("base", "tuned"))
        else:
            before, after = ([run[f"{of}{figure}"] for run in (*runs, null)] for of in ("base_", ""))
        values = (before[:3], after[:3], after[3:])
        for shown, of in zip(row[1:], values, strict=True):
            numbers = NUMBER.findall(shown)
            assert len(numbers) == len(of) and all(map(agrees, numbers, of)), (first, shown, of)


# ---- sentences


def median(file, learner, figure):
    return statistics.median(COLUMNS[figure](run) for run in read(file)["results"] if run["learner"] == learner)


def least_and_most(values):
    return [min(values), max(values)]


def tables(of, h):
    """KL of where steps of h end, on five random tables: least and most."""
    return least_and_most([table[of][h] for table in read(ORDERS)["tables"]])


def variances():
    return [table["order_variance"] for table in read(ORDERS)["tables"]]


def networks(case):
    return [run["kl"] for run in read(ORDERS)["results"] if run["learner"] == case]


def calls_of_a_sample(sampler):
    (found,) = [run for run in read(GUIDANCE)["results"] if run["sampler"] == sampler]
    return found["calls_of_a_sample"]


def of_log(figure, cases=("as dam countdown", "learning_rate x 4", "learning_rate / 20")):
    """Least and most of a figure that was logged, over all entries of some cases of `dam countdown`."""
    logs = [run["log"] for run in read(COUNTDOWN)["results"] if run["learner"] in cases]
    return least_and_most([entry[figure] for log in logs for entry in log])


def trained(name):
    """Of `python -m experiments runs`, those that are no control."""
    return [run for run in of_runs(name) if not run["null_arm"]]


def readme_solved():
    """Of the base and of the model that README's block ends with. Printed are four digits, which name one of 264."""
    printed = [line for line in read(BLOCK)["printed"] if line.startswith("step ")]
    return [round(264 * float(re.search(r"eval_solved ([\d.]+)", printed[n])[1])) / 264 for n in (0, -1)]


def of_calls(file):
    """Reward calls of every run, which are as many."""
    (calls,) = {run["curve"][-1]["reward_calls"] for run in read(file)["results"]}
    return calls


def off_track():
    """Where the seed that went astray is farthest from p* on its way, and where it is back."""
    (curve,) = [
        run["curve"] for run in read(UNIFORM)["results"] if run["learner"] == "posterior, baseline" and run["seed"] == 1
    ]
    n = max(range(8, len(curve)), key=lambda n: curve[n]["kl"])
    return curve[n], curve[n + 2]


def centred(name, figure):
    """Of the ladder of temperatures with a centred network."""
    return median(f"epyc-avx2-2-cores/{name}.json", "tilted posterior, then variance", figure)


def on_the_way(name, point):
    """Of the curve of a study's first run."""
    return read(f"epyc-avx2-2-cores/{name}.json")["results"][0]["curve"][point]


def of_instances(file, learner, figure):
    """A figure of samples at the end of each run of `exact`."""
    return [run["figures"][figure] for run in read(file)["results"] if run["learner"] == learner]


README = "README.md"
ANYWHERE = None  # README, or one of the pages that it leads to
CHOOSING = "docs/choosing.md"
ISING = "epyc-avx512-2-cores/ising-0.28-masked.json"
PINWHEEL = "epyc-avx512-2-cores/pinwheel-masked.json"
CHECKERBOARD = "epyc-avx512-2-cores/checkerboard-uniform.json"
SMALLER = "epyc-avx512-2-cores/pinwheel-31.json"
COUNTDOWN = "xeon-avx512-2-cores/countdown.json"
SUDOKU = "epyc-avx512-2-cores/sudoku-estimators.json"
ORDERS = "xeon-avx512-2-cores/orders.json"
PUBLISHED = "first_jump_one, state"
LONG = "epyc-avx512-2-cores/ising-0.28-masked-long.json"
BUDGET = "epyc-avx2-2-cores/ising-0.28-256000.json"
OLD = "epyc-avx2-2-cores/ising-0.28-256000-old.json"
HOPS = "epyc-avx2-2-cores/moves-occupation.json"
BLOCK = "epyc-avx2-2-cores/readme.json"
PUZZLES, AGAIN, DAMPED = (
    f"{name}.json"
    for name in ("xeon-avx512-2-cores/sudoku", "xeon-avx512-2-cores/sudoku-positions", "epyc-avx2-2-cores/sudoku")
)
TEXT_RUNS = "xeon-avx512-2-cores/countdown-runs.json"
UNIFORM = "epyc-avx512-2-cores/pinwheel-uniform.json"
MASKED_CHECKERBOARD = "epyc-avx512-2-cores/checkerboard-masked.json"
POTTS = "epyc-avx2-2-cores/potts-1.005-128000-mlp.json"
LARGER = [
    f"epyc-avx2-2-cores/{name}.json" for name in ("ising-8-0.28", "ising-8-0.4407", "potts-8-1.005", "ising-16-0.28")
]
SPINS = {case: f"epyc-avx2-2-cores/moves-{case}.json" for case in ("potts", "ising")}
REACHED = "epyc-avx2-2-cores/moves-ising-attainable.json"
NETWORK_CALLS = "epyc-avx2-2-cores/pinwheel-9-learners-network.json"
ABLATIONS = "epyc-avx2-2-cores/ablations.json"
GUIDANCE = "epyc-avx2-2-cores/guidance.json"
TODAY = "xeon-avx512-2-cores/ising-0.28-masked.json"
SETS, SETS_KEPT = "epyc-avx2-2-cores/exact-mis.json", "epyc-avx2-2-cores/exact-mis-kept.json"
CUTS, CUTS_KEPT = "epyc-avx2-2-cores/exact-maxcut.json", "epyc-avx2-2-cores/exact-maxcut-kept.json"
SITES = "epyc-avx2-2-cores/exact-dna.json"
MAZES = "epyc-avx2-2-cores/exact-maze.json"
CHAIN = "epyc-avx2-2-cores/chain.json"
# Passages with their numbers in braces, and what these were rounded from.
SENTENCES = [
    (
        STUDY,
        "ESS of `posterior` {}, weighted denoising {}, c-DTM {}, `first_jump` {}, `path, baseline` {}, the published "
        "estimator {}",
        lambda: [
            median(TODAY, name, "ESS")
            for name in (
                "posterior", "weighted denoising", "c-DTM", "first_jump", "path, baseline", "first_jump_one, state",
            )
        ],
    ),
    (
        STUDY,
        "comes to a KL of {} ({} to {}), TV {}, and is below 1e-3 from {} calls on",
        lambda: [
            median(CHECKERBOARD, "posterior, baseline", "KL(p*, p_u)"),
            *least_and_most([run["curve"][-1]["kl"] for run in read(CHECKERBOARD)["results"]]),
            *[median(CHECKERBOARD, "posterior, baseline", figure) for figure in ("TV", "to 1e-3")],
        ],
    ),
    (
        STUDY,
        "`posterior` has an ESS of {}. TV over 65,536 states is mostly the samples' own: of {} samples it is {} [{}]",
        lambda: [
            median(LONG, "posterior", "ESS"), read(LONG)["samples"], *read(LONG)["results"][0]["tv"]
        ],
    ),
    (
        STUDY,
        "networks of width {}, five seeds, {} rounds of {} calls",
        lambda: [read(BUDGET)[option] for option in ("width", "rounds", "batch")],
    ),
    (STUDY, "figures of {} paths", lambda: [read(BUDGET)["samples"]]),
    (STUDY, "256,000 calls, where ours is {}.", lambda: [centred("ising-0.28-256000-centred", "ESS")]),
    (
        STUDY,
        "the ESS was {} (Ising) and {} (Potts) after {} calls, at 16 x 16 and beta 0.28 it was {} after {}, where the "
        "KL was still falling: {} after {}, {} at the last evaluation",
        lambda: [
            centred("ising-8-0.4407", "ESS"), centred("potts-8-1.005", "ESS"), centred("potts-8-1.005", "reward calls"),
            centred("ising-16-0.28", "ESS"), centred("ising-16-0.28", "reward calls"),
            on_the_way("ising-16-0.28", -3)["kl"], on_the_way("ising-16-0.28", -3)["reward_calls"],
            on_the_way("ising-16-0.28", -1)["kl"],
        ],
    ),
    (
        ANYWHERE,
        "samples are worth {} with `posterior`, and {} where outcomes are kept",
        lambda: [
            100 * median(*of, "ESS")
            for of in ((OLD, "posterior"), (BUDGET, "posterior, then variance"))
        ],
    ),
    (
        ANYWHERE,
        "With a network that has the lattice's symmetries it is {}.",
        lambda: [100 * centred("ising-0.28-256000-centred", "ESS")],
    ),
    (
        STUDY,
        "That is {} of the published run's reward calls",
        lambda: [median(HOPS, "path, baseline", "reward calls") / read(HOPS)["published"]["reward_calls"]],
    ),
    (
        STUDY,
        "Here it is {} of the published run's",
        lambda: [
            median(SPINS["potts"], "path, then variance", "reward calls")
            / read(SPINS["potts"])["published"]["reward_calls"]
        ],
    ),
    (
        STUDY,
        "These are {} of the published run's calls",
        lambda: [
            median(SPINS["ising"], "path, then variance", "reward calls")
            / read(SPINS["ising"])["published"]["reward_calls"]
        ],
    ),
    (
        STUDY,
        "networks by {} steps on the divergence of paths at {} states each",
        lambda: [read(REACHED)[option] for option in ("steps", "states")],
    ),
    (
        STUDY,
        "averaged over the {} symmetries of the lattice that leave the start as it is",
        lambda: [len(invariants.symmetries(4, moves.ising().start))],
    ),
    (
        STUDY,
        "all three end at TVs of at most {}",
        lambda: [max(run["tv"] for run in read(SPINS["ising"])["results"])],
    ),
    (STUDY, "too, and leave {} classes of states", lambda: [read(REACHED)["classes"]]),
    (STUDY, "as many rounds as {} states that the network sees", lambda: [read(NETWORK_CALLS)["network_calls"]]),
    (
        STUDY,
        "those of a warm-up: {} times the calls of ours",
        lambda: [1.28e6 / of_calls("epyc-avx2-2-cores/ising-16-0.28.json")],
    ),
    (
        STUDY,
        "runs of {} minutes on a busy core at most",
        lambda: [max(run["seconds"] for file in LARGER for run in read(file)["results"]) / 60],
    ),
    (STUDY, "means of {} repeats", lambda: [read(ABLATIONS)["repeats"]]),
    (STUDY, "{} positions of all trajectories of a row", lambda: [read(CHAIN)["positions"]]),
    (
        STUDY,
        "times ESS it is {} to {}.",
        lambda: least_and_most([run["error"] * run["ess"] for run in read(CHAIN)["results"]]),
    ),
    (
        STUDY,
        "At the same reward calls, and {} network calls in place of {}, the learner",
        lambda: [median(CUTS_KEPT, KEPT, "network calls"), median(CUTS, STEPPED, "network calls")],
    ),
    (
        STUDY,
        "keeps {} of the maximum sets of one graph and {} and {} of the maximum cuts of two",
        lambda: [
            min(of_instances(SETS, STEPPED, "found")), *sorted(of_instances(CUTS, STEPPED, "found"), reverse=True)[1:]
        ],
    ),
    (
        STUDY,
        "{} to {} of the base's divergence from p* is left",
        lambda: least_and_most(
            [
                run["figures"]["kl"] / run["references"]["the base"]["kl"]
                for run in read(SITES)["results"]
                if run["learner"] == KEPT
            ]
        ),
    ),
    (STUDY, "more than {} of plans arrive", lambda: [sorted(of_instances(MAZES, KEPT, "success"))[1]]),
    (
        STUDY,
        "but for {} of the maximum sets of one graph",
        lambda: [
            1 - min(run["references"]["random maximal sets, 256 runs"]["found"] for run in read(SETS)["results"])
        ],
    ),
    (
        STUDY,
        "with {} of arrivals where p* has {}",
        lambda: [
            min(of_instances(MAZES, KEPT, "success")),
            min(run["references"]["p*"]["success"] for run in read(MAZES)["results"]),
        ],
    ),
    (STUDY, "nothing trained: {} samples", lambda: [read(GUIDANCE)["samples"]]),
    (
        STUDY,
        "Of {} calls, which the learners above are trained by, come {} samples of svdd with 20 proposals, or one of 64 "
        "particles {} times.",
        lambda: [
            median(TODAY, "posterior", "reward calls"),
            *[
                median(TODAY, "posterior", "reward calls") / calls_of_a_sample(name)
                for name in ("svdd, 20 proposals", "smc, one of 64")
            ],
        ],
    ),
    (
        CHOOSING,
        "of model samples is {} with `posterior` and {} with `first_jump`",
        lambda: [median(ISING, name, "ESS") for name in ("posterior", "first_jump")],
    ),
    (
        CHOOSING,
        "after {} calls, it is at a KL of {} where `posterior` is at {}, and it came below 1e-2 in {} calls instead of "
        "{}",
        lambda: [
            median(PINWHEEL, "path, baseline", "reward calls"),
            median(PINWHEEL, "path, baseline", "KL(p*, p_u)"),
            median(PINWHEEL, "posterior", "KL(p*, p_u)"),
            median(PINWHEEL, "path, baseline", "calls to KL 1e-2"),
            median(PINWHEEL, "posterior", "calls to KL 1e-2"),
        ],
    ),
    (
        CHOOSING,
        "after {} calls, it is behind: {}.",
        lambda: [median(ISING, "path, baseline", figure) for figure in ("reward calls", "ESS")],
    ),
    (
        CHOOSING,
        "without which the KL on 31 x 31 points is {} instead of {}",
        lambda: [median(SMALLER, name, "KL(p*, p_u)") for name in ("path, baseline, no base", "path, baseline")],
    ),
    (
        CHOOSING,
        "came to {} of greedy answers and K = 16 to {}",
        lambda: [median(COUNTDOWN, name, "greedy") for name in ("K = 4", "as dam countdown")],
    ),
    (
        CHOOSING,
        "at a KL of paths of {} instead of {}, and lose some points: {} of",
        lambda: [
            median(COUNTDOWN, "beta 0.1, max_tilt 1", "KL of paths"),
            median(COUNTDOWN, "as dam countdown", "KL of paths"),
            median(COUNTDOWN, "beta 0.1, max_tilt 1", "greedy"),
        ],
    ),
    (
        CHOOSING,
        "leaves `dam countdown` at {}, four times of it at {}, of {}",
        lambda: [
            median(COUNTDOWN, name, "greedy")
            for name in ("learning_rate / 20", "learning_rate x 4", "as dam countdown")
        ],
    ),
    (CHOOSING, "at a KL of {} to {} from p*", lambda: tables("reward", "0.2")),
    (CHOOSING, "with a reward of zero {} to {} away", lambda: tables("no_reward", "0.2")),
    (CHOOSING, "on those tables it is {} to {}.", lambda: least_and_most(variances())),
    (
        ANYWHERE,
        "having a variance of {} to {} between orders, at a KL of {} to {} from p* with h = 0.2, of {} to {} with h = "
        "0.5; with a constant reward {} to {} and {} to {} away from the base",
        lambda: [
            *least_and_most(variances()),
            *tables("reward", "0.2"),
            *tables("reward", "0.5"),
            *tables("no_reward", "0.2"),
            *tables("no_reward", "0.5"),
        ],
    ),
    (
        ANYWHERE,
        "small networks to {} to {}, without a reward to {} to {}, in {} steps of 128 groups",
        lambda: [
            *least_and_most(networks("four times the trajectories")),
            *least_and_most(networks("no reward, four times the trajectories")),
            read(ORDERS)["steps"],
        ],
    ),
    (
        ANYWHERE,
        "after {} calls each, outcomes re-masked once a step, 100 samples are worth {} with `posterior`, {} with the "
        "loss of MDNS, {} with c-DTM, {} with `first_jump` and {} with the published estimator",
        lambda: [
            median(TODAY, "posterior", "reward calls"),
            *[
                100 * median(TODAY, name, "ESS")
                for name in ("posterior", "weighted denoising", "c-DTM", "first_jump", "first_jump_one, state")
            ],
        ],
    ),
    (
        ANYWHERE,
        "`posterior` solves {}, `first_jump` {}, the published estimator {}, from a base at {}.",
        lambda: [
            *[median(SUDOKU, name, "solved") for name in ("posterior, group", "first_jump, group", PUBLISHED)],
            read(SUDOKU)["results"][0]["base_solved"],
        ],
    ),
    (
        ANYWHERE,
        "on a pinwheel of 91 x 91 points it reaches a KL of 1e-3 in a tenth of the calls after which the published "
        "estimator is at {}",
        lambda: [median(PINWHEEL, PUBLISHED, "KL(p*, p_u)")],
    ),
    (
        README,
        "from {} calls of a reward, in {} s of one core",
        lambda: [read(BLOCK)["reward_calls"], read(BLOCK)["processor_seconds"]],
    ),
    (README, "the base solves {}, the model {};", readme_solved),
    (README, "goes on to {} of harder ones", lambda: [min(run["solved"] for run in trained(PUZZLES))]),
    (README, "seeds 0, 1 and 2 solve {} again", lambda: [min(run["solved"] for run in trained(AGAIN))]),
    (
        README,
        "Steps kept at `max_tilt` 0.2 to the end solved {}, {} and {}",
        lambda: [run["solved"] for run in trained(DAMPED)],
    ),
    (
        README,
        "(AVX-512), {} reward calls each; no grid of the {} held-out puzzles",
        lambda: [of_runs(PUZZLES)[0][key] for key in ("reward_calls", "puzzles")],
    ),
    (
        README,
        "Of d1's puzzles {} have a listed solution",
        lambda: [of_runs(PUZZLES)[0]["other_file_unseen"]["puzzles"]],
    ),
    (
        README,
        "none of which is trained on: {} reward calls, {} minutes with one thread",
        lambda: [
            of_runs(TEXT_RUNS)[0]["reward_calls"],
            statistics.median(run["seconds"] / 60 for run in trained(TEXT_RUNS)),
        ],
    ),
    (
        "docs/rewards.md",
        "from {} to {} of greedy answers",
        lambda: [
            statistics.median(run[of] for run in trained(TEXT_RUNS))
            for of in ("base_greedy", "greedy")
        ],
    ),
    (
        "docs/rewards.md",
        "the {} steps of pretraining see {} lines, and a run of {} calls {} problems",
        lambda: [
            countdown_base.STEPS,
            countdown_base.STEPS * countdown_base.BATCH,
            of_runs(TEXT_RUNS)[0]["reward_calls"],
            of_runs(TEXT_RUNS)[0]["reward_calls"] / finetune_countdown.Countdown.generations,
        ],
    ),
    ("docs/learning.md", "fine-tuning with {} reward calls", lambda: [read(COUNTDOWN)["calls"]]),
    (
        "docs/learning.md",
        "moves further from the base ({} nats, not {})",
        lambda: [median(COUNTDOWN, name, "KL of paths") for name in ("learning_rate x 4", "as dam countdown")],
    ),
    (
        "docs/learning.md",
        "noise moved it {} nats away",
        lambda: [median(COUNTDOWN, "constant reward", "KL of paths")],
    ),
    (
        "docs/logs.md",
        "The first has {} of held-out answers right in the end, from {}; the others {}, {}, {} and {}",
        lambda: [
            median(COUNTDOWN, "as dam countdown", "greedy"),
            read(COUNTDOWN)["results"][0]["base"]["greedy"],
            *[
                median(COUNTDOWN, name, "greedy")
                for name in ("learning_rate x 4", "learning_rate / 20", "constant reward", "null arm")
            ],
        ],
    ),
    (
        "docs/logs.md",
        "to {} and {} of 16 in the first two runs above",
        lambda: [
            run["log"][-1]["ess_path"]
            for run in read(COUNTDOWN)["results"]
            if run["learner"] in ("as dam countdown", "learning_rate x 4")
        ],
    ),
    ("docs/logs.md", "above 0.05; {} to {} in the first three runs above", lambda: of_log("split_half")),
    ("docs/logs.md", "| {} to {} in the first three runs above; falls", lambda: of_log("grad_norm")),
    (
        CHOOSING,
        "solved after {} reward calls, three seeds",
        lambda: [read(SUDOKU)["calls"]],
    ),
    (CHOOSING, "text model of `dam countdown`, at {} calls", lambda: [read(COUNTDOWN)["calls"]]),
    (
        "docs/training.md",
        "while on the lattice, after so few calls, it is behind ({}). At {} calls on that lattice 100 samples are "
        "worth {} with `posterior`, and {} where outcomes are kept",
        lambda: [
            100 * median(TODAY, "path, baseline", "ESS"),
            median(BUDGET, "posterior, then variance", "reward calls"),
            100 * median(OLD, "posterior", "ESS"),
            100 * median(BUDGET, "posterior, then variance", "ESS"),
        ],
    ),
    (STUDY, "31 x 31 points, {} reward calls, three seeds", lambda: [of_calls(SMALLER)]),
    (
        STUDY,
        "The baseline is worth a factor of {} here. One of the five seeds with it was at a KL of {} after {} calls, "
        "and at {} with the others after {}",
        lambda: [
            median(UNIFORM, "posterior", "KL(p*, p_u)") / median(UNIFORM, "posterior, baseline", "KL(p*, p_u)"),
            *[point[key] for point in off_track() for key in ("kl", "reward_calls")],
        ],
    ),
    (STUDY, "The checkerboard, masked base, five seeds, {} reward calls", lambda: [of_calls(MASKED_CHECKERBOARD)]),
    (STUDY, "With a uniform base, five seeds, {} reward calls", lambda: [of_calls(CHECKERBOARD)]),
    (
        STUDY,
        "beta 0.28, masked base, five seeds, {} reward calls",
        lambda: [median(ISING, "posterior", "reward calls")],
    ),
    (STUDY, "six of them again, {} calls", lambda: [median(TODAY, "posterior", "reward calls")]),
    (
        STUDY,
        "Longer, {} reward calls at beta 0.28, {} times the {} of the published table",
        lambda: [
            median(LONG, "posterior", "reward calls"),
            median(LONG, "posterior", "reward calls") / median(BUDGET, "posterior, then variance", "reward calls"),
            median(BUDGET, "posterior, then variance", "reward calls"),
        ],
    ),
    (STUDY, "### At {} reward calls", lambda: [median(BUDGET, "posterior, then variance", "reward calls")]),
    (STUDY, "is critical, {} calls, two seeds", lambda: [of_calls(POTTS)]),
    (
        STUDY,
        "The main job, {} reward calls, three seeds, {} held-out puzzles of which the base solves {}",
        lambda: [read(SUDOKU)["calls"], 264, read(SUDOKU)["results"][0]["base_solved"]],
    ),
]  # fmt: skip


def test_no_optimum_of_a_graph_is_lost_where_outcomes_are_kept():
    """What the page says of all six graphs."""
    assert [of_instances(file, KEPT, "found") for file in (SETS_KEPT, CUTS_KEPT)] == [[1.0] * 3] * 2


@pytest.mark.parametrize(("page", "passage", "values"), SENTENCES, ids=[p[:40] for _, p, _ in SENTENCES])
def test_figures_of_sentences_are_those_of_their_json(page, passage, values):
    assert not list(differences(page, passage, values()))


# ---- the checker itself


def test_numbers_are_compared_as_they_are_rounded():
    for shown, value in (("98.9%", 0.98864), ("0.0024", 0.00244), ("6.3e-05", 6.34e-5), ("1,159,168", 1159168.0)):
        assert agrees(shown, value)
    for shown, value in (("98.9%", 0.9895001), ("0.0024", 0.00246), ("6.3e-05", 6.36e-5), ("1,159,168", 1159169.0)):
        assert not agrees(shown, value)
    assert wrong("0.50 (0.40 to 0.60) [0.1]", [0.4, 0.5, 0.6], 0.1) is None
    for cell in ("0.51 (0.40 to 0.60)", "0.50 (0.41 to 0.60)", "0.50 (0.40 to 0.61)", "0.50 [0.2]", "much"):
        assert wrong(cell, [0.4, 0.5, 0.6], 0.1) is not None


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_results_name_device_versions_and_budget(path):
    """What another would need to repeat it."""
    result = read(path.relative_to(RESULTS))
    assert re.fullmatch(provenance.FOLDERS, path.parent.name)
    assert not provenance.lacking(path, result) and not provenance.misattributed(path, result)


def test_the_budget_of_runs_is_what_each_of_them_spent():
    for name in (TEXT_RUNS, PUZZLES, AGAIN, DAMPED):
        found = read(name)
        assert found["reward_calls"] == sorted({run["reward_calls"] for run in of_runs(name)})


def test_what_a_result_does_not_say_is_told(tmp_path):
    """Each field that is missing or of another folder, and each that is not where it is said to be from."""
    file = tmp_path / "epyc-avx2-2-cores" / "a.json"
    whole = {"dam": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "device": file.parent.name, "calls": 10}
    assert provenance.lacking(file, whole) == []
    for name in whole:
        told = provenance.lacking(file, {key: value for key, value in whole.items() if key != name})
        assert told == [{"calls": "a budget", "device": "device: None"}.get(name, name)]
    assert provenance.lacking(file, {**whole, "device": "xeon-avx512-2-cores"}) == ["device: xeon-avx512-2-cores"]
    for model, good in (("AMD EPYC 7763 64-Core Processor", False), ("AMD EPYC", True), ("Intel(R) Xeon(R)", False)):
        assert (provenance.lacking(file, {**whole, "cpu": model}) == []) == good
    commit = read(TEXT_RUNS)["added"]["torch"].split()[-1]
    for source, good in ((f"constraints.txt at {commit}", True), ("constraints.txt", False), ("memory", False)):
        assert (provenance.misattributed(file, {**whole, "added": {"torch": source}}) == []) == good
    assert provenance.misattributed(file, {**whole, "added": {"device": "folder", "dam": "folder"}})
    if provenance.of_commit(commit, "constraints.txt") is not None:
        assert provenance.misattributed(file, {"torch": "2.6.0", "added": {"torch": f"constraints.txt at {commit}"}})


def test_every_result_is_shown_somewhere():
    """A JSON that no page links to is of figures that nobody can find."""
    told = {
        ((pages.ROOT / page).parent / link).resolve()
        for page in pages.PAGES
        for link in pages.links(page)
        if ":" not in link
    }
    missing = [str(path.relative_to(RESULTS)) for path in RESULTS.glob("*/*.json") if Path(path) not in told]
    assert not missing, missing
