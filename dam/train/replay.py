"""A replay buffer of groups of trajectories: one rollout feeds many training steps."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.train.processes import exchanged

Group = dict[str, Tensor]

# Entries that are filled up on the left when groups of different length meet in a batch, and on the right, with what.
_SEQUENCES = ("states", "final", "attention_mask")
_JUMPS = {"log_ratio": 0.0, "position": -1, "call": -1}


def stacked_groups(groups: list[Group], pad_token: int) -> Group:
    """Groups as tensors with a leading group dimension; shorter sequences are filled up, with attention_mask 0."""
    length = max(group["final"].shape[-1] for group in groups)
    jumps = {name: max(group[name].shape[-1] for group in groups) for name in _JUMPS if name in groups[0]}

    def padded(name: str, group: Group) -> Tensor:
        value = group[name]
        missing = length - group["final"].shape[-1]
        if missing == 0 and (name not in jumps or value.shape[-1] == jumps[name]):
            return value
        if name in _SEQUENCES:
            return F.pad(value, (missing, 0), value=0 if name == "attention_mask" else pad_token)
        if name in jumps:
            value = torch.where(value >= 0, value + missing, value) if name == "position" else value
            return F.pad(value, (0, jumps[name] - value.shape[-1]), value=_JUMPS[name])
        return value + missing if name in ("first", "start") else value

    return {name: torch.stack([padded(name, group) for group in groups]) for name in groups[0]}


def unstacked(batch: Group) -> list[Group]:
    """The groups of tensors with a leading group dimension, in memory of their own on the CPU."""
    return [
        {name: value[g].cpu().clone() for name, value in batch.items()} for g in range(len(next(iter(batch.values()))))
    ]


class ReplayBuffer:
    """The last `capacity` groups; a group is a dict of tensors for one prompt and its K trajectories.

    Args:
        capacity: groups kept; older ones go first.
        pad_token: fills up shorter sequences, with attention_mask 0.
    """

    def __init__(self, capacity: int, pad_token: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 group; got {capacity}")
        self._groups: collections.deque[Group] = collections.deque(maxlen=capacity)
        self.pad_token = pad_token
        self._process, self._processes = 0, 1
        self._added = 0

    def share(self, process: int, processes: int) -> None:
        """From here on each of several processes keeps its part of the groups, and of all others their weights.

        Args:
            process: this one.
            processes: that have the same groups added, in the same order.
        """
        self._process, self._processes = process, processes

    @property
    def is_shared(self) -> bool:
        return self._processes > 1

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, batch: Group) -> None:
        """Adds groups given as tensors with a leading group dimension."""
        self._add(unstacked(batch))

    def _add(self, groups: Sequence[Group]) -> None:
        for group in groups:
            owner = self._added % self._processes
            self._added += 1
            if self.is_shared:
                kept = group if owner == self._process else {"weight": group["weight"]}
                group = {**kept, "owner": torch.tensor(owner)}
            self._groups.append(group)

    def choose(self, size: int, parts: int, generator: torch.Generator) -> Tensor:
        """Places of `size` groups for each of `parts` equal parts, int64 [parts, share], drawn without replacement.

        Of all groups, if it holds fewer; some are then in two parts, where the parts would not be equal.
        """
        chosen = torch.randperm(len(self._groups), generator=generator, device="cpu")[: size * parts]
        share = -(-len(chosen) // parts)
        return chosen.repeat(-(-share * parts // len(chosen)))[: share * parts].view(parts, share)

    def batch(self, places: Tensor, of_each: Sequence[Tensor] = ()) -> Group:
        """The groups at these places [G], stacked; some may be the same.

        Args:
            places: int64 [G].
            of_each: where processes share the groups, the places that each of them asks for, this one's among them.
        """
        distinct, of = places.unique(return_inverse=True)
        if self.is_shared:
            found = self._fetched(distinct.tolist(), of_each)
        else:
            found = [self._groups[place] for place in distinct.tolist()]
        return {name: value[of] for name, value in stacked_groups(found, self.pad_token).items()}

    def _fetched(self, places: list[int], of_each: Sequence[Tensor]) -> list[Group]:
        """Groups at distinct places, rising, from the processes that keep them."""
        owner = [int(group["owner"]) for group in self._groups]
        mine = [[self._groups[n] for n in asked.unique().tolist() if owner[n] == self._process] for asked in of_each]
        found = [iter(groups) for groups in exchanged(mine)]
        return [_without_owner(next(found[owner[n]])) for n in places]

    def weights(self, places: Tensor) -> Tensor:
        """The weights [G, K] of the groups at these places [G]."""
        return torch.stack([self._groups[place]["weight"] for place in places.tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue exactly; where groups are shared, this process's part."""
        return {"groups": list(self._groups), "added": self._added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._groups.clear()
        self._groups.extend(state["groups"])
        self._added = state.get("added", len(self._groups))

    def clear(self) -> None:
        self.load_state_dict({"groups": []})

    def load_whole(self, groups: Sequence[Group]) -> None:
        """Groups with all that they hold, of which this process keeps its part."""
        self._groups.clear()
        self._added = 0
        self._add(groups)

    def merged(self, parts: Sequence[Sequence[Group]]) -> list[Group]:
        """Groups whole again, from the parts of all processes that shared them."""
        return [_without_owner(versions[int(versions[0]["owner"])]) for versions in zip(*parts, strict=True)]


def check_groups(groups: Sequence[Group], checkpoint: str, num_generations: int, on_paths: bool) -> None:
    """That a run can go on with the groups of a checkpoint, beside those of its own.

    Args:
        groups: may be of a checkpoint that does not tell `exact`, which they are given.
        checkpoint: its folder, for messages.
        num_generations: trajectories of each group of the run.
        on_paths: whether these keep their paths.

    Raises:
        ValueError: its groups have another number of trajectories, or they lack what is needed.
    """
    sizes = {len(group["weight"]) for group in groups}
    if not sizes <= {num_generations}:
        raise ValueError(
            f"the groups of {checkpoint!r} have {' and '.join(map(str, sorted(sizes)))} trajectories and cannot be "
            f"trained on beside groups of {num_generations}: resume with the num_generations it was saved with, "
            "or begin a new run from its weights"
        )
    if any(("position" in group) != on_paths for group in groups):
        raise ValueError(
            f"the groups of {checkpoint!r} were drawn {'without' if on_paths else 'with'} diffusion_steps or "
            "block_length and cannot be trained on beside others: resume with the settings it was saved with, or "
            "begin a new run from its weights"
        )
    for group in groups:
        # Of a checkpoint that does not tell: at their own states paths are right whatever drew them.
        group.setdefault("exact", torch.tensor(not on_paths))


def _without_owner(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "owner"}
