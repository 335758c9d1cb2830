"""`dam sudoku` and `dam info`: files, errors before the work, and runs that are stopped or killed and go on."""

import functools
import json
import os
import shlex
import signal
import sys

import pytest
import torch
from transformers import AutoModelForMaskedLM

from dam import cli
from dam.tasks import finetune as front
from dam.tasks import finetune_sudoku as job
from dam.tasks import sudoku
from tests import fresh, ranks
from tests.covering import full

KEYS = (
    "base_solved",
    "solved",
    "base_exact",
    "exact",
    "base_cells",
    "cells",
    "reward_calls",
    "seconds",
    "seed",
    "estimator",
)
# A rollout is 4 puzzles of 8 trajectories; 6 rollouts of 2 steps, evaluated and saved after every second rollout.
SHRUNK = {"prompts": 4, "generations": 8, "iterations": 2, "evaluations": 3}
all_grids = functools.cache(sudoku.all_grids)
SMALL = ("--reward-calls", "192", "--seed", "3")


def shrink(set_attribute):
    """Makes a run small enough to be done several times, through set_attribute(object, name, value)."""
    for name, value in SHRUNK.items():
        set_attribute(job.Sudoku, name, value)
    set_attribute(sudoku, "all_grids", all_grids)
    config = job.Sudoku.config

    def smaller(self):
        changed = config(self)
        few = changed["draw_outcomes"] and 16
        return {**changed, "save_steps": 4, "replay_batch_size": 4, "draw_outcomes": few}

    set_attribute(job.Sudoku, "config", smaller)


def interrupted_after(calls, number):
    """The units reward, that sends this process a signal at its n-th call."""
    left = [calls]

    @functools.wraps(sudoku.units_reward)
    def reward(**arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return sudoku.units_reward(**arguments)

    return {"units": reward}


def main_killed_after(calls, arguments):
    """What a process runs that is to be killed."""
    torch.set_num_threads(1)
    shrink(setattr)
    job.REWARDS = interrupted_after(calls, signal.SIGKILL)
    cli.main(arguments)


@pytest.fixture
def small(monkeypatch, one_thread):
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    held_out = sudoku.held_out_puzzles(8)
    rows = zip(held_out.puzzle[:20].tolist(), held_out.solution[:20].tolist(), strict=True)
    path = tmp_path_factory.mktemp("puzzles") / "puzzles.csv"
    lines = [",".join("".join(map(str, cells)) for cells in row) for row in rows]
    path.write_text("\n".join(["Puzzle,Solution", *lines, ""]))
    return str(path)


@pytest.fixture(scope="module")
def reference(puzzles, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        shrink(patch.setattr)
        assert cli.main(["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(output)]) == 0
        torch.set_num_threads(threads)
    return output


def result(output):
    return json.loads((output / "metrics.json").read_text())


def history(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output):
    return [
        (e["step"], e["reward_calls"], e["eval_solved"], e["eval_cells"]) for e in history(output) if "eval_solved" in e
    ]


def assert_same_run(output, reference):
    ours, theirs = ({k: v for k, v in result(o).items() if k != "seconds"} for o in (output, reference))
    assert ours == theirs
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert curve(output) == curve(reference)


# A whole run


@pytest.mark.slow
def test_a_run_as_a_user_starts_it(tmp_path):
    done = fresh.main("dam.cli", "sudoku", "--reward-calls", "1024", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "runs" / "sudoku-1"  # a new folder unless told otherwise
    metrics = result(output)
    assert set(KEYS) <= set(metrics)
    assert (metrics["reward_calls"], metrics["seed"], metrics["estimator"]) == (1024, 5, "posterior")
    assert "fine-tuned" in done.stdout and f"{metrics['solved']:.1%}" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_files_of_a_run(reference, puzzles):
    assert {"config.json", "model.safetensors", "metrics.json", "metrics.jsonl", "plot.png"} <= set(
        os.listdir(reference)
    )
    assert (reference / "plot.png").read_bytes().startswith(b"\x89PNG")
    metrics = result(reference)
    assert set(KEYS) <= set(metrics)
    assert (metrics["reward_calls"], metrics["seed"], metrics["puzzles"]) == (192, 3, 20)
    # The curve begins with the base, before any reward was asked for, and ends with the budget spent.
    points = curve(reference)
    assert points[0] == (0, 0, metrics["base_solved"], metrics["base_cells"])
    assert points[-1][:3] == (12, 192, metrics["solved"])
    rewards = [entry["reward"] for entry in history(reference) if "reward" in entry]
    assert len(rewards) == 6


def test_the_saved_model_is_the_one_that_was_measured(reference, puzzles):
    model = AutoModelForMaskedLM.from_pretrained(reference, attn_implementation="eager")
    assert model.config.dam["seed"] == 3
    read = sudoku.read_puzzles(puzzles)
    measured = sudoku.metrics(read.puzzle, job.fill_in(model, read), read.solution)
    assert measured == {name: result(reference)[name] for name in ("solved", "exact", "cells")}


@pytest.mark.parametrize(
    "options",
    [
        ("--reward", "cells", "--estimator", "first_jump_one"),
        ("--estimator", "first_jump", "--normalizer", "state"),
        ("--null-arm",),
    ],
    ids=" ".join,
)
def test_every_option_runs(small, puzzles, tmp_path, options):
    arguments = ["sudoku", "--reward-calls", "64", "--puzzles", puzzles, "--output", str(tmp_path / "run"), *options]
    assert cli.main(arguments) == 0
    assert set(KEYS) <= set(result(tmp_path / "run"))


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dam ")
    assert [line.split()[0] for line in lines[1:5]] == ["torch", "cpu", "triton", "cuda"]
    assert lines[5].startswith("with ") and "transformers " in lines[5]


# Errors, before anything is made


def file(path, text="not a folder"):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reward-calls", "100"), "reward_calls must be at least 1024"),
        (("--blanks", "0"), "blanks"),
        (("--blanks", "17"), "blanks"),
        (("--seed", "-1"), "seed"),
        (("--seed", str(2**32)), "seed"),
        (("--puzzles", "nothing.csv"), "nothing.csv"),
        (("--puzzles", "bad.csv"), "bad.csv, line 3: Puzzle must have 16 characters; got 15"),
        (("--puzzles", "other.csv"), "other.csv, line 1: column Solution missing"),
        (("--output", "file/run"), "file"),
        (("--output", "file"), "file"),
        (("--resume",), "nothing to resume"),
        (("--resume", "--output", "run"), "nothing to resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_comes_before_the_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "fill_in", lambda *_: pytest.fail("the work has started"))
    file(tmp_path / "file")
    file(tmp_path / "bad.csv", "Puzzle,Solution\n\n120430122103430,1234341221434321\n")
    file(tmp_path / "other.csv", "Puzzle\n1204301221034301\n")
    before = sorted(os.listdir(tmp_path))
    arguments = options if "--output" in options or options == ("--resume",) else (*options, "--output", "run")
    assert cli.main(["sudoku", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dam sudoku: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_missing_extra_is_an_error_before_the_work(small, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(job, "fill_in", lambda *_: pytest.fail("the work has started"))
    assert cli.main(["sudoku", "--output", str(tmp_path / "run")]) == 1
    assert "pip install 'discrete-adjoint-matching[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", [("--estimator", "last_jump"), ("--reward-calls", "many"), ("--reward", "luck")], ids=" ".join
)
def test_what_the_parser_refuses(option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sudoku", *option])
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.full
def test_the_exit_status_of_an_error(tmp_path):
    file(tmp_path / "file")
    done = fresh.main("dam.cli", "sudoku", "--output", str(tmp_path / "file" / "run"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dam sudoku: ")
    assert "Traceback" not in done.stderr


def test_a_run_is_not_overwritten(small, reference, capsys):
    before = (reference / "metrics.json").read_bytes()
    assert cli.main(["sudoku", *SMALL, "--output", str(reference)]) == 1
    assert "is not empty: continue the run in it with --resume" in capsys.readouterr().err
    assert (reference / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("calls", "count"), [pytest.param(7, 32, id="in a rollout"), full(6, 20, id="in an evaluation")]
)
def test_a_reward_function_that_fails_loses_nothing(
    small, reference, puzzles, tmp_path, monkeypatch, capsys, calls, count
):
    left = [calls]

    def broken(completion_ids, **_):
        left[0] -= 1
        return "excellent" if left[0] == 0 else sudoku.units_reward(completion_ids)

    output = tmp_path / "run"
    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "REWARDS", {"units": broken})
        assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"dam sudoku: reward function 'broken' must return a list of {count} numbers; got str" in error
    assert "Traceback" not in error
    if count == 32:
        assert "failed_rollouts.pt" in error and (output / "failed_rollouts.pt").exists()
    assert cli.main([*arguments, "--resume"]) == 0
    assert_same_run(output, reference)


# Stopped and killed

# Reward calls are those of rollouts and, after every second of them, of an evaluation: call 5 is the rollout
# after the first checkpoint was saved.


@pytest.mark.parametrize(
    ("calls", "number"),
    [
        pytest.param(1, signal.SIGINT, id="at once"),
        full(5, signal.SIGINT, id="half-way"),
        pytest.param(5, signal.SIGTERM, id="half-way by SIGTERM"),
        full(9, signal.SIGINT, id="at the end"),
    ],
)
def test_a_stopped_run_continues_to_the_same_result(
    small, reference, puzzles, tmp_path, monkeypatch, capsys, calls, number
):
    output = tmp_path / "run"
    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "REWARDS", interrupted_after(calls, number))
        status = cli.main(arguments)
    if calls < 9:
        assert status == 130
        _, _, advice = capsys.readouterr().err.partition("checkpoint saved. Continue with: dam ")
        assert advice.startswith("sudoku --resume") and not (output / "metrics.json").exists()
        assert cli.main(shlex.split(advice)) == 0
    else:
        assert status == 0  # nothing was left to do
    assert_same_run(output, reference)


def test_ctrl_c_before_the_first_step(small, reference, puzzles, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(job, "fill_in", interrupted)
        try:
            assert cli.main(arguments) == 130
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C went through")
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "checkpoints"),
    [
        pytest.param(2, 0, id="before a checkpoint", marks=pytest.mark.full),
        pytest.param(8, 2, id="after two"),
    ],
)
def test_a_killed_run_continues_to_the_same_result(small, reference, puzzles, tmp_path, calls, checkpoints):
    output = tmp_path / "run"
    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(output)]
    process = ranks.server_of_forks().Process(target=main_killed_after, args=(calls, arguments))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(output.glob("checkpoint-*"))) == checkpoints
    assert not (output / "metrics.json").exists()
    # What a kill in the middle of a line leaves.
    with open(output / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 0.')
    assert cli.main([*arguments, "--resume"]) == 0
    assert_same_run(output, reference)


def test_a_kill_while_a_checkpoint_was_written(small, reference, puzzles, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "REWARDS", interrupted_after(8, signal.SIGINT))
        assert cli.main(arguments) == 130
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / "dam_state.pt").unlink()
    (last / "model.safetensors").write_bytes(b"half of")
    assert cli.main([*arguments, "--resume"]) == 0
    assert_same_run(output, reference)


def test_resuming_a_finished_run_prints_the_same_table(small, reference, puzzles, capsys):
    before = {path.name: path.read_bytes() for path in reference.iterdir() if path.is_file()}
    assert cli.main(["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(reference), "--resume"]) == 0
    assert capsys.readouterr().out.startswith(job.Sudoku.report(result(reference)))
    assert {path.name: path.read_bytes() for path in reference.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "option",
    [("--seed", "4"), ("--estimator", "first_jump"), ("--reward", "cells"), ("--reward-calls", "416")],
    ids=" ".join,
)
def test_a_run_is_not_resumed_with_other_options(small, reference, puzzles, capsys, option):
    arguments = ["sudoku", *SMALL, "--puzzles", puzzles, "--output", str(reference), "--resume", *option]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "started with other options" in error
    assert option[0].removeprefix("--").replace("-", "_") in error


def test_runs_are_numbered(tmp_path):
    assert front.next_output("sudoku", tmp_path) == tmp_path / "sudoku-1"
    with pytest.raises(ValueError, match="nothing to resume"):
        front.last_output("sudoku", tmp_path)
    for name in ("sudoku-2", "sudoku-10", "sudoku-old", "other-99"):
        (tmp_path / name).mkdir()
    assert front.last_output("sudoku", tmp_path) == tmp_path / "sudoku-10"
    assert front.next_output("sudoku", tmp_path) == tmp_path / "sudoku-11"
