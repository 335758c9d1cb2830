"""Kinds of parallelism under which processes would train on the same rows."""

import types

import pytest

from dam.train.resumable import check_parallelism


def accelerator(**sizes):
    return types.SimpleNamespace(parallelism_config=types.SimpleNamespace(**sizes))


@pytest.mark.parametrize("name", ["tp", "cp", "sp"])
def test_processes_that_share_rows_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}_size = 2 has several work on the same: divide the model by FSDP2"):
        check_parallelism(accelerator(**{f"{name}_size": 2}), "DAMTrainer")


def test_others_are_not():
    check_parallelism(types.SimpleNamespace(), "DAMTrainer")
    check_parallelism(types.SimpleNamespace(parallelism_config=None), "DAMTrainer")
    check_parallelism(accelerator(tp_size=1, cp_size=1, dp_shard_size=2), "DAMTrainer")
