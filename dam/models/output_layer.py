"""The head of an output layer, with the adapter that PEFT has put on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dam.models.sharding import brought_here, shape_of, whole
from dam.ops._head import Head, LoRA

# Rows of a head whose sum with an adapter's product is formed at a time, for its norms.
_BLOCK_ROWS = 4096


def head_of(layer: Any, *, in_place: bool = False) -> Head:
    """What a layer computes now, be its adapters on or off, as weight, bias and low-rank product.

    Parameters that are divided among processes are gathered, or with in_place handed on as they are.

    PEFT's layers are known by their attributes, so that PEFT is not needed: LoRA with its options rsLoRA, lora_bias
    and DoRA, trainable_token_indices and modules_to_save. DoRA scales the rows of the weight and so forms one
    array as large as it.

    Raises:
        TypeError: it is no linear layer.
        ValueError: an adapter on it cannot be had as a low-rank product, or several are on it at once.
    """
    adapted = getattr(layer, "token_adapter", layer)  # inside a wrapper of PEFT's
    if not hasattr(adapted, "base_layer"):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or len(shape_of(weight)) != 2:
            raise TypeError(f"the output layer, {type(layer).__name__}, is no linear layer: it has no matrix `weight`")
        with brought_here(layer):
            weight, bias = layer.weight, getattr(layer, "bias", None)
            if in_place:
                return Head(weight, bias)
            return Head(whole(weight), None if bias is None else whole(bias))
    if adapted.merged and adapted.disable_adapters:
        raise ValueError("the adapter on the output layer is switched off but merged: call unmerge_adapter() first")
    head, names = head_of(adapted.base_layer), _active(adapted)
    if not names:
        return head
    if len(names) > 1 or head.lora is not None:
        raise ValueError(f"the output layer may have one active adapter; got {', '.join(names)} on {_kind(adapted)}")
    if hasattr(adapted, "trainable_tokens_delta"):
        return _with_tokens(head, adapted, names[0])
    if _is_lora(adapted, names[0]):
        return _with_lora(head, adapted, names[0])
    raise ValueError(
        f"the adapter {names[0]!r} on the output layer is of a kind, {_kind(adapted)}, whose product the fused "
        "operations do not apply; LoRA, rsLoRA, DoRA, lora_bias, trainable_token_indices and modules_to_save are fine. "
        "Leave the output layer out of target_modules, or merge the adapter (merge_and_unload)"
    )


def _active(layer: Any) -> list[str]:
    """Names of the adapters that a tuner layer applies."""
    if layer.disable_adapters or layer.merged:
        return []
    present = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind)}
    return [name for name in layer.active_adapters if name in present]


def _variant(layer: Any, name: str) -> str | None:
    """Name of PEFT's class for a form of LoRA of its own, None for the plain one."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    return None if variant is None else getattr(variant, "__name__", type(variant).__name__)


def _kind(layer: Any) -> str:
    variants = [_variant(layer, name) for name in layer.active_adapters]
    return ", ".join([type(layer).__module__, type(layer).__name__, *filter(None, variants)])


def _is_lora(layer: Any, name: str) -> bool:
    factors = [getattr(layer, kind, {}) for kind in ("lora_A", "lora_B")]
    linear = all(name in factor and isinstance(factor[name], nn.Linear) for factor in factors)
    return linear and _variant(layer, name) in (None, "DoraLinearVariant")


def _with_lora(head: Head, layer: Any, name: str) -> Head:
    a, b, scale = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0.0:
        raise ValueError(f"a LoRA adapter on the output layer must have lora_dropout=0 in training; got {dropout.p}")
    weight, bias, high, low = head.weight, head.bias, whole(a.weight), whole(b.weight)
    if b.bias is not None:
        added = scale * whole(b.bias)
        bias = added if bias is None else bias + added
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if name in magnitudes:
        factor = whole(magnitudes[name].weight) / _row_norms(weight, high, low, scale)
        # In float32 until a linear op takes it: in bfloat16 a factor near 1 would be 1.
        weight, low = weight * factor.float()[:, None], low * factor[:, None]
    return Head(weight, bias, LoRA(high, low, scale))


@torch.no_grad()
def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norms [V] of the rows of weight + scale * b @ a, constants of the gradient (DoRA, arXiv 2402.09353, 4.3)."""
    norms = weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
    a, b = a.to(norms.dtype), b.to(norms.dtype)
    with torch.autocast(weight.device.type, enabled=False):  # whose 8 bits would be those of every logit
        for at in range(0, len(norms), _BLOCK_ROWS):
            part = slice(at, at + _BLOCK_ROWS)
            rows = torch.addmm(weight[part].to(norms.dtype), b[part], a, alpha=scale)
            torch.linalg.vector_norm(rows, dim=1, out=norms[part])
    return norms


def _with_tokens(head: Head, layer: Any, name: str) -> Head:
    """Rows of the weight replaced by trained ones: a product of as many ranks, that adds their differences."""
    index = torch.tensor(layer.token_indices[name], device=head.weight.device)
    trained = whole(layer.trainable_tokens_delta[name]).to(head.weight.dtype)
    chosen = head.weight.new_zeros(head.weight.shape[0], len(index))
    chosen[index, torch.arange(len(index), device=index.device)] = 1.0
    # PEFT's layer, on in place of a linear one, leaves out its bias.
    return Head(head.weight, None, LoRA(trained - head.weight[index], chosen))
