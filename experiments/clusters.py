"""Swendsen-Wang: samples of a periodic square lattice that is too large for sums over it."""

from __future__ import annotations

import torch
from torch import Tensor


def swendsen_wang(side: int, coupling: float, site: Tensor, chains: int, sweeps: int, seed: int) -> Tensor:
    """Last states of independent chains from random ones, int64 [chains, n n], of the law that `transfer` sums over.

    Equal neighbours are bound with probability 1 - e^-coupling; each cluster of bound sites draws a token, with the
    weights of all its sites. Leaves the law as it is, so that only the start is left to be forgotten.

    Args:
        side: n.
        coupling: of each pair of neighbours with equal tokens, at least 0.
        site: float64 [q], of each token.
        chains: how many.
        sweeps: of each.
        seed: of all draws.

    Raises:
        ValueError: the coupling is negative: unequal neighbours are never bound.

    Source: Swendsen and Wang, Nonuniversal critical dynamics in Monte Carlo simulations, Phys. Rev. Lett. 58 (1987).
    """
    if coupling < 0:
        raise ValueError(f"swendsen_wang: the coupling must be at least 0; got {coupling}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(len(site), (chains, side, side), generator=generator)
    bound_with = 1 - torch.tensor(-coupling, dtype=torch.float64).exp()
    for _ in range(sweeps):
        bonds = []
        for axis in (1, 2):  # of each site to the next one
            drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64) < bound_with
            bonds.append((x == x.roll(-1, axis)) & drawn)
        cluster = _clusters(bonds, side).view(chains, -1)
        weight = torch.zeros(chains, side**2, len(site), dtype=torch.float64)
        weight.scatter_add_(1, cluster[..., None].expand_as(weight), site.expand_as(weight))
        token = torch.multinomial(weight.softmax(dim=2).flatten(0, 1), 1, generator=generator).view(chains, -1)
        x = token.gather(1, cluster).view_as(x)
    return x.flatten(1)


def _clusters(bonds: list[Tensor], side: int) -> Tensor:
    """The least number of a site in each one's cluster, int64 [B, n, n], of bonds [B, n, n] along either axis."""
    number = torch.arange(side**2).view(side, side).expand_as(bonds[0]).clone()
    while True:
        before = number
        for axis, bond in zip((1, 2), bonds, strict=True):
            number = torch.where(bond, torch.minimum(number, number.roll(-1, axis)), number)
            back = bond.roll(1, axis)
            number = torch.where(back, torch.minimum(number, number.roll(1, axis)), number)
        if torch.equal(number, before):
            return number
