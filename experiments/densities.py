"""Laws that are known exactly, for models to learn from rewards alone: log p* up to a constant is the reward.

The base knows nothing: every state is equally likely, so that the optimum at g = -log p* is p* itself.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dam.ctmc import enumeration
from experiments import clusters, transfer

RESOLUTION = 91
DENSITIES = ("pinwheel", "checkerboard")


class Density(abc.ABC):
    """p* over L tokens of V values."""

    tokens: int
    length: int

    @abc.abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """log p* up to a constant, float64 [B] for x [B, L]."""

    def law(self) -> Tensor:
        """p*, float64 [V^L], in the order of `enumeration.states`."""
        return torch.softmax(self.log_density(enumeration.states(self.tokens, self.length)), dim=0)


class Lattice(Density):
    """A periodic square lattice: log p*(x) = coupling * equal pairs of neighbours + sum_i site[x_i] + offset - log Z.

    A lattice of side 2 has each pair of neighbours twice.
    """

    side: int
    beta: float

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.side**2

    @property
    @abc.abstractmethod
    def coupling(self) -> float:
        """Of each pair of neighbours with equal tokens."""

    @property
    @abc.abstractmethod
    def site(self) -> Tensor:
        """Of each token at a site, float64 [V]."""

    @property
    @abc.abstractmethod
    def offset(self) -> float:
        """What log_density has beside both."""

    @abc.abstractmethod
    def observables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnetisation and correlation of neighbours, as each lattice has them, float64 [B] for x [B, L]."""

    @abc.abstractmethod
    def of_moments(self, pairs: float, count: float, square: float) -> tuple[float, float]:
        """Means of the observables, of those of equal pairs, of how often token 1 is there, and of that squared."""

    @property
    def enumerable(self) -> bool:
        return self.tokens**self.length <= 2**20

    def known(self) -> tuple[float, tuple[float, float]]:
        """Exact: log of the sum of exp(log_density) over all states, and the means of the observables under p*."""
        log_z, *means = transfer.moments(self.side, self.coupling, self.site, token=1)
        return log_z + self.offset, self.of_moments(*means)

    def exact(self, count: int, seed: int) -> Tensor:
        """Samples of p*, int64 [count, L]: independent exact ones, or where rows have too many states for that,
        those of Swendsen-Wang after 200 sweeps each.
        """
        if self.tokens**self.side <= 1024:
            return transfer.samples(self.side, self.coupling, self.site, count, seed)
        return clusters.swendsen_wang(self.side, self.coupling, self.site, count, 200, seed)


@dataclasses.dataclass(frozen=True)
class Ising(Lattice):
    """E(x) = -sum of s s' over neighbours on a periodic square lattice - field sum of s, for spins s = 2x - 1."""

    side: int = 4
    beta: float = 0.28
    field: float = 0.1
    tokens = 2

    @property
    def coupling(self) -> float:
        return 2 * self.beta

    @property
    def site(self) -> Tensor:
        return torch.tensor([-self.beta * self.field, self.beta * self.field], dtype=torch.float64)

    @property
    def offset(self) -> float:
        return -2 * self.beta * self.length  # s s' = 2 [s = s'] - 1, over two pairs for each site

    def log_density(self, x: Tensor) -> Tensor:
        """-beta E(x)."""
        s = self.spins(x)
        pairs = (s * s.roll(1, 1)).sum(dim=(1, 2)) + (s * s.roll(1, 2)).sum(dim=(1, 2))
        return self.beta * (pairs + self.field * s.sum(dim=(1, 2)))

    def spins(self, x: Tensor) -> Tensor:
        return (2 * x - 1).double().view(-1, self.side, self.side)

    def observables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnetisation per spin, and the correlation of neighbours, float64 [B]."""
        s = self.spins(x)
        return s.mean(dim=(1, 2)), ((s * s.roll(1, 1)) + (s * s.roll(1, 2))).mean(dim=(1, 2)) / 2

    def of_moments(self, pairs: float, count: float, square: float) -> tuple[float, float]:
        return 2 * count / self.length - 1, pairs / self.length - 1

    def known(self) -> tuple[float, tuple[float, float]]:
        if self.field:
            return super().known()
        beta = torch.tensor(self.beta, dtype=torch.float64)
        of_beta = functools.partial(transfer.without_field, self.side)
        log_z, slope = torch.func.jvp(of_beta, (beta,), (torch.ones_like(beta),))
        return float(log_z), (0.0, float(slope) / (2 * self.length))


@dataclasses.dataclass(frozen=True)
class Potts(Lattice):
    """E(x) = -the number of equal neighbours on a periodic square lattice, of sites with so many colours.

    The infinite lattice is critical at beta = log(1 + sqrt(colours)), 1.005 for three.
    """

    side: int = 4
    beta: float = 1.005
    colours: int = 3

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.colours

    @property
    def coupling(self) -> float:
        return self.beta

    @property
    def site(self) -> Tensor:
        return torch.zeros(self.colours, dtype=torch.float64)

    @property
    def offset(self) -> float:
        return 0.0

    def log_density(self, x: Tensor) -> Tensor:
        """-beta E(x)."""
        return self.beta * self.equal(x)

    def equal(self, x: Tensor) -> Tensor:
        """The number of equal neighbours, float64 [B]."""
        x = x.view(-1, self.side, self.side)
        return ((x == x.roll(1, 1)).double() + (x == x.roll(1, 2))).sum(dim=(1, 2))

    def observables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q sum over colours of their share squared - 1) / (q - 1), 1 of one colour alone and 0 of equal shares, and
        the share of equal neighbours.
        """
        shares = F.one_hot(x, self.colours).double().mean(dim=1)
        square = (self.colours * shares.square().sum(dim=1) - 1) / (self.colours - 1)
        return square, self.equal(x) / (2 * self.length)

    def of_moments(self, pairs: float, count: float, square: float) -> tuple[float, float]:
        # No colour is another's better: the sum over them is that of one, as often.
        sum_of_squares = self.colours * square / self.length**2
        return (self.colours * sum_of_squares - 1) / (self.colours - 1), pairs / (2 * self.length)


@dataclasses.dataclass(frozen=True)
class Grid(Density):
    """A density of the plane at the points of a grid: two tokens, one for each axis of [-1, 1]^2.

    "pinwheel" has five bent Gaussian arms above a floor of e^-9 of its peak; "checkerboard" is 1 on every other of
    4 x 4 squares and e^-6 between, with edges of one cell, which coarse grids see little of.
    """

    name: str = "pinwheel"
    size: int = RESOLUTION
    length = 2

    def __post_init__(self) -> None:
        if self.name not in DENSITIES:
            raise ValueError(f"there are the densities {', '.join(DENSITIES)}; got {self.name!r}")

    @property
    def tokens(self) -> int:
        return self.size

    def log_density(self, x: Tensor) -> Tensor:
        return self.table()[x[:, 0], x[:, 1]]

    def table(self) -> Tensor:
        """log p* up to a constant, float64 [V, V]."""
        axis = torch.linspace(-1, 1, self.size, dtype=torch.float64)
        x, y = torch.meshgrid(axis, axis, indexing="ij")
        if self.name == "checkerboard":
            edge = 2.0 / self.size
            wave = torch.sin(2 * math.pi * x) * torch.sin(2 * math.pi * y)
            inside = torch.sigmoid(wave / (math.pi * edge))
            return torch.log(inside + (1 - inside) * math.exp(-6))
        radius, angle = 4 * torch.hypot(x, y), torch.atan2(y, x)
        arms = []
        for k in range(5):
            turned = angle - 2 * math.pi * k / 5 - 0.5 * torch.exp(0.3 * radius)
            turned = torch.remainder(turned + math.pi, 2 * math.pi) - math.pi
            arms.append(-((radius - 2) ** 2) / (2 * 0.6**2) - (turned * radius) ** 2 / (2 * 0.2**2))
        log_density = torch.logsumexp(torch.stack(arms), dim=0)
        return torch.logaddexp(log_density - log_density.max(), torch.tensor(-9.0, dtype=torch.float64))
