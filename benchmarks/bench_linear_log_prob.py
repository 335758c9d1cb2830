"""linear_log_prob against the bare matmuls in it. Where logits are too many to be kept, it makes one of them twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 128, vocabulary: int = 126_464, hidden: int = 1024) -> list[harness.Case]:
    states, head = harness.normal(rows, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    target = torch.randint(vocabulary, (rows, 1))
    given = {"hidden": states, "head_weight": head, "target": target}

    def behind_matmul(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
        return peers.log_prob(hidden @ head_weight.t(), target)

    def quack(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
        return peers.quack_log_prob(hidden @ head_weight.t(), target)

    def negative(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
        return -peers.cut_cross_entropy(hidden, head_weight, target, reduction="none")

    def case(label: str, *wrt: str) -> harness.Case:
        inputs = harness.Inputs(given, wrt)
        gradients = {"states_gradient": "hidden" in wrt, "head_gradient": "head_weight" in wrt}
        packages: dict[str, Callable[[], object]] = {
            "cut cross entropy": inputs.call(negative, "cut_cross_entropy"),
            "matmul, quack's cross entropy": inputs.call(quack, "quack"),
        }
        return harness.Case(
            label,
            *harness.bare_matmuls(states, head, logits=1, **gradients),
            {
                "dam": inputs.call(dam.linear_log_prob, "dam"),
                "matmul, log_softmax + gather": inputs.call(behind_matmul, "torch"),
            },
            on_gpu={} if wrt else packages,
            reads=(states, head, target, head) if wrt else (states, head, target),
            inputs=inputs,
            check=correct.Values(dam.log_prob, rounding.log_prob, heads=("",)),
        )

    return [
        case("linear_log_prob, forward"),
        case("linear_log_prob, forward and backward, frozen head", "hidden"),
        case("linear_log_prob, forward and backward, trained head", "hidden", "head_weight"),
    ]


def test_linear_log_prob(benchmark, function):
    benchmark(function)
