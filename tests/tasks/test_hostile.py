"""Nothing that a model writes is evaluated, takes long, takes memory, or is right by accident."""

import builtins
import resource
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from dam.tasks import countdown, gsm8k, sudoku_text
from tests.tasks import hostile

SECONDS = 0.010

# No hostile string reaches the target, or is the right number; a puzzle's solution is not among them either.
CHECKERS = {
    "countdown": lambda text: countdown.check(text, [30, 100, 93], 23).correct,
    "countdown-any": lambda text: countdown.check(text, [30, 100, 93], 7777, all_numbers=False).correct,
    "gsm8k": lambda text: gsm8k.check(text, "271828").correct,
    "sudoku_text": lambda text: sudoku_text.grid_of(text) == [int(digit) for digit in "1234341221434321"],
}
FORBIDDEN = ("exec", "open", "import", "os.", "subprocess.", "socket.", "ctypes.", "pty.", "shutil.")
_watch = {"on": False, "seen": []}


def _hook(event, _):
    if _watch["on"] and event.startswith(FORBIDDEN):
        _watch["seen"].append(event)


@pytest.fixture(scope="module")
def watched():
    """What the interpreter does for a checker beyond computing: a list of events. Hooks cannot be removed."""
    sys.addaudithook(_hook)
    return _watch


def judge_all(checker, count, seed, watched, monkeypatch, tmp_path):
    """Longest time of a string, of this thread's own, in seconds; the strings that were right."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("evaluated")

    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    longest, right = 0.0, []
    for text in hostile.strings(count, seed, huge=500 if count < 10_000 else 1000):
        watched["on"] = True
        start = time.thread_time()
        correct = checker(text)
        longest = max(longest, time.thread_time() - start)
        watched["on"] = False
        if correct:
            right.append(text)
    assert watched["seen"] == []
    assert not Path(hostile.CANARY).exists()
    return longest, right


@pytest.mark.parametrize("name", CHECKERS)
def test_hostile_strings(name, watched, monkeypatch, tmp_path):
    checker = CHECKERS[name]
    checker("<answer>1+1</answer>")
    longest, right = judge_all(checker, 1500, 0, watched, monkeypatch, tmp_path)
    assert right == []
    assert longest < SECONDS


@pytest.mark.full
@pytest.mark.parametrize("name", CHECKERS)
def test_a_hundred_thousand_hostile_strings(name, watched, monkeypatch, tmp_path):
    checker = CHECKERS[name]
    judge_all(checker, 9_999, 1, watched, monkeypatch, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    longest, right = judge_all(checker, 100_000, 2, watched, monkeypatch, tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\n{name}: {time.monotonic() - start:.1f} s, longest {1000 * longest:.2f} ms, memory grown by {grown} KiB")
    assert right == []
    assert longest < SECONDS
    assert grown < 32 * 1024  # one string of 10 MB, twice over, on top of the highest so far


@pytest.mark.parametrize("name", CHECKERS)
def test_an_answer_of_ten_megabytes_is_not_copied(name):
    checker = CHECKERS[name]
    for unit in ("1+", "(", "<answer>", "\\boxed{", " "):
        text = "<answer>" + unit * (10 * 2**20 // len(unit)) + "</answer>"
        checker(text[:100])
        tracemalloc.start()
        checker(text)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def test_the_strings_would_hurt_a_checker_that_evaluates(monkeypatch, tmp_path):
    """Otherwise the tests above could not fail."""
    monkeypatch.chdir(tmp_path)
    code = [text for text in hostile.strings(1500, 0) if hostile.CANARY in text and text.startswith("open(")]
    assert code
    eval(code[0])
    assert Path(hostile.CANARY).exists()
