"""LLaDA 2. Read in: ZHZisZZ/dllm, dllm/pipelines/llada2/models/modeling_llada2_moe.py; inclusionAI/dFactory."""

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tests.models.standins.trunk import (
    LAYERS,
    MASK,
    PAD,
    SIZE,
    VOCABULARY,
    Attention,
    Experts,
    Standin,
    counted,
    filled_in,
)


class LLaDA2MoeConfig(PretrainedConfig):
    model_type = "llada2_moe"

    def __init__(self, **more):
        self.hidden_size = SIZE
        super().__init__(**{"pad_token_id": PAD, "tie_word_embeddings": False, "vocab_size": VOCABULARY, **more})


class LLaDA2MoeAttention(Attention):
    last = "dense"

    def make_projections(self):
        self.query_key_value = nn.Linear(SIZE, 3 * SIZE, bias=False)

    def projected(self, x):
        return self.query_key_value(x).chunk(3, dim=-1)


class LLaDA2MoeDecoderLayer(nn.Module):
    def __init__(self, layer_idx):
        super().__init__()
        self.attention, self.mlp = LLaDA2MoeAttention(layer_idx), Experts()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x, mask, position_ids, **cache):
        x = x + self.attention(self.input_layernorm(x), mask, position_ids, **cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2MoeModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, SIZE)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(n) for n in range(LAYERS))
        self.norm = nn.RMSNorm(SIZE)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        x, length = self.word_embeddings(input_ids), input_ids.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = counted(input_ids) + past if position_ids is None else position_ids
        if attention_mask is None or attention_mask.dim() == 2:  # as transformers makes a mask of these: causal
            seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)[None, None]
            if attention_mask is not None:
                itself = torch.ones(length, past + length, dtype=torch.bool).tril(past).triu(past)
                seen = seen & attention_mask[:, None, None, :].bool() | itself
            attention_mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min).expand(len(x), -1, -1, -1)
        expected = (len(x), 1, length, past + length)
        if attention_mask.shape != expected or attention_mask.dtype == torch.bool:
            raise ValueError(f"what is added to scores, {expected}; got {attention_mask.shape}")
        for layer in self.layers:
            x = layer(x, attention_mask.to(x.dtype), position_ids, past_key_values=past_key_values)
        return self.norm(x)


class LLaDA2MoeModelLM(Standin):
    config_class = LLaDA2MoeConfig

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.vocab_size
        self.model, self.lm_head = LLaDA2MoeModel(vocabulary), nn.Linear(SIZE, vocabulary, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_
    ):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids, past_key_values))
        past = past_key_values if use_cache else None
        return MoeCausalLMOutputWithPast(logits=logits.float(), past_key_values=past)

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def get_output_embeddings(self):
        return self.lm_head


def block_mask(length, block_length):
    """What is added to scores, [1, 1, length, length], of whole blocks."""
    blocks = torch.ones(length // block_length, length // block_length).tril()
    return blocks.repeat_interleave(block_length, 0).repeat_interleave(block_length, 1)[None, None].log()


@torch.no_grad()
def generate(model, prompt, block_length=32, gen_length=8):
    """Blocks of the whole sequence, the first with what the prompt leaves of it: the likeliest token of a call."""
    total = -(-(prompt.shape[1] + gen_length) // block_length) * block_length
    x = torch.full((1, total), MASK)
    x[:, : prompt.shape[1]] = prompt
    mask, positions = block_mask(total, block_length), torch.arange(total)[None]
    for end in range(prompt.shape[1] // block_length * block_length + block_length, total + 1, block_length):
        seen = x[:, :end]
        while bool((seen == MASK).any()):
            where = seen == MASK
            where[:, : end - block_length] = False
            logits = model(seen, attention_mask=mask[..., :end, :end], position_ids=positions[:, :end]).logits
            seen = filled_in(seen, logits, where, 1)
        x[:, :end] = seen
    return x[:, : prompt.shape[1] + gen_length]
