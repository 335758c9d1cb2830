"""The Triton backend: launchers of dam.kernels, imported when an op first runs on it, and whether it can run."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dam.kernels.launch import INTERPRETED
from dam.ops import _head, _rows


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


# Looked up once, and as globals: torch.compile traces the choice of a backend.
_INSTALLED = _found("triton")
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"  # of the tensors that the kernels take


def launcher(op: str, name: str | None = None) -> Callable[..., Any]:
    """The function `name` (by default `op`) of dam.kernels.<op>, found at its first call: Triton takes a second."""

    def run(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"dam.kernels.{op}"), name or op)(*arguments, **options)

    return run


def why_unavailable() -> str | None:
    """Reason why no kernel can run here, or None."""
    if not _INSTALLED:
        return "Triton is not installed: pip install 'discrete-adjoint-matching[triton]'"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU, and TRITON_INTERPRET=1, which interprets the kernels on a CPU, is not set"


def backward_kolmogorov(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    from dam.ops import backward_kolmogorov as op  # which imports this module

    if duration == 0.0 or kind in ("low_rank", "dense"):  # a copy, or the library's matmuls
        return op._torch(terminal, kind, tensors, sizes, duration, tol, transpose)
    if kind != "lattice":
        mask_token = sizes[0] if kind == "absorbing" else None
        stays, moves = math.exp(-duration), -math.expm1(-duration)
        return launcher("backward_kolmogorov", "closed_form")(terminal, mask_token, stays, moves, transpose)
    walks = op.weighted_walks(terminal.shape[1], sizes, duration, tol)
    taps = _rows.on_device([weights for *_, weights in walks], terminal.device)
    walk = launcher("backward_kolmogorov", "Walk")
    steps = [walk(*of_dimension) for of_dimension in walks]
    return launcher("backward_kolmogorov", "lattice")(terminal, steps, taps, workspace=_rows.workspace_bytes() // 2)


# ---- ops that contain the matmul with a head
#
# Fused, no logits reach memory but those whose gradient is carried on. Chunked, the library multiplies and the row-wise
# kernels follow.


def _fused(op: str, head: _head.Head, key: str) -> bool:
    return launcher("head", "form_of")(op, head.hidden, head.weight.shape[0], key=key) == "fused"


def _library(head: _head.Head) -> Callable[[slice, slice, Tensor], Tensor]:
    def library(rows: slice, columns: slice, out: Tensor) -> Tensor:
        return _head.logits(head.part(rows, columns), out)

    return library


def linear_jump(head: _head.Head, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    return launcher("linear_jump")(head, *arguments, library=_library(head), workspace=_rows.workspace_bytes())


def linear_log_prob(head: _head.Head, *arguments: Any) -> tuple[Tensor, Tensor]:
    return launcher("linear_log_prob")(head, *arguments, library=_library(head), workspace=_rows.workspace_bytes())


def linear_log_prob_backward(
    grad: Tensor,
    head: _head.Head,
    target: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    temperature: float,
    needed: _head.Needed,
) -> tuple[Tensor, ...]:
    from dam.ops import linear_log_prob as op

    if not _fused("linear_log_prob", head, _gradient_form(needed)):
        return op.chunked_backward("triton", grad, head, target, log_escape, exclude, temperature, needed)
    rows = launcher("linear_log_prob", "rows_of")(grad, target, log_escape, exclude, temperature)
    return _fused_gradients("linear_log_prob", head, None, rows, temperature, needed)


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
    from dam.ops import linear_matching_loss as op

    arguments = (head, target, weight, base, base_weight, row_scale, exclude, normalized)
    if not _fused("linear_matching_loss", head, _gradient_form(needed) if any(needed) else "form"):
        return op.chunked("triton", *arguments, needed)
    if row_scale is None:
        count = head.hidden.shape[0]
        row_scale = head.hidden.new_full((count,), 1.0 / max(count, 1), dtype=torch.float64)
    row_loss, rows = launcher("linear_matching_loss")(
        head, target, weight, base, base_weight, row_scale, exclude, normalized, workspace=_rows.workspace_bytes()
    )
    gradients = _fused_gradients("linear_matching_loss", head, base, rows, 1.0, needed)
    return row_loss.sum().to(torch.float32), *gradients


def _gradient_form(needed: _head.Needed) -> str:
    """Name of the form of a gradient in the table: of one that goes on to the head, or to hidden states alone."""
    return "trained_form" if needed[1] else "frozen_form"


def _fused_gradients(
    op: str, head: _head.Head, base: _head.Head | None, of_rows: Any, temperature: float, needed: _head.Needed
) -> tuple[Tensor, ...]:
    """Chunks of the gradient of logits, each multiplied on by the library as soon as it is made."""
    gradients = _head.Gradients(head, needed)
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    if any(needed) and rows > 0:
        dtype = _head.gradient_dtype(head, "triton")
        # By columns where the head is trained, so that each of its rows gets its gradient in one product.
        along, across = (columns, rows) if needed[1] else (rows, columns)
        step = max(1, min(along, _rows.workspace_bytes() // (across * dtype.itemsize)))
        step -= step % 128 if step > 128 else 0  # whole blocks of a matmul
        memory = head.hidden.new_empty(step * across, dtype=dtype)
        gradient, scale = launcher("head", "gradient"), launcher("core", "scale_of")(temperature)
        for at in range(0, along, step):
            part = slice(at, min(at + step, along))
            chunk = (slice(0, rows), part) if needed[1] else (part, slice(0, columns))
            shape = [s.stop - s.start for s in chunk]
            out = memory[: shape[0] * shape[1]].view(shape)
            gradients.add(*chunk, gradient(op, head, base, of_rows, scale, *chunk, out))
    return gradients.finish()
