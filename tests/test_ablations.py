"""The ablations: what is enumerated is what the oracle has, and errors of targets are those of their definitions."""

import functools
import json
from unittest.mock import Mock

import pytest
import torch

from dam.ctmc import enumeration
from experiments import ablations, guidance, tables
from experiments.__main__ import main
from experiments.densities import Ising
from tests import oracle

Z = 5.5  # false alarm of a normal score: below 1e-7 each
N, V = ablations.POSITIONS, ablations.TOKENS


@pytest.fixture(scope="module")
def known():
    return ablations.Known.made()


def joint(law):
    return law.view((V,) * N)


def test_conditionals_and_the_target_are_those_of_the_oracle(known):
    base, best = ablations.laws()
    cost = -6 * oracle.neighbour_cost(joint(base), seed=19)
    torch.testing.assert_close(joint(base), oracle.random_joint(N, V, seed=18), rtol=1e-12, atol=0)
    torch.testing.assert_close(joint(best), oracle.tilted(joint(base), cost), rtol=1e-10, atol=0)
    found = tables.conditionals(base, N, V).exp()
    for state in (ablations.STATE, torch.tensor([V, 0, 3, V, 2]), torch.full((N,), V)):
        masked = state == V
        expected = oracle.conditional(joint(base), state)
        at = found[enumeration.index_of(state, V + 1)]
        torch.testing.assert_close(at[masked], expected[masked], rtol=1e-10, atol=0)
    masked = ablations.MASKED
    expected = oracle.conditional(joint(best), ablations.STATE)[masked] / len(masked)
    torch.testing.assert_close(known.target[masked], expected, rtol=1e-9, atol=0)
    assert float(known.target.sum()) == pytest.approx(1, rel=1e-12)


def test_trajectories_are_all_there_are(known):
    """Each law of paths sums to 1, and path weights and rewards make p* of every one of them."""
    best = ablations.laws()[1]
    for name, proposal in known.proposals.items():
        assert float(proposal.log_prob.exp().sum()) == pytest.approx(1, rel=1e-12), name
        log_weight = proposal.log_prob + proposal.log_ratio + proposal.reward
        share = torch.softmax(log_weight, dim=0)
        law = torch.zeros(V**N, dtype=torch.float64).index_add_(0, enumeration.index_of(proposal.final, V), share)
        there = (enumeration.states(V, N)[:, 2] == ablations.STATE[2]).double()
        torch.testing.assert_close(law, best * there / (best @ there), rtol=1e-9, atol=1e-300)
        used = (proposal.final == ablations.STATE) | (ablations.STATE == V)
        assert bool(used.all()) and bool((proposal.first[:, None] == ablations.MASKED).any(dim=1).all())


def test_errors_are_bias_and_variance(known):
    """The squared error is both together. No bias at the optimum, where weights are all 1; one at the base."""
    for sampler, biased in (("the base", True), ("the optimum", False)):
        found = ablations.errors("posterior", known, known.proposals[sampler], 4, 4000)
        assert found["error"] == pytest.approx(found["bias"] + found["variance"], rel=1e-2)
        assert (found["bias"] > 5 * found["spread"]) == biased and found["bias"] > -5 * found["spread"]


def test_without_path_weights_the_reward_counts_twice(known):
    """From the optimum the limit of many trajectories is p* exp(r), here within its noise at K = 1024."""
    law = ablations.laws()[1] * ablations.reward_of(enumeration.states(V, N)).exp()
    twice = ablations.given(tables.conditionals(law / law.sum(), N, V)) / len(ablations.MASKED)
    away = float((twice - known.target).square().sum())
    proposal = known.proposals["the optimum"]
    without = ablations.errors("posterior, no path weights", known, proposal, 1024, 200)
    assert abs(without["bias"] - away) < 0.05 * away + 5 * without["spread"] and away > 1e-3
    assert abs(ablations.errors("posterior", known, proposal, 1024, 200)["bias"]) < 0.05 * away


@pytest.mark.parametrize("name", ["adjoint, known", "adjoint of 7 completions"])
def test_the_adjoint_has_no_bias_but_that_of_its_normaliser(known, name):
    """It falls with the number of jumps."""
    proposal = known.proposals["the base"]
    few, many = (ablations.errors(name, known, proposal, size, 2000) for size in (64, 1024))
    assert many["bias"] < few["bias"] / 3 + 5 * many["spread"]


def test_centred_gradients_have_no_noise_at_the_optimum(known):
    best = known.proposals["the optimum"]
    for name in ablations.GRADIENTS:
        found = ablations.noise(name, best, 16, 200)
        assert (found["variance"] < 1e-24) == (name in ("path, baseline", "log-variance")), name
    away = known.proposals["the base"]
    # What is subtracted has the mean 0: first_jump and path ask for the same.
    difference = ablations.gradients("first_jump", away, 16, 4000) - ablations.gradients(
        "path, baseline", away, 16, 4000
    )
    z = difference.mean(dim=0) / (difference.std(dim=0) / 4000**0.5).clamp(min=1e-9)
    assert float(z.abs().max()) < Z


def test_rounds_without_the_divergence_leave_the_optimum():
    first, second, *_, last = ablations.iterated(8)[1:]
    assert first["kl"] < 1e-12 < 1e-3 < second["kl"] < last["kl"]
    assert first["reward"] < second["reward"] < last["reward"] and last["entropy"] < first["entropy"]


def test_errors_on_a_chain_are_those_of_dense_arrays():
    """Of counts of tokens where the reward is 0, and none of many trajectories where it is not."""
    length, tokens = 3, 5
    model = ablations.Independent(tokens, length)
    law = (model.hidden @ model.weight.t()).detach().double().softmax(dim=1)
    found = ablations.on_chain(tokens, length, positions=3 * 500, size=16, strength=0.0)
    expected = float((law * (1 - law)).sum(dim=1).mean()) / 16
    assert found["error"] == pytest.approx(expected, rel=0.07)  # 1,500 targets of relative deviation 0.5
    assert found["ess"] == pytest.approx(16)
    found = ablations.on_chain(tokens, length, positions=3, size=500, strength=2.0)
    # A sum of squares of deviations of 1 / ESS^(1/2) at most.
    assert found["error"] < 5 / found["ess"] and found["mean_error"] < 5 / found["ess"] ** 0.5


@pytest.mark.full
@pytest.mark.slow
def test_the_study_of_ablations(tmp_path, monkeypatch, capsys):
    """The printed tables are those of the JSON."""
    monkeypatch.setattr(ablations, "SIZES", (4, 16, 64))
    assert main(["ablations", "--repeats", "50", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert ablations.text_of(found) in capsys.readouterr().out
    assert len(found["sizes"]) == 7 * 5 * 3 - 5 and found["repeats"] == 50
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


def test_the_study_of_the_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "VOCABULARIES", (32, 64))
    monkeypatch.setattr(ablations, "LENGTHS", (4,))
    monkeypatch.setattr(ablations.ctypes, "CDLL", Mock())  # it would hold for all tests
    assert main(["chain", "--positions", "16", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "chain.json").read_text())
    assert ablations.text_of_chain(found) in capsys.readouterr().out
    assert [(r["V"], r["L"]) for r in found["results"]] == [(32, 4), (64, 4)] and found["positions"] == 16
    # 4 groups of 16 trajectories; a state has 1 to 4 masks.
    assert all(64 <= r["rows"] <= 256 and r["logits_bytes"] == 4 * r["rows"] * r["V"] for r in found["results"])


def test_the_study_of_guidance(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guidance, "Ising", functools.partial(Ising, 2))
    assert main(["guidance", "--samples", "32", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "guidance.json").read_text())
    assert guidance.text_of(found) in capsys.readouterr().out
    calls = [r["calls_of_a_sample"] for r in found["results"]]
    assert calls == [5 * 4, 20 * 4, 64, 16 * 4, 64 * 4]
    # 2,048 importance weights of the base, whose ESS is 0.31 of their number, have a mean known to 3%.
    assert abs(found["results"][2]["log_z_error"]) < 5 * 0.033
