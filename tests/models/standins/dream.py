"""Dream. Read in: ZHZisZZ/dllm, dllm/pipelines/dream/models/modeling_dream.py and generation_utils.py."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from tests.models.standins.trunk import (
    LAYERS,
    MASK,
    PAD,
    SIZE,
    VOCABULARY,
    FeedForward,
    Layer,
    Standin,
    counted,
    filled_in,
)


class DreamConfig(PretrainedConfig):
    model_type = "Dream"

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


class DreamBaseModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, SIZE)
        self.layers = nn.ModuleList(Layer(FeedForward(), layer_idx=n) for n in range(LAYERS))
        self.norm = nn.RMSNorm(SIZE)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            # Whatever is no tensor, "full" or None, is full attention.
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
            x = layer(x, mask, position_ids, past_key_values=past_key_values)
        return self.norm(x)


class DreamModel(Standin):
    config_class = DreamConfig

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.vocab_size
        self.model, self.lm_head = DreamBaseModel(vocabulary), nn.Linear(SIZE, vocabulary, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_
    ):
        if isinstance(attention_mask, torch.Tensor) and (attention_mask.dim(), attention_mask.dtype) != (4, torch.bool):
            raise ValueError(f"a boolean mask [B, 1, L, L], please; got {attention_mask.shape}")
        position_ids = counted(input_ids) if position_ids is None else position_ids
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values)
        return MaskedLMOutput(logits=self.lm_head(hidden))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def shifted(logits):
    """Logits of tokens at their own positions, of what the model returns."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


@torch.no_grad()
def generate(model, prompt, attention_mask=None, gen_length=8, alg="maskgit_plus", top_p=None, top_k=None):
    """A token a call, anywhere in the completion, where `alg` says."""
    x, positions = F.pad(prompt, (0, gen_length), value=MASK), None
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, gen_length), value=1)
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        shown = attention_mask.bool()
        attention_mask = shown[:, None, None, :] & shown[:, None, :, None]
    for _ in range(gen_length):
        # Rows of padding see nothing, of which attention makes 0 (NaN before torch 2.5).
        logits = shifted(model(x, "full" if attention_mask is None else attention_mask, positions).logits)
        x = filled_in(x, logits, x == MASK, 1, lambda logits: confidence(logits, alg, top_p, top_k))
    return x


def confidence(logits, alg, top_p=None, top_k=None):
    """What `sample_tokens` gives at temperature 0."""
    if top_p is not None:
        falling, index = logits.sort(dim=-1, descending=True)
        remove = falling.softmax(dim=-1).cumsum(dim=-1) > top_p
        remove = F.pad(remove[..., :-1], (1, 0))
        logits = logits.masked_fill(remove.scatter(-1, index, remove), torch.finfo(logits.dtype).min)
    if top_k is not None:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)
    probs = logits.softmax(dim=-1)
    if alg == "entropy":
        return (probs * (probs + 1e-10).log()).sum(dim=-1)
    top = probs.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1] if alg == "topk_margin" else top[..., 0]
