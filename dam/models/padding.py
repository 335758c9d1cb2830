"""Whether a model gives a row that is padded on the left what it gives the row alone: told by trying it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dam.models.attention import padding


def takes_left_padding(
    hidden_states: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    pad: int,
    multiple: int = 1,
) -> bool:
    """Whether hidden states of half a row are the same with padding in front of it and behind it, in one pass of both.

    Padding behind leaves positions as they are alone.

    Args:
        hidden_states: [B, L, D] of tokens and attention mask [B, L].
        model: is in evaluation mode meanwhile.
        tokens, attention_mask: [B, L], of which the first row is used, without its padding.
        pad: token to pad with.
        multiple: length of blocks that attention has, which padding of as many tokens leaves as they are.
    """
    row = tokens[:1, int(padding(attention_mask[:1])) :]
    if row.shape[1] == 0:
        raise ValueError("attention_mask hides a whole row of tokens")
    alone = row[:, row.shape[1] // 2 :]
    size = -(-alone.shape[1] // multiple) * multiple
    filler = torch.full_like(alone[:, :1], pad).expand(-1, size)
    padded = torch.cat((torch.cat((filler, alone), dim=1), torch.cat((alone, filler), dim=1)))
    mask = torch.ones_like(padded)
    mask[0, :size] = mask[1, alone.shape[1] :] = 0
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        states = hidden_states(padded, mask)
    return is_rounding(states[0, size:], states[1, : alone.shape[1]])


def is_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether hidden states [..., D] differ by no more than rounding does.

    Judged by the median over positions: in a mixture of experts rounding sends single positions to other experts.
    """
    difference = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    return float(difference.nan_to_num(nan=torch.inf).median()) <= _rounding(expected)


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
