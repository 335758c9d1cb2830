"""A replay buffer of groups of trajectories: one rollout feeds many training steps."""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, batch: Group) -> None:
        """Adds groups given as tensors with a leading group dimension."""
        self._groups.extend(unstacked(batch))

    def choose(self, size: int, parts: int, generator: torch.Generator) -> Tensor:
        """Places of `size` groups for each of `parts` equal parts, int64 [parts, share], drawn without replacement.

        Of all groups, if it holds fewer; some are then in two parts, where the parts would not be equal.
        """
        chosen = torch.randperm(len(self._groups), generator=generator, device="cpu")[: size * parts]
        share = -(-len(chosen) // parts)
        return chosen.repeat(-(-share * parts // len(chosen)))[: share * parts].view(parts, share)

    def batch(self, places: Tensor) -> Group:
        """The groups at these places [G], stacked; some may be the same."""
        distinct, of = places.unique(return_inverse=True)
        groups = stacked_groups([self._groups[place] for place in distinct.tolist()], self.pad_token)
        return {name: value[of] for name, value in groups.items()}

    def weights(self, places: Tensor) -> Tensor:
        """The weights [G, K] of the groups at these places [G]."""
        return torch.stack([self._groups[place]["weight"] for place in places.tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue exactly."""
        return {"groups": list(self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._groups.clear()
        self._groups.extend(state["groups"])
