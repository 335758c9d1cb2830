"""Reward functions that are models, and async ones."""

import asyncio
import threading

import pytest
import torch
from tiny import ROWS, rotary_model, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from dam.train import DAMTrainer, RewardError
from dam.train.reward_model import RewardModel, with_models
from dam.train.rewards import total_reward

WORDS = ["[MASK]", "[PAD]", "a", "b", "c", "d", "[CLS]", "[SEP]"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"


def tokenizer(template=None):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 6), ("[SEP]", 7)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]", chat_template=template
    )


def classifier(labels=1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=8, num_labels=labels, max_position_embeddings=32, initializer_range=1.0, **sizes)
    return BertForSequenceClassification(config).train()


def score(model, ids):
    """By hand: one row, no padding, no dropout."""
    with torch.no_grad():
        return float(model.eval()(input_ids=torch.tensor([ids])).logits[0, 0])


def test_its_output_for_prompt_and_completion_is_the_reward():
    """Whatever stands beside it in the batch; special tokens around a text, a template's own around a conversation."""
    model = classifier()
    reward = RewardModel(model, tokenizer(TEMPLATE), batch_size=2)
    chat = [{"role": "a", "content": "b c"}]
    found = reward(
        prompts=["a b ", "c ", chat, "d d d "],
        completions=["c", "a a a", [{"role": "b", "content": "d"}], "b"],
        completion_ids=[[4]] * 4,
    )
    rows = [[6, 2, 3, 4, 7], [6, 4, 2, 2, 2, 7], [2, 3, 4, 3, 5], [6, 5, 5, 5, 3, 7]]
    assert found == pytest.approx([score(model, row) for row in rows], abs=1e-5)
    assert len({round(value, 3) for value in found}) == 4
    with torch.autocast("cpu", torch.bfloat16):
        again = reward(prompts=["a b "], completions=["c"])
    assert again == pytest.approx(found[:1], abs=1e-5)  # as in bfloat16 it would not be


def test_a_run_learns_from_a_model_given_as_such_or_by_name(tmp_path):
    model, words = classifier(), tokenizer()
    model.save_pretrained(tmp_path / "judge")
    words.save_pretrained(tmp_path / "judge")
    logged = []
    for given, tokenizers in ((model, words), (f"{tmp_path}/judge", None)):
        config = tiny_config(tmp_path, max_steps=2, stop_token_ids=[])
        rows = [{"prompt": "a b"}, {"prompt": "c d"}] * 2
        network = rotary_model()
        network.resize_token_embeddings(8, mean_resizing=False)
        trainer = DAMTrainer(network, given, config, rows, None, words, tokenizers)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "reward" in entry][-1])
    assert "rewards/BertForSequenceClassification/mean" in logged[0] and "rewards/judge/mean" in logged[1]
    assert logged[0]["reward"] == pytest.approx(logged[1]["reward"], abs=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "tokenizers", "error", "message"),
    [
        (lambda: classifier(2), "own", ValueError, "has 2 outputs, .* load it with num_labels=1"),
        (lambda: torch.nn.Linear(2, 1), "own", TypeError, "must be a sequence classifier of transformers; Linear"),
        (classifier, None, ValueError, "has no name to load its tokenizer by: pass reward_processing_classes"),
        (lambda: [classifier()] * 2, "own", ValueError, "one entry per reward function, 2; got 1"),
    ],
    ids=["two outputs", "no config", "no tokenizer", "one tokenizer for two"],
)
def test_a_model_that_does_not_fit_is_refused_at_once(tmp_path, given, tokenizers, error, message):
    words = tokenizer()
    with pytest.raises(error, match=message):
        DAMTrainer(tiny_model(), given(), tiny_config(tmp_path), ROWS, None, words, tokenizers and words)


def test_a_model_reads_text(tmp_path):
    with pytest.raises(ValueError, match="completions are token ids: pass processing_class"):
        DAMTrainer(tiny_model(), classifier(), tiny_config(tmp_path), ROWS, None, None, tokenizer())
    reward = RewardModel(classifier(), tokenizer())
    with pytest.raises(TypeError, match="a reward model reads text; got a prompt of type list"):
        reward(prompts=[[1, 2]], completions=["a"])


def test_functions_pass_through():
    def plain(**_):
        return [1.0]

    options = {"batch_size": 1, "model_init_kwargs": None, "chat_template_kwargs": None}
    assert with_models(plain, None, reads_text=False, **options) == [plain]


# Async


def rewarded(*functions):
    return total_reward(
        functions, [1.0] * len(functions), prompts=["p"], completions=["c"], completion_ids=[[1]], columns={}
    )


def test_async_functions_run_side_by_side_and_beside_plain_ones():
    """Each waits for the next to have begun: one after the other they would wait for ever."""
    begun = [threading.Event(), threading.Event()]

    async def wait(number):
        begun[number].set()
        for _ in range(500):
            if all(event.is_set() for event in begun):
                return [float(number + 1)]
            await asyncio.sleep(0.01)
        raise TimeoutError

    async def one(**_):
        return await wait(0)

    def plain(**_):
        assert begun[0].wait(5)
        return [10.0]

    async def two(**_):
        return await wait(1)

    assert rewarded(one, plain, two)[0].tolist() == [13.0]


def test_async_functions_have_one_loop_which_may_already_run_here():
    loops = []

    async def remembered(**_):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    async def in_a_notebook():
        return rewarded(remembered)

    rewarded(remembered)
    assert asyncio.run(in_a_notebook())[0].tolist() == [1.0]
    assert loops[0] is loops[1]


def test_what_fails_is_named():
    async def slow(**_):
        await asyncio.sleep(60)

    async def fails(**_):
        raise KeyError("answer")

    def plain(**_):
        raise OSError("gone")

    with pytest.raises(RewardError, match="'fails' raised KeyError: 'answer'"):
        rewarded(fails, slow)
    with pytest.raises(RewardError, match="'plain' raised OSError: gone"):
        rewarded(slow, plain)
