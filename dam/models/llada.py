"""LLaDA: full attention, logits divided by sqrt(d) if the config says so, an output layer that may be the embedding.

Source: Nie et al., Large Language Diffusion Models, arXiv 2502.09992; modeling_llada.py of GSAI-ML/LLaDA-8B-Base.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dam.models.denoiser import MaskedLM
from dam.models.sharding import brought_here, check_sharding, settle, whole
from dam.models.tail import Tail
from dam.ops._head import Head

_POSITIONS = 8  # that are compared with the model's own logits


class LLaDA(MaskedLM):
    """LLaDA, LLaDA 1.5 and LLaDA-MoE.

    With `weight_tying` the model multiplies by its embedding's matrix without a call of an output layer: the input of
    that product is taken behind the last norm, `transformer.ln_f`. Without, it is a `MaskedLM` like others.

    Early releases of the code do not heed attention_mask: rows padded on the left are refused there.

    Args:
        model: the model, or what wraps it.
        adapter: as for `MaskedLM`.
        mask_token_id: where not that of the config.
    """

    def __init__(self, model: nn.Module, *, adapter: bool = True, mask_token_id: int | None = None):
        super().__init__(model, adapter=adapter, mask_token_id=mask_token_id)
        config = self._inner.config
        self._tied = bool(getattr(config, "weight_tying", False))
        if self._tied:
            self._scale = 1.0 / math.sqrt(config.d_model) if config.scale_logits else 1.0

    def _transformer(self) -> Any:
        """What holds the embedding and the last norm, inside whatever wraps it."""
        for module in self._inner.modules():
            transformer = getattr(module, "transformer", None)
            if all(isinstance(getattr(transformer, name, None), nn.Module) for name in ("wte", "ln_f")):
                return transformer
        raise TypeError(f"{type(self._inner).__name__} has no transformer with wte and ln_f, as LLaDA has")

    def _output_layer(self) -> Any:
        if not self._tied:
            return super()._output_layer()
        layer = self._transformer().wte
        check_sharding(layer, self._inner)
        settle(self._inner)
        return layer

    def _tail(self, layer: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tail:
        if not self._tied:
            return super()._tail(layer, tokens, attention_mask)
        tail = Tail(scale=self._scale)
        known = self._known_tails(layer)
        if self._adapter not in known:
            self._check_logits(tail, layer, tokens, attention_mask)
            known[self._adapter] = tail
        return tail

    def _head_of(self, layer: nn.Module) -> Head:
        if not self._tied:
            return super()._head_of(layer)
        # What the model reads, whatever adapter is on the embedding.
        with brought_here(layer):
            return Head(whole(layer.weight), None)  # type: ignore[arg-type]

    def _check_logits(self, tail: Tail, layer: nn.Module, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """That hidden states and head give the model's own logits, at the last positions of a row.

        Raises:
            ValueError: they do not.
        """
        model = getattr(self._inner, "_orig_mod", self._inner)
        with torch.no_grad():
            hidden, output = self._behind_norm(model, self._arguments(tokens[:1], attention_mask), _POSITIONS)
            own = output.logits[0].float()
            ours = self._head_of(layer).logits(tail.hidden_states(hidden[:, -_POSITIONS:])[0]).float()
        difference = float((ours.log_softmax(dim=1) - own.log_softmax(dim=1)).abs().max())
        # Of logits of the size that they have, in the dtype of the product.
        if not difference <= 16.0 * torch.finfo(output.logits.dtype).eps * max(1.0, float(own.abs().max())):
            raise ValueError(
                f"{type(self._inner).__name__} gives log-probabilities that differ by up to {difference:.3g} from "
                "those of its last norm's output and its embedding: hand in a dam.models.Denoiser of your own"
            )

    def _last_states(self, model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        if not self._tied:
            return super()._last_states(model, arguments)
        return self._behind_norm(model, arguments, 0)

    def _behind_norm(self, model: Any, arguments: dict[str, Any], kept: int) -> tuple[Tensor, Any]:
        """The last norm's output [B, L, D], and what the model returns for the last `kept` positions of it."""
        given: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            given.append(output)
            return output[:, max(0, output.shape[1] - kept) :] if kept else output[:, :0]

        handle = self._transformer().ln_f.register_forward_hook(keep)
        try:
            output = model(**arguments)
        finally:
            handle.remove()
        if len(given) != 1:
            raise RuntimeError(
                f"the last norm of {type(self._inner).__name__} ran {len(given)} times in a forward pass"
            )
        return given[0], output
