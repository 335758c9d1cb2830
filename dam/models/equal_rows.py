"""Rows of a network call that are equal, so that one of them can be run for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dam.models.padding import evaluating, is_rounding
from dam.models.sharding import waits_for_others
from dam.models.tail import is_compiled


class Distinct(NamedTuple):
    """Rows without those that are equal to another one: rows[first][of] are the rows."""

    first: Tensor  # int64 [n]: which rows these are, each the first of its kind
    of: Tensor  # int64 [B]: which of them each row is equal to


def distinct(rows: Tensor) -> Distinct:
    """The distinct ones of rows int64 [B, L]; on a GPU it waits once.

    Rows are sorted by a hash of 64 bits, and neighbours compared entry by entry: two that differ are never taken for
    equal. Two equal ones may be left apart where a third has their hash.
    """
    order = (rows * _multipliers(rows.shape[1]).to(rows.device)).sum(dim=1).argsort(stable=True)
    ordered = rows[order]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(dim=1)
    of = torch.empty_like(order).scatter_(0, order, new.long().cumsum(dim=0) - 1)
    return Distinct(order[new], of)


def given(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What a network is given for each row, int64 [B, L or 2 L]."""
    return tokens if attention_mask is None else torch.cat((tokens, attention_mask.long()), dim=1)


@functools.lru_cache(maxsize=16)
def _multipliers(length: int) -> Tensor:
    """Of entries, in their hash: odd numbers."""
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (length,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def takes_any_rows(model: nn.Module) -> bool:
    """Whether a model may be given fewer rows, as far as is seen without a trial.

    Not in training mode, in which rows that are equal differ by dropout; where FSDP2 or ZeRO-3 divides it, whose
    processes must run a trial alike; nor compiled, which is for calls of as many rows as each other.
    """
    return not (waits_for_others(model) or any(module.training or is_compiled(module) for module in model.modules()))


@torch.no_grad()
def may_run_once(
    hidden_states: Callable[[Tensor, Tensor | None], Tensor],
    model: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor | None,
    ids: int,
) -> bool:
    """Whether each row gets in a call of all what its equal gets in a call of distinct ones, at every position.

    It does not where chance is drawn, what a row gets hangs on the others (experts that take so many tokens of a call
    and no more), or on its place. In the second call as many rows of other tokens are beside the distinct ones.

    Args:
        hidden_states: [B, L, D] of tokens and attention mask [B, L].
        model: is in evaluation mode meanwhile.
        ids: how many tokens it knows.
    """
    found = distinct(given(tokens, attention_mask))
    once, mask = tokens[found.first], None if attention_mask is None else attention_mask[found.first].repeat(2, 1)
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        every = hidden_states(tokens, attention_mask)
        beside = hidden_states(torch.cat((once, (once + 1) % ids)), mask)
    shown = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return is_rounding(beside[found.of][shown], every[shown], everywhere=True)
