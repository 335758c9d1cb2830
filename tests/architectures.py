"""Sizes of masked language models of which a call takes milliseconds, for several architectures of transformers."""


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
