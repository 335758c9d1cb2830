"""linear_log_prob: `log_prob` on the logits of a head, and what their gradient depends on.

Fused, the sums and the targets' logits are taken on the chip. Chunked, the library multiplies and log_prob's kernels
see the logits chunk by chunk, while they are in the cache.
Contract: dam/ops/linear_log_prob.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dam.kernels import configs, core, head, log_prob
from dam.kernels.excluded import Excluded
from dam.kernels.projection import Projection


def linear_log_prob(
    of: Projection,
    target: Tensor,  # [T, J]
    exclude: Excluded,
    temperature: float,
    *,
    library: head.Library,
    workspace: int,  # bytes
) -> tuple[Tensor, Tensor]:
    op = "linear_log_prob"
    hidden, rows, columns = of.hidden, of.hidden.shape[0], of.weight.shape[0]
    config = configs.lookup(op, hidden.device, hidden.element_size(), rows, columns)
    fused = head.form_of(op, hidden, columns) == "fused"
    limit = min(workspace, int(config["chunk_mb"] * 2**20))
    parts = head.summary_chunks(op, of, 8, workspace) if fused else head.row_chunks(rows, columns, 4, limit)
    memory = None if fused else head.chunk_memory(hidden, parts, columns, limit)
    value = hidden.new_empty(target.shape, dtype=torch.float32)
    log_escape = hidden.new_empty((rows,), dtype=torch.float64)
    for part in parts:
        lookup = log_prob.Lookup(
            hidden[part], columns, target[part], exclude.part(part), temperature,
            (value[part], log_escape[part]),
        )  # fmt: skip
        if memory is None:
            summary = head.summarise(
                op, of.part(part), lookup.exclude, lookup.scale, target=lookup.target, target_logit=lookup.value
            )
            lookup.finish(summary.block_max, summary.block_excess)
        else:
            for first, logits in head.chunked_logits(library, part, columns, limit, memory):
                lookup.see(logits, first)
    return value, log_escape


def rows_of(
    grad: Tensor,  # [T, J]
    target: Tensor,  # [T, J]
    log_escape: Tensor,  # float64 [T]
    exclude: Excluded,
    temperature: float,
) -> head.Rows:
    """What the gradient of the logits depends on, beside them."""
    scale = 1.0 / temperature
    pull = (-scale * grad.double()).contiguous()
    counted = target >= 0 if exclude.row is None else (target >= 0) & (target != exclude.row[:, None])
    coefficient = torch.where(counted, pull, 0.0).sum(dim=1).clamp(-core.LARGEST.value, core.LARGEST.value)
    return head.Rows(exclude, target, pull, log_escape.double() / scale, coefficient.float())
