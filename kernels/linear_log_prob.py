"""linear_log_prob, fused: log-probabilities of targets, and the gradient of logits, out of hidden states and head.

Contract: dam/ops/linear_log_prob.py. Its chunked form needs no kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dam.kernels import core, head, log_prob


def linear_log_prob(
    of: head.Tensors,
    target: Tensor,  # [T, J]
    exclude: Tensor | None,  # [T]
    temperature: float,
    *,
    workspace: int,  # bytes
) -> tuple[Tensor, Tensor]:
    whole = head.Head(*of)
    rows, columns = whole.hidden.shape[0], whole.weight.shape[0]
    value = whole.hidden.new_empty(target.shape, dtype=torch.float32)
    log_escape = whole.hidden.new_empty((rows,), dtype=torch.float64)
    for part in head.summary_chunks("linear_log_prob", whole, 8, workspace):
        lookup = log_prob.Lookup(
            whole.hidden[part], columns, target[part], None if exclude is None else exclude[part], temperature,
            (value[part], log_escape[part]),
        )  # fmt: skip
        summary = head.summarise(
            "linear_log_prob", whole.part(part), lookup.exclude, lookup.scale, target=lookup.target,
            target_logit=lookup.value,
        )  # fmt: skip
        lookup.finish(summary.block_max, summary.block_excess)
    return value, log_escape


def rows_of(
    grad: Tensor,  # [T, J]
    target: Tensor,  # [T, J]
    log_escape: Tensor,  # float64 [T]
    exclude: Tensor | None,  # [T]
    temperature: float,
) -> head.Rows:
    """What the gradient of the logits depends on, beside them."""
    scale = 1.0 / temperature
    pull = (-scale * grad.double()).contiguous()
    counted = target >= 0 if exclude is None else (target >= 0) & (target != exclude[:, None])
    coefficient = torch.where(counted, pull, 0.0).sum(dim=1).clamp(-core.LARGEST.value, core.LARGEST.value)
    return head.Rows(exclude, target, pull, log_escape.double() / scale, coefficient.float())
