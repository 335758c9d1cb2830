"""linear_jump: `jump` fused with the language-model head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.backends import choice, cuda, deferral, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _group, _head, _linear, _op, _parallel, _rows
from dam.ops import jump as _row_op


@_checks.renamed("weight", "head_weight")
def linear_jump(
    hidden: Tensor,  # [..., D]
    head_weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    *,
    lora: _head.LoRA | None = None,
    softcap: float | None = None,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    num_samples: int = 1,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    check: bool = True,
    group: Any = None,
) -> _row_op.Jump:
    """`jump` on logits = hidden @ head_weight^T + bias, without storing them: the same draws up to rounding.

    With softcap on logits = softcap * tanh((hidden @ head_weight^T + bias) / softcap).

    Args:
        hidden: hidden states [..., D], of T rows in all; unit inner stride.
        head_weight, bias: the head, [V, D] and [V], of the dtype of hidden.
        lora: an adapter on the head, `dam.LoRA(a [R, D], b [V, R], scale)`: its weight is then
            head_weight + scale * b @ a, which is never formed.
        softcap: of the logits, > 0 and in their units, before temperature and exclusion. A bias of -inf then is a logit
            of -softcap: what may not be drawn goes into suppress.
        exclude, suppress, temperature, num_samples, seed, row_ids, check: as for `jump`.
        group: process group whose ranks each have some rows of the head, of its bias and of lora.b, as for `jump`;
            hidden states and lora.a are whole on every rank.

    Returns:
        Jump(target, log_prob, log_escape) as `jump` does. Not differentiable: see `linear_log_prob`.
        Extra memory is bounded by the environment variable DAM_WORKSPACE_MB (unless set 256, on a GPU 1.25% of its
        memory if that is more). On a CPU it is kept for the next call, until `dam.release_workspace()`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or (with check)
            a row cannot be sampled; the message names the first such row.
    """
    op = "linear_jump"
    if _group.is_asked(group, head_weight):
        temperature = _checks.temperature(op, temperature, zero=True)
        divided = _head.Head(head_weight, bias, lora, softcap)
        call = _parallel.of_head(op, group, _IMPLEMENTATIONS, hidden, divided, exclude, suppress, temperature)
        return _row_op.over_group(call, num_samples, seed, row_ids, check)
    if lora is None and _op.at_once(hidden, head_weight, bias, exclude, suppress, seed, row_ids):
        seed = _row_op.random_seed(hidden) if seed is None else seed
        logits = _head.at_once(hidden, head_weight, bias, softcap)
        if logits is not None:
            found = _row_op.at_once(logits, exclude, suppress, temperature, num_samples, seed, row_ids, check)
            if found is not None:
                return found
    hidden, lead = _checks.rows(op, "hidden", hidden, "D")
    head = _head.checked(op, hidden, head_weight, bias, lora, softcap)
    excluded = _excluded.checked(op, exclude, suppress, lead, head_weight.shape[0], hidden)
    _checks.boolean(op, "check", check)
    temperature, num_samples, seed, row_ids = _row_op.sampling_arguments(
        op, hidden, lead, temperature, num_samples, seed, row_ids
    )
    backend = choice.choose(op, _IMPLEMENTATIONS, hidden)
    tensors = (None if x is None else x.detach() for x in head.tensors)
    drawn = _linear_jump(*tensors, head.softcap, *excluded, temperature, num_samples, seed, row_ids, check, backend)
    return _row_op.as_jump(drawn, num_samples, lead)


def _chunked(
    backend: str,
    head: _head.Projection,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    rows = head.hidden.shape[0]
    out: tuple[Tensor, Tensor, Tensor] | None = None
    for part, (memory,) in _head.chunks(head, arrays=1, backend=backend):
        row_ids = _ids(row_ids, part, head.hidden)
        *drawn, bad = _row_op._IMPLEMENTATIONS[backend](
            _head.logits(head.part(part), memory),
            exclude.part(part),
            temperature,
            num_samples,
            seed,
            None if row_ids is None else _rows.part(row_ids, part),
            check,
        )
        assert isinstance(bad, int)  # of backends that know at once
        if part == slice(0, rows):
            target, log_prob, log_escape = drawn
            return target, log_prob, log_escape, bad
        out = out or _row_op.outputs(head.hidden, rows, num_samples)
        for whole, piece in zip(out, drawn, strict=True):
            whole[part] = piece
        if bad >= 0:
            return *out, part.start + bad
    return *(out or _row_op.outputs(head.hidden, rows, num_samples)), -1


def _ids(row_ids: Tensor | None, part: slice, hidden: Tensor) -> Tensor | None:
    """Names of all rows' streams; None where a row op that sees them all, as `part` is all, counts them itself."""
    rows = hidden.shape[0]
    return torch.arange(rows, device=hidden.device) if row_ids is None and part != slice(0, rows) else row_ids


def _triton(head: _head.Projection, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    return triton.launcher("linear_jump")(
        head, *arguments, library=_linear.library(head), workspace=_rows.workspace_bytes(head.hidden.device)
    )


def _cuda(
    head: _head.Projection,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """Library matmuls over chunks of rows, with a draw after each; whether a row is bad is asked once, at the end."""
    rows = head.hidden.shape[0]
    out = _row_op.outputs(head.hidden, rows, num_samples)
    lowest_bad = cuda.lowest_bad(head.hidden, rows, check)
    key = cuda.seed(seed, head.hidden)
    for part, (memory,) in _head.chunks(head, arrays=1, backend="cuda"):
        row_ids = _ids(row_ids, part, head.hidden)
        logits = _head.logits(head.part(part), memory)
        target, log_prob, log_escape = (_rows.part(x, part) for x in out)
        _row_op.cuda_draw(
            logits,
            exclude.part(part),
            temperature,
            num_samples,
            key,
            None if row_ids is None else _rows.part(row_ids, part),
            (target, log_prob, log_escape),
            lowest_bad,
            part.start,
        )
    return *out, cuda.unread(lowest_bad)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "torch": functools.partial(_chunked, "torch"),
    "cpu": functools.partial(_chunked, "cpu"),
    "triton": _triton,
    "cuda": _cuda,
}


@_op.op("linear_jump")
def _linear_jump(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    softcap: float | None,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.index_range("linear_jump", "exclude", exclude, weight.shape[0], backend)
    head = _head.Projection(hidden, weight, bias, low_hidden, low_weight, softcap)
    excluded = Excluded(exclude, suppressed)
    *drawn, bad = _IMPLEMENTATIONS[backend](head, excluded, temperature, num_samples, seed, row_ids, check)
    bad = deferral.first_bad(bad, hidden.shape[0], _row_op.bad_later("linear_jump"))
    if bad >= 0:
        one = slice(bad, bad + 1)
        memory = hidden.new_empty((1, weight.shape[0]), dtype=_rows.accumulator(hidden.dtype))
        logits = _head.logits(head.part(one), memory)
        _row_op.raise_bad_row("linear_jump", bad, logits, excluded.part(one))
    target, log_prob, log_escape = drawn
    return target, log_prob, log_escape


@_linear_jump.register_fake
def _(
    hidden,
    weight,
    bias,
    low_hidden,
    low_weight,
    softcap,
    exclude,
    suppressed,
    temperature,
    num_samples,
    seed,
    row_ids,
    check,
    backend,
):
    return _row_op.outputs(hidden, hidden.shape[0], num_samples)
