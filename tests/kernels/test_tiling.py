"""What a draw and a summary may not depend on: how launches divide the logits; and memory that is not touched."""

import math

import pytest
import torch

import dam
from dam.backends import choice
from dam.kernels.excluded import Excluded
from tests import calls
from tests.covering import full
from tests.ops.helpers import assert_close, far, integers, normal, same

if choice.why_unavailable("triton") is not None:
    pytest.skip(choice.why_unavailable("triton"), allow_module_level=True)

from dam.kernels import configs, core, head, linear_jump, linear_log_prob, log_prob, matching_loss
from dam.kernels.projection import Projection

INF = math.inf
# Values of a launch over rows, from one tile in one step to a whole row, and rows split among programs.
TILINGS = [
    {"elements": 1024, "programs": 1},
    {"elements": 4096, "programs": 64},
    {"elements": 8192, "programs": 512, "warps": 8},
    {"elements": 2**16, "programs": 7},
]


@pytest.fixture(autouse=True)
def on_triton():
    with torch.device(choice.DEVICE_TYPE["triton"]), dam.backend("triton"):
        yield


def tiled(values):
    return configs.override("rows", **values)


@calls.each("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_tiling(dtype, call):
    """Sums are of tiles, draws are of tiles and of tokens in one, and gradients are written tile by tile."""
    logits, base = call.inputs(2, 3 * 1024 + 77, dtype=dtype, seed=1)
    logits *= 3.0
    logits[1, 1024:2048] = -INF
    results = []
    for values in TILINGS:
        with tiled(values):
            results.append(call(logits, base))
    assert all(calls.same(result, results[0]) for result in results[1:])


@pytest.mark.slow
def test_a_gradient_may_take_the_place_of_the_logits():
    """Of rows that programs share, with targets in every part."""
    logits, target, grad = normal(2, 2500, seed=15), integers(-1, 2500, 2, 40, seed=16), normal(2, 40, seed=17)
    target[:, 1] = target[:, 0]
    _, log_escape = log_prob.log_prob(logits, target, Excluded(), 1.0)
    arguments = (target, grad, normal(2, 2500, seed=18), grad[:, 0], None, Excluded(), True, 0.7, True)
    for values in TILINGS:
        with tiled(values):
            expected = log_prob.log_prob_backward(grad, logits, target, log_escape, Excluded(), 1.0)
            x = logits.clone()
            assert torch.equal(log_prob.log_prob_backward(grad, x, target, log_escape, Excluded(), 1.0, x), expected)
            expected = matching_loss.matching_loss(logits, *arguments)
            x = logits.clone()
            assert same(matching_loss.matching_loss(x, *arguments, x), expected)


@pytest.mark.slow
@calls.each("linear")
@pytest.mark.parametrize("form", ["fused", "chunked"])
def test_linear_ops_do_not_depend_on_tiling(form, call):
    """Rounding of the matmul may differ; few logits are near enough for it to matter (see test_linear_jump.py)."""
    inputs = call.inputs(20, 1100, seed=10)
    with dam.backend("torch"):
        expected = call(*inputs)
    for values in (
        {"block_rows": 16, "block_columns": 256, "block_depth": 16, "group": 1, "chunk_mb": 0.1},
        {"block_rows": 32, "block_columns": 512, "block_depth": 32, "group": 3, "merge_rows": 4, "chunk_mb": 2},
    ):
        with configs.override("linear", form=form, frozen_form=form, trained_form=form, **values):
            out = call(*inputs)
        # Sums of 40 float32 products and of 1100 exponentials, in other orders.
        calls.assert_close(out, expected, call.terms(*inputs), rtol=2.0**-18, atol=2.0**-18)


def test_chunks_of_columns_draw_as_one():
    """Chunked, a race that a later chunk of columns loses stays decided by an earlier one."""
    hidden, weight, exclude = normal(12, 16, seed=45), normal(21_000, 16, seed=46), integers(-1, 21_000, 12, seed=47)
    suppress = integers(0, 8, 21_000, seed=49) == 0
    suppress[3000:9000] = True
    options = {"exclude": exclude, "suppress": suppress, "num_samples": 3, "seed": 15}
    with dam.backend("torch"):
        expected = dam.linear_jump(hidden, weight, **options)
        greedy = dam.linear_jump(hidden, weight, temperature=0, seed=15)
    with configs.override("linear", form="chunked", chunk_mb=0.2):  # 6 rows at a time, 8 of 21 tiles
        out = dam.linear_jump(hidden, weight, **options)
        assert torch.equal(dam.linear_jump(hidden, weight, temperature=0, seed=15).target, greedy.target)
        target = expected.target[:, :2].contiguous()
        value = dam.linear_log_prob(hidden, weight, target, exclude=exclude, suppress=suppress)
    assert torch.equal(out.target, expected.target)
    assert_close(out.log_prob, expected.log_prob, rtol=2.0**-18, atol=2.0**-18)
    assert_close(out.log_escape, expected.log_escape, rtol=2.0**-20)
    assert_close(value, expected.log_prob[:, :2], rtol=2.0**-18, atol=2.0**-18)


@calls.each("states")
def test_blocks_of_trajectories_and_states_change_nothing(call):
    """Sums that are carried from block to block, and rows that programs share."""
    inputs = call.inputs(3, 300, seed=48)
    whole = call(*inputs)
    with (
        configs.override("adjoint_weights", elements=16, steps=8, weights=4),
        configs.override("tilt_to_ess", elements=128),
        configs.override("backward_kolmogorov", elements=128, programs=9, cache_mb=0, points=16, lines=16, depth=16),
    ):
        # float64 inside, rounded once; tilts are where the ESS crosses a threshold.
        calls.assert_close(call(*inputs), whole, call.terms(*inputs), rtol=2.0**-23, atol=1e-12)


@calls.each("rows", "linear")
@pytest.mark.parametrize(
    "gpu",
    ["NVIDIA H100", *(full(gpu) for gpu in ("NVIDIA A100", "AMD Instinct MI300X"))],
)
def test_the_sizes_shipped_for_gpus_compute_the_same(gpu, call):
    """In the interpreter too, where they are slow: on few rows."""
    rows = call.family == "rows"
    inputs = call.inputs(2, 1500, seed=20, dtype=torch.bfloat16) if rows else call.inputs(20, 400, seed=22)
    expected = call(*inputs)
    with configs.as_if_on(gpu):
        # Sums of 40 float32 products in other orders, and their exponentials.
        calls.assert_close(call(*inputs), expected, call.terms(*inputs), rtol=2.0**-17, of_largest=2.0**-17)


# ---- offsets beyond 2^31 without the memory, and tiles of -inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_beyond_2_31_elements(dtype):
    """tests/ops/test_large.py has such inputs; here what is written lies as far apart."""
    logits, target, grad = (
        normal(4, 2000, seed=30, dtype=dtype),
        integers(-1, 2000, 4, 2, seed=31),
        normal(4, 2, seed=32),
    )
    _, log_escape = log_prob.log_prob(logits, target, Excluded(), 1.0)
    expected = log_prob.log_prob_backward(grad, logits, target, log_escape, Excluded(), 1.0)
    out = far(4, 2000, dtype)
    assert torch.equal(log_prob.log_prob_backward(grad, logits, target, log_escape, Excluded(), 1.0, out), expected)
    arguments = (target, grad, logits, grad[:, 0], None, Excluded(), True, 1.0, True)
    expected = matching_loss.matching_loss(logits, *arguments)
    assert same(matching_loss.matching_loss(logits, *arguments, out), expected)


def test_heads_beyond_2_31_elements():
    """Hidden states, head and the logits' gradient, each with rows 2^30 elements apart."""
    hidden, weight = far(4, 24, torch.bfloat16), far(3, 24, torch.bfloat16)
    hidden.copy_(normal(4, 24, seed=33))
    weight.copy_(normal(3, 24, seed=34))
    target = torch.zeros(4, 1, dtype=torch.int64)

    def everything(hidden, weight, out):
        of = Projection(hidden, weight)
        arguments = (Excluded(), 1.0, 1, torch.tensor(1), None, True)
        with configs.override("linear", form="fused"):
            drawn = linear_jump.linear_jump(of, *arguments, library=None, workspace=2**20)
            value, log_escape = linear_log_prob.linear_log_prob(
                of, target, Excluded(), 1.0, library=None, workspace=2**20
            )
        rows = linear_log_prob.rows_of(torch.ones(4, 1), target, log_escape, Excluded(), 1.0)
        whole = (slice(0, 4), slice(0, 3))
        gradient = head.gradient("linear_log_prob", of, None, rows, core.scale_of(1.0), *whole, out)
        return *drawn[:3], value, gradient

    dense = torch.empty(4, 3, dtype=torch.bfloat16)
    expected = everything(hidden.contiguous(), weight.contiguous(), dense)
    assert same(everything(hidden, weight, far(4, 3, torch.bfloat16)), expected)
