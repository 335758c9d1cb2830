"""What the processes of a run tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from dam.train.rewards import RewardError

_T = TypeVar("_T")


def together(work: Callable[[], _T]) -> list[_T]:
    """What `work` gives on each process, on all of them, in the order of processes; called by all alike.

    Raises:
        RewardError, RuntimeError: on all processes, if `work` raised on one, which raises what it raised itself: none
            waits for one that has stopped.
    """
    if PartialState().num_processes == 1:
        return [work()]
    mine: _T | None = None
    raised: Exception | None = None
    try:
        mine = work()
    except Exception as error:
        raised = error
    told = None if raised is None else (isinstance(raised, RewardError), f"{type(raised).__name__}: {raised}")
    everyone = gather_object([(mine, told)])
    if raised is not None:
        raise raised
    for process, (_, failed) in enumerate(everyone):
        if failed is not None:
            of_reward, message = failed
            raise (RewardError if of_reward else RuntimeError)(f"process {process} failed: {message}")
    return [given for given, _ in everyone]
