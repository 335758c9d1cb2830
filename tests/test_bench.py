"""`python -m benchmarks`: every case runs, its functions compute the same, and records say what was measured."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dam
from dam import cli
from dam.backends import cpu
from dam.benchmarks import __main__ as entry
from dam.benchmarks import (
    builds,
    calls,
    checkout,
    harness,
    memory,
    options,
    pages,
    peers,
    products,
    records,
    report,
    side_by_side,
    steps,
)
from dam.kernels import configs
from tests import fresh
from tests.calls import public_ops
from tests.ops import helpers

CHECKOUT = Path(__file__).parent.parent
# Ops that draw, and those whose peers return less than they do or only nearly the same: they have tests of their own.
COMPARED_OTHERWISE = ("jump", "linear_jump", "rollout", "adjoint_weights", "backward_kolmogorov")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_every_op_has_a_benchmark():
    missing = set(public_ops()) - set(harness.ops())
    assert not missing, f"there is no {', '.join(f'benchmarks/bench_{op}.py' for op in sorted(missing))}"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("op", harness.ops())
def test_every_case_is_measured(op, dtype):
    for case in harness.tiny_cases(harness.cases_of(op), getattr(torch, dtype)):
        measured = harness.measure(case, 1, compiled=False)
        assert all(seconds > 0 for seconds in measured.median_seconds.values())
        assert {"dam", case.floor_name} <= measured.median_seconds.keys()
        assert measured.absent.keys() >= case.compiled.keys()
        if dtype == "float32":
            assert measured.absent.keys() == case.compiled.keys()


@pytest.mark.parametrize("op", [op for op in harness.ops() if op not in COMPARED_OTHERWISE])
def test_peers_compute_the_same(op, monkeypatch):
    monkeypatch.setattr(peers, "compiled", lambda function: function)  # what is compiled, without compiling it
    sizes = {"rows": 7, "vocabulary": 50, "hidden": 16, "groups": 5, "trajectories": 12}
    cases = harness.cases_of(op)
    for case in cases(torch.float32, **{name: sizes[name] for name in harness.sizes_of(cases)}):
        expected = harness.tensors(case.functions.pop("dam")())
        for function in (case.functions | case.compiled).values():
            for ours, theirs in zip(expected, harness.tensors(function()), strict=True):
                # Sums of 50 and products of 16 float32 numbers, and their exponentials.
                bound = 256 * helpers.rounding(torch.float32) * float(ours.abs().max())
                helpers.assert_close(theirs.view_as(ours), ours, rtol=0.0, atol=bound)


def test_eager_adjoint_weights():
    for case in harness.cases_of("adjoint_weights")(torch.float32, groups=5, trajectories=12, steps=9):
        ours = case.functions["dam"]()
        weight, log_path, log_normalizer, ess = case.functions["flip, cumsum, softmax"]()
        for actual, expected in (
            (weight, ours.weight),
            (log_path, ours.log_path[..., :-1]),
            (log_normalizer, ours.log_normalizer),
            (ess, ours.ess),
        ):
            # Sums of 9 steps and of 12 trajectories in float32, of numbers near 1 that may cancel.
            helpers.assert_close(actual, expected, rtol=64 * helpers.rounding(torch.float32), atol=1e-6)


def test_kolmogorov_peers_are_matrix_exponentials():
    terminal, duration = helpers.normal(3, 20, dtype=torch.float64), 0.7
    uniform = torch.full((20, 20), 1 / 20, dtype=torch.float64) - torch.eye(20, dtype=torch.float64)
    ring4, ring5 = (
        torch.eye(n, dtype=torch.float64).roll(1, 0) + torch.eye(n).roll(-1, 0) - 2 * torch.eye(n) for n in (4, 5)
    )
    lattice = torch.kron(ring4, torch.eye(5)) + torch.kron(torch.eye(4), ring5)
    for generator, actual in (
        (uniform, peers.uniform_kolmogorov(terminal, duration)),
        (lattice, peers.lattice_kolmogorov(dam.generators.Lattice((4, 5), periodic=True), terminal, duration)),
    ):
        expected = terminal @ torch.matrix_exp(duration * generator).t()
        # The eigenvalues of the lattice are float32.
        helpers.assert_close(actual, expected, rtol=0.0, atol=64 * helpers.rounding(torch.float32))


def test_samplers_draw_from_the_softmax():
    rows = 4000
    probability = torch.tensor([0.6, 0.3, 0.08, 0.02])
    logits = (probability.log() + 1.0).repeat(rows, 1)
    for sample in (peers.llada_step, peers.softmax_multinomial, peers.gumbel_race, lambda x: dam.jump(x)):
        drawn = sample(logits)
        counts = torch.bincount(drawn if isinstance(drawn, torch.Tensor) else drawn[0], minlength=4)
        z = (counts - rows * probability) / (rows * probability * (1 - probability)).sqrt()
        assert float(z.abs().max()) < helpers.Z, counts
    case = harness.cases_of("jump")(torch.float32, rows=7, vocabulary=50)[0]
    helpers.assert_close(case.functions["torch.logsumexp"](), case.functions["dam"]().log_escape, rtol=1e-6)


@pytest.mark.parametrize("steps", (1, 3, 7))
def test_lladas_loop_fills_in_every_position(steps):
    expected = helpers.integers(0, 11, 2, 7)
    hidden = 100.0 * torch.nn.functional.one_hot(expected, 11).float()  # leaves one token to draw
    assert torch.equal(peers.llada_rollout(hidden, torch.eye(11), steps), expected)


def test_the_head_runs_where_a_rollout_jumps(monkeypatch):
    case = harness.cases_of("rollout")(torch.float32, sequences=3, length=8, steps=4, vocabulary=20, hidden=4)[0]
    rows = Counter()
    jump = dam.decoding.linear_jump

    def counted(hidden, *arguments, **options):
        rows[name] += len(hidden)
        return jump(hidden, *arguments, **options)

    monkeypatch.setattr(dam.decoding, "linear_jump", counted)
    for name in ("dam", "dam, head at every mask"):
        case.functions[name]()
    assert rows == {"dam": 3 * 8, "dam, head at every mask": 3 * (8 + 6 + 4 + 2)}
    with FlopCounterMode(display=False) as counter:
        case.floor()
    assert counter.get_total_flops() == 2 * rows["dam"] * 20 * 4


@pytest.mark.parametrize("op", configs.LINEAR_OPS)
def test_the_floor_of_a_linear_op_is_its_matmuls(op):
    for case in harness.cases_of(op)(torch.float32, rows=3, vocabulary=20, hidden=4):
        with FlopCounterMode(display=False) as counter:
            case.floor()
        count = 1 if case.floor_name.startswith("bare") else int(case.floor_name.split()[0])
        assert counter.get_total_flops() == count * 2 * 3 * 20 * 4


def test_a_peer_that_fails_is_absent_with_its_reason(monkeypatch):
    def fine():
        return None

    def fails():
        raise RuntimeError("no compiler here\nand more")

    case = harness.Case("an op", "floor", fine, {"dam": fine}, {"compiled": fails})
    measured = harness.measure(case, 1)
    assert measured.absent == {"compiled": "RuntimeError: no compiler here"}
    assert "compiled" not in measured.median_seconds
    monkeypatch.setattr(harness, "SLOW", 0.0)
    assert "took" in harness.measure(dataclasses.replace(case, functions={"dam": fine, "slow": fine}), 1).absent["slow"]
    case.functions["dam"] = fails
    with pytest.raises(RuntimeError, match="no compiler"):
        harness.measure(case, 1)


def test_a_peer_that_does_not_return_is_stopped(monkeypatch):
    def fine():
        return None

    def compiles():
        time.sleep(60)

    monkeypatch.setattr(harness, "SLOW", 0.2)
    monkeypatch.setattr(harness, "COMPILES", 0.3)
    handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    case = harness.Case("an op", "floor", fine, {"dam": fine, "slow": compiles}, {"compiled": compiles})
    measured = harness.measure(case, 1)
    assert time.monotonic() - began < 30
    reasons = {"slow": "0.2 s", "compiled": "0.3 s"}
    assert measured.absent == {k: f"TimeoutError: its first call took more than {v}" for k, v in reasons.items()}
    assert measured.median_seconds.keys() == {"floor", "dam"}
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_nothing_is_stopped_where_there_are_no_signals():
    """They are the main thread's."""
    done = []

    def wait():
        with harness.stopped_after(0.05):
            time.sleep(0.2)
            done.append("waited")

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    with harness.stopped_after(math.inf):
        done.append("no limit")
    assert done == ["waited", "no limit"]


def test_bench_prints_a_table_and_writes_json_and_png(tmp_path, capsys):
    sizes = ("--rows", "2", "--vocabulary", "50")
    arguments = ("bench", "jump", *sizes, "--repeats", "1", "--threads", "1", "--no-memory", "--no-compiled")
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("jump-float32-rows-2-vocabulary-50*.png"))) == 1
    (path,) = tmp_path.glob("jump-float32-rows-2-vocabulary-50*.json")
    result = json.loads(path.read_text())
    assert result["sizes"] == {"rows": 2, "vocabulary": 50}
    for key in ("op", "dtype", "threads", "repeats", "dam", "torch", "cpu", "cores", "instruction_set", "bfloat16"):
        assert result[key]
    (case,) = result["cases"]
    assert case["median_seconds"].keys() == {
        "plain read of the logits",
        "dam",
        "LLaDA's step",
        "softmax + multinomial",
        "torch.logsumexp",
    }
    assert case["absent"] == {"compiled Gumbel race": "left out: --no-compiled"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*case["median_seconds"], *case["absent"].values(), str(tmp_path)))
    assert cli.main([*arguments, "--no-peers", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-alone.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert case["median_seconds"].keys() == {"plain read of the logits", "dam"}
    assert case["absent"]["LLaDA's step"] == "left out: --no-peers"


def test_a_record_says_of_what_it_is_in_itself(tmp_path):
    """Taken out of its file too: op, case, sizes, dtype, bytes, floor and versions."""
    arguments = ["rate_ratio", "--rows", "3", "--vocabulary", "50", "--dtype", "bfloat16", "--repeats", "1"]
    assert entry.main([*arguments, "--no-memory", "--no-compiled", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    (record,) = result["cases"]
    named = {"op": "rate_ratio", "label": "rate_ratio", "sizes": {"rows": 3, "vocabulary": 50}, "dtype": "bfloat16"}
    results = 2 * 3 * 4  # log_ratio, escape_gap
    bytes_ = {"result_bytes": results, "moved_bytes": 2 * 3 * 50 * 2 + 3 * 8 + results}  # both logits, target
    floor = "plain read of both logits"
    floors = {"floor_name": floor, "floor_seconds": record["median_seconds"][floor]}
    assert record.items() >= {**named, **bytes_, **floors, "versions": records.versions()}.items()
    assert record["floor_seconds"] > 0 and result.items() >= records.versions().items()


def test_versions(monkeypatch):
    import triton

    found = records.versions.__wrapped__  # not those that this process knows already
    monkeypatch.setattr(checkout, "commit", lambda: "of this checkout")
    expected = {"dam": dam.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    assert found() == {**expected, "triton": triton.__version__, "commit": "of this checkout"}
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(checkout, "commit", lambda: None)
    assert found() == {**expected, "commit": None}


@pytest.mark.parametrize("op", harness.ops())
def test_what_must_move_is_known_of_every_case(op):
    cases = harness.cases_of(op)
    sizes = {name: min(size, 8) for name, size in harness.sizes_of(cases).items()}
    for case in harness.tiny_cases(cases, torch.float32):
        record = records.of_case(op, case, sizes, "float32")
        assert case.reads and record["moved_bytes"] - record["result_bytes"] == sum(x.nbytes for x in case.reads)
        assert record["result_bytes"] == sum(x.nbytes for x in harness.tensors(case.functions["dam"]())) > 0


def test_a_rollout_reads_the_head_once_a_step():
    sizes = {"sequences": 3, "length": 8, "steps": 4, "vocabulary": 20, "hidden": 4}
    (case,) = harness.cases_of("rollout")(torch.float32, **sizes)
    record = records.of_case("rollout", case, sizes, "float32")
    assert record["result_bytes"] == 3 * 8 * 8  # tokens
    assert record["moved_bytes"] == 4 * 20 * 4 * 4 + 3 * 8 * 4 * 4 + 3 * 8 * 8  # heads, states at what jumps, tokens


def test_a_wrong_op_or_size_is_an_error_that_lists_what_there_is(tmp_path, capsys):
    assert cli.main(["bench", "jmup", "--output", str(tmp_path / "new")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dam bench: ") and "'jmup'" in message
    assert all(op in message for op in harness.ops())
    assert cli.main(["bench", "jump", "--hidden", "8", "--output", str(tmp_path / "new")]) == 1
    assert "--D (hidden) is no size of jump; there are --T (rows), --V (vocabulary)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        cli.main(["bench", "jump", "--rows", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("main", (entry.main, lambda arguments: cli.main(["bench", *arguments])), ids=("module", "dam"))
def test_both_front_ends_measure_the_sizes_and_dtypes_that_are_asked_for(main, tmp_path, capsys):
    """Dtypes between commas and one after another, each once; sizes of those ops that have them."""
    sizes = ("--rows", "2", "--vocabulary", "64", "--groups", "3", "--trajectories", "5")
    dtypes = ("--dtype", "bfloat16,float32", "--dtype", "bfloat16")
    fast = ("--repeats", "1", "--no-memory", "--no-peers", "--output", str(tmp_path))
    assert main(["rate_ratio", "tilt_to_ess", *sizes, *dtypes, *fast]) == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    expected = {"rate_ratio": {"rows": 2, "vocabulary": 64}, "tilt_to_ess": {"groups": 3, "trajectories": 5}}
    assert all(r["sizes"] == expected[r["op"]] for r in results)
    measured = sorted((r["op"], r["dtype"]) for r in results)
    assert measured == [(op, dtype) for op in expected for dtype in ("bfloat16", "float32")]
    assert capsys.readouterr().out.count("T = 2, V = 64, bfloat16") == 1
    with pytest.raises(SystemExit):
        main(["rate_ratio", "--dtype", "float32,float8"])
    assert "no dtype 'float8' to measure; there are float32, bfloat16, float16, fp32" in capsys.readouterr().err


def test_one_entry_has_every_command(capsys):
    own = {(): "--no-peers", ("gpu",): "--sanitize", ("builds",): "BEFORE", ("calls",): "--loop"}
    for command, option in own.items():
        with pytest.raises(SystemExit) as stop:
            entry.main([*command, "--help"])
        shown = capsys.readouterr().out
        usage = " ".join(("usage: python -m benchmarks", *command))
        assert stop.value.code == 0 and shown.startswith(f"{usage} [-h]") and option in shown
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    there = capsys.readouterr().out
    assert there.startswith("usage: dam bench [-h]") and all(
        f"--{letter} N, --{size} N" in there for size, (letter, _) in options.SIZES.items()
    )
    assert entry.main(["jmup"]) == 1
    assert capsys.readouterr().err.startswith("python -m benchmarks: no op 'jmup' to measure")


def test_the_entry_is_started_as_a_module():
    done = fresh.main("benchmarks", "--help")
    assert done.returncode == 0 and "python -m benchmarks gpu" in done.stdout, done.stdout + done.stderr


def test_every_size_is_an_option():
    known = {name for op in harness.ops() for name in harness.sizes_of(harness.cases_of(op))}
    assert known == options.SIZES.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory():
    sizes = {"rows": 8, "vocabulary": 500_000}
    grown = memory.peak_bytes("jump", 0, "LLaDA's step", "float32", 1, sizes)
    # Float64 logits and noise at least; a dozen copies would be more than it ever holds.
    assert 2 * 8 * 8 * 500_000 <= grown < 12 * 8 * 8 * 500_000


@pytest.mark.parametrize(
    ("model", "slug"),
    (
        ("AMD EPYC", "epyc"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "xeon-platinum-8481c"),
        ("", "cpu"),
    ),
)
def test_results_are_named_after_the_device(model, slug):
    assert report.slug(model) == slug


def pytest_alone(*arguments):
    """`python -m pytest arguments`, not as a child of xdist's, in which nothing would be timed."""
    alone = dict.fromkeys(name for name in os.environ if name.startswith("PYTEST_XDIST"))
    return fresh.main("pytest", "-q", "-p", "no:cacheprovider", *arguments, **alone)


@pytest.mark.full
def test_pytest_benchmark_runs_the_same_functions():
    chosen = ("benchmarks/bench_tilt_to_ess.py", "--benchmark-disable", "-k", "float32 and not compiled")
    done = pytest_alone(*chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_pytest_collects_every_op_of_the_folder():
    """Each function of each case in each dtype; pytest alone leaves them to `pytest benchmarks`."""
    done = pytest_alone("benchmarks", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line for line in done.stdout.splitlines() if line.startswith("benchmarks/bench_")]
    expected = []
    for op in harness.ops():
        for dtype in harness.DTYPES:
            for case in harness.tiny_cases(harness.cases_of(op), getattr(torch, dtype)):
                names = (case.floor_name, *case.functions, *case.compiled)
                expected += [f"benchmarks/bench_{op}.py::test_{op}[{dtype}-{case.label}-{name}]" for name in names]
    assert sorted(collected) == sorted(expected)


def test_pytest_alone_collects_no_benchmark(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"] and not list((CHECKOUT / "tests").rglob("bench_*.py"))


def test_a_size_that_no_op_has_stops_pytest():
    done = pytest_alone("benchmarks/bench_tilt_to_ess.py", "--rows", "8", "--collect-only")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--T (rows) is no size of tilt_to_ess; there are --G (groups), --K (trajectories)" in done.stderr


def test_records_of_pytest_benchmark(tmp_path):
    """The same fields as those of `python -m benchmarks`, at the sizes and the dtype that were asked for."""
    sizes = ("--rows", "3", "--vocabulary", "50", "--dtype", "float16")
    short = ("--benchmark-max-time", "0.001", "--benchmark-min-rounds", "1", "-k", "not compiled")
    output = tmp_path / "records.json"
    done = pytest_alone("benchmarks/bench_rate_ratio.py", *sizes, *short, "--benchmark-json", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {b["extra_info"].pop("function"): b for b in json.loads(output.read_text())["benchmarks"]}
    floor = "plain read of both logits"
    assert measured.keys() == {floor, "dam", "two logsumexp + gathers"}
    results = 2 * 3 * 4
    expected = records.versions()
    for name, benchmark in measured.items():
        errors = benchmark["extra_info"].pop("errors")
        assert bool(errors) == (name != floor) and all(error < 1e-3 for error in errors.values())
        versions = benchmark["extra_info"].pop("versions")
        assert versions.keys() == expected.keys() and versions["torch"] == expected["torch"]
        assert benchmark["extra_info"] == {
            "op": "rate_ratio",
            "label": "rate_ratio",
            "sizes": {"rows": 3, "vocabulary": 50},
            "dtype": "float16",
            "moved_bytes": 2 * 3 * 50 * 2 + 3 * 8 + results,
            "result_bytes": results,
            "floor_name": floor,
            "floor_seconds": measured[floor]["stats"]["median"],
        }


def test_two_builds_run_side_by_side(tmp_path, capsys):
    """Each under its own checkout's code, here a copy of this one that has lost its link to the kernels, and its own
    interpreter, here this one with another torch.
    """
    before, python = tmp_path / "before", tmp_path / "python"
    (tmp_path / "sitecustomize.py").write_text("import torch; torch.__version__ = '9.9.9'")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for folder in ("dam", "kernels"):
        shutil.copytree(checkout.ROOT / folder, before / folder, symlinks=True, ignore=shutil.ignore_patterns("data"))
    (before / "dam" / "kernels").unlink()
    source = before / "dam" / "ops" / "jump.py"
    first = "    if _op.at_once("
    source.write_text(source.read_text().replace(first, f"    __import__('time').sleep(0.05)\n{first}", 1))
    arguments = ["--rows", "2", "--vocabulary", "64", "--repeats", "1", "--json", str(tmp_path / "builds.json")]
    arguments += ["--threads", "1", "--python", str(python)]
    assert builds.main([str(before), *arguments]) == 0
    assert "jump" in capsys.readouterr().out
    found = json.loads((tmp_path / "builds.json").read_text())
    cases = {case["label"]: case["median_seconds"] for case in found["cases"]}
    assert builds.FLOOR in cases and {"before", "dam"} == cases["jump"].keys()
    # The code that was changed is the one that ran as "before", and nowhere else.
    assert cases["jump"]["before"] > 0.05
    assert (found["cpu"], found["instruction_set"], found["rows"]) == (report.cpu_model(), cpu.isa(), 2)
    torches = {build: versions["torch"] for build, versions in found["builds"].items()}
    assert torches == {"before": torch.__version__, "dam": "9.9.9"}
    assert {re.match(r"\w+", name)[0] for name in cases} >= {*public_ops(), "rollout"}
    with pytest.raises(FileNotFoundError, match="build it there first"):
        builds.main([str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        builds.main([str(before), "--cpu-time", "--threads", "2"])
    assert "--cpu-time is the sum of all threads' times" in capsys.readouterr().err


def test_builds_take_turns_and_calls_fill_the_time():
    """A ratio's two times are of one repeat, each the second of two in a row, of as many calls as fill the time."""
    asked = []

    class Slow:
        """A build whose calls take 3 ms of the clock and, in the n-th measurement, n ms of the CPU."""

        def __init__(self, name):
            self.calls, self.name, self.number = [builds.FLOOR, "jump", "torch"], name, 0

        def seconds(self, call, number=1, *, cpu_time=False):
            asked.append((self.name, call, number))
            self.number += 1
            return 1e-3 * self.number if cpu_time else 3e-3

    seconds = builds.measure({"before": Slow("before"), "dam": Slow("dam")}, 20, only="jump", fill=8e-3, cpu_time=True)
    assert asked[:2] == [("before", builds.FLOOR, 1), ("before", "jump", 1)]  # tell how many fill the time
    rest = asked[2:]
    assert {number for *_, number in rest} == {3} and len(rest) == 2 * 2 * 2 * 20
    assert rest[::2] == rest[1::2]
    # Both builds' times of a call come right after each other, either first.
    assert all(one[1] == other[1] and one[0] != other[0] for one, other in zip(rest[::4], rest[2::4], strict=True))
    assert {name for name, *_ in rest[::4]} == {"before", "dam"}
    assert all(len(times) == 20 for of in seconds.values() for times in of.values())
    kept = sorted(round(1e3 * time) for of in seconds.values() for time in of["dam"])
    assert kept == list(range(2, 81, 2))  # every second one


def test_the_interval_of_a_median():
    """It holds the distribution's median in 95 of 100 samples, as a binomial number of values lies below."""
    assert builds.median_and_interval([5.0]) == (5.0, 5.0, 5.0)
    for n in (11, 31, 101):
        median, low, high = builds.median_and_interval(list(range(n))[::-1])
        assert median == (n - 1) / 2 and low + high == n - 1
        outside = 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n
        assert 0.01 < outside < 0.05
    seconds = {"before": [1.0, 2.0, 4.0], "dam": [2.0, 3.0, 3.0]}
    assert builds.compared(seconds) == {
        "median_seconds": {"before": 2.0, "dam": 3.0},
        "ratio": 1.5,  # of the ratios 2, 1.5 and 0.75
        "ratio_interval": [0.75, 2.0],
    }


def test_calls_of_few_numbers_are_measured(tmp_path, capsys, monkeypatch):
    """Every one, of the CPU's time; and what is timed is the call that is named."""
    path = tmp_path / "calls.json"
    arguments = ["--rows", "2", "--vocabulary", "5", "--hidden", "3", "--repeats", "3", "--loop", "2"]
    assert entry.main(["calls", *arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    of = calls.functions(2, 5, 3, torch.float32)
    assert (
        found["median_cpu_seconds"].keys() == of.keys() and found["rows"] == 2 and found["instruction_set"] == cpu.isa()
    )
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in of)
    clock = [0.0]
    monkeypatch.setattr(calls.time, "process_time", lambda: clock[0])
    took = {name: 1.0 + n for n, name in enumerate(of)}

    def spend(name):
        clock[0] += took[name]

    assert calls.measure({name: functools.partial(spend, name) for name in of}, 3, 2) == took
    for name, call in of.items():
        shapes = [x.shape for x in harness.tensors(call())]
        gradient = (2, 3) if name.startswith("linear") else (2, 5)
        assert shapes == [gradient] if name.endswith("with gradient") else shapes


def test_steps_of_a_rollout_are_measured(monkeypatch):
    """Each as often as it has steps, so that a step and a network's call are compared."""
    of = steps.functions(2)
    drawn = of["a step"][0]()
    assert drawn.final.shape == (2, steps.STEPS) and of["Sudoku's model"][0]().shape[0] == 2
    clock, made = [0.0], Counter()
    monkeypatch.setattr(steps.time, "process_time", lambda: clock[0])

    def spend(name, seconds):
        made[name] += 1
        clock[0] += seconds

    of_each = {"rollout": (32.0, 64), "call": (2.0, 1)}  # seconds of the CPU, steps
    spent = {name: (functools.partial(spend, name, took), number) for name, (took, number) in of_each.items()}
    assert steps.measure(spent, 3) == {"rollout": 0.5, "call": 2.0}
    assert made == {"rollout": 4, "call": 4 * 64}


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
@pytest.mark.parametrize("large", [False, True])
def test_new_memory_is_written(large):
    assert pages.milliseconds(4 * 2**20, large) > 0


@pytest.mark.parametrize("calls", [3, 4])
def test_published_loops_run_beside_ours(calls):
    """At tiny sizes; of a rollout of 4 calls all were made, or 3 that stand for 4/3 of them each."""
    sizes = {"sequences": 2, "prompt": 3, "completion": 64, "steps": 4, "vocabulary": 11, "hidden": 64, "layers": 1}
    for part, loops in side_by_side.LOOPS.items():
        for loop in loops:
            factor = side_by_side.RUN[part, loop](side_by_side.Setting(sizes), calls)
            assert factor == (4 / calls if (part, loop) == ("rollout", "LLaDA, d1") else 1.0)


def test_products_are_those_of_torch(monkeypatch, tmp_path):
    """Each case's functions, which write to arrays of their own, give what torch's product in bfloat16 does."""
    for case in products.cases(40, 70, 33):
        expected = case.floor().clone()
        slack = 2.0**-6 * float(expected.abs().max())
        for function in case.functions.values():
            # As far as the floor's rounding to bfloat16, and its inputs', of sums whose terms cancel.
            helpers.assert_close(function(), expected, rtol=2.0**-6, atol=slack)
    path = tmp_path / "products.json"
    arguments = ["products", "--rows", "3", "--vocabulary", "9", "--hidden", "5", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    products.main()
    found = json.loads(path.read_text())
    assert found["bfloat16"] == cpu.instructions() and "dam" in found["median_seconds"]["3 rows, logits"]
