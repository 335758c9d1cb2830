"""Numbers of a page that look like measurements, in its sentences and in the cells of its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from tests import pages
from tests.tables import NUMBER, agrees

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"
_UNIT = r"(?:ns|us|ms|s|seconds?|minutes?|hours?|[KMGTk]i?B|[KMGT]?B/s|[KMGT]?FLOP(?:/s)?|nats?|times)"
_WORD = "two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen|twenty|thirty|fifty|hundred|thousand"
# What is measured has a unit of time or memory, is a share, a multiple or a fraction, or counts a thousand calls.
_LOOKS = re.compile(
    rf"""(?<![\w.,/^-])(?:
        {_NUMBER}(?:\s?%|x\b|[\s-]{_UNIT}\b)
      | [-+]?(?:\d[\d,]*\.\d+(?:e[-+]?\d+)?|\.\d+|\d+e-\d+)(?!\w|\.\d)
      | \d[\d,]{{3,}}\s(?:reward\s|network\s)?calls
      | (?:{_WORD})\stimes\s(?:as|longer|shorter|faster|slower)
    )
    | (?<=\bworth\s)\d+ | (?<=\bfactor\sof\s)\d+""",
    re.VERBOSE,
)
# ... but not a number of an equation or of a release, which are names, nor a setting that is named in front of it.
_NAMED = re.compile(
    r"(?:Prop\.|Eq\.|Thm\.|arXiv|Python|torch|transformers|peft|accelerate|LLaDA|SDAR|Dream|TRL|Triton|CUDA|Muon|lm-eval"
    r"|SGLang|vLLM|YAML|compute capabilit(?:y|ies)|beta`?|max_tilt`?|full_tilt_from`?(?: \|)?|[hq] =|field)"
    r"\s(?:\d[\d.]*(?:,| and)\s)?$"
)
_RELEASE = re.compile(r"(?:\.x|\s(?:or newer|and later))\b")
_BOUND = re.compile(r"\d+e-\d+")  # of a whole power of ten: to which something is compared


class Found(NamedTuple):
    page: str
    line: int  # from 1
    start: int  # in the page's text
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text!r}"


@cache
def text_of(page: str) -> str:
    return (pages.ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text of a page, character by character, with blanks for code, for where links lead and for comments."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "_", match[0])

    lines = text.splitlines(keepends=True)
    for token in pages.parsed(text):
        if token.type in ("fence", "code_block"):
            for n in range(*token.map):
                lines[n] = re.sub(r"[^\n]", "_", lines[n])
    text = "".join(lines)
    for code in (r"<!--.*?-->", r"`(?:[^`\n]|\n(?!\n))*`", r"(?<=\])\([^)]*\)"):
        text = re.sub(code, blank, text, flags=re.DOTALL)
    return text


def found(page: str, text: str) -> Iterator[Found]:
    """Where numbers look like measurements in the text of a page."""
    told = prose(text)
    for match in _LOOKS.finditer(told):
        before, behind = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 12]
        if _NAMED.search(before.replace("\n", " ")) or _RELEASE.match(behind.replace("\n", " ")):
            continue
        if _BOUND.fullmatch(match[0]) and match[0].startswith("1e"):
            continue
        yield Found(page, text.count("\n", 0, match.start()) + 1, match.start(), match[0])


def matches(page: str | None, passage: str) -> list[tuple[str, re.Match[str]]]:
    """Where a passage stands, in a page, or if None in README and the pages that it leads to."""
    names = [page] if page else ["README.md", *(name for name in pages.PAGES if name.startswith("docs/"))]
    return [(name, match) for name in names for match in pattern(passage).finditer(text_of(name))]


def differences(page: str | None, passage: str, values: Sequence[float]) -> Iterator[str]:
    """What is wrong with the numbers of a passage, which were rounded from as many values."""
    found = matches(page, passage)
    if not found:
        yield f"no page has {passage!r}"
    for name, match in found:
        for shown, value in zip(match.groups(), values, strict=True):
            if not agrees(shown, value):
                yield f"{name}: {shown} is shown, of {value}, in {match[0]!r}"


def pattern(passage: str) -> re.Pattern[str]:
    """Of a passage, in which blanks may be the end of a line, and {} is a number."""
    return re.compile(re.escape(passage).replace(r"\{\}", f"({NUMBER.pattern})").replace(r"\ ", r"\s+"))


def outside(every: Iterable[Found], spans: Iterable[tuple[int, int]]) -> list[Found]:
    """What lies in none of the spans of the page's text."""
    kept = list(spans)
    return [one for one in every if not any(start <= one.start < end for start, end in kept)]
