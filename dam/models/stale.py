"""Passes over one block at a time with keys and values of all else as they were when the block began: an approximation.

Source: Wu et al., Fast-dLLM, arXiv 2505.22618, its dual cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dam.models.attention import allowed, positions
from dam.models.prefix import Run, Store, columns


class StaleCache:
    """The blocks of B rows of a model with full attention, gone through from left to right.

    A row's first pass at a block is over its whole sequence; those after it run the block alone, and see what is before
    and behind it as that first pass did, although under full attention it changes with what is put into the block. So
    what is drawn is of another law than the model's: p(v | i, state, state when its block began). It is a function of
    what a trajectory has done all the same, so that its log-probabilities, and path weights against a base that is
    sampled in the same passes, are exact ones of that law.

    Args:
        run: the network.
        tokens, attention_mask: [B, L], of the rows; which tokens they are comes with each call.
        shift: 1 where hidden states predict the position behind, as `MaskedLM` has it.
    """

    def __init__(self, run: Run, tokens: Tensor, attention_mask: Tensor | None, shift: int = 0):
        self._run, self._shift, self._attention_mask = run, shift, attention_mask
        self._position = positions(tokens, attention_mask)
        self._shown = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self._begun = torch.full((len(tokens),), -1, device=tokens.device)  # where the block is that a row is at
        self._store = Store(*tokens.shape)
        self._last: Tensor | None = None  # [B, D]: hidden states in front of that block

    @torch.no_grad()
    def hidden_states(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """As `dam.models.prefix.Passes` says."""
        length = int((end - begin).max())
        new = self._begun[rows] != begin
        out: Tensor | None = None
        for chosen, run in ((new, self._whole), (~new, self._block)):
            if bool(chosen.any()):
                hidden = run(rows[chosen], tokens[chosen], begin[chosen], end[chosen], length)
                out = hidden.new_zeros(len(rows), *hidden.shape[1:]) if out is None else out
                out[chosen] = hidden
        assert out is not None
        return out

    def _whole(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor, length: int) -> Tensor:
        """Runs whole sequences, whose keys and values are kept."""
        mask = None if self._attention_mask is None else self._attention_mask[rows]
        seen = allowed(tokens, mask).expand(len(rows), -1, -1, -1)
        hidden = self._run(tokens, seen, self._position[rows], self._store.begin(rows, 0))
        first = torch.zeros_like(begin)
        self._store.keep(first, first + tokens.shape[1])
        self._begun[rows] = begin
        if self._last is None:
            self._last = hidden.new_zeros(len(self._begun), hidden.shape[2])
        self._last[rows] = columns(hidden, begin - 1, 1)[:, 0]
        return self._shifted(columns(hidden, begin, length), rows, begin)

    def _block(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor, length: int) -> Tensor:
        """Runs the blocks alone, which see themselves as they are now and all else as kept."""
        index = torch.arange(max(tokens.shape[1], length), device=tokens.device)
        place = begin[:, None] + index[:length]
        own = place < end[:, None]
        place = place.clamp(max=tokens.shape[1] - 1)
        own &= self._shown[rows].gather(1, place)
        kept = index[: tokens.shape[1]]
        others = self._shown[rows] & ((kept < begin[:, None]) | (kept >= end[:, None]))
        # What is hidden sees itself, as in `allowed`.
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        now = own[:, None, :] & own[:, :, None] | itself
        seen = torch.cat((others[:, None, :] & own[:, :, None], now), dim=2)[:, None]
        cache = self._store.begin(rows, tokens.shape[1])
        hidden = self._run(tokens.gather(1, place), seen, self._position[rows].gather(1, place), cache)
        return self._shifted(hidden, rows, begin)

    def _shifted(self, hidden: Tensor, rows: Tensor, begin: Tensor) -> Tensor:
        """Hidden states of the blocks [b, W, D] at the positions that they predict."""
        if not self._shift:
            return hidden
        assert self._last is not None
        before = torch.cat((self._last[rows, None], hidden[:, :-1]), dim=1)
        first = columns(self._position[rows, :, None], begin, hidden.shape[1]) == 0
        return torch.where(first, hidden, before)
