"""A model's parameters as its checkpoint has them, for an engine that loads such."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dam.files import usual_modes
from dam.models.sharding import is_partitioned, whole

# What PEFT puts into names; "original_module" is what a module of modules_to_save was at first.
_BASE, _SAVED, _ORIGINAL = "base_layer", "modules_to_save", "original_module"


@torch.no_grad()
def served_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters of a model, by the names that they have in its checkpoint.

    Of one with a LoRA adapter those of the base with the adapter added, in the dtype of the base; of one that FSDP2 or
    DeepSpeed's ZeRO-3 divides whole ones, one after another, so all its processes go through them. Wrappers
    (DistributedDataParallel, torch.compile) are seen through.

    Raises:
        ValueError: an adapter is none that can be added, as one that ZeRO-3 divides.
    """
    network = _unwrapped(model)
    if hasattr(network, "peft_config"):
        network = network.get_base_model()
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, _BASE)}
    if layers and any(map(is_partitioned, network.parameters())):
        raise ValueError(
            "the adapter's factors are divided by DeepSpeed's ZeRO-3, and their product cannot be sent as part of the "
            "weights: use stage 2, FSDP2, or no adapter"
        )
    for name, parameter in network.named_parameters():
        found = _served(name, layers, network)
        if found is not None:
            plain, added = found
            value = whole(parameter).detach()
            yield plain, value if added is None else value + added.to(value)


def write_weights(
    parameters: Iterable[tuple[str, Tensor]], folder: str, version: int, dtype: torch.dtype | None
) -> str:
    """Writes parameters to folder/version-<version>/model.safetensors, and removes earlier versions there.

    Returns:
        The folder of the version.
    """
    from safetensors.torch import save_file

    tensors = {name: value.to("cpu", dtype or value.dtype).contiguous() for name, value in parameters}
    if not tensors:
        raise ValueError("there are no parameters to send")
    place = os.path.join(folder, f"version-{version}")
    os.makedirs(place, exist_ok=True)
    with usual_modes(place):  # the server's user may be another
        save_file(tensors, os.path.join(place, "model.safetensors"), metadata={"format": "pt"})
    for other in os.listdir(folder):
        if other.startswith("version-") and other != os.path.basename(place):
            shutil.rmtree(os.path.join(folder, other), ignore_errors=True)
    return place


def _unwrapped(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _served(name: str, layers: dict[str, nn.Module], network: nn.Module) -> tuple[str, Tensor | None] | None:
    """The name in a checkpoint, and what an adapter adds; None of what has no place there."""
    parts = name.split(".")
    if _SAVED in parts:
        at = parts.index(_SAVED)
        wrapper = network.get_submodule(".".join(parts[:at]))
        active = parts[at + 1] in _active(wrapper)
        return (".".join(parts[:at] + parts[at + 2 :]), None) if active else None
    if _ORIGINAL in parts:
        at = parts.index(_ORIGINAL)
        wrapper = network.get_submodule(".".join(parts[:at]))
        return None if _active(wrapper) else (".".join(parts[:at] + parts[at + 1 :]), None)
    owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    if owner is None:
        return name, None
    if not name.startswith(f"{owner}.{_BASE}."):
        return None  # the adapter's own
    plain = name.replace(f".{_BASE}.", ".", 1)
    return plain, _added(layers[owner], owner) if name.endswith(".weight") else None


def _active(wrapper: Any) -> list[str]:
    return list(wrapper.active_adapters) if not wrapper.disable_adapters else []


def _added(layer: Any, name: str) -> Tensor | None:
    """What a layer's active adapters add to its weight.

    Raises:
        ValueError: they do something else.
    """
    if getattr(layer, "merged", False):
        return None
    added = None
    for adapter in _active(layer):
        kinds = [kind for kind in layer.adapter_layer_names if adapter in getattr(layer, kind, {})]
        if not kinds:  # it has nothing at this layer
            continue
        bias = (getattr(layer, "lora_bias", None) or {}).get(adapter)
        if not kinds[0].startswith("lora_") or adapter in getattr(layer, "lora_variant", {}) or bias:
            raise ValueError(
                f"the adapter {adapter!r} of {name} is no plain LoRA, which alone can be sent as part of the weights: "
                "train without an engine, or with LoRA (no DoRA, no lora_bias)"
            )
        delta = whole(layer.get_delta_weight(adapter))
        added = delta if added is None else added + delta
    return added
