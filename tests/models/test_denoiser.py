"""Hidden states and head of Hugging Face models: together the model's own logits, without computing them all."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

import dam
from dam.models import MaskedLM, Tabular, as_denoiser
from dam.models.tail import POSITIONS
from tests.architectures import small_sizes
from tests.models import standins
from tests.models.standins import llada

VOCABULARY = 13
SIZES = small_sizes(VOCABULARY)
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, cls_token_id=None, sep_token_id=None)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    bias = made.get_output_embeddings().bias
    if bias is not None:
        bias.data.normal_()  # zero when new: leaving it out must show
    return made


@pytest.fixture
def tokens(model, attention_mask):
    tokens = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(attention_mask == 0, model.config.pad_token_id)  # by which RoBERTa counts positions


@pytest.fixture
def attention_mask(model):
    mask = torch.ones(3, 7, dtype=torch.int64)
    if isinstance(model, BertForMaskedLM):
        mask[1, 4:6] = 0  # padding on the left would be refused
    else:
        mask[1, :3] = 0
    return mask


def through_the_head(denoiser, tokens, attention_mask):
    head = denoiser.head()
    return nn.functional.linear(denoiser.hidden_states(tokens, attention_mask), head.weight, head.bias)


def test_hidden_states_through_the_head_are_the_logits(model, tokens, attention_mask):
    with torch.no_grad():
        expected = model(tokens, attention_mask=attention_mask).logits
        logits = through_the_head(MaskedLM(model), tokens, attention_mask)
    seen = attention_mask.bool()
    # The same operations on the same numbers; only the shape of the last product may differ.
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_ordinary_forward_pass(model, tokens, attention_mask):
    gradients = []
    for forward in (
        lambda: model(tokens, attention_mask=attention_mask).logits,
        lambda: through_the_head(MaskedLM(model), tokens, attention_mask),
    ):
        model.zero_grad()
        forward()[:, -1:].log_softmax(dim=-1)[..., 2].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = gradients
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        # Sums of a few hundred terms in float32.
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_logits_are_computed(model, tokens):
    """But those of a few positions, once, which are compared with the model's."""
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    MaskedLM(model).hidden_states(tokens)
    MaskedLM(model).hidden_states(tokens)
    handle.remove()
    assert sizes == [POSITIONS * VOCABULARY, 0, 0]


def test_the_model_is_left_as_it_was(model, tokens):
    before = model(tokens).logits
    MaskedLM(model).hidden_states(tokens)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(IndexError):
        MaskedLM(model).hidden_states(tokens + VOCABULARY)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_wrapper_that_keeps_the_model_in_module_is_run_through(model, tokens):
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **arguments):
            self.calls += 1
            return self.module(**arguments)

    wrapper = Wrapper(model)
    assert torch.equal(MaskedLM(wrapper).hidden_states(tokens), MaskedLM(model).hidden_states(tokens))
    assert wrapper.calls == 1


def test_models_that_do_not_fit_are_refused(tokens):
    with pytest.raises(TypeError, match=r"must have get_output_embeddings\(\); Linear has none"):
        MaskedLM(nn.Linear(2, 2))

    class Headless(nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(TypeError, match="of Headless gives no linear layer"):
        MaskedLM(Headless()).head()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.output = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

        def get_output_embeddings(self):
            return self.output

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            return self.output(hidden) + self.output(2 * hidden)

    with pytest.raises(RuntimeError, match="output layer of Twice ran 2 times"):
        MaskedLM(Twice()).hidden_states(tokens)


def test_with_its_adapter_off_a_model_is_the_base(tokens):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    torch.manual_seed(0)
    base = MODELS["bert"]().eval()
    expected = MaskedLM(base).hidden_states(tokens)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).eval()
    assert not torch.allclose(MaskedLM(adapted).hidden_states(tokens), expected)
    torch.testing.assert_close(MaskedLM(adapted, adapter=False).hidden_states(tokens), expected)


def test_an_adapter_on_the_head_is_part_of_it(tokens):
    """Which PEFT keeps beside the layer's weight: the logits of a forward pass, without the merged head."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    torch.manual_seed(0)
    base = MODELS["bert"]().eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["decoder"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    logits = adapted(input_ids=tokens).logits.flatten(0, 1)
    target = logits.argmax(dim=1)
    for adapter in (True, False):
        denoiser = MaskedLM(adapted, adapter=adapter)
        hidden, head = denoiser.hidden_states(tokens).flatten(0, 1), denoiser.head()
        value = dam.linear_log_prob(hidden, head.weight, target, bias=head.bias, lora=head.lora)
        expected = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
        # Logits near 1 of a small model, in float32.
        assert torch.allclose(value, expected, atol=1e-5) == adapter
    adapted.merge_adapter()
    assert MaskedLM(adapted).head().lora is None
    adapted.unmerge_adapter()
    with_dropout = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["decoder"])
    noisy = peft.get_peft_model(MODELS["bert"](), with_dropout)
    assert MaskedLM(noisy.eval()).head().lora is not None
    with pytest.raises(ValueError, match=r"must have lora_dropout=0 in training; got 0\.5"):
        MaskedLM(noisy.train()).head()


def test_a_table_has_a_row_for_every_state():
    table = Tabular(torch.arange(27.0)[:, None, None].expand(27, 3, 2).clone(), tokens=3)
    states = torch.cartesian_prod(*[torch.arange(3)] * 3)
    assert table.index(states).tolist() == list(range(27))
    logits = table.hidden_states(states) @ table.head().weight.T
    assert torch.equal(logits, table.logits)


# ---- padding on the left


SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_a_token_that_a_model_counts_positions_by_is_the_one_to_pad_with():
    """RoBERTa's positions are of tokens that are not its own pad token: rows padded with another are refused."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=40)).eval()
    with torch.no_grad():
        model.roberta.embeddings.position_embeddings.weight.normal_()
    tokens = torch.tensor([[7, 3, 9, 7, 7, 7], [2, 2, 9, 7, 7, 7]])
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    own = torch.where(mask == 0, 1, tokens)
    hidden = MaskedLM(model).hidden_states(own, mask)
    torch.testing.assert_close(hidden[1:, 2:], MaskedLM(model).hidden_states(tokens[1:, 2:], mask[1:, 2:]))
    with pytest.raises(ValueError, match="padded on the left"):
        MaskedLM(model).hidden_states(tokens, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_heed_its_mask_is_refused_padded_rows(dtype):
    """Rounding of 16 bits hides half of what padding changes; another token behind the row does not."""
    tokens, mask = torch.full((2, 12), 18), torch.ones(2, 12, dtype=torch.int64)
    tokens[:, :6], tokens[1, :3], mask[1, :3] = 3, 17, 0
    for heeds_mask in (True, False):
        model = standins.LLaDAModelLM(llada.LLaDAConfig(heeds_mask=heeds_mask)).eval().to(dtype)
        if heeds_mask:
            as_denoiser(model).hidden_states(tokens, mask)
        else:
            with pytest.raises(ValueError, match="padded on the left"):
                as_denoiser(model).hidden_states(tokens, mask)


@pytest.mark.parametrize("length", [1, 9])
def test_padding_is_tried_within_a_table_of_positions(length):
    """An odd length, as long as the table; and where the config says -1 for no pad token."""
    model = BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=max(2, length))).eval()
    model.config.pad_token_id = -1
    tokens = torch.full((2, length), 7)
    assert MaskedLM(model).hidden_states(tokens, torch.ones_like(tokens)).shape == (2, length, 16)


@pytest.mark.parametrize("positions", range(1, 9))
def test_a_head_is_had_before_any_call_of_a_model_of_any_length(positions):
    """Of a table of so many positions; it is the one that later calls go with."""
    model = BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=positions)).eval()
    denoiser, tokens = MaskedLM(model), torch.arange(positions)[None]
    head = denoiser.head()
    with torch.no_grad():
        logits = head.logits(denoiser.hidden_states(tokens))
        # The same products in another shape.
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
