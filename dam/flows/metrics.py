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


def sinkhorn_divergence(left: Tensor, right: Tensor, *, share: float = 0.05) -> float:
    """Entropic transport between samples, less half of what it is from each of them to itself.

        S = OT(x, y) - (OT(x, x) + OT(y, y)) / 2

    with squared distances as costs, the dual values of `sinkhorn`, and epsilon = `share` times the mean cost between x
    and y in all three. It is 0 for equal sets; between independent sets of one law it is above 0, the less the more
    samples there are.

    This is what the code of published figures computes: it hands an epsilon of 1e-3 to a geometry that the divergence
    is not taken of, and has ott-jax's default of then, 0.05 of the mean cost.

    Args:
        left, right: samples [A, D] and [B, D].
        share: of the mean cost; a few percent, so that the iterations converge.

    Raises:
        ImportError: POT is not installed.
        ValueError: there are no samples on a side, or share is not > 0.

    Source: Feydy et al., arXiv 1810.08278; the code of Chen et al., arXiv 2412.07081, with ott-jax 0.4.6.
    """
    if not (len(left) and len(right) and share > 0):
        raise ValueError(
            f"sinkhorn_divergence: there must be samples on both sides and share > 0; got {len(left)} and {len(right)} "
            f"samples and {share:g}"
        )
    between = squared_distances(left, right)
    epsilon = share * float(between.mean())
    if epsilon == 0:  # all samples are one point
        return 0.0
    alone = [_converged(squared_distances(one, one), epsilon) for one in (left, right)]
    return _converged(between, epsilon) - sum(alone) / 2


def _converged(cost: np.ndarray, epsilon: float) -> float:
    """The dual value of entropic transport between equal samples, by POT, where column sums are off by 1e-3 at most."""
    ot = _pot()
    rows, columns = cost.shape
    left, right = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    # Products with e^(-cost / epsilon) are ten times as fast as sums of exponentials, where float64 has them.
    direct = float(cost.max()) < _LARGEST_EXPONENT * epsilon
    method, names = ("sinkhorn", ("u", "v")) if direct else ("sinkhorn_log", ("log_u", "log_v"))
    # POT's error is a root of squares, which is at least the sum of sizes over the root of their number.
    threshold = 1e-3 / math.sqrt(columns)
    _, log = ot.sinkhorn(
        left, right, cost, epsilon, method=method, numItermax=5000, stopThr=threshold, log=True, warn=True
    )
    duals = [np.log(log[name]) if direct else log[name] for name in names]
    return epsilon * sum(float(np.mean(dual)) + math.log(len(dual)) for dual in duals)


_LARGEST_EXPONENT = 300  # of products of two, of which float64 has all digits


class Sinkhorn(NamedTuple):
    """Entropic transport cost."""

    cost: float  # the dual value, a lower bound: <a, f> + <b, g>, with KL to the product as regulariser
    iterations: int
    error: float  # sum of |column sums - 1 / B|: 0 where it has converged


def sinkhorn(cost: np.ndarray, *, epsilon: float = 1e-3, iterations: int = 2000, threshold: float = 1e-3) -> Sinkhorn:
    """Sinkhorn's iterations in the log domain between equal samples, from potentials of 0.

    At epsilon = 1e-3 and costs of order 10 these 2,000 iterations are far from converged: the value then says how near
    samples have neighbours in the other set, and little of how much mass each mode has, and is below `wasserstein`.
    It is the epsilon that code of published figures names, and does not use: see `sinkhorn_divergence`. `wasserstein`
    is the distance.

    Pairs whose share is below what float64 can see are left out: so it takes seconds for 2,000 samples, where the
    same iterations on all pairs take many minutes.

    Args:
        cost: float64 [A, B], squared distances.
        epsilon: of the entropy.
        iterations: at most so many, of both potentials each.
        threshold: stops where the error is below, looked at every 10 iterations.

    Source: Cuturi, arXiv 1306.0895; epsilon of Blessing et al., arXiv 2406.07423.
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
