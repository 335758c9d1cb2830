"""Pre-norm RoBERTa's pass of our own gives what the model gives, at the positions that are read, or is not taken."""

import pytest
import torch
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

from dam.adjoint import MatchingTargets, estimator_loss
from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.models import Head, MaskedLM, PreNormRoberta, as_denoiser
from dam.models import roberta as module
from dam.models.denoiser import hidden_at
from dam.rollout import rollout
from dam.train.base import InitialParameters
from dam.train.sampling import _InBlocks

MASK, PAD, VOCABULARY, LENGTH, PLACES = 0, 1, 7, 6, 10
PROCESS = MaskedCTMC(mask_token=MASK)


def model_of(layers=3, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = RobertaPreLayerNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=PLACES,
        type_vocab_size=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **settings},
    )
    model = RobertaPreLayerNormForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales are 0 and 1 at first
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def states_of(rows, padded=False):
    """Tokens [rows, 6], some of them masks, and their attention mask; with padding in front of every other row."""
    tokens = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
    tokens[:, 2::2] = MASK
    mask = torch.ones_like(tokens)
    if padded:
        tokens[::2, :2], mask[::2, :2] = PAD, 0
    return tokens, mask


# Of rows: every one once, some several times, some not at all, in no order.
READ = {
    "one of each": lambda rows: (torch.arange(rows), torch.arange(rows) % 2 + 3),
    "all masks": lambda rows: torch.nonzero(states_of(rows)[0] == MASK, as_tuple=True),
    "any": lambda rows: (torch.tensor([2, 0, 2, 2, 0, 1]), torch.tensor([5, 3, 2, 5, 3, 4])),
    "a single one": lambda rows: (torch.tensor([1]), torch.tensor([4])),
}


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of our own."""
    seen = []
    own = module._states_at
    monkeypatch.setattr(module, "_states_at", lambda *given: seen.append(given) or own(*given))
    return seen


def test_it_is_the_family_of_its_class():
    assert type(as_denoiser(model_of())) is PreNormRoberta


def test_hidden_states_that_another_class_makes_are_read_where_that_makes_them(passes):
    class Doubled(PreNormRoberta):
        def hidden_states(self, tokens, attention_mask=None):
            return 2 * super().hidden_states(tokens, attention_mask)

    model, (tokens, mask) = model_of(), states_of(3)
    row, position = READ["any"](3)
    wanted = 2 * PreNormRoberta(model).hidden_states(tokens, mask)[row, position]
    assert torch.equal(Doubled(model).hidden_at(tokens, mask, row, position), wanted) and not passes
    patched = PreNormRoberta(model)
    patched.hidden_states = lambda *given: 2 * PreNormRoberta.hidden_states(patched, *given)
    assert torch.equal(patched.hidden_at(tokens, mask, row, position), wanted) and not passes


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [3, 64])  # in 64 there are more tokens than pairs of token and place
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("read", READ)
def test_hidden_states_and_gradients_are_the_model_s(read, layers, rows, padded, passes):
    """In float64, to what rounding explains; a bias of keys has none, as it leaves attention as it is."""
    model, (tokens, mask) = model_of(layers), states_of(rows, padded)
    denoiser, (row, position) = PreNormRoberta(model.train()), READ[read](rows)
    expected, found = (
        denoiser.hidden_states(tokens, mask)[row, position],
        denoiser.hidden_at(tokens, mask, row, position),
    )
    assert len(passes) == 2  # the trial, and the pass
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    used = [
        p for name, p in model.named_parameters() if not name.startswith("lm_head.decoder") and name != "lm_head.bias"
    ]
    used = [
        p for p in used if p is not model.get_output_embeddings().weight or p is model.get_input_embeddings().weight
    ]
    gradients = [torch.autograd.grad(hidden.sin().sum(), used) for hidden in (expected, found)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_without_gradients_or_a_mask_too(passes):
    tokens, _ = states_of(64)
    denoiser, (row, position) = PreNormRoberta(model_of(hidden_act="gelu")), READ["any"](64)
    with torch.no_grad():
        found, whole = denoiser.hidden_at(tokens, None, row, position), denoiser.hidden_states(tokens)[row, position]
    assert len(passes) == 2
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_pairs_of_token_and_place_are_looked_up_where_they_are_fewer_than_tokens(monkeypatch):
    model, sizes = model_of(), []
    embeddings = type(model.roberta_prelayernorm.embeddings)
    own = embeddings.forward
    counted = lambda self, input_ids, **given: sizes.append(input_ids.numel()) or own(self, input_ids, **given)  # noqa: E731
    PreNormRoberta(model).hidden_at(states_of(3)[0], None, *READ["any"](3))
    monkeypatch.setattr(embeddings, "forward", counted)
    for rows in (3, 64):
        PreNormRoberta(model).hidden_at(states_of(rows)[0], None, *READ["any"](rows))
    assert sizes == [3 * LENGTH, VOCABULARY * PLACES]


def test_nothing_is_read(passes):
    model, (tokens, mask) = model_of().train(), states_of(5)
    found = PreNormRoberta(model).hidden_at(tokens, mask, torch.zeros(0).long(), torch.zeros(0).long())
    found.sum().backward()
    assert found.shape == (0, 16) and not passes


def test_sequences_that_are_too_long_are_refused_as_the_model_does():
    denoiser = PreNormRoberta(model_of())
    denoiser.hidden_at(states_of(64)[0], None, *READ["any"](64))
    tokens = torch.full((64, PLACES - PAD), 3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        denoiser.hidden_at(tokens, None, *READ["any"](64))


def hooked(model):
    model.roberta_prelayernorm.encoder.layer[1].register_forward_hook(lambda *_: None)


def patched(model):
    layer = model.roberta_prelayernorm.encoder.layer[0]
    layer.forward = layer.forward  # as accelerate does


def adapted(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"], init_lora_weights=False), model)


def checkpointed(model):
    model.gradient_checkpointing_enable()
    model.train()


def dropping(model):
    model.train()
    model.roberta_prelayernorm.encoder.layer[2].attention.self.dropout.p = 0.1


def halved(model):
    model.bfloat16()


@pytest.mark.parametrize("change", [hooked, patched, adapted, checkpointed, dropping, halved])
def test_what_is_more_than_the_class_is_run_by_the_model(change, passes):
    model, (tokens, mask) = model_of(), states_of(5)
    change(model)
    row, position = READ["any"](5)
    denoiser = PreNormRoberta(model)
    denoiser.hidden_states(tokens, mask)  # the trials of any MaskedLM
    torch.manual_seed(1)
    found = denoiser.hidden_at(tokens, mask, row, position)
    torch.manual_seed(1)
    expected = denoiser.hidden_states(tokens, mask)[row, position]
    assert not passes
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"attention": "full"}, {"shift": 1}])
def test_another_law_is_run_by_the_model(options, passes):
    tokens, mask = states_of(5)
    row, position = READ["any"](5)
    denoiser = PreNormRoberta(model_of(), **options)
    found = denoiser.hidden_at(tokens, mask, row, position)
    assert not passes and torch.equal(found, denoiser.hidden_states(tokens, mask)[row, position])


def test_a_wrapper_and_autocast_are_run_by_the_model(passes):
    (tokens, mask), (row, position) = states_of(5), READ["any"](5)
    model = model_of(dtype=torch.float32)
    PreNormRoberta(torch.nn.DataParallel(model)).hidden_at(tokens, mask, row, position)
    with torch.autocast("cpu", torch.bfloat16):
        PreNormRoberta(model).hidden_at(tokens, mask, row, position)
    assert not passes


def test_a_pass_that_gives_something_else_is_found_out_and_not_taken(monkeypatch):
    """As of a release of transformers whose class computes something else; tried again when a run begins."""
    model, (tokens, mask), (row, position) = model_of(), states_of(5), READ["any"](5)
    denoiser, own = PreNormRoberta(model), module._states_at
    whole = denoiser.hidden_states(tokens, mask)[row, position]
    monkeypatch.setattr(module, "_states_at", lambda *given: 1.01 * own(*given))
    assert torch.equal(denoiser.hidden_at(tokens, mask, row, position), whole)
    monkeypatch.setattr(module, "_states_at", lambda *given: 1.0001 * own(*given))
    assert torch.equal(denoiser.hidden_at(tokens, mask, row, position), whole)
    denoiser.compare(tokens, mask)
    assert not torch.equal(denoiser.hidden_at(tokens, mask, row, position), whole)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(order="confidence"), Decoding(guidance=0.5)])
def test_a_rollout_draws_the_same(decoding, passes):
    tokens, mask = (x.repeat_interleave(4, dim=0) for x in states_of(8, padded=True))
    model, base = model_of(), model_of(layers=2)
    given = {"attention_mask": mask, "decoding": decoding, "seed": 3}
    found = rollout(PreNormRoberta(model), tokens, PROCESS, base=PreNormRoberta(base), **given)
    assert len(passes) > 2
    expected = rollout(MaskedLM(model), tokens, PROCESS, base=MaskedLM(base), **given)
    assert torch.equal(found.final, expected.final) and torch.equal(found.position, expected.position)
    for name in ("log_prob", "base_log_prob"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_runs_equal_states_once_in_training_mode_too(padded, passes):
    """The loss and its gradient are those of all states, each run by the model."""
    model, (tokens, mask) = model_of().train(), states_of(4, padded)
    of = torch.tensor([2, 0, 2, 1, 0, 2])
    states, mask = tokens[of], mask[of]
    row, position = torch.nonzero(states == MASK, as_tuple=True)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(2, VOCABULARY, (len(row), 1), generator=generator)
    weight = torch.rand(len(row), 1, generator=generator, dtype=torch.float64)
    targets = MatchingTargets(states, torch.zeros_like(of), row, position, target, weight)
    once, each = (estimator_loss(cls(model), targets, PROCESS, mask) for cls in (PreNormRoberta, MaskedLM))
    assert [len(given[1]) for given in passes] == [3, 3]  # the trial, and the pass
    used = [p for name, p in model.named_parameters() if "pooler" not in name]
    torch.testing.assert_close(once, each, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, used) for loss in (once, each)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_rows_of_a_model_that_drops_are_not_run_once():
    model, (tokens, mask) = model_of(), states_of(4)
    dropping(model)
    assert not PreNormRoberta(model).equal_rows(tokens, mask)
    assert PreNormRoberta(model_of().train()).equal_rows(tokens, mask)


class Places:
    """A denoiser that has hidden states at positions only; knows which it was asked for."""

    def __init__(self):
        self.asked = []
        self.weight = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(0))

    def hidden_states(self, tokens, attention_mask=None):
        raise AssertionError("of positions only")

    def hidden_at(self, tokens, attention_mask, row, position):
        self.asked += list(zip(tokens[row].tolist(), position.tolist(), strict=True))
        return torch.stack([tokens[row].sum(dim=1), position, row * 0, row * 0 + 1], dim=1).float() / 9

    def head(self):
        return Head(self.weight, None)


def test_rollouts_and_losses_ask_for_the_positions_that_they_read():
    denoiser, (tokens, _) = Places(), states_of(3)
    made = rollout(denoiser, tokens, PROCESS, seed=0)
    assert sorted(position for _, position in denoiser.asked) == sorted(made.position.flatten().tolist())
    assert all(state[position] == MASK for state, position in denoiser.asked)
    denoiser.asked.clear()
    row, position = torch.tensor([0, 2, 2]), torch.tensor([2, 4, 2])
    targets = MatchingTargets(tokens, torch.arange(3), row, position, torch.full((3, 1), 3), torch.ones(3, 1))
    estimator_loss(denoiser, targets, PROCESS)
    assert denoiser.asked == [(tokens[r].tolist(), p) for r, p in zip(row.tolist(), position.tolist(), strict=True)]


def test_a_base_of_first_parameters_runs_them(passes):
    model, (tokens, mask), (row, position) = model_of(), states_of(5), READ["any"](5)
    base = InitialParameters(model).denoiser(model, as_denoiser)
    before = MaskedLM(model).hidden_states(tokens, mask)[row, position].detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(base.hidden_at(tokens, mask, row, position), before, rtol=0, atol=1e-12)
    assert passes and not torch.allclose(PreNormRoberta(model).hidden_at(tokens, mask, row, position), before)


def test_a_base_in_the_blocks_of_a_model_is_read_as_itself(passes):
    base, (tokens, mask) = PreNormRoberta(model_of()), states_of(3)
    row, position = READ["any"](3)
    wanted = base.hidden_at(tokens, mask, row, position)
    before = len(passes)
    inside = _InBlocks(base, PreNormRoberta(model_of()))
    assert torch.equal(hidden_at(inside, tokens, mask, row, position), wanted) and len(passes) == before + 1
