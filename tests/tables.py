"""Numbers of tables and sentences against what they were rounded from."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from decimal import Decimal

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
SPREAD = re.compile(
    rf"({NUMBER.pattern})(?: \(({NUMBER.pattern}) to ({NUMBER.pattern})\))?(?: \[({NUMBER.pattern})\])?"
)


def is_figure(cell: str) -> bool:
    """Whether a cell has nothing but numbers, what is between several of them, and what stands for none."""
    words = NUMBER.sub("", cell)
    return words != cell and re.fullmatch(r"(?:to|inf|[\s()\[\],])*", words) is not None


def agrees(shown: str, value: float) -> bool:
    """Whether a value rounds to a number as it is shown: is within half a unit of its last digit.

    A value that lies halfway may be rounded to either side, as its own last digit is rounded too.
    """
    number = Decimal(shown.rstrip("%").replace(",", ""))
    unit = Decimal(1).scaleb(int(number.as_tuple().exponent))
    exact = Decimal(value) * (100 if shown.endswith("%") else 1)
    return abs(exact - number) <= unit / 2 * (1 + Decimal("1e-9"))


def wrong(cell: str, values: Sequence[float], exact: float | None = None) -> str | None:
    """What is wrong with a cell "median (least to most) [exact]" of values, the latter where they stand; or None."""
    shown = SPREAD.fullmatch(cell.strip().replace("`", ""))
    if shown is None:
        return f"{cell!r} is no figure"
    expected = (statistics.median(values), min(values), max(values), exact)
    if shown[2] is None and not agrees(shown[1], expected[0]):
        return f"{cell} is shown, of a median of {expected[0]}"
    for text, value in zip(shown.groups(), expected, strict=True):
        if text is not None and (value is None or not agrees(text, value)):
            return f"{text} of {cell!r} is shown, of {value}"
    return None
