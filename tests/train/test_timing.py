"""Where time goes: by a clock that is set by hand, and in a run whose reward takes all of it."""

import re
import sys

import pytest
import torch
from tiny import ROWS, rotary_model, sum_reward, tiny_config, tiny_model
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from dam.train import DAMTrainer, terminal
from dam.train.callbacks import RolloutProgress, log_line, progress_line
from dam.train.timing import Timing


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_every_second_is_counted_once():
    clock = Clock()
    timing = Timing(clock=clock)
    with timing.part("evaluation"):
        clock.pass_by(50)  # before the run
    timing.begin(10)
    clock.pass_by(1)
    with timing.part("rollout"):
        clock.pass_by(4)
        with timing.part("reward"):
            clock.pass_by(2)
        clock.pass_by(1)
    timing.drew(400)
    timing.begin(11)  # it has begun
    with timing.part("evaluation"):
        clock.pass_by(2)
    assert timing.take(14, 20) == {
        "time/rollout_share": 0.5,
        "time/reward_share": 0.2,
        "time/evaluation_share": 0.2,
        "time/training_share": 0.1,
        "tokens_per_second": 40.0,
        "time/eta_seconds": 10 / 4 * 6,
    }
    assert timing.take(14, 20) == {}  # no time has passed
    clock.pass_by(5)
    told = timing.take(15, 20)
    assert told["time/training_share"] == 1.0 and told["tokens_per_second"] == told["time/rollout_share"] == 0.0
    assert told["time/eta_seconds"] == 15 / 5 * 5
    timing.clear()
    assert timing.take(15, 20) == {}


def test_a_part_waits_for_the_device_at_both_ends():
    """Whose work before it is no part of it, and whose work in it is."""
    clock, queued = Clock(), [3.0]
    timing = Timing(wait=lambda: clock.pass_by(queued.pop() if queued else 0.0), clock=clock)
    timing.begin(0)
    with timing.part("rollout"):
        queued.append(1.0)
    told = timing.take(1, 1)
    assert (told["time/training_share"], told["time/rollout_share"], told["time/eta_seconds"]) == (0.75, 0.25, 0.0)


def test_a_run_tells_where_its_time_goes(tmp_path):
    """Time passes in rewards, 5 s for 2 prompts of 8 completions of 3 tokens and 3 s in an evaluation; in passes, 0.5 s
    each; in other network calls, 1 s each; and in metrics, 2 s."""
    clock, calls = Clock(), [0]

    def reward(completion_ids, trainer_state, **_):
        clock.pass_by(5 if len(completion_ids) == 16 else 3)
        assert trainer_state.max_steps == 6
        return sum_reward(completion_ids)

    def network(module, args):
        clock.pass_by(0.5 if torch.is_grad_enabled() else 1.0)
        calls[-1] += not torch.is_grad_enabled()

    def metrics(prediction):
        clock.pass_by(2)
        return {}

    config = tiny_config(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer = DAMTrainer(tiny_model(), reward, config, ROWS, ROWS[:2], compute_metrics=metrics)
    trainer._timing = Timing(clock=clock)
    trainer.model.register_forward_pre_hook(network)
    logs = trainer.log
    trainer.log = lambda *args: [logs(*args), calls.append(0)]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = [5 + 2 * 0.5 + calls[0], 5 + 2 * 0.5 + calls[1], 5 + 3 + 2 + 2 * 0.5 + calls[2] + calls[3]]
    assert len(logged) == 3 and min(calls[:4]) > 2
    for entry, passed in zip(logged, seconds, strict=True):
        assert entry["tokens_per_second"] == pytest.approx(48 / passed)
        assert entry["time/training_share"] == pytest.approx(1 / passed)
    # The evaluation comes between the second log and the third, and logs by itself.
    shares = [[entry[f"time/{part}_share"] for part in ("rollout", "reward", "evaluation")] for entry in logged]
    for n, evaluated in ((0, []), (1, []), (2, [calls[2] + 2])):
        others = [calls[3 if evaluated else n], 5 + 3 * len(evaluated), sum(evaluated)]
        assert shares[n] == pytest.approx([each / seconds[n] for each in others])
    paces = [sum(seconds[: n + 1]) / (2 * n + 2) for n in range(3)]
    expected = [pace * (4 - 2 * n) for n, pace in enumerate(paces)]
    assert [entry["time/eta_seconds"] for entry in logged] == pytest.approx(expected)


def test_tokens_are_those_that_were_drawn(tmp_path):
    """Of prompts of different length, and up to a stop token where a rollout ends there."""
    seen = []

    def reward(completion_ids, **_):
        clock.pass_by(1)
        seen.append(sum(map(len, completion_ids)))
        return sum_reward(completion_ids)

    for changes, prompts in (({}, [[1], [2, 3]]), ({"stop_token_ids": [5], "block_length": 1}, [[1], [2]])):
        seen.clear()
        clock = Clock()
        config = tiny_config(tmp_path, max_steps=2, max_completion_length=6, **changes)
        trainer = DAMTrainer(rotary_model(), reward, config, [{"prompt": prompt} for prompt in prompts])
        trainer._timing = Timing(clock=clock)
        trainer.train()
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert entry["tokens_per_second"] == seen[0] and (seen[0] < 96) == bool(changes)


def test_a_line_of_progress():
    logs = {"loss": 1.0, "reward": 0.5, "ess": 4.06, "tilt": 0.25, "kl_path": 0.043, "tokens_per_second": 12345.6}
    shares = {"time/rollout_share": 0.62, "time/reward_share": 0.05, "time/evaluation_share": 0.0}
    line = progress_line({**logs, **shares, "time/training_share": 0.33})
    figures = "reward 0.5, ess 4.06, kl_path 0.043, tilt 0.25, 12,346 tokens/s"
    assert (
        line
        == f"{figures} (62% rollout, 5% reward, 33% training)"
        == log_line({**logs, **shares, "time/training_share": 0.33})
    )
    assert progress_line({"eval_reward": 1.0}) == ""
    assert log_line({"eval_reward": 1.0, "reward_calls": 2048, "epoch": 0.5}) == "eval_reward 1, reward_calls 2,048"


@pytest.mark.parametrize("writes", [True, False])
def test_the_bar_counts_from_where_a_run_was_resumed(tmp_path, capsys, monkeypatch, writes):
    """Else the steps of before would seem to have taken no time."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar, state, control = RolloutProgress(writes), TrainerState(global_step=500, max_steps=1000), TrainerControl()
    config = tiny_config(tmp_path)
    bar.on_train_begin(config, state, control)
    state.global_step = 501
    bar.on_step_end(config, state, control)
    bar.on_log(config, state, control, logs={"reward": 0.5})
    told = bar.training_bar.format_dict
    assert (told["initial"], told["n"], told["total"], told["postfix"]) == (500, 501, 1000, "reward 0.5")
    assert told["rate"] is None  # the mean
    bar.on_train_end(config, state, control)
    assert ("step 501/1000: reward 0.5\n" in capsys.readouterr().out) == writes


@pytest.mark.parametrize("writes", [True, False])
def test_progress_in_a_pipe_is_lines(tmp_path, capsys, monkeypatch, writes):
    """No carriage return, and not a line a step: one for each log, or where none are written one at the end."""
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 1e6)
    bar, state, control = RolloutProgress(writes), TrainerState(max_steps=100), TrainerControl()
    bar.on_train_begin(None, state, control)
    for step in range(100):
        state.global_step = step + 1
        bar.on_step_end(None, state, control)
        if step % 50 == 0:
            bar.on_log(None, state, control, logs={"reward": 0.5})
    bar.on_train_end(None, state, control)
    out, err = capsys.readouterr()
    if writes:
        assert (out, err) == ("step 1/100: reward 0.5\nstep 51/100: reward 0.5\n", "")
    else:
        assert out == "" and "\r" not in err
        assert re.fullmatch(r"0% 0/100 \[.*\]\n100% 100/100 \[.*, reward 0.5\]\n", err)


def test_a_run_has_this_bar_in_place_of_transformers_own(tmp_path):
    for disabled in (True, False):
        trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, disable_tqdm=disabled), ROWS)
        bars = [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]
        assert [type(bar) for bar in bars] == ([] if disabled else [RolloutProgress])
