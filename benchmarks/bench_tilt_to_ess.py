"""tilt_to_ess: the tilt of every group that keeps a set effective sample size."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, groups: int = 1024, trajectories: int = 64) -> list[harness.Case]:
    reward = harness.normal(groups, trajectories, dtype)
    ess, max_tilt = max(1.0, trajectories / 4), 100.0
    return [
        harness.Case(
            "tilt_to_ess",
            "plain read of the rewards",
            harness.reading(reward),
            {
                "dam": lambda: dam.tilt_to_ess(reward, ess, max_tilt=max_tilt),
                "bisection in torch": lambda: peers.tilt_to_ess(reward, ess, max_tilt),
            },
            {"compiled bisection": lambda: peers.compiled(peers.tilt_to_ess)(reward, ess, max_tilt)},
            reads=(reward,),
        )
    ]


def test_tilt_to_ess(benchmark, function):
    benchmark(function)
