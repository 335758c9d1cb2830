"""A network for exchanges of unlike spins on a periodic lattice, that knows the symmetries of what is to be learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.centred import sites_around


class Exchanges(nn.Module):
    """Log multipliers of exchanges of two spins, each of them a word of either site:

        a_t(i <-> j, x) = q_t(i, j - i; x) + q_t(j, i - j; x)

    q(i, .; x) is a gated MLP of all spins of the state and of the one that the chain starts from, as they lie from site
    i and times the spin there: one number for each displacement. The MLP is the same for all sites, so that nothing
    changes where state and start are translated, or have their colours exchanged, together; that is as far as an
    optimum is symmetric whose target and base are and whose start is not. All 0 at the start.

    Gates multiply two linear functions of the spins, as log h has products of several; what this is worth beside a
    potential of pairs is measured by experiments/attainable.py.

    Args:
        side: n, of n n sites.
        start: tokens, 0 or 1, of the state to start from.
        width: of the MLP.
        depth: layers of gates.
        degree: powers of time that the MLP is given, and that are coefficients of its outputs.
    """

    around: Tensor
    start: Tensor
    displacement: Tensor

    def __init__(self, side: int, start: Sequence[int], width: int, depth: int = 2, degree: int = 5):
        super().__init__()
        around = sites_around(side)
        sites, others = around.shape
        self.others, self.degree = others, degree
        self.register_buffer("around", around)  # [L, L - 1]
        self.register_buffer(
            "start", 2.0 * torch.tensor(start)[torch.cat((torch.arange(sites)[:, None], around), 1)] - 1
        )
        displacement = torch.zeros(sites, sites, dtype=torch.int64)
        displacement.scatter_(1, around, torch.arange(others).expand(sites, -1))
        self.register_buffer("displacement", displacement)  # [L, L], of a site from another
        self.first = nn.Linear(others + sites + degree, 2 * width)
        self.layers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth - 1))
        self.last = nn.Linear(width, others * degree)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens: Tensor, time: Tensor, removed: Tensor, added: Tensor) -> Tensor:
        """[B, M] of states int64 [B, L], times [B] and moves that take spin 1 from one site to another, int64 [B, 1, M]
        each.
        """
        power = torch.arange(self.degree, device=time.device)
        basis = (2 * time[:, None] - 1).pow(power).float()  # [B, degree]
        spin = 2.0 * tokens - 1
        here = spin[:, :, None]
        seen = (spin[:, self.around] * here, self.start * here, basis[:, None].expand(-1, len(self.start), -1))
        h = gated(self.first(torch.cat(seen, dim=2)))
        for layer in self.layers:
            h = h + gated(layer(h))
        words = self.last(h).unflatten(2, (self.others, self.degree))
        words = (words * basis[:, None, None]).sum(dim=3).flatten(1)
        one, other = removed[:, 0], added[:, 0]
        out = words.gather(1, one * self.others + self.displacement[one, other])
        return out + words.gather(1, other * self.others + self.displacement[other, one])


def gated(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, dim=-1)
    return value * F.relu(gate)
