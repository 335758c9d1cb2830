"""A network for periodic lattices whose law has the symmetries of p*: translations, and colours of equal weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dam.models.denoiser import Head
from experiments.densities import Lattice


class Centred(nn.Module):
    """p(v | position, tokens) by a residual MLP of what the other sites hold, each by where it lies from the position;
    as a `Denoiser`, uniform at the start.

    The MLP is the same for all positions, so that translations change nothing. Where no token has a larger weight at a
    site than another, nor do permutations of tokens: the MLP is given them by number, as they are met going outwards
    from the position, and its logit for the next number is that of all that are not met.

    A position costs one evaluation of the MLP, a state as many as positions are read.

    Args:
        density: the lattice.
        width, depth: of the MLP.
        reach: displacements along either axis up to that are seen; None: the whole lattice.
    """

    around: Tensor
    held: Tensor
    identity: Tensor

    def __init__(self, density: Lattice, width: int = 128, depth: int = 2, reach: int | None = None):
        super().__init__()
        self.tokens, site = density.tokens, density.site
        self.interchangeable = bool((site == site[0]).all())
        self.register_buffer("around", sites_around(density.side, reach))  # [L, M]
        # What a site holds, as input: nothing of a mask.
        self.register_buffer("held", torch.eye(self.tokens + 1)[:, : self.tokens])
        self.register_buffer("identity", torch.eye(self.tokens))
        self.first = nn.Linear(self.around.shape[1] * self.tokens, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, self.tokens)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        """Logits [n, V] at positions of rows."""
        seen = tokens[row[:, None], self.around[position]]
        if not self.interchangeable:
            return self.logits(seen)
        number = met(seen, self.tokens)
        masked = torch.full_like(number[:, :1], self.tokens)
        logits = self.logits(torch.cat((number, masked), dim=1).gather(1, seen))
        return logits.gather(1, number)

    def logits(self, seen: Tensor) -> Tensor:
        """Of what is seen, int64 [n, M]; [n, V]."""
        h = F.gelu(self.first(F.embedding(seen, self.held).flatten(1)))
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        found: Tensor = self.last(h)
        return found

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        row, position = (part.flatten() for part in torch.meshgrid(*map(torch.arange, tokens.shape), indexing="ij"))
        return self.hidden_at(tokens, attention_mask, row, position).view(*tokens.shape, -1)

    def head(self) -> Head:
        return Head(self.identity, None)


def sites_around(side: int, reach: int | None = None) -> Tensor:
    """The other sites of a periodic lattice as seen from each one, the nearest first, int64 [L, M].

    Args:
        side: n, of L = n n sites.
        reach: as for `Centred`; displacements are -((n - 1) // 2) .. n // 2.

    Raises:
        ValueError: nothing is within reach.
    """
    if reach is not None and reach < 1:
        raise ValueError(f"a centred network sees at least its neighbours: reach must be at least 1; got {reach}")
    furthest = side // 2 if reach is None else reach
    along = range(max(-furthest, -((side - 1) // 2)), min(furthest, side // 2) + 1)
    away = sorted(((i, j) for i in along for j in along if (i, j) != (0, 0)), key=lambda d: (d[0] ** 2 + d[1] ** 2, d))
    down, right = torch.tensor(away).t()
    site = torch.arange(side**2)
    rows, columns = (site // side)[:, None] + down, (site % side)[:, None] + right
    return rows % side * side + columns % side


def met(seen: Tensor, tokens: int) -> Tensor:
    """How many other tokens are met before each one, int64 [n, V], going through int64 [n, M]; all that are not met
    have the number that are.
    """
    nearness = torch.arange(seen.shape[1], 0, -1, dtype=torch.float32)  # int64 takes four times as long
    nearest = ((seen[:, None] == torch.arange(tokens)[:, None]) * nearness).amax(dim=2)  # [n, V], 0 if not met
    return (nearest[:, None] > nearest[:, :, None]).sum(dim=2)
