"""linear_matching_loss, forward and gradients in one call, against the bare matmuls in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding


def cases(dtype: torch.dtype, *, rows: int = 128, vocabulary: int = 126_464, hidden: int = 1024) -> list[harness.Case]:
    states, base_states = (harness.normal(rows, hidden, dtype) for _ in range(2))
    head = harness.head(hidden, vocabulary, dtype)
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)

    def case(trained: bool, based: bool) -> harness.Case:
        base = {"base_hidden": base_states, "base_head_weight": head, "base_weight": base_weight} if based else {}
        given = {"hidden": states, "head_weight": head, "target": target, "weight": weight, **base}
        inputs = harness.Inputs(given, ("hidden", "head_weight") if trained else ("hidden",))
        materialised = peers.linear_cdtm_loss if based else peers.linear_weighted_cross_entropy
        formula = "matmul, c-DTM" if based else "matmul, cross entropy"
        groups = ("cdtm",) if based else ()
        packages = {
            "torch's linear cross entropy": (peers.torch_linear_cross_entropy, "torch"),
            "Liger's fused linear cross entropy": (peers.liger_linear_cross_entropy, "liger"),
            "Liger's, Triton": (peers.liger_triton_linear_cross_entropy, "liger"),
            "quack's linear cross entropy": (peers.quack_linear_cross_entropy, "quack"),
            "quack's, scaled exponentials": (peers.quack_scaled_exp_linear_cross_entropy, "quack"),
            "cut cross entropy": (peers.cut_cross_entropy, "cut_cross_entropy"),
            "fla's linear cross entropy": (peers.fla_linear_cross_entropy, "fla"),
        }
        of_trained_heads = {
            "Liger's, CuTe for Hopper": (peers.liger_hopper_linear_cross_entropy, "liger"),
            "Liger's, cuTile": (peers.liger_cutile_linear_cross_entropy, "liger"),
        }
        packages = {} if based else packages | (of_trained_heads if trained else {})
        # Packages have means over rows: one target of weight 1 each.
        of_package: dict[str, Any] = {"takes": ("hidden", "head_weight", "target"), "weight": torch.ones_like(weight)}
        on_gpu: dict[str, Callable[[], object]] = {
            f"compiled {formula}": inputs.call(peers.compiled(materialised), "compile", *groups),
            **{name: inputs.call(loss, group, **of_package) for name, (loss, group) in packages.items()},
        }
        return harness.Case(
            f"linear_matching_loss, {'trained' if trained else 'frozen'} head{', with base' if based else ''}",
            *harness.bare_matmuls(states, head, logits=1 + based, states_gradient=True, head_gradient=trained),
            {
                "dam": inputs.call(dam.linear_matching_loss, "dam"),
                formula: inputs.call(materialised, "torch", *groups),
            },
            on_gpu=on_gpu,
            reads=(states, head, target, weight, *base.values()),
            inputs=inputs,
            check=correct.Values(dam.matching_loss, rounding.matching_loss, heads=("", "base_") if based else ("",)),
        )

    return [case(trained, based) for trained in (False, True) for based in (False, True)]


def test_linear_matching_loss(benchmark, function):
    benchmark(function)
