"""Which estimator learns most from a reward call: how learners are run, and the studies but that of `lattice`.

grid: a pinwheel or a checkerboard on 91 x 91 points, learned from log p* alone by a masked or a uniform chain whose
base knows nothing; divergences are exact. sudoku: a language model that knows rows only, from rewards.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import records, report
from dam import plots
from experiments import grid, learners, replay
from experiments.densities import Grid
from experiments.exact import learner as exact

SVDD = "svdd"
COSTS = ("reward_calls", "network_calls")  # of a point of a curve
SECONDS = "core_seconds"  # likewise: a processor's time for drawing, rewards and gradient steps
CHECKS = 24  # evaluations of a run, at numbers of rounds that grow by a factor


@dataclasses.dataclass(frozen=True)
class Options:
    """What every learner gets alike."""

    rounds: int = 3000
    batch: int = 2048  # reward calls of a round
    steps: int = 1  # gradient steps of a round, of learners that can take more
    replicates: int = 1  # states that an outcome is re-masked to in each step, of learners that re-mask
    learning_rate: float = 2e-3
    power: float = 1.5  # with which it falls to 0
    average: float = 16.0  # exponent of the weights' average
    network_calls: int = 0  # states that the network sees, in place of `rounds`, if not 0


def fitting(options: Options) -> dict[str, float]:
    """What models take of the options."""
    return {name: getattr(options, name) for name in ("learning_rate", "power", "average")}


def playing(options: Options) -> dict[str, int]:
    """What learners take of them."""
    return {name: getattr(options, name) for name in ("batch", "steps", "replicates")}


def checked(rounds: int) -> set[int]:
    """Rounds after which a run is evaluated, the last among them."""
    return {max(1, round(rounds ** (k / CHECKS))) for k in range(CHECKS // 3, CHECKS + 1)}


def bar(rounds: int, label: str) -> tqdm:
    """Counts rounds on a terminal that no other process writes to."""
    hidden = not sys.stderr.isatty() or multiprocessing.parent_process() is not None
    return tqdm(range(rounds), desc=label, leave=False, disable=hidden)


def play(
    learner: learners.Learner,
    model: learners.Model,
    options: Options,
    evaluate: Callable[[], dict[str, float]],
    label: str,
) -> list[dict[str, float]]:
    """Plays rounds; figures on the way, with what they had cost."""
    rounds = options.rounds
    if options.network_calls:
        rounds = learners.rounds_within(options.network_calls, learner, model)
    curve, at = [], checked(rounds)
    reward_calls = network_calls = 0
    seconds = 0.0
    for n in bar(rounds, label):
        started = time.process_time()  # what else the machine does is not in it
        played = learner.round(model, n, n / rounds)
        for targets in played.steps:
            model.step(targets, n / rounds)
        seconds += time.process_time() - started
        reward_calls, network_calls = reward_calls + played.reward_calls, network_calls + played.network_calls
        if n + 1 in at:
            cost = {"reward_calls": reward_calls, "network_calls": network_calls, SECONDS: seconds}
            curve.append({**cost, **evaluate()})
    return curve


Run = Callable[[str, int], dict[str, Any]]  # what a learner comes to from a seed; `curve` is part of it


def timed(run: Run, name: str, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = run(name, seed)
    return {"learner": name, "seed": seed, **found, "seconds": time.perf_counter() - started}


def run_all(given: dict[str, Any], run: Run) -> Iterator[dict[str, Any]]:
    """Every learner from every seed, as many at a time as there are processes, in the order in which they end."""
    tasks = [(name, seed) for name in given["learners"] for seed in range(given["seeds"])]
    if given["processes"] == 1:
        yield from (timed(run, *task) for task in tasks)
        return
    # New interpreters: a fork of this one would have torch's pools of threads without the threads.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given["processes"], fresh, torch.set_num_threads, (1,)) as pool:
        yield from (future.result() for future in as_completed([pool.submit(timed, run, *task) for task in tasks]))


def write(path: Path, setting: dict[str, Any], results: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """The results of what is done, put into the order in which they were asked for."""
    results.sort(key=lambda r: (given["learners"].index(r["learner"]), r["seed"]))
    setting = {**records.versions(), "device": report.device(), **setting, "processes": given["processes"]}
    report.write_json(path, {**setting, "results": results})


# ---- two tokens on a grid


def on_grid(density: Grid, name: str, options: Options, seed: int) -> tuple[list[dict[str, float]], Tensor]:
    """Trains on a masked chain; the curve, and the law at the end, float64 [V, V]."""
    torch.manual_seed(seed)
    truth = density.law().view(density.size, density.size)
    model = grid.GridModel(density, **fitting(options))
    if name == SVDD:
        learner: learners.Learner = grid.ValueGuidance(density, batch=options.batch, seed=seed)
        law = learner.law
    else:
        learner = learners.learner(name, density, **playing(options), seed=seed)
        law = model.law
    curve = play(
        learner, model, options, lambda: grid.divergences(truth, law()), f"{name}, {density.name}, seed {seed}"
    )
    return curve, law()


# Of the uniform chain: the last time, where 1e-4 of the noise is left, and times that bounds are taken between.
UNIFORM_TIMES = [1 - 10 ** (-5 * k / 30) for k in range(31)]
UNIFORM_LEARNERS = ("posterior, baseline", "posterior")


def on_uniform_grid(density: Grid, name: str, options: Options, seed: int) -> tuple[list[dict[str, float]], Tensor]:
    """Trains on a uniform chain, simulated exactly; outcomes are re-noised for the gradient.

    A tenth of the trajectories are the base's, as in `learners.Path`. The model is one joint law at all times, so that
    the baseline is exact at re-noised states too. The figures at the end are of the chain's law by its forward
    equation; those on the way of the law that its rates reverse.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    truth = density.law().view(density.size, density.size)
    model = grid.UniformModel(density, **fitting(options))
    curve, at, network_calls = [], checked(options.rounds), 0
    uniform = options.batch // 10
    share = uniform / options.batch
    label = f"{name}, uniform base, {density.name}, seed {seed}"
    for n in bar(options.rounds, label):
        drawn_from = model.log_joint().detach()
        final, log_ratio, calls = model.trajectories(
            drawn_from, options.batch, uniform, seed * 10**6 + 2 * n, UNIFORM_TIMES
        )
        # The teacher's word on a state is asked for beside the model's.
        network_calls += calls + options.steps * options.batch * (2 if name == UNIFORM_LEARNERS[0] else 1)
        # p_base over the mixture of both laws of paths, and p_u over it.
        log_base = -torch.logaddexp(math.log1p(-share) - log_ratio, torch.full_like(log_ratio, math.log(share)))
        weight = torch.softmax(density.log_density(final) + log_base, dim=0) * options.batch
        taken: dict[str, Any] = {}
        if name == UNIFORM_LEARNERS[0]:
            taken = {"baseline": (log_base - log_ratio).exp(), "teacher": drawn_from}
        for _ in range(options.steps):
            model.step(final, weight, n / options.rounds, generator, **taken)
        if n + 1 in at:
            cost = {"reward_calls": (n + 1) * options.batch, "network_calls": network_calls}
            curve.append({**cost, **grid.divergences(truth, model.law())})
    # Half as long intervals as those that were simulated in: the solver is of second order in them.
    times = [1 - 10 ** (-5 * k / 120) for k in range(121)]
    law = model.simulated_law(times).view_as(truth)
    curve[-1].update(grid.divergences(truth, law))
    return curve, law


def run_grid(density: Grid, base: str, options: Options, published_times: int, name: str, seed: int) -> dict[str, Any]:
    more = published_times if name == learners.PUBLISHED else 1
    options = dataclasses.replace(options, rounds=options.rounds * more)
    curve, law = (on_grid if base == "masked" else on_uniform_grid)(density, name, options, seed)
    return {"curve": curve, "law": law}


def study_grid(given: dict[str, Any], options: Options, output: Path) -> str:
    density = Grid(given["density"], given["size"])
    run = functools.partial(run_grid, density, given["base"], options, given["published_times"])
    results: list[dict[str, Any]] = []
    laws: dict[str, Tensor] = {}
    stem = given["name"] or f"{density.name}-{given['base']}"
    title = f"{density.name}, {density.size} x {density.size}, {given['base']} base"
    setting = {**dataclasses.asdict(density), "base": given["base"], **dataclasses.asdict(options)}
    setting["published_times"] = given["published_times"]
    for found in run_all(given, run):
        law = found.pop("law")
        if found["seed"] == 0:
            laws[found["learner"]] = law
        results.append(found)
        last = found["curve"][-1]
        print(
            f"{found['learner']}, seed {found['seed']}: KL {last['kl']:.3g} after {last['reward_calls']:,}", flush=True
        )
        write(output / f"{stem}.json", setting, results, given)
    draw_curves(output / f"{stem}.png", results, "kl", "KL(p* || p_u)", title)
    truth = density.law().view(density.size, density.size)
    draw_laws(output / f"{stem}-samples.png", {"p*": truth, **{n: laws[n] for n in given["learners"]}}, title)
    # Uniform chains are not played by `play`, which counts seconds.
    return "\n\n".join((grid_table(results), *([seconds_table(results)] if given["base"] == "masked" else [])))


def reached(curve: Sequence[dict[str, float]], figure: str, level: float) -> float:
    """Reward calls at the first evaluation from which on the figure stays at the level or below; infinite if never."""
    first = math.inf
    for point in reversed(curve):
        if not point[figure] <= level:
            break
        first = point["reward_calls"]
    return first


def grid_table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| learner | reward calls | network calls | KL(p*, p_u) | TV | calls to KL 1e-2 | to 1e-3 | to 1e-4 |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["learner"] for r in results):
        curves = [r["curve"] for r in results if r["learner"] == name]
        cells = [name, *(middle([curve[-1][cost] for curve in curves]) for cost in COSTS)]
        cells += [spread([curve[-1][figure] for curve in curves], "{:.2g}") for figure in ("kl", "tv")]
        for level in (1e-2, 1e-3, 1e-4):
            cells.append(middle([reached(curve, "kl", level) for curve in curves]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WITHIN = (0.25, 0.5, 1.0, 2.0)


def seconds_table(results: Sequence[dict[str, Any]]) -> str:
    """KL at the last evaluation within so many seconds of a core, and what all of the run took: medians over seeds.

    Learning rates have not fallen then as far as those of a run of that length would have.
    """
    lines = [f"| learner | seconds of a core | {' | '.join(f'KL after {s:g} s' for s in WITHIN)} |"]
    lines += ["| --- " * (2 + len(WITHIN)) + "|"]
    for name in dict.fromkeys(r["learner"] for r in results):
        curves = [r["curve"] for r in results if r["learner"] == name]
        cells = [name, spread([curve[-1][SECONDS] for curve in curves], "{:.2f}")]
        for limit in WITHIN:
            within = [[point["kl"] for point in curve if point[SECONDS] <= limit] for curve in curves]
            cells.append(spread([points[-1] for points in within], "{:.2g}") if all(within) else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def middle(counts: Sequence[float]) -> str:
    """Median, of what may not be the same for all seeds; "-" if it is infinite."""
    median = statistics.median(counts)
    return f"{median:,.0f}" if math.isfinite(median) else "-"


def spread(values: Sequence[float], form: str) -> str:
    """Median, and least to most if there are several."""
    median = form.format(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({form.format(min(values))} to {form.format(max(values))})"


# ---- Sudoku

SUDOKU = ("posterior, group", "first_jump, group", "posterior, state", "first_jump_one, state")


def run_sudoku(calls: int, name: str, seed: int) -> dict[str, Any]:
    """The main job of `dam sudoku` with an estimator and a normaliser: held-out puzzles solved, on the way."""
    from dam.tasks import finetune_sudoku

    estimator, normalizer = name.split(", ")
    options = finetune_sudoku.Options(reward_calls=calls, estimator=estimator, normalizer=normalizer, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        found = finetune_sudoku.finetune(Path(folder), options)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    curve = [
        {"reward_calls": entry["reward_calls"], "unsolved": 1 - entry["eval_solved"]}
        for entry in history
        if "eval_solved" in entry
    ]
    return {**{figure: found[figure] for figure in ("base_solved", "solved", "exact")}, "curve": curve}


def study_sudoku(given: dict[str, Any], output: Path) -> str:
    results: list[dict[str, Any]] = []
    for found in run_all(given, functools.partial(run_sudoku, given["calls"])):
        results.append(found)
        print(f"{found['learner']}, seed {found['seed']}: {found['solved']:.1%} solved", flush=True)
        write(output / "sudoku-estimators.json", {"calls": given["calls"]}, results, given)
    title = "4 x 4 Sudoku, held-out puzzles of 8 blanks"
    draw_curves(output / "sudoku-estimators.png", results, "unsolved", "share not solved", title, log=False)
    lines = ["| estimator, normaliser | reward calls | solved | of the base |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        solved = spread([r["solved"] for r in runs], "{:.1%}")
        calls = middle([r["curve"][-1]["reward_calls"] for r in runs])
        lines.append(f"| {name} | {calls} | {solved} | {runs[0]['base_solved']:.1%} |")
    return "\n".join(lines)


# ---- a network as base


def run_orders(steps: int, name: str, seed: int) -> dict[str, Any]:
    from experiments import orders

    return orders.run(steps, name, seed)


def study_orders(given: dict[str, Any], output: Path) -> str:
    from experiments import orders  # needs transformers

    tables = [orders.of_table(seed) for seed in range(5)]
    setting, results = {"steps": given["steps"], "tables": tables}, []
    for found in run_all(given, functools.partial(run_orders, given["steps"])):
        results.append(found)
        print(f"{found['learner']}, seed {found['seed']}: KL {found['kl']:.3g}", flush=True)
        write(output / f"{given['name']}.json", setting, results, given)
    lines = ["| steps h of tables | KL from p* | ... without a reward |", "| --- | --- | --- |"]
    for h in orders.TABLE_STEPS:
        away = [spread([table[name][h] for table in tables], "{:.3f}") for name in ("reward", "no_reward")]
        lines.append(f"| {h:g} | {' | '.join(away)} |")
    lines += ["", "| network | KL(p* || p_u) | E[r] off by |", "| --- | --- | --- |"]
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        off = spread([r["reward_off"] for r in runs], "{:+.4f}")
        lines.append(f"| {name} | {spread([r['kl'] for r in runs], '{:.4f}')} | {off} |")
    return "\n".join(lines)


# ---- a text model, one setting after another


def run_countdown(calls: int, name: str, seed: int) -> dict[str, Any]:
    from experiments import countdown

    return countdown.run(calls, name, seed)


def study_countdown(given: dict[str, Any], output: Path) -> str:
    from experiments import countdown  # needs transformers

    for seed in range(given["seeds"]):
        countdown.base(seed)  # not by several processes at once
    results: list[dict[str, Any]] = []
    for found in run_all(given, functools.partial(run_countdown, given["calls"])):
        results.append(found)
        told = ", ".join(f"{name} {found[name]:.1%}" for name in countdown.SHOWN)
        print(f"{found['learner']}, seed {found['seed']}: {told}", flush=True)
        write(output / "countdown.json", {"calls": given["calls"]}, results, given)
    lines = [f"| case | {' | '.join(countdown.SHOWN)} | KL of paths | findings |", "| --- " * 6 + "|"]
    figures = {
        name: [r["base"][name] for r in results if r["learner"] == results[0]["learner"]] for name in countdown.SHOWN
    }
    lines.append(f"| the base | {' | '.join(spread(values, '{:.1%}') for values in figures.values())} | 0 | |")
    for name in dict.fromkeys(r["learner"] for r in results):
        runs = [r for r in results if r["learner"] == name]
        shares = [spread([r[figure] for r in runs], "{:.1%}") for figure in countdown.SHOWN]
        kl = spread([r["log"][-1]["kl_path"] for r in runs], "{:.2f}")
        told = ", ".join(sorted({finding["name"] for r in runs for finding in r["findings"]}))
        lines.append(f"| {name} | {' | '.join(shares)} | {kl} | {told} |")
    return "\n".join(lines)


# ---- figures


def draw_curves(
    path: Path, results: Sequence[dict[str, Any]], figure: str, axis: str, title: str, *, log: bool = True
) -> None:
    """A figure against reward calls and, where they are counted, network calls and seconds: medians and bands over
    seeds.
    """
    costs = [cost for cost in (*COSTS, SECONDS) if cost in results[0]["curve"][-1]]
    drawn = plots.figure_class()(figsize=(6 * len(costs), 4.5), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    for axes, cost in zip(drawn.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
        for name in dict.fromkeys(r["learner"] for r in results):
            curves = [r["curve"] for r in results if r["learner"] == name]
            calls = [statistics.median(point[cost] for point in points) for points in zip(*curves, strict=True)]
            values = torch.tensor([[point[figure] for point in curve] for curve in curves])
            style = {learners.PUBLISHED: "--", SVDD: "k:"}.get(name, "-")  # there are ten colours
            (line,) = axes.plot(calls, values.quantile(0.5, dim=0).tolist(), style, linewidth=1.2, label=name)
            axes.fill_between(
                calls, values.amin(dim=0).tolist(), values.amax(dim=0).tolist(), alpha=0.2, color=line.get_color()
            )
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.tick_params(which="minor", labelbottom=False)  # they would overlap
        axes.set_xlabel(cost.replace("_", " "))
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel(axis)
    drawn.axes[-1].legend(fontsize=7)
    drawn.savefig(path, dpi=130)


def draw_laws(path: Path, laws: dict[str, Tensor], title: str, samples: int = 20_000) -> None:
    """Counts of samples of each law [V, V], as images."""
    columns = min(6, len(laws))
    rows = -(-len(laws) // columns)
    figure = plots.figure_class()(figsize=(2 * columns, 2.2 * rows), layout="constrained")
    figure.suptitle(f"{title}: {samples:,} samples", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    generator = torch.Generator().manual_seed(0)
    most = float((samples * next(iter(laws.values()))).max())
    for axis, (name, law) in zip(axes, laws.items(), strict=False):
        drawn = torch.multinomial(law.flatten(), samples, replacement=True, generator=generator)
        count = torch.bincount(drawn, minlength=law.numel()).view_as(law)
        axis.imshow(count.t().tolist(), origin="lower", cmap="magma", vmax=most)
        axis.set_title(name, fontsize=7)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=130)


def learners_of(given: dict[str, Any]) -> list[str]:
    """Names of a study's learners."""
    if given["study"] == "sudoku":
        return list(SUDOKU)
    if given["study"] == "orders":
        from experiments import orders  # needs transformers

        return list(orders.CASES)
    if given["study"] == "countdown":
        from experiments import countdown  # needs transformers

        return list(countdown.CASES)
    if given["study"] == "moves":
        from experiments import moves  # whose runs are this module's

        return list(moves.LEARNERS)
    if given["study"] == "exact":
        return list(exact.LEARNERS)
    if given.get("base") == "uniform":
        return list(UNIFORM_LEARNERS) if given["study"] == "grid" else ["posterior"]
    return [*learners.LEARNERS, *([SVDD] if given["study"] == "grid" else replay.LEARNERS)]


def default_learners(given: dict[str, Any]) -> list[str]:
    if given["study"] == "exact":
        return list(exact.DEFAULT)
    return [name for name in learners_of(given) if name not in (*learners.ON_REQUEST, *replay.LEARNERS)]
