"""Parameters that are elsewhere, or of which a process holds a part: here, and whole, where a head is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP2 or DeepSpeed's ZeRO-3 has divided, gathered from all processes; others as they are.

    Its gradient is the mean over processes, as theirs are, and each keeps its part.
    """
    if is_partitioned(parameter):
        with _gathered(parameter):
            if parameter.requires_grad and torch.is_grad_enabled():
                return _OfPartitions.apply(parameter)
            return parameter.detach()
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


def is_partitioned(parameter: Tensor | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has divided a parameter, be it gathered just now or not."""
    return getattr(parameter, "ds_id", None) is not None


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of all of a parameter: of one that ZeRO-3 has divided nothing is in its place between its uses."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def waits_for_others(model: nn.Module) -> bool:
    """Whether a forward pass of one process waits for those of others, as FSDP2 or ZeRO-3 divides the model."""
    return any(is_fsdp(module) for module in model.modules()) or any(map(is_partitioned, model.parameters()))


@contextlib.contextmanager
def _gathered(parameter: Any) -> Iterator[None]:
    """Context manager: a parameter that ZeRO-3 has divided has its values."""
    if parameter.ds_status.name == "INFLIGHT":
        raise RuntimeError("a parameter is read while ZeRO-3 fetches it: settle the model first")
    if parameter.ds_status.name == "AVAILABLE":  # a persistent one, or one that is to be used again soon
        yield
        return
    parameter.all_gather()
    try:
        yield
    finally:
        parameter.partition()


class _OfPartitions(torch.autograd.Function):
    """The values of a parameter that ZeRO-3 has gathered, so that their gradient is added to that of the parameter.

    DeepSpeed reduces that, and puts each process's part where its optimizer takes it, when autograd has added up all
    that a backward pass gives the parameter; a tied embedding's too.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parameter, gradient = ctx.parameter, gradient.contiguous()
        if parameter.ds_status.name == "NOT_AVAILABLE":
            # Autograd adds to a gradient of the shape that its parameter has at that time; no values are read.
            parameter.data = gradient

            def added(parameter: Any) -> None:
                handle.remove()
                if parameter.ds_status.name == "NOT_AVAILABLE":
                    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

            handle = parameter.register_post_accumulate_grad_hook(added)
        return gradient


@contextlib.contextmanager
def partitions_of(model: nn.Module, values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Context manager: parameters that ZeRO-3 has divided have other values, of which each process holds its part.

    Args:
        model: the one that they are of.
        values: by parameter, of its whole shape.

    Raises:
        ValueError: parts are kept twice, or not in memory.
    """
    own = {}
    try:
        _let_go(model, values)
        for parameter, value in values.items():
            own[parameter] = parameter.ds_tensor.data
            parameter.ds_tensor.data = _part(parameter, value)
        yield
    finally:
        _let_go(model, own)
        for parameter, data in own.items():
            parameter.ds_tensor.data = data


def _let_go(model: nn.Module, parameters: Mapping[Any, Tensor]) -> None:
    """Of gathered values, so that they are gathered anew."""
    settle(model)
    for parameter in parameters:
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def _part(parameter: Any, value: Tensor) -> Tensor:
    """The part of a value that this process would hold, were it that of the parameter; of equal size in all of them."""
    held = parameter.ds_tensor
    if getattr(parameter, "ds_secondary_tensor", None) is not None or held.status.name != "AVAILABLE":
        raise ValueError(
            "the base cannot take the place of parameters that ZeRO-3 keeps twice (zero_hpz_partition_size) or on NVMe "
            "(offload_param): leave that out, or pass ref_model"
        )
    rank, size = torch.distributed.get_rank(parameter.ds_process_group), held.numel()
    part = value.reshape(-1)[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - len(part))).to(held)


def settle(model: nn.Module) -> None:
    """Waits for parameters that ZeRO-3 is fetching, for what it takes to be the model's next layers."""
    if not is_partitioned(next(model.parameters(), None)):
        return  # it divides all parameters or none, and a walk over modules is a tenth of a small model's call
    for module in model.modules():
        fetched = getattr(module, "ds_inflight_param_registry", None)
        while fetched:
            fetched.pop(next(iter(fetched))).wait()


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
    """That a head can be read: it is all here, or divided by FSDP2, by ZeRO-3 or by rows of the vocabulary.

    Raises:
        ValueError: it is divided otherwise.
    """
    if not is_shared_by_rows(layer, model):
        return
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise ValueError(
            "an adapter is on the output layer, which tensor parallelism divides: leave that layer out of its "
            "target_modules, or out of the plan (tp_plan)"
        )
    for name, parameter in layer.named_parameters():
        placements = parameter.placements if is_divided(parameter) else ()  # type: ignore[attr-defined]
        by_rows = [each for each in placements if type(each) is Shard and each.dim == 0]
        if len(by_rows) != 1 or not all(isinstance(each, (Shard, Replicate)) for each in placements):
            raise ValueError(
                f"{name} of the output layer is divided by tensor parallelism with placements {list(placements)}, not "
                "by rows of the vocabulary: plan that layer as ColwiseParallel, leave it out of the plan (tp_plan), so "
                "that each process has it whole, or divide the model by FSDP2"
            )


def is_shared_by_rows(layer: nn.Module, model: nn.Module) -> bool:
    """Whether tensor parallelism divides an output layer, whose rows the operations then take where they are."""
    return any(map(is_divided, layer.parameters())) and not any(map(is_fsdp, model.modules()))


def here(states: Tensor) -> Tensor:
    """Hidden states that a layer which tensor parallelism divides is given, as a tensor of this process.

    Raises:
        ValueError: this process has a part of them.
    """
    if not is_divided(states):
        return states
    if not all(isinstance(each, Replicate) for each in states.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"hidden states are divided before the output layer, {states.placements}: plan it with "  # type: ignore[attr-defined]
            "input_layouts=Replicate()"
        )
    return states.to_local()  # type: ignore[attr-defined]


def as_given(states: Tensor, given: Tensor) -> Tensor:
    """Other hidden states as the layer was given its own."""
    if not is_divided(given):
        return states
    return DTensor.from_local(states, given.device_mesh, given.placements, run_check=False)  # type: ignore[attr-defined]


def own_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """Rows of a tensor that this process has of those that processes share, and which these are; else all."""
    if not is_divided(tensor):
        return tensor, slice(0, tensor.shape[0])
    mesh, places = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    dim = next(n for n, each in enumerate(places) if isinstance(each, Shard))
    each = -(-tensor.shape[0] // mesh.size(dim))  # as torch.chunk divides
    local = tensor.to_local()  # type: ignore[attr-defined]
    first = min(mesh.get_local_rank(dim) * each, tensor.shape[0])
    return local, slice(first, first + local.shape[0])


def tied_to(hidden: Tensor, output: Any, model: nn.Module) -> Tensor:
    """Hidden states whose gradient passes by what `model` returned, which is of no positions, where FSDP2 divides it.

    FSDP2 gathers the parameters of a unit for the backward pass when that comes to what the unit returned; DeepSpeed,
    of any stage, begins a backward pass there.

    Args:
        model: as it was called.
    """
    if not torch.is_grad_enabled() or not (is_deepspeed(model) or any(is_fsdp(module) for module in model.modules())):
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


def is_deepspeed(model: nn.Module) -> bool:
    """Whether a model is DeepSpeed's engine around one. DeepSpeed itself need not be there."""
    return any(each.__module__ == "deepspeed.runtime.engine" for each in type(model).__mro__)
