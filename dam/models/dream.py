"""Dream: full attention, and logits that are of the position behind, as those of the language model it began as.

Source: Ye et al., Dream 7B, arXiv 2508.15487; modeling_dream.py and generation_utils.py of Dream-org/Dream-v0-Base-7B.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dam.models.attention import allowed, positions
from dam.models.denoiser import MaskedLM


class Dream(MaskedLM):
    """Dream, and models of its class.

    The token at position i is predicted by the logits at i - 1, that of the first position by its own. Padding on the
    left goes to the model as its own generation does it: a boolean mask [B, 1, L, L] and positions without padding. Its
    own generation predicts the first token of a row that is padded from the padding; here it is as without.

    Args:
        model: the model, or what wraps it.
        adapter: as for `MaskedLM`.
        shift: 0 for a model of this class that was trained to predict in place.
        mask_token_id: where not that of the config.
        approximate_cache: as for `MaskedLM`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: bool = True,
        shift: int = 1,
        mask_token_id: int | None = None,
        approximate_cache: int | None = None,
    ):
        super().__init__(
            model,
            adapter=adapter,
            attention="full",
            shift=shift,
            mask_token_id=mask_token_id,
            approximate_cache=approximate_cache,
        )

    def _arguments(self, tokens: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        if attention_mask is None or bool((attention_mask != 0).all()):
            # No mask is full attention, by a faster kernel.
            return {"input_ids": tokens, "use_cache": False}
        return {
            "input_ids": tokens,
            "attention_mask": self._mask(allowed(tokens, attention_mask)),
            "position_ids": positions(tokens, attention_mask),
            "use_cache": False,
        }

    def _mask(self, seen: Tensor) -> Tensor:
        return seen
