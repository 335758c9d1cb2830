"""What would be silently wrong is refused, or right: ends of schedules, paths of other processes, graphless bases."""

import pytest
import torch

from dam import flows

FLOAT64 = torch.float64
BASE = flows.GaussianMixture(
    log_weight=torch.tensor([0.0, 0.5], dtype=FLOAT64),
    mean=torch.tensor([[-1.0, 0.0], [1.5, 0.5]], dtype=FLOAT64),
    variance=torch.tensor([[0.2, 0.3], [0.3, 0.1]], dtype=FLOAT64),
)
PROCESS = flows.FlowProcess()
VELOCITY = BASE.model(PROCESS.schedule)


def drawn(process, model, *, rows=8, steps=10, dtype=FLOAT64, **options):
    times = process.times(steps)
    start = process.initial((rows, 2), start=float(times[0]), seed=1, dtype=dtype)
    return flows.simulate(process, model, start, times=times, seed=1, **options)


def test_the_last_step_of_a_data_prediction_is_euler_s_on_the_circle_too():
    """beta is 0 at time 1 and no rounding, in float32 as well: else the drift there is 1e16 times a rounding."""
    process = flows.FlowProcess(flows.Trigonometric(), "data")
    assert not bool(process.finite(torch.ones(1, dtype=FLOAT64)))
    model = BASE.model(process.schedule, "data")
    final = drawn(process, model, rows=4000, steps=60, dtype=torch.float32).final
    mean, spread = BASE.moments()
    # Of 4,000 samples, five standard errors of each.
    torch.testing.assert_close(final.double().mean(dim=0), mean, rtol=0, atol=5 * float(spread.max()) / 4000**0.5)
    torch.testing.assert_close(final.double().std(dim=0), spread, rtol=0.06, atol=0)


def test_paths_of_another_process_are_not_matched():
    terminal = torch.ones(8, 2, dtype=FLOAT64)
    for other in (PROCESS.ode(), flows.FlowProcess(noise=0.3)):
        with pytest.raises(ValueError, match="the path is of another process"):
            flows.adjoint_targets(PROCESS, VELOCITY, drawn(other, VELOCITY), terminal)


def test_times_are_those_of_the_process():
    start = torch.zeros(2, 2, dtype=FLOAT64)
    for times in ([0.0, 1.0, 1.5], [-1.0, 0.0, 0.5]):
        with pytest.raises(ValueError, match=r"times must be in \[0, 1\]"):
            flows.simulate(PROCESS.ode(), VELOCITY, start, times=times, seed=1)
    path = flows.simulate(PROCESS, VELOCITY, start, times=[0.1, 0.3, 0.5], seed=1)
    with pytest.raises(ValueError, match=r"must end at time 1, where the cost is; got 0\.5"):
        flows.adjoint_targets(PROCESS, VELOCITY, path, torch.ones_like(start))


def test_a_base_without_a_graph_has_no_adjoint():
    path, terminal = drawn(PROCESS, VELOCITY), torch.ones(8, 2, dtype=FLOAT64)
    with pytest.raises(ValueError, match=r"as under torch\.no_grad"):
        flows.lean_adjoint(PROCESS, torch.no_grad()(VELOCITY), path, terminal)
    with torch.no_grad():
        flows.lean_adjoint(PROCESS, VELOCITY, path, terminal)


def test_a_cost_is_of_the_states_and_one_number_each():
    state, weight = torch.ones(4, 2, dtype=FLOAT64), torch.ones(2, dtype=FLOAT64, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on the states"):
        flows.cost_gradient(lambda x: (x.round().detach() * weight).sum(dim=1), state)
    path = drawn(PROCESS, VELOCITY)
    with pytest.raises(ValueError, match=r"one number for each row, \[8\]; got \[8, 2\]"):
        flows.draft_loss(path, VELOCITY, lambda x: x.square())
    with pytest.raises(ValueError, match="terminal has entries that are not finite"):
        flows.lean_adjoint(PROCESS, VELOCITY, path, torch.full((8, 2), torch.nan, dtype=FLOAT64))


def test_no_rows_and_other_dtypes():
    none = drawn(PROCESS, VELOCITY, rows=0)
    assert len(flows.adjoint_targets(PROCESS, VELOCITY, none, torch.zeros(0, 2, dtype=FLOAT64)).time) == 0
    path = drawn(PROCESS, VELOCITY, dtype=torch.float32)
    adjoint = flows.lean_adjoint(PROCESS, VELOCITY, path, torch.ones(8, 2, dtype=FLOAT64, requires_grad=True))
    assert adjoint.dtype == torch.float32 and not adjoint.requires_grad


def test_states_in_another_memory_format_are_made_again():
    """A convolution of them has other last bits than of contiguous ones."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(8, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 8, 3, padding=1)
    )
    start = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    path = flows.simulate(PROCESS, lambda x, _: net(x), start, times=PROCESS.times(7), seed=1, checkpoint_every=3)
    assert path.states.shape == (8, 4, 8, 16, 16)
