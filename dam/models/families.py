"""Models to denoisers, by the model_type of their config: which family's law a model has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from dam.models.a2d import A2D
from dam.models.denoiser import Denoiser, MaskedLM
from dam.models.diffusion_gemma import DiffusionGemma
from dam.models.dream import Dream
from dam.models.llada import LLaDA
from dam.models.llada2 import LLaDA2
from dam.models.roberta import PreNormRoberta
from dam.models.sdar import SDAR

# Makes a denoiser of a model, or of what wraps it; keyword `adapter` as `as_denoiser`, and options of its own.
Family = Callable[..., Denoiser]

_FAMILIES: dict[str, Family] = {
    "a2d-llama": A2D,
    "a2d-qwen2": A2D,
    "a2d-qwen3": A2D,
    "Dream": Dream,
    "diffusion_gemma": DiffusionGemma,
    "llada": LLaDA,
    "lladamoe": LLaDA,
    "llada2_moe": LLaDA2,
    "llada21_moe": LLaDA2,
    "roberta-prelayernorm": PreNormRoberta,
    "sdar": SDAR,
    "sdar_moe": SDAR,
}

# Classes of transformers that load the families' models, where it is not AutoModelForMaskedLM.
_AUTO_CLASSES = {
    **dict.fromkeys(("Dream", "llada", "lladamoe"), "AutoModel"),
    **dict.fromkeys(("llada2_moe", "llada21_moe", "sdar", "sdar_moe"), "AutoModelForCausalLM"),
}


def auto_class(model_type: str | None) -> str:
    """Name of the class of transformers that loads models of a type as their makers say (docs/models.md)."""
    return _AUTO_CLASSES.get(model_type or "", "AutoModelForMaskedLM")


def register(model_type: str, family: Family) -> None:
    """Makes `as_denoiser`, and with it the trainer, take models of a type by a family of your own, or another one.

    Args:
        model_type: of their config.
        family: `family(model, adapter=..., **options)` gives a `Denoiser`; the model may be inside PEFT's wrapper or
            those of accelerate. A subclass of `MaskedLM`, or `functools.partial(MaskedLM, shift=1)`, will do.
    """
    _FAMILIES[model_type] = family


def as_denoiser(model: nn.Module, *, adapter: bool = True, **options: Any) -> Denoiser:
    """A model as a `Denoiser` with the law that it has.

    Itself where it has hidden_states() and head(); else what its family says, by `config.model_type`; else a
    `MaskedLM`, whose attention is what the model makes of attention_mask and whose logits are in place.

    Args:
        model: the module, or one wrapped by PEFT, DistributedDataParallel and their like.
        adapter: False evaluates a PEFT model with its adapters switched off (the base model).
        options: of the family: `block_length`, `mask_token_id`, ...; of others those of `MaskedLM`.

    Raises:
        TypeError: the module is none of these; the family has no such option; or the module is a Denoiser inside a
            wrapper, whose forward pass a call of its methods would go around, and with it the sum of gradients over
            processes.
        ValueError: an option is out of range.
    """
    if _is_denoiser(model):
        if not adapter:
            raise TypeError(f"{type(model).__name__} has no adapter to switch off")
        if options:
            raise TypeError(
                f"{type(model).__name__} is a Denoiser itself and takes no options; got {', '.join(options)}"
            )
        return cast(Denoiser, model)
    inner = getattr(model, "module", None)
    if _is_denoiser(inner):
        raise TypeError(
            f"{type(inner).__name__} is a Denoiser inside {type(model).__name__}: its methods would go around the "
            "wrapper, and gradients would not be summed over processes. Train it in one process, or hand in a "
            "denoiser that calls the wrapper's forward"
        )
    model_type = _model_type(model)
    family = _FAMILIES.get(model_type, MaskedLM) if model_type else MaskedLM
    parameters = inspect.signature(family).parameters
    by_name = [name for name, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [name for name in by_name if name not in ("adapter", next(iter(parameters)))]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in options if name not in known and not takes_any]
    if unknown:
        raise TypeError(
            f"models of type {model_type!r} have no option {', '.join(unknown)}; they have {', '.join(known) or 'none'}"
        )
    return family(model, adapter=adapter, **options)


def _model_type(model: Any) -> str | None:
    """That of the config of a model, or of the model inside a wrapper."""
    for module in (model, getattr(model, "module", None)):
        config = getattr(module, "config", None)
        found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
        if found:
            return str(found)
    return None


def _is_denoiser(model: Any) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("hidden_states", "head"))
