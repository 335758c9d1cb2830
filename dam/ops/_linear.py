"""What the linear ops share on GPUs: gradients of a head by columns in CUDA, and the fused form in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dam.backends import triton
from dam.kernels.excluded import Excluded
from dam.ops import _gradient, _head, _rows, _softcap


def gradients_by_columns(
    head: _head.Projection,
    base: _head.Projection | None,
    target: Tensor,  # [T, J]
    pull: Tensor,  # float64 [T, J]
    shares: Tensor,  # [T, SHARES]
    exclude: Excluded,
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
        _gradient.cuda_gradient(
            logits,
            base_logits,
            columns.start,
            target,
            pull,
            shares,
            exclude.columns(columns),
            temperature,
            gradient,
            target_gradient,
        )
        if head.softcap is not None:
            _softcap.differentiated(gradient, logits, head.softcap)
        gradients.add(rows, columns, gradient)
    return gradients.finish()


# ---- Triton: fused, no logits reach memory but those whose gradient is carried on; chunked, the library multiplies and
# the row-wise kernels follow


def fused(op: str, head: _head.Projection, needed: _head.Needed = (False,) * 5, arrays: int = 1) -> bool:
    """Whether the table of kernel sizes chooses the fused form, of values or of the gradients that are needed."""
    key = gradient_form(needed) if any(needed) else "form"
    form = triton.launcher("head", "form_of")(op, head.hidden, head.weight.shape[0], key=key)
    if form == "once":
        return _head.adds_chunks(head, needed, arrays=arrays, backend="triton")
    return form == "fused"


def library(head: _head.Projection) -> Callable[[slice, slice, Tensor], Tensor]:
    """What a chunked kernel calls for the logits of some rows and columns."""

    def multiply(rows: slice, columns: slice, out: Tensor) -> Tensor:
        return _head.logits(head.part(rows, columns), out)

    return multiply


def gradient_form(needed: _head.Needed) -> str:
    """Name of the form of a gradient in the table: of one that goes on to the head, or to hidden states alone."""
    return "trained_form" if needed[1] else "frozen_form"


def fused_gradients(
    op: str,
    head: _head.Projection,
    base: _head.Projection | None,
    of_rows: Any,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    """Chunks of the gradient of logits, each multiplied on by the library as soon as it is made."""
    gradients = _head.Gradients(head, needed)
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    if any(needed) and rows > 0:
        dtype = _head.gradient_dtype(head, "triton")
        # By columns where the head is trained, so that each of its rows gets its gradient in one product.
        along, across = (columns, rows) if needed[1] else (rows, columns)
        step = max(1, min(along, _rows.workspace_bytes(head.hidden.device) // (across * dtype.itemsize)))
        step -= step % 128 if step > 128 else 0  # whole blocks of a matmul
        memory = head.hidden.new_empty(step * across, dtype=dtype)
        gradient, scale = triton.launcher("head", "gradient"), triton.launcher("core", "scale_of")(temperature)
        for at in range(0, along, step):
            part = slice(at, min(at + step, along))
            chunk = (slice(0, rows), part) if needed[1] else (part, slice(0, columns))
            shape = [s.stop - s.start for s in chunk]
            out = memory[: shape[0] * shape[1]].view(shape)
            gradients.add(*chunk, gradient(op, head, base, of_rows, scale, *chunk, out))
    return gradients.finish()
