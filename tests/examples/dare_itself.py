"""The recipe of examples/dare on DARE's own code, on a CPU: python -m tests.examples.dare_itself PATH_OF_DARE

Not a test of the suite: needs a checkout of DARE at the commit that `install.py` names, tensordict and omegaconf, and
for the models' code transformers 4.57. Of DARE it runs DataProto (verl/protocol.py) and the modelling code of LLaDA and
Dream, with small random weights, below the tests of test_dare.py; and it puts the recipe into a copy of the files that
are edited, and compiles them. Ray, pandas and flash_attn are empty modules: none of this calls them on a CPU.
"""

import importlib.util
import shutil
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from tests.examples import dare_interfaces

SIZES = {"vocab_size": 6, "mask_token_id": 0, "pad_token_id": 1, "eos_token_id": 5}
LLADA = {
    **{"embedding_size": 6, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 64},
    **{"max_sequence_length": 64, "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu"},
    **{"init_device": "cpu", "rope": True, "alibi": False, "include_bias": False, "include_qkv_bias": False},
    **{"weight_tying": False, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
DREAM = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"attn_implementation": "sdpa"},
}
TESTS = (
    "test_a_rollout_fills_in_whole_responses_and_says_by_which_call_and_law",
    "test_validation_takes_the_likeliest_tokens_one_for_each_prompt",
    "test_the_targets_are_dams_own_for_the_rollouts_own_trajectories",
    "test_an_update_asks_the_output_layer_for_no_logits",
)


def module(name, path=None, **content):
    """A module by its file, or one of the given content."""
    if path is None:
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = made
        vars(made).update(content)
        return made
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def own_data_proto(dare):
    """DARE's DataProto, made as the tests make theirs."""
    from tensordict import TensorDict

    for name, content in {"ray": {"ObjectRef": object}, "pandas": {}, "verl": {}, "verl.utils": {}}.items():
        module(name, **content)
    module("verl.utils.device", get_torch_device=lambda: torch.cpu)
    module("verl.utils.torch_functional", allgather_dict_tensors=None)
    module("verl.utils.py_functional", dare / "verl/utils/py_functional.py")
    own = module("verl.protocol", dare / "verl/protocol.py").DataProto

    class DataProto(own):
        def __init__(self, batch=None, non_tensor_batch=None, meta_info=None):
            if isinstance(batch, dict):
                batch = TensorDict(batch, batch_size=(len(next(iter(batch.values()))),))
            super().__init__(batch=batch, non_tensor_batch=non_tensor_batch or {}, meta_info=meta_info or {})

        def repeat(self, times):
            return super().repeat(repeat_times=times, interleave=True)

    return DataProto


def models(dare):
    """By name: makes a model of a seed."""
    module("flash_attn", flash_attn_func=None, flash_attn_varlen_func=None, flash_attn_with_kvcache=None)
    made = {}
    for name, folder, files in (
        ("llada", "LLaDA-8B-Instruct", ("configuration_llada", "modeling_llada")),
        (
            "dream",
            "Dream-v0-Instruct-7B",
            ("configuration_dream", "generation_utils", "generation_utils_block", "modeling_dream"),
        ),
    ):
        module(name, __path__=[str(dare / "models" / folder)])
        made[name] = [module(f"{name}.{file}", dare / "models" / folder / f"{file}.py") for file in files]
    llada, dream = made["llada"], made["dream"]
    llada[-1].LLaDABlock.flash_attn_with_kvcache = None  # its code reads it, and sets it where flash_attn is used only

    def seeded(make):
        def of(seed=0):
            torch.manual_seed(seed)
            return make()

        return of

    return {
        "LLaDA": seeded(lambda: llada[-1].LLaDAModelLM(llada[0].LLaDAConfig(**SIZES, **LLADA), init_params=True)),
        "Dream": seeded(lambda: dream[-1].DreamModel(dream[0].DreamConfig(**SIZES, **DREAM))),
    }


def main(dare):
    from omegaconf import OmegaConf

    dare_interfaces.DataProto = own_data_proto(dare)
    dare_interfaces.Config = lambda *given, **more: OmegaConf.create(dict(*given, **more))
    from dam.models import as_denoiser
    from tests.examples import test_dare as tests

    status = pytest.main(["-q", "-p", "no:cacheprovider", tests.__file__])
    print(f"the tests with DARE's DataProto and omegaconf: {'passed' if status == 0 else 'FAILED'}")
    recipe = dare_interfaces.recipe(pytest.MonkeyPatch())
    for name, make in models(dare).items():
        tests.rotary_model, tests.MaskedLM = make, as_denoiser
        for test in TESTS:
            getattr(tests, test)(recipe)
            print(f"{name}: {test}")
        for exact in (False, True):
            tests.test_an_update_is_a_step_on_the_loss_of_the_whole_mini_batch(recipe, exact)
            print(f"{name}: an update, {'exact chain' if exact else 'on paths'}")
    installer = module("install_dare", dare_interfaces.RECIPE / "install.py")
    with tempfile.TemporaryDirectory() as folder:
        for file in (installer.WORKERS, installer.TRAINER):
            (Path(folder) / file).parent.mkdir(parents=True)
            shutil.copyfile(dare / file, Path(folder) / file)
        installer.install(Path(folder))
        for file in (installer.WORKERS, installer.TRAINER, *installer.FILES.values()):
            if file.endswith(".py"):
                compile((Path(folder) / file).read_text(), file, "exec")
    print("install.py: the files that it edits compile")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
