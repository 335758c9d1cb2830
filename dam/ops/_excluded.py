"""Destinations that an op leaves out: one of each row (`exclude`) and a set that no row has (`suppress`)."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from dam.backends import deferral
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _op


def checked(
    op: str,
    exclude: int | Tensor,
    suppress: Tensor | Sequence[int] | Set[int] | None,
    lead: torch.Size,
    columns: int,
    reference: Tensor,
) -> Excluded:
    """The arguments of an op over rows with these leading dimensions, once they fit."""
    return Excluded(
        _checks.exclude(op, exclude, lead, columns, reference), _suppressed(op, suppress, columns, reference)
    )


def is_nothing(suppress: object) -> bool:
    """Whether it leaves out no destination, as far as can be told without looking into tensors."""
    return suppress is None or (isinstance(suppress, (list, tuple)) and not suppress)


def given(
    op: str, value: Tensor | Sequence[int] | Set[int] | None, reference: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """suppress as a mask bool [V] or as ids int64 [S], whose range is not looked at; neither for nothing."""
    if value is None:
        return None, None
    if not isinstance(value, Tensor):
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Set)):
            raise TypeError(f"{op}: suppress must be a tensor or a sequence of ids; got {type(value).__name__}")
        ids = list(value)
        for v in ids:
            if isinstance(v, bool) or not isinstance(v, int):
                raise TypeError(f"{op}: suppress must hold ids, ints; got {type(v).__name__} (a mask is a bool tensor)")
        return None, _sent(op, ids, reference) if ids else None
    _checks.same_device(op, "suppress", value, reference)
    if value.dtype == torch.bool:
        return value, None
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: suppress must be a bool mask or int64 ids; got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{op}: suppress must be ids of shape [S], the same for all rows; got {list(value.shape)}")
    return None, value


def _suppressed(
    op: str, value: Tensor | Sequence[int] | Set[int] | None, columns: int, reference: Tensor
) -> Tensor | None:
    """bool [V], or None for nothing."""
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        for v in value:
            if isinstance(v, int) and not isinstance(v, bool) and not 0 <= v < columns:
                raise ValueError(f"{op}: suppress must hold ids in [0, {columns}); got {v}")
    mask, ids = given(op, value, reference)
    if mask is not None and mask.shape != (columns,):
        raise ValueError(f"{op}: a mask suppress must have shape [{columns}]; got {list(mask.shape)}")
    if ids is not None:
        return _mask_of(ids, columns, op)
    return None if mask is None else mask.contiguous()


def _sent(op: str, ids: list[int], reference: Tensor) -> Tensor:
    """int64 [S] on the device of `reference`, without waiting for it."""
    if reference.device.type != deferral.GPU or torch.compiler.is_compiling():
        return torch.tensor(ids, dtype=torch.int64, device=reference.device)
    if deferral.is_captured(reference):
        raise ValueError(
            f"{op}: suppress is ids of the host, which a CUDA graph would read again whenever it runs: capture the "
            "call with a tensor on the GPU"
        )
    return torch.tensor(ids, dtype=torch.int64, device="cpu").pin_memory().to(reference.device, non_blocking=True)


@_op.op("suppressed")
def _mask_of(ids: Tensor, columns: int, op: str) -> Tensor:
    """bool [columns], True at the ids. On a GPU an id out of range is a device-side assertion, as in torch's ops."""
    if ids.device.type == "cpu" and ids.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= columns:
            raise ValueError(f"{op}: suppress must hold ids in [0, {columns}); got {low if low < 0 else high}")
    return ids.new_zeros(columns, dtype=torch.bool).scatter_(0, ids, True)


@_mask_of.register_fake
def _(ids, columns, op):
    return ids.new_empty(columns, dtype=torch.bool)


def split(target: Tensor, excluded: Excluded) -> tuple[Tensor, Tensor | None]:
    """Targets [T, J] with -1 at suppressed ones, as implementations take them, and which these are, bool [T, J].

    Dropped here, once for all, so that kernels look for suppressed columns only where they load whole tiles.
    """
    if excluded.suppressed is None:
        return target, None
    # Out of range they are left for the op to find.
    never = excluded.suppressed[target.clamp(0, excluded.suppressed.shape[0] - 1)] & (target >= 0)
    return target.where(~never, -1), never


def with_never(log_prob: Tensor, never: Tensor | None, log_escape: Tensor) -> Tensor:
    """Log-probabilities [T, J] with those of suppressed targets: -inf, or NaN in a row that has no distribution."""
    if never is None:
        return log_prob
    nothing = torch.where(log_escape < torch.inf, -torch.inf - log_escape, torch.nan)  # -inf less -inf is NaN
    return torch.where(never, nothing[:, None].to(log_prob.dtype), log_prob)
