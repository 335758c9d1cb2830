"""Ops over vocabularies whose columns the ranks of a process group share: what one rank with all of them says."""

import pytest
import torch

from dam.ops import _group
from tests import ranks
from tests.ops.helpers import normal

RUN = "tests.ops.group_run"


@pytest.mark.parametrize("count", [2, 3])
def test_values_gradients_and_draws_are_those_of_one_rank(count, tmp_path):
    """To rounding, and draws to the bit, wherever columns are divided; targets on both sides of each rank's end."""
    ranks.succeed(RUN, count, tmp_path, "equal", "dtensors")


@pytest.mark.parametrize("case", ["equal_cuda", "equal_triton"])
def test_every_backend_shares_columns(case, tmp_path):
    ranks.succeed(RUN, 2, tmp_path, case)


@pytest.mark.parametrize("count", [2, 3])
def test_a_hundred_thousand_draws_are_equal_to_the_bit(count, tmp_path):
    ranks.succeed(RUN, count, tmp_path, "many_draws")


def test_what_goes_over_the_wire_and_what_is_allocated(tmp_path):
    """One collective each way, of sizes that no vocabulary or width changes; no array of more than a rank's share."""
    ranks.succeed(RUN, 2, tmp_path, "wire", "shares")


def test_calls_that_differ_are_told_apart_on_every_rank(tmp_path):
    ranks.succeed(RUN, 3, tmp_path, "disagree", "argues", "other_maps")


def test_unusual_tensors_rows_and_backward_passes(tmp_path):
    ranks.succeed(RUN, 2, tmp_path, "wrapped", "kept", "edges")


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


def test_compiled_code_calls_them(tmp_path):
    ranks.succeed(RUN, 2, tmp_path, "compiled")


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
