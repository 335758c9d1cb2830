"""What a run has beyond what `transformers.Trainer` saves, and which checkpoints hold all of it."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dam.train.replay import Group

_STATE = "dam_state.pt"
_PART = "dam_replay_{}.pt"  # where processes share the replay buffer, of each the groups that it keeps


class Kept(Protocol):
    """What is kept of rollouts for training steps: groups of tensors, as `dam.train.replay.ReplayBuffer` has them."""

    @property
    def is_shared(self) -> bool:
        """Whether each of several processes keeps a part of its own."""

    def __len__(self) -> int: ...

    def clear(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """With "groups": where they are shared, this process's part."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_whole(self, groups: list[Group]) -> None:
        """Groups with all that they hold, of which this process keeps its part."""

    def merged(self, parts: list[list[Group]]) -> list[Group]:
        """What `load_whole` takes, of the parts of all processes."""


_Replay = TypeVar("_Replay", bound=Kept)


class Progress(Generic[_Replay]):
    """Counts, what is kept of rollouts and metrics that are not logged yet.

    Args:
        replay: what training steps draw from.
    """

    def __init__(self, replay: _Replay):
        self.replay = replay
        self.micro_step = 0  # of the step, with gradient accumulation
        self.reward_calls = 0
        self.evaluation_due = False  # to be done over before the next step
        self._metrics: dict[str, list[float]] = collections.defaultdict(list)
        self._began: tuple[int, dict[str, Any]] | None = None  # the last step that began, and all this at its start

    def record(self, **values: float) -> None:
        """Metrics of one rollout."""
        for name, value in values.items():
            self._metrics[name].append(value)

    def take_metrics(self) -> dict[str, float]:
        """Means of what was recorded since the last call."""
        means = {name: float(np.nanmean(values)) for name, values in self._metrics.items()}
        self._metrics.clear()
        return means

    def begin(self, step: int) -> None:
        """Remembers the start of a step, once: `go_back` returns there."""
        if self._began is None or self._began[0] != step:
            self.micro_step = 0
            self._began = (step, self.state_dict())

    @property
    def has_begun(self) -> bool:
        """Whether a step of this run, or of what continues it, has begun."""
        return self._began is not None

    def go_back(self, step: int, *, evaluation_due: bool) -> None:
        """To where the step that failed began, to go on from there; what fails between steps leaves all as it is.

        Args:
            step: that the run has come to.
            evaluation_due: whether an evaluation was to come before the next step.
        """
        if self._began is not None and self._began[0] == step:
            self.load_state_dict(self._began[1])
        else:
            self.evaluation_due |= evaluation_due

    def clear(self) -> None:
        """As at the start of a run."""
        self.micro_step, self.reward_calls, self.evaluation_due, self._began = 0, 0, False, None
        self._metrics.clear()
        self.replay.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "reward_calls": self.reward_calls,
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "replay": self.replay.state_dict(),
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.micro_step, self.reward_calls = 0, state["reward_calls"]
        self._metrics.clear()
        self._metrics.update(state["metrics"])
        self.replay.load_state_dict(state["replay"])
        self.evaluation_due = state["evaluation_due"]

    def save(self, folder: str, process: int = 0, processes: int = 1) -> None:
        """Into a checkpoint, which is not whole until the trainer's state is written too.

        Where processes share what is kept all call this, each of which saves its part.
        """
        os.makedirs(folder, exist_ok=True)
        state = self.state_dict()
        if self.replay.is_shared:
            torch.save(state["replay"]["groups"], os.path.join(folder, _PART.format(process)))
            state["replay"] = {"parts": processes}
        if process == 0:
            if os.path.exists(os.path.join(folder, TRAINER_STATE_NAME)):
                os.remove(os.path.join(folder, TRAINER_STATE_NAME))
            torch.save(state, os.path.join(folder, _STATE))

    def load(self, checkpoint: str, check: Callable[[list[Group], str], None]) -> None:
        """From a checkpoint, to go on.

        Args:
            checkpoint: its folder.
            check: raises where a run cannot go on with the groups of a checkpoint.

        Raises:
            ValueError: it is not whole, or what `check` raises.
        """
        if not _is_whole(checkpoint):
            raise ValueError(f"{checkpoint!r} is no whole checkpoint of such a run")
        state = torch.load(os.path.join(checkpoint, _STATE), weights_only=True)
        if "parts" in state["replay"]:
            parts = [os.path.join(checkpoint, _PART.format(n)) for n in range(state["replay"]["parts"])]
            groups = self.replay.merged([torch.load(path, weights_only=True) for path in parts])
        else:
            groups = state["replay"]["groups"]
        check(groups, checkpoint)
        self.load_state_dict({**state, "replay": {"groups": []}})
        self.replay.load_whole(groups)


def last_checkpoint(output_dir: str) -> str | None:
    """The last whole checkpoint in `output_dir`, or None. One that a kill cut short is passed over."""
    found = []
    if os.path.isdir(output_dir):
        for name in os.listdir(output_dir):
            prefix, _, step = name.rpartition("-")
            path = os.path.join(output_dir, name)
            if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() and _is_whole(path):
                found.append((int(step), path))
    return max(found)[1] if found else None


def _is_whole(path: str) -> bool:
    """Whether a checkpoint has all its files: the trainer's state, one JSON object, is written last."""
    try:
        with open(os.path.join(path, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return os.path.exists(os.path.join(path, _STATE))
