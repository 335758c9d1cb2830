"""What the processes of a run tell each other, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from dam.models.sharding import is_divided
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
            raise _shared(
                raised or (RewardError if of_reward else RuntimeError)(f"process {process} failed: {message}")
            )
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


def agree(told: Mapping[str, Any]) -> None:
    """That all processes say the same of a run, before it begins.

    Args:
        told: by name what each of them says, as text.

    Raises:
        ValueError: on all of them, where two do not; names what, and what each says.
    """
    if PartialState().num_processes == 1:
        return
    of_each: list[dict[str, str]] = gather_object([{name: str(value) for name, value in told.items()}])
    first = of_each[0]
    for process, other in enumerate(of_each):
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            said = "; ".join(f"{name}: {_short(first.get(name))} and {_short(other.get(name))}" for name in differ)
            raise _shared(
                ValueError(
                    f"processes 0 and {process} do not do the same run, {said}. Give all the same arguments, model and "
                    "rows, in the same order: a shuffle or a split needs a seed"
                )
            )


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 60 else f"{text[:60]}..."


def _shared(error: Exception) -> Exception:
    """An error that all processes raise at this place."""
    error._dam_shared = True  # type: ignore[attr-defined]
    return error


@torch.no_grad()
def match(tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters the values that they have in the first process; called by all alike, once they are made.

    For those that are drawn, as an adapter's are, and for those that only the first process has loaded
    (fsdp_cpu_ram_efficient_loading). What has no values here, or in parts only, stays as it is.

    Raises:
        ValueError: the processes have other parameters; on all of them.
    """
    if PartialState().num_processes == 1:
        return
    here = {name: each for name, each in tensors.items() if not (each.is_meta or is_divided(each))}
    agree({name: f"{each.dtype} {list(each.shape)}" for name, each in here.items()})
    sums: list[list[int]] = gather_object([[_bits(each) for each in here.values()]])
    for n, each in enumerate(here.values()):
        if any(of_one[n] != sums[0][n] for of_one in sums):
            each.copy_(broadcast(each.to(PartialState().device, copy=True)))


def _bits(tensor: Tensor) -> int:
    """A sum of a tensor's bits as whole numbers, which other values seldom have."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return int(tensor.detach().contiguous().flatten().view(kind).sum(dtype=torch.int64))
