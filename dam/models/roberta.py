"""Pre-norm RoBERTa, the class of the small models that dam makes itself: on CPUs a pass of our own, of what is read.

Source: RobertaPreLayerNormForMaskedLM of transformers, after Ott et al., fairseq, arXiv 1904.01038.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dam.models.attention import additive
from dam.models.denoiser import MaskedLM, check_left_padding
from dam.models.padding import evaluating, is_rounding

# Of models: whether a trial has shown that the pass of our own gives what theirs does.
_AGREES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

# Modules of these packages compute what their classes say. Others, such as adapters' and FSDP2's, do more.
_PLAIN = ("torch.nn.modules.", "transformers.models.roberta_prelayernorm.", "transformers.activations")


class PreNormRoberta(MaskedLM):
    """Pre-norm RoBERTa, of whose last layer and output only the positions that are read are run (`hidden_at`).

    That is on a CPU, in float32 or float64, of a model that is as transformers makes it. Besides, the first layer's
    queries, keys and values are looked up where there are fewer pairs of token and position than tokens, others are one
    product, and attention is torch's fused one. Numbers are those of the model's own pass up to rounding, gradients
    too; a trial before the first pass compares. With adapters, hooks, a wrapper, autocast, torch.compile, dropout that
    is on or checkpoints of gradients, all is run by the model; so it is where a class made of this one has its own
    hidden_states.

    Args: as for `MaskedLM`.
    """

    def compare(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        _AGREES.pop(self._inner, None)
        super().compare(tokens, attention_mask)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        """As `MaskedLM`; in the pass of our own no row's numbers hang on others, in training mode either."""
        return self._takes_own_pass(tokens) or super().equal_rows(tokens, attention_mask)

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        """As `Denoiser` says."""
        if len(row) == 0 or not self._takes_own_pass(tokens):
            return self.hidden_states(tokens, attention_mask)[row, position]
        tail = self._tail(self._output_layer(), tokens[:1], None if attention_mask is None else attention_mask[:1])
        if attention_mask is not None:
            self._try_padding(tokens, attention_mask)
            check_left_padding(self, attention_mask)
        if not self._try_own_pass(tokens, attention_mask, row, position):
            return self.hidden_states(tokens, attention_mask)[row, position]
        return tail.hidden_states(_states_at(self.model, tokens, attention_mask, row, position))

    def _takes_own_pass(self, tokens: Tensor) -> bool:
        """Whether the pass of our own is of this model, as far as is seen without a trial."""
        model = self.model
        if model is not self._inner or type(model).__name__ != "RobertaPreLayerNormForMaskedLM":
            return False
        if getattr(self.hidden_states, "__func__", None) is not PreNormRoberta.hidden_states:
            return False  # a class made of this one, or someone else, says what they are
        if self._attention != "own" or self._shift or not self._adapter or model.config.is_decoder:
            return False
        if tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return all(_is_plain(module) for module in model.modules())

    def _try_own_pass(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> bool:
        """Whether it gives what the model's own does, found out once."""
        if self.model not in _AGREES:
            with torch.no_grad(), evaluating(self.model):
                whole, _ = self._last_states(self.model, self._arguments(tokens, attention_mask))
                found = _states_at(self.model, tokens, attention_mask, row, position)
            _AGREES[self.model] = is_rounding(found, whole[row, position], everywhere=True)
        return _AGREES[self.model]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class does, in numbers of one kind, and nothing else is done where it runs."""
    own = vars(module)  # looked into by itself: this runs for each module in each call
    if not type(module).__module__.startswith(_PLAIN) or "forward" in own or module._compiled_call_impl is not None:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if module.training and (own.get("gradient_checkpointing", False) or own.get("p", 0.0) > 0.0):
        return False
    return all(p is None or p.dtype in (torch.float32, torch.float64) for p in own["_parameters"].values())


class _Read(NamedTuple):
    """Positions of sequences [B, L] that are read, each once."""

    flat: Tensor  # int64 [u]: row * L + position of each, rising
    table: Tensor  # int64 [B, P]: those of each row, and its first position in place of what it has fewer
    place: Tensor  # int64 [u]: where each is in there, row * P + number
    of: Tensor  # int64 [n]: which of them each one is that was asked for


def _read(shape: torch.Size, row: Tensor, position: Tensor) -> _Read:
    """Positions int64 [n] of rows int64 [n]."""
    rows, length = shape
    used = torch.zeros(shape, dtype=torch.bool)
    used[row, position] = True
    counted = used.cumsum(dim=1)
    most = int(counted[:, -1].max())
    flat = used.flatten().nonzero()[:, 0]
    place = flat // length * most + counted.flatten()[flat] - 1
    table = (length * torch.arange(rows)).repeat_interleave(most)
    table[place] = flat
    number = torch.zeros_like(counted).flatten()
    number[flat] = torch.arange(len(flat))
    return _Read(flat, table.view(rows, most), place, number[row * length + position])


def _states_at(model: Any, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
    """What the output layer is given [n, D] at positions of rows, int64 [n] each, of tokens [B, L]."""
    body, head = model.roberta_prelayernorm, model.lm_head
    *front, last = body.encoder.layer
    hidden = None
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        hidden = additive(attention_mask[:, None, None] != 0, body.LayerNorm.weight.dtype)  # [B, 1, 1, L]
    x, qkv = _embedded(body.embeddings, tokens, front[0].attention if front else None)
    for layer in front:
        own = layer.attention.self
        if qkv is None:
            qkv = _side_by_side(layer.attention.LayerNorm(x), own.query, own.key, own.value)
        query, key, value = qkv.chunk(3, dim=-1)
        x, qkv = _behind_attention(layer, _attended(own, query, key, value, hidden), x), None
    own, read = last.attention.self, _read(tokens.shape, row, position)
    normed = last.attention.LayerNorm(x)
    query = own.query(F.embedding(read.table, normed.flatten(0, 1)))
    key, value = _side_by_side(normed, own.key, own.value).chunk(2, dim=-1)
    found = F.embedding(read.place, _attended(own, query, key, value, hidden).flatten(0, 1))
    at = body.LayerNorm(_behind_attention(last, found, F.embedding(read.flat, x.flatten(0, 1))))
    return F.embedding(read.of, head.layer_norm(F.gelu(head.dense(at))))


def _embedded(embeddings: Any, tokens: Tensor, attention: Any) -> tuple[Tensor, Tensor | None]:
    """What the first layer is given [B, L, D], and where looked up, its queries, keys and values [B, L, 3 A].

    They depend on a token and its place alone. Looking up is by `F.embedding`, whose gradient is a fast sum.
    """
    pad, places = embeddings.padding_idx, embeddings.position_embeddings.num_embeddings
    pairs = embeddings.word_embeddings.num_embeddings * places
    too_long = tokens.shape[1] + pad + 1 > places  # which the model refuses
    if attention is None or 2 * pairs > tokens.numel() or too_long:
        return embeddings(input_ids=tokens), None
    shown = (tokens != pad).long()
    pair = tokens * places + shown.cumsum(dim=1) * shown + pad
    every = torch.arange(pairs)[None]
    x = embeddings(input_ids=every // places, position_ids=every % places)
    own = attention.self
    qkv = _side_by_side(attention.LayerNorm(x), own.query, own.key, own.value)
    return F.embedding(pair, x[0]), F.embedding(pair, qkv[0])


def _side_by_side(x: Tensor, *layers: nn.Linear) -> Tensor:
    """What linear layers give for x [..., D], by one product: [..., sum of their sizes]."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _attended(own: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Attention of queries [B, P, A] to keys and values [B, L, A], of all heads, [B, P, A]."""
    size = (own.num_attention_heads, own.attention_head_size)
    query, key, value = (x.unflatten(-1, size).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, hidden).transpose(1, 2).flatten(2)


def _behind_attention(layer: Any, found: Tensor, x: Tensor) -> Tensor:
    """What a layer gives [..., D], of what its attention has found and of what it was given."""
    x = layer.attention.output.dense(found) + x
    inner = layer.intermediate
    fed = inner.dense(inner.LayerNorm(x))
    if torch.is_grad_enabled() or type(inner.intermediate_act_fn).__name__ != "GELUActivation":
        fed = inner.intermediate_act_fn(fed)
    else:
        torch.ops.aten.gelu_(fed)  # as that does, in the place of what it is given
    return layer.output.dense(fed) + x
