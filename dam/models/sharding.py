"""Parameters that are elsewhere, or of which a process holds a part: here, and whole, where a head is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial


def whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP2 has divided, gathered from all processes; others as they are.

    Its gradient is the mean over processes, as FSDP's are, and each keeps its part.
    """
    if not is_divided(parameter):
        return parameter
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    if parameter.device.type != mesh.device_type:  # FSDP2's CPUOffloadPolicy brings it there in forward passes only
        parameter = parameter.to(mesh.device_type)
    gathered = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered


def is_divided(parameter: Tensor) -> bool:
    return torch.distributed.is_available() and isinstance(parameter, DTensor)


@contextlib.contextmanager
def brought_here(layer: nn.Module) -> Iterator[None]:
    """Context manager: what accelerate has offloaded of a layer's own parameters is where its forward pass has them.

    Raises:
        ValueError: a parameter has no values.
    """
    if not is_offloaded(layer):
        yield
        return
    if not hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"parameters of the output layer, {type(layer).__name__}, are on the meta device and have no values: load "
            "the model's weights"
        )
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a layer's own parameters are not here outside of its forward pass."""
    return any(parameter.is_meta for parameter in layer.parameters(recurse=False))


def is_placed(model: nn.Module) -> bool:
    """Whether accelerate has put a model, or parts of it, where they are to stay: divided or offloaded."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def check_sharding(layer: nn.Module, model: nn.Module) -> None:
    """That a head can be read: it is all here, or divided by FSDP2.

    Raises:
        ValueError: it is divided by something else.
    """
    for name, parameter in layer.named_parameters():
        if getattr(parameter, "ds_id", None) is not None and parameter.numel() == 0:
            raise ValueError(
                f"{name} of the output layer is partitioned by DeepSpeed's ZeRO-3 and not here outside of its forward "
                "pass: use stage 2, or FSDP2"
            )
        if is_divided(parameter) and not any(is_fsdp(module) for module in model.modules()):
            raise ValueError(
                f"{name} of the output layer is a DTensor, divided by tensor parallelism: leave the output layer out "
                "of the plan (tp_plan), so that each process has it whole, or divide the model by FSDP2"
            )


def tied_to(hidden: Tensor, output: Any, model: nn.Module) -> Tensor:
    """Hidden states whose gradient passes by what `model` returned, which is of no positions, where FSDP2 divides it.

    FSDP2 gathers the parameters of a unit for the backward pass when that comes to what the unit returned.
    """
    if not torch.is_grad_enabled() or not any(is_fsdp(module) for module in model.modules()):
        return hidden
    for tensor in _tensors(output):
        if tensor.requires_grad and tensor.numel() == 0:
            hidden = hidden + tensor.sum().to(hidden.dtype)
    return hidden


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
