"""Schedules of masked chains: the unmasked fraction alpha(t), from 0 at time 0 (noise) to 1 at time 1 (data)."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor


class Schedule(abc.ABC):
    """An increasing function alpha from [0, 1] onto [0, 1]."""

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
