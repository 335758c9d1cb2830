"""Mixtures of Gaussians: laws whose velocities, scores and tilts are known, to hold samples and models to."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dam.flows.processes import PREDICTS, Model
from dam.flows.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """sum_m w_m N(mean_m, diag(variance_m)) in D dimensions; all functions are differentiable in its parameters.

    Args:
        log_weight: [M], up to a constant.
        mean: [M, D].
        variance: [M, D], of each coordinate, > 0.

    Raises:
        ValueError: shapes do not go together.
    """

    log_weight: Tensor
    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        shape = self.mean.shape
        if len(shape) != 2 or self.variance.shape != shape or self.log_weight.shape != shape[:1]:
            raise ValueError(
                "GaussianMixture: shapes must be [M], [M, D] and [M, D]; got "
                f"{list(self.log_weight.shape)}, {list(shape)} and {list(self.variance.shape)}"
            )

    def _log_parts(self, state: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of alpha X + beta eps at states [B, D]: log w_m N(x), [B, M]; x - alpha mean and variances, [B, M, D]."""
        gap = state[:, None] - alpha[:, None, None] * self.mean
        variance = alpha.square()[:, None, None] * self.variance + beta.square()[:, None, None]
        log_density = -(gap.square() / variance + variance.log() + math.log(2 * math.pi)).sum(dim=2) / 2
        return self.log_weight.log_softmax(dim=0) + log_density, gap, variance

    def log_density(self, state: Tensor) -> Tensor:
        """log p(x) of states [B, D], [B]."""
        one = torch.ones_like(state[:, 0])
        return self._log_parts(state, one, 0 * one)[0].logsumexp(dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, D]."""
        part = torch.multinomial(self.log_weight.softmax(dim=0), count, True, generator=generator)
        noise = torch.randn((count, self.mean.shape[1]), generator=generator, dtype=self.mean.dtype)
        return self.mean[part] + self.variance[part].sqrt() * noise

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each coordinate, [D] each."""
        weight = self.log_weight.softmax(dim=0)[:, None]
        mean = (weight * self.mean).sum(dim=0)
        return mean, (weight * (self.variance + (self.mean - mean).square())).sum(dim=0).sqrt()

    def model(self, schedule: Schedule, predicts: str = "velocity") -> Model:
        """What a network that knows this law would predict, a function of states [B, D] and times [B].

        Raises:
            ValueError: `predicts` is none of FlowProcess's.
        """
        if predicts not in PREDICTS:
            raise ValueError(f"GaussianMixture: predicts must be one of {', '.join(PREDICTS)}; got {predicts!r}")

        def prediction(state: Tensor, time: Tensor) -> Tensor:
            alpha, beta = schedule.alpha(time), schedule.beta(time)
            log_parts, gap, variance = self._log_parts(state, alpha, beta)
            share = log_parts.softmax(dim=1)[..., None]
            # E[X_1 | x] and E[eps | x] of each part: its means and the regression of X_1 and eps on X_t.
            pull = (share * gap / variance).sum(dim=1)
            if predicts == "score":
                return -pull
            if predicts == "noise":
                return beta[:, None] * pull
            data = (share * (self.mean + alpha[:, None, None] * self.variance * gap / variance)).sum(dim=1)
            if predicts == "data":
                return data
            slopes = schedule.alpha_derivative(time)[:, None], schedule.half_variance_derivative(time)[:, None]
            return slopes[0] * data + slopes[1] * pull

        return prediction

    def tilted(self, linear: Tensor, quadratic: Tensor) -> GaussianMixture:
        """The law in proportion to p(x) exp(linear . x - sum_d quadratic_d x_d^2 / 2), again a mixture.

        Args:
            linear: [D].
            quadratic: [D]; 1 / variance + quadratic must be > 0.

        Raises:
            ValueError: the tilt cannot be normalised.
        """
        precision = 1 / self.variance + quadratic
        if not bool((precision > 0).all()):
            raise ValueError("GaussianMixture: the tilt cannot be normalised: 1 / variance + quadratic must be > 0")
        mean = (self.mean / self.variance + linear) / precision
        change = mean.square() * precision - self.mean.square() / self.variance - (precision * self.variance).log()
        return GaussianMixture(self.log_weight + change.sum(dim=1) / 2, mean, 1 / precision)
