"""What kernels find wrong with the numbers that they are given, and when the host reads it: at once, or later."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GPU = "cuda"  # type of the devices that a host waits for


class _Unread(NamedTuple):
    lowest: Tensor  # int64 [] on the device
    entries: int
    message: Callable[[int], str]


class _State(threading.local):
    unread: list[_Unread] | None = None


_state = _State()


@contextlib.contextmanager
def deferred_checks() -> Iterator[None]:
    """Context manager: what kernels on a GPU check is read once, when the block ends, and not after each op.

    Of `jump`, `linear_jump`, `adjoint_weights` and `tilt_to_ess`, whose check otherwise makes the host wait for the
    GPU in each call. The end of the block waits once for each device that they ran on, and raises for the first call
    that was given what has no result, whatever else the block has raised. Until then nothing has been checked: what
    lasts, a step of an optimiser say, belongs behind the block. Checks of shapes and dtypes, and all of tensors on a
    CPU, are made at once. Blocks may be nested, each for the calls inside it and not in an inner one.

    Under capture in a CUDA graph nothing is read, inside such a block or not.

    Raises:
        ValueError: at the end; names the op and the first row or trajectory.
    """
    unread: list[_Unread] = []
    outer, _state.unread = _state.unread, unread
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # a device may not answer any more
            problem = _problem(unread)
            if problem is not None:
                raise problem from error
        raise
    else:
        problem = _problem(unread)
        if problem is not None:
            raise problem
    finally:
        _state.unread = outer


def _problem(unread: list[_Unread]) -> ValueError | None:
    """What was wrong first, in the order of the calls."""
    found: dict[int, int] = {}
    for device in {one.lowest.device for one in unread}:
        chosen = [n for n, one in enumerate(unread) if one.lowest.device == device]
        found.update(zip(chosen, torch.stack([unread[n].lowest for n in chosen]).tolist(), strict=True))
    for n, (_, entries, message) in enumerate(unread):
        if found[n] < entries:
            return ValueError(f"{message(found[n])} (found when the block of dam.deferred_checks() ended)")
    return None


def is_captured(x: Tensor) -> bool:
    """Whether calls on a tensor are being captured in a CUDA graph: nothing runs that could be waited for, and what the
    host hands over is the same in every replay.
    """
    if x.device.type != GPU or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def first_bad(lowest: int | Tensor, entries: int, message: Callable[[int], str]) -> int:
    """The first of so many entries that no result can be given for, or -1: also where that is not to be known yet.

    Args:
        lowest: its index, or -1; of kernels on a device an int64 [] there, at least `entries` if there is none.
        message: what to say of an entry once the arguments may be gone.
    """
    if isinstance(lowest, int):
        return lowest
    if is_captured(lowest):
        return -1
    if _state.unread is not None:
        _state.unread.append(_Unread(lowest, entries, message))
        return -1
    bad = int(lowest)
    return bad if bad < entries else -1
