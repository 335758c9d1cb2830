"""Schedules of users: derivatives, inverses to rounding, and what is no schedule."""

import math
import pickle

import pytest
import torch

from dam.ctmc import Cosine, MaskedCTMC, UserSchedule
from dam.ctmc.schedules import define
from dam.derive import DerivativeError

TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)
EPS = torch.finfo(torch.float64).eps


def smooth(t):
    """Slope 0 at both ends."""
    return t**2 * (3 - 2 * t)


def cosine(t):
    angle = t * (math.pi / 2)
    return 1 - torch.cos(angle)


def steep(t):
    return torch.where(t < 0.5, 1e-3 * t, 5e-4 + (1 - 5e-4) * (2 * t - 1) ** 3)


def polynomial(t):
    total = 0.0
    for power in range(1, 4):
        total = total + t**power / 3
    return total


@pytest.mark.parametrize("alpha", [smooth, cosine, steep, polynomial])
def test_a_defined_schedule_is_what_autograd_makes_of_its_function(alpha):
    """The slope to a few roundings of its terms; the inverse to those of alpha, which it is solved for."""
    schedule, other = define(alpha), UserSchedule(alpha)
    torch.testing.assert_close(schedule.derivative(TIMES), other.derivative(TIMES), rtol=1e-14, atol=1e-14)
    for each in (schedule, other):
        values = each.alpha(TIMES)
        found = each.inverse(values)
        torch.testing.assert_close(each.alpha(found), values, rtol=4 * EPS, atol=4 * EPS)
        assert bool(((found >= 0) & (found <= 1)).all())
        inside = each.derivative(TIMES) > 0.1
        torch.testing.assert_close(found[inside], TIMES[inside], rtol=1e-13, atol=1e-14)
    rates = schedule.derivative(TIMES[:-1]) / (1 - schedule.alpha(TIMES[:-1]))
    torch.testing.assert_close(schedule.unmasking_rate(TIMES[:-1]), rates, rtol=0, atol=0)


def test_inverses_take_few_calls_and_any_dtype():
    """Newton's method: bisection alone takes some 53. 1 - cos is 0 to rounding at times below 1e-8."""
    calls = []

    def counted(t):
        calls.append(len(t))
        return cosine(t)

    schedule = UserSchedule(counted, Cosine().derivative)
    calls.clear()
    found = schedule.inverse(TIMES[1:-1])
    torch.testing.assert_close(found, Cosine().inverse(TIMES[1:-1]), rtol=1e-14, atol=1e-15)
    assert len(calls) < 15
    low = schedule.inverse(TIMES.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), Cosine().inverse(TIMES.float().double()), rtol=1e-7, atol=1e-8)


def test_inverses_near_a_start_that_is_infinitely_steep():
    """Times of all sizes: alpha of what is found to its roundings, and no more calls than bits and powers of 2."""
    calls = []

    def root(t):
        calls.append(len(t))
        return t**0.1

    schedule = UserSchedule(root, lambda t: 0.1 * t**-0.9)
    calls.clear()
    wanted = torch.tensor([0.0, 1e-30, 1e-3, 1e-2, 0.5, 1.0], dtype=torch.float64)
    found = schedule.inverse(wanted)
    torch.testing.assert_close(found, wanted**10, rtol=1e-13, atol=0)
    assert len(calls) < 64
    late = UserSchedule(lambda t: 0.25 + 0.75 * t)
    torch.testing.assert_close(late.inverse(torch.tensor([0.25, 0.1, 1.0])), torch.tensor([0.0, 0.0, 1.0]))


def test_masked_processes_run_on_a_defined_schedule_as_on_the_library_s():
    """The same times of jumps and rates: alpha and its inverse agree to rounding."""
    tokens = torch.full((64, 6), 4)
    processes = [MaskedCTMC(4, schedule) for schedule in (define(cosine), Cosine())]
    one, other = (process.jump_times(tokens, seed=3) for process in processes)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    rates = [p.log_rates(torch.zeros(64, 6, 5), tokens, TIMES[1:65]) for p in processes]
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-12, atol=1e-12)


def test_the_slope_shows_its_source_and_is_pickled_by_the_function_s_name():
    schedule = define(smooth)
    first, _, text = schedule.slope.source.partition("\n")
    assert first == f"# smooth, {__file__}:{smooth.__code__.co_firstlineno}"
    space = {}
    exec(compile(text, "slope", "exec"), space)
    torch.testing.assert_close(space["dsmooth"](TIMES, d_t=torch.ones_like(TIMES)), 6 * TIMES * (1 - TIMES))
    loaded = pickle.loads(pickle.dumps(schedule))
    assert (
        loaded == schedule and loaded != define(cosine) and torch.equal(loaded.inverse(TIMES), schedule.inverse(TIMES))
    )


def half(t):
    return t / 2


@pytest.mark.parametrize("make", [define, UserSchedule])
@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (lambda t: 1 - t, "alpha must increase"),
        (half, "half is no schedule: alpha must increase .* 0.5 at 1"),
        (lambda t: 2 * t - 1, "-1 at 0"),
        (lambda t: 2 * t, "2 at 1"),
        (lambda t: t * (1 + torch.sin(9 * t * math.pi)), "alpha must increase"),
        # Between the 129 times that are looked at first.
        (lambda t: t + 0.02 * torch.sin(256 * math.pi * t), r"its slope at time 0\.00\d+ is -1\d"),
        (lambda t: 0.5 * t + 0.5 * (t > 0.5), "near time 0.5 alpha changes by 0.5 more"),
        (lambda t: torch.max(t) * t, "of each time alone"),
        (lambda t: torch.cumsum(t, 0) / 64.5, "of each time alone"),
        (lambda t: torch.log(t - 0.5), "not a number at time 0"),
        (lambda t: torch.sum(t), r"a value for each time of a tensor \[129\]; got \[\]"),
        (lambda t: math.sin(t), "takes no tensor of times"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(make, alpha, message):
    with pytest.raises(ValueError, match=message):
        make(alpha)


def test_a_slope_that_is_not_the_derivative_is_refused():
    with pytest.raises(ValueError, match="or the slope is not its derivative"):
        UserSchedule(smooth, lambda t: 5 * t * (1 - t))


@pytest.mark.parametrize("alpha", [torch.sqrt, lambda t: t**0.1, lambda t: 1 - torch.sqrt(1 - t)])
def test_infinite_slopes_at_an_end_are_no_jumps(alpha):
    assert UserSchedule(alpha).alpha(torch.ones(1)) == 1


def test_ends_and_what_is_no_number():
    """alpha' / (1 - alpha) has no bound at time 1, where a slope of 0 would make it 0 / 0."""
    schedule = define(smooth)
    assert schedule.unmasking_rate(torch.tensor([0.0, 1.0])).tolist() == [0.0, math.inf]
    found = schedule.inverse(torch.tensor([0.5, math.nan, 1.0]))
    assert found[1].isnan() and found[0] == 0.5 and found[2] == 1


def test_what_has_no_derivative_that_could_be_written_is_refused_with_its_line():
    with pytest.raises(DerivativeError, match="no known derivative") as caught:
        define(lambda t: torch.special.erfcx(1 - t))
    assert caught.value.line.file == __file__
    with pytest.raises(ValueError, match="of the time alone; it has 2"):
        define(lambda t, power: t**power)
    with pytest.raises(DerivativeError, match="no Python source"):
        define(torch.square)
