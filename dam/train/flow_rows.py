"""Rows of a dataset as what a flow and its reward are conditioned on, and the rows of paths."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dam.train.data import NumberedRow, is_stream, row_name

Column = Tensor | list[Any]  # [B, ...], or one entry for each of B rows


class Unconditioned:
    """A dataset of so many rows without columns, for models that have no condition."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Rows:
    """What B paths are drawn for."""

    row_id: Tensor  # int64 [B]: their draws are keyed by it
    columns: dict[str, Column]

    def __getitem__(self, of: slice) -> Rows:
        return Rows(self.row_id[of], {name: taken(column, of) for name, column in self.columns.items()})

    def __len__(self) -> int:
        return len(self.row_id)


def taken(column: Column, of: slice | Tensor) -> Column:
    """Some rows of a column, by a slice or by numbers int64 [N]."""
    if isinstance(column, Tensor):
        return column[of if isinstance(of, slice) else of.to(column.device)]
    return column[of] if isinstance(of, slice) else [column[n] for n in of.tolist()]


def rows_of(batch: Mapping[str, Any], repeats: int, dtype: torch.dtype) -> Rows:
    """The rows of paths, `repeats` for each row of a batch, one after another; columns of floats in a dtype."""
    number = batch["number"]
    each = torch.arange(len(number), device=number.device).repeat_interleave(repeats)
    of_row = torch.arange(repeats, device=number.device).repeat(len(number))
    columns = {}
    for name, column in batch["columns"].items():
        if isinstance(column, Tensor) and column.is_floating_point():
            column = column.to(dtype)
        columns[name] = taken(column, each) if repeats > 1 else column
    return Rows(number[each] * repeats + of_row, columns)


def collate(rows: Sequence[NumberedRow]) -> dict[str, Any]:
    """Rows to a batch: `number` int64 [B], of each in its dataset, and `columns`.

    A column of tensors, arrays, numbers or lists of numbers, of one shape, is a tensor [B, ...]; any other is a list.

    Raises:
        ValueError: a row is no mapping, has other columns than the first, or a tensor of another shape; names both.
    """
    first = rows[0]
    for each in rows:
        _check_row(each.row, each.where, first.row, first.where)
    columns = {name: _column(name, rows) for name in first.row}
    return {"number": torch.tensor([each.number for each in rows], device="cpu"), "columns": columns}


def check_rows(dataset: Any, name: str) -> None:
    """Looks through a dataset in memory for rows that would end the run later.

    Raises:
        ValueError: as `collate`.
    """
    if not isinstance(dataset, (list, tuple)) or is_stream(dataset):
        return
    for n, row in enumerate(dataset):
        _check_row(row, row_name(n, name), dataset[0], row_name(0, name))


def _check_row(row: Any, where: str, first: Any, of_first: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a mapping from names of columns; got {type(row).__name__}")
    if not isinstance(first, Mapping) or row.keys() != first.keys():
        raise ValueError(f"{where} has columns {sorted(row)}, and {of_first} {sorted(first)}: give all the same")


def _column(name: str, rows: Sequence[NumberedRow]) -> Column:
    values = [_tensor(each.row[name]) for each in rows]
    if not all(isinstance(value, Tensor) for value in values):
        return [each.row[name] for each in rows]
    for each, value in zip(rows, values, strict=True):
        if value.shape != values[0].shape:
            raise ValueError(
                f"column {name!r} of {each.where} has shape {list(value.shape)}, of {rows[0].where} "
                f"{list(values[0].shape)}: pad them to one"
            )
    return torch.stack(values)


def _tensor(value: Any) -> Any:
    """A value that is made of numbers as a tensor; others as they are."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value, device="cpu")
    if isinstance(value, numbers.Real):
        return torch.tensor(value, device="cpu")
    if isinstance(value, list):
        try:
            return torch.tensor(value, device="cpu") if value else value
        except (TypeError, ValueError):  # texts, or lists of several lengths
            return value
    return value
