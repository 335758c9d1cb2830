"""Sizes and dtypes of what is measured: options of every command that measures the cases of bench_<op>.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any

from benchmarks import harness

# By the name that they have in the signatures of `cases`: the letter of the tables, and whose.
SIZES = {
    "rows": ("T", ""),
    "vocabulary": ("V", ""),
    "hidden": ("D", ""),
    "groups": ("G", ""),
    "trajectories": ("K", "of a group"),
    "steps": ("S", "of a trajectory"),
    "sequences": ("B", "of a rollout"),
    "length": ("L", "of a sequence"),
}


def add(option: Callable[..., Any], dtypes: Sequence[str]) -> None:
    """Adds them by `option`, the add_argument of a parser or the addoption of pytest's; `dtypes` are the default."""
    for name, (letter, whose) in SIZES.items():
        meaning = f"{letter}, {whose}" if whose else letter
        option(f"--{name}", metavar="N", type=positive, help=f"{meaning} (default: the op's own)")
    meaning = f"{', '.join(harness.DTYPES)}; several with commas or repeated (default: {', '.join(dtypes)})"
    option("--dtype", metavar="DTYPE", type=_dtypes, action="extend", help=meaning)


def sizes(given: argparse.Namespace, ops: Collection[str]) -> dict[str, int]:
    """The sizes that were given.

    Raises:
        ValueError: one that none of the ops has; the message lists those that they have.
    """
    found = {name: value for name in SIZES if (value := getattr(given, name)) is not None}
    known = {name for op in ops for name in harness.sizes_of(harness.cases_of(op))}
    for name in found:
        if name not in known:
            raise ValueError(f"--{name} is no size of {', '.join(ops)}; there are {', '.join(sorted(known))}")
    return found


def dtypes(given: argparse.Namespace, default: Sequence[str]) -> list[str]:
    """Those that were given, each once, or the default."""
    return list(dict.fromkeys(given.dtype or default))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def _dtypes(text: str) -> list[str]:
    for name in text.split(","):
        if name not in harness.DTYPES:
            raise argparse.ArgumentTypeError(f"no dtype {name!r} to measure; there are {', '.join(harness.DTYPES)}")
    return text.split(",")
