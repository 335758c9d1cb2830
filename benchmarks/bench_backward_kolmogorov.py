"""backward_kolmogorov: the adjoint over the whole vocabulary, for a uniform chain and for a periodic square lattice."""

from __future__ import annotations

import math

import torch

import dam
from benchmarks import harness, peers

DURATION = 1.0


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    shape = (math.isqrt(vocabulary),) * 2
    uniform, lattice = dam.generators.Uniform(vocabulary), dam.generators.Lattice(shape, periodic=True)
    # e^{-g} of random terminal costs.
    terminal = harness.normal(rows, vocabulary, dtype).exp_()
    on_lattice = harness.normal(rows, math.prod(shape), dtype).exp_()
    return [
        harness.Case(
            "backward_kolmogorov, uniform",
            "plain read of the terminal values",
            harness.reading(terminal),
            {
                "dam": lambda: dam.backward_kolmogorov(uniform, terminal, DURATION),
                "closed form in torch": lambda: peers.uniform_kolmogorov(terminal, DURATION),
            },
            {"compiled closed form": lambda: peers.compiled(peers.uniform_kolmogorov)(terminal, DURATION)},
            reads=(terminal,),
        ),
        harness.Case(
            "backward_kolmogorov, square lattice",
            "plain read of the terminal values",
            harness.reading(on_lattice),
            {
                "dam": lambda: dam.backward_kolmogorov(lattice, on_lattice, DURATION),
                "Fourier transforms in torch": lambda: peers.lattice_kolmogorov(on_lattice, shape, DURATION),
            },
            reads=(on_lattice,),
        ),
    ]


def test_backward_kolmogorov(benchmark, function):
    benchmark(function)
