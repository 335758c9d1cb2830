"""tilt_to_ess: the tilt of every group that keeps a set effective sample size."""

from __future__ import annotations

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, groups: int = 1024, trajectories: int = 64) -> list[harness.Case]:
    reward = harness.normal(groups, trajectories, dtype)
    inputs = harness.Inputs({"reward": reward, "ess": max(1.0, trajectories / 4), "max_tilt": 100.0})
    return [
        harness.Case(
            "tilt_to_ess",
            "plain read of the rewards",
            harness.reading(reward),
            {
                "dam": inputs.call(dam.tilt_to_ess, "dam"),
                "bisection in torch": inputs.call(peers.tilt_to_ess, "torch"),
            },
            {"compiled bisection": inputs.call(peers.compiled(peers.tilt_to_ess), "compile")},
            reads=(reward,),
            inputs=inputs,
            check=correct.Values(dam.tilt_to_ess, rounding.tilt_to_ess),
        )
    ]


def test_tilt_to_ess(benchmark, function):
    benchmark(function)
