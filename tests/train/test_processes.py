"""A run on two processes: that of one, and of its parts, and of what becomes of an error in one of them."""

import time

import pytest
import torch

from dam.train.progress import last_checkpoint
from tests import ranks
from tests.hostile import lossy
from tests.train.process_run import LOSSY, told, trained


def launched(output, *cases):
    """Two processes as `torchrun` starts them; it ends all when one fails."""
    command = ("--standalone", "--nproc_per_node", "2", "-m", "tests.train.process_run", str(output), *cases)
    return ranks.launched("torch.distributed.run", output, *command)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("processes")
    cases = ("whole", "resumed", "lossy")
    done = launched(output, *cases)
    assert done.code == 0, done.text[-3000:]
    return output, {case: [torch.load(output / f"{case}-{rank}.pt") for rank in (0, 1)] for case in cases}


def assert_same_groups(ours, theirs):
    assert len(ours) == len(theirs) and all(
        torch.equal(one[name], other[name]) for one, other in zip(ours, theirs, strict=True) for name in one
    )


def test_a_resumed_run_is_the_whole_one_bit_for_bit(runs):
    (first, second), (resumed, _) = runs[1]["whole"], runs[1]["resumed"]
    assert torch.equal(first["weights"], second["weights"]) and torch.equal(first["weights"], resumed["weights"])
    for other in (second, resumed):
        assert_same_groups(first["groups"], other["groups"])
        assert first["reward_calls"] == other["reward_calls"] and first["eval_reward"] == other["eval_reward"]
    assert first["logged"] == resumed["logged"]


@pytest.mark.parametrize(("case", "changes"), [("whole", {}), ("lossy", {"judge": lossy, **LOSSY})])
def test_two_processes_do_what_one_does(runs, tmp_path, case, changes):
    """Draws, groups and figures over all processes, of lost rewards too; gradients are summed in another order."""
    one, (two, other) = told(trained(tmp_path, **changes)), runs[1][case]
    assert torch.equal(two["weights"], other["weights"])
    assert (max(entry.get("rewards/failed", 0.0) for entry in one["logged"]) > 0) == (case == "lossy")
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0.0, atol=1e-6)
    for ours, theirs in zip(one["groups"], two["groups"], strict=True):
        padding = [int((group["attention_mask"] == 0).sum()) for group in (ours, theirs)]
        bare = [group["final"][:, pad:] for group, pad in zip((ours, theirs), padding, strict=True)]
        assert torch.equal(*bare)
        torch.testing.assert_close(ours["weight"], theirs["weight"], rtol=1e-4, atol=1e-5)
    assert one["reward_calls"] == two["reward_calls"] == 6 * 4 * 8
    assert one["eval_reward"] == pytest.approx(two["eval_reward"])
    for ours, theirs in zip(one["logged"], two["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_run_of_two_processes_goes_on_in_one(runs, tmp_path):
    output, ran = runs
    one = told(trained(tmp_path, resume=f"{output}/whole/checkpoint-2"))
    torch.testing.assert_close(one["weights"], ran["whole"][0]["weights"], rtol=0.0, atol=1e-6)
    assert one["reward_calls"] == ran["whole"][0]["reward_calls"]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("broken", "RewardError: process 1 failed: RewardError: reward function 'Judge' raised ConnectionError"),
        pytest.param("killed", "process 1 failed: it stopped without a word: it was killed", marks=pytest.mark.full),
        pytest.param("unread", "RuntimeError: process 1 failed: OSError: the disk is gone", marks=pytest.mark.full),
    ],
)
def test_an_error_in_one_process_ends_all_with_a_checkpoint(runs, tmp_path, case, error):
    start = time.monotonic()
    done = launched(tmp_path, case)
    assert done.code != 0 and error in done.text
    assert not list(tmp_path.glob("*.pt"))
    # Far below the half hour that a process waits for one that has stopped.
    assert time.monotonic() - start < 120
    last = last_checkpoint(str(tmp_path / case))
    assert last is not None
    one = told(trained(tmp_path / "again", resume=last))
    torch.testing.assert_close(one["weights"], runs[1]["whole"][0]["weights"], rtol=0.0, atol=1e-6)


@pytest.mark.full
def test_too_many_lost_rewards_end_all_and_the_process_that_has_some_keeps_its_rollouts(tmp_path):
    done = launched(tmp_path, "too_lossy")
    assert done.code != 0
    kept = tmp_path / "too_lossy" / "failed_rollouts.pt"
    message = "more than max_reward_failures, 0.1: 'lossy' error {} times, first: ValueError: no fours"
    failed = torch.load(kept, weights_only=False)["failed"]
    assert message.format(len(failed)) in done.text and f"are kept in {kept}" in done.text
