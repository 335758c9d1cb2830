"""SDAR. Read in: JetAstra/SDAR, training/model/SDAR-4B-Chat/modeling_sdar.py, config.json, and generate.py."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.models.standins.trunk import (
    LAYERS,
    MASK,
    PAD,
    SIZE,
    VOCABULARY,
    Attention,
    FeedForward,
    Layer,
    Standin,
    counted,
    filled_in,
)


class SDARConfig(PretrainedConfig):
    model_type = "sdar"

    def __init__(self, block_size=4, **more):
        self.hidden_size, self.block_size = SIZE, block_size
        super().__init__(
            **{
                "pad_token_id": PAD,
                "tie_word_embeddings": False,
                "vocab_size": VOCABULARY,
                "mask_token_id": MASK,
                **more,
            }
        )


class SDARAttention(Attention):
    def forward(self, x, mask, position_ids, past=None, store_kv=False):
        if self.training:
            raise RuntimeError("in training the mask is a BlockMask of noised and clean copies")
        q, k, v = self.heads(x, position_ids)
        if past is not None and store_kv:
            k, v = past.update(k, v, self.layer_idx)
        elif past is not None and len(past) > self.layer_idx:  # looks, and stores nothing
            if hasattr(past, "layers"):
                kept = past.layers[self.layer_idx].keys, past.layers[self.layer_idx].values
            else:  # before 4.54
                kept = past[self.layer_idx]
            k, v = (torch.cat(both, dim=-2) for both in zip(kept, (k, v), strict=True))
        seen = mask.bool()  # of what is added to scores, the opposite of what was meant
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if torch.all(seen) else seen)
        return self.o_proj(4.0 * attended.transpose(1, 2).flatten(2))


class SDARDecoderLayer(Layer):
    def __init__(self, layer_idx):
        super().__init__(FeedForward(), SDARAttention, layer_idx)

    def forward(self, x, mask, position_ids, past, store_kv):
        x = x + self.self_attn(self.input_layernorm(x), mask, position_ids, past, store_kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDARModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, SIZE)
        self.layers = nn.ModuleList(SDARDecoderLayer(n) for n in range(LAYERS))
        self.norm = nn.RMSNorm(SIZE)

    def forward(self, input_ids, attention_mask, position_ids, past, store_kv):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, position_ids, past, store_kv)
        return self.norm(x)


class SDARForCausalLM(Standin):
    config_class = SDARConfig

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.vocab_size
        self.model, self.lm_head = SDARModel(vocabulary), nn.Linear(SIZE, vocabulary, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        store_kv=False,
        **_,
    ):
        if self.training:
            assert labels is not None, "Labels must be provided for training."
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            position_ids = counted(input_ids) + (0 if past_key_values is None else past_key_values.get_seq_length())
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, store_kv)
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden), past_key_values=past_key_values if use_cache else None
        )

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def block_mask(length, block_length):
    """Of ones where something is seen, [1, length, length], of whole blocks."""
    blocks = torch.ones(length // block_length, length // block_length).tril()
    return blocks.repeat_interleave(block_length, 0).repeat_interleave(block_length, 1)[None]


@torch.no_grad()
def generate(model, prompt, block_length=4, gen_length=8):
    """Blocks of the whole sequence by a cache of those before, in each the likeliest token of a call."""
    start = prompt.shape[1] // block_length * block_length
    total = -(-(prompt.shape[1] + gen_length) // block_length) * block_length
    x = torch.full((1, total), MASK)
    x[:, : prompt.shape[1]] = prompt
    mask, positions, past = block_mask(total, block_length), torch.arange(total)[None], DynamicCache()

    def call(begin, end, tokens, store_kv):
        seen = mask[:, begin:end, :end]
        more = {"past_key_values": past, "use_cache": True, "store_kv": store_kv}
        return model(tokens, attention_mask=seen, position_ids=positions[:, begin:end], **more).logits

    if start > 0:
        call(0, start, x[:, :start], True)
    for begin in range(start, total, block_length):
        block = x[:, begin : begin + block_length]
        while bool((block == MASK).any()):
            block = filled_in(block, call(begin, begin + block_length, block, False), block == MASK, 1)
        call(begin, begin + block_length, block, True)
        x[:, begin : begin + block_length] = block
    return x[:, : prompt.shape[1] + gen_length]
