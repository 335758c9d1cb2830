"""Destinations that an op leaves out, as its implementations take them, here and in `dam.ops`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Excluded(NamedTuple):
    """One destination of each row, and a set of destinations that no row has."""

    row: Tensor | None = None  # int64 [T], -1 for none
    suppressed: Tensor | None = None  # bool [V]; no target that an implementation is given is among them

    def part(self, rows: slice) -> Excluded:
        """The same for some rows; itself where these are all."""
        if self.row is None or rows == slice(0, self.row.shape[0]):
            return self
        return self._replace(row=self.row[rows])

    @property
    def arguments(self) -> dict[str, Any]:
        """As the kernels of `dam.kernels` take it."""
        return {
            "exclude": self.row,
            "exclude_stride": 0 if self.row is None else self.row.stride(0),
            "suppressed": None if self.suppressed is None else self.suppressed.view(torch.uint8),
        }
