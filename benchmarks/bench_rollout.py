"""rollout with a head of LLaDA's vocabulary: the head at the positions that jump, against at all masked ones.

The network below the head is left out (hidden states are a table), so that what is compared is the head and the draws.
Every step fills the same number of positions of a sequence, and the floor is the bare matmul of these.
"""

from __future__ import annotations

import functools

import torch

import dam.rollout
from dam.benchmarks import correct, harness, peers
from dam.ctmc import MaskedCTMC
from dam.models import Head


class _Table:
    """Hidden states that do not depend on the tokens, as a `Denoiser`."""

    def __init__(self, states: torch.Tensor, head: torch.Tensor):
        self._states, self._head = states, head

    def hidden_states(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self._states[: len(tokens)]

    def head(self) -> Head:
        return Head(self._head, None)


def cases(
    dtype: torch.dtype,
    *,
    sequences: int = 4,
    length: int = 32,
    steps: int = 8,
    vocabulary: int = 126_464,
    hidden: int = 512,
) -> list[harness.Case]:
    if length % steps:
        raise ValueError(f"rollout: steps must divide length; got steps {steps}, length {length}")
    states, head = harness.normal(sequences * length, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    table = _Table(states.view(sequences, length, hidden), head)
    process = MaskedCTMC(mask_token=vocabulary - 1)
    tokens = torch.full((sequences, length), process.mask_token)
    jumping = states[: sequences * length // steps]
    floor_name, step = harness.bare_matmuls(jumping, head, logits=1)

    def floor() -> None:
        for _ in range(steps):
            step()

    def rollout(hidden: torch.Tensor, head_weight: torch.Tensor, order: str) -> torch.Tensor:
        return dam.rollout.rollout(table, tokens, process, steps=steps, order=order, seed=1).final

    def loop(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
        return peers.llada_rollout(hidden, head_weight, steps)

    of = harness.Inputs({"hidden": states.view(sequences, length, hidden), "head_weight": head})
    return [
        harness.Case(
            "rollout",
            floor_name,
            floor,
            {
                "dam": of.call(functools.partial(rollout, order="random"), "dam"),
                "dam, head at every mask": of.call(functools.partial(rollout, order="confidence"), "dam"),
                "LLaDA's loop": of.call(loop, "torch", "llada"),
            },
            reads=(jumping, head) * steps,
            check=correct.Tokens((sequences, length), vocabulary),  # by confidence no position has the softmax's law
        )
    ]


def test_rollout(benchmark, function):
    benchmark(function)
