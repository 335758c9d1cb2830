"""linear_jump: drawing a destination per row out of hidden states and head, against the bare matmul in it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import dam
from dam.benchmarks import correct, harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464, hidden: int = 4096) -> list[harness.Case]:
    states, head = harness.normal(rows, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    inputs = harness.Inputs({"hidden": states, "head_weight": head})

    def behind(draw: Callable[[Tensor], object], *groups: str) -> harness.Call:
        """The matmul and what draws from its logits."""
        return inputs.call(lambda hidden, head_weight: draw(hidden @ head_weight.t()), *groups)

    return [
        harness.Case(
            "linear_jump",
            *harness.bare_matmuls(states, head, logits=1),
            {
                "dam": inputs.call(dam.linear_jump, "dam"),
                "matmul, softmax + multinomial": behind(peers.softmax_multinomial, "torch"),
            },
            on_gpu={
                "dam, check=False": inputs.call(functools.partial(dam.linear_jump, check=False), "dam"),
                "bare matmul, logits in float32": lambda: torch.mm(states, head.t(), out_dtype=torch.float32),
                "matmul, dam.jump": behind(functools.partial(dam.jump, check=False), "dam"),
                "matmul, compiled Gumbel race": behind(
                    lambda logits: peers.compiled(peers.gumbel_race)(logits=logits), "compile"
                ),
                "FlashSampling, restated": inputs.call(peers.flash_sampling, "flash_sampling"),
                "matmul, flashinfer's sampling_from_logits": behind(peers.flashinfer_sample, "flashinfer"),
            },
            reads=(states, head),
            inputs=inputs,
            check=correct.Draws(heads=("",)),
        )
    ]


def test_linear_jump(benchmark, function):
    benchmark(function)
