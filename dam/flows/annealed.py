"""Annealing from a Gaussian to a target: densities on the way, the running cost, weights of paths."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dam.flows.adjoint import Cost
from dam.flows.brownian import gaussian_log_density
from dam.flows.processes import AnnealedLangevin, over
from dam.flows.simulate import Path


@dataclasses.dataclass(frozen=True)
class Annealing:
    """Densities pi_t ~ N(0, deviation^2)^(1 - l) e^(-l E) with l = t^power, from a Gaussian at 0 to the target at 1.

    With U_t = -log pi_t, neither of them normalised but the Gaussian, Langevin dynamics on pi_t from X_0 ~ pi_0 and the
    running cost f = d/dt U_t, the law of paths in proportion to p_base e^(-integral f) ends in e^(-E) / Z
    (Jarzynski), and its normaliser is Z. It starts in

        pi_0(x) e^(-V_0(x)),      V_0(x) = -log E_base[e^(-integral f) | X_0 = x]

    which is learned from a = grad V_0 as an energy's samples are: tilted from the Gaussian by e^(-V_0).

    Args:
        energy: E of states [B, ...], [B], which torch.func can differentiate.
        deviation: of the Gaussian, in each coordinate.
        sigma: of the Langevin dynamics' noise.
        power: at least 1: above 1 most of the time goes where densities are still wide, and change most for a
            given l.

    Raises:
        ValueError: deviation or sigma is not > 0 and finite, or power below 1.

    Source: Choi et al., Non-equilibrium Annealed Adjoint Sampler, arXiv 2506.18165.
    """

    energy: Cost
    deviation: float = 1.0
    sigma: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.deviation < math.inf:
            raise ValueError(f"Annealing: deviation must be > 0 and finite; got {self.deviation}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"Annealing: sigma must be > 0 and finite; got {self.sigma}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"Annealing: power must be at least 1 and finite; got {self.power}")

    @property
    def process(self) -> AnnealedLangevin:
        """The dynamics, with models that predict the control u."""
        return AnnealedLangevin(self.log_density, self.sigma)

    def log_density(self, state: Tensor, time: Tensor) -> Tensor:
        """log pi_t, [B], of states [B, ...] and times [B]."""
        share = time**self.power
        return (1 - share) * gaussian_log_density(state, self.deviation**2) - share * self.energy(state)

    def running(self, state: Tensor, time: Tensor) -> Tensor:
        """f = d/dt U_t, [B]."""
        rate = self.power * time ** (self.power - 1)
        return rate * (self.energy(state) + gaussian_log_density(state, self.deviation**2))

    @torch.no_grad()
    def log_weights(self, path: Path) -> Tensor:
        """log of e^(-E(X_K)) prod B(X_k | X_k+1) / prod F(X_k+1 | X_k), less log pi_0(X_0): float64 [B].

        F are the steps of the model that drew the path, B those of the reference dynamics backwards, with the density
        of the later time. The mean of its exponential over paths from pi_0 is Z, exactly, on any grid and for any
        control; in the limit of short steps and without a control it is e^(-integral f).

        Args:
            path: of this process, by method="euler".

        Raises:
            ValueError: the path is of another method, or of another process.

        Source: Neal, Annealed Importance Sampling, 2001; Vargas et al., arXiv 2307.01050, of such steps.
        """
        steps = path.steps
        if steps.method != "euler" or any(steps.second_order):
            raise ValueError(f"log_weights: steps must be Gaussian: method='euler'; got {steps.method!r}")
        if steps.process != self.process:
            raise ValueError("log_weights: the path is of another process than this annealing's")
        process = self.process
        states = path.backwards()
        _, later = next(states)
        total = -self.energy(later).double()
        for k, state in states:
            length, variance = steps.length[k], steps.spread[k] ** 2
            ahead = later - state - length * process.drift(path.model, state, steps.times[k])
            back = state - later - length * process.drift(None, later, steps.times[k + 1])
            gap = ahead.double().square() - back.double().square()
            total = total + gap.flatten(1).sum(dim=1) / (2 * variance)
            later = state
        return total - gaussian_log_density(later.double(), self.deviation**2)


def clipped(slope: Tensor, largest: float) -> tuple[Tensor, float]:
    """Rows [B, ...] cut to a norm of at most `largest`, and the share that was cut: a bias while it is above 0."""
    norm = slope.flatten(1).norm(dim=1)
    cut = norm > largest
    factor = torch.where(cut, largest / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.ones_like(norm))
    return over(factor, slope) * slope, float(cut.double().mean())
