"""Diagnostics: what they are on groups whose truth is known, and that noise has none of it."""

import math

import pytest
import torch

import dam
from dam import diagnostics, plots
from dam.adjoint import tilted_weights

GROUPS, SIZE, LENGTH = 40, 32, 6


def outcomes(seed):
    """Independent tokens 0 .. 3; the first position of each group is given."""
    final = torch.randint(4, (GROUPS, SIZE, LENGTH), generator=torch.Generator().manual_seed(seed))
    maskable = torch.ones(GROUPS, LENGTH, dtype=torch.bool)
    maskable[:, 0] = False
    final[:, :, 0] = 1
    return final, maskable


def weights_of(reward):
    return dam.adjoint_weights(torch.zeros(*reward.shape, 1), -reward)


def test_halves_agree_where_the_reward_is_in_the_outcome():
    """A strong preference for one token in one place is what both halves say; a random reward is what neither does."""
    final, maskable = outcomes(1)
    taught = weights_of(3.0 * (final[:, :, 2] == 3).double()).weight
    noise = weights_of(torch.randn(GROUPS, SIZE, generator=torch.Generator().manual_seed(2))).weight
    reliable = diagnostics.split_half_reliability(taught, final, maskable, generator=torch.Generator().manual_seed(3))
    random = diagnostics.split_half_reliability(noise, final, maskable, generator=torch.Generator().manual_seed(3))
    # Of 40 x 5 x 4 cells correlations of noise are within 5 / 800^(1/2).
    assert reliable > 0.35 and abs(random) < 0.18
    null = diagnostics.permuted(taught, torch.Generator().manual_seed(4))
    assert torch.equal(null.sort(dim=1).values, taught.sort(dim=1).values) and not torch.equal(null, taught)
    assert abs(diagnostics.split_half_reliability(null, final, maskable)) < 0.18


def test_halves_of_equal_weights_and_tiny_groups_say_nothing():
    final, maskable = outcomes(5)
    for equal in (
        torch.ones(GROUPS, SIZE),
        torch.full((GROUPS, SIZE), 0.1).double(),
        torch.full((GROUPS, SIZE), math.nan),
    ):
        assert math.isnan(diagnostics.split_half_reliability(equal, final, maskable))
    assert math.isnan(diagnostics.split_half_reliability(torch.ones(GROUPS, 3), final[:, :3], maskable))


def test_what_is_given_does_not_count():
    """What stands at positions that were not filled in is not looked at, even if it tells all."""
    final, maskable = outcomes(6)
    weight = weights_of((final[:, :, 2] == 3).double()).weight
    changed = final.clone()
    changed[:, :, 0] = final[:, :, 2]
    values = [
        diagnostics.split_half_reliability(weight, x, maskable, generator=torch.Generator().manual_seed(7))
        for x in (final, changed)
    ]
    assert values[0] == values[1]


def test_ess_by_step_and_kl():
    """All from one jump at step 1: before it the ESS is that of its ratios, after it K."""
    log_ratio = torch.zeros(2, 4, 3)
    log_ratio[:, 0, 1] = math.log(5.0)
    ess = diagnostics.ess_by_step(log_ratio)
    one = (5 + 3) ** 2 / (25 + 3)
    # float32 sums of a path, whose exponentials are taken.
    torch.testing.assert_close(ess, torch.tensor([one, one, 4.0, 4.0]).double(), rtol=1e-6, atol=0)
    assert torch.allclose(diagnostics.kl_path(log_ratio), torch.full((2,), -math.log(5.0) / 4).double())
    with_gap = diagnostics.kl_path(log_ratio, escape_gap=torch.ones(2, 4, 3))
    assert torch.allclose(with_gap, torch.full((2,), -math.log(5.0) / 4 - 3).double())


def test_diagnose_is_all_of_them():
    final, maskable = outcomes(8)
    log_ratio = 0.1 * torch.randn(GROUPS, SIZE, 5, generator=torch.Generator().manual_seed(9))
    weights = dam.adjoint_weights(log_ratio, -3.0 * (final[:, :, 2] == 3).double(), clip=0.5)
    told = diagnostics.diagnose(weights, log_ratio, final, maskable, generator=torch.Generator().manual_seed(1))
    assert told.ess == float(weights.ess.mean()) and told.clip_fraction == float(weights.clipped.mean()) > 0
    assert told.adjoint_mean < 1 and told.ess_path == float(diagnostics.ess_by_step(log_ratio)[0])
    assert told.kl_path == float(-log_ratio.double().sum(2).mean(1).mean()) and told.split_half > 0.5


def test_the_plot_of_a_training_run(tmp_path):
    history = [{"reward": 0.1 * n, "kl_path": 0.2 * n, "ess": 4.0, "reward_calls": 16 * n, "step": n} for n in range(5)]
    plots.training(tmp_path / "plot.png", [*history, {"eval_loss": 1.0}])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="history must hold some of reward, kl_path, kl_outcome"):
        plots.training(tmp_path / "none.png", [{"eval_loss": 1.0}])


@pytest.mark.parametrize("mixed", [False, True])
def test_figures_leave_out_what_is_not_kept(monkeypatch, mixed):
    """Groups of 12, of which 3 are not kept, have the figures of the 9 others; one of them alone changes no group."""
    generator = torch.Generator().manual_seed(5)
    final, maskable = outcomes(2)
    final, log_ratio = final[:, :12], torch.randn(GROUPS, 12, 3, generator=generator, dtype=torch.float64)
    reward = (final[:, :, 2] == 3).double() + torch.randn(GROUPS, 12, generator=generator, dtype=torch.float64)
    from_base = (torch.arange(12) >= 8).expand(GROUPS, -1) if mixed else None
    kept = torch.ones(GROUPS, 12, dtype=torch.bool)
    kept[: GROUPS // 2, [0, 5, 9]] = False
    kept[GROUPS // 2 :, [2, 3, 11]] = False

    def alone(values):
        return None if values is None else values[kept].view(GROUPS, 9, *values.shape[2:])

    table = torch.rand(GROUPS, 12, generator=generator)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: table if shape[1] == 12 else alone(table))
    options = {"beta": 0.5, "ess": 3.0}
    weights, _ = tilted_weights(log_ratio, reward, from_base=from_base, kept=kept, **options)
    told = diagnostics.diagnose(weights, log_ratio, final, maskable, from_base=from_base, kept=kept)
    others, _ = tilted_weights(alone(log_ratio), alone(reward), from_base=alone(from_base), **options)
    wanted = diagnostics.diagnose(others, alone(log_ratio), alone(final), maskable, from_base=alone(from_base))
    assert told == pytest.approx(wanted, rel=1e-10, nan_ok=True)
    assert not math.isnan(told.split_half)
    every, _ = tilted_weights(log_ratio, reward, from_base=from_base, **options)
    assert told != pytest.approx(
        diagnostics.diagnose(every, log_ratio, final, maskable, from_base=from_base), rel=1e-3, nan_ok=True
    )


def test_a_group_with_too_few_for_two_halves_says_nothing_about_them():
    final, maskable = outcomes(1)
    weight = weights_of(3.0 * (final[:, :, 2] == 3).double()).weight
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[10:, 3:] = False

    def reliability(weight, final, maskable, kept=None):
        generator = torch.Generator().manual_seed(3)
        return diagnostics.split_half_reliability(weight, final, maskable, kept=kept, generator=generator)

    assert reliability(weight, final, maskable, kept) == pytest.approx(
        reliability(weight[:10], final[:10], maskable[:10]), rel=1e-9
    )
    kept[:10, 3:] = False
    assert math.isnan(reliability(weight, final, maskable, kept))


def history_of(rewards, **figures):
    """A log of as many entries; a figure is one for all, or a list."""
    entries = [{"loss": 1.0, "step": n, "reward": float(reward)} for n, reward in enumerate(rewards)]
    usual = {"frac_reward_zero_std": 0.3, "split_half": 0.4, "tilt": 0.2, "kl_path": 0.2}
    for name, value in {**usual, **figures}.items():
        for n, entry in enumerate(entries):
            entry[name] = value[n] if isinstance(value, list) else value
    return [*entries, {"eval_reward": 1.0, "step": 9}, {"train_runtime": 1.0}]


FLAT = [0.30, 0.32, 0.31, 0.29, 0.31, 0.30, 0.32, 0.30]
AT_ONCE = [0.25, 0.57, 0.60, 0.61, 0.67, 0.62, 0.62, 0.58, 0.73, 0.65, 0.58, 0.60, 0.70, 0.65, 0.72, 0.64]
SOON = [0.30, 0.40, 0.64, 0.66, 0.52, 0.72, 0.48, 0.68]  # in a quarter of the run, where it then stays
UNLUCKY = [0.26, 0.34, 0.30, 0.29, 0.31, 0.30, 0.32, 0.30]  # in its first entry only
RISING = [0.30, 0.32, 0.35, 0.36, 0.40, 0.41, 0.44, 0.46]


@pytest.mark.parametrize(
    ("history", "names"),
    [
        (history_of([0.5] * 2, frac_reward_zero_std=1.0), ["constant reward"]),
        (history_of([0.5, 0.2, 0.4], frac_reward_zero_std=1.0), ["constant reward"]),  # by prompt, but not within one
        (history_of([0.5] * 1, frac_reward_zero_std=1.0), []),  # too early to say
        # A run that has come to its end is none with a fault.
        (history_of([*RISING, *[1.0] * 8], frac_reward_zero_std=[*[0.3] * 8, *[1.0] * 8]), []),
        (history_of([0.01] * 3, frac_reward_zero_std=0.95), ["few groups tell"]),
        (history_of(FLAT), []),
        (history_of(FLAT, split_half=0.01), ["targets are noise"]),
        (history_of(FLAT, kl_path=[0.1 * n for n in range(8)]), ["moves without learning"]),
        (history_of(FLAT, kl_path=0.001), ["stands still"]),
        (history_of(FLAT, kl_path=0.001, split_half=0.0), ["targets are noise", "stands still"]),
        (history_of(RISING, kl_path=2.0, split_half=0.0), []),  # it learns
        (history_of(AT_ONCE, kl_path=1.2), []),  # it has learned
        (history_of(SOON, kl_path=1.2), []),
        (history_of(UNLUCKY, kl_path=1.2), ["moves without learning"]),
        (history_of(FLAT[:7], kl_path=2.0, split_half=0.0), []),
        # As in the first steps of a run with a small learning rate, or one that is warmed up.
        (history_of(FLAT, kl_path=[1e-4 * n * n for n in range(8)]), []),
    ],
    ids=str,
)
def test_why_a_run_does_not_learn(history, names):
    assert [finding.name for finding in diagnostics.findings(history)] == names


def test_findings_give_their_figures_and_what_to_do():
    (still,) = diagnostics.findings(history_of(FLAT, kl_path=0.001, tilt=0.004))
    assert "1.0e-03 nats" in still.message and "a smaller target_ess: steps go 0.004 of the way only" in still.message
    (equal,) = diagnostics.findings(history_of(FLAT, frac_reward_zero_std=0.9))
    assert "in 90% of the groups" in equal.message
    (constant,) = diagnostics.findings(history_of([0.25, 0.25], frac_reward_zero_std=1.0))
    assert "one reward (0.25 lately)" in constant.message
