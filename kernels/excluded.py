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

    def columns(self, columns: slice) -> Excluded:
        """What of the set lies among these columns; the destinations of rows stay columns of all."""
        return self if self.suppressed is None else self._replace(suppressed=self.suppressed[columns])

    def shifted(self, first: int, count: int) -> Excluded:
        """The destinations of rows as some of `count` columns from `first` on, -1 for those elsewhere."""
        if self.row is None:
            return self
        row = self.row - first
        return self._replace(row=row.where((row >= 0) & (row < count), -1))

    @property
    def arguments(self) -> dict[str, Any]:
        """As the kernels of `dam.kernels` take it."""
        return {
            "exclude": self.row,
            "exclude_stride": 0 if self.row is None else self.row.stride(0),
            "suppressed": None if self.suppressed is None else self.suppressed.view(torch.uint8),
        }
