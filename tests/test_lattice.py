"""Lattices whose sums are exact, what is sampled from them, and learners that use outcomes again."""

import json
import math

import pytest
import torch

from dam.ctmc import enumeration
from dam.rollout import path_of
from experiments import centred, clusters, grid, lattice, learners, orders, replay, transfer
from experiments.__main__ import main
from experiments.densities import Grid, Ising, Potts
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each

LATTICES = [Ising(2, 0.6, 0.1), Ising(3, 0.4, 0.2), Potts(2, 0.7), Potts(3), Potts(2, 0.9, colours=4)]


@pytest.mark.parametrize("density", LATTICES, ids=str)
def test_sums_by_the_transfer_matrix_are_those_of_enumeration(density):
    """log Z and means of the observables: rounding of float64 sums over a few thousand states."""
    states, law = enumeration.states(density.tokens, density.length), density.law()
    log_z, means = density.known()
    assert math.isclose(log_z, float(density.log_density(states).logsumexp(dim=0)), rel_tol=1e-13)
    for mean, observed in zip(means, density.observables(states), strict=True):
        assert math.isclose(mean, float(law @ observed), rel_tol=1e-10)


def test_sums_of_larger_lattices_come_in_chunks(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 7)
    small = Ising(3, 0.4, 0.2)
    by_enumeration = float(small.log_density(enumeration.states(2, 9)).logsumexp(dim=0))
    assert math.isclose(small.known()[0], by_enumeration, rel_tol=1e-13)


@pytest.mark.parametrize(("side", "beta"), [(3, 0.2), (4, math.log(1 + 2**0.5) / 2), (8, 0.28), (8, 0.6)])
def test_sums_without_a_field_are_those_of_the_transfer_matrix(side, beta):
    """By Kaufman's products, above, at and below the critical temperature, where one of them changes its sign."""
    density = Ising(side, beta, 0.0)
    log_z, (magnetisation, correlation) = density.known()
    other_log_z, *moments = transfer.moments(side, density.coupling, density.site, token=1)
    assert math.isclose(log_z, other_log_z + density.offset, rel_tol=1e-12)
    means = density.of_moments(*moments)
    assert magnetisation == 0 and abs(means[0]) < 1e-10 and math.isclose(correlation, means[1], rel_tol=1e-10)


@pytest.mark.parametrize("density", [Ising(2, 0.4, 0.2), Potts(2, 0.5)], ids=str)
@pytest.mark.parametrize("how", ["rows", "clusters"])
def test_samples_are_of_the_law(density, how):
    """Chi-square over all states; 20 sweeps forget a random start of four sites."""
    given = (density.side, density.coupling, density.site)
    x = transfer.samples(*given, 10_000, 1) if how == "rows" else clusters.swendsen_wang(*given, 10_000, 20, 2)
    counts = torch.bincount(enumeration.index_of(x, density.tokens), minlength=density.tokens**4).double()
    assert abs(oracle.chi_square_z(counts, density.law())) < Z


@pytest.mark.parametrize("density", [Ising(4, 0.4407), Potts(4)], ids=str)
def test_clusters_of_a_larger_lattice(density):
    """Means of 1,000 chains after 30 sweeps against the exact ones, on lattices without pairs twice."""
    x = clusters.swendsen_wang(density.side, density.coupling, density.site, 1000, 30, 3)
    for observed, mean in zip(density.observables(x), density.known()[1], strict=True):
        assert abs(float(observed.mean()) - mean) < Z * float(observed.std()) / len(x) ** 0.5


def test_unequal_neighbours_are_not_bound():
    with pytest.raises(ValueError, match=r"the coupling must be at least 0; got -0\.5"):
        clusters.swendsen_wang(2, -0.5, torch.zeros(2, dtype=torch.float64), 1, 1, 0)


def perturbed(density, made=lattice.Network, scale=0.3):
    torch.manual_seed(5)
    model = learners.DenoiserModel(made(density, 32), density, learning_rate=1e-3)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
    model.averaged.load_state_dict(model.network.state_dict())
    return model


def test_hidden_states_where_they_are_read():
    """In any order of rows and positions, some of them twice."""
    network = perturbed(Ising(3)).network
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (20, 9), generator=generator)
    row, position = torch.randint(20, (50,), generator=generator), torch.randint(9, (50,), generator=generator)
    found, expected = network.hidden_at(tokens, None, row, position), network.hidden_states(tokens)[row, position]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32 products of other sizes


@pytest.mark.parametrize(("side", "reach"), [(3, None), (4, None), (5, 1), (8, 3)])
def test_sites_around_are_all_others_within_reach(side, reach):
    """Each once, the nearest first, and from every site at the same displacements."""
    around = centred.sites_around(side, reach)
    furthest = side // 2 if reach is None else reach
    site = torch.arange(side**2)[:, None]
    away = torch.stack((around // side - site // side, around % side - site % side), dim=2) % side
    away = torch.where(away > side // 2, away - side, away)
    assert torch.equal(away, away[:1].expand_as(away))
    within = {(i, j) for i in range(side) for j in range(side) if max(min(i, side - i), min(j, side - j)) <= furthest}
    assert sorted((int(i) % side, int(j) % side) for i, j in away[0]) == sorted(within - {(0, 0)})
    distance = away[0].square().sum(dim=1)
    assert bool((distance[1:] >= distance[:-1]).all())


def test_a_network_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="reach must be at least 1; got 0"):
        centred.Centred(Ising(4), reach=0)


def test_tokens_are_numbered_as_they_are_met():
    """Masks, here 3, have no number; what is not met shares the next one."""
    seen = torch.tensor([[3, 2, 2, 0, 3], [3, 3, 3, 3, 3], [1, 3, 0, 2, 1], [0, 0, 3, 0, 0]])
    assert centred.met(seen, 3).tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 2], [0, 1, 1]]


@pytest.mark.parametrize("density", [Ising(4, 0.4, 0.1), Ising(4, 0.4, 0.0), Potts(3), Potts(3, 0.7, 4)], ids=str)
def test_a_centred_network_is_as_symmetric_as_its_lattice(density):
    """Rolling a state rolls what is predicted, and exchanging colours of equal weight exchanges it, to the rounding of
    float32 products; what stands at a site tells nothing of the prediction there, and everything else does.
    """
    network, tokens, side = perturbed(density, centred.Centred).network, density.tokens, density.side
    generator = torch.Generator().manual_seed(2)
    states = torch.randint(tokens + 1, (50, side**2), generator=generator)
    states[0] = tokens  # nothing is known
    found = network.hidden_states(states).log_softmax(dim=2).detach()
    assert float(found.std()) > 0.1  # else nothing is tested
    rolled = states.view(-1, side, side).roll((1, 2), (1, 2)).flatten(1)
    expected = found.view(-1, side, side, tokens).roll((1, 2), (1, 2)).flatten(1, 2)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(network.hidden_states(rolled).log_softmax(dim=2), expected, **close)
    exchanged = torch.tensor([*range(1, tokens), 0, tokens])
    other = network.hidden_states(exchanged[states]).log_softmax(dim=2)
    favoured = isinstance(density, Ising) and density.field > 0
    assert favoured != torch.allclose(other[..., exchanged[:-1]], found, **close)
    filled = states.clone()
    filled[:, 5] = (filled[:, 5] + 1) % (tokens + 1)
    changed = (network.hidden_states(filled).log_softmax(dim=2) - found).abs().amax(dim=2) > 1e-4
    assert not bool(changed[:, 5].any()) and float(changed.double().mean()) > 0.8
    row, position = torch.randint(50, (30,), generator=generator), torch.randint(side**2, (30,), generator=generator)
    at = network.hidden_at(states, None, row, position).log_softmax(dim=1)
    torch.testing.assert_close(at, found[row, position], **close)


def test_divergences_of_a_network_that_is_known_exactly(monkeypatch):
    """Of paths, over some orders, and of outcomes: the exact ones by all 24 orders of four sites."""
    density = Ising(2)
    model = perturbed(density)
    paths = orders.path_log_prob(model.log_prob(enumeration.states(3, 4)).double(), 2)  # [24, 16]
    law, log_p = paths.exp().mean(dim=0), density.law().log()
    of_outcomes = float((law * (law.log() - log_p)).sum())
    of_paths = float((paths.exp() * (paths - log_p)).sum(dim=1).mean())
    assert of_outcomes < of_paths - 0.01  # else nothing is tested
    found = lattice.figures(density, model, 10_000, 0)
    values = (paths - log_p).flatten()
    spread = float((paths.exp().flatten() / 24 * (values - of_paths).square()).sum().sqrt())
    assert abs(found["kl"] - of_paths) < Z * spread / 10_000**0.5
    weights = float(((-2 * values).exp() * paths.exp().flatten() / 24).sum())  # the mean of their square
    assert abs(found["log_z_error"]) < Z * (weights - 1) ** 0.5 / 10_000**0.5
    many = {}
    for count in (2, 64):
        monkeypatch.setattr(lattice, "ORDERS", count)
        many[count] = lattice.kl_over_orders(density, model, 1000, 0)
    assert of_outcomes - Z * spread / 1000**0.5 < many[64] < many[2]


class Small(Grid):
    """Nine outcomes of two tokens."""

    def table(self):
        return torch.randn((3, 3), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def on_grid(logits):
    """A model of Small with given logits, float64 [2, V + 1, V]; it computes in float32."""
    model = grid.GridModel(Small("pinwheel", 3), learning_rate=1e-3)
    model.network = lambda: logits.float()
    return model


def conditionals(joint):
    return torch.cat([torch.stack([joint.t(), joint]), torch.stack([joint.sum(1), joint.sum(0)])[:, None]], dim=1).log()


def test_the_gradient_of_the_variance():
    """That of half the variance of r - log p_u over outcomes of any law and both orders, by autograd on the sum over
    all of them.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    model, every = on_grid(logits), enumeration.states(3, 2)
    law = torch.rand(9, generator=generator, dtype=torch.float64)
    law = law / law.sum()
    log_prob = logits.log_softmax(dim=2)
    values = []
    for first in (0, 1):
        begun = log_prob[first, 3, every[:, first]]
        values.append(model_reward() - begun - log_prob[1 - first, every[:, first], every[:, 1 - first]])
    value = torch.stack(values)
    variance = (law / 2 * (value - (law / 2 * value).sum()).square()).sum()
    (expected,) = torch.autograd.grad(variance / 2, logits)
    total, squares, parts = torch.zeros_like(logits), torch.zeros_like(logits), 20
    for _ in range(parts):
        final = every[torch.multinomial(law, 4000, True, generator=generator)]
        path = in_any_order(final, generator)
        targets = replay.variance_targets(model, path, Small("pinwheel", 3).log_density(final))
        (found,) = torch.autograd.grad(model.loss(targets).double(), logits)
        total, squares = total + found / parts, squares + found.square() / parts
    error = ((squares - total.square()) / (parts - 1)).clamp(min=1e-14).sqrt()
    # The loss is by 1 / L of the sum over jumps, and a mean of 4,000 is less than its noise. Student's t of 19 degrees
    # of freedom beyond 12: 1e-10 each.
    assert float(((total - expected / 2) / error).abs().max()) < 12


def test_the_variance_is_of_the_model_as_it_is():
    """Whatever drew the paths, and no path further from the mean than its bound."""
    generator = torch.Generator().manual_seed(3)
    model, every = on_grid(torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)), enumeration.states(3, 2)
    path = in_any_order(every, generator)
    path.log_prob = torch.full((9, 2), torch.nan)
    log_weight = model_reward()
    off = log_weight - model.path_log_prob(path).double().sum(dim=1)
    for bound in (math.inf, 0.5):
        targets = replay.variance_targets(model, path, log_weight, bound)
        expected = (off - off.mean()).clamp(-bound, bound)
        # To the rounding of float32 log-probabilities.
        torch.testing.assert_close(targets.weight.view(9, 2), expected[:, None].expand(-1, 2), rtol=0, atol=1e-5)
        assert bound == math.inf or int((expected.abs() == bound).sum()) >= 2


def in_any_order(final, generator):
    """Paths to outcomes [B, L] from masks only, in orders drawn uniformly, without their log-probabilities."""
    order = torch.rand(final.shape, generator=generator).argsort(dim=1)
    call = torch.arange(final.shape[1]).expand_as(order)
    return path_of(torch.full_like(final[:1], 3), final[None], order[None], call[None])


def model_reward():
    return Small("pinwheel", 3).log_density(enumeration.states(3, 2))


@pytest.mark.parametrize("name", replay.LEARNERS)
def test_what_is_kept_is_weighed_toward_the_optimum(name):
    """From a model that is not it: the kept outcomes by their weights have the law of p_a, and each its own reward."""
    logits = 0.5 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    density = Small("pinwheel", 3)
    learner = replay.learner(name, density, batch=2048, steps=2, replicates=1, seed=3)
    if learner.ess:
        learner.ess = 0.7  # more than p* leaves
    model = on_grid(logits)
    for n in range(20):
        made = learner.round(model, n, 0.7)
        states = sum(len(targets.states) for targets in made.steps)
        variance = name != "posterior, replay"
        expected = 2048 * 2 if variance else 2 * learner.states  # of outcomes of two tokens
        # The variance asks the model twice at each state, for the weights and in the loss.
        assert made.reward_calls == 2048 and states == expected
        assert made.network_calls == 2048 * 2 + (1 + variance) * states
    final, reward, weight = learner.final.flatten(0, 1).long(), learner.reward.flatten(), learner.weights().flatten()
    torch.testing.assert_close(reward, density.log_density(final), rtol=0, atol=0)
    share = weight / weight.sum()
    law = torch.zeros(9, dtype=torch.float64).index_add_(0, enumeration.index_of(final, 3), share)
    truth = torch.softmax(learner.tilt * density.law().log(), dim=0)
    assert 0.1 < learner.tilt < 0.9 if learner.ess else learner.tilt == 1
    ess = float(1 / share.square().sum())
    assert ess > 10_000
    # Shares of weighted draws have at most the variance p (1 - p) / ESS but for the spread of weights within a state.
    assert float(((law - truth).abs() / (truth * (1 - truth) / ess).sqrt()).max()) < Z
    learner.kept, before = 3, learner.final
    for _ in learner.round(model, 20, 0.7).steps:
        pass
    assert len(learner.final) == len(learner.reward) == len(learner.weights()) == 3
    assert torch.equal(learner.final[:2], before[-2:])


def test_the_tilt_goes_as_far_as_its_sample_size_allows():
    """To rounding of 40 halvings, never back, and to 1 where all of it is allowed."""
    generator = torch.Generator().manual_seed(0)
    log_ratio, reward = (scale * torch.randn(500, generator=generator, dtype=torch.float64) for scale in (0.3, 3.0))

    def ess(a):
        return float(1 / torch.softmax(log_ratio + a * reward, dim=0).square().sum())

    a = replay.furthest_tilt(log_ratio, reward, 200.0, 0.0)
    assert 0.05 < a < 0.95 and ess(a) >= 200 > ess(a + 1e-9)
    assert replay.furthest_tilt(log_ratio, reward, 200.0, a + 0.01) == a + 0.01
    assert replay.furthest_tilt(log_ratio, reward, ess(1.0) - 1e-6, 0.3) == 1


def test_at_the_optimum_the_variance_asks_for_nothing():
    """Whatever is kept, in whatever order; and re-masked outcomes are as far from it as draws are."""
    density = Small("pinwheel", 3)
    model = on_grid(conditionals(density.law().view(3, 3)))
    for name in ("variance", "posterior, replay"):
        learner = replay.learner(name, density, batch=512, steps=1, replicates=1, seed=4)
        steps = [targets for n in range(3) for targets in learner.round(model, n, 0.7).steps]
        largest = max(float(targets.weight.abs().max()) for targets in steps)
        # float32 log-probabilities.
        assert largest < 1e-5 if name == "variance" else largest > 0.1
    with pytest.raises(KeyError):
        replay.learner("posterior", density, batch=512, steps=1, replicates=1, seed=4)


def test_the_study_of_potts(tmp_path, capsys):
    """The base has an ESS of 0.056; three seeds had 0.48 to 0.78 after so few calls, log Z off by 0.04."""
    arguments = ["potts", "--side", "2", "--rounds", "40", "--batch", "128", "--samples", "2048", "--seeds", "1"]
    assert main([*arguments, "--width", "64", "--learners", "posterior", "--output", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "potts-1.005-masked.json").read_text())["results"]
    assert found["ess"] > 0.2 and abs(found["log_z_error"]) < 0.2 and found["kl_over_orders"] < found["kl"]
    assert found["curve"][-1]["reward_calls"] == 40 * 128
    assert "| posterior | 5,120 | 40,960 |" in capsys.readouterr().out


def test_a_centred_network_in_the_study(tmp_path):
    """By a ladder of temperatures; what it came to is told with what it was made of."""
    arguments = ["potts", "--side", "2", "--rounds", "40", "--batch", "128", "--samples", "2048", "--seeds", "1"]
    chosen = ["--network", "centred", "--reach", "1", "--width", "32", "--learners", "tilted posterior, then variance"]
    assert main([*arguments, *chosen, "--output", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "potts-1.005-masked.json").read_text())
    assert (told["network"], told["reach"], told["width"]) == ("centred", 1, 32)
    (found,) = told["results"]
    assert found["ess"] > 0.8 and abs(found["log_z_error"]) < 0.1


def test_equal_network_calls():
    """Each learner's last point within the calls of the one that made the fewest."""
    curves = {"a": [(10, 5, 0.5), (20, 10, 0.9)], "b": [(15, 3, 0.4), (25, 6, 0.6), (40, 9, 0.95)]}
    results = [
        {
            "learner": name,
            "curve": [
                dict(zip(("network_calls", "reward_calls", "ess", "kl"), (*point, 0.1), strict=True)) for point in curve
            ],
        }
        for name, curve in curves.items()
    ]
    assert lattice.network_calls_table(results).splitlines()[2:] == [
        "| a | 20 | 10 | 0.9000 | 0.1 |",
        "| b | 15 | 3 | 0.4000 | 0.1 |",
    ]


def test_tables_of_several_lattices():
    """A row for each lattice and learner, each with its own seeds."""
    run = {"ess": 0.5, "kl": 0.1, "log_z_error": 0.01, "magnetisation_error": [0.02, 0.03]}
    run.update(correlation_error=[0.04, 0.05], curve=[{"reward_calls": 1000, "network_calls": 2000}])
    ising = {"side": 4, "beta": 0.28, "field": 0.1, "results": [{**run, "learner": "a"}, {**run, "learner": "b"}]}
    potts = {"side": 8, "beta": 1.005, "colours": 3, "results": [{**run, "learner": "a", "ess": e} for e in (0.7, 0.9)]}
    rows = [line.split(" | ") for line in lattice.lattices_table([ising, potts]).splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["| Ising, field 0.1, 4 x 4, beta 0.28", "a"],
        ["| Ising, field 0.1, 4 x 4, beta 0.28", "b"],
        ["| Potts, 3 colours, 8 x 8, beta 1.005", "a"],
    ]
    assert rows[0][2:5] == ["1,000", "2,000", "0.5000"] and rows[2][4] == "0.8000 (0.7000 to 0.9000)"
    assert rows[0][-2:] == ["0.0200 [0.0300]", "0.0400 [0.0500] |"]
