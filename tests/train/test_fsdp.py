"""What accelerate's plugin is made to do, and what is refused of it; runs with it are in test_forked.py."""

import types

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from tiny import tiny_config, tiny_model

from dam.train import fsdp
from tests.train.process_run import model


def accelerator(version=2, backend="NO", units=None):
    plugin = types.SimpleNamespace(fsdp_version=version, transformer_cls_names_to_wrap=units)
    state = types.SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=TorchDynamoPlugin(backend=backend))
    return types.SimpleNamespace(state=state)


def test_the_first_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set fsdp_version: 2 in accelerate's configuration file"):
        fsdp.prepare_plugin(accelerator(version=1), tiny_config(tmp_path), tiny_model())


def test_one_process_divides_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    alone = types.SimpleNamespace(state=types.SimpleNamespace(), num_processes=1)
    assert not fsdp.prepare_plugin(alone, tiny_config(tmp_path), tiny_model())


@pytest.mark.parametrize(("given", "expected"), [(None, ["ModernBertEncoderLayer"]), (["ModernBertMLP"],) * 2])
def test_what_holds_the_input_embeddings_is_no_unit_of_its_own(tmp_path, given, expected):
    """accelerate makes them one, and cannot divide them twice; what is named by hand stays."""
    network, prepared = model(), accelerator(units=given)
    assert "ModernBertEmbeddings" in network._no_split_modules
    assert fsdp.prepare_plugin(prepared, tiny_config(tmp_path), network)
    assert prepared.state.fsdp_plugin.transformer_cls_names_to_wrap == expected


def test_units_are_compiled_and_nothing_else(tmp_path):
    network, prepared = model(), accelerator(backend="EAGER")
    fsdp.prepare_plugin(prepared, tiny_config(tmp_path), network)
    compiled = {type(module).__name__ for module in network.modules() if module._compiled_call_impl is not None}
    assert compiled == {"ModernBertEncoderLayer"} and prepared.state.dynamo_plugin.backend == DynamoBackend.NO


def test_what_cannot_be_compiled_is_refused(tmp_path):
    bare = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="compiles its units, and Linear names none: set fsdp_transformer_layer_cls"):
        fsdp.prepare_plugin(accelerator(backend="EAGER"), tiny_config(tmp_path), bare)
    with pytest.raises(ValueError, match="give the model as it is, and torch_compile=True"):
        fsdp.prepare_plugin(accelerator(), tiny_config(tmp_path), torch.compile(model(), backend="eager"))
