"""A potential of spins on a periodic lattice that has all symmetries of what is to be learned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ORDER = 4  # of correlations: most spins of a product


class Invariants(nn.Module):
    """Log multipliers of moves as differences of a potential, a_t(y, x) = W_t(y) - W_t(x), with W_t a network of the
    lattice's correlations:

        W_t(x) = sum over k of (2 t - 1)^k MLP_k(c(x)),    c_o(x) = mean over A in o of  sigma_A prod of A's spins

    where o is an orbit of sets of at most 4 sites under the symmetries of the lattice, with or without an exchange of
    colours, that leave the state to start from as it is: as much as an optimum has whose target and base are symmetric
    and whose start is not. sigma_A is -1 where A is an image by an exchange of colours and has an odd number of sites.
    All 0 at the start of learning.

    The network sees each of the C classes of states that correlations tell apart once for all times, however many moves
    are asked for.

    Args:
        side: n, of n n sites.
        start: tokens, 0 or 1, of the state to start from.
        states: int64 [X, n n], all that moves lead to.
        to: int64 [X, M], the number of the state that each move leads to.
        width: of the MLP.
        degree: number of coefficients of a polynomial of time.
    """

    of: Tensor
    leads: Tensor
    correlations: Tensor

    def __init__(self, side: int, start: Sequence[int], states: Tensor, to: Tensor, width: int, degree: int = 6):
        super().__init__()
        self.degree = degree
        known = correlations(states, symmetries(side, start))
        classes, of = known.unique(dim=0, return_inverse=True)
        self.register_buffer("of", of)  # [X]
        self.register_buffer("leads", of[to])  # [X, M]
        varied = classes[:, (classes != classes[0]).any(dim=0)].float()
        self.register_buffer("correlations", (varied - varied.mean(dim=0)) / varied.std(dim=0))  # [C, O]
        hidden = [nn.Linear(varied.shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        last = nn.Linear(width, degree)
        self.network = nn.Sequential(*hidden, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, number: Tensor, time: Tensor) -> Tensor:
        """[B, M] of the moves out of states of these numbers, int64 [B], at times [B]."""
        times, at = time.unique(return_inverse=True)
        basis = (2 * times[:, None] - 1).pow(torch.arange(self.degree, device=time.device)).float()
        potential = (basis @ self.network(self.correlations).t()).flatten()  # [N C]
        row = at * len(self.correlations)
        # gather, whose backward pass is several times as fast here as that of an index.
        here = potential.gather(0, row + self.of[number])
        there = row[:, None] + self.leads[number]
        return potential.gather(0, there.flatten()).view_as(there) - here[:, None]


def symmetries(side: int, start: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Those of a periodic lattice of n n sites that leave a state as it is: site i's image int64 [L], and -1 with an
    exchange of colours, else 1.
    """
    spin = 2 * torch.tensor(start) - 1
    lattice = torch.arange(side**2).view(side, side)
    found = []
    for turned in range(4):
        for mirrored in (lattice.rot90(turned), lattice.rot90(turned).t()):
            for shift in itertools.product(range(side), repeat=2):
                image = mirrored.roll(shift, (0, 1)).flatten()
                found += [(image, sign) for sign in (1, -1) if torch.equal(sign * spin[image], spin)]
    return found


def correlations(states: Tensor, group: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Sums of products of spins over the images of sets of at most ORDER sites, a column for each orbit, int64 [X, O].

    Each image counts as often as symmetries lead to it.
    """
    spin = 2 * states - 1
    columns: list[Tensor] = []
    seen: set[tuple[int, ...]] = set()
    for order in range(1, ORDER + 1):
        for sites in itertools.combinations(range(states.shape[1]), order):
            if sites in seen:
                continue
            images = torch.stack([image[list(sites)] for image, _ in group]).sort(dim=1).values
            sign = torch.tensor([sign**order for _, sign in group])
            seen.update(tuple(image) for image in images.tolist())
            every, which = images.unique(dim=0, return_inverse=True)
            weight = torch.zeros(len(every), dtype=torch.int64).index_add_(0, which, sign)
            columns.append(spin[:, every].prod(dim=2) @ weight)
    return torch.stack(columns, dim=1)
