"""Other divergences of rates: their values, their minimisers, and the generalised KL they join."""

import math

import pytest
import torch

import dam
from dam.divergences import rate_matching_loss
from tests.ops.helpers import assert_close, integers, normal

INF = math.inf


def dense(target, weight, columns):
    """w as an array, float64 [T, V]."""
    w = torch.zeros(len(target), columns, dtype=torch.float64)
    return w.scatter_add_(1, target.clamp(min=0), torch.where(target >= 0, weight.double(), 0.0))


def test_kl_is_the_kernels():
    logits, target, weight = normal(5, 30, seed=1), integers(-1, 30, 5, 3, seed=2), normal(5, 3, seed=3)
    ours = rate_matching_loss(logits, target, weight, exclude=4)
    assert torch.equal(ours, dam.matching_loss(logits, target, weight, exclude=4, normalized=False))
    # And the same by its generator, u log u, whose divergence is the kernels' up to no constant.
    general = rate_matching_loss(logits, target, weight, divergence=lambda u: u * u.log() - u, exclude=4)
    # float32 sums of 30 terms.
    assert math.isclose(float(general), float(ours), rel_tol=2.0**-18)


def test_l2_is_the_squared_distance():
    """Up to the half square of w, which no model changes."""
    logits, target, weight = normal(4, 9, seed=4).double(), integers(-1, 9, 4, 3, seed=5), normal(4, 3, seed=6)
    w = dense(target, weight, 9)
    expected = ((logits.exp() - w).square() / 2 - w.square() / 2).sum(dim=1).mean()
    assert_close(rate_matching_loss(logits, target, weight, divergence="l2"), expected, rtol=1e-12)
    half = rate_matching_loss(logits, target, weight, divergence=lambda u: u.square() / 2)
    assert_close(half, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "divergence",
    ["kl", "l2", lambda u: -u.log(), lambda u: u * u.log(), lambda u: u**1.5, lambda u: (u + 1).log() * (u + 1)],
)
def test_the_minimiser_is_the_mean_target(divergence):
    """For every convex generator the gradient vanishes at u = E[w], and the loss is larger around it."""
    targets, weights = integers(0, 6, 400, 1, seed=7), normal(400, 1, seed=8).abs() + 0.1
    mean = dense(targets, weights, 6).mean(dim=0)

    def loss(log_rates):
        return rate_matching_loss(log_rates.expand(400, 6).contiguous(), targets, weights, divergence=divergence)

    leaf = mean.log()[None].float().requires_grad_()
    if divergence != "kl":
        leaf = mean.log()[None].requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    # Rounding of float32 sums over 400 rows; float64 for all but the kernels.
    assert float(gradient.abs().max()) < (1e-5 if divergence == "kl" else 1e-12)
    for i in range(6):
        for step in (-0.3, 0.3):
            moved = leaf.detach().clone()
            moved[0, i] += step
            assert loss(moved) > value


def test_what_cannot_be_reached_counts_nothing():
    logits = torch.tensor([[0.5, -INF, 1.0]], dtype=torch.float64, requires_grad=True)
    for divergence in ("l2", lambda u: -u.log()):
        loss = rate_matching_loss(logits, torch.tensor([[0]]), torch.ones(1, 1), divergence=divergence, exclude=2)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (
            math.isfinite(float(loss.detach()))
            and gradient[0, 1] == gradient[0, 2] == 0
            and math.isfinite(gradient[0, 0])
        )


def test_an_excluded_target_is_none():
    logits, weight = normal(2, 5, seed=11), torch.ones(2, 1)
    excluded, none = torch.full((2, 1), 3), torch.full((2, 1), -1)
    for divergence in ("kl", "l2", lambda u: -u.log()):
        losses = [rate_matching_loss(logits, t, weight, divergence=divergence, exclude=3) for t in (excluded, none)]
        assert torch.equal(*losses)


def test_suppressed_destinations_are_none():
    """As logits of -inf there and no targets."""
    logits, weight, target = normal(2, 5, seed=11), normal(2, 2, seed=12), torch.tensor([[3, 1], [0, 4]])
    without = logits.clone()
    without[:, [0, 3]] = -INF
    for divergence in ("kl", "l2", lambda u: -u.log()):
        options = {"divergence": divergence, "exclude": 2}
        expected = rate_matching_loss(without, torch.tensor([[-1, 1], [-1, 4]]), weight, **options)
        assert torch.equal(rate_matching_loss(logits, target, weight, suppress=[3, 0], **options), expected)


def test_a_target_of_no_rate_costs_what_phi_says_of_almost_none():
    """l2's own cost, whichever way it is asked for; without end where phi's slope is; NaN stays NaN."""
    logits, target, weight = torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[1]]), torch.ones(1, 1)
    squared = rate_matching_loss(logits, target, weight, divergence="l2")
    assert_close(rate_matching_loss(logits, target, weight, divergence=lambda u: u * u / 2), squared, rtol=1e-6)
    assert rate_matching_loss(logits, target, weight, divergence=lambda u: -u.log()) == INF
    logits[0, 1] = math.nan
    for divergence in ("kl", "l2", lambda u: u * u / 2):
        assert math.isnan(rate_matching_loss(logits, target, weight, divergence=divergence))


def test_no_gradient_without_need():
    logits, target, weight = normal(2, 5, seed=9), integers(0, 5, 2, 1, seed=10), torch.ones(2, 1)
    phi = lambda u: u * u.log() - u  # noqa: E731
    loss = rate_matching_loss(logits, target, weight, divergence=phi)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert rate_matching_loss(logits, target, weight, divergence=phi) == loss


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "js"}, ValueError, "'kl', 'l2', what define returns or a convex function; got 'js'"),
        ({"divergence": lambda u: u.sum()}, ValueError, "must be elementwise"),
        ({"divergence": "l2", "exclude": 7}, ValueError, "exclude must be -1 or in"),
        ({"divergence": "l2", "normalized": 1}, TypeError, "normalized must be"),
        ({"divergence": "l2", "weight": torch.ones(2, 3)}, ValueError, "weight must have the shape of target"),
        ({"divergence": "l2", "row_scale": torch.ones(2, 1)}, ValueError, r"row_scale must have shape \[2\]"),
        ({"divergence": "l2", "weight": torch.ones(2, 1).long()}, TypeError, "weight must be float"),
        ({"divergence": "l2", "target": torch.full((2, 1), 5)}, ValueError, "target must be -1 or in"),
    ],
)
def test_wrong_arguments(options, error, message):
    arguments = {
        "log_rates": torch.zeros(2, 5),
        "target": torch.zeros(2, 1, dtype=torch.int64),
        "weight": torch.ones(2, 1),
    }
    with pytest.raises(error, match=message):
        rate_matching_loss(**(arguments | options))
