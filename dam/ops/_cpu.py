"""The C++ backend: hands tensors to dam._cpu as addresses, sizes and strides. Arguments were checked by the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dam.ops import _rows

try:
    # After torch, so that it joins the OpenMP thread pool that torch has loaded.
    from dam import _cpu as _kernels  # type: ignore[attr-defined]
except ImportError:
    _kernels = None  # type: ignore[assignment]  # dam.ops._backend says why and offers no "cpu" backend

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    rows, columns = x.shape
    return x.data_ptr(), rows, columns, x.stride(0), _DTYPE_CODE[x.dtype]


def _indices(x: Tensor | None) -> tuple[int, int]:
    """Address and stride of int64 [T]; (0, 0) for none."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def jump(
    logits: Tensor,
    exclude: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    from dam.ops import jump as op  # jump imports this module

    target, log_prob, log_escape = op.outputs(logits, logits.shape[0], num_samples)
    bad_row = _kernels.jump(
        *_matrix(logits),
        *_indices(exclude),
        *_indices(row_ids),
        temperature,
        num_samples,
        int(seed) % 2**64,
        target.data_ptr(),
        log_prob.data_ptr(),
        log_escape.data_ptr(),
        torch.get_num_threads(),
    )
    return target, log_prob, log_escape, bad_row if check else -1


def log_prob(logits: Tensor, target: Tensor, exclude: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    from dam.ops import log_prob as op

    value, log_escape = op.outputs(logits, target)
    target = target.contiguous()
    _kernels.log_prob(
        *_matrix(logits),
        *_indices(exclude),
        temperature,
        target.data_ptr(),
        target.shape[1],
        value.data_ptr(),
        log_escape.data_ptr(),
        torch.get_num_threads(),
    )
    return value, log_escape


def log_prob_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    temperature: float,
    into: Tensor | None = None,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    # Held by names: the kernel sees addresses only.
    target, upstream, log_escape = target.contiguous(), grad.double().contiguous(), log_escape.double().contiguous()
    _kernels.log_prob_backward(
        *_matrix(logits),
        *_indices(exclude),
        temperature,
        target.data_ptr(),
        target.shape[1],
        upstream.data_ptr(),
        log_escape.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    return gradient


def matching_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    base_logits: Tensor | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Tensor | None,
    normalized: bool,
    with_grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from dam.ops import matching_loss as op

    rows = logits.shape[0]
    loss, gradient = op.outputs(logits, with_grad, into)
    target, weight = target.contiguous(), weight.double().contiguous()
    scale = (
        torch.full((rows,), 1.0 / max(rows, 1), dtype=torch.float64)
        if row_scale is None
        else row_scale.double().contiguous()
    )
    base_weight = None if base_weight is None else base_weight.double().contiguous()
    total = _kernels.matching_loss(
        *_matrix(logits),
        0 if base_logits is None else base_logits.data_ptr(),
        0 if base_logits is None else base_logits.stride(0),
        *_indices(exclude),
        target.data_ptr(),
        target.shape[1],
        weight.data_ptr(),
        0 if base_weight is None else base_weight.data_ptr(),
        scale.data_ptr(),
        normalized,
        gradient.data_ptr() if with_grad else 0,
        torch.get_num_threads(),
    )
    # Through float64: fill_ refuses a sum beyond float32 where a conversion gives inf.
    return loss.copy_(torch.tensor(total, dtype=torch.float64)), gradient


def rate_ratio(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    from dam.ops import rate_ratio as op

    log_ratio, escape_gap = op.outputs(logits, target)
    target = target.contiguous()
    _kernels.rate_ratio(
        *_matrix(logits),
        base_logits.data_ptr(),
        base_logits.stride(0),
        *_indices(exclude),
        target.data_ptr(),
        target.shape[1],
        log_ratio.data_ptr(),
        escape_gap.data_ptr(),
        torch.get_num_threads(),
    )
    return log_ratio, escape_gap


def adjoint_weights(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    from dam.ops import adjoint_weights as op

    outputs = op.outputs(log_ratio)
    log_ratio, cost = _rows.unit_inner_stride(log_ratio), terminal_cost.double().contiguous()
    gap = None if escape_gap is None else _rows.unit_inner_stride(escape_gap)
    bad = _kernels.adjoint_weights(
        log_ratio.data_ptr(),
        *log_ratio.shape,
        log_ratio.stride(0),
        log_ratio.stride(1),
        _DTYPE_CODE[log_ratio.dtype],
        *((0, 0, 0) if gap is None else (gap.data_ptr(), gap.stride(0), gap.stride(1))),
        cost.data_ptr(),
        math.inf if clip is None else clip,
        *(output.data_ptr() for output in outputs),
        torch.get_num_threads(),
    )
    return *outputs, bad


def tilt_to_ess(reward: Tensor, ess: float, max_tilt: float) -> tuple[Tensor, int]:
    from dam.ops import tilt_to_ess as op

    tilt, reward = op.outputs(reward), reward.double().contiguous()
    bad = _kernels.tilt_to_ess(
        reward.data_ptr(), *reward.shape, ess, max_tilt, tilt.data_ptr(), torch.get_num_threads()
    )
    return tilt, bad


def backward_kolmogorov(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    from dam.ops import backward_kolmogorov as op

    if kind not in ("uniform", "absorbing") or duration == 0.0:
        return op.in_float64(terminal, kind, tensors, sizes, duration, tol, transpose, _filter_lines)
    result = op.outputs(terminal)
    _kernels.closed_form(
        *_matrix(terminal),
        sizes[0] if kind == "absorbing" else -1,
        math.exp(-duration),
        -math.expm1(-duration),
        transpose,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def _filter_lines(lines: Tensor, periodic: bool, taps: list[float]) -> Tensor:
    lines = lines.contiguous()
    result = torch.empty_like(lines)
    _kernels.filter_lines(lines.data_ptr(), *lines.shape, periodic, taps, result.data_ptr(), torch.get_num_threads())
    return result


def isa() -> str:
    """Instruction set that the kernels run with: avx512, avx2 or plain."""
    return _kernels.isa()
