"""The CUDA backend: hands tensors to dam._cuda as addresses, sizes and strides, on torch's current stream.

Work memory comes from torch's allocator, and nothing waits for the device but where a result says that an argument was
wrong; so calls can be captured in a CUDA graph. With DAM_EMULATE_CUDA=1 the same kernels run on CPU tensors, in
dam._cuda_emulated.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import torch
from torch import Tensor

from dam.ops import _head, _rows

EMULATED = os.environ.get("DAM_EMULATE_CUDA") == "1"
DEVICE_TYPE = "cpu" if EMULATED else "cuda"  # of the tensors that the kernels take
MODULE = "dam._cuda_emulated" if EMULATED else "dam._cuda"

_kernels: Any = None
_IMPORT_ERROR: str | None = None
try:
    _kernels = importlib.import_module(MODULE)
except ImportError as error:
    _IMPORT_ERROR = str(error)

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ABSENT_MATRIX = _ABSENT_INDICES = (0, 0)
_ABSENT_VALUES = (0, 0, 0, 0)
_ABSENT_CUBE = (0, 0, 0)
# float64 states between the dimensions of a lattice, which should stay in the L2 cache.
_LATTICE_CHUNK_BYTES = 32 * 2**20


def why_unavailable() -> str | None:
    """Reason why no kernel can run here, or None."""
    if _IMPORT_ERROR is not None:
        how = "installed from its sources with DAM_EMULATE_CUDA=1" if EMULATED else "installed where nvcc is found"
        return f"{MODULE} does not import ({_IMPORT_ERROR}); it is built when dam is {how}"
    if EMULATED:
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm; dam._cuda takes NVIDIA GPUs"
    return None if torch.cuda.is_available() else "torch sees no GPU"


# ---- tensors as tuples; a tensor must be held by a name until the call is made


def _where(x: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    if EMULATED:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _shape(x: Tensor) -> tuple[int, int, int]:
    return *x.shape, _DTYPE_CODE[x.dtype]  # type: ignore[return-value]


def _matrix(x: Tensor | None) -> tuple[int, int]:
    return _ABSENT_MATRIX if x is None else (x.data_ptr(), x.stride(0))


def _indices(x: Tensor | None) -> tuple[int, int]:
    return _ABSENT_INDICES if x is None else (x.data_ptr(), x.stride(0))


def _targets(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]


def _readable(x: Tensor | None) -> Tensor | None:
    """Numbers of a dtype that the kernels read."""
    return x if x is None or x.dtype in _DTYPE_CODE else x.double()


def _values(x: Tensor | None) -> tuple[int, int, int, int]:
    if x is None:
        return _ABSENT_VALUES
    return x.data_ptr(), _DTYPE_CODE[x.dtype], x.stride(0), x.stride(1) if x.dim() == 2 else 0


def _cube(x: Tensor | None) -> tuple[int, int, int]:
    return _ABSENT_CUBE if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _summaries(like: Tensor, arrays: int, rows: int) -> Tensor:
    return like.new_empty(_kernels.summary_floats(arrays, rows, like.shape[1]), dtype=torch.float32)


class _FirstBad:
    """The least index of what no result can be given for, found by kernels."""

    def __init__(self, like: Tensor, count: int):
        self.count = count
        self.lowest = torch.full((), count, dtype=torch.int64, device=like.device)

    def read(self) -> int:
        """The index, or -1. Waits for the kernels; under capture in a CUDA graph there is nothing to wait for."""
        if not EMULATED and torch.cuda.is_current_stream_capturing():
            return -1
        bad = int(self.lowest)
        return bad if bad < self.count else -1


# ---- the ops


def _seed(seed: Tensor, logits: Tensor) -> tuple[int, int]:
    """Address of a seed on the device, which stays there, and the seed where it is not."""
    if seed.device == logits.device and not EMULATED:
        return seed.data_ptr(), 0
    return 0, int(seed) % 2**64


def _draw(
    logits: Tensor,
    exclude: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: tuple[int, int],
    row_ids: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],  # contiguous
    first_bad: _FirstBad | None,
    first_row: int = 0,
) -> None:
    summaries = _summaries(logits, _kernels.ROW_SUMMARIES, logits.shape[0])
    _kernels.jump(
        _shape(logits),
        _matrix(logits),
        _indices(exclude),
        _indices(row_ids),
        temperature,
        num_samples,
        *seed,
        summaries.data_ptr(),
        *(x.data_ptr() for x in out),
        0 if first_bad is None else first_bad.lowest.data_ptr(),
        first_row,
        _where(logits),
    )


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

    out = op.outputs(logits, logits.shape[0], num_samples)
    first_bad = _FirstBad(logits, logits.shape[0]) if check else None
    _draw(logits, exclude, temperature, num_samples, _seed(seed, logits), row_ids, out, first_bad)
    return *out, -1 if first_bad is None else first_bad.read()


def linear_jump(
    head: _head.Head,
    exclude: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Library matmuls over chunks of rows, with a draw after each; whether a row is bad is asked once, at the end."""
    from dam.ops import jump as op

    rows = head.hidden.shape[0]
    out = op.outputs(head.hidden, rows, num_samples)
    first_bad = _FirstBad(head.hidden, rows) if check else None
    key = _seed(seed, head.hidden)
    ids = torch.arange(rows, device=head.hidden.device) if row_ids is None else row_ids
    for part, (memory,) in _head.chunks(rows, head.weight, arrays=1, backend="cuda"):
        logits = _head.logits(head.part(part), memory)
        target, log_prob, log_escape = (x[part] for x in out)
        _draw(
            logits,
            None if exclude is None else exclude[part],
            temperature,
            num_samples,
            key,
            ids[part],
            (target, log_prob, log_escape),
            first_bad,
            part.start,
        )
    return *out, -1 if first_bad is None else first_bad.read()


def log_prob(logits: Tensor, target: Tensor, exclude: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    from dam.ops import log_prob as op

    value, log_escape = op.outputs(logits, target)
    summaries = _summaries(logits, _kernels.ROW_SUMMARIES, logits.shape[0])
    _kernels.log_prob(
        _shape(logits),
        _matrix(logits),
        _indices(exclude),
        temperature,
        _targets(target),
        summaries.data_ptr(),
        value.data_ptr(),
        log_escape.data_ptr(),
        _where(logits),
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
    log_escape = log_escape.double().contiguous()
    target_gradient = grad.new_empty(grad.shape, dtype=torch.float32)
    _kernels.log_prob_backward(
        _shape(logits),
        _matrix(logits),
        _indices(exclude),
        temperature,
        _targets(target),
        _values(grad),
        log_escape.data_ptr(),
        target_gradient.data_ptr(),
        _matrix(gradient),
        _DTYPE_CODE[gradient.dtype],
        _where(logits),
    )
    return gradient


def linear_log_prob_backward(
    grad: Tensor,
    head: _head.Head,
    target: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """By rows, or by columns where the head is trained and the rows do not fit one chunk."""
    from dam.ops import linear_log_prob as op

    if not _head.by_columns(head, needed, 1, _head.gradient_dtype(head, "cuda")):
        return op.chunked_backward("cuda", grad, head, target, log_escape, exclude, temperature, needed)
    pull = -grad.double() / temperature
    counted = target >= 0 if exclude is None else (target >= 0) & (target != exclude[:, None])
    largest = torch.finfo(torch.float32).max
    coefficient = torch.where(counted, pull, 0.0).sum(dim=1).clamp(-largest, largest).float()
    reference = log_escape.double() * temperature
    high = reference.float()
    nothing = torch.zeros_like(high)
    shares = torch.stack((coefficient, high, (reference - high).float(), nothing, nothing, nothing), dim=1)
    return _gradients_by_columns(head, None, target, pull, shares, exclude, temperature, needed)


def _gradients_by_columns(
    head: _head.Head,
    base: _head.Head | None,
    target: Tensor,  # [T, J]
    pull: Tensor,  # float64 [T, J]
    shares: Tensor,  # [T, SHARES]
    exclude: Tensor | None,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """Gradients of a head's tensors from what the gradient of logits depends on: the logits again, and with them it."""
    gradients, rows = _head.Gradients(head, needed), slice(0, head.hidden.shape[0])
    target_gradient = pull.new_empty(pull.shape, dtype=torch.float32)
    arrays, dtype = 1 if base is None else 2, _head.gradient_dtype(head, "cuda")
    for columns, memory, gradient in _head.column_chunks(head, arrays=arrays, gradient=dtype):
        logits = _head.logits(head.part(rows, columns), memory[0])
        base_logits = None if base is None else _head.logits(base.part(rows, columns), memory[1])
        _kernels.gradient(
            _shape(logits),
            _matrix(logits),
            _matrix(base_logits),
            columns.start,
            _indices(exclude),
            _targets(target),
            _values(pull),
            shares.data_ptr(),
            temperature,
            target_gradient.data_ptr(),
            _matrix(gradient),
            _DTYPE_CODE[gradient.dtype],
            _where(logits),
        )
        gradients.add(rows, columns, gradient)
    return gradients.finish()


def rate_ratio(logits: Tensor, base_logits: Tensor, target: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    from dam.ops import rate_ratio as op

    log_ratio, escape_gap = op.outputs(logits, target)
    summaries = _summaries(logits, 2 * _kernels.ROW_SUMMARIES, logits.shape[0])
    _kernels.rate_ratio(
        _shape(logits),
        _matrix(logits),
        _matrix(base_logits),
        _indices(exclude),
        _targets(target),
        summaries.data_ptr(),
        log_ratio.data_ptr(),
        escape_gap.data_ptr(),
        _where(logits),
    )
    return log_ratio, escape_gap


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
    shares: Tensor | None = None,  # [T, SHARES]; filled with what the gradient depends on
) -> tuple[Tensor, Tensor]:
    from dam.ops import matching_loss as op

    rows = logits.shape[0]
    numbers = tuple(_readable(x) for x in (weight, base_weight, row_scale))
    _, gradient = op.outputs(logits, with_grad, into)
    arrays = _kernels.ROW_SUMMARIES if base_logits is None else _kernels.BASE_SUMMARIES
    summaries = _summaries(logits, arrays, rows)
    target_logit = logits.new_empty(target.shape, dtype=torch.float32)
    row_loss = logits.new_empty((rows,), dtype=torch.float64)
    _kernels.matching_loss(
        _shape(logits),
        _matrix(logits),
        _matrix(base_logits),
        _indices(exclude),
        _targets(target),
        *(_values(x) for x in numbers),
        normalized,
        summaries.data_ptr(),
        target_logit.data_ptr(),
        row_loss.data_ptr(),
        _matrix(gradient) if with_grad else _ABSENT_MATRIX,
        _DTYPE_CODE[gradient.dtype],
        0 if shares is None else shares.data_ptr(),
        _where(logits),
    )
    return row_loss.sum().to(torch.float32), gradient


def linear_matching_loss(
    head: _head.Head,
    target: Tensor,
    weight: Tensor,
    base: _head.Head | None,
    base_weight: Tensor | None,
    row_scale: Tensor | None,
    exclude: Tensor | None,
    normalized: bool,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """By rows; the gradient of a trained head in a second pass by columns, where the rows do not fit one chunk."""
    from dam.ops import linear_matching_loss as op

    arguments = (head, target, weight, base, base_weight, row_scale, exclude, normalized)
    if not _head.by_columns(head, needed, 1 if base is None else 2, _head.gradient_dtype(head, "cuda")):
        return op.chunked("cuda", *arguments, needed)
    rows = head.hidden.shape[0]
    shares = head.hidden.new_empty((rows, _kernels.SHARES), dtype=torch.float32)
    loss, *_ = op.chunked("cuda", *arguments, (False,) * 5, shares)
    scale = 1.0 / rows if row_scale is None else row_scale.double()[:, None]
    return loss, *_gradients_by_columns(head, base, target, weight.double() * scale, shares, exclude, 1.0, needed)


def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in place, without waiting for the device to learn the factor."""
    kept = _readable(factor.reshape(1))
    _kernels.scale(gradient.data_ptr(), _DTYPE_CODE[gradient.dtype], gradient.numel(), _values(kept), _where(gradient))
    return gradient


def adjoint_weights(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    from dam.ops import adjoint_weights as op

    groups, size, steps = log_ratio.shape
    outputs = op.outputs(log_ratio)
    log_ratio = _rows.unit_inner_stride(log_ratio)
    gap = None if escape_gap is None else _rows.unit_inner_stride(escape_gap)
    log_weight = log_ratio.new_empty((groups, size), dtype=torch.float64)
    cost = _readable(terminal_cost)
    first_bad = _FirstBad(log_ratio, groups * size)
    _kernels.adjoint_weights(
        groups,
        size,
        steps,
        _DTYPE_CODE[log_ratio.dtype],
        _cube(log_ratio),
        _cube(gap),
        _values(cost),
        math.inf if clip is None else clip,
        log_weight.data_ptr(),
        *(output.data_ptr() for output in outputs),
        first_bad.lowest.data_ptr(),
        _where(log_ratio),
    )
    return *outputs, first_bad.read()


def tilt_to_ess(reward: Tensor, ess: float, max_tilt: float) -> tuple[Tensor, int]:
    from dam.ops import tilt_to_ess as op

    tilt = op.outputs(reward)
    first_bad = _FirstBad(reward, reward.numel())
    _kernels.tilt_to_ess(
        *reward.shape, _values(reward), ess, max_tilt, tilt.data_ptr(), first_bad.lowest.data_ptr(), _where(reward)
    )
    return tilt, first_bad.read()


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

    if duration == 0.0 or kind in ("low_rank", "dense"):  # a copy, or the library's matmuls
        return op._torch(terminal, kind, tensors, sizes, duration, tol, transpose)
    if kind == "lattice":
        return _lattice(terminal, op.weighted_walks(terminal.shape[1], sizes, duration, tol))
    rows, columns = terminal.shape
    result = op.outputs(terminal)
    totals = terminal.new_empty(_kernels.summary_floats(1, rows, columns), dtype=torch.float64)
    _kernels.closed_form(
        _shape(terminal),
        _matrix(terminal),
        sizes[0] if kind == "absorbing" else -1,
        math.exp(-duration),
        -math.expm1(-duration),
        transpose,
        totals.data_ptr(),
        result.data_ptr(),
        _where(terminal),
    )
    return result


def _lattice(terminal: Tensor, walks: list[tuple[int, int, bool, list[float]]]) -> Tensor:
    from dam.ops import backward_kolmogorov as op

    rows, columns = terminal.shape
    result = op.outputs(terminal)
    # Few go with the launch: a copy to the device could not be part of a CUDA graph, which reads the host when it runs.
    few = all(len(weights) <= _kernels.FEW_TAPS for *_, weights in walks)
    taps = None if few else _rows.on_device([weights for *_, weights in walks], terminal.device)
    not_finite = torch.zeros(rows, dtype=torch.int32, device=terminal.device)
    buffers = min(len(walks) - 1, 2)
    memory = min(_LATTICE_CHUNK_BYTES, _rows.workspace_bytes() // 2)
    step = max(1, memory // (buffers * columns * 8)) if buffers > 0 else max(1, rows)
    states = terminal.new_empty((buffers, min(step, rows), columns), dtype=torch.float64)
    where = _where(terminal)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        source = terminal[part]
        for i, (length, inner, periodic, weights) in enumerate(walks):
            last = i == len(walks) - 1
            target = result[part] if last else states[i % 2][: part.stop - start]
            _kernels.walk(
                part.stop - start,
                columns,
                length,
                inner,
                periodic,
                0 if taps is None else taps[i].data_ptr(),
                weights if taps is None else [],
                len(weights) - 1,
                _matrix(source),
                _DTYPE_CODE[source.dtype],
                target.data_ptr(),
                not last,
                not_finite[part].data_ptr(),
                where,
            )
            source = target
    _kernels.fill_with_nan(rows, columns, not_finite.data_ptr(), result.data_ptr(), where)
    return result
