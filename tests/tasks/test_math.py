"""MATH: comparisons by math-verify in processes that can be ended."""

import itertools
import pickle
import resource
import sys
import time
from pathlib import Path

import pytest

from dam.tasks import math
from dam.tasks.answers import TAIL
from dam.workers import Failure, Pool
from tests.tasks import hostile, verdicts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """One pool for all tests, with time enough on a machine that has other work, in a folder of its own."""
    task = math.Math(seconds=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workers"))
        task.verdicts([r"\boxed{1}"], ["2"])
        task.folder = Path.cwd()
    yield task
    task.close()


def test_verdicts_by_hand(task):
    found = task.verdicts([line[0] for line in verdicts.MATH], [line[1] for line in verdicts.MATH])
    wrong = []
    for (completion, answer, word), verdict in zip(verdicts.MATH, found, strict=True):
        said = "none" if verdict.answer is None else "right" if verdict.correct else "wrong"
        if said != word or verdict.failure is not None:
            wrong.append((completion, answer, word, verdict))
    assert wrong == []


def test_parts_and_metrics(task):
    completions = [r"\boxed{0.5}", "<answer>2</answer>", "1/2", r"\boxed{" + "9" * 61 + "}"]
    columns = {"completions": completions, "answer": [r"\frac{1}{2}"] * 4, "prompts": None}
    assert task.format(**columns) == [1.0, 1.0, 0.0, 1.0]
    assert task.answer(**columns) == [1.0, 1.0, 0.0, 0.0]
    assert task.correct(**columns) == [1.0, 0.0, 0.0, 0.0]
    assert task.unchecked(**columns) == [0.0] * 4
    found = task.metrics([completions], [{"answer": r"\frac{1}{2}"}])
    assert found == {
        **{"exact": 0.25, "pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0},
        **{"format": 0.75, "answer": 0.5, "unchecked": 0.0},
    }


class Fake:
    """Stands for the workers: fails on 9s, and counts what it is asked."""

    def __init__(self):
        self.asked = []

    def map(self, arguments):
        self.asked += arguments
        return [Failure("timeout", "") if "9" in answer else right == answer for right, answer in arguments]


def with_pool(**options):
    task = math.Math(**options)
    task._pool = Fake()
    return task


def test_what_was_not_decided_is_not_correct_and_counted():
    task = with_pool()
    (verdict,) = task.verdicts([r"\boxed{9^{9^9}}"], ["5"])
    assert verdict == math.Verdict(True, "9^{9^9}", False, "timeout")
    assert task.metrics([[r"\boxed{9^{9^9}}"], [r"\boxed{5}"]], [{"answer": "5"}] * 2)["unchecked"] == 0.5
    columns = {"completions": [r"\boxed{9^{9^9}}", r"\boxed{5}", "5"], "answer": ["5"] * 3}
    assert task.unchecked(**columns) == [1.0, 0.0, 0.0]
    assert task.correct(**columns) == [0.0, 1.0, 0.0]


def test_a_comparison_is_made_once_and_what_needs_none_not_at_all():
    task = with_pool()
    completions = [r"\boxed{6}"] * 5 + [r"\boxed{\frac 1 2}", "none", r"\boxed{7"]
    columns = {"completions": completions, "answer": ["5"] * 5 + [r"\frac12", "5", "5"]}
    for part in task.rewards:
        part(**columns)
    assert task._pool.asked == [("5", "6")]
    assert task.correct(**columns) == [0.0] * 5 + [1.0, 0.0, 0.0]


def test_no_math_verify_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"discrete-adjoint-matching\[tasks\]"):
        math.Math().verdicts([r"\boxed{6}"], ["5"])


def test_comparisons_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(math, "REMEMBERED", 10)
    task = with_pool()
    found = task.verdicts([rf"\boxed{{{n}}}" for n in range(10, 50)], [str(n) for n in range(11, 51)])
    assert len(found) == 40 and len(task._known) == 10


def test_a_task_can_be_sent_to_other_processes():
    task = with_pool(seconds=3.0)
    sent = pickle.loads(pickle.dumps(task.correct))
    assert sent.__self__._limits == task._limits and "_pool" not in vars(sent.__self__)


def test_a_worker_of_another_pool_has_no_pool_of_its_own():
    columns = {"completions": [r"\boxed{0.5}", r"\boxed{3}"], "answer": [r"\frac{1}{2}"] * 2}
    hangs = {"completions": [r"\boxed{9^{9^{9}}}"], "answer": ["5"]}
    with Pool(math.Math().correct, workers=1, timeout=4.0) as pool:
        right, failure = pool.map([columns, hangs])
    assert right == [1.0, 0.0] and failure.kind == "timeout"


def test_the_way_of_math_verify_that_evaluates_is_not_used(monkeypatch):
    """Its extraction of plain expressions hands them to `parse_expr`, which runs them as Python."""
    import math_verify

    evaluated = []
    monkeypatch.setattr(math_verify.parser, "parse_expr_cached", evaluated.append)
    math_verify.parse("the answer is 2*(3+4)", parsing_timeout=None)
    assert evaluated  # what is looked for is there
    evaluated.clear()
    compare = math.Compare()
    for text in ["1+1", "2*(3+4)", "(1+2)^3", "1/2", "2**3", "__import__('os')", "is 2*(3+4)", "$2*(3+4)$"]:
        compare(text, "5")
        compare("5", text)
    assert not evaluated


@pytest.mark.parametrize(
    ("answer", "inside"),
    [
        ("$5$", "5"),
        ("The answer is $x + 1$.", "x + 1"),
        (r"\$5", r"\$5"),
        (r"from \$5 to \$6", r"from \$5 to \$6"),
        ("$5$ or $6$", "$5$ or $6$"),
        (r"\(5\)", "5"),
        (r"\[5.\]", "5"),
        ("$$5$$", "5"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\{1\}", r"\{1\}"),
        (r"\{1", r"\{1"),  # no brace of TeX's
        ("{1", None),
        ("1}", None),
        ("}{", None),
        ("1\\", None),
        ("", None),
        (" . ", None),
    ],
)
def test_what_stands_around_an_answer(answer, inside):
    assert math.within_bounds(answer) == inside


def test_rows_have_the_answer_of_either_form():
    of_answer = math.TASK.row({"problem": "What is $1+1$?", "solution": r"It is $\boxed{3}$.", "answer": "2"})
    of_solution = math.TASK.row({"problem": "What is $1+1$?", "solution": r"$1+1 = \boxed{\frac{4}{2}}$, so."})
    assert of_answer["answer"] == "2" and of_solution["answer"] == r"\frac{4}{2}"
    assert math.TASK.row({"problem": "?", "solution": r"so $\boxed 7$."})["answer"] == "7"
    for record, what in [
        ({"problem": "?", "solution": "It is 2."}, "must have its answer in a box"),
        ({"problem": "?", "solution": r"It is \boxed{2"}, "must have its answer in a box"),
        ({"problem": "?", "answer": "9" * 61}, "out of bounds"),
        ({"problem": "?", "answer": ""}, "answer must be text"),
        ({"question": "?", "answer": "2"}, "missing: problem"),
    ]:
        with pytest.raises(ValueError, match=what):
            math.TASK.row(record)


def test_the_default_to_train_on_is_not_the_one_to_test_on():
    assert math.TASK.source("train") != math.TASK.source("test") == math.TASK.dataset


def judge_all(task, texts):
    """Kinds of failures, and the memory of this process in KiB after each batch."""
    kinds, peaks = [], []
    texts = iter(texts)
    for number in itertools.count(10):
        batch = list(itertools.islice(texts, 1000))
        if not batch:
            break
        # Of the largest only what is looked at: a batch of whole ones would be gigabytes.
        asked = [*(text[-TAIL:] for text in batch), rf"\boxed{{{number}+1}}"]
        found = task.verdicts(asked, [*["271828"] * len(batch), str(number + 1)])
        assert found.pop().correct, "a worker is lost"
        assert not any(verdict.correct for verdict in found)
        kinds += [verdict.failure for verdict in found if verdict.failure is not None]
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return kinds, peaks


def test_hostile_strings(task):
    """But for powers of powers, which take their time each."""
    texts = [text for text in hostile.strings(300, 0) if not any(power in text for power in hostile.POWERS)]
    kinds, _ = judge_all(task, texts)
    assert kinds == []
    assert not (task.folder / hostile.CANARY).exists()


@pytest.mark.full
def test_a_hundred_thousand_hostile_strings(monkeypatch, tmp_path):
    task = math.Math(seconds=5)
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    kinds, peaks = judge_all(task, hostile.strings(100_000, 2))
    task.close()
    known, grown = len(task._known), peaks[-1] - peaks[9]
    print(f"\n{time.monotonic() - start:.0f} s, {known} comparisons, memory grown by {grown} KiB")
    print({kind: kinds.count(kind) for kind in set(kinds)})
    assert set(kinds) <= {"timeout", "memory"}
    assert not (tmp_path / hostile.CANARY).exists()
    assert grown < 32 * 1024
