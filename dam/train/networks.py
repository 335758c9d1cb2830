"""What trainers do to the modules that they are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Context manager: the model without dropout and gradients.

    Args:
        model: as it was again afterwards.
        precision: context in which networks run, such as autocast.
    """
    with without_training(model), torch.no_grad(), precision:
        yield


@contextlib.contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """Context manager: the model without dropout, and as it was again afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def check_apart(
    module: nn.Module,
    name: str,
    trained: nn.Module,
    *,
    of: str = "the model",
    effect: str = "would be frozen with it",
    cure: str = "",
) -> None:
    """That a module has no parameter that is trained with another.

    Args:
        module, name: of it, as arguments call it.
        trained: the module to train.
        of: what that is, in the message.
        effect: what would happen to the parameters.
        cure: what else to do.

    Raises:
        ValueError: they share parameters.
    """
    trainable = {parameter: which for which, parameter in trained.named_parameters() if parameter.requires_grad}
    shared = [trainable[parameter] for parameter in module.parameters() if parameter in trainable]
    if shared:
        raise ValueError(
            f"{name} shares {len(shared)} parameters with {of} ({shared[0]}, ...), which {effect}: give it a copy "
            f"(copy.deepcopy){cure}"
        )


def without_dropout(network: nn.Module) -> None:
    """Sets to 0 what dropout modules drop, and the rates that attention layers keep as numbers."""
    for module in network.modules():
        for name, value in vars(module).items():
            of_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and name == "p"
            if isinstance(value, float) and (of_dropout or "drop" in name):
                setattr(module, name, 0.0)


def check_dtype(network: nn.Module) -> None:
    """That what is trained can be: an update of Adam's in float16 divides by an epsilon that is 0 there.

    Raises:
        ValueError: names the first parameter in float16.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is to be trained in float16, whose range gradients and Adam's epsilon leave: load the model "
                "in float32 and set fp16=True, or load it in bfloat16"
            )
