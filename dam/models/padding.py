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
    Judged by the median over positions: in a mixture of experts rounding sends single positions to other experts.

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
    rounding = _rounding(states.dtype, states.device.type)
    states = states.float()
    behind = states[1, :length]
    size_of = behind.norm(dim=-1).clamp(min=1e-30)
    away = torch.stack([(found - behind).norm(dim=-1) / size_of for found in (states[0, size:], states[2, :length])])
    return float(away.nan_to_num(nan=torch.inf).median(dim=1).values.max()) <= rounding


def _rounding(dtype: torch.dtype, device: str) -> float:
    """The difference that layers of rounding explain, in the dtype that a forward pass computes in."""
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
