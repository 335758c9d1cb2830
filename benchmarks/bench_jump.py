"""jump: drawing a destination per row, against the samplers that users have."""

from __future__ import annotations

import torch

import dam
from benchmarks import goals, harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits = harness.logits(rows, vocabulary, dtype)
    seed = torch.zeros((), dtype=torch.int64)
    return [
        harness.Case(
            "jump",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": lambda: dam.jump(logits),
                "LLaDA's step": lambda: peers.llada_step(logits),
                "softmax + multinomial": lambda: peers.softmax_multinomial(logits),
                "torch.logsumexp": lambda: torch.logsumexp(logits, dim=-1),
            },
            {"compiled Gumbel race": lambda: peers.compiled(peers.gumbel_race)(logits)},
            {
                "dam, check=False": lambda: dam.jump(logits, check=False),
                goals.seeded("dam"): lambda: dam.jump(logits, check=False, seed=seed),
                "flashinfer's sampling_from_logits": lambda: peers.flashinfer_sample(logits),
            },
            (logits,),
        )
    ]


def test_jump(benchmark, function):
    benchmark(function)
