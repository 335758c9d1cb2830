"""Offsets beyond 2^31 elements: by strides over memory that is hardly touched, and over a whole array."""

import os

import pytest
import torch
from helpers import assert_close, integers, normal, rounding, slow

import dam
from dam.ops import matching_loss as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)


def free_bytes():
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def need(size):
    if free_bytes() < size:
        pytest.skip(f"needs {size >> 30} GiB of free memory")


@pytest.fixture
def far():
    """Two bfloat16 arrays [4, 1500] whose rows lie 2^30 elements apart, and dense copies of them."""
    stride = 2**30 + 8
    if torch.get_default_device().type == "cuda":
        need(2 * 3 * stride * 2 + (1 << 30))  # on a CPU pages that are not touched take no memory
    rows = []
    for seed in (1, 2):
        x = torch.empty(3 * stride + 1500, dtype=torch.bfloat16).as_strided((4, 1500), (stride, 1))
        rows += [x, x.copy_(normal(4, 1500, seed=seed)).contiguous()]
    return rows


def test_row_strides(backend, far):
    x, dense_x, base, dense_base = far
    target, weight, exclude = integers(0, 1500, 4, 2, seed=3), normal(4, 2, seed=4), integers(-1, 1500, 4, seed=5)

    def everything(logits, base_logits):
        logits = logits.detach().requires_grad_()
        loss = dam.matching_loss(
            logits, target, weight, base_logits=base_logits, base_weight=weight[:, 0].abs(), exclude=exclude
        )
        loss = loss + dam.log_prob(logits, target, exclude=exclude, temperature=0.7).clamp(min=-100).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        ratio = dam.rate_ratio(logits, base_logits, target)
        return loss, gradient, *ratio, *dam.jump(logits, exclude=exclude, seed=6)

    for a, b in zip(everything(x, base), everything(dense_x, dense_base), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
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
