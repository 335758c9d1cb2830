"""Work memory of the linear ops: on a CPU it is kept from one call to the next."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dam.ops import _rows

_LINE = 64  # bytes of a cache line
# Of work memory on a CPU, from which on it is kept for the next call. What is given back to the system is mapped and
# zeroed anew: 64 MB for 512 rows of 32,768 logits took 7 ms beside a product of 45, or in a virtual machine that gives
# unused memory back to its host 170. Below, malloc keeps it by itself.
_KEPT_FROM = 2**20
_kept: list[Tensor] = []  # pieces of memory that no call has, by size
# What was given back since they were last looked at: a garbage collection may do so at any time, also in _collect().
_returned: collections.deque[Tensor] = collections.deque()
_keeping = threading.Lock()


@contextlib.contextmanager
def work_arrays(shape: tuple[int, int], dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[list[Tensor]]:
    """Uninitialised arrays [shape] of these dtypes, for as long as the context lasts: nothing may refer to them later.

    On a CPU their memory stays for the next call, `_rows.workspace_bytes()` of it at the most.
    """
    starts = [0]
    for dtype in dtypes:
        nbytes = math.prod(shape) * dtype.itemsize
        starts.append(starts[-1] + nbytes + -nbytes % _LINE)
    if device.type != "cpu" or starts[-1] < _KEPT_FROM:
        yield [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]
        return
    memory = _memory(starts[-1])
    try:
        yield [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, dtype in zip(starts, dtypes, strict=False)
        ]
    finally:
        _returned.append(memory)


def lent_array(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised array for as long as anything refers to it; on a CPU its memory is then kept as that above."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _KEPT_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _memory(nbytes)
    lent = memory.numpy()[:nbytes]  # which the tensor's storage refers to until it is freed
    weakref.finalize(lent, _returned.append, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _memory(nbytes: int) -> Tensor:
    """The smallest piece that is kept and large enough, or a new one."""
    with _keeping:
        _collect()
        for i, memory in enumerate(_kept):
            if memory.numel() >= nbytes:
                return _kept.pop(i)
    with torch.inference_mode(False):  # which later calls may not be in
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _collect() -> None:
    """Adds what was given back, and keeps as many of the largest pieces as may be."""
    while _returned:
        _kept.append(_returned.popleft())
    _kept.sort(key=Tensor.numel)
    while _kept and sum(map(Tensor.numel, _kept)) > _rows.workspace_bytes():
        del _kept[0]


def release_workspace() -> None:
    """Gives back the work memory that the linear ops keep between calls on a CPU."""
    with _keeping:
        _returned.clear()
        _kept.clear()
