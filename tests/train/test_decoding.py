"""Decoding in evaluation, and rows that end early in evaluation and training."""

import pytest
import torch
from tiny import MASK, ROWS, rotary_model, sum_reward, tiny_config

from dam.decoding import Decoding
from dam.models import MaskedLM
from dam.rollout import rollout
from dam.train import DAMTrainer, sampling

PROMPTS = [{"prompt": [5, 2]}, {"prompt": [4]}, {"prompt": [3, 3, 3]}, {"prompt": [2]}] * 4
STOP = [5, 4]


class Calls:
    """What the sampler asks of rollouts, without the tokens that end rows if `whole`; and rows of network calls."""

    def __init__(self, monkeypatch, whole=False):
        self.options, self.found, self.rows = [], [], []

        def recorded(denoiser, tokens, process, **options):
            self.options.append(options)
            options = {**options, "stop_tokens": ()} if whole else options
            self.found.append(rollout(denoiser, tokens, process, **options))
            return self.found[-1]

        monkeypatch.setattr(sampling, "rollout", recorded)

    def watch(self, model):
        model.register_forward_pre_hook(
            lambda module, args, given: self.rows.append(len(given["input_ids"])), with_kwargs=True
        )
        return model


def evaluated(tmp_path, monkeypatch, whole=False, **changes):
    """Completions that are rewarded, the mean reward and the predictions; and the calls."""
    seen, calls = [], Calls(monkeypatch, whole)

    def look(completion_ids, **_):
        seen.extend(completion_ids)
        return sum_reward(completion_ids)

    config = tiny_config(
        tmp_path, stop_token_ids=STOP, max_completion_length=6, eval_temperature=1.0, **{"block_length": 2, **changes}
    )
    trainer = DAMTrainer(rotary_model(), look, config, ROWS)
    trainer.predict(PROMPTS[:1])  # what is tried before the first call
    seen.clear(), calls.found.clear(), calls.options.clear()
    calls.watch(trainer.model)
    out = trainer.predict(PROMPTS)
    return seen, out, calls


@pytest.mark.parametrize(
    "decoding", [{}, {"block_length": None}, {"eval_remasking": "confidence", "eval_threshold": 0.3}], ids=str
)
def test_rows_end_early_in_evaluation_with_the_same_rewards(tmp_path, monkeypatch, decoding):
    monkeypatch.setattr(MaskedLM, "equal_rows", lambda *_: False)  # each row is run, and counted
    seen, out, calls = evaluated(tmp_path, monkeypatch, **decoding)
    expected, before, every = evaluated(tmp_path, monkeypatch, whole=True, **decoding)
    assert seen == expected and out.metrics["test_reward"] == before.metrics["test_reward"]
    assert sum(calls.rows) < sum(every.rows) and len({len(ids) for ids in seen}) > 2
    jumps = [(found.call.max(dim=1).values + 1).tolist() for found in calls.found]
    assert sum(calls.rows) == sum(map(sum, jumps))
    for ids, row, other in zip(seen, out.predictions, before.predictions, strict=True):
        length = len(row) - 6 + len(ids)
        assert row[:length].tolist() == other[:length].tolist() and MASK not in row
    # The last call may have filled something behind the end; the rest is the token that ended the row.
    for found in calls.found:
        filled = torch.zeros_like(found.final, dtype=torch.bool)
        rows, at = torch.nonzero(found.call >= 0, as_tuple=True)
        filled[rows, found.position[rows, at]] = True
        rest = found.final[(found.initial == MASK) & ~filled]
        assert len(rest) > 0 and set(rest.tolist()) <= set(STOP)


def test_a_prompt_s_tokens_end_nothing(tmp_path, monkeypatch):
    """Nor does anything in a sequence given as input_ids, in training either."""
    _, _, calls = evaluated(tmp_path, monkeypatch)
    assert all(bool((found.call >= 0).any(dim=1).all()) for found in calls.found)  # [5, 2] begins with a stop token
    calls = Calls(monkeypatch)
    config = tiny_config(tmp_path, stop_token_ids=STOP, block_length=1, eval_temperature=1.0, max_steps=1)
    rows = [{"input_ids": [4, *[MASK] * 7]}] * 8
    trainer = DAMTrainer(rotary_model(), sum_reward, config, rows)
    trainer.evaluate(rows)
    trainer.train()
    assert len(calls.found) == 3
    for found in calls.found:
        assert bool((found.call >= 0).all()) and bool((found.final[:, 1:-1] == 4).any())


def test_options_of_decoding_reach_the_rollouts_of_evaluation_only(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    options = {
        "eval_remasking": "entropy",
        "eval_threshold": 0.5,
        "eval_temperature": 0.7,
        "eval_top_k": 3,
        "eval_top_p": 0.9,
        "eval_guidance": 1.5,
    }
    config = tiny_config(tmp_path, diffusion_steps=2, max_steps=1, **options)
    trainer = DAMTrainer(rotary_model(), sum_reward, config, ROWS)
    trainer.evaluate(ROWS)
    expected = Decoding("entropy", 0.5, 0.7, 3, 0.9, 1.5)
    assert [given["decoding"] for given in calls.options] == [expected]
    assert calls.options[0]["steps"] is None  # the threshold tells how many a call fills
    calls.options.clear()
    trainer.train()
    assert len(calls.options) == 2  # the model's and the base's
    for given in calls.options:
        assert given["decoding"] is None and given["temperature"] == 1.0 and given["steps"] == 2


def test_thresholds_set_the_calls_of_evaluation(tmp_path, monkeypatch):
    for threshold, expected in ((0.0, 3), (1.1, 6)):
        _, _, calls = evaluated(
            tmp_path, monkeypatch, whole=True, eval_remasking="confidence", eval_threshold=threshold, diffusion_steps=1
        )
        assert [found.network_calls for found in calls.found] == [expected] * 2


@pytest.mark.parametrize("on_paths", [{"block_length": 1}, {"block_length": 2}, {"diffusion_steps": 3}], ids=str)
def test_training_at_states_of_paths_is_the_same_with_rows_that_end(tmp_path, monkeypatch, on_paths):
    """While the model is its base, so that what is behind an end adds no noise to the weights."""
    weights, rows, groups = [], [], []
    for whole in (False, True):
        calls = Calls(monkeypatch, whole)
        config = tiny_config(
            tmp_path,
            stop_token_ids=STOP,
            max_completion_length=6,
            num_generations=16,
            base_generations=2,
            max_steps=2,
            num_orders=2 if on_paths == {"block_length": 1} else 1,
            **on_paths,
        )
        trainer = DAMTrainer(rotary_model(), sum_reward, config, PROMPTS[:4])
        calls.watch(trainer.model)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        rows.append(sum(calls.rows))
        groups.append(trainer.progress.replay.batch(torch.arange(2)))
        logged = [entry for entry in trainer.state.log_history if "kl_path" in entry]
        assert logged[0]["kl_path"] == 0 and logged[0]["order_variance"] < 1e-10
    assert rows[0] < rows[1]
    ended, whole = groups
    made = ended["call"] >= 0
    assert not bool(made.all()) and bool((whole["call"] >= 0).all())
    assert torch.equal(ended["position"][made], whole["position"][made])
    torch.testing.assert_close(ended["weight"], whole["weight"], rtol=1e-5, atol=0)
    moved = rotary_model().state_dict()
    for name, value in weights[0].items():
        # Adam divides by what may be small; steps were of 1e-2.
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-4)
    assert any(float((value - moved[name]).abs().max()) > 5e-3 for name, value in weights[0].items())


def test_outcomes_that_are_re_masked_are_drawn_whole(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    config = tiny_config(tmp_path, stop_token_ids=STOP, max_completion_length=6, max_steps=1)
    trainer = DAMTrainer(rotary_model(), sum_reward, config, PROMPTS[:4])
    trainer.train()
    assert all(bool((found.call >= 0).all()) for found in calls.found)
