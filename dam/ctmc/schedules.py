"""Schedules alpha(t): what is left of the data, from noise at time 0 to all of it at time 1; or what is unmasked."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


class Schedule(abc.ABC):
    """An increasing function alpha on [0, 1] with alpha(1) = 1; alpha(0) = 0 but where a schedule says otherwise."""

    @abc.abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """Expected unmasked fraction at `time`."""

    @abc.abstractmethod
    def derivative(self, time: Tensor) -> Tensor:
        """d alpha / dt at `time`."""

    @abc.abstractmethod
    def inverse(self, alpha: Tensor) -> Tensor:
        """The time at which the unmasked fraction is `alpha`."""

    def unmasking_rate(self, time: Tensor) -> Tensor:
        """Rate at which one masked position unmasks, alpha' / (1 - alpha)."""
        return self.derivative(time) / (1 - self.alpha(time))


def sampled(start: float, end: float) -> Tensor:
    """Times at which bounds on an interval look at a schedule, float64 [257]."""
    return torch.linspace(start, end, 257, dtype=torch.float64, device="cpu")


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """alpha(t) = t."""

    def alpha(self, time: Tensor) -> Tensor:
        return time

    def derivative(self, time: Tensor) -> Tensor:
        return torch.ones_like(time)

    def inverse(self, alpha: Tensor) -> Tensor:
        return alpha


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha(t) = 1 - cos(pi t / 2): slow while little is known, fast at the end."""

    def alpha(self, time: Tensor) -> Tensor:
        return 1 - torch.cos(time * math.pi / 2)

    def derivative(self, time: Tensor) -> Tensor:
        return torch.sin(time * math.pi / 2) * math.pi / 2

    def inverse(self, alpha: Tensor) -> Tensor:
        return torch.acos(1 - alpha) * 2 / math.pi


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """alpha(t) = least^(1 - t): noise at a constant rate, log(1 / least), and alpha(0) = least.

    Source: Campbell et al., A Continuous Time Framework for Discrete Denoising Models, arXiv 2205.14987.
    """

    least: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise ValueError(f"Geometric: least must be in (0, 1); got {self.least}")

    def alpha(self, time: Tensor) -> Tensor:
        return torch.exp((1 - time) * math.log(self.least))

    def derivative(self, time: Tensor) -> Tensor:
        return -math.log(self.least) * self.alpha(time)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - alpha.log() / math.log(self.least)


@dataclasses.dataclass(frozen=True)
class UserSchedule(Schedule):
    """A schedule from a function of yours; its derivative by autograd, its inverse by bisection.

    Args:
        function: alpha, an increasing function of a tensor of times that autograd can follow.

    Raises:
        ValueError: alpha does not increase to 1 at time 1.
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        values = self.alpha(torch.linspace(0, 1, 129, dtype=torch.float64, device="cpu"))
        if not bool((values.diff() > 0).all()) or abs(float(values[-1]) - 1) > 1e-6 or float(values[0]) < 0:
            raise ValueError(
                "UserSchedule: alpha must increase on [0, 1], from at least 0 at time 0 to 1 at time 1; got "
                f"{float(values[0]):g} at 0 and {float(values[-1]):g} at 1, least step {float(values.diff().min()):g}"
            )

    def alpha(self, time: Tensor) -> Tensor:
        return self.function(time).clamp(max=1.0)  # rounding of the function must not make probabilities negative

    def derivative(self, time: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = time.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return slope

    def inverse(self, alpha: Tensor) -> Tensor:
        low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
        for _ in range(60):  # to the last bit of float64
            middle = (low + high) / 2
            below = self.function(middle) < alpha
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
