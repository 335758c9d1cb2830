"""Calling reward functions, which are plain Python, and saying clearly when one of them misbehaves, and on what.

Where they are `isolated` each is called for one completion at a time, in a worker process or, if async, with a time-out
of asyncio: what goes wrong costs that completion only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import math
import numbers
import os
import threading
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dam.workers import KINDS, Failure, Pool, ServerError

Outcomes = dict[str, Any]  # of a rollout, as the arguments of `total_reward`
RewardFunction = Callable[..., Sequence[float | None]]

# What a reward function is given by name besides the columns of the dataset.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state")


class RewardError(RuntimeError):
    """No reward: a function raised, or returned something that is not one number per completion; or decoding failed."""


class Failed(NamedTuple):
    """A completion that a function has no reward for."""

    function: str
    completion: int
    failure: Failure


class _Answers(list[Any]):
    """What an isolated function gives for each completion: a number, None, or a `Failure`."""


class Rewarded(NamedTuple):
    """Of N completions; NaN where a function failed, in all of them."""

    total: Tensor  # float64 [N]
    parts: dict[str, Tensor]  # of each function, float64 [N]; NaN too where it does not apply
    failed: list[Failed]


def refuse_reserved(columns: Collection[str], where: str) -> None:
    """Columns must not have the name of what a reward function is given besides: one would stand for the other.

    Raises:
        ValueError: one has; `where` it was found.
    """
    for name in ARGUMENTS:
        if name in columns:
            raise ValueError(
                f"{where}, column {name!r}: reward functions are given the run's own under this name. Rename the "
                f"column, dataset.rename_column({name!r}, ...), and take it under the new name"
            )


def names_of(functions: Sequence[RewardFunction]) -> list[str]:
    """A name for each in messages and logs: functions of one name, as partials and instances are, are numbered."""
    names = []
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        names.append(getattr(function, "__name__", type(function).__name__))
    taken = set(names)
    for shared in [name for name in taken if names.count(name) > 1]:
        free = (numbered for k in itertools.count(1) if (numbered := f"{shared}_{k}") not in taken)
        names = [next(free) if name == shared else name for name in names]
    return names


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """In a thread of its own, and one for all rollouts: what an async function keeps open belongs to its loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def _started(function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    """What a function returns; of an async one a future, which is under way while the next ones are called."""
    values = function(**arguments)
    return asyncio.run_coroutine_threadsafe(values, _event_loop()) if inspect.iscoroutine(values) else values


def _returned(
    functions: Sequence[RewardFunction], names: Sequence[str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What each function returns, by name; async ones run side by side."""
    given: dict[str, Any] = {}
    name = names[0]
    try:
        for function, name in zip(functions, names, strict=True):
            given[name] = _started(function, arguments)
        for name, values in given.items():
            given[name] = values.result() if isinstance(values, concurrent.futures.Future) else values
    except Exception as error:
        raise RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
    finally:
        for values in given.values():
            if isinstance(values, concurrent.futures.Future):  # of one that is waited for no more
                values.cancel()
    return given


def _checked(values: Any, name: str, count: int) -> list[float]:
    """What a function returned as one number for each completion, NaN where it does not apply."""
    if isinstance(values, (Tensor, np.ndarray)):
        # A column [N, 1] is what models with one output give.
        values = (values[:, 0] if values.shape == (count, 1) else values).tolist()
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise RewardError(
            f"reward function {name!r} must return a list of {count} numbers; got {type(values).__name__}"
        )
    if len(values) != count:
        raise RewardError(f"reward function {name!r} must return one value per completion, {count}; got {len(values)}")
    rewards = []
    for i, value in enumerate(values):
        if value is None:
            rewards.append(math.nan)  # does not apply here
            continue
        if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"reward function {name!r} returned {value!r} ({type(value).__name__}) for completion {i}; "
                "it must be a number, or None where it does not apply"
            )
        try:
            value = float(value)
        except OverflowError as error:
            raise RewardError(f"reward function {name!r} returned a number too large for completion {i}") from error
        if math.isnan(value) or value == math.inf:
            raise RewardError(f"reward function {name!r} returned {value} for completion {i}")
        rewards.append(value)
    return rewards


def total_reward(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    *,
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    columns: Mapping[str, list[Any]],
    trainer_state: Any = None,
) -> Rewarded:
    """The weighted sum of all reward functions for each completion, and the values of each by name.

    A function is called as `function(prompts=..., completions=..., completion_ids=..., trainer_state=..., **columns)`
    and returns N numbers or truth values, as a list, or an array or tensor [N] or [N, 1]: None where it does not apply
    (it then counts nothing, and its value is NaN), -inf where an outcome is forbidden. Async ones run side by side.
    Those that are isolated also have completions that they failed at.

    Raises:
        RewardError: names the function and what it did.
        ValueError: a column has the name of another argument.
    """
    count = len(completions)
    refuse_reserved(columns, "the dataset")
    arguments = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": trainer_state,
        **columns,
    }
    total = torch.zeros(count, dtype=torch.float64, device="cpu")
    applies = torch.zeros(count, dtype=torch.bool, device="cpu")
    parts = {}
    failed: list[Failed] = []
    names = names_of(functions)
    returned = _returned(functions, names, arguments)
    for name, weight in zip(names, weights, strict=True):
        answers = returned[name]
        if isinstance(answers, _Answers):
            failed += [Failed(name, n, answer) for n, answer in enumerate(answers) if isinstance(answer, Failure)]
            answers = [None if isinstance(answer, Failure) else answer for answer in answers]
        values = torch.tensor(_checked(answers, name, count), dtype=torch.float64, device="cpu")
        known = ~torch.isnan(values)
        applies |= known
        if weight < 0 and bool((values == -torch.inf).any()):
            raise RewardError(f"reward function {name!r} returned -inf (forbidden) and has a negative weight, {weight}")
        if weight != 0:  # not 0 * -inf
            total += torch.where(known, weight * values, 0.0)
        parts[name] = values
    lost = torch.zeros_like(applies)
    lost[[n for _, n, _ in failed]] = True
    for values in (total, *parts.values()):
        values[lost] = math.nan
    applies |= lost
    if not bool(applies.all()):
        raise RewardError(
            f"no reward function applies to completion {int((~applies).nonzero()[0])} ({', '.join(names)} gave None)"
        )
    return Rewarded(total, parts, failed)


def _is_async(function: RewardFunction) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _state_as_data(state: Any) -> Any:
    """Numbers and text of a `transformers.TrainerState`, in an object that a worker loads without transformers."""
    if state is None:
        return None
    plain = {name: v for name, v in vars(state).items() if v is None or isinstance(v, (bool, int, float, str))}
    return types.SimpleNamespace(**plain)


def _one_by_one(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call for each completion."""
    state = _state_as_data(arguments["trainer_state"])
    lists = {name: values for name, values in arguments.items() if name != "trainer_state"}
    return [
        {"trainer_state": state, **{name: [value] for name, value in zip(lists, values, strict=True)}}
        for values in zip(*lists.values(), strict=True)
    ]


def _isolated(function: RewardFunction, name: str, timeout: float | None, workers: int) -> Callable[..., Any]:
    """A reward function of which a call for one completion at a time is made, and that gives a `Failure` for some.

    Raises:
        TypeError: it cannot be sent to a worker process.
    """
    if _is_async(function):

        async def awaited(**arguments: Any) -> _Answers:
            return _answers(await _awaited(function, _one_by_one(arguments), timeout), name)

        awaited.__name__ = name
        return awaited
    try:
        pool = Pool(function, workers=workers, timeout=timeout)
    except (TypeError, ServerError) as error:
        raise TypeError(
            f"reward function {name!r} cannot be called in a worker process, as reward_workers and reward_timeout ask "
            f"for: {error}"
        ) from error

    def in_workers(**arguments: Any) -> _Answers:
        return _answers(pool.map(_one_by_one(arguments)), name)

    in_workers.__name__ = name
    return in_workers


async def _awaited(function: RewardFunction, calls: list[dict[str, Any]], timeout: float | None) -> list[Any]:
    """What an async function gives for each, all awaited together, or a `Failure`."""

    async def answer(arguments: dict[str, Any]) -> Any:
        try:
            return await function(**arguments)  # type: ignore[misc]
        except Exception as error:
            return Failure("error", f"{type(error).__name__}: {error}")
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop of all
            return Failure("crash", f"{type(error).__name__}: {error}")

    tasks = [asyncio.ensure_future(answer(arguments)) for arguments in calls]
    try:
        await asyncio.wait(tasks, timeout=timeout)
    finally:
        late = [task for task in tasks if task.cancel()]  # not waited for: it may not listen
    told = Failure("timeout", f"no answer within {timeout} seconds")
    return [
        told if task in late else Failure("error", "cancelled") if task.cancelled() else task.result() for task in tasks
    ]


def _answers(answers: list[Any], name: str) -> _Answers:
    """Of calls for one completion each, as what one call for all would return."""

    def of_one(answer: Any) -> Any:
        if isinstance(answer, Failure):
            return answer
        try:
            value = _checked(answer, name, 1)[0]
        except RewardError as error:
            return Failure("answer", str(error))
        return None if math.isnan(value) else value

    return _Answers(of_one(answer) for answer in answers)


class Rewards:
    """The reward of a run: functions and their weights.

    Args:
        functions: one or more.
        weights: one for each; all 1 unless given.
        output_dir: where the outcomes that a function misbehaved on are kept.
        timeout, workers: of `DAMConfig`, reward_timeout and reward_workers; functions are isolated if one of them is
            set.
        stays: bool for each function, whether it is called in this process, for all completions at once, nevertheless.

    Raises:
        TypeError: there is no function, or something that is none, or one that cannot be sent to a worker process.
        ValueError: there are not as many weights as functions.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None,
        output_dir: str,
        *,
        timeout: float | None = None,
        workers: int | None = None,
        stays: Sequence[bool] | None = None,
    ):
        self.functions: list[RewardFunction] = (
            list(functions) if isinstance(functions, (list, tuple)) else [functions]  # type: ignore[list-item]
        )
        if not self.functions or not all(callable(f) for f in self.functions):
            raise TypeError("reward_funcs must be a function or a non-empty list of functions")
        self._weights = [1.0] * len(self.functions) if weights is None else weights
        if len(self._weights) != len(self.functions):
            raise ValueError(
                f"reward_weights must have one entry per reward function, {len(self.functions)}; "
                f"got {len(self._weights)}"
            )
        self._output_dir = output_dir
        self.isolated = timeout is not None or workers is not None
        self._called: Sequence[Callable[..., Any]] = self.functions
        if self.isolated:
            number = workers or min(2, os.cpu_count() or 1)
            self._called = [
                function if stay else _isolated(function, name, timeout, number)
                for function, name, stay in zip(
                    self.functions, names_of(self.functions), stays or [False] * len(self.functions), strict=True
                )
            ]

    def __call__(self, outcomes: Outcomes, state: Any, decode: Callable[[list[list[int]]], list[Any]]) -> Rewarded:
        """`total_reward` of the outcomes of a step.

        Args:
            outcomes: prompts, completions, completion_ids and columns.
            state: `transformers.TrainerState` of the run, for functions and messages.
            decode: makes of completion_ids the completions that functions see; put into `outcomes`.

        Raises:
            RewardError: decoding failed, or a function misbehaves; the outcomes are kept in a file.
        """
        try:
            outcomes["completions"] = decode(outcomes["completion_ids"])
            return total_reward(self._called, self._weights, **outcomes, trainer_state=state)
        except RewardError as error:
            raise self.with_outcomes_kept(error, outcomes, state) from error

    def with_outcomes_kept(self, error: RewardError, outcomes: Outcomes, state: Any) -> RewardError:
        """The error that is to end a run, with where the outcomes that it is about are."""
        return with_outcomes_kept(error, self._output_dir, outcomes, state.global_step)


def with_outcomes_kept(error: RewardError, output_dir: str, outcomes: Outcomes, step: int) -> RewardError:
    """The error that is to end a run, with where the outcomes that it is about are: output_dir/failed_rollouts.pt."""
    path = os.path.join(output_dir, "failed_rollouts.pt")
    try:
        os.makedirs(output_dir, exist_ok=True)
        torch.save({"step": step, **outcomes}, path)
    except Exception as unsaved:  # a full disk, or a column that cannot be pickled; the cause is what matters
        kept = f"could not be kept in {path} ({type(unsaved).__name__}: {unsaved})"
    else:
        kept = f"are kept in {path}"
    return RewardError(f"{error}. The rollouts of step {step} {kept}")


def failure_figures(failed: Sequence[Sequence[Failed]], count: int) -> dict[str, float]:
    """What the log says of completions without a reward: the fraction of all, and of each kind.

    Args:
        failed: of each process.
        count: of the completions of all.
    """
    kinds = {(process, each.completion, each.failure.kind) for process, part in enumerate(failed) for each in part}
    of_kind = {kind: sum(kind == its for _, _, its in kinds) / count for kind in KINDS}
    lost = len({(process, completion) for process, completion, _ in kinds}) / count
    return {"rewards/failed": lost, **{f"rewards/failed_{kind}": share for kind, share in of_kind.items()}}


def told_failures(failed: Sequence[Failed]) -> str:
    """Which functions failed how often and how, and the first message of each kind."""
    told = []
    for name in dict.fromkeys(f.function for f in failed):
        for kind in KINDS:
            messages = [f.failure.message for f in failed if f.function == name and f.failure.kind == kind]
            if messages:
                told.append(f"{name!r} {kind} {len(messages)} times, first: {messages[0]}")
    return "; ".join(told)
