"""entropy: of the distribution of the next jump, out of the logits."""

from __future__ import annotations

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)

    def case(label: str, inputs: harness.Inputs, reads: tuple[torch.Tensor, ...]) -> harness.Case:
        return harness.Case(
            label,
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": inputs.call(dam.entropy, "dam"),
                "softmax x log_softmax": inputs.call(peers.entropy, "torch"),
            },
            {"compiled": inputs.call(peers.compiled(peers.entropy), "compile")},
            reads=reads,
            inputs=inputs,
            check=correct.Values(dam.entropy, rounding.entropy),
        )

    return [
        case("entropy", harness.Inputs({"logits": logits}), (logits,)),
        case("entropy, forward and backward", harness.Inputs({"logits": logits}, ("logits",)), (logits, logits)),
    ]


def test_entropy(benchmark, function):
    benchmark(function)
