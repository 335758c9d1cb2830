"""Adjoint Sampling: a Brownian reference from one point, and matching on bridges of it to samples that are kept."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dam.flows.adjoint import Cost
from dam.flows.matching import Targets
from dam.flows.processes import Process, over


@dataclasses.dataclass(frozen=True)
class Brownian(Process):
    """Brownian motion from X_0 = 0 whose noise falls geometrically, and a model m that predicts -grad V:

        dX = sigma^2 m_t(X) dt + sigma dW,      sigma(t) = largest (smallest / largest)^t

    The control is u = sigma m. As X_0 is one point, it is independent of X_1. A bridge to X_1 is Gaussian, under the
    reference and under the optimum too, which only weighs outcomes anew: so X_t can be drawn from X_1 alone.

    Args:
        smallest, largest: sigma at times 1 and 0.

    Raises:
        ValueError: not 0 < smallest <= largest.

    Source: Havens et al., Adjoint Sampling, arXiv 2504.11713.
    """

    smallest: float = 1.0
    largest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest < math.inf:
            raise ValueError(f"Brownian: noise must be 0 < smallest <= largest; got {self.smallest} and {self.largest}")

    @classmethod
    def reaching(cls, deviation: float, ratio: float, steps: int) -> Brownian:
        """That whose X_1 has this standard deviation when it is simulated in even steps by Euler-Maruyama.

        Args:
            deviation: of X_1, in each coordinate.
            ratio: largest / smallest, at least 1.
            steps: of `times(steps)`.
        """
        if not (deviation > 0 and ratio >= 1):
            raise ValueError(f"Brownian: deviation must be > 0 and ratio at least 1; got {deviation} and {ratio}")
        one = cls(1 / ratio, 1.0)
        scale = deviation / math.sqrt(float(one.clock(one.times(steps))[-1]))
        return cls(scale / ratio, scale)

    def reference(self, state: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(state)

    def gain(self, time: Tensor) -> Tensor:
        return self.diffusion(time).square()

    def diffusion(self, time: Tensor) -> Tensor:
        return self.largest * torch.exp(time * math.log(self.smallest / self.largest))

    def clock(self, times: Tensor) -> Tensor:
        """The variance of the reference at each time of a grid, as Euler-Maruyama steps through it: float64 [K + 1]."""
        gained = self.diffusion(times[:-1]).square() * times.diff()
        return torch.cat((torch.zeros_like(gained[:1]), gained.cumsum(0)))

    def bridged(self, times: Tensor, final: Tensor, k: Tensor, noise: Tensor) -> Tensor:
        """X at time k of a grid, given X_0 = 0 and X at its last time, [B, ...].

        Exactly what the steps of Euler-Maruyama on this grid have, under the reference and under the optimum.

        Args:
            times: float64 [K + 1].
            final: X at the last of the times, [B, ...].
            k: int64 [B], in 0 .. K.
            noise: standard normals, [B, ...].
        """
        clock = self.clock(times).to(final.device)
        share = (clock[k] / clock[-1]).view(-1, *[1] * (final.dim() - 1))
        spread = (clock[-1] * share * (1 - share)).sqrt()
        return share.to(final.dtype) * final + spread.to(final.dtype) * noise

    def terminal_cost(self, energy: Cost, times: Tensor) -> Cost:
        """g = E + log p_1 of the reference, up to no constant: its tilt by e^(-g) is e^(-E), integral and all.

        Args:
            energy: E of states [B, ...], [B].
            times: the grid that X_1 is reached by.
        """
        variance = float(self.clock(times)[-1])

        def cost(state: Tensor) -> Tensor:
            return energy(state) + gaussian_log_density(state, variance)

        return cost


def gaussian_log_density(state: Tensor, variance: float) -> Tensor:
    """log N(x; 0, variance) of states [B, ...], [B]."""
    flat = state.flatten(1)
    return -(flat.square().sum(dim=1) / variance + flat.shape[1] * math.log(2 * math.pi * variance)) / 2


def projected_targets(
    process: Brownian,
    times: Tensor,  # float64 [K + 1]
    final: Tensor,  # [B, ...]
    slope: Tensor,  # [B, ...]
    *,
    mode_width: float = 0.0,
    generator: torch.Generator | None = None,
) -> Targets:
    """Targets of Adjoint Sampling at one time of each of B outcomes: the reciprocal projection.

        X_k from the bridge to X_1,      prediction = -grad g(X_1),      weight = K sigma_k^2 h_k / (2 B)

    so that `matching.loss` is the expectation of what `adjoint_targets` has on whole paths of a law whose bridges are
    the reference's: the lean adjoint of Brownian motion is constant. The outcomes may be old ones, of other controls:
    the law of outcomes is what is to become the optimum's, and a buffer of them averages over rounds.

    With a mode_width w the prediction is a share of the gradient and the rest of the bridge's own slope,

        -k grad g(X_1) + (1 - k) (X_1 - X_k) / r,      1 / k = 1 + r / w^2 - r / c,

    where c is the variance of the reference at the end and r what is left of it. Where outcomes have the optimum's law
    both have one mean given X_k, and the noise of one balances that of the other: all of it if the law is a Gaussian of
    deviation w. Of other outcomes the second has the mean of their own law's control. So what is to be learned is the
    same for every w, but outcomes should be drawn by their weights: else it takes 1 / k times as long.

    Args:
        process, times: that the outcomes are drawn by, with method="euler".
        final: X_1, [B, ...].
        slope: an unbiased estimate of grad g at it, [B, ...]: `cost_gradient` of `process.terminal_cost`.
        mode_width: w, below the deviation of the reference; 0 is the gradient alone.
        generator: of times and noise, on the CPU.

    Raises:
        ValueError: shapes differ, the slope is not finite, or mode_width is out of range.

    Source: Havens et al., arXiv 2504.11713, Sec. 3; of shares, De Bortoli et al., Target Score Matching, arXiv
    2402.08667.
    """
    if slope.shape != final.shape:
        raise ValueError(
            f"projected_targets: slope must have the shape of final, {list(final.shape)}; got {list(slope.shape)}"
        )
    if not bool(slope.isfinite().all()):
        raise ValueError("projected_targets: slope has entries that are not finite")
    times = times.to(dtype=torch.float64, device="cpu")
    rows, count = len(final), len(times) - 1
    k = torch.randint(count, (rows,), generator=generator)
    noise = torch.randn(final.shape, generator=generator, dtype=final.dtype).to(final.device)
    state = process.bridged(times, final, k.to(final.device), noise)
    clock = process.clock(times)
    weight = clock.diff()[k] * count / (2 * max(1, rows))
    prediction = -slope
    if mode_width:
        if not 0 < mode_width**2 < float(clock[-1]):
            raise ValueError(
                f"projected_targets: mode_width must be at least 0 and below the reference's deviation, "
                f"{float(clock[-1]) ** 0.5:g}; got {mode_width:g}"
            )
        left = clock[-1] - clock[k]
        share = over((1 / (1 + left / mode_width**2 - left / clock[-1])).to(slope), slope)
        prediction = share * prediction + (1 - share) * (final - state) / over(left.to(slope), slope)
    return Targets(state, times[k].to(final.device), prediction, weight.to(final.device))
