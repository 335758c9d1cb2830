"""What the processes of a run tell each other, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from dam.train.rewards import RewardError

_T = TypeVar("_T")
_END = object()


def in_step(work: Callable[[], _T]) -> _T:
    """What `work` gives; called by all processes alike.

    Raises:
        Exception: what `work` raised, here; and on all processes where it raised on another: a RewardError for such a
            one, else a RuntimeError. See `is_shared`.
    """
    if PartialState().num_processes == 1:
        return work()
    given: Any = None
    raised: Exception | None = None
    try:
        given = work()
    except Exception as error:
        raised = error
    told = None if raised is None else (isinstance(raised, RewardError), f"{type(raised).__name__}: {raised}")
    for process, failed in enumerate(gather_object([told])):
        if failed is not None:
            of_reward, message = failed
            shared = raised or (RewardError if of_reward else RuntimeError)(f"process {process} failed: {message}")
            shared._dam_shared = True  # type: ignore[attr-defined]
            raise shared
    return given


def together(work: Callable[[], _T]) -> list[_T]:
    """What `work` gives on each process, in their order, on all of them; raises as `in_step` does."""
    given = in_step(work)
    return [given] if PartialState().num_processes == 1 else gather_object([given])


def each_in_step(batches: Iterable[_T]) -> Iterator[_T]:
    """Batches of which each process has as many; raises as `in_step` does where one cannot be had."""
    remaining = iter(batches)
    while (batch := in_step(lambda: next(remaining, _END))) is not _END:
        if batch is None:  # what a loader gives where there are no rows, before it fails: accelerate 1.4 to 1.8
            return
        yield batch  # type: ignore[misc]


def is_shared(error: BaseException) -> bool:
    """Whether all processes raise at this place, so that they can still do something together."""
    return PartialState().num_processes == 1 or getattr(error, "_dam_shared", False)
