"""What needs no other process: which failure is whose, and what a process is told that another does not do."""

import signal
import threading
import time

import pytest
import torch
from tiny import ROWS, sum_reward, tiny_config, tiny_model

from dam.train import DAMTrainer, fsdp
from dam.train import lifelines as lifelines_module
from dam.train import processes as processes_module
from dam.train.data import outline
from dam.train.lifelines import Lifelines, OtherProcessError
from dam.train.processes import agree, match


class Two:
    """Two processes, of which this is the first; the other says what it is given to say."""

    num_processes, process_index, device = 2, 0, torch.device("cpu")


@pytest.fixture
def other(monkeypatch):
    said = []
    for module in (processes_module, lifelines_module):
        monkeypatch.setattr(module, "PartialState", Two)
    monkeypatch.setattr(processes_module, "gather_object", lambda given: [*given, said.pop(0) if said else given[0]])
    return said


def test_what_differs_is_named(other):
    other.append({"seed": "1", "beta": "0.1"})
    with pytest.raises(ValueError, match=r"processes 0 and 1 do not do the same run, seed: 0 and 1; rows: x{60}\.\.\."):
        agree({"seed": 0, "beta": 0.1, "rows": "x" * 70})
    agree({"seed": 0})  # the other says the same


def test_parameters_are_those_of_the_first_process_where_they_differ(other, monkeypatch):
    sent = []
    monkeypatch.setattr(processes_module, "broadcast", lambda tensor: (sent.append(tensor), tensor + 1)[1])
    tensors = {"same": torch.ones(3), "drawn": torch.zeros(2), "half": torch.ones(2, dtype=torch.bfloat16)}
    shapes = {name: f"{each.dtype} {list(each.shape)}" for name, each in tensors.items()}
    sums = [processes_module._bits(each) for each in tensors.values()]
    other += [shapes, [sums[0], sums[1] + 5, sums[2]]]
    match(tensors)
    assert len(sent) == 1 and tensors["drawn"].tolist() == [1.0, 1.0] and tensors["same"].tolist() == [1.0] * 3
    other.append({**shapes, "drawn": "torch.float32 [7]"})
    with pytest.raises(ValueError, match=r"drawn: torch.float32 \[2\] and torch.float32 \[7\]"):
        match(tensors)


@pytest.mark.parametrize("changed", [ROWS[1:], ROWS[::-1], [{**row, "labels": [1] * 4} for row in ROWS]])
def test_an_outline_tells_rows_apart(changed):
    assert outline(ROWS) == outline([dict(row) for row in ROWS]) != outline(changed)


def test_the_first_failure_is_the_cause(other):
    """Of an error here none, of a connection that is gone the other's, though it is told of later."""
    lines = Lifelines()
    own = KeyError("mine")
    assert lines.failure(own) is own and lines._cause == (0, "KeyError: 'mine'")
    lines = Lifelines()
    lost = RuntimeError("gloo: Connection closed by peer")
    threading.Timer(0.2, lines._told, (1, "ValueError: theirs")).start()
    failure = lines.failure(lost)
    assert isinstance(failure, OtherProcessError) and str(failure) == "process 1 failed: ValueError: theirs"
    assert failure.__cause__ is lost


def test_a_failure_elsewhere_interrupts_what_is_done_here(other):
    """A sleep, which is no collective."""
    lines = Lifelines()
    before = signal.getsignal(signal.SIGTERM)
    lines._main, lines._previous = threading.get_ident(), signal.signal(signal.SIGTERM, lines._on_signal)
    threading.Timer(0.2, lines._told, (1, "gone")).start()
    start = time.monotonic()
    try:
        with pytest.raises(OtherProcessError, match="process 1 failed: gone"):
            time.sleep(20)
        assert time.monotonic() - start < 10
    finally:
        lines.failure(OtherProcessError("gone"))
        lines.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_fsdp_of_the_first_version_is_refused(tmp_path):
    class Accelerator:
        class state:
            class fsdp_plugin:
                fsdp_version, transformer_cls_names_to_wrap = 1, None

    with pytest.raises(ValueError, match="set fsdp_version: 2 in accelerate's configuration file"):
        fsdp.prepare_plugin(Accelerator, tiny_config(tmp_path), tiny_model())


def test_what_holds_the_input_embeddings_is_no_unit_of_its_own():
    """accelerate makes them one, and cannot divide them twice."""
    from tests.train.process_run import model

    network = model()
    assert "ModernBertEmbeddings" in network._no_split_modules
    assert fsdp._units(network) == ["ModernBertEncoderLayer"]


def test_groups_that_cannot_be_shared_equally_count_as_in_one_part(tmp_path):
    """Three groups in the buffer, of two passes: one is in both, and counts once."""
    config = tiny_config(tmp_path, prompts=1, gradient_accumulation_steps=2, replay_batch_size=2, num_iterations=1)
    trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS)
    trainer.train()
    groups = trainer.progress.replay.state_dict()["groups"][:3]
    trainer.progress.replay.load_state_dict({"groups": groups})
    found = []
    for micro_step in (0, 1):
        trainer.progress.micro_step = micro_step
        found.append(trainer._replayed()[0]["weight"])
    expected = sum(group["weight"].sum() for group in groups) / 3
    torch.testing.assert_close(sum(weight.sum(dim=1).mean() for weight in found) / 2, expected)
    assert sum(int((weight == 0).all(dim=1).sum()) for weight in found) == 1
