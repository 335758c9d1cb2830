"""The C++ backend against the float64 reference, under every instruction set and number of threads."""

import importlib
import math
import os
import sys

import numpy as np
import pytest
import torch
from helpers import threads
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.kernels.excluded import Excluded
from dam.ops import _philox, _rows
from dam.ops._excluded import split
from tests import fresh

kernels = importlib.import_module("dam._cpu")  # setup.py always builds it: without it these tests fail
jump_op, log_prob_op, matching_op, ratio_op, adjoint_op, tilt_op, kolmogorov_op = (
    importlib.import_module(f"dam.ops.{name}")
    for name in (
        "jump",
        "log_prob",
        "matching_loss",
        "rate_ratio",
        "adjoint_weights",
        "tilt_to_ess",
        "backward_kolmogorov",
    )
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fixed examples: a draw that a floating-point tie decides (about one in 10^6) must not fail a run now and then.
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

FUSED = os.environ.get("DAM_CPU_ISA") != "plain"  # products fused with sums
# Relative error of exp(d) in float32: a rounding of d where products are fused, of scaled d besides where not.
EXP_ERROR = 2.0**-22.5
ERROR_PER_NAT = 2.0**-24 if FUSED else 2.0**-22


class Case:
    """Random inputs: logits in a wider or narrower buffer, some -inf, whole -inf tiles, exclusions, targets."""

    def __init__(self, rows, columns, targets, dtype, stride, scale, seed, exclude, suppress, infinite):
        g = torch.Generator().manual_seed(seed)
        self.g, self.rows, self.columns, self.dtype = g, rows, columns, dtype
        # One column in each row is always reachable, neither excluded nor -inf.
        kept = torch.randint(0, columns, (rows,), generator=g)

        def matrix(dead):
            width = {"dense": columns, "padded": columns + 13, "same row": columns}[stride]
            x = torch.randn(1 if stride == "same row" else rows, width, generator=g) * scale
            x[:, :columns][dead] = -math.inf
            x = x.to(dtype)
            return (x.expand(rows, width) if stride == "same row" else x)[:, :columns]

        dead = torch.zeros(1 if stride == "same row" else rows, columns, dtype=torch.bool)
        if infinite:
            dead |= torch.rand(dead.shape, generator=g) < 0.3
            dead[:, 1024:2048] = True
        if stride == "same row":
            kept[:] = kept[:1] if rows else 0
            dead[:, kept[:1]] = False
        else:
            dead[torch.arange(rows), kept] = False
        self.logits, self.base = matrix(dead), matrix(dead)
        one = None
        if exclude != "none" and columns > 1:
            draw = torch.randint(-1, columns, (rows,), generator=g)
            one = torch.where(draw == kept, -1, draw)
            if exclude == "one for all" and rows:
                # An expanded scalar, as the ops pass an int.
                allowed = next((v for v in range(columns) if v not in set(kept.tolist())), -1)
                one = torch.tensor([allowed]).expand(rows)
        suppressed = None
        if suppress:
            suppressed = torch.rand(columns, generator=g) < 0.1
            suppressed[1024:2048] |= suppress == "a tile"
            suppressed[kept] = False
        self.exclude = Excluded(one, suppressed)
        self.target, _ = split(torch.randint(-1, columns, (rows, targets), generator=g), self.exclude)
        self.seed = torch.randint(-(2**63), 2**63 - 1, (), generator=g)
        self.row_ids = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.g)


@st.composite
def cases(draw, scales=(0.1, 3.0, 40.0)):
    return Case(
        rows=draw(st.integers(0, 6)),
        columns=draw(st.one_of(st.integers(1, 70), st.integers(1000, 1050), st.integers(2040, 5000))),
        targets=draw(st.integers(0, 5)),
        dtype=draw(st.sampled_from(DTYPES)),
        stride=draw(st.sampled_from(["dense", "padded", "same row"])),
        scale=draw(st.sampled_from(scales)),
        seed=draw(st.integers(0, 2**31)),
        exclude=draw(st.sampled_from(["none", "per row", "one for all"])),
        suppress=draw(st.sampled_from(["", "some", "a tile"])),
        infinite=draw(st.booleans()),
    )


def assert_within(actual, expected, tolerance):
    """|actual - expected| <= tolerance, infinities and NaN alike."""
    actual, expected = actual.double(), expected.double()
    special = ~torch.isfinite(expected)
    torch.testing.assert_close(actual[special], expected[special], rtol=0, atol=0, equal_nan=True)
    excess = ((actual - expected).abs() - tolerance)[~special]
    assert not bool((excess > 0).any()) and not bool(torch.isnan(excess).any()), f"off by {excess.max()} too much"


def log_prob_tolerance(exact):
    # Rounding of the result, and the relative error of a mass or of a tail beside 1. The tail of a row whose
    # log-probability is near 0 is the whole result, and in these cases within some 20 nats where it matters.
    # 1e-11 is the float64 rounding of the reference at logits of 1e4.
    return exact.abs() * (2.0**-24 + EXP_ERROR + 20 * ERROR_PER_NAT) + 1e-11


@few
@given(cases(), st.sampled_from([1.0, 0.37, 2.5, 0.0]), st.integers(1, 3))
def test_jump_matches_reference(case, temperature, num_samples):
    arguments = (case.exclude, temperature, num_samples, case.seed, case.row_ids, False)
    expected = jump_op._torch(case.logits.double(), *arguments)
    target, log_prob, log_escape, bad = jump_op._cpu(case.logits, *arguments)
    assert torch.equal(target, expected[0])
    assert bad == -1
    assert log_prob.dtype == log_escape.dtype == torch.float32
    assert_within(log_prob, expected[1], log_prob_tolerance(expected[1]))
    # A sum of a mass's logarithm and a maximum, which may cancel: absolute in the mass.
    assert_within(log_escape, expected[2], expected[2].abs() * 2.0**-23 + 1e-6)


@few
@given(cases(scales=(0.1, 3.0, 1e4)), st.sampled_from([1.0, 0.37, 2.5]))
def test_log_prob_and_backward_match_reference(case, temperature):
    if case.dtype == torch.float16:
        case.logits = case.logits.clamp(min=-6e4, max=6e4)
    expected, log_escape = log_prob_op._torch(case.logits.double(), case.target, case.exclude, temperature)
    value, _ = log_prob_op._cpu(case.logits, case.target, case.exclude, temperature)
    assert_within(value, expected, log_prob_tolerance(expected))

    grad = case.normal(2, *case.target.shape).double()[1]  # a view that starts inside its storage
    exact = log_prob_op._torch_backward(grad, case.logits.double(), case.target, log_escape, case.exclude, temperature)
    magnitude = (
        log_prob_op._torch_backward(
            -grad.abs(), case.logits.double(), torch.full_like(case.target, 0), log_escape, Excluded(), temperature
        ).abs()
        + grad.abs().sum(dim=1, keepdim=True) / temperature
    )
    actual = log_prob_op._cpu_backward(grad, case.logits, case.target, log_escape, case.exclude, temperature)
    assert actual.dtype == case.dtype and actual.is_contiguous()
    # Rounding to the dtype (and float16's spacing near 0), plus float32 rounding of the terms that may cancel.
    eps = torch.finfo(case.dtype).eps
    floor = 2.0**-24 if case.dtype == torch.float16 else 0.0
    assert_within(actual, exact, exact.abs() * eps + magnitude * 1e-6 + floor)


@few
@given(
    cases(scales=(0.1, 1.0, 3.0)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 1e6]),
    st.sampled_from([1.0, 0.5, 3.0]),
)
def test_matching_loss_matches_reference(case, normalized, with_base, size, temperature):
    weight = case.normal(*case.target.shape) * size
    base = case.base if with_base else None
    base_weight = case.normal(case.rows) if with_base else None
    row_scale = case.normal(case.rows).abs()
    rest = (case.exclude, normalized, temperature, True)
    reached = torch.isfinite(case.logits.double().gather(1, case.target.clamp(min=0)))
    weight = torch.where(reached, weight, 0.0)  # infinite losses: the test below

    base_64 = None if base is None else base.double()
    exact, exact_grad = matching_op._torch(
        case.logits.double(), case.target, weight, base_64, base_weight, row_scale, *rest
    )
    loss, grad = matching_op._cpu(case.logits, case.target, weight, base, base_weight, row_scale, *rest)
    # Terms of both signs: errors are relative to the sum of their sizes.
    x = torch.where(torch.isfinite(case.logits), case.logits.double(), 0.0) / temperature
    largest = x.abs().amax(dim=1) + math.log(case.columns) if case.rows else x.new_zeros(0)
    extra = 0.0 if base_weight is None else base_weight.abs().double()
    if normalized:
        outflow = weight.abs().double().sum(dim=1) + extra
        size_of_row = outflow * 2 * largest
        size_of_grad = outflow
    else:
        rate, base_rate = ((y.double() / temperature).exp().sum(dim=1) for y in (case.logits, case.base))
        size_of_row = rate + (weight.abs().double().sum(dim=1) + extra * base_rate) * largest
        size_of_grad = rate + weight.abs().double().sum(dim=1) + extra * base_rate
    assert_within(loss, exact, 1e-6 * row_scale * size_of_row)
    assert grad.dtype == case.dtype and grad.shape == case.logits.shape
    eps = torch.finfo(case.dtype).eps
    floor = 2.0**-24 if case.dtype == torch.float16 else 0.0
    overflow = exact_grad.abs() > torch.finfo(case.dtype).max * 0.999  # may round to either side
    tolerance = exact_grad.abs() * eps + (row_scale * size_of_grad)[:, None] * 1e-6 / temperature + floor
    assert_within(grad.masked_fill(overflow, 0.0), exact_grad.masked_fill(overflow, 0.0), tolerance)

    without, empty = matching_op._cpu(
        case.logits, case.target, weight, base, base_weight, row_scale, case.exclude, normalized, temperature, False
    )
    assert torch.equal(without, loss) and empty.numel() == 0


@few
@given(cases(scales=(0.1, 1.0, 10.0)))
def test_rate_ratio_matches_reference(case):
    exact, gap = ratio_op._torch(case.logits.double(), case.base.double(), case.target, case.exclude)
    log_ratio, escape_gap = ratio_op._cpu(case.logits, case.base, case.target, case.exclude)
    torch.testing.assert_close(log_ratio, exact.float(), rtol=0, atol=0, equal_nan=True)  # a difference, rounded once
    rates = [_rows.allowed(x, case.exclude).exp().sum(1) for x in (case.logits, case.base)]
    assert_within(escape_gap, gap, (rates[0] + rates[1]) * (EXP_ERROR + 20 * ERROR_PER_NAT) + gap.abs() * 2.0**-24)


@st.composite
def groups(draw):
    """log_ratio and escape_gap [G, K, S] of any stride, terminal_cost [G, K], some of them infinite."""
    count, size, steps = draw(st.integers(0, 5)), draw(st.integers(1, 20)), draw(st.integers(0, 40))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["dense", "padded", "swapped", "strided"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def cube():
        x = torch.randn(count, size, 2 * steps, generator=g)
        if draw(st.booleans()):
            x[torch.rand(x.shape, generator=g) < 0.02] = -math.inf
        x = x.to(dtype)
        if layout == "swapped":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return x[..., ::2] if layout == "strided" else x[..., :steps] if layout == "padded" else x[..., :steps].clone()

    cost = torch.randn(count, size, generator=g) * draw(st.sampled_from([1.0, 1e3]))
    if draw(st.booleans()):
        cost[torch.rand(cost.shape, generator=g) < 0.3] = math.inf
    return cube(), cube() if draw(st.booleans()) else None, cost


@few
@given(groups(), st.sampled_from([None, 0.0, 1.5]))
def test_adjoint_weights_match_reference(group, clip):
    log_ratio, gap, cost = group
    *exact, bad = adjoint_op._torch(log_ratio.double(), cost, None if gap is None else gap.double(), clip, True)
    *results, bad_here = adjoint_op._cpu(log_ratio, cost, gap, clip, True)
    assert bad == bad_here == -1
    for actual, expected in zip(results, exact, strict=True):
        assert actual.dtype == torch.float32
        # Rounded once from float64; 1e-10 is the float64 rounding of log weights near 1e3 in an exponential.
        assert_within(actual, expected, expected.abs() * (2.0**-24 + 1e-10) + 1e-12)


def test_a_large_log_path_is_that_of_its_groups():
    """Above 32 MB it is written past the caches; one group alone is not."""
    case = Case(1, 1, 0, torch.float32, "dense", 1.0, 5, "none", "", False)
    log_ratio, gap, cost = case.normal(2, 4099, 1100), case.normal(2, 4099, 1100), case.normal(2, 4099)
    both = adjoint_op._cpu(log_ratio, cost, gap, None, True)
    assert both[1].nbytes > 2**25 and both[1][:1].nbytes < 2**25
    for g in range(2):
        alone = adjoint_op._cpu(log_ratio[g : g + 1], cost[g : g + 1], gap[g : g + 1], None, True)
        for a, b in zip(both[:-1], alone[:-1], strict=True):
            assert torch.equal(a[g], b[0])


def test_adjoint_weights_name_the_first_bad_trajectory():
    log_ratio, cost = torch.zeros(300, 9, 3), torch.zeros(300, 9)
    log_ratio[170, 4, 1], log_ratio[250, 1, 0], cost[299, 0] = math.nan, math.inf, -math.inf
    for count in (1, 2):
        with threads(count):
            assert adjoint_op._cpu(log_ratio, cost, None, None, True)[-1] == 170 * 9 + 4
            cost[60, 8] = math.nan
            assert adjoint_op._cpu(log_ratio, cost, None, None, True)[-1] == 60 * 9 + 8
            cost[60, 8] = 0.0


@few
@given(groups(), st.floats(1, 20), st.sampled_from([0.0, 1e-3, 1.0, 1e6, 1e300]))
def test_tilt_to_ess_matches_reference(group, ess, max_tilt):
    reward = -group[2].double()
    exact, bad = tilt_op._torch(reward, min(ess, reward.shape[1]), max_tilt, True)
    tilt, bad_here = tilt_op._cpu(reward, min(ess, reward.shape[1]), max_tilt, True)
    assert bad == bad_here == -1
    # The same bisection; exponentials that differ by 4e-15 move the tilt by about as much, and further where the ESS is
    # flat, as it is near tilt 0: there the ESS is the same to what such exponentials leave of it.
    shifted = reward - reward.amax(dim=1, keepdim=True)

    def ess_at(h):
        weight = torch.where(shifted == -math.inf, 0.0, (h[:, None] * shifted).exp())
        return weight.sum(dim=1).square() / weight.square().sum(dim=1)

    same = torch.isclose(tilt, exact, rtol=1e-9, atol=1e-12)
    assert bool((same | torch.isclose(ess_at(tilt), ess_at(exact), rtol=1e-13, atol=0.0)).all())


@pytest.mark.parametrize(
    ("reward", "ess", "max_tilt"),
    [([0.0, -1e-308], 1.5, 1.797e308), ([0.0, -5e-324, -1.0], 2.5, 1e308), ([0.0, -1e300, -1e-300], 2.5, 1e308)],
)
def test_tilt_to_ess_at_the_ends_of_float64(reward, ess, max_tilt):
    """Neither bisection overflows or stops early: the ESS is `ess` at the result, where it passes through it."""
    x = torch.tensor([reward], dtype=torch.float64)
    (exact, _), (tilt, _) = tilt_op._torch(x, ess, max_tilt, True), tilt_op._cpu(x, ess, max_tilt, True)
    torch.testing.assert_close(tilt, exact, rtol=1e-9, atol=0)
    above = torch.softmax(x * tilt * (1 - 1e-9), 1)
    assert float(1 / above.square().sum()) >= ess * (1 - 1e-9) and 0 < float(tilt) <= max_tilt


def test_coldest_temperatures_and_steepest_gradients():
    value, _ = log_prob_op._cpu(torch.tensor([[0.0, -1e-30]]), torch.tensor([[0]]), Excluded(), 1e-30)
    assert float(value) == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-6)
    x, target = torch.tensor([[0.0, -math.inf, -1e30]]), torch.tensor([[0]])
    _, log_escape = log_prob_op._cpu(x, target, Excluded(), 1e-3)
    gradient = log_prob_op._cpu_backward(torch.tensor([[1e38]]), x, target, log_escape, Excluded(), 1e-3)
    assert not bool(torch.isnan(gradient[0, 1:]).any()) and bool((gradient[0, 1:] == 0).all())


def test_tilt_to_ess_names_the_first_bad_reward():
    reward = torch.zeros(300, 7)
    reward[170, 4], reward[250, 1] = math.nan, math.inf
    for count in (1, 2):
        with threads(count):
            assert tilt_op._cpu(reward, 2.0, 1.0, True)[-1] == 170 * 7 + 4


def test_small_log_probabilities_keep_their_digits():
    """One token at 0, V - 1 others far down: log_prob = -log1p(tail) is the tail itself."""
    for nats in (5.0, 12.0, 18.0, 30.0):
        x = torch.full((1, 5000), -nats)
        x[0, 3] = 0.0
        exact = -math.log1p(4999 * math.exp(-nats))
        value, _ = log_prob_op._cpu(x, torch.tensor([[3]]), Excluded(), 1.0)
        assert float(value) == pytest.approx(exact, rel=EXP_ERROR + 2.0**-24 + nats * ERROR_PER_NAT)


def test_tail_has_its_mass():
    """131071 equal tokens 18 nats under one: float32 Gumbel noise would all but lose them."""
    columns, draws = 131072, 100_000
    x = torch.full((1, columns), -18.0)
    x[0, 77] = 0.0
    tail = (columns - 1) * math.exp(-18.0)
    share = tail / (1.0 + tail)
    target = dam.jump(x, num_samples=draws, seed=5).target
    hits = int((target != 77).sum())
    # Five standard deviations of a binomial count; the seed is fixed.
    assert abs(hits - draws * share) < 5 * math.sqrt(draws * share)


def test_draws_agree_with_reference_over_many_rows():
    g = torch.Generator().manual_seed(1)
    differ = 0
    for columns, scale, dtype in ((700, 1.0, torch.float32), (4099, 5.0, torch.bfloat16), (2500, 0.0, torch.float16)):
        x = (torch.randn(500, columns, generator=g) * scale).to(dtype)
        for temperature in (1.0, 0.6):
            arguments = (Excluded(), temperature, 2, torch.tensor(9), None, False)
            differ += int((jump_op._torch(x, *arguments)[0] != jump_op._cpu(x, *arguments)[0]).sum())
    # 6,000 draws of which fewer than 1 in 10^5 may differ.
    assert differ <= 1


@st.composite
def closed_chains(draw):
    """kind and sizes of the generators that the C++ backend has kernels for."""
    kind = draw(st.sampled_from(["uniform", "absorbing", "lattice"]))
    if kind == "lattice":
        line = st.lists(st.sampled_from([1, 2, 3, 31, 256, 300, 2050, 4100]), min_size=1, max_size=1)
        short = st.lists(st.sampled_from([1, 2, 3, 7, 8, 9, 17]), min_size=2, max_size=3)
        shape = draw(st.one_of(line, short))
        return kind, [*shape, *(draw(st.integers(0, 1)) for _ in shape)]
    size = draw(st.one_of(st.integers(1, 70), st.integers(1000, 1050), st.integers(2040, 5000)))
    return kind, [size if kind == "uniform" else draw(st.integers(0, size - 1)), size]


@few
@given(closed_chains(), st.integers(0, 9), st.sampled_from(DTYPES), st.sampled_from([1e-4, 0.8, 70.0]), st.booleans())
def test_backward_kolmogorov_matches_reference(chain, rows, dtype, duration, transpose):
    kind, sizes = chain
    columns = math.prod(sizes[: len(sizes) // 2]) if kind == "lattice" else sizes[-1]
    wide = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(columns))
    terminal = wide.exp().to(dtype)[:, :columns]
    arguments = (kind, [], sizes, duration, 1e-6, transpose)
    expected = kolmogorov_op._torch(terminal.double(), *arguments)
    with threads(2):
        result = kolmogorov_op._cpu(terminal, *arguments)
    # float64 sums of non-negative numbers in another order, rounded once.
    assert_within(result, expected, expected * (2.0**-24 + 1e-12))
    assert result.dtype == torch.float32 and result.is_contiguous()
    with threads(1):
        assert torch.equal(result, kolmogorov_op._cpu(terminal, *arguments))


@pytest.mark.parametrize(
    ("kind", "sizes", "shape"),
    [
        ("uniform", [200_003], (1, 200_003)),
        ("absorbing", [70_000], (3, 131_072)),
        ("lattice", [91, 91, 0, 1], (3, 91 * 91)),
        ("lattice", [32_768, 0], (1, 32_768)),
    ],
)
def test_threads_change_nothing_in_backward_kolmogorov(kind, sizes, shape):
    terminal = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(kolmogorov_op._cpu(terminal, kind, [], sizes, 1.5, 1e-6, True))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(1, 200_003), (3, 131_072), (37, 3_001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(shape, dtype):
    case = Case(*shape, 3, dtype, "dense", 2.0, 3, "per row", "a tile", True)
    weight, base_weight = case.normal(shape[0], 3), case.normal(shape[0])

    def run():
        return (
            *jump_op._cpu(case.logits, case.exclude, 0.8, 2, case.seed, case.row_ids, True)[:3],
            *log_prob_op._cpu(case.logits, case.target, case.exclude, 0.8),
            *matching_op._cpu(
                case.logits, case.target, weight, case.base, base_weight, None, case.exclude, True, 0.8, True
            ),
            *ratio_op._cpu(case.logits, case.base, case.target, case.exclude),
        )

    with threads(1):
        one = run()
    for count in (2, 5):
        with threads(count):
            for a, b in zip(one, run(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_change_a_sum_over_many_rows():
    """torch divides a sum of so many numbers among its threads, which rounds it otherwise."""
    # The same terms again with the other sign, in another order: what is left of the sum is its roundings.
    g = torch.Generator().manual_seed(1)
    some, weight = torch.randn(100_000, 2, generator=g), torch.ones(200_000, 1)
    logits = torch.cat((some, some[torch.randperm(100_000, generator=g)]))
    weight[100_000:] = -1.0
    target = torch.zeros(200_000, 1, dtype=torch.int64)
    results = []
    for count in (1, 2, 5):
        with threads(count), dam.backend("cpu"):
            results.append(dam.matching_loss(logits, target, weight, reduction="sum"))
    assert results[0] == results[1] == results[2] != 0


def test_order_and_company_of_rows_change_nothing():
    case = Case(50, 2_345, 0, torch.float32, "padded", 2.0, 4, "per row", "a tile", True)
    whole = jump_op._cpu(case.logits, case.exclude, 1.0, 3, case.seed, case.row_ids, True)
    order = torch.randperm(50, generator=case.g)[:20]
    some = jump_op._cpu(
        case.logits[order],
        Excluded(case.exclude.row[order], case.exclude.suppressed),
        1.0,
        3,
        case.seed,
        case.row_ids[order],
        True,
    )
    for a, b in zip(whole[:3], some[:3], strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [1, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_bad_row_is_named(value, columns, dtype):
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[[17, 30]] = value
    for count in (1, 2):
        with threads(count), dam.backend("cpu"), pytest.raises(ValueError, match="row 17 "):
            dam.jump(x, seed=1)
    for temperature in (1.0, 0.0):
        target, log_prob, log_escape, bad = jump_op._cpu(x, Excluded(), temperature, 3, torch.tensor(1), None, False)
        assert bad == -1
        assert bool((target >= -1).all()) and bool((target < columns).all())
        good = torch.arange(40) % 13 != 4
        assert bool((target[good] >= 0).all()) and bool(torch.isfinite(log_prob[good]).all())
        if value == -math.inf:
            assert bool((target[17] == -1).all()) and bool((log_prob[17] == value).all()) and log_escape[17] == value


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_past_a_rows_end_is_seen(dtype):
    """Loops go in steps of 16, 32 or 64 numbers: neither memory beyond the row counts nor what an earlier row left."""
    g = torch.Generator().manual_seed(5)
    big = torch.full((2, 2047), 6e4).to(dtype)  # its last tile goes through the buffer
    target, weight, seed = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.tensor(3)

    def everything(x, base):
        grad = torch.ones(2, 1, dtype=torch.float64)
        log_prob, log_escape = log_prob_op._cpu(x, target, Excluded(), 1.0)
        return [
            *jump_op._cpu(x, Excluded(), 1.0, 4, seed, None, True)[:3],
            log_prob,
            log_escape,
            log_prob_op._cpu_backward(grad, x, target, log_escape, Excluded(), 1.0),
            *ratio_op._cpu(x, base, target, Excluded()),
            *matching_op._cpu(x, target, weight, base, torch.ones(2), None, Excluded(), True, 1.0, True),
        ]

    for columns in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1025, 1087, 1089):
        rows = torch.randn(2, columns, generator=g).to(dtype)
        expected = everything(rows, rows.flip(0))
        full = big.clone()
        full[:, :columns] = rows
        everything(big, big)
        for a, b in zip(everything(full[:, :columns], full.flip(0)[:, :columns]), expected, strict=True):
            assert torch.equal(a, b)
        assert bool((expected[0] < columns).all()) and bool((expected[3] <= 0).all())
        exact = rows.double().log_softmax(dim=1)[:, :1]
        assert_within(expected[3], exact, log_prob_tolerance(exact))


def test_excluded_nan_is_not_seen():
    x = torch.randn(2, 1100)
    x[:, 1050] = math.nan
    exclude = Excluded(torch.tensor([1050, 1050]))
    assert jump_op._cpu(x, exclude, 1.0, 1, torch.tensor(1), None, True)[3] == -1
    target, weight = torch.tensor([[1050], [3]]), torch.ones(2, 1)
    loss, grad = matching_op._cpu(x, target, weight, None, None, None, exclude, True, 1.0, True)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all()) and bool((grad[:, 1050] == 0).all())


@pytest.mark.parametrize("normalized", [True, False])
def test_zero_weight_on_unreachable_target_counts_nothing(normalized):
    x = torch.randn(1, 2100)
    x[0, 5] = -math.inf
    x[0, 1024:2048] = -math.inf
    base = torch.randn(1, 2100).masked_fill(x == -math.inf, -math.inf)
    target = torch.tensor([[5, 1500, 7]])
    for base_logits, base_weight in ((None, None), (base, torch.ones(1)), (torch.randn(1, 2100), torch.zeros(1))):
        weights = torch.tensor([[0.0, 0.0, 1.0]])
        loss, grad = matching_op._cpu(
            x, target, weights, base_logits, base_weight, None, Excluded(), normalized, 1.0, True
        )
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())
    loss, _ = matching_op._cpu(x, target, torch.ones(1, 3), None, None, None, Excluded(), normalized, 1.0, True)
    assert float(loss) == math.inf
    loss, _ = matching_op._cpu(
        x, target, torch.zeros(1, 3), torch.randn(1, 2100), torch.ones(1), None, Excluded(), normalized, 1.0, True
    )
    assert float(loss) == math.inf  # the base wants what the model cannot reach


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 64])
def test_every_16_bit_logit_is_read(dtype, columns):
    """One reachable logit per row: log_escape is that logit. One column is read by itself, 64 as vectors."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    value = bits.view(dtype)
    value = value[torch.isfinite(value)]
    x = torch.full((value.numel(), columns), -math.inf, dtype=dtype)
    x[:, -1] = value
    assert torch.equal(jump_op._cpu(x, Excluded(), 1.0, 1, torch.tensor(0), None, True)[2], value.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_nearest_even(dtype):
    """Unreachable logits leave -weight as the gradient; its rounding is torch's, ties and subnormals included."""
    g = torch.Generator().manual_seed(2)
    columns = 67  # whole vectors and a remainder
    bits = torch.randint(-(2**31), 2**31 - 1, (3000, columns), generator=g).to(torch.int32)
    bits[::2] &= -(2**12)  # ties are frequent
    value = bits.view(torch.float32)
    exponent = torch.randint(-30, 18, (2000, columns), generator=g)
    value[1000:] = torch.ldexp(torch.rand(2000, columns, generator=g) - 0.5, exponent)
    value = torch.where(torch.isfinite(value), value, 1.0)
    x = torch.full(value.shape, -math.inf, dtype=dtype)
    target = torch.arange(columns).expand(value.shape)
    _, grad = matching_op._cpu(x, target, -value, None, None, torch.ones(len(value)), Excluded(), False, 1.0, True)
    assert torch.equal(grad, value.to(dtype))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers published with Random123 (kat_vectors, philox4x32-10).
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert list(kernels.philox(counter, key)) == words
    reference = _philox.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert [int(word) for word in reference] == words


@pytest.mark.parametrize("scale", [1.0, 1 / 0.7, 0.01])
def test_exp(scale):
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.uniform(1, 2, (156, 2000)), np.arange(-149, 7)[:, None]).astype(np.float32).ravel()
    x = np.concatenate([x, -x, [0.0, -math.inf, math.nan]]).astype(np.float32)
    x = x[~(x * scale > 87.9)]
    result = np.empty_like(x)
    kernels.exp(x.ctypes.data, result.ctypes.data, x.size, scale)
    product = x.astype(np.float64) * scale
    exact = np.exp(product)
    normal = product > -86.6
    # Stated in csrc/core/math.h.
    size = np.abs(product[normal])
    bound = 2.0**-22.4 + (2.0**-28.4 * size if scale == 1 else 0.0) if FUSED or scale == 1 else 2.0**-22 * (1 + size)
    assert np.all(np.abs(result[normal] / exact[normal] - 1) <= bound)
    assert np.all(result[product < -86.7] == 0)
    assert np.all(result[x == 0] == 1)
    assert np.isnan(result[-1])


def test_exponential():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (200_003, 2), dtype=np.uint32)
    for shift in range(32):  # every magnitude of the small end
        words[shift * 1000 : (shift + 1) * 1000, 0] >>= shift
        words[(32 + shift) * 1000 : (33 + shift) * 1000, 0] = 0
        words[(32 + shift) * 1000 : (33 + shift) * 1000, 1] >>= shift
        words[(64 + shift) * 1000 : (65 + shift) * 1000, 0] |= np.uint32((0xFFFFFFFF << (32 - shift)) & 0xFFFFFFFF)
    words[-2:] = [[0, 0], [0xFFFFFFFF, 0xFFFFFFFF]]
    result = np.empty(len(words))
    kernels.exponential(words.ctypes.data, result.ctypes.data, len(words))
    reference = _philox.exponential(*(torch.from_numpy(words[:, i].astype(np.int64)) for i in range(2))).numpy()
    # Both round the uniform to a double first; past it 1e-14 is stated in csrc/core/math.h.
    assert np.all(np.abs(result / reference - 1) < 1e-14)
    assert result[-2] == 2.0**-65


def test_instruction_set_is_reported():
    assert kernels.isa() in kernels.isas()
    assert kernels.isa() == (os.environ.get("DAM_CPU_ISA") or kernels.isas()[0])


@pytest.mark.parametrize("seed", [0, -5, 2**64 - 1])
def test_random_words_are_those_of_torch(seed, monkeypatch):
    """By the kernel, without torch's rounds, to the bit: in rows that fill no vector, one sample or several, of ids and
    seeds that take all 64 bits.
    """
    ids = torch.randint(-(2**63), 2**63 - 1, (3, 14), generator=torch.Generator().manual_seed(0))[:, ::2]
    for count in (0, 1, 7, 700):
        for sample in (5, range(3, 10), range(2**24 - 2, 2**24)):

            def drawn(count=count, sample=sample):
                return _philox._blocks(seed, _philox.Use.WIENER, ids, count, sample)

            with dam.backend("torch"):
                expected = drawn()
            with monkeypatch.context() as patch:
                patch.setattr(_philox, "philox", None)
                of_kernel = drawn()
            for found, words in zip(of_kernel, expected, strict=True):
                torch.testing.assert_close(found, words, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("isa", kernels.isas())
def test_every_instruction_set(isa):
    if os.environ.get("DAM_CPU_ISA"):
        pytest.skip("this run is about one set")
    if isa == kernels.isa():
        pytest.skip("the one this run uses")
    done = fresh.main("pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, DAM_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ["avx512", "sse9"])
def test_missing_instruction_set_is_an_error(isa):
    if isa in kernels.isas():
        pytest.skip("this machine has it")
    code = (
        "import torch, dam\ntry: dam.jump(torch.zeros(1, 3), seed=0)\nexcept (RuntimeError, ValueError) as e: print(e)"
    )
    done = fresh.run(code, DAM_CPU_ISA=isa)
    assert "DAM_CPU_ISA" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_library():
    """A second copy would bring a second pool of threads."""
    code = "import dam, torch\ndam.jump(torch.zeros(2, 9), seed=0)\nprint(open('/proc/self/maps').read())"
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    paths = {line.split()[-1] for line in done.stdout.splitlines() if "gomp" in line or "libomp" in line}
    assert len(paths) <= 1, paths
