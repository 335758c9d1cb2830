"""A model and its base in one pass of the layers that they have in common: numbers as in two passes."""

import functools

import pytest
import torch

from dam.models import Tabular, as_denoiser
from dam.models.trunk import SharedTrunk, layers_of
from dam.rollout import rollout
from dam.train import DAMTrainer
from dam.train.base import with_base
from tests.models.standins.trunk import LAYERS
from tests.models.test_families import FAMILIES, PROCESS, PROMPTS, config_for, low, padded, tokens_of
from tests.train.tiny import assert_same_weights

peft = pytest.importorskip("peft", reason="needs the package peft")

TARGETS = {
    "ModernBERT": ["Wo"],
    "RoBERTa": ["query"],
    "EuroBERT": ["q_proj"],
    "LLaDA": ["q_proj"],
    "LLaDA-MoE": ["q_proj"],
    "Dream": ["q_proj"],
    "Qwen3": ["q_proj"],
}


def adapted(name, layers, **options):
    """A model with an adapter that somebody has trained on some of its layers, and its base before and after that."""
    model = FAMILIES[name].model()
    config = peft.LoraConfig(r=2, target_modules=TARGETS[name], layers_to_transform=layers, **options)
    model, base = with_base(peft.get_peft_model(model, config), None, None)
    return model.eval(), base


def train(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def counted(model):
    """How often each layer runs from now on."""
    calls = [0] * len(layers_of(model))
    for n, layer in enumerate(layers_of(model)):
        for part in layer.modules():
            if isinstance(part, torch.nn.Linear):  # something in it that runs once
                part.register_forward_pre_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
                break
    return calls


@pytest.mark.parametrize("name", TARGETS)
def test_layers_before_the_first_adapter_run_once(name):
    """And log-probabilities are those of a pass of their own, bit for bit: of the same numbers."""
    family = FAMILIES[name]
    model, base = adapted(name, [1])
    train(model)
    tokens, mask = padded([tokens_of(1, n, seed=n)[0] for n in (7, 5, 6)])
    denoiser, initial = family.denoiser(model), base.denoiser(model, family.denoiser)
    assert initial.beside(denoiser).hidden_states(tokens, mask).shape[-1] == 2 * 16  # the trial
    calls = counted(model)
    options = {"attention_mask": mask, "seed": 3}
    found = rollout(denoiser, tokens, PROCESS, base=initial, **options)
    assert LAYERS == 2 and calls == [found.network_calls, 2 * found.network_calls]
    initial.beside = lambda denoiser: None
    expected = rollout(denoiser, tokens, PROCESS, base=initial, **options)
    for one in ("final", "log_prob", "base_log_prob"):
        assert torch.equal(getattr(found, one), getattr(expected, one)), one
    assert float(found.log_ratio.abs().max()) > 1e-3


def test_nothing_runs_twice_as_long_as_nothing_is_trained():
    model, base = adapted("ModernBERT", None)
    denoiser = as_denoiser(model)
    calls = counted(model)
    found = rollout(denoiser, tokens_of(3, 8), PROCESS, base=base.denoiser(model, as_denoiser), seed=3)
    assert max(calls) <= found.network_calls + 3  # the comparison with the model's own logits
    assert torch.equal(found.log_prob, found.base_log_prob)
    train(model)
    assert base.denoiser(model, as_denoiser).beside(denoiser) is None  # an adapter on the first layer


def test_an_adapter_on_the_head_alone_shares_all_layers():
    model, base = adapted("Qwen3", [1], modules_to_save=["lm_head"])
    assert SharedTrunk(model, base.different()).layers == LAYERS
    train(model)
    assert SharedTrunk(model, base.different()).layers == 1
    head = model.get_output_embeddings()
    assert SharedTrunk(model, list(head.modules())).layers == LAYERS
    assert SharedTrunk(model, [model.get_input_embeddings()]).layers == 0
    assert SharedTrunk(Tabular(torch.zeros(2, 1, 2), 2), []).layers == 0


def test_a_model_whose_layers_do_not_run_one_after_another_is_run_whole():
    """One whose second layer sees more than the first gave: the trial tells."""
    model, base = adapted("Qwen3", [1])
    train(model)
    first, second = layers_of(model)
    ran = []
    first.self_attn.register_forward_hook(lambda *_: ran.append(1))
    second.register_forward_hook(lambda _, args, output: output + 0.1 * len(ran))
    told = functools.partial(as_denoiser, attention="full")
    beside = base.denoiser(model, told).beside(told(model))
    beside.hidden_states(tokens_of(2, 6))
    assert beside._trunk.layers == 0


def test_a_run_is_the_same_with_and_without(tmp_path, monkeypatch):
    runs = []
    for shared in (True, False):
        model = FAMILIES["ModernBERT"].model()
        config = peft.LoraConfig(r=2, target_modules=TARGETS["ModernBERT"], layers_to_transform=[1])
        if not shared:
            monkeypatch.setattr("dam.train.base._AtFirst.beside", lambda *_: None)
        trainer = DAMTrainer(
            peft.get_peft_model(model, config), low, config_for(tmp_path, learning_rate=0.05), PROMPTS[:8]
        )
        trainer.train()
        runs.append(trainer)
    assert_same_weights(runs[0].model, runs[1].model)
    logged = [[entry.get("kl_path") for entry in trainer.state.log_history] for trainer in runs]
    assert logged[0] == logged[1]
