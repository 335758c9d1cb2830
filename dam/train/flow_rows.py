"""Rows of a dataset as what a flow and its reward are conditioned on, and the rows of paths."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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

    def __getitem__(self, of: slice | Tensor) -> Rows:
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


class _Kind(NamedTuple):
    """What a column is, as the rows say that were looked at."""

    dtype: torch.dtype | None  # that its numbers are promoted to; None is a list of whatever it has
    shape: torch.Size | None  # of its numbers
    where: str  # the first row


class Columns:
    """Makes batches of rows, in which a column is of one kind: that is decided once, and not in each batch.

    A column of tensors, arrays, numbers or lists of numbers, of one shape, is a tensor [B, ...] in the dtype that holds
    all of them, Python's floats in float64; any other is a list. The rows of a dataset in memory all have a say, of
    another its first.

    Args:
        conditions: names of the columns that the model is called with; None is all that are numbers.
    """

    def __init__(self, conditions: Sequence[str] | None = None):
        self._conditions = conditions
        self._kinds: dict[str, _Kind] = {}

    def clear(self) -> None:
        """Nothing is known of any column."""
        self._kinds = {}

    def look(self, dataset: Any, name: str) -> None:
        """Decides on the columns of a dataset, beside those of others; of one that is read once nothing is known.

        Raises:
            ValueError: it has no rows, or as a batch.
        """
        if is_stream(dataset):
            return
        if not len(dataset):
            raise ValueError(f"the {name} dataset is empty: there are no rows to draw for")
        in_memory = isinstance(dataset, (list, tuple))
        first = dataset[0]
        for n in range(len(dataset) if in_memory else 1):
            row, where = dataset[n] if n else first, row_name(n, name)
            _check_row(row, where, first, row_name(0, name))
            for column, value in row.items():
                self._add(column, _kind(value, where))

    def meet(self, dataset: Any, name: str) -> None:
        """As `look`, where there is a column that nothing has been decided on."""
        if is_stream(dataset) or (
            len(dataset) and isinstance(dataset[0], Mapping) and dataset[0].keys() <= self._kinds.keys()
        ):
            return
        self.look(dataset, name)

    def __call__(self, rows: Sequence[NumberedRow]) -> dict[str, Any]:
        """Rows to a batch: `number` int64 [B], of each in its dataset, and `columns`.

        Raises:
            ValueError: a row is no mapping, has other columns than the first, or a column of another kind than those
                that decided; names both.
        """
        first = rows[0]
        for each in rows:
            _check_row(each.row, each.where, first.row, first.where)
            for column in each.row:
                if column not in self._kinds:  # of a stream
                    self._add(column, _kind(each.row[column], each.where))
        columns = {name: self._column(name, rows) for name in first.row}
        return {"number": torch.tensor([each.number for each in rows], device="cpu"), "columns": columns}

    def _is_models(self, column: str) -> bool:
        """Whether the model may be called with it: a list of one for the reward alone may hold anything."""
        return self._conditions is None or column in self._conditions

    def _add(self, column: str, new: _Kind) -> None:
        """A row's say."""
        old = self._kinds.setdefault(column, new)
        if old.dtype is not None and new.dtype is not None and old.shape == new.shape:
            self._kinds[column] = old._replace(dtype=torch.promote_types(old.dtype, new.dtype))
        elif not (old.dtype is None and new.dtype is None):
            if self._is_models(column):
                raise ValueError(_differ(column, new, old))
            self._kinds[column] = old._replace(dtype=None, shape=None)

    def _column(self, name: str, rows: Sequence[NumberedRow]) -> Column:
        known = self._kinds[name]
        if known.dtype is None:
            for each in rows:
                if self._is_models(name) and (new := _kind(each.row[name], each.where)).dtype is not None:
                    raise ValueError(_differ(name, new, known))
            return [_plain(each.row[name]) for each in rows]
        values = []
        for each in rows:
            new = _kind(each.row[name], each.where)
            fits = new.dtype is not None and torch.promote_types(new.dtype, known.dtype) == known.dtype
            if not fits or new.shape != known.shape:
                raise ValueError(_differ(name, new, known))
            values.append(torch.as_tensor(_tensor(each.row[name]), dtype=known.dtype))
        return torch.stack(values)


def shown(state: Tensor, columns: Mapping[str, Column]) -> str:
    """What something was called with, in a message: states and columns, their dtypes and shapes."""

    def one(value: Column) -> str:
        dtype = str(getattr(value, "dtype", "list")).removeprefix("torch.")
        return f"{dtype} {list(value.shape) if isinstance(value, Tensor) else [len(value)]}"

    return ", ".join([f"states {one(state)}", *(f"{name} {one(column)}" for name, column in columns.items())])


def _differ(column: str, new: _Kind, old: _Kind) -> str:
    told = [
        "no number"
        if kind.dtype is None
        else f"{str(kind.dtype).removeprefix('torch.')} of shape {list(kind.shape or ())}"
        for kind in (new, old)
    ]
    return (
        f"column {column!r} of {new.where} is {told[0]}, of {old.where} {told[1]}: the model is called with it or not, "
        "in all rows alike. Fill it in, pad it to one shape or give all one type; or name the columns that the model "
        "is called with (conditions): others may hold anything where the dataset is a list"
    )


def _check_row(row: Any, where: str, first: Any, of_first: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a mapping from names of columns; got {type(row).__name__}")
    if not isinstance(first, Mapping) or row.keys() != first.keys():
        raise ValueError(f"{where} has columns {sorted(row)}, and {of_first} {sorted(first)}: give all the same")


def _kind(value: Any, where: str) -> _Kind:
    found = _tensor(value)
    return _Kind(None, None, where) if found is None else _Kind(found.dtype, found.shape, where)


def _tensor(value: Any) -> Tensor | None:
    """A value that is made of numbers as a tensor; None of another."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, numbers.Real) and not isinstance(value, (numbers.Integral, np.generic)):
        value = float(value)
    if not isinstance(value, (np.ndarray, np.generic, numbers.Real, list)) or (isinstance(value, list) and not value):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # lists of several lengths
        return None
    return torch.as_tensor(array, device="cpu") if array.dtype.kind in "biuf" else None


def _plain(value: Any) -> Any:
    """NumPy's text, of which it is a kind of its own, as Python's: what checkpoints hold."""
    return str(value) if isinstance(value, np.str_) else value
