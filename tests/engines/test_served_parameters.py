"""What an engine is sent is the model: a fresh one that loads it predicts the same."""

import pytest
import torch

pytest.importorskip("peft", reason="needs the package peft")

import peft
from torch import nn

from dam.engines import served_parameters
from tests.models.standins import SDARForCausalLM
from tests.models.standins.sdar import SDARConfig, block_mask

TOKENS = torch.arange(8)[None]


def model(seed=0):
    torch.manual_seed(seed)
    return SDARForCausalLM(SDARConfig()).eval()


@torch.no_grad()
def logits(network):
    return network(TOKENS, attention_mask=block_mask(8, 4)).logits


def adapted(**settings):
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 8, **settings}
    network = peft.get_peft_model(model(), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"], "use_rslora": True},
        {"target_modules": ["up_proj"], "bias": "lora_only"},
    ],
)
def test_an_adapter_is_sent_as_part_of_the_weights(settings):
    network, served = adapted(**settings), model(7)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    assert float((logits(network) - logits(model())).abs().max()) > 0.1
    served.load_state_dict(dict(served_parameters(network)), strict=True)
    torch.testing.assert_close(logits(served), logits(network), rtol=0.0, atol=2e-5)
    # Nothing is merged for it.
    assert all(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())
    with network.disable_adapter():
        served.load_state_dict(dict(served_parameters(network)), strict=True)
        torch.testing.assert_close(logits(served), logits(network), rtol=0.0, atol=2e-5)


def test_a_merged_adapter_is_not_added_twice():
    network, served = adapted(), model(7)
    network.merge_adapter()
    served.load_state_dict(dict(served_parameters(network)), strict=True)
    torch.testing.assert_close(logits(served), logits(network), rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_sum_of_weights_is_refused(settings):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **settings)
    if settings.get("lora_bias"):
        config.target_modules = {"up_proj"}
    with pytest.raises(ValueError, match=r"up_proj is no plain LoRA|q_proj is no plain LoRA"):
        dict(served_parameters(peft.get_peft_model(model(), config)))


def test_an_adapter_of_another_kind_is_refused():
    network = peft.get_peft_model(model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="q_proj is no plain LoRA"):
        dict(served_parameters(network))


def test_wrappers_are_seen_through():
    network = model()
    names = [name for name, _ in served_parameters(torch.compile(network, backend="eager"))]
    assert names == [name for name, _ in network.named_parameters()]
