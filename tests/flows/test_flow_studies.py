"""`python -m benchmarks.flows`: figures of laws that are known, every learner at its budget, and small runs of each."""

import functools
import json

import pytest
import torch

from dam import flows
from dam.benchmarks.flows import __main__ as entry
from dam.benchmarks.flows import cost, mixtures, samplers
from dam.tasks import sampling

BASE = mixtures.mixture()
FLAT = 1e6  # a beta at which p* is the base


def run(tmp_path, study, *arguments):
    path = tmp_path / f"{study}.json"
    assert entry.main([study, *arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    # What another would need to repeat it; where it was written is nobody's business.
    assert {"dam", "torch", "python", "commit", "device", "instruction_set", "threads", "command"} <= found.keys()
    assert found["command"][:4] == ["python", "-m", "benchmarks.flows", study] and str(tmp_path) not in str(found)
    return found


# ---- the mixtures' figures


def test_the_density_of_an_ode_is_that_of_what_it_draws():
    """log p by the change of variables, against the mixture's own, to the error of 12 steps of fourth order."""
    state = BASE.sample(60, torch.Generator().manual_seed(0))
    start, integral = mixtures.along(BASE.model(mixtures.SDE.schedule), state, 1.0, 0.0)
    found = mixtures.log_normal(start) + integral
    assert float((found - BASE.log_density(state)).abs().mean()) < 2e-3
    back, away = mixtures.along(BASE.model(mixtures.SDE.schedule), start, 0.0, 1.0)
    torch.testing.assert_close(back, state, rtol=0, atol=2e-2)
    torch.testing.assert_close(away, -integral, rtol=0, atol=2e-2)


def test_divergences_are_zero_of_the_base_from_itself_and_of_a_tilt_what_they_are():
    """At no tilt 0; at beta 1 the base's, by sums over a grid; of evenly spread samples as near as they promise."""
    model = BASE.model(mixtures.SDE.schedule)
    flat = mixtures.figures(model, FLAT, seed=0)
    assert abs(flat["kl"]) < 1e-3 and abs(flat["reverse_kl"]) < 1e-3 and flat["modes"] == mixtures.MODES
    grid = mixtures.points()
    base, best = BASE.log_density(grid), mixtures.tilt(1.0, grid)
    kl = lambda p, q: float((p.exp() * (p - q)).sum() * mixtures.cell())  # noqa: E731
    found = mixtures.figures(model, 1.0, seed=0)
    assert found["reverse_kl"] == pytest.approx(kl(best, base), abs=1e-3)
    # A tenth of the standard error of as many independent samples, about 0.8 / sqrt(2048).
    assert found["kl"] == pytest.approx(kl(base, best), abs=2e-3)
    assert found["entropy"] == pytest.approx(mixtures.of_tilt(FLAT)["entropy"], abs=2e-3)


def test_modes_that_are_lost_are_not_counted():
    centres = mixtures.centres()
    expected = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert torch.equal(mixtures.shares(centres), torch.full((4,), 0.25))
    assert mixtures.kept(torch.tensor([0.7, 0.16, 0.09, 0.05]), expected) == 3
    assert mixtures.kept(expected, expected) == 4 and mixtures.kept(torch.tensor([1.0, 0, 0, 0]), expected) == 1


# ---- the learners


@pytest.mark.parametrize("name", mixtures.LEARNERS)
def test_learners_stay_within_their_calls_and_begin_as_the_base(name, monkeypatch):
    monkeypatch.setattr(mixtures.LEARNERS[name], "rows", 8)
    monkeypatch.setattr(mixtures.LEARNERS[name], "steps", 4)
    calls = 2 * mixtures.LEARNERS[name](1.0, 1, 0).calls_of_a_round() + 1
    learner = mixtures.LEARNERS[name](1.0, calls, seed=0)
    state, time = torch.randn(5, 2), torch.linspace(0, 1, 5)
    assert torch.equal(learner.model(state, time), learner.model.base(state, time))
    learner.run()
    assert learner.rounds == 2 and learner.cost.calls == calls - 1  # what a round says it takes, it takes
    assert not torch.equal(learner.model(state, time), learner.model.base(state, time))


def test_a_study_of_mixtures_is_written_as_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "STEPS", 3)
    monkeypatch.setattr(mixtures, "SAMPLES", 64)
    monkeypatch.setattr(mixtures.Learner, "rows", 16)
    names = ["DRaFT", "ReFL"]
    sizes = ["--calls", "40", "--seeds", "2", "--betas", "2", "0.5", "--learners", *names]
    found = run(tmp_path, "mixtures", *sizes)
    assert [(one["learner"], one["seed"], one["beta"]) for one in found["results"]] == [
        (name, seed, beta) for seed in (0, 1) for name in names for beta in (2.0, 0.5)
    ]
    assert {one["calls"] for one in found["results"]} == {32} and found["calls"] == 40
    rows = mixtures.text_of(found).splitlines()
    assert len(rows) == 2 + 2 * (len(names) + 2)
    drafts = sorted(one["kl"] for one in found["results"] if (one["learner"], one["beta"]) == ("DRaFT", 0.5))
    assert f"({drafts[0]:.4f} to {drafts[1]:.4f})" in next(row for row in rows if row.startswith("| 0.5 | DRaFT"))
    assert (tmp_path / "mixtures.png").read_bytes().startswith(b"\x89PNG")


# ---- what a step costs

SMALL = ["--steps", "3", "--rows", "4", "--dimension", "2", "--width", "8", "--repeats", "1", "--no-compiled"]


def test_a_step_and_the_plain_loop_have_the_same_gradients_and_both_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "GROWN", {"steps": "K"})
    found = run(tmp_path, "cost", *SMALL)
    assert found["gradients_apart"] < cost.TOLERANCE
    assert set(found["median_seconds"]) == {cost.FLOOR, "dam", "plain loop"} == set(found["peak_bytes"])
    assert all(name in found["absent"] for name in ("dam, networks compiled", "plain loop, the step compiled"))
    assert all(entry["adjoints"] >= entry["path"] for entry in found["growth"].values())
    assert "| K doubled |" in cost.text_of(found)
    monkeypatch.setattr(cost.Step, "cost", staticmethod(lambda state: state.sum(dim=1)))
    step = cost.Step(cost.Setting(3, 4, 2, 8))
    plain = step.plain
    monkeypatch.setattr(step, "plain", lambda **given: plain(base=lambda x, t: 1.1 * step.base(x, t), **given))
    assert step.off() > cost.TOLERANCE


@pytest.mark.full
def test_adjoints_take_memory_for_states_and_not_for_the_network_at_each_step():
    """As a table of the page has it: twice the steps, rows or dimensions are no more than twice the memory, and with a
    network twice as wide it grows by one evaluation's activations, where autograd through the path has all of them.
    """
    setting = cost.Setting(steps=8, rows=16, dimension=4, width=256)
    found = cost.growth(setting)
    once, state = found["as it is"], 4 * setting.rows * setting.dimension
    for name in ("steps", "rows", "dimension"):
        assert found[name]["adjoints"] < 2.1 * once["adjoints"]
    activations = 4 * setting.rows * setting.width
    wider = found["width"]["adjoints"] - once["adjoints"]
    assert wider < 12 * activations, (wider, activations)
    assert found["width"]["through"] - once["through"] > 2 * setting.steps * activations
    assert found["steps"]["adjoints"] - once["adjoints"] < setting.steps * (60 * state)
    assert found["steps"]["through"] - once["through"] > 4 * setting.steps * activations


def test_studies_are_named_and_say_what_they_are():
    for name in entry.STUDIES:
        with pytest.raises(SystemExit) as stopped:
            entry.main([name, "--help"])
        assert stopped.value.code == 0
    with pytest.raises(SystemExit):
        entry.main(["nothing"])
    assert flows.FlowProcess() == mixtures.SDE


# ---- samplers


def test_a_study_of_samplers_looks_at_the_reference_before_and_at_exact_samples_after(tmp_path, monkeypatch):
    """Rows in order; the reference's own look is that of an untrained sampler; a mean with its least and its most."""
    few = sampling.Settings(rounds=2, paths=20, updates=2, batch=16, kept=2, steps=4)
    monkeypatch.setattr(
        sampling,
        "_PRESETS",
        {("gmm-40", name): sampling.Preset(few, hidden=8) for name in ("naas", "adjoint-sampling")},
    )
    monkeypatch.setattr(samplers.metrics, "sinkhorn", functools.partial(samplers.metrics.sinkhorn, iterations=10))
    options = ["--target", "gmm-40", "--samples", "30", "--seeds", "0", "1", "--sinkhorn", "--deviation", "2"]
    found = run(tmp_path, "samplers", *options)
    rows = found["results"]
    naas, walk = sampling.tried("gmm-40")
    assert [row["learner"] for row in rows] == [samplers.REFERENCE, naas, naas, walk, walk, samplers.EXACT]
    before = sampling.sampler("gmm-40", naas, deviation=2.0).sample(30, seed=2**40)
    law = sampling.reference(sampling.TARGETS["gmm-40"](), 30, seed=2**31)
    assert rows[0]["w2"] == sampling.distances(sampling.TARGETS["gmm-40"](), before.final.double(), law)["w2"]
    assert len(rows[1]["curve"]) == 2 and rows[1]["w2"] != rows[0]["w2"]
    assert rows[1]["energy_calls"] == 60 * 4 * 3 and rows[3]["energy_calls"] == 60
    text = samplers.text_of(found)
    of_naas = next(line for line in text.splitlines() if line.startswith(f"| {naas}"))
    values = [row["w2"] for row in rows[1:3]]
    assert f" {sum(values) / 2:.3f} ({min(values):.3f} to {max(values):.3f}) " in of_naas
    with pytest.raises(ValueError, match="those of dw-4 are arrangements"):
        entry.main(["samplers", "--target", "dw-4", "--sinkhorn"])
