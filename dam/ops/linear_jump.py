"""linear_jump: `jump` fused with the language-model head."""

from __future__ import annotations

import torch
from torch import Tensor

from dam.ops import _backend, _checks, _head
from dam.ops import jump as _row_op


def linear_jump(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    exclude: int | Tensor = -1,
    temperature: float = 1.0,
    num_samples: int = 1,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    check: bool = True,
) -> _row_op.Jump:
    """`jump` on logits = hidden @ weight^T + bias, without storing them: the same draws up to rounding.

    Args:
        hidden: hidden states [T, D]; unit inner stride.
        weight: head weight [V, D], of the dtype of hidden.
        bias: head bias [V].
        exclude, temperature, num_samples, seed, row_ids, check: as for `jump`.

    Returns:
        Jump(target, log_prob, log_escape) as `jump` does. Not differentiable: see `linear_log_prob`.
        Extra memory is bounded by the environment variable DAM_WORKSPACE_MB (256 unless set).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or (with check)
            a row cannot be sampled; the message names the first such row.
    """
    op = "linear_jump"
    _checks.matrix(op, "hidden", hidden, "D")
    _checks.head(op, "weight", weight, "bias", bias, "hidden", hidden)
    rows = hidden.shape[0]
    excluded = _checks.exclude(op, exclude, rows, weight.shape[0], hidden)
    _checks.boolean(op, "check", check)
    temperature, num_samples, seed, row_ids = _row_op.sampling_arguments(
        op, hidden, rows, temperature, num_samples, seed, row_ids
    )
    backend = _backend.choose(op, _row_op._IMPLEMENTATIONS, hidden)
    bias = None if bias is None else bias.detach()
    drawn = _linear_jump(
        hidden.detach(), weight.detach(), bias, excluded, temperature, num_samples, seed, row_ids, check, backend
    )
    return _row_op.as_jump(drawn, num_samples)


@torch.library.custom_op("dam::linear_jump", mutates_args=())
def _linear_jump(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.index_range("linear_jump", "exclude", exclude, weight.shape[0])
    rows = hidden.shape[0]
    ids = torch.arange(rows, device=hidden.device) if row_ids is None else row_ids
    target, log_prob, log_escape = _row_op.outputs(hidden, rows, num_samples)
    for part, (memory,) in _head.chunks(rows, weight, arrays=1):
        logits = _head.logits(hidden[part], weight, bias, memory)
        target[part], log_prob[part], log_escape[part], bad = _row_op._IMPLEMENTATIONS[backend](
            logits,
            None if exclude is None else exclude[part],
            temperature,
            num_samples,
            seed,
            ids[part],
            check,
        )
        if bad >= 0:
            one = slice(bad, bad + 1)
            _row_op.raise_bad_row(
                "linear_jump", part.start + bad, logits[one], None if exclude is None else exclude[part][one]
            )
    return target, log_prob, log_escape


@_linear_jump.register_fake
def _(hidden, weight, bias, exclude, temperature, num_samples, seed, row_ids, check, backend):
    return _row_op.outputs(hidden, hidden.shape[0], num_samples)
