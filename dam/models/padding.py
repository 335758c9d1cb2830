"""Whether a model gives a row that is padded on the left what it gives the row alone: told by trying it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def takes_left_padding(
    hidden_states: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tokens: Tensor,
    pad: int,
    other: int,
    multiple: int = 1,
) -> bool:
    """Whether hidden states of a few tokens are the same with padding in front of them and behind, in one pass.

    Padding behind leaves positions as they are alone; of two kinds, it tells whether attention_mask is heeded at all.

    Args:
        hidden_states: [B, L, D] of tokens and attention mask [B, L].
        model: is in evaluation mode meanwhile.
        tokens: [B, L], of whose tokens, as different as they are, half a row is made.
        pad, other: tokens to pad with: rows are padded on the left with the first.
        multiple: length of blocks that attention has, which padding of as many tokens leaves as they are.
    """
    length = max(1, tokens.shape[1] // 2)
    values = tokens.unique()
    values = values[values != pad] if bool((values != pad).any()) else values
    alone = values[torch.arange(length, device=tokens.device) % len(values)]
    size = -(-length // multiple) * multiple
    padding, others = (torch.full((size,), token, dtype=alone.dtype, device=alone.device) for token in (pad, other))
    rows = torch.stack([torch.cat(parts) for parts in ((padding, alone), (alone, padding), (alone, others))])
    mask = torch.ones_like(rows)
    mask[0, :size] = mask[1:, length:] = 0
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        states = hidden_states(rows, mask)
    behind = states[1, :length]
    return is_rounding(states[0, size:], behind) and is_rounding(states[2, :length], behind)


def is_rounding(found: Tensor, expected: Tensor, *, everywhere: bool = False) -> bool:
    """Whether hidden states [..., D] differ by no more than rounding does.

    Judged by the median over positions, as in a mixture of experts rounding sends single positions to other experts; or
    at every one.
    """
    difference = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    difference = difference.nan_to_num(nan=torch.inf)
    return float(difference.max() if everywhere else difference.median()) <= _rounding(expected)


def _rounding(hidden: Tensor) -> float:
    """The difference that layers of rounding explain, in the dtype that a forward pass computes in."""
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return max(1e-3, 16.0 * torch.finfo(dtype).eps)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: the model without dropout; each of its modules as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
