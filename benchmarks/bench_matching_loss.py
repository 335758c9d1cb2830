"""matching_loss, forward and gradient in one call: one weighted target per row, without and with a base."""

from __future__ import annotations

import functools

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits, base = (harness.logits(rows, vocabulary, dtype) for _ in range(2))
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)
    cross_entropy, cdtm = peers.compiled(peers.weighted_cross_entropy), peers.compiled(peers.cdtm_loss)
    given = (target, weight, base, base_weight)
    overwritten = functools.cache(logits.clone)  # logits of its own for what writes over them, made when first used
    return [
        harness.Case(
            "matching_loss, forward and backward",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": lambda: harness.gradients(lambda x: dam.matching_loss(x, target, weight), logits),
                "cross entropy": lambda: harness.gradients(
                    lambda x: peers.weighted_cross_entropy(x, target, weight), logits
                ),
            },
            {"compiled cross entropy": lambda: harness.gradients(lambda x: cross_entropy(x, target, weight), logits)},
            {
                "quack's cross entropy": lambda: harness.gradients(
                    lambda x: peers.quack_cross_entropy(x, target), logits
                ),
                "Liger's cross entropy": lambda: harness.gradients(
                    lambda x: peers.liger_cross_entropy(x, target), overwritten()
                ),
            },
            (logits, target, weight),
        ),
        harness.Case(
            "matching_loss with base, forward and backward",
            "plain read of both logits",
            harness.reading(logits, base),
            {
                "dam": lambda: harness.gradients(
                    lambda x: dam.matching_loss(x, target, weight, base_logits=base, base_weight=base_weight), logits
                ),
                "c-DTM's formula": lambda: harness.gradients(lambda x: peers.cdtm_loss(x, *given), logits),
            },
            {"compiled c-DTM's formula": lambda: harness.gradients(lambda x: cdtm(x, *given), logits)},
            reads=(logits, *given),
        ),
    ]


def test_matching_loss(benchmark, function):
    benchmark(function)
