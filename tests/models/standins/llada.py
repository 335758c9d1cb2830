"""LLaDA. Read in: ZHZisZZ/dllm, dllm/pipelines/llada/models/modeling_llada.py; ML-GSAI/LLaDA, generate.py."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.models.standins.trunk import (
    LAYERS,
    MASK,
    PAD,
    SIZE,
    VOCABULARY,
    Attention,
    Standin,
    counted,
    filled_in,
)


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, weight_tying=False, scale_logits=False, heeds_mask=True, **more):
        self.d_model, self.weight_tying, self.scale_logits = SIZE, weight_tying, scale_logits
        self.heeds_mask = heeds_mask  # early code does not
        super().__init__(
            **{
                "pad_token_id": PAD,
                "tie_word_embeddings": False,
                "vocab_size": VOCABULARY,
                "mask_token_id": MASK,
                **more,
            }
        )


class LLaDALlamaBlock(Attention):
    last = "attn_out"

    def __init__(self):
        super().__init__()
        self.ff_proj, self.ff_out = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.attn_norm, self.ff_norm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x, mask, position_ids):
        x = x + super().forward(self.attn_norm(x), mask, position_ids)
        return x + self.ff_out(F.silu(self.ff_proj(self.ff_norm(x))))


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.vocab_size, SIZE),
            "blocks": nn.ModuleList(LLaDALlamaBlock() for _ in range(LAYERS)),
            "ln_f": nn.RMSNorm(SIZE),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(SIZE, config.vocab_size, bias=False)
        self.transformer = nn.ModuleDict(parts)

    def forward(self, input_ids, attention_mask=None, attention_bias=None):
        x = self.transformer.wte(input_ids)
        bias = attention_bias
        if attention_mask is not None and 0.0 in attention_mask and self.config.heeds_mask:
            hidden = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float).min
            bias = hidden.expand(-1, 1, x.shape[1], -1) + (0.0 if bias is None else bias)
        for block in self.transformer.blocks:
            x = block(x, bias, counted(input_ids))
        x = self.transformer.ln_f(x)
        if self.config.weight_tying:
            logits = F.linear(x, self.transformer.wte.weight, None)
        else:
            logits = self.transformer.ff_out(x)
        if self.config.scale_logits:
            logits.mul_(1 / math.sqrt(self.config.d_model))
        return logits


class LLaDAModelLM(Standin):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None, **_):
        return CausalLMOutputWithPast(logits=self.model.forward(input_ids, attention_mask, attention_bias))

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out


@torch.no_grad()
def generate(model, prompt, attention_mask=None, steps=8, gen_length=8, block_length=4, cfg_scale=0.0):
    """Blocks of the completion one after another, in each the likeliest tokens of a call (`low_confidence`)."""
    x = F.pad(prompt, (0, gen_length), value=MASK)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, gen_length), value=1)
    prompt_index = x != MASK
    blocks = gen_length // block_length
    for block in range(blocks):
        end = prompt.shape[1] + (block + 1) * block_length
        base, remainder = divmod(block_length, steps // blocks)
        for i in range(steps // blocks):
            where = x == MASK
            where[:, end:] = False
            logits = model(x, attention_mask=attention_mask).logits
            if cfg_scale > 0.0:
                un_logits = model(x.masked_fill(prompt_index, MASK), attention_mask=attention_mask).logits
                logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            x = filled_in(x, logits, where, base + (i < remainder))
    return x
