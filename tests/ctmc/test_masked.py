import pytest
import torch

from dam.ctmc import Cosine, Linear, MaskedCTMC
from tests.oracle import chi_square_z

MASK = 9
# |z| beyond 5.5 has probability below 1e-7 for a standard normal; chi-square with few cells has a heavier upper tail.
Z = 6.5


def test_schedules_are_increasing_with_the_stated_derivative_and_inverse():
    time = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for schedule in (Linear(), Cosine()):
        ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(schedule.inverse(schedule.alpha(time)), time)
        step = 1e-6  # central differences err by about step^2 and rounding / step: below 1e-9
        slope = (schedule.alpha(time + step) - schedule.alpha(time - step)) / (2 * step)
        torch.testing.assert_close(schedule.derivative(time), slope, rtol=0, atol=1e-8)


def test_escape_rate_counts_masks():
    tokens = torch.tensor([[MASK, 1, MASK], [1, 2, 3]])
    rate = MaskedCTMC(MASK).escape_rate(tokens, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(rate, torch.tensor([4.0, 0.0]))  # 2 masks at 1 / (1 - t) = 2 each


def test_jump_times_follow_the_schedule():
    tokens = torch.full((100_000, 1), MASK)
    for schedule in (Linear(), Cosine()):
        times = MaskedCTMC(MASK, schedule).jump_times(tokens, torch.Generator().manual_seed(0))
        share = float((times < 0.3).double().mean())
        expected = float(schedule.alpha(torch.tensor(0.3, dtype=torch.float64)))
        assert abs(share - expected) < 5.5 * (expected * (1 - expected) / len(times)) ** 0.5


def test_remask_visits_every_number_of_masks_and_every_subset_alike():
    initial = torch.tensor([MASK, 5, MASK, MASK]).expand(60_000, 4)
    final = torch.tensor([1, 5, 2, 3]).expand(60_000, 4)
    states = MaskedCTMC(MASK).remask(initial, final, torch.Generator().manual_seed(1))
    masked = states == MASK
    assert not bool(masked[:, 1].any()), "a given token was masked"
    assert bool((masked | (states == final)).all())
    code = (masked[:, [0, 2, 3]] * torch.tensor([4, 2, 1])).sum(1)
    counts = torch.bincount(code, minlength=8).double()
    # Number uniform on 1 .. 3, then the subset uniform: 3 singletons, 3 pairs, 1 triple.
    probability = torch.tensor([0, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 3], dtype=torch.float64)
    assert chi_square_z(counts, probability) < Z


@pytest.mark.parametrize("seeded", [True, False])
def test_stratified_states_have_the_law_of_others_and_each_number_of_masks_as_often_in_a_group(seeded):
    """Groups of 6 outcomes of 3 positions: two of each number; over groups every outcome's states as without."""
    groups = 20_000
    initial, final = torch.full((groups, 6, 3), MASK), torch.arange(3).expand(groups, 6, 3)
    given = {"seed": 3} if seeded else {"generator": torch.Generator().manual_seed(3)}
    masked = MaskedCTMC(MASK).remask(initial, final, stratified=True, **given) == MASK
    count = masked.sum(dim=2)
    assert all(bool(((count == m).sum(dim=1) == 2).all()) for m in (1, 2, 3))
    number = (masked * torch.tensor([4, 2, 1])).sum(dim=2)
    expected = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3], dtype=torch.float64) / 9  # by subset of positions
    for k in (0, 5):
        counts = torch.bincount(number[:, k], minlength=8).double()
        assert counts[0] == 0 and abs(chi_square_z(counts[1:], expected[1:])) < Z
    # The numbers of two of a group are not independent; which outcome gets which is.
    assert abs(float(torch.corrcoef(count[:, :2].T.double())[0, 1]) + 1 / 5) < Z * groups**-0.5
    if seeded:
        part = MaskedCTMC(MASK).remask(
            initial[5:7], final[5:7], stratified=True, seed=3, row_ids=torch.arange(30, 42).view(2, 6)
        )
        assert torch.equal(part == MASK, masked[5:7])


@pytest.mark.parametrize("stratified", [True, False])
def test_antithetic_states_have_masks_where_their_twins_have_none(stratified):
    """And each by itself a number of masks uniform on 0 .. 3, any subset."""
    groups = 20_000
    initial = torch.tensor([MASK, 5, MASK, MASK]).expand(groups, 4, 4)
    final = torch.tensor([1, 5, 2, 3]).expand(groups, 4, 4)
    states = MaskedCTMC(MASK).remask(initial, final, seed=3, stratified=stratified, antithetic=True)
    masked = states == MASK
    assert not bool(masked[..., 1].any()) and bool((masked | (states == final)).all())
    assert torch.equal(masked[:, :2] ^ masked[:, 2:], initial[:, :2] == MASK)
    expected = torch.tensor([3, 1, 1, 1, 1, 1, 1, 3], dtype=torch.float64) / 12  # by subset of positions
    for k in (0, 3):
        code = (masked[:, k][:, [0, 2, 3]] * torch.tensor([4, 2, 1])).sum(dim=1)
        assert abs(chi_square_z(torch.bincount(code, minlength=8).double(), expected)) < Z
    with pytest.raises(ValueError, match="with an even K"):
        MaskedCTMC(MASK).remask(initial[:, :3], final[:, :3], seed=3, antithetic=True)


def test_remask_by_seed_depends_on_the_row_id_only():
    """The law is that by a generator, and padding in front or other rows change nothing."""
    process = MaskedCTMC(MASK)
    initial = torch.tensor([MASK, 5, MASK, MASK]).expand(60_000, 4)
    final = torch.tensor([1, 5, 2, 3]).expand(60_000, 4)
    states = process.remask(initial, final, seed=1)
    masked = states == MASK
    code = (masked[:, [0, 2, 3]] * torch.tensor([4, 2, 1])).sum(1)
    probability = torch.tensor([0, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 3], dtype=torch.float64)
    assert not bool(masked[:, 1].any()) and chi_square_z(torch.bincount(code, minlength=8).double(), probability) < Z
    ids = torch.tensor([[7, 40_000]])
    padded = (torch.nn.functional.pad(x[:2], (3, 0), value=0)[None] for x in (initial, final))
    assert torch.equal(process.remask(*padded, seed=1, row_ids=ids)[..., 3:], states[ids])
    # Not by the order of a rollout under the same seed: the position that unmasks last would be masked for certain.
    last = process.jump_times(initial, seed=1).masked_fill(initial != MASK, -1).argmax(dim=1)
    share = float(masked.gather(1, last[:, None]).double().mean())
    assert abs(share - 2 / 3) < 5.5 * (2 / 9 / len(states)) ** 0.5


def test_jump_times_by_seed_follow_the_schedule():
    tokens = torch.full((1000, 100), MASK)
    times = MaskedCTMC(MASK, Cosine()).jump_times(tokens, seed=0)
    share, expected = (
        float((times < 0.3).double().mean()),
        float(Cosine().alpha(torch.tensor(0.3, dtype=torch.float64))),
    )
    assert abs(share - expected) < 5.5 * (expected * (1 - expected) / times.numel()) ** 0.5
    assert torch.equal(MaskedCTMC(MASK, Cosine()).jump_times(tokens[5], seed=0, row_ids=torch.tensor(5)), times[5])


def test_a_generator_or_a_seed_with_row_ids():
    tokens, process = torch.full((2, 3), MASK), MaskedCTMC(MASK)
    with pytest.raises(ValueError, match="give one of them"):
        process.jump_times(tokens, torch.Generator(), seed=0)
    with pytest.raises(ValueError, match="row_ids name streams of a seed"):
        process.remask(tokens, tokens, row_ids=torch.arange(2))
    with pytest.raises(ValueError, match=r"row_ids must have shape \[2\]"):
        process.remask(tokens, tokens, seed=0, row_ids=torch.arange(3))
    with pytest.raises(TypeError, match="row_ids must be int64"):
        process.remask(tokens, tokens, seed=0, row_ids=torch.arange(2.0))


def test_suppressed_tokens_have_no_rate_and_the_others_share_theirs():
    process, tokens, time = (
        MaskedCTMC(MASK, suppress=(1,), vocabulary=11),
        torch.tensor([[0, MASK]]),
        torch.tensor([0.5]),
    )
    logits = torch.randn(1, 2, 13, generator=torch.Generator().manual_seed(0))
    rates = process.log_rates(logits, tokens, time)
    assert torch.isneginf(rates[0, 1]).nonzero()[:, 0].tolist() == [1, MASK, 11, 12]
    torch.testing.assert_close(rates[0, 1].exp().sum(), process.escape_rate(tokens, time)[0].double())
    assert [process.suppressed(n) for n in (1, 4, 13)] == [[], [1], [1, 11, 12]]


def test_a_mask_without_a_destination_leaves_nothing_out():
    """A head may have no row for the mask: then the rates of all its tokens are those of one with a row."""
    process, tokens, time = MaskedCTMC(MASK), torch.tensor([[1, MASK]]), torch.tensor([0.5])
    assert (process.excluded(MASK), process.excluded(MASK + 1)) == (-1, MASK)
    logits = torch.randn(1, 2, MASK + 1, generator=torch.Generator().manual_seed(0))
    with_row, without = (process.log_rates(part, tokens, time) for part in (logits, logits[..., :MASK]))
    assert torch.equal(with_row[..., :MASK], without)
    assert bool((with_row[..., MASK] == -torch.inf).all())
