"""Countdown: combine the given numbers with + - * / to reach a target. Checked exactly, without evaluating anything.

An answer is in <answer>...</answer>, or else in the last \\boxed{...}, or else the completion is the expression and
nothing besides (`answers.marked`). It is read as Python reads an expression, by `ast`, after its characters, length,
digits and nesting are found to be within bounds, and computed in fractions.

What is read: whole numbers in ASCII digits, + - * / and parentheses; also what models write for these: U+00D7 (times),
U+00F7 (divided by), U+2212 (minus), U+00B7 and TeX's \\times, \\cdot, \\div. TeX's $ or backticks around the expression
and a full stop behind it are passed over. `= c` may stand behind it, c one whole number: the answer is then correct
only if that is true as well (d1's prompt asks for no equals sign, and its evaluation cuts it off). Anything else is no
answer: signs (-5, +5, --5), powers, //, decimals, 1_000, 007, 2(3 + 4), a second equals sign.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from dam.tasks import language
from dam.tasks.answers import LONGEST, marked, marks, text_of

# Bounds of an expression, before it is parsed. No problem that is admitted needs more.
MAX_CHARACTERS = 256
MAX_DIGITS = 9
MAX_DEPTH = 24
MAX_NUMBERS = 16  # of a problem

_WRITTEN = {"×": "*", "·": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
_WRITES = re.compile("|".join(map(re.escape, _WRITTEN)))
_CHARACTERS = re.compile(r"[0-9+*/() \t\r\n-]+")
_TOO_LONG = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_RESULT = re.compile(r"-?[0-9]+")


class Verdict(NamedTuple):
    """What an answer is worth."""

    format: bool  # an answer is there, and it is an expression
    value: Fraction | None  # None: there is none, as behind a division by zero
    numbers_right: bool  # it uses the given numbers: each exactly once, or at most once
    correct: bool  # numbers_right, and its value is the target


NO_ANSWER = Verdict(False, None, False, False)


def extract(completion: str) -> str | None:
    """The expression that a completion gives as its answer, as it stands there; None where there is none."""
    if marks(completion):
        return marked(completion)
    return completion.strip() if len(completion) <= LONGEST else None


def check(completion: str, numbers: Sequence[int], target: int, *, all_numbers: bool = True) -> Verdict:
    """Judges a completion. Never raises, and never takes long, whatever it holds.

    Args:
        completion: text with an answer in it, see above.
        numbers: given.
        target: to be reached.
        all_numbers: each number is to be used exactly once (as in d1); False: at most once.
    """
    answer = extract(completion)
    parsed = None if answer is None else _parsed(answer)
    if parsed is None:
        return NO_ANSWER
    tree, claimed = parsed
    used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    given = Counter(numbers)
    numbers_right = used == given if all_numbers else used <= given
    value = _value(tree)
    correct = numbers_right and value == target and claimed in (None, target)
    return Verdict(True, value, numbers_right, correct)


def _parsed(answer: str) -> tuple[ast.expr, int | None] | None:
    """An expression's tree, of numbers and the four operations only, and what it is said to equal."""
    if len(answer) > MAX_CHARACTERS:
        return None
    text = (
        _WRITES.sub(lambda match: _WRITTEN[match[0]], answer)
        .strip()
        .removesuffix(".")
        .strip("$` \t\r\n")
        .removesuffix(".")
    )
    text, equals, result = text.partition("=")
    if equals and not _RESULT.fullmatch(result.strip()):
        return None
    if not _CHARACTERS.fullmatch(text) or _TOO_LONG.search(text) or _depth(text) > MAX_DEPTH:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None
    if not all(isinstance(node, _ALLOWED) for node in ast.walk(tree)):
        return None
    return tree, int(result) if equals else None


_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_ALLOWED = (ast.BinOp, ast.Constant, *_OPERATORS)


def _depth(text: str) -> int:
    """How many parentheses are open at once, at most."""
    deepest = depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _value(tree: ast.expr) -> Fraction | None:
    """Exactly; None where something is divided by zero."""
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)  # type: ignore[arg-type]
    assert isinstance(tree, ast.BinOp)
    left, right = _value(tree.left), _value(tree.right)
    if left is None or right is None:
        return None
    if isinstance(tree.op, ast.Add):
        return left + right
    if isinstance(tree.op, ast.Sub):
        return left - right
    if isinstance(tree.op, ast.Mult):
        return left * right
    return left / right if right else None


# Problems


class Problem(NamedTuple):
    """Numbers, a target, and an expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    solution: str


HELD_OUT_SHARE = 16  # one of so many problems


def is_held_out(numbers: Sequence[int], target: int) -> bool:
    """Whether a problem is of the held-out set: by a hash of its numbers, whatever their order, and its target."""
    key = f"{sorted(numbers)} {target}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % HELD_OUT_SHARE == 0


def draw_problems(
    count: int,
    seed: int,
    *,
    size: int = 3,
    largest: int = 100,
    held_out: bool = False,
    exclude: Collection[tuple[Sequence[int], int]] = (),
) -> list[Problem]:
    """Problems by the rule of d1's test set: numbers of 1 .. 100, all used once, and a target of 1 .. 100.

    Numbers are uniform, and are combined in a random order by random operations; drawn again until every value on the
    way is a whole number, 0 or more, and the last one is a target. (All 128 problems of d1's can be solved so.)

    Args:
        count: of problems, which may repeat.
        seed: fixes them.
        size: numbers of a problem.
        largest: number and target.
        held_out: only problems of the held-out set; otherwise only others: no problem is ever in both.
        exclude: (numbers, target) that are not drawn, in whatever order the numbers are.

    Raises:
        ValueError: a size or a bound is out of range.
    """
    if count < 0 or not 2 <= size <= MAX_NUMBERS or not 1 <= largest < 10**MAX_DIGITS:
        raise ValueError(
            f"count must be 0 or more, size in [2, {MAX_NUMBERS}], largest in [1, 10^{MAX_DIGITS}); "
            f"got {count}, {size}, {largest}"
        )
    excluded = {(tuple(sorted(numbers)), target) for numbers, target in exclude}
    generator = random.Random(f"countdown {seed}")
    problems: list[Problem] = []
    while len(problems) < count:
        numbers = tuple(generator.randint(1, largest) for _ in range(size))
        combined = _combined(numbers, generator)
        if combined is None or not 1 <= combined.value <= largest:
            continue
        if is_held_out(numbers, combined.value) != held_out or (tuple(sorted(numbers)), combined.value) in excluded:
            continue
        problems.append(Problem(numbers, combined.value, combined.text))
    return problems


class _Term(NamedTuple):
    value: int
    text: str
    binds: int  # how closely the operation on top does: 0 sums, 1 products, 2 a number


def _combined(numbers: Sequence[int], generator: random.Random) -> _Term | None:
    """All numbers in one expression; None where a value on the way is no whole number, 0 or more."""
    terms = [_Term(number, str(number), 2) for number in numbers]
    while len(terms) > 1:
        left = terms.pop(generator.randrange(len(terms)))
        right = terms.pop(generator.randrange(len(terms)))
        joined = _joined(left, generator.choice("+-*/"), right)
        if joined is None:
            return None
        terms.append(joined)
    return terms[0]


def _joined(left: _Term, operator: str, right: _Term) -> _Term | None:
    if operator == "/" and (right.value == 0 or left.value % right.value):
        return None
    value = {
        "+": left.value + right.value,
        "-": left.value - right.value,
        "*": left.value * right.value,
        "/": left.value // (right.value or 1),
    }[operator]
    if value < 0:
        return None
    binds = int(operator in "*/")
    first = left.text if left.binds >= binds else f"({left.text})"
    # a - (b + c) and a / (b * c) need them.
    needs = right.binds < binds or (right.binds == binds and operator in "-/")
    return _Term(value, f"{first}{operator}{f'({right.text})' if needs else right.text}", binds)


# The task


class Countdown(language.LanguageTask):
    """Rows, rewards and metrics of Countdown.

    Rows have `numbers`, a list of integers, and `target`. They are made of records with nums (or numbers) and target,
    as of Jiayi-Pan/Countdown-Tasks-3to4, or input, "30,100,93", and output, "23", as of d1's test set.

    Rewards, as d1's paper has them (Zhao et al. 2025, arXiv 2504.12216, appendix): 1 for a correct answer, 0.1 for one
    that only uses the right numbers, 0 otherwise; by weights 0.1 of `answer` and 0.9 of `correct`. d1's code gives 0.1
    for whatever stands in <answer>. `format` and `closeness` have weight 0: they are logged, and `closeness` is there
    for groups in which nothing is correct.

    Metrics: `exact` and pass@k of correct answers; `format`, `answer`, `closeness`: means of the parts.

    Args:
        all_numbers: each number is to be used exactly once; False: at most once.
        size: only problems of so many numbers (d1 trains on those of 3); None: of any number.
        closeness_scale: distance from the target at which `closeness` is one half.
    """

    name: ClassVar[str] = "countdown"
    dataset: ClassVar[str | None] = "Jiayi-Pan/Countdown-Tasks-3to4"
    reward_weights: ClassVar[tuple[float, ...]] = (0.0, 0.1, 0.9, 0.0)

    def __init__(self, *, all_numbers: bool = True, size: int | None = None, closeness_scale: float = 10.0):
        if not closeness_scale > 0:
            raise ValueError(f"closeness_scale must be above 0; got {closeness_scale}")
        self.all_numbers, self.size, self.closeness_scale = all_numbers, size, closeness_scale

    @property
    def rewards(self) -> tuple[Any, ...]:
        return self.format, self.answer, self.correct, self.closeness

    def row(self, record: Mapping[str, Any], *, style: str = "d1") -> dict[str, Any] | None:
        numbers, target = _problem(record)
        if self.size is not None and len(numbers) != self.size:
            return None
        return {"prompt": self.prompt(numbers, target, style=style), "numbers": numbers, "target": target}

    def prompt(self, numbers: Sequence[int], target: int, *, style: str = "d1") -> list[dict[str, str]]:
        """Messages. d1's asks for reasoning and the expression in tags, without an equals sign."""
        how = "every number exactly once" if self.all_numbers else "each number at most once"
        question = (
            f"Write an arithmetic expression that equals {target}, with the numbers {list(numbers)}. Use {how}, and no "
            "other number; combine them with +, -, *, / and parentheses."
        )
        if style == "d1":
            question += " With the numbers [2, 3, 4] and the target 5, a right answer is <answer>\n2*4-3\n</answer>."
        return language.prompt(question, style, answer="the expression alone, without an equals sign")

    def verdicts(
        self, completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int]
    ) -> list[Verdict]:
        """`check` of each completion."""
        return [
            check(text_of(completion), given, wanted, all_numbers=self.all_numbers)
            for completion, given, wanted in zip(completions, numbers, target, strict=True)
        ]

    def format(
        self, completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
    ) -> list[float]:
        """1 where an answer is there and is an expression."""
        return [float(verdict.format) for verdict in self.verdicts(completions, numbers, target)]

    def answer(
        self, completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
    ) -> list[float]:
        """1 where it uses the right numbers, whatever comes out."""
        return [float(verdict.numbers_right) for verdict in self.verdicts(completions, numbers, target)]

    def correct(
        self, completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
    ) -> list[float]:
        """1 where it is correct."""
        return [float(verdict.correct) for verdict in self.verdicts(completions, numbers, target)]

    def closeness(
        self, completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
    ) -> list[float]:
        """s / (s + |value - target|), s = `closeness_scale`, where the right numbers are used; 0 otherwise. Ours."""
        verdicts = self.verdicts(completions, numbers, target)
        return [self._closeness(verdict, wanted) for verdict, wanted in zip(verdicts, target, strict=True)]

    def _closeness(self, verdict: Verdict, target: int) -> float:
        if not verdict.numbers_right or verdict.value is None:
            return 0.0
        scale = Fraction(self.closeness_scale)
        return float(scale / (scale + abs(verdict.value - target)))

    def judge(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> language.Judged:
        targets = [row["target"] for row in rows]
        verdicts = self.verdicts(texts, [row["numbers"] for row in rows], targets)
        close = [self._closeness(verdict, target) for verdict, target in zip(verdicts, targets, strict=True)]
        figures = {
            "format": sum(verdict.format for verdict in verdicts) / len(texts),
            "answer": sum(verdict.numbers_right for verdict in verdicts) / len(texts),
            "closeness": sum(close) / len(texts),
        }
        return language.Judged([verdict.correct for verdict in verdicts], figures)


def _problem(record: Mapping[str, Any]) -> tuple[list[int], int]:
    """Numbers and target of a dataset's row.

    Raises:
        ValueError: they are missing, or are no problem.
    """
    names = [("nums", "target"), ("numbers", "target"), ("input", "output")]
    pair = next((pair for pair in names if all(name in record for name in pair)), None)
    if pair is None:
        raise ValueError(
            f"needed: nums and target, numbers and target, or input and output; found: {', '.join(record)}"
        )
    numbers, target = _integers(record[pair[0]], pair[0]), _integers(record[pair[1]], pair[1])
    if len(target) != 1:
        raise ValueError(f"{pair[1]} must be one integer; got {record[pair[1]]!r}")
    if not 1 <= len(numbers) <= MAX_NUMBERS or not all(0 <= number < 10**MAX_DIGITS for number in numbers):
        raise ValueError(
            f"{pair[0]} must be 1 to {MAX_NUMBERS} integers from 0, of at most {MAX_DIGITS} digits; got {numbers}"
        )
    return numbers, target[0]


def _integers(value: Any, name: str) -> list[int]:
    """Of 5, [5, 6], "5,6" or "[5, 6]"."""
    parts = value.strip().strip("[]").split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    texts = [str(part).strip() for part in parts]
    if any(isinstance(part, bool) for part in parts) or not all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in texts):
        raise ValueError(f"{name} must be integers; got {value!r:.100}")
    return [int(text) for text in texts]


TASK = Countdown()
