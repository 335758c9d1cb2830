"""linear_jump: drawing a destination per row out of hidden states and head, against the bare matmul in it."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464, hidden: int = 4096) -> list[harness.Case]:
    states, head = harness.normal(rows, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    return [
        harness.Case(
            "linear_jump",
            "bare matmul in float32",
            harness.bare_matmuls(states, head, logits=1),
            {
                "dam": lambda: dam.linear_jump(states, head),
                "matmul, softmax + multinomial": lambda: peers.softmax_multinomial(states @ head.t()),
            },
        )
    ]


def test_linear_jump(benchmark, function):
    benchmark(function)
