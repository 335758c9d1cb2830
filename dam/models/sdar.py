"""SDAR: block-causal attention by a boolean mask that the caller builds, blocks counted from the sequence's start.

Source: Cheng et al., SDAR, arXiv 2510.06303; modeling_sdar.py and generate.py of JetAstra/SDAR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dam.models.denoiser import MaskedLM

BLOCK_LENGTH = 4  # of the models published first; later ones say theirs in config.block_size


class SDAR(MaskedLM):
    """SDAR, and models of its class (TraDo).

    In training mode its code draws masks of its own and asks for labels: it is called as in evaluation, with its
    adapters' dropout as it is.

    Args:
        model: the model, or what wraps it.
        adapter: as for `MaskedLM`.
        block_length: of the attention's blocks; that of the config unless given, or 4.
        mask_token_id: where neither tokenizer nor config have it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: bool = True,
        block_length: int | None = None,
        mask_token_id: int | None = None,
    ):
        config = getattr(getattr(model, "module", model), "config", None)
        own = getattr(config, "block_size", None) or BLOCK_LENGTH
        super().__init__(model, adapter=adapter, block_length=block_length or own, mask_token_id=mask_token_id)

    def _mask(self, seen: Tensor) -> Tensor:
        return seen  # it makes a boolean mask of what it is given, by which 0 would hide

    def _cached_arguments(self, tokens: Tensor, seen: Tensor, position_ids: Tensor, cache: Any) -> dict[str, Any]:
        # Without store_kv it looks into the cache by itself, in ways of one release.
        return {**super()._cached_arguments(tokens, seen, position_ids, cache), "store_kv": True}

    def _last_states(self, model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        with self._as_in_evaluation():
            return super()._last_states(model, arguments)

    def _tail(self, layer: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Any:
        with self._as_in_evaluation():
            return super()._tail(layer, tokens, attention_mask)

    @contextlib.contextmanager
    def _as_in_evaluation(self) -> Iterator[None]:
        """Context manager: the modules that do something else in training, the model and its attention, do not.

        Raises:
            ValueError: activations are to be computed again in the backward pass, when they would.
        """
        training = [module for module in self._inner.modules() if module.training and _has_own_training(module)]
        if training and any(getattr(module, "gradient_checkpointing", False) for module in self._inner.modules()):
            raise ValueError(
                "SDAR's attention computes something else in training, and with gradient checkpointing it would run "
                "again outside of this call: call model.gradient_checkpointing_disable()"
            )
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _has_own_training(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.startswith("SDAR") and name.endswith(("ForCausalLM", "Attention"))
