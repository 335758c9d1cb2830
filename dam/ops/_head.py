"""A language-model head applied to a chunk of rows at a time, and its gradients: what the linear_* ops share.

The chunked form of a linear op is the library matmul over chunks of rows, followed by the row-wise op of the
same backend; no [T, V] array of logits ever exists, and one of their gradient only where `form` says so. Products of
16-bit operands are left in float32, so that logits are not rounded to 16 bits: on a CPU they are the C++ backend's own,
or without it torch's, of blocks of the vocabulary that are converted, so that no float32 copy of the head is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.backends import cpu
from dam.kernels import forms
from dam.kernels.projection import Projection
from dam.ops import _checks, _memory, _rows, _softcap

# Of the vocabulary rows that are converted at a time: of 0.5 to 128 MB, 4 MB were fastest on a CPU with 32 MB of cache.
_BLOCK_BYTES = 4 * 2**20
_ON_GPU = ("triton", "cuda")  # backends
# Rows of a chunk from which on adding to the head's gradient costs less than computing the logits again: of each of its
# entries 8 bytes at 3 TB/s, beside 2 operations a row at 760 TFLOP/s, as an H100 has them.
_MANY_ROWS = 1024
# Rows up to which the C++ backend's product by float32's instructions is faster on a CPU than converting the head for
# torch's: of 128 it took 0.6 of that time, of 1,024 1.2 (benchmarks/products.py, AVX-512).
_WIDENED_ROWS = 512
# Whether a product of 16-bit numbers can be added to a float32 array: in torch 2.11 and later.
_ADDS_PRODUCTS = hasattr(torch.ops.aten.addmm, "dtype_out") and tuple(map(int, torch.__version__.split(".")[:2])) >= (
    2,
    11,
)


class LoRA(NamedTuple):
    """A low-rank adapter on a head: its weight is weight + scale * b @ a, which is never formed.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """

    a: Tensor  # [R, D]
    b: Tensor  # [V, R]
    scale: float = 1.0


class Head(NamedTuple):
    """The output layer of a model: x = hidden @ (weight + lora's product)^T + bias; logits = x, or soft-capped."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora: LoRA | None = None
    softcap: float | None = None  # logits = softcap * tanh(x / softcap)

    def to(self, dtype: torch.dtype) -> Head:
        """The head in the dtype of the hidden states, which autocast may have changed."""
        lora = None if self.lora is None else LoRA(self.lora.a.to(dtype), self.lora.b.to(dtype), self.lora.scale)
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), lora, self.softcap)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a linear op takes of the head besides hidden states of that dtype: the one place that says how."""
        head = self.to(dtype)
        return {"head_weight": head.weight, "bias": head.bias, "lora": head.lora, "softcap": head.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [..., V] of hidden states [..., D], as the linear ops make them; not differentiable.

        For comparisons: this is the array that the ops never make. float32, float64 for float64 hidden states.
        """
        with torch.no_grad():
            rows = hidden.reshape(-1, hidden.shape[-1])
            out = rows.new_empty((rows.shape[0], self.weight.shape[0]), dtype=_rows.accumulator(rows.dtype))
            logits(checked("Head.logits", rows, *self.to(rows.dtype)), out)
        return out.view(*hidden.shape[:-1], -1)


def checked(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None = None,
    softcap: float | None = None,
    names: tuple[str, str, str, str] = ("hidden", "head_weight", "bias", "softcap"),
    *,
    least: int = 1,
) -> Projection:
    """The arguments of a linear op, hidden states as [T, D], as a `Projection`, once they fit each other.

    The head has at least so many rows.
    """
    _checks.head(op, names[1], weight, names[2], bias, names[0], hidden, least=least)
    if softcap is not None:  # in a range whose squares float32 has
        softcap = _checks.number(op, names[3], softcap, 1e-15, 1e15)
    if lora is None:
        return Projection(hidden, weight, bias, softcap=softcap)
    if not isinstance(lora, LoRA):
        raise TypeError(f"{op}: lora must be a dam.LoRA or None; got {type(lora).__name__}")
    scale = _checks.number(op, "lora.scale", lora.scale, -1e30, 1e30)
    _checks.matrix(op, "lora.a", lora.a, "D")
    _checks.like(op, "lora.a", lora.a, names[0], hidden, shape=False)
    _checks.matrix(op, "lora.b", lora.b, "R")
    _checks.like(op, "lora.b", lora.b, names[0], hidden, shape=False)
    wanted = ((lora.a.shape[0], hidden.shape[1]), (weight.shape[0], lora.a.shape[0]))
    for name, factor, shape in zip(("a", "b"), (lora.a, lora.b), wanted, strict=True):
        if factor.shape != shape:
            raise ValueError(f"{op}: lora.{name} must have shape {list(shape)}; got {list(factor.shape)}")
    # In the dtype of the operands, as inside the ops. A tensor without data has no autocast to switch off.
    with contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
        low_hidden = (hidden @ lora.a.t()) * scale
    return Projection(hidden, weight, bias, low_hidden, lora.b, softcap)


def at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor | None:
    """The logits of an `_op.at_once` call where its tensors fit and few logits are made, in one chunk; else None."""
    if softcap is not None or not cpu.kernels.takes_head(hidden, weight, bias):
        return None
    out = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    _products(Projection(hidden, weight, bias), out)  # as in an op, into an array that autocast leaves alone
    return out


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of a head in the accumulator's dtype, each valid until the next one is taken."""
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


def _dtypes(head: Projection, arrays: int, gradient: torch.dtype | None, backend: str) -> list[torch.dtype]:
    """Of arrays of logits, and of their gradient if that does not take the place of the first."""
    dtypes = [_rows.accumulator(head.weight.dtype)] * arrays
    apart = head.softcap is not None and backend in _ON_GPU
    if gradient is None or (gradient == dtypes[0] and not apart):
        return dtypes
    return [*dtypes, gradient]


def _steps(length: int, bytes_per_step: int, device: torch.device) -> list[slice]:
    """Parts whose arrays fit the workspace on a GPU: of equal size but the last, and whole blocks of a matmul."""
    step = max(1, min(length, _rows.workspace_bytes(device) // max(1, bytes_per_step)))
    if step < length:
        step -= step % next((block for block in (1024, 64) if step >= block), 1)
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def _row_parts(head: Projection, rows: int, dtypes: list[torch.dtype], backend: str) -> list[slice]:
    """Chunks of so many rows whose arrays of these dtypes fit the workspace."""
    bytes_per_row = head.weight.shape[0] * sum(dtype.itemsize for dtype in dtypes)
    if backend in _ON_GPU:
        return _steps(rows, bytes_per_row, head.weight.device)
    return list(_rows.chunks(rows, bytes_per_row))


def chunks(
    head: Projection,
    *,
    arrays: int,
    backend: str,
    gradient: torch.dtype | None = None,
    held: Tensor | None = None,  # [., V]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Chunks of rows, with `arrays` arrays [chunk, V] in the accumulator's dtype that serve one chunk after another.

    One more array follows for the gradient of the logits, if that has another dtype, or on a GPU goes on through a soft
    cap and so needs the logits beside it; see `blocks`. If `held` is given, an array of that gradient for as many rows
    at a time, then what the gradient goes into, the last array or the first, is the chunk's part of it.
    """
    forms.asked(backend)  # an error at the first call, also of what has one form only
    weight = head.weight
    dtypes = _dtypes(head, arrays, gradient, backend)
    at = len(dtypes) - 1 if len(dtypes) > arrays else 0  # of the gradient's array
    own = dtypes if held is None else dtypes[:at] + dtypes[at + 1 :]
    rows, columns = head.hidden.shape[0], weight.shape[0]
    most = max(1, rows if held is None else held.shape[0])
    pieces = [
        (first, piece)
        for first in range(0, rows, most)
        for piece in _row_parts(head, min(most, rows - first), own, backend)
    ]
    if not pieces:
        return
    largest = pieces[0][1].stop
    with _memory.work_arrays((largest, columns), own, weight.device) as memory:
        for first, piece in pieces:
            found = [_rows.part(array, slice(0, piece.stop - piece.start)) for array in memory]
            if held is not None:
                found.insert(at, held[piece])
            yield slice(first + piece.start, first + piece.stop), found


def form(head: Projection, needed: Needed, *, arrays: int, backend: str) -> str:
    """How the gradients of a head's tensors are made of that of the logits: as DAM_LINEAR_FORM says, else the fastest.

    "rows": of each chunk of rows as it comes; every chunk but a single one adds to a float32 gradient as large as the
    head. "whole": chunks of rows write the gradient of all logits, [T, V] in `gradient_dtype`, and each tensor gets its
    own in one product; or of as many rows at a time as may be held, which then are added. "columns": so do chunks of
    columns, one for each, but logits whose sums must be known first are computed twice; in CUDA only.
    """
    asked = forms.asked(backend)
    if not any(needed):
        return "rows"
    if asked in forms.OF_GRADIENTS:
        return asked
    if not needed[1]:
        return "rows"
    rows, dtype, weight = head.hidden.shape[0], gradient_dtype(head, backend), head.weight
    parts = _row_parts(head, rows, _dtypes(head, arrays, dtype, backend), backend)
    if len(parts) <= 1:
        return "rows"
    # Else nothing is added in another dtype, or all that is held is converted before it is multiplied.
    if weight.dtype != _rows.accumulator(weight.dtype) and (dtype == weight.dtype or backend == "cpu"):
        held = _held_rows(head, dtype)
        if held == rows or (backend in _ON_GPU and held >= max(_MANY_ROWS, 2 * parts[0].stop)):
            return "whole"
    return "columns" if backend == "cuda" and parts[0].stop < _MANY_ROWS else "rows"


def adds_chunks(head: Projection, needed: Needed, *, arrays: int, backend: str) -> bool:
    """Whether the gradient of a trained head would be a sum over chunks of rows, one for each."""
    if not needed[1] or form(head, needed, arrays=arrays, backend=backend) != "rows":
        return False
    dtypes = _dtypes(head, arrays, gradient_dtype(head, backend), backend)
    return len(_row_parts(head, head.hidden.shape[0], dtypes, backend)) > 1


def _held_rows(head: Projection, dtype: torch.dtype) -> int:
    """Rows of which "whole" holds the gradient of logits at a time, all or equal parts of them.

    In as many bytes as the workspace, or as the head's gradient would take in float32.
    """
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    limit = max(_rows.workspace_bytes(head.weight.device), 4 * head.weight.numel())
    most = max(1, limit // (columns * dtype.itemsize))
    if most >= rows:
        return rows
    block = 64 if most >= 64 else 1  # of a matmul
    most -= most % block
    each = -(-rows // -(-rows // most))
    return each + -each % block


def keeps_logits(head: Projection, needed: Needed, backend: str) -> bool:
    """Whether logits are few enough to be kept for a backward pass: with their gradient, half of a CPU's workspace.

    Not where DAM_LINEAR_FORM asks for one of the gradient's forms, which compute them again.
    """
    if forms.asked(backend) in forms.OF_GRADIENTS:
        return False
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    dtypes = (_rows.accumulator(head.weight.dtype), gradient_dtype(head, backend))
    fit = rows * columns * sum(dtype.itemsize for dtype in dtypes) <= _rows.workspace_bytes() // 2
    return any(needed) and fit and rows > 0


def held_for(head: Projection, needed: Needed, *, arrays: int, backend: str) -> Tensor | None:
    """Memory for the gradient of logits, where the form holds it."""
    if form(head, needed, arrays=arrays, backend=backend) != "whole":
        return None
    dtype = gradient_dtype(head, backend)
    return head.weight.new_empty(_held_rows(head, dtype), head.weight.shape[0], dtype=dtype)


def column_chunks(
    head: Projection, *, arrays: int, gradient: torch.dtype
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Chunks of columns, with arrays [T, chunk] like those of `chunks`, the gradient's last; it may be the first."""
    dtypes = _dtypes(head, arrays, gradient, "cuda")
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    memory: list[Tensor] = []
    for part in _steps(columns, rows * sum(dtype.itemsize for dtype in dtypes), head.weight.device):
        size = part.stop - part.start
        memory = memory or [head.weight.new_empty(rows * size, dtype=dtype) for dtype in dtypes]
        found = [array[: rows * size].view(rows, size) for array in memory]
        yield part, found[:arrays], found[arrays] if len(found) > arrays else found[0]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a [n, k] @ b [k, m] into `out`, which is of the accumulator's dtype; b is a head or its transpose."""
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype == b.dtype and a.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    # Nothing in torch multiplies 16-bit numbers into float32 on a CPU.
    if _on_cpu(a, b.t(), out) and a.dtype == b.dtype and (cpu.is_fast(a.dtype) or a.shape[0] <= _WIDENED_ROWS):
        return cpu.product(a, b.t(), out)
    if _on_cpu(a, b, out) and _in_tiles(a, b):
        return cpu.product_hidden(a, b, out)
    if b.stride(0) == 1:  # logits: a block of them at a time
        a = a.to(out.dtype)
        for part, block in _blocks(b.t()):
            torch.mm(a, block.t(), out=out[:, part])
        return out
    out.zero_()
    for part, block in _blocks(b):
        out.addmm_(a[:, part].to(out.dtype), block)
    return out


def _on_cpu(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether the C++ backend's products can take these arrays: in rows of one number after another."""
    rows = all(x.stride(1) == 1 for x in (a, b, out))
    return rows and a.device.type == "cpu" and out.dtype != torch.float64 and cpu.why_unavailable() is None


def _in_tiles(gradient: Tensor, factor: Tensor) -> bool:
    """Whether tiles multiply a gradient of logits with a factor of these."""
    return gradient.dtype == torch.float32 and factor.dtype == torch.bfloat16 and cpu.has_tiles()


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Adds a @ b to `out`, of the accumulator's dtype, if that takes no copies; else False, and nothing is done."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b)
        return True
    if a.dtype == b.dtype and a.is_cuda and torch.version.cuda is not None and _ADDS_PRODUCTS:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        return True
    return False


def logits(head: Projection, out: Tensor) -> Tensor:
    """Logits of all rows of `head` into `out`, in the accumulator's dtype."""
    _products(head, out)
    return out if head.softcap is None else _softcap.capped(out, head.softcap)


def blocks(
    head: Projection, rows: slice, out: Tensor, gradient: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Logits of these rows into `out`, block by block: its rows, its logits, and the place for their gradient.

    When the next block is asked for, the gradient goes on through the cap. All rows are one block, unless logits are
    capped and `gradient` is `out`: then as many as stay in a CPU's cache meanwhile.
    """
    if head.softcap is None or gradient is None:
        yield rows, logits(head.part(rows), out), gradient
        return
    if gradient is not out:
        yield rows, logits(head.part(rows), out), gradient
        _softcap.differentiated(gradient, out, head.softcap)
        return
    _products(head.part(rows), out)
    step = max(1, _softcap.step(out) // out.shape[1])
    memory = torch.empty_like(out[:step])
    for at in range(0, out.shape[0], step):
        block = out[at : at + step]
        ratio = _softcap.capped_and_ratio(block, head.softcap, memory[: block.shape[0]])
        yield slice(rows.start + at, rows.start + at + block.shape[0]), block, block
        _softcap.differentiated_by_ratio(block, ratio)


def _products(head: Projection, out: Tensor) -> None:
    """What becomes the logits of `head`, before a cap."""
    _multiply(head.hidden, head.weight.t(), out)
    if head.low_hidden is not None and head.low_weight is not None:
        _add_low_rank(head.low_hidden, head.low_weight, out)
    if head.bias is not None:
        out.add_(head.bias.to(out.dtype))


def _add_low_rank(low_hidden: Tensor, low_weight: Tensor, out: Tensor) -> None:
    """out + low_hidden @ low_weight^T in place, a block of columns at a time where that takes memory."""
    step = out.shape[1]
    if low_hidden.dtype != out.dtype:
        step = max(1, 4 * _BLOCK_BYTES // max(1, out.element_size() * out.shape[0]))
    for at in range(0, out.shape[1], step):
        part = slice(at, min(at + step, out.shape[1]))
        if low_hidden.dtype == out.dtype:
            out.addmm_(low_hidden, low_weight.t())
        else:
            total = out.new_empty(out.shape[0], part.stop - at)
            out[:, part] += _multiply(low_hidden, low_weight[part].t(), total)


def gradient_dtype(head: Projection, backend: str) -> torch.dtype:
    """In which the gradient of logits is multiplied on: the accumulator's, but bfloat16 stays so on a GPU.

    Its matrix units would take a copy of the head in float32 otherwise. float16 could not hold the gradient: at
    V = 128k and T = 8k most of it lies below 1e-8.
    """
    stays = head.hidden.dtype == torch.bfloat16 and backend in _ON_GPU
    return torch.bfloat16 if stays else _rows.accumulator(head.hidden.dtype)


Needed = tuple[bool, bool, bool, bool, bool]  # whether each tensor of a `Projection`, in their order, gets a gradient


class Gradients:
    """Gradients of a head's tensors, accumulated over chunks of the logits; empty where not needed.

    Where that of logits is `held`, [., V], what chunks of rows contribute is added when the array is full, or the rows
    are at their end. With `partial`, of some of a vocabulary's columns, those of hidden states stay in the dtype of the
    accumulator.
    """

    def __init__(self, head: Projection, needed: Needed, held: Tensor | None = None, *, partial: bool = False):
        self._head, self._needed, self.held = head, needed, held
        self._unrounded = (0, 3) if partial else ()  # those of hidden states, which go on to be added to others
        self._gradients: list[Tensor | None] = [None] * 5

    def add(self, rows: slice, columns: slice, grad_logits: Tensor) -> None:
        """Adds what the gradient of the logits of these rows and columns, in `gradient_dtype`, contributes.

        A chunk of all columns is all that the hidden states of its rows get, and one of all rows all that its columns
        of the head get: then nothing is accumulated.
        """
        head = self._head
        whole_rows = columns == slice(0, head.weight.shape[0])
        whole_columns = rows == slice(0, head.hidden.shape[0])
        for i, factor in ((0, head.weight), (3, head.low_weight)):
            if factor is not None and (gradient := self._of(i, whole_rows)) is not None:
                if not whole_rows and _add_product(grad_logits, factor[columns], gradient[rows]):
                    continue
                _put_rows(gradient[rows], grad_logits, factor[columns], whole_rows)
        for i, factor in ((1, head.hidden), (4, head.low_hidden)):
            if factor is not None and (gradient := self._of(i, whole_columns)) is not None:
                _put_product(gradient[columns], grad_logits.t(), factor[rows], whole_columns)
        if (gradient := self._of(2, whole_columns)) is not None:
            _put(gradient[columns], _column_sums(grad_logits, _rows.accumulator(gradient.dtype)), whole_columns)

    def add_rows(self, rows: slice, grad_logits: Tensor) -> None:
        """The same for all columns of the next chunk of rows, which is a part of what is held."""
        all_columns = slice(0, self._head.weight.shape[0])
        if self.held is None:
            self.add(rows, all_columns, grad_logits)
            return
        size = (rows.stop - 1) % self.held.shape[0] + 1  # what of it is full
        if size == self.held.shape[0] or rows.stop == self._head.hidden.shape[0]:
            self.add(slice(rows.stop - size, rows.stop), all_columns, self.held[:size])

    def _of(self, i: int, whole: bool) -> Tensor | None:
        """Gradient of tensor i of the head, made when it is first asked for: zeros to add to, unless it comes whole."""
        like = self._head.tensors[i]
        if self._gradients[i] is None and self._needed[i] and like is not None:
            if whole:
                dtype = _rows.accumulator(like.dtype) if i in self._unrounded else like.dtype
                self._gradients[i] = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            else:
                self._gradients[i] = like.new_zeros(like.shape, dtype=_rows.accumulator(like.dtype))
        return self._gradients[i]

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients in the dtype of the inputs."""
        dtype = self._head.hidden.dtype
        found = [self._of(i, False) for i in range(5)]
        # Outputs of an operator must not alias each other, so an empty tensor each.
        a, b, c, d, e = (
            self._head.hidden.new_empty(0) if g is None else g if i in self._unrounded else g.to(dtype)
            for i, g in enumerate(found)
        )
        return a, b, c, d, e


def _column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over rows in `dtype`: a part at a time where torch makes a copy in it, as on a CPU."""
    if x.dtype == dtype or x.is_cuda:
        return x.sum(dim=0, dtype=dtype)
    step = max(1, 16 * _BLOCK_BYTES // (dtype.itemsize * max(1, x.shape[0])))
    return torch.cat([part.sum(dim=0, dtype=dtype) for part in x.split(step, dim=1)])


def _put(gradient: Tensor, total: Tensor, whole: bool) -> None:
    if whole:
        gradient.copy_(total)
    else:
        gradient += total


def _put_rows(gradient: Tensor, grad_logits: Tensor, factor: Tensor, whole: bool) -> None:
    """grad_logits @ factor put into rows of a gradient, from the accumulator's dtype, by parts of many rows."""
    size = factor.shape[1]
    step = max(1, 16 * _BLOCK_BYTES // (4 * max(1, size)))
    for at in range(0, gradient.shape[0], step):
        part = slice(at, min(at + step, gradient.shape[0]))
        total = factor.new_empty((part.stop - at, size), dtype=_rows.accumulator(factor.dtype))
        _put(gradient[part], _multiply(grad_logits[part], factor, total), whole)


def _put_product(gradient: Tensor, a: Tensor, b: Tensor, whole: bool) -> None:
    """a @ b put into the gradient of a head, which is as large as the head: a part at a time where it needs a copy."""
    if a.dtype == gradient.dtype == b.dtype and whole:
        torch.mm(a, b, out=gradient)
        return
    if not whole and _add_product(a, b, gradient):
        return
    if _on_cpu(a.t(), b, gradient) and _in_tiles(a, b):
        cpu.product_weight(a.t(), b, gradient)
        return
    step = max(1, 16 * _BLOCK_BYTES // (4 * max(1, *b.shape)))
    for at in range(0, gradient.shape[0], step):
        part = slice(at, min(at + step, gradient.shape[0]))
        total = b.new_empty((part.stop - at, b.shape[1]), dtype=_rows.accumulator(b.dtype))
        _put(gradient[part], _multiply(a[part], b, total), whole)


def needed_of(head: Projection) -> Needed:
    """Which tensors of a head a backward pass that starts now would want gradients of."""
    enabled = torch.is_grad_enabled()
    a, b, c, d, e = (enabled and x is not None and x.requires_grad for x in head.tensors)
    return a, b, c, d, e


def fake_gradients(head: Projection, needed: Needed) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients with the shapes that `Gradients.finish` returns."""
    a, b, c, d, e = (
        head.hidden.new_empty(x.shape if need and x is not None else (0,))
        for x, need in zip(head.tensors, needed, strict=True)
    )
    return a, b, c, d, e
