"""Ops over vocabularies whose columns the ranks of a process group share: what one rank with all of them says."""

import pytest
import torch

from dam.ops import _group
from tests import fresh, ranks
from tests.ops.helpers import normal

RUN = "tests.ops.group_run"
UNUSUAL = ("wrapped", "kept", "edges")  # tensors, backward passes, rows


def test_two_ranks_say_what_one_does(tmp_path):
    """Values and gradients to rounding and draws to the bit, wherever columns are divided, 10^5 draws of each op among
    them; one collective each way, of sizes that no vocabulary changes, and no array of more than a rank's share."""
    ranks.succeed(
        RUN, 2, tmp_path, "equal", "rounded_once", "many_draws", "dtensors", "wire", "shares", "compiled", *UNUSUAL
    )


def test_three_ranks_say_what_one_does_or_what_differs(tmp_path):
    """And calls that differ are told apart on every rank."""
    cases = ("equal", "rounded_once", "many_draws", "dtensors", "disagree", "backward_passes", "argues", "other_maps")
    ranks.succeed(RUN, 3, tmp_path, *cases)


def test_operations_run_where_torch_was_built_without_distributed():
    """Its package is there then, and little in it."""
    code = """
import torch, torch.distributed
for name in ("ProcessGroup", "all_gather_single", "all_gather_into_tensor", "all_to_all_single", "all_reduce"):
    if hasattr(torch.distributed, name):
        delattr(torch.distributed, name)
import dam
target = torch.zeros(2, dtype=torch.int64)
assert dam.jump(torch.zeros(2, 4), seed=1).target.shape == (2,)
assert dam.linear_log_prob(torch.zeros(2, 3), torch.zeros(4, 3), target).shape == (2,)
try:
    dam.log_prob(torch.zeros(2, 4), target, group="ranks")
except TypeError as error:
    assert "group must be a torch.distributed process group; got str" in str(error)
else:
    raise SystemExit("taken")
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_cuda_and_triton_share_columns(tmp_path):
    ranks.succeed(RUN, 2, tmp_path, "equal_cuda", "equal_triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_states_that_differ_by_rounding_pass(dtype):
    """Also of many rows that are alike, whose sums 16 bits do not hold; other rows do not."""
    common, apart = normal(1, 64, seed=0).abs() + 1.0, 0.3 * normal(20_000, 64, seed=1)
    states = common + apart
    first = _group._sums_of(states.to(dtype))
    assert first.isfinite().all()
    bound = _group._TOLERANCE * first[-1]
    rounded = _group._sums_of((states * (1 + 2**-9 * normal(20_000, 64, seed=2))).to(dtype))
    assert (rounded - first)[:-1].abs().max() < 0.5 * bound
    others = _group._sums_of((common + apart.flip(0)).to(dtype))
    assert (others - first)[:-1].abs().max() > 2 * bound


@pytest.mark.parametrize("case", ["killed", "raises"])
def test_a_rank_that_is_gone_ends_all(case, tmp_path):
    """Within 30 s of the start, with what happened."""
    found = ranks.run(RUN, 3, tmp_path, case, timeout=90.0)
    first = min(one.seconds for one in found)
    for rank, one in enumerate(found):
        assert one.code != 0 and one.seconds < first + 30.0, (rank, one)
        if case == "raises" and rank == 2:
            assert "logits must have shape [..., V]; got []" in one.text
        elif rank != 2:
            assert "a rank is gone, or made another call" in one.text
