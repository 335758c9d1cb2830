"""Which positions a denoiser's attention lets see which: blocks, and the masks and positions that a caller builds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

ORIGINS = ("completion", "sequence")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of positions, filled one after another: within one all is seen, between them only what came before.

    Args:
        length: positions of a block.
        origin: where blocks are counted from. "completion": from the end of the sequence, so that the first block may
            be shorter. "sequence": from the first token that is no padding, so that a prompt may end inside a block,
            of which the rest is the first to be filled in, and the last block may be shorter.

    Raises:
        ValueError: no such length or origin.
    """

    length: int
    origin: str = "completion"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"block_length must be at least 1; got {self.length}")
        if self.origin not in ORIGINS:
            raise ValueError(f"block_origin must be one of {', '.join(ORIGINS)}; got {self.origin!r}")

    def numbers(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Number of the block of each position, int64, as tokens [B, L]: rising to the right, from any number."""
        if self.origin == "sequence":
            place = positions(tokens, attention_mask)
        else:
            length = tokens.shape[1]
            place = (torch.arange(length, device=tokens.device) - length).expand(tokens.shape)
        return torch.div(place, self.length, rounding_mode="floor")


def positions(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Positions counted from each row's first token that is no padding, int64, as tokens [B, L]; 0 at that padding.

    What a mask hides further on is counted: it is a token that is not seen, not one that is not there.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return index if attention_mask is None else (index - padding(attention_mask)[:, None]).clamp(min=0)


def padding(attention_mask: Tensor) -> Tensor:
    """How many positions each row is padded by on the left, int64 [B]."""
    return (attention_mask.cumsum(dim=1) == 0).sum(dim=1)


def allowed(tokens: Tensor, attention_mask: Tensor | None, blocks: Blocks | None = None) -> Tensor:
    """Whether position q sees position k, bool [B, 1, q, k]: k's block is not behind q's, and k is not hidden.

    [1, 1, q, k] where it is so in all rows, because nothing is hidden. A hidden position sees itself, as a row that
    sees nothing would be NaN, which zero weights do not keep from others.
    """
    if attention_mask is None or bool((attention_mask != 0).all()):
        tokens, attention_mask = tokens[:1], None
    batch, length = tokens.shape
    seen = torch.ones(batch, length, length, dtype=torch.bool, device=tokens.device)
    if blocks is not None:
        number = blocks.numbers(tokens, attention_mask)
        seen = number[:, None, :] <= number[:, :, None]
    if attention_mask is not None:
        shown = attention_mask.bool()
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        seen = (seen & shown[:, None, :] & shown[:, :, None]) | itself
    return seen[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to attention scores: 0, or the least number where nothing is seen."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
