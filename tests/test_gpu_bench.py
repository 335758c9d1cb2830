"""`python -m benchmarks gpu`, tried at tiny sizes on the CPU, where kernels run in Triton's interpreter."""

import contextlib
import json
import math
import re
import time
import zipfile

import pytest
import scipy.stats
import torch

import dam
from dam.backends import triton
from dam.benchmarks import accuracy, checkout, goals, gpu, harness, machine, peers, records, tune
from dam.kernels import configs
from tests import fresh
from tests.calls import public_ops

# On a GPU the command itself is the trial.
pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="needs Triton's interpreter")

SIZES = {"rows": 3, "vocabulary": 20, "hidden": 16, "groups": 2, "trajectories": 5, "steps": 4}


class Machine(machine.Machine):
    """Without a call before each timed one: it is the interpreter that takes the time here."""

    short = 0.0


def item(op, **sizes):
    defaults = harness.sizes_of(harness.cases_of(op))
    dtype = torch.float32 if op in configs.STATE_OPS else torch.bfloat16
    return gpu.Item(op, {name: SIZES[name] for name in defaults} | sizes, dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of every op; whichever test asks first waits for it."""
    run = gpu.Run(Machine(), tmp_path_factory.mktemp("results"), repeats=1)
    run.text = run.measure([item(op) for op in configs.OPS], 2**16)
    return run


def record_of(run, label):
    (record,) = (record for record in run.records if record["label"] == label)
    return record


@pytest.mark.slow
def test_every_op_is_measured(whole):
    assert whole.failures == whole.left_out == []
    missing = set(public_ops()) - set(configs.OPS)
    assert not missing, f"OPS of kernels/configs.py lacks {', '.join(sorted(missing))}"
    assert {record["op"] for record in whole.records} == set(public_ops()) == set(configs.OPS)
    for op in configs.OPS:
        labels = [case.label for case in harness.tiny_cases(harness.cases_of(op), torch.float32)]
        assert [record["label"] for record in whole.records if record["op"] == op] == labels
    for record in whole.records:
        assert all(seconds > 0 for seconds in record["median_seconds"].values())
        assert {"dam", record["floor_name"]} <= record["median_seconds"].keys()


@pytest.mark.slow
def test_a_record_says_of_what_it_is_in_itself(whole):
    for record in whole.records:
        asked = item(record["op"])
        assert record["sizes"] == asked.sizes and record["dtype"] == str(asked.dtype).removeprefix("torch.")
        assert record["floor_name"] == gpu.COPY or record["op"] in configs.LINEAR_OPS
        assert record["floor_seconds"] == record["median_seconds"][record["floor_name"]]
        assert record["moved_bytes"] > record["result_bytes"] > 0 and record["versions"] == records.versions()


@pytest.mark.slow
def test_both_forms_of_a_linear_op_are_measured(whole):
    for record in whole.records:
        forms = {name for name in record["median_seconds"] if name in ("dam, fused", "dam, chunked")}
        assert len(forms) == (2 if record["op"].startswith("linear_") else 0)
        assert record["table_form"] in ((*goals.FORMS, "once") if forms else (None,))


@pytest.mark.slow
def test_the_default_backend_is_measured_beside_triton(whole):
    for record in whole.records:
        assert goals.TRITON in record["median_seconds"], record["label"]
    names = ("dam", "dam, check=False", "dam, triton", "dam, triton, check=False")
    assert set(names) <= record_of(whole, "jump")["median_seconds"].keys()
    assert all(f"| jump | {name} | 3 |" in whole.text for name in names)


def test_each_name_stands_for_its_backend():
    seen = []
    case = harness.Case("", "floor", dict, {"dam": lambda: seen.append(gpu.choice._requested)})
    with gpu.on_default(Machine()):
        for op in ("linear_jump", "backward_kolmogorov"):  # the default of the latter is Triton in part
            functions = gpu.chosen(case, item(op)).functions
            assert ("dam, cuda" in functions) == (op == "backward_kolmogorov")
            for name, function in functions.items():
                function()
                assert seen.pop() == ("cuda" if name in ("dam", "dam, cuda") else "triton"), name


def test_without_the_cuda_kernels_the_run_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.choice, "why_unavailable", lambda name: "no nvcc here" if name == "cuda" else None)
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    run.measure([item("rate_ratio")], 2**10)
    assert run.failures == [] and run.left_out == ["the CUDA kernels: no nvcc here"]
    assert gpu.default_backend() == "triton" and goals.TRITON not in run.records[0]["median_seconds"]


def test_few_rows_are_compared_with_the_best_peer():
    """Not with the floor, nor with dam's other functions."""
    few = record("jump", rows=4, dam=2.0, **{"dam, triton": 1.0, "fast peer": 1.5, "slow peer": 9.0})
    found = {g.what: g for g in goals.reached([few], BANDWIDTH) if g.goal.startswith("no slower")}
    assert found["jump"].met is False and "1.33" in found["jump"].measured
    assert found["jump, triton"].met is True and "0.667" in found["jump, triton"].measured
    many = {g.what: g for g in goals.reached([record("jump", rows=2048, dam=2.0)], BANDWIDTH)}
    assert many["jump, triton"].measured == "not measured"


class OfGraphs(Machine):
    """Notes of which logits the calls of each graph are."""

    def __init__(self):
        self.graphs, self.called = [], []

    def graph_seconds(self, functions):
        self.called.clear()
        for function in functions:
            function()
        self.graphs.append((len(functions), len(set(self.called))))
        return 1.0


def test_calls_of_one_graph_have_inputs_of_their_own(monkeypatch, tmp_path):
    of_graphs, jump = OfGraphs(), dam.jump

    def called(logits, **options):
        of_graphs.called.append(logits.data_ptr())
        return jump(logits, **options)

    monkeypatch.setattr(dam, "jump", called)
    monkeypatch.setattr(gpu, "GRAPH_CALLS", 3)
    monkeypatch.setattr(gpu, "SHORT_CALL", math.inf)
    run = gpu.Run(of_graphs, tmp_path, repeats=1)
    text = run.measure([item("jump")._replace(graph=True)], 2**10)
    (found,) = run.records
    ours = {goals.seeded("dam"), goals.seeded(goals.TRITON), "dam, check=False", "dam"}
    assert ours | {gpu.COPY, "LLaDA's step"} <= found["graph"]["seconds"].keys() and found["graph"]["calls"] == 3
    assert of_graphs.graphs.count((3, 3)) >= len(ours) and {calls for calls, _ in of_graphs.graphs} == {3}
    assert "## Many calls in one CUDA graph" in text and run.failures == []


def test_a_call_that_waits_is_in_no_graph(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRAPH_CALLS", 1)
    monkeypatch.setattr(gpu, "SHORT_CALL", math.inf)
    monkeypatch.setattr(Machine, "waits", lambda self, function: True, raising=False)
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    assert "in one CUDA graph" in run.measure([item("rate_ratio")._replace(graph=True)], 2**10)
    graph = run.records[0]["graph"]
    assert graph["seconds"] == {} and "cannot be captured" in graph["absent"]["dam"]


def test_goals_are_about_the_unchecked_call_where_there_is_one():
    """Peers check nothing, and a check waits for the GPU."""
    functions = {"dam": 9.0, "dam, check=False": 1.02, "dam, triton": 9.0, "dam, triton, check=False": 2.0}
    found = {g.what: g for g in goals.reached([record("jump", **functions)], BANDWIDTH) if "90%" in g.goal}
    assert found["jump"].met is True and found["jump, triton"].measured.startswith("0.5 ")
    found = {g.what: g for g in goals.reached([record("linear_jump", **functions)], BANDWIDTH) if "1.03x" in g.goal}
    assert found["linear_jump"].met is True


def test_a_form_is_that_of_the_forward_pass_and_of_gradients():
    case = harness.Case(
        "", "floor", dict, {"dam": lambda: configs.lookup("linear_jump", torch.device("cpu"), 2, 3, 20)}
    )
    functions = gpu.chosen(case, item("linear_jump")).functions
    for form in goals.FORMS:
        values = functions[f"dam, {form}"]()
        assert {name: value for name, value in values.items() if name.endswith("form")} == dict.fromkeys(
            tune.FORM_KEYS, form
        )


def test_the_form_of_the_table_is_that_of_the_gradient(monkeypatch):
    row = configs.Row("linear", {"form": "a", "frozen_form": "b", "trained_form": "c"})
    monkeypatch.setattr(configs, "TABLE", (*configs.TABLE, row))
    configs._lookup.cache_clear()
    labels = ("linear_log_prob, forward", "linear_matching_loss, frozen head", "linear_matching_loss, trained head")
    found = [gpu.table_form(item("linear_log_prob"), label, torch.device("cpu")) for label in labels]
    configs._lookup.cache_clear()
    assert found == ["a", "b", "c"]


@pytest.mark.slow
def test_floors_count_what_must_move_and_the_matmuls(whole):
    t, v, d, g, k, s = (SIZES[name] for name in ("rows", "vocabulary", "hidden", "groups", "trajectories", "steps"))
    logits, target, state, lattice = 2 * t * v, 8 * t, 4 * t * v, 4 * t * math.isqrt(v) ** 2
    paths, groups = 4 * g * k * s, 4 * g
    moved = {
        "jump": logits + (8 + 4 + 4) * t,  # target, log_prob, log_escape
        "log_prob, forward": logits + target + 4 * t,
        "log_prob, forward and backward": 2 * logits + target + logits,
        "rate_ratio": 2 * logits + target + 2 * 4 * t,
        "matching_loss, forward and backward": logits + target + 4 * t + logits,
        "matching_loss with base, forward and backward": 2 * logits + target + 4 * t + 4 * t + logits,
        "adjoint_weights": paths + 4 * g * k + 4 * g * k * (s + 1) + 4 * g * k + 3 * groups,
        "adjoint_weights with escape_gap": 2 * paths + 4 * g * k + 4 * g * k * (s + 1) + 4 * g * k + 3 * groups,
        "backward_kolmogorov, uniform": 2 * state,
        "backward_kolmogorov, square lattice": 2 * lattice,
        "tilt_to_ess": 4 * g * k + 8 * g,
        "linear_jump": 2 * (t + v) * d + (8 + 4 + 4) * t,
    }
    assert {label: record_of(whole, label)["moved_bytes"] for label in moved} == moved
    flops = {record["label"]: record["flops"] / (2 * t * v * d) for record in whole.records}
    assert {label: count for label, count in flops.items() if count} == {
        "linear_jump": 1,
        "linear_log_prob, forward": 1,
        "linear_log_prob, forward and backward, frozen head": 2,
        "linear_log_prob, forward and backward, trained head": 3,
        "linear_matching_loss, frozen head": 2,
        "linear_matching_loss, frozen head, with base": 3,
        "linear_matching_loss, trained head": 3,
        "linear_matching_loss, trained head, with base": 4,
    }


@pytest.mark.parametrize("limit", (2**28, 5))
def test_the_copy_moves_all_bytes(monkeypatch, limit):
    copied = []
    copy = torch.Tensor.copy_

    def counted(target, source):
        copied.append(2 * source.nbytes)
        return copy(target, source)

    monkeypatch.setattr(machine, "COPIED_AT_ONCE", limit)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    machine.copying(8 * 17, torch.device("cpu"))()
    assert sum(copied) == 8 * 17


@pytest.mark.slow
def test_what_is_written(whole):
    for op in configs.OPS:
        result = json.loads((whole.output / f"{op}.json").read_text())
        assert all(result[key] for key in ("op", "gpu", "torch", "triton", "dam", "repeats", "bandwidth"))
        assert "commit" in result
        assert result["cases"] == json.loads(json.dumps([r for r in whole.records if r["op"] == op]))
        assert (whole.output / f"{op}.png").stat().st_size > 0
    summary = json.loads((whole.output / "summary.json").read_text())
    assert {"gpu", "bandwidth", "tests", "goals", "failures", "left_out"} <= summary.keys()
    assert summary["not_yet"] == [] and "Cut off" not in whole.text
    assert (whole.output / "summary.md").read_text() == whole.text
    assert whole.text.index("## Goals") > whole.text.index("## Linear ops and their forms")


def test_what_is_planned():
    items = gpu.plan()
    assert {item.op for item in items} == set(configs.OPS)
    for op in configs.ROW_OPS:
        sizes = {(i.sizes["rows"], i.sizes["vocabulary"]) for i in items if i.op == op}
        assert sizes == {(t, v) for t in (1, 8, 64, 1024, 4096, 8192, 32_768) for v in gpu.VOCABULARIES}
    rows = {i.sizes["rows"] for i in items if i.op == "linear_jump" and i.sizes["vocabulary"] == gpu.LLADA}
    assert rows == {1, 16, 64, 128, 256, 512, 1024, 4096, 8192}


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_absent_with_its_reason(whole, monkeypatch, tmp_path):
    def missing(logits):
        raise ModuleNotFoundError("No module named 'sampler'")

    monkeypatch.setattr(peers, "flashinfer_sample", missing)
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    text = run.measure([item("jump")], 2**10)
    (record,) = run.records
    reason = "ModuleNotFoundError: No module named 'sampler'"
    assert record["absent"] == {"flashinfer's sampling_from_logits": reason}
    assert "flashinfer's sampling_from_logits" not in record["median_seconds"]
    assert f"* flashinfer's sampling_from_logits (1 cases): {reason}" in text
    assert run.failures == []


def test_a_function_of_dam_that_fails_fails_the_run(monkeypatch, tmp_path):
    def fails(*arguments, **options):
        raise ValueError("broken kernel\nand more")

    jump = dam.jump
    monkeypatch.setattr(dam, "rate_ratio", fails)
    monkeypatch.setattr(dam, "jump", lambda logits, **options: fails() if options else jump(logits))
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    text = run.measure([item("rate_ratio"), item("jump")], 2**10)
    assert run.failures == [
        "rate_ratio, T = 3, V = 20, rate_ratio: ValueError: broken kernel",
        *(
            f"jump, T = 3, V = 20, jump, {name}: ValueError: broken kernel"
            for backend in (goals.TRITON, "dam")
            for name in (f"{backend}, check=False", goals.seeded(backend))
        ),
    ]
    assert all(f"* {failure}" in text[text.index("## FAILED") :] for failure in run.failures)
    assert [record["op"] for record in run.records] == ["jump"]  # the rest is measured


def test_what_compiles_too_long_is_stopped_once(monkeypatch, tmp_path):
    """At the other sizes it is absent at once, for the same reason."""
    calls = []

    def compiles(**arguments):
        calls.append(arguments)
        time.sleep(60)

    monkeypatch.setattr(harness, "COMPILES", 0.1)
    monkeypatch.setattr(peers, "quack_log_prob", compiles)
    monkeypatch.setattr(peers, "quack_cross_entropy", compiles)
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    run.measure([item("log_prob"), item("log_prob", rows=2)], 2**10)
    assert len(calls) == 2  # one for each case, forward, and forward and backward
    for record in run.records:
        assert record["absent"] == {"quack's cross entropy": "TimeoutError: its first call took more than 0.1 s"}
    assert len(run.records) == 4 and run.failures == []


def test_what_was_measured_survives_a_kill(monkeypatch, tmp_path):
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    measure = run._measure

    def killed(item):
        if item.op == "jump":
            raise KeyboardInterrupt
        measure(item)

    monkeypatch.setattr(run, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run.measure([item("rate_ratio"), item("jump"), item("log_prob")], 2**10)
    text, result = (tmp_path / "summary.md").read_text(), json.loads((tmp_path / "summary.json").read_text())
    assert "* rate_ratio (T = 3, V = 20): dam" in text
    assert result["not_yet"] == ["jump, T = 3, V = 20", "log_prob, T = 3, V = 20"]
    assert "## Cut off before\n\n* jump, T = 3, V = 20\n* log_prob, T = 3, V = 20\n" in text
    assert (tmp_path / "rate_ratio.json").exists()


def test_a_spent_budget_leaves_out_the_rest(monkeypatch, tmp_path):
    run = gpu.Run(Machine(), tmp_path, budget=100.0, repeats=1)
    write = run._write
    monkeypatch.setattr(run, "_write", lambda op: (write(op), setattr(run, "started", time.monotonic() - 101)))
    text = run.measure([item("rate_ratio"), item("jump"), item("log_prob")], 2**10)
    assert [record["op"] for record in run.records] == ["rate_ratio"]
    left_out = [f"{op}, T = 3, V = 20: the budget of 100 s was spent" for op in ("jump", "log_prob")]
    assert run.left_out == left_out
    assert all(f"* {line}" in text for line in left_out)
    assert run.failures == []


def test_inputs_larger_than_the_memory_are_left_out(monkeypatch, tmp_path):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 1 TB")

    monkeypatch.setattr(harness, "logits", too_large)
    run = gpu.Run(Machine(), tmp_path, repeats=1)
    run.measure([item("jump")], 2**10)
    assert run.failures == run.records == []
    assert "tried to allocate 1 TB" in run.left_out[0]


def record(label, *, rows=1024, dam=1.0, floor=1.0, moved=100, flops=0, kernels=None, extra=None, graph=None, **others):
    return {
        "op": label.split(",")[0],
        "label": label,
        "sizes": {"rows": rows, "vocabulary": 50},
        "floor_name": "floor",
        "median_seconds": {"floor": floor, "dam": dam, **others},
        "moved_bytes": moved,
        "result_bytes": 10,
        "flops": flops,
        "peak_bytes": {} if extra is None else {"dam": 10 + extra},
        "parts": {} if kernels is None else {"dam": {"kernel_seconds": kernels}},
        "absent": {},
        "table_form": "fused",
        "graph": {} if graph is None else {"calls": 4, "seconds": graph, "absent": {}},
    }


BANDWIDTH = {"copy": 100.0, "read": 200.0}


@pytest.mark.parametrize(
    ("op", "goal", "good", "bad"),
    (
        ("jump", "90%", {"dam": 1 / 0.91}, {"dam": 1 / 0.89}),
        ("matching_loss with base, forward and backward", "90%", {"dam": 1 / 0.91}, {"dam": 1 / 0.89}),
        ("linear_jump", "1.03x", {"dam": 1.02}, {"dam": 1.04}),
        ("linear_jump", "1.10x", {"rows": 64, "dam": 0.54}, {"rows": 1, "dam": 0.56}),
        (
            "linear_jump",
            "never behind",
            {"rows": 128, "dam, fused": 1.0, "matmul, dam.jump": 1.5},
            {"rows": 512, "dam, fused": 1.5, "matmul, dam.jump": 0.9},
        ),
        ("linear_matching_loss, frozen head", "1.05x", {"dam": 1.04}, {"dam": 1.06}),
        ("linear_matching_loss, trained head, with base", "1.05x", {"dam": 1.04}, {"dam": 1.06}),
        ("linear_matching_loss, frozen head", "256 MiB", {"extra": 2**28}, {"extra": 2**28 + 1}),
        ("backward_kolmogorov, uniform", "one read", {"dam": 1.49}, {"dam": 1.51}),
        ("backward_kolmogorov, square lattice", "0.50", {"dam": 1.99}, {"dam": 2.01}),
        ("adjoint_weights", "0.80", {"dam": 1.24}, {"dam": 1.26}),
    ),
)
def test_a_goal_is_met_when_every_size_meets_it(monkeypatch, op, goal, good, bad):
    monkeypatch.delenv("DAM_WORKSPACE_MB", raising=False)

    def reached(*records):
        (found,) = (g for g in goals.reached(records, BANDWIDTH) if g.what == op and goal in g.goal)
        return found

    assert reached().met is None
    assert reached(record(op, **good)).met is True
    assert reached(record(op, **good), record(op, **bad)).met is False
    assert "1 of 2 sizes" in reached(record(op, **good), record(op, **bad)).measured


def test_a_goal_of_graphs_is_about_the_copy_in_one():
    def reached(**graph):
        found = goals.reached([record("jump", rows=64, dam=1.0, graph=graph)], BANDWIDTH)
        (one,) = (g for g in found if g.what == "jump" and "in one CUDA graph" in g.goal)
        return one.met

    assert reached(floor=0.91, dam=1.0) is True and reached(floor=0.89, dam=1.0) is False
    assert reached(floor=0.91, dam=1.2, **{goals.seeded("dam"): 1.0}) is True
    assert reached() is reached(dam=1.0) is None  # nor without a copy to compare with


def test_the_fastest_form_of_each_size_is_named():
    few = record("linear_jump", rows=16, flops=1, **{"dam, fused": 1.0, "dam, chunked": 2.0})
    many = record("linear_jump", rows=4096, flops=1, **{"dam, fused": 4.0, "dam, chunked": 2.0})
    lines = [line for line in goals.tables([many, few], BANDWIDTH) if line.startswith("| jump | 50 |")]
    assert [line.split(" | ")[2] for line in lines] == ["16", "4,096"]
    assert [line.split(" | ")[-2] for line in lines] == ["fused", "chunked"]


def test_kernels_are_reported_beside_calls():
    short = record("jump", dam=2.0, kernels=1.0)
    goal = next(g for g in goals.reached([short], BANDWIDTH) if g.what == "jump")
    assert goal.met is False and goal.measured.endswith("its kernels alone 1")
    assert any("2e+03 ms, 0.50 (1.00)" in line for line in goals.tables([short], BANDWIDTH))


# ---- the tuner


def as_rows(lines):
    return [eval(line.strip().removesuffix(","), {"Row": configs.Row}) for line in lines]


def tuned(monkeypatch, job, times):
    """Rows for a job whose candidates take times(values) as long as the table's."""

    def measure(case, repeats, timer):
        seconds = {"table": 1.0} | {name: times(json.loads(name)) for name in case.functions}
        return harness.Measurement(case.label, case.floor_name, seconds, {})

    monkeypatch.setattr(harness, "measure", measure)
    with dam.backend("triton"):
        return tune.tune(Machine(), [job], 1, lambda: False)


def test_tuned_rows_take_effect(monkeypatch, capsys):
    axes = (tune.axis("elements", 1024, 2048), tune.axis("warps", 1, 2))
    job = tune.Job("jump", (tune.Variant({}, axes),), (2, 4, 8), {"vocabulary": 20})
    rows = []
    logits = harness.logits
    monkeypatch.setattr(harness, "logits", lambda count, *others: (rows.append(count), logits(count, *others))[1])

    def times(values):
        # At 2 rows the table's values are the fastest, at 4 also 1024 elements, and at 8 one warp as well.
        gain = 0.5 if values.get("elements") == 1024 and rows[-1] > 2 else 1.0
        return gain * (0.9 if values.get("warps") == 1 and rows[-1] > 4 else 1.0)

    tuning = tuned(monkeypatch, job, times)
    assert tuning.failures == tuning.left_out == []
    assert len(tuning.tried) == 3 * 4
    assert "\n".join(tuning.rows) in capsys.readouterr().out
    table = configs.TABLE
    before = configs.lookup("jump", torch.device("cpu"), 2, 2, 20)
    monkeypatch.setattr(configs, "TABLE", table + tuple(as_rows(tuning.rows)))
    configs._lookup.cache_clear()
    old = (before["elements"], before["warps"])
    for count, expected in (
        (1, old),
        (2, old),
        (3, (1024, old[1])),
        (4, (1024, old[1])),
        (5, (1024, 1)),
        (99, (1024, 1)),
    ):
        found = configs.lookup("jump", torch.device("cpu"), 2, count, 20)
        assert (found["elements"], found["warps"]) == expected
    assert configs.lookup("jump", torch.device("cpu"), 4, 8, 20)["elements"] == before["elements"]
    configs._lookup.cache_clear()


def test_a_table_that_is_the_fastest_stays(monkeypatch):
    job = tune.Job("jump", (tune.Variant({}, (tune.axis("elements", 1024),)),), (4,), {"vocabulary": 20})
    assert tuned(monkeypatch, job, lambda values: 0.99).rows == []


def test_the_fastest_variant_is_kept(monkeypatch):
    variants = (tune.Variant({"elements": 1024}, (tune.axis("warps", 1, 2),)), tune.Variant({"elements": 2048}, ()))
    job = tune.Job("jump", variants, (4,), {"vocabulary": 20})
    tuning = tuned(monkeypatch, job, lambda values: values["elements"] / 2048 - 0.1 * (values.get("warps") == 2))
    (row,) = as_rows(tuning.rows)
    assert row.values == {"elements": 1024, "warps": 2} and row.rows == math.inf and row.element_bytes == (2,)


def test_a_candidate_with_another_result_or_an_error_is_not_taken(monkeypatch):
    jump = dam.jump

    def broken(logits, **options):
        elements = configs.lookup("jump", logits.device, 2, *logits.shape)["elements"]
        if elements == 1024:
            raise RuntimeError("out of resource: shared memory")
        drawn = jump(logits, **options)
        return drawn._replace(log_escape=drawn.log_escape + (0.1 if elements == 2048 else 0.0))

    monkeypatch.setattr(dam, "jump", broken)
    job = tune.Job("jump", (tune.Variant({}, (tune.axis("elements", 1024, 2048),)),), (4,), {"vocabulary": 20})
    tuning = tuned(monkeypatch, job, lambda values: 0.5)
    assert tuning.rows == []
    assert [("shared memory" in entry["reason"], "off by" in entry["reason"]) for entry in tuning.tried] == [
        (True, False),
        (False, True),
    ]


def test_results_that_differ():
    target, value = torch.arange(200), torch.ones(200)
    other = target.clone()
    other[0] += 1
    changed = value.clone()
    changed[0] = 2.0
    assert tune.difference([target, value], [target, value]) is None
    assert tune.difference([target, value], [other, changed]) is None  # a tie
    assert "off by" in tune.difference([target, value], [target, changed])
    assert "off by" in tune.difference([value], [value * math.nan])
    assert "other draws" in tune.difference([target, value], [target + 1, value])
    assert "other shapes" in tune.difference([target], [target[1:]])


def test_a_spent_budget_ends_tuning():
    job = tune.Job("jump", tune.ROWS, (1, 64), {"vocabulary": 20})
    tuning = tune.tune(Machine(), [job], 1, lambda: True)
    assert tuning.rows == tuning.tried == []
    assert tuning.left_out == [f"jump, case 0, rows {rows}: the time was spent" for rows in (1, 64)]


def test_jobs_of_the_tuner_are_of_ops_that_exist():
    assert {job.op for job in tune.jobs()} == set(configs.OPS)
    for job in tune.jobs():
        assert job.case < len(harness.tiny_cases(harness.cases_of(job.op), job.dtype))


@pytest.mark.parametrize(
    ("name", "part"), (("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"))
)
def test_a_row_holds_for_all_gpus_of_a_chip(name, part):
    assert tune.part_of_name(name) == part and part in name


# ---- the command


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """main() with the CPU in the place of a GPU, and tiny items."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "Gpu", Machine)
    monkeypatch.setattr(gpu, "plan", lambda: [item("rate_ratio"), item("jump")])
    monkeypatch.setattr(gpu, "bandwidths", lambda machine, nbytes: BANDWIDTH)
    monkeypatch.delenv("DAM_LINEAR_FORM", raising=False)
    monkeypatch.delenv("DAM_BACKEND", raising=False)


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "python -m benchmarks gpu: torch sees no GPU here, so nothing was measured\n"


@pytest.mark.parametrize(("variable", "value"), (("DAM_LINEAR_FORM", "fused"), ("DAM_BACKEND", "triton")))
def test_a_choice_for_all_calls_cannot_be_compared(as_if_on_gpu, monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    assert gpu.main([]) == 1
    assert f"{variable} is set" in capsys.readouterr().err


def test_the_command_prints_the_summary_last(as_if_on_gpu, tmp_path, capsys):
    arguments = ["--no-tests", "--repeats", "1", "--only", "jump,log_prob", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert {path.name for path in tmp_path.glob("*.json")} == {"jump.json", "summary.json"}
    assert capsys.readouterr().out.endswith((tmp_path / "summary.md").read_text())


def test_tests_that_fail_fail_the_command(as_if_on_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_tests", lambda log, limit, options: ("triton" in log.name, f"{options[-1]} ran"))
    assert gpu.main(["--repeats", "1", "--only", "jump", "--output", str(tmp_path)]) == 1
    failed = capsys.readouterr().out.split("## FAILED")[1]
    assert "* tests: cuda: cuda ran; triton: triton and not cuda ran" in failed
    assert (tmp_path / "jump.json").exists()  # measuring went on


def test_a_call_of_some_minutes_goes_on_where_the_last_one_ended(as_if_on_gpu, monkeypatch, tmp_path, capsys):
    """Accuracy, what is predicted, tests, the rest; nothing twice, unless the code is another."""
    items = [item("rate_ratio"), item("jump"), item("log_prob")]
    monkeypatch.setattr(gpu, "is_predicted", lambda item: item.op == "jump")
    monkeypatch.setattr(gpu, "PREDICTED", (("jump", 3),))
    monkeypatch.setattr(gpu, "run_tests", lambda log, limit, options: (steps.append(log.stem) or True, "passed"))
    monkeypatch.setattr(gpu, "sanitize", lambda output, limit: [steps.append("sanitizer") or "nothing found"])
    monkeypatch.setattr(
        gpu.accuracy, "checks", lambda *given, **sizes: [steps.append("accuracy") or accuracy.Check("x", 0.1, 1.0)]
    )

    def call(most):
        """Of as many items as `most`, before the time is up."""
        steps.clear()
        run = gpu.Run(Machine(), tmp_path, budget=1e6, repeats=1)

        def measured(self, item):
            self.records.append(record(item.op, dam=2.0 if item.peers else 1.0))
            steps.append(item.op if item.peers else f"{item.op} alone")
            if len([step for step in steps if step.split()[0] in configs.OPS]) == most:
                self.budget = 0.0

        monkeypatch.setattr(gpu.Run, "_measure", measured)
        gpu.in_minutes(run, items, 180.0)
        assert run.failures == []
        found = {record["op"]: record["median_seconds"]["dam"] for record in run.records}
        assert len(found) == len(run.records)
        return list(steps), found, run.left_out

    steps = []
    first, records, left_out = call(2)
    assert first == ["accuracy", "jump alone", "tests-cuda", "jump"] and records == {"jump": 2.0}  # not both
    assert [line.split(":")[0] for line in left_out[-4:]] == [
        "rate_ratio, T = 3, V = 20", "log_prob, T = 3, V = 20", "tests of triton", "compute-sanitizer",
    ]  # fmt: skip
    second, records, left_out = call(9)
    assert second == ["rate_ratio", "log_prob", "tests-triton", "sanitizer"] and left_out == []
    assert records.keys() == {"jump", "log_prob", "rate_ratio"}
    assert call(9)[0] == []
    monkeypatch.setattr(checkout, "digest", lambda: "of other code")
    assert call(1)[:2] == (["accuracy", "jump alone"], {"jump": 1.0})
    assert call(9)[0] == ["tests-cuda", "jump", "rate_ratio", "log_prob", "tests-triton", "sanitizer"]


def test_what_is_wrong_is_said_and_checked_again(as_if_on_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.accuracy, "checks", lambda *given, **sizes: [accuracy.Check("dX", math.nan, math.nan)])
    arguments = ["--minutes", "8", "--no-tests", "--repeats", "1", "--only", "jump", "--output", str(tmp_path)]
    for _ in range(2):
        assert gpu.main(arguments) == 1
        assert "WRONG: dX: error nan, nan times what is allowed" in capsys.readouterr().out.split("## FAILED")[1]


@pytest.mark.skipif(gpu.choice.why_unavailable("cuda") is not None, reason="needs the emulator of CUDA")
def test_accuracy_is_that_of_float64(monkeypatch):
    """All checks hold in the emulator; with one row of a head's gradient wrong, its check does not."""
    sizes = {"rows": 16, "vocabulary": 1500, "hidden": 16}

    def failed():
        return [c.what for c in accuracy.checks(torch.device("cpu"), ["cuda"], **sizes) if not c.passed]

    assert failed() == []
    finish = gpu.accuracy.dam.ops._head.Gradients.finish

    def wrong(self):
        found = finish(self)
        if self._head.weight.dtype == torch.bfloat16 and self.held is not None:
            found[1][700] *= 1.02
        return found

    monkeypatch.setattr(gpu.accuracy.dam.ops._head.Gradients, "finish", wrong)
    assert failed() == [
        f"linear_{op} cuda whole, gradients" for op in ("matching_loss", "matching_loss with base", "log_prob")
    ]


def test_the_command_sanitizes(as_if_on_gpu, monkeypatch, tmp_path, capsys):
    """Each tool over the tests of the CUDA kernels, in one process; what it finds fails the command."""
    seen = []

    def run_tests(log, limit, options, under):
        seen.append((log.name, under[:3], "-k" in options))
        return under[2] == "memcheck", "closing line"

    monkeypatch.setattr(gpu, "run_tests", run_tests)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    assert gpu.main(["--sanitize", "--output", str(tmp_path)]) == 1
    tool = ("/bin/compute-sanitizer", "--tool")
    assert seen == [("memcheck.txt", (*tool, "memcheck"), True), ("racecheck.txt", (*tool, "racecheck"), True)]
    assert "memcheck: nothing found; closing line" in capsys.readouterr().out
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main(["--sanitize", "--output", str(tmp_path)]) == 0
    assert "compute-sanitizer is not installed here" in capsys.readouterr().out


def test_the_command_tunes(as_if_on_gpu, monkeypatch, tmp_path, capsys):
    job = tune.Job("jump", (tune.Variant({}, (tune.axis("elements", 1024),)),), (4,), {"vocabulary": 20})
    monkeypatch.setattr(tune, "jobs", lambda: [job, job._replace(op="log_prob")])
    monkeypatch.setattr(tune, "GAIN", math.inf)
    assert gpu.main(["--tune", "--repeats", "1", "--only", "jump", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "tune.json").read_text())
    assert [entry["values"] for entry in result["tried"]] == [{"elements": 1024}]
    (row,) = as_rows(result["rows"])
    assert row.op == "jump" and row.gpu in configs.INTERPRETER
    assert capsys.readouterr().out.endswith("For TABLE:\n\n" + result["rows"][0] + "\n")


def test_an_unknown_op_is_an_error_that_lists_what_there_is(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "jump,jmup"])
    assert "'jmup'" in (message := capsys.readouterr().err) and all(op in message for op in configs.OPS)


def test_one_thing_at_a_time(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "8", "--tune"])
    assert "--tune: not allowed with argument --minutes" in capsys.readouterr().err


class Replaced(Exception):
    """This process would have been replaced."""


def test_what_is_not_installed_is_installed_first(monkeypatch):
    reasons, done = ["No module named 'dam.kernels'", None], []

    def execv(path, arguments):
        done.append(arguments)
        raise Replaced

    monkeypatch.setattr(checkout, "why_not_installed", lambda: reasons.pop(0))
    monkeypatch.setattr(checkout, "install", lambda: done.append("installed"))
    monkeypatch.setattr(checkout.os, "execv", execv)
    monkeypatch.setenv(checkout._STARTED, "")
    began = time.monotonic()
    with pytest.raises(Replaced):
        checkout.ensure_installed("benchmarks", ["gpu", "--budget", "100"])
    installed, arguments = done
    assert installed == "installed" and arguments[1:] == ["-m", "benchmarks", "gpu", "--budget", "100"]
    assert began <= checkout.started() <= time.monotonic()  # what it took counts
    time.sleep(0.01)
    assert checkout.started() < time.monotonic() - 0.01


def test_what_is_installed_stays(monkeypatch):
    monkeypatch.setattr(checkout, "why_not_installed", lambda: None)
    assert checkout.ensure_installed("benchmarks", ["gpu"]) is None


def test_what_cannot_be_installed_is_an_error(monkeypatch):
    def fails():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(checkout, "why_not_installed", lambda: "No module named 'dam.kernels'")
    monkeypatch.setattr(checkout, "install", fails)
    assert "no compiler" in checkout.ensure_installed("benchmarks", ["gpu"])


def test_installing_needs_nothing_of_dam():
    """In a fresh checkout `import dam` fails, and this is what puts that right."""
    code = (
        "import sys; sys.modules['dam'] = None; import torch; torch.cuda.is_available = lambda: True\n"
        "from benchmarks import checkout; checkout.ensure_installed = lambda *arguments: arguments\n"
        "import runpy; sys.argv[1:] = ['gpu', '--tune']; runpy.run_module('benchmarks', run_name='__main__')"
    )
    run = fresh.run(code)
    assert run.returncode == 1 and run.stderr.endswith("measured: ('benchmarks', ['gpu', '--tune'])\n"), run.stderr


@pytest.mark.full
def test_tests_run_within_a_limit(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text("def test_good(): pass\n")
    passed, closing = gpu.run_tests(tmp_path / "log.txt", 60.0, [str(path)])
    assert passed and closing.startswith("1 passed")


@pytest.mark.full
def test_tests_that_are_cut_off_are_named(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 'reason' == ''\ndef test_long(): time.sleep(60)\n"
    )
    for limit in (6, 20, 50):  # until it is long enough for pytest to begin on a busy machine
        passed, closing = gpu.run_tests(tmp_path / "log.txt", float(limit), [str(path)])
        assert not passed
        if "0 passed" not in closing:
            break
    named = rf"not finished after {limit} s; 1 passed, 1 failed: \S*test_it.py::test_bad"
    assert re.fullmatch(named, closing), closing
    assert "assert 'reason' == ''" in (tmp_path / "log.txt").read_text()


def test_tests_that_no_time_is_left_for_fail(tmp_path):
    assert gpu.run_all_tests(tmp_path, 0.0) == (False, "cuda: no time was left; triton: no time was left")


def wheel(folder, name, version="1.0"):
    """A wheel of an empty module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_wheels_of_peers_are_installed_one_by_one(monkeypatch, tmp_path):
    """Into a folder of their own here; one that is broken is named, and keeps no other out."""
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    assert checkout.install_wheels(tmp_path) == [f"no wheels in {tmp_path}"]
    (tmp_path / "a_broken-1.0-py3-none-any.whl").write_text("no archive")
    wheel(tmp_path, "peer_of_dam")
    (failed,) = checkout.install_wheels(tmp_path)
    assert failed.startswith("a_broken-1.0-py3-none-any.whl: ERROR")
    assert (tmp_path / "installed" / "peer_of_dam.py").exists()


def test_flash_sampling_draws_from_the_softmax():
    """The law of each row, rows of another state among them, in more than one block of rows and of tokens."""
    rows, columns, depth = 300, 200, 16
    generator = torch.Generator().manual_seed(3)
    states, head = (torch.randn(n, depth, generator=generator) for n in (2, columns))
    hidden = states.repeat_interleave(rows, dim=0)
    drawn = peers.flash_sampling(hidden.bfloat16(), (0.5 * head).bfloat16())
    p = torch.softmax(states.bfloat16().double() @ (0.5 * head).bfloat16().double().t(), dim=1)
    for state, tokens in enumerate(drawn.view(2, rows)):
        counts, expected = torch.bincount(tokens, minlength=columns).double(), rows * p[state]
        common = expected > 5
        pooled = lambda x, common=common: torch.cat([x[common], x[~common].sum()[None]])  # noqa: E731
        assert scipy.stats.chisquare(pooled(counts), pooled(expected)).pvalue > 1e-6


def test_another_checkout_is_not_this_one(monkeypatch, tmp_path):
    assert checkout.why_not_installed() is None
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert "is not of this checkout" in checkout.why_not_installed()


def test_calls_of_a_graph_are_captured_once_and_share_its_time(monkeypatch):
    order = []

    class Graph:
        def replay(self):
            order.append("replay")

    @contextlib.contextmanager
    def captured(graph):
        order.append("capture")
        yield
        order.append("end")

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    timer = machine.Gpu.__new__(machine.Gpu)
    monkeypatch.setattr(machine.Gpu, "__call__", lambda self, function: function() or 8.0)
    assert timer.graph_seconds([lambda: order.append("a"), lambda: order.append("b")]) == 4.0
    assert order == ["a", "b", "capture", "a", "b", "end", *5 * ["replay"]]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_calls_are_timed_on_a_gpu_between_events_with_the_cache_displaced(monkeypatch):
    """The order of what is asked of CUDA, which is not here."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 3.0

    class Properties:
        L2_cache_size, total_memory, multi_processor_count, major, minor = 1024, 2**30, 132, 9, 0

    cuda = {
        "Event": Event,
        "_sleep": lambda cycles: order.append("sleep"),
        "get_device_properties": lambda device: Properties,
        "synchronize": lambda: order.append("synchronize"),
        "reset_peak_memory_stats": lambda: order.append("reset"),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 150,
        "set_sync_debug_mode": lambda mode: order.append(mode),
        "empty_cache": lambda: None,
        "Stream": lambda: contextlib.nullcontext(),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine.Gpu, "device", torch.device("cpu"))
    timer = machine.Gpu()
    monkeypatch.setattr(timer, "_displace", lambda: order.append("displace"))

    def call():
        order.append("call")

    assert timer.once(call) == 3e-3
    assert order == ["sleep", "displace", "event", "call", "event", "wait"]
    assert timer(call) == 3e-3 and order.count("call") == 3  # a short one runs untimed first
    order.clear()
    assert timer.peak_bytes(call) == 50
    assert order == ["synchronize", "reset", "call", "synchronize"]
    order.clear()
    assert timer.first(call) >= 0 and order == ["call", "synchronize"]
    assert timer.waits(call) is False

    def waiting():
        raise RuntimeError("called a synchronizing CUDA operation")

    assert timer.waits(waiting) is True and order[-1] == "default"
    # What this machine cannot measure has its reason, and nothing fails.
    parts = timer.parts(call)
    assert parts["waits"] is False and parts["call_seconds"] > 0
    assert isinstance(parts["kernel_seconds"], str) and isinstance(parts["replay_seconds"], str)
    assert "cannot be captured" in timer.parts(waiting)["replay_seconds"]
    assert timer.answers()
    assert timer.facts()["compute_capability"] == "9.0"
