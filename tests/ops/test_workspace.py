"""Work memory of the linear ops on a CPU: who has it, how long it is kept, and pages that may be asked for."""

import collections
import importlib
import os
import signal
import threading

import pytest
import torch

import dam
from dam.ops import _head, _memory

ROWS, COLUMNS = 64, 32768  # 8 MB of logits: more than a call before its checks makes
kernels = importlib.import_module("dam._cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    dam.release_workspace()
    yield
    dam.release_workspace()


def kept():
    """Bytes of each piece that the next call finds."""
    return [memory.numel() for memory in _memory._kept]


def arguments(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 16, generator=g).to(dtype)
    weight = torch.randn(COLUMNS, 16, generator=g).to(dtype)
    return hidden, weight, torch.randint(COLUMNS, (ROWS,), generator=g)


def test_a_call_takes_what_the_one_before_left():
    hidden, weight, target = arguments()
    dam.linear_log_prob(hidden, weight, target)
    assert kept() == [4 * ROWS * COLUMNS]
    before = _memory._kept[0].data_ptr()
    dam.linear_jump(hidden[:32], weight, seed=1)  # of fewer rows: serves as it is
    assert kept() == [4 * ROWS * COLUMNS] and _memory._kept[0].data_ptr() == before
    dam.linear_log_prob(torch.cat((hidden, hidden)), weight, torch.cat((target, target)))
    assert kept() == [4 * ROWS * COLUMNS, 8 * ROWS * COLUMNS]


def test_arrays_are_apart_and_aligned():
    with _memory.work_arrays(
        (3, 100_001), [torch.float32, torch.bfloat16, torch.float64], torch.device("cpu")
    ) as arrays:
        assert [(x.dtype, x.shape) for x in arrays] == [
            (dtype, (3, 100_001)) for dtype in (torch.float32, torch.bfloat16, torch.float64)
        ]
        assert all(x.data_ptr() % 64 == 0 and x.is_contiguous() for x in arrays)
        for value, x in enumerate(arrays):
            x.fill_(value)
        assert all((x == value).all() for value, x in enumerate(arrays))


def test_two_calls_at_a_time_do_not_share():
    device, shape = torch.device("cpu"), (ROWS, COLUMNS)
    with _memory.work_arrays(shape, [torch.float32], device) as (one,):
        with _memory.work_arrays(shape, [torch.float32], device) as (other,):
            assert one.data_ptr() != other.data_ptr()
    assert kept() == [4 * ROWS * COLUMNS] * 2


def test_threads_get_the_results_of_calls_one_after_another():
    hidden, weight, target = arguments()
    wanted = [dam.linear_log_prob(hidden + i, weight, target) for i in range(4)]
    found: list = [None] * 4

    def call(i):
        for _ in range(20):
            found[i] = dam.linear_log_prob(hidden + i, weight, target)
            if not torch.equal(found[i], wanted[i]):
                return

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_no_more_is_kept_than_the_bound(monkeypatch):
    hidden, weight, target = arguments()
    dam.linear_log_prob(hidden, weight, target)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "2")
    dam.linear_log_prob(hidden, weight, target)  # in chunks; what is there is larger than may be kept now
    assert kept() and sum(kept()) <= 2 * 2**20


def test_logits_that_a_backward_pass_keeps_are_lent_as_long_as_it_may_come():
    hidden, weight, target = arguments()
    hidden.requires_grad_()
    logits = (hidden.detach() @ weight.t()).double()
    probabilities = torch.softmax(logits, dim=1)
    wanted = (torch.nn.functional.one_hot(target, COLUMNS) - probabilities) @ weight.double()

    value = dam.linear_log_prob(hidden, weight, target)
    assert kept() == []  # they have it
    dam.linear_jump(-3 * hidden.detach(), weight, seed=1)  # takes another piece
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
        assert (gradient - wanted).abs().max() < 1e-4  # sums of 32,768 float32 products of size 1e-4
    del value
    assert kept() == [4 * ROWS * COLUMNS] * 2  # theirs, and their gradient's, which was the other call's


def test_logits_that_many_values_kept_are_no_more_than_the_bound_once_these_are_gone(monkeypatch):
    """Also if no other call follows; and a bound that has become invalid meanwhile is the next call's error."""
    monkeypatch.setenv("DAM_WORKSPACE_MB", "33")
    hidden, weight, target = arguments()
    values = [dam.linear_log_prob(hidden.requires_grad_(), weight, target) for _ in range(6)]
    monkeypatch.setenv("DAM_WORKSPACE_MB", "nothing")
    values.clear()
    assert kept() == [4 * ROWS * COLUMNS] * 4 and not _memory._returned
    with pytest.raises(ValueError, match="got 'nothing'"):
        dam.linear_jump(hidden.detach(), weight, seed=1)


def test_a_call_in_the_middle_of_another_does_not_wait_for_it(monkeypatch):
    """As from __del__ in a garbage collection, or from a signal's handler: at any place, here where pieces are sized.

    It gets memory of its own; and when it releases what is kept, what the other goes on with is not kept either.
    """
    device, shape, inside = torch.device("cpu"), (ROWS, COLUMNS), []

    class Returned(collections.deque):
        def popleft(self):
            memory = super().popleft()
            if not inside:
                inside.append(memory)
                with _memory.work_arrays(shape, [torch.float32], device) as (other,):
                    inside.append(other)
                dam.release_workspace()
            return memory

    def call():
        with _memory.work_arrays(shape, [torch.float32], device):
            pass

    monkeypatch.setattr(_memory, "_returned", Returned())
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    memory, other = inside
    assert memory.data_ptr() != other.data_ptr() and kept() == []
    call()
    assert kept() == [4 * ROWS * COLUMNS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")  # of newer Pythons: where threads run, which the parent may have
def test_a_child_of_a_fork_does_not_wait_for_a_thread_that_is_not_there():
    device, shape = torch.device("cpu"), (ROWS, COLUMNS)
    with _memory._keeping:  # as another thread may have it
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                with _memory.work_arrays(shape, [torch.float32], device):
                    os._exit(0 if kept() == [] else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_value_does_not_hold_memory_of_a_much_larger_call():
    device = torch.device("cpu")
    with _memory.work_arrays((8 * ROWS, COLUMNS), [torch.float32], device):
        pass
    lent = _memory.lent_array((ROWS, COLUMNS), torch.float32, device)
    assert kept() == [32 * ROWS * COLUMNS]  # still there for others
    del lent
    assert kept() == [4 * ROWS * COLUMNS, 32 * ROWS * COLUMNS]
    again = _memory.lent_array((ROWS // 2 + 1, COLUMNS), torch.float32, device)  # of half the size and more: the same
    assert kept() == [32 * ROWS * COLUMNS]
    del again


def test_small_calls_keep_nothing():
    hidden, weight, target = arguments()
    dam.linear_log_prob(hidden[:2], weight, target[:2])
    assert kept() == []


def test_memory_of_inference_mode_serves_later_calls():
    hidden, weight, target = arguments()
    with torch.inference_mode():
        dam.linear_log_prob(hidden, weight, target)
    first = kept()
    assert not any(memory.is_inference() for memory in _memory._kept)  # which may not be written to outside
    weight.requires_grad_()
    dam.linear_log_prob(hidden, weight, target).sum().backward()
    assert first and kept() and weight.grad is not None


def test_an_error_gives_it_back():
    head = _head.checked("test", *arguments()[:2], None)
    with pytest.raises(RuntimeError, match="of a reward"):
        for _ in _head.chunks(head, arrays=1, backend="cpu"):
            raise RuntimeError("of a reward")
    assert kept() == [4 * ROWS * COLUMNS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_as_they_are_when_the_next_call_comes(dtype):
    hidden, weight, target = arguments(dtype)
    hidden.requires_grad_()
    value = dam.linear_log_prob(hidden, weight, target)
    first = value.clone()
    value.sum().backward()
    assert hidden.grad is not None
    gradient = hidden.grad.clone()
    dam.linear_jump(-2 * hidden.detach(), weight, seed=3)
    assert torch.equal(value, first) and torch.equal(hidden.grad, gradient)


def test_pages_where_free_memory_goes_back_to_a_host(tmp_path):
    def device(name, identity, features):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "device").write_text(identity + "\n")
        (folder / "features").write_text(features + "\n")

    def goes_back():
        return kernels.memory_goes_back(devices=str(tmp_path))

    assert not kernels.memory_goes_back(devices=str(tmp_path / "nowhere"))
    device("virtio0", "0x0001", "1" * 64)  # a network card
    assert not goes_back()
    device("virtio1", "0x0005", "01100001" + "0" * 56)  # a balloon without reports of free pages
    assert not goes_back()
    device("virtio2", "0x0005", "01100101" + "0" * 56)
    assert goes_back()
