"""Columns of a dataset: that a batch has them as the dataset does, whichever rows it is of."""

import numpy as np
import pytest
import torch
from flow_tiny import tiny_config

from dam.train import FlowTrainer
from dam.train.data import NumberedRow
from dam.train.flow_rows import Columns, rows_of


def batch(columns, rows, *numbers):
    return columns([NumberedRow(n, f"row {n} of the training dataset", rows[n]) for n in numbers])["columns"]


def test_the_dtype_of_a_column_is_that_of_all_its_rows():
    """Python's numbers lose no digit before they are as wide as the states."""
    rows = [{"goal": 1}, {"goal": 0.1}, {"goal": True}]
    columns = Columns()
    columns.look(rows, "training")
    for numbers in ((0,), (0, 2), (1, 2)):
        assert batch(columns, rows, *numbers)["goal"].dtype == torch.float64
    whole = columns([NumberedRow(1, "row 1", rows[1])])
    assert rows_of(whole, 2, torch.float64).columns["goal"].tolist() == [0.1, 0.1]
    assert rows_of(whole, 1, torch.float32).columns["goal"].dtype == torch.float32
    for value, dtype in (([1, 2], torch.int64), (np.float32(1), torch.float32), ([[0.5]], torch.float64)):
        assert batch(Columns(), [{"goal": value}], 0)["goal"].dtype == dtype


class MapStyle:
    """Rows that are read one by one."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, None], "row 1 .* is no number, of row 0 .* float64 of shape"),
        ([None, 0.5], "row 1 .* is float64 of shape .*, of row 0 .* no number"),
        ([1, 0.5], "row 1 .* is float64 of shape .*, of row 0 .* int64"),
        ([[1], [1, 2]], r"row 1 .* shape \[2\], of row 0 .* shape \[1\]"),
    ],
)
def test_a_row_of_another_kind_is_named(values, message):
    """Of a dataset that is not in memory, when it is met; with the first row of which it was decided."""
    rows, columns = [{"goal": value} for value in values], Columns()
    columns.look(MapStyle(rows), "training")
    with pytest.raises(ValueError, match=f"column 'goal' of {message}"):
        batch(columns, rows, 1)


def test_a_column_for_the_reward_alone_may_hold_anything():
    """It is a list in all batches, of rows that would make a tensor too."""
    rows = [
        {"goal": 0.5, "words": [1], "note": 3, "name": np.str_("a")},
        {"goal": 1.0, "words": [1, 2], "note": None, "name": "b"},
    ]
    columns = Columns(["goal"])
    columns.look(rows, "training")
    assert batch(columns, rows, 0) == {"goal": torch.tensor([0.5]), "words": [[1]], "note": [3], "name": ["a"]}
    assert type(batch(columns, rows, 0)["name"][0]) is str  # which a checkpoint can hold
    with pytest.raises(ValueError, match=r"column 'note' of row 1 .* is no number"):
        Columns(["note"]).look(rows, "training")


class Optional(torch.nn.Module):
    """Can be called without its condition."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, state, time, goal=None):
        return self.scale * state


def test_a_condition_is_dropped_in_no_batch(tmp_path):
    """Of a stream, whose rows nobody has seen before."""
    rows = [{"goal": None if n == 5 else n / 8} for n in range(8)]
    stream = iter_of(rows)
    config = tiny_config(tmp_path, max_steps=6, num_iterations=1)
    trainer = FlowTrainer(Optional(), lambda x, goal: -x.square().sum(dim=1), config, stream, shape=(3,))
    with pytest.raises(ValueError, match="column 'goal' of row 5 of the training dataset is no number"):
        trainer.train()


def iter_of(rows):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    return Rows()
