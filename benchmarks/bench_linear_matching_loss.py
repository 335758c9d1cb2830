"""linear_matching_loss, forward and gradients in one call, against the bare matmuls in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import dam
from benchmarks import harness, peers


def cases(dtype: torch.dtype, *, rows: int = 128, vocabulary: int = 126_464, hidden: int = 1024) -> list[harness.Case]:
    states, base_states = (harness.normal(rows, hidden, dtype) for _ in range(2))
    head = harness.head(hidden, vocabulary, dtype)
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)

    def case(trained: bool, based: bool) -> harness.Case:
        base = {"base_hidden": base_states, "base_head_weight": head, "base_weight": base_weight} if based else {}
        inputs = (states, head) if trained else (states,)

        def fused(h: torch.Tensor, w: torch.Tensor = head) -> torch.Tensor:
            return dam.linear_matching_loss(h, w, target, weight, **base)

        def peer(loss: Callable[..., torch.Tensor], *given: torch.Tensor) -> Callable[[], object]:
            return lambda: harness.gradients(lambda h, w=head: loss(h, w, *given), *inputs)

        materialised = peers.linear_cdtm_loss if based else peers.linear_weighted_cross_entropy
        given = (target, weight, base_states, head, base_weight) if based else (target, weight)
        formula = "matmul, c-DTM" if based else "matmul, cross entropy"
        of_packages = {
            "torch's linear cross entropy": peers.torch_linear_cross_entropy,
            "Liger's fused linear cross entropy": peers.liger_linear_cross_entropy,
            "Liger's, Triton": peers.liger_triton_linear_cross_entropy,
            "quack's linear cross entropy": peers.quack_linear_cross_entropy,
            "quack's, scaled exponentials": peers.quack_scaled_exp_linear_cross_entropy,
            "cut cross entropy": peers.cut_cross_entropy,
            "fla's linear cross entropy": peers.fla_linear_cross_entropy,
        }
        of_trained_heads = {
            "Liger's, CuTe for Hopper": peers.liger_hopper_linear_cross_entropy,
            "Liger's, cuTile": peers.liger_cutile_linear_cross_entropy,
        }
        packages = {} if based else of_packages | (of_trained_heads if trained else {})
        return harness.Case(
            f"linear_matching_loss, {'trained' if trained else 'frozen'} head{', with base' if based else ''}",
            *harness.bare_matmuls(states, head, logits=1 + based, states_gradient=True, head_gradient=trained),
            {"dam": lambda: harness.gradients(fused, *inputs), formula: peer(materialised, *given)},
            on_gpu={f"compiled {formula}": peer(peers.compiled(materialised), *given)}
            | {name: peer(loss, target) for name, loss in packages.items()},
            reads=(states, head, target, weight, *base.values()),
        )

    return [case(trained, based) for trained in (False, True) for based in (False, True)]


def test_linear_matching_loss(benchmark, function):
    benchmark(function)
