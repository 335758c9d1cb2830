"""log_prob: forward, and forward and backward."""

from __future__ import annotations

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)
    target = torch.randint(vocabulary, (rows, 1))

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What a package's cross entropy is, whose gradient takes as long as that of log-probabilities."""
        return -dam.log_prob(logits, target).mean()

    def case(label: str, inputs: harness.Inputs, reads: tuple[torch.Tensor, ...]) -> harness.Case:
        quack = (
            inputs.call(peers.quack_cross_entropy, "quack", check=correct.Values(loss, rounding.mean_log_prob))
            if inputs.wrt
            else inputs.call(peers.quack_log_prob, "quack")
        )
        return harness.Case(
            label,
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": inputs.call(dam.log_prob, "dam"),
                "log_softmax + gather": inputs.call(peers.log_prob, "torch"),
            },
            {"compiled log_softmax + gather": inputs.call(peers.compiled(peers.log_prob), "compile")},
            {"quack's cross entropy": quack},
            reads,
            inputs,
            correct.Values(dam.log_prob, rounding.log_prob),
        )

    given = {"logits": logits, "target": target}
    return [
        case("log_prob, forward", harness.Inputs(given), (logits, target)),
        # The upstream gradient is known after the first pass only.
        case("log_prob, forward and backward", harness.Inputs(given, ("logits",)), (logits, target, logits)),
    ]


def test_log_prob(benchmark, function):
    benchmark(function)
