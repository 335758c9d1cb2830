"""LLaDA 2.0 and 2.1: block-causal attention by a mask that the caller builds, blocks counted from the sequence's start.

Source: Bie et al., LLaDA2.0, arXiv 2512.15745; modeling_llada2_moe.py of inclusionAI/LLaDA2.0-mini.
"""

from __future__ import annotations

from torch import nn

from dam.models.denoiser import MaskedLM

BLOCK_LENGTH = 32  # that the models were trained and published with
MASK_TOKEN = 156895  # which its config does not tell


class LLaDA2(MaskedLM):
    """LLaDA 2.0 and 2.1.

    Its own generation fills the last block whole and cuts what was not asked for; here a sequence that ends inside a
    block has a shorter one, so that the two agree where prompt and completion are a whole number of blocks. Of 2.1 the
    tokens are drawn once and not edited later.

    Args:
        model: the model, or what wraps it.
        adapter: as for `MaskedLM`.
        block_length: of the attention's blocks.
        mask_token_id: where neither tokenizer nor config have it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: bool = True,
        block_length: int = BLOCK_LENGTH,
        mask_token_id: int | None = MASK_TOKEN,
    ):
        super().__init__(model, adapter=adapter, block_length=block_length, mask_token_id=mask_token_id)
