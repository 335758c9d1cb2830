"""FlowTrainer on two processes: the run of one, to the bit when it goes on, and what ends it by name."""

import subprocess
import sys

import pytest
import torch

from dam.train import FlowTrainer
from dam.train.progress import last_checkpoint
from tests.train.flow_process_run import told, trained
from tests.train.flow_tiny import ROWS, Network, direct, near_goal, tiny_config

pytestmark = pytest.mark.full


def launched(output, *cases):
    """Two processes as `torchrun` starts them; it ends all when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    return subprocess.run(
        [*command, "tests.train.flow_process_run", str(output), *cases], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("processes")
    cases = ("whole", "resumed", "refl")
    done = launched(output, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, {case: [torch.load(output / f"{case}-{rank}.pt") for rank in (0, 1)] for case in cases}


def assert_the_same_run(one, two):
    """Gradients and figures are summed in another order."""
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0.0, atol=1e-6)
    assert one["reward_calls"] == two["reward_calls"]
    assert one["eval_reward"] == pytest.approx(two["eval_reward"], rel=1e-5)
    for ours, theirs in zip(one["logged"], two["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_resumed_run_is_the_whole_one_bit_for_bit(runs):
    """From between two steps of a rollout, of which each process has its own targets."""
    (first, second), (resumed, other) = runs[1]["whole"], runs[1]["resumed"]
    for each in (second, resumed, other):
        assert torch.equal(first["weights"], each["weights"])
        assert first["eval_reward"] == each["eval_reward"] and first["reward_calls"] == each["reward_calls"]
    assert first["logged"] == resumed["logged"]


def test_two_processes_do_what_one_does(runs, tmp_path):
    """Where a step takes all targets, so that their order says nothing. Also of ReFL."""
    assert_the_same_run(told(trained(tmp_path / "one")), runs[1]["whole"][0])
    given = {**direct("refl", per_device_train_batch_size=4), "optim": "sgd", "max_steps": 2}
    one = FlowTrainer(Network(), near_goal, tiny_config(tmp_path, **given), ROWS, ROWS[:5], shape=(3,))
    one.train()
    assert_the_same_run(told(one), runs[1]["refl"][0])


def test_targets_of_two_processes_are_not_for_one(runs, tmp_path):
    output, ran = runs
    with pytest.raises(ValueError, match="has targets of 2 processes, which 1 cannot go on with: resume with as many"):
        trained(tmp_path, resume=f"{output}/whole/checkpoint-2")
    # Between two rollouts there are none.
    assert_the_same_run(told(trained(tmp_path, resume=f"{output}/whole/checkpoint-3")), ran["whole"][0])


def test_a_process_that_is_killed_ends_all_and_the_last_checkpoint_goes_on(runs, tmp_path):
    done = launched(tmp_path, "killed")
    assert done.returncode != 0 and "process 1 failed: it stopped without a word: it was killed" in done.stderr
    last = last_checkpoint(str(tmp_path / "killed"))
    assert last == f"{tmp_path}/killed/checkpoint-3"
    assert_the_same_run(told(trained(tmp_path / "again", resume=last)), runs[1]["whole"][0])


def test_draft_is_refused(tmp_path, monkeypatch):
    """By DDP only the last of its many calls would be summed over processes."""
    config = tiny_config(tmp_path, **direct("draft"))
    monkeypatch.setattr(type(config), "world_size", 2)
    with pytest.raises(ValueError, match='learner "draft" goes back through many calls of the model'):
        FlowTrainer(Network(), near_goal, config, ROWS, shape=(3,))
