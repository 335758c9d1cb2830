"""jump: drawing a destination per row, against the samplers that users have."""

from __future__ import annotations

import functools

import torch

import dam
from dam.benchmarks import correct, goals, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)
    seed = torch.zeros((), dtype=torch.int64)
    inputs = harness.Inputs({"logits": logits})
    unchecked = functools.partial(dam.jump, check=False)
    return [
        harness.Case(
            "jump",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": inputs.call(dam.jump, "dam"),
                "LLaDA's step": inputs.call(peers.llada_step, "torch", "llada"),
                "softmax + multinomial": inputs.call(peers.softmax_multinomial, "torch"),
                "torch.logsumexp": inputs.call(
                    peers.logsumexp, "torch", check=correct.Values(peers.logsumexp, rounding.logsumexp)
                ),
            },
            {"compiled Gumbel race": inputs.call(peers.compiled(peers.gumbel_race), "compile")},
            {
                "dam, check=False": inputs.call(unchecked, "dam"),
                goals.seeded("dam"): inputs.call(
                    functools.partial(unchecked, seed=seed), "dam", check=correct.Draws(fewest=1)
                ),
                "flashinfer's sampling_from_logits": inputs.call(peers.flashinfer_sample, "flashinfer"),
            },
            (logits,),
            inputs,
            correct.Draws(),
        )
    ]


def test_jump(benchmark, function):
    benchmark(function)
