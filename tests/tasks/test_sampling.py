"""Runs of samplers into a folder: what they leave, that they go on as they were, and what the command refuses."""

import json
import math

import pytest
import torch

from dam.cli import main
from dam.flows.networks import ParticleNetwork, Preconditioned
from dam.flows.samplers import AdjointMatching, AdjointSampling, AnnealedSampling
from dam.tasks import energies, sampling
from dam.tasks.energies import TARGETS

KINDS = {"naas": AnnealedSampling, "adjoint-sampling": AdjointSampling, "adjoint-matching": AdjointMatching}

# Few steps, and noise that is weak enough for them.
SMALL = {"rounds": 2, "paths": 20, "updates": 3, "batch": 16, "kept": 2, "steps": 5, "sigma": 1.0}


def tiny(monkeypatch):
    """Presets of a few paths, for one target with each learner."""
    for learner in sampling.tried("many-well-5"):
        found = sampling.preset("many-well-5", learner)
        settings = sampling.dataclasses.replace(found.settings, **SMALL)
        monkeypatch.setitem(
            sampling._PRESETS, ("many-well-5", learner), sampling.dataclasses.replace(found, settings=settings)
        )


@pytest.mark.parametrize("learner", ["naas", pytest.param("adjoint-sampling", marks=pytest.mark.full)])
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch, learner, capsys):
    """Killed in its second round, after the checkpoint of the first: the figures and the weights are those of a whole
    run, to the bit.
    """
    tiny(monkeypatch)
    options = ["sampler", "--learner", learner, "--samples", "20", "--looks", "2", "--seed", "1"]
    assert main([*options, "--output", str(tmp_path / "whole")]) == 0
    assert "round 2/2: ess" in capsys.readouterr().out
    real = sampling.Sampler.round

    def killed(self):
        if self.round_number == 1:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(sampling.Sampler, "round", killed)
    assert main([*options, "--output", str(tmp_path / "part")]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(sampling.Sampler, "round", real)
    assert main([*options, "--output", str(tmp_path / "part")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*options, "--output", str(tmp_path / "part"), "--resume"]) == 0
    whole, part = (torch.load(tmp_path / name / sampling.STATE, weights_only=True) for name in ("whole", "part"))
    assert whole["history"] == part["history"]
    for name, value in whole["sampler"]["models"].items():
        assert torch.equal(value, part["sampler"]["models"][name])
    lines = (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert {"energy_calls", "ess", "log_z", "sinkhorn_divergence", "modes"} <= json.loads(lines[-1]).keys()
    assert (tmp_path / "part" / "samples.png").stat().st_size > 1000
    assert main([*options[:-1], "2", "--output", str(tmp_path / "part"), "--resume"]) == 1
    assert "seed 1 (now 2)" in capsys.readouterr().err


def test_an_energy_that_is_no_number_is_an_error_of_the_command(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch)
    real = TARGETS["many-well-5"]

    class Broken(real):
        def __call__(self, state):
            return super().__call__(state) / (state[:, 0] < 1.0)

    monkeypatch.setitem(TARGETS, "many-well-5", Broken)
    assert main(["sampler", "--output", str(tmp_path / "run")]) == 1
    assert "an energy must be finite wherever paths go" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--target", "many-wells"], "there are the targets gmm-40"),
        (["--learner", "am"], "there are the learners naas"),
        (["--target", "lj-13"], "no settings are known for lj-13"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--looks", "0"], "--looks must be at least 1"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, options, fault):
    monkeypatch.chdir(tmp_path)
    assert main(["sampler", *options]) == 1
    assert fault in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_the_learner_of_a_target_is_the_first_with_settings_unless_given(tmp_path, monkeypatch):
    asked = []

    def run(output, target, learner, **others):
        asked.append((target, learner))
        return {"energy_calls": 0}

    monkeypatch.setattr(sampling, "run", run)
    for n, given in enumerate(([], ["--target", "dw-4"], ["--learner", "adjoint-sampling"], ["--target", "lj-13"])):
        assert main(["sampler", *given, "--output", str(tmp_path / str(n))]) == 0
    assert asked == [
        ("many-well-5", "naas"),
        ("dw-4", "adjoint-sampling"),
        ("many-well-5", "adjoint-sampling"),
        ("lj-13", "naas"),  # which run refuses by name
    ]


def test_presets_reach_their_networks_and_are_known_by_their_target():
    for (target, learner), chosen in sampling._PRESETS.items():
        one = sampling.sampler(target, learner, seed=3)
        assert learner in sampling.tried(target) and one.settings.seed == 3
        assert type(one) is KINDS[learner]
        for name, network in one.models.items():
            beside = chosen.langevin is not None and name == "model"
            assert isinstance(network, Preconditioned) == beside
            if beside:
                assert network.largest == chosen.langevin
                network = network.network
            if isinstance(network, ParticleNetwork):
                assert len(network.later) + 1 == chosen.layers
                assert (network.message[0].out_features, network.output) == (chosen.hidden, chosen.output)
            else:
                assert (network.octaves, network.output) == (chosen.octaves, chosen.output)
                assert network.net[0].out_features == chosen.hidden
    assert sampling.tried("lj-13") == []


def test_a_gradient_that_particles_have_beside_their_network_is_counted_and_does_not_move_their_centre():
    """Of E the centre has none, and that of its own Gaussian is that of the walk: to rounding of float32."""
    one = sampling.sampler("dw-4", "adjoint-sampling")
    model = one.models["model"]
    torch.nn.init.ones_(model.strength[-1].bias)
    state = 2 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 3
    found = model(state, torch.full((50,), 0.5)).detach().view(50, 4, 2)
    assert one.energy.calls == 50
    assert found.abs().mean() > 1 and found.mean(dim=1).abs().max() < 1e-4


def test_wells_that_are_lost_and_shares_that_are_off_are_told():
    """On the right are 50, 10, 9, 91 and 100 of 100: the last three have lost a well, left with under a fifth."""
    energy = energies.ManyWell(6, 5, 2.0)
    right = torch.tensor([50, 10, 9, 91, 100])
    final = torch.full((100, 6), -1.4, dtype=torch.float64)
    final[:, :5] = torch.where(torch.arange(100)[:, None] < right, 1.4, -1.4)
    found = sampling.distances(energy, final, energy.sample(100, torch.Generator().manual_seed(0)))
    assert found["lost_wells"] == 3
    assert found["share_error"] == pytest.approx((0 + 0.40 + 0.41 + 0.41 + 0.5) / 5)


def test_particles_are_sampled_centred_with_the_normaliser_of_centred_states(monkeypatch):
    """Two particles in the plane: of their difference r, in the potential of its length, Z is an integral over the
    plane, and centred states have the lengths of r / sqrt 2. An untrained walk's weights have it as their mean.
    """
    two = energies.Particles(2, 2, lambda d: (d - 1).square())
    monkeypatch.setitem(TARGETS, "two", lambda: two)
    settings = sampling.Settings(**{**SMALL, "paths": 200}, deviation=1.0, ratio=2.0)
    monkeypatch.setitem(sampling._PRESETS, ("two", "adjoint-sampling"), sampling.Preset(settings, output=1.0, hidden=8))
    one = sampling.sampler("two", "adjoint-sampling")
    one.round()
    drawn = one.sample(20_000, seed=5)
    law = energies.metropolis(two, 200, steps=100, length=0.5, seed=0)
    few = drawn._replace(final=drawn.final[:200])
    found = sampling.measured(two, few, law, settings.deviation)
    radius = torch.linspace(0, 12, 10_001, dtype=torch.float64)
    area = 2 * math.pi * radius * torch.exp(-((radius - 1).square())) / 2  # of r / sqrt 2
    weight = torch.exp(drawn.log_weight - drawn.log_weight.max())
    error = float(weight.std() / weight.mean()) / math.sqrt(20_000)
    assert error < 0.02
    assert found["log_z"] == pytest.approx(math.log(float(torch.trapezoid(area, radius))), abs=5 * error)
    assert {"w2", "energy_w2"} <= found.keys() and "sinkhorn_divergence" not in found
