"""Tasks with an exact answer: what is called exact, held to enumeration, and what is learned of it."""

import dataclasses
import functools
import itertools
import json
import math

import pytest
import torch

from dam.ctmc import enumeration
from dam.rollout import rollout
from experiments import estimators, learners
from experiments.__main__ import main
from experiments.exact import automata, dna, graphs, learner, maze, study
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each


def test_states_are_in_the_order_of_loops():
    assert torch.equal(enumeration.states(3, 4), oracle.sequences(4, 3))


# ---- graphs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("made", [graphs.IndependentSet, graphs.Cut])
def test_rewards_and_optima_of_graphs(made, seed):
    """Rewards by loops over edges; the optimum by the integer programme, by enumeration, and no heuristic above it."""
    task = made(graphs.random_edges("erdos-renyi", 9, 4, seed), 9)
    for number in range(0, 512, 37):
        x = enumeration.states(2, 9)[number]
        inside = sum(int(x[i] and x[j]) for i, j in task.edges)
        cut = sum(int(x[i] != x[j]) for i, j in task.edges)
        assert task.rewards[number] == (int(x.sum()) - 2 * inside if made is graphs.IndependentSet else cut)
    value, subset = task.optimum()
    assert value == task.rewards.max() == task.reward(subset[None])[0]
    found = torch.stack([task.heuristic(k) for k in range(20)])
    assert value >= task.reward(found).max() > task.rewards.mean()
    if made is graphs.IndependentSet:
        assert task.figures(found)["independent"] == 1.0 and task.figures(subset[None])["independent"] == 1.0
        assert bool((task.within(enumeration.states(2, 9)[task.rewards == value]) == 0).all())


def test_figures_of_a_law_are_those_of_its_samples():
    """On average over all pairs of samples of a graph with three nodes, each as often as it is drawn."""
    task = graphs.IndependentSet(((0, 1), (1, 2)), 3, beta=1.0)
    law, every = task.law(), enumeration.states(2, 3)
    assert math.isclose(task.log_z, math.log(float((task.rewards.exp() / 8).sum())), rel_tol=1e-12)
    mean = dict.fromkeys(task.columns, 0.0)
    for i, j in itertools.product(range(8), repeat=2):
        for name, value in task.figures(every[[i, j]]).items():
            mean[name] += float(law[i] * law[j]) * value
    assert task.of_law(law, samples=2) == pytest.approx(mean, rel=1e-12)


def test_random_graphs():
    degree = torch.bincount(torch.tensor(graphs.random_edges("regular", 10, 3, 0)).flatten())
    assert degree.tolist() == [3] * 10
    edges = graphs.random_edges("erdos-renyi", 10, 3, 0)
    assert all(i < j for i, j in edges) and len(set(edges)) == len(edges)
    with pytest.raises(ValueError, match="there are the graphs erdos-renyi, regular; got 'tree'"):
        graphs.random_edges("tree", 10, 3, 0)
    with pytest.raises(ValueError, match="by enumeration of at most 20 nodes; got 21"):
        graphs.Cut(((0, 1),), 21).law()


def test_an_integer_programme_without_a_solution_is_an_error():
    with pytest.raises(RuntimeError, match="the integer programme was not solved"):
        graphs.solved(torch.ones(1).numpy(), torch.ones(1, 1).numpy(), -torch.ones(1).numpy())


# ---- laws by automata


def walk():
    """A walk between the ends of a line of four, that rests at the right one: states that one, two or three lead to."""
    prob = torch.tensor([[0, 0, 1], [0.3, 0, 0.7], [0.5, 0.1, 0.4], [0, 1, 0]], dtype=torch.float64)
    to = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 3], [3, 3, 3]])
    return automata.Automaton(1, to, prob[None], 5)


def chain():
    generator = torch.Generator().manual_seed(0)
    prob = torch.rand((9, 3), generator=generator, dtype=torch.float64) + 0.1
    return automata.markov(prob / prob.sum(dim=1, keepdim=True), 5, 3)


def tilted():
    """One with other probabilities at each time."""
    score = torch.randn((5, 27, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return chain().tilted(score)[0]


LAWS = {"walk": walk, "chain": chain, "tilted": tilted}


@pytest.mark.parametrize("name", LAWS)
def test_conditionals_of_an_automaton(name):
    """Given any tokens, against sums over all sequences."""
    law, every = LAWS[name](), oracle.sequences(5, 3)
    p = law.log_prob(every).exp()
    assert math.isclose(float(p.sum()), 1.0, rel_tol=1e-12)
    generator = torch.Generator().manual_seed(2)
    known = every[torch.multinomial(p, 40, replacement=True, generator=generator)]
    states = torch.where(torch.rand(known.shape, generator=generator) < 0.6, 3, known)
    found = law.log_conditionals(states).exp()
    for state, given in zip(states, found, strict=True):
        for i in range(5):
            others = torch.arange(5) != i
            fits = ((state == 3) | (every == state) | ~others).all(dim=1)
            mass = torch.stack([p[fits & (every[:, i] == v)].sum() for v in range(3)])
            torch.testing.assert_close(given[i], mass / mass.sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_what_is_known_of_the_states_of_an_automaton(name):
    """In front of each token given the others, and at the end given all, against sums over all sequences."""
    law, every = LAWS[name](), oracle.sequences(5, 3)
    p, through = law.log_prob(every).exp(), law.states(every)
    generator = torch.Generator().manual_seed(2)
    known = every[torch.multinomial(p, 10, replacement=True, generator=generator)]
    states = torch.where(torch.rand(known.shape, generator=generator) < 0.6, 3, known)
    for state, given in zip(states, law.given(states)[1], strict=True):
        for i in range(6):
            fits = ((state == 3) | (every == state) | (torch.arange(5) == i)).all(dim=1)
            mass = torch.zeros(len(law.to), dtype=torch.float64).index_add_(0, through[fits, i], p[fits])
            torch.testing.assert_close(given[i], mass / mass.sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_a_tilt_of_an_automaton(name):
    """log Z, the law, means and the KL, against sums over all sequences; samples by a chi-square."""
    law, every = LAWS[name](), oracle.sequences(5, 3)
    score = torch.randn((5, *law.to.shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states = law.states(every)
    total = torch.stack([score[t, states[:, t], every[:, t]] for t in range(5)]).sum(dim=0)
    log_p = law.log_prob(every)
    new, log_z = law.tilted(score)
    assert math.isclose(log_z, float((log_p + total).logsumexp(dim=0)), rel_tol=1e-10)
    q = new.log_prob(every).exp()
    torch.testing.assert_close(q, (log_p + total - log_z).exp(), rtol=1e-10, atol=1e-14)
    assert math.isclose(new.expectation(score), float(q @ total), rel_tol=1e-10)
    assert math.isclose(automata.kl(new, law), float(q @ (total - log_z)), rel_tol=1e-9)
    drawn = new.sample(20_000, torch.Generator().manual_seed(4))
    counts = torch.bincount(enumeration.index_of(drawn, 3), minlength=243).double()
    likely = q * 20_000 > 5  # a chi-square is one of cells that have a few
    pooled = [torch.cat((of[likely], of[~likely].sum()[None])) for of in (counts, q)]
    kept = pooled[1] > 0
    assert abs(oracle.chi_square_z(pooled[0][kept], pooled[1][kept])) < Z


def test_states_that_are_not_the_last_tokens_are_no_markov_chain():
    law = walk()
    with pytest.raises(ValueError, match=r"Markov: token v must lead from state s to \(s V \+ v\) mod V\^m"):
        automata.Markov(law.start, law.to, law.prob, law.length)


# ---- binding sites


@pytest.fixture(scope="module")
def sites():
    return dna.Sites(0, length=8)


@pytest.fixture(scope="module")
def words():
    return enumeration.states(4, 8)


def test_site_probabilities():
    """Of windows by loops over their letters."""
    consensus, kept = torch.tensor([0, 3, 1, 2, 2, 0]), [0.5, 0.9, 0.7, 0.85, 0.6, 0.8]
    found = dna.site_probabilities(consensus, kept, threshold=1.5)
    for number in range(0, 4096, 173):
        window = enumeration.states(4, 6)[number].tolist()
        score = sum(
            math.log(4 * (p if v == c else (1 - p) / 3))
            for v, c, p in zip(window, consensus.tolist(), kept, strict=True)
        )
        assert math.isclose(float(found[number]), 1 / (1 + math.exp(1.5 - score)), rel_tol=1e-12)
    assert int(found.argmax()) == int(enumeration.index_of(consensus, 4))


def test_the_optimum_of_binding_sites(sites, words):
    """log Z, p* and all its figures, against the 65,536 sequences of eight letters."""
    log_base, reward = sites.log_base(words), sites.reward(words)
    for word in range(0, 65_536, 9973):
        windows = [enumeration.index_of(words[word, i : i + 6], 4) for i in range(3)]
        assert math.isclose(float(reward[word]), sum(float(sites.site[w]) for w in windows), rel_tol=1e-12)
    score = log_base + reward / sites.beta
    # The base that networks are asked with is in float32.
    assert math.isclose(sites.log_z, float(score.logsumexp(dim=0)), rel_tol=1e-5)
    p = torch.softmax(score, dim=0)
    torch.testing.assert_close(sites.optimum.log_prob(words).exp(), p, rtol=1e-5, atol=0)
    exact = sites.of_law(sites.optimum)
    held_out = sum(sites.held_out[enumeration.index_of(words[:, i : i + 6], 4)] for i in range(3))
    means = {"reward": reward, "held_out": held_out, "log_base": log_base / 8}
    for name, values in means.items():
        assert math.isclose(exact[name], float(p @ values), rel_tol=1e-5)
    counts = [enumeration.index_of(words[:, i : i + 3], 4) for i in range(6)]
    three_mers = sum(torch.zeros(64, dtype=torch.float64).index_add_(0, index, p) for index in counts) / 6
    torch.testing.assert_close(sites.three_mers(sites.optimum), three_mers, rtol=1e-5, atol=1e-12)
    assert exact["three_mers"] == 1.0 and -1 < exact["three_mers_base"] < 0.99


def test_figures_of_sampled_sequences(sites):
    """Those of p*'s own samples are its exact ones, within their noise."""
    drawn = sites.optimum.sample(20_000, torch.Generator().manual_seed(5))
    found, exact = sites.figures(drawn), sites.of_law(sites.optimum)
    deviation = float(sites.reward(drawn).std() / 20_000**0.5)
    assert abs(found["reward"] - exact["reward"]) < Z * deviation
    # 120,000 words of three letters: frequencies are right to a relative error of a few percent.
    assert found["three_mers"] > 0.995 and abs(found["three_mers_base"] - exact["three_mers_base"]) < 0.02
    best = sites.best_of(16, 200)
    assert best.shape == (200, 8) and sites.reward(best).mean() > sites.references(10)["the base"]["reward"] * 3


def test_a_network_begins_as_the_base(sites):
    """Its conditionals, and the log-probabilities of its trajectories by any order, up to float32."""
    denoiser = sites.denoiser()
    states = sites.base.sample(30, torch.Generator().manual_seed(6))
    states[torch.rand(states.shape, generator=torch.Generator().manual_seed(7)) < 0.5] = 4
    logits = denoiser.head().logits(denoiser.hidden_states(states).detach())
    torch.testing.assert_close(logits.log_softmax(dim=2), sites.base.log_conditionals(states), rtol=0, atol=1e-5)
    for order in ("random", "left-to-right"):
        model = learners.DenoiserModel(sites.denoiser(), sites, learning_rate=1e-3)
        path = rollout(denoiser, model.blank(50), model.process, order=order, seed=1)
        torch.testing.assert_close(path.log_prob.sum(dim=1).double(), sites.log_base(path.final), rtol=0, atol=1e-4)


# ---- a maze


@pytest.fixture(scope="module")
def tiny():
    """Nine cells, six moves, and two ways that are as short."""
    return maze.Maze(0, side=3, loops=2, length=6, beta=0.7)


@functools.cache
def walked(task):
    """By loops over all plans: how likely each is, 0 if a wall is in its way, and its reward."""
    probability, reward, goal = [], [], task.goal
    for plan in oracle.sequences(6, 5).tolist():
        cell, p, r = (0, 0), 1.0, 0
        for move in plan:
            here = [0] if cell == goal else [0, *(m for m in range(1, 5) if task.maze.has_edge(cell, moved(cell, m)))]
            p *= (move in here) / len(here)
            cell = moved(cell, move)
            r += cell == goal
        probability.append(p)
        reward.append(r - abs(goal[0] - cell[0]) - abs(goal[1] - cell[1]))
    return torch.tensor([probability, reward], dtype=torch.float64)


def moved(cell, move):
    down, right = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))[move]
    return cell[0] + down, cell[1] + right


def test_plans_through_a_maze(tiny):
    """Rewards and the base of all 15,625; log Z, p* and its figures are sums over them."""
    every, (base, reward) = oracle.sequences(6, 5), walked(tiny)
    free = base > 0
    assert math.isclose(float(base.sum()), 1.0, rel_tol=1e-12) and 0.01 < free.double().mean() < 0.2
    torch.testing.assert_close(tiny.log_base(every).exp(), base, rtol=1e-6, atol=0)  # of a float32 chain
    assert torch.equal(tiny.reward(every[free]), reward[free])
    score = base.log() + reward / tiny.beta
    assert math.isclose(tiny.log_z, float(score.logsumexp(dim=0)), rel_tol=1e-5)
    p = torch.softmax(score, dim=0)
    torch.testing.assert_close(tiny.optimum.log_prob(every).exp(), p, rtol=1e-5, atol=0)
    best = reward == reward[free].max()
    assert {tuple(plan) for plan in tiny.shortest.tolist()} == {tuple(plan) for plan in every[best & free].tolist()}
    there = torch.tensor([functools.reduce(moved, plan, (0, 0)) == tiny.goal for plan in every.tolist()])
    exact = tiny.of_law(tiny.optimum, samples=7)
    expected = {
        "reward": p[free] @ reward[free],
        "success": p[there & free].sum(),
        "shortest": p[best & free].sum(),
        "found": (1 - (1 - p[best & free]) ** 7).mean(),
    }
    assert exact == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_figures_of_plans_are_those_of_their_law(tiny):
    """Of all plans that are free of walls, each once: shares are counts."""
    every, (base, reward) = oracle.sequences(6, 5), walked(tiny)
    found = tiny.figures(every[base > 0])
    count = int((base > 0).sum())
    assert found["shortest"] == pytest.approx(len(tiny.shortest) / count) and found["found"] == 1.0
    assert found["reward"] == pytest.approx(float(reward[base > 0].mean()))
    assert tiny.figures(tiny.shortest[:1])["found"] == 1 / len(tiny.shortest)


@pytest.mark.parametrize("seed", range(3))
def test_classical_plans(seed):
    """A* finds one of the plans that breadth-first search finds; walls are where the tree and its loops have none."""
    task = maze.Maze(seed)
    assert bool((task.shortest == task.a_star()).all(dim=1).any())
    assert len(task.shortest.unique(dim=0)) == len(task.shortest)
    assert task.maze.number_of_edges() == 15 + task.loops
    found = task.references(100)
    assert found["A*, its one plan"]["reward"] == found["breadth-first search, all plans"]["reward"]
    assert found["p*"]["reward"] < found["A*, its one plan"]["reward"] and found["the base"]["success"] < 0.1


def test_mazes_that_cannot_be():
    with pytest.raises(ValueError, match="of 3 x 3 cells a tree leaves 4 walls; got 5 loops"):
        maze.random_maze(3, 5, 0)
    with pytest.raises(ValueError, match="the goal is 4 moves away, and a plan has 3"):
        _ = maze.Maze(0, side=3, loops=4, length=3).shortest


def test_a_planner_begins_as_the_random_walk(tiny):
    """Its trajectories cross no wall, and are as likely as the walk has them, up to float32."""
    model = learners.DenoiserModel(tiny.denoiser(), tiny, learning_rate=1e-3)
    path = model.sampled(model.blank(200), seed=1)
    torch.testing.assert_close(path.log_prob.sum(dim=1).double(), tiny.log_base(path.final), rtol=0, atol=1e-4)


# ---- the learner that keeps outcomes


def kept(task, batch, **options):
    return learner.Kept(task, batch=batch, steps=2, seed=0, **options)


def test_kept_outcomes_are_weighed_toward_the_law_of_the_tilt():
    """Those of two rounds of the base: sums of their weights, by outcome, within noise of p_a."""
    task = small(0)
    model = learners.DenoiserModel(task.denoiser(), task, learning_rate=1e-3)
    by = kept(task, 20_000)
    for n in range(2):
        by.round(model, n, 0.0)
    assert 0.1 < by.tilt < 1
    weight, final = by.weights().flatten() / by.weights().sum(), by.final.flatten(0, 1).long()
    found = torch.zeros(64, dtype=torch.float64).index_add_(0, enumeration.index_of(final, 2), weight)
    law = torch.softmax(by.tilt * task.rewards / task.beta, dim=0)
    # Shares of 40,000 draws from 64 outcomes, at a probability of 1/64 each, times what they weigh.
    deviation = law * (63 / 40_000) ** 0.5
    assert float(((found - law) / deviation).abs().max()) < Z


def test_a_reward_is_asked_for_once():
    asked = []

    class Counting(graphs.Cut):
        def reward(self, x):
            asked.append(len(x))
            return super().reward(x)

    task = Counting(small(0).edges, 6)
    model = learners.DenoiserModel(task.denoiser(), task, learning_rate=1e-3)
    by = kept(task, 64)
    for n in range(4):
        played = by.round(model, n, n / 4 + 0.2)
        # Of paths a state for each jump, looked at once for its weight and once for the loss.
        assert played.network_calls == 64 * 6 + (2 * by.states if n < 2 else 2 * 64 * 6)
    assert asked == [64] * 4


def test_at_the_optimum_the_variance_asks_for_nothing(sites):
    """Without a reward that is the base, which the model begins as, whatever the order of the path."""
    task = dataclasses.replace(sites, beta=1e9)
    model = learners.DenoiserModel(task.denoiser(), task, learning_rate=1e-3)
    by = kept(task, 64, late=0.5, positions=512)
    by.round(model, 0, 0.0)
    asked = [targets.weight.abs().max() for targets in by.round(model, 1, 0.9).steps]
    # Logarithms of eight jumps in float32; the sequences' own differ by several.
    assert len(asked) == 2 and max(asked) < 1e-4 and sites.log_base(by.final.flatten(0, 1).long()).std() > 1


# ---- the study


def small(seed):
    return graphs.Cut(graphs.random_edges("regular", 6, 3, seed), 6, beta=0.5)


@pytest.mark.parametrize(
    ("name", "least", "most"), [(learner.KEPT, -0.1, 0.1), (learner.STEPPED, -0.1, 0.3), (learner.NULL, 3.0, 10.0)]
)
def test_what_is_learned_is_the_optimum(monkeypatch, name, least, most):
    """The complete bipartite graph of three and three: of a divergence of 3.3 the learners leave 0.02, in a mean over
    samples that can be below 0; weights of other outcomes lead it astray, to 5.6.
    """
    options = estimators.Options(rounds=20, batch=128, steps=4, learning_rate=1e-2, power=1.0)
    monkeypatch.setitem(study.CASES, "small", study.Case("small", small, options, 256))
    found = study.run("small", options, name, seed=1)
    law = small(1).law()
    assert 3.3 < float(torch.xlogy(law, law * 64).sum()) < 3.4
    assert least < found["figures"]["kl"] < most
    last = found["curve"][-1]
    assert last["reward_calls"] == 20 * 128 and last["gained"] == pytest.approx(float(name != learner.NULL), abs=0.2)


def test_figures_of_a_model_that_is_the_base(sites):
    """Its KL and log Z, by samples, are the exact ones within their noise: 0.003 and 0.03; log Z is 0.178."""
    task = dataclasses.replace(sites, beta=0.2)
    model = learners.DenoiserModel(task.denoiser(), task, learning_rate=1e-3)
    found = study.figures(task, model, 4000, seed=0)
    assert found["kl"] == pytest.approx(automata.kl(task._long, task.optimum), abs=0.02)
    assert abs(found["log_z_error"]) < 0.15 < task.log_z and 0.05 < found["ess"] < 0.5


def test_the_study_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(study.CASES, "dna", dataclasses.replace(study.CASES["dna"], samples=64))
    arguments = ["exact", "--task", "dna", "--rounds", "2", "--batch", "32", "--steps", "1", "--seeds", "1"]
    assert main([*arguments, "--learners", "weighted denoising", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "exact-dna.json").read_text())
    assert written["beta"] == dna.Sites.beta and written["length"] == 20 and written["rounds"] == 2
    assert study.table(written["results"], dna.Sites.columns) in capsys.readouterr().out
    for picture in ("exact-dna.png", "exact-dna-reward.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
