"""Rows as a server fills them in: what is drawn for one depends on no other, and nothing is drawn twice."""

import json

import pytest
import torch

from dam.ctmc import MaskedCTMC
from dam.engines import rows
from dam.engines.rows import Request, Row, advance
from dam.models.attention import Blocks
from dam.rollout import plan

MASK, VOCABULARY, WIDTH = 6, 9, 4


def request(**changes):
    values = {"seed": 2**64 - 3, "row_id": -(2**62), "length": 12, "block_length": WIDTH, "mask_token": MASK}
    return Request(**{**values, "suppress": (1,), "vocabulary": 8, "temperature": 0.5, **changes})


def logits_of(state):
    """Some that depend on all of a row."""
    generator = torch.Generator().manual_seed(hash(tuple(state)) % 2**31)
    return torch.randn(len(state), VOCABULARY, generator=generator)


def filled(*asked, together=True, prompt=(2, 3, 4, 5, 0)):
    """Jumps of each row, of rows that go through their blocks in step, or one after another."""
    if not together:
        return [filled(one, prompt=prompt)[0] for one in asked]
    planned = [Row(one, len(prompt)) for one in asked]
    states = [list(prompt) + [MASK] * (one.length - len(prompt)) for one in asked]
    jumps = [[] for _ in asked]
    for begin in range(0, asked[0].length, WIDTH):
        masks = [state[begin : begin + WIDTH].count(MASK) for state in states]
        blocks = [row.block(begin, count) for row, count in zip(planned, masks, strict=True)]
        for _ in range(WIDTH + 1):
            ids = torch.tensor([state[begin : begin + WIDTH] for state in states]).flatten()
            logits = torch.cat([logits_of(state)[begin : begin + WIDTH] for state in states])
            done = advance(blocks, ids, logits)
            for n, state in enumerate(states):
                state[begin : begin + WIDTH] = ids.view(-1, WIDTH)[n].tolist()
            if all(done):
                break
        assert all(done)
        for made, block in zip(jumps, blocks, strict=True):
            made.extend(block.jumps)
    return jumps


def test_rows_of_other_laws_share_a_call_and_draw_what_they_draw_alone():
    asked = (
        request(),
        request(seed=4),
        request(row_id=5),
        request(temperature=0.0),
        request(steps=2),
        request(order="left-to-right"),
        request(suppress=(1, 2, 3, 4)),
    )
    together = filled(*asked)
    assert together == filled(*asked, together=False)
    assert len({tuple(jump.token for jump in jumps) for jumps in together}) == len(asked)
    assert {jump.token for jump in together[-1]} <= {0, 5, 7}
    assert all(jump.token not in (MASK, 1, 8) for jumps in together for jump in jumps)


def test_calls_are_those_that_a_rollout_plans():
    tokens = torch.full((1, 12), MASK)
    tokens[:, :5] = 0
    for order, steps in (("random", None), ("random", 3), ("left-to-right", 4)):
        (jumps,) = filled(request(order=order, steps=steps))
        number = Blocks(WIDTH, "sequence").numbers(tokens)
        ids = torch.tensor([-(2**62)])
        path = plan(tokens, MaskedCTMC(MASK), order, steps, number, seed=2**64 - 3, row_ids=ids)
        assert [jump.position for jump in jumps] == path.position[0].tolist()
        assert [jump.call for jump in jumps] == path.call[0].tolist()


def test_only_rows_that_are_filled_are_drawn_from(monkeypatch):
    """So no array is made of a whole block of each row, but the logits that are given."""
    seen = []
    draw = rows.jump
    monkeypatch.setattr(rows, "jump", lambda logits, **given: seen.append(len(logits)) or draw(logits, **given))
    filled(*(request(row_id=n) for n in range(3)))
    assert seen == [3] * 7


def test_a_block_that_was_filled_in_before_draws_nothing_and_half_of_one_is_refused():
    row = Row(request(), 5)
    ids, logits = torch.zeros(WIDTH, dtype=torch.int64), torch.zeros(WIDTH, VOCABULARY)
    again = row.block(8, 0)
    assert advance([again], ids, logits) == [True] and again.jumps == [] and not ids.any()
    with pytest.raises(ValueError, match="a block half filled in, from position 8 on"):
        advance([row.block(8, 2)], ids, logits)
    # Begun anew, as after a server has taken back its memory, it draws the same.
    first, second = row.block(8, 4), row.block(8, 4)
    for block in (first, first, second):
        advance([block], ids, logits)
    assert first.jumps[:1] == second.jumps and len(first.jumps) == 2


def test_a_row_that_ends_is_filled_up_and_counts_one_more_call():
    prompt = (2, 3, 4, 5, 0)
    asked = request(order="left-to-right", stop_tokens=(7,), start=5, suppress=(0, 1, 2, 3, 4, 5))
    row, ids = Row(asked, len(prompt)), torch.tensor([0, MASK, MASK, MASK])
    block = row.block(4, 3)
    assert advance([block], ids, torch.zeros(WIDTH, VOCABULARY)) == [False]
    assert block.ended == 7 and ids.tolist() == [0, 7, 7, 7] and len(block.jumps) == 1
    assert advance([block], ids, torch.zeros(WIDTH, VOCABULARY)) == [True] and len(block.jumps) == 1


def test_a_request_is_the_same_behind_json():
    asked = request(stop_tokens=(7, 3), steps=3)
    parameters = asked.as_parameters()
    assert Request.of_parameters(json.loads(json.dumps(parameters))) == asked
    with pytest.raises(ValueError, match=r"contract 0 and this server's dam of 1: install one release"):
        Request.of_parameters({**parameters, "dam": 0})
    with pytest.raises(TypeError, match="colour"):
        Request.of_parameters({**parameters, "dam_colour": 3})


@pytest.mark.parametrize(
    ("changes", "prompt", "message"),
    [
        ({"length": 10}, 5, "whole blocks of 4: a sequence of 10 tokens"),
        ({"order": "confidence"}, 5, "by the orders random, left-to-right"),
        ({"temperature": -1.0}, 5, "temperature must be >= 0"),
        ({}, 12, "a prompt of 12 tokens leaves nothing to fill in of 12"),
        ({"stop_tokens": (7,), "start": 4}, 5, "start is 4, in the prompt of 5 tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, prompt, message):
    with pytest.raises(ValueError, match=message):
        Row(request(**changes), prompt)
