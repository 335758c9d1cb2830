"""The C++ backend's products of 16-bit numbers against float64, by every instruction that this machine has for them."""

import functools
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import normal, rounding, same, threads
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.backends import cpu
from tests import fresh

INSTRUCTIONS = [name for name, _ in cpu.kernels.instructions()]
TILES = pytest.mark.skipif("amx" not in INSTRUCTIONS, reason="this machine has no AMX")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
sizes = st.tuples(st.integers(1, 140), st.integers(1, 600), st.integers(1, 300))  # T, V, D: all kinds of last tiles


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    monkeypatch.setattr(cpu, "instructions", lambda: request.param)
    return request.param


def matrix(rows, columns, *, seed, dtype=torch.bfloat16, room=3):
    """Rows that lie `room` elements apart, with NaN in between: what reads past an end cannot miss it."""
    x = torch.full((rows, columns + room), math.nan, dtype=dtype)
    x[:, :columns] = normal(rows, columns, seed=seed)
    return x[:, :columns]


def filled(function, rows, columns, *, dtype=torch.float32, value=math.nan):
    """What a product writes, once it is known to write nothing else."""
    out = torch.full((rows, columns + 5), value, dtype=dtype)
    function(out[:, :columns])
    untouched = out[:, columns:]
    assert untouched.isnan().all() if math.isnan(value) else (untouched == value).all()
    return out[:, :columns]


def within(actual, a, b, error, atol=0.0):
    """Whether a @ b in float64 is met within `error` of its terms' absolute sum."""
    terms = a.double().abs() @ b.double().abs()
    return bool(((actual.double() - a.double() @ b.double()).abs() <= error * terms + atol).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(sizes, st.integers(0, 7), st.sampled_from([1, 2, 3]))
@few
def test_product(dtype, shape, room, count):
    """Products of 16-bit numbers are exact in float32; D sums of them round at 2^-24 each, in whatever order."""
    rows, columns, depth = shape
    hidden = matrix(rows, depth, seed=1, dtype=dtype, room=room)
    weight = matrix(columns, depth, seed=2, dtype=dtype, room=room)
    for name in INSTRUCTIONS if dtype == torch.bfloat16 else ["float32"]:
        with threads(count):
            found = filled(functools.partial(cpu.product, hidden, weight, by=name), rows, columns)
        assert within(found, hidden, weight.t(), (depth + 1) * 2.0**-24), name


def test_a_product_takes_infinite_numbers_as_they_are(instructions):
    """Only where they are: zeros that fill up a tile make NaN of them in no other row and column."""
    hidden, weight = matrix(37, 70, seed=3), matrix(45, 70, seed=4)
    hidden[35, 69], weight[44, 3], hidden[2, 68] = math.inf, -math.inf, math.nan
    found = filled(lambda out: cpu.product(hidden, weight, out), 37, 45)
    torch.testing.assert_close(found, hidden.float() @ weight.float().t(), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_rows_that_are_not_numbers_do_not_reach_those_multiplied_after_them(instructions):
    """1,024 rows go at a time, in the same work memory: what fills up a tile is zeros each time."""
    hidden, weight = matrix(1030, 5, seed=24), matrix(40, 5, seed=25)
    wanted = filled(lambda out: cpu.product(hidden, weight, out), 1030, 40)
    hidden[:1024] = math.nan
    found = filled(lambda out: cpu.product(hidden, weight, out), 1030, 40)
    assert torch.equal(found[1024:], wanted[1024:])


def test_a_product_of_signed_zeros_and_small_numbers(instructions):
    """Words of two numbers are moved as they are, and not as the float32 numbers that their bits would be."""
    hidden = torch.tensor([[0.0, -0.0, 1.0], [2.0**-100, -0.0, -1.0]] * 4, dtype=torch.bfloat16)
    weight = torch.tensor([[2.0**20, -0.0, 0.0], [2.0**100, 1.0, 2.0**-120]], dtype=torch.bfloat16)
    found = filled(lambda out: cpu.product(hidden, weight, out), 8, 2)
    assert torch.equal(found.double(), hidden.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_many_rows(dtype, monkeypatch):
    """Of more than are multiplied at a time, also of another number at last; gradients are added up in float32."""
    hidden, weight = matrix(2050, 40, seed=19, dtype=dtype), matrix(37, 40, seed=20, dtype=dtype)
    found = filled(lambda out: cpu.product(hidden, weight, out), 2050, 37)
    assert within(found, hidden, weight.t(), 41 * 2.0**-24)
    if dtype == torch.bfloat16 and "amx" in INSTRUCTIONS:
        monkeypatch.setattr(cpu, "_ROWS_AT_ONCE", 1000)
        call, at_once = cpu.kernels.product_weight, []
        monkeypatch.setattr(
            cpu.kernels, "product_weight", lambda **given: (at_once.append(given["shape"][0]), call(**given))
        )
        gradient = normal(2050, 37, seed=21)
        added = filled(lambda out: cpu.product_weight(gradient, hidden, out), 37, 40, value=0.5)
        narrow = filled(lambda out: cpu.product_weight(gradient, hidden, out), 37, 40, dtype=dtype)
        assert within(added.double() - 0.5, gradient.t(), hidden, 2.0**-16 + 2052 * 2.0**-23, atol=2.0**-23)
        error = rounding(dtype) * (gradient.t().double() @ hidden.double()).abs()
        assert within(narrow, gradient.t(), hidden, 2.0**-15 + 2052 * 2.0**-23, atol=error)
        assert at_once == [1000, 1000, 50] * 2  # so work memory does not grow with rows


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts kilobytes as Linux does")
def test_memory_of_many_rows_and_few_columns():
    """By how much a call grows the process: 60,000 rows' states of 512 numbers would be 123 MB in float32."""
    code = (
        "import resource, torch, dam\n"
        "torch.set_num_threads(1)\n"
        "hidden, weight = torch.ones(60_000, 512, dtype=torch.bfloat16), torch.ones(64, 512, dtype=torch.bfloat16)\n"
        "dam.linear_jump(hidden[:2], weight, seed=0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "dam.linear_jump(hidden, weight, seed=0)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "DAM_WORKSPACE_MB": "8"}  # and no fork, which grows by what it reads of its parent's
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # Half the workspace, results of 1 MB, 2 of states that are rearranged, and as much again for allocators.
    assert int(done.stdout) < 2 * (4 + 1 + 2) * 1024


@pytest.mark.parametrize("rows", [3, 20, 70])
def test_a_product_does_not_depend_on_threads(instructions, rows):
    hidden, weight = matrix(rows, 100, seed=5), matrix(1500, 100, seed=6)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(filled(lambda out: cpu.product(hidden, weight, out), rows, 1500))
    assert same(found[:1] * 2, found[1:])


@TILES
@given(sizes, st.sampled_from([1, 2, 3]))
@few
def test_gradients_by_tiles(shape, count):
    """Each number goes in as two with 8 bits each, the first cut off, the second rounded: 2^-16 of it is left out."""
    rows, columns, depth = shape
    gradient = torch.nn.functional.pad(
        normal(rows, columns, seed=7) * torch.exp(3 * normal(rows, columns, seed=8)), (0, 2)
    )
    gradient = gradient[:, :columns]
    hidden, weight = matrix(rows, depth, seed=9), matrix(columns, depth, seed=10)
    with threads(count):
        of_hidden = filled(lambda out: cpu.product_hidden(gradient, weight, out), rows, depth)
        added = filled(lambda out: cpu.product_weight(gradient, hidden, out), columns, depth, value=0.5)
        narrow = filled(lambda out: cpu.product_weight(gradient, hidden, out), columns, depth, dtype=torch.bfloat16)
    assert within(of_hidden, gradient, weight, 2.0**-16 + columns * 2.0**-23)
    # Beside 0.5 a float32 sum holds no more than 2^-25 at a time.
    assert within(added.double() - 0.5, gradient.t(), hidden, 2.0**-16 + (rows + 2) * 2.0**-23, atol=2.0**-25)
    error = rounding(torch.bfloat16) * (gradient.t().double() @ hidden.double()).abs()
    assert within(narrow, gradient.t(), hidden, 2.0**-15 + (rows + 2) * 2.0**-23, atol=error)


@TILES
def test_extreme_gradients_by_tiles():
    """The largest float32 number stays finite, infinite and NaN ones are what they are, in their own row and column."""
    gradient, weight, hidden = normal(40, 70, seed=11), matrix(70, 33, seed=12), matrix(40, 33, seed=13)
    gradient[3, 5], gradient[17, 69], gradient[39, 0] = torch.finfo(torch.float32).max, math.inf, math.nan
    weight[5], hidden[3] = 0.5, 0.5
    found = filled(lambda out: cpu.product_hidden(gradient, weight, out), 40, 33)
    torch.testing.assert_close(found, gradient @ weight.float(), rtol=1e-4, atol=1e-3, equal_nan=True)
    found = filled(lambda out: cpu.product_weight(gradient, hidden, out), 70, 33, value=0.0)
    torch.testing.assert_close(found, gradient.t() @ hidden.float(), rtol=1e-4, atol=1e-3, equal_nan=True)


@TILES
def test_a_row_of_a_product_by_tiles_is_its_own():
    """Whatever other rows there are, and whatever their number: a rollout's draws do not change with its batch."""
    hidden, weight, gradient = matrix(150, 90, seed=14), matrix(300, 90, seed=15), normal(150, 300, seed=16)
    whole = filled(lambda out: cpu.product(hidden, weight, out), 150, 300)
    back = filled(lambda out: cpu.product_hidden(gradient, weight, out), 150, 90)
    for rows in (slice(0, 1), slice(7, 40), slice(149, 150)):
        some, part = hidden[rows], gradient[rows]
        forward = filled(functools.partial(cpu.product, some, weight), len(some), 300)
        backward = filled(functools.partial(cpu.product_hidden, part, weight), len(part), 90)
        assert torch.equal(forward, whole[rows])
        assert torch.equal(backward, back[rows])


def test_linear_ops_by_each_instruction(instructions):
    """Draws and gradients of a head in bfloat16 are those of its numbers in float32, whatever multiplies them."""
    hidden, weight = normal(50, 48, seed=17, dtype=torch.bfloat16), normal(1100, 48, seed=18, dtype=torch.bfloat16)
    target = torch.arange(50)[:, None] * 20
    arguments = (target, torch.rand(50, 1, generator=torch.Generator().manual_seed(0)))
    wide = [x.float().requires_grad_() for x in (hidden, weight)]
    narrow = [x.clone().requires_grad_() for x in (hidden, weight)]
    losses = [dam.linear_matching_loss(*pair, *arguments) for pair in (wide, narrow)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for exact, found in zip(wide, narrow, strict=True):
        error = (found.grad.double() - exact.grad.double()).abs()
        # A bfloat16 result, of terms that go in with 16 bits.
        assert (error <= rounding(torch.bfloat16) * exact.grad.abs() + 2.0**-15 * exact.grad.abs().max()).all()
    draws = [dam.linear_jump(*(x.detach() for x in pair), seed=3) for pair in (wide, narrow)]
    assert torch.equal(draws[0].target, draws[1].target)


def test_instructions_by_name(monkeypatch):
    choose = cpu.instructions.__wrapped__
    for name in INSTRUCTIONS:
        monkeypatch.setenv("DAM_CPU_PRODUCT", name)
        assert choose() == name
    monkeypatch.setenv("DAM_CPU_PRODUCT", "")
    assert choose() == INSTRUCTIONS[0]
    monkeypatch.setenv("DAM_CPU_PRODUCT", "sse9")
    with pytest.raises(ValueError, match="DAM_CPU_PRODUCT must be one of amx, avx512_bf16, float32; got 'sse9'"):
        choose()
    monkeypatch.setenv("DAM_CPU_PRODUCT", "amx")
    monkeypatch.setattr(cpu, "_instructions", lambda: {"float32": 0})
    with pytest.raises(RuntimeError, match="must be one of float32 on this machine; got 'amx'"):
        choose()


def test_a_set_without_bfloat16_has_no_instructions_for_it():
    code = "from dam.backends import cpu; print(cpu.instructions())"
    done = fresh.run(code, DAM_CPU_ISA="plain")
    assert done.stdout.strip() == "float32", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_not_widened_number_by_number(monkeypatch, dtype):
    """Converting the head once for all of them is faster; the logits are the same but for the order of sums."""
    monkeypatch.setattr(cpu, "instructions", lambda: "float32")
    calls, product = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda *arguments: calls.append(1) or product(*arguments))
    hidden, weight = normal(513, 24, seed=22, dtype=dtype), normal(90, 24, seed=23, dtype=dtype)
    head = dam.models.Head(weight, None)
    few, many = head.logits(hidden[:512]), head.logits(hidden)
    assert len(calls) == 1
    assert within(many, hidden, weight.t(), 25 * 2.0**-24) and within(few, hidden[:512], weight.t(), 25 * 2.0**-24)
