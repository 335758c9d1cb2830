"""A2D. Read in: ZHZisZZ/dllm, dllm/pipelines/a2d/models/qwen3/modeling_qwen3.py; dllm/core/samplers/bd3lm.py."""

import torch
import torch.nn.functional as F
import transformers

from tests.architectures import QWEN, past_masks
from tests.models.standins.trunk import HEADS, LAYERS, MASK, PAD, SIZE, VOCABULARY, filled_in


class A2DConfig(getattr(transformers, f"{QWEN}Config")):
    model_type = f"a2d-{QWEN.lower()}"

    def __init__(self, **more):
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": SIZE,
            "intermediate_size": 2 * SIZE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": SIZE // HEADS,
            "pad_token_id": PAD,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
        }
        super().__init__(**{**sizes, **more})


class A2DLMHeadModel(getattr(transformers, f"{QWEN}ForCausalLM")):
    config_class = A2DConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.dim() == 2:  # what it hides is hidden, and all else seen
            least = torch.finfo(self.dtype).min
            added = torch.where(attention_mask[:, None, None, :].bool(), 0.0, least).to(self.dtype)
            attention_mask = added.expand(-1, 1, input_ids.shape[1], -1)
        more["past_key_values"] = past_key_values
        return super().forward(input_ids, attention_mask=past_masks(attention_mask), position_ids=position_ids, **more)


@torch.no_grad()
def generate(model, prompt, block_length=4, gen_length=8):
    """BD3LM: the prompt padded to whole blocks, in each block of the completion the likeliest token of a call."""
    missing = -prompt.shape[1] % block_length
    x = F.pad(prompt, (missing, 0), value=PAD)
    for _ in range(gen_length // block_length):
        x = F.pad(x, (0, block_length), value=MASK)
        shown = x != PAD
        block = (torch.arange(x.shape[1]) // block_length).expand(x.shape)
        seen = (block[:, None, :] <= block[:, :, None]) & shown[:, None, :] & shown[:, :, None]
        positions = (shown.long().cumsum(-1) - 1).clamp(min=0)
        while bool((x == MASK).any()):
            x = filled_in(x, model(x, attention_mask=seen[:, None], position_ids=positions).logits, x == MASK, 1)
    return x[:, missing:]
