"""A run that was stopped, killed or let down by its reward function continues to the weights of one that was not.

Weights are compared bitwise: every random choice depends on seed and step only, so nothing may differ.
"""

import itertools
import os

import pytest
import torch
from tiny import ROWS, assert_same_weights, sum_reward, tiny_config, tiny_model

from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.train import DAMTrainer, RewardError, last_checkpoint


class BreaksAt:
    """sum_reward, but its n-th call raises."""

    def __init__(self, n):
        self.left = n

    def __call__(self, **arguments):
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("the judge is away")
        return sum_reward(**arguments)


def uninterrupted(output, *, dropout=0.0, rows=ROWS, **changes):
    model = tiny_model(dropout=dropout)
    trainer = DAMTrainer(model, sum_reward, tiny_config(output, **changes), rows)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize(
    "changes",
    [
        *[{"estimator": e, "normalizer": n} for e, n in itertools.product(ESTIMATORS, NORMALIZERS)],
        {"draw_outcomes": 8},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "num_iterations": 1, "rows": ROWS[:6]},  # an epoch ends half-way
        {"null_arm": True},
        {"dropout": 0.1},
        {"max_steps": 11},  # into the second epoch, whose prompts come in another order
    ],
    ids=lambda changes: " ".join(map(str, {**changes, "rows": ""}.values())),
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, changes):
    # Saved after every step: in the middle of a batch of rollouts, between two, at the end of an epoch and beyond.
    model, trainer = uninterrupted(tmp_path, **changes, save_strategy="steps", save_steps=1)
    rows, dropout = changes.pop("rows", ROWS), changes.pop("dropout", 0.0)
    for step in {3, 4, trainer.state.max_steps - 1}:
        resumed = tiny_model(seed=step, dropout=dropout)  # other weights, which the checkpoint must replace
        again = DAMTrainer(resumed, sum_reward, tiny_config(tmp_path, **changes), rows, ref_model=tiny_model())
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert_same_weights(model, resumed)
        assert again.reward_calls == trainer.reward_calls


@pytest.mark.parametrize("broken", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 3},
        {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 3, "rows": ROWS[:6]},
        {"dropout": 0.1},
    ],
    ids=["plain", "accumulation", "uneven epochs", "dropout"],
)
def test_a_mended_reward_function_loses_nothing(tmp_path, changes, broken):
    model, trainer = uninterrupted(tmp_path / "whole", **changes)
    output = tmp_path / "broken"
    rows, dropout = changes.get("rows", ROWS), changes.get("dropout", 0.0)
    config = {name: value for name, value in changes.items() if name not in ("rows", "dropout")}
    failing = DAMTrainer(tiny_model(dropout=dropout), BreaksAt(broken), tiny_config(output, **config), rows)
    with pytest.raises(RewardError, match=r"'BreaksAt' raised ConnectionError: the judge is away.*failed_rollouts\.pt"):
        failing.train()
    kept = torch.load(output / "failed_rollouts.pt")
    prompts = 2 * config.get("gradient_accumulation_steps", 1)  # of a step, and trajectories of each
    assert len(kept["completion_ids"]) == len(kept["prompts"]) == prompts * 8
    assert kept["step"] == failing.state.global_step

    resumed = tiny_model(dropout=dropout)
    again = DAMTrainer(resumed, sum_reward, tiny_config(output, **config), rows)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(model, resumed)
    assert again.reward_calls == trainer.reward_calls


def test_an_error_in_evaluation_also_leaves_a_checkpoint(tmp_path):
    model, _ = uninterrupted(tmp_path / "whole")
    config = {"eval_strategy": "steps", "eval_steps": 4}
    failing = DAMTrainer(
        # The two rollouts of steps 0 and 2, then the evaluation after step 4.
        tiny_model(), BreaksAt(3), tiny_config(tmp_path / "broken", **config), ROWS, ROWS[:1],
    )  # fmt: skip
    with pytest.raises(RewardError, match="the judge is away"):
        failing.train()
    resumed = tiny_model()
    again = DAMTrainer(resumed, sum_reward, tiny_config(tmp_path / "broken", **config), ROWS, ROWS[:1])
    again.train(resume_from_checkpoint=True)
    assert_same_weights(model, resumed)


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    uninterrupted(tmp_path, save_strategy="steps", save_steps=2)
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-6"
    os.remove(tmp_path / "checkpoint-6" / "dam_state.pt")  # written last
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-4"
    with pytest.raises(ValueError, match=r"checkpoint-6' is no whole DAMTrainer checkpoint"):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS).train(f"{tmp_path}/checkpoint-6")


def test_another_number_of_trajectories_is_refused_before_any_work(tmp_path):
    uninterrupted(tmp_path, save_strategy="steps", save_steps=2)
    worked = []
    config = tiny_config(tmp_path, num_generations=4, num_iterations=6)
    again = DAMTrainer(tiny_model(), lambda **_: worked.append(1), config, ROWS)
    with pytest.raises(ValueError, match=r"groups of .*checkpoint-2' have 8 trajectories .* resume with the num_gen"):
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert not worked


def test_without_a_checkpoint_resuming_is_an_error(tmp_path):
    assert last_checkpoint(str(tmp_path / "nothing")) is None
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS).train(resume_from_checkpoint=True)


def test_training_twice_starts_afresh(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, max_steps=2), ROWS)
    trainer.train()
    trainer.train()
    assert trainer.reward_calls == 16
    assert len(trainer.progress.replay) == 2
