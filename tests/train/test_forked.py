"""Runs that DDP and FSDP2 divide over processes: that of one process, goes on in others, and ends as a whole."""

import json

import pytest
import torch
from peft import PeftModel

from dam.train.progress import last_checkpoint
from tests import ranks
from tests.train.forked_run import GROUPS, by_paths, ran, settings
from tests.train.process_run import model

# FSDP2 needs a GPU in torch 2.6.
pytestmark = pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 7), reason="needs torch 2.7")
LIMIT = 30.0  # seconds in which every process ends when one has failed

RUNS = ["ddp-3", "fsdp-2", "fsdp-3-from-fsdp-2"]
LORA, PATHS = ["fsdp-2-lora"], ["fsdp-2-paths"]
OTHERS = [
    *("fsdp-2-from-ddp-3", "ddp-2-from-fsdp-2", "fsdp-2-compiled", "fsdp-3-from-fsdp-2-lora"),
    *("ddp-1", "ddp-2", "ddp-2-from-ddp-1", "ddp-3-from-ddp-2", "fsdp-2-from-ddp-1", "fsdp-3-paths", "ddp-3-paths"),
]


def forked(output, *cases):
    ranks.succeed("tests.train.forked_run", 1, output, *cases, timeout=500.0)
    return json.loads((output / "ended.json").read_text())


def printed(output, case, rank):
    return (output / f"{case}-{rank}.txt").read_text()


def found_in(output, *cases):
    ended = forked(output, *cases)
    for case in ended:
        processes = range(settings(case)[1])
        assert ended[case]["statuses"] == [0] * len(processes), printed(output, case, 0)[-3000:]
    return output, {
        case: [torch.load(output / f"{case}-{rank}.pt") for rank in range(settings(case)[1])] for case in ended
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return found_in(tmp_path_factory.mktemp("forked"), *RUNS, *LORA, *PATHS)


@pytest.fixture(scope="module")
def others(runs):
    return found_in(runs[0], *OTHERS)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return ran(str(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def one_by_paths(tmp_path_factory):
    return ran(str(tmp_path_factory.mktemp("one")), **by_paths())


@pytest.fixture(scope="module")
def one_lora(tmp_path_factory):
    torch.manual_seed(0)  # as the first process draws an adapter
    return ran(str(tmp_path_factory.mktemp("one")), lora=True)


def assert_same(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=atol, msg=name)


def assert_same_log(ours, theirs):
    assert len(ours) == len(theirs)
    for entry, other in zip(ours, theirs, strict=True):
        assert entry == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", RUNS)
def test_six_steps_are_those_of_one_process(runs, one, case):
    """With Adam, whole and resumed after the third: parameters, and all that is logged; sums in another order."""
    for found in runs[1][case]:
        assert_same(found["weights"], one["weights"])
        assert_same_log(found["logged"], one["logged"])
        assert found["reward_calls"] == one["reward_calls"] == 6 * GROUPS * 8
        assert found["eval_reward"] == pytest.approx(one["eval_reward"])
        assert found["class"].startswith("FSDP") == case.startswith("fsdp")


@pytest.mark.parametrize("case", PATHS)
def test_six_steps_at_states_of_paths_are_those_of_one_process(runs, one_by_paths, case):
    """Of rows that end early, single outcomes of a buffer that processes share."""
    assert one_by_paths["logged"][0]["completions/clipped_ratio"] < 0.9
    for found in runs[1][case]:
        assert_same(found["weights"], one_by_paths["weights"])
        assert_same_log(found["logged"], one_by_paths["logged"])


@pytest.mark.full
@pytest.mark.parametrize("case", OTHERS)
def test_so_are_those_of_other_numbers_and_kinds(others, one, one_lora, one_by_paths, case):
    expected = one_by_paths if case.endswith("paths") else one_lora if case.endswith("lora") else one
    for found in others[1][case]:
        assert_same(found["weights"], expected["weights"])
        assert_same_log(found["logged"], expected["logged"])
        assert (found["graphs"] > 0) == case.endswith("compiled")


@pytest.mark.parametrize("case", LORA)
def test_six_steps_of_an_adapter_are_those_of_one_process(runs, one_lora, case):
    """Whose parameters each process draws anew, and whose base is the model itself: nothing moves at first."""
    for found in runs[1][case]:
        assert_same(found["weights"], one_lora["weights"])
        assert_same_log(found["logged"], one_lora["logged"])
    first, *others = (entry["kl_path"] for entry in one_lora["logged"])
    assert first == 0.0 and max(others) > 0.0


@pytest.mark.parametrize("case", ["ddp-3", "fsdp-2"])
def test_each_process_rewards_whole_groups_of_its_own(runs, one, case):
    of_each = [found["seen"] for found in runs[1][case]]
    assert len({len(seen) for seen in of_each}) == 1
    assert sorted(name for seen in of_each for name in seen) == sorted(one["seen"])
    for seen in of_each:
        assert all(len(set(seen[n : n + 8])) == 1 for n in range(0, len(seen), 8))


@pytest.mark.parametrize("case", ["fsdp-2", "fsdp-3-from-fsdp-2"])
def test_processes_of_a_divided_model_share_the_replay_buffer(runs, case):
    of_each = [["final" in group for group in found["groups"]] for found in runs[1][case]]
    keepers = [sum(kept) for kept in zip(*of_each, strict=True)]
    assert keepers == [1] * 2 * GROUPS and {sum(kept) for kept in of_each} == {2 * GROUPS // len(of_each)}
    first, *others = runs[1][case]
    for ours, theirs in zip(first["groups"], others[0]["groups"], strict=True):
        assert torch.equal(ours["weight"], theirs["weight"])


@pytest.mark.parametrize("case", ["ddp-3", "fsdp-2", "fsdp-2-lora"])
def test_a_saved_model_is_loaded_in_one_process(runs, case):
    output, found = runs
    folder = output / case / "model"
    again = PeftModel.from_pretrained(model(), folder) if "lora" in case else type(model()).from_pretrained(folder)
    assert_same(dict(again.named_parameters()), found[case][0]["weights"], atol=0.0)


@pytest.mark.parametrize("case", ["fsdp-2", pytest.param("ddp-3", marks=pytest.mark.full)])
def test_a_divided_run_goes_on_in_one_process(runs, one, tmp_path, case):
    found = ran(str(tmp_path), resume=f"{runs[0]}/{case}/checkpoint-3")
    assert_same(found["weights"], one["weights"])
    assert found["reward_calls"] == one["reward_calls"]


def test_an_adapter_divided_goes_on_in_one_process(runs, one_lora, tmp_path):
    torch.manual_seed(0)
    found = ran(str(tmp_path), resume=f"{runs[0]}/fsdp-2-lora/checkpoint-3", lora=True)
    assert_same(found["weights"], one_lora["weights"])


KILLED = "process 1 failed: it stopped without a word: it was killed"
ILL = "process 1 failed: ArithmeticError: the model is ill"
FAILURES = {
    "ddp-3-killed": (KILLED, 4),
    "fsdp-3-killed": (KILLED, 3),
    "ddp-2-ill": (ILL, 4),
    "ddp-2-rows": ("processes 0 and 1 do not do the same run, train_dataset: 24 rows", None),
}
MORE = {
    "fsdp-2-ill": (ILL, 3),
    "ddp-3-busy": (KILLED, 4),
    "ddp-2-early": ("another process ended before the run began", None),
    "ddp-2-shuffled": ("processes 0 and 1 do not do the same run, train_dataset: 24 rows", None),
    "fsdp-2-arguments": ("processes 0 and 1 do not do the same run, seed: 42 and 43; beta: 0.1 and 0.2", None),
}
FAILED = [*FAILURES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    output = tmp_path_factory.mktemp("failures")
    return output, forked(output, *FAILURES)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    output = tmp_path_factory.mktemp("failures")
    return output, forked(output, *MORE)


@pytest.fixture
def failure(request, case):
    """Where the case was run, how it ended, the cause, and the step of its checkpoint."""
    output, ended = request.getfixturevalue("failures" if case in FAILURES else "more")
    return output, ended[case], *(FAILURES | MORE)[case]


@pytest.mark.parametrize("case", FAILED)
def test_a_process_that_fails_ends_all_with_the_cause(failure, case):
    """Each of the others says why, at once."""
    output, ended, cause, _ = failure
    statuses = ended["statuses"]
    assert statuses[1] == (-9 if cause is KILLED else 1) and 0 not in statuses
    assert ended["seconds"] < LIMIT
    for rank in range(settings(case)[1]):
        if rank != 1:
            assert cause in printed(output, case, rank)


@pytest.mark.parametrize("case", FAILED)
def test_what_is_left_of_it_goes_on_in_one_process(failure, one, tmp_path, case):
    """Under DDP from the step that failed, by the first process alone; else from the last checkpoint."""
    output, _, _, step = failure
    last = last_checkpoint(str(output / case))
    assert last == (None if step is None else f"{output}/{case}/checkpoint-{step}")
    if last is not None:
        assert_same(ran(str(tmp_path), resume=last)["weights"], one["weights"])
