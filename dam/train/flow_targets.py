"""What is kept of a rollout of flows: targets, with the conditions of their rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.flows.matching import Targets
from dam.train.flow_rows import Column, taken

_COLUMN, _END = "column/", "end/"  # begin the names of columns, and of targets at the ends of paths, in a group


class Batch(NamedTuple):
    """Targets of a forward and backward pass."""

    targets: Targets
    columns: dict[str, Column]  # of each target


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

    def fill(self, targets: Targets, row: Tensor, columns: dict[str, Column], ends: Targets | None = None) -> None:
        """Takes the place of what there was.

        Args:
            targets: N of them.
            row: int64 [N], of which path each is.
            columns: of the paths, that passes ask for.
            ends: of each path one, of another loss.
        """
        kept = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in columns.items()}
        self._group = {
            **{name: value.cpu() for name, value in targets._asdict().items()},
            "row": row.cpu(),
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
        if self._group is None:
            raise RuntimeError("there are no targets: the rollout has not been drawn")
        group, count = self._group, len(self)
        size = min(size, count)
        begin, end = number * size, (number + 1) * size
        orders = [_order(count, seed, turn) for turn in range(begin // count, -(-end // count))]
        at = torch.cat(orders)[begin % count :][:size]
        state, time, prediction, weight = (group[name][at].to(device) for name in Targets._fields)
        drawn = Targets(state, time, prediction, weight * (count / size))
        return Batch(drawn, self._columns(group, group["row"][at], device))

    def ends(self, device: torch.device) -> Batch:
        """Those at the ends of all paths."""
        if self._group is None:
            raise RuntimeError("there are no targets: the rollout has not been drawn")
        group = self._group
        targets = Targets(*(group[_END + name].to(device) for name in Targets._fields))
        return Batch(targets, self._columns(group, torch.arange(len(targets.time), device="cpu"), device))

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


def _order(count: int, seed: int, turn: int) -> Tensor:
    """A permutation of so many numbers, int64 [count], another in each turn."""
    generator = torch.Generator("cpu").manual_seed((seed + turn) % 2**63)
    return torch.randperm(count, generator=generator, device="cpu")
