"""Chains of listed moves: listings, laws and weights against the matrix exponential, and what is matched."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import dam
from dam.ctmc import (
    Geometric,
    Moves,
    MovesCTMC,
    UniformCTMC,
    enumeration,
    gillespie,
    matching,
    moves,
    simulate,
    tau_leap,
)

# A false alarm of one test: |z| above it has probability 6e-7.
Z, P_VALUE = 5.0, 1e-6
SITES, PARTICLES = 3, 3
TIMES = [0.0, 0.4, 0.7, 0.9, 1.0]


def chain(**options):
    return MovesCTMC(moves.hop(1.0), **options)


def space_of(process=None, size=PARTICLES + 1):
    return enumeration.MoveSpace(process or chain(), torch.tensor([[PARTICLES, 0, 0]]), size)


class Table:
    """Numbers for each state and slot, times 1 + t."""

    def __init__(self, space, scale=0.3, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.space = space
        self.values = scale * torch.randn(space.to.shape, generator=generator, dtype=torch.float64)

    def __call__(self, states, time, listed):
        return self.values[self.space.index_of(states)] * (1 + time[:, None])


class Constant:
    """The same number for every move."""

    def __init__(self, value):
        self.value = value

    def __call__(self, states, time, listed):
        return torch.full_like(listed.rate, self.value)


def started(space, count):
    return torch.tensor([[PARTICLES, 0, 0]]).expand(count, -1)


def point(space):
    law = torch.zeros(len(space.states), dtype=torch.float64)
    law[space.index_of(torch.tensor([PARTICLES, 0, 0]))] = 1.0
    return law


def exponential_law(space, model, initial, times):
    """By scipy's matrix exponential of a generator that is summed up move by move."""
    law = initial.numpy()
    for start, end in itertools.pairwise(times):
        generator = torch.zeros(len(space.states), len(space.states), dtype=torch.float64)
        time = torch.full((len(space.states),), (start + end) / 2, dtype=torch.float64)
        log_multiplier = model(space.states, time, None)
        for x, state in enumerate(space.states.tolist()):
            for slot, (i, j) in enumerate(itertools.permutations(range(SITES), 2)):
                if state[i]:
                    there = list(state)
                    there[i], there[j] = there[i] - 1, there[j] + 1
                    y = int(space.index_of(torch.tensor(there)))
                    generator[x, y] += state[i] * math.exp(log_multiplier[x, slot])
        generator -= torch.diag(generator.sum(dim=1))
        law = law @ scipy.linalg.expm(generator.numpy() * (end - start))
    return torch.from_numpy(law)


def chi_square_p(index, law):
    counts = torch.bincount(index, minlength=len(law)).double()
    expected = law * (len(index) / law.sum())
    return scipy.stats.chisquare(counts, expected).pvalue


def z_scores(samples, expected):
    return (samples.mean(dim=0) - expected) / (samples.std(dim=0) / math.sqrt(len(samples)))


# ---- listings


def test_swaps_are_all_exchanges_of_sites_that_differ():
    tokens = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2]])
    neighbours, rate = moves.swap(0.5)(tokens)
    for row, state in enumerate(tokens.tolist()):
        for slot, (i, k) in enumerate(itertools.combinations(range(4), 2)):
            there = list(state)
            there[i], there[k] = there[k], there[i]
            assert neighbours[row, slot].tolist() == there
            assert rate[row, slot] == (0.5 if state[i] != state[k] else 0.0)
    some = moves.swap(1.0, pairs=[(0, 3)])(tokens)
    assert some.neighbours.tolist() == [[[2, 1, 1, 0]], [[2, 2, 2, 2]]]


def test_relabellings_are_all_other_tokens_of_a_site():
    neighbours, rate = moves.relabel(3, 2.0)(torch.tensor([[0, 2]]))
    assert neighbours[0].tolist() == [[0, 2], [1, 2], [2, 2], [0, 0], [0, 1], [0, 2]]
    assert rate[0].tolist() == [0, 2, 2, 2, 2, 0]


def test_hops_leave_in_proportion_to_the_particles():
    neighbours, rate = moves.hop(0.5, pairs=[(0, 1), (1, 0)])(torch.tensor([[3, 0]]))
    assert neighbours[0].tolist() == [[2, 1], [3, 0]] and rate[0].tolist() == [1.5, 0.0]


def test_joined_listings_and_the_states_that_they_lead_to():
    """Swaps alone keep the composition; with relabellings every state is reached."""
    start = torch.tensor([[0, 0, 1]])
    assert len(enumeration.MoveSpace(MovesCTMC(moves.swap()), start, 2).states) == 3
    # A swap of neighbours that differ is no single relabelling, so that no neighbour is listed twice.
    both = MovesCTMC(moves.joined(moves.swap(), moves.relabel(2)))
    space = enumeration.MoveSpace(both, start, 2)
    assert torch.equal(space.states, enumeration.states(2, 3)) and space.to.shape == (8, 3 + 6)


def listing(neighbours, rate):
    return MovesCTMC(lambda tokens: Moves(torch.tensor([neighbours]), torch.tensor([rate])))


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (listing([[1, 0], [1, 0]], [1.0, 2.0]), r"moves 0 and 1 out of state \[0, 1\] both lead to \[1, 0\]"),
        (listing([[0, 1], [1, 0]], [1.0, 2.0]), r"move 0 out of state \[0, 1\].*leads to the state itself"),
        (listing([[1, 0], [1, 1]], [1.0, math.nan]), r"move 1 out of state \[0, 1\].*not finite"),
        (listing([[1, 0], [1, 1]], [1.0, -1.0]), "at rate -1, has a rate that is negative"),
        (listing([[1, 0], [1, 1]], [1.0, math.inf]), "not finite"),
        (MovesCTMC(lambda x: Moves(x[:, None][:, :0], torch.zeros(len(x), 0))), "no moves at all"),
        (MovesCTMC(lambda x: Moves(x, torch.zeros(len(x), 1))), r"neighbours int64 \[1, M, 2\]"),
        (MovesCTMC(lambda x: Moves(x[:, None], torch.zeros(len(x), 2))), r"for each neighbour, \[1, 1\]"),
    ],
)
def test_listings_that_cannot_be_right_are_refused(process, message):
    with pytest.raises(ValueError, match=message):
        process.moves(torch.tensor([[0, 1]]))


def test_slots_without_a_move_may_repeat_anything():
    process = listing([[0, 1], [1, 0], [1, 0], [0, 1]], [0.0, 1.0, 0.0, 0.0])
    assert process.moves(torch.tensor([[0, 1]])).rate.tolist() == [[0, 1, 0, 0]]


def test_arguments_that_cannot_be_right_are_refused():
    process, tokens = chain(), torch.tensor([[3, 0, 0]])
    for call, message in (
        (lambda: MovesCTMC(None), "must be a function"),
        (lambda: chain(predicts="data"), "multiplier, rate"),
        (lambda: chain(largest_escape=0.0), "positive and finite"),
        (lambda: moves.hop(-1.0), "hop: rate must be positive"),
        (lambda: moves.swap(1.0, pairs=[(0, 3)])(tokens), r"sites 0 \.\. 2"),
        (lambda: moves.swap(1.0, pairs=[0, 1])(tokens), r"int64 \[P, 2\]"),
        (lambda: moves.hop()(tokens - 1), "must not be negative"),
        (lambda: moves.relabel(3)(tokens), r"relabel: tokens must be in 0 \.\. 2; got 0 to 3"),
        (lambda: moves.swap()(tokens[:, :1]), "two sites or more"),
        (lambda: simulate(process, process.base, tokens, times=[0, 1], seed=0), "largest_escape, or use gillespie"),
        (lambda: tau_leap(process, process.base, tokens, times=[0, 1], seed=0), "use gillespie or simulate"),
        (lambda: gillespie(process, lambda x, t, m: x, tokens, times=[0, 1], seed=0), r"for each slot, \[1, 6\]"),
        (
            lambda: gillespie(process, lambda x, t, m: m.rate / 0, tokens, times=[0, 1], seed=0),
            r"the rate of move 0, to \[2, 1, 0\], is inf at state \[3, 0, 0\] and time 0.5",
        ),
        # Finite logarithms whose events would never reach the end of an interval: one of them overflows, one does not.
        (lambda: gillespie(process, Constant(800.0), tokens, times=[0, 1], seed=0), r"rate is inf at .*3, 0, 0\]"),
        (lambda: gillespie(process, Constant(40.0), tokens, times=[0, 1], seed=0), r"1.41231e\+18 .* has diverged"),
        (
            lambda: gillespie(process, process.base, tokens, times=[0, 1], first=torch.tensor([1]), seed=0),
            r"intervals 0 \.\. 0; got \[1\]",
        ),
        (
            lambda: gillespie(process, process.base, tokens, times=[0, 1], most_events=2**24, seed=0),
            r"most_events must be in 1 \.\. 16777215; got 16777216",
        ),
        (lambda: enumeration.MoveSpace(process, tokens, 3), r"tokens must be in 0 \.\. 2"),
        (lambda: enumeration.MoveSpace(process, tokens, 4, most=5), "more than 5 states"),
        (lambda: space_of().index_of(torch.tensor([1, 0, 0])), "no moves lead to"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- laws and weights


def test_the_forward_equation_is_the_matrix_exponential():
    space = space_of()
    assert len(space.states) == 10
    model = Table(space)
    found = space.law(model, point(space), TIMES)
    torch.testing.assert_close(found, exponential_law(space, model, point(space), TIMES), rtol=0, atol=1e-12)
    # The backward equation is its adjoint.
    terminal = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = space.value(model, terminal, TIMES)
    assert math.isclose(float(value @ point(space)), float(terminal @ found), rel_tol=1e-12)


def most_first(tokens):
    """Hops with those that a state has in front, as many slots as the batch needs."""
    neighbours, rate = moves.hop(1.0)(tokens)
    order = (rate == 0).int().argsort(dim=1, stable=True)[:, : int((rate > 0).sum(dim=1).max())]
    return Moves(neighbours.gather(1, order[..., None].expand(-1, -1, SITES)), rate.gather(1, order))


def test_slots_that_only_some_batches_have(monkeypatch):
    """The laws are those of the listing with all slots, for a model that knows moves by where they lead."""
    monkeypatch.setattr(enumeration, "_CHUNK", 4)
    whole, some = space_of(), space_of(MovesCTMC(most_first))
    assert [most_first(part).rate.shape[1] for part in some.states.split(4)] == [4, 6, 4]
    assert some.to.shape == whole.to.shape == (10, 6)

    def model(states, time, listed):
        return 0.3 * (listed.neighbours * torch.tensor([1, -1, 2])).sum(dim=2) * time[:, None]

    # float64, sums in another order
    laws = [space.law(model, point(space), TIMES) for space in (whole, some)]
    torch.testing.assert_close(*laws, rtol=0, atol=1e-13)
    terminal = torch.linspace(0, 1, 10, dtype=torch.float64)
    values = [space.value(model, terminal, TIMES) for space in (whole, some)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-13)


def test_slots_that_depend_on_the_other_states_of_a_batch_are_refused():
    def needed(tokens):
        neighbours, rate = moves.hop(1.0)(tokens)
        used = (rate > 0).any(dim=0)
        return Moves(neighbours[:, used], rate[:, used])

    with pytest.raises(ValueError, match=r"state \[0, 0, 3\] in other slots when it is listed alone"):
        space_of(MovesCTMC(needed))

    def turned(tokens):  # of all but the state with the fewest moves, where they are listed with it
        neighbours, rate = moves.hop(1.0)(tokens)
        most = (rate > 0).sum(dim=1) > 2
        if len(tokens) > 1:
            neighbours, rate = (
                torch.where(most.view(-1, *[1] * (x.dim() - 1)), x.flip(1), x) for x in (neighbours, rate)
            )
        return Moves(neighbours, rate)

    with pytest.raises(ValueError, match="in other slots when it is listed alone"):
        space_of(MovesCTMC(turned))


@pytest.mark.parametrize("listing", [moves.hop(1.0), most_first])
def test_numbers_of_states_are_the_same_chain(listing):
    process = MovesCTMC(listing)
    space = space_of(process)
    numbered = space.numbered()
    assert numbered.states.tolist() == [[x] for x in range(10)]
    with pytest.raises(ValueError, match=r"in 0 \.\. 9; got -1"):  # and not the last state
        numbered.process.moves(torch.tensor([[-1]]))

    def model(states, time, listed):
        return 0.3 * (listed.neighbours * torch.tensor([1, -1, 2])).sum(dim=2) * time[:, None]

    def of_numbers(number, time, listed):
        return model(None, time, listed._replace(neighbours=space.states[listed.neighbours[..., 0]]))

    assert torch.equal(numbered.law(of_numbers, point(space), TIMES), space.law(model, point(space), TIMES))
    path = gillespie(process, model, started(space, 200), times=TIMES, base=process.base, seed=3)
    start = space.index_of(started(space, 200))[:, None]
    other = gillespie(numbered.process, of_numbers, start, times=TIMES, base=numbered.process.base, seed=3)
    used = path.exposure > 0
    assert torch.equal(other.state[used][:, 0], space.index_of(path.state[used]))
    assert torch.equal(other.position, path.position)
    # The listing that has fewer slots in some batches sums rates in another order there.
    for name in ("exposure", "log_ratio", "escape_gap"):
        torch.testing.assert_close(getattr(other, name), getattr(path, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", moves.PREDICTS)
def test_gillespie_has_its_law_and_weights_lead_to_the_bases(predicts):
    process = chain(predicts=predicts)
    space = space_of(process)
    table = Table(space)

    def model(states, time, listed):
        return table(states, time, listed) + process.base(states, time, listed)

    path = gillespie(process, model, started(space, 10_000), times=TIMES, base=process.base, seed=1)
    index = space.index_of(path.final)
    assert chi_square_p(index, exponential_law(space, table, point(space), TIMES)) > P_VALUE
    weight = (path.log_ratio + path.escape_gap).sum(dim=1).exp()
    base = space.law(process.base, point(space), [0.0, 1.0])
    outcome = torch.nn.functional.one_hot(index, 10).double()
    assert abs(float(z_scores(weight[:, None], 1.0))) < Z
    assert float(z_scores(weight[:, None] * outcome, base).abs().max()) < Z
    # All of the time is somewhere, and each event says from where a move was made.
    torch.testing.assert_close(path.exposure.sum(dim=1), torch.ones(10_000, dtype=torch.float64), rtol=0, atol=1e-12)
    row, event = (path.position >= 0).nonzero(as_tuple=True)
    after = path.state[row, (event + 1).clamp(max=path.state.shape[1] - 1)]  # the end of the time is an event too
    listed = process.moves(path.state[row, event])
    assert torch.equal(listed.neighbours[torch.arange(len(row)), path.position[row, event]], after)


def test_thinned_trajectories_have_the_law_of_rates_that_change_with_time():
    process = chain(largest_escape=20.0)
    space = space_of(process)
    model = Table(space)
    path = simulate(process, model, started(space, 4000), times=[0.0, 1.0], base=process.base, seed=2)
    fine = [k / 40 for k in range(41)]  # an error of second order, far below what 4000 samples can tell
    index = space.index_of(path.final)
    assert chi_square_p(index, space.law(model, point(space), fine)) > P_VALUE
    weight = (path.log_ratio + path.escape_gap).sum(dim=1).exp()
    outcome = torch.nn.functional.one_hot(index, 10).double()
    base = space.law(process.base, point(space), [0.0, 1.0])
    assert float(z_scores(weight[:, None] * outcome, base).abs().max()) < Z
    assert abs(float(z_scores(path.exposure.sum(dim=1)[:, None], 1.0))) < Z
    assert path.state.shape == (*path.time.shape, SITES)


def test_gillespie_of_coordinates_has_the_law_of_the_forward_equation():
    process = UniformCTMC(3, Geometric(1e-3))
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(9, 2, 3, generator=generator, dtype=torch.float64)
    times = [0.0, 0.5, 0.9]

    def model(tokens, time):
        return table[enumeration.index_of(tokens, 3)]

    initial = torch.zeros(9, dtype=torch.float64)
    initial[0] = 1.0
    path = gillespie(process, model, torch.zeros(10_000, 2, dtype=torch.int64), times=times, seed=5)
    assert path.state is None
    law = enumeration.law(process, model, initial, 3, 2, times)
    assert chi_square_p(enumeration.index_of(path.final, 3), law) > P_VALUE


def test_a_trajectory_depends_on_its_row_id_and_not_on_the_batch():
    space = space_of()
    model = Table(space)
    whole = gillespie(chain(), model, started(space, 64), times=TIMES, base=chain().base, seed=3)
    chosen = torch.tensor([40, 7, 63])
    part = gillespie(chain(), model, started(space, 3), times=TIMES, base=chain().base, seed=3, row_ids=chosen)
    events = part.time.shape[1]
    for name in ("position", "state", "exposure", "log_ratio", "escape_gap"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[chosen, :events]), name
    assert not torch.equal(whole.final[:32], whole.final[32:])


def test_trajectories_of_more_events_than_allowed_are_refused():
    """The most that one has are allowed; rates that run away, here by e^8, are an error that names where."""
    space = space_of()
    options = {"times": TIMES, "seed": 3}
    path = gillespie(chain(), Table(space), started(space, 64), **options)
    events = path.time.shape[1]
    again = gillespie(chain(), Table(space), started(space, 64), most_events=events, **options)
    assert torch.equal(again.final, path.final)
    for model, most in ((Table(space), events - 1), (Constant(8.0), 100)):
        with pytest.raises(
            ValueError, match=rf"has had {most} events and is at time 0\.\d+ of 1, in state .* diverged"
        ):
            gillespie(chain(), model, started(space, 64), most_events=most, **options)


def test_trajectories_that_start_later():
    """From the third interval on, the law is that of the times from there."""
    space = space_of()
    model = Table(space)
    first = torch.full((10_000,), 2)
    path = gillespie(chain(), model, started(space, 10_000), times=TIMES, first=first, seed=6)
    law = exponential_law(space, model, point(space), TIMES[2:])
    assert chi_square_p(space.index_of(path.final), law) > P_VALUE


def test_weights_at_the_optimum_become_constant():
    """Their spread is what constant rates in an interval leave: of second order in its length, so to a quarter each."""
    process, space = chain(), space_of()
    cost = torch.linspace(0, 2, 10, dtype=torch.float64)
    spread = []
    for count in (8, 32):
        times = [k / count for k in range(count + 1)]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(times)]
        values = torch.stack([space.value(process.base, (-cost).exp(), [t, 1.0]) for t in middles])

        def optimum(states, time, listed, values=values, count=count):
            value = values[(time * count).long()]
            there = value.gather(1, space.to[space.index_of(states)])
            return (there / value.gather(1, space.index_of(states)[:, None])).log()

        path = gillespie(process, optimum, started(space, 2000), times=times, base=process.base, seed=7)
        total = (path.log_ratio + path.escape_gap).sum(dim=1) - cost[space.index_of(path.final)]
        spread.append(float(total.std()))
    assert spread[0] < 0.2 and spread[1] < 0.4 * spread[0]


# ---- matching


def test_the_expected_gradient_is_that_of_the_cross_entropy_of_paths():
    """With and without a baseline, at a model that is not the one that drew: sum of p*_t (Lambda_v - sum u* log v)."""
    process, space = chain(), space_of()
    model, times = Table(space), [0.0, 1.0]
    cost = torch.linspace(0, 1, 10, dtype=torch.float64)
    # Mild weights, so that sums of 100 gradients are close to normal.
    drew = Table(space, scale=0.2, seed=9)
    start = point(space)
    # Truth: integrals over time by Gauss-Legendre; p*_t(x) ~ p_base,t(x) value_t(x), u* = r value(y) / value(x).
    nodes, shares = np.polynomial.legendre.leggauss(12)
    expected = torch.zeros(10, 6, dtype=torch.float64)
    half = torch.full((10,), 0.5, dtype=torch.float64)  # of `times` the middle, at which rates are taken
    rate = space.base_rate * model(space.states, half, None).exp()
    for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        value = space.value(process.base, (-cost).exp(), [node, 1.0])
        law = space.law(process.base, start, [0.0, node]) * value
        law = law / law.sum()
        optimal = space.base_rate * value[space.to] / value[:, None]
        expected += share * law[:, None] * (rate - optimal) * 1.5  # d log v / d table = 1 + t
    path = gillespie(process, drew, started(space, 10_000), times=times, base=process.base, seed=8)
    log_weight = (path.log_ratio + path.escape_gap).sum(dim=1) - cost[space.index_of(path.final)]
    normalizer = math.log(float(start @ space.value(process.base, (-cost).exp(), [0.0, 1.0])))
    weight = (log_weight - normalizer).exp()
    # Batches of trajectories make samples of the gradient.
    tensors = {name: value for name, value in vars(path).items() if isinstance(value, torch.Tensor)}
    reached = space.base_rate > 0
    for baseline in (0.0, 1.0):
        samples = []
        for part in torch.arange(10_000).split(100):
            some = type(path)(**{name: value[part] for name, value in tensors.items()}, network_calls=0)
            model.values = model.values.detach().requires_grad_()
            targets = matching.path_targets(some, weight[part])
            teacher = drew if baseline else None
            matching.loss(process, model, targets, baseline=baseline, teacher=teacher).backward()
            samples.append(model.values.grad[reached])
        # Student's t of 100 samples is beyond 6.2 with probability 1e-8. Rounding in float32 is far below the noise.
        assert float(z_scores(torch.stack(samples), expected[reached]).abs().max()) < 6.2


def test_a_table_comes_to_the_optimum():
    """From weights less 1, and costs that are told for what was drawn only; exact law of what is simulated."""
    process, space = chain(check=False), space_of()
    cost = torch.linspace(0, 2, 10, dtype=torch.float64)
    optimum = space.law(process.base, point(space), [0.0, 1.0]) * (-cost).exp()
    optimum = optimum / optimum.sum()
    times = [0.0, 0.4, 0.7, 0.9, 1.0]
    edges = torch.tensor(times, dtype=torch.float64)
    values = torch.zeros(4, *space.to.shape, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.3, betas=(0.9, 0.99))

    def model(states, time, listed):
        return values[torch.searchsorted(edges, time) - 1, space.index_of(states)]

    def distance():
        return float((space.law(model, point(space), times) - optimum).abs().sum() / 2)

    before = distance()
    for n in range(15):
        path = gillespie(process, model, started(space, 400), times=times, base=process.base, seed=n)
        gain = (path.log_ratio + path.escape_gap)[None]
        weights = dam.adjoint_weights(gain, cost[space.index_of(path.final)][None])
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - n / 15)
        optimizer.zero_grad()
        matching.loss(process, model, matching.path_targets(path, weights.weight), baseline=1.0).backward()
        optimizer.step()
    # 6000 draws of p* itself are as far from it as 0.014, and rates that are constant in four intervals 0.01.
    assert before > 0.2 and distance() < 0.04


def test_log_ratio_of_trajectories_by_another_model():
    """By the model that drew it is what they recorded; p_v / p_u has mean 1 over the trajectories of u."""
    space = space_of()
    drew, other = Table(space, scale=0.2), Table(space, scale=0.2, seed=4)
    path = gillespie(chain(), drew, started(space, 4000), times=TIMES, base=chain().base, seed=10)
    recorded = (path.log_ratio + path.escape_gap).sum(dim=1)
    # Sums of about ten numbers of float64, in another order.
    torch.testing.assert_close(matching.log_ratio(chain(), drew, path), recorded, rtol=0, atol=1e-12)
    by_other = matching.log_ratio(chain(), other, path)
    assert abs(float(z_scores((recorded - by_other).exp()[:, None], 1.0))) < Z
    rows = torch.tensor([7, 3999, 0])
    torch.testing.assert_close(matching.log_ratio(chain(), other, path, rows), by_other[rows], rtol=0, atol=1e-12)
    plain = gillespie(UniformCTMC(2), lambda x, t: torch.zeros(*x.shape, 2), path.final % 2, times=[0, 0.5], seed=1)
    with pytest.raises(ValueError, match="must be of moves"):
        matching.log_ratio(chain(), drew, plain)
    bounded = dataclasses.replace(chain(), largest_escape=9.0)
    thinned = simulate(bounded, lambda x, t, listed: 0 * listed.rate, path.initial[:4], times=[0, 1], seed=1)
    with pytest.raises(ValueError, match="draw with gillespie"):
        matching.log_ratio(chain(), drew, thinned)


def test_the_variance_of_weights_leads_to_the_optimum():
    """On trajectories of the base alone, all of them in every step: nothing is drawn from the table that learns."""
    process, space = chain(check=False), space_of()
    cost = torch.linspace(0, 1, 10, dtype=torch.float64)
    optimum = space.law(process.base, point(space), [0.0, 1.0]) * (-cost).exp()
    optimum = optimum / optimum.sum()
    edges = torch.tensor(TIMES, dtype=torch.float64)
    values = torch.zeros(4, *space.to.shape, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.05)

    def model(states, time, listed):
        return values[torch.searchsorted(edges, time) - 1, space.index_of(states)]

    path = gillespie(process, process.base, started(space, 2000), times=TIMES, seed=11)
    terminal = cost[space.index_of(path.final)]
    before = float((space.law(model, point(space), TIMES) - optimum).abs().sum() / 2)
    for _ in range(60):
        optimizer.zero_grad()
        (matching.log_ratio(process, model, path) - terminal).var().backward()
        optimizer.step()
    # 2000 draws of p* itself are as far from it as 0.025.
    assert before > 0.1 > 3 * float((space.law(model, point(space), TIMES) - optimum).abs().sum() / 2)


def test_targets_of_first_jumps_and_drawn_ones():
    space = space_of()
    path = gillespie(chain(), Table(space), started(space, 50), times=TIMES, seed=9)
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0))
    every = matching.path_targets(path, weight)
    assert len(every.move) == int((path.exposure > 0).sum())
    assert math.isclose(float(every.exposure.sum()), 1.0, rel_tol=1e-12)
    first = matching.path_targets(path, weight, first_jump=True)
    assert torch.equal(first.states, started(space, len(first.move)))
    jumped = (path.position >= 0).any(dim=1)
    assert int((first.move >= 0).sum()) == int(jumped.sum())
    part = every.drawn(7, torch.Generator().manual_seed(1))
    assert part.move.shape == (7, 1)
    more = float(part.jumps.max()) / float(every.jumps.max())
    assert math.isclose(more, len(every.move) / 7, rel_tol=1e-12)
    merged = every.merged()
    # At most as many rows as there are states and intervals, and the same loss but for the order of sums in float32.
    assert len(merged.move) <= 40 < len(every.move)
    for options in ({}, {"baseline": 1.0}, {"baseline": 1.0, "teacher": Table(space, seed=4)}):
        losses = [float(matching.loss(chain(), Table(space, seed=5), t, **options)) for t in (every, merged)]
        assert math.isclose(*losses, rel_tol=1e-4, abs_tol=1e-5)
    with pytest.raises(ValueError, match="element per trajectory, 50"):
        matching.path_targets(path, weight[:3])
    with pytest.raises(ValueError, match="give a baseline"):
        matching.loss(chain(), Table(space), every, teacher=Table(space))
    plain = gillespie(
        UniformCTMC(2), lambda x, t: torch.zeros(*x.shape, 2), started(space, 2) * 0, times=[0, 0.5], seed=1
    )
    with pytest.raises(ValueError, match="must be of moves"):
        matching.path_targets(plain, weight[:2])


def test_targets_without_jumps():
    """States without a move have no jumps, merged or not: time at an escape rate of 0 costs nothing."""
    process = MovesCTMC(moves.swap())
    path = gillespie(process, process.base, torch.zeros(3, 4, dtype=torch.int64), times=[0.0, 0.5, 1.0], seed=1)
    assert (path.position == -1).all() and torch.equal(path.exposure, torch.full((3, 2), 0.5, dtype=torch.float64))
    targets = matching.path_targets(path, torch.ones(3))
    merged = targets.merged()
    assert merged.move.tolist() == [[-1], [-1]] and merged.exposure.tolist() == [0.5, 0.5]
    for some in (targets, merged):
        for teacher in (None, process.base):
            assert float(matching.loss(process, Constant(1.0), some, baseline=1.0, teacher=teacher)) == 0.0
    none = matching.path_targets(gillespie(process, process.base, path.final[:0], times=[0, 1], seed=1), torch.ones(0))
    assert none.merged().move.shape == (0, 1)
