"""LLaDA-MoE. Read in: ZHZisZZ/dllm, dllm/pipelines/llada/models/modeling_lladamoe.py; generated as LLaDA is."""

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tests.models.standins.trunk import LAYERS, MASK, PAD, SIZE, VOCABULARY, Experts, Layer, Standin, counted


class LLaDAMoEConfig(PretrainedConfig):
    model_type = "lladamoe"

    def __init__(self, **more):
        self.hidden_size = SIZE
        super().__init__(
            **{
                "pad_token_id": PAD,
                "tie_word_embeddings": False,
                "vocab_size": VOCABULARY,
                "mask_token_id": MASK,
                **more,
            }
        )


class LLaDAMoEModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, SIZE)
        self.layers = nn.ModuleList(Layer(Experts()) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(SIZE)

    def forward(self, input_ids, attention_mask, position_ids):
        x = self.embed_tokens(input_ids)
        mask = None  # full attention; what [B, L] hides is hidden
        if attention_mask is not None:
            shape = (-1, 1, input_ids.shape[1], -1)
            mask = torch.where(attention_mask[:, None, None, :].bool(), 0.0, torch.finfo(x.dtype).min).expand(shape)
        for layer in self.layers:
            x = layer(x, mask, position_ids)
        return self.norm(x)


class LLaDAMoEModelLM(Standin):
    config_class = LLaDAMoEConfig

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.vocab_size
        self.model, self.lm_head = LLaDAMoEModel(vocabulary), nn.Linear(SIZE, vocabulary, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        position_ids = counted(input_ids) if position_ids is None else position_ids
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids))
        return MoeCausalLMOutputWithPast(logits=logits.float())

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head
