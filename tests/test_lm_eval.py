"""The model "dam" of lm-eval. Its dependencies are too many for `make test` (200 MB): where they are installed."""

import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dam.lm_eval import DAM, cut
from dam.recipes.characters import characters_tokenizer
from tests.test_generate import small_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    small_model().save_pretrained(folder)
    characters_tokenizer().save_pretrained(folder)
    return DAM.create_from_arg_string(
        f"pretrained={folder},orders=3,max_completion_length=6", {"batch_size": 2, "device": "cpu"}
    )


def asked(kind, *arguments):
    known = {"request_type": kind, "doc": {}}
    return [Instance(arguments=each, idx=n, metadata=("t", n, 1), **known) for n, each in enumerate(arguments)]


def test_it_is_registered():
    assert get_model("dam") is DAM


def test_completions_are_cut_at_what_ends_them(adapter):
    greedy = {"do_sample": False, "max_gen_toks": 5}
    contexts = ("1+1", "what is this?", "x")
    whole = adapter.generate_until(asked("generate_until", *((text, {**greedy, "until": []}) for text in contexts)))
    assert all(1 <= len(text) <= 5 for text in whole)
    end = whole[1][2]
    found = adapter.generate_until(asked("generate_until", *((text, {**greedy, "until": [end]}) for text in contexts)))
    assert found == [cut(text, [end]) for text in whole] and len(found[1]) <= 2
    with pytest.raises(ValueError, match="generation_kwargs num_beams are not known here"):
        adapter.generate_until(asked("generate_until", ("x", {"num_beams": 4})))


def test_a_likelihood_of_one_token_is_the_model_s_own(adapter):
    values = adapter.loglikelihood(asked("loglikelihood", *(("1+1=", character) for character in "0123456789")))
    ids = torch.tensor([[*adapter.tok_encode("1+1="), adapter.tokenizer.mask_token_id]])
    with torch.no_grad():
        logits = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    logits[adapter.tokenizer.mask_token_id] = -math.inf
    expected = logits.log_softmax(dim=0)[[adapter.tok_encode(character)[0] for character in "0123456789"]]
    torch.testing.assert_close(torch.tensor([value for value, _ in values]), expected, rtol=0, atol=1e-4)


def test_whole_texts_are_behind_an_end_of_text(adapter):
    (rolling,) = adapter.loglikelihood_rolling(asked("loglikelihood_rolling", ("ab",)))
    ((value, _),) = adapter.loglikelihood(asked("loglikelihood", ("", "ab")))
    assert rolling == pytest.approx(value, abs=1e-5)
