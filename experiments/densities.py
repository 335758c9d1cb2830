"""Laws that are known exactly, for models to learn from rewards alone: log p* up to a constant is the reward.

The base knows nothing: every state is equally likely, so that the optimum at g = -log p* is p* itself.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from dam.ctmc import enumeration

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


@dataclasses.dataclass(frozen=True)
class Ising(Density):
    """E(x) = -sum of s s' over neighbours on a periodic square lattice - field sum of s, for spins s = 2x - 1."""

    side: int = 4
    beta: float = 0.28
    field: float = 0.1
    tokens = 2

    @property
    def length(self) -> int:
        return self.side**2

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
