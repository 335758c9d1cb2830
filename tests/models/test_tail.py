"""What a model does to logits after its output layer is found and followed, or refused, whatever class it is."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig

from dam.models import MaskedLM
from tests.architectures import small_sizes

VOCABULARY, WIDTH = 11, 8


class Toy(nn.Module):
    """An embedding, an output layer and, after it, `tail`, a function of this module and its logits."""

    def __init__(self, tail, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.output = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.outside = nn.Parameter(torch.randn(VOCABULARY))
        self.register_buffer("fixed", torch.randn(1, VOCABULARY))
        self.unused = nn.Parameter(torch.randn(VOCABULARY))
        self.tail, self.runs = tail, 0

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids, attention_mask=None):
        self.runs += 1
        return self.tail(self, self.output(torch.tanh(self.mixed(self.embedding(input_ids)))))


def position_before(logits):
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


FOLLOWED = {
    "nothing": lambda model, logits: logits,
    "scaled": lambda model, logits: logits * 0.3,
    "divided": lambda model, logits: logits / 8,
    "parameter added": lambda model, logits: logits + model.outside,
    "buffer added": lambda model, logits: logits + model.fixed,
    "position before": lambda model, logits: position_before(logits),
    "all of it": lambda model, logits: position_before(logits * -0.7) + model.outside,
    "log-probabilities": lambda model, logits: (logits * 0.3 + model.outside).log_softmax(dim=-1),
    "in float32": lambda model, logits: logits.float() * 0.3,
}


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))


def through_the_head(denoiser, tokens):
    hidden, head = denoiser.hidden_states(tokens), denoiser.head()
    return nn.functional.linear(hidden, head.weight, head.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FOLLOWED)
def test_it_becomes_part_of_hidden_states_and_head(name, bias, tokens):
    model, gradients = Toy(FOLLOWED[name], bias), []
    logits = [value.log_softmax(dim=-1) for value in (model(tokens), through_the_head(MaskedLM(model), tokens))]
    for value in logits:
        model.zero_grad()
        value[..., 2].sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    # Numbers near 1 in float32, rounded in another order.
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 0.125])
def test_in_bfloat16_a_scale_rounds_as_the_model_s_does(scale, tokens):
    model = Toy(lambda model, logits: logits * scale).bfloat16()
    exact = copy.deepcopy(model).double()(tokens).log_softmax(dim=-1).detach()
    hidden = MaskedLM(model).hidden_states(tokens)
    ours = MaskedLM(model).head().logits(hidden).double().log_softmax(dim=-1)
    theirs = model(tokens).detach().double().log_softmax(dim=-1)
    assert hidden.dtype == torch.bfloat16
    # Both are of the hidden states' rounding, 2^-9 of numbers near 1; ours does not round logits.
    assert float((ours - exact).abs().max()) < 2 * float((theirs - exact).abs().max())


def test_a_new_bias_of_zero_is_found(tokens):
    """So that it is trained, as the model's own loss would; also where it is frozen until later."""
    for frozen in (False, True):
        model = Toy(FOLLOWED["parameter added"], bias=False)
        nn.init.zeros_(model.outside).requires_grad_(not frozen)
        assert MaskedLM(model).head().bias is not None
        assert MaskedLM(model).head().bias.data_ptr() == model.outside.data_ptr()
        assert model.outside.requires_grad != frozen


def test_it_is_looked_for_once_and_leaves_nothing_behind(tokens):
    model = Toy(FOLLOWED["parameter added"])
    model.unused.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    MaskedLM(model).hidden_states(tokens)
    assert model.runs == 2  # and the one that was asked for
    MaskedLM(model).hidden_states(tokens)
    MaskedLM(model).head()
    assert model.runs == 3
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not model.output._forward_pre_hooks and not model.output._forward_hooks
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in model.parameters())
    other = copy.deepcopy(model)
    other.tail = FOLLOWED["scaled"]  # a copy is another model
    torch.testing.assert_close(through_the_head(MaskedLM(other), tokens), other(tokens))


def test_parameters_are_looked_up_at_each_call(tokens):
    model = Toy(FOLLOWED["parameter added"])
    MaskedLM(model).head()
    model.outside = nn.Parameter(torch.randn(VOCABULARY))
    torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), model(tokens))


def test_it_is_found_in_inference_mode_and_without_gradients(tokens):
    for mode in (torch.inference_mode, torch.no_grad):
        model = Toy(FOLLOWED["all of it"])
        with mode():
            torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), model(tokens))
            assert not torch.is_grad_enabled()


def never(logits):
    return logits.masked_fill(torch.arange(VOCABULARY) == 4, -torch.inf)


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        (
            lambda m, z: 2.0 * torch.tanh(z / 2.0),
            ValueError,
            r"where the layer gives 64 the model gives 2, .* differ by",
        ),
        (lambda m, z: 1e4 * torch.tanh(z / 1e4), ValueError, "set that to None"),
        (lambda m, z: z.softmax(dim=-1), ValueError, "changes its logits after the output layer"),
        (lambda m, z: z * 0.0, ValueError, "changes its logits after the output layer"),
        (lambda m, z: z + 2.0 * m.outside, ValueError, r"no parameter or buffer as it stands \(but made of outside\)"),
        (lambda m, z: z + m.outside + m.fixed, ValueError, r"made of outside, fixed\)"),
        (lambda m, z: z + torch.arange(VOCABULARY), ValueError, "adds up to 5 to the logits of its output layer"),
        (lambda m, z: z[..., :-1], TypeError, "returns logits of 10 tokens, but .* gives 11 numbers"),
        (lambda m, z: never(z), ValueError, r"gives 1 tokens \(4, ...\) logits of -inf"),
        (lambda m, z: torch.cat((z[:, 1:], z[:, :1]), dim=1), ValueError, "changes its logits after"),
    ],
)
def test_whatever_else_is_refused(tail, error, message, tokens):
    model = Toy(tail)
    with pytest.raises(error, match=message):
        MaskedLM(model).hidden_states(tokens)
    with pytest.raises(error, match=message):
        MaskedLM(model).head()
    assert not model.output._forward_pre_hooks and not model.output._forward_hooks


def test_a_layer_that_is_no_product_of_its_weight_is_refused(tokens):
    class Cosine(nn.Linear):
        def forward(self, hidden):
            return super().forward(nn.functional.normalize(hidden, dim=-1))

    model = Toy(FOLLOWED["nothing"])
    model.output = Cosine(WIDTH, VOCABULARY)
    with pytest.raises(ValueError, match=r"Cosine, computes something else .* differ by up to 0\.\d+, where rounding"):
        MaskedLM(model).hidden_states(tokens)


@pytest.mark.parametrize("returned", [lambda z: {"loss": z.sum()}, lambda z: (z.sum(),), lambda z: None])
def test_a_model_without_logits_is_taken_as_it_is(returned, tokens):
    model = Toy(lambda model, logits: returned(logits))
    assert MaskedLM(model).head().bias is model.output.bias


@pytest.mark.parametrize("returned", [lambda z: {"logits": z}, lambda z: {"loss": None, "scores": z}, lambda z: [z]])
def test_logits_are_found_in_what_a_model_returns(returned, tokens):
    model, plain = (Toy(tail) for tail in (lambda model, logits: returned(logits * 0.3), FOLLOWED["scaled"]))
    torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), plain(tokens))


SIZES = {**small_sizes(VOCABULARY), "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 8}
CAUSAL = {
    "multiplied by logit_scale": CohereConfig(**SIZES, logit_scale=0.0625),
    "divided by logits_scaling": GraniteConfig(**SIZES, logits_scaling=8.0),
    "multiplied by logits_scaling": HyperCLOVAXConfig(**SIZES, logits_scaling=8.0),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_scales_of_transformers_classes(name, tokens):
    """Among them two that read one name in opposite ways."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CAUSAL[name]).eval()
    for parameter in model.parameters():
        parameter.data *= 8.0 if parameter.dim() == 2 else 1.0  # new ones give logits near 0
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), expected, rtol=1e-5, atol=1e-5)
        assert float(expected.std()) > 0.01


def test_soft_capped_logits_of_transformers_are_refused(tokens):
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=30.0)).eval()
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM changes .* \(final_logit_softcapping in the config\)"):
        MaskedLM(model).hidden_states(tokens)
    model.config.final_logit_softcapping = None
    torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), model(tokens).logits)


def test_a_scale_that_is_trained_is_refused(tokens):
    """It would get no gradient; frozen it is a number like others."""
    model = Toy(lambda model, logits: logits * model.scale)
    model.scale = nn.Parameter(torch.tensor(0.3))
    with pytest.raises(ValueError, match=r"Toy applies scale after its output layer: .* gives it no gradient"):
        MaskedLM(model).hidden_states(tokens)
    model.scale.requires_grad_(False)
    with torch.no_grad():
        expected = model(tokens).log_softmax(dim=2)
    torch.testing.assert_close(through_the_head(MaskedLM(model), tokens).log_softmax(dim=2), expected)
