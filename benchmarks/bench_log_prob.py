"""log_prob: forward, and forward and backward."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)
    target = torch.randint(vocabulary, (rows, 1))
    compiled = peers.compiled(peers.log_prob)
    return [
        harness.Case(
            "log_prob, forward",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": lambda: dam.log_prob(logits, target),
                "log_softmax + gather": lambda: peers.log_prob(logits, target),
            },
            {"compiled log_softmax + gather": lambda: compiled(logits, target)},
            {"quack's cross entropy": lambda: peers.quack_log_prob(logits, target)},
            (logits, target),
        ),
        harness.Case(
            "log_prob, forward and backward",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": lambda: harness.gradients(lambda x: dam.log_prob(x, target).sum(), logits),
                "log_softmax + gather": lambda: harness.gradients(lambda x: peers.log_prob(x, target).sum(), logits),
            },
            {"compiled log_softmax + gather": lambda: harness.gradients(lambda x: compiled(x, target).sum(), logits)},
            {
                "quack's cross entropy": lambda: harness.gradients(
                    lambda x: peers.quack_cross_entropy(x, target), logits
                )
            },
            (logits, target, logits),  # the upstream gradient is known after the first pass only
        ),
    ]


def test_log_prob(benchmark, function):
    benchmark(function)
