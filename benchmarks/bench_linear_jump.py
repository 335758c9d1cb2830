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
            *harness.bare_matmuls(states, head, logits=1),
            {
                "dam": lambda: dam.linear_jump(states, head),
                "matmul, softmax + multinomial": lambda: peers.softmax_multinomial(states @ head.t()),
            },
            on_gpu={
                "dam, check=False": lambda: dam.linear_jump(states, head, check=False),
                "bare matmul, logits in float32": lambda: torch.mm(states, head.t(), out_dtype=torch.float32),
                "matmul, dam.jump": lambda: dam.jump(states @ head.t(), check=False),
                "matmul, compiled Gumbel race": lambda: peers.compiled(peers.gumbel_race)(states @ head.t()),
                "FlashSampling, restated": lambda: peers.flash_sampling(states, head),
                "matmul, flashinfer's sampling_from_logits": lambda: peers.flashinfer_sample(states @ head.t()),
            },
            reads=(states, head),
        )
    ]


def test_linear_jump(benchmark, function):
    benchmark(function)
