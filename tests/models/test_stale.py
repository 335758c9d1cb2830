"""Passes over blocks with keys and values of all else as they were when the block began: the law that they have."""

import functools

import pytest
import torch

from dam.models import MaskedLM, as_denoiser
from dam.models.attention import additive, positions
from dam.rollout import jump_log_prob, log_prob_over_orders, rollout
from dam.train.base import with_base
from tests.models.standins.trunk import MASK
from tests.models.test_families import FAMILIES, PROCESS, lora_on, qwen_model
from tests.models.test_prefix import completions, sizes_of

LENGTH = 4


def denoiser_of(model, **options):
    return as_denoiser(model.eval(), attention="full", **options)


@torch.no_grad()
def at_two_states(denoiser, before, now, begin, end, mask):
    """Hidden states of a row's block in one pass: of the row as it was, and behind it of its block as it is now.

    What was sees what was; the block sees itself, and of what was all but the block.
    """
    length, width = len(before), end - begin
    seen = torch.zeros(length + width, length + width, dtype=torch.bool)
    seen[:length, :length] = seen[length:, :length] = True
    seen[length:, begin:end] = False
    seen[length:, length:] = True
    seen &= torch.cat((mask, torch.ones(width))).bool()
    seen |= torch.eye(length + width, dtype=torch.bool)
    position = positions(before[None], mask[None])
    hidden = denoiser.model.model(
        input_ids=torch.cat((before, now[begin:end]))[None],
        attention_mask=additive(seen[None, None], torch.float32),
        position_ids=torch.cat((position, position[:, begin:end]), dim=1),
        use_cache=False,
    ).last_hidden_state[0]
    if denoiser._shift:
        return torch.cat((hidden[begin - 1 : begin], hidden[length:-1]))
    return hidden[length:]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("prompts", [(5, 5, 5), (6, 3, 4)])
def test_hidden_states_are_those_of_a_pass_over_both_states(shift, prompts):
    """To rounding: sums of the same numbers in another order."""
    denoiser = denoiser_of(qwen_model(), shift=shift, approximate_cache=LENGTH)
    tokens, mask = completions(*prompts, length=8)
    passes = denoiser.prefix_cache(tokens, mask)
    rows, begin = torch.arange(3), torch.tensor([tokens.shape[1] - 8] * 3)
    for block in range(2):
        before = tokens.clone()
        for call in range(3):
            if call:
                tokens[:, begin[0] + call] = call  # what was drawn
            some = rows[call % 2 :]  # not all rows take part in each call
            if call == 0:
                some = rows
            hidden = passes.hidden_states(some, tokens[some], begin[some], begin[some] + LENGTH)
            for row, found in zip(some.tolist(), hidden, strict=True):
                start = int(begin[row])
                expected = at_two_states(denoiser, before[row], tokens[row], start, start + LENGTH, mask[row])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        tokens[:, begin[0] : begin[0] + LENGTH] = 7 + block
        begin = begin + LENGTH


def test_rows_at_other_blocks_than_each_other_are_as_alone():
    denoiser = denoiser_of(qwen_model(), approximate_cache=LENGTH)
    tokens, mask = completions(6, 3, 4)
    tokens[1, -9:-5] = 3  # begins a block late
    together = rollout(denoiser, tokens, PROCESS, attention_mask=mask, seed=3)
    for n in range(3):
        one = slice(n, n + 1)
        cut = int((mask[n] == 0).sum())
        alone = rollout(denoiser, tokens[one, cut:], PROCESS, seed=3, row_ids=torch.tensor([n]))
        assert torch.equal(alone.final[0], together.final[n, cut:])
        jumps = alone.call.shape[1]
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[n, :jumps], rtol=0, atol=1e-5)


def test_blocks_of_one_position_are_exact():
    """Each call is then the first at its block."""
    model, (tokens, mask) = qwen_model(), completions(6, 3, 4)
    found = rollout(denoiser_of(model, approximate_cache=1), tokens, PROCESS, attention_mask=mask, seed=3)
    exact = rollout(denoiser_of(model), tokens, PROCESS, attention_mask=mask, seed=3, block_length=1)
    assert torch.equal(found.final, exact.final)
    torch.testing.assert_close(found.log_prob, exact.log_prob, rtol=0, atol=1e-5)
    longer = rollout(denoiser_of(model, approximate_cache=LENGTH), tokens, PROCESS, attention_mask=mask, seed=3)
    of_its_own = jump_log_prob(denoiser_of(model), longer, PROCESS, attention_mask=mask)
    assert float((longer.log_prob - of_its_own).abs().max()) > 1e-3  # another law


def test_path_weights_are_of_the_same_passes():
    """An adapter that does nothing leaves weights of 1, whatever the order; one that does, those of its own passes."""
    model = lora_on(qwen_model())
    denoiser = denoiser_of(model, approximate_cache=LENGTH)
    model, base = with_base(model, None, None)
    initial = base.denoiser(model, functools.partial(denoiser_of, approximate_cache=LENGTH))
    tokens, mask = completions(6, 3, 4)
    paths = rollout(denoiser, tokens, PROCESS, base=initial, attention_mask=mask, seed=3)
    torch.testing.assert_close(paths.log_ratio, torch.zeros_like(paths.log_ratio), rtol=0, atol=1e-5)
    over = log_prob_over_orders(denoiser, initial, paths, PROCESS, orders=2, attention_mask=mask, seed=3)
    torch.testing.assert_close(over.log_ratio, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    changed = jump_log_prob(denoiser, paths, PROCESS, attention_mask=mask)
    assert float((changed - paths.log_prob).abs().max()) > 1e-2
    kept = jump_log_prob(initial, paths, PROCESS, attention_mask=mask)
    torch.testing.assert_close(kept, paths.log_prob, rtol=0, atol=1e-5)


def test_a_call_runs_its_block_but_for_the_first_of_a_block():
    model = qwen_model()
    denoiser = denoiser_of(model, approximate_cache=LENGTH)
    tokens, _ = completions(5, 5, length=8)
    denoiser.prefix_cache(tokens)  # the trial
    calls = sizes_of(model)
    rollout(denoiser, tokens, PROCESS, seed=0)
    assert calls == [(2, 13), *[(2, LENGTH)] * 3] * 2


@pytest.mark.parametrize("name", ["A2D", "Dream"])
def test_families_with_full_attention_have_it(name):
    model, (tokens, mask) = FAMILIES[name].model(), completions(6, 3, 4)
    denoiser = as_denoiser(model, approximate_cache=LENGTH)
    paths = rollout(denoiser, tokens, PROCESS, attention_mask=mask, seed=3)
    assert not bool((paths.final == MASK).any())
    torch.testing.assert_close(jump_log_prob(denoiser, paths, PROCESS, attention_mask=mask), paths.log_prob)


def test_what_has_none_says_so():
    tokens, _ = completions(6, 3, 4)
    with pytest.raises(ValueError, match="approximate_cache is for full attention"):
        MaskedLM(qwen_model(), attention="block-causal", block_length=4, approximate_cache=4)
    with pytest.raises(ValueError, match="ModernBertForMaskedLM has no approximate_cache: it takes no past_key_values"):
        rollout(as_denoiser(FAMILIES["ModernBERT"].model(), approximate_cache=4), tokens, PROCESS, seed=0)
    with pytest.raises(ValueError, match="it is in training mode"):
        rollout(as_denoiser(qwen_model().train(), attention="full", approximate_cache=4), tokens, PROCESS, seed=0)
    # Told nothing of its attention: it makes a causal mask of its own of whole sequences, and of what is handed in not.
    with pytest.warns(UserWarning, match="other hidden states than one pass over all"):
        causal = as_denoiser(qwen_model().eval(), approximate_cache=4)
        with pytest.raises(ValueError, match="passes over blocks with a cache fail"):
            rollout(causal, tokens, PROCESS, seed=0)
    with pytest.raises(ValueError, match="block_length is 3"):
        rollout(denoiser_of(qwen_model(), approximate_cache=4), tokens, PROCESS, seed=0, block_length=3)
