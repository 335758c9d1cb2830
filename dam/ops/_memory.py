"""Work memory of the linear ops: on a CPU it is kept from one call to the next."""

from __future__ import annotations

import collections
import contextlib
import math
import os
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
_returned: collections.deque[Tensor] = collections.deque()  # what was given back since they were last looked at
# Of who looks at them. Nobody waits for it, but takes new memory, or leaves it to the next to look: garbage collections
# and signals may call anything here in the middle of anything, in the same thread.
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
    most = _rows.workspace_bytes()
    memory = _memory(starts[-1], most)
    try:
        yield [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, dtype in zip(starts, dtypes, strict=False)
        ]
    finally:
        _give_back(memory, most)


def lent_array(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised array for as long as anything refers to it; on a CPU its memory is then kept as that above."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _KEPT_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    most = _rows.workspace_bytes()
    memory = _memory(nbytes, most, 2 * nbytes)  # as it may be held for long
    lent = memory.numpy()[:nbytes]  # which the tensor's storage refers to until it is freed
    weakref.finalize(lent, _give_back, memory, most).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _memory(nbytes: int, most: int, largest: int | None = None) -> Tensor:
    """The smallest piece that is kept and large enough, and not too large, or a new one; `most` bytes stay kept."""
    if _keeping.acquire(blocking=False):
        try:
            kept = _collect(most)
            for i, memory in enumerate(kept):
                if memory.numel() >= nbytes:
                    if largest is not None and memory.numel() > largest:
                        break
                    return kept.pop(i)
        finally:
            _keeping.release()
    with torch.inference_mode(False):  # which later calls may not be in
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _give_back(memory: Tensor, most: int) -> None:
    """Keeps it for the next call, if that may be.

    At once: of logits that many values kept, all are given back together, and no other call need follow.
    """
    _returned.append(memory)
    if _keeping.acquire(blocking=False):
        try:
            _collect(most)
        finally:
            _keeping.release()


def _collect(most: int) -> list[Tensor]:
    """What is kept, with what was given back: as many of the largest pieces as `most` bytes allow."""
    kept = _kept
    with contextlib.suppress(IndexError):  # at the end: whether there is one more cannot be asked before
        while True:
            kept.append(_returned.popleft())
    kept.sort(key=Tensor.numel)
    while kept and sum(map(Tensor.numel, kept)) > most:
        del kept[0]
    return kept


def release_workspace() -> None:
    """Gives back the work memory that the linear ops keep between calls on a CPU."""
    global _kept
    _returned.clear()
    _kept = []  # another list: a call that is in the middle of the one before goes on with that


def _start_anew() -> None:
    """In the child of a fork: another thread may have had the lock, and is not there to release it."""
    global _keeping
    _keeping = threading.Lock()
    release_workspace()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
