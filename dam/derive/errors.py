"""The one error of the differentiator, which shows the line that it is about."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """A line of a function's source: where it is, and its text."""

    file: str
    number: int
    text: str


class DerivativeError(ValueError):
    """A function has no derivative that could be written, or arguments for which what was written does not hold.

    Raised when a function is transformed, with file, number and text of the line; and, for what only shows when the
    derivative runs (integers, arrays that share memory, a result that is no scalar), by the derivative.
    """

    def __init__(self, message: str, line: Line | None = None) -> None:
        self.message, self.line = message, line
        place = "" if line is None else f"{line.file}:{line.number}: {line.text}\n    "
        super().__init__(place + message)
