import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dam import decoding as decoding_module
from dam import rollout as rollout_module
from dam.ctmc import MaskedCTMC
from dam.decoding import Drawn
from dam.models.denoiser import Head
from dam.ops.jump import jump
from dam.rollout import ORDERS, Trajectories, jump_log_prob, outcome_log_prob, rollout
from tests import oracle

N, V = 3, 3
JOINT = oracle.random_joint(N, V, seed=0)
PROCESS = oracle.process(JOINT)
MODEL, BASE = oracle.table(JOINT), oracle.table(oracle.random_joint(N, V, seed=1))
Z = 6.5  # of a chi-square statistic with 26 degrees of freedom: false alarm below 1e-6


class Equal:
    """4,096 equally likely tokens, whatever the others are."""

    def hidden_states(self, tokens, attention_mask=None):
        return torch.zeros(*tokens.shape, 1)

    def head(self):
        return Head(torch.zeros(4097, 1), None)


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


@pytest.mark.parametrize("given", [{"suppress": (1,)}, {"suppress": (1,), "vocabulary": 3}, {"vocabulary": 2}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_suppressed_tokens_are_drawn_by_nobody_and_the_laws_are_those_without_them(given, order):
    """Of the sampler and of the base; a suppressed token that stands in a prompt stays."""
    process = dataclasses.replace(PROCESS, **given)
    tokens = blank(60)
    tokens[:, 0] = 1
    trajectories = rollout(MODEL, tokens, process, base=BASE, order=order, seed=5)
    kept = torch.tensor([v for v in range(V) if v not in process.suppressed(V)])
    assert bool((trajectories.final[:, 0] == 1).all()) and len(kept) == 2
    assert torch.equal(trajectories.final[:, 1:].unique(), kept)
    for model, log_prob in ((MODEL, trajectories.log_prob), (BASE, trajectories.base_log_prob)):
        for b in range(60):
            for s in range(N - 1):
                state = trajectories.states_before(s)[b]
                logits = model.logits[model.index(state)].detach()[trajectories.position[b, s]]
                index = int((kept == trajectories.token[b, s]).nonzero())
                expected = logits[kept].log_softmax(dim=0)[index]
                assert abs(float(log_prob[b, s] - expected)) < 1e-6


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
    real = decoding_module.linear_jump
    monkeypatch.setattr(
        decoding_module, "linear_jump", lambda hidden, *a, **k: rows.append(len(hidden)) or real(hidden, *a, **k)
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


def test_what_a_trajectory_draws_depends_on_its_row_id_only():
    """Not on the batch, nor on padding in front; and ids 0, 1, ... are what is meant where none are given."""
    whole = rollout(MODEL, blank(64), PROCESS, base=BASE, seed=8)
    ids = torch.tensor([40, 3, 63])
    part = rollout(MODEL, blank(3), PROCESS, base=BASE, seed=8, row_ids=ids)
    for name in ("final", "position", "token", "log_prob", "base_log_prob"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[ids]), name
    assert len(rollout(MODEL, blank(64), PROCESS, seed=8, row_ids=torch.full((64,), 5)).final.unique(dim=0)) == 1
    short = torch.tensor([[7, 4096, 4096, 4096]])
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), short), dim=1)
    for order in ORDERS:
        finals = [
            rollout(Equal(), tokens, MaskedCTMC(4096), order=order, seed=9, row_ids=torch.tensor([7])).final[:, -4:]
            for tokens in (short, padded)
        ]
        assert torch.equal(*finals)


def test_order_and_tokens_are_independent():
    """4,096 equal tokens: at every jump a quarter of them is drawn a quarter of the time, wherever the jump goes."""
    trajectories = rollout(Equal(), torch.full((4096, 8), 4096), MaskedCTMC(4096), seed=12345)
    quarter = (trajectories.token // 1024).flatten()
    cells = trajectories.position.flatten() * 4 + quarter
    for chosen in (slice(None), *(slice(s, None, 8) for s in range(8))):
        counts = torch.bincount(cells[chosen], minlength=32).double()
        assert oracle.chi_square_z(counts, torch.full((32,), 1 / 32, dtype=torch.float64)) < Z
    # Nor are they a user's draws under the same seed.
    own = jump(torch.zeros(4096 * 8, 4096), seed=12345).target
    assert float((own == trajectories.token.flatten()).double().mean()) < 2e-3  # 1 / 4096 by chance


def test_a_position_by_confidence_is_drawn_anew_in_each_call(monkeypatch):
    """Else what is drawn last would be what was not likely enough before, and not of the law that log_prob states."""
    drawn = []
    real = decoding_module.linear_jump
    monkeypatch.setattr(decoding_module, "linear_jump", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    trajectories = rollout(Equal(), torch.full((2000, 2), 4096), MaskedCTMC(4096), order="confidence", seed=13)
    first, last = drawn[0].target.view(2000, 2), drawn[1].target
    assert torch.equal(trajectories.token, torch.stack((first[:, 0], last), dim=1))
    # Equal by chance with probability 1 / 4096 a row.
    assert int((first[:, 1] == last).sum()) < 10


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
        (
            blank(1),
            {"order": "left"},
            "order must be one of random, left-to-right, confidence, .*; got 'left'",
        ),
    ],
)
def test_bad_arguments_are_named(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(MODEL, tokens, PROCESS, seed=0, **options)


def test_outcomes_are_as_likely_by_every_order_as_by_their_law():
    outcomes = oracle.sequences(N, V)
    found = outcome_log_prob(MODEL, blank(len(outcomes)), outcomes, PROCESS, orders=4, seed=5)
    expected = JOINT.flatten().log()[:, None].expand(-1, 4)
    # log_prob is float64 of float64 logits.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("block_length", [None, 2])
def test_outcomes_by_one_order_have_a_law_where_conditionals_agree_on_none(steps, block_length):
    """Each order's probabilities add up to 1, orders differ, and a row's depend on its id only."""
    model = oracle.perturbed(MODEL, 1.0, seed=3)
    outcomes = oracle.sequences(N, V)
    options = {"orders": 6, "seed": 5, "steps": steps, "block_length": block_length}
    one_id = torch.full((len(outcomes),), 7)
    found = outcome_log_prob(model, blank(len(outcomes)), outcomes, PROCESS, row_ids=one_id, **options)
    torch.testing.assert_close(found.exp().sum(dim=0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(found.std(dim=1).max()) > 0.01
    alone = outcome_log_prob(model, blank(1), outcomes[5:6], PROCESS, row_ids=one_id[:1], **options)
    torch.testing.assert_close(alone, found[5:6], rtol=0, atol=1e-9)


def test_what_was_given_is_no_part_of_an_outcome():
    tokens, outcome = blank(1), oracle.sequences(N, V)[13:14].clone()
    tokens[0, 1] = outcome[0, 1]
    marginal = JOINT.sum(dim=(0, 2))[outcome[0, 1]]
    found = outcome_log_prob(MODEL, tokens, outcome, PROCESS, orders=2, seed=0)
    expected = (JOINT[tuple(outcome[0])] / marginal).log().expand(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": 0}, "orders must be at least 1"),
        ({"decoding": decoding_module.Decoding("confidence")}, 'orders are drawn as "random" draws them'),
        ({"outcome": torch.full((1, N), V)}, "outcome must be tokens with all masks filled in"),
        ({"tokens": torch.tensor([[0, V, V]]), "outcome": torch.ones(1, N, dtype=torch.int64)}, "nothing else changed"),
    ],
)
def test_what_is_no_outcome_is_refused(change, message):
    given = {"tokens": blank(1), "outcome": torch.zeros(1, N, dtype=torch.int64), "orders": 1, **change}
    with pytest.raises(ValueError, match=message):
        outcome_log_prob(MODEL, given.pop("tokens"), given.pop("outcome"), PROCESS, seed=0, **given)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers that are read, and results whose size is one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1]
        by_mask = name.startswith("index.") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select") or name.startswith("_unique")
        self.count += name.startswith("unique") or by_mask
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", [None, Equal()], ids=["alone", "with base"])
def test_a_network_call_makes_nobody_wait(base, monkeypatch):
    """Which jumps a call makes is known before the first one: reads are as many in 2 calls as in 16."""
    zeros = lambda hidden: torch.zeros(len(hidden))  # noqa: E731
    monkeypatch.setattr(
        rollout_module, "draw_tokens", lambda hidden, *_, **__: Drawn(zeros(hidden).long(), zeros(hidden), None)
    )
    monkeypatch.setattr(rollout_module, "token_log_prob", lambda hidden, *_: zeros(hidden))
    counts = []
    for steps in (2, 16):
        with Reads() as reads:
            way = rollout(Equal(), torch.full((3, 16), 4096), MaskedCTMC(4096), base=base, steps=steps, seed=0)
        assert way.network_calls == steps
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("stop_tokens", [[], [0, 1]])
def test_the_jumps_of_each_call_are_those_that_the_trajectories_name(stop_tokens):
    tokens = torch.full((40, 6), 3)
    tokens[:20, :3], tokens[5] = 2, torch.tensor([3, 1, 1, 1, 1, 1])
    table = oracle.table(oracle.random_joint(6, V, seed=2))
    way = rollout(table, tokens, PROCESS, steps=4, seed=3, stop_tokens=stop_tokens)
    calls = rollout_module._by_call(way)
    assert len(calls) == way.network_calls
    for n, jumps in enumerate(calls):
        rows, at = torch.nonzero(way.call == n, as_tuple=True)
        assert torch.equal(jumps.rows, rows)
        assert torch.equal(jumps.at, at)
        assert torch.equal(jumps.position, way.position[rows, at])
        assert torch.equal(jumps.active, rows.unique())
        assert torch.equal(jumps.active[jumps.compact], rows)
    nothing = dataclasses.replace(way, call=torch.full_like(way.call, -1))
    assert rollout_module._by_call(nothing) == []
