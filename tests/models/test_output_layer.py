"""Adapters that PEFT puts on an output layer: part of the head with their gradients, or refused by name."""

import copy
import inspect

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, EsmConfig, EsmForMaskedLM

from dam.models import MaskedLM
from dam.models.output_layer import head_of
from tests.architectures import small_sizes

peft = pytest.importorskip("peft", reason="needs the package peft")

VOCABULARY = 13
SIZES = {**small_sizes(VOCABULARY), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEAD = ["cls.predictions.decoder"]
APPLIED = {
    "LoRA": peft.LoraConfig(target_modules=HEAD, r=2, lora_alpha=3),
    "rsLoRA": peft.LoraConfig(target_modules=HEAD, r=2, use_rslora=True),
    "DoRA": peft.LoraConfig(target_modules=HEAD, r=2, lora_alpha=3, use_dora=True),
    "lora_bias": peft.LoraConfig(target_modules=HEAD, r=2, lora_alpha=3, lora_bias=True),
    "bias all": peft.LoraConfig(target_modules=HEAD, r=2, bias="all"),
    "modules_to_save": peft.LoraConfig(target_modules=["query"], r=2, modules_to_save=HEAD),
    "trainable_token_indices": peft.LoraConfig(target_modules=["query"], r=2, trainable_token_indices=[3, 5]),
    "trainable tokens alone": peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[3, 5]),
    "another layer": peft.IA3Config(target_modules=["transform.dense"], feedforward_modules=[]),
}
REFUSED = {
    "IA3": (peft.IA3Config(target_modules=HEAD, feedforward_modules=[]), "peft.tuners.ia3"),
    "LoHa": (peft.LoHaConfig(target_modules=HEAD, r=2), "peft.tuners.loha"),
    "LoKr": (peft.LoKrConfig(target_modules=HEAD, r=2), "peft.tuners.lokr"),
    "OFT": (peft.OFTConfig(target_modules=HEAD, r=2, oft_block_size=0), "peft.tuners.oft"),
    "VeRA": (peft.VeraConfig(target_modules=HEAD, r=2), "peft.tuners.vera"),
    "AdaLoRA": (peft.AdaLoraConfig(target_modules=HEAD, init_r=2, total_step=10), "peft.tuners.adalora"),
}


def bert(tied=False):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=tied))
    model.get_output_embeddings().bias.data.normal_()
    return model


def adapted(config, model):
    """A model with an adapter that has been trained, which shows."""
    made = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture
def tokens():
    return torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


def log_prob_of(denoiser, tokens):
    """Differentiable, of all tokens."""
    hidden, head = denoiser.hidden_states(tokens), denoiser.head()
    logits = hidden @ head.weight.t()
    if head.lora is not None:
        logits = logits + head.lora.scale * (hidden @ head.lora.a.t()) @ head.lora.b.t()
    return (logits if head.bias is None else logits + head.bias).log_softmax(dim=-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", APPLIED)
def test_log_probabilities_and_gradients_are_the_model_s_own(kind, tied, tokens):
    model = adapted(APPLIED[kind], bert(tied))
    seen = []
    for forward in (
        lambda: model(input_ids=tokens).logits.log_softmax(dim=-1),
        lambda: log_prob_of(MaskedLM(model), tokens),
    ):
        model.zero_grad()
        log_prob = forward()
        log_prob[:, 3:, 2:4].sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append((log_prob.detach(), gradients))
    (expected, theirs), (log_prob, ours) = seen
    # Numbers of up to 10 in float32, by other orders of the same sums.
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=2e-5)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", APPLIED)
def test_with_the_adapter_off_they_are_the_base_s(kind, tied, tokens):
    model = adapted(APPLIED[kind], bert(tied))
    trainable = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        with model.disable_adapter():
            expected = model(input_ids=tokens).logits.log_softmax(dim=-1)
        for parameter, before in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)
        log_prob = log_prob_of(MaskedLM(model, adapter=False), tokens)
        torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=2e-5)
        on = log_prob_of(MaskedLM(model), tokens)
        assert not torch.allclose(on, expected, atol=1e-2)
        torch.testing.assert_close(on, model(input_ids=tokens).logits.log_softmax(dim=-1), rtol=1e-5, atol=2e-5)
    assert trainable == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(kind, tokens):
    """Also new, when they do nothing yet."""
    config, name = REFUSED[kind]
    model = peft.get_peft_model(bert(), copy.deepcopy(config)).eval()
    for call in (MaskedLM(model).head, lambda: MaskedLM(model).hidden_states(tokens)):
        with pytest.raises(ValueError, match=f"'default' on the output layer is of a kind, {name}.* Leave the output"):
            call()
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=tokens).logits.log_softmax(dim=-1)
        torch.testing.assert_close(log_prob_of(MaskedLM(model, adapter=False), tokens), expected)


def test_forms_of_lora_without_a_product_are_refused_by_name():
    if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip(f"peft {peft.__version__} has no activated LoRA")
    config = peft.LoraConfig(target_modules=HEAD, r=2, alora_invocation_tokens=[3])
    layer = peft.get_peft_model(bert(), config).get_output_embeddings()
    with pytest.raises(ValueError, match="ALoraLinearVariant"):
        head_of(layer)


def test_a_switched_off_adapter_that_was_frozen_stays_so(tokens):
    """PEFT makes it trainable as it switches it on again."""
    model = adapted(APPLIED["modules_to_save"], bert())
    model.requires_grad_(False)
    MaskedLM(model, adapter=False).hidden_states(tokens)
    MaskedLM(model, adapter=False).head()
    assert not any(p.requires_grad for p in model.parameters())


def test_dora_in_bfloat16_is_as_exact_as_the_model_s_own(tokens):
    """Magnitudes close to the norms, whose ratio bfloat16 would round to 1."""
    model = peft.get_peft_model(bert(), copy.deepcopy(APPLIED["DoRA"])).eval()
    magnitude = model.get_output_embeddings().lora_magnitude_vector["default"].weight
    magnitude.data *= 1.0 + 0.003 * torch.arange(VOCABULARY) / VOCABULARY
    head = head_of(model.get_output_embeddings())
    plain = model.get_output_embeddings().base_layer.weight
    expected = 1.0 + 0.003 * torch.arange(VOCABULARY) / VOCABULARY
    torch.testing.assert_close(head.weight.norm(dim=1) / plain.norm(dim=1), expected, rtol=2e-6, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        again = head_of(model.get_output_embeddings())
    torch.testing.assert_close(again.weight, head.weight, rtol=2e-6, atol=0.0)


def test_dora_s_norms_come_in_blocks(monkeypatch):
    layer = adapted(APPLIED["DoRA"], bert()).get_output_embeddings()
    expected = head_of(layer)
    monkeypatch.setattr("dam.models.output_layer._BLOCK_ROWS", 5)
    torch.testing.assert_close(head_of(layer).weight, expected.weight)


def test_a_head_with_its_bias_outside_may_be_saved_as_a_module(tokens):
    """The bias is then the copy's with the adapter on, the original's with it off."""
    torch.manual_seed(0)
    esm = EsmForMaskedLM(EsmConfig(**SIZES, position_embedding_type="rotary", mask_token_id=3, token_dropout=False))
    config = peft.LoraConfig(target_modules=["query"], r=2, modules_to_save=["lm_head"])
    model = adapted(config, esm)
    with torch.no_grad():
        for adapter in (True, False, True):
            denoiser = MaskedLM(model, adapter=adapter)
            with denoiser._as_asked():
                expected = model(input_ids=tokens).logits.log_softmax(dim=-1)
            torch.testing.assert_close(log_prob_of(denoiser, tokens), expected, rtol=1e-5, atol=2e-5)
    saved = model.base_model.model.lm_head.modules_to_save["default"].bias
    assert MaskedLM(model).head().bias.data_ptr() == saved.data_ptr()


def test_several_adapters_or_merged_ones():
    model = peft.get_peft_model(bert(), copy.deepcopy(APPLIED["LoRA"]))
    model.add_adapter("other", copy.deepcopy(APPLIED["LoRA"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="may have one active adapter; got default, other"):
        head_of(model.get_output_embeddings())
    merged = adapted(APPLIED["DoRA"], bert())
    merged.merge_adapter()
    assert head_of(merged.get_output_embeddings()).lora is None
    with (
        merged.disable_adapter(),
        pytest.raises(ValueError, match=r"switched off but merged: call unmerge_adapter\(\)"),
    ):
        head_of(merged.get_output_embeddings())
