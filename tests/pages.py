"""The pages of the repository as what CommonMark makes of them: their blocks of code, links and tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "experiments/*.md", "benchmarks/*.md")
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))


class Block(NamedTuple):
    """A block of code: fenced, with the words of its info string, or indented, with none."""

    page: str
    line: int  # of its first line of code, from 1
    language: str  # "" of one that is indented
    options: str  # what follows the language
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Table(NamedTuple):
    page: str
    line: int  # of its head, from 1
    heading: str  # of the section that it is in
    before: str  # the paragraph in front of it
    head: list[str]
    rows: list[list[str]]  # cells as they are written


@cache
def tokens(page: str) -> list:
    return parsed((ROOT / page).read_text(encoding="utf-8"))


def parsed(markdown: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def blocks(page: str) -> list[Block]:
    """All of a page, in their order."""
    found = []
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            language, _, options = token.info.strip().partition(" ")
            first = token.map[0] + 1 + (token.type == "fence")
            found.append(Block(page, first, language, options.strip(), token.content))
    return found


def links(page: str) -> list[str]:
    """Where links and images of a page lead to."""
    spans = [span for token in tokens(page) for span in token.children or ()]
    return [str(span.attrs.get("href", span.attrs.get("src"))) for span in spans if span.type in ("link_open", "image")]


def spans(page: str) -> list[str]:
    """Code within lines of a page."""
    return [span.content for token in tokens(page) for span in token.children or () if span.type == "code_inline"]


def headings(page: str) -> list[str]:
    """As they are written, without what marks links and code."""
    return [text(after) for token, after in zip(tokens(page), tokens(page)[1:], strict=False) if opens(token)]


def opens(token) -> bool:
    return token.type == "heading_open"


def text(token) -> str:
    """Of an inline token."""
    return "".join(span.content for span in token.children if span.type in ("text", "code_inline"))


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them: lower case, without punctuation, hyphens for spaces."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings(page)}


def tables(page: str) -> list[Table]:
    """All of a page, in their order."""
    return tables_of(tokens(page), page)


def tables_of(every: list, page: str = "") -> list[Table]:
    """Those of parsed text."""
    found: list[Table] = []
    heading = before = ""
    for n, token in enumerate(every):
        if opens(token):
            heading, before = text(every[n + 1]), ""
        elif token.type == "paragraph_open":
            before = every[n + 1].content
        elif token.type == "table_open":
            rows: list[list[str]] = []
            for part in every[n:]:
                if part.type == "table_close":
                    break
                if part.type == "tr_open":
                    rows.append([])
                elif part.type == "inline":
                    rows[-1].append(part.content)
            found.append(Table(page, token.map[0] + 1, heading, before, rows[0], rows[1:]))
    return found
