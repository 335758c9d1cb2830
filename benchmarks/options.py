"""Sizes and dtypes of what is measured: options of every command that measures the cases of bench_<op>.py."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dam.benchmarks import harness

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
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add(option: Callable[..., Any], dtypes: Sequence[str]) -> None:
    """Adds them by `option`, the add_argument of a parser or the addoption of pytest's; `dtypes` are the default."""
    for name, (letter, whose) in SIZES.items():
        meaning = " ".join(part for part in (name, whose) if part)
        option(
            f"--{letter}",
            f"--{name}",
            dest=name,
            metavar="N",
            type=positives,
            action="extend",
            help=f"{meaning}; several with commas are measured one after another (default: the op's own)",
        )
    meaning = f"{', '.join(harness.DTYPES)}, or {', '.join(SHORT_DTYPES)}; several with commas or repeated"
    option(
        "--dtype",
        metavar="DTYPE",
        type=_dtypes,
        action="extend",
        help=f"{meaning} (default: {', '.join(dtypes)})",
    )


def sizes(given: argparse.Namespace, ops: Collection[str]) -> dict[str, list[int]]:
    """The sizes that were given, each value once.

    Raises:
        ValueError: one that none of the ops has; the message lists those that they have.
    """
    found = {name: list(dict.fromkeys(values)) for name in SIZES if (values := getattr(given, name)) is not None}
    known = {name for op in ops for name in harness.sizes_of(harness.cases_of(op))}
    for name in found:
        if name not in known:
            raise ValueError(f"{_option(name)} is no size of {', '.join(ops)}; there are {_listed(known)}")
    return found


def sweep(op: str, given: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """All sizes of an op: every combination of those that were given and that it has, its own for the others."""
    own = harness.sizes_of(harness.cases_of(op))
    values = [given.get(name, (size,)) for name, size in own.items()]
    return [dict(zip(own, some, strict=True)) for some in itertools.product(*values)]


def text(sizes: Mapping[str, int]) -> str:
    """As tables have them: T = 64, V = 126,464."""
    return ", ".join(f"{SIZES[name][0]} = {size:,}" for name, size in sizes.items())


def dtypes(given: argparse.Namespace, default: Sequence[str]) -> list[str]:
    """Those that were given, each once, or the default."""
    return list(dict.fromkeys(given.dtype or default))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _dtypes(text: str) -> list[str]:
    names = [SHORT_DTYPES.get(name, name) for name in text.split(",")]
    for name in names:
        if name not in harness.DTYPES:
            there = ", ".join((*harness.DTYPES, *SHORT_DTYPES))
            raise argparse.ArgumentTypeError(f"no dtype {name!r} to measure; there are {there}")
    return names


def _option(name: str) -> str:
    return f"--{SIZES[name][0]} ({name})"


def _listed(names: Collection[str]) -> str:
    return ", ".join(_option(name) for name in SIZES if name in names)
