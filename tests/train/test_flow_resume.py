"""A run of FlowTrainer that was stopped, or that an error ended, continues to the weights of one that was not.

Weights are compared bitwise: every random choice depends on seed, step and row only, so nothing may differ.
"""

import pytest
import torch
from flow_tiny import ROWS, Network, direct, near_goal, tiny_config
from tiny import assert_same_weights, logged
from transformers import TrainerCallback

from dam.flows import FlowProcess, Trigonometric
from dam.train import FlowTrainer, RewardError, last_checkpoint


def run(output, reward=near_goal, resume=None, dropout=0.0, seed=0, callbacks=None, value=False, **changes):
    model = Network(seed, dropout)
    given = {name: changes.pop(name) for name in ("process",) if name in changes}
    if seed:
        given["ref_model"] = Network()
    if value:
        given["value"] = Network(seed + 1)
    trainer = FlowTrainer(model, reward, tiny_config(output, **changes), ROWS, ROWS[:2], callbacks, shape=(3,), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 5, "dropout": 0.2},  # into the second epoch, whose rows come in another order
        {
            "max_steps": 5,
            "num_iterations": 3,
            "gradient_accumulation_steps": 2,
            "matched_times": 3,
            "rollout_batch_size": 3,
            "ema_decay": 0.5,
        },
        pytest.param({"max_steps": 3, **direct("draft", draft_steps=2)}, marks=pytest.mark.full),
        {"max_steps": 3, "learner": "vgg_flow", "value": True, "diffusion_steps": 4},
        pytest.param({"max_steps": 3, **direct("draft", recompute=False)}, marks=pytest.mark.full),
        pytest.param({"max_steps": 3, **direct("refl", gradient_accumulation_steps=2)}, marks=pytest.mark.full),
    ],
    ids=["dropout", "parts", "draft", "value", "draft whole", "refl"],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, changes):
    whole = run(tmp_path, save_strategy="steps", save_steps=1, **changes)
    last = whole.state.max_steps
    for step in {last - 1} if changes.get("value") else {1, last - 1}:
        again = run(tmp_path, seed=step, resume=f"{tmp_path}/checkpoint-{step}", **changes)
        assert_same_weights(whole.model, again.model)
        if changes.get("value"):
            assert_same_weights(whole.value, again.value)
        assert logged(again) == logged(whole) and again.reward_calls == whole.reward_calls
    # Between two rollouts there is nothing to keep.
    state = torch.load(tmp_path / f"checkpoint-{whole.args.num_iterations}" / "dam_state.pt", weights_only=True)
    assert state["replay"] == {"groups": []}


class BadAt:
    """The reward, but its n-th call in a run raises, or is not a number for a path."""

    def __init__(self, n, how):
        self.left, self.how = n + 1, how  # the first is the trial before the run

    def __call__(self, state, goal, name):
        self.left -= 1
        value = near_goal(state, goal, name)
        if self.left != 0:
            return value
        if self.how == "raises":
            raise ConnectionError("the judge is away")
        if self.how == "slope":  # a root at 0: a number, and no gradient
            return value - (state[:, 0] * 0).abs().sqrt()
        return torch.where(torch.arange(len(value)) == 2, torch.nan, value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "the reward 'BadAt' is nan at path 2, row id ., and not finite at 1 of 4. The rollouts of step 2"),
        pytest.param("raises", "the reward 'BadAt' raised ConnectionError: the judge is away", marks=pytest.mark.full),
        pytest.param("slope", "the gradient of the cost is not finite at row 0", marks=pytest.mark.full),
    ],
)
def test_a_mended_reward_loses_nothing(tmp_path, how, message):
    changes = {"max_steps": 4, "rollout_batch_size": 4}
    with pytest.raises(RewardError, match=message):
        run(tmp_path, BadAt(2, how), **changes)
    kept = torch.load(tmp_path / "failed_rollouts.pt")
    assert kept["states"].shape == (4, 3) and kept["step"] == 2 and len(kept["columns"]["name"]) == 4
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-2"
    again = run(tmp_path, resume=True, **changes)
    assert_same_weights(run(tmp_path / "whole", **changes).model, again.model)


class Spoils(TrainerCallback):
    """Has an update end in weights that are no numbers."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.layers[3].weight.mul_(torch.inf)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, r"simulate: row \d is not finite at time .* the model has diverged, or steps are too long"),
        (3, "the loss of step 3 is (inf|nan): the run has diverged. Go on from an earlier checkpoint"),
    ],
    ids=["paths", "loss"],
)
def test_a_step_that_diverges_is_named_and_saved(tmp_path, step, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, callbacks=[Spoils(step)], save_strategy="steps", save_steps=1)
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-{step}"


@pytest.mark.full
def test_a_value_goes_with_its_checkpoint(tmp_path):
    given = {"max_steps": 1, "learner": "vgg_flow", "save_strategy": "steps", "save_steps": 1}
    run(tmp_path, **given)
    with pytest.raises(ValueError, match="is of a run without a value: resume with what it was saved with"):
        run(tmp_path, value=True, resume=True, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "vgg_flow"}, "learner adjoint_matching, now vgg_flow"),
        ({"beta": 0.25}, "beta 0.5, now 0.25"),
        ({"process": FlowProcess(predicts="data")}, "predicts velocity, now data"),
        ({"process": FlowProcess(Trigonometric())}, "schedule .*, now "),
    ],
)
def test_targets_are_gone_on_with_as_what_they_were_made(tmp_path, changes, message):
    run(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=rf"checkpoint-1' is of within a rollout, .* were made with {message}"):
        run(tmp_path, resume=f"{tmp_path}/checkpoint-1", **changes)
    if "beta" in changes:  # where a rollout begins there are none
        assert run(tmp_path, resume=f"{tmp_path}/checkpoint-2", **changes).state.global_step == 6


def test_a_checkpoint_of_another_model_or_trainer_is_refused(tmp_path):
    run(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    state = torch.load(tmp_path / "checkpoint-1" / "dam_state.pt", weights_only=True)
    (group,) = state["replay"]["groups"]
    for changed in ({**group, "state": group["state"][:, :2]}, {"weight": group["weight"]}):
        torch.save({**state, "replay": {"groups": [changed]}}, tmp_path / "checkpoint-1" / "dam_state.pt")
        with pytest.raises(ValueError, match=r"checkpoint-1' has no targets for states of shape \(3,\)"):
            run(tmp_path, resume=f"{tmp_path}/checkpoint-1")
