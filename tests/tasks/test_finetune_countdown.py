"""`dam countdown`: the path of a language model, from text to text; runs that are killed go on to the same weights."""

import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerState

from dam import cli
from dam.tasks import countdown, countdown_base, live
from dam.tasks import finetune_countdown as job

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the base is trained by torch.optim.Muon")
# A rollout is 4 problems of 8 trajectories; 6 rollouts of 2 steps, saved after every second one.
SHRUNK = {"prompts": 4, "generations": 8, "iterations": 2, "evaluations": 3}
SMALL = ("countdown", "--reward-calls", "192", "--pretraining-steps", "12", "--seed", "3")


def shrink(set_attribute):
    for name, value in SHRUNK.items():
        set_attribute(job.Countdown, name, value)
    set_attribute(job, "PROBLEMS", 12)
    set_attribute(job, "SAMPLES", 4)
    set_attribute(countdown_base, "_SAVED_EVERY", 4)
    set_attribute(countdown_base, "BATCH", 16)
    config = job.Countdown.config
    set_attribute(job.Countdown, "config", lambda self: {**config(self), "save_steps": 4, "replay_batch_size": 4})


def run_in_another_process(output):
    """A run of few steps, or what is left of it."""
    torch.set_num_threads(1)
    shrink(setattr)
    resume = ["--resume"] if (output / "run.json").exists() else []
    return cli.main([*SMALL, "--output", str(output), *resume])


@pytest.fixture
def small(monkeypatch, one_thread):
    shrink(monkeypatch.setattr)


CODE = """
from pathlib import Path
import sys
from tests.tasks.test_finetune_countdown import run_in_another_process
sys.exit(run_in_another_process(Path(sys.argv[1])))
"""


def started(output):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_run(small, tmp_path, monkeypatch, capsys):
    seen = []

    def correct(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, columns["numbers"], columns["target"], strict=True))
        return countdown.TASK.correct(completions=completions, **columns)

    monkeypatch.setitem(job.REWARDS, "correct", correct)
    assert cli.main([*SMALL, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("greedy", "sampled", "pass@4"):
        assert 0 <= result["base_" + name] <= 1 and 0 <= result[name] <= 1
    assert (result["problems"], result["reward_calls"]) == (12, 192)
    assert "fine-tuned" in out and "step 4\n" in out
    # Rewards see text as it is written, without special tokens; there are pairs among the prompts.
    for prompt, completion, numbers, target in seen:
        assert prompt == f"{' '.join(map(str, numbers))} = {target}"
        assert all(word in countdown_base.WORDS[4:] for word in completion.split())
    assert {len(numbers) for _, _, numbers, _ in seen} == {2, 3}
    # What was saved is a model and a tokenizer for whoever loads them.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    assert tokenizer.mask_token_id == model.config.mask_token_id and tokenizer.padding_side == "left"


def test_no_problem_of_a_file_is_trained_on(tmp_path):
    problems = [(problem.numbers, problem.target) for problem in countdown.draw_problems(64, 1)]
    file = tmp_path / "problems.jsonl"
    lines = [{"input": ",".join(map(str, numbers)), "output": str(target)} for numbers, target in problems]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = job.Countdown(job.Options(problems=str(file)))
    assert [(row["numbers"], row["target"]) for row in task.evaluation_rows()] == [(list(n), t) for n, t in problems]
    trained = {(tuple(sorted(row["numbers"])), row["target"]) for row in task.training_rows()}
    assert len(task.training_rows()) == 64 * 64 and not trained & countdown_base.excluded(problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pretraining-steps", "0"), "pretraining_steps must be at least 1; got 0"),
        (("--reward-calls", "100"), "reward_calls must be at least 1024"),
        (("--problems", "nothing.jsonl"), "nothing.jsonl"),
        (("--problems", "four.jsonl"), "knows problems of 2 or 3 numbers from 1 to 100"),
        (("--problems", "bad.jsonl"), "needed: nums and target"),
    ],
    ids=" ".join,
)
def test_an_error_comes_before_the_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(countdown_base, "pretrained", lambda *_, **__: pytest.fail("the work has started"))
    (tmp_path / "four.jsonl").write_text('{"input": "1,2,3,4", "output": "10"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "1,2,3"}\n')
    assert cli.main(["countdown", "--output", "run", *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_of_another_task_is_not_resumed(tmp_path, capsys):
    """Its options have other names."""
    (tmp_path / "run.json").write_text(json.dumps({"task": "sudoku", "options": {"blanks": 8}, "seconds": 1.0}))
    assert cli.main(["countdown", "--resume", "--output", str(tmp_path)]) == 1
    assert f"nothing to resume: {tmp_path} holds no run of dam countdown" in capsys.readouterr().err


def test_a_constant_reward_is_told(small, tmp_path):
    with pytest.warns(UserWarning, match="constant reward: all trajectories of every group have had one reward"):
        assert cli.main([*SMALL, "--reward", "constant", "--output", str(tmp_path / "run")]) == 0


def assert_same_weights(output, reference):
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (output, reference))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def until(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    """While the base is trained, and while it is fine-tuned."""
    assert started(tmp_path / "whole").wait() == 0
    output = tmp_path / "part"
    for file in ("base/pretraining.pt", "checkpoint-4/trainer_state.json"):
        process = started(output)
        until((output / file).exists, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (output / "metrics.json").exists()
    assert started(output).wait() == 0
    assert_same_weights(output, tmp_path / "whole")


@pytest.mark.full
def test_a_run_that_was_killed_at_ten_random_moments(tmp_path):
    """By how far the run has come and a little later, as by the clock a busy machine would have other moments."""
    assert started(tmp_path / "whole").wait() == 0
    draw = random.Random(0)
    files = [
        "base/pretraining.pt",
        "base/config.json",
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-8/trainer_state.json",
    ]
    for number in range(10):
        output = tmp_path / f"part-{number}"
        file, lines = draw.choice(
            [*((file, 0) for file in files), *(("metrics.jsonl", lines) for lines in range(1, 8))]
        )
        process = started(output)
        until(
            lambda at=output / file, n=lines: at.exists() and (not n or len(at.read_text().splitlines()) >= n), process
        )
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert started(output).wait() == 0
        assert_same_weights(output, tmp_path / "whole")


def test_what_is_shown_of_a_completion_as_it_is_unmasked():
    task = job.Countdown(job.Options())
    model = countdown_base.network(0)
    rolled_out = functools.partial(task._rolled_out, model, task.rows[:2])
    pictures = list(live.frames(rolled_out(temperature=1.0), task.tokenizer))
    assert pictures[0] == [f"{row['prompt']}{' ▒' * countdown_base.COMPLETION}" for row in task.rows[:2]]
    hidden = [picture[0].count("▒") for picture in pictures]
    assert hidden == sorted(hidden, reverse=True) and hidden[-1] == 0
    final = task._texts(rolled_out(temperature=1.0).final)
    assert pictures[-1] == [f"{row['prompt']} {text}" for row, text in zip(task.rows, final, strict=False)]


def test_on_a_terminal_frames_are_drawn_over_each_other(monkeypatch):
    task = job.Countdown(job.Options())
    model = countdown_base.network(0)
    monkeypatch.setattr(live, "_FRAME_SECONDS", 0.0)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    state = TrainerState()
    state.is_local_process_zero = state.is_world_process_zero = True
    task.callbacks()[0].on_evaluate(None, state, None, model=model)
    assert terminal.getvalue().count(f"\x1b[{job.SHOWN}A") >= 1


def test_a_torch_without_muon_is_refused_before_anything_is_made(small, monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(torch.optim, "Muon")
    assert cli.main([*SMALL, "--output", str(tmp_path / "run")]) == 1
    assert "needs torch 2.9 or later" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
