"""Products of parameters, of which `make test` runs some that have every value; the others repeat, and are `full`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def full(*values: Any, id: str | None = None) -> Any:
    """A case of `make test-full` alone."""
    return pytest.param(*values, id=id, marks=pytest.mark.full)


def pairs(first: Sequence[Any], second: Sequence[Any], make: Callable[..., Any] = lambda a, b: (a, b)) -> list[Any]:
    """All pairs of values, as `make` has them; of `make test` are as few as have every value of either.

    Args:
        first, second: values. The i-th of the longer goes with the i-th of the shorter, counted round and round.
        make: the parameter, or several as a tuple, that a pair is.
    """
    found = []
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            made = make(one, other)
            values = made if isinstance(made, tuple) else (made,)
            kept = j == i % len(second) if len(first) >= len(second) else i == j % len(first)
            found.append(pytest.param(*values) if kept else full(*values))
    return found


def covering(cases: Sequence[Sequence[int]], strength: int | None = None) -> set[int]:
    """The places of few cases that have every value that occurs, and every pair of values of three parameters or more.

    Greedy: the next one is the first of those with the most that no earlier one has.

    Args:
        cases: of each its parameters' values, as numbers. Parameters that always change together count as one.
        strength: 1 for every value, 2 for every pair, whatever the number of parameters.
    """
    parameters = set(zip(*cases, strict=True))  # each by its values in all cases
    strength = strength or (2 if len(parameters) > 2 else 1)
    columns = sorted(parameters)
    left = [
        {
            tuple((n, columns[n][place]) for n in chosen)
            for chosen in itertools.combinations(range(len(columns)), min(strength, len(columns)))
        }
        for place in range(len(cases))
    ]
    kept = set()
    while any(left):
        best = max(range(len(cases)), key=lambda place: (len(left[place]), -place))
        kept.add(best)
        has = set(left[best])
        left = [each - has for each in left]
    return kept or set(range(len(cases)))
