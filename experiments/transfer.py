"""Exact sums over a periodic square lattice by its transfer matrix, row by row.

Of laws in which equal neighbours and each token at a site have their weight:

    log p(x) = coupling * sum over neighbours [x_i = x_j] + sum_i site[x_i] - log Z

With A = D^1/2 K D^1/2 over the q^n states of a row, D the weights inside a row and K those between two rows, a product
over the row's sites, Z = tr A^n. K is a Kronecker product, so that A is applied without being formed.

Source: Kramers and Wannier, Statistics of the two-dimensional ferromagnet, Phys. Rev. 60 (1941).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dam.ctmc import enumeration

CHUNK = 512  # columns that A is applied to at a time


def _row_weights(side: int, coupling: Tensor, site: Tensor) -> Tensor:
    """log D, float64 [q^n], differentiable."""
    row = enumeration.states(len(site), side)
    return coupling * (row == row.roll(1, 1)).sum(dim=1) + site[row].sum(dim=1)


def _applied(columns: Tensor, side: int, half: Tensor, between: Tensor) -> Tensor:
    """A times columns [q^n, C], of D^1/2 [q^n] and the factor of K for a site [q, q]."""
    size, shape = len(between), columns.shape
    found = half[:, None] * columns
    for _ in range(side):  # the first site goes to the end, so that after n times each is back in its place
        rolled = between @ found.reshape(size, -1)
        found = rolled.view(size, -1, shape[1]).transpose(0, 1).reshape(shape)
    return half[:, None] * found


def log_z(side: int, coupling: Tensor, site: Tensor) -> Tensor:
    """log of the sum over all q^(n n) states, float64 scalar, differentiable.

    Args:
        side: n.
        coupling: float64 scalar, of each pair of neighbours with equal tokens; a lattice of side 2 has each pair twice.
        site: float64 [q], of each token.
    """
    log_row = _row_weights(side, coupling, site)
    most = log_row.max().detach()
    half = ((log_row - most) / 2).exp()
    between = (coupling * (torch.eye(len(site), dtype=torch.float64) - 1)).exp()  # of weights at most 1
    total = log_row.new_zeros(())
    for at in range(0, len(half), CHUNK):
        columns = torch.zeros(len(half), min(CHUNK, len(half) - at), dtype=torch.float64)
        columns[at : at + CHUNK].fill_diagonal_(1.0)
        for _ in range(side // 2):
            columns = _applied(columns, side, half, between)
        further = _applied(columns, side, half, between) if side % 2 else columns
        total = total + (columns * further).sum()
    return total.log() + side * most + side**2 * coupling


def moments(side: int, coupling: float, site: Tensor, token: int) -> tuple[float, float, float, float]:
    """log Z, and the means of equal pairs of neighbours, of how often a token is there, and of that squared.

    By derivatives of log Z in the coupling and in the token's weight, forwards, without a graph.
    """
    at = torch.tensor(coupling, dtype=torch.float64)
    direction = torch.zeros_like(site)
    direction[token] = 1.0

    def along_site(weight: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.func.jvp(lambda w: log_z(side, at, w), (weight,), (direction,))
        return found

    (value, first), (_, second) = torch.func.jvp(along_site, (site,), (direction,))
    _, pairs = torch.func.jvp(lambda j: log_z(side, j, site), (at,), (torch.ones_like(at),))
    return float(value), float(pairs), float(first), float(second + first.square())


def without_field(side: int, beta: Tensor) -> Tensor:
    """log Z of the Ising lattice without a field, sum over neighbours s s' times beta; float64 scalar, differentiable.

    In closed form, so of any side.

    Source: Kaufman, Crystal statistics II, Phys. Rev. 76 (1949).
    """
    k = torch.arange(1, 2 * side, dtype=torch.float64)
    others = torch.acosh(torch.cosh(2 * beta) / torch.tanh(2 * beta) - torch.cos(torch.pi * k / side))
    first = 2 * beta + torch.tanh(beta).log()  # below 0 above the critical temperature
    half = side / 2 * torch.cat((first[None], others))
    products, exponents = [], []
    for part in (half[0::2], half[1::2]):
        taken = part.abs().detach()
        for f in (torch.cosh, torch.sinh):
            products.append((2 * f(part) * (-taken).exp()).prod())
            exponents.append(taken.sum())
    most = torch.stack(exponents).max()
    total = (torch.stack(products) * (torch.stack(exponents) - most).exp()).sum()
    return side**2 / 2 * (2 * torch.sinh(2 * beta)).log() + (total / 2).log() + most


def samples(side: int, coupling: float, site: Tensor, count: int, seed: int) -> Tensor:
    """Independent exact samples, int64 [count, n n], by rows: each given the first and the one before.

    Forms n powers of A, [q^n, q^n] each.
    """
    at = torch.tensor(coupling, dtype=torch.float64)
    log_row = _row_weights(side, at, site)
    half = ((log_row - log_row.max()) / 2).exp()
    between = (at * (torch.eye(len(site), dtype=torch.float64) - 1)).exp()
    powers = [torch.eye(len(half), dtype=torch.float64)]
    for _ in range(side):
        powers.append(_applied(powers[-1], side, half, between))
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(powers[side].diagonal(), count, True, generator=generator)
    chosen = [first]
    for row in range(1, side):
        finals = []
        for last, start in zip(chosen[-1].split(4096), first.split(4096), strict=True):
            weight = powers[1][last] * powers[side - row][start]
            finals.append(torch.multinomial(weight, 1, generator=generator)[:, 0])
        chosen.append(torch.cat(finals))
    return enumeration.states(len(site), side)[torch.stack(chosen, dim=1)].flatten(1)
