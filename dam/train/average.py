"""An exponential moving average of trained weights, which is evaluated and saved in their place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STATE = "dam_average.pt"


class WeightAverage(TrainerCallback):
    """Of the trainable parameters, in float32; it begins as what they are when a run begins.

        average <- d average + (1 - d) parameter,   d = min(decay, (1 + n) / (10 + n)),   after step n = 0, 1, ...

    The weights of a checkpoint are the averages; a file beside them has these in float32 and the weights themselves,
    so that a resumed run goes on from where it was.

    Args:
        model: whose parameters are averaged.
        decay: d of a long run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay = model, decay
        self._averages: dict[str, Tensor] = {}  # none: there is no run
        self._resumed: dict[str, dict[str, Tensor]] | None = None

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self._model.named_parameters() if each.requires_grad}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = self._trainable()
        self._averages = {name: each.detach().to(torch.float32, copy=True) for name, each in parameters.items()}
        if self._resumed is not None:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self._resumed["weights"][name])
                    self._averages[name].copy_(self._resumed["averages"][name])
            self._resumed = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                self._averages[name].lerp_(parameter.float(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: during a run the model has the averages, and its own weights again afterwards."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, parameter in self._trainable().items() if self._averages else ():
                average = self._averages[name].to(parameter.dtype)
                kept.append((parameter, parameter.data))
                parameter.data = average
            yield
        finally:
            for parameter, own in kept:
                parameter.data = own

    def finish(self) -> None:
        """The model has the averages from here on."""
        with torch.no_grad():
            for name, parameter in self._trainable().items() if self._averages else ():
                parameter.copy_(self._averages[name])
        self.forget()

    def forget(self) -> None:
        """The model keeps the weights that it has: the run is over."""
        self._averages = {}

    def save(self, folder: str) -> None:
        """Into a checkpoint, before the file that makes it whole."""
        os.makedirs(folder, exist_ok=True)
        weights = {name: each.detach() for name, each in self._trainable().items()}
        torch.save({"averages": self._averages, "weights": weights}, os.path.join(folder, _STATE))

    def load(self, checkpoint: str) -> None:
        """From a checkpoint, to go on from when the run begins."""
        self._resumed = torch.load(os.path.join(checkpoint, _STATE), weights_only=True, map_location="cpu")


def check_average(checkpoint: str, ema_decay: float | None) -> None:
    """That a run with an average is resumed as one, and none else.

    Raises:
        ValueError: the checkpoint's weights are averages and ema_decay is None, or the other way round.
    """
    if os.path.exists(os.path.join(checkpoint, _STATE)) != (ema_decay is not None):
        how = "without ema_decay" if ema_decay is not None else "with ema_decay, so that its weights are averages"
        raise ValueError(
            f"{checkpoint!r} is of a run {how}: resume with the setting it was saved with, or begin a new run from its "
            "weights"
        )
