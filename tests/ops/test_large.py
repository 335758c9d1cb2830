"""Offsets beyond 2^31 elements: by strides over memory that is hardly touched, and over a whole array."""

import os

import pytest
import torch
from helpers import assert_close, normal, rounding, slow

import dam
from dam.ops import matching_loss as module
from tests import calls

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)


def free_bytes():
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def need(size):
    if free_bytes() < size:
        pytest.skip(f"needs {size >> 30} GiB of free memory")


def far(near):
    """The array [T, V] with rows that lie 2^30 elements apart."""
    rows, columns = near.shape
    stride = 2**30 + 8
    x = torch.empty((rows - 1) * stride + columns, dtype=near.dtype).as_strided((rows, columns), (stride, 1))
    return x.copy_(near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_strides(backend, dtype):
    """Of every op over rows; one after another, as all rows together are large on a GPU."""
    if torch.get_default_device().type == "cuda":  # on a CPU pages that are not touched take no memory
        if dtype != torch.bfloat16:
            pytest.skip("bfloat16 has the same offsets in half the memory")
        need(2 * 3 * (2**30 + 8) * dtype.itemsize + (1 << 30))
    near = [normal(4, 1500, seed=seed, dtype=dtype) for seed in (1, 2)]
    strided = [far(x) for x in near]
    for call in calls.of("rows", "states"):
        assert calls.same(call(*strided), call(*near)), call.name


@pytest.mark.slow
@pytest.mark.full  # offsets that strides have tried; on a GPU, where no memory is untouched, the only such test
def test_a_whole_array(backend):
    """The last rows of 2.2e9 elements, 4.3 GB, against the same rows alone; its gradient is as large."""
    if slow(backend):
        pytest.skip(f"{backend} takes minutes here")
    rows, columns, last = 17_000, 126_464, 4
    assert rows * columns > 2**31
    need(10 << 30)
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16)
    logits[-last:] = normal(last, columns, seed=7, scale=3.0, dtype=torch.bfloat16)
    target, row_ids = torch.full((rows, 1), columns - 1), torch.arange(rows)
    few = logits[-last:].clone()

    drawn = dam.jump(logits, seed=8)
    alone = dam.jump(few, seed=8, row_ids=row_ids[-last:])
    for a, b in zip(drawn, alone, strict=True):
        assert torch.equal(a[-last:], b)

    logits.requires_grad_()
    few.requires_grad_()
    value = dam.log_prob(logits, target)
    assert torch.equal(value[-last:], dam.log_prob(few, target[-last:]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    (expected,) = torch.autograd.grad(dam.log_prob(few, target[-last:]).sum(), few)
    assert torch.equal(gradient[-last:], expected)
    # A row of equal logits: 1 - 1/V at the target, -1/V elsewhere, in bfloat16.
    flat = gradient[rows - last - 1].double()
    assert_close(flat[:-1], torch.full((columns - 1,), -1 / columns), rtol=2 * rounding(torch.bfloat16))
    assert_close(flat[-1], torch.tensor(1 - 1 / columns), rtol=2 * rounding(torch.bfloat16))
