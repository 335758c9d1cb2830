"""Early ends, orders, thresholds, cut laws and guidance, against enumeration and loops that restate them."""

import collections
import dataclasses
import itertools
import math

import pytest
import torch

from dam import decoding as decoding_module
from dam.ctmc import MaskedCTMC
from dam.decoding import MODEL_ORDERS, ORDERS, Decoding
from dam.models.denoiser import Head
from dam.ops._head import LoRA
from dam.rollout import Trajectories, jump_log_prob, log_prob_over_orders, rollout
from tests import oracle
from tests.ops.helpers import largest_bytes

N, V = 3, 3
STOP = 2
PROCESS = MaskedCTMC(mask_token=V)
MODEL, BASE = oracle.inconsistent(N, V, seed=1), oracle.inconsistent(N, V, seed=2)
Z = 6.5  # of a chi-square statistic with 26 degrees of freedom: false alarm below 1e-6


class Counted:
    """A denoiser that counts the rows of its network calls."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, []

    def hidden_states(self, tokens, attention_mask=None):
        self.rows.append(len(tokens))
        return self.denoiser.hidden_states(tokens, attention_mask)

    def head(self):
        return self.denoiser.head()


def blank(rows, length=N):
    return torch.full((rows, length), V)


@pytest.fixture
def head_rows(monkeypatch):
    """Rows that the head ran at, of each fused draw."""
    rows, real = [], decoding_module.linear_jump
    monkeypatch.setattr(
        decoding_module, "linear_jump", lambda hidden, *a, **k: rows.append(len(hidden)) or real(hidden, *a, **k)
    )
    return rows


def text(row, stop=STOP):
    """A row up to its first end."""
    row = row.tolist()
    return tuple(row[: row.index(stop) + 1] if stop in row else row)


def assert_same(a, b):
    for name in ("final", "position", "token", "call", "log_prob"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# ---- rows that have ended


@pytest.mark.parametrize(
    "options", [{}, {"block_length": 1}, {"block_length": 2}, {"steps": 2}, {"order": "left-to-right"}], ids=str
)
def test_jumps_up_to_an_end_are_those_without_it_and_the_rest_takes_no_calls(options):
    whole = rollout(MODEL, blank(300), PROCESS, base=BASE, seed=3, **options)
    counted = Counted(MODEL)
    ended = rollout(counted, blank(300), PROCESS, base=BASE, stop_tokens=[STOP], seed=3, **options)
    made = ended.call >= 0
    for name, empty in (("position", -1), ("token", -1), ("call", -1), ("log_prob", 0), ("base_log_prob", 0)):
        found, expected = getattr(ended, name), getattr(whole, name)
        assert torch.equal(found[made], expected[made]), name
        assert bool((found[~made] == empty).all()), name
    for b in range(300):
        # The first call behind which the text stands up to an end; all calls where there is none.
        shown = (text(whole.states_before(n)[b]) for n in range(1, whole.network_calls + 1))
        ends = [STOP in row and V not in row for row in shown]
        calls = ends.index(True) + 1 if True in ends else whole.network_calls
        assert int(ended.call[b].max()) + 1 == calls
        assert text(ended.final[b]) == text(whole.final[b])
        assert bool((ended.final[b, len(text(ended.final[b])) :] != V).all())
    behind = (whole.initial == V) & (ended.final != whole.final)
    assert bool((ended.final[behind] == STOP).all())
    # A network call for each row and call, no more.
    calls = ended.call.max(dim=1).values + 1
    assert counted.rows == [int((calls > n).sum()) for n in range(ended.network_calls)]
    assert sum(counted.rows) < (280 if options in ({}, {"steps": 2}) else 240) / 100 * 300


@pytest.mark.parametrize("options", [{}, {"block_length": 2}, {"steps": 2}], ids=str)
def test_paths_up_to_an_end_have_the_law_of_texts(options):
    """All of them are seen; the probabilities of their orders and tokens sum to the law of texts of whole rollouts."""
    models = [oracle.inconsistent(N, V, seed, spread=0.5) for seed in (1, 2)]
    found = rollout(models[0], blank(8000), PROCESS, base=models[1], stop_tokens=[STOP], seed=4, **options)
    paths = {}
    for b in range(len(found.final)):
        key = tuple(zip(found.call[b].tolist(), found.position[b].tolist(), found.token[b].tolist(), strict=True))
        paths[frozenset(key)] = b
    chosen = found[torch.tensor(list(paths.values()))]
    for log_prob, model in zip((chosen.log_prob, chosen.base_log_prob), models, strict=True):
        law = collections.defaultdict(float)
        for b, weight in enumerate(log_prob.double().sum(dim=1).exp().tolist()):
            law[text(chosen.final[b])] += weight * probability_of_order(chosen[b : b + 1], options)
        expected = law_of_texts(model, N, options)
        assert law.keys() == expected.keys()
        assert sum(law.values()) == pytest.approx(1, abs=1e-6)  # sums of float32 log-probabilities
        for key in law:
            assert law[key] == pytest.approx(expected[key], abs=1e-6)


def probability_of_order(path, options):
    """That a rollout goes to these positions in these calls: a set of so many of those that are left, call by call."""
    left = [1, 2] if options.get("block_length") == 2 else [3]  # positions of blocks
    probability = 1.0
    for call in range(path.network_calls):
        count = int((path.call == call).sum())
        probability /= math.comb(left[0], count)
        left[0] -= count
        left = left if left[0] else left[1:]
    return probability


def ordered_sets(positions, sizes):
    """All divisions of positions into an ordered set for each call, of these sizes."""
    if not sizes:
        yield []
        return
    for first in itertools.combinations(positions, sizes[0]):
        for rest in ordered_sets([i for i in positions if i not in first], sizes[1:]):
            yield [list(first), *rest]


def every_path(model, length, options):
    """Outcomes with their probabilities by each order, as whole rollouts draw them."""
    if "block_length" in options:
        size = options["block_length"]
        blocks = [list(range(max(0, i - size), i)) for i in range(length, 0, -size)][::-1]
        orders = itertools.product(*(list(ordered_sets(block, [1] * len(block))) for block in blocks))
        sets = [list(itertools.chain(*parts)) for parts in orders]
    else:
        steps = options.get("steps", length)
        calls = [n * steps // length for n in range(length)]
        sets = list(ordered_sets(list(range(length)), [calls.count(n) for n in range(steps)]))
    outcomes = oracle.sequences(length, V)
    for positions_of_calls in sets:
        states, log_prob = torch.full_like(outcomes, V), torch.zeros(len(outcomes), dtype=torch.float64)
        for positions in positions_of_calls:
            law = model.logits.detach()[model.index(states)][:, :, :V].log_softmax(dim=2)
            log_prob += law.gather(2, outcomes[..., None])[:, positions, 0].sum(dim=1)
            states[:, positions] = outcomes[:, positions]
        yield from zip(outcomes, (log_prob.exp() / len(sets)).tolist(), strict=True)


def law_of_texts(model, length, options):
    law = collections.defaultdict(float)
    for outcome, probability in every_path(model, length, options):
        law[text(outcome)] += probability
    return law


def test_ends_count_from_where_completions_start():
    """Not in a prompt, given or filled in; and a row that shows its end at once takes no call."""
    table = oracle.inconsistent(4, V, seed=5)
    tokens = torch.tensor([[STOP, V, V, V], [V, 0, V, V], [0, STOP, V, V], [0, STOP, V, V]])
    start = torch.tensor([1, 2, 1, 2])
    counted = Counted(table)
    found = rollout(counted, tokens, PROCESS, stop_tokens=[STOP], start=start, order="left-to-right", seed=0)
    jumps = (found.call >= 0).sum(dim=1)
    assert jumps[2] == 0 and found.final[2].tolist() == [0, STOP, STOP, STOP]
    assert jumps[0] >= 1 and jumps[1] >= 2 and jumps[3] >= 1
    assert counted.rows[0] == 3
    many = rollout(table, tokens[1:2].repeat(200, 1), PROCESS, stop_tokens=[STOP], start=start[1:2].repeat(200), seed=0)
    first = many.final[:, 0] == STOP  # a mask in the prompt
    assert bool(first.any()) and bool((many.final[first][:, 2:] != STOP).any())
    # Unless told, from a row's first mask on.
    given = rollout(table, tokens[3:], PROCESS, stop_tokens=[STOP], seed=0)
    assert int((given.call >= 0).sum()) >= 1


@pytest.mark.parametrize("options", [{}, {"block_length": 3}, {"steps": 3}], ids=str)
def test_other_orders_of_ended_texts_give_weights_with_the_base_s_law_of_texts(options):
    rows, length = 20_000, 4
    model, base = (oracle.inconsistent(length, V, seed) for seed in (1, 2))
    found = rollout(model, blank(rows, length), PROCESS, base=base, stop_tokens=[STOP], seed=6, **options)
    paths = log_prob_over_orders(model, base, found, PROCESS, orders=2, seed=6, **options)
    torch.testing.assert_close(paths.log_prob[:, 0], found.log_prob.double().sum(dim=1), rtol=0, atol=0)
    moved = (paths.log_prob[:, 1] - paths.log_prob[:, 0]).abs() > 1e-5
    early = (found.call >= 0).sum(dim=1) < length
    assert bool(moved[~early].any()) and bool(moved[early].any()) == (options == {})  # of two before the last call
    weight = paths.log_ratio.exp()
    _, of_text = found.final.unique(dim=0, return_inverse=True)
    names = {int(n): text(row) for row, n in zip(found.final, of_text, strict=True)}
    for key, probability in law_of_texts(base, length, options).items():
        same = torch.tensor([n for n, name in names.items() if name == key])
        value = weight * torch.isin(of_text, same)
        assert abs(float(value.mean()) - probability) < 5.5 * float(value.std()) / rows**0.5


def test_ended_trajectories_are_put_together_and_taken_apart():
    ended = rollout(MODEL, blank(40), PROCESS, stop_tokens=[STOP], block_length=1, seed=7)
    both = Trajectories.concatenate([ended[:15], ended[15:]])
    for field in dataclasses.fields(Trajectories):
        if field.name != "base_log_prob":
            assert torch.equal(getattr(both, field.name), getattr(ended, field.name)), field.name
    ends = torch.tensor([STOP in row for row in ended.final.tolist()])
    assert torch.equal(ended.ended, ends) and bool(ends.any()) and not bool(ends.all())
    assert Trajectories.concatenate([ended, rollout(MODEL, blank(1), PROCESS, seed=7)]).ended is None


def test_ended_trajectories_replay():
    found = rollout(MODEL, blank(50), PROCESS, stop_tokens=[STOP], block_length=1, steps=3, seed=7)
    counted = Counted(MODEL)
    torch.testing.assert_close(jump_log_prob(counted, found, PROCESS), found.log_prob)
    calls = found.call.max(dim=1).values + 1
    assert counted.rows == [int((calls > n).sum()) for n in range(found.network_calls)]
    assert torch.equal(
        found.states_before(found.network_calls)[found.call[:, -1] >= 0], found.final[found.call[:, -1] >= 0]
    )


# ---- orders, and several positions a call


def greedy(model, order, threshold=None, block_length=N, per_call=1):
    """The likeliest tokens of a table, by a loop: the sequence and the positions of each call."""
    state, calls = torch.full((N,), V), []
    first = N % block_length
    blocks = [range(first)] * bool(first) + [range(i, i + block_length) for i in range(first, N, block_length)]
    for block in blocks:
        while bool((state[list(block)] == V).any()):
            p = oracle.log_conditional(model, state).detach().exp()
            top = p.sort(dim=1, descending=True).values
            score = {
                "confidence": top[:, 0],
                "margin": top[:, 0] - top[:, 1],
                "entropy": (p * p.log()).sum(dim=1),
            }[order]
            left = sorted((i for i in block if state[i] == V), key=lambda i: -float(score[i]))
            least = math.inf if threshold is None else (-threshold if order == "entropy" else threshold)
            taken = left[:per_call] if threshold is None else [i for i in left if score[i] >= least] or left[:1]
            calls.append(sorted(taken))
            for i in taken:
                state = state.clone()
                state[i] = p[i].argmax()
    return state, calls


@pytest.mark.parametrize("order", MODEL_ORDERS)
@pytest.mark.parametrize("threshold", [None, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("block_length", [N, 2])
def test_orders_by_the_model_and_thresholds(order, threshold, block_length):
    several = []
    for seed in range(8):
        model = oracle.inconsistent(N, V, seed, spread=2.0)
        decoding = Decoding(order=order, threshold=threshold, temperature=0.0)
        found = rollout(model, blank(2), PROCESS, decoding=decoding, block_length=block_length, seed=0)
        state, calls = greedy(model, order, threshold, block_length)
        assert found.final.tolist() == [state.tolist()] * 2
        for b in range(2):
            made = [sorted(found.position[b][found.call[b] == n].tolist()) for n in range(found.network_calls)]
            assert made == calls
        several.append(len(calls) < N)
    assert any(several) or threshold is None or (order, threshold) == ("entropy", 0.2) or threshold == 0.95


def test_a_threshold_fills_a_block_in_one_call_or_a_position_a_call(head_rows):
    for threshold, block_length, calls, rows in (
        (0.0, None, 1, [15]),
        (0.0, 2, 2, [5, 10]),
        (1.1, None, 3, [15, 10, 5]),
        (1.1, 2, 3, [5, 10, 5]),
    ):
        head_rows.clear()
        found = rollout(
            MODEL,
            blank(5),
            PROCESS,
            decoding=Decoding(order="confidence", threshold=threshold),
            block_length=block_length,
            seed=0,
        )
        assert found.network_calls == calls and head_rows == rows
        assert torch.equal(found.final.sort(dim=1).values < V, torch.ones(5, N, dtype=torch.bool))


def test_rows_by_threshold_take_the_calls_that_they_need():
    """And draw what they would alone, up to an end as without."""
    model = oracle.inconsistent(4, V, seed=4, spread=2.0)
    decoding = Decoding(order="confidence", threshold=0.5)
    counted = Counted(model)
    whole = rollout(counted, blank(60, 4), PROCESS, base=model, decoding=decoding, block_length=2, seed=1)
    calls = whole.call.max(dim=1).values + 1
    assert set(calls.tolist()) == {2, 3, 4}
    n = whole.network_calls
    assert counted.rows[:n] == [int((calls > k).sum()) for k in range(n)]
    torch.testing.assert_close(whole.base_log_prob, whole.log_prob, rtol=0, atol=1e-6)
    ids = torch.tensor([17, 3, 40])
    part = rollout(model, blank(3, 4), PROCESS, decoding=decoding, block_length=2, seed=1, row_ids=ids)
    for name in ("final", "position", "token", "call", "log_prob"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[ids]), name
    # Each position of a call but the first is above the threshold.
    for b in range(60):
        for k in range(int(calls[b])):
            p = whole.log_prob[b][whole.call[b] == k].exp()
            assert bool((p[1:] >= 0.5).all()) and bool((p.diff() <= 0).all())
    ended = rollout(model, blank(60, 4), PROCESS, decoding=decoding, block_length=2, stop_tokens=[STOP], seed=1)
    made = ended.call >= 0
    assert not bool(made.all())
    for name in ("position", "token", "call", "log_prob"):
        assert torch.equal(getattr(ended, name)[made], getattr(whole, name)[made]), name


def test_left_to_right():
    tokens = torch.tensor([[V, V, V], [V, 0, V]])
    found = rollout(MODEL, tokens, PROCESS, order="left-to-right", seed=0)
    assert found.position.tolist() == [[0, 1, 2], [0, 2, -1]]
    two = rollout(MODEL, blank(2), PROCESS, order="left-to-right", steps=2, seed=0)
    assert two.call.tolist() == [[0, 0, 1]] * 2 and two.position.tolist() == [[0, 1, 2]] * 2
    # What is drawn at a position is keyed by where it is, not by the order.
    assert torch.equal(
        rollout(MODEL, blank(9), PROCESS, steps=1, seed=0).final,
        rollout(MODEL, blank(9), PROCESS, steps=1, order="left-to-right", seed=0).final,
    )


def test_head_rows_are_positions_drawn(head_rows):
    """By an order free of the model one for each jump; by confidence all that are masked of the block, in each call."""
    for order, expected in (("random", [4] * 3), ("left-to-right", [4] * 3), ("confidence", [12, 8, 4])):
        head_rows.clear()
        rollout(MODEL, blank(4), PROCESS, order=order, seed=0)
        assert head_rows == expected
    head_rows.clear()
    found = rollout(MODEL, blank(400), PROCESS, block_length=1, stop_tokens=[STOP], seed=0)
    assert sum(head_rows) == int((found.call >= 0).sum()) < 3 * 400


# ---- laws that leave tokens out


def cut(log_p, top_k=None, top_p=None, temperature=1.0):
    """Log-probabilities of one position [V] without what is left out, by sorting tokens."""
    log_p = (log_p / temperature).log_softmax(dim=0)
    ranked = sorted(range(len(log_p)), key=lambda v: -float(log_p[v]))[:top_k]
    if top_p is not None:
        total, kept = float(log_p[ranked].exp().sum()), []
        while ranked and sum(float(log_p[v].exp()) for v in kept) / total < top_p:
            kept.append(ranked.pop(0))
        ranked = kept
    out = torch.full_like(log_p, -math.inf)
    out[ranked] = log_p[ranked].log_softmax(dim=0)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "law", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.6, "temperature": 1.5}, {"top_p": 0.3}], ids=str
)
def test_cut_laws_are_those_of_the_sampler_and_of_the_base(law, order):
    tokens = blank(60)
    found = rollout(MODEL, tokens, PROCESS, base=BASE, decoding=Decoding(order=order, **law), seed=8)
    left_out = 0
    for b in range(60):
        for s in range(N):
            state = found.states_before(int(found.call[b, s]))[b]
            at, token = found.position[b, s], found.token[b, s]
            for model, log_prob in ((MODEL, found.log_prob[b, s]), (BASE, found.base_log_prob[b, s])):
                expected = cut(oracle.log_conditional(model, state).detach()[at], **law)[token]
                assert float(log_prob) == pytest.approx(float(expected), abs=1e-6)  # float32
            left_out += float(found.base_log_prob[b, s]) == -math.inf
    assert left_out > 0
    assert bool((found.log_prob > -math.inf).all())


def test_cut_laws_are_drawn_and_sum_to_one():
    """All paths that are drawn, in random order: their probabilities are those of the tables, and sum to 1."""
    law = {"top_k": 2, "top_p": 0.8}
    found = rollout(MODEL, blank(20_000), PROCESS, decoding=Decoding(**law), seed=9)
    table = torch.zeros_like(MODEL.logits.detach())
    for n, state in enumerate(oracle.sequences(N, V + 1)):
        for i in range(N):
            table[n, i, :V] = cut(oracle.log_conditional(MODEL, state).detach()[i], **law)
    expected = oracle.generated(oracle.Tabular(table, V + 1), N, V).flatten()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-12) and bool((expected == 0).any())
    counts = torch.bincount((found.final * torch.tensor([V * V, V, 1])).sum(dim=1), minlength=V**N).double()
    assert oracle.chi_square_z(counts, expected) < Z


class Row:
    """The same logits at every position."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def hidden_states(self, tokens, attention_mask=None):
        return self.logits.expand(*tokens.shape, -1)

    def head(self):
        return Head(torch.eye(len(self.logits)), None)


@pytest.mark.parametrize(
    ("law", "kept"),
    [
        ({"top_k": 1}, {0, 1}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.1}, {0, 1}),
        ({"top_p": 0.55}, {0, 1}),
        ({"top_p": 0.65}, {0, 1, 2, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.99}, {0, 1}),
    ],
    ids=str,
)
def test_equals_are_kept_or_left_out_together(law, kept):
    """Of probabilities .3, .3, .16, .08, .16; the mask token, likeliest of all, is not counted."""
    p = [0.3, 0.3, 0.16, 0.08, 0.16]
    model = Row([math.log(x) for x in p] + [9.0])
    found = rollout(model, torch.full((400, 1), 5), MaskedCTMC(5), decoding=Decoding(**law), seed=0)
    assert set(found.token.flatten().tolist()) == kept
    total = sum(p[v] for v in kept)
    for token, log_prob in zip(found.token[:, 0].tolist(), found.log_prob[:, 0].tolist(), strict=True):
        assert log_prob == pytest.approx(math.log(p[token] / total), abs=1e-6)
    greedy = rollout(model, torch.full((3, 1), 5), MaskedCTMC(5), decoding=Decoding(temperature=0.0, **law), seed=0)
    assert greedy.token.tolist() == [[0]] * 3 and float(greedy.log_prob[0, 0]) == pytest.approx(math.log(0.3 / total))


def test_logits_formed_for_a_law_are_the_fused_draws():
    """top_k of all tokens, and entropy's order of one position a block, draw what is drawn without."""
    for dtype in (torch.float64, torch.float32):
        model = oracle.Tabular(MODEL.logits.detach().to(dtype), V + 1)
        plain = rollout(model, blank(200), PROCESS, block_length=1, seed=2)
        assert_same(plain, rollout(model, blank(200), PROCESS, block_length=1, decoding=Decoding(top_k=V), seed=2))
        fused = rollout(model, blank(200), PROCESS, block_length=1, order="confidence", seed=2)
        formed = rollout(model, blank(200), PROCESS, block_length=1, order="entropy", seed=2)
        assert_same(fused, formed)


@pytest.mark.parametrize("decoding", [Decoding(order="entropy"), Decoding(top_k=2, top_p=0.9)], ids=str)
def test_autocast_around_a_rollout_does_not_round_its_logits(decoding):
    generator = torch.Generator().manual_seed(0)
    head = Head(
        torch.randn(V, 64, generator=generator),
        None,
        LoRA(*(torch.randn(size, generator=generator) for size in ((2, 64), (V, 2)))),
    )
    hidden = torch.randn(N, 64, generator=generator)

    class Linear:
        def hidden_states(self, tokens, attention_mask=None):
            return hidden.expand(len(tokens), -1, -1)

        def head(self):
            return head

    given = {"base": Linear(), "decoding": decoding, "seed": 0}
    expected = rollout(Linear(), blank(20), PROCESS, **given)
    with torch.autocast("cpu", torch.bfloat16):
        found = rollout(Linear(), blank(20), PROCESS, **given)
    assert_same(found, expected)
    assert torch.equal(found.base_log_prob, expected.base_log_prob)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(order="confidence"),
        Decoding(order="margin"),
        Decoding(top_k=50, top_p=0.9),
        Decoding(order="entropy", threshold=3.0),
    ],
    ids=str,
)
def test_no_array_of_positions_by_vocabulary(monkeypatch, decoding):
    """The largest tensor that a rollout allocates, inside of its operations too, with a vocabulary of 126,464."""
    rows, length, vocabulary, size = 4, 8, 126_464, 4
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(length, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator)

    class Network:
        def hidden_states(self, tokens, attention_mask=None):
            return hidden.expand(len(tokens), -1, -1)

        def head(self):
            return Head(weight, None)

    tokens, process = torch.full((rows, length), 126_336), MaskedCTMC(126_336, suppress=(1, 2), vocabulary=126_400)
    largest, found = largest_bytes(
        lambda: rollout(
            Network(),
            tokens,
            process,
            base=Network(),
            steps=None if decoding.threshold else 2,
            decoding=decoding,
            seed=0,
        )
    )
    assert bool((found.final != 126_336).all())
    # A call draws at 16 positions or more. What is formed at once is of one, as the workspace has no room for more.
    assert 4 * vocabulary <= largest <= 8 * vocabulary


# ---- guidance


def test_guided_laws_are_those_of_mixed_logits(head_rows):
    """Of the sampler and of the base, whose own logits are guided; two passes a call and one fused draw."""
    scale, counted = 1.5, Counted(MODEL)
    tokens = torch.tensor([[0, V, V]] * 40)
    decoding = Decoding(guidance=scale, temperature=0.7)
    found = rollout(counted, tokens, PROCESS, base=BASE, decoding=decoding, seed=3)
    assert counted.rows == [40] * 4 and head_rows == [40, 40]
    for b in range(40):
        for s in range(2):
            state = found.states_before(int(found.call[b, s]))[b]
            without = state.clone()
            without[0] = V
            at, token = found.position[b, s], found.token[b, s]
            for model, log_prob in ((MODEL, found.log_prob[b, s]), (BASE, found.base_log_prob[b, s])):
                given, other = (model.logits.detach()[model.index(x)][at, :V] for x in (state, without))
                expected = ((other + (scale + 1) * (given - other)) / 0.7).log_softmax(dim=0)[token]
                assert float(log_prob) == pytest.approx(float(expected), abs=1e-5)  # float32 sums of larger numbers


def test_guidance_hides_what_it_is_told_and_never_padding():
    scale, tokens = 2.0, torch.tensor([[1, 0, V]] * 4)
    seen = []

    class Seen(Counted):
        def hidden_states(self, tokens, attention_mask=None):
            seen.append(tokens[0].tolist())
            return super().hidden_states(tokens, attention_mask)

    options = {"decoding": Decoding(guidance=scale), "seed": 0}
    rollout(Seen(MODEL), tokens, PROCESS, **options)
    rollout(Seen(MODEL), tokens, PROCESS, attention_mask=torch.tensor([[0, 1, 1]] * 4), **options)
    rollout(Seen(MODEL), tokens, PROCESS, hide=torch.tensor([[True, False, False]] * 4), **options)
    assert seen[0::2] == [[1, 0, V]] * 3
    assert seen[1::2] == [[V, V, V], [1, V, V], [V, 0, V]]


def test_guidance_of_scale_0_is_none():
    tokens = torch.tensor([[0, V, V]] * 20)
    counted = Counted(MODEL)
    assert_same(
        rollout(MODEL, tokens, PROCESS, seed=1),
        rollout(counted, tokens, PROCESS, decoding=Decoding(guidance=0.0), seed=1),
    )
    assert counted.rows == [20, 20]


def test_guidance_goes_with_an_adapter_and_a_bias():
    """Head, adapter and bias are linear in hidden states whose weights sum to 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, N, 5, generator=generator)
    head = Head(
        torch.randn(V, 5, generator=generator),
        torch.randn(V, generator=generator),
        LoRA(torch.randn(2, 5, generator=generator), torch.randn(V, 2, generator=generator), 0.5),
    )

    class Linear:
        def hidden_states(self, tokens, attention_mask=None):
            return hidden[(tokens[:, 0] == V).long()]

        def head(self):
            return head

    found = rollout(Linear(), torch.tensor([[0, V, V]] * 30), PROCESS, decoding=Decoding(guidance=1.0), seed=0)
    given, other = head.logits(hidden)
    law = (2 * given - other).log_softmax(dim=1)
    expected = law[found.position, found.token]
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)


def test_guidance_of_a_soft_cap_is_refused():
    class Capped(Row):
        def head(self):
            return super().head()._replace(softcap=5.0)

    with pytest.raises(ValueError, match="a soft cap behind the head does not allow: leave out guidance"):
        rollout(Capped([0.0, 1.0]), torch.tensor([[0, 2]]), MaskedCTMC(2), decoding=Decoding(guidance=1.0), seed=0)


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "likeliest"}, "order must be one of random, left-to-right, confidence, entropy, margin; got"),
        (
            {"threshold": 0.5},
            "threshold goes with order confidence, entropy, margin, .* got 'random'",
        ),
        ({"threshold": math.nan, "order": "confidence"}, "threshold must be a number"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": math.inf}, "temperature must be >= 0 and finite"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"guidance": -0.5}, "guidance must be >= 0"),
    ],
    ids=str,
)
def test_bad_decodings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


@pytest.mark.parametrize(
    "options", [{"top_k": 2.0}, {"top_p": "0.9"}, {"temperature": True}, {"guidance": None}], ids=str
)
def test_decodings_of_a_wrong_type_are_named(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be a"):
        Decoding(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random", "decoding": Decoding()}, "order and decoding= exclude each other"),
        ({"steps": 2, "decoding": Decoding(order="confidence", threshold=0.5)}, "leave out steps=2"),
        ({"stop_tokens": [V]}, f"token {V} ends a row but is never drawn"),
        ({"stop_tokens": [STOP], "start": torch.tensor([0.0])}, r"start must be int64 \[1\]; got torch.float32 \[1\]"),
        ({"hide": torch.zeros(1, 2).bool(), "decoding": Decoding(guidance=1.0)}, r"hide must be bool \[1, 3\]"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rollout(MODEL, blank(1), PROCESS, seed=0, **options)


def test_other_orders_are_of_random_ones():
    found = rollout(MODEL, blank(2), PROCESS, base=BASE, order="left-to-right", seed=0)
    with pytest.raises(ValueError, match="other orders are drawn as \"random\" draws them; got 'left-to-right'"):
        log_prob_over_orders(MODEL, BASE, found, PROCESS, orders=2, decoding=Decoding(order="left-to-right"), seed=0)


def test_a_suppressed_token_ends_no_row():
    process = dataclasses.replace(PROCESS, suppress=(STOP,))
    with pytest.raises(ValueError, match="take it out of stop_tokens"):
        rollout(MODEL, blank(1), process, stop_tokens=[STOP], seed=0)
