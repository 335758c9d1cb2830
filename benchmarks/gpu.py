"""Measures the GPU table: python -m benchmarks gpu [--minutes N] [--only OP,OP] [--no-tests] [--tune|--sanitize].

Installs this checkout where it is not, with the CUDA kernels if there is an nvcc, runs the tests of both GPU backends,
measures every operation against its floors and its peers, on the default backend ("dam") and in Triton ("dam, triton"),
writes JSON, PNG and summary.md, and prints that summary last. Needs an NVIDIA GPU and no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import dam
from dam import plots
from dam.backends import choice, triton
from dam.benchmarks import accuracy, checkout, goals, harness, records, report, tune
from dam.benchmarks.agenda import Agenda
from dam.benchmarks.machine import COPY, SHORT_CALL, Gpu, Machine, bandwidths, copying, default_backend, on_default
from dam.kernels import configs, forms

Function = Callable[[], object]

PROG = "python -m benchmarks gpu"
BUDGET, TESTS_LIMIT, SANITIZE_LIMIT = 450.0, 180.0, 400.0  # seconds
TESTS_LEAST, SANITIZE_LEAST = 30.0, 120.0  # with fewer left they are not begun
# What the longest case takes that is begun just before --minutes are over, and the plots.
RESERVE = 40.0
TESTS = ("tests/cuda", "tests/ops", "--ignore", "tests/cuda/test_build.py")
# Of those, by name, in this order: what the other backends compute needs no GPU, and was tested elsewhere.
TESTED = {"cuda": "cuda", "triton": "triton and not cuda"}
WORKERS = 12
LLADA = 126_464
VOCABULARIES = (32_768, LLADA, 151_936, 262_144)
# Calls that a CUDA graph holds: of inputs that together are many times the L2 cache, and not more than these.
GRAPH_BYTES, GRAPH_CALLS = 2**28, 64
TRITON = goals.TRITON


class Item(NamedTuple):
    """The cases of one op at one size, measured together."""

    op: str
    sizes: dict[str, int]
    dtype: torch.dtype = torch.bfloat16
    peers: bool = True
    compiled: bool = False  # also the peers of torch.compile, each of which takes seconds for every size
    graph: bool = False  # also many calls in one CUDA graph


def plan() -> list[Item]:
    """What is measured, in the order of what a spent budget should leave out last."""

    def rows(op: str, count: int, vocabulary: int) -> Item:
        # Peers hold several float32 or float64 arrays [T, V]: at 32,768 rows the memory would go to them.
        peers, compiled = count < 32_768, vocabulary == LLADA and count == 8192
        graph = vocabulary == LLADA and count in (64, 1024)
        return Item(op, {"rows": count, "vocabulary": vocabulary}, peers=peers, compiled=compiled, graph=graph)

    def linear(op: str, count: int, vocabulary: int = LLADA) -> Item:
        sizes = {"linear_jump": (64, 256, 4096), "linear_matching_loss": (1024,)}
        compiled = vocabulary == LLADA and count in sizes.get(op, ())
        return Item(op, {"rows": count, "vocabulary": vocabulary, "hidden": 4096}, compiled=compiled)

    others = [v for v in VOCABULARIES if v != LLADA]
    items = [rows(op, t, LLADA) for t in (8192, 1024, 64, 1) for op in configs.ROW_OPS]
    items += [linear("linear_jump", t) for t in (1, 64, 128, 256, 1024, 4096)]
    items += [linear("linear_matching_loss", 8192), linear("linear_log_prob", 8192)]
    # The bisection is 53 passes, which a compiler would unroll for a minute.
    sizes = {"backward_kolmogorov": {"rows": 1024, "vocabulary": LLADA}}
    items += [Item(op, sizes.get(op, {}), torch.float32, compiled=op != "tilt_to_ess") for op in configs.STATE_OPS]
    items += [rows(op, t, v) for t in (8192, 1024) for v in others for op in configs.ROW_OPS]
    items += [linear("linear_jump", t) for t in (16, 512, 8192)]
    items += [linear(op, t) for t in (64, 1024) for op in ("linear_log_prob", "linear_matching_loss")]
    items += [rows(op, t, LLADA) for t in (8, 4096, 32_768) for op in configs.ROW_OPS]
    items += [linear("linear_matching_loss", 32_768)._replace(peers=False)]  # whose logits alone are 8.3 GB
    items += [linear("linear_jump", t, 151_936) for t in (64, 256, 1024, 4096, 1, 16, 128, 512, 8192)]
    items += [rows(op, t, v) for t in (4096, 64, 1, 8, 32_768) for v in others for op in configs.ROW_OPS]
    return items


# What benchmarks/notes.md predicts and no run has shown yet, in the order of what it is worth.
PREDICTED = (
    ("linear_matching_loss", 8192),
    ("matching_loss", 8192),
    ("linear_log_prob", 8192),
    ("jump", 1024),
    ("jump", 64),
    ("matching_loss", 1024),
    ("linear_jump", 4096),
    ("backward_kolmogorov", 1024),
)


def is_predicted(item: Item) -> bool:
    return item.sizes.get("vocabulary") == LLADA and (item.op, item.sizes["rows"]) in PREDICTED


@dataclasses.dataclass
class Run:
    """Measurements of one run, and what failed or was left out."""

    machine: Machine
    output: Path
    budget: float = math.inf  # seconds
    repeats: int = 7
    accuracy_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # other than those of accuracy.checks
    started: float = dataclasses.field(default_factory=time.monotonic)
    tests: str = "not run"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    bandwidth: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes per second
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    not_yet: list[str] = dataclasses.field(default_factory=list)  # what is still to be measured
    stopped: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # compiled too long: label, name, why

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.facts = {**records.versions(), **self.machine.facts()}

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def out_of_time(self) -> bool:
        return self.left() < 0.0

    def measure(
        self,
        items: Sequence[Item],
        bandwidth_bytes: int = 2**32,
        *,
        done: Callable[[Item, list[dict[str, Any]]], None] = lambda item, records: None,
        plots: bool = True,
    ) -> str:
        """Measures the items, printing each; writes JSON, PNG and summary.md, whose text it returns.

        JSON and summary.md are written after every item, for a run that is killed; then `done` gets the item and its
        records, if all its cases have one.
        """
        stopped = None
        if (reason := choice.why_unavailable("cuda")) is not None:
            self.left_out = [*dict.fromkeys([*self.left_out, f"the CUDA kernels: {reason}"])]
        with on_default(self.machine):
            self.bandwidth = bandwidths(self.machine, bandwidth_bytes)
            self.machine.free()
            for n, item in enumerate(items):
                if stopped is None and self.out_of_time():
                    stopped = f"the budget of {self.budget:.0f} s was spent"
                if stopped is not None:
                    self.left_out.append(f"{described(item)}: {stopped}")
                    continue
                before, missed = len(self.records), len(self.left_out) + len(self.failures)
                self._measure(item)
                if len(self.left_out) + len(self.failures) == missed:
                    done(item, self.records[before:])
                self.not_yet = [described(later) for later in items[n + 1 :]]
                self._write(item.op)
                self._write_summary()
                if not self.machine.answers():
                    stopped = "the GPU no longer answers"
        self.not_yet = []
        return self.finish() if plots else self._write_summary()

    def finish(self) -> str:
        """Plots, and the summary."""
        self._plot()
        return self._write_summary()

    def tune(self, jobs: Sequence[tune.Job]) -> str:
        """Tunes the jobs and writes tune.json; returns the rows for the table, and what failed or was left out."""
        with dam.backend("triton"):
            tuning = tune.tune(self.machine, jobs, self.repeats, self.out_of_time)
        report.write_json(self.output / "tune.json", {**self.facts, **dataclasses.asdict(tuning)})
        self.failures += tuning.failures
        lines = [*listed("Left out", tuning.left_out), *listed("FAILED", tuning.failures)]
        return "\n".join([*lines, "For TABLE:\n", *tuning.rows]) + "\n"

    def _measure(self, item: Item) -> None:
        print(f"\n{described(item)} (after {time.monotonic() - self.started:.0f} s)", flush=True)
        try:
            with torch.device(self.machine.device):
                cases = harness.cases_of(item.op)(item.dtype, **item.sizes)
        except torch.OutOfMemoryError as error:
            # Of the inputs and the floor's logits, which are not dam's to make smaller.
            self.left_out.append(f"{described(item)}: its inputs do not fit the memory ({harness.reason(error)})")
            cases = []
        except Exception as error:
            self.failures.append(f"{described(item)}: {harness.reason(error)}")
            cases = []
        for case in cases:
            if self.out_of_time():
                self.left_out.append(f"{described(item)}, {case.label}: the budget of {self.budget:.0f} s was spent")
                continue
            try:
                record = self._record(item, case)
            except Exception as error:
                self.failures.append(f"{described(item)}, {case.label}: {harness.reason(error)}")
                print(f"\n{case.label}\n  FAILED: {harness.reason(error)}", flush=True)
                continue
            self.records.append(record)
            lines = goals.figures(record, self.bandwidth)
            print("\n".join([report.case_table(record), *(f"  {line}" for line in lines)]), flush=True)
            ours = {name: why for name, why in record["absent"].items() if name.startswith("dam")}
            self.failures += [f"{described(item)}, {case.label}, {name}: {why}" for name, why in ours.items()]
        if item.compiled:
            torch.compiler.reset()  # after a few sizes of one function the compiler would give up on it
        self.machine.free()

    def _record(self, item: Item, case: harness.Case) -> dict[str, Any]:
        """The measurements of a case, as they are written to JSON."""
        sizes = {**harness.sizes_of(harness.cases_of(item.op)), **item.sizes}
        record, flops = records.of_case(item.op, case, sizes, str(item.dtype).removeprefix("torch.")), 0
        if item.op in configs.LINEAR_OPS:
            with FlopCounterMode(display=False) as counter:
                case.floor()
            flops = counter.get_total_flops()
        else:
            case = dataclasses.replace(case, floor_name=COPY, floor=copying(record["moved_bytes"], self.machine.device))
        case = chosen(case, item)
        # What was stopped while it compiled at one size would be stopped at every other.
        known = {name: why for (label, name), why in self.stopped.items() if label == case.label}
        case.functions, case.compiled = (
            {name: f for name, f in some.items() if name not in known} for some in (case.functions, case.compiled)
        )
        measured = harness.measure(case, self.repeats, timer=self.machine)
        slow = {name: why for name, why in measured.absent.items() if why.startswith(TimeoutError.__name__)}
        self.stopped.update({(case.label, name): why for name, why in slow.items() if name in case.compiled})
        measured.absent.update(known)
        functions = {case.floor_name: case.floor, **case.functions, **case.compiled}
        functions = {name: f for name, f in functions.items() if name not in measured.absent}
        peaks = {name: self.machine.peak_bytes(f) for name, f in functions.items()}
        measured.peak_bytes.update({name: peak for name, peak in peaks.items() if peak is not None})
        parts = {}
        if measured.median_seconds["dam"] < SHORT_CALL:
            ours = (name for name in functions if name.startswith("dam") or name == case.floor_name)
            parts = {name: self.machine.parts(functions[name]) for name in ours}
        return {
            **records.timed(record, measured),
            "flops": flops,  # of the floor
            "table_form": table_form(item, case.label, self.machine.device),
            "parts": parts,
            "graph": self._graph(item, case, record["moved_bytes"], measured) if item.graph else {},
        }

    def _graph(self, item: Item, case: harness.Case, nbytes: int, measured: harness.Measurement) -> dict[str, Any]:
        """Seconds of a call of each function, many in one CUDA graph, or why there are none.

        Each on inputs of its own, so that none finds in the L2 cache what it reads; of functions whose calls are short.
        """
        calls = min(GRAPH_CALLS, max(4, -(-GRAPH_BYTES // nbytes)))
        cases = []
        for _ in range(calls):
            with torch.device(self.machine.device):
                made = harness.cases_of(item.op)(item.dtype, **item.sizes)
            (one,) = (one for one in made if one.label == case.label)
            cases.append(dataclasses.replace(chosen(one, item), floor=copying(nbytes, self.machine.device)))
        seconds, absent = {}, {}
        for name in (name for name, t in measured.median_seconds.items() if t < SHORT_CALL):
            functions = [{COPY: one.floor, **one.functions, **one.compiled}[name] for one in cases]
            try:
                if self.machine.waits(functions[0]):
                    raise RuntimeError("a call that waits for the GPU cannot be captured")
                seconds[name] = self.machine.graph_seconds(functions)
            except Exception as error:
                absent[name] = harness.reason(error)
        return {"calls": calls, "seconds": seconds, "absent": absent}

    def _write(self, op: str) -> None:
        records = [record for record in self.records if record["op"] == op]
        if records:
            result = {"op": op, **self.facts, "repeats": self.repeats, "bandwidth": self.bandwidth, "cases": records}
            report.write_json(self.output / f"{op}.json", result)

    def _write_summary(self) -> str:
        text = self.summary()
        (self.output / "summary.md").write_text(text, encoding="utf-8")
        reached = [goal._asdict() for goal in goals.reached(self.records, self.bandwidth, self.machine.device)]
        result = {"bandwidth": self.bandwidth, "tests": self.tests, "goals": reached}
        lists = {"failures": self.failures, "left_out": self.left_out, "not_yet": self.not_yet}
        report.write_json(self.output / "summary.json", {**self.facts, **result, **lists})
        return text

    def _plot(self) -> None:
        """A PNG per op: of its cases with LLaDA's vocabulary, or of all where there is none."""
        for op in dict.fromkeys(record["op"] for record in self.records):
            records = [record for record in self.records if record["op"] == op]
            records = [r for r in records if r["sizes"].get("vocabulary") == LLADA] or records
            records.sort(key=lambda r: (r["label"], r["sizes"].get("rows", 0)))
            panels = [
                (f"{r['label']}, {goals.sizes_text(r['sizes'])}", r["median_seconds"], r["floor_name"]) for r in records
            ]
            try:
                plots.times_and_floor(self.output / f"{op}.png", panels, title=f"{op}, {self.facts['gpu']}")
            except ImportError as error:
                self.left_out.append(f"plots: {error}")
                return

    def summary(self) -> str:
        """What was measured in Markdown; what matters most comes last, where a terminal shows it."""
        names = ("driver", "cuda", "torch", "triton", "dam", "commit")
        copy, read = (f"{self.bandwidth[name] / 1e12:.3f} TB/s" for name in ("copy", "read"))
        lines = [
            f"# Measured on {self.facts['gpu']}\n",
            ", ".join(f"{name} {self.facts[name]}" for name in names if self.facts.get(name)) + "\n",
            f"A large copy moves {copy}, bytes read and bytes written counted; reading alone {read}.\n",
            *listed("Left out", self.left_out, most=20),
            *listed("Cut off before", self.not_yet, most=20),
            *goals.tables(self.records, self.bandwidth, self.machine.device),
            f"tests: {self.tests}\n",
            *listed("FAILED", self.failures),
        ]
        return "\n".join(lines).rstrip() + "\n"


def described(item: Item) -> str:
    return ", ".join(text for text in (item.op, goals.sizes_text(item.sizes)) if text)


def listed(title: str, lines: Sequence[str], most: int | None = None) -> list[str]:
    if not lines:
        return []
    rest = [] if most is None or len(lines) <= most else [f"* and {len(lines) - most} more, in summary.json"]
    return [f"## {title}\n", *(f"* {line}" for line in lines[:most]), *rest, ""]


def on_backend(backend: str, function: Function) -> Function:
    def call() -> object:
        with dam.backend(backend):
            return function()

    return call


def in_form(form: str, function: Function) -> Function:
    def call() -> object:
        os.environ["DAM_LINEAR_FORM"] = form
        try:
            return function()
        finally:
            del os.environ["DAM_LINEAR_FORM"]  # that it was set is an error of the command

    return call


def chosen(case: harness.Case, item: Item) -> harness.Case:
    """The case with the functions that the item asks for, those of Triton and each of its forms of a linear op among
    them.

    What compiles or loads kernels of its own when it is first called goes with `compiled`.
    """
    functions, compiled = dict(case.functions), case.compiled | case.on_gpu
    if item.op in configs.LINEAR_OPS:
        call = functions["dam"]
        for form in goals.FORMS:
            form_of_triton = tune.with_values(item.op, dict.fromkeys(tune.FORM_KEYS, form), call)
            functions[f"dam, {form}"] = on_backend("triton", form_of_triton)
        if default_backend() == "cuda" and "trained" in case.label:
            functions |= {f"dam, {form}": in_form(form, call) for form in forms.OF_GRADIENTS}
    if item.op == "backward_kolmogorov" and default_backend() == "cuda":  # whose default on a lattice is Triton
        functions["dam, cuda"] = on_backend("cuda", functions["dam"])
    if default_backend() != "triton":
        for name, call in (*case.functions.items(), *case.on_gpu.items()):
            if name.startswith("dam"):
                functions[name.replace("dam", TRITON, 1)] = on_backend("triton", call)
    if not item.compiled:
        compiled = {name: f for name, f in compiled.items() if "compiled" not in name}
    if not item.peers:
        functions, compiled = (
            {name: f for name, f in some.items() if name.startswith("dam")} for some in (functions, compiled)
        )
    return dataclasses.replace(case, functions=functions, compiled=compiled)


def table_form(item: Item, label: str, device: torch.device) -> str | None:
    """The form that the table of kernel sizes chooses for a case of a linear op, for its gradient if it has one."""
    if item.op not in configs.LINEAR_OPS:
        return None
    sizes = {**harness.sizes_of(harness.cases_of(item.op)), **item.sizes}
    values = configs.lookup(item.op, device, item.dtype.itemsize, sizes["rows"], sizes["vocabulary"])
    forward, frozen, trained = tune.FORM_KEYS
    return values[trained if "trained" in label else frozen if "frozen" in label else forward]


def run_tests(log: Path, limit: float, options: Sequence[str] = TESTS, under: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether the tests passed within the limit, in seconds, and pytest's closing line; all that it prints into log.

    Args:
        options: arguments of pytest.
        under: a command that runs another one, which is then pytest in one process.
    """
    # A line for each test as it ends, and a failure when it happens: the log of a run that was cut off is to have them.
    plugins = ("-p", "no:cacheprovider", "-p", "dam.benchmarks.failures")
    command = [*under, sys.executable, "-m", "pytest", "-v", "--tb=short", *plugins, *options]
    if not under and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]  # most of their time goes into compiling kernels
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=checkout.ROOT, start_new_session=True)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    closing = text.splitlines()[-1].strip("= ") if text else "pytest printed nothing"
    if status is None:
        # "NAME PASSED [ 1%]" of one process, "[gw0] [ 1%] PASSED NAME" of several.
        passed, failed = (
            {a or b for a, b in re.findall(rf"^(\S+::.+) {word} |^\[gw.*\] {word} (.+)$", text, re.MULTILINE)}
            for word in ("PASSED", "FAILED")
        )
        named = f": {', '.join(sorted(failed)[:5])}" if failed else ""
        closing = f"not finished after {limit:.0f} s; {len(passed)} passed, {len(failed)} failed{named}"
    return status == 0, closing


def in_minutes(run: Run, items: Sequence[Item], tests_limit: float) -> str:
    """What is worth most first, until the budget is spent; what an earlier call has done is not done again.

    Accuracy, the figures that were predicted without what others take, the CUDA kernels' tests, the same beside others,
    whose compilers may take minutes, all other figures, Triton's tests, and what compute-sanitizer finds. Returns the
    summary.
    """
    key = {"code": checkout.digest(), "gpu": run.facts["gpu"], "torch": torch.__version__, "repeats": run.repeats}
    agenda = Agenda(run.output / "agenda.json", key)
    predicted = sorted(filter(is_predicted, items), key=lambda item: PREDICTED.index((item.op, item.sizes["rows"])))
    alone = [item._replace(peers=False, compiled=False) for item in predicted if item.peers]
    for item in (*alone, *items):
        _take(run, agenda[_step(item)] if _step(item) in agenda else [])
    print(f"{len(agenda)} steps were done before", flush=True)
    _check_accuracy(run, agenda)

    def done(item: Item, found: list[dict[str, Any]]) -> None:
        agenda.add(_step(item), found)
        _take(run, found)

    def measure(some: Sequence[Item]) -> None:
        run.measure([item for item in some if _step(item) not in agenda], done=done, plots=False)

    measure([item for item in alone if described(item) not in agenda])
    _test_once(run, agenda, "cuda", tests_limit)
    measure([*predicted, *(item for item in items if not is_predicted(item))])
    _test_once(run, agenda, "triton", tests_limit)
    _sanitize_once(run, agenda)
    run.tests = "; ".join(agenda[name] for name in ("tests, cuda", "tests, triton") if name in agenda) or run.tests
    return run.finish()


def _step(item: Item) -> str:
    return described(item) if item.peers else f"{described(item)}, alone"


def _take(run: Run, found: Sequence[dict[str, Any]]) -> None:
    """Puts records in the place of those of the same cases, of an item that was measured alone before."""
    cases = [(record["label"], record["sizes"]) for record in found]
    run.records = [*(r for r in run.records if (r["label"], r["sizes"]) not in cases), *found]


def _sanitize_once(run: Run, agenda: Agenda) -> None:
    if "sanitizer" in agenda:
        return
    if run.left() < SANITIZE_LEAST:
        run.left_out.append("compute-sanitizer: too little time was left")
        return
    lines = sanitize(run.output, run.left())
    print("\n".join(lines), flush=True)
    bad = [line for line in lines if "FAILED" in line]
    run.failures += bad
    if not bad:
        agenda.add("sanitizer", lines)


def _check_accuracy(run: Run, agenda: Agenda) -> None:
    if "accuracy" in agenda:
        return
    backends = [name for name in choice.FAST["cuda"] if choice.why_unavailable(name) is None]
    found, before = [], len(run.failures)
    try:
        for check in accuracy.checks(run.machine.device, backends, **run.accuracy_sizes):
            print(check, flush=True)
            found.append({**check._asdict(), "passed": check.passed})
            if not check.passed:
                run.failures.append(str(check))
    except Exception as error:
        run.failures.append(f"accuracy, after {len(found)} checks: {harness.reason(error)}")
    run.machine.free()
    if len(run.failures) == before:
        agenda.add("accuracy", found)
    report.write_json(run.output / "accuracy.json", {**run.facts, "checks": found})


def _test_once(run: Run, agenda: Agenda, name: str, limit: float) -> None:
    """The tests of a backend, unless they have passed; with what time there is."""
    if f"tests, {name}" in agenda or limit == 0.0:
        return
    limit = min(limit, run.left())
    if limit < TESTS_LEAST:
        run.left_out.append(f"tests of {name}: too little time was left")
        return
    passed, closing = run_tests(run.output / f"tests-{name}.txt", limit, (*TESTS, "-k", TESTED[name]))
    print(f"tests of {name}: {closing}", flush=True)
    if passed:
        agenda.add(f"tests, {name}", f"{name}: {closing}")
    else:
        run.failures.append(f"tests of {name}: {closing} ({run.output})")


def run_all_tests(output: Path, limit: float) -> tuple[bool, str]:
    """The same of the tests of each GPU backend, one after another within the limit."""
    began, passed, closings = time.monotonic(), True, []
    for name, expression in TESTED.items():
        left = began + limit - time.monotonic()
        if left <= 0.0:
            passed, closing = False, "no time was left"
        else:
            good, closing = run_tests(output / f"tests-{name}.txt", left, (*TESTS, "-k", expression))
            passed = passed and good
        closings.append(f"{name}: {closing}")
    return passed, "; ".join(closings)


def sanitize(output: Path, limit: float) -> list[str]:
    """What compute-sanitizer finds in the tests of the CUDA kernels, a line for each of its tools that was run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return ["compute-sanitizer is not installed here, so nothing was looked for"]
    lines = []
    for check in ("memcheck", "racecheck"):
        log = output / f"{check}.txt"
        under = (tool, "--tool", check, "--error-exitcode", "1", "--kernel-name", "kernel_substring=dam")
        options = (*TESTS, "-k", "cuda and not compile and not opcheck and not graph", "-m", "not slow")
        passed, closing = run_tests(log, limit / 2, options, under)
        lines.append(f"{check}: {'nothing found' if passed else 'FAILED'}; {closing} ({log})")
    return lines


def main(arguments: Sequence[str]) -> int:
    started = checkout.started()
    options = _options(arguments)
    if not torch.cuda.is_available():
        return _error("torch sees no GPU here, so nothing was measured")
    if triton.INTERPRETED:
        return _error("TRITON_INTERPRET=1 is set, so kernels would not run on the GPU; nothing was measured")
    if os.environ.get("DAM_BACKEND"):
        return _error("DAM_BACKEND is set, so the default could not be measured; nothing was measured")
    if os.environ.get("DAM_LINEAR_FORM"):
        return _error("DAM_LINEAR_FORM is set, so no other form could be measured; nothing was measured")
    machine = Gpu()
    output = options.output or report.RESULTS / report.slug(machine.facts()["gpu"])
    budget = options.budget if options.minutes is None else max(0.0, 60.0 * options.minutes - RESERVE)
    run = Run(machine, output, budget, options.repeats, started=started)
    if options.sanitize:
        lines = sanitize(output, min(options.budget, SANITIZE_LIMIT))
        print("\n".join(lines), flush=True)
        return 1 if any("FAILED" in line for line in lines) else 0
    if options.wheels is not None:
        run.left_out += [f"a package to compare with: {why}" for why in checkout.install_wheels(options.wheels)]
    if options.minutes is not None:
        text = in_minutes(
            run, [item for item in plan() if item.op in options.only], options.tests_limit * options.tests
        )
    elif options.tune:
        text = run.tune([job for job in tune.jobs() if job.op in options.only])
    else:
        if options.tests:
            passed, run.tests = run_all_tests(output, options.tests_limit)
            print(f"tests: {run.tests}", flush=True)
            if not passed:
                run.failures.append(f"tests: {run.tests} ({output})")
        text = run.measure([item for item in plan() if item.op in options.only])
    print(f"\nJSON and PNG: {output}\n\n{text}", end="", flush=True)
    return 1 if run.failures else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def ops(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in configs.OPS]
        if unknown:
            raise argparse.ArgumentTypeError(f"no op {unknown[0]!r} to measure; there are {', '.join(configs.OPS)}")
        return text.split(",")

    add = parser.add_argument
    add("--only", metavar="OP,OP", type=ops, default=list(configs.OPS), help="operations to measure (default: all)")
    add("--output", metavar="DIR", type=Path, help="folder of the results (default: benchmarks/results/<gpu>)")
    add("--budget", metavar="SECONDS", type=float, default=BUDGET, help="begin nothing after it (default: %(default)g)")
    one = parser.add_mutually_exclusive_group().add_argument
    one(
        "--minutes",
        metavar="N",
        type=float,
        help="by value, accuracy first; a second call goes on with what was left out",
    )
    add("--repeats", metavar="N", type=int, default=7, help="calls of each function (default: %(default)s)")
    add("--no-tests", dest="tests", action="store_false", help="leave out the tests")
    add("--wheels", metavar="DIR", type=Path, help="install the wheels in it first: those of peers.txt")
    add("--tests-limit", metavar="SECONDS", type=float, default=TESTS_LIMIT, help="for them (default: %(default)g)")
    one("--tune", action="store_true", help="instead: measure candidates for the table of kernels/configs.py")
    one("--sanitize", action="store_true", help="instead: the tests of the CUDA kernels under compute-sanitizer")
    return parser.parse_args(arguments)


def _error(sentence: str) -> int:
    print(f"{PROG}: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit("the command is python -m benchmarks gpu")
