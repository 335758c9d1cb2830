"""DARE's data-parallel actor for Discrete Adjoint Matching: log-probabilities and updates that form no logits.

Goes to verl/workers/actor/dam_actor.py of DARE (README.md here; `install.py` puts it there), which takes the place of
verl/workers/actor/llada_dp_actor_*.py where algorithm.name is "dam".

Not run here: DARE's trainer and workers, Ray, a GPU. Run here on a CPU: this file, by tests/examples/test_dare.py
behind the interfaces of DARE at commit 83ae8a3 that dare_interfaces.py there records, in one process and under FSDP2 in
two, and by dare_itself.py on DARE's own DataProto and modelling code of LLaDA and Dream, small and random.

Facts of DARE that it goes by (verl 0.3.1.dev inside):
    compute_log_prob(data, calculate_entropy) returns (entropy, log_probs, loss_per_sample), [B, R] each, and is called
    for actor and reference policy alike; update_policy(data) returns metrics, lists by name; _optimizer_step() clips,
    steps and returns the norm of the gradient; batch sizes in `config` are those of one process by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.trainer.ppo.dam_loss import CALL, WEIGHT, Law, matching_loss, response_log_prob
from verl.utils.device import get_torch_device
from verl.workers.actor import DataParallelPPOActor

from dam.models import as_denoiser

_READ = ("input_ids", "responses", "attention_mask", CALL)


class DLLMDataParallelPPOActor(DataParallelPPOActor):  # by this name DARE's worker asks for it
    """Actor, or without an optimizer the reference policy, which is the base.

    The model runs below its output layer only (`dam.models.as_denoiser`), and the head at the positions that are asked
    for: no array [rows, V] beyond DAM_WORKSPACE_MB is formed, in either pass.

    Args:
        config: DARE's `actor_rollout_ref.actor`, or `.ref`.
        actor_module: the model, as it is or as FSDP2 has divided it.
        actor_optimizer: None for the reference policy.

    Raises:
        ValueError: a setting of DARE's that this actor would have to leave out; the message says what to set.
    """

    def __init__(self, config: Any, actor_module: torch.nn.Module, actor_optimizer: Any = None):
        _check(config, actor_module)
        super().__init__(config, actor_module, actor_optimizer)

    def compute_log_prob(self, data: Any, calculate_entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token of the response, in the network call that drew it.

        Returns:
            An unbiased estimate of the entropy it was drawn with, -log p; log p; and -log p as loss_per_sample. All
            float32 [B, R].
        """
        if data.meta_info.get("use_dynamic_bsz"):
            raise ValueError(_DYNAMIC)
        law, rows = Law.of(data.meta_info), {name: data.batch[name] for name in _READ}
        self.actor_module.eval()
        parts = []
        for part in _parts(len(rows["input_ids"]), data.meta_info["micro_batch_size"]):
            with torch.no_grad(), _autocast(rows["input_ids"].device):
                batch = {name: value[part] for name, value in rows.items()}
                parts.append(response_log_prob(as_denoiser(self.actor_module), batch, law))
        log_prob = torch.cat(parts)
        return -log_prob, log_prob, -log_prob

    def update_policy(self, data: Any) -> dict[str, list[float]]:
        """An optimizer step for each mini-batch of ppo_mini_batch_size rows: the mean over them of the matching loss.

        Which states are trained at is drawn anew in each step, from a seed of torch's generator on the CPU, which
        verl's checkpoints keep.
        """
        if data.meta_info.get("multi_turn"):
            raise ValueError("turns of tools are not masks to fill in: set rollout.multi_turn.enable=False")
        law, config = Law.of(data.meta_info), self.config
        rows = {name: data.batch[name] for name in (*_READ, WEIGHT)}
        device, count = get_torch_device().current_device(), len(rows["input_ids"])
        row_ids = torch.arange(count) + _rank() * count
        self.actor_module.train()
        metrics: dict[str, list[float]] = {"actor/dam_loss": [], "actor/grad_norm": []}
        for _ in range(config.ppo_epochs):
            for mini in _parts(count, config.ppo_mini_batch_size):
                self.actor_optimizer.zero_grad()
                seed, size = int(torch.randint(2**62, ())), mini.stop - mini.start
                whole = 0.0
                for part in _parts(size, config.ppo_micro_batch_size_per_gpu, mini.start):
                    batch = {name: value[part].to(device) for name, value in rows.items()}
                    with _autocast(batch["input_ids"].device):
                        loss = matching_loss(
                            as_denoiser(self.actor_module), batch, law, seed=seed, row_ids=row_ids[part].to(device)
                        )
                    share = loss * ((part.stop - part.start) / size)
                    share.backward()
                    whole += float(share.detach())
                metrics["actor/dam_loss"].append(whole)
                metrics["actor/grad_norm"].append(_number(self._optimizer_step()))
        self.actor_optimizer.zero_grad()
        return metrics


_DYNAMIC = (
    "processes must make as many forward passes as each other, in batches of rows: set "
    "actor_rollout_ref.actor.use_dynamic_bsz=False, and ppo_micro_batch_size_per_gpu"
)


def _check(config: Any, module: torch.nn.Module) -> None:
    if isinstance(module, FullyShardedDataParallel):
        raise ValueError("the head is read out of FSDP2's parameters, not FSDP1's: set actor.strategy=fsdp2")
    if config.get("use_dynamic_bsz", False):
        raise ValueError(_DYNAMIC)
    if config.get("ulysses_sequence_parallel_size", 1) > 1:
        raise ValueError("each process must have whole sequences: set ulysses_sequence_parallel_size=1")
    for name, why in (
        ("kl_loss_coef", "the weights hold the KL to the base (algorithm.dam.beta is its coefficient)"),
        ("entropy_coeff", "the matching loss has no entropy term"),
        ("cfg_scale", "rollouts and training are without guidance"),
    ):
        if config.get(name, 0.0):
            raise ValueError(f"{why}: set {name}=0.0; got {config.get(name)}")


def _parts(count: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of `size` rows, of `count` from `start` on; the last may be smaller."""
    return (slice(at, min(at + size, start + count)) for at in range(start, start + count, size))


def _number(norm: Tensor) -> float:
    """A norm, which under FSDP2 each process may have a part of."""
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole.detach())


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _autocast(device: torch.device) -> Any:
    """bfloat16 on a GPU, as DARE's actors have it around their models."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")
