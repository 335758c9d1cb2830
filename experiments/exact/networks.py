"""Networks that begin as the base: its exact conditionals, and what a network adds to their logarithms, 0 at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dam.models.denoiser import Head
from experiments.exact.automata import Automaton

FORBIDDEN = -60.0  # in place of -inf, which a head with weights of 0 would make NaN


class Windows(nn.Module):
    """Features of a position by an MLP of the tokens around it.

    Args:
        tokens: V; token V is the mask.
        reach: tokens on either side.
        features: what it gives, D.
        beside: numbers that it is given beside the tokens.
    """

    def __init__(self, tokens: int, reach: int = 7, width: int = 96, features: int = 32, beside: int = 0):
        super().__init__()
        self.values, self.reach, self.features = tokens + 2, reach, features  # the mask, and what is outside
        given = (2 * reach + 1) * self.values + beside
        self.layers = nn.Sequential(
            *(nn.Linear(given, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            *(nn.Linear(width, features), nn.GELU()),
        )

    def forward(self, tokens: Tensor, row: Tensor, position: Tensor, *beside: Tensor) -> Tensor:
        """[n, D] at positions int64 [n] of rows [n] of tokens [B, L], with what is beside them [n, ...]."""
        around = F.pad(tokens, (self.reach, self.reach), value=self.values - 1)
        at = position[:, None] + torch.arange(2 * self.reach + 1)
        near = F.one_hot(around[row[:, None], at], self.values).float().flatten(1)
        return self.layers(torch.cat([near, *beside], dim=1))


class States(Windows):
    """Features of a position by an MLP of the tokens around it, of the time, and of what the base knows of its states:
    the laws of those in front of the token, behind it and at the end.

    Args:
        tokens, reach, width, features: as for `Windows`.
        states: S.
        length: L.
    """

    def __init__(self, tokens: int, states: int, length: int, reach: int, width: int = 96, features: int = 32):
        super().__init__(tokens, reach, width, features, beside=3 * states + length)
        self.length = length

    def known(self, states: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Of laws of states [B, L + 1, S], [n, 3 S + L]."""
        laws = (states[row, position], states[row, position + 1], states[row, -1])
        return torch.cat([*laws, F.one_hot(position, self.length).float()], dim=1)


class Beyond(nn.Module):
    """A `Denoiser` whose logits are log p_base(v | i, x) and a linear map of a network's features, 0 at the start.

    Args:
        base: its conditionals are p_base(v | i, x).
        network: of (tokens, row, position), with `features`.
    """

    def __init__(self, base: Automaton, network: Windows):
        super().__init__()
        self.base, self.network = base, network
        self.output = nn.Linear(network.features, base.to.shape[1])
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        """What the network says, and behind it the base's log-probabilities, [n, D + V]."""
        base = self.base.log_conditionals(tokens)[row, position].clamp(min=FORBIDDEN)
        return torch.cat([self.network(tokens, row, position), base], dim=1)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        row, position = (part.flatten() for part in torch.meshgrid(*map(torch.arange, tokens.shape), indexing="ij"))
        return self.hidden_at(tokens, attention_mask, row, position).view(*tokens.shape, -1)

    def head(self) -> Head:
        weight = self.output.weight
        return Head(torch.cat([weight, torch.eye(len(weight))], dim=1), self.output.bias)


class Along(Beyond):
    """`Beyond` whose network is told what the base knows of its states, `Automaton.given`."""

    network: States

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        log_prob, states = self.base.given(tokens)
        told = self.network(tokens, row, position, self.network.known(states, row, position))
        return torch.cat([told, log_prob[row, position].clamp(min=FORBIDDEN)], dim=1)
