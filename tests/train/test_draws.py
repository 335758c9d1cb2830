"""What a run draws depends on (seed, step, prompt, trajectory, position) only, however the work is divided."""

import copy

import pytest
import torch

from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.models import MaskedLM
from dam.rollout import jump_log_prob, rollout
from dam.train import DAMTrainer
from dam.train.trainer import _Draw
from tests import covering
from tests.train.tiny import MASK, ROWS, rotary_model, sum_reward, tiny_config, tiny_model

PROMPTS = [{"prompt": [1 + n % 5] * (1 + n % 3), "name": n} for n in range(8)]  # of several lengths, so padded
WHOLE = {"prompts": 4, "replay_batch_size": 4, "draw_outcomes": None}
HALVES = {"prompts": 2, "replay_batch_size": 2, "gradient_accumulation_steps": 2}


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
        *covering.pairs(ESTIMATORS, NORMALIZERS, lambda e, n: {"estimator": e, "normalizer": n}),
        {"null_arm": True},
        {"num_orders": 3},
        {"base_generations": 3},
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
    config = tiny_config(tmp_path, max_steps=2, num_iterations=1, prompts=4, learning_rate=0.0)
    DAMTrainer(rotary_model(), reward, config, rows).train()
    # Of 5^7 outcomes that an untrained model finds about equally likely, 64 share one with probability 0.03.
    assert len(seen) == 64 and len(set(seen)) > 60


def test_the_last_trajectories_of_a_group_are_drawn_by_the_base(tmp_path):
    """As the base's own rollout draws them, and with the log ratio of base to model that the others have."""
    groups = []

    class Told(DAMTrainer):
        def _rolled_out(self, model, batch):
            groups.extend(super()._rolled_out(model, batch))
            return groups[:]

    base = tiny_model(seed=1)
    config = tiny_config(tmp_path, max_steps=1, prompts=1, base_generations=3, rollout_batch_size=4)
    trainer = Told(tiny_model(), sum_reward, config, [{"input_ids": [MASK] * 4}], ref_model=base)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    seed = trainer._seed(_Draw.ROLLOUT, step=0)
    process, (group,) = trainer.process, groups
    for drawer, rows in ((before, slice(0, 5)), (base, slice(5, 8))):
        row_ids = torch.arange(8)[rows]
        way = rollout(MaskedLM(drawer), torch.full((len(row_ids), 4), MASK), process, seed=seed, row_ids=row_ids)
        assert torch.equal(group["final"][rows], way.final) and torch.equal(group["position"][rows], way.position)
        model, other = (jump_log_prob(MaskedLM(each), way, process) for each in (before, base))
        torch.testing.assert_close(group["log_ratio"][rows], other - model, rtol=0, atol=1e-5)  # float32
    assert float(group["log_ratio"].abs().max()) > 0.01


def test_what_the_model_has_lost_comes_back(tmp_path):
    """Token 3 at e^-9 of what the base gives it: its own trajectories never show it, those of the base do."""
    found = []
    for base_generations in (0, 2):
        base, model = tiny_model(), tiny_model()
        with torch.no_grad():
            model.cls.predictions.bias[3] -= 9.0
        model.requires_grad_(False)
        model.cls.predictions.bias.requires_grad_(True)
        config = tiny_config(
            tmp_path, max_steps=60, base_generations=base_generations, learning_rate=0.3, full_tilt_from=0.0, beta=1.0
        )
        DAMTrainer(model, lambda completion_ids, **_: [0.0] * len(completion_ids), config, ROWS, ref_model=base).train()
        tokens = torch.tensor([row["input_ids"] for row in ROWS])
        with torch.no_grad():
            share = [each(input_ids=tokens).logits[..., 1:].softmax(dim=-1)[..., 2].mean() for each in (model, base)]
        found.append(float(share[0] / share[1]))
    # Up to what 60 noisy steps leave: 480 trajectories of 3 jumps, of which a fifth has the token.
    assert found[0] < 0.1 and 0.6 < found[1] < 1.6


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
    "decoding",
    [
        {},
        {"eval_remasking": "confidence"},
        {"eval_remasking": "entropy", "eval_threshold": 1.7, "eval_top_p": 0.98},
        {"eval_guidance": 0.5, "eval_top_k": 4},
    ],
    ids=str,
)
def test_evaluation_draws_each_row_apart_in_any_batch_size(tmp_path, decoding):
    """So that 64 samples of one prompt are 64 samples, at one a batch too."""
    rows = [{"input_ids": [1, *[MASK] * 7]}] * 32
    found = []
    for size in (32, 5, 1):
        config = tiny_config(tmp_path, per_device_eval_batch_size=size, eval_temperature=1.0, **decoding)
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
