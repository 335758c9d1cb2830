r"""GSM8K: word problems whose answer is a number. Read exactly, as a fraction, without evaluating anything.

Where an answer is looked for, first to last: what <answer>...</answer> holds, and of that what \boxed{...} holds if it
has a box; the last \boxed{...}; what follows the last ####, as in the data; the last number of the completion, which is
what evaluations without a format take (lm-evaluation-harness, `flexible-extract`; OpenCompass, as LLaDA).

What is read as a number: 18, -18, +18, 1,234.50 (commas between groups of three only), .5, 3/4, \frac{3}{4} (\dfrac,
\tfrac), 18 1/2; with any words and units (m^2) around it, $ (\$18, -$18, $-18), percent signs, TeX's \text{...}, $...$,
thousands as 1{,}234 or 1\,234, and a full stop behind it. Behind an equals sign what follows the last one counts.
18.00 equals 18, 50% is 50 (its sign is a unit, as in the data), 0.5 is not.

What is not: a marked answer that states several different numbers, be it a range, a list or a product that is not
worked out (the last number of a whole completion is taken all the same); powers, roots, 1e3, 1.000.000; digits that
are not ASCII, superscripts or fractions of one character (10², 18½); more than `MAX_DIGITS` digits. A marked answer has
at most `MAX_CHARACTERS` characters, and the last number is looked for in the last so many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from dam.tasks import language
from dam.tasks.answers import TAIL, marked, text_of

MAX_DIGITS = 40
MAX_CHARACTERS = 400

_DIGITS = r"-?[0-9]{1,40}"
_FRACTION = re.compile(rf"(-?)\\[dt]?frac\s*(?:\{{\s*({_DIGITS})\s*\}}\s*\{{\s*({_DIGITS})\s*\}}|([0-9])\s*([0-9]))")
_SPACES_IN_NUMBERS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;])(?=[0-9])")
_ADORNMENTS = re.compile(
    r"\^\{?\\circ\}?|\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)|mbox|boxed|fbox|q?quad|left|right|approx|displaystyle)(?![A-Za-z])"
)
_COMMAND = re.compile(r"\\[A-Za-z]")
_RUN = re.compile(r"(?:[0-9][0-9.,]*|(?<!\.)\.[0-9]+)(?:/[0-9][0-9.,]*)*")
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_RATIO = re.compile(r"([0-9]+)/([0-9]+)")
_GLUED = re.compile(r"[A-Za-z_]+[0-9]|[eE][-+]?[0-9]|\s*\^")  # 1e3, 0x1F, 2x3, 10^2
_WORKED_OUT_LATER = re.compile(r"[0-9)]\s*(?:[-+*×÷·]|x(?=\s)|\s/|/\s)\s*[($]*[0-9.]|[0-9]\([0-9]")  # 9+9, 9 x 9, 9(9)
_OF_A_UNIT = re.compile(r"[A-Za-z]\s*\}?\s*\^\{?$")  # what stands behind it in m^2, \text{ cm}^{3}
_GAP = re.compile(r"\s+(?:and\s+)?")  # of 18 1/2


class Verdict(NamedTuple):
    """What an answer is worth."""

    format: bool  # it stands in <answer> or in a box
    value: Fraction | None  # None: there is none, or none that is read
    correct: bool


def read_number(answer: str) -> Fraction | None:
    """The one number that a marked answer states, see above; None where there is none, or several."""
    if len(answer) > MAX_CHARACTERS:
        return None
    text = _plain_text(answer.rpartition("=")[2])
    values = set() if _COMMAND.search(text) or _WORKED_OUT_LATER.search(text) else set(_numbers(text))
    return values.pop() if len(values) == 1 else None


def last_number(text: str) -> Fraction | None:
    """The last number in the last `MAX_CHARACTERS` of a text; None where it has none, or it is not read."""
    if len(text) > MAX_CHARACTERS:
        text = text[-MAX_CHARACTERS:]
        first = re.search(r"\s", text)  # behind which no half of a number is
        text = text[first.end() :] if first else ""
    return next(reversed(_numbers(_plain_text(text))), None)


def value_of(completion: str) -> Fraction | None:
    """The number that a completion answers, by the places above; None where there is none, or none that is read."""
    answer = marked(completion)
    if answer is not None:
        return read_number(answer)
    tail = completion[-TAIL:]
    if "####" in tail:
        return read_number(tail.rpartition("####")[2].strip().partition("\n")[0])
    return last_number(tail)


def check(completion: str, answer: str) -> Verdict:
    """Judges a completion by the right answer, a number as `read_number` takes it. Never raises, never takes long."""
    value = value_of(completion)
    return Verdict(marked(completion) is not None, value, value is not None and value == read_number(answer))


def _plain_text(text: str) -> str:
    """Without what TeX puts around numbers."""
    text = text.replace("−", "-").replace(r"\$", "$").replace(r"\%", "%").replace("\\ ", " ").replace("~", " ")
    text = _SPACES_IN_NUMBERS.sub(lambda match: "," if match[0][0] in "{," else "", text)
    text = _FRACTION.sub(lambda match: f" {match[1]}{match[2] or match[4]}/{match[3] or match[5]} ", text)
    return _ADORNMENTS.sub(" ", text)


def _numbers(text: str) -> list[Fraction | None]:
    """All numbers of a text in order, None for what looks like one and is not read; digits in words are passed over."""
    values: list[Fraction | None] = []
    whole: tuple[int, int] | None = None  # where an integer ends that a fraction may go on from, and its sign
    for match in _RUN.finditer(text):
        run = match[0].rstrip(".,")
        start, end = match.start(), match.start() + len(run)
        before, behind = text[max(start - 2, 0) : start], text[end : end + 40]
        if before[-1:].isalpha() or before[-1:] == "_" or _OF_A_UNIT.search(text[max(start - 8, 0) : start]):
            continue
        sign = _sign(text, start)
        formula = before[-1:] == "^" or before == "^{" or _GLUED.match(behind)
        if sign is None or formula or before[-1:].isnumeric() or behind[:1].isnumeric():
            values.append(None)
            continue
        read = (
            [_read(run)] if _RATIO.fullmatch(run) or _PLAIN.fullmatch(run) else [_read(x) for x in run.split(",") if x]
        )
        if whole and "/" in run and _GAP.fullmatch(text, whole[0], start):  # 18 1/2
            integer, part = values.pop(), read[0]
            assert integer is not None
            values.append(integer + whole[1] * part if part is not None and 0 < part < 1 else None)
            whole = None
            continue
        values += [None if value is None else sign * value for value in read]
        whole = (end, sign) if run.isdigit() and read[0] is not None else None
    return values


def _read(run: str) -> Fraction | None:
    """18, 1,234.5, .5 or 3/4; None of anything else."""
    if len(run) > MAX_DIGITS:
        return None
    ratio = _RATIO.fullmatch(run)
    if ratio:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    return Fraction(run.replace(",", "")) if _PLAIN.fullmatch(run) else None


def _sign(text: str, start: int) -> int | None:
    """Of the number that begins at `start`; a minus behind a number or a letter is none. None of two, or of a power."""
    before = text[max(start - 8, 0) : start].rstrip("$€£")
    if not before or before[-1] not in "+-":
        return 1
    earlier = before[-2:-1]
    if earlier and earlier in "+-^":
        return None
    if earlier.isalnum() or earlier in (")", "]", "}", "%"):
        return 1
    return -1 if before[-1] == "-" else 1


class GSM8K(language.LanguageTask):
    """Rows, rewards and metrics of GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    Rows have `answer`, the right number as text. They are made of records with question and answer, the latter as in
    openai/gsm8k, its number behind ####, or the number alone.

    Rewards, by their weights: `correct` 2, `answer` 0.5 and `format` 0.5, which are d1's correctness, integer and
    format rewards (dllm-reasoning/d1, diffu-grpo/reward_func.py). There the answer has to be the same text as the right
    one, here the same number; there an integer, here any number that is read; and d1 adds up to 1 more for the exact
    lines of its tags, which are left out here.

    Metrics: `exact` and pass@k of correct answers, as published accuracies count them (Cobbe et al. 2021); `format` and
    `answer`: means of the parts.
    """

    name: ClassVar[str] = "gsm8k"
    dataset: ClassVar[str | None] = "openai/gsm8k:main"
    reward_weights: ClassVar[tuple[float, ...]] = (0.5, 0.5, 2.0)

    @property
    def rewards(self) -> tuple[Any, ...]:
        return self.format, self.answer, self.correct

    def row(self, record: Mapping[str, Any], *, style: str = "d1") -> dict[str, Any] | None:
        question, answer = language.texts(record, ("question", "answer"))
        answer = answer.rpartition("####")[2].strip()
        if read_number(answer) is None:
            raise ValueError(f"answer must be a number, or end with #### and a number; got {answer!r:.100}")
        return {"prompt": language.prompt(question, style, answer="the number alone"), "answer": answer}

    def verdicts(self, completions: Sequence[Any], answer: Sequence[str]) -> list[Verdict]:
        """`check` of each completion."""
        return [check(text_of(completion), right) for completion, right in zip(completions, answer, strict=True)]

    def format(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """1 where the answer stands in <answer> or in a box."""
        return [float(verdict.format) for verdict in self.verdicts(completions, answer)]

    def answer(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """1 where a number is given, be it right or wrong."""
        return [float(verdict.value is not None) for verdict in self.verdicts(completions, answer)]

    def correct(self, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
        """1 where it is the right one."""
        return [float(verdict.correct) for verdict in self.verdicts(completions, answer)]

    def judge(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> language.Judged:
        verdicts = self.verdicts(texts, [row["answer"] for row in rows])
        figures = {
            "format": sum(verdict.format for verdict in verdicts) / len(texts),
            "answer": sum(verdict.value is not None for verdict in verdicts) / len(texts),
        }
        return language.Judged([verdict.correct for verdict in verdicts], figures)


TASK = GSM8K()
