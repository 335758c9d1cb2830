"""A2D: autoregressive models (Qwen2, Qwen3, Llama) converted to full attention, trained whole or block by block.

Source: Zhou et al., dLLM, ZHZisZZ/dllm: pipelines/a2d and core/samplers (mdlm, bd3lm).
"""

from __future__ import annotations

from torch import nn

from dam.models.denoiser import MaskedLM


class A2D(MaskedLM):
    """A converted model: full attention by its class, or with block_length that of block diffusion (BD3LM).

    Nothing in its config tells which it was trained with. With blocks the mask is handed in, and they are counted from
    the completion's end: its own generation pads a prompt to whole blocks, so that a completion begins with one. The
    two agree where the completion is a whole number of blocks.

    Args:
        model: the model, or what wraps it.
        adapter: as for `MaskedLM`.
        block_length: of BD3LM's blocks; None for MDLM.
        block_origin: where they are counted from (`dam.models.Blocks`).
        shift: 1 for a conversion that kept predicting the token behind.
        mask_token_id: where neither tokenizer nor config have it.
        approximate_cache: as for `MaskedLM`, of MDLM.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: bool = True,
        block_length: int | None = None,
        block_origin: str = "completion",
        shift: int = 0,
        mask_token_id: int | None = None,
        approximate_cache: int | None = None,
    ):
        super().__init__(
            model,
            adapter=adapter,
            block_length=block_length,
            block_origin=block_origin,
            shift=shift,
            mask_token_id=mask_token_id,
            approximate_cache=approximate_cache,
        )
