"""Schedules alpha(t), beta(t): X_t = alpha(t) X_1 + beta(t) eps, from noise at time 0 to data at time 1."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor


class Schedule(abc.ABC):
    """How much of the data and of the noise there is at a time: alpha increases to 1, beta decreases.

    What a process needs of it are

        kappa(t) = alpha' / alpha,      eta(t) = beta (kappa beta - beta')

    with which velocity and score of any law of X_1 are related: v_t(x) = kappa x + eta grad log p_t(x). All functions
    take float64 times of any shape and are infinite where they have no value.

    Source: Domingo-Enrich et al., Adjoint Matching, arXiv 2409.08861.
    """

    @abc.abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """What multiplies the data."""

    @abc.abstractmethod
    def beta(self, time: Tensor) -> Tensor:
        """What multiplies the noise: the standard deviation of X_t given X_1."""

    @abc.abstractmethod
    def alpha_derivative(self, time: Tensor) -> Tensor:
        """d alpha / dt."""

    @abc.abstractmethod
    def beta_derivative(self, time: Tensor) -> Tensor:
        """d beta / dt."""

    def half_variance_derivative(self, time: Tensor) -> Tensor:
        """d (beta^2 / 2) / dt, which may be finite where d beta / dt is not."""
        return self.beta(time) * self.beta_derivative(time)

    def kappa(self, time: Tensor) -> Tensor:
        """d log alpha / dt."""
        return self.alpha_derivative(time) / self.alpha(time)

    def eta(self, time: Tensor) -> Tensor:
        """Half of the squared diffusion of the memoryless process."""
        beta = self.beta(time)
        return beta * (self.kappa(time) * beta - self.beta_derivative(time))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """alpha = t, beta = 1 - t: straight lines, of rectified flows and conditional optimal transport."""

    def alpha(self, time: Tensor) -> Tensor:
        return time

    def beta(self, time: Tensor) -> Tensor:
        return 1 - time

    def alpha_derivative(self, time: Tensor) -> Tensor:
        return torch.ones_like(time)

    def beta_derivative(self, time: Tensor) -> Tensor:
        return -torch.ones_like(time)


@dataclasses.dataclass(frozen=True)
class Trigonometric(Schedule):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): the variance stays that of data of variance 1."""

    def alpha(self, time: Tensor) -> Tensor:
        return torch.sin(time * math.pi / 2)

    def beta(self, time: Tensor) -> Tensor:
        # 0 at time 1, where a cosine would be a rounding and 1 / beta finite.
        return torch.sin((1 - time) * math.pi / 2)

    def alpha_derivative(self, time: Tensor) -> Tensor:
        return self.beta(time) * math.pi / 2

    def beta_derivative(self, time: Tensor) -> Tensor:
        return -torch.sin(time * math.pi / 2) * math.pi / 2


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Schedule):
    """The diffusion that noises data at a rate which grows linearly, alpha^2 + beta^2 = 1:

        alpha(t) = exp(-s (low + s (high - low) / 2) / 2),      s = 1 - t

    so that kappa = eta = (low + s (high - low)) / 2. What is left of the data at time 0 is exp(-(low + high) / 4), 0.7%
    by default.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, arXiv 2011.13456.
    """

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high < math.inf):
            raise ValueError(f"VariancePreserving: rates must be 0 < low <= high; got {self.low} and {self.high}")

    def _log_alpha(self, time: Tensor) -> Tensor:
        noised = 1 - time
        return -noised * (self.low + noised * (self.high - self.low) / 2) / 2

    def alpha(self, time: Tensor) -> Tensor:
        return self._log_alpha(time).exp()

    def beta(self, time: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(time))).sqrt()

    def alpha_derivative(self, time: Tensor) -> Tensor:
        return self.kappa(time) * self.alpha(time)

    def beta_derivative(self, time: Tensor) -> Tensor:
        return self.half_variance_derivative(time) / self.beta(time)  # -inf at time 1

    def half_variance_derivative(self, time: Tensor) -> Tensor:
        return -self.kappa(time) * self.alpha(time).square()

    def kappa(self, time: Tensor) -> Tensor:
        return (self.low + (1 - time) * (self.high - self.low)) / 2

    def eta(self, time: Tensor) -> Tensor:
        return self.kappa(time)  # by alpha^2 + beta^2 = 1, and finite at time 1


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Schedule):
    """The diffusion that adds noise to the data, alpha = 1, beta(t) = largest (smallest / largest)^t.

    X_1 is what the noise `smallest` leaves of the data, and X_0 depends on it: `largest` is to be many times the data's
    own standard deviation.

    Source: Song et al., arXiv 2011.13456.
    """

    smallest: float = 0.01
    largest: float = 50.0

    def __post_init__(self) -> None:
        if not (0 < self.smallest < self.largest < math.inf):
            raise ValueError(
                f"VarianceExploding: noise must be 0 < smallest < largest; got {self.smallest} and {self.largest}"
            )

    @property
    def _rate(self) -> float:
        return math.log(self.largest / self.smallest)

    def alpha(self, time: Tensor) -> Tensor:
        return torch.ones_like(time)

    def beta(self, time: Tensor) -> Tensor:
        return self.largest * torch.exp(-time * self._rate)

    def alpha_derivative(self, time: Tensor) -> Tensor:
        return torch.zeros_like(time)

    def beta_derivative(self, time: Tensor) -> Tensor:
        return -self._rate * self.beta(time)
