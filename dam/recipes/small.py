"""A model of a family's class with small sizes and random weights, for a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dam.train.pretrained import class_of

# What configs call their sizes; none becomes larger than it is.
_SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "n_embd", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_hidden_size", "dense_intermediate_size", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_experts_per_tok", "n_group"), 2),
    **{"num_experts": 4, "topk_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 1},
    **{"head_dim": 16, "rotary_dim": 8},
}
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
_HEADS = (("num_attention_heads", "num_key_value_heads"), ("n_heads", "n_kv_heads"))


def small_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a small model of a config, in the proportions that its class asks for.

    Heads stay shared by queries where they were; lists with an entry for each layer are cut.
    """
    sizes = {
        name: min(given[name], small)
        for name, small in _SIZES.items()
        if isinstance(given.get(name), int) and not isinstance(given[name], bool) and given[name] > 0
    }
    # LLaDA calls the rows of its embedding so, of which the vocabulary says how many there are.
    if isinstance(given.get("embedding_size"), int) and given["embedding_size"] >= (given.get("vocab_size") or 0):
        del sizes["embedding_size"]
    for heads, shared in _HEADS:
        if sizes.get(heads) and given.get(shared):
            sizes[shared] = sizes[heads] if given[shared] == given[heads] else 1
    layers = next((name for name in _LAYERS if name in sizes), None)
    if layers is not None:
        for name, value in given.items():
            if isinstance(value, (list, tuple)) and len(value) == given[layers]:
                sizes[name] = list(value)[: sizes[layers]]
    if "init_device" in given:
        sizes["init_device"] = "cpu"
    return sizes


def with_vocabulary(given: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What a config says of tokens, for another tokenizer."""
    changed: dict[str, Any] = {"vocab_size": len(tokenizer)}
    if isinstance(given.get("embedding_size"), int) and given["embedding_size"] >= (given.get("vocab_size") or 0):
        changed["embedding_size"] = len(tokenizer)
    for name in given:
        if name.endswith("_token_id"):
            changed[name] = getattr(tokenizer, name, None)
    return {**changed, "mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}


def small_config(config: Any, tokenizer: Any = None) -> Any:
    """A config of the same class with small sizes; with a tokenizer, of its tokens instead of its own."""
    given = config.to_dict()
    changes = small_sizes(given)
    if tokenizer is not None:
        changes |= with_vocabulary(given, tokenizer)
    small = type(config).from_dict({**given, **changes})
    small.name_or_path = config.name_or_path  # where code that comes with a model is found
    return small


def random_model(
    config: Any, *, auto_class: str | None, dtype: str, trust_remote_code: bool, attn: str | None = None, seed: int = 0
) -> Any:
    """A model of a config, with random weights, by the class that would load it; no other draw is changed."""
    more = {} if attn is None else {"attn_implementation": attn}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = class_of(auto_class, config).from_config(config, trust_remote_code=trust_remote_code, **more)
    return model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype)).eval()
