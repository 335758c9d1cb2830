"""Rows of a network call that are equal are run once, to the same draws; or each, where that would change something."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dam.decoding import Decoding
from dam.models import Head, MaskedLM, Tabular
from dam.models import equal_rows as module
from dam.models.equal_rows import distinct
from dam.rollout import jump_log_prob, rollout
from dam.train.base import with_base
from tests.models.test_families import FAMILIES, PROCESS, padded, tokens_of
from tests.train.tiny import MASK as TINY_MASK
from tests.train.tiny import tiny_model

K = 6


class Each:
    """A denoiser without what tells that equal rows may be run once; counts the rows that it runs."""

    def __init__(self, denoiser):
        self._denoiser, self.rows, self.head = denoiser, [], denoiser.head

    def hidden_states(self, tokens, attention_mask=None):
        self.rows.append(tokens.clone())
        return self._denoiser.hidden_states(tokens, attention_mask)


class Once(Each):
    def equal_rows(self, tokens, attention_mask=None):
        return self._denoiser.equal_rows(tokens, attention_mask)


class Mean:
    """Hidden states by additions within a row alone, in one order: the same bits in every call."""

    def hidden_states(self, tokens, attention_mask=None):
        place = torch.arange(tokens.shape[1])
        ahead = (tokens * 37 % 11).double().cumsum(dim=1) + place
        return torch.stack((ahead, ahead.flip(1) * (tokens + 1)), dim=2) / 50

    def head(self):
        return Head(torch.randn(19, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None)

    def equal_rows(self, tokens, attention_mask=None):
        return True


class Small(nn.Module):
    """What a row gets is its own, and beside it whatever a subclass adds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.output = nn.Embedding(19, 8), nn.Linear(8, 19, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output

    def extra(self, x):
        return 0.0

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        return self.output(x + x.mean(dim=1, keepdim=True) + self.extra(x))


class Chance(Small):
    def extra(self, x):
        return F.dropout(x, 0.1, training=True)


class Place(Small):
    def extra(self, x):
        return 0.1 * torch.arange(len(x))[:, None, None]


class Others(Small):
    def extra(self, x):
        return x.mean(dim=(0, 1))


class Capacity(Small):
    """An expert that takes the first so many tokens of a call and no more."""

    def extra(self, x):
        taken = torch.arange(x[..., 0].numel()).view(x.shape[:2]) < x[..., 0].numel() - 2
        return torch.where(taken[..., None], x.tanh(), 0.0)


def trajectories_of(prompts, size=K):
    tokens, mask = padded([tokens_of(1, length, seed=length)[0] for length in prompts])
    return tokens.repeat_interleave(size, dim=0), mask.repeat_interleave(size, dim=0)


def assert_same(found, expected, exact=False):
    for name in ("final", "position", "token", "call"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("log_prob", "base_log_prob"):
        # A product of fewer rows may add in another order, in float32.
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


@pytest.mark.parametrize("collide", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (40, 1), (64, 5), (0, 4)])
def test_distinct_rows_make_up_all_rows(shape, collide, monkeypatch):
    if collide:  # every row has the hash of every other
        monkeypatch.setattr(module, "_multipliers", lambda length: torch.zeros(length, dtype=torch.int64))
    rows = torch.randint(2, shape, generator=torch.Generator().manual_seed(1))
    first, of = distinct(rows)
    assert torch.equal(rows[first][of], rows)
    assert torch.equal(of[first], torch.arange(len(first)))
    assert collide or len(first) == len(rows.unique(dim=0))
    assert all(not bool((rows[:n] == rows[n]).all(dim=1).any()) for n in first.tolist()) or collide


@pytest.mark.parametrize("name", ["ModernBERT", "Qwen", "LLaDA", "LLaDA-MoE", "Dream", "A2D"])
@pytest.mark.parametrize("steps", [None, 2])
def test_draws_are_those_of_a_rollout_that_runs_each_row(name, steps):
    """Of prompts of several lengths, padded; and a call runs the states that there are, each once."""
    family, (tokens, mask) = FAMILIES[name], trajectories_of((7, 4))
    model, base = family.model(0), family.model(1)
    found, expected = [], []
    for into, kind in ((found, Once), (expected, Each)):
        denoisers = [kind(family.denoiser(one.eval())) for one in (model, base)]
        into += [
            rollout(denoisers[0], tokens, PROCESS, base=denoisers[1], attention_mask=mask, steps=steps, seed=3),
            *denoisers,
        ]
    assert_same(found[0], expected[0])
    for once, each in zip(found[1:], expected[1:], strict=True):
        assert [len(rows) for rows in once.rows] == [len(rows.unique(dim=0)) for rows in each.rows]
    assert len(found[1].rows[0]) == 2
    assert len(expected[1].rows[0]) == 2 * K


@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding("confidence"), Decoding("entropy", threshold=1.0), Decoding(guidance=0.5), Decoding(top_k=3)],
    ids=str,
)
def test_draws_are_the_same_bits_where_a_row_s_numbers_are_its_own(decoding):
    tokens, mask = trajectories_of((7, 4))
    options = {"decoding": decoding, "attention_mask": mask, "seed": 3}
    found, expected = (rollout(kind(Mean()), tokens, PROCESS, base=Mean(), **options) for kind in (Once, Each))
    assert_same(found, expected, exact=True)
    again = jump_log_prob(Each(Mean()), found, PROCESS, attention_mask=mask, decoding=decoding)
    assert decoding.by_model or torch.equal(again, found.base_log_prob)


def test_rows_that_stop_early_too():
    tokens, mask = trajectories_of((7, 4))
    options = {"attention_mask": mask, "seed": 3, "stop_tokens": [2, 5, 11], "block_length": 2}
    found, expected = (rollout(kind(Mean()), tokens, PROCESS, base=Mean(), **options) for kind in (Once, Each))
    assert bool(found.ended.any())
    assert_same(found, expected, exact=True)


def test_an_attention_mask_tells_rows_apart():
    tokens, mask = trajectories_of((8,), 4)
    mask[1, :2] = mask[3, :2] = 0
    denoiser = Once(FAMILIES["ModernBERT"].denoiser(FAMILIES["ModernBERT"].model().eval()))
    rollout(denoiser, tokens, PROCESS, attention_mask=mask, seed=0)
    assert len(denoiser.rows[0]) == 2


@pytest.mark.parametrize("cls", [Chance, Place, Others, Capacity])
def test_a_model_of_whose_rows_one_changes_the_other_runs_each(cls):
    """Or whose rows are random, or depend on their place: found by a trial."""
    tokens = torch.full((12, 4), 18)
    assert MaskedLM(Small().eval()).equal_rows(tokens)
    assert not MaskedLM(cls().eval()).equal_rows(tokens)


@pytest.mark.parametrize("how", ["training", "one layer training", "compiled", "in place"])
def test_models_whose_rows_are_not_to_be_left_out(how):
    tokens = torch.full((12, 4), TINY_MASK)
    model = tiny_model(dropout=0.5).eval()
    assert MaskedLM(model).equal_rows(tokens)
    if how == "training":
        model.train()
    elif how == "one layer training":
        model.bert.encoder.layer[0].output.dropout.train()
    elif how == "compiled":
        model = torch.compile(model)
    else:
        model.bert.compile()
    assert not MaskedLM(model).equal_rows(tokens)


def test_the_trial_is_made_once_and_again_where_a_model_is_compared_anew():
    tokens, calls = torch.full((12, 4), 18), []
    model = Small().eval()
    model.embedding.register_forward_hook(lambda *_: calls.append(1))
    for expected in (2, 2):
        assert MaskedLM(model).equal_rows(tokens)
        assert len(calls) == expected
    MaskedLM(model).compare(tokens)
    before = len(calls)
    assert MaskedLM(model).equal_rows(tokens)
    assert len(calls) == before + 2


def test_rows_that_are_equal_nowhere_are_not_looked_at_again(monkeypatch):
    looked = []
    monkeypatch.setattr("dam.rollout.distinct", lambda rows: looked.append(len(rows)) or distinct(rows))
    tokens = torch.full((4, 3), PROCESS.mask_token)
    tokens[:, 0] = torch.arange(4)
    rollout(Mean(), tokens, PROCESS, seed=0)
    assert looked == [4]
    looked.clear()
    table = Tabular(torch.zeros(19**3, 3, 18), 19)  # says nothing of it
    rollout(table, tokens[:1].repeat(4, 1), PROCESS, seed=0)
    assert looked == [4]
    looked.clear()
    # Four of one prompt that part at the first token, of 18: they are not looked at after that.
    one = torch.full((4, 8), PROCESS.mask_token)
    way = rollout(Mean(), one, PROCESS, seed=0)
    assert len(way.states_before(1).unique(dim=0)) == 4
    assert looked == [4, 4, 4]


def test_a_base_that_is_the_model_s_first_parameters_runs_equal_rows_once():
    """With model and base as one, and each for itself."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    family, (tokens, mask) = FAMILIES["ModernBERT"], trajectories_of((7, 4))
    config = peft.LoraConfig(r=2, target_modules=["Wo"], layers_to_transform=[1])
    model, base = with_base(peft.get_peft_model(family.model(), config), None, None)
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    denoiser = family.denoiser(model)
    options = {"attention_mask": mask, "seed": 3}
    found = rollout(denoiser, tokens, PROCESS, base=base.denoiser(model, family.denoiser), **options)
    expected = rollout(Each(denoiser), tokens, PROCESS, base=Each(base.denoiser(model, family.denoiser)), **options)
    assert_same(found, expected)
    assert float((found.log_ratio).abs().max()) > 0
