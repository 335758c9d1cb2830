"""An average of the weights: what it is, and that evaluation, saving, resuming and the end of a run go by it."""

import pytest
import torch
from peft import LoraConfig
from tiny import ROWS, assert_same_weights, sum_reward, tiny_config, tiny_model
from transformers import BertForMaskedLM, TrainerCallback

from dam.train import DAMTrainer
from dam.train.average import WeightAverage

SAVED = {"save_strategy": "steps", "save_steps": 1}


class Recorder(TrainerCallback):
    """The trained parameters at the start and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen = [snapshot(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(snapshot(model))


def snapshot(model):
    return {name: each.detach().double().clone() for name, each in model.named_parameters() if each.requires_grad}


def averaged(seen, decay):
    average = seen[0]
    for n, weights in enumerate(seen[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * weights[name] for name in average}
    return average


def run(output, model=None, resume=None, peft_config=None, **changes):
    recorder = Recorder()
    config = tiny_config(output, **{"ema_decay": 0.3, **changes})
    trainer = DAMTrainer(
        model or tiny_model(), sum_reward, config, ROWS, ROWS * 4, callbacks=[recorder], peft_config=peft_config,
        ref_model=tiny_model() if resume else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder.seen


@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_ends_as_the_average_of_what_was_trained(tmp_path, adapter):
    """d = 1/10, 2/11, 3/12, then 0.3; rounding of float32 over six steps."""
    lora = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0) if adapter else None
    trainer, seen = run(tmp_path, peft_config=lora)
    expected, found = averaged(seen, 0.3), snapshot(trainer.model)
    assert found.keys() == expected.keys() and all("lora" in name for name in found) == adapter
    moved = max(float((found[name] - seen[-1][name]).abs().max()) for name in found)
    assert moved > 5e-4
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=2.0**-20, atol=2.0**-22)


def test_training_and_rollouts_are_those_without_an_average(tmp_path):
    _, with_average = run(tmp_path)
    _, without = run(tmp_path, ema_decay=None)
    assert all(
        torch.equal(one[name], other[name]) for one, other in zip(with_average, without, strict=True) for name in one
    )


def test_what_is_evaluated_and_saved_is_the_average(tmp_path):
    """At step 3; the model goes on with its own weights."""
    trainer, seen = run(
        tmp_path, **SAVED, eval_strategy="steps", eval_steps=3, eval_temperature=1.0, learning_rate=0.3, ema_decay=0.9
    )
    expected = averaged(seen[:4], 0.9)
    saved = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-3")
    for name, value in snapshot(saved).items():
        torch.testing.assert_close(value, expected[name], rtol=2.0**-20, atol=2.0**-22)
    logged = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    again = DAMTrainer(saved, sum_reward, tiny_config(tmp_path, eval_temperature=1.0), ROWS)
    assert again.evaluate(ROWS * 4)["eval_reward"] == pytest.approx(logged[0], abs=1e-12)


def test_a_resumed_run_ends_with_the_same_average_bit_for_bit(tmp_path):
    trainer, seen = run(tmp_path, **SAVED)
    for step in (1, 4):
        again, later = run(tmp_path / "again", model=tiny_model(seed=step), resume=f"{tmp_path}/checkpoint-{step}")
        assert_same_weights(trainer.model, again.model)
        assert all(torch.equal(seen[-1][name], later[-1][name]) for name in later[-1])


def test_an_average_is_kept_in_float32_where_weights_are_in_bfloat16(tmp_path):
    """So that it is rounded once, by up to half a last place, and not after each of six steps."""
    trainer, seen = run(tmp_path, model=tiny_model().bfloat16())
    expected = averaged(seen, 0.3)
    for name, found in trainer.model.named_parameters():
        torch.testing.assert_close(found.detach().double(), expected[name], rtol=1.001 * 2.0**-8, atol=1e-7)


@pytest.mark.parametrize("saved_with", [None, 0.3])
def test_a_run_with_an_average_is_resumed_as_one_and_no_other(tmp_path, saved_with):
    run(tmp_path, ema_decay=saved_with, **SAVED, max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1' is of a run with(out)? ema_decay.* resume with the setting"):
        run(tmp_path, ema_decay=None if saved_with else 0.3, resume=f"{tmp_path}/checkpoint-1")


def test_the_best_weights_are_the_best_average(tmp_path):
    scores = iter([3.0, 2.0, 1.0])
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = tiny_config(tmp_path, ema_decay=0.3, **steps, load_best_model_at_end=True, metric_for_best_model="score")
    trainer = DAMTrainer(
        tiny_model(), sum_reward, config, ROWS, ROWS[:2], compute_metrics=lambda _: {"score": next(scores)}
    )
    trainer.train()
    assert_same_weights(trainer.model, BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-2"))


def test_what_fails_half_way_leaves_the_weights_and_is_what_is_raised():
    """No memory for a copy of an average: other processes may be elsewhere, which only that error tells."""

    class NoMemory:
        def to(self, *_):
            raise torch.OutOfMemoryError

    model = tiny_model()
    average = WeightAverage(model, 0.5)
    average.on_train_begin(None, None, None)
    before = [parameter.clone() for parameter in model.parameters()]
    average._averages = {name: value + 1 for name, value in average._averages.items()}
    average._averages[list(average._averages)[2]] = NoMemory()
    with pytest.raises(torch.OutOfMemoryError), average.in_place():
        pass
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
