"""The gradient of some columns of logits, for ops whose sums over a row were made elsewhere, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dam.backends import address, cpu, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _rows

_HELD = 69.0  # log of what a float32 coefficient holds with room to spare


class Rate(NamedTuple):
    """What a gradient has of a row's rates: factor * exp(log_rate + logits / temperature - log_escape), float64 [T]."""

    factor: Tensor
    log_rate: Tensor  # 0 of normalised rates, log_escape of rates as they are
    log_escape: Tensor

    def share(self, temperature: float) -> Tensor:
        """float64 [T, 2]: coefficient and reference of coefficient * exp((logits - reference) / temperature).

        0 where nothing is asked for, whatever the row holds, and where it can reach nothing. What float32 cannot hold
        of the coefficient goes into the reference.
        """
        log_size = self.factor.abs().log() + self.log_rate
        held = log_size < _HELD
        nothing = (self.factor == 0) | (self.log_escape == -torch.inf)
        coefficient = torch.where(held, log_size.exp(), 1.0).copysign(self.factor)
        reference = (self.log_escape - torch.where(held, 0.0, log_size)) * temperature
        zero = torch.zeros_like(reference)
        return torch.stack((zero.where(nothing, coefficient), zero.where(nothing, reference)), dim=1)


def shares_of(model: Rate, base: Rate | None, temperature: float) -> Tensor:
    """float64 [T, 4]: the shares of the logits and of base logits."""
    of_model = model.share(temperature)
    return torch.cat((of_model, torch.zeros_like(of_model) if base is None else base.share(temperature)), dim=1)


def _torch(
    logits: Tensor,
    base_logits: Tensor | None,
    first_column: int,
    vocabulary: int,
    target: Tensor,
    pull: Tensor,
    shares: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor,
) -> None:
    rows, columns = logits.shape
    target = _rows.drop_excluded(target, exclude) - first_column
    here = (target >= 0) & (target < columns)
    target, pull = target.where(here, 0), torch.where(here, pull, 0.0)
    local = exclude.shifted(first_column, columns)
    for part in _rows.chunks(rows, columns * _rows.REFERENCE_BYTES):
        found = torch.zeros_like(logits[part], dtype=torch.float64)
        for sign, array, at in ((1.0, logits, 0), (-1.0, base_logits, 2)):
            if array is None:
                continue
            x = _rows.allowed(array[part], local.part(part))
            coefficient, reference = shares[part, at, None], shares[part, at + 1, None]
            found += sign * torch.where(coefficient == 0, 0.0, coefficient * ((x - reference) / temperature).exp())
        into[part] = found.scatter_add_(1, target[part], -pull[part])


def _cpu(
    logits: Tensor,
    base_logits: Tensor | None,
    first_column: int,
    vocabulary: int,
    target: Tensor,
    pull: Tensor,
    shares: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor,
) -> None:
    target, pull, shares = target.contiguous(), pull.contiguous(), shares.contiguous()
    suppressed = address.bits(exclude.suppressed)
    cpu.kernels.gradient(
        shape=cpu.shape(logits),
        logits=address.matrix(logits),
        base=address.matrix(base_logits),
        first_column=first_column,
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        target=target.data_ptr(),
        targets=target.shape[1],
        pull=pull.data_ptr(),
        shares=shares.data_ptr(),
        temperature=temperature,
        gradient=into.data_ptr(),
    )


def _cuda(
    logits: Tensor,
    base_logits: Tensor | None,
    first_column: int,
    vocabulary: int,
    target: Tensor,
    pull: Tensor,
    shares: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor,
) -> None:
    words = []
    largest = torch.finfo(torch.float32).max
    for at in (0, 2):
        reference = shares[:, at + 1]
        high = reference.float()
        words += [shares[:, at].clamp(-largest, largest).float(), high, (reference - high).float()]
    cuda_gradient(
        logits, base_logits, first_column, target, pull, torch.stack(words, dim=1), exclude, temperature, into
    )


def cuda_gradient(
    logits: Tensor,
    base_logits: Tensor | None,
    first_column: int,
    target: Tensor,
    pull: Tensor,
    shares: Tensor,  # float32 [T, SHARES]: coefficient and reference in two words, of the logits and of the base's
    exclude: Excluded,  # `suppressed` of these columns
    temperature: float,
    into: Tensor,
    target_gradient: Tensor | None = None,  # work memory, float32 [T, J]
) -> None:
    suppressed = address.bits(exclude.suppressed)
    if target_gradient is None:
        target_gradient = pull.new_empty(pull.shape, dtype=torch.float32)
    cuda.kernels.gradient(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        base=address.matrix(base_logits),
        first_column=first_column,
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        target=address.targets(target),
        pull=address.values(pull),
        shares=shares.data_ptr(),
        scale=1.0 / temperature,
        target_gradient=target_gradient.data_ptr(),
        gradient=address.matrix(into),
        gradient_dtype=address.DTYPE_CODE[into.dtype],
        where=cuda.where(logits),
    )


# Fill `into` [T, V], which may be the logits, with the gradient of logits x [T, V], of columns that begin at
# first_column of a vocabulary:
#
#     share of x - share of base logits - sum_j pull_j 1[v = target_j]
#
# target int64 [T, J] and exclude.row are columns of the vocabulary, exclude.suppressed bool [V] is of these columns;
# pull float64 [T, J]; shares float64 [T, 4] of `shares_of`.
IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("gradient"),
    "cuda": _cuda,
}
