"""adjoint_weights: reverse-time accumulation and normalisation of many groups of trajectories."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, groups: int = 1024, trajectories: int = 64, steps: int = 256) -> list[harness.Case]:
    shape = (groups, trajectories, steps)
    log_ratio, gap = (harness.normal(groups * trajectories, steps, dtype, scale=0.1).view(shape) for _ in range(2))
    cost = harness.normal(groups, trajectories, dtype)

    def case(label: str, escape_gap: torch.Tensor | None) -> harness.Case:
        inputs = (log_ratio, cost) if escape_gap is None else (log_ratio, cost, escape_gap)
        return harness.Case(
            label,
            "plain read of the inputs",
            harness.reading(*inputs),
            {
                "dam": lambda: dam.adjoint_weights(log_ratio, cost, escape_gap=escape_gap),
                "flip, cumsum, softmax": lambda: peers.adjoint_weights(log_ratio, cost, escape_gap),
            },
            {"compiled": lambda: peers.compiled(peers.adjoint_weights)(log_ratio, cost, escape_gap)},
            reads=inputs,
        )

    return [case("adjoint_weights", None), case("adjoint_weights with escape_gap", gap)]


def test_adjoint_weights(benchmark, function):
    benchmark(function)
