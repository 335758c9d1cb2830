"""How far samples are from a law: transport costs, energies, modes, normalisers, effective sample sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError("transport costs need POT: pip install 'discrete-adjoint-matching[sampler]'") from error
    return ot


def squared_distances(left: Tensor, right: Tensor) -> np.ndarray:
    """|x - y|^2 of states [A, D] and [B, D], float64 [A, B]."""
    gap = torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return gap.square().numpy()


def wasserstein(cost: np.ndarray) -> float:
    """The least mean cost of moving equal samples to equal samples, exactly, by the network simplex: W_2^2 of squares.

    Args:
        cost: float64 [A, B], `squared_distances` for one.

    Raises:
        ImportError: POT is not installed.
    """
    ot = _pot()
    rows, columns = cost.shape
    left, right = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    return float(ot.emd2(left, right, cost, numItermax=10_000_000))


class Sinkhorn(NamedTuple):
    """Entropic transport cost."""

    cost: float  # the dual value, a lower bound: <a, f> + <b, g>, with KL to the product as regulariser
    iterations: int
    error: float  # sum of |column sums - 1 / B|: 0 where it has converged


def sinkhorn(cost: np.ndarray, *, epsilon: float = 1e-3, iterations: int = 2000, threshold: float = 1e-3) -> Sinkhorn:
    """Sinkhorn's iterations in the log domain between equal samples, from potentials of 0, as figures are published.

    At epsilon = 1e-3 and costs of order 10 these 2,000 iterations are far from converged: the value then says how near
    samples have neighbours in the other set, and little of how much mass each mode has, and is below `wasserstein`.
    It stands beside published figures, whose setting this is; `wasserstein` is the distance.

    Pairs whose share is below what float64 can see are left out: so it takes seconds for 2,000 samples, where the
    same iterations on all pairs take many minutes.

    Args:
        cost: float64 [A, B], squared distances.
        epsilon: of the entropy.
        iterations: at most so many, of both potentials each.
        threshold: stops where the error is below, looked at every 10 iterations.

    Source: Cuturi, arXiv 1306.0895; setting of Blessing et al., arXiv 2406.07423.
    """
    matrix = torch.from_numpy(np.ascontiguousarray(cost, dtype=np.float64))
    nearest = max(float(matrix.min(dim=0).values.max()), float(matrix.min(dim=1).values.max()))
    width = 2 * nearest + _UNSEEN * epsilon
    while True:
        found = _iterated(matrix, epsilon, iterations, threshold, width)
        if found is not None:
            return found
        width *= 2


_UNSEEN = 60  # e^-60 of a row's mass is under float64's rounding of it, however many columns there are


class _Near:
    """Of each row the columns that cost at most `width`, filled up to a rectangle with infinite costs."""

    def __init__(self, matrix: Tensor, width: float):
        near = matrix <= width
        most = int(near.sum(dim=1).max())
        cost, self.at = torch.where(near, matrix, torch.inf).topk(most, dim=1, largest=False, sorted=False)
        self.cost = cost

    def smooth_minimum(self, potential: Tensor, epsilon: float) -> Tensor:
        """-epsilon log sum_j exp((potential_j - cost_ij) / epsilon), of each row."""
        return -epsilon * ((potential[self.at] - self.cost) / epsilon).logsumexp(dim=1)


def _iterated(matrix: Tensor, epsilon: float, iterations: int, threshold: float, width: float) -> Sinkhorn | None:
    """The iterations with pairs up to a cost of `width` only; None where one that is left out would be seen."""
    rows, columns = matrix.shape
    of_rows, of_columns = _Near(matrix, width), _Near(matrix.T.contiguous(), width)
    left, right = epsilon * math.log(1 / rows), epsilon * math.log(1 / columns)
    f = torch.zeros(rows, dtype=torch.float64)
    g = torch.zeros(columns, dtype=torch.float64)
    done, error = 0, math.inf
    while done < iterations and error >= threshold:
        g = right + of_columns.smooth_minimum(f, epsilon)
        f = left + of_rows.smooth_minimum(g, epsilon)
        done += 1
        if done % 10 == 0 or done == iterations:
            column_sums = torch.exp((g - of_columns.smooth_minimum(f, epsilon)) / epsilon)
            error = float((column_sums - 1 / columns).abs().sum())
            # What is left out of a row is less than e^-60 of what it has, 1 / rows.
            if float(f.max() + g.max()) - width > left - _UNSEEN * epsilon:
                return None
    return Sinkhorn(float((f - left).mean() + (g - right).mean()), done, error)


def mode_counts(samples: Tensor, modes: Tensor) -> Tensor:
    """How many samples [N, D] are nearest to each of the modes [M, D], int64 [M]: Voronoi cells."""
    nearest = torch.cdist(samples.double(), modes.double()).argmin(dim=1)
    return torch.bincount(nearest, minlength=len(modes))


class Estimates(NamedTuple):
    """What weights tell of a sampler."""

    log_normalizer: float  # log of the mean weight: its exponential is unbiased, itself it is low by variance / 2 N
    elbo: float  # mean log weight, a lower bound of log Z
    ess: float  # effective sample size, as a share of N


def estimates(log_weight: Tensor) -> Estimates:
    """log Z, its lower bound, and the effective sample size, of log weights float64 [N]."""
    log_mean = log_weight.logsumexp(dim=0) - math.log(len(log_weight))
    ess = torch.exp(2 * log_weight.logsumexp(dim=0) - (2 * log_weight).logsumexp(dim=0)) / len(log_weight)
    return Estimates(float(log_mean), float(log_weight.mean()), float(ess))


def energy_w2(left: Tensor, right: Tensor) -> float:
    """W_2 between the energies of samples, [N] each: the root mean square of the difference of sorted ones.

    Raises:
        ValueError: they are not as many.
    """
    if left.shape != right.shape:
        raise ValueError(f"energies must be as many on both sides; got {list(left.shape)} and {list(right.shape)}")
    return float((left.double().sort().values - right.double().sort().values).square().mean().sqrt())
