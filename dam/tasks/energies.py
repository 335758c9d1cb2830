"""Densities that samplers are measured on, as energies E: the law is e^(-E) / Z.

Of each there is what is known of it: exact samples, log Z, modes. Particles in a potential of their distances have
neither samples nor log Z, and a law on arrangements whose centre of mass is at 0 only.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dam.flows import GaussianMixture


class Energy(abc.ABC):
    """E of states [B, D], [B], and what is known of e^(-E) / Z."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """D."""

    @abc.abstractmethod
    def __call__(self, state: Tensor) -> Tensor:
        """E, [B], of states [B, D], differentiable."""

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Exact samples, float64 [count, D]; None where there is no way to them."""
        return None

    @property
    def log_normalizer(self) -> float | None:
        """log Z, None where it is not known."""
        return None

    @property
    def modes(self) -> Tensor | None:
        """Where the density has its maxima, about: float64 [M, D]; None where these are no few points."""
        return None


@dataclasses.dataclass(frozen=True)
class Mixture(Energy):
    """A mixture of Gaussians, normalised: log Z = 0."""

    law: GaussianMixture

    @property
    def dim(self) -> int:
        return self.law.mean.shape[1]

    def __call__(self, state: Tensor) -> Tensor:
        law = GaussianMixture(*(getattr(self.law, f.name).to(state) for f in dataclasses.fields(self.law)))
        return -law.log_density(state)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.law.sample(count, generator)

    @property
    def log_normalizer(self) -> float:
        return 0.0

    @property
    def modes(self) -> Tensor:
        return self.law.mean


def gmm_40() -> Mixture:
    """40 equal Gaussians of standard deviation log(1 + e) in the plane, with means uniform in [-40, 40]^2.

    The means are the published ones: torch's first 80 uniforms of seed 0.

    Source: Midgley et al., Flow Annealed Importance Sampling Bootstrap, arXiv 2208.01893.
    """
    drawn = torch.rand((40, 2), generator=torch.Generator().manual_seed(0))
    mean = (80 * (drawn - 0.5)).double()
    variance = math.log1p(math.e) ** 2
    return Mixture(GaussianMixture(torch.zeros(40, dtype=torch.float64), mean, torch.full_like(mean, variance)))


@dataclasses.dataclass(frozen=True)
class Funnel(Energy):
    """x_0 ~ N(0, 3^2), and given it the others independent N(0, e^(x_0)); normalised.

    Source: Neal, Slice Sampling, 2003.
    """

    size: int = 10

    @property
    def dim(self) -> int:
        return self.size

    def __call__(self, state: Tensor) -> Tensor:
        first, others = state[:, 0], state[:, 1:]
        of_first = first.square() / 18 + math.log(3)
        of_others = others.square().sum(dim=1) * torch.exp(-first) / 2 + (self.size - 1) * first / 2
        return of_first + of_others + self.size * math.log(2 * math.pi) / 2

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn((count, self.size), generator=generator, dtype=torch.float64)
        first = 3 * noise[:, :1]
        return torch.cat((first, torch.exp(first / 2) * noise[:, 1:]), dim=1)

    @property
    def log_normalizer(self) -> float:
        return 0.0


@dataclasses.dataclass(frozen=True)
class ManyWell(Energy):
    """E = sum over the first m coordinates of (x^2 - delta)^2 + sum over the others of x^2 / 2: 2^m modes, all alike.

    Coordinates are independent, so that samples and log Z are by quadrature of one.

    Args:
        size: D.
        wells: m.
        delta: wells are at +- its square root.

    Source: Berner et al., arXiv 2211.01364; "MW54" of Chen et al., arXiv 2412.07081, is D = m = 5, delta = 4.
    """

    size: int = 5
    wells: int = 5
    delta: float = 4.0

    def __post_init__(self) -> None:
        if not (1 <= self.wells <= self.size and self.delta > 0):
            raise ValueError(
                f"ManyWell: wells must be in 1 .. {self.size} and delta > 0; got {self.wells} and {self.delta}"
            )

    @property
    def dim(self) -> int:
        return self.size

    def __call__(self, state: Tensor) -> Tensor:
        well, rest = state[:, : self.wells], state[:, self.wells :]
        return (well.square() - self.delta).square().sum(dim=1) + rest.square().sum(dim=1) / 2

    @functools.cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """A fine grid of one well's coordinate, and the integral of e^(-E) up to each of its points, float64 [G]."""
        edge = math.sqrt(self.delta + 7)  # where E is 49
        grid = torch.linspace(-edge, edge, 200_001, dtype=torch.float64)
        height = torch.exp(-(grid.square() - self.delta).square())
        return grid, torch.cat((grid[:1] * 0, torch.cumulative_trapezoid(height, grid)))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        grid, mass = self._table
        level = torch.rand((count, self.wells), generator=generator, dtype=torch.float64) * mass[-1]
        right = torch.searchsorted(mass, level).clamp(1, len(grid) - 1)
        share = (level - mass[right - 1]) / (mass[right] - mass[right - 1])
        well = grid[right - 1] + share * (grid[right] - grid[right - 1])
        rest = torch.randn((count, self.size - self.wells), generator=generator, dtype=torch.float64)
        return torch.cat((well, rest), dim=1)

    @property
    def log_normalizer(self) -> float:
        return self.wells * math.log(float(self._table[1][-1])) + (self.size - self.wells) * math.log(2 * math.pi) / 2

    @property
    def modes(self) -> Tensor:
        sign = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * self.wells)
        well = math.sqrt(self.delta) * sign.view(-1, self.wells)
        return torch.cat((well, torch.zeros(len(well), self.size - self.wells, dtype=torch.float64)), dim=1)

    def right_shares(self, states: Tensor) -> Tensor:
        """Of states [N, D], the share on the right of each barrier, float64 [m]: 1/2 under the law."""
        return (states[:, : self.wells] > 0).double().mean(dim=0)


@dataclasses.dataclass(frozen=True)
class Particles(Energy):
    """N particles whose energy is a sum over pairs of a function of their distance, and a pull to their centre.

    States are [B, N * dimensions]. The energy does not change with the centre of mass, so e^(-E) is a law of centred
    states only. As a law of all states that samplers can have, the centre is Gaussian with the standard deviation that
    each learner starts from: `lifted`.

    Args:
        count, dimensions: N and their space's.
        pair: of distances [B, P], [B, P].
        pull: the energy has pull / 2 times the sum of squared distances to the centre.
    """

    count: int
    dimensions: int
    pair: Callable[[Tensor], Tensor]
    pull: float = 0.0

    @property
    def dim(self) -> int:
        return self.count * self.dimensions

    def centred(self, state: Tensor) -> Tensor:
        """Without the centre of mass, [B, D]."""
        x = state.view(len(state), self.count, self.dimensions)
        return (x - x.mean(dim=1, keepdim=True)).reshape(state.shape)

    def distances(self, state: Tensor) -> Tensor:
        """Of each pair, [B, N (N - 1) / 2]."""
        x = state.view(len(state), self.count, self.dimensions)
        i, j = torch.triu_indices(self.count, self.count, 1, device=state.device)
        return (x[:, i] - x[:, j]).square().sum(dim=2).sqrt()

    def __call__(self, state: Tensor) -> Tensor:
        energy = self.pair(self.distances(state)).sum(dim=1)
        if self.pull:
            energy = energy + self.pull / 2 * self.centred(state).square().sum(dim=1)
        return energy

    def lifted(self, deviation: float) -> Callable[[Tensor], Tensor]:
        """E of centred states, and of the centre of mass that of a Gaussian of this deviation in each coordinate."""

        def energy(state: Tensor) -> Tensor:
            inner = self.centred(state)
            return self(inner) + (state - inner).square().sum(dim=1) / (2 * deviation**2)

        return energy

    def centre_log_normalizer(self, deviation: float) -> float:
        """log Z of what `lifted` adds: of sqrt(N) times the centre, a Gaussian."""
        return self.dimensions * math.log(2 * math.pi * deviation**2) / 2


def _double_well(distance: Tensor) -> Tensor:
    gap = (distance - 4).square()
    return 0.9 * gap.square() - 4 * gap


def dw_4() -> Particles:
    """DW-4: four particles in the plane, each pair with 0.9 (d - 4)^4 - 4 (d - 4)^2.

    Source: Köhler et al., Equivariant Flows, arXiv 2006.02425; with these numbers as Akhound-Sadegh et al., iDEM, arXiv
    2402.06121.
    """
    return Particles(4, 2, _double_well)


def _lennard_jones(distance: Tensor) -> Tensor:
    sixth = distance**-6
    return 2 * (sixth.square() - 2 * sixth)


def lj_13() -> Particles:
    """LJ-13: 13 particles in space, each pair with 2 (d^-12 - 2 d^-6), and a pull of 1 to their centre.

    The factor 2 is what the published samples were drawn with: a sum over ordered pairs.

    Source: Köhler et al., arXiv 2006.02425; Akhound-Sadegh et al., iDEM, arXiv 2402.06121.
    """
    return Particles(13, 3, _lennard_jones, pull=1.0)


TARGETS: dict[str, Callable[[], Energy]] = {
    "gmm-40": gmm_40,
    "funnel-10": Funnel,
    "many-well-5": ManyWell,
    "many-well-50": lambda: ManyWell(50, 5, 2.0),
    "dw-4": dw_4,
    "lj-13": lj_13,
}


def metropolis(energy: Particles, count: int, *, steps: int, length: float, seed: int) -> Tensor:
    """States of long Metropolis chains, one for each of `count`, float64 [count, D], centred: a reference of our own.

    Chains begin from Gaussians of standard deviation 2 and are annealed over the first fifth of the steps, in which
    their temperature falls from 10 to 1. A step moves every coordinate by a Gaussian.

    Args:
        energy: of particles.
        count: of chains, which are independent.
        steps: of each.
        length: of a step, its standard deviation in each coordinate.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    state = energy.centred(2 * torch.randn((count, energy.dim), generator=generator, dtype=torch.float64))
    now = energy(state)
    for n in range(steps):
        heat = max(1.0, 10.0 * (1 - n / (steps / 5)) + n / (steps / 5))
        noise = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        proposal = energy.centred(state + length * noise)
        then = energy(proposal)
        level = torch.rand(count, generator=generator, dtype=torch.float64).log()
        taken = level < (now - then) / heat
        state = torch.where(taken[:, None], proposal, state)
        now = torch.where(taken, then, now)
    return state


def aligned_squares(left: np.ndarray, right: np.ndarray, *, assigned: bool = False) -> np.ndarray:
    """Least squared distance of arrangements of few particles in the plane, over turns, mirrors and swaps: [A, B].

    Args:
        left, right: centred states of N particles in the plane, float64 [A, 2 N] and [B, 2 N].
        assigned: particles are swapped to the least sum of distances as they lie, and turned only then, as figures of
            DW-4 are published: an upper bound, as the best swap is that of turned ones.

    Source: of `assigned`, the code of Akhound-Sadegh et al., iDEM, arXiv 2402.06121.
    """
    a = left[:, 0::2] + 1j * left[:, 1::2]
    b = right[:, 0::2] + 1j * right[:, 1::2]
    apart = [[np.abs(x[:, None] - y) for y in b.T] for x in a.T] if assigned else None  # N x N of [A, B]
    shortest = np.full((len(a), len(b)), np.inf)
    # The best turn by an angle makes the product of complex states real: its size is what is gained.
    most = np.zeros((len(a), len(b)))
    for order in itertools.permutations(range(a.shape[1])):
        swapped = b[:, list(order)].T
        gain = np.maximum(np.abs(a @ swapped.conj()), np.abs(a @ swapped))
        if apart is None:
            np.maximum(most, gain, out=most)
        else:
            length = sum(apart[i][j] for i, j in enumerate(order))
            most = np.where(length < shortest, gain, most)
            np.minimum(shortest, length, out=shortest)
    squares = (np.abs(a) ** 2).sum(axis=1)[:, None] + (np.abs(b) ** 2).sum(axis=1)[None]
    return np.maximum(squares - 2 * most, 0.0)
