"""adjoint_weights: path weights, reverse in time, and their normalisation over a group of trajectories."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, deferral, triton
from dam.ops import _checks, _op, _rows


class AdjointWeights(NamedTuple):
    """Weights of the K trajectories of each of G groups, and what tells whether to trust them."""

    weight: Tensor  # [G, K]
    log_path: Tensor  # [G, K, S + 1]
    log_normalizer: Tensor  # [G]
    ess: Tensor  # [G]
    clipped: Tensor  # [G]


def adjoint_weights(
    log_ratio: Tensor,  # [G, K, S]
    terminal_cost: Tensor,  # [G, K]
    *,
    escape_gap: Tensor | None = None,  # [G, K, S]
    clip: float | None = None,
    check: bool = True,
) -> AdjointWeights:
    """Accumulates path weights backward along each trajectory and normalises them over its group.

        log_path[g, k, s] = sum_{s' >= s} (log_ratio + escape_gap)[g, k, s'],     log_path[g, k, S] = 0
        l[g, k]           = log_path[g, k, 0] - terminal_cost[g, k]
        log_normalizer    = logsumexp_k l - log K                 (estimates -V at the group's start)
        weight            = exp(l - log_normalizer) = K softmax_k(l)                        (mean 1)
        ess               = (sum_k weight)^2 / sum_k weight^2

    All of it in log space and float64 inside. A group none of whose trajectories is feasible gets weight 0,
    ess 0 and log_normalizer -inf.

    Args:
        log_ratio: log u_base - log u at each jump [G, K, S]; zero for steps a trajectory did not take.
        terminal_cost: g(X_1) [G, K]; +inf forbids the outcome.
        escape_gap: model minus base escape rate, integrated over each step's time [G, K, S].
        clip: upper bound on l - log_normalizer, hence weights at most e^clip; the mean then falls below 1.
            None bounds nothing.
        check: raise if there is a NaN, or a trajectory's l is +inf; on a GPU that waits for the result, or in
            `dam.deferred_checks()` for all calls of a block at its end. With False what is returned of such a group is
            unspecified.

    Returns:
        AdjointWeights(weight, log_path, log_normalizer, ess, clipped); clipped is the fraction of a group's
        trajectories that `clip` touched. float32 (float64 for float64 log_ratio). Not differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or (with check) holds a NaN, or a
            trajectory's l is +inf; the message names the first such trajectory.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Prop. 2.4 and Eq. 13.
    """
    op = "adjoint_weights"
    _checks.floating(op, "log_ratio", log_ratio)
    if log_ratio.dim() != 3 or log_ratio.shape[1] < 1:
        raise ValueError(f"{op}: log_ratio must have shape [G, K, S] with K >= 1; got {list(log_ratio.shape)}")
    _checks.floating(op, "terminal_cost", terminal_cost)
    if terminal_cost.shape != log_ratio.shape[:2]:
        raise ValueError(
            f"{op}: terminal_cost must have shape {list(log_ratio.shape[:2])}; got {list(terminal_cost.shape)}"
        )
    _checks.same_device(op, "terminal_cost", terminal_cost, log_ratio)
    if escape_gap is not None:
        _checks.like(op, "escape_gap", escape_gap, "log_ratio", log_ratio)
        escape_gap = escape_gap.detach()
    if clip is not None and not (isinstance(clip, (int, float)) and math.isfinite(clip)):
        raise ValueError(f"{op}: clip must be a finite number or None; got {clip!r}")
    _checks.boolean(op, "check", check)
    backend = choice.choose(op, _IMPLEMENTATIONS, log_ratio)
    bound = None if clip is None else float(clip)
    given = log_ratio.detach(), terminal_cost.detach(), escape_gap, bound, check, backend
    return AdjointWeights(*_adjoint_weights(*given))


def _torch(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """The five outputs and the first trajectory, as g * K + k, that has no weight, or -1; with check it stops there."""
    groups, size, steps = log_ratio.shape
    weight, log_path, log_normalizer, ess, clipped = outputs(log_ratio)
    for part in _rows.chunks(groups, size * (steps + 1) * _rows.REFERENCE_BYTES):
        gain = log_ratio[part].double()
        if escape_gap is not None:
            gain = gain + escape_gap[part].double()
        path = torch.zeros((*gain.shape[:2], steps + 1), dtype=torch.float64, device=gain.device)
        path[..., :steps] = gain.flip(2).cumsum(2).flip(2)
        cost = terminal_cost[part].double()
        # An outcome of cost +inf is forbidden whatever its path weight, so inf - inf cannot arise.
        log_weight = torch.where(cost == torch.inf, -torch.inf, path[..., 0] - cost)
        bad = torch.isnan(path[..., 0]) | torch.isnan(cost) | ~(log_weight < torch.inf)
        if check and bool(bad.any()):
            first = int(bad.flatten().nonzero()[0])
            return weight, log_path, log_normalizer, ess, clipped, part.start * size + first
        # Relative to the largest first: at log weights of 10^16 and more, log K would be lost beside them.
        top = log_weight.amax(dim=1)
        shifted = torch.where(log_weight == -torch.inf, -torch.inf, log_weight - top[:, None])
        excess = torch.logsumexp(shifted, dim=1) - math.log(size)
        relative = torch.where(shifted == -torch.inf, -torch.inf, shifted - excess[:, None])
        normalizer = torch.where(top == -torch.inf, -torch.inf, top + excess)
        if clip is None:
            touched = torch.zeros_like(relative)
        else:
            touched = (relative > clip).double()
            relative = relative.clamp(max=clip)
        w = relative.exp()
        square = (w * w).sum(dim=1)
        weight[part], log_path[part], log_normalizer[part] = w, path, normalizer
        ess[part] = torch.where(square > 0, w.sum(dim=1).square() / square, 0.0)
        clipped[part] = touched.mean(dim=1)
    return weight, log_path, log_normalizer, ess, clipped, -1


def _cpu(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    results = outputs(log_ratio)
    log_ratio, cost = _rows.unit_inner_stride(log_ratio), terminal_cost.double().contiguous()
    gap = None if escape_gap is None else _rows.unit_inner_stride(escape_gap)
    groups, size, steps = log_ratio.shape
    weight, log_path, log_normalizer, ess, clipped = results
    bad = cpu.kernels.adjoint_weights(
        groups=groups,
        size=size,
        steps=steps,
        dtype=address.DTYPE_CODE[log_ratio.dtype],
        threads=torch.get_num_threads(),
        log_ratio=address.cube(log_ratio),
        escape_gap=address.cube(gap),
        terminal_cost=cost.data_ptr(),
        clip=math.inf if clip is None else clip,
        weight=weight.data_ptr(),
        log_path=log_path.data_ptr(),
        log_normalizer=log_normalizer.data_ptr(),
        ess=ess.data_ptr(),
        clipped=clipped.data_ptr(),
    )
    return *results, bad if check else -1


def _cuda(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int | Tensor]:
    groups, size, steps = log_ratio.shape
    results = outputs(log_ratio)
    log_ratio = _rows.unit_inner_stride(log_ratio)
    gap = None if escape_gap is None else _rows.unit_inner_stride(escape_gap)
    log_weight = log_ratio.new_empty((groups, size), dtype=torch.float64)
    cost = address.readable(terminal_cost)
    lowest_bad = cuda.lowest_bad(log_ratio, groups * size, True)  # the kernel puts it somewhere in any case
    weight, log_path, log_normalizer, ess, clipped = results
    cuda.kernels.adjoint_weights(
        groups=groups,
        size=size,
        steps=steps,
        dtype=address.DTYPE_CODE[log_ratio.dtype],
        log_ratio=address.cube(log_ratio),
        escape_gap=address.cube(gap),
        terminal_cost=address.values(cost),
        clip=math.inf if clip is None else clip,
        log_weight=log_weight.data_ptr(),
        weight=weight.data_ptr(),
        log_path=log_path.data_ptr(),
        log_normalizer=log_normalizer.data_ptr(),
        ess=ess.data_ptr(),
        clipped=clipped.data_ptr(),
        first_bad=address.of(lowest_bad),
        where=cuda.where(log_ratio),
    )
    return *results, cuda.unread(lowest_bad if check else None)


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("adjoint_weights"),
    "cuda": _cuda,
}


def outputs(log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised weight, log_path, log_normalizer, ess and clipped."""
    groups, size, steps = log_ratio.shape
    shapes = ((groups, size), (groups, size, steps + 1), (groups,), (groups,), (groups,))
    weight, log_path, log_normalizer, ess, clipped = (
        log_ratio.new_empty(shape, dtype=_rows.accumulator(log_ratio.dtype)) for shape in shapes
    )
    return weight, log_path, log_normalizer, ess, clipped


@_op.op("adjoint_weights")
def _adjoint_weights(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None, check: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = log_ratio.shape[1]
    *results, bad = _IMPLEMENTATIONS[backend](log_ratio, terminal_cost, escape_gap, clip, check)

    def later(bad: int) -> str:
        return (
            f"adjoint_weights: trajectory {bad % size} of group {bad // size} has no weight: its path or terminal_cost "
            "holds a NaN, or its log weight is +inf"
        )

    bad = deferral.first_bad(bad, terminal_cost.numel(), later)
    if bad >= 0:
        g, k = divmod(bad, size)
        gain = log_ratio[g, k].double()
        if escape_gap is not None:
            gain = gain + escape_gap[g, k].double()
        path, cost = float(gain.sum()), float(terminal_cost[g, k])
        raise ValueError(
            f"adjoint_weights: trajectory {k} of group {g} has log weight {path - cost}: path {path}, "
            f"terminal_cost {cost}"
        )
    weight, log_path, log_normalizer, ess, clipped = results
    return weight, log_path, log_normalizer, ess, clipped


@_adjoint_weights.register_fake
def _(log_ratio, terminal_cost, escape_gap, clip, check, backend):
    return outputs(log_ratio)
