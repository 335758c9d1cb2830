"""Rewards that hang, crash or raise at a completion: it is left out of its group, counted, and too many end the run."""

import asyncio
import math
import os
import time

import pytest
import torch
from tiny import ROWS, assert_same_weights, sum_reward, tiny_config, tiny_model
from transformers import TrainerState

from dam.train import DAMTrainer, RewardError
from dam.train.rewards import Rewards
from dam.train.trainer import _in_place_of_dropped
from dam.workers import Failure
from tests.hostile import judge

pytest.importorskip("dill")  # sends functions of this file by value, so that workers need not import torch

LONG = 120.0  # seconds in which success is expected, whatever else the machine does


def outcomes(how):
    count = len(how)
    return {
        "prompts": ["p"] * count,
        "completions": [],
        "completion_ids": [[n] for n in range(count)],
        "columns": {"how": list(how)},
    }


def rewarded(functions, how, tmp_path, **options):
    rewards = Rewards(functions, None, str(tmp_path), **options)
    return rewards(outcomes(how), TrainerState(global_step=7), lambda ids: ids)


def test_each_failure_costs_its_completion_only(tmp_path, capfd):
    how = ["well", "exit", "kill", "raise", "print", "allocate", "large", "nan", "two", "well"]
    total, parts, failed = rewarded(judge, how, tmp_path, timeout=LONG)
    assert parts.keys() == {"judge"}
    for values in (total, parts["judge"]):
        assert [None if math.isnan(v) else v for v in values.tolist()] == [7, *[None] * 3, 11, *[None] * 4, 16]
    assert {each.completion: each.failure.kind for each in failed} == {
        1: "crash",
        2: "crash",
        3: "error",
        5: "memory",
        6: "answer",
        7: "answer",
        8: "answer",
    }
    assert "KeyError: 'answer'" in failed[2].failure.message
    assert capfd.readouterr() == ("", "")


def test_a_hang_costs_its_completion_only(tmp_path):
    total, _, failed = rewarded(judge, ["hang"], tmp_path, timeout=0.2, workers=1)
    assert total.isnan().tolist() == [True] and failed[0].failure.kind == "timeout"


def test_a_failure_of_one_function_leaves_out_the_completion_in_all(tmp_path):
    """And None, does not apply, stays what it is."""

    def constant(**_):
        return [10.0]

    total, parts, failed = rewarded([constant, judge], ["well", "raise", "none"], tmp_path, workers=2)
    assert total.nan_to_num(-1).tolist() == [17, -1, 10]
    assert parts["constant"].nan_to_num(-1).tolist() == [10, -1, 10]
    assert parts["judge"].nan_to_num(-1).tolist() == [7, -1, -1]
    assert [(each.function, each.completion) for each in failed] == [("judge", 1)]


def test_async_functions_are_awaited_together_and_fail_one_by_one(tmp_path):
    """Each that is well waits until all have begun; a hang does not keep the others."""
    begun = []

    async def ask(how, completion_ids, **_):
        begun.append(how[0])
        if how[0] == "raise":
            raise ConnectionError("away")
        if how[0] == "exit":
            raise SystemExit
        if how[0] == "hang":
            await asyncio.sleep(1000)
        while len(begun) < 5:
            await asyncio.sleep(0.01)
        return [float(completion_ids[0][0])]

    total, _, failed = rewarded(ask, ["well", "hang", "raise", "exit", "well"], tmp_path, timeout=5.0)
    assert total.nan_to_num(-1).tolist() == [0, -1, -1, -1, 4]
    assert [(each.completion, each.failure.kind) for each in failed] == [(1, "timeout"), (2, "error"), (3, "crash")]
    # Without a limit of time.
    begun.clear()
    assert rewarded(ask, ["well"] * 5, tmp_path, workers=1).total.tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_sent_to_a_worker_is_refused_by_name_before_any_work(tmp_path):
    open_one = (n for n in ())

    def mine(**_):
        return [len(list(open_one))]

    with pytest.raises(TypeError, match=r"reward function 'mine' cannot be called in a worker process, .*module"):
        DAMTrainer(tiny_model(), mine, tiny_config(tmp_path, reward_workers=1), ROWS)


# ---- in a group


def test_places_of_dropped_trajectories_are_taken_by_the_others_in_turn():
    """So that the mean over places is the mean over those that are kept."""
    kept = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    member, share = _in_place_of_dropped(kept)
    assert member.tolist() == [[0, 1, 2, 3, 4], [1, 1, 2, 2, 4], [3] * 5]
    values = torch.randn(3, 5, dtype=torch.float64)
    for group in range(3):
        means = (values[group, member[group]] * share[group]).mean(), values[group, kept[group]].mean()
        torch.testing.assert_close(*means, rtol=1e-6, atol=0)
    assert share[0].tolist() == [1.0] * 5


def lost_on(tokens):
    """sum_reward, but that it raises at completions whose first token that was filled in is among these."""

    def fails_there(completion_ids, **_):
        if completion_ids[0][1] in tokens:
            raise ValueError("not of my liking")
        return [float(sum(completion_ids[0]))]

    return fails_there


def isolated_run(output, function, rows=ROWS, **changes):
    changes = {"reward_workers": 2, "reward_timeout": LONG, "max_reward_failures": 1.0} | changes
    model = tiny_model()
    trainer = DAMTrainer(model, function, tiny_config(output, **changes), rows, ref_model=tiny_model())
    return model, trainer


def test_what_is_lost_is_counted_and_never_trained_on(tmp_path):
    _, trainer = isolated_run(tmp_path, lost_on({2, 3}), logging_steps=1, log_completions=True, save_strategy="no")
    trainer.train()
    groups = trainer.progress.replay.state_dict()["groups"]
    assert groups
    for group in groups:
        assert not bool(torch.isin(group["final"][:, 1], torch.tensor([2, 3])).any())
        assert group["final"].shape == (8, 4) and bool(group["weight"].isfinite().all())
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    lost = [entry["rewards/failed"] for entry in log]
    assert 0.2 < sum(lost) / len(lost) < 0.6  # two of five tokens, of an untrained model
    for entry in log:
        assert entry["rewards/failed_error"] == entry["rewards/failed"] and entry["rewards/failed_timeout"] == 0
        assert all(math.isfinite(value) for value in entry.values())
    shown = trainer._completions
    for completion, reward, weight in zip(
        shown.completions, shown.figures["fails_there"], shown.figures["weight"], strict=True
    ):
        failed = completion[1] in (2, 3)
        assert math.isnan(reward) == failed
        assert weight == 0 or not failed


@pytest.mark.parametrize("changes", [{}, {"normalizer": "state"}, {"draw_outcomes": 8}, {"centering": 1.0}])
def test_without_failures_a_run_is_what_it_is_without_workers(tmp_path, changes):
    model, trainer = isolated_run(tmp_path, lost_on(set()), max_steps=3, **changes)
    trainer.train()
    plain = tiny_model()
    DAMTrainer(plain, sum_reward, tiny_config(tmp_path, max_steps=3, **changes), ROWS, ref_model=tiny_model()).train()
    assert_same_weights(model, plain)


def test_a_resumed_run_with_failures_ends_with_the_same_weights(tmp_path):
    model, trainer = isolated_run(tmp_path, lost_on({4}), save_strategy="steps", save_steps=1)
    trainer.train()
    resumed, again = isolated_run(tmp_path, lost_on({4}), reward_workers=1)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert_same_weights(model, resumed)
    with pytest.raises(AssertionError):  # what is lost makes a difference
        other, trainer = isolated_run(tmp_path, lost_on({5}))
        trainer.train()
        assert_same_weights(model, other)


@pytest.mark.parametrize(
    ("tokens", "limit", "message"),
    [({1, 2, 3}, 0.1, r"more than max_reward_failures, 0\.1"), ({1, 2, 3, 4, 5}, 1.0, "which leaves no group")],
)
def test_too_many_failures_end_the_run_with_the_rollouts_kept(tmp_path, tokens, limit, message):
    _, trainer = isolated_run(tmp_path, lost_on(tokens), max_reward_failures=limit)
    with pytest.raises(
        RewardError,
        match=rf"failed at .* of 16 completions, {message}.*: 'fails_there' error \d+ times, first: ValueError: not "
        rf"of my liking\. The rollouts of step 0 are kept in {tmp_path}/failed_rollouts\.pt",
    ):
        trainer.train()
    kept = torch.load(tmp_path / "failed_rollouts.pt", weights_only=False)
    assert len(kept["prompts"]) == len(kept["completions"]) == 16
    where = [n for n, completion in enumerate(kept["completion_ids"]) if completion[1] in tokens]
    assert [completion for _, completion, *_ in kept["failed"]] == where
    assert kept["failed"][0][2:] == ("error", "ValueError: not of my liking")


def test_evaluation_leaves_out_what_is_lost(tmp_path):
    """The mean is over the others, and how many were lost is logged."""

    def of_row(row, **_):
        if row[0] < 2:
            raise ValueError
        return [float(row[0])]

    rows = [{"input_ids": [1, 0, 0, 0], "row": n} for n in range(5)]
    _, trainer = isolated_run(tmp_path, of_row)
    with pytest.warns(UserWarning, match="failed in evaluation: 'of_row' error 2 times"):
        metrics = trainer.evaluate(rows)
    assert metrics["eval_reward"] == 3.0 and metrics["eval_rewards/failed"] == pytest.approx(0.4)


def test_a_hang_in_a_run_costs_its_completion_only(tmp_path):
    """And a reward that is not isolated still ends it."""

    def hangs(completion_ids, **_):
        import time

        if completion_ids[0][1] == 5:
            time.sleep(1000)
        return [float(sum(completion_ids[0]))]

    _, trainer = isolated_run(tmp_path, hangs, reward_timeout=2.0, reward_workers=8, max_steps=1, logging_steps=1)
    before = time.monotonic()
    trainer.train()
    assert time.monotonic() - before < LONG
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    fives = [ids[1] == 5 for ids in trainer._seen["completion_ids"]]
    assert any(fives)
    assert entry["rewards/failed"] >= sum(fives) / len(fives) > 0
    with pytest.raises(RewardError, match="raised KeyError"):
        rewarded(judge, ["raise"], tmp_path)
    assert os.path.exists(tmp_path / "failed_rollouts.pt")
    with pytest.raises(RewardError, match="returned Failure"):  # a tuple of its own is no number
        rewarded(lambda **_: [Failure("error", "")], ["well"], tmp_path)


@pytest.mark.parametrize(
    "changes", [{"reward_timeout": 0.0}, {"reward_workers": 0}, {"max_reward_failures": 1.5}], ids=str
)
def test_bad_settings_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny_config(tmp_path, **changes)
