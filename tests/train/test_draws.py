"""What a run draws depends on (seed, step, prompt, trajectory, position) only, however the work is divided."""

import itertools

import pytest
import torch

from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.train import DAMTrainer
from tests.train.tiny import MASK, ROWS, rotary_model, sum_reward, tiny_config

PROMPTS = [{"prompt": [1 + n % 5] * (1 + n % 3), "name": n} for n in range(8)]  # of several lengths, so padded
WHOLE = {"per_device_train_batch_size": 4, "replay_batch_size": 4, "draw_outcomes": None}
HALVES = {"per_device_train_batch_size": 2, "replay_batch_size": 2, "gradient_accumulation_steps": 2}


def run(output, **changes):
    """The completions of each rollout, by prompt, and the model's weights after 4 steps."""
    rollouts = []

    def reward(completion_ids, name, **_):
        rollouts.append(sorted(zip(name, completion_ids, strict=True)))
        return sum_reward(completion_ids)

    # Under SGD weights differ by what gradients do; Adam would divide rounding by itself.
    config = tiny_config(output, max_steps=4, optim="sgd", learning_rate=0.1, **(WHOLE | changes))
    trainer = DAMTrainer(rotary_model(), reward, config, PROMPTS)
    trainer.train()
    return rollouts, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_same_run(one, other):
    assert one[0] == other[0] and len(one[0]) == 2
    # Sums in another order: a few roundings of gradients below 1; another draw moves weights by 1e-3.
    torch.testing.assert_close(one[1], other[1], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        *({"estimator": e, "normalizer": n} for e, n in itertools.product(ESTIMATORS, NORMALIZERS)),
        {"null_arm": True},
        {"num_orders": 3},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_how_the_work_is_divided_changes_no_draw(tmp_path, changes):
    whole = run(tmp_path, **changes)
    assert_same_run(whole, run(tmp_path, rollout_batch_size=5, **changes))
    assert_same_run(whole, run(tmp_path, **HALVES, **changes))
    other = run(tmp_path, seed=43, **changes)
    assert whole[0] != other[0] and float((whole[1] - other[1]).abs().max()) > 1e-3


def test_drawn_outcomes_are_those_of_the_whole_step(tmp_path):
    whole = run(tmp_path, draw_outcomes=8)
    assert_same_run(whole, run(tmp_path, **{**HALVES, "draw_outcomes": 4}))
    assert float((whole[1] - run(tmp_path)[1]).abs().max()) > 1e-3


def test_trajectories_of_a_group_and_of_equal_prompts_are_drawn_apart(tmp_path):
    seen = []

    def reward(completion_ids, **_):
        seen.extend(map(tuple, completion_ids))
        return sum_reward(completion_ids)

    rows = [{"input_ids": [1, *[MASK] * 7]}] * 8
    config = tiny_config(tmp_path, max_steps=2, num_iterations=1, per_device_train_batch_size=4, learning_rate=0.0)
    DAMTrainer(rotary_model(), reward, config, rows).train()
    # Of 5^7 outcomes that an untrained model finds about equally likely, 64 share one with probability 0.03.
    assert len(seen) == 64 and len(set(seen)) > 60


def test_data_seed_orders_the_prompts(tmp_path):
    first, other, same = (run(tmp_path, **changes)[0][0] for changes in ({}, {"data_seed": 1}, {"data_seed": 42}))
    assert same == first and [name for name, _ in first] != [name for name, _ in other]


def evaluated(trainer, rows):
    seen = []
    trainer.reward_funcs[0] = lambda completion_ids, **_: (
        seen.extend(map(tuple, completion_ids)) or sum_reward(completion_ids)
    )
    return trainer.evaluate(rows)["eval_reward"], tuple(seen)


@pytest.mark.parametrize(
    "decoding", [{"eval_temperature": 1.0}, {"eval_temperature": 1.0, "eval_remasking": "confidence"}]
)
def test_evaluation_draws_each_row_apart_in_any_batch_size(tmp_path, decoding):
    """So that 64 samples of one prompt are 64 samples, at one a batch too."""
    rows = [{"input_ids": [1, *[MASK] * 7]}] * 32
    found = []
    for size in (32, 5, 1):
        config = tiny_config(tmp_path, per_device_eval_batch_size=size, **decoding)
        found.append(evaluated(DAMTrainer(rotary_model(), sum_reward, config, ROWS), rows))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][1])) > 28  # as above


@pytest.mark.parametrize("redraw", [False, True])
def test_evaluations_differ_only_if_asked(tmp_path, redraw):
    rows = [{"input_ids": [1, *[MASK] * 7]}] * 8
    config = tiny_config(tmp_path, eval_temperature=1.0, eval_redraw=redraw, learning_rate=0.0, max_steps=2)
    trainer = DAMTrainer(rotary_model(), sum_reward, config, ROWS)
    before, again = evaluated(trainer, rows), evaluated(trainer, rows)
    trainer.train()
    after = evaluated(trainer, rows)
    assert before == again and (after != before) == redraw
