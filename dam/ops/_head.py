"""A language-model head applied to a chunk of rows at a time, and its gradients: what the linear_* ops share.

The linear form of an op is the library matmul over chunks of rows, followed by the row-wise op of the
same backend, in place; no [T, V] array ever exists. 16-bit operands are multiplied in float32, a block of the
vocabulary at a time, so that logits are not rounded to 16 bits and no float32 copy of the head is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dam.ops import _rows

# Of the vocabulary rows that are converted at a time: of 0.5 to 128 MB, 4 MB were fastest on a CPU with 32 MB of cache.
_BLOCK_BYTES = 4 * 2**20


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the head in the accumulator's dtype, each valid until the next one is taken."""
    dtype = _rows.accumulator(weight.dtype)
    columns, width = weight.shape
    if weight.dtype == dtype:
        yield slice(0, columns), weight
        return
    step = max(1, _BLOCK_BYTES // max(1, width * dtype.itemsize))
    buffer = weight.new_empty(min(step, columns), width, dtype=dtype)
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        yield part, buffer[: part.stop - start].copy_(weight[part])


def chunks(rows: int, weight: Tensor, *, arrays: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Chunks of rows, with `arrays` arrays [chunk, V] in the accumulator's dtype that serve one chunk after another."""
    dtype = _rows.accumulator(weight.dtype)
    columns = weight.shape[0]
    memory: list[Tensor] = []
    for part in _rows.chunks(rows, arrays * columns * dtype.itemsize):
        size = part.stop - part.start
        if not memory:  # the first chunk is the largest
            memory = [weight.new_empty(size, columns, dtype=dtype) for _ in range(arrays)]
        yield part, [array[:size] for array in memory]


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden [n, D] @ weight [V, D]^T + bias [V] into `out`, in the accumulator's dtype."""
    hidden = hidden.to(out.dtype)
    for part, block in _blocks(weight):
        torch.mm(hidden, block.t(), out=out[:, part])
    return out if bias is None else out.add_(bias.to(out.dtype))


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
            for part, block in _blocks(self._weight):
                total.addmm_(grad_logits[:, part], block)
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
