"""What VGG-Flow's value has of a run: its share of the states, its own decay and dropout, and errors of the reward."""

import pytest
import torch
from flow_tiny import ROWS, Network, near_goal, tiny_config
from torch import nn

from dam.train import FlowTrainer, RewardError


class Value(nn.Module):
    """The residual of a value's gradient, with dropout and a norm; counts how it is called."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.modes = []

    def forward(self, state, time, goal):
        self.modes.append((self.training, torch.is_grad_enabled(), len(state)))
        return self.layers(torch.cat((state, time[:, None], goal[:, None]), dim=1))


def trained(output, value, reward=near_goal, evaluated=None, **changes):
    config = tiny_config(output, learner="vgg_flow", **{"max_steps": 1} | changes)
    trainer = FlowTrainer(Network(), reward, config, ROWS, evaluated, shape=(3,), value=value)
    trainer.train()
    return trainer


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_value_decays_as_the_model_does(tmp_path, decay):
    """Weights by weight_decay, biases and norms not at all: as of transformers' own groups, and not AdamW's 0.01."""
    value = Value()
    trainer = trained(tmp_path, value, weight_decay=decay)
    of_each = {id(each): group["weight_decay"] for group in trainer.optimizer.param_groups for each in group["params"]}
    for name, each in value.named_parameters():
        assert of_each[id(each)] == (decay if name in ("layers.0.weight", "layers.4.weight") else 0.0)


def test_targets_are_made_of_the_value_without_dropout(tmp_path):
    """Its loss has dropout, as the model's; with disable_dropout there is none."""
    value = Value(dropout=0.5)
    trained(tmp_path, value)
    with_gradient = {training for training, gradient, _ in value.modes[4:] if gradient}
    without = [training for training, gradient, count in value.modes if not gradient]
    assert without == [False] and True in with_gradient
    still = Value(dropout=0.5)
    trained(tmp_path, still, disable_dropout=True)
    assert still.layers[3].p == 0.0


def test_a_pass_takes_its_part_of_the_ends(tmp_path):
    """Of 4 paths' ends and 24 targets in passes of 6: each end once in a rollout of 4 passes, and no more at once."""
    value = Value()
    trained(
        tmp_path,
        value,
        forward_looking=False,
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=6,
    )
    assert {count for *_, count in value.modes} <= {1, 2, 6}  # of ends, of the trial, of targets
    assert sum(count == 1 for *_, count in value.modes) == 4


class BadAt:
    """The reward, but its n-th call raises, or is not a number for a path; or from then on it has no gradient."""

    def __init__(self, n, how):
        self.left, self.how = n, how

    def __call__(self, state, goal, name):
        self.left -= 1
        value = near_goal(state, goal, name)
        if self.left > 0 or (self.left < 0 and self.how != "slope"):
            return value
        if self.how == "slope":  # a root at 0: a number, and no gradient; from here on
            return value - (state[:, 0] * 0).abs().sqrt()
        if self.how == "raises":
            raise ConnectionError("the judge is away")
        return torch.where(torch.arange(len(value)) == 2, torch.nan, value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "the reward 'BadAt' raised ConnectionError: the judge is away. The rollouts of step 0 are kept in"),
        ("nan", "the reward 'BadAt' is nan at path 2, row id ., and not finite at 1 of 8. The rollouts of step 0"),
        ("slope", "the reward 'BadAt': the gradient of the cost is not finite at row 0, .* The rollouts of step 0"),
    ],
)
def test_a_reward_that_misbehaves_within_the_value_is_named(tmp_path, how, message):
    """Where torch.func differentiates it: the states are kept as of any other call."""
    reward = BadAt(10**9, how)
    before = trained(tmp_path / "whole", Value(), reward)
    calls = 10**9 - reward.left
    assert before.reward_calls > 0
    reward = BadAt(calls - 3, how)  # of the loss: the last call is of the ends
    with pytest.raises(RewardError, match=message):
        trained(tmp_path, Value(), reward)
    kept = torch.load(tmp_path / "failed_rollouts.pt")
    assert kept["states"].shape == (8, 3) and kept["row_ids"].shape == (8,) and len(kept["columns"]["name"]) == 8


def test_the_value_of_the_best_step_goes_with_its_model(tmp_path):
    value = Value()
    trainer = trained(
        tmp_path, value, evaluated=ROWS, max_steps=3, learning_rate=0.5, lr_scheduler_type="constant",
        load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=False,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    last = torch.load(f"{tmp_path}/checkpoint-3/dam_value.pt", weights_only=True)
    kept = torch.load(f"{best}/dam_value.pt", weights_only=True)
    assert not best.endswith("-3") and not torch.equal(kept["layers.0.weight"], last["layers.0.weight"])
    assert all(torch.equal(each, kept[name]) for name, each in value.state_dict().items())
