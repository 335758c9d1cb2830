"""rate_ratio: what a path's weight gains, out of the logits of model and base."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits, base = (harness.logits(rows, vocabulary, dtype) for _ in range(2))
    target = torch.randint(vocabulary, (rows, 1))
    return [
        harness.Case(
            "rate_ratio",
            "plain read of both logits",
            harness.reading(logits, base),
            {
                "dam": lambda: dam.rate_ratio(logits, base, target),
                "two logsumexp + gathers": lambda: peers.rate_ratio(logits, base, target),
            },
            {"compiled": lambda: peers.compiled(peers.rate_ratio)(logits, base, target)},
            reads=(logits, base, target),
        )
    ]


def test_rate_ratio(benchmark, function):
    benchmark(function)
