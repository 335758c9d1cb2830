"""`dam countdown`: the path of a language model, from text to text; runs that are killed go on to the same weights."""

import contextlib
import io
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerState

from dam import cli
from dam.models import MaskedLM
from dam.rollout import jump_log_prob
from dam.tasks import countdown, countdown_base, finetune, live
from dam.tasks import finetune_countdown as job
from tests import ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the base is trained by torch.optim.Muon")
# A rollout is 4 problems of 8 trajectories; 6 rollouts of 2 steps, saved after every second one.
SHRUNK = {"prompts": 4, "generations": 8, "iterations": 2, "evaluations": 3}
END = countdown_base.WORDS.index(countdown_base.END)
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
    sys.exit(cli.main([*SMALL, "--output", str(output), *resume]))


@pytest.fixture
def small(monkeypatch, one_thread):
    shrink(monkeypatch.setattr)


class Whole(NamedTuple):
    """A run that nobody stopped."""

    output: Path
    written: str  # on the terminal
    rewarded: list  # what its reward function was given: prompt, completion, numbers, target


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output, seen = tmp_path_factory.mktemp("whole") / "run", []

    def correct(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, columns["numbers"], columns["target"], strict=True))
        return countdown.TASK.correct(completions=completions, **columns)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as terminal:
        shrink(patch.setattr)
        patch.setitem(job.REWARDS, "correct", correct)
        assert cli.main([*SMALL, "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    return Whole(output, terminal.getvalue(), seen)


def test_a_run(whole):
    result = json.loads((whole.output / "metrics.json").read_text())
    for name in ("greedy", "sampled", "pass@4"):
        assert 0 <= result["base_" + name] <= 1 and 0 <= result[name] <= 1
    assert (result["problems"], result["reward_calls"]) == (12, 192)
    assert "fine-tuned" in whole.written and "step 4\n" in whole.written
    # Rewards see text as it is written, without special tokens; there are pairs among the prompts.
    for prompt, completion, numbers, target in whole.rewarded:
        assert prompt == f"{' '.join(map(str, numbers))} = {target}"
        assert all(word in countdown_base.WORDS[4:] for word in completion.split())
    assert {len(numbers) for _, _, numbers, _ in whole.rewarded} == {2, 3}
    # What was saved is a model and a tokenizer for whoever loads them.
    tokenizer = AutoTokenizer.from_pretrained(whole.output)
    model = AutoModelForMaskedLM.from_pretrained(whole.output)
    assert tokenizer.mask_token_id == model.config.mask_token_id and tokenizer.padding_side == "left"


def task_of(tmp_path, problems, **options):
    """The task with problems of a file."""
    file = tmp_path / "problems.jsonl"
    lines = [{"input": ",".join(map(str, numbers)), "output": str(target)} for numbers, target in problems]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job.Countdown(job.Options(problems=str(file), **options))


def test_no_problem_of_a_file_is_trained_on(tmp_path, monkeypatch):
    """Of a file of all that would be, neither by the base nor from rewards, in whatever order the numbers are."""
    every = [(row["numbers"], row["target"]) for row in job.Countdown(job.Options(reward_calls=4096)).training_rows()]
    problems = [(numbers[::-1], target) for numbers, target in every]
    task = task_of(tmp_path, problems, reward_calls=4096, pretraining_steps=7)
    assert [(row["numbers"], row["target"]) for row in task.evaluation_rows()] == problems
    trained = [(row["numbers"], row["target"]) for row in task.training_rows()]
    assert [sum(len(numbers) == size for numbers, _ in trained) for size in (2, 3)] == [32, 224]
    assert not countdown_base.excluded(trained) & countdown_base.excluded(problems)
    monkeypatch.setattr(countdown_base, "pretrained", lambda *_, **given: given)
    given = task.model(tmp_path)
    assert (given["without"], given["steps"]) == (countdown_base.excluded(problems), 7)


def logits_of(model, task, tokens):
    """[L, V] of one row, of the tokens that may be drawn."""
    never = [task.tokenizer.mask_token_id, task.tokenizer.pad_token_id, task.tokenizer.unk_token_id]
    return model(input_ids=tokens[None]).logits[0].detach().index_fill(1, torch.tensor(never), -torch.inf)


def test_evaluation_takes_the_likeliest_token_at_the_likeliest_place(tmp_path):
    """By the model's own logits of each problem alone, without padding, up to its end."""
    task, model = task_of(tmp_path, [([1, 2], 3), ([5, 6, 7], 18), ([5, 6, 8], 19)]), countdown_base.network(0)
    pad, mask = task.tokenizer.pad_token_id, task.process.mask_token
    model.get_input_embeddings().weight.data[pad, ::2] = 10.0
    model.lm_head.bias.data[[pad, task.tokenizer.unk_token_id]] = 100.0
    model.lm_head.bias.data[END] = 3.0
    drawn = task._rolled_out(model, task.rows, temperature=0.0)
    assert torch.equal(task.fill_in(model), drawn.final)
    for row, final, log_prob in zip(task.rows, drawn.final, drawn.log_prob, strict=True):
        prompt = task.tokenizer(row["prompt"], return_tensors="pt")["input_ids"][0]
        tokens = torch.cat((prompt, torch.full((countdown_base.COMPLETION,), mask)))
        expected = []
        while mask in tokens[: tokens.tolist().index(END) if END in tokens else None]:
            law = logits_of(model, task, tokens).log_softmax(dim=1)
            law = law.masked_fill((tokens != mask)[:, None], -torch.inf)
            place, token = divmod(int(law.argmax()), law.shape[1])
            tokens[place] = token
            expected.append(float(law.max()))
        tokens[tokens == mask] = END
        assert final[-len(tokens) :].tolist() == tokens.tolist()
        assert log_prob[log_prob < 0].tolist() == pytest.approx(expected, rel=1e-4)  # float32 sums in other orders
    assert bool((drawn.call < 0).any())  # behind an end
    # Nor is anything else drawn in training.
    assert finetune.config(task, tmp_path).suppress_tokens == [pad, task.tokenizer.unk_token_id]


def test_samples_are_drawn_as_in_training(monkeypatch):
    """From the model as it is, in an order that it has no part in; so many of each problem."""
    monkeypatch.setattr(job, "PROBLEMS", 12)
    monkeypatch.setattr(job, "SAMPLES", 4)
    task, drawn = job.Countdown(job.Options()), []
    roll_out = task._rolled_out
    monkeypatch.setattr(
        task, "_rolled_out", lambda *given, **named: drawn.append(roll_out(*given, **named)) or drawn[-1]
    )
    for model in map(countdown_base.network, (0, 1)):
        task.sampled_metrics(model)
        log_prob = jump_log_prob(MaskedLM(model), drawn[-1], task.process)
        torch.testing.assert_close(drawn[-1].log_prob, log_prob)
        first = zip(drawn[-1].initial, drawn[-1].position[:, 0], drawn[-1].token[:, 0], strict=True)
        likeliest = [int(logits_of(model, task, row)[place].argmax()) == token for row, place, token in first]
        assert sum(likeliest) < len(likeliest) / 2
    there = (drawn[0].position >= 0) & (drawn[1].position >= 0)
    assert torch.equal(drawn[0].position[there], drawn[1].position[there]) and int(there.sum()) > 48
    prompts = task.tokenizer.batch_decode(drawn[0].initial, skip_special_tokens=True)
    assert prompts == [row["prompt"] for row in task.rows for _ in range(4)]
    # One right answer to the first problem and four to the second.
    right = [countdown.draw_problems(12, 0, held_out=True)[n].solution for n in (0, 1)]
    monkeypatch.setattr(task, "_texts", lambda final: [right[0], "", "", "1", *[right[1]] * 4, *[""] * 40])
    assert task.sampled_metrics(model) == {"sampled": 5 / 48, "pass@4": 2 / 12, "answer": 5 / 48}


def test_what_is_judged_is_the_text_in_front_of_its_end(tmp_path):
    task = task_of(tmp_path, [([1, 2], 3), ([5, 6, 7], 18), ([5, 6, 7], 4)])
    final = torch.full((3, countdown_base.PROMPT + countdown_base.COMPLETION), END)
    for row, text in zip(final, ("1+2", "5+6+7", "5+6+7"), strict=True):
        ids = task.tokenizer(text)["input_ids"]
        row[countdown_base.PROMPT :][: len(ids)] = torch.tensor(ids)
    assert task._texts(final) == ["1 + 2", "5 + 6 + 7", "5 + 6 + 7"]
    assert task.metrics(final) == {"greedy": 2 / 3, "greedy_closeness": pytest.approx((1 + 1 + 10 / 24) / 3)}


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
    shorter = ("--reward-calls", "64", "--pretraining-steps", "1", "--reward", "constant")
    with pytest.warns(UserWarning, match="constant reward: all trajectories of every group have had one reward"):
        assert cli.main([*SMALL, *shorter, "--output", str(tmp_path / "run")]) == 0


def assert_same_weights(output, reference):
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (output, reference))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def started(output):
    """A process that runs, or goes on with, what `output` has; all are imported in what it is a fork of."""
    process = ranks.server_of_forks().Process(target=run_in_another_process, args=(output,))
    process.start()
    return process


def goes_on_to_its_end(output):
    process = started(output)
    process.join()
    assert process.exitcode == 0


def kill(output, condition, seconds=0.0):
    """Starts a run, and kills it once a condition holds and some seconds are over."""
    process = started(output)
    while not condition():
        time.sleep(0.005)
        assert process.is_alive()
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(whole, tmp_path):
    """While the base is trained, and while it is fine-tuned."""
    for file in ("base/pretraining.pt", "checkpoint-4/trainer_state.json"):
        kill(tmp_path, (tmp_path / file).exists)
        assert not (tmp_path / "metrics.json").exists()
    goes_on_to_its_end(tmp_path)
    assert_same_weights(tmp_path, whole.output)


@pytest.mark.full
def test_a_run_that_was_killed_at_ten_random_moments(whole, tmp_path):
    """By how far the run has come and a little later, as by the clock a busy machine would have other moments."""
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
        kill(
            output,
            lambda at=output / file, n=lines: at.exists() and (not n or len(at.read_text().splitlines()) >= n),
            draw.uniform(0.0, 0.3),
        )
        goes_on_to_its_end(output)
        assert_same_weights(output, whole.output)


def test_what_is_shown_of_a_completion_as_it_is_unmasked():
    """Before its first token, then with one more at each call; in the end without what is behind its end."""
    task, model = job.Countdown(job.Options()), countdown_base.network(0)
    model.lm_head.bias.data[END] = 6.0
    drawn = task._rolled_out(model, task.rows[:4], temperature=1.0)
    pictures = list(live.frames(drawn, task.tokenizer))
    assert len(pictures) == drawn.network_calls + 1
    for row, filled in enumerate((drawn.call >= 0).sum(dim=1).tolist()):
        for call, picture in enumerate(pictures[:-1]):
            jumps = sorted(zip(drawn.position[row, :call].tolist(), drawn.token[row, :call].tolist(), strict=True))
            words = [task.tokenizer.decode(token) for place, token in jumps if place >= 0 and token != END]
            shown = picture[row].split()
            assert shown.count("▒") == countdown_base.COMPLETION - min(call, filled)
            assert " ".join(word for word in shown if word != "▒") == " ".join([task.rows[row]["prompt"], *words])
    texts = task._texts(drawn.final)
    assert pictures[-1] == [f"{row['prompt']} {text}" for row, text in zip(task.rows, texts, strict=False)]
    assert len((drawn.call >= 0).sum(dim=1).unique()) > 1  # one ended before the others


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
