"""A model that FSDP2 divides, as accelerate prepares it: on a CPU too, and checkpoints of it and of whole models."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

_MODEL, _OPTIMIZER = "pytorch_model_fsdp", "optimizer"  # accelerate's names of what is in a checkpoint


def prepare_plugin(accelerator: Any, args: Any, model: nn.Module) -> bool:
    """Makes FSDP2 of what `accelerate launch` or `fsdp` of the arguments ask for; whether they do.

    On a CPU accelerate hears neither and would leave the model whole on each process, without a word. And of the
    classes that a model names as units of its own one may hold the input embeddings, which accelerate makes a unit
    too: that one is left out, unless the classes are named by hand.

    Raises:
        ValueError: FSDP's first version is asked for, or what is not done under FSDP2.
    """
    plugin_args = getattr(args, "fsdp_plugin_args", None)  # of transformers 4.x the environment has them
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or plugin_args is not None
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        if not asked or accelerator.num_processes == 1 or accelerator.distributed_type != DistributedType.MULTI_CPU:
            return False
        plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} keeps parameters in flat pieces, of which the output layer cannot be "
            "read: set fsdp_version: 2 in accelerate's configuration file (examples/accelerate/fsdp2.yaml), or "
            "fsdp_config={'version': 2}"
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _units(model)
    return True


def _units(model: Any) -> list[str] | None:
    """Classes that are units of their own: those that a model names, less what holds the input embeddings."""
    named = getattr(model, "_no_split_modules", None)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not named or embeddings is None:
        return None
    holders = {
        type(module).__name__ for module in model.modules() if any(part is embeddings for part in module.modules())
    }
    here = {type(module).__name__ for module in model.modules()}
    return [name for name in named if name in here - holders] or None


def is_divided(checkpoint: str) -> bool:
    """Whether a checkpoint is of a model that FSDP divided."""
    return os.path.isdir(f"{checkpoint}/{_MODEL}_0") or os.path.isfile(f"{checkpoint}/{_MODEL}.bin")


def load_divided_weights(model: Any, checkpoint: str) -> None:
    """Those of a checkpoint of FSDP2 into a model that is whole here."""
    adapter = hasattr(model, "disable_adapter")
    if os.path.isfile(f"{checkpoint}/{_MODEL}.bin"):
        weights = torch.load(f"{checkpoint}/{_MODEL}.bin", weights_only=True, map_location="cpu")
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{checkpoint!r} has weights that the model lacks: {', '.join(unknown[:3])}, ...")
        return
    weights = _of_adapter(model) if adapter else model.state_dict()
    _read(f"{checkpoint}/{_MODEL}_0", {"model": weights})
    if adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)


def _of_adapter(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=model.active_adapter)


def load_divided_optimizer(model: nn.Module, optimizer: Any, checkpoint: str) -> None:
    """The optimizer's state in a checkpoint of FSDP2, where the model is whole."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    if os.path.isfile(f"{checkpoint}/{_OPTIMIZER}.bin"):
        state = torch.load(f"{checkpoint}/{_OPTIMIZER}.bin", weights_only=True, map_location="cpu")
    else:
        state = get_optimizer_state_dict(model, optimizer)
        _read(f"{checkpoint}/{_OPTIMIZER}_0", {"optimizer": state})
    set_optimizer_state_dict(model, optimizer, state)


def _read(folder: str, into: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(into, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def load_whole_weights(model: Any, checkpoint: str) -> None:
    """Those of a checkpoint of one process, or of DDP, into a model that FSDP2 divides; by all processes.

    Raises:
        ValueError: it is of an adapter.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if hasattr(model, "disable_adapter"):
        raise ValueError(
            f"{checkpoint!r} is of an adapter that was trained without FSDP and cannot be resumed with it: resume "
            "without FSDP, or begin a new run from the adapter (PeftModel.from_pretrained(..., is_trainable=True))"
        )
    weights: dict[str, Any] = {}
    if PartialState().is_main_process:
        from transformers.modeling_utils import load_state_dict

        files = [name for name in sorted(os.listdir(checkpoint)) if name.endswith(".safetensors")]
        for name in files or ["pytorch_model.bin"]:
            weights |= load_state_dict(f"{checkpoint}/{name}")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)


def load_whole_optimizer(model: nn.Module, optimizer: Any, checkpoint: str) -> None:
    """The optimizer's state in such a checkpoint, where FSDP2 divides the model; by all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state: dict[str, Any] = {}
    if PartialState().is_main_process:
        state = torch.load(f"{checkpoint}/{_OPTIMIZER}.pt", weights_only=True, map_location="cpu")
        named = {parameter: name for name, parameter in model.named_parameters()}
        # Numbers of parameters count through the groups, which are made alike in every run.
        names = [named[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            "state": {names[number]: of_one for number, of_one in state["state"].items()},
            "param_groups": [
                {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
            ],
        }
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
