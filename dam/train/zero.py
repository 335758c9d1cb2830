"""What DeepSpeed is told, and has saved, looked at before the first step."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dam.models.sharding import is_partitioned


def check_zero(config: Mapping[str, Any], max_grad_norm: float) -> None:
    """That DAMTrainer and what DeepSpeed is told agree.

    Args:
        config: DeepSpeed's, where what is "auto" has been filled in.
        max_grad_norm: as the trainer's arguments say.

    Raises:
        ValueError: they do not; the message says which setting to change.
    """
    zero = config.get("zero_optimization", {})
    if config.get("fp16", {}).get("enabled", False):
        raise ValueError(
            "fp16 with DeepSpeed: its loss scale is not known where the fused operations form gradients, which would "
            "lose what it is there to keep; set bf16 (mixed_precision: bf16)"
        )
    if config.get("gradient_clipping", 0.0) != max_grad_norm:
        raise ValueError(
            f"DeepSpeed's gradient_clipping is {config.get('gradient_clipping')}, but max_grad_norm is {max_grad_norm}"
            ': set gradient_clipping to "auto", or leave it out of deepspeed_config'
        )
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save", False):
        raise ValueError(
            "save_model and checkpoints would hold parts of a model that from_pretrained cannot load: set "
            "zero3_save_16bit_model: true (stage3_gather_16bit_weights_on_model_save)"
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1 or config.get("sequence_parallel_size", 1) > 1:
        raise ValueError(
            "tensor or sequence parallelism of DeepSpeed: processes that share a sequence would be given different "
            "groups; leave it out"
        )


def check_whole(name: str, models: Iterable[nn.Module]) -> None:
    """That DeepSpeed has not divided a model as it was loaded.

    Raises:
        ValueError: it has.
    """
    for model in models:
        if any(map(is_partitioned, model.parameters())):
            raise ValueError(
                f"the {name}, {type(model).__name__}, was divided by DeepSpeed as it was loaded, so that no process "
                "has its weights to keep or to run: set zero3_init_flag: false"
            )


def check_checkpoint(folder: str, processes: int | None, universal: bool = False) -> None:
    """That a checkpoint can be gone on from: DeepSpeed's parts are of as many processes.

    Args:
        folder: the checkpoint.
        processes: of this run under DeepSpeed; None: it is not under DeepSpeed.
        universal: DeepSpeed was told to load a universal checkpoint (checkpoint: load_universal: true), of any number.

    Raises:
        ValueError: it cannot; the message says how.
    """
    parts = glob.glob(os.path.join(folder, "global_step*", "*zero_pp_rank_*_optim_states.pt"))
    ranks = {match[1] for part in parts if (match := re.search(r"zero_pp_rank_(\d+)_", os.path.basename(part)))}
    if processes is None:
        if ranks:
            raise ValueError(
                f"{folder!r} was saved under DeepSpeed, which has the optimizer's state: resume under DeepSpeed, by as "
                f"many processes ({len(ranks)}), or begin a new run from its weights"
            )
    elif universal:
        if not os.path.exists(os.path.join(folder, "latest_universal")):
            raise ValueError(
                f"{folder!r} has no universal checkpoint: make one of it by python -m "
                "deepspeed.checkpoint.ds_to_universal"
            )
    elif not ranks:
        raise ValueError(
            f"{folder!r} was not saved under DeepSpeed: resume without it, or begin a new run from its weights"
        )
    elif len(ranks) != processes:
        raise ValueError(
            f"{folder!r} was saved by {len(ranks)} processes under DeepSpeed, whose parts of the optimizer's state "
            f"this run of {processes} cannot take: resume with {len(ranks)}"
        )
