"""Layers that the stand-ins share: rotary attention by whatever mask is given, and experts."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

SIZE, HEADS, LAYERS, VOCABULARY, MASK, PAD = 16, 2, 2, 19, 18, 17


class Standin(PreTrainedModel):
    """Weights so large that what a model is called with shows in its logits."""

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.6 / module.in_features**0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


class Attention(nn.Module):
    """Scaled dot products, whose mask is boolean, additive or none; keys and values go to a cache that is given."""

    last = "o_proj"  # name of the layer that heads go through together

    def __init__(self, layer_idx=None):
        super().__init__()
        self.layer_idx = layer_idx
        self.make_projections()
        setattr(self, self.last, nn.Linear(SIZE, SIZE, bias=False))

    def make_projections(self):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(SIZE, SIZE, bias=False))

    def projected(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x, position_ids):
        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in self.projected(x))
        half = q.shape[-1] // 2
        angle = position_ids[:, None, :, None] * 10.0 ** -torch.arange(half, dtype=torch.float32)
        cos, sin = (torch.cat((f(angle),) * 2, dim=-1).to(q.dtype) for f in (torch.cos, torch.sin))
        return *(y * cos + torch.cat((-y[..., half:], y[..., :half]), dim=-1) * sin for y in (q, k)), v

    def forward(self, x, mask, position_ids, past_key_values=None):
        q, k, v = self.heads(x, position_ids)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {})
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return getattr(self, self.last)(4.0 * attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a feed-forward layer or experts."""

    def __init__(self, mlp, attention=Attention, layer_idx=None):
        super().__init__()
        self.self_attn, self.mlp = attention(layer_idx), mlp
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x, mask, position_ids, **cache):
        x = x + self.self_attn(self.input_layernorm(x), mask, position_ids, **cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class FeedForward(nn.Module):
    """Without a gate."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class Experts(nn.Module):
    """Two of three experts for each token."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(SIZE, 3, bias=False), nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, SIZE))
        return (weight[..., None] * picked).sum(dim=-2)


def counted(x):
    """Positions of tokens [B, L] as a model makes them where it is given none."""
    return torch.arange(x.shape[1])[None].expand(x.shape[:2])


def filled_in(x, logits, where, count, confidence=lambda logits: logits.softmax(dim=-1).amax(dim=-1)):
    """`count` tokens of each row put in where `confidence` is highest, of the positions `where`; never the mask token.

    The likeliest ones; confidence is their probability unless given.
    """
    logits = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    token = logits.argmax(dim=-1)
    chosen = confidence(logits).masked_fill(~where, -torch.inf).topk(count, dim=1).indices
    return x.scatter(1, chosen, token.gather(1, chosen))
