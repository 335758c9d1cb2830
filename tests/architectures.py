"""Sizes of masked language models of which a call takes milliseconds, for several architectures of transformers."""

import importlib.util

import pytest
import transformers

# The newest of Qwen's language models that the release has.
QWEN = "Qwen3" if hasattr(transformers, "Qwen3Config") else "Qwen2"


def small_sizes(vocabulary):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def past_masks(mask):
    """A mask [B, 1, L, L] as Qwen's models give it to their layers as it is, past what makes masks of masks (4.53)."""
    return {"full_attention": mask} if importlib.util.find_spec("transformers.masking_utils") else mask


def of_transformers(found):
    """A class, or that of transformers by its name; skips the test where the release has none of that name."""
    if isinstance(found, str):
        if not hasattr(transformers, found):
            pytest.skip(f"transformers {transformers.__version__} has no {found}")
        found = getattr(transformers, found)
    return found
