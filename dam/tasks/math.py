r"""MATH: competition problems whose answer is an expression, compared by math-verify in processes of their own.

An answer is what <answer>...</answer> or else the last \boxed{...} holds (`answers.marked`), without TeX's $ or \(
around it and a full stop behind it. It is compared if it has at most `MAX_CHARACTERS` characters, braces that are
balanced and not nested deeper than `MAX_DEPTH`, no number of more than `MAX_DIGITS` digits and no control characters;
otherwise it is no answer. An answer written as the right one, but for spaces, is right; of others math-verify decides.
It reads LaTeX by a grammar: its other way, by sympy's `parse_expr`, evaluates as Python what it is given, and is not
used.

math-verify may hang, or take all memory, on an answer such as 9^{9^{9}}, and its own time limit works in the main
thread only. So it runs in worker processes with limits of time and memory, which end it from outside. What has not been
decided so is not correct, and counted: `unchecked`, in the log and in metrics. In a worker of another pool, as that of
`DAMConfig(reward_workers=)`, it runs as part of the call, which has its limits already.

math-verify is lenient, and what it takes for equal is equal here: 1+1 is 2, \frac{1}{3} is 0.333333 (six digits), 50\%
is 50 and 0.5, x = 5 is 5, (3,4) is 3,4, units are passed over, and so is the base of 4210_5. A model that is paid for
an answer may learn to repeat the question's expression as its answer, which is equal to it.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from dam.tasks import language
from dam.tasks.answers import boxed, marked, text_of
from dam.workers import Failure, Pool, is_worker

# Bounds of an answer, before it is parsed.
MAX_CHARACTERS = 400
MAX_DEPTH = 16
MAX_DIGITS = 60

SECONDS = 5.0  # math-verify's own default for a comparison
MEMORY = 2**30  # bytes
REMEMBERED = 16_384  # comparisons

_TOO_LONG = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_FORMULA = re.compile(r"[^$]*(?<!\\)\$([^$]+)(?<!\\)\$[^$]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Verdict(NamedTuple):
    """What an answer is worth."""

    format: bool  # it stands in <answer> or in a box
    answer: str | None  # None: there is none, or none within bounds
    correct: bool
    failure: str | None  # why it could not be decided, `Failure.kind`


def extract(completion: str) -> str | None:
    """The answer of a completion, within bounds; None where there is none."""
    answer = marked(completion)
    return None if answer is None else within_bounds(answer)


def within_bounds(answer: str) -> str | None:
    """An answer without what stands around it; None where it is out of bounds."""
    text = answer.strip()
    formula = _FORMULA.fullmatch(text)  # The answer is $5$.
    if formula:
        text = formula[1]
    for opening, closing in (("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.strip().rstrip(".").rstrip()
    if not text or len(text) > MAX_CHARACTERS or _TOO_LONG.search(text) or _CONTROL.search(text):
        return None
    return text if _balanced(text) else None


def _balanced(text: str) -> bool:
    """Whether each brace of TeX's has its other one, at most `MAX_DEPTH` open at once."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if not 0 <= depth <= MAX_DEPTH:
            return False
    return depth == 0 and not text.endswith("\\")


class Compare:
    """Whether math-verify finds an answer equal to the right one. To be called in a worker: it may hang.

    It loads math-verify and reads a first answer where it is unpickled, so that no call spends its time on that.
    """

    def __call__(self, right: str, answer: str) -> bool:
        import math_verify

        given = self._parsed(right), self._parsed(answer)
        try:
            return bool(math_verify.verify(*given, timeout_seconds=None, raise_on_error=True))
        except MemoryError:
            raise
        except Exception:  # of one way to compare; there may be others
            return bool(math_verify.verify(*given, timeout_seconds=None))

    @staticmethod
    def _parsed(text: str) -> list[Any]:
        import math_verify

        configs = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
        try:
            return math_verify.parse(f"\\boxed{{{text}}}", configs, parsing_timeout=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:  # what it does not read is equal to nothing
            return []

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, ()


def _loaded() -> Compare:
    import logging

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # that its time limit is off
    compare = Compare()
    compare(r"\frac{1}{2}", "0.5")
    return compare


class Math(language.LanguageTask):
    """Rows, rewards and metrics of MATH (Hendrycks et al. 2021, arXiv 2103.03874).

    Rows have `answer`, the right one, in LaTeX. They are made of records with problem and answer, as of
    HuggingFaceH4/MATH-500, or problem and solution, whose last box is the answer, as of MATH.

    Rewards, by their weights: `correct` 2 and `format` 0.5, as d1's two for MATH (dllm-reasoning/d1,
    diffu-grpo/reward_func.py), where Hendrycks' comparison of strings stands in the place of math-verify and the format
    is graded by whether the box is in the tags. `answer` and `unchecked` have weight 0: they are logged.

    Metrics: `exact` and pass@k of correct answers, by math-verify (Kydlicek 2025, github.com/huggingface/Math-Verify);
    `format`, `answer`, `unchecked`: means of the parts.

    Args:
        seconds: of a comparison.
        workers: processes, started by the first comparison and kept.
        memory: of a process, in bytes.
    """

    name: ClassVar[str] = "math"
    dataset: ClassVar[str | None] = "HuggingFaceH4/MATH-500"
    training_dataset: ClassVar[str] = "DigitalLearningGmbH/MATH-lighteval"  # MATH-500 has no split to train on
    reward_weights: ClassVar[tuple[float, ...]] = (0.5, 0.0, 2.0, 0.0)

    def __init__(self, *, seconds: float = SECONDS, workers: int = 2, memory: int | None = MEMORY):
        self._limits: dict[str, Any] = {"timeout": seconds, "workers": workers, "memory": memory}
        # A run's parts ask for the same comparisons one after another.
        self._known: OrderedDict[tuple[str, str], bool | Failure] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pool"}  # of this process only

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if is_worker():
            _loaded()  # before the first call's time begins

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(Compare(), **self._limits)

    @property
    def rewards(self) -> tuple[Any, ...]:
        return self.format, self.answer, self.correct, self.unchecked

    def source(self, split: str) -> str | None:
        return self.training_dataset if split == "train" else self.dataset

    def row(self, record: Mapping[str, Any], *, style: str = "d1") -> dict[str, Any] | None:
        if record.get("answer") is not None:
            problem, answer = language.texts(record, ("problem", "answer"))
        else:
            problem, solution = language.texts(record, ("problem", "solution"))
            answer = boxed(solution) or ""
            if not answer:
                raise ValueError(f"solution must have its answer in a box; got ...{solution[-100:]!r}")
        if within_bounds(answer) is None:
            raise ValueError(f"answer is empty or out of bounds: {answer!r:.100}")
        answer_is = r"in \boxed{}" if style == "d1" else "as short as it can be"
        return {"prompt": language.prompt(problem, style, answer=f"the final answer, {answer_is}"), "answer": answer}

    def verdicts(self, completions: Sequence[Any], answer: Sequence[str]) -> list[Verdict]:
        """Judges completions by their right answers, all undecided ones in one go of the workers.

        Raises:
            ImportError: math-verify is missing.
        """
        texts = [text_of(completion) for completion in completions]
        given = [extract(text) for text in texts]
        right = [within_bounds(each) or each for each in answer]
        pairs = [(r, g) for r, g in zip(right, given, strict=True) if g is not None]
        found = self._compared(pairs)
        verdicts = []
        for text, r, g in zip(texts, right, given, strict=True):
            result = found[r, g] if g is not None else False
            failure = result.kind if isinstance(result, Failure) else None
            verdicts.append(Verdict(marked(text) is not None, g, result is True, failure))
        return verdicts

    def _compared(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool | Failure]:
        known = {pair: self._known[pair] for pair in pairs if pair in self._known}
        known |= {pair: True for pair in pairs if _without_spaces(pair[0]) == _without_spaces(pair[1])}
        unknown = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        if unknown:
            _check_installed()
            compared = [Compare()(*pair) for pair in unknown] if is_worker() else self._pool.map(unknown)
            known |= dict(zip(unknown, compared, strict=True))
        self._known |= known
        for _ in range(len(self._known) - REMEMBERED):
            self._known.popitem(last=False)
        return known

    def format(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """1 where the answer stands in <answer> or in a box."""
        return [float(marked(text_of(completion)) is not None) for completion in completions]

    def answer(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """1 where there is one within bounds."""
        return [float(extract(text_of(completion)) is not None) for completion in completions]

    def correct(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """1 where it equals the right one."""
        return [float(verdict.correct) for verdict in self.verdicts(completions, answer)]

    def unchecked(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """1 where a limit of time or memory, or a crash, left it undecided; it is not correct then."""
        return [float(verdict.failure is not None) for verdict in self.verdicts(completions, answer)]

    def judge(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> language.Judged:
        verdicts = self.verdicts(texts, [row["answer"] for row in rows])
        figures = {
            "format": sum(verdict.format for verdict in verdicts) / len(texts),
            "answer": sum(verdict.answer is not None for verdict in verdicts) / len(texts),
            "unchecked": sum(verdict.failure is not None for verdict in verdicts) / len(texts),
        }
        return language.Judged([verdict.correct for verdict in verdicts], figures)

    def close(self) -> None:
        """Ends the workers; the next comparison starts new ones."""
        pool = self.__dict__.pop("_pool", None)
        if pool is not None:
            pool.close()


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _check_installed() -> None:
    """Here, where it can be said what to do; without loading it, which takes seconds."""
    import importlib.util

    try:
        found = importlib.util.find_spec("math_verify")
    except (ImportError, ValueError):  # by whoever keeps it from being imported
        found = None
    if found is None:
        raise ImportError("the answers of MATH need math-verify: pip install 'discrete-adjoint-matching[tasks]'")


TASK = Math()
