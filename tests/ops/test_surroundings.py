"""What a program sets for all of torch, a default device or dtype or autocast, changes no result of an op."""

import contextlib

import pytest
import torch

import dam
from tests import calls
from tests.ops.helpers import default_dtype

# Without a backend asked for by name, calls that nobody watches ask the C++ kernels first.
rooms = pytest.mark.parametrize(
    "room",
    [contextlib.nullcontext, lambda: dam.backend("cpu"), lambda: dam.backend("torch")],
    ids=["any", "cpu", "torch"],
)


@contextlib.contextmanager
def default_device(monkeypatch):
    """Of which nothing can be read: what an op makes there is noticed. The calls' own arguments stay where they are."""
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cpu"))
    with torch.device("meta"):
        yield


@rooms
@calls.each()
def test_a_default_device_is_not_that_of_the_results(call, room, monkeypatch):
    inputs = call.inputs(6, 1100)
    with room():
        expected = call(*inputs)
        with default_device(monkeypatch):
            assert calls.same(call(*inputs), expected)


def test_seeds_from_torchs_generator_are_on_the_cpu(monkeypatch):
    logits = torch.zeros(2, 9)
    with default_device(monkeypatch):
        assert 0 <= int(dam.jump(logits).target.min()) and int(dam.linear_jump(logits, logits).target.max()) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@rooms
@calls.each()
def test_a_default_dtype_is_not_that_of_the_results(call, room, dtype):
    inputs = call.inputs(6, 1100)
    with room():
        expected = call(*inputs)
        with default_dtype(dtype):
            assert calls.same(call(*inputs), expected)


@rooms
@calls.each()
def test_autocast_does_not_reach_into_an_op(call, room):
    """Products inside are in float64 or put into an array that is there, which autocast leaves alone.

    That of hidden states and an adapter autograd differentiates: a backward pass inside autocast, which torch advises
    against, casts it.
    """
    inputs = call.inputs(6, 1100)
    with room():
        expected = call(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(*inputs)
    of_adapter = {name for name in expected if name.startswith(("gradient in a,", "gradient in hidden,"))}
    assert calls.same(*({n: x for n, x in results.items() if n not in of_adapter} for results in (found, expected)))


def test_operands_that_autocast_left_in_two_dtypes_are_told_so():
    hidden, head = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"bfloat16.*autocast casts no argument"):
        dam.linear_jump(hidden, head)
