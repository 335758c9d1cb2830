"""DAMTrainer: that it learns, what reward functions are given, what is logged, and prompts of different length."""

import contextlib
import math
import warnings

import pytest
import torch
from peft import LoraConfig
from tiny import MASK, ROWS, VOCABULARY, assert_same_weights, rotary_model, sum_reward, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from dam import diagnostics
from dam.models import MaskedLM, Tabular, as_denoiser
from dam.rollout import PathLogProbs
from dam.train import DAMTrainer
from tests import oracle
from tests.architectures import small_sizes
from tests.ops.helpers import default_dtype, largest_bytes

WORDS = ["[MASK]", "[PAD]", "a", "b", "c", "d"]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]")


def fives(completion_ids, **_):
    """The fraction of fives among the three positions that are filled in."""
    return [sum(token == 5 for token in ids[-3:]) / 3 for ids in completion_ids]


def rewards(trainer):
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


# Trained


@pytest.mark.parametrize("null_arm", [False, True])
def test_the_reward_goes_up_but_not_in_the_null_arm(tmp_path, null_arm):
    config = tiny_config(
        tmp_path,
        null_arm=null_arm,
        num_generations=16,
        prompts=8,
        max_steps=60,
        replay_size=16,
        replay_batch_size=16,
        logging_steps=10,
    )
    trainer = DAMTrainer(tiny_model(), fives, config, ROWS)
    trainer.train()
    history = rewards(trainer)
    # The untrained model draws each of the five tokens about equally often.
    assert history[0] < 0.5
    if null_arm:
        # Permuted weights have mean 1 and know nothing of the reward: what is left is drift.
        assert history[-1] < 0.5
    else:
        assert history[-1] > 0.85


def test_the_base_does_not_move(tmp_path):
    base = tiny_model()
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS, ref_model=base)
    trainer.train()
    assert_same_weights(base, tiny_model())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(AssertionError):
        assert_same_weights(trainer.model, tiny_model())


def test_no_weight_falls_on_what_is_forbidden(tmp_path):
    def no_fives(completion_ids, **_):
        return [-math.inf if 5 in ids else 0.0 for ids in completion_ids]

    config = tiny_config(tmp_path, num_generations=16, max_steps=60, prompts=8, logging_steps=10)
    trainer = DAMTrainer(tiny_model(), [no_fives, fives], config, ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    # A third of all positions would be at stake; the base draws a five in one of five.
    tokens = torch.tensor([row["input_ids"] for row in ROWS * 16])
    final = trainer.sampler.rollout(
        trainer.model, tokens, torch.ones(128, 4), seed=1, row_ids=torch.arange(128), temperature=1.0
    ).final
    assert float((final[:, 1:] == 5).double().mean()) < 0.05


def test_gradient_accumulation_sees_a_mean_of_losses(tmp_path):
    """The gradient of two accumulated batches is the mean of theirs, so that the loss logged does not double."""
    logged = []
    for steps in (1, 2):
        config = tiny_config(
            tmp_path, gradient_accumulation_steps=steps, learning_rate=0.0, max_steps=4, logging_steps=1
        )
        trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logged.append(sum(losses) / len(losses))
    # Losses of an untrained model vary by a few per cent around log 5; doubling would be 100 per cent.
    assert logged[1] == pytest.approx(logged[0], rel=0.3)


# What reward functions see


def seen_by_reward(tmp_path, rows, **options):
    seen = []

    def look(**arguments):
        seen.append(arguments)
        return sum_reward(**arguments)

    trainer = DAMTrainer(rotary_model(), look, tiny_config(tmp_path, max_steps=1), rows, **options)
    trainer.train()
    return seen[0]


def test_with_input_ids_a_completion_is_the_whole_sequence(tmp_path):
    rows = [{"input_ids": [n, MASK, 4, MASK], "labels": [n, 2, 4, 2], "name": f"row {n}"} for n in (1, 2)]
    seen = seen_by_reward(tmp_path, rows)
    assert set(seen) == {"prompts", "completions", "completion_ids", "trainer_state", "labels", "name"}
    assert len(seen["prompts"]) == 2 * 8
    assert seen["completions"] == seen["completion_ids"]  # no tokenizer to decode with
    for prompt, completion, labels, name in zip(
        seen["prompts"], seen["completion_ids"], seen["labels"], seen["name"], strict=True
    ):
        first = prompt[0]
        assert prompt == [first, MASK, 4, MASK]
        assert (completion[0], completion[2]) == (first, 4)
        assert MASK not in completion
        assert labels == [first, 2, 4, 2]
        assert name == f"row {first}"
    # The trajectories of a prompt come one after another.
    assert seen["name"][0] == seen["name"][7] != seen["name"][8]


def test_with_token_prompts_a_completion_is_what_follows(tmp_path):
    rows = [{"prompt": [1, 2, 3], "answer": 6}, {"prompt": [4], "answer": 4}]
    seen = seen_by_reward(tmp_path, rows)
    assert set(seen) == {"prompts", "completions", "completion_ids", "trainer_state", "answer"}
    assert sorted(map(tuple, seen["prompts"])) == [(1, 2, 3)] * 8 + [(4,)] * 8
    assert [sum(prompt) for prompt in seen["prompts"]] == seen["answer"]
    assert all(len(ids) == 3 and MASK not in ids for ids in seen["completion_ids"])


def test_with_text_prompts_completions_are_text(tmp_path, tokenizer):
    rows = [{"prompt": "a b a"}, {"prompt": "d"}]
    seen = seen_by_reward(tmp_path, rows, processing_class=tokenizer)
    assert sorted(set(seen["prompts"])) == ["a b a", "d"]
    for text, ids in zip(seen["completions"], seen["completion_ids"], strict=True):
        assert len(ids) == 3
        assert text == " ".join(WORDS[token] for token in ids if token != tokenizer.pad_token_id)


def test_behind_a_conversation_completions_are_messages(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}d{% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": words}]} for words in ("a b a", "b")]
    seen = seen_by_reward(tmp_path, rows, processing_class=tokenizer)
    assert all(prompt in [row["prompt"] for row in rows] for prompt in seen["prompts"])
    for (message,), ids in zip(seen["completions"], seen["completion_ids"], strict=True):
        assert message == {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}


@pytest.mark.parametrize("normalizer", ["group", "state"])
def test_only_tokens_of_the_tokenizer_are_drawn_and_none_that_is_suppressed(tmp_path, tokenizer, normalizer):
    """A head of 70 rows beside a tokenizer of 6 ids: in training and in evaluation, by model and base."""
    model = rotary_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    seen = []

    def look(completion_ids, **_):
        seen.extend(token for ids in completion_ids for token in ids)
        return sum_reward(completion_ids)

    config = tiny_config(
        tmp_path,
        normalizer=normalizer,
        suppress_tokens=[1, 4],
        stop_token_ids=[],
        eval_temperature=1.0,
        learning_rate=0.0,
        logging_steps=1,
    )
    rows = [{"prompt": [4, 69]}, {"prompt": "a"}] * 2
    trainer = DAMTrainer(model, look, config, rows, processing_class=tokenizer)
    trainer.train()
    assert set(seen) == {2, 3, 5}
    seen.clear()
    trainer.evaluate(rows * 4)
    assert set(seen) == {2, 3, 5}
    # Nothing was learned: model and base give what was drawn the same probability.
    for name in ("kl_path", "kl_outcome"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert logged and not any(logged), name


@pytest.mark.parametrize("normalizer", ["group", "state"])
def test_what_follows_an_end_is_neither_rewarded_nor_trained_on(tmp_path, normalizer):
    """Not what a prompt holds; and of what the states show, since an end that is still masked tells nothing."""
    seen = []

    def look(completion_ids, **_):
        seen.extend(completion_ids)
        return sum_reward(completion_ids)

    config = tiny_config(
        tmp_path, normalizer=normalizer, stop_token_ids=[5, 4], max_completion_length=5, num_generations=16
    )
    rows = [{"prompt": [5, 2]}, {"prompt": [4]}] * 2
    trainer = DAMTrainer(rotary_model(), look, config, rows)
    trainer.train()
    assert {len(ids) for ids in seen} == {1, 2, 3, 4, 5}
    assert not any({4, 5} & set(ids[:-1]) for ids in seen)
    assert all(len(ids) == 5 or ids[-1] in (4, 5) for ids in seen)
    groups, names = trainer.progress.replay.batch(torch.arange(6)), torch.arange(6)
    every, targets = trainer._estimated(groups, names), trainer._targets(groups, names)
    start = targets.states.shape[1] - 5

    def behind(row, position):
        return bool({4, 5} & set(targets.states[row, start:position].tolist()))

    pairs = [list(zip(t.row.tolist(), t.position.tolist(), strict=True)) for t in (every, targets)]
    assert pairs[1] == [pair for pair in pairs[0] if not behind(*pair)] and len(pairs[1]) < len(pairs[0])


def test_a_sequence_that_is_filled_in_has_no_end(tmp_path, tokenizer):
    tokenizer.eos_token = "d"
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS, processing_class=tokenizer)
    trainer.train()
    groups, names = trainer.progress.replay.batch(torch.arange(6)), torch.arange(6)
    assert bool((groups["states"][:, 0] == 5).any() or (groups["final"] == 5).any())
    every, targets = trainer._estimated(groups, names), trainer._targets(groups, names)
    assert all(torch.equal(a, b) for a, b in zip(every, targets, strict=True))


def test_text_prompts_need_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="string prompts need a tokenizer"):
        seen_by_reward(tmp_path, [{"prompt": "a"}] * 2)


def test_a_row_needs_a_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"needs input_ids or prompt; this one has \['question'\]"):
        seen_by_reward(tmp_path, [{"question": "a"}] * 2)


# Prompts of different length


def architectures():
    common = small_sizes(VOCABULARY)
    torch.manual_seed(0)
    rotary = ModernBertForMaskedLM(
        ModernBertConfig(**common, cls_token_id=None, sep_token_id=None, attn_implementation="sdpa")
    )
    by_pad_token = RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**common, initializer_range=0.5))
    return {"rotary": rotary, "by pad token": by_pad_token}


@pytest.mark.parametrize("kind", ["rotary", "by pad token"])
@pytest.mark.parametrize("steps", [None, 2])
def test_padding_does_not_change_a_completion(tmp_path, tokenizer, kind, steps):
    """The likeliest completion of a prompt is the same alone and next to a longer prompt."""
    seen = []

    def look(completion_ids, **_):
        seen.append(completion_ids)
        return sum_reward(completion_ids)

    config = tiny_config(tmp_path, eval_remasking="confidence", diffusion_steps=steps, per_device_eval_batch_size=8)
    trainer = DAMTrainer(architectures()[kind], look, config, ROWS, processing_class=tokenizer)
    prompts = [[2], [3, 4, 5, 2, 3, 3], [4, 2], [5, 5, 5], [3]]
    trainer.evaluate([{"prompt": prompt} for prompt in prompts])
    for prompt in prompts:
        trainer.evaluate([{"prompt": prompt}])
    together, *alone = seen
    assert together == [ids for (ids,) in alone]


def test_padding_does_not_move_blocks(tmp_path, tokenizer):
    """Otherwise the order in which a completion is filled in would depend on the longest prompt of its batch."""
    trainer = DAMTrainer(
        rotary_model(), sum_reward, tiny_config(tmp_path, block_length=2), ROWS, processing_class=tokenizer
    )

    def filled_last(longest):
        batch = trainer.data_collator([{"prompt": [5]}] * 40 + [{"prompt": [2] * longest}])
        way = trainer.sampler.rollout(
            trainer.model, batch["input_ids"], batch["attention_mask"], seed=0, row_ids=batch["number"]
        )
        return set((way.position[:40, -1] - batch["input_ids"].shape[1]).tolist())

    # 40 orders: a place that is last in half of them is missed once in 2^40.
    assert filled_last(1) == filled_last(2) == filled_last(3) == filled_last(4)


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize("normalizer", ["group", "state"])
def test_padding_is_never_filled_in(tmp_path, tokenizer, with_tokenizer, normalizer):
    config = tiny_config(tmp_path, normalizer=normalizer, max_steps=4, prompts=4)
    rows = [{"prompt": [2, 3, 4]}, {"prompt": [5]}] * 2
    trainer = DAMTrainer(
        rotary_model(), sum_reward, config, rows, processing_class=tokenizer if with_tokenizer else None
    )
    trainer.train()
    groups = trainer.progress.replay.batch(torch.arange(6))
    padding = groups["attention_mask"] == 0
    assert padding.any()
    assert not (trainer.process.masked(groups["states"]) & padding).any()
    start = padding.sum(dim=1)[:, None]
    assert (groups["first"] > start).all()  # a prompt has at least one token


# Logged and evaluated


def test_what_is_logged(tmp_path):
    config = tiny_config(tmp_path, full_tilt_from=None, base_generations=0)
    trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {
        "reward",
        "reward_std",
        "tilt",
        "rewards/sum_reward/mean",
        "reward_calls",
        *diagnostics.Diagnostics._fields,
    }
    assert all(names <= set(entry) for entry in entries)
    assert [entry["reward_calls"] for entry in entries] == [16, 32, 48]
    # The first rollout is the base's.
    assert entries[0]["kl_path"] == entries[0]["kl_outcome"] == entries[0]["order_variance"] == 0
    # Bisection ends where the effective sample size is the one asked for (float32 in what is logged).
    assert all(entry["ess"] >= 4.0 * (1 - 1e-6) for entry in entries)


def test_lengths_and_rewards_are_logged_by_trl_s_names(tmp_path):
    """Of the seven completions of each prompt that the model draws; the eighth is the base's."""
    seen = []

    def look(completion_ids, **_):
        seen[:] = completion_ids
        return sum_reward(completion_ids)

    def some(completion_ids, **_):
        return [None if n % 8 < 4 else float(n) for n in range(len(completion_ids))]

    def by_prompt(prompts, **_):
        return [float(prompt[0]) for prompt in prompts]

    config = tiny_config(
        tmp_path, stop_token_ids=[5], max_completion_length=4, max_steps=1, logging_steps=1, base_generations=1
    )
    trainer = DAMTrainer(rotary_model(), [look, some], config, [{"prompt": [2]}] * 2)
    trainer.train()
    entry = trainer.state.log_history[0]
    own = [ids for n, ids in enumerate(seen) if n % 8 != 7]
    total = torch.tensor([sum(ids) + (0 if n % 8 < 4 else n) for n, ids in enumerate(seen) if n % 8 != 7]).double()
    lengths = [len(ids) for ids in own]
    ended = [len(ids) for ids in own if ids[-1] == 5]
    assert 0 < len(ended) < len(own)
    sums = torch.tensor([float(sum(ids)) for ids in own])
    applied = torch.tensor([4.0, 5, 6, 12, 13, 14])
    expected = {
        "reward": total.mean(),
        "reward_std": total.std(),
        "rewards/look/mean": sums.mean(),
        "rewards/look/std": sums.std(),
        "rewards/some/mean": applied.mean(),
        "rewards/some/std": applied.std(),
        "frac_reward_zero_std": 0.0,
        "completions/mean_length": sum(lengths) / 14,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "completions/clipped_ratio": 1 - len(ended) / 14,
    }
    assert {name: entry[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    # What is the same for all of a prompt teaches nothing; a sequence that is filled in has no completion.
    trainer = DAMTrainer(tiny_model(), by_prompt, config, ROWS)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["frac_reward_zero_std"] == 1.0 and not any(name.startswith("completions/") for name in entry)


def test_why_a_run_does_not_learn_is_told_once_a_run(tmp_path):
    config = tiny_config(tmp_path, max_steps=4, num_iterations=1, logging_steps=1)
    trainer = DAMTrainer(tiny_model(), lambda completion_ids, **_: [0.5] * len(completion_ids), config, ROWS)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        (told,) = [str(warning.message) for warning in said if "constant reward" in str(warning.message)]
        assert told.startswith("step 2, constant reward: ")


class Counted(MaskedLM):
    """Counts the states that networks see outside training, equal ones each."""

    seen = 0

    def equal_rows(self, tokens, attention_mask=None):
        return False

    def hidden_states(self, tokens, attention_mask=None):
        Counted.seen += 0 if torch.is_grad_enabled() else len(tokens)
        return super().hidden_states(tokens, attention_mask)


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"order_samples": 0}, 0), ({}, 1 / 8), ({"order_samples": 3}, 3 / 8), ({"num_orders": 3, "order_samples": 0}, 2)],
    ids=str,
)
def test_what_other_orders_cost_and_tell(tmp_path, changes, share):
    """2 prompts of 8 trajectories of 3 jumps in 3 rollouts, under model and base; a share of it for other orders."""
    Counted.seen = 0
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(15)  # conditionals far from those of one law
    trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path, **changes), ROWS, denoiser=Counted)
    trainer.train()
    assert Counted.seen == round(3 * 2 * 16 * 3 * (1 + share))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    if share == 0:
        assert all("order_variance" not in entry and "kl_outcome" not in entry for entry in entries)
    else:
        assert entries[0]["order_variance"] == 0 < entries[-1]["order_variance"]
        assert entries[0]["kl_outcome"] == 0 != entries[-1]["kl_outcome"] != entries[-1]["kl_path"]


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_orders_are_averaged_in_the_weights(tmp_path, leave_one_out):
    """Weights of the last rollout follow from reward and log ratio over 3 orders of what it drew, not of one."""
    model = tiny_model()
    seen = {}

    class Told(DAMTrainer):
        def _rolled_out(self, model, batch):
            groups = super()._rolled_out(model, batch)
            seen["groups"] = groups
            return groups

    config = tiny_config(
        tmp_path, num_orders=3, beta=50.0, target_ess=None, full_tilt_from=0.0, leave_one_out=leave_one_out, max_steps=4
    )
    trainer = Told(model, sum_reward, config, ROWS)
    trainer.train()
    group, last = seen["groups"][-1], trainer.progress.replay.state_dict()["groups"][-1]
    orders = PathLogProbs(group["order_log_prob"], group["order_base_log_prob"])
    assert orders.log_prob.shape == (8, 3)
    # One of 8 is drawn by the base.
    mixture = (7 / 8 + orders.log_ratio.exp() / 8).log()
    share = (orders.log_ratio + group["reward"] / 50.0 - mixture).softmax(dim=0)
    expected = 7 * share / (1 - share) if leave_one_out else 8 * share
    torch.testing.assert_close(last["weight"], expected.float())
    # Figures are of the 7 that the model drew.
    every = {name: torch.stack([each[name] for each in seen["groups"]])[:, :7] for name in group if "log" in name}
    paths = PathLogProbs(every["order_log_prob"], every["order_base_log_prob"])
    told = [entry["kl_outcome"] for entry in trainer.state.log_history if "kl_outcome" in entry][-1]
    assert told == pytest.approx(diagnostics.kl_outcome(every["log_ratio"], paths), rel=1e-5)
    one = 8 * (group["log_ratio"].sum(dim=1) + group["reward"] / 50.0).softmax(dim=0)
    assert float((one - expected).abs().max()) > 1e-4


@pytest.mark.full
def test_without_a_reward_the_base_is_kept_unless_steps_are_capped(tmp_path):
    """A table of conditionals of no one law: to the noise of 300 steps; or, capped, to 0.07 away, a power mean."""
    base = oracle.inconsistent(3, 4, seed=1).float()
    law = oracle.generated(base, 3, 4)
    found = {}
    for full_tilt_from in (0.5, None):
        model = oracle.inconsistent(3, 4, seed=1).float()
        changes = {"max_tilt": 0.2, "target_ess": None, "full_tilt_from": full_tilt_from, "learning_rate": 0.05}
        sizes = {"num_generations": 16, "prompts": 8, "replay_size": 64, "replay_batch_size": 32}
        config = tiny_config(tmp_path, mask_token_id=4, max_steps=300, logging_steps=100, **changes, **sizes)
        DAMTrainer(
            model, lambda completion_ids, **_: [0.0] * len(completion_ids), config, [{"input_ids": [4] * 3}] * 8
        ).train()
        found[full_tilt_from] = oracle.kl(law, oracle.generated(model, 3, 4))
    mean = (oracle.path_log_prob(base, 3, 4) * 0.2).exp().mean(dim=0) ** 5
    capped = oracle.kl(law.flatten(), mean / mean.sum())
    assert found[0.5] < found[None] / 2 and found[None] > capped * 2 / 3, (found, capped)


def test_evaluate_returns_and_logs_metrics(tmp_path):
    given = {}

    def compute_metrics(prediction):
        given.update(final=prediction.predictions, labels=prediction.label_ids, initial=prediction.inputs)
        return {"right": float((prediction.predictions == prediction.label_ids).mean())}

    rows = [{"input_ids": [n, MASK, 4, MASK], "labels": [n, 2, 4, 2]} for n in (1, 2, 3)]
    rows.append({"input_ids": [1, 4, MASK], "labels": [1, 4, 3]})  # shorter: padded on the left
    config = tiny_config(tmp_path, per_device_eval_batch_size=3)
    trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS, rows, compute_metrics=compute_metrics)
    result = trainer.evaluate()
    assert {"eval_reward", "eval_right", "eval_runtime", "reward_calls"} <= set(result)
    assert trainer.state.log_history[-1]["eval_right"] == result["eval_right"]
    assert given["initial"].tolist() == [[1, 0, 4, 0], [2, 0, 4, 0], [3, 0, 4, 0], [-100, 1, 4, 0]]
    assert given["labels"][3].tolist() == [-100, 1, 4, 3]
    assert (given["final"][:3, 2] == 4).all() and (given["final"] != MASK).all()
    assert trainer.reward_calls == 0
    # Decoding the likeliest token in a fixed order is the same every time.
    again = trainer.evaluate()
    assert again["eval_reward"] == result["eval_reward"]


def test_evaluate_several_datasets(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS, {"one": ROWS[:1], "two": ROWS[1:3]})
    assert {"eval_one_reward", "eval_two_reward"} <= set(trainer.evaluate())


def test_evaluating_does_not_change_training(tmp_path):
    models_ = []
    for evaluated in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        models_.append(tiny_model(dropout=0.1))
        DAMTrainer(models_[-1], sum_reward, tiny_config(tmp_path, **evaluated), ROWS, ROWS[:2]).train()
    assert_same_weights(*models_)


def test_rollouts_come_in_pieces_of_rollout_batch_size(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskedLM, "equal_rows", lambda *_: False)  # each row is run, and counted
    sizes = []
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, rollout_batch_size=5, max_steps=1), ROWS)

    def count(module, args, kwargs):
        if not torch.is_grad_enabled():
            sizes.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    # One row first, to compare with the model's own logits, three to try padding. 14 trajectories of three jumps:
    # pieces of 5, 5 and 4, a network call for each jump; and two that the base drew. One of a group by a second order.
    assert sizes == [1, 3] + [5] * 6 + [4] * 3 + [2] * 3 + [2] * 3


# Arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward_funcs": []}, TypeError, "reward_funcs must be a function or a non-empty list"),
        ({"reward_funcs": [3]}, TypeError, "reward_funcs must be"),
        ({"args": "out"}, TypeError, "args must be a DAMConfig; got str"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, r"model must have get_output_embeddings\(\)"),
    ],
    ids=["no function", "not a function", "not a config", "not a language model"],
)
def test_a_bad_argument_is_named(tmp_path, changes, error, message):
    arguments = {
        "model": tiny_model(),
        "reward_funcs": sum_reward,
        "args": tiny_config(tmp_path),
        "train_dataset": ROWS,
        **changes,
    }
    with pytest.raises(error, match=message):
        DAMTrainer(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_token_id": None}, "the mask token is not known: set mask_token_id"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must have one entry per reward function, 1; got 2"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_an_error(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **config), ROWS)


def test_the_mask_token_is_taken_from_the_tokenizer_or_the_model(tmp_path, tokenizer):
    config = tiny_config(tmp_path, mask_token_id=None)
    assert DAMTrainer(tiny_model(), sum_reward, config, ROWS, processing_class=tokenizer).process.mask_token == 0
    model = tiny_model()
    model.config.mask_token_id = 3
    assert DAMTrainer(model, sum_reward, config, ROWS).process.mask_token == 3


def test_too_few_prompts_for_one_rollout(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS[:1])
    with pytest.raises(ValueError, match="1 prompts, fewer than the 2 of one rollout"):
        trainer.train()


def test_a_model_given_by_name_is_loaded_in_float32_or_as_asked(tmp_path):
    """A checkpoint in bfloat16 would be trained in bfloat16 otherwise, which loses small steps."""
    tiny_model().bfloat16().save_pretrained(tmp_path / "model")
    for kwargs, dtype in ((None, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        config = tiny_config(tmp_path, model_init_kwargs=kwargs)
        model = DAMTrainer(f"{tmp_path}/model", sum_reward, config, ROWS).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with pytest.raises(ValueError, match="model_init_kwargs go with a model that is given by name"):
        DAMTrainer(model, sum_reward, config, ROWS)


@pytest.mark.parametrize("kind", ["modules", "numbers", "adapter"])
def test_without_dropout_two_losses_are_one(tmp_path, kind):
    """Rates are kept in modules, as BERT's, or as numbers, as those of ModernBERT's attention."""

    def losses(disable):
        model = tiny_model(dropout=0.0 if kind == "adapter" else 0.3)
        if kind == "numbers":
            model = rotary_model()
            model.model.layers[0].attn.attention_dropout = 0.3
        lora = LoraConfig(target_modules=["query"], lora_dropout=0.3, init_lora_weights=False)
        config = tiny_config(tmp_path, disable_dropout=disable)
        trainer = DAMTrainer(model, sum_reward, config, ROWS, peft_config=lora if kind == "adapter" else None)
        tokens = torch.tensor([[1, 2, MASK, 3]])
        network = trainer.model.train()
        return [float(network(input_ids=tokens).logits.detach().sum()) for _ in range(2)]

    one, other = losses(False)
    assert one != other
    one, other = losses(True)
    assert one == other


def test_prompts_keep_their_order_where_it_is_asked_for(tmp_path):
    seen = []

    def look(completion_ids, **_):
        seen.append(sorted({ids[0] for ids in completion_ids}))
        return sum_reward(completion_ids)

    rows = [{"input_ids": [1 + n // 2, MASK]} for n in range(10)]
    config = tiny_config(tmp_path, shuffle_dataset=False, num_iterations=1, max_steps=7)
    DAMTrainer(tiny_model(), look, config, rows).train()
    assert seen == [[1], [2], [3], [4], [5], [1], [2]]


@pytest.mark.parametrize(
    ("changes", "rollouts", "completions"),
    [
        ({"num_iterations": 2}, 3, 16),
        ({"num_iterations": 1, "steps_per_generation": 3}, 2, 48),
        ({"generation_batch_size": 32, "gradient_accumulation_steps": 4}, 6, 32),
        ({"gradient_accumulation_steps": 2, "replay_batch_size": None}, 3, 32),
    ],
    ids=str,
)
def test_rollouts_are_as_many_and_as_large_as_trl_s(tmp_path, changes, rollouts, completions):
    """6 training steps, 16 completions a pass."""
    seen = []

    def look(completion_ids, **_):
        seen.append(len(completion_ids))
        return sum_reward(completion_ids)

    trainer = DAMTrainer(tiny_model(), look, tiny_config(tmp_path, **changes), ROWS)
    trainer.train()
    assert seen == [completions] * rollouts
    assert trainer.reward_calls == completions * rollouts


# A denoiser of one's own


def table(length=3, tokens=4):
    """A table of random logits, whose last token is the mask."""
    generator = torch.Generator().manual_seed(3)
    return Tabular(0.3 * torch.randn(tokens**length, length, tokens, generator=generator), tokens)


def twos(completion_ids, **_):
    return [float(sum(token == 2 for token in ids)) for ids in completion_ids]


def table_config(tmp_path, **changes):
    return tiny_config(tmp_path, mask_token_id=3, **changes)


TABLE_ROWS = [{"input_ids": [3, 3, 3]}] * 8


def test_a_model_that_is_a_denoiser_is_taken_as_it_is(tmp_path):
    """And trained: the reward counts twos, a third of what the table draws at the start."""
    config = table_config(tmp_path, num_generations=16, prompts=8, max_steps=60, learning_rate=0.1, logging_steps=10)
    trainer = DAMTrainer(table(), twos, config, TABLE_ROWS)
    trainer.train()
    assert rewards(trainer)[0] < 1.8 and rewards(trainer)[-1] > 2.5


def test_a_denoiser_is_made_by_what_the_user_hands_in(tmp_path):
    """One factory makes those of the model, of its base and of the loss; the step is the same as by default."""
    made, run = [], []

    class Observed(MaskedLM):
        def hidden_states(self, tokens, attention_mask=None):
            run.append((self.model, torch.is_grad_enabled()))
            return super().hidden_states(tokens, attention_mask)

    def factory(model, *, adapter=True):
        made.append((model, adapter))
        return Observed(model, adapter=adapter)

    trained = []
    for options in ({}, {"denoiser": factory}):
        trained.append(tiny_model())
        trainer = DAMTrainer(trained[-1], sum_reward, tiny_config(tmp_path, max_steps=2), ROWS, **options)
        trainer.train()
    assert_same_weights(*trained)
    models = [model for model, _ in made]
    assert trainer.model in models and len({id(model) for model in models}) == 2  # the model and its frozen base
    assert all(adapter for _, adapter in made)
    base = trainer.sampler.base(trainer.model).model
    # Losses, one of each step, and rollouts, whose outcomes the base weighs.
    assert [model for model, grad in run if grad] == [trainer.model] * 2
    assert {id(model) for model, grad in run if not grad} == {id(trainer.model), id(base)}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_of_a_step_is_that_of_the_cross_entropy(tmp_path, temperature):
    """Weighted, of the replayed groups, and of the table itself, at the rollouts' temperature: no other model."""
    trainer = DAMTrainer(table(), twos, table_config(tmp_path, temperature=temperature), TABLE_ROWS)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(TABLE_ROWS[:2]))
    (gradient,) = torch.autograd.grad(loss, [trainer.model.logits])
    groups, names = trainer._replayed()  # the same draws again
    targets = trainer._targets(groups, names)
    logits = trainer.model.logits.detach().double().requires_grad_()
    rows = logits[trainer.model.index(targets.states)[targets.row], targets.position]
    log_prob = torch.log_softmax(rows[:, :-1] / temperature, dim=1).gather(1, targets.target.clamp(min=0))
    terms = torch.where(targets.target >= 0, targets.weight * log_prob, 0.0)
    expected = -terms.sum() / len(targets.states)
    # Float32 rounding of sums of a few dozen terms of order 1.
    torch.testing.assert_close(loss.double(), expected, rtol=2.0**-20, atol=0.0)
    (exact,) = torch.autograd.grad(expected, [logits])
    torch.testing.assert_close(gradient.double(), exact, rtol=2.0**-18, atol=2.0**-22)


@pytest.mark.parametrize("normalizer", ["group", "state"])
def test_the_head_needs_no_row_for_the_mask(tmp_path, normalizer):
    """As in SEDD's layout: with the row left out, a run is that of the model that has it."""

    class Net(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.layer, self.lm_head = (
                torch.nn.Embedding(7, 8),
                torch.nn.Linear(8, 8),
                torch.nn.Linear(8, 7),
            )
            self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight[:rows].detach())
            self.lm_head.bias = torch.nn.Parameter(self.lm_head.bias[:rows].detach())

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids, attention_mask=None):
            return self.lm_head(self.layer(self.embed(input_ids)).tanh())

    config = tiny_config(tmp_path, mask_token_id=6, normalizer=normalizer, weight_decay=0.0)
    with_row, without = Net(7), Net(6)
    for net in (with_row, without):
        DAMTrainer(net, sum_reward, config, [{"input_ids": [1, 6, 6, 6]}] * 8).train()
    for ours, theirs in zip(without.parameters(), with_row.parameters(), strict=True):
        # The same draws; matmuls of 6 and 7 columns may round otherwise.
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"the mask token must be an id that the model takes, in \[0, 7\); got 7"):
        DAMTrainer(Net(6), sum_reward, tiny_config(tmp_path, mask_token_id=7), ROWS)


def test_a_denoiser_inside_a_wrapper_is_refused():
    """Its methods would go around the wrapper, which sums gradients over processes."""
    wrapped = torch.nn.Module()
    wrapped.module = table()
    with pytest.raises(TypeError, match="Tabular is a Denoiser inside Module: its methods would go around the wrapper"):
        as_denoiser(wrapped)
    with pytest.raises(TypeError, match="Tabular has no adapter to switch off"):
        as_denoiser(table(), adapter=False)
    assert isinstance(as_denoiser(tiny_model()), MaskedLM)


def test_a_default_device_or_dtype_changes_nothing(tmp_path):
    """Of a step, from rows to gradient. (The loaders of torch, and BERT's masks for sdpa in 4.57, heed the device.)"""
    losses = []
    for surroundings in (contextlib.nullcontext(), torch.device("meta"), default_dtype(torch.float64)):
        model = tiny_model(attn_implementation="eager")
        trainer = DAMTrainer(model, sum_reward, tiny_config(tmp_path), ROWS)
        with surroundings:
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS[:2]))
            loss.backward()
        losses.append((loss.detach(), trainer.model.bert.embeddings.word_embeddings.weight.grad))
    for loss, gradient in losses[1:]:
        assert torch.equal(loss, losses[0][0]) and torch.equal(gradient, losses[0][1])


def test_parameters_in_float16_are_not_trained(tmp_path):
    """Frozen they are no harm; trained they became NaN after a few steps of Adam."""
    with pytest.raises(ValueError, match=r"is to be trained in float16, .* set fp16=True, or load it in bfloat16"):
        DAMTrainer(tiny_model().half(), sum_reward, tiny_config(tmp_path), ROWS)
    frozen = tiny_model().half().requires_grad_(False)
    DAMTrainer(frozen, sum_reward, tiny_config(tmp_path), ROWS)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        DAMTrainer(frozen, sum_reward, tiny_config(tmp_path), ROWS).train()
    trainer = DAMTrainer(tiny_model().bfloat16(), sum_reward, tiny_config(tmp_path), ROWS)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_the_base_has_the_model_s_precision(tmp_path, precision):
    """So that an untouched model has weights of 1 in bfloat16 too, and predicts before training as after."""
    config = tiny_config(tmp_path, learning_rate=0.0, eval_temperature=1.0, **precision)
    trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS)
    before = trainer.predict(ROWS * 30).predictions
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kl_path" in entry]
    assert all(entry["kl_path"] == 0.0 and entry["ess_path"] == 8.0 for entry in logged) and logged
    assert (trainer.predict(ROWS * 30).predictions == before).all()


@pytest.mark.parametrize("changes", [{"diffusion_steps": 1}, {"diffusion_steps": 2}, {"block_length": 1}])
def test_rollouts_of_few_calls_are_trained_at_the_states_that_the_calls_saw(tmp_path, changes):
    """And for what each drew there. Two of three tables are equal often enough to tell a re-masked state."""
    config = table_config(tmp_path, **changes)
    trainer = DAMTrainer(table(), twos, config, TABLE_ROWS)
    trainer.train()
    groups, names = trainer._replayed()
    targets = trainer._targets(groups, names)
    size = config.num_generations
    for n, (state, group) in enumerate(zip(targets.states, targets.group.tolist(), strict=True)):
        k = n % size
        call, position = groups["call"][group, k], groups["position"][group, k]
        rows = targets.row == n
        (seen,) = set(call[(position[:, None] == targets.position[rows]).any(dim=1)].tolist())
        expected = torch.full((3,), 3)
        earlier = position[call < seen]
        expected[earlier] = groups["final"][group, k][earlier]
        assert torch.equal(state, expected)
        assert sorted(targets.position[rows].tolist()) == sorted(position[call == seen].tolist())
        assert torch.equal(targets.target[rows, 0], groups["final"][group, k][targets.position[rows]])
        torch.testing.assert_close(targets.weight[rows].sum(), groups["weight"][group, k])
    for other in ({"estimator": "first_jump"}, {"normalizer": "state"}):
        with pytest.raises(ValueError, match="goes with estimator"):
            DAMTrainer(table(), twos, table_config(tmp_path, **changes, **other), TABLE_ROWS).train()


def test_as_many_calls_as_masks_are_the_exact_chain(tmp_path):
    """Whose outcomes are re-masked: bit for bit what no limit gives."""
    runs = []
    for steps in (3, None):
        trainer = DAMTrainer(table(), twos, table_config(tmp_path, diffusion_steps=steps), TABLE_ROWS)
        trainer.train()
        runs.append(trainer.model)
    assert_same_weights(*runs)


def test_each_row_is_trained_at_the_states_of_its_own_chain(tmp_path):
    """Of two calls: rows with two masks at re-masked outcomes, those with three at what the calls saw."""
    rows = [{"input_ids": [3, 3, 3] if n % 2 else [1, 3, 3]} for n in range(8)]
    trainer = DAMTrainer(table(), twos, table_config(tmp_path, diffusion_steps=2, replay_batch_size=6), rows)
    trainer.train()
    groups, names = trainer._replayed()
    short = (groups["states"] == 3).sum(dim=1) == 2
    assert 0 < short.sum() < len(short)
    targets = trainer._targets(groups, names)
    assert len(targets.states) == groups["weight"].numel()
    for of, alone in ((short, trainer._at_outcomes), (~short, trainer._on_paths)):
        ids = names[of, None] * 8 + torch.arange(8)
        expected = alone({name: value[of] for name, value in groups.items()}, ids)
        here = of[targets.group]
        assert torch.equal(targets.states[here], expected.states)
        assert torch.equal(targets.group[here], of.nonzero()[:, 0][expected.group])
        kept = here[targets.row]
        assert torch.equal((here.cumsum(0) - 1)[targets.row[kept]], expected.row)
        for name in ("position", "target", "weight"):
            assert torch.equal(getattr(targets, name)[kept], getattr(expected, name))


def test_a_row_that_takes_more_calls_than_its_estimator_admits_is_refused_before_it_is_rolled_out(tmp_path):
    """Before the first step where the dataset is looked through, and else when it comes: in the second rollout here."""
    config = tiny_config(tmp_path, estimator="first_jump", diffusion_steps=3, shuffle_dataset=False)
    rows = [*ROWS[:2], *[{"input_ids": [1, MASK, MASK, MASK, MASK]}] * 6]

    class NotLookedThrough(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    for dataset, rollouts in ((rows, 0), (NotLookedThrough(), 1)):
        called = []

        def reward(completion_ids, called=called, **_):
            called.append(1)
            return sum_reward(completion_ids)

        with pytest.raises(
            ValueError, match="a row with 4 masks takes more than the 3 network calls of diffusion_steps"
        ):
            DAMTrainer(rotary_model(), reward, config, dataset).train()
        assert len(called) == rollouts
    DAMTrainer(rotary_model(), sum_reward, config, ROWS).train()


def test_no_step_stores_logits_of_all_positions(tmp_path, monkeypatch):
    """Of rollouts, rewards, training and evaluation with a vocabulary of 126,464 the largest tensor is the head."""
    vocabulary, size, states = 126_464, 16, 4 * 8
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    model = BertForMaskedLM(BertConfig(**small_sizes(vocabulary), hidden_dropout_prob=0.0))
    config = tiny_config(tmp_path, prompts=4, max_steps=2, learning_rate=1e-3, beta=1e6)
    trainer = DAMTrainer(model, sum_reward, config, ROWS)
    largest, _ = largest_bytes(lambda: (trainer.train(), trainer.evaluate(ROWS)))
    # Or its gradient; logits of a step, whose states have two masks in the mean, would be four times as large.
    assert largest <= 4 * vocabulary * size < 4 * vocabulary * 2 * states
    assert len(trainer._targets(*trainer._replayed()).states) == states


def by_state(targets):
    """Sum of weights by state (of three positions, four tokens) and position [64, 3], over the number of states."""
    out = torch.zeros(64, 3)
    code = (targets.states * torch.tensor([16, 4, 1])).sum(dim=1)[targets.row]
    out.index_put_((code, targets.position), targets.weight[:, 0], accumulate=True)
    return out / len(targets.states)


def test_replicates_of_an_outcome_are_states_of_the_same_law(tmp_path):
    """Antithetic ones too, in which every position is trained in one of a pair; and a first one as without any."""
    found = {}
    for name, changes in {
        "one": {},
        "four": {"num_replicates": 4},
        "in pairs": {"num_replicates": 4, "antithetic": True},
        "on paths": {"num_replicates": 4, "block_length": 1},
    }.items():
        trainer = DAMTrainer(table(), twos, table_config(tmp_path, **changes), TABLE_ROWS)
        trainer.train()
        groups, names = trainer._replayed()
        draws = []
        for n in range(100):
            targets = trainer._targets(groups, names + n * len(names))
            draws.append(by_state(targets))
            if name == "in pairs":
                half = torch.zeros_like(targets.states, dtype=torch.int64)
                half[targets.row, targets.position] = 1
                pairs = half.view(len(names), 2, -1, 3)
                assert bool((pairs.sum(dim=1) == 1).all())
        times = changes.get("num_replicates", 1)
        assert len(targets.states) == times * groups["weight"].numel()
        found[name] = torch.stack(draws)
    one, four, pairs, paths = found.values()
    total = one.mean(dim=0).sum()
    for draws in (four, pairs):
        # 100 x 32 draws of a state each, and more: a standard error below 3%; without the twins' factor it is 25% off.
        torch.testing.assert_close(draws.mean(dim=0).sum(), total, rtol=0.12, atol=0)
    assert float(four.var(dim=0).sum()) < 0.5 * float(one.var(dim=0).sum())
    assert float(paths.mean(dim=0).sum()) > 0


def test_centred_weights_have_no_sum(tmp_path):
    config = table_config(tmp_path, centering=1.0)
    trainer = DAMTrainer(table(), twos, config, TABLE_ROWS)
    trainer.train()
    weight = trainer.progress.replay.batch(torch.arange(4))["weight"]
    # Of numbers up to 8, in float32.
    assert float(weight.sum(dim=1).abs().max()) < 1e-5 and float(weight.min()) < 0 < float(weight.max())


def test_forbidden_outcomes_are_left_out_of_every_mean(tmp_path):
    def no_fives(completion_ids, **_):
        return [-math.inf if 5 in ids else 1.0 for ids in completion_ids]

    config = tiny_config(tmp_path, eval_temperature=1.0)
    trainer = DAMTrainer(tiny_model(), [no_fives, sum_reward], config, ROWS)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/no_fives/mean" in entry]
    assert logged and all(entry["rewards/no_fives/mean"] == 1.0 for entry in logged)
    assert math.isfinite(trainer.evaluate(ROWS * 8)["eval_reward"])


def test_batches_that_accelerate_would_split_are_refused(tmp_path):
    config = tiny_config(tmp_path, accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match="split_batches must be False: per_device_train_batch_size is of each process"):
        DAMTrainer(tiny_model(), sum_reward, config, ROWS)
