"""adjoint_weights: reverse-time accumulation and normalisation of many groups of trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, groups: int = 1024, trajectories: int = 64, steps: int = 256) -> list[harness.Case]:
    shape = (groups, trajectories, steps)
    log_ratio, gap = (harness.normal(groups * trajectories, steps, dtype, scale=0.1).view(shape) for _ in range(2))
    cost = harness.normal(groups, trajectories, dtype)

    def compared(result: Any) -> Sequence[Tensor]:
        """The log-weights of paths without those of what is left at their end, zeros that not every formula has."""
        weight, log_path, log_normalizer, ess, *_ = harness.tensors(result)
        return weight, log_path[..., :steps], log_normalizer, ess

    def case(label: str, **more: Tensor) -> harness.Case:
        inputs = harness.Inputs({"log_ratio": log_ratio, "terminal_cost": cost, **more})
        read = (log_ratio, cost, *more.values())
        return harness.Case(
            label,
            "plain read of the inputs",
            harness.reading(*read),
            {
                "dam": inputs.call(dam.adjoint_weights, "dam"),
                "flip, cumsum, softmax": inputs.call(peers.adjoint_weights, "torch"),
            },
            {"compiled": inputs.call(peers.compiled(peers.adjoint_weights), "compile")},
            reads=read,
            inputs=inputs,
            check=correct.Values(dam.adjoint_weights, rounding.adjoint_weights, results=compared),
        )

    return [case("adjoint_weights"), case("adjoint_weights with escape_gap", escape_gap=gap)]


def test_adjoint_weights(benchmark, function):
    benchmark(function)
