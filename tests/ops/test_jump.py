"""jump: what is drawn, from which distribution, with which random numbers."""

import math

import pytest
import scipy.stats
import torch
from helpers import P_VALUE, Z, allowed, assert_close, integers, log_softmax, normal, rounding, slow, threads
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.backends import choice
from dam.ops import jump as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
# float32 results round values whose float64 counterparts the tests compute; sums of exp carry about 2^-22 besides.
TOLERANCE = {"rtol": 2.0**-21, "atol": 2.0**-21}


def chi_square_p(counts, probability):
    """p-value of counts against probabilities; destinations expected fewer than 10 times share a bin."""
    expected = probability * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return scipy.stats.chisquare(observed[kept].cpu().numpy(), expected[kept].cpu().numpy()).pvalue


def z_score(count, trials, probability):
    return (count - trials * probability) / math.sqrt(trials * probability * (1 - probability))


# ---- the distribution


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.5, 3.0])
@pytest.mark.of_the_op
def test_draws_follow_the_softmax(backend, temperature):
    """A million draws (fewer at other temperatures or emulated) from rows that differ in their id only."""
    logits = normal(1, 9, seed=1, scale=2.0)
    logits[0, 4] = -INF
    rows = (200 if backend == "cuda" and slow(backend) else 1000) if temperature == 1.0 else 50
    draws = dam.jump(logits.expand(rows, -1), exclude=2, temperature=temperature, num_samples=1000, seed=7).target
    counts = torch.bincount(draws.flatten(), minlength=9)
    p = log_softmax(logits, 2, temperature).exp()[0]
    assert counts[2] == counts[4] == 0
    assert chi_square_p(counts, p) > P_VALUE


@pytest.mark.of_the_op
def test_draws_follow_the_softmax_over_several_tiles(backend):
    """V = 3000 is two full tiles of 1024 and a ragged one; a slow backend draws fewer."""
    logits = normal(1, 3000, seed=2, scale=2.0)
    rows = 4 if slow(backend) else 200
    draws = dam.jump(logits.expand(rows, -1), num_samples=1000, seed=8).target
    counts = torch.bincount(draws.flatten(), minlength=3000)
    assert chi_square_p(counts, log_softmax(logits).exp()[0]) > P_VALUE


@pytest.mark.of_the_op
def test_tail_has_its_mass(backend):
    """One token 18 nats over all others, whose mass is 0.002 at V = 131,072.

    A float32 Gumbel race over the tokens, capped near 16.6, loses nine tenths of that mass. Of 300,000 draws 598 +- 24
    fall in the tail, and such a race would miss by 22 standard deviations. Slow backends draw 5000
    times from 8 times as many tokens: 79 +- 9, and such a race would miss by 8. (A race of tiles before tokens hides
    coarse noise in all but the top token's tile; test_philox.py holds the noise itself to its small end.)
    """
    size, draws = (2**20, 5000) if slow(backend) else (2**17, 300_000)
    logits = torch.full((1, size), -18.0)
    logits[0, 70_000] = 0.0
    target = dam.jump(logits, num_samples=draws, seed=3).target
    tail = target[target != 70_000]
    mass = (size - 1) * math.exp(-18.0)
    assert abs(z_score(len(tail), draws, mass / (1 + mass))) < 4.0
    # Equal stretches of the tail are equally likely (the top token's own has one token less, which does not show).
    assert chi_square_p(torch.bincount(tail * 4 // size, minlength=4), torch.full((4,), 0.25)) > P_VALUE


def test_log_prob_and_log_escape(backend):
    logits = normal(20, 2500, seed=4, scale=4.0)
    exclude = integers(-1, 2500, 20, seed=4)
    for temperature in (1.0, 0.7, 5.0):
        out = dam.jump(logits, exclude=exclude, temperature=temperature, num_samples=4, seed=1)
        assert out.log_prob.dtype == out.log_escape.dtype == torch.float32 and out.target.dtype == torch.int64
        assert_close(out.log_prob, log_softmax(logits, exclude, temperature).gather(1, out.target), **TOLERANCE)
        assert_close(out.log_escape, torch.logsumexp(allowed(logits, exclude) / temperature, 1), **TOLERANCE)


def test_float64_stays_float64():
    logits = normal(5, 40, seed=5, dtype=torch.float64)
    out = dam.jump(logits, seed=1)
    assert out.log_prob.dtype == out.log_escape.dtype == torch.float64
    # A handful of float64 roundings.
    assert_close(out.log_prob, log_softmax(logits).gather(1, out.target[:, None])[:, 0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_draw_from_the_values_they_hold(backend, dtype):
    logits = normal(300, 100, seed=6, scale=3.0, dtype=dtype)
    out, wide = dam.jump(logits, seed=2), dam.jump(logits.float(), seed=2)
    assert torch.equal(out.target, wide.target)
    # The same numbers may be summed in another order.
    assert_close(out.log_prob, wide.log_prob, rtol=4 * rounding(torch.float32))


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_a_common_offset_changes_nothing_but_log_escape(backend, offset):
    # Multiples of 2^-8 below 2^15, so that adding the offset is exact in float32.
    logits = (normal(200, 64, seed=7) * 256).round() / 256
    out, moved = dam.jump(logits, seed=4), dam.jump(logits + offset, seed=4)
    assert torch.equal(out.target, moved.target)
    assert_close(moved.log_prob, out.log_prob, rtol=2.0**-22, atol=2.0**-22)
    assert_close(moved.log_escape, out.log_escape.double() + offset, rtol=2 * rounding(torch.float32), atol=2.0**-21)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_temperatures(backend, temperature):
    """Cold: the largest logit. Hot: all allowed destinations alike."""
    logits = torch.tensor([[1.0, 2.0, -INF, 3.0]]).expand(400, -1)
    out = dam.jump(logits, exclude=0, temperature=temperature, seed=1)
    if temperature < 1:
        assert bool((out.target == 3).all()) and bool((out.log_prob == 0).all())
    else:
        # z of a fair coin
        assert set(out.target.tolist()) == {1, 3} and abs(z_score(int((out.target == 1).sum()), 400, 0.5)) < Z
        assert_close(out.log_prob, torch.full((400,), -math.log(2)), rtol=1e-6)


# ---- what is never drawn


def test_impossible_destinations_are_never_drawn(backend):
    """Single -inf, whole tiles of -inf, an excluded token that holds nearly all mass."""
    logits = normal(10, 4000, seed=8)
    logits[:, 1024:3072] = -INF
    logits[:, ::3] = -INF
    logits[:, 3999] = 50.0
    target = dam.jump(logits, exclude=3999, num_samples=100, seed=5).target
    assert bool(torch.isfinite(logits.gather(1, target)).all()) and bool((target != 3999).all())


@pytest.mark.parametrize("columns", [1, 2, 1023, 1024, 1025, 2049])
def test_the_only_destination_left_is_drawn(backend, columns):
    """Also where destination 0 holds nearly all mass and is excluded."""
    only = torch.tensor(sorted({0, 1, 511, 512, 1023, 1024, 2047, 2048, columns - 1} & set(range(columns))))
    logits = torch.full((len(only), columns), -INF)
    logits[:, 0] = 40.0
    logits.scatter_(1, only[:, None], -3.0)
    out = dam.jump(logits, exclude=torch.where(only == 0, -1, 0), seed=6)
    assert torch.equal(out.target, only)
    assert bool((out.log_prob == 0).all())
    assert_close(out.log_escape, torch.full((len(only),), -3.0), rtol=rounding(torch.float32))


def test_ties_at_a_tiny_temperature_have_equal_shares(backend):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    for scale in (1.0, 1e20):
        out = dam.jump(logits * scale, temperature=1e-30, num_samples=40, seed=1)
        # One of two is missed by 40 draws once in 2^39.
        assert set(out.target.flatten().tolist()) == {1, 3}
        assert_close(out.log_prob, torch.full((1, 40), -math.log(2)), **TOLERANCE)


# ---- temperature 0


def test_temperature_zero_takes_the_lowest_argmax(backend):
    logits = integers(0, 4, 64, 2100, seed=9).float()  # many ties, in every tile
    logits[:8] = -1.0  # and rows of nothing but ties
    exclude = integers(-1, 2100, 64, seed=10)
    exclude[0] = 0
    out = dam.jump(logits, exclude=exclude, temperature=0, seed=1)
    x = allowed(logits, exclude)
    lowest = torch.where(x == x.amax(1, keepdim=True), torch.arange(2100), 2100).amin(1)
    assert torch.equal(out.target, lowest)
    assert_close(out.log_prob, log_softmax(logits, exclude).gather(1, lowest[:, None])[:, 0], **TOLERANCE)
    assert_close(out.log_escape, torch.logsumexp(x, 1), **TOLERANCE)
    repeated = dam.jump(logits, exclude=exclude, temperature=0, num_samples=3, seed=2).target
    assert torch.equal(repeated, lowest[:, None].expand(-1, 3))


# ---- the random stream


@pytest.mark.parametrize("count", [1, 2])
def test_draws_do_not_depend_on_company(backend, count):
    """Row ids name the streams: order, batch, threads and the number of samples change nothing."""
    logits = normal(24, 1100, seed=11, scale=3.0)
    ids = integers(-(2**63), 2**63 - 1, 24, seed=12)
    whole = dam.jump(logits, row_ids=ids, num_samples=3, seed=9)
    order = torch.randperm(24, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(ids.device)
    with threads(count):
        shuffled = dam.jump(logits[order], row_ids=ids[order], num_samples=3, seed=9)
        parts = [dam.jump(logits[a:b], row_ids=ids[a:b], num_samples=3, seed=9) for a, b in ((0, 1), (1, 15), (15, 24))]
        one = dam.jump(logits, row_ids=ids, seed=9)
    for field in range(3):
        assert torch.equal(shuffled[field], whole[field][order])
        assert torch.equal(torch.cat([part[field] for part in parts]), whole[field])
    assert torch.equal(one.target, whole.target[:, 0])


def test_row_ids_default_to_positions(backend):
    logits = normal(40, 30, seed=13)
    named = dam.jump(logits, row_ids=torch.arange(40), seed=1).target
    assert torch.equal(dam.jump(logits, seed=1).target, named)
    # Any stride of the ids.
    assert torch.equal(dam.jump(logits, row_ids=torch.arange(80)[::2] // 2, seed=1).target, named)
    same = dam.jump(logits[:1].expand(40, -1), row_ids=torch.zeros(40, dtype=torch.int64), seed=1).target
    assert bool((same == same[0]).all())


def agreement_z(a, b, p):
    """z-score of the number of equal draws, which is Binomial(n, sum p^2) for independent ones."""
    return z_score(int((a == b).sum()), a.numel(), float((p * p).sum()))


@pytest.mark.of_the_op
def test_streams_are_unrelated(backend):
    """Other seeds, row ids and samples, also those that differ in one bit of either 32-bit word, are independent."""
    rows = 5000
    logits = normal(1, 6, seed=14)
    p = log_softmax(logits).exp()
    logits = logits.expand(rows, -1)
    ids = torch.arange(rows)
    first = dam.jump(logits, seed=5, num_samples=3)
    base = first.target[:, 0]
    others = [dam.jump(logits, seed=seed).target for seed in (4, 6, 5 + 2**32, 5 + 2**63, -5)]
    others += [dam.jump(logits, seed=5, row_ids=ids + shift).target for shift in (1, 2**32, 2**62)]
    others += [first.target[:, 1], first.target[:, 2], base.roll(1)]
    assert all(abs(agreement_z(base, other, p)) < Z for other in others)


@pytest.mark.of_the_op
def test_pairs_of_samples_are_independent(backend):
    """Consecutive samples of one row fill a contingency table as a product does."""
    logits = normal(1, 5, seed=15)
    target = dam.jump(logits.expand(2000, -1), num_samples=40, seed=10).target
    p = log_softmax(logits).exp()[0]
    counts = torch.bincount((target[:, ::2] * 5 + target[:, 1::2]).flatten(), minlength=25)
    assert chi_square_p(counts, (p[:, None] * p).flatten()) > P_VALUE


@pytest.mark.of_the_op
def test_tile_and_token_races_are_independent(backend):
    """Which token wins does not depend on which tile did: 8 tokens of each of 4 tiles are equally likely.

    The first tokens of a tile are those whose random numbers would be a tile's own if the streams were one.
    """
    place = torch.tensor([0, 1, 2, 3, 512, 513, 514, 515])
    tokens = (torch.arange(4)[:, None] * 1024 + place).flatten()
    logits = torch.full((1, 4096), -INF)
    logits[0, tokens] = 0.0
    rows = 3 if slow(backend) else 100
    target = dam.jump(logits.expand(rows, -1), num_samples=1000, seed=11).target
    counts = torch.bincount(torch.searchsorted(tokens, target.flatten()), minlength=32)
    assert chi_square_p(counts, torch.full((32,), 1 / 32.0)) > P_VALUE


def test_seed_forms_agree(backend):
    logits = normal(100, 50, seed=16)
    expected = dam.jump(logits, seed=2**64 - 3).target
    assert torch.equal(dam.jump(logits, seed=-3).target, expected)
    assert torch.equal(dam.jump(logits, seed=torch.tensor(-3)).target, expected)
    assert torch.equal(dam.jump(logits, seed=torch.tensor([-3])).target, expected)


def test_manual_seed_governs(backend):
    logits = normal(200, 50, seed=17)

    def draw():
        return dam.jump(logits).target

    torch.manual_seed(3)
    a, b = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), a) and torch.equal(draw(), b) and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "columns", "samples", "temperature"),
    [(20_000, 20, 1, 1.0), (5_000, 20, 1, 0.5), (2_000, 20, 5, 3.0), (64, 5_000, 3, 1.0)],
)
def test_backends_agree(rows, columns, samples, temperature):
    """At most 1 draw in 10^4 may differ, by floating-point ties. So the law of draws is that of one backend."""
    logits = normal(rows, columns, seed=18, scale=3.0)
    options = {"num_samples": samples, "seed": 12, "temperature": temperature}
    with dam.backend("torch"):
        reference = dam.jump(logits, **options).target
    others = [n for n in IMPLEMENTATIONS if n != "torch" and choice.why_unavailable(n) is None]
    if not others:
        pytest.skip("only the reference runs here")
    for name in others:
        with dam.backend(name):
            target = dam.jump(logits.to(choice.DEVICE_TYPE[name]), **options).target.cpu()
        assert int((target != reference).sum()) <= rows * samples // 10_000


# ---- shapes and strides


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from([1, 2, 7, 1023, 1024, 1025, 2047, 3001]),
    padding=st.integers(0, 3),
    samples=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_shapes_and_strides(rows, columns, padding, samples, dtype):
    wide = normal(rows, columns + padding, seed=19, dtype=dtype)
    wide[:, columns:] = 60.0  # would win if it were read
    for logits in (wide[:, :columns], wide[::2, :columns], wide[:1, :columns].expand(min(rows, 1) * 4, -1)):
        out = dam.jump(logits, num_samples=samples, seed=13)
        shape = (logits.shape[0],) if samples == 1 else (logits.shape[0], samples)
        assert out.target.shape == out.log_prob.shape == shape and out.log_escape.shape == shape[:1]
        assert bool(((out.target >= 0) & (out.target < columns)).all())
        dense = dam.jump(logits.contiguous(), num_samples=samples, seed=13)
        assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


def test_rows_beyond_2_31_elements(backend):
    """Two rows 2^31 elements apart in memory of which nothing else is touched."""
    logits = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))
    logits.copy_(normal(2, 64, seed=20))
    out, dense = dam.jump(logits, seed=1, num_samples=8), dam.jump(logits.contiguous(), seed=1, num_samples=8)
    assert torch.equal(out.target, dense.target)


# ---- rows that cannot be sampled


@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize(
    ("fill", "problem"), [(math.nan, "NaN"), (INF, r"\+inf"), (-INF, "no reachable destination")], ids=str
)
def test_check_names_the_first_bad_row(backend, fill, problem, temperature):
    logits = normal(30, 1200, seed=21)
    for row in (28, 17):  # the later one is made bad first
        if fill == -INF:
            logits[row] = -INF
        else:
            logits[row, 1100] = fill
        with pytest.raises(ValueError, match=f"jump: row {row} of the logits.*{problem}"):
            dam.jump(logits, temperature=temperature, seed=1)
    out = dam.jump(logits, temperature=temperature, seed=1, check=False)
    good = [r for r in range(30) if r not in (17, 28)]
    alone = dam.jump(logits[good], row_ids=torch.tensor(good), temperature=temperature, seed=1)
    assert torch.equal(out.target[good], alone.target)
    if fill == -INF:
        assert out.target[17] == -1 and out.log_prob[17] == out.log_escape[17] == -INF


def test_what_is_excluded_cannot_be_bad(backend):
    logits = torch.tensor([[math.nan, 1.0], [INF, 1.0]])
    assert dam.jump(logits, exclude=0, seed=1).target.tolist() == [1, 1]


def test_an_excluded_nan_is_not_blamed(backend):
    logits = torch.tensor([[math.nan, -INF]])
    with pytest.raises(ValueError, match="no reachable destination"):
        dam.jump(logits, exclude=0, seed=1)


# ---- torch's own machinery


@pytest.mark.of_the_op
def test_opcheck(backend):
    logits, exclude, ids = normal(4, 30, seed=22), torch.tensor([0, -1, 3, 29]), torch.arange(4)
    some = (logits[:, :20], exclude.clamp(max=19), torch.arange(20) % 5 == 2, 0.0, 3)
    for args in ((logits, None, None, 1.0, 1), some, (logits[:0], None, None, 1.0, 2)):
        row_ids = ids[: len(args[0])]
        torch.library.opcheck(module._jump.overload, (*args, torch.tensor(1), row_ids, True, backend))


@pytest.mark.slow
@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    # What torch compiles to is seconds of a core, and of one op as of another.
    @torch.compile(fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    def draw(logits, exclude):
        return dam.jump(logits * 2, exclude=exclude, num_samples=2, seed=14)

    logits = normal(30, 40, seed=23)
    exclude = integers(-1, 40, 30, seed=24)
    eager = dam.jump(logits * 2, exclude=exclude, num_samples=2, seed=14)
    for a, b in zip(draw(logits, exclude), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.of_the_op
def test_compiled_draws_without_a_seed_differ(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(logits):
        return dam.jump(logits).target, dam.jump(logits).target

    logits = normal(100, 40, seed=25)
    torch.manual_seed(1)
    a, b = draw(logits)
    c, d = draw(logits)
    torch.manual_seed(1)
    again = draw(logits)
    assert len({tuple(x.tolist()) for x in (a, b, c, d)}) == 4
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_is_not_differentiable(backend):
    out = dam.jump(normal(3, 4).requires_grad_(), seed=1)
    assert not out.log_prob.requires_grad and not out.log_escape.requires_grad


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a tensor; got list"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \[..., V\]; got \[\]"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits must have at least one column; got shape \[3, 0\]"),
        ({"logits": torch.zeros(3, 5).long()}, TypeError, "logits must be float32.*got torch.int64"),
        ({"logits": torch.zeros(5, 3).t()}, ValueError, r"logits must have stride 1.*got strides \[1, 3\]"),
        ({"exclude": 5}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"exclude": -2}, ValueError, r"exclude must be -1 or in \[0, 5\); got -2"),
        ({"exclude": torch.tensor([0, 5, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"exclude": torch.tensor([0, -2, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got -2"),
        ({"exclude": torch.zeros(2, dtype=torch.int64)}, ValueError, r"exclude must be .* shape \[3\]; got .*\[2\]"),
        ({"exclude": torch.zeros(3, dtype=torch.int32)}, TypeError, "exclude must be int64; got torch.int32"),
        ({"exclude": 1.0}, TypeError, "exclude must be an int or an int64 tensor; got float"),
        ({"exclude": True}, TypeError, "exclude must be an int or an int64 tensor; got bool"),
        ({"temperature": -1.0}, ValueError, "temperature must be .*; got -1.0"),
        ({"temperature": 1e31}, ValueError, "temperature must be .*; got 1e\\+31"),
        ({"temperature": 1e-31}, ValueError, "temperature must be .*; got 1e-31"),
        ({"temperature": INF}, ValueError, "temperature must be .*; got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number; got str"),
        ({"num_samples": 0}, ValueError, r"num_samples must be in \[1, 2\^24\); got 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples must be an int; got float"),
        ({"seed": 2**64}, ValueError, f"seed must fit in 64 bits; got {2**64}"),
        ({"seed": 1.0}, TypeError, "seed must be an int, an int64 tensor or None; got float"),
        ({"seed": torch.tensor([1, 2])}, TypeError, r"seed tensor must hold one int64; got torch.int64 \[2\]"),
        ({"row_ids": [0, 1, 2]}, TypeError, "row_ids must be an int64 tensor; got list"),
        ({"row_ids": torch.arange(2)}, ValueError, r"row_ids must have shape \[3\]; got \[2\]"),
        ({"row_ids": torch.arange(3).float()}, TypeError, "row_ids must be an int64 tensor; got torch.float32"),
        ({"check": "no"}, TypeError, "check must be .*; got str"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^jump: .*{message}"):
        dam.jump(**{"logits": torch.zeros(3, 5), **arguments})


def test_inputs_on_other_devices_are_refused():
    for name in ("exclude", "row_ids"):
        with pytest.raises(ValueError, match=f"^jump: {name} must be on cpu like the other inputs; got meta"):
            dam.jump(torch.zeros(3, 5), **{name: torch.arange(3, device="meta")})
