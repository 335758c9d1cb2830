import pytest
import torch

from dam import rollout as rollout_module
from dam.rollout import Trajectories, jump_log_prob, rollout
from tests import oracle

N, V = 3, 3
JOINT = oracle.random_joint(N, V, seed=0)
PROCESS = oracle.process(JOINT)
MODEL, BASE = oracle.table(JOINT), oracle.table(oracle.random_joint(N, V, seed=1))
Z = 6.5  # of a chi-square statistic with 26 degrees of freedom: false alarm below 1e-6


def blank(rows, length=N):
    return torch.full((rows, length), PROCESS.mask_token)


def test_outcomes_follow_the_joint():
    final = rollout(MODEL, blank(40_000), PROCESS, seed=3).final
    counts = torch.bincount((final * torch.tensor([V * V, V, 1])).sum(1), minlength=V**N).double()
    assert oracle.chi_square_z(counts, JOINT.flatten()) < Z


def test_order_is_uniform():
    trajectories = rollout(MODEL, blank(20_000), PROCESS, seed=4)
    counts = torch.bincount((trajectories.position * torch.tensor([9, 3, 1])).sum(1), minlength=27).double()
    orders = torch.zeros(27, dtype=torch.float64)
    orders[counts > 0] = 1 / 6
    assert int((counts > 0).sum()) == 6
    assert oracle.chi_square_z(counts, orders) < Z


@pytest.mark.parametrize("steps", [None, 1, 2])
def test_log_probs_are_those_of_the_sampler_and_of_the_base_under_the_same_steps(steps):
    trajectories = rollout(MODEL, blank(50), PROCESS, base=BASE, steps=steps, seed=5)
    assert trajectories.network_calls == (steps or N)
    for model, log_prob in ((MODEL, trajectories.log_prob), (BASE, trajectories.base_log_prob)):
        for b in range(50):
            for s in range(N):
                state = trajectories.states_before(int(trajectories.call[b, s]))[b]
                expected = oracle.log_conditional(model, state).detach()[
                    trajectories.position[b, s], trajectories.token[b, s]
                ]
                # float32 results of float64 tables: a rounding unit of a number below 16
                assert abs(float(log_prob[b, s] - expected)) < 1e-6
    torch.testing.assert_close(trajectories.log_ratio, trajectories.base_log_prob - trajectories.log_prob)


def test_what_is_given_stays_and_shorter_trajectories_have_empty_jumps():
    tokens = torch.tensor([[3, 3, 3], [0, 3, 2], [3, 1, 3]])
    trajectories = rollout(MODEL, tokens, PROCESS, base=BASE, seed=6)
    given = tokens != PROCESS.mask_token
    assert bool((trajectories.final == tokens)[given].all())
    assert bool((trajectories.final != PROCESS.mask_token).all())
    assert trajectories.position.ge(0).sum(1).tolist() == [3, 1, 2]
    empty = trajectories.position < 0
    assert bool((trajectories.token[empty] == -1).all())
    assert bool((trajectories.log_prob[empty] == 0).all())
    assert bool((trajectories.base_log_prob[empty] == 0).all())


def test_the_head_runs_at_the_positions_that_jump_only(monkeypatch):
    rows = []
    real = rollout_module.linear_jump
    monkeypatch.setattr(
        rollout_module, "linear_jump", lambda hidden, *a, **k: rows.append(len(hidden)) or real(hidden, *a, **k)
    )
    rollout(MODEL, blank(10), PROCESS, seed=7)
    assert rows == [10, 10, 10]
    rows.clear()
    rollout(MODEL, blank(10), PROCESS, steps=1, seed=7)
    assert rows == [30]


def test_a_seed_fixes_the_trajectories():
    first, second = (rollout(MODEL, blank(64), PROCESS, seed=8) for _ in range(2))
    assert torch.equal(first.final, second.final) and torch.equal(first.position, second.position)
    assert not torch.equal(first.final, rollout(MODEL, blank(64), PROCESS, seed=9).final)


def test_blocks_are_filled_from_left_to_right():
    """They are counted from the end, where completions are, so that padding on the left does not move them."""
    trajectories = rollout(MODEL, blank(200), PROCESS, block_length=2, seed=10)
    assert bool((trajectories.position[:, 0] == 0).all())
    assert len(trajectories.position[:, 1].unique()) == 2


def test_confidence_order_fills_the_likeliest_position_first():
    trajectories = rollout(MODEL, blank(1), PROCESS, order="confidence", temperature=0.0, seed=11)
    state = blank(1)[0]
    for s in range(N):
        best = oracle.log_conditional(MODEL, state).masked_fill((state != V)[:, None], -torch.inf)
        position, token = divmod(int(best.argmax()), V)
        assert (int(trajectories.position[0, s]), int(trajectories.token[0, s])) == (position, token)
        state[position] = token


def test_temperature_sharpens_and_its_log_probs_are_tempered():
    trajectories = rollout(MODEL, blank(20), PROCESS, temperature=0.5, seed=12)
    state = blank(1)[0]
    for b in range(20):
        tempered = (2 * oracle.log_conditional(MODEL, state)).log_softmax(dim=1)
        expected = tempered[trajectories.position[b, 0], trajectories.token[b, 0]]
        assert abs(float(trajectories.log_prob[b, 0] - expected)) < 1e-6  # a rounding unit, as above


def test_concatenation_fills_up_with_empty_jumps():
    long = rollout(MODEL, blank(2), PROCESS, base=BASE, seed=13)
    short = rollout(MODEL, torch.tensor([[3, 1, 2]]), PROCESS, base=BASE, seed=13)
    both = Trajectories.concatenate([short, long])
    assert both.position[0].tolist() == [0, -1, -1]
    assert float(both.log_prob[0, 1:].abs().sum()) == 0
    assert torch.equal(both.final, torch.cat([short.final, long.final]))


def test_jump_log_prob_replays_a_trajectory():
    trajectories = rollout(MODEL, blank(30), PROCESS, steps=2, seed=14)
    torch.testing.assert_close(jump_log_prob(MODEL, trajectories, PROCESS), trajectories.log_prob)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([[0, 1, 2]]), {}, "row 0 of tokens has no mask token"),
        (torch.tensor([3, 3, 3]), {}, r"int64 \[B, L\]"),
        (blank(1), {"steps": 0}, "steps must be at least 1"),
        (blank(1), {"order": "left"}, "order must be one of random, confidence"),
    ],
)
def test_bad_arguments_are_named(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(MODEL, tokens, PROCESS, seed=0, **options)
