"""rate_ratio: what a path's weight gains, out of the logits of model and base."""

from __future__ import annotations

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits, base = (harness.logits(rows, vocabulary, dtype) for _ in range(2))
    target = torch.randint(vocabulary, (rows, 1))
    inputs = harness.Inputs({"logits": logits, "base_logits": base, "target": target})
    return [
        harness.Case(
            "rate_ratio",
            "plain read of both logits",
            harness.reading(logits, base),
            {
                "dam": inputs.call(dam.rate_ratio, "dam"),
                "two logsumexp + gathers": inputs.call(peers.rate_ratio, "torch"),
            },
            {"compiled": inputs.call(peers.compiled(peers.rate_ratio), "compile")},
            reads=(logits, base, target),
            inputs=inputs,
            check=correct.Values(dam.rate_ratio, rounding.rate_ratio),
        )
    ]


def test_rate_ratio(benchmark, function):
    benchmark(function)
