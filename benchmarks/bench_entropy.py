"""entropy: of the distribution of the next jump, out of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)

    def both(function) -> object:
        return harness.gradients(lambda x: function(x).sum(), logits)

    def ours(x: Tensor) -> Tensor:
        return dam.entropy(x)

    return [
        harness.Case(
            "entropy",
            "plain read of the logits",
            harness.reading(logits),
            {"dam": lambda: ours(logits), "softmax x log_softmax": lambda: peers.entropy(logits)},
            {"compiled": lambda: peers.compiled(peers.entropy)(logits)},
            reads=(logits,),
        ),
        harness.Case(
            "entropy, forward and backward",
            "plain read of the logits",
            harness.reading(logits),
            {"dam": lambda: both(ours), "softmax x log_softmax": lambda: both(peers.entropy)},
            {"compiled": lambda: both(peers.compiled(peers.entropy))},
            reads=(logits, logits),
        ),
    ]


def test_entropy(benchmark, function):
    benchmark(function)
