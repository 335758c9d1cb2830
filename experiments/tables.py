"""Laws and conditionals of a few positions, exact in float64: log p(v | i, x) of every state, [(V + 1)^N, N, V]."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dam.ctmc import enumeration


def conditionals(law: Tensor, positions: int, tokens: int) -> Tensor:
    """log p(v | i, x) of a joint law [V^N]; of no meaning at positions that are filled in.

    Args:
        law: float64, positive, in the order of `enumeration.states`.
    """
    states, outcomes = enumeration.states(tokens + 1, positions), enumeration.states(tokens, positions)
    agree = ((states[:, None] == tokens) | (states[:, None] == outcomes)).all(dim=2)  # [(V + 1)^N, V^N]
    is_token = torch.nn.functional.one_hot(outcomes, tokens).double()  # [V^N, N, V]
    mass = torch.einsum("sx,x,xiv->siv", agree.double(), law, is_token)
    return (mass / mass.sum(dim=2, keepdim=True)).log()


def path_log_prob(log_prob: Tensor, tokens: int, state: Tensor | None = None) -> Tensor:
    """log p(x | order) of every order of unmasking m positions and every outcome, [m!, V^m].

    Args:
        log_prob: conditionals, [(V + 1)^N, N, V].
        state: int64 [N], where the paths begin; None: with masks only.

    Returns:
        Orders as `itertools.permutations` has them of the masked positions, outcomes as `enumeration.states` of these.
    """
    start = torch.full((log_prob.shape[1],), tokens) if state is None else state
    masked = (start == tokens).nonzero()[:, 0].tolist()
    outcomes = enumeration.states(tokens, len(masked))
    found = []
    for order in itertools.permutations(range(len(masked))):
        states, total = start.repeat(len(outcomes), 1), log_prob.new_zeros(len(outcomes))
        for j in order:
            total = total + log_prob[enumeration.index_of(states, tokens + 1), masked[j], outcomes[:, j]]
            states = states.clone()
            states[:, masked[j]] = outcomes[:, j]
        found.append(total)
    return torch.stack(found)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())
