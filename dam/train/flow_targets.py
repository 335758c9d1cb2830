"""What is kept of a rollout of flows: targets, with the conditions of their rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.flows.matching import Targets
from dam.train.flow_rows import Column, Rows, taken

_COLUMN, _END = "column/", "end/"  # begin the names of columns, and of targets at the ends of paths, in a group


class Batch(NamedTuple):
    """Targets of a forward and backward pass."""

    targets: Targets
    rows: Rows  # of each target


class TargetBuffer:
    """The targets of the last rollout, on the CPU; several processes have each its own.

    Args:
        process, processes: this one, and of how many.
    """

    def __init__(self, process: int = 0, processes: int = 1):
        self._process, self._processes = process, processes
        self._group: dict[str, Any] | None = None

    @property
    def is_shared(self) -> bool:
        return self._processes > 1

    def __len__(self) -> int:
        return 0 if self._group is None else len(self._group["time"])

    def clear(self) -> None:
        self._group = None

    @property
    def _kept(self) -> dict[str, Any]:
        if self._group is None:
            raise RuntimeError("there are no targets: the rollout has not been drawn")
        return self._group

    def fill(
        self,
        targets: Targets,
        row: Tensor,
        rows: Rows,
        ends: Targets | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes the place of what there was.

        Args:
            targets: N of them.
            row: int64 [N], of which path each is.
            rows: of the paths, with the columns that passes ask for.
            ends: of each path one, of another loss.
            told: numbers and texts that say what the targets are of, for `check_told`.
        """
        kept = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in rows.columns.items()}
        self._group = {
            **{name: value.cpu() for name, value in targets._asdict().items()},
            "row": row.cpu(),
            "row_id": rows.row_id.cpu(),
            "told": dict(told or {}),
            **{_COLUMN + name: value for name, value in kept.items()},
            **({} if ends is None else {_END + name: value.cpu() for name, value in ends._asdict().items()}),
        }

    def batch(self, number: int, size: int, seed: int, device: torch.device) -> Batch:
        """Targets of the n-th pass that the rollout feeds: all in turn, in an order that a seed gives, and in others.

        Their weights are such that the loss is that of all, in the mean.

        Args:
            number: n.
            size: of them; all, if there are fewer.
            seed: of the orders.
            device: that they are moved to.
        """
        row, count = self._kept["row"], len(self)
        at = _turn(count, number, min(size, count), seed)
        return self._drawn("", at, row[at], device)

    def ends(self, number: int, size: int, seed: int, device: torch.device) -> Batch:
        """Of those at the ends of paths as large a part as of the targets, rounded up, in turn too: see `batch`."""
        count = len(self._kept["row_id"])
        at = _turn(count, number, -(-count * min(size, len(self)) // len(self)), seed)
        return self._drawn(_END, at, at, device)

    def _drawn(self, which: str, at: Tensor, row: Tensor, device: torch.device) -> Batch:
        group = self._kept
        state, time, prediction, weight = (group[which + name][at].to(device) for name in Targets._fields)
        drawn = Targets(state, time, prediction, weight * (len(group[which + "time"]) / len(at)))
        return Batch(drawn, Rows(group["row_id"][row].to(device), self._columns(group, row, device)))

    def _columns(self, group: dict[str, Any], row: Tensor, device: torch.device) -> dict[str, Column]:
        columns: dict[str, Column] = {}
        for name, column in group.items():
            if name.startswith(_COLUMN):
                found = taken(column, row)
                columns[name.removeprefix(_COLUMN)] = found.to(device) if isinstance(found, Tensor) else found
        return columns

    def state_dict(self) -> dict[str, Any]:
        """Where each process has its own, those of this one."""
        return {"groups": [] if self._group is None else [self._group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._group = state["groups"][0] if state["groups"] else None

    def load_whole(self, groups: list[Any]) -> None:
        self.load_state_dict({"groups": groups})

    def merged(self, parts: list[list[Any]]) -> list[Any]:
        """Of the parts that processes have saved, this one's.

        Raises:
            ValueError: they were more or fewer, with targets that no step has used up.
        """
        if len(parts) != self._processes and any(parts):
            raise ValueError(
                f"the checkpoint has targets of {len(parts)} processes, which {self._processes} cannot go on with: "
                "resume with as many, or from a step at which a rollout begins, a multiple of num_iterations"
            )
        return parts[self._process] if len(parts) == self._processes else []


def _turn(count: int, number: int, size: int, seed: int) -> Tensor:
    """Which of `count` the n-th part of a size has, int64 [size]: all in turn, in orders that a seed gives."""
    begin, end = number * size, (number + 1) * size
    orders = [_order(count, seed, turn) for turn in range(begin // count, -(-end // count))]
    return torch.cat(orders)[begin % count :][:size]


def check_readable(columns: Mapping[str, Column]) -> None:
    """That columns can be kept in checkpoints, which are read without running what is in them.

    Raises:
        ValueError: one cannot; names it.
    """
    for name, column in columns.items():
        if isinstance(column, Tensor):
            continue
        file = io.BytesIO()
        try:
            torch.save(column, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # of pickling, whatever a class raises, or of reading
            kinds = ", ".join(sorted({type(each).__name__ for each in column}))
            raise ValueError(
                f"column {name!r} is kept with the targets of a rollout, and a checkpoint cannot hold {kinds}: give "
                "texts, numbers, or lists and dicts of them, a path to be opened by the reward for one; or set "
                f"num_iterations=1, of which nothing is kept ({type(error).__name__})"
            ) from error


def check_told(group: Mapping[str, Any], told: Mapping[str, Any], checkpoint: str) -> None:
    """That targets of a checkpoint are of what runs.

    Raises:
        ValueError: they are not; names what differs.
    """
    then = group.get("told", {})
    differ = [f"{name} {then.get(name)}, now {now}" for name, now in told.items() if then.get(name) != now]
    if differ:
        raise ValueError(
            f"{checkpoint!r} is of within a rollout, whose targets were made with {'; '.join(differ)}: resume with "
            "what it was saved with, from a step at which a rollout begins, or begin a new run from its weights"
        )


def _order(count: int, seed: int, turn: int) -> Tensor:
    """A permutation of so many numbers, int64 [count], another in each turn."""
    generator = torch.Generator("cpu").manual_seed((seed + turn) % 2**63)
    return torch.randperm(count, generator=generator, device="cpu")
