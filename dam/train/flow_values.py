"""The gradient of a value that VGG-Flow learns beside a flow: its loss, and what of it a run has to keep."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dam.flows import matching
from dam.flows.adjoint import Cost
from dam.flows.matching import Targets
from dam.flows.processes import FlowProcess, Model, over, predicted
from dam.flows.values import consistency_loss, forward_looking
from dam.train.flow_config import FlowConfig
from dam.train.flow_rows import Column
from dam.train.networks import without_dropout, without_training

_STATE = "dam_value.pt"


class ValueLearner(TrainerCallback):
    """Trains a network with the flow, by the same optimizer and at the same states.

    Args:
        value: called at states [B, ...], times [B] and conditions by name; gives [B, ...].
        process: the ODE.
        args: weights of its losses, and whether it is a residual of the one-step outcome's cost gradient.
    """

    def __init__(self, value: nn.Module, process: FlowProcess, args: FlowConfig):
        self._value, self._process, self._args = value, process, args
        if args.disable_dropout:
            without_dropout(value)

    def gradient(self, base: Model, cost: Cost, conditions: dict[str, Column]) -> Model:
        """grad V of rows with these conditions, for g = `cost`."""

        def learned(state: Tensor, time: Tensor) -> Tensor:
            return self._value(state, time, **conditions)

        if not self._args.forward_looking:
            return learned
        return forward_looking(self._process, base, cost, learned)

    def matched(self, targets: Targets, gradient: Model) -> Targets:
        """Of targets that predict what the base does, those of the value as it is now."""
        with torch.no_grad(), without_training(self._value):
            found = predicted(gradient, targets.state, targets.time)
        moved = found / over(self._process.gain(targets.time), found)
        return targets._replace(prediction=targets.prediction - moved.to(targets.prediction.dtype))

    def loss(self, base: Model, gradient: Model, targets: Targets) -> Tensor:
        """What is left of the HJB equation at the targets' states."""
        left = consistency_loss(self._process, base, gradient, targets.state, targets.time)
        return self._args.value_consistency * left

    def end_loss(self, gradient: Model, ends: Targets) -> Tensor:
        """How far it ends from the cost's gradient."""
        return self._args.value_boundary * matching.loss(gradient, ends)

    def check(self, base: Model, gradient: Model, targets: Targets) -> None:
        """That its losses can be had: raises what they raise."""
        self.loss(base, gradient, targets)
        self.end_loss(gradient, targets)

    def begin_step(self) -> None:
        """No gradients are left of the step before: transformers clears those of the flow alone."""
        self._value.train()
        self._value.zero_grad(set_to_none=True)

    def add_to(self, optimizer: torch.optim.Optimizer, decayed: Collection[str]) -> None:
        """The network's parameters, as groups of their own.

        Args:
            optimizer: of the model.
            decayed: names of those that weight_decay is of; of others it is 0.
        """
        trainable = {name: each for name, each in self._value.named_parameters() if each.requires_grad}
        for decay, names in (
            (self._args.weight_decay, trainable.keys() & set(decayed)),
            (0.0, trainable.keys() - set(decayed)),
        ):
            params = [each for name, each in trainable.items() if name in names]
            if params:
                optimizer.add_param_group({"params": params, "weight_decay": decay})

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self._value.parameters(), args.max_grad_norm)

    def save(self, folder: str) -> None:
        """Into a checkpoint, before the file that makes it whole."""
        os.makedirs(folder, exist_ok=True)
        torch.save(self._value.state_dict(), os.path.join(folder, _STATE))

    def load(self, checkpoint: str) -> None:
        """From a checkpoint."""
        self._value.load_state_dict(torch.load(os.path.join(checkpoint, _STATE), weights_only=True, map_location="cpu"))

    def to(self, device: torch.device) -> None:
        self._value.to(device)


def check_value(checkpoint: str, has_value: bool) -> None:
    """That a run with a value is resumed as one, and none else.

    Raises:
        ValueError: it is not.
    """
    if os.path.exists(os.path.join(checkpoint, _STATE)) != has_value:
        how = "without a value" if has_value else "with a value, which it goes on from"
        raise ValueError(f"{checkpoint!r} is of a run {how}: resume with what it was saved with")
