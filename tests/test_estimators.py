"""`python -m experiments`, its small versions: the laws that are learned, and the order of the estimators."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import dam
from dam.ctmc import enumeration
from dam.tasks import countdown_base, finetune, finetune_countdown, sudoku
from experiments import attainable, countdown, estimators, grid, invariants, lattice, learners, moves, orders, policy
from experiments.__main__ import main
from experiments.densities import Grid, Ising
from tests import fresh, oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each


def table(name, tmp_path):
    """Last figures of each learner of a study that was written."""
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    return {r["learner"]: r for r in results}


# ---- what is learned


def test_the_lattice_is_the_ising_model():
    """Neighbours by loops, each pair once for each of its two ways round a lattice of side 2 and more."""
    model = Ising(side=3, beta=0.4, field=0.2)
    x = torch.randint(2, (5, 9), generator=torch.Generator().manual_seed(1))
    for state, value in zip(x, model.log_density(x), strict=True):
        s = (2 * state - 1).view(3, 3).tolist()
        energy = -sum(s[i][j] * (s[(i + 1) % 3][j] + s[i][(j + 1) % 3]) for i in range(3) for j in range(3))
        energy -= 0.2 * sum(map(sum, s))
        assert math.isclose(value, -0.4 * energy, rel_tol=1e-12, abs_tol=1e-12)
    law = model.law()
    assert law.shape == (512,) and math.isclose(float(law.sum()), 1.0, rel_tol=1e-12)
    up = (law * model.observables(enumeration.states(2, 9))[0]).sum()
    assert up > 0  # the field's side


def test_densities_of_the_plane():
    pinwheel = Grid("pinwheel", 61).table()
    # Five arms: the density 72 degrees further is the same, up to the grid's coarseness.
    axis = torch.linspace(-1, 1, 61, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    turn = 2 * math.pi / 5
    there = ((x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)),)
    index = [((part + 1) * 30).round().long().clamp(0, 60) for part in there[0]]
    inside = torch.hypot(x, y) < 0.9
    p, turned = pinwheel.exp()[inside], pinwheel.exp()[index[0], index[1]][inside]
    assert float(torch.corrcoef(torch.stack([p, turned]))[0, 1]) > 0.9
    assert float(torch.corrcoef(torch.stack([p, pinwheel.exp().flip(0)[inside]]))[0, 1]) < 0.7  # it is bent
    assert float(pinwheel.max()) < 1e-3 and math.isclose(float(pinwheel.min()), -9, abs_tol=1e-3)
    squares = Grid("checkerboard", 81).table().exp()
    middles = squares[10::20, 10::20]  # of 4 x 4 squares
    assert middles.shape == (4, 4)
    expected = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    torch.testing.assert_close(middles, torch.where(expected, 1.0, math.exp(-6)).double(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="pinwheel, checkerboard; got 'disc'"):
        Grid("disc")


# ---- models whose laws are exact


def trained(size=7):
    """A model on a grid that is not the base any more."""
    torch.manual_seed(0)
    model = grid.GridModel(Grid("pinwheel", size), learning_rate=1e-2)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def test_trajectories_on_the_grid_follow_its_law():
    model = trained(5)
    path = model.sampled(model.blank(40_000), seed=1)
    law = grid.law_of(model.network().detach().double().log_softmax(dim=2)).flatten()
    assert math.isclose(float(law.sum()), 1.0, rel_tol=1e-9)
    counts = torch.bincount(enumeration.index_of(path.final, 5), minlength=25).double()
    assert abs(oracle.chi_square_z(counts, law)) < Z
    torch.testing.assert_close(model.path_log_prob(path), path.log_prob, rtol=0, atol=1e-5)  # float32
    # Of a state with one mask, that one is filled in.
    part = torch.tensor([[2, 5], [5, 3]]).repeat(2000, 1)
    some = model.sampled(part, seed=2)
    assert some.position.shape == (4000, 1) and torch.equal(some.final[::2, 0], torch.full((2000,), 2))
    given = model.log_prob(part[:1])[0, 1].double().exp()
    assert abs(oracle.chi_square_z(torch.bincount(some.final[::2, 1], minlength=5).double(), given)) < Z
    # The base's trajectories among them keep the network's log-probabilities.
    mixed = model.explored(4000, 3000, seed=3)
    counts = torch.bincount(enumeration.index_of(mixed.final[:3000], 5), minlength=25).double()
    assert abs(oracle.chi_square_z(counts, torch.full((25,), 1 / 25, dtype=torch.float64))) < Z
    torch.testing.assert_close(model.path_log_prob(mixed), mixed.log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", learners.LEARNERS)
def test_every_learner_asks_for_a_matching_loss(name):
    """A model on the grid computes it from sums over contexts, here against `dam.matching_loss` row by row."""
    model, density = trained(), Grid("pinwheel", 7)
    learner = learners.learner(name, density, batch=64, seed=3)
    for n in range(2):
        round = learner.round(model, n, n / 2)
        assert 0 < round.reward_calls <= 64 and round.network_calls > 0
        for targets in round.steps:
            assert bool(model.process.masked(targets.states)[targets.row, targets.position].all())
            other = targets.states[targets.row, 1 - targets.position]
            scale = torch.full((len(other),), 1.0 / len(targets.states))
            expected = dam.matching_loss(
                model.network()[targets.position, other], targets.target, targets.weight.float(), row_scale=scale
            )
            # float32 sums of numbers of order one, with cancellation between weights of both signs.
            size = float((targets.weight.abs().sum() / len(targets.states)).clamp(min=1.0))
            torch.testing.assert_close(model.loss(targets), expected, rtol=1e-4, atol=1e-5 * size)


class Random(Grid):
    """Weights within a factor of ten or so of each other, whose estimates are nearly normal."""

    def table(self):
        generator = torch.Generator().manual_seed(7)
        return 0.6 * torch.randn((self.size, self.size), generator=generator, dtype=torch.float64)


class Exact(torch.nn.Module):
    """The conditionals of a joint law [V, V], as `grid.Contexts` gives them."""

    def __init__(self, joint):
        super().__init__()
        first = torch.stack([joint.sum(1), joint.sum(0)])[:, None]
        self.log_prob = torch.cat([torch.stack([joint.t(), joint]), first], dim=1).log()

    def forward(self):
        return self.log_prob.log_softmax(dim=2).float()


def gradients(name, law, model_law, rounds=60):
    """The gradients [rounds, 2, V + 1, V] that a learner asks for at a model of a joint law, and its log p(v | x).

    `law` is the target's, log rewards up to a constant; that of c-DTM a stage's tilt beyond the model.
    """
    density = Random("pinwheel", 5)
    model = trained(5)
    model.network = Exact(model_law)
    learner = learners.learner(name, density, batch=4096, seed=6)
    log_prob = model.network().double()
    found = []
    for n in range(rounds):
        total = torch.zeros(2, 6, 5, dtype=torch.float64)
        for targets in learner.round(model, n, 0.0).steps:
            other = targets.states[targets.row, 1 - targets.position]
            rows, used = torch.arange(len(other))[:, None].expand_as(targets.target), targets.target >= 0
            where = (targets.position[rows][used], other[rows][used], targets.target[used])
            total.index_put_(where, targets.weight[used].double(), accumulate=True)
        found.append(total - total.sum(dim=2, keepdim=True) * Exact(law).forward().double().exp())
    return torch.stack(found), log_prob


def laws(name):
    """p*, and for c-DTM that of its first stage from a base that knows nothing."""
    reward = Random("pinwheel", 5).table()
    stages = learners.TiltMatching.stages if name == "c-DTM" else 1
    return torch.softmax((reward / stages).flatten(), dim=0).view(5, 5), torch.full((5, 5), 1 / 25, dtype=torch.float64)


CONSISTENT = sorted(set(learners.LEARNERS) - set(policy.LEARNERS))  # the others by enumeration: tests/test_policy.py


@pytest.mark.parametrize("name", CONSISTENT)
def test_the_fixed_point_is_the_optimum(name):
    """At p* no learner's gradient has another mean than 0; that of c-DTM vanishes a stage's tilt beyond its teacher."""
    law, uniform = laws(name)
    gradient, _ = gradients(name, law, uniform if name == "c-DTM" else law)
    # float32 log-probabilities leave gradients of 1e-4 a trajectory where there are none.
    z = gradient.mean(dim=0) / (gradient.std(dim=0) / 60**0.5).clamp(min=1e-3)
    # Student's t of 59 degrees of freedom beyond 7: 3e-9 each.
    assert float(z.abs().max()) < 7


@pytest.mark.parametrize("name", CONSISTENT)
def test_away_from_the_optimum_the_gradient_leads_to_it(name):
    """From the base, the gradient has a positive product with log p* - log p_theta."""
    law, uniform = laws(name)
    gradient, log_prob = gradients(name, uniform, uniform, rounds=40)
    toward = (gradient * (Exact(law).forward().double() - log_prob)).sum(dim=(1, 2, 3))
    assert float(toward.mean() / (toward.std() / 40**0.5)) > 7


def test_weights_are_constant_where_the_model_is_the_law():
    """A grid model that is p*: the path learner asks for nothing, the others for p*."""
    density = Grid("pinwheel", 7)
    model = trained()
    model.network = Exact(density.law().view(7, 7))
    path = learners.learner("path, baseline", density, batch=512, seed=4)
    assert float(path.round(model, 0, 0.0).steps[0].weight.abs().max()) < 1e-4 * 512  # the self-normalised mean
    path.explore = 0.0
    assert float(path.round(model, 0, 0.0).steps[0].weight.abs().max()) < 1e-4
    posterior = learners.learner("posterior", density, batch=512, seed=4).round(model, 0, 0.0).steps[0]
    masked = model.process.masked(posterior.states).sum(dim=1)[posterior.row]
    torch.testing.assert_close(posterior.weight[:, 0], 1.0 / masked.double(), rtol=0, atol=1e-4)


def test_what_resampling_keeps():
    """The probability that svdd's sampler keeps a token, by simulation and in two limits."""
    value = torch.tensor([1.0, 0.5, 0.01, 1e-9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(4, (200_000, 3), generator=generator)
    chosen = draws.gather(1, torch.multinomial(value[draws], 1, generator=generator))[:, 0]
    exact = grid.kept(value, 3)
    assert abs(oracle.chi_square_z(torch.bincount(chosen, minlength=4).double(), exact)) < Z
    torch.testing.assert_close(grid.kept(value, 1), torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-6, atol=0)
    # In proportion to the values, up to a share of their spread over the number of draws.
    torch.testing.assert_close(grid.kept(value, 10_000), value / value.sum(), rtol=5e-4, atol=0)


def test_the_uniform_chain_of_a_joint_law():
    """Its predictions are Bayes' rule over all states, and its chain ends in that law, by the forward equation."""
    size = 4
    torch.manual_seed(0)
    model = grid.UniformModel(Grid("pinwheel", size), learning_rate=1e-3)
    with torch.no_grad():
        for parameter in model._fit.averaged.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    joint = model.law()
    assert math.isclose(float(joint.sum()), 1.0, rel_tol=1e-6) and float(joint.max()) > 0.1
    time = torch.tensor([0.4, 0.9], dtype=torch.float64)
    states = torch.tensor([[0, 3], [2, 1]])
    kernel = model.process.kernel(time)
    told = model.prediction(joint.log(), states, time).log_softmax(dim=2).exp()
    for n in range(2):
        posterior = joint * kernel[n][:, states[n, 0]][:, None] * kernel[n][:, states[n, 1]]
        posterior /= posterior.sum()
        torch.testing.assert_close(told[n, 0], posterior.sum(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(told[n, 1], posterior.sum(0), rtol=1e-9, atol=1e-12)
    times = [1 - 10 ** (-5 * k / 120) for k in range(121)]
    # 1e-3 of the data is left at time 0, and 7e-5 of the noise at the last time.
    assert float((model.simulated_law(times) - joint.flatten()).abs().sum()) < 2e-3


# ---- the studies, small


@pytest.mark.slow
def test_order_on_the_grid(tmp_path, capsys):
    """At equal reward calls: by factors in KL (0.10, 0.23, 0.96, 1.9), where two seeds differed by a fifth at most."""
    chosen = ["path, baseline", "posterior", "first_jump_one, state", "d1", "svdd"]
    arguments = ["grid", "--size", "31", "--rounds", "250", "--batch", "512", "--seeds", "1", "--output", str(tmp_path)]
    assert main([*arguments, "--learners", *chosen]) == 0
    found = table("pinwheel-masked", tmp_path)
    kl = {name: r["curve"][-1]["kl"] for name, r in found.items()}
    assert kl["path, baseline"] < kl["posterior"] / 1.5 and kl["posterior"] < kl["first_jump_one, state"] / 2
    assert kl["first_jump_one, state"] < kl["d1"] and kl["d1"] > 1
    assert {r["curve"][-1]["reward_calls"] for r in found.values()} == {250 * 512}
    # svdd's values are exact by then: what is left is the bias of 20 proposals, and stays.
    curve = found["svdd"]["curve"]
    assert 0.02 < kl["svdd"] < 0.05 and curve[-1]["kl"] > 0.9 * curve[-6]["kl"]
    for picture in ("pinwheel-masked.png", "pinwheel-masked-samples.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert "| posterior | 128,000 |" in capsys.readouterr().out


@pytest.mark.full
def test_processes_change_no_figure(tmp_path):
    """Runs depend on their seed alone, and stand in the order in which they were asked for."""
    arguments = ["grid", "--size", "7", "--rounds", "3", "--batch", "64", "--seeds", "2"]
    for processes in ("1", "2"):
        chosen = ["--learners", "posterior", "svdd", "--processes", processes, "--output", str(tmp_path / processes)]
        assert main([*arguments, *chosen]) == 0
    one, two = (
        json.loads((tmp_path / processes / "pinwheel-masked.json").read_text())["results"] for processes in ("1", "2")
    )
    assert [(r["learner"], r["seed"]) for r in two] == [("posterior", 0), ("posterior", 1), ("svdd", 0), ("svdd", 1)]
    for a, b in zip(one, two, strict=True):
        assert (a["learner"], a["seed"]) == (b["learner"], b["seed"])
        for mine, other in zip(a["curve"], b["curve"], strict=True):
            assert mine.pop("core_seconds") > 0 and other.pop("core_seconds") > 0
            assert mine == pytest.approx(other, rel=1e-4)  # float32 sums by another number of threads
    assert one[0]["curve"][-1]["kl"] != pytest.approx(one[1]["curve"][-1]["kl"], rel=1e-4)


@pytest.mark.full
@pytest.mark.slow
def test_a_uniform_base_on_the_grid(tmp_path):
    """A few thousand simulated trajectories leave two thirds of the base's divergence at most."""
    arguments = ["grid", "--base", "uniform", "--size", "11", "--rounds", "16", "--batch", "256", "--steps", "4"]
    assert main([*arguments, "--learning-rate", "4e-3", "--seeds", "1", "--output", str(tmp_path)]) == 0
    density = Grid("pinwheel", 11)
    start = grid.divergences(density.law(), torch.full((121,), 1 / 121, dtype=torch.float64))["kl"]
    found = table("pinwheel-uniform", tmp_path)
    assert set(found) == {"posterior, baseline", "posterior"}
    for r in found.values():
        assert r["curve"][-1]["kl"] < start * 2 / 3
        assert r["curve"][-1]["reward_calls"] == 16 * 256 < r["curve"][-1]["network_calls"]


def test_a_network_that_knows_nothing_has_the_weights_of_the_base():
    """ESS of exp(-beta E) over uniform samples, from its definition; KL(p_u || p*) likewise."""
    density = Ising(side=2)
    model = learners.DenoiserModel(lattice.Network(density), density, learning_rate=1e-3)
    found = lattice.figures(density, model, 20_000, seed=0)
    p = density.law()
    expected = 1 / (16 * float(p.square().sum()))
    # Of 20,000 samples it has a standard deviation of 0.43% (200 repetitions).
    assert math.isclose(found["ess"], expected, rel_tol=Z * 0.0043)
    uniform = float((p - 1 / 16).abs().sum()) / 2
    assert math.isclose(found["tv"][0], uniform, abs_tol=0.02) and found["tv"][1] < 0.03
    kl = float((-math.log(16) - p.log()).mean())
    spread = float((-math.log(16) - p.log()).std()) / 20_000**0.5
    assert abs(found["kl"] - kl) < Z * spread


@pytest.mark.full
def test_order_on_the_lattice(tmp_path, capsys):
    """At equal reward calls the posterior is ahead of the published estimator, beyond what seeds differ by (0.02)."""
    arguments = ["ising", "--side", "2", "--rounds", "32", "--batch", "256", "--samples", "4096", "--seeds", "1"]
    chosen = ["--learners", "posterior", "first_jump_one, state", "--output", str(tmp_path)]
    assert main([*arguments, *chosen]) == 0
    found = table("ising-0.28-masked", tmp_path)
    posterior, published = found["posterior"], found["first_jump_one, state"]
    assert posterior["ess"] > 0.93 and published["ess"] < posterior["ess"] - 0.1
    assert posterior["tv"][0] < published["tv"][0] and posterior["kl"] < published["kl"]
    assert (tmp_path / "ising-0.28-masked.png").stat().st_size > 10_000
    assert "| posterior | 8,192 |" in capsys.readouterr().out


@pytest.mark.full
def test_a_uniform_base_on_the_lattice(tmp_path):
    """Samples weighed by their paths: ESS of the base is 0.31 there, and of what is trained twice as much.

    The base's total variation is 0.48; after so few calls 0.15 to 0.27 was left in 32 seeds.
    """
    arguments = ["ising", "--base", "uniform", "--side", "2", "--rounds", "16", "--batch", "256", "--samples", "1024"]
    assert main([*arguments, "--seeds", "1", "--output", str(tmp_path)]) == 0
    found = table("ising-0.28-uniform", tmp_path)["posterior"]
    law = Ising(side=2).law()
    assert 1 / (16 * float(law.square().sum())) < 0.32 and found["ess"] > 0.62
    assert found["tv"][0] < 0.6 * float((law - 1 / 16).abs().sum()) / 2


@pytest.mark.full
def test_the_study_of_sudoku(tmp_path, capsys):
    """One rollout of each: no order to be seen yet, but the table and what it is made of."""
    arguments = ["sudoku", "--seeds", "1", "--calls", "1024", "--output", str(tmp_path)]
    assert main([*arguments, "--learners", "posterior, group", "first_jump_one, state"]) == 0
    for r in table("sudoku-estimators", tmp_path).values():
        assert r["curve"][0] == {"reward_calls": 0, "unsolved": pytest.approx(1 - r["base_solved"])}
        assert r["curve"][-1]["reward_calls"] == 1024 and 0 <= r["solved"] <= 1
    assert "| posterior, group | 1,024 |" in capsys.readouterr().out


def test_laws_of_orders_are_those_of_the_oracle():
    """Paths, where steps end, and states as often as re-masking draws them."""
    table_ = oracle.inconsistent(3, 4, seed=2)
    paths = orders.path_log_prob(table_.logits[..., :4].detach().log_softmax(dim=2), 4)
    torch.testing.assert_close(paths, oracle.path_log_prob(table_, 3, 4), rtol=1e-12, atol=1e-12)
    score = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (paths * 0.2).exp().mean(dim=0) ** 5 * score.exp()
    torch.testing.assert_close(orders.power_mean(paths, score, 0.2), mean / mean.sum(), rtol=1e-12, atol=0)
    law = torch.rand(125, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = orders._at_every_state(law / law.sum())
    drawn = torch.multinomial(law, 200_000, True, generator=torch.Generator().manual_seed(2))
    final = dam.ctmc.enumeration.states(5, 3)[drawn]
    states = orders.PROCESS.remask(torch.full_like(final, 5), final, torch.Generator().manual_seed(3))
    sampled = dam.adjoint.group_targets(
        "posterior", states[:, None], final[:, None], torch.ones(len(final), 1), orders.PROCESS
    )

    def shares(targets):
        place = dam.ctmc.enumeration.index_of(targets.states[targets.row], 6) * 15 + targets.position * 5
        cells = place + targets.target[:, 0]
        total = torch.zeros(216 * 15, dtype=torch.float64)
        return total.index_add_(0, cells, targets.weight[:, 0].double()) / len(targets.states)

    # A share of n weights of at most 1 is off by less than half of n^-1/2.
    assert float((shares(every) - shares(sampled)).abs().max()) < 5 * 0.5 * len(final) ** -0.5
    assert abs(float(shares(every).sum()) - 1) < 1e-6


@pytest.mark.slow
def test_the_study_of_orders(tmp_path, capsys):
    arguments = ["orders", "--seeds", "1", "--steps", "4", "--output", str(tmp_path)]
    assert main([*arguments, "--learners", "defaults", "no reward", "outcomes of p*"]) == 0
    found = table("orders", tmp_path)
    assert 0 < found["no reward"]["kl"] < found["defaults"]["kl"] and found["no reward"]["reward_off"] == 0
    assert found["outcomes of p*"]["kl"] > 0 and "order_variance" in found["defaults"]
    assert "| 0.2 | 0.029 (0.013 to 0.083) | 0.057 (0.031 to 0.070) |" in capsys.readouterr().out  # README's figures


@pytest.mark.full
def test_the_study_of_countdown(tmp_path, monkeypatch, capsys):
    """A base of three steps: no figure to be seen, but a table with what the log of each case tells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(countdown_base, "STEPS", 3)
    monkeypatch.setattr(finetune_countdown, "PROBLEMS", 8)
    monkeypatch.setattr(countdown.Countdown, "prompts", 4)
    arguments = ["countdown", "--calls", "192", "--output", str(tmp_path)]
    with pytest.warns(UserWarning, match="constant reward"):
        assert main([*arguments, "--learners", "as dam countdown", "constant reward"]) == 0
    found = table("countdown", tmp_path)
    constant = found["constant reward"]
    assert [finding["name"] for finding in constant["findings"]] == ["constant reward"]
    assert constant["settings"] == {"reward": "constant"} and constant["log"][-1]["frac_reward_zero_std"] == 1
    assert found["as dam countdown"]["base"] == constant["base"] and constant["log"][-1]["step"] == 17
    shown = capsys.readouterr().out
    assert "\n| constant reward |" in shown and "| the base |" in shown
    assert (tmp_path / "runs" / "countdown-base-0" / "config.json").exists()


def test_figures_of_finished_runs_of_countdown(tmp_path, monkeypatch, capsys):
    """Of what the run saved, and of its base by the same problems."""
    evaluated, weights = countdown.evaluated, {}

    def and_which(task, model):
        return {**evaluated(task, model), "which": model.get_input_embeddings().weight[0, -1].item()}

    monkeypatch.setattr(countdown, "evaluated", and_which)
    for seed, (name, folder) in enumerate((("tuned", tmp_path / "run"), ("base", tmp_path / "run" / "base"))):
        model = countdown_base.network(seed)
        model.save_pretrained(folder)
        weights[name] = model.get_input_embeddings().weight[0, -1].item()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"greedy": 0.5, "examples": []}))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"options": {"null_arm": True}}))
    (tmp_path / "problems.jsonl").write_text('{"input": "1,2,3", "output": "6"}\n')
    arguments = ["runs", str(tmp_path / "run"), "--task", "countdown", "--problems", str(tmp_path / "problems.jsonl")]
    assert main(arguments) == 0
    (run,) = json.loads(capsys.readouterr().out)
    others = run.pop("other_problems")
    assert run == {"greedy": 0.5, "null_arm": True} and others["problems"] == 1
    assert {name: others[name]["which"] for name in weights} == weights
    assert all({"greedy", "sampled", "pass@16"} <= others[name].keys() for name in weights)


@pytest.mark.full
def test_every_case_of_countdown_is_a_run_that_can_begin():
    for name in countdown.CASES:
        task = countdown.task_of(name, 16 * 1024, 0)
        config = finetune.config(task, Path("nowhere"))
        assert config.max_steps == task.rollouts * task.iterations and config.eval_strategy == "no"
        assert all(
            getattr(config, key) == value for key, value in countdown.CASES[name].items() if hasattr(config, key)
        )


def test_figures_of_finished_runs(tmp_path, capsys):
    """A run that saved the base model does on other puzzles as the base does."""
    training, held_out = (sudoku.draw_puzzles(grids, 6, blanks=(3, 8), seed=0) for grids in sudoku.split_grids())
    rows = [
        ",".join("".join(map(str, cells)) for cells in row)
        for puzzles in (training, held_out)
        for row in zip(puzzles.puzzle.tolist(), puzzles.solution.tolist(), strict=True)
    ]
    (tmp_path / "puzzles.csv").write_text("\n".join(["Puzzle,Solution", *rows, ""]))
    sudoku.base_model().save_pretrained(tmp_path / "run")
    metrics = {"solved": 0.5, "reward_calls": 1024}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({**metrics, "example": "a grid"}))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"options": {"null_arm": True}}))
    arguments = ["runs", str(tmp_path / "run"), "--json", str(tmp_path / "runs.json")]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == [{**metrics, "null_arm": True}]
    assert main([*arguments, "--puzzles", str(tmp_path / "puzzles.csv")]) == 0
    told = json.loads((tmp_path / "runs.json").read_text())
    assert {"dam", "torch", "python", "device"} <= told.keys() and told["reward_calls"] == [1024]
    run, base = told["results"]
    assert run == {**metrics, "null_arm": True, **{key: base[key] for key in ("other_file", "other_file_unseen")}}
    assert base["base"] is True and base["other_file"]["puzzles"] == 12 and base["other_file_unseen"]["puzzles"] == 6


# ---- chains of moves


def test_the_three_chains_are_the_published_ones():
    """Numbers of states, the published ones by their formula, and of the smallest the distance of base and target."""
    case = moves.occupation()
    assert len(case.space.states) == 35
    base = case.space.law(case.process.base, case.initial, [0.0, 1.0])
    # Published: 0.4176 of an untrained network, in 128 steps of one jump at most.
    assert abs(float((base - case.target).abs().sum() / 2) - 0.4176) < 0.002
    optimum = base * case.rewards.exp()
    torch.testing.assert_close(optimum / optimum.sum(), case.target)
    assert len(moves.ising(side=2).space.states) == math.comb(4, 2)
    small = moves.potts(length=5, labelled=2)
    assert len(small.space.states) == math.comb(5, 2) * 3**2 and math.comb(14, 4) * 3**4 == 81_081
    # Out of a state there are 2 x 2 relabellings and 2 x 3 x 3 new places, at equal rates that sum up to 10.
    listed = small.process.moves(torch.tensor([[1, 0, 3, 0, 0]]))
    assert listed.neighbours.shape[1] == 22 and math.isclose(float(listed.rate.sum()), 10.0, rel_tol=1e-12)
    apart = (listed.neighbours != torch.tensor([1, 0, 3, 0, 0])).sum(dim=2)[0]
    assert apart.tolist() == [1] * 4 + [2] * 18 and bool(((listed.neighbours != 0).sum(dim=2) == 2).all())


@pytest.mark.parametrize("case", [moves.potts(length=5, labelled=2), moves.occupation(sites=3, particles=3)])
def test_potentials_differ_by_the_sum_over_all_pairs(case):
    """W(y) - W(x), of one changed site or two, by a sum over pairs; n as the network gives it."""
    torch.manual_seed(0)
    model, time = case.network(4), 0.3
    states, least = case.space.states[::5], int(case.vacant)
    length, size = len(case.start), case.size - least
    basis = torch.tensor([(2 * time - 1) ** n for n in range(model.degree)])
    listed = case.process.moves(states)
    changes = moves.changed(states, listed.neighbours, case.size, case.vacant)
    given = (states, torch.full((len(states),), time, dtype=torch.float64), *changes)
    with torch.no_grad():
        assert float(model(*given).abs().max()) == 0.0
        for parameter in (model.field, model.pair, model.network[-1].weight):
            parameter.copy_(torch.randn(parameter.shape))
    field, pair = (torch.tensordot(basis, part, dims=1) for part in (model.field, model.pair))

    def present(x):
        return [i * size + int(v) - least for i, v in enumerate(x) if v >= least]

    def potential(x):
        between = sum(pair[a, b] for a in present(x) for b in present(x) if a // size != b // size)
        return field[present(x)].sum() + between

    def by_network(x, y):
        here = torch.zeros(length * size)
        here[present(x)] = 1.0
        gone = sorted(set(present(x)) - set(present(y)))
        new = sorted(set(present(y)) - set(present(x)))
        n = model.network(torch.cat((here, basis)))
        return n[new].sum() - n[gone].sum()

    found = model(*given)
    for row, state in enumerate(states):
        for slot in (listed.rate[row] > 0).nonzero()[:, 0].tolist():
            there = listed.neighbours[row, slot]
            expected = potential(there) - potential(state) + by_network(state, there)
            torch.testing.assert_close(found[row, slot], expected, rtol=1e-4, atol=1e-4)  # 50 numbers in float32


@pytest.mark.parametrize("case", [moves.potts(length=5, labelled=2), moves.occupation(sites=3, particles=3)])
def test_what_learners_play_with_is_the_chain_of_the_case(case):
    """Numbers and looked up changes against states and their own: the same law of a network that is not 0."""
    torch.manual_seed(0)
    model = case.network(4)
    with torch.no_grad():
        model.network[-1].weight.normal_()
    assert [part.shape[1] for part in case.changes] == ([1, 1] if case.vacant else [2, 2])

    def of_states(states, time, listed):
        return model(states, time, *moves.changed(states, listed.neighbours, case.size, case.vacant))

    expected = case.space.law(of_states, case.initial, moves.TIMES)
    # 16 intervals leave out 1e-7 each; rates are float32.
    torch.testing.assert_close(case.law(case.model(model)), expected, rtol=0, atol=3e-6)
    assert torch.equal(case.space.states[case.of_start(2)[:, 0]], torch.tensor([case.start] * 2))


def test_correlations_tell_apart_what_no_symmetry_does():
    """States of 4 x 4 spins are of one class exactly if a symmetry of the lattice and the start leads from one to the
    other, by the least of the numbers that their images have.
    """
    start = torch.tensor(moves.ising().start)
    group = invariants.symmetries(4, start.tolist())
    # Shifts and mirrors along rows, mirrors across them, and a shift by two across them with the colours exchanged.
    assert len(group) == 4 * 2 * 2 * 2
    for image, sign in group:
        assert torch.equal(sign * (2 * start - 1)[image], 2 * start - 1)
    up = torch.tensor(list(itertools.combinations(range(16), 8)))
    states = torch.zeros(len(up), 16, dtype=torch.int64).scatter_(1, up, 1)
    place = 2 ** torch.arange(16)
    least = torch.stack([(states if sign == 1 else 1 - states)[:, image] @ place for image, sign in group]).amin(dim=0)
    known = invariants.correlations(states, group)
    assert len(known.unique(dim=0)) == len(least.unique())
    assert len(torch.cat((known, least[:, None]), dim=1).unique(dim=0)) == len(least.unique())


def test_a_potential_of_invariants_is_one():
    """What the network gives for a move is the difference of its polynomials at where it leads to and starts from."""
    case, time = moves.ising(side=2), 0.3
    torch.manual_seed(0)
    network, number = case.network(4), torch.arange(6)
    given = (number, torch.full((6,), time, dtype=torch.float64))
    with torch.no_grad():
        assert float(network(*given).abs().max()) == 0.0
        network.network[-1].weight.normal_(std=4.0)
        coefficients = network.network(network.correlations)[network.of]
        found = network(*given)
    potential = sum((2 * time - 1) ** k * coefficients[:, k] for k in range(network.degree))
    assert float(potential.std()) > 0.1  # else nothing is tested
    # Rounding of float32 sums of six terms.
    torch.testing.assert_close(found, potential[case.space.to] - potential[:, None], rtol=1e-5, atol=1e-5)


def test_fits_to_the_optimum_end_at_it():
    """On 6 states a potential of pairs is any function of them, and its law the one of the optimum's rates, in 16
    intervals 0.011 from the target; so does the case's network come there by steps on the divergence of paths.
    """
    case = moves.ising(side=2)
    known = attainable.optimum(case)
    rates = case.law(attainable.differences(case, known.log_value))
    pairs = case.law(attainable.differences(case, attainable.pairs(case, known)))
    torch.testing.assert_close(pairs, rates, rtol=0, atol=1e-6)
    assert float((rates - case.target).abs().sum() / 2) < 0.015
    torch.manual_seed(0)
    options = attainable.Options(steps=400, states=64, width=16, learning_rate=1e-2)
    fitted = attainable.fit(case, case.network(options.width), known, options)
    off = [float((case.law(model) - rates).abs().sum() / 2) for model in (case.process.base, case.model(fitted))]
    assert off[1] < 0.1 * off[0]


def test_steps_on_the_variance_shrink_it():
    """All trajectories of a round three times: their log weights by the network as it is then spread less."""
    case, options = moves.occupation(sites=3, particles=3), moves.Options(batch=256, together=16, width=8)
    torch.manual_seed(0)
    network = case.network(options.width)
    process, generator = case.numbered.process, torch.Generator().manual_seed(0)
    path = moves.gillespie(process, process.base, case.of_start(options.batch), times=moves.TIMES, seed=0)

    def spread():
        with torch.no_grad():
            log_weight = moves.matching.log_ratio(process, case.model(network), path)
        return float((log_weight + case.rewards[path.final[:, 0]]).std())

    before, fit = spread(), moves.learners.Fit(network, learning_rate=5e-3)
    steps = list(moves.variance_steps(case, network, options, path, generator))
    assert sum(calls for _, calls in steps) == int((path.exposure > 0).sum())
    for n in range(3):
        for loss, _ in moves.variance_steps(case, network, options, path, generator):
            fit.step(loss, n / 3)
    assert spread() < 0.6 * before


def test_the_study_of_moves(tmp_path):
    """In two rounds the trajectories together have come nearer; the published estimator's budget is counted alike."""
    small = ["--rounds", "2", "--batch", "64", "--steps", "2", "--events", "128", "--width", "8", "--seeds", "1"]
    assert main(["moves", *small, "--output", str(tmp_path)]) == 0
    found = table("moves-occupation", tmp_path)
    assert all(result["curve"][-1]["reward_calls"] == 128 for result in found.values())
    assert found["path, baseline"]["tv"] < 0.4 < found["first_jump_one, state"]["tv"] + 0.05
    # The same rounds as long as a step is not the whole way.
    assert found["path, then variance"]["curve"][0]["tv"] < 0.4
    assert (tmp_path / "moves-occupation.png").stat().st_size > 10_000


def test_every_study_is_a_subcommand_with_options_of_its_own(capsys):
    own = {"grid": "--density", "ising": "--beta", "sudoku": "--calls", "orders": "--steps", "countdown": "--calls"}
    own.update(moves="--case", runs="--puzzles", potts="--colours", exact="--task")
    own.update(ablations="--repeats", chain="--positions", guidance="--samples")
    for study, option in own.items():
        with pytest.raises(SystemExit) as stop:
            main([study, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and shown.startswith(f"usage: python -m experiments {study}") and option in shown
    done = fresh.main("experiments", "--help")
    assert done.returncode == 0 and all(f"\n    {study}  " in done.stdout for study in own), done.stdout + done.stderr


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="first_jump_one, state: the batch must be a multiple of 16; got 100"):
        learners.learner("first_jump_one, state", Grid("pinwheel", 5), batch=100, seed=0)
    with pytest.raises(ValueError, match="analytic adjoint: the batch must be a multiple of 8; got 4"):
        learners.learner("analytic adjoint", Grid("pinwheel", 5), batch=4, seed=0)
    with pytest.raises(ValueError, match="posterior: the batch must be a multiple of 64; got 100"):
        learners.learner("posterior", Grid("pinwheel", 5), batch=100, size=64, seed=0)


@pytest.mark.parametrize(("name", "cost"), [("posterior", 2 + 1), ("log-variance", 2 + 2), ("DMPO", 2 + 4)])
def test_runs_end_at_a_number_of_network_calls(name, cost):
    """Of two positions; each trajectory and each state of a gradient step is one. Its own rounds only."""
    options = estimators.Options(rounds=1, batch=32, network_calls=32 * cost * 3 + 5)
    last = estimators.run_grid(Grid("pinwheel", 5), "masked", options, 1, name, 0)["curve"][-1]
    assert (last["network_calls"], last["reward_calls"]) == (32 * cost * 3, 32 * 3)


def test_too_few_network_calls_are_refused():
    options = estimators.Options(batch=32, network_calls=95)
    with pytest.raises(ValueError, match="network_calls must be at least 96, a round of Group; got 95"):
        estimators.run_grid(Grid("pinwheel", 5), "masked", options, 1, "posterior", 0)
    with pytest.raises(ValueError, match="ValueGuidance asks no network: give it rounds, not network calls"):
        estimators.run_grid(Grid("pinwheel", 5), "masked", options, 1, "svdd", 0)


def test_reward_calls_to_a_level():
    curve = [{"reward_calls": n, "kl": kl} for n, kl in ((1, 5.0), (2, 0.9), (3, 1.1), (4, 0.8), (5, 0.5))]
    assert estimators.reached(curve, "kl", 1.0) == 4 and estimators.reached(curve, "kl", 10.0) == 1
    assert estimators.reached(curve, "kl", 0.1) == math.inf
    assert estimators.checked(3000) >= {14, 3000} and len(estimators.checked(3000)) > 12


def test_divergences_within_seconds():
    """The last evaluation within the limit, a median over seeds; none where a seed has no evaluation by then."""
    points = ((0.2, 4.0), (0.6, 2.0), (0.9, 1.0))
    results = [
        {"learner": "d1", "curve": [{"core_seconds": s * slow, "kl": kl} for s, kl in points]}
        for slow in (1.0, 1.5, 2.0)
    ]
    (row,) = estimators.seconds_table(results).splitlines()[2:]
    assert row == "| d1 | 1.35 (0.90 to 1.80) | - | 4 (4 to 4) | 2 (1 to 4) | 1 (1 to 1) |"


def test_a_learner_of_another_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ising", "--learners", "svdd"])
    assert "no learner 'svdd' in this study; there are path, baseline;" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["seeds", "processes"])
def test_no_runs_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main(["ising", f"--{option}", "0"])
    assert f"--{option} must be at least 1; got 0" in capsys.readouterr().err
