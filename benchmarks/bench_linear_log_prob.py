"""linear_log_prob against the bare matmuls in it. Where logits are too many to be kept, it makes one of them twice."""

from __future__ import annotations

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 128, vocabulary: int = 126_464, hidden: int = 1024) -> list[harness.Case]:
    states, head = harness.normal(rows, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    target = torch.randint(vocabulary, (rows, 1))

    def backward(value, *inputs):
        return harness.gradients(lambda *x: value(*x).sum(), *inputs)

    return [
        harness.Case(
            "linear_log_prob, forward",
            *harness.bare_matmuls(states, head, logits=1),
            {
                "dam": lambda: dam.linear_log_prob(states, head, target),
                "matmul, log_softmax + gather": lambda: peers.log_prob(states @ head.t(), target),
            },
            on_gpu={
                "cut cross entropy": lambda: peers.cut_cross_entropy(states, head, target, reduction="none"),
                "matmul, quack's cross entropy": lambda: peers.quack_log_prob(states @ head.t(), target),
            },
            reads=(states, head, target),
        ),
        harness.Case(
            "linear_log_prob, forward and backward, frozen head",
            *harness.bare_matmuls(states, head, logits=1, states_gradient=True),
            {
                "dam": lambda: backward(lambda h: dam.linear_log_prob(h, head, target), states),
                "matmul, log_softmax + gather": lambda: backward(
                    lambda h: peers.log_prob(h @ head.t(), target), states
                ),
            },
            reads=(states, head, target, head),
        ),
        harness.Case(
            "linear_log_prob, forward and backward, trained head",
            *harness.bare_matmuls(states, head, logits=1, states_gradient=True, head_gradient=True),
            {
                "dam": lambda: backward(lambda h, w: dam.linear_log_prob(h, w, target), states, head),
                "matmul, log_softmax + gather": lambda: backward(
                    lambda h, w: peers.log_prob(h @ w.t(), target), states, head
                ),
            },
            reads=(states, head, target, head),
        ),
    ]


def test_linear_log_prob(benchmark, function):
    benchmark(function)
