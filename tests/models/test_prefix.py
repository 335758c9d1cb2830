"""Passes over blocks with the keys and values of what is before them: the draws of passes over whole sequences."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from dam.decoding import Decoding
from dam.models import Blocks, Tabular, as_denoiser
from dam.models.prefix import _cache_class
from dam.rollout import jump_log_prob, log_prob_over_orders, rollout
from dam.train.base import with_base
from tests.models.standins.trunk import HEADS, LAYERS, MASK, PAD, SIZE
from tests.models.test_families import (
    BERT_LIKE,
    FAMILIES,
    PROCESS,
    Family,
    lively,
    lora_on,
    padded,
    qwen_model,
    tokens_of,
    transformers_model,
)

SHIFTED = Family(
    qwen_model,
    None,
    None,
    Blocks(4, "completion"),
    {"block_length": 4, "block_origin": "completion", "shift": 1},
)
BLOCKS = {
    **{name: FAMILIES[name] for name in ("LLaDA 2 by 4", "SDAR", "A2D by 4")},
    "Qwen, of the position behind": SHIFTED,
    "... from the sequence's start": dataclasses.replace(
        SHIFTED, blocks=Blocks(4, "sequence"), options={"block_length": 4, "shift": 1}
    ),
}


class Whole:
    """A denoiser without its passes over blocks."""

    def __init__(self, denoiser):
        self.denoiser, self.blocks = denoiser, denoiser.blocks

    def hidden_states(self, tokens, attention_mask=None):
        return self.denoiser.hidden_states(tokens, attention_mask)

    def head(self):
        return self.denoiser.head()


def completions(*prompts, length=9):
    """Rows of prompts of these lengths, each with masks behind it."""
    rows = [torch.cat((tokens_of(1, n, seed=n)[0].clamp(max=PAD - 1), torch.full((length,), MASK))) for n in prompts]
    return padded(rows)


def scattered():
    """Rows that are at other blocks than each other, begin late and end early, and have masks where prompts are."""
    tokens, mask = completions(6, 3, 13, 1)
    given = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < torch.tensor(
        [[0.2], [0.5], [0.8], [0.4]]
    )
    tokens = torch.where(given & (tokens == MASK), 3, tokens)
    tokens[2, 3], tokens[0, 9] = MASK, MASK
    return tokens, mask


def assert_same(found, expected):
    for name in ("final", "position", "token", "call"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # Sums of the same numbers in float32, of products of other sizes.
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.base_log_prob, expected.base_log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rows", ["one length", "padded", "scattered"])
def test_draws_are_those_of_whole_sequences(name, rows):
    family = BLOCKS[name]
    denoiser, base = family.denoiser(family.model()), family.denoiser(family.model(seed=1))
    given = {"one length": completions(5, 5), "padded": completions(6, 3, 4), "scattered": scattered()}
    tokens, mask = given[rows]
    fixed = {"seed": 3, "attention_mask": None if rows == "one length" else mask}
    assert denoiser.prefix_cache(tokens, fixed["attention_mask"]) is not None  # the trial has found them the same
    for options in ({}, {"order": "confidence", "steps": 5, "temperature": 0.5}):
        paths = rollout(denoiser, tokens, PROCESS, base=base, **fixed, **options)
        assert_same(paths, rollout(Whole(denoiser), tokens, PROCESS, base=Whole(base), **fixed, **options))
    if rows == "padded":
        paths = rollout(denoiser, tokens, PROCESS, base=base, **fixed)
        over = [
            log_prob_over_orders(*models, paths, PROCESS, orders=2, **fixed)
            for models in ((denoiser, base), (Whole(denoiser), Whole(base)))
        ]
        for found, expected in zip(*over, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # sums of 9 of those


@pytest.mark.parametrize("name", ["SDAR", "Qwen, of the position behind"])
@pytest.mark.parametrize(
    "options",
    [
        {"stop_tokens": [1, 5, 8, 10]},
        {"decoding": Decoding(order="confidence", threshold=0.08), "stop_tokens": [5, 10]},
        {"decoding": Decoding(order="entropy", top_k=6, guidance=1.0), "steps": 6},
    ],
    ids=str,
)
def test_draws_are_those_of_whole_sequences_where_rows_go_on_by_themselves(name, options):
    """Some end, or take fewer calls for a block; and the prompt is hidden in a second pass with a cache of its own."""
    family = BLOCKS[name]
    denoiser, base = (lively(family.model(seed), 3.0) for seed in (0, 1))
    denoiser, base = family.denoiser(denoiser), family.denoiser(base)
    tokens, mask = scattered()
    fixed = {"seed": 5, "attention_mask": mask, **options}
    paths = rollout(denoiser, tokens, PROCESS, base=base, **fixed)
    assert_same(paths, rollout(Whole(denoiser), tokens, PROCESS, base=Whole(base), **fixed))
    calls, masks = paths.call.max(dim=1).values + 1, (tokens == MASK).sum(dim=1)
    assert bool((calls < masks).any()) and (paths.ended is None or bool(paths.ended.any()))


@pytest.mark.parametrize("name", ["LLaDA 2 by 4", "SDAR", "A2D by 4"])
def test_rows_that_have_ended_are_not_run(name):
    family = BLOCKS[name]
    model = lively(family.model(), 4.0)
    denoiser = family.denoiser(model)
    tokens, _ = completions(*[8] * 12, length=12)
    options = {"stop_tokens": [1, 5, 8], "seed": 0}
    rollout(denoiser, tokens, PROCESS, **options)  # what is tried before the first call
    sizes = sizes_of(model)
    found = rollout(denoiser, tokens, PROCESS, **options)
    calls = found.call.max(dim=1).values + 1
    assert len(calls.unique()) > 2
    assert [rows for rows, _ in sizes] == [int((calls > n).sum()) for n in range(found.network_calls)]
    assert [width for _, width in sizes] == [(12 if n == 0 else 8) if n % 4 == 0 else 4 for n in range(len(sizes))]


@pytest.mark.parametrize("name", ["LLaDA 2 by 4", "SDAR", "A2D by 4"])
def test_the_base_of_an_adapter_goes_block_by_block_too(name):
    family = BLOCKS[name]
    adapted = lora_on(family.model(), init_lora_weights=False)
    denoiser, base = family.denoiser(adapted), family.denoiser(adapted, adapter=False)
    adapted, initial = with_base(adapted, None, None)
    first = initial.denoiser(adapted, family.denoiser)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    tokens, mask = completions(6, 3, 4)
    options = {"attention_mask": mask, "seed": 3}
    calls = sizes_of(adapted)
    for other in (base, first):
        found = rollout(denoiser, tokens, PROCESS, base=other, **options)
        calls.clear()
        assert_same(found, rollout(denoiser, tokens, PROCESS, base=Whole(other), **options))
        whole = sum(batch * length for batch, length in calls)
        calls.clear()
        rollout(denoiser, tokens, PROCESS, base=other, **options)
        assert sum(batch * length for batch, length in calls) < 0.7 * whole
        assert float(found.log_ratio.abs().sum()) > 0.1


def sizes_of(model):
    """Shapes of the tokens that a model is called with from now on."""
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("name", ["LLaDA 2 by 4", "SDAR", "A2D by 4"])
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_each_call_runs_its_block_and_each_finished_block_once(name, order):
    family = BLOCKS[name]
    model = family.model()
    denoiser = family.denoiser(model)
    tokens, _ = completions(8, 8, 8, length=12)
    rollout(denoiser, tokens, PROCESS, seed=0)  # what is tried before the first call
    sizes = sizes_of(model)
    found = rollout(denoiser, tokens, PROCESS, order=order, seed=0)
    first_calls, later_calls = [(3, 8), (3, 8)], [(3, 4)] * 3
    assert sizes == [(3, 12), *later_calls, first_calls[0], *later_calls, first_calls[1], *later_calls]
    assert found.network_calls == 12
    sizes.clear()
    rollout(denoiser, tokens, PROCESS, order=order, steps=6, seed=0)
    assert sizes == [(3, 12), (3, 4), (3, 8), (3, 4), (3, 8), (3, 4)]
    sizes.clear()
    jump_log_prob(denoiser, found, PROCESS)
    assert sizes == [(3, 12), *later_calls, first_calls[0], *later_calls, first_calls[1], *later_calls]


def test_rows_at_different_blocks_are_run_in_two_passes_at_most():
    """Blocks from the sequence's start, of prompts that end at different places in one."""
    family = BLOCKS["SDAR"]
    model = family.model()
    denoiser = family.denoiser(model)
    tokens, mask = completions(8, 6, 5, 3, length=11)
    options = {"attention_mask": mask, "seed": 0}
    rollout(denoiser, tokens, PROCESS, **options)
    sizes = sizes_of(model)
    found = rollout(denoiser, tokens, PROCESS, **options)
    assert found.network_calls == 11
    # All with their prompts at first, without padding; then three a block, and one two, as it begins the second.
    assert sizes[:7] == [(4, 12), *[(3, 4), (1, 8)] * 3]
    assert len(sizes) == 1 + 2 * 10
    # Blocks in front of the first mask, and what the first pass is wider than those of single rows.
    prompts = (8 + 4 + 4 + 0) + (0 + 4 + 4 + 8)
    finished = 4 * (2 + 3 + 2 + 3)
    assert sum(batch * length for batch, length in sizes) <= prompts + finished + 4 * 4 * 11


def test_what_is_kept_is_one_sequence_of_keys_and_values():
    family = BLOCKS["A2D by 4"]
    denoiser = family.denoiser(family.model())
    tokens, mask = completions(8, 3, length=12)
    made = []
    begin = denoiser.prefix_cache
    denoiser.prefix_cache = lambda *args: made.append(begin(*args)) or made[-1]
    rollout(denoiser, tokens, PROCESS, attention_mask=mask, seed=0)
    store = made[0]._store
    assert len(store._whole) == 2 * LAYERS
    assert not store._new
    assert {tuple(part.shape) for part in store._whole.values()} == {(2, 1, tokens.shape[1], SIZE // HEADS)}


def test_calls_that_go_back_to_an_earlier_block_are_of_whole_sequences():
    """Of trajectories that a model without blocks drew."""
    family = BLOCKS["A2D by 4"]
    model = family.model()
    denoiser = family.denoiser(model)
    tokens, _ = completions(8, 8, length=8)
    tokens[1, 0] += 1  # equal rows would be run once
    paths = rollout(FAMILIES["A2D"].denoiser(model), tokens, PROCESS, seed=0)
    expected = jump_log_prob(Whole(denoiser), paths, PROCESS)
    sizes = sizes_of(model)
    assert torch.equal(jump_log_prob(denoiser, paths, PROCESS), expected)
    assert sizes == [(2, 16)] * 8
    # Nor where one call fills two blocks.
    both = rollout(FAMILIES["A2D"].denoiser(model), tokens, PROCESS, steps=1, seed=0)
    sizes.clear()
    jump_log_prob(denoiser, both, PROCESS)
    assert sizes == [(2, 16)]


def test_passes_over_blocks_are_offered_where_they_are_to_be_had(monkeypatch):
    tokens = tokens_of(2, 9)
    for name in ("LLaDA", "Dream", "A2D", "Qwen", "ModernBERT"):
        family = FAMILIES[name]
        assert family.denoiser(family.model()).prefix_cache(tokens) is None, name
    encoder = transformers_model(ModernBertForMaskedLM, ModernBertConfig, **BERT_LIKE)().eval()
    assert as_denoiser(encoder, block_length=4).prefix_cache(tokens) is None
    model = BLOCKS["SDAR"].model()
    assert as_denoiser(model).prefix_cache(tokens) is not None
    assert as_denoiser(model.train()).prefix_cache(tokens) is None
    model.eval()
    monkeypatch.setattr("dam.models.sharding.is_fsdp", lambda module: module is model.model)
    assert as_denoiser(model).prefix_cache(tokens) is None


@pytest.mark.parametrize("fault", ["forgets", "raises"])
def test_a_model_whose_cache_is_wrong_is_run_whole_and_said_so(fault):
    class Faulty(type(BLOCKS["A2D by 4"].model())):
        def forward(self, *args, past_key_values=None, **more):
            if past_key_values is not None and fault == "raises":
                raise AttributeError("no such method of a cache")
            if past_key_values is not None:
                more["attention_mask"] = more["attention_mask"][..., -more["input_ids"].shape[1] :]
            return super().forward(*args, **more)

    family = BLOCKS["A2D by 4"]
    model = family.model()
    model.__class__ = Faulty
    denoiser = family.denoiser(model)
    tokens, _ = completions(8, 8, length=8)
    why = {"forgets": "they give other hidden states", "raises": "AttributeError: no such method of a cache"}[fault]
    with pytest.warns(UserWarning, match=f"Faulty: rollouts cannot run blocks alone, .* {why}"):
        found = rollout(denoiser, tokens, PROCESS, seed=0)
    assert_same(
        dataclasses.replace(found, base_log_prob=found.log_prob),
        rollout(Whole(denoiser), tokens, PROCESS, base=Whole(denoiser), seed=0),
    )


def test_the_cache_tells_a_mask_s_size_to_every_release():
    cache = _cache_class()(None, 8)
    assert cache.get_seq_length(1) == 8
    assert cache.get_mask_sizes(4, 1) == cache.get_mask_sizes(torch.arange(8, 12), 1) == (12, 0)


def test_the_trial_leaves_the_model_and_random_state_as_they_were():
    model = BLOCKS["LLaDA 2 by 4"].model()
    model.model.layers[0].train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    as_denoiser(model, block_length=4).prefix_cache(tokens_of(1, 3))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_denoiser_of_one_s_own_may_offer_passes_over_blocks():
    """A table's: hidden states of the columns asked for, in the order in which they are asked for."""

    class Own(Tabular):
        blocks = Blocks(2)
        asked = None

        def prefix_cache(self, tokens, attention_mask=None):
            self.asked, outer = [], self

            class Passes:
                def hidden_states(self, rows, tokens, begin, end):
                    outer.asked.append((rows.tolist(), begin.tolist(), end.tolist()))
                    hidden = outer.hidden_states(tokens)
                    at = begin[:, None] + torch.arange(int((end - begin).max()))
                    return hidden.take_along_dim(at.clamp(max=hidden.shape[1] - 1)[..., None], dim=1)

            return Passes()

    torch.manual_seed(0)
    own = Own(torch.randn(3**5, 5, 2), tokens=3)
    tokens = torch.tensor([[2, 2, 2, 2, 2], [0, 1, 2, 0, 2]])
    process = dataclasses.replace(PROCESS, mask_token=2)
    found = rollout(own, tokens, process, seed=0)
    assert_same(
        dataclasses.replace(found, base_log_prob=found.log_prob),
        rollout(Whole(own), tokens, process, base=Whole(own), seed=0),
    )
    assert own.asked[:3] == [([0, 1], [0, 1], [1, 3]), ([0, 1], [1, 3], [3, 5]), ([0], [1], [3])]
    assert isinstance(own, nn.Module)
