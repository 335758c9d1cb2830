"""backward_kolmogorov: exp(duration Q) terminal, accurate in every entry, non-negative, and its transpose backward."""

import functools
import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from helpers import assert_close, normal, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import dam
from dam.generators import Absorbing, Dense, Lattice, LowRank, Uniform
from dam.ops import backward_kolmogorov as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
INF = math.inf
FLOOR = 1e-30  # of the contract: relative accuracy holds above it times the row's maximum
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def rate_matrix(size, seed, power):
    """Rates that spread over orders of magnitude, some of them zero; float64."""
    x = normal(size, size, seed=seed, dtype=torch.float64).abs() ** power
    x[normal(size, size, seed=seed + 1) > 0.7] = 0.0
    return x.fill_diagonal_(0.0)


def dense(size, seed=0, power=3.0):
    rates = rate_matrix(size, seed, power) * (6 / size)
    return Dense(rates - torch.diag(rates.sum(1)))


def path(size):
    """The walk between two ends as a matrix: far entries are tiny."""
    return Dense(torch.from_numpy(matrix_of(Lattice((size,)))).to(torch.get_default_device()))


def low_rank(size, rank, seed=0):
    left, right = (normal(size, rank, seed=seed + i, dtype=torch.float64).abs() for i in (0, 1))
    return LowRank(left, (right**3).t().contiguous() * (6 / size))


GENERATORS = {
    "uniform": lambda: Uniform(37),
    "absorbing": lambda: Absorbing(37, 5),
    "line": lambda: Lattice((37,)),
    "ring": lambda: Lattice((24,), periodic=True),
    "grid": lambda: Lattice((5, 4, 3), periodic=(True, False, True)),
    "degenerate torus": lambda: Lattice((2, 1, 7), periodic=True),
    "degenerate grid": lambda: Lattice((2, 1, 7)),
    "low rank": lambda: low_rank(37, 3),
    "dense": lambda: dense(37),
}
each_generator = pytest.mark.parametrize("name", GENERATORS)


def matrix_of(generator):
    """Q from the definitions, entry by entry: float64 numpy [V, V]."""
    size = generator.size
    q = np.zeros((size, size))
    if isinstance(generator, Uniform):
        q[:] = 1 / size
    elif isinstance(generator, Absorbing):
        q[:, generator.mask_token] = 1.0
    elif isinstance(generator, Lattice):
        for point in itertools.product(*map(range, generator.shape)):
            for axis, direction in itertools.product(range(len(point)), (-1, 1)):
                other = list(point)
                other[axis] += direction
                if generator.periodic[axis]:
                    other[axis] %= generator.shape[axis]
                if 0 <= other[axis] < generator.shape[axis]:
                    here, there = (np.ravel_multi_index(p, generator.shape) for p in (point, tuple(other)))
                    q[here, there] += 1.0
    elif isinstance(generator, LowRank):
        q[:] = (generator.left.double() @ generator.right.double()).cpu().numpy()
    else:
        q[:] = generator.matrix.double().cpu().numpy()
    np.fill_diagonal(q, 0.0)
    np.fill_diagonal(q, -q.sum(1))
    return q


def exponential(generator, duration):
    """exp(duration Q) by scipy, on the default device; absolute error some 1e-16 times |duration Q|."""
    return torch.from_numpy(scipy.linalg.expm(duration * matrix_of(generator))).to(torch.get_default_device())


def exact_exponential(generator, duration):
    """exp(duration Q) with all digits of float64 right in every entry, however small."""
    q = matrix_of(generator)
    with mpmath.workdps(80):
        # The diagonal again, as float64 sums are not exact.
        m = mpmath.matrix(q.tolist())
        for x in range(len(q)):
            m[x, x] = -mpmath.fsum(m[x, y] for y in range(len(q)) if y != x)
        # Rounding is absolute, some orders of magnitude above 1e-80, and the smallest entries of interest 1e-42.
        e = mpmath.expm(m * mpmath.mpf(duration), method="taylor")
        rows = [[float(e[x, y]) for y in range(len(q))] for x in range(len(q))]
    return torch.tensor(rows, dtype=torch.float64)


def float_type(backend):
    """The most precise dtype that a backend takes."""
    return torch.float64 if backend == "torch" else torch.float32


def assert_accurate(result, terminal, matrix, tol, extra=0.0):
    """The docstring's bound, and rounding to the result's dtype."""
    assert result.dtype == (torch.float64 if terminal.dtype == torch.float64 else torch.float32)
    terminal = terminal.double()
    bound = (tol + extra + rounding(result.dtype)) * (terminal.abs() @ matrix.t())
    floor = tol * FLOOR * terminal.abs().amax(dim=1, keepdim=True)
    excess = (result.double() - terminal @ matrix.t()).abs() - bound - floor
    assert not bool((excess > 0).any()), f"off by {float(excess.max())} too much"


@each_generator
def test_matches_the_matrix_exponential(backend, name):
    generator = GENERATORS[name]()
    for duration in (0.0, 1e-6, 1, 50.0, 1e3):
        terminal = normal(4, generator.size, seed=1, dtype=float_type(backend))
        # scipy's own rounding, relative to rows that sum to 1.
        scale = duration * float(np.abs(matrix_of(generator)).max()) * generator.size
        result = dam.backward_kolmogorov(generator, terminal, duration, tol=1e-12)
        expected = terminal.double() @ exponential(generator, duration).t()
        assert_close(result, expected, rtol=rounding(result.dtype), atol=1e-14 * (1 + scale))


SPIKY = {
    "uniform": lambda: Uniform(5),
    "absorbing": lambda: Absorbing(5, 3),
    "line": lambda: Lattice((12,)),
    "ring": lambda: Lattice((13,), periodic=True),
    "even ring": lambda: Lattice((10,), periodic=True),
    "grid": lambda: Lattice((4, 3), periodic=(True, False)),
    "low rank": lambda: low_rank(9, 2),
    "dense path": lambda: path(12),
    "dense stiff": lambda: dense(8, power=12.0),
}


@functools.cache
def spiky_truth(name, duration):
    with torch.device("cpu"):
        return exact_exponential(SPIKY[name](), duration)


@pytest.mark.parametrize("name", SPIKY)
def test_every_entry_is_accurate(backend, name):
    """One spike per row: entries that lie far from it, down to 1e-30, have relative error tol."""
    generator = SPIKY[name]()
    for duration in (1e-12, 1e-4, 20.0):
        truth = spiky_truth(name, duration).to(torch.get_default_device())
        spikes = torch.eye(generator.size, dtype=float_type(backend))
        jumps = duration * float(np.abs(matrix_of(generator)).max())
        for tol in (1e-12, 1e-6):
            result = dam.backward_kolmogorov(generator, spikes, duration, tol=tol)
            # float64's rounding as the docstring states it.
            assert_accurate(result, spikes, truth, tol, extra=1e-13 + 1e-15 * jumps)
            assert bool((result >= 0).all())
            # The transpose, to the same accuracy.
            (gradient,) = torch.autograd.grad(
                dam.backward_kolmogorov(generator, x := spikes.clone().requires_grad_(), duration, tol=tol), x, spikes
            )
            assert_accurate(gradient, spikes, truth.t(), tol, extra=1e-13 + 1e-15 * jumps)


@each_generator
def test_constants_are_preserved(backend, name):
    """Rows of exp(duration Q) sum to one."""
    generator = GENERATORS[name]()
    for duration in (1e-9, 0.5, 40.0, 1e5):
        terminal = torch.full((2, generator.size), 0.75, dtype=float_type(backend))
        result = dam.backward_kolmogorov(generator, terminal, duration)
        # A few roundings of numbers that sum to 1, thousands of times where a series is summed.
        assert_close(result, terminal, rtol=1e-12 + rounding(result.dtype))


@each_generator
def test_semigroup(backend, name):
    """Advancing by s and then by t is advancing by s + t."""
    generator = GENERATORS[name]()
    terminal = normal(3, generator.size, seed=2, dtype=float_type(backend)).exp()
    once = dam.backward_kolmogorov(generator, terminal, 2.0)
    twice = dam.backward_kolmogorov(generator, dam.backward_kolmogorov(generator, terminal, 0.75), 1.25)
    # Non-negative throughout: relative errors add, tol three times and two roundings.
    assert_close(twice, once, rtol=3e-6 + 4 * rounding(once.dtype))


@each_generator
def test_non_negative_in_non_negative_out(backend, name):
    generator = GENERATORS[name]()
    for duration in (1e-3, 1.0, 30.0, 1e4):
        power = normal(8, generator.size, seed=3, dtype=torch.float64).clamp(-2.5, 2.5) * 8
        terminal = torch.where(normal(8, generator.size, seed=4) > 0.5, 0.0, 10**power).to(float_type(backend))
        result = dam.backward_kolmogorov(generator, terminal, duration)
        low, high = torch.aminmax(terminal, dim=1, keepdim=True)
        slack = 1e-6 + rounding(result.dtype)
        assert bool((result >= 0).all())
        # An expectation lies between the extremes.
        assert bool((result >= low * (1 - slack)).all()) and bool((result <= high * (1 + slack)).all())


@each_generator
def test_linear(backend, name):
    generator = GENERATORS[name]()
    a, b = (normal(3, generator.size, seed=s, dtype=float_type(backend)) for s in (5, 6))
    whole = dam.backward_kolmogorov(generator, 2 * a - b, 1.5)
    parts = [dam.backward_kolmogorov(generator, x, 1.5).double() for x in (a, b)]
    # Numbers of about 1 that may cancel, each with its error tol and rounding.
    assert_close(whole, 2 * parts[0] - parts[1], rtol=0, atol=1e-5 + 20 * rounding(whole.dtype))


@each_generator
def test_dtypes(backend, name):
    generator = GENERATORS[name]()
    matrix = exponential(generator, 0.8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, float_type(backend)):
        terminal = normal(5, generator.size, seed=7, dtype=dtype)
        result = dam.backward_kolmogorov(generator, terminal, 0.8)
        # float64 inside: only the result is rounded. scipy is right to 1e-13 in these small matrices.
        assert_accurate(result, terminal, matrix, 1e-6, extra=1e-12)
        with dam.backend("torch"):
            reference = dam.backward_kolmogorov(generator, terminal.double(), 0.8)
        assert_close(result, reference, rtol=2 * rounding(result.dtype), atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_a_generator(backend, dtype):
    """A generator's tensors may have any dtype; rates are taken as given."""
    left, right = normal(6, 2, seed=8).abs().to(dtype), normal(2, 6, seed=9).abs().to(dtype)
    ring = (torch.eye(6).roll(1, 0) - torch.eye(6)).to(dtype)
    for generator in (LowRank(left, right), Dense(ring)):
        terminal = normal(3, 6, seed=10)
        result = dam.backward_kolmogorov(generator, terminal, 1.1)
        assert_accurate(result, terminal, exponential(generator, 1.1), 1e-6)


@each_generator
def test_strides_and_company(backend, name):
    """A row's result depends neither on its neighbours nor on where it lies."""
    generator = GENERATORS[name]()
    size = generator.size
    wide = normal(6, size + 13, seed=11)
    whole = dam.backward_kolmogorov(generator, wide[:, :size].contiguous(), 0.9)
    tolerance = {"rtol": 4 * rounding(torch.float32), "atol": 1e-7}  # library matmuls differ in their last bits
    assert_close(dam.backward_kolmogorov(generator, wide[:, :size], 0.9), whole, **tolerance)
    assert_close(dam.backward_kolmogorov(generator, wide[::2, :size], 0.9), whole[::2], **tolerance)
    expanded = wide[1, :size].expand(4, size)
    assert_close(dam.backward_kolmogorov(generator, expanded, 0.9), whole[1].expand(4, size), **tolerance)


@each_generator
def test_small_workspace(backend, name, monkeypatch):
    """Rows one at a time, and no room for a squared matrix."""
    generator = GENERATORS[name]()
    terminal = normal(5, generator.size, seed=12)
    for duration in (0.9, 60.0):
        whole = dam.backward_kolmogorov(generator, terminal, duration)
        with monkeypatch.context() as patch:
            patch.setenv("DAM_WORKSPACE_MB", "0.001")
            part = dam.backward_kolmogorov(generator, terminal, duration)
        assert_close(part, whole, rtol=4 * rounding(torch.float32), atol=1e-7)


# ---- edges


@each_generator
def test_duration_zero_is_a_copy(backend, name):
    generator = GENERATORS[name]()
    terminal = normal(3, generator.size, seed=13)
    terminal[1, 2] = INF
    result = dam.backward_kolmogorov(generator, terminal, 0)
    assert torch.equal(result, terminal) and result.data_ptr() != terminal.data_ptr()


@each_generator
def test_no_rows(backend, name):
    generator = GENERATORS[name]()
    assert dam.backward_kolmogorov(generator, torch.zeros(0, generator.size), 1.0).shape == (0, generator.size)


@pytest.mark.parametrize("duration", [0.0, 5e-324, 1e-300, 1.0, 1e300])
def test_one_state(backend, duration):
    one = torch.ones(1, 1)
    chains = (Uniform(1), Absorbing(1, 0), Lattice((1, 1)), Lattice((1,), True), LowRank(one, one), Dense(0 * one))
    for generator in chains:
        if isinstance(generator, LowRank) and duration > 1e200:
            continue  # jumps to itself are counted
        assert dam.backward_kolmogorov(generator, 3 * one, duration).tolist() == [[3.0]]


@pytest.mark.parametrize("duration", [5e-324, 1e-300, 1e9, 1e300])
def test_extreme_durations(backend, duration):
    terminal = normal(2, 12, seed=14, dtype=float_type(backend)).abs()
    terminal[:, 3] = 2.0
    mean = terminal.double().mean(1, keepdim=True).expand(2, 12)
    for generator, limit in (
        (Uniform(12), mean),
        (Lattice((12,)), mean),
        (Lattice((3, 4), True), mean),
        (Absorbing(12, 3), torch.full((2, 12), 2.0)),
        (path(12), mean),
    ):
        result = dam.backward_kolmogorov(generator, terminal, duration)
        expected = terminal if duration < 1 else limit
        assert_close(result, expected, rtol=1e-12 + 2 * rounding(result.dtype))


@each_generator
def test_a_row_that_is_not_finite_is_nan(backend, name):
    generator = GENERATORS[name]()
    for value in (math.nan, INF, -INF):
        for dtype, at in itertools.product((torch.float32, torch.float16), (0, 5, generator.size - 1)):
            terminal = normal(3, generator.size, seed=15, dtype=dtype)
            terminal[1, at] = value
            result = dam.backward_kolmogorov(generator, terminal, 0.4)
            assert bool(torch.isnan(result[1]).all()) and bool(torch.isfinite(result[::2]).all())


# ---- large V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("duration", [1e-7, 0.3, 9.0])
def test_large_vocabulary(backend, dtype, duration):
    """A vocabulary of 126,464, a spike in it, and the last token as the mask."""
    size = 126_464
    terminal = normal(3, size, seed=16).abs().to(dtype)
    terminal[0] = 0.0
    terminal[0, 77] = 1.0
    stays, moves = math.exp(-duration), -math.expm1(-duration)
    x = terminal.double()
    tolerance = 1e-12 + rounding(torch.float32)  # sums of V non-negative numbers in float64
    assert_close(
        dam.backward_kolmogorov(Uniform(size), terminal, duration),
        stays * x + moves * x.mean(1, keepdim=True),
        rtol=tolerance,
    )
    expected = stays * x + moves * x[:, -1:]
    expected[:, -1] = x[:, -1]
    assert_close(dam.backward_kolmogorov(Absorbing(size, size - 1), terminal, duration), expected, rtol=tolerance)


@pytest.mark.parametrize("periodic", [False, (True, False)])
def test_large_grid(backend, periodic):
    """91 x 91 points: one matrix exponential from each side."""
    generator = Lattice((91, 91), periodic)
    terminal = normal(2, 91 * 91, seed=17).exp()
    for duration in (0.2, 3.0):
        first, second = (exponential(Lattice((91,), p), duration) for p in generator.periodic)
        expected = first @ terminal.double().view(2, 91, 91) @ second.t()
        result = dam.backward_kolmogorov(generator, terminal, duration).view(2, 91, 91)
        assert_close(result, expected, rtol=1e-6 + rounding(torch.float32))


@pytest.mark.parametrize("duration", [0.01, 1.0, 300.0])
def test_long_line(backend, duration):
    """32,768 points: a spike spreads as e^{-2t} I_k(2t), and at an end the outer half is mirrored."""
    size, middle = 32_768, 16_000
    spikes = torch.zeros(2, size, dtype=float_type(backend))
    spikes[0, middle] = spikes[1, 0] = 1.0
    result = dam.backward_kolmogorov(Lattice((size,)), spikes, duration).double()
    reach = torch.arange(201)
    bell = torch.from_numpy(scipy.special.ive(np.arange(202), 2 * duration)).to(result.device)
    # scipy's Bessel functions are good to 1e-13; above the floor tol is relative, also 36 deviations out.
    tolerance = {"rtol": 1e-6 + rounding(torch.float32), "atol": 1e-36}
    assert_close(result[0, middle + reach], bell[:-1], **tolerance)
    assert_close(result[0, middle - reach], bell[:-1], **tolerance)
    assert_close(result[1, reach], bell[:-1] + bell[1:], **tolerance)
    assert_close(result.sum(1), torch.ones(2), rtol=1e-7)  # Q is symmetric: columns sum to one too


@pytest.mark.parametrize("mean", [1e-12, 0.3, 1.0, 40.0, 2.5e3, 1e6])
def test_poisson_weights(mean):
    first, weights = module._poisson(mean, 1e-40)
    k = np.arange(first, first + len(weights))
    with mpmath.workdps(30):
        picked = np.unique(np.linspace(0, len(k) - 1, 50).astype(int))
        exact = [float(mpmath.exp(-mean) * mpmath.mpf(mean) ** int(i) / mpmath.factorial(int(i))) for i in k[picked]]
    # One rounding or two per step from the mode outward.
    np.testing.assert_allclose(np.array(weights)[picked], exact, rtol=1e-15 * (10 + 20 * math.sqrt(mean)))
    assert math.fsum(weights) == pytest.approx(1.0, rel=1e-15)
    assert len(weights) < 40 + 30 * math.sqrt(mean)


# ---- torch's own machinery


@each_generator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_transpose(backend, name, dtype):
    generator = GENERATORS[name]()
    terminal = normal(3, generator.size, seed=18, dtype=dtype).requires_grad_()
    upstream = normal(3, generator.size, seed=19)
    (gradient,) = torch.autograd.grad(dam.backward_kolmogorov(generator, terminal, 0.6), terminal, upstream)
    matrix = exponential(generator, 0.6)
    bound = (1e-6 + rounding(dtype) + rounding(torch.float32)) * (upstream.double().abs() @ matrix) + 1e-12
    assert gradient.dtype == dtype
    assert bool(((gradient.double() - upstream.double() @ matrix).abs() <= bound).all())


def test_gradient_of_a_sum(backend):
    """An upstream gradient with stride 0."""
    terminal = normal(2, 9, seed=20).requires_grad_()
    dam.backward_kolmogorov(Absorbing(9, 4), terminal, 1.3).sum().backward()
    expected = exponential(Absorbing(9, 4), 1.3).sum(0).expand(2, 9)
    assert_close(terminal.grad, expected, rtol=1e-6)


@each_generator
def test_gradcheck(name):
    generator = GENERATORS[name]()
    terminal = normal(1, generator.size, seed=21, dtype=torch.float64).requires_grad_()

    def op(x):
        return dam.backward_kolmogorov(generator, x, 0.7)[:, :5]

    assert torch.autograd.gradcheck(op, terminal, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, terminal, fast_mode=True)


@pytest.mark.parametrize("name", ["uniform", "absorbing", "grid", "low rank", "dense"])
@pytest.mark.of_the_op
def test_opcheck_and_compile(backend, name):
    generator = GENERATORS[name]()
    terminal = normal(2, generator.size, seed=22).requires_grad_()
    arguments = (terminal, *module._pieces(generator), 0.9, 1e-6, False, backend)
    torch.library.opcheck(module._backward_kolmogorov.overload, arguments)

    def step(x):
        return dam.backward_kolmogorov(generator, (-x).exp(), 0.9).log().sum()

    torch._dynamo.reset()  # or the other generators count as recompilations of this one
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values = [torch.autograd.grad(f(terminal), terminal)[0] for f in (step, compiled)]
    assert_close(values[1], values[0], rtol=8 * rounding(torch.float32))  # exp and log compile differently


def test_a_generator_is_not_differentiated(backend):
    left, right = (x.abs().requires_grad_() for x in (normal(4, 2, seed=23), normal(2, 4, seed=24)))
    assert not dam.backward_kolmogorov(LowRank(left, right), torch.ones(1, 4), 1.0).requires_grad


# ---- any generator


@st.composite
def chains(draw):
    kind = draw(st.sampled_from(["uniform", "absorbing", "lattice", "low rank", "dense"]))
    size, seed = draw(st.integers(1, 40)), draw(st.integers(0, 1000))
    if kind == "uniform":
        return Uniform(size)
    if kind == "absorbing":
        return Absorbing(size, draw(st.integers(0, size - 1)))
    if kind == "lattice":
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        return Lattice(shape, [draw(st.booleans()) for _ in shape])
    if kind == "low rank":
        return low_rank(size, draw(st.integers(1, 4)), seed)
    return dense(size, seed, power=2.0)


@few
@given(chains(), st.integers(0, 3), st.sampled_from([1e-8, 0.01, 0.9, 12.0]), st.integers(0, 1000))
def test_any_generator(generator, rows, duration, seed):
    matrix = exponential(generator, duration)
    scale = 1 + duration * float(np.abs(matrix_of(generator)).max()) * generator.size
    for backend, dtype in (("torch", torch.float64), (None, torch.float32)):
        terminal = normal(rows, generator.size, seed=seed, dtype=dtype)
        terminal = torch.cat([terminal, terminal.abs(), torch.ones_like(terminal)])
        with dam.backend(backend) if backend else torch.no_grad():
            result = dam.backward_kolmogorov(generator, terminal, duration)
        # scipy's rounding beside the contract's bound.
        bound = (1e-6 + rounding(dtype)) * (terminal.double().abs() @ matrix.t()) + 1e-14 * scale
        assert bool(((result.double() - terminal.double() @ matrix.t()).abs() <= bound).all())
        assert bool((result[rows:] >= 0).all())


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"generator": torch.zeros(3, 3)}, TypeError, "generator must be Uniform, .*; got Tensor"),
        ({"terminal": [[0.0]]}, TypeError, "terminal must be a tensor; got list"),
        ({"terminal": torch.zeros(2, 3).long()}, TypeError, "terminal must be float32.*; got torch.int64"),
        ({"terminal": torch.zeros(())}, ValueError, r"terminal must have shape \[..., V\]; got \[\]"),
        ({"terminal": torch.zeros(2, 4)}, ValueError, r"terminal must have shape \[..., 3\].*; got \[2, 4\]"),
        ({"terminal": torch.zeros(3, 2).t()}, ValueError, "terminal must have stride 1"),
        ({"duration": -1.0}, ValueError, r"duration must be in \[0, .*; got -1"),
        ({"duration": INF}, ValueError, r"duration must be in \[0, .*; got inf"),
        ({"duration": math.nan}, ValueError, r"duration must be in \[0, .*; got nan"),
        ({"duration": "1"}, TypeError, "duration must be a number; got str"),
        ({"tol": 0.0}, ValueError, r"tol must be in \[1e-12, 0.1\]; got 0"),
        ({"tol": 1.0}, ValueError, r"tol must be in \[1e-12, 0.1\]; got 1"),
        (
            {"terminal": torch.zeros(2, 3, device="meta"), "generator": Dense(torch.zeros(3, 3))},
            ValueError,
            "generator must be on meta like the other inputs; got cpu",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"generator": Uniform(3), "terminal": torch.zeros(2, 3), "duration": 1.0}
    with pytest.raises(error, match=f"^backward_kolmogorov: .*{message}"):
        dam.backward_kolmogorov(**{**good, **arguments})


def test_an_absurd_duration_is_an_error(monkeypatch):
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.00001")  # no room for a squared matrix
    with pytest.raises(ValueError, match=r"^backward_kolmogorov: duration times .* less than 1e9 .*; got 2e\+10"):
        dam.backward_kolmogorov(path(5), torch.zeros(1, 5), 1e10)
    monkeypatch.delenv("DAM_WORKSPACE_MB")
    with pytest.raises(ValueError, match=r"^backward_kolmogorov: duration times .*; got inf"):
        dam.backward_kolmogorov(path(5), torch.zeros(1, 5), 1e308)


ONES = torch.ones(3, 3)
NEGATIVE, NAN = ONES.clone(), ONES.clone()
NEGATIVE[2, 1], NAN[1, 2] = -0.5, math.nan


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Uniform(0), ValueError, "Uniform: size must be at least 1; got 0"),
        (lambda: Uniform(2.0), TypeError, "Uniform: size must be an int; got float"),
        (lambda: Uniform(True), TypeError, "Uniform: size must be an int; got bool"),
        (lambda: Absorbing(3, 3), ValueError, r"Absorbing: mask_token must be in \[0, 3\); got 3"),
        (lambda: Absorbing(3, -1), ValueError, r"Absorbing: mask_token must be in \[0, 3\); got -1"),
        (lambda: Lattice(5), TypeError, "Lattice: shape must be a sequence of ints; got int"),
        (lambda: Lattice(()), ValueError, r"Lattice: shape must have at least one dimension; got \(\)"),
        (lambda: Lattice((3, 0)), ValueError, r"Lattice: shape\[1\] must be at least 1; got 0"),
        (lambda: Lattice((3, 2.0)), TypeError, r"Lattice: shape\[1\] must be an int; got float"),
        (lambda: Lattice((3, 2), 1), TypeError, "Lattice: periodic must be a bool or one per dimension; got 1"),
        (lambda: Lattice((3, 2), (True,)), ValueError, "Lattice: periodic must .* 2 entries like shape; got 1"),
        (lambda: LowRank([[1.0]], ONES), TypeError, "LowRank: left must be a tensor; got list"),
        (lambda: LowRank(ONES.long(), ONES), TypeError, "LowRank: left must be float32.*; got torch.int64"),
        (lambda: LowRank(ONES[0], ONES), ValueError, r"LowRank: left must have shape \[V, R\].*; got \[3\]"),
        (lambda: LowRank(ONES[:, :0], ONES), ValueError, r"LowRank: left must have shape \[V, R\].*; got \[3, 0\]"),
        (lambda: LowRank(ONES, ONES[:2]), ValueError, r"LowRank: right must have shape \[3, 3\].*; got \[2, 3\]"),
        (lambda: LowRank(ONES, ONES.double()), TypeError, "LowRank: right must have the dtype of left"),
        (lambda: LowRank(ONES, ONES.to("meta")), ValueError, "LowRank: right must be on cpu like left; got meta"),
        (lambda: LowRank(NAN, ONES), ValueError, r"LowRank: left must be finite; got nan at \[1, 2\]"),
        (lambda: LowRank(ONES, INF * ONES), ValueError, r"LowRank: right must be finite; got inf at \[0, 0\]"),
        (lambda: LowRank(ONES, NEGATIVE), ValueError, r"LowRank: right must be non-negative; got -0.5 at \[2, 1\]"),
        (
            lambda: LowRank(1e200 * ONES.double(), 1e200 * ONES.double()),
            ValueError,
            "LowRank: left @ right must have finite row sums; got inf in row 0",
        ),
        (lambda: Dense(3), TypeError, "Dense: matrix must be a tensor; got int"),
        (lambda: Dense(ONES[:2]), ValueError, r"Dense: matrix must have shape \[V, V\]; got \[2, 3\]"),
        (lambda: Dense(NAN), ValueError, r"Dense: matrix must be finite; got nan at \[1, 2\]"),
        (lambda: Dense(NEGATIVE), ValueError, r"Dense: matrix must be non-negative off .*; got -0.5 at \[2, 1\]"),
        (lambda: Dense(ONES), ValueError, "Dense: matrix must have rows that sum to zero; got 3 in row 0"),
        (
            lambda: Dense(torch.tensor([[-1.0, 1.0], [1e-3, -1.001e-3]])),
            ValueError,
            "Dense: matrix must have rows that sum to zero; got -1.0.*e-06 in row 1",
        ),
        (
            lambda: Dense(1e308 * (ONES.double() - 2 * torch.eye(3))),
            ValueError,
            "Dense: matrix must have finite escape rates; got inf in row 0",
        ),
    ],
)
def test_wrong_generators(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_rows_may_sum_to_zero_within_rounding():
    """A diagonal that was rounded to the matrix's dtype is accepted, and the sum made exact."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rates = normal(50, 50, seed=25).abs().fill_diagonal_(0.0).to(dtype)
        generator = Dense(rates - torch.diag(rates.sum(1)))
        assert_close(
            dam.backward_kolmogorov(generator, torch.ones(1, 50), 5.0), torch.ones(1, 50), rtol=rounding(torch.float32)
        )


def test_sizes_of_generators():
    assert [GENERATORS[name]().size for name in GENERATORS] == [37, 37, 37, 24, 60, 14, 14, 37, 37]
    assert Lattice([2, 3], [True, False]) == Lattice((2, 3), (True, False))
    assert Lattice((2, 3), True).periodic == (True, True)
