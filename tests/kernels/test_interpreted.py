"""What tests/interpreted.py leaves out of Triton's interpreter changes no result."""

import pytest
import torch

import dam
from dam.backends import triton
from tests import fresh
from tests.ops.helpers import normal, same

pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="needs Triton's interpreter")


def results():
    """Draws, a gradient by rows of two tiles, and a product with a head: integers, floats of two kinds, and blocks."""
    with dam.backend("triton"):
        logits = normal(2, 1100, seed=1, dtype=torch.bfloat16).requires_grad_()
        loss = dam.matching_loss(logits, torch.tensor([[3, -1], [1050, 7]]), normal(2, 2, seed=2))
        (gradient,) = torch.autograd.grad(loss, logits)
        drawn = dam.linear_jump(normal(3, 20, seed=3), normal(70, 20, seed=4), exclude=5, seed=-1)
        return [*dam.jump(logits.detach(), num_samples=2, seed=2**40), loss.detach(), gradient, *drawn]


def test_results_are_those_of_the_interpreter_as_it_is(tmp_path):
    code = f"""
import sys, torch
from dam.backends import triton
from tests.kernels import test_interpreted

assert triton.INTERPRETED and "tests.interpreted" not in sys.modules
torch.save(test_interpreted.results(), {str(tmp_path / "results.pt")!r})
"""
    done = fresh.run(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert same(results(), torch.load(tmp_path / "results.pt"))
