"""Laws and conditionals of a few positions, exact in float64: log p(v | i, x) of every state, [(V + 1)^N, N, V]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


def random_law(positions: int, tokens: int, seed: int) -> Tensor:
    """Softmax of normal draws, float64 [V^N]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens**positions, generator=generator, dtype=torch.float64).softmax(dim=0)


def orders(count: int) -> Tensor:
    """Permutations of so many positions, int64 [m!, m]."""
    return torch.tensor(list(itertools.permutations(range(count))))


def path_log_prob(log_prob: Tensor, tokens: int, state: Tensor | None = None) -> Tensor:
    """log p(x | order) of every order of unmasking m positions and every outcome, [m!, V^m].

    Args:
        log_prob: conditionals, [(V + 1)^N, N, V].
        state: int64 [N], where the paths begin; None: with masks only.

    Returns:
        In the order of `orders` and of `enumeration.states` of the masked positions.
    """
    start = torch.full((log_prob.shape[1],), tokens) if state is None else state
    masked = (start == tokens).nonzero()[:, 0].tolist()
    outcomes = enumeration.states(tokens, len(masked))
    found = []
    for order in orders(len(masked)).tolist():
        states, total = start.repeat(len(outcomes), 1), log_prob.new_zeros(len(outcomes))
        for j in order:
            total = total + log_prob[enumeration.index_of(states, tokens + 1), masked[j], outcomes[:, j]]
            states = states.clone()
            states[:, masked[j]] = outcomes[:, j]
        found.append(total)
    return torch.stack(found)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
