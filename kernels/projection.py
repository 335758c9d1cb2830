"""Hidden states with the head that maps them to logits: the tensors of a linear op, here and in `dam.ops`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """Logits to be: x = hidden @ weight^T + low_hidden @ low_weight^T + bias, or softcap tanh(x / softcap).

    The second product is a LoRA adapter's: low_hidden = scale * hidden @ a^T, low_weight = b.
    """

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    low_hidden: Tensor | None = None  # [T, R]
    low_weight: Tensor | None = None  # [V, R]
    softcap: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """All but the cap. By their names: torch.compile of torch 2.6 cannot slice a NamedTuple."""
        return self.hidden, self.weight, self.bias, self.low_hidden, self.low_weight

    def part(self, rows: slice, columns: slice = slice(None)) -> Projection:
        """The same for some rows and columns of the logits; itself where these are all, as slices cost a small call."""
        hidden, weight, bias, low_hidden, low_weight, softcap = self
        if rows == slice(0, hidden.shape[0]) and columns in (slice(None), slice(0, weight.shape[0])):
            return self
        return Projection(
            hidden[rows],
            weight[columns],
            None if bias is None else bias[columns],
            None if low_hidden is None else low_hidden[rows],
            None if low_weight is None else low_weight[columns],
            softcap,
        )
