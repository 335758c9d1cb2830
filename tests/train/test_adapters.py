"""Which modules an adapter's targets are: some, and the output layer only on purpose."""

import re
import warnings

import pytest
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from dam.train import DAMTrainer
from dam.train.adapters import check_targets, linear_layers
from tests.architectures import small_sizes
from tests.models import standins
from tests.models.standins import dream, llada, llada2, sdar

peft = pytest.importorskip("peft", reason="needs the package peft")

MODELS = {
    "LLaDA": lambda: standins.LLaDAModelLM(llada.LLaDAConfig()),
    "LLaDA tied": lambda: standins.LLaDAModelLM(llada.LLaDAConfig(weight_tying=True)),
    "LLaDA 2": lambda: standins.LLaDA2MoeModelLM(llada2.LLaDA2MoeConfig()),
    "Dream": lambda: standins.DreamModel(dream.DreamConfig()),
    "SDAR": lambda: standins.SDARForCausalLM(sdar.SDARConfig()),
    "ModernBERT": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**small_sizes(19), cls_token_id=None, sep_token_id=None)
    ),
}
BLOCKS = r"model\.transformer\.blocks\.\d+\."


def targets(model, target_modules, **more):
    return check_targets(model, peft.LoraConfig(target_modules=target_modules, **more))


@pytest.mark.parametrize("name", MODELS)
def test_the_expression_that_is_advised_is_of_the_linear_layers_of_the_blocks(name):
    model = MODELS[name]()
    expression, count = linear_layers(model)
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)]
    assert sorted(targets(model, expression)) == sorted(inside)
    assert count == len(inside) > 0
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=expression))
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == count  # as PEFT reads it


@pytest.mark.parametrize("nothing", ["layers.0.q_proj", ["query", "value"], r".*\.(query|value)"])
def test_targets_that_match_nothing_are_refused_with_what_would(nothing):
    model = MODELS["LLaDA"]()
    with pytest.raises(ValueError, match="matches no module of LLaDAModelLM") as error:
        targets(model, nothing)
    (advised,) = re.findall(r"'(model\S+)' would match its 12 linear layers", str(error.value))
    assert advised == BLOCKS + "(q_proj|k_proj|v_proj|attn_out|ff_proj|ff_out)"
    assert len(targets(model, advised)) == 12


@pytest.mark.parametrize(
    "by_accident", [["ff_out"], ["q_proj", "ff_out"], r".*ff_out", r".*", r"model\.transformer\..*out", "model.*"]
)
def test_the_output_layer_by_accident_is_refused(by_accident):
    message = r"matches the output layer, model\.transformer\.ff_out, as it matches .*model\.transformer\.blocks\.0\."
    with pytest.raises(ValueError, match=message):
        targets(MODELS["LLaDA"](), by_accident)


@pytest.mark.parametrize(
    ("name", "on_purpose"),
    [
        ("LLaDA", ["model.transformer.ff_out", "q_proj"]),
        ("LLaDA", ["transformer.ff_out", "ff_out"]),
        ("LLaDA tied", ["wte", "q_proj"]),
        ("Dream", ["lm_head", "q_proj"]),
        ("Dream", r".*\.(q_proj|v_proj)|lm_head"),
        ("Dream", "lm_head"),
    ],
)
def test_the_output_layer_by_its_name_is_fine(name, on_purpose):
    model = MODELS[name]()
    head = model.get_output_embeddings()
    assert any(model.get_submodule(found) is head for found in targets(model, on_purpose))


def test_the_anchored_name_is_of_the_blocks_alone():
    found = targets(MODELS["LLaDA"](), BLOCKS + "(ff_out|q_proj)")
    assert sorted(found) == [f"model.transformer.blocks.{n}.{leaf}" for n in (0, 1) for leaf in ("ff_out", "q_proj")]


def test_names_of_another_family_that_match_nothing_are_told():
    llama = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    with pytest.warns(UserWarning, match="down_proj, gate_proj, o_proj, up_proj match no module of LLaDAModelLM"):
        assert len(targets(MODELS["LLaDA"](), llama)) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets(MODELS["Dream"](), ["q_proj", "o_proj"])


def test_what_peft_looks_for_itself_is_left_to_it():
    model = MODELS["Dream"]()
    assert targets(model, "all-linear") == []
    assert check_targets(model, peft.PromptTuningConfig(num_virtual_tokens=2)) == []
    assert targets(model, ["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]


def test_every_user_of_peft_config_profits_and_the_model_stays_as_it_is(tmp_path):
    model = tiny_model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"'\.\*' matches the output layer, cls\.predictions\.decoder"):
        DAMTrainer(model, lambda **_: [], tiny_config(tmp_path), peft_config=peft.LoraConfig(target_modules=".*"))
    assert [name for name, _ in model.named_modules()] == before
