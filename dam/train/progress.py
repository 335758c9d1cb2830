"""What a run has beyond what `transformers.Trainer` saves, and which checkpoints hold all of it."""

from __future__ import annotations

import collections
import json
import os
from typing import Any

import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dam.train.replay import ReplayBuffer

_STATE = "dam_state.pt"


class Progress:
    """Counts, the replay buffer and metrics that are not logged yet.

    Args:
        replay: the groups that training steps draw from.
    """

    def __init__(self, replay: ReplayBuffer):
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
        self.replay.load_state_dict({"groups": []})

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

    def save(self, folder: str) -> None:
        """Into a checkpoint, which is not whole until the trainer's state is written too."""
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(os.path.join(folder, TRAINER_STATE_NAME)):
            os.remove(os.path.join(folder, TRAINER_STATE_NAME))
        torch.save(self.state_dict(), os.path.join(folder, _STATE))

    def load(self, checkpoint: str, num_generations: int, on_paths: bool) -> None:
        """From a checkpoint, to go on with groups of that many trajectories, with their paths or without.

        Raises:
            ValueError: it is not whole, its groups have another number of trajectories, or they lack what is needed.
        """
        if not _is_whole(checkpoint):
            raise ValueError(f"{checkpoint!r} is no whole DAMTrainer checkpoint")
        state = torch.load(os.path.join(checkpoint, _STATE), weights_only=True)
        sizes = {len(group["weight"]) for group in state["replay"]["groups"]}
        if not sizes <= {num_generations}:
            raise ValueError(
                f"the groups of {checkpoint!r} have {' and '.join(map(str, sorted(sizes)))} trajectories and cannot be "
                f"trained on beside groups of {num_generations}: resume with the num_generations it was saved with, "
                "or begin a new run from its weights"
            )
        if any(("position" in group) != on_paths for group in state["replay"]["groups"]):
            raise ValueError(
                f"the groups of {checkpoint!r} were drawn {'without' if on_paths else 'with'} diffusion_steps or "
                "block_length and cannot be trained on beside others: resume with the settings it was saved with, or "
                "begin a new run from its weights"
            )
        for group in state["replay"]["groups"]:
            # Of a checkpoint that does not tell: at their own states paths are right whatever drew them.
            group.setdefault("exact", torch.tensor(not on_paths))
        self.load_state_dict(state)


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
