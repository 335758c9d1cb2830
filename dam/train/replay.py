"""A replay buffer of groups of trajectories: one rollout feeds many training steps."""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Group = dict[str, Tensor]

# How each sequence-valued entry is filled up when groups of different length meet in a batch, on the left.
_SEQUENCES = ("states", "final", "attention_mask")


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
        self._pad_token = pad_token

    def __len__(self) -> int:
        return len(self._groups)

    def extend(self, batch: Group) -> None:
        """Adds groups given as tensors with a leading group dimension."""
        size = len(next(iter(batch.values())))
        for g in range(size):
            self._groups.append({name: value[g].cpu().clone() for name, value in batch.items()})

    def sample(self, size: int, generator: torch.Generator) -> Group:
        """`size` groups (all, if it holds fewer), drawn without replacement, stacked."""
        chosen = torch.randperm(len(self._groups), generator=generator)[:size].tolist()
        groups = [self._groups[g] for g in chosen]
        length = max(group["final"].shape[-1] for group in groups)
        return {name: torch.stack([self._padded(name, group, length) for group in groups]) for name in groups[0]}

    def _padded(self, name: str, group: Group, length: int) -> Tensor:
        missing = length - group["final"].shape[-1]
        if missing == 0:
            return group[name]
        if name in _SEQUENCES:
            return F.pad(group[name], (missing, 0), value=0 if name == "attention_mask" else self._pad_token)
        return group[name] + missing if name in ("first", "start") else group[name]

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue exactly."""
        return {"groups": list(self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._groups.clear()
        self._groups.extend(state["groups"])
