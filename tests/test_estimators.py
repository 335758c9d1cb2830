"""`python -m benchmarks.estimators`, its small version: the law that is learned, and the order of the estimators."""

import json
import math

import torch

from benchmarks import estimators
from dam.ctmc import enumeration


def test_the_lattice_is_the_ising_model():
    """Neighbours by loops, each pair once for each of its two ways round a lattice of side 2 and more."""
    model = estimators.Ising(side=3, beta=0.4, field=0.2)
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


def test_a_network_that_knows_nothing_has_the_weights_of_the_base():
    """ESS of exp(-beta E) over uniform samples, from its definition."""
    model = estimators.Ising(side=2)
    found = estimators.figures(model, estimators.Network(4), 20_000, seed=0)
    p = model.law()
    expected = 1 / (16 * float(p.square().sum()))
    # 20,000 samples of 16 states: 1% of it.
    assert math.isclose(found["ess"], expected, rel_tol=0.02)
    uniform = float((p - 1 / 16).abs().sum()) / 2
    assert math.isclose(found["tv"][0], uniform, abs_tol=0.02) and found["tv"][1] < 0.03


def test_order_of_the_estimators(tmp_path, capsys):
    """At equal reward calls the posterior is ahead of the published estimator, beyond what seeds differ by (0.01)."""
    arguments = ["ising", "--side", "2", "--calls", "8192", "--groups", "8", "--size", "16", "--samples", "4096"]
    chosen = ["--estimators", "posterior", "first_jump_one", "--seeds", "1", "--output", str(tmp_path)]
    assert estimators.main([*arguments, *chosen]) == 0
    result = json.loads((tmp_path / "ising.json").read_text())
    posterior, published = result["results"]
    assert posterior["ess"] > 0.93 and published["ess"] < posterior["ess"] - 0.1
    assert posterior["tv"][0] < published["tv"][0] and posterior["reward_calls"] == published["reward_calls"] == 8192
    assert len(posterior["curve"]) == 8 and (tmp_path / "ising.png").stat().st_size > 10_000
    assert "| posterior | 0 | 8,192 |" in capsys.readouterr().out
