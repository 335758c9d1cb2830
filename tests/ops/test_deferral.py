"""Checks whose result is on a device: read after each op, or at the end of dam.deferred_checks(), never nowhere."""

import math

import pytest
import torch

import dam
from dam.backends import deferral
from dam.ctmc import MaskedCTMC
from dam.models import Head
from dam.rollout import rollout

ON_DEVICE = ("triton", "cuda")
AT_THE_END = r"\(found when the block of dam.deferred_checks\(\) ended\)"


def bad_jump(row=3):
    logits = torch.zeros(5, 40)
    logits[row, 7] = math.nan
    return dam.jump(logits, seed=1)


def bad_linear_jump(row=2):
    hidden = torch.ones(4, 8)
    hidden[row] = math.inf
    return dam.linear_jump(hidden, torch.ones(40, 8), seed=1)


def bad_weights(group=1, trajectory=2):
    cost = torch.zeros(3, 4)
    cost[group, trajectory] = -math.inf
    return dam.adjoint_weights(torch.zeros(3, 4, 2), cost)


def bad_tilt(group=2, trajectory=1):
    reward = torch.zeros(3, 4)
    reward[group, trajectory] = math.nan
    return dam.tilt_to_ess(reward, 2.0, max_tilt=1.0)


CALLS = {
    bad_jump: "jump: row 3 of the logits",
    bad_linear_jump: "linear_jump: row 2 of the logits",
    bad_weights: "adjoint_weights: trajectory 2 of group 1 has",
    bad_tilt: r"tilt_to_ess: reward\[2, 1\] is",
}


@pytest.mark.parametrize("call", CALLS)
def test_without_a_block_each_call_raises(backend, call):
    with pytest.raises(ValueError, match=CALLS[call]) as caught:
        call()
    assert "deferred" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_a_block_raises_at_its_end_by_name(backend, call):
    reached = False
    with pytest.raises(ValueError, match=CALLS[call]), dam.deferred_checks():
        dam.jump(torch.zeros(5, 40), seed=1)
        call()
        dam.tilt_to_ess(torch.zeros(2, 4), 2.0, max_tilt=1.0)
        reached = True
    assert reached == (backend in ON_DEVICE)
    assert deferral._state.unread is None
    with pytest.raises(ValueError, match=CALLS[call]):  # and after it as before
        call()


def test_the_first_call_is_blamed(backend):
    with pytest.raises(ValueError, match=r"reward\[0, 3\]"), dam.deferred_checks():
        bad_tilt(0, 3)
        bad_jump()
        bad_tilt()


def test_nothing_is_read_inside_a_block(backend, monkeypatch):
    """Of ops that read nothing else; and at its end everything at once."""
    if backend not in ON_DEVICE:
        pytest.skip("a CPU need not be waited for")
    reads = []
    for name in ("__int__", "__bool__", "__float__", "item", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, real=real: reads.append(name) or real(x))

    def both():
        dam.adjoint_weights(torch.zeros(3, 4, 2), torch.zeros(3, 4))
        dam.tilt_to_ess(torch.zeros(3, 4), 2.0, max_tilt=1.0)

    both()
    assert reads == ["__int__", "__int__"]
    reads.clear()
    with dam.deferred_checks():
        both()
        both()
        assert reads == []
    assert set(reads) == {"tolist"}


def test_good_calls_of_a_block_are_what_they_are_without(backend):
    log_ratio, cost = torch.linspace(-1, 1, 24).view(3, 4, 2), torch.linspace(0, 2, 12).view(3, 4)
    expected = dam.adjoint_weights(log_ratio, cost)
    with dam.deferred_checks():
        found = dam.adjoint_weights(log_ratio, cost)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_block_raises_comes_of_what_was_bad_first(backend):
    """An index out of range, say, of a target that could not be drawn."""
    with pytest.raises(ValueError, match="jump: row 3") as caught, dam.deferred_checks():
        bad_jump()
        raise IndexError("of a later call")
    assert (backend in ON_DEVICE) == isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(IndexError, match="of a later call"), dam.deferred_checks():
        dam.jump(torch.zeros(5, 40), seed=1)
        raise IndexError("of a later call")


def test_a_device_that_does_not_answer_hides_no_error(backend, monkeypatch):
    def fails(unread):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(deferral, "_problem", fails)
    with pytest.raises(KeyError, match="own"), dam.deferred_checks():
        raise KeyError("own")
    with pytest.raises(RuntimeError, match="device-side"), dam.deferred_checks():
        pass


def test_blocks_are_read_each_for_itself(backend):
    with pytest.raises(ValueError, match="jump: row 3") as caught, dam.deferred_checks():
        with pytest.raises(ValueError, match="reward"), dam.deferred_checks():
            bad_tilt()
        bad_jump()
    assert backend not in ON_DEVICE or "deferred_checks" in str(caught.value)


@pytest.mark.parametrize("call", [bad_weights, bad_tilt])
def test_check_is_as_jump_s(backend, call):
    """Not asked for, nothing is raised, and what is good beside what is bad is as it is without it."""
    cost = torch.linspace(0, 1, 12).view(3, 4)
    cost[1, 2] = math.nan
    if call is bad_weights:
        run = lambda x, **how: dam.adjoint_weights(torch.zeros(*x.shape, 2), x, **how).weight  # noqa: E731
    else:
        run = lambda x, **how: dam.tilt_to_ess(x, 2.0, max_tilt=9.0, **how)  # noqa: E731
    with pytest.raises(ValueError, match=r"1, 2\]|trajectory 2 of group 1"):
        run(cost)
    good = [0, 2]
    assert torch.equal(run(cost, check=False)[good], run(cost[good]))
    with pytest.raises(TypeError, match="check must be True or False; got int"):
        run(cost, check=1)


class Unwell:
    """A denoiser that has nothing to draw at state 3 of the rollout's, and fails at tokens that are none."""

    def __init__(self):
        self.calls = 0

    def hidden_states(self, tokens, attention_mask=None):
        hidden = torch.nn.functional.embedding(tokens, torch.eye(6)).mean(dim=1, keepdim=True).expand(-1, 4, -1).clone()
        if self.calls == 2:
            hidden[1] = math.nan
        self.calls += 1
        return hidden

    def head(self):
        return Head(torch.eye(6)[:5].contiguous(), None)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_rollout_names_what_it_cannot_draw(backend, order):
    denoiser = Unwell()
    with pytest.raises(ValueError, match=r"linear_jump: row \d of the logits"):
        rollout(denoiser, torch.full((3, 4), 5), MaskedCTMC(5), order=order, seed=0)
    assert denoiser.calls == (4 if backend in ON_DEVICE else 3)
