"""What a model does to logits after its output layer is found and followed, or refused, whatever class it is."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dam
from dam.models import MaskedLM
from tests.architectures import of_transformers, small_sizes

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


def cap(logits, softcap):
    return torch.tanh(logits / softcap) * softcap


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
    "capped": lambda model, logits: cap(logits, 2.0),
    "capped, of the unit": lambda model, logits: torch.tanh(logits),
    "capped, then scaled": lambda model, logits: cap(logits, 3.0) * -0.5,
    "all of it, capped": lambda model, logits: cap(position_before(logits * -0.7) + model.outside, 1.5),
    "log-probabilities, capped": lambda model, logits: cap(logits + model.fixed, 1.5).log_softmax(dim=-1),
}


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))


def through_the_head(denoiser, tokens):
    hidden, head = denoiser.hidden_states(tokens), denoiser.head()
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else cap(logits, head.softcap)


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


def test_a_new_bias_of_zero_that_is_scaled_is_refused(tokens):
    """It would be trained as if it came after the scale; one of log-probabilities is found all the same."""
    model = Toy(lambda model, logits: (logits + model.outside) * 0.5, bias=False)
    normalised = Toy(lambda model, logits: (0.5 * logits + model.outside).log_softmax(dim=-1), bias=False)
    for each in (model, normalised):
        nn.init.zeros_(each.outside)
    with pytest.raises(ValueError, match=r"which is no parameter or buffer as it stands \(but made of outside\)"):
        MaskedLM(model).head()
    assert MaskedLM(normalised).head().bias.data_ptr() == normalised.outside.data_ptr()


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
        (lambda m, z: 2.0 * z.clamp(-1, 1), ValueError, r"where the layer gives 64 the model gives 2, .* differ by"),
        (
            lambda m, z: z / (1.0 + z.abs() / 30.0),
            ValueError,
            r"Denoiser of your own, whose head\(\) and hidden_states",
        ),
        (lambda m, z: 1e4 * torch.atan(z / 1e4), ValueError, "changes its logits after the output layer"),
        (lambda m, z: cap(cap(z, 30.0), 20.0), ValueError, "changes its logits after the output layer"),
        (lambda m, z: cap(z, 30.0) + m.outside, ValueError, "and then a soft cap"),
        (lambda m, z: cap(z, 30.0) + 0.0 * m.outside, ValueError, "and then a soft cap"),
        (lambda m, z: cap(z + 2.0 * m.outside, 30.0), ValueError, "and then a soft cap"),
        (lambda m, z: cap(z + m.outside + m.fixed, 30.0), ValueError, "and then a soft cap"),
        (
            lambda m, z: cap(100.0 * z, 2.0),
            ValueError,
            "changes its logits after the output layer",
        ),  # as good as a sign
        (lambda m, z: z.softmax(dim=-1), ValueError, "changes its logits after the output layer"),
        (lambda m, z: z.log(), ValueError, "the model gives nan, and its log-probabilities differ by up to inf"),
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
    "multiplied by logit_scale": ("CohereConfig", {"logit_scale": 0.0625}),
    "divided by logits_scaling": ("GraniteConfig", {"logits_scaling": 8.0}),
    "multiplied by logits_scaling": ("HyperCLOVAXConfig", {"logits_scaling": 8.0}),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_scales_of_transformers_classes(name, tokens):
    """Among them two that read one name in opposite ways."""
    config, changes = CAUSAL[name]
    config = of_transformers(config)(**SIZES, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 8.0 if parameter.dim() == 2 else 1.0  # new ones give logits near 0
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), expected, rtol=1e-5, atol=1e-5)
        assert float(expected.std()) > 0.01


CAPPED = {
    "Gemma 2": ("Gemma2Config", 30.0),
    "Gemma 3": ("Gemma3TextConfig", 12.5),
    "VaultGemma": ("VaultGemmaConfig", 20.0),
    "NanoChat": ("NanoChatConfig", 15.0),
}


def capped_model(name):
    """One whose logits go far into the cap, as those of new models do not."""
    config, softcap = CAPPED[name]
    config = of_transformers(config)(**SIZES, final_logit_softcapping=softcap)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.weight *= softcap / float(layer.weight.norm(dim=1).max())
    return model


@pytest.mark.parametrize("name", CAPPED)
def test_soft_capped_logits_of_transformers(name, tokens):
    """Log-probabilities, draws and the loss with its gradients are those of the model's own logits."""
    model, softcap = capped_model(name), CAPPED[name][1]
    denoiser = MaskedLM(model)
    hidden, head = denoiser.hidden_states(tokens), denoiser.head()
    assert head.softcap == softcap  # to the last digit
    logits = model(tokens).logits
    assert 0.8 * softcap < float(logits.detach().abs().max()) and float(logits.detach().abs().median()) < 0.9 * softcap
    target = tokens.flip(0)[..., None]
    weight = torch.randn(target.shape, generator=torch.Generator().manual_seed(2)).abs()
    arguments = head.arguments(hidden.dtype)
    pairs = [
        (dam.linear_log_prob(hidden, target=target, **arguments), dam.log_prob(logits, target)),
        (
            dam.linear_matching_loss(hidden, target=target, weight=weight, **arguments),
            dam.matching_loss(logits, target, weight),
        ),
    ]
    for pair in pairs:
        gradients = []
        # Logits up to the cap, rounded to 2^-24 of it after sums of 16 products; through the network again.
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6 * softcap)
        for value in pair:
            model.zero_grad()
            value.sum().backward(retain_graph=True)
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
        for key, gradient in gradients[1].items():
            atol = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[0][key], gradient, rtol=1e-4, atol=atol)
    drawn = dam.linear_jump(hidden.detach(), **head.arguments(hidden.dtype), seed=3)
    assert torch.equal(drawn.target, dam.jump(logits.detach(), seed=3).target)


def test_a_cap_with_an_adapter_on_and_off(tokens):
    """On the output layer too, whose product comes before the cap."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(capped_model("Gemma 2"), config).eval()
    with torch.no_grad():
        for adapter in (True, False):
            denoiser = MaskedLM(model, adapter=adapter)
            hidden, head = denoiser.hidden_states(tokens), denoiser.head()
            assert head.softcap == 30.0 and (head.lora is not None) == adapter
            if adapter:
                expected = model(tokens).logits
            else:
                with model.disable_adapter():
                    expected = model(tokens).logits
            torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [0.3, 2.0, 15.0, 30, 30.3, 1e2, 1234.5, 1e4])
@pytest.mark.parametrize("scale", [1.0, -0.3, 1 / 3])
def test_a_cap_of_few_digits_is_found_exactly(softcap, scale, dtype, tokens):
    """Whatever comes before it; a scale of many digits is found to those of float32."""
    model = Toy(lambda model, logits: cap(logits * scale, softcap)).to(dtype)
    hidden, head = MaskedLM(model).hidden_states(tokens), MaskedLM(model).head()
    assert head.softcap == softcap
    expected = copy.deepcopy(model).double()(tokens).detach()
    # Of sums of 8 products; in bfloat16 of hidden states that were rounded and rounded again when they were scaled.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(head.logits(hidden).double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("softcap", [7.123456789, math.pi])
def test_a_cap_of_many_digits_is_found_to_rounding(softcap, tokens):
    for dtype, rtol in ((torch.float32, 2.0**-22), (torch.float64, 2.0**-50)):
        head = MaskedLM(Toy(lambda model, logits: cap(logits, softcap)).to(dtype)).head()
        assert math.isclose(head.softcap, softcap, rel_tol=rtol)


def test_a_cap_beyond_all_probes_is_none(tokens):
    """No logits in float32 are told from uncapped ones by it."""
    model = Toy(lambda model, logits: cap(logits, 1e7))
    assert MaskedLM(model).head().softcap is None
    torch.testing.assert_close(through_the_head(MaskedLM(model), tokens), model(tokens))


def test_a_cap_of_logits_in_16_bits_is_found(tokens):
    """A model that rounds after its layer: as near as 16 bits tell, and short decimals exactly."""
    for softcap in (2.0, 30.0, 50.0):
        model = Toy(lambda model, logits, softcap=softcap: cap(logits.bfloat16(), softcap))
        assert MaskedLM(model).head().softcap == softcap


def test_a_cap_of_a_large_vocabulary_is_found(tokens):
    """By some of its columns, and compared on all: one that differs is enough."""
    model = Toy(lambda model, logits: cap(logits, 30.0))
    model.output = nn.Linear(WIDTH, 5001)
    assert MaskedLM(model).head().softcap == 30.0
    other = copy.deepcopy(model)
    other.tail = lambda model, logits: cap(logits, 30.0) * (1.0 + 1e-4 * (torch.arange(5001) == 4999))
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        MaskedLM(other).head()


def test_a_cap_that_is_trained_is_refused(tokens):
    model = Toy(lambda model, logits: cap(logits, model.softcap))
    model.softcap = nn.Parameter(torch.tensor(30.0))
    with pytest.raises(ValueError, match=r"Toy applies softcap after its output layer: .* gives it no gradient"):
        MaskedLM(model).hidden_states(tokens)
    model.softcap.requires_grad_(False)
    assert MaskedLM(model).head().softcap == 30.0


def test_a_new_bias_of_zero_before_or_after_a_cap(tokens):
    """Its numbers do not tell, its gradient does."""
    before = Toy(lambda model, logits: cap(logits + model.outside, 30.0), bias=False)
    after = Toy(lambda model, logits: cap(logits, 30.0) + model.outside)
    scaled = Toy(lambda model, logits: cap((logits + model.outside) * 0.5, 30.0))
    normalised = Toy(lambda model, logits: cap(logits + model.outside, 1e4).log_softmax(dim=-1))
    normalised.output, normalised.outside = nn.Linear(WIDTH, 50_001, bias=False), nn.Parameter(torch.empty(50_001))
    for model in (before, normalised, after, scaled):
        nn.init.zeros_(model.outside)
    for model in (before, normalised):
        assert MaskedLM(model).head().bias.data_ptr() == model.outside.data_ptr()
        assert MaskedLM(model).head().softcap in (30.0, 1e4)
    for model in (after, scaled):
        with pytest.raises(ValueError, match="and then a soft cap"):
            MaskedLM(model).head()


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
