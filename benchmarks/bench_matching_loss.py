"""matching_loss, forward and gradient in one call: one weighted target per row, without and with a base."""

from __future__ import annotations

from typing import Any

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    logits, base = (harness.logits(rows, vocabulary, dtype) for _ in range(2))
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)
    plain = harness.Inputs({"logits": logits, "target": target, "weight": weight}, ("logits",))
    based = harness.Inputs({**plain.given, "base_logits": base, "base_weight": base_weight}, plain.wrt)
    # Packages have means over rows: one target of weight 1 each.
    of_package: dict[str, Any] = {"takes": ("logits", "target"), "weight": torch.ones_like(weight)}
    check = correct.Values(dam.matching_loss, rounding.matching_loss)
    return [
        harness.Case(
            "matching_loss, forward and backward",
            "plain read of the logits",
            harness.reading(logits),
            {
                "dam": plain.call(dam.matching_loss, "dam"),
                "cross entropy": plain.call(peers.weighted_cross_entropy, "torch"),
            },
            {"compiled cross entropy": plain.call(peers.compiled(peers.weighted_cross_entropy), "compile")},
            {
                "quack's cross entropy": plain.call(peers.quack_cross_entropy, "quack", **of_package),
                "Liger's cross entropy": plain.call(
                    peers.liger_cross_entropy, "liger", overwrites="logits", **of_package
                ),
            },
            (logits, target, weight),
            plain,
            check,
        ),
        harness.Case(
            "matching_loss with base, forward and backward",
            "plain read of both logits",
            harness.reading(logits, base),
            {
                "dam": based.call(dam.matching_loss, "dam"),
                "c-DTM's formula": based.call(peers.cdtm_loss, "torch", "cdtm"),
            },
            {"compiled c-DTM's formula": based.call(peers.compiled(peers.cdtm_loss), "compile", "cdtm")},
            reads=(logits, target, weight, base, base_weight),
            inputs=based,
            check=check,
        ),
    ]


def test_matching_loss(benchmark, function):
    benchmark(function)
