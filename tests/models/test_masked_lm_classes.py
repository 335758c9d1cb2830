"""Every class of AutoModelForMaskedLM: hidden states and head give its own logits and gradients, or it is refused."""

import inspect

import pytest
import torch
import transformers
from transformers import FNetForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from dam.models import MaskedLM

VOCABULARY = 21
# What configurations call sizes; each takes those that it has.
SIZES = {
    **dict.fromkeys(("hidden_size", "embedding_size", "d_model", "dim", "emb_dim", "entity_emb_size"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "d_inner"), 32),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "n_heads", "n_head", "type_vocab_size"), 2),
    **dict.fromkeys(("head_dim", "d_head", "attention_head_size", "prediction_head_size", "input_embedding_size"), 8),
    **dict.fromkeys(("entity_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"), 4),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "max_2d_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "mask_token_id": 3,
}
# A vision tower beside the text model, which masked tokens do not reach.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}
SPECIAL = {
    "funnel": {"block_sizes": (1, 1), "num_decoder_layers": 1},
    "modernvbert": {"image_token_id": 4},
    "neomme": {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}, "sliding_attention": {}}},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 2},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ("local",),
        "local_attn_chunk_length": 4,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "ultravbert": {"image_token_id": 4},
    "xmod": {"default_language": "en_XX"},
}
# By their type, and what the error says.
REFUSED = {
    # logits = hidden @ [embedding; another matrix]^T, without a call of the output layer
    "mobilebert": (RuntimeError, "ran 0 times"),
    # the embedding's matrix, which is no output layer
    "perceiver": (TypeError, "gives no linear layer"),
}
# Before 5.0, which takes any.
_taken = inspect.signature(FNetForMaskedLM.forward).parameters
if "attention_mask" not in _taken and not any(p.kind is p.VAR_KEYWORD for p in _taken.values()):
    REFUSED["fnet"] = (TypeError, "unexpected keyword argument 'attention_mask'")
if hasattr(transformers, "Wav2Vec2ForMaskedLM"):
    REFUSED["wav2vec2"] = (TypeError, "gives no linear layer")  # of sounds
# Those of 4.x that cannot be tried.
UNTRIED = {
    "mega": "keeps the graph of a call for the next",
    "qdqbert": "needs the package pytorch-quantization",
}
# Those whose positions count from each row's first token, by rotation or from tokens that are no padding.
TAKES_PADDING = (
    *("camembert", "data2vec-text", "esm", "esmc", "eurobert", "gte", "ibert", "jina_embeddings_v3", "longformer"),
    *("luke", "mega", "modernbert", "modernvbert", "mpnet", "neomme", "nezha", "nomic_bert", "roberta"),
    *("roberta-prelayernorm", "roformer", "ultrabert", "ultravbert", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
CONFIGS = {config.model_type: config for config in MODEL_FOR_MASKED_LM_MAPPING}


def tiny(model_type, **changes):
    """A model of that type in evaluation mode, every vector over the vocabulary random: biases are zero when new."""
    if model_type in UNTRIED:
        pytest.skip(f"{model_type} {UNTRIED[model_type]}")
    config_class = CONFIGS[model_type]
    if hasattr(config_class, "sub_configs") and "text_config" in config_class.sub_configs:
        parts = {name: type(part) for name, part in vars(config_class()).items() if name in config_class.sub_configs}
        changes = {
            "text_config": _small(parts["text_config"]),
            "vision_config": _small(parts["vision_config"], **VISION, patch_size=8),
            **changes,
        }
        config = config_class(**{**SPECIAL.get(model_type, {}), **changes})
    else:
        config = _small(config_class, **{**SPECIAL.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model_class = MODEL_FOR_MASKED_LM_MAPPING[config_class]
    model = (model_class[0] if isinstance(model_class, tuple) else model_class)(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel() == VOCABULARY and tensor.is_floating_point():
            tensor.data.normal_()
    return model


def _small(config_class, **changes):
    known = config_class()
    return config_class(**{**{name: size for name, size in SIZES.items() if _takes(known, name)}, **changes})


def _takes(config, name):
    if not hasattr(config, name):
        return False
    # Some have a size that follows from others, which may not be given.
    return not isinstance(getattr(type(config), name, None), property)


def log_prob_and_gradients(model, forward):
    model.zero_grad()
    log_prob = forward().log_softmax(dim=-1)
    log_prob[:, 4:, 5].sum().backward()
    return log_prob.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_the_head(denoiser, tokens, mask):
    hidden, head = denoiser.hidden_states(tokens, mask), denoiser.head()
    return torch.nn.functional.linear(hidden, head.weight, head.bias)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_it_is_right_or_refused(model_type):
    tokens = torch.randint(5, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if model_type in REFUSED:
        error, message = REFUSED[model_type]
        with pytest.raises(error, match=message):
            MaskedLM(tiny(model_type)).hidden_states(tokens, mask)
        return
    model = tiny(model_type).train(model_type == "reformer")  # it has gradients in training mode only
    expected, theirs = log_prob_and_gradients(model, lambda: model(input_ids=tokens, attention_mask=mask).logits)
    log_prob, ours = log_prob_and_gradients(model, lambda: through_the_head(MaskedLM(model), tokens, mask))
    # The same operations in float32 on the same numbers; only the last product's shape may differ.
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("model_type", sorted(CONFIGS.keys() - REFUSED.keys()))
def test_rows_padded_on_the_left_are_taken_where_they_change_nothing(model_type):
    model = tiny(model_type)
    for name, parameter in model.named_parameters():
        if "position" in name:
            parameter.data.normal_()  # small when new: that they are others must show
    tokens = torch.randint(5, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    denoiser = MaskedLM(model)
    denoiser.compare(tokens, torch.ones_like(tokens))
    assert denoiser.left_padding == (model_type in TAKES_PADDING)


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_a_layer_that_is_not_the_last_is_refused(model_type):
    """With legacy=False get_output_embeddings() names a layer of the head that comes before; not tied, as 4.x would."""
    tokens = torch.arange(5, 13)[None]
    model = tiny(model_type, legacy=False, tie_word_embeddings=False)
    with pytest.raises(TypeError, match="returns logits of 21 tokens, but what get_output_embeddings"):
        MaskedLM(model).hidden_states(tokens, torch.ones_like(tokens))
    # As wide as the vocabulary, where shapes do not tell.
    sizes = {"hidden_size": VOCABULARY - 1, "vocab_size": VOCABULARY - 1}
    model = tiny(model_type, legacy=False, tie_word_embeddings=False, **sizes)
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        MaskedLM(model).hidden_states(tokens, torch.ones_like(tokens))
