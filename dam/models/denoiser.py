"""Hidden states and head out of a model, one way, so that the head runs only where it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dam.ops._head import Head, LoRA


class Denoiser(Protocol):
    """What rollouts and losses need of a model that predicts p(v | position, tokens)."""

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input of the head [B, L, D] for tokens int64 [B, L]."""

    def head(self) -> Head:
        """The head that maps hidden states to logits."""


class MaskedLM:
    """A Hugging Face masked language model (or any module like it) as a `Denoiser`.

    The model must have `get_output_embeddings()`, a linear layer that is applied last. A hook hands
    that layer no positions at all and keeps what it would have been given, so a forward pass costs no
    logits; this works where a model returns logits only.

    Args:
        model: takes `input_ids` and `attention_mask`.
        adapter: False evaluates a PEFT model with its adapters switched off (the base model).
    """

    def __init__(self, model: nn.Module, *, adapter: bool = True):
        self.model: Any = model
        # DistributedDataParallel and its like keep the model in .module; the forward pass must go through them.
        self._inner: Any = model if hasattr(model, "get_output_embeddings") else getattr(model, "module", model)
        if not callable(getattr(self._inner, "get_output_embeddings", None)):
            raise TypeError(f"model must have get_output_embeddings(); {type(model).__name__} has none")
        self._adapter = adapter

    def _output_layer(self) -> Any:
        layer = self._inner.get_output_embeddings()
        if layer is None or getattr(layer, "weight", None) is None:
            raise TypeError(f"get_output_embeddings() of {type(self._inner).__name__} gives no linear layer")
        return layer

    @contextlib.contextmanager
    def _as_asked(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._adapter else self._inner.disable_adapter():
            yield

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(args[0])
            return (args[0][:, :0], *args[1:])

        handle = self._output_layer().register_forward_pre_hook(keep)
        try:
            with self._as_asked():
                self.model(input_ids=tokens, attention_mask=attention_mask)
        finally:
            handle.remove()
        if len(kept) != 1 or kept[0].shape[:2] != tokens.shape:
            raise RuntimeError(
                f"the output layer of {type(self._inner).__name__} ran {len(kept)} times in one forward pass, "
                f"on shapes {[list(h.shape) for h in kept]}; it must run once, on {[*tokens.shape, 'D']}"
            )
        return kept[0]

    def head(self) -> Head:
        layer = self._output_layer()
        return Head(layer.weight, getattr(layer, "bias", None), self._lora(layer))

    def _lora(self, layer: Any) -> LoRA | None:
        """A PEFT adapter on the output layer itself, whose `weight` is that of the layer below it."""
        if not self._adapter or not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
            return None
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if not names:
            return None
        if len(names) > 1:
            raise ValueError(f"the output layer may have one active LoRA adapter; got {', '.join(names)}")
        dropout = layer.lora_dropout[names[0]]
        if layer.training and getattr(dropout, "p", 0.0) > 0.0:
            raise ValueError(
                f"a LoRA adapter on the output layer must have lora_dropout=0 in training; got {dropout.p}"
            )
        return LoRA(layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, float(layer.scaling[names[0]]))


def denoiser_of(model: nn.Module, *, adapter: bool = True) -> Denoiser:
    """A module as a `Denoiser`: itself where it has hidden_states() and head(), else a `MaskedLM`.

    Args:
        model: the module, or one wrapped by DistributedDataParallel and its like.
        adapter: False evaluates a PEFT model with its adapters switched off (the base model).

    Raises:
        TypeError: the module is neither; or it is a Denoiser inside a wrapper, whose forward pass a call of its
            methods would go around, and with it the sum of gradients over processes.
    """
    if _is_denoiser(model):
        if not adapter:
            raise TypeError(f"{type(model).__name__} has no adapter to switch off")
        return cast(Denoiser, model)
    inner = getattr(model, "module", None)
    if _is_denoiser(inner):
        raise TypeError(
            f"{type(inner).__name__} is a Denoiser inside {type(model).__name__}: its methods would go around the "
            "wrapper, and gradients would not be summed over processes. Train it in one process, or hand in a "
            "denoiser that calls the wrapper's forward"
        )
    return MaskedLM(model, adapter=adapter)


def _is_denoiser(model: Any) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("hidden_states", "head"))


class Tabular(nn.Module):
    """A table of logits for every state of a short sequence, as a `Denoiser`: exact, for tests and studies.

    Args:
        logits: [(tokens)^L, L, V], a row per state; state x has index sum_i x_i (tokens)^(L-1-i).
        tokens: number of distinct tokens of a state, the mask included.
    """

    def __init__(self, logits: Tensor, tokens: int):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self._tokens = tokens

    def index(self, tokens: Tensor) -> Tensor:
        """Row of the table for each state [..., L]."""
        length = tokens.shape[-1]
        powers = self._tokens ** torch.arange(length - 1, -1, -1, device=tokens.device)
        return (tokens * powers).sum(dim=-1)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits[self.index(tokens)]

    def head(self) -> Head:
        size = self.logits.shape[-1]
        return Head(torch.eye(size, dtype=self.logits.dtype, device=self.logits.device), None)
