"""linear_matching_loss, fused: the loss in one pass that contains the matmul, and the gradient of logits in another.

Contract: dam/ops/linear_matching_loss.py. Its chunked form needs no kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels import core, head, matching_loss
from dam.kernels.excluded import Excluded
from dam.kernels.launch import launch
from dam.kernels.projection import Projection


@triton.jit(do_not_specialize=core.VARYING)
def finish_kernel(
    exclude,  # [T], or None
    exclude_stride,
    target,  # [T, J]
    target_stride,
    slot_stride,
    weight,  # [T, J]
    weight_stride,
    weight_slot_stride,
    base_weight,  # [T], or None
    base_weight_stride,
    row_scale,  # [T]
    row_scale_stride,
    block_max,  # [T, blocks]
    block_excess,
    base_max,
    base_excess,
    cross,
    target_logit,  # [T, J]: logits of the targets
    row_loss,  # float64 [T]
    pull,  # float64 [T, J]: what each target takes off the gradient
    reference,  # float64 [T], see gradient_kernel
    coefficient,  # [T]
    base_reference,  # float64 [T]
    base_coefficient,  # [T]
    rows,
    columns,
    slots,
    blocks,
    scale_high,
    scale_low,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    excluded = None
    if exclude is not None:
        excluded = core.load_excluded(exclude, exclude_stride, row, columns)
    loss, slope, at, factor, base_at, base_factor = matching_loss.finish_rows(
        target, target_stride, slot_stride, weight, weight_stride, weight_slot_stride, base_weight,
        base_weight_stride, row_scale, row_scale_stride, block_max, block_excess, base_max, base_excess, cross,
        target_logit, row, excluded, rows, columns, slots, blocks, core.float64_of(scale_high, scale_low), NORMALIZED,
        SLOTS, BLOCK,
    )  # fmt: skip
    tl.store(row_loss + row, loss, mask=valid)
    tl.store(reference + row, at, mask=valid)
    tl.store(coefficient + row, factor, mask=valid)
    tl.store(base_reference + row, base_at, mask=valid)
    tl.store(base_coefficient + row, base_factor, mask=valid)
    for slot in range(0, slots, SLOTS):
        w = core.load_per_slot(weight, weight_stride, weight_slot_stride, row, slot, slots, SLOTS)
        index = slot + tl.arange(0, SLOTS)[None, :]
        stored = valid[:, None] & (index < slots)
        tl.store(pull + row[:, None] * slots + index, slope[:, None] * w, mask=stored)


def linear_matching_loss(
    of: Projection,
    target: Tensor,  # [T, J]
    weight: Tensor,  # [T, J]
    base: Projection | None,
    base_weight: Tensor | None,  # [T]
    row_scale: Tensor,  # [T]
    exclude: Excluded,
    normalized: bool,
    temperature: float,
    *,
    workspace: int,  # bytes
) -> tuple[Tensor, head.Rows]:
    """Loss of each row, float64 [T], and what the gradient of its logits depends on, beside them."""
    op, scale = "linear_matching_loss", core.scale_of(temperature)
    rows, columns = of.hidden.shape[0], of.weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return of.hidden.new_empty(shape, dtype=dtype)

    row_loss, pull = empty(rows), empty(*target.shape)
    reference, base_reference = empty(rows), empty(rows)
    coefficient, base_coefficient = empty(rows, dtype=torch.float32), empty(rows, dtype=torch.float32)
    for part in head.summary_chunks(op, of, 8 if base is None else 20, workspace):
        some = exclude.part(part)
        target_logit = empty(*target[part].shape, dtype=torch.float32)
        summary = head.summarise(
            op, of.part(part), some, scale, base=None if base is None else base.part(part),
            target=target[part], target_logit=target_logit,
        )  # fmt: skip
        some_base_weight = None if base_weight is None else base_weight[part]
        g = core.geometry("matching_loss", of.hidden[part], columns)
        launch(
            finish_kernel, (g.blocks,), exclude=some.row, exclude_stride=core.stride_of(some.row), target=target[part],
            target_stride=target.stride(0), slot_stride=target.stride(1), weight=weight[part],
            weight_stride=weight.stride(0), weight_slot_stride=weight.stride(1), base_weight=some_base_weight,
            base_weight_stride=core.stride_of(some_base_weight), row_scale=row_scale[part],
            row_scale_stride=row_scale.stride(0), block_max=summary.block_max, block_excess=summary.block_excess,
            base_max=summary.base_max, base_excess=summary.base_excess, cross=summary.cross, target_logit=target_logit,
            row_loss=row_loss[part], pull=pull[part], reference=reference[part], coefficient=coefficient[part],
            base_reference=base_reference[part], base_coefficient=base_coefficient[part],
            rows=part.stop - part.start, columns=columns, slots=target.shape[1], blocks=summary.blocks,
            scale_high=scale.scale_high, scale_low=scale.scale_low, NORMALIZED=normalized, ROWS=g.ROWS,
            SLOTS=core.slots_of(target.shape[1]), BLOCK=core.block_of(summary.blocks), **g.options,
        )  # fmt: skip
    of_rows = head.Rows(exclude, target, pull, reference, coefficient)
    if base is not None:
        of_rows = of_rows._replace(base_reference=base_reference, base_coefficient=base_coefficient)
    return row_loss, of_rows
