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
    "Qwen": ["q_proj"],
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
    model, base = adapted("Qwen", [1], modules_to_save=["lm_head"])
    assert SharedTrunk(model, base.different()).layers == LAYERS
    train(model)
    assert SharedTrunk(model, base.different()).layers == 1
    head = model.get_output_embeddings()
    assert SharedTrunk(model, list(head.modules())).layers == LAYERS
    assert SharedTrunk(model, [model.get_input_embeddings()]).layers == 0
    assert SharedTrunk(Tabular(torch.zeros(2, 1, 2), 2), []).layers == 0


def test_a_model_whose_layers_do_not_run_one_after_another_is_run_whole():
    """One whose second layer sees more than the first gave: the trial tells, in each rollout anew."""
    model, base = adapted("Qwen", [1])
    train(model)
    first, second = layers_of(model)
    ran = []
    first.self_attn.register_forward_hook(lambda *_: ran.append(0.1))
    second.register_forward_hook(lambda _, args, output: output + (ran.pop() if ran else 0.0))
    told = functools.partial(as_denoiser, attention="full")
    tokens = tokens_of(2, 6)
    for _rollout in range(2):
        beside = base.denoiser(model, told).beside(told(model))
        assert beside._trunk.layers == 1
        for _call in range(2):
            beside.hidden_states(tokens)
            assert beside._trunk.layers == 0 and not base.shares


def test_a_trial_in_which_nothing_differs_shows_nothing():
    """Of tokens of which model and base say the same, as long as training has done no more than rounding hides."""
    model, base = adapted("Qwen", [1])
    told = functools.partial(as_denoiser, attention="full")
    tokens = tokens_of(2, 6)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    for size, shown in ((1e-30, False), (1.0, True)):
        parameter.data.fill_(size)
        beside = base.denoiser(model, told).beside(told(model))
        beside.hidden_states(tokens)
        assert beside._trunk.layers == 1 and base.shares == shown, name


def test_an_embedding_that_is_the_output_layer_runs_in_front():
    """Whatever a trial says that sees none of the tokens that were trained."""
    model = FAMILIES["LLaDA tied"].model()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], trainable_token_indices={"wte": [5]}
    )
    model, base = with_base(peft.get_peft_model(model, config), None, None)
    train(model.eval())
    assert SharedTrunk(model, base.different()).layers == 0


class Stack(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def linear(module=None):
    return torch.nn.Sequential(torch.nn.Linear(4, 4) if module is None else module)


def test_layers_that_are_one_or_have_a_part_in_common():
    """A part that two layers have is in front of both, and a layer that is there twice runs as often."""
    shared = torch.nn.Linear(4, 4)
    assert SharedTrunk(Stack([linear(), linear(shared), linear(), linear(shared)]), [shared]).layers == 1
    twice = linear()
    model = Stack([twice, linear(), twice])
    assert SharedTrunk(model, [twice[0]]).layers == 0
    trunk = SharedTrunk(Stack([twice, twice]), [])
    assert trunk.layers == 1
    with trunk.second_pass():
        pass
    assert "forward" not in vars(twice)
    assert layers_of(model) == [twice, model.layers[1]]


def test_experts_of_layers_of_several_classes_are_no_layers():
    experts = torch.nn.ModuleList([linear(), linear()])
    assert layers_of(Stack([linear(), Stack(experts)])) == []


def test_layers_that_are_compiled_run_in_both_passes():
    model = Stack([linear(), linear()])
    assert SharedTrunk(model, [model.layers[1]]).layers == 1
    model.layers[0].compile(backend="eager")
    assert SharedTrunk(model, [model.layers[1]]).layers == 0


@pytest.mark.parametrize("output", [lambda x: {"hidden_states": x}, lambda x: x[..., :2], lambda x: (None, x)])
def test_layers_whose_outputs_are_not_known_run_in_both_passes(output):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return output(x)

    model = Stack([Layer(), Layer()])
    trunk = SharedTrunk(model, [model.layers[1]])
    with trunk.first_pass():
        model.layers[0](torch.ones(2, 3, 4))
    assert trunk.layers == 0


def test_layers_are_as_they_were_after_an_error():
    model, base = adapted("Qwen", [1])
    train(model)
    told = functools.partial(as_denoiser, attention="full")
    beside = base.denoiser(model, told).beside(told(model))
    first, second = layers_of(model)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # in the second pass
            raise MemoryError

    handle = second.register_forward_pre_hook(fail)
    tokens = tokens_of(2, 6)
    with pytest.raises(MemoryError):
        beside.hidden_states(tokens)
    handle.remove()
    assert "forward" not in vars(first)
    expected = base.denoiser(model, told).hidden_states(tokens)
    assert torch.equal(beside.hidden_states(tokens)[..., 16:], expected)


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
