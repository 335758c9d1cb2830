"""Chains that undo noise, and simulation: laws against enumeration and the matrix exponential, and path weights."""

import dataclasses
import itertools
import math

import pytest
import scipy.stats
import torch

import dam
from dam.ctmc import (
    Geometric,
    LatticeCTMC,
    Linear,
    MaskedCTMC,
    UniformCTMC,
    UserSchedule,
    enumeration,
    simulate,
    tau_leap,
)
from dam.ctmc.simulate import _arrivals
from tests.oracle import random_joint

# A false alarm of one test: |z| above it has probability 6e-7.
Z, P_VALUE = 5.0, 1e-6
SIZE, LENGTH = 3, 2
END = 0.9


def chains():
    return [
        pytest.param(UniformCTMC(SIZE, Geometric(1e-3)), id="uniform"),
        pytest.param(UniformCTMC(SIZE, Geometric(1e-3), predicts="ratio"), id="uniform-ratio"),
        pytest.param(LatticeCTMC(SIZE, Geometric(1e-4)), id="lattice"),
        pytest.param(LatticeCTMC(SIZE, Geometric(1e-4), periodic=True), id="cycle"),
        pytest.param(LatticeCTMC(SIZE, Geometric(1e-4), predicts="ratio"), id="lattice-ratio"),
    ]


def chi_square_p(counts, probability):
    """That counts are as far as these from their expectation, or farther; cells of probability zero must be empty."""
    expected = counts.sum() * probability
    assert not bool(counts[expected == 0].any())
    return scipy.stats.chisquare(counts[expected > 0], expected[expected > 0] * (counts.sum() / expected.sum())).pvalue


class Exact:
    """What a perfect model of data with joint law q predicts, by Bayes' rule over all V^L outcomes."""

    def __init__(self, process, joint):
        self.process, self.joint = process, joint.flatten()
        self.length = joint.dim()
        self.outcomes = enumeration.states(process.size, self.length)

    def marginal(self, tokens, time):
        """p_t(x) for tokens [B, L] at times [B]."""
        return self.likelihood(tokens, self.process.kernel(time)) @ self.joint

    def likelihood(self, tokens, kernel):
        """p_t(x | X_1) for every outcome, [B, V^L], from kernels [B, V, V]."""
        factors = [
            kernel[:, self.outcomes[:, i], :].gather(2, tokens[:, None, i : i + 1].expand(-1, len(self.outcomes), 1))
            for i in range(self.length)
        ]
        return torch.cat(factors, dim=2).prod(dim=2)

    def __call__(self, tokens, time):
        kernel = self.process.kernel(time)
        posterior = self.likelihood(tokens, kernel) * self.joint
        if self.process.predicts == "ratio":
            size = self.process.size
            moved = tokens[:, None, None, :].expand(-1, self.length, size, -1).clone()
            for i in range(self.length):
                moved[:, i, :, i] = torch.arange(size)
            kernels = kernel.repeat_interleave(self.length * size, dim=0)
            there = self.likelihood(moved.flatten(0, 2), kernels) @ self.joint
            return (there.view(-1, self.length, size) / posterior.sum(dim=1)[:, None, None]).log()
        values = torch.nn.functional.one_hot(self.outcomes, self.process.size).double()  # [V^L, L, V]
        return torch.einsum("bn,nlv->blv", posterior / posterior.sum(dim=1, keepdim=True), values).log()


def off(model, scale=0.5, seed=5):
    """A model that is wrong by numbers that depend on state and time."""
    generator = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(SIZE**LENGTH, LENGTH, SIZE, generator=generator, dtype=torch.float64)

    def call(tokens, time):
        return model(tokens, time) + noise[enumeration.index_of(tokens, SIZE)] * (1 + time[:, None, None])

    return call


def joint():
    return random_joint(LENGTH, SIZE, seed=1)


def grid(end=END, steps=24):
    return torch.linspace(0, end, steps + 1, dtype=torch.float64).tolist()


# ---- rates


@pytest.mark.parametrize("process", chains())
def test_a_perfect_model_has_the_marginals_of_the_noised_data(process):
    """The law of the chain with exact rates is p_t at every t."""
    model = Exact(process, joint())
    every = enumeration.states(SIZE, LENGTH)

    def marginal(t):
        return model.marginal(every, torch.full((len(every),), t, dtype=torch.float64))

    times, found = grid(END, steps=300), marginal(0.0)
    for begin, end in ((0, 100), (100, 300)):
        found = enumeration.law(process, model, found, SIZE, LENGTH, times[begin : end + 1])
        # The rates of an interval are those of its middle: an error of the square of its length.
        assert float((found - marginal(times[end])).abs().sum()) < 1e-4


@pytest.mark.parametrize("process", chains())
def test_rates_are_those_of_the_reversal(process):
    """u_t(y, x) = beta_t Q[v, x_i] p_t(y) / p_t(x), from the definition."""
    model, time = Exact(process, joint()), 0.6
    matrix = enumeration.Rates(process, model, SIZE, LENGTH, time).matrix()
    every = enumeration.states(SIZE, LENGTH)
    p = model.marginal(every, torch.full((len(every),), time, dtype=torch.float64))
    speed = float(process.noise_speed(torch.tensor(time, dtype=torch.float64)))
    if isinstance(process, UniformCTMC):
        noise = torch.full((SIZE, SIZE), 1 / SIZE, dtype=torch.float64)
    else:
        steps = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
        near = (steps.abs() == 1) | (process.periodic & (steps.abs() == SIZE - 1))
        noise = near.double()
    for x, state in enumerate(every):
        for y, other in enumerate(every):
            moved = (state != other).nonzero().flatten().tolist()
            if len(moved) == 1:
                i = moved[0]
                expected = speed * noise[other[i], state[i]] * p[y] / p[x]
                assert math.isclose(matrix[x, y], expected, rel_tol=1e-9)
            elif moved:
                assert matrix[x, y] == 0
    assert float(matrix.sum(dim=1).abs().max()) < 1e-9


@pytest.mark.parametrize("process", chains())
def test_escape_rates_stay_below_their_bound(process):
    """For models that predict data, whatever they predict: certain ones, right or wrong, escape fastest."""
    if process.predicts == "ratio":
        pytest.skip("a ratio may be anything")
    every = enumeration.states(SIZE, LENGTH)
    for start, end in ((0.0, 0.2), (0.5, 0.6), (0.9, 0.99)):
        bound = process.escape_bound(start, end, LENGTH)
        for w in range(SIZE):
            certain = torch.full((len(every), LENGTH, SIZE), -1e3, dtype=torch.float64)
            certain[:, :, w] = 0.0
            for time in torch.linspace(start, end, 9, dtype=torch.float64):
                log_rates = process.log_rates(certain, every, time.expand(len(every)))
                assert float(log_rates.exp().sum(dim=(1, 2)).max()) <= bound


def test_bridges_follow_the_noise():
    """X_t given X_1, against the matrix exponential of the generator."""
    for process in (UniformCTMC(4), LatticeCTMC(4, Geometric(1e-5)), LatticeCTMC(4, Geometric(1e-5), periodic=True)):
        time = torch.full((20_000,), 0.8, dtype=torch.float64)
        final = torch.tensor([[0, 2]]).expand(20_000, 2)
        drawn = process.noise(final, time, torch.Generator().manual_seed(1))
        q = process._rates(torch.device("cpu"))
        q = q - torch.diag(q.sum(dim=0))
        kernel = torch.matrix_exp(float(process.noise_left(torch.tensor(0.8, dtype=torch.float64))) * q)
        for i, w in enumerate((0, 2)):
            assert chi_square_p(torch.bincount(drawn[:, i], minlength=4).double(), kernel[w]) > P_VALUE


def test_a_language_models_vocabulary():
    """Uniform noise makes nothing of the size [V, V]."""
    process = UniformCTMC(150_000)
    final = torch.full((2, 5), 149_999)
    state = process.noise(final, torch.tensor([0.5, 1.0]), torch.Generator().manual_seed(1))
    assert bool((state[0] != final[0]).any()) and torch.equal(state[1], final[1])
    log_rates = process.log_rates(torch.zeros(2, 5, 150_000), state, torch.tensor([0.5, 0.9]))
    assert log_rates.shape == (2, 5, 150_000) and math.isclose(process.dependence(), 1e-4, rel_tol=1e-4)


def test_kernels_are_the_generators_exponential():
    """As the library's backward equation has it, whichever of its two ways a lattice's is computed."""
    for process in (
        UniformCTMC(5),
        LatticeCTMC(5, Geometric(1e-5)),
        LatticeCTMC(6, Geometric(math.exp(-200.0)), periodic=True),
    ):
        for time in (0.0, 0.5, 0.99):
            t = torch.tensor(time, dtype=torch.float64)
            eye = torch.eye(process.size, dtype=torch.float64)
            expected = dam.backward_kolmogorov(process.generator, eye, float(process.noise_left(t)))
            # Sums of up to 128 terms that are not negative, and of eigenvectors where all entries are about 1 / V.
            torch.testing.assert_close(process.kernel(t), expected, rtol=1e-11, atol=0)


# ---- simulation


def laws(process, model, start, times):
    """Law of X at the last time from a state at the first, [V^L], by matrix exponentials over short intervals."""
    size = getattr(process, "size", None) or process.mask_token + 1
    current = torch.zeros(size**LENGTH, dtype=torch.float64)
    current[enumeration.index_of(start, size)] = 1.0
    fine = torch.linspace(times[0], times[-1], 301, dtype=torch.float64).tolist()
    for a, b in itertools.pairwise(fine):
        matrix = enumeration.Rates(process, model, size, LENGTH, (a + b) / 2).matrix()
        current = current @ torch.matrix_exp((b - a) * matrix)
    return current


def masked_model(tokens, time):
    """Logits that depend on all tokens and on time."""
    other = tokens.flip(1)[..., None].double()
    values = torch.arange(SIZE + 1, dtype=torch.float64)
    return torch.sin(1 + other * values + time[:, None, None]) + torch.zeros(*tokens.shape, SIZE + 1)


def simulated(*left_out, full=()):
    every = [*chains(), pytest.param(MaskedCTMC(SIZE, Linear()), id="masked")]
    return [
        pytest.param(*chain.values, id=chain.id, marks=[pytest.mark.full] * (chain.id in full))
        for chain in every
        if chain.id not in left_out
    ]


def start_and_models(process, scale=0.5):
    if isinstance(process, MaskedCTMC):
        return torch.tensor([SIZE, SIZE]), masked_model, lambda x, t: 0.5 * masked_model(x, 1 - t)
    exact = Exact(process, joint())
    return torch.tensor([0, 2]), off(exact, scale), exact


def bound_of(process):
    return 4.0 if getattr(process, "predicts", "data") == "ratio" else 1.0


@pytest.mark.parametrize("process", simulated(full=("lattice-ratio", "cycle")))
def test_simulated_trajectories_have_the_law_of_the_chain(process):
    """Of a model that is wrong, so that nothing helps it; against products of matrix exponentials."""
    start, model, _ = start_and_models(process)
    size = getattr(process, "size", SIZE + 1)
    times = grid(steps=12)
    path = simulate(process, model, start.expand(4000, -1), times=times, bound=bound_of(process), seed=3)
    counts = torch.bincount(enumeration.index_of(path.final, size), minlength=size**LENGTH)
    expected = laws(process, model, start, times)
    expected[expected < 1e-12] = 0.0
    assert chi_square_p(counts.double(), expected) > P_VALUE


@pytest.mark.parametrize("process", simulated("lattice-ratio", "cycle", full=("uniform",)))  # those left out take long
def test_path_weights_turn_the_models_law_into_the_bases(process):
    """Their mean is 1, and weighted counts are the base's law; without the escape gap neither holds."""
    start, model, base = start_and_models(process)
    size = getattr(process, "size", SIZE + 1)
    times, count = grid(0.7, steps=8), 4000
    options = {"times": times, "base": base, "bound": 1.5 * bound_of(process), "seed": 4}
    path = simulate(process, model, start.expand(count, -1), **options)
    weight = (path.log_ratio + path.escape_gap).sum(dim=1).exp()
    assert abs(float(weight.mean()) - 1) < Z * float(weight.std()) / count**0.5
    expected = laws(process, base, start, times)
    index = enumeration.index_of(path.final, size)
    for x in range(size**LENGTH):
        share = weight * (index == x)
        assert abs(float(share.mean()) - float(expected[x])) < Z * float(share.std()) / count**0.5 + 1e-6
    if not isinstance(process, MaskedCTMC):
        careless = path.log_ratio.sum(dim=1).exp()
        assert abs(float(careless.mean()) - 1) > Z * float(careless.std()) / count**0.5


@pytest.mark.parametrize("process", simulated())
def test_leaps_have_the_law_of_their_own_chain(process):
    """Enumerated interval by interval: coordinates by themselves, each with exp of its own generator's one jump."""
    start, model, base = start_and_models(process, scale=0.2)  # weights of many leaps spread
    size = getattr(process, "size", SIZE + 1)
    times, count = grid(0.7, steps=5), 6000
    every = enumeration.states(size, LENGTH)

    def law_of(model):
        current = torch.zeros(len(every), dtype=torch.float64)
        current[enumeration.index_of(start, size)] = 1.0
        for a, b in itertools.pairwise(times):
            rates = process.log_rates(
                model(every, torch.full((len(every),), a).double()), every, torch.full((len(every),), a)
            ).exp()
            escape = rates.sum(dim=2, keepdim=True)
            move = torch.where(escape > 0, rates / escape, 0.0) * -torch.expm1(-(b - a) * escape)
            stay = torch.nn.functional.one_hot(every, size) * torch.exp(-(b - a) * escape)
            each = move + stay  # [V^L, L, V]
            transition = each[:, 0, every[:, 0]] * each[:, 1, every[:, 1]]
            current = current @ transition
        return current

    path = tau_leap(process, model, start.expand(count, -1), times=times, base=base, seed=5)
    counts = torch.bincount(enumeration.index_of(path.final, size), minlength=len(every))
    expected = law_of(model)
    expected[expected < 1e-12] = 0.0
    assert chi_square_p(counts.double(), expected) > P_VALUE
    weight = (path.log_ratio + path.escape_gap).sum(dim=1).exp()
    assert abs(float(weight.mean()) - 1) < Z * float(weight.std()) / count**0.5
    base_law, index = law_of(base), enumeration.index_of(path.final, size)
    for x in range(len(every)):
        share = weight * (index == x)
        assert abs(float(share.mean()) - float(base_law[x])) < Z * float(share.std()) / count**0.5 + 1e-6
    assert path.network_calls == 5 * count


def test_short_leaps_tend_to_the_chain():
    process = UniformCTMC(SIZE, Geometric(1e-3))
    start, model, _ = start_and_models(process)
    expected = laws(process, model, start, grid(0.7))

    def distance(steps):
        path = tau_leap(process, model, start.expand(8000, -1), times=grid(0.7, steps), seed=6)
        counts = torch.bincount(enumeration.index_of(path.final, SIZE), minlength=SIZE**LENGTH)
        return float((counts / counts.sum() - expected).abs().sum())

    # 8000 draws over 9 states have a distance of 0.025 of themselves.
    assert distance(1) > 0.1 and distance(40) < 0.06


def test_value_is_the_discrete_adjoint():
    """E[exp(-g(X_1)) | X_t = x] by the backward equation, against the forward law from each state."""
    process = UniformCTMC(SIZE, Geometric(1e-3))
    model, times = Exact(process, joint()), grid(END, steps=30)
    terminal = torch.linspace(0.1, 2.0, SIZE**LENGTH, dtype=torch.float64)
    value = enumeration.value(process, model, terminal, SIZE, LENGTH, times)
    for x in range(SIZE**LENGTH):
        start = torch.zeros(SIZE**LENGTH, dtype=torch.float64)
        start[x] = 1.0
        forward = enumeration.law(process, model, start, SIZE, LENGTH, times)
        # Adjoint of each other up to the series' tolerance.
        assert math.isclose(float(forward @ terminal), float(value[x]), rel_tol=1e-11)


# ---- what a user sees when wrong


def test_dependence_is_measured_and_refused():
    assert math.isclose(UniformCTMC(4, Geometric(1e-3)).dependence(), 0.75e-3, rel_tol=1e-9)
    with pytest.warns(UserWarning, match=r"X_0 and X_1 are dependent, by a total variation of 0\.0075"):
        UniformCTMC(4, Geometric(0.01))
    with pytest.raises(ValueError, match=r"dependent, by a total variation of 0\.15 .*needs independence"):
        UniformCTMC(4, Geometric(0.2))
    with pytest.raises(ValueError, match="dependent"):  # 91 points need longer to forget
        LatticeCTMC(91, Geometric(1e-4))
    with pytest.raises(ValueError, match=r"alpha\(0\) must be in \(0, 1\)"):
        UniformCTMC(4, Linear())
    with pytest.raises(ValueError, match="start with nothing unmasked"):
        MaskedCTMC(4, Geometric())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rates_are_named_with_state_and_time(bad):
    process = UniformCTMC(SIZE, Geometric(1e-3), predicts="ratio")

    def model(tokens, time):
        out = torch.zeros(*tokens.shape, SIZE)
        out[(tokens == torch.tensor([0, 2])).all(dim=1), 1, 1] = bad
        return out

    tokens = torch.tensor([[1, 1], [0, 2]])
    message = rf"coordinate 1 to 1 is {bad} at state \[0, 2\] and time 0"
    for run in (simulate, tau_leap):
        with pytest.raises(ValueError, match=message):
            run(process, model, tokens, times=[0.0, 0.001] if run is tau_leap else [0.0, 0.5], seed=1)


class OfAUser:
    """Two states, each left at a rate that the model's logits say, in the dtype that `dtype` names."""

    def __init__(self, dtype):
        self.dtype = dtype

    def log_rates(self, prediction, tokens, time):
        rates = prediction.to(torch.float16).to(self.dtype)  # the same numbers in every dtype
        return rates.masked_fill(torch.nn.functional.one_hot(tokens, 2).bool(), -math.inf)

    def escape_bound(self, start, end, length):
        return 4.0 * length


@pytest.mark.parametrize("run", [simulate, tau_leap])
def test_a_process_of_ones_own_in_any_dtype(run):
    """Its rates are taken into float64 before anything is computed of them: the same paths, bit for bit."""
    tokens = torch.zeros(200, 2, dtype=torch.int64)
    model = lambda x, t: torch.sin(1.0 + x.flip(1)[..., None] + torch.arange(2.0))  # noqa: E731
    paths = [
        run(OfAUser(dtype), model, tokens, times=[0.0, 0.4, 0.8], base=lambda x, t: -model(x, t), seed=2)
        for dtype in (torch.float64, torch.float32, torch.float16)
    ]
    assert paths[0].log_ratio.dtype == torch.float64 and bool((paths[0].log_ratio != 0).any())
    for path in paths[1:]:
        for field in dataclasses.fields(path):
            a, b = getattr(path, field.name), getattr(paths[0], field.name)
            assert a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


@pytest.mark.parametrize("run", [simulate, tau_leap])
@pytest.mark.parametrize("cut", [(slice(None), 0), (slice(None), slice(1))])
def test_rates_of_another_shape_are_refused(run, cut):
    process = OfAUser(torch.float32)
    process.log_rates = lambda prediction, x, t: prediction[cut]
    with pytest.raises(ValueError, match=r"log_rates of OfAUser must give \[\d+, 2, 'V'\]; got \[\d+, (1, )?2\]"):
        run(process, lambda x, t: torch.zeros(*x.shape, 2), torch.zeros(9, 2).long(), times=[0.0, 0.4], seed=2)


def test_rates_above_the_bound_are_an_error():
    process = UniformCTMC(SIZE, Geometric(1e-3), predicts="ratio")
    high = lambda tokens, time: torch.full((*tokens.shape, SIZE), 9.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"the model's escape rate .* passes the bound .* at state \[0, 1\] and time"):
        simulate(process, high, torch.tensor([[0, 1]]), times=[0.0, 0.5], seed=1)
    for times in ([0.5], [0.5, 0.5], [0.5, 0.1]):
        with pytest.raises(ValueError, match="times must increase"):
            simulate(process, high, torch.tensor([[0, 1]]), times=times, seed=1)
    for infinite in (process, LatticeCTMC(SIZE, Geometric(1e-4))):
        with pytest.raises(ValueError, match="end before rates are infinite"):
            simulate(infinite, high, torch.tensor([[0, 1]]), times=[0.5, 1.0], seed=1)
    with pytest.raises(ValueError, match=r"tokens must be int64 \[B, L\]; got torch.int32 \[1, 2\]"):
        tau_leap(process, high, torch.tensor([[0, 1]], dtype=torch.int32), times=[0.5, 0.6], seed=1)
    for of in (enumeration.law, enumeration.value):
        with pytest.raises(ValueError, match="times must increase"):
            of(process, high, torch.ones(9) / 9, SIZE, LENGTH, [0.9, 0.5])


def test_a_base_without_a_rate_forbids_the_path():
    """Weight 0, not NaN, in both simulators."""
    process = UniformCTMC(SIZE, Geometric(1e-3), predicts="ratio")

    def model(tokens, time):
        return torch.zeros(*tokens.shape, SIZE)

    def base(tokens, time):
        return torch.full((*tokens.shape, SIZE), -math.inf)

    for run in (simulate, tau_leap):
        path = run(process, model, torch.zeros(50, 2, dtype=torch.int64), times=[0.0, 0.3], base=base, seed=1)
        jumped = (path.position >= 0).any(dim=1)
        assert bool(jumped.any()) and bool((path.log_ratio.sum(dim=1)[jumped] == -math.inf).all())
        assert bool((path.log_ratio[~jumped] == 0).all())


def test_a_seed_fixes_a_run_and_nothing_else_is_touched():
    """Nor is a graph of the model's calls kept, and schedules by autograd serve under inference mode too."""
    process = UniformCTMC(SIZE, UserSchedule(lambda t: 1e-4 ** (1 - t)))
    scale = torch.nn.Parameter(torch.ones(()))

    def model(tokens, time):
        return scale * torch.sin(tokens[..., None] + torch.arange(SIZE))

    tokens = torch.tensor([[0, 1], [2, 2]])
    options = {"times": [0.0, 0.5, 0.9], "base": model, "seed": 2**64 - 5}
    for run in (simulate, tau_leap):
        with torch.inference_mode():
            first = run(process, model, tokens, **options)
        second = run(process, model, tokens, **options)
        assert torch.equal(first.final, second.final) and torch.equal(first.time, second.time)
        assert not second.log_ratio.requires_grad and tokens.tolist() == [[0, 1], [2, 2]]
        other = run(process, model, tokens.repeat(40, 1), **(options | {"seed": 6}))
        assert not torch.equal(other.final[:2], other.final[2:4])
        with pytest.raises(ValueError, match="seed must fit in 64 bits"):
            run(process, model, tokens, **(options | {"seed": 2**64}))


@pytest.mark.parametrize("run", [simulate, tau_leap])
def test_a_trajectory_depends_on_its_row_id_only(run):
    """Not on the others of its batch, which may have more events."""
    process = UniformCTMC(SIZE, Geometric(1e-3))
    model = Exact(process, random_joint(LENGTH, SIZE, seed=0))
    base = Exact(process, random_joint(LENGTH, SIZE, seed=1))
    tokens = process.initial((50, LENGTH), torch.Generator().manual_seed(0))
    options = {"times": [0.0, 0.5, 0.8, END], "base": base, "seed": 3}
    whole = run(process, model, tokens, **options)
    ids = torch.tensor([31, 4])
    part = run(process, model, tokens[ids], row_ids=ids, **options)
    events = part.time.shape[1]
    for name in ("final", "time", "position", "token", "log_ratio", "escape_gap"):
        kept = getattr(whole, name)[ids]
        # Sums over the states of a batch of another size may round otherwise.
        torch.testing.assert_close(
            getattr(part, name), kept if name == "final" else kept[:, :events], rtol=1e-9, atol=1e-12
        )
    assert (
        len(run(process, model, tokens[:1].expand(9, -1), row_ids=torch.full((9,), 5), **options).final.unique(dim=0))
        == 1
    )
    with pytest.raises(ValueError, match="row_ids must have shape"):
        run(process, model, tokens, row_ids=ids, **options)


def test_arrivals_are_those_of_a_poisson_process():
    """Numbers by Poisson's law, times uniform; and as many as it takes, also where the first guess is too few."""
    rows = torch.arange(20_000)
    times = _arrivals(3.0, 0.5, 1.5, 4, rows, 0)
    counts = torch.bincount((times < 1.5).sum(dim=1), minlength=20).double()
    probability = torch.tensor(scipy.stats.poisson(3.0).pmf(range(20)))
    assert (
        chi_square_p(
            torch.cat((counts[:10], counts[10:].sum()[None])),
            torch.cat((probability[:10], 1 - probability[:10].sum()[None])),
        )
        > P_VALUE
    )
    assert scipy.stats.kstest(times[times < 1.5].numpy() - 0.5, "uniform").pvalue > P_VALUE
    assert bool((times[:, -1] >= 1.5).all())
    assert bool((_arrivals(0.0, 0.5, 1.5, 4, rows[:2], 0) == torch.inf).all())
