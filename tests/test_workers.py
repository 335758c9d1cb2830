"""A pool of workers: nothing that a function does costs another call, or this process."""

import functools
import importlib.util
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dam import workers
from dam.workers import Failure, Pool, ServerError
from tests import hostile

LINUX = sys.platform == "linux"
# Success is expected within it, on a machine that is busy with something else too.
LONG = 120.0


@pytest.fixture(scope="module")
def pool():
    with Pool(hostile.misbehave, workers=2, timeout=LONG, memory=1 << 28) as made:
        yield made


def kinds(answers):
    return [answer.kind if isinstance(answer, Failure) else None for answer in answers]


def is_there(process):
    """Whether it runs, and is no zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    if LINUX:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    return True


def ends(process):
    deadline = time.monotonic() + LONG
    while is_there(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_there(process)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (("exit", 0), "crash", "exit status 0"),
        (("exit", 3), "crash", "exit status 3"),
        (("sys_exit",), "crash", "SystemExit: enough"),
        (("kill", signal.SIGKILL), "crash", "SIGKILL"),
        (("kill", signal.SIGTERM), "crash", "SIGTERM"),
        (("segfault",), "crash", "SIGSEGV"),
        (("kill_server",), "crash", "the process that starts the workers"),
        (("raise", "KeyError('x')"), "error", "KeyError: 'x'"),
        (("raise", "KeyboardInterrupt()"), "crash", "KeyboardInterrupt"),
        (("raise", "ValueError('x' * 10**7)"), "error", "ValueError: xxx"),
        (("recurse",), "error", "RecursionError"),
        pytest.param(
            ("allocate",), "memory", "MemoryError", marks=pytest.mark.skipif(not LINUX, reason="no limit there")
        ),
        (("large", 20), "answer", "an answer of 209715"),
        (("no_data",), "answer", "type object"),
    ],
    ids=lambda value: "-".join(map(str, value))[:30] if isinstance(value, tuple) else "",
)
def test_a_call_that_fails_costs_itself_only(pool, call, kind, message):
    """Its neighbours are answered, in their order, and what went wrong is told in few words."""
    answers = pool.map([("well", 1), call, ("well", [2.0]), ("well", "c")])
    assert kinds(answers) == [None, kind, None, None]
    assert message in answers[1].message and len(answers[1].message) <= 500
    assert answers[0::2] == [1, [2.0]] and answers[3] == "c"


def test_what_is_printed_neither_blocks_nor_is_seen(pool, capfd):
    assert pool.map([("print", 8)] * 2) == [8, 8]
    assert capfd.readouterr() == ("", "")


def test_a_hang_is_ended_in_time_with_what_it_started(tmp_path):
    marks = [str(tmp_path / name) for name in ("child", "daemon")]
    with Pool(hostile.misbehave, workers=4, timeout=3.0) as pool:
        before = time.monotonic()
        answers = pool.map([("hang",), ("spin",), ("child_and_hang", marks[0]), ("daemon_and_hang", marks[1])])
        assert time.monotonic() - before < LONG
        assert answers == [Failure("timeout", "no answer within 3 seconds")] * 4
        assert ends(int(Path(marks[0]).read_text()))
        if LINUX:  # elsewhere one in a session of its own is not found
            assert ends(int(Path(marks[1]).read_text()))
        else:
            os.kill(int(Path(marks[1]).read_text()), signal.SIGKILL)


def test_what_a_call_leaves_behind_ends_with_it(pool, tmp_path):
    """Threads, children and timers, which could hurt the calls after it."""
    child, thread, *_ = pool.map([("child", str(tmp_path / "mark")), ("thread",), ("alarm",)])
    assert ends(child) and ends(thread)
    time.sleep(0.3)  # the alarm would ring
    assert pool.map([("well", n) for n in range(4)]) == [0, 1, 2, 3]


def test_a_worker_is_kept_unless_it_broke_down():
    with Pool(hostile.count, workers=1, timeout=LONG) as pool:
        (first, process), (second, same) = pool.map([(), ()])
        assert (first, second, same) == (1, 2, process)
        assert kinds(pool.map([("too", "many")])) == ["error"]
        assert pool.map([()]) == [(3, process)]
        os.kill(process, signal.SIGKILL)  # as the system does where memory is short
        ((third, other),) = pool.map([()])
        assert (third, other != process) == (1, True)


@pytest.mark.skipif(not LINUX, reason="memory is bounded on Linux only")
def test_what_earlier_calls_have_filled_is_not_the_fault_of_the_one_that_finds_no_room():
    with Pool(hostile.misbehave, workers=1, timeout=LONG, memory=1 << 28) as pool:
        answers = pool.map([("leak", 60)] * 10)
    assert kinds(answers) == [None] * 10 and max(answers) < 5


def test_workers_run_side_by_side(tmp_path):
    with Pool(hostile.meet, workers=3, timeout=LONG) as pool:
        assert pool.map([(str(tmp_path), n, 3) for n in range(3)]) == [0, 1, 2]


def test_a_forged_answer_runs_nothing_here(pool, tmp_path):
    mark = tmp_path / "made"
    assert kinds(pool.map([("forge", str(mark)), ("well", 1)])) == ["answer", None]
    assert not mark.exists()


@pytest.mark.skipif(not LINUX, reason="/proc")
def test_nothing_piles_up_over_many_failures():
    """Files, children, zombies, memory: 300 here; 10^4 take half a minute and are no different."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def children(process):
        return Path(f"/proc/{process}/task/{process}/children").read_text().split()

    with Pool(hostile.misbehave, workers=2, timeout=LONG) as pool:
        calls = [("exit", 1), ("raise", "ValueError('no')"), ("sys_exit",)] * 33
        pool.map(calls)
        files, memory, here = len(os.listdir("/proc/self/fd")), resident(), len(children(os.getpid()))
        for _ in range(2):
            assert set(kinds(pool.map(calls))) == {"crash", "error"}
        assert len(os.listdir("/proc/self/fd")) <= files + 2  # those of workers that are kept
        assert resident() - memory < 8 << 20
        assert len(children(os.getpid())) == here
        assert len(children(pool._server._process.pid)) <= 2
    assert len(children(os.getpid())) == here - 1


def test_an_interrupt_ends_the_calls_and_leaves_the_pool_usable(pool):
    # A shell that starts the tests in the background has it ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.map([("hang",), ("hang",)])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert pool.map([("well", 1)]) == [1]


ENDLESS = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("dam_workers", sys.argv[1])
workers = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)
from tests import hostile
pool = workers.Pool(hostile.misbehave, workers=1, timeout=None)
if (holder := os.fork()) == 0:
    time.sleep(1000)
print(pool._server._process.pid, holder, flush=True)
pool.map([("child_and_hang", sys.argv[2])])
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    """In the midst of a call, which has a child; though another, as of a data loader, holds what it had open."""
    mark = tmp_path / "child"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", ENDLESS, workers.__file__, str(mark)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    with running:
        server, holder = map(int, running.stdout.readline().split())
        deadline = time.monotonic() + LONG
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        running.kill()
        ended = ends(server) and ends(int(mark.read_text()))
        os.kill(holder, signal.SIGKILL)
    assert ended


def test_a_worker_imports_what_the_function_needs_only():
    with Pool(hostile.loaded, timeout=LONG) as pool:
        assert pool.map([("torch",), ("numpy",), ("tests.hostile",)]) == [False, False, True]


def test_answers_are_plain_data(pool):
    given = [(1, 2.5, None), {"a": [True, b"b"]}, {3}, float("-inf"), np.float32(0.5), np.arange(3)]
    answers = pool.map([("well", each) for each in given])
    assert answers == [(1, 2.5, None), {"a": [True, b"b"]}, {3}, float("-inf"), 0.5, [0, 1, 2]]
    assert type(answers[4]) is float
    assert workers._plain(torch.ones(1, 2, dtype=torch.bfloat16)) == [[1.0, 1.0]]


def test_what_arguments_are_made_of_is_imported_once_and_not_within_the_limits_of_a_worker():
    with Pool(operator.methodcaller("imported_by"), workers=1, timeout=LONG) as pool:
        assert kinds(pool.map([(1,)])) == ["error"]  # a worker that was there before
        assert pool.map([(hostile.Thing(),)] * 2) == [pool._server._process.pid] * 2
        os.kill(pool._server._process.pid, signal.SIGKILL)
        assert pool.map([(hostile.Thing(),)]) == [pool._server._process.pid]


def test_functions_without_a_name_in_a_module_are_sent_as_they_are():
    pytest.importorskip("dill")
    factor = 3

    def times(number, more=0):
        return number * factor + more + len(hostile.__name__) - len("tests.hostile")

    for function in (times, functools.partial(times, more=0), lambda number: number * factor):
        with Pool(function, timeout=LONG) as pool:
            assert pool.map([(2,), {"number": 5}]) == [6, 15]


def test_what_cannot_be_sent_is_refused_with_what_to_do(monkeypatch, tmp_path):
    open_one = (n for n in ())

    def holds_a_generator():
        return open_one

    with pytest.raises(TypeError, match=r"holds_a_generator .*cannot be sent .*define it in a module"):
        Pool(holds_a_generator, timeout=1.0)
    monkeypatch.setitem(sys.modules, "dill", None)
    with pytest.raises(TypeError, match=r"cannot be sent .*define it in a module .*or install dill"):
        Pool(lambda: 0, timeout=1.0)
    (tmp_path / "gone.py").write_text("def gone():\n    pass\n")
    spec = importlib.util.spec_from_file_location("gone", tmp_path / "gone.py")
    monkeypatch.setitem(sys.modules, "gone", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["gone"])
    with pytest.raises(ServerError, match=r"cannot be loaded in a worker process: .*No module named 'gone'"):
        Pool(sys.modules["gone"].gone, timeout=1.0)


def test_bad_arguments():
    for options, message in (
        ({"workers": 0, "timeout": 1.0}, "workers"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": 1.0, "memory": 0}, "memory"),
    ):
        with pytest.raises(ValueError, match=message):
            Pool(hostile.double, **options)
    with Pool(hostile.double, timeout=LONG) as pool:
        with pytest.raises(TypeError, match="arguments of call 1 cannot be sent"):
            pool.map([(1,), (threading.Lock(),)])
        assert pool.map([(1,)]) == [2] and pool.map([]) == []
    with pytest.raises(RuntimeError, match="closed"):
        pool.map([(1,)])
