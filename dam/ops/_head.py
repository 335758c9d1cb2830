"""A language-model head applied to a chunk of rows at a time, and its gradients: what the linear_* ops share.

The linear form of an op is the library matmul over chunks of rows, followed by the row-wise op of the
same backend; no [T, V] array ever exists. 16-bit operands are multiplied in float32, a block of the
vocabulary at a time, so that logits are not rounded to 16 bits and no float32 copy of the head is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dam.ops import _rows

_BLOCK = 8192  # vocabulary rows converted at a time; 128 MB at D = 4096


def _blocks(weight: Tensor) -> Iterator[slice]:
    step = weight.shape[0] if weight.dtype == _rows.accumulator(weight.dtype) else _BLOCK
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def chunks(rows: int, weight: Tensor, *, arrays: int) -> Iterator[slice]:
    """Chunks of rows for a loop that holds `arrays` arrays [chunk, V] at a time."""
    itemsize = _rows.accumulator(weight.dtype).itemsize
    return _rows.chunks(rows, arrays * weight.shape[0] * itemsize)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [n, D] @ weight [V, D]^T + bias [V] in the accumulator's dtype."""
    dtype = _rows.accumulator(hidden.dtype)
    hidden = hidden.to(dtype)
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for block in _blocks(weight):
        torch.mm(hidden, weight[block].to(dtype).t(), out=out[:, block])
    return out if bias is None else out.add_(bias.to(dtype))


class Gradients:
    """Gradients of hidden states, head weight and bias, accumulated over chunks; empty where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]):
        self._hidden, self._weight = hidden, weight
        dtype = _rows.accumulator(hidden.dtype)
        need_hidden, need_weight, need_bias = needed
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=dtype) if need_weight else None
        self.bias = weight.new_zeros(weight.shape[:1], dtype=dtype) if need_bias else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Adds what the gradient of the logits of these rows, [n, V] in the accumulator's dtype, contributes."""
        dtype = grad_logits.dtype
        if self.hidden is not None:
            total = grad_logits.new_zeros(grad_logits.shape[0], self._hidden.shape[1])
            for block in _blocks(self._weight):
                total.addmm_(grad_logits[:, block], self._weight[block].to(dtype))
            self.hidden[rows] = total
        if self.weight is not None:
            self.weight.addmm_(grad_logits.t(), self._hidden[rows].to(dtype))
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients in the dtype of the inputs."""
        return self._finished(self.hidden), self._finished(self.weight), self._finished(self.bias)

    def _finished(self, gradient: Tensor | None) -> Tensor:
        # Outputs of an operator must not alias each other, so an empty tensor each.
        return self._hidden.new_empty(0) if gradient is None else gradient.to(self._hidden.dtype)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients with the shapes that `Gradients.finish` returns."""
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        hidden.new_empty(weight.shape if needed[1] else (0,)),
        hidden.new_empty(weight.shape[:1] if needed[2] else (0,)),
    )
