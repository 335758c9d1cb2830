"""Hidden states and head out of a model, one way, so that the head runs only where it is needed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dam.models.output_layer import head_of
from dam.models.sharding import check_sharding, tied_to
from dam.models.tail import Tail, check_calls, found_tail
from dam.ops._head import Head


class Denoiser(Protocol):
    """What rollouts and losses need of a model that predicts p(v | position, tokens)."""

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input of the head [B, L, D] for tokens int64 [B, L]."""

    def head(self) -> Head:
        """The head that maps hidden states to logits."""


# Of models, by their output layer and whether their adapter is on: what they do to logits after that layer.
_TAILS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class MaskedLM:
    """A Hugging Face masked language model (or any module like it) as a `Denoiser`.

    The model must have `get_output_embeddings()`, a linear layer over the vocabulary. A hook hands
    that layer no positions at all and keeps what it would have been given, so a forward pass costs no
    logits; this works where a model returns logits only.

    Before a model's first call one forward pass of one row compares hidden states and head with the model's own
    logits: with what the output layer gives, and with what becomes of numbers put in its place. Found that way and
    followed are a bias outside the layer (ESM), a scale (Cohere, Granite), logits of the position before, and a soft
    cap of all that (Gemma 2). Anything else is an error. Where the model returns no logits there is nothing to compare.

    A head that FSDP2 has divided is gathered each time it is asked for.

    Args:
        model: takes `input_ids` and `attention_mask`.
        adapter: False evaluates a PEFT model with its adapters switched off.

    Raises:
        TypeError: the model has no such layer.
        ValueError, TypeError: at the first call: hidden states and head would give other logits than the model's. The
            message says by how much, and what to do.
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
        if layer is None:
            raise TypeError(f"get_output_embeddings() of {type(self._inner).__name__} gives no linear layer")
        check_sharding(layer, self._inner)
        return layer

    @contextlib.contextmanager
    def _as_asked(self) -> Iterator[None]:
        if self._adapter:
            yield
            return
        # PEFT makes an adapter trainable when it switches it on again, one that was frozen too.
        trainable = [(parameter, parameter.requires_grad) for parameter in self._inner.parameters()]
        try:
            with self._inner.disable_adapter():
                yield
        finally:
            for parameter, before in trainable:
                parameter.requires_grad_(before)

    def _tail(self, layer: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tail:
        known = _TAILS.setdefault(self._inner, weakref.WeakKeyDictionary()).setdefault(layer, {})
        if self._adapter not in known:
            # As it is without torch.compile, which would trace hooks that run once.
            model = getattr(self._inner, "_orig_mod", self._inner)
            with torch.no_grad():
                head = head_of(layer)
            known[self._adapter] = found_tail(model, layer, head, tokens, attention_mask)
        return known[self._adapter]

    def compare(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        """Compares with the model's own logits anew, as at the start of a run: a setting may have changed since.

        Args:
            tokens: int64 [B, L], of which the first row is used.
            attention_mask: [B, L].

        Raises:
            ValueError, TypeError: hidden states and head would give other logits.
        """
        _TAILS.pop(self._inner, None)
        with self._as_asked():
            self._tail(self._output_layer(), tokens[:1], None if attention_mask is None else attention_mask[:1])

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        given: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given.append(args[0])
            return (args[0][:, :0], *args[1:])

        with self._as_asked():
            layer = self._output_layer()
            tail = self._tail(layer, tokens[:1], None if attention_mask is None else attention_mask[:1])
            handle = layer.register_forward_pre_hook(keep)
            try:
                output = self.model(input_ids=tokens, attention_mask=attention_mask)
            finally:
                handle.remove()
        check_calls(self._inner, given, tokens)
        return tail.hidden_states(tied_to(given[0], output, self._inner))

    def head(self) -> Head:
        with self._as_asked():
            layer = self._output_layer()
            head = head_of(layer)
            # Any tokens do, where no others were seen yet.
            tail = self._tail(layer, torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0])
            return tail.head(head, self._inner)


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
