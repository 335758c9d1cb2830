"""Tries the code that is published with diffusion language models, small and with random weights.

    python -m tests.published FOLDER

prints a line for each family: "right", or what failed, under the transformers that is installed; docs/models.md has
what came out. FOLDER holds that code, the files configuration_*.py and modeling_*.py: of github.com/ZHZisZZ/dllm those
of dllm/pipelines/{dream,llada,llada2,llada21}/models and of a2d/models/{llama,qwen2,qwen3}, and of
github.com/JetAstra/SDAR those of training/model/SDAR-4B-Chat.

What this code imports and a CPU does not have is put in its place: flash_attn's norm and attention are torch's, and
classes that generate or compute a loss are empty.
"""

import functools
import importlib
import importlib.machinery
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers

from dam.models import as_denoiser
from tests.models.standins import dream, llada2, sdar
from tests.models.test_families import by_blocks, in_place, log_probs, padded

PACKAGE = "published_code"
VOCABULARY, MASK, PAD = 40, 38, 39
SIZES = {
    **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "mask_token_id": MASK, "initializer_range": 0.3},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
LLADA = {
    **{"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 64, "max_sequence_length": 64},
    **{"vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "pad_token_id": PAD, "mask_token_id": MASK},
    **{"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "init_device": "cpu"},
    **{"rope": True, "alibi": False, "include_bias": False, "include_qkv_bias": False, "weight_tying": False},
    **{"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
LLADA_MOE = {
    **SIZES,
    **{"num_key_value_heads": 2, "dense_intermediate_size": 64, "expert_intermediate_size": 16, "num_experts": 4},
    **{"shared_expert_intermediate_size": None, "num_experts_per_tok": 2, "moe_layer_freq": [1, 1], "eos_token_id": 1},
    **{"rope_theta": 1e4, "partial_rotary_factor": 1.0, "qk_layernorm": True, "moe_router_enable_expert_bias": False},
    **{"moe_router_score_function": "softmax", "router_num_group": None, "router_topk_group": None},
}
LLADA_2 = {
    **SIZES,
    **{"head_dim": 16, "rotary_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "use_bias": False},
    **{"attention_dropout": 0.0, "output_dropout": 0.0, "embedding_dropout": 0.0},
}
FULL, BY_BLOCKS = {"approximate_cache": 4}, {"block_length": 4}


class Published(NamedTuple):
    """Names of a module and its class, and of the config's; sizes; logits at their positions; options of passes."""

    module: str
    model: str
    config_module: str
    config: str
    sizes: dict[str, Any]
    logits: Callable[[Any, torch.Tensor], torch.Tensor] = in_place
    options: dict[str, Any] | None = None
    passes: tuple[dict[str, Any], ...] = ()  # options with which there are passes over blocks


def shifted(model, tokens):
    return dream.shifted(in_place(model, tokens))


by_4 = functools.partial(by_blocks, block_length=4)
llada = functools.partial(Published, "modeling_llada", "LLaDAModelLM", "configuration_llada", "LLaDAConfig")
FAMILIES = {
    "LLaDA": llada(LLADA),
    "LLaDA tied and scaled": llada({**LLADA, "weight_tying": True, "scale_logits": True}),
    "LLaDA-MoE": Published(
        "modeling_lladamoe", "LLaDAMoEModelLM", "configuration_lladamoe", "LLaDAMoEConfig", LLADA_MOE
    ),
    "Dream": Published(
        "modeling_dream", "DreamModel", "configuration_dream", "DreamConfig", SIZES, shifted, None, (FULL,)
    ),
    **{
        name: Published(
            f"modeling_{files}",
            "LLaDA2MoeModelLM",
            f"configuration_{files}",
            "LLaDA2MoeConfig",
            LLADA_2,
            by_4(llada2.block_mask),
            BY_BLOCKS,
            (BY_BLOCKS,),
        )
        for name, files in (("LLaDA 2.0", "llada2_moe"), ("LLaDA 2.1", "llada21_moe"))
    },
    "SDAR": Published(
        "modeling_sdar",
        "SDARForCausalLM",
        "configuration_sdar",
        "SDARConfig",
        {**SIZES, "head_dim": 16, "block_size": 4, "fuse_cross_entropy": False},
        by_4(sdar.block_mask),
        passes=({},),
    ),
    **{
        f"A2D {base}": Published(
            f"modeling_{base.lower()}",
            f"A2D{base}LMHeadModel",
            f"modeling_{base.lower()}",
            f"A2D{base}Config",
            {**SIZES, "head_dim": 16},
            passes=(FULL, BY_BLOCKS),
        )
        for base in ("Llama", "Qwen2", "Qwen3")
    },
}


def replace_what_is_missing(folder):
    """Modules that the code in a folder imports, which is made a package."""

    def module(name, **members):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(members)
        sys.modules[name] = made
        return made

    def attention(q, k, v, causal=False, softmax_scale=None):
        assert not causal
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def rms_norm(x, weight, bias=None, eps=1e-6):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def rearrange(x, pattern):
        heads_first = {"b h l d -> b l (h d)": True, "b l h d -> b l (h d)": False}[pattern]
        return (x.transpose(1, 2) if heads_first else x).flatten(2)

    module(PACKAGE).__path__ = [folder]
    # transformers knows by the name of a base that a model generates.
    mixin, config = type("DreamGenerationMixin", (), {}), transformers.GenerationConfig
    module(f"{PACKAGE}.generation_utils", DreamGenerationMixin=mixin, DreamGenerationConfig=config)
    loss = type("FusedLinearDiffusionCrossEntropyLoss", (), {})
    module(f"{PACKAGE}.fused_linear_diffusion_cross_entropy", FusedLinearDiffusionCrossEntropyLoss=loss)
    module("einops", rearrange=rearrange)
    module("flash_attn", flash_attn_func=attention, flash_attn_varlen_func=None)
    for name in ("ops", "ops.triton"):
        module(f"flash_attn.{name}")
    module("flash_attn.ops.triton.layer_norm", rms_norm_fn=rms_norm)
    module("flash_attn.bert_padding", index_first_axis=None, pad_input=None, unpad_input=None)


def model_class(family):
    """The class of a model; LLaDA's makes its weights on a GPU unless told."""
    code = importlib.import_module(f"{PACKAGE}.{family.module}")
    if hasattr(code, "LLaDAModel") and not hasattr(code.LLaDAModel, "on_cpu"):
        init = code.LLaDAModel.__init__

        def on_cpu(self, config, *args, **kwargs):
            config.init_device = "cpu"
            init(self, config, *args, **kwargs)

        code.LLaDAModel.__init__, code.LLaDAModel.on_cpu = on_cpu, True
    return getattr(code, family.model)


@torch.no_grad()
def made(family):
    """A model whose logits are far from uniform."""
    cls = model_class(family)
    config = getattr(importlib.import_module(f"{PACKAGE}.{family.config_module}"), family.config)
    torch.manual_seed(0)
    model = cls(config(**family.sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.3)
    return model


def check(family):
    """That what is saved is loaded, and that dam's logits, of padded rows too, and passes over blocks are the model's.

    Raises:
        Exception: something else than so.
    """
    tokens = torch.randint(MASK, (2, 13), generator=torch.Generator().manual_seed(1))
    tokens[:, ::3] = MASK
    model = made(family)
    with torch.no_grad():
        before = family.logits(model, tokens)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder).eval()
        own = family.logits(model, tokens)
    assert torch.equal(own, before), "it has other logits when it is loaded"
    denoiser = as_denoiser(model, **(family.options or {}))
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)  # float32, of logits up to 20
    for mask in (None, torch.ones_like(tokens)):
        close(log_probs(denoiser, tokens, mask), own.log_softmax(dim=-1))
    together = log_probs(denoiser, *padded([tokens[0], F.pad(tokens[1], (4, 0), value=3)]))
    close(together[0, 4:], log_probs(denoiser, tokens[:1])[0])
    for options in family.passes:
        assert as_denoiser(model, **options).prefix_cache(tokens) is not None, f"no passes over blocks, by {options}"
    denoiser.hidden_states(tokens).float().pow(2).mean().backward()
    assert any(parameter.grad is not None for parameter in model.train().parameters())


def main(folder):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    replace_what_is_missing(folder)
    print(f"transformers {transformers.__version__}")
    for name, family in FAMILIES.items():
        try:
            check(family)
        except Exception as error:  # whatever code of others raises is what is asked
            print(f"{name}: {type(error).__name__}: {error}")
        else:
            print(f"{name}: right")


if __name__ == "__main__":
    main(*sys.argv[1:])
