"""backward_kolmogorov: the adjoint over the whole vocabulary, for a uniform chain and for a periodic square lattice."""

from __future__ import annotations

import math

import torch

import dam
from dam.benchmarks import correct, harness, peers, rounding

DURATION = 1.0


def cases(dtype: torch.dtype, *, rows: int = 64, vocabulary: int = 126_464) -> list[harness.Case]:
    shape = (math.isqrt(vocabulary),) * 2
    generators = (dam.generators.Uniform(vocabulary), dam.generators.Lattice(shape, periodic=True))
    # e^{-g} of random terminal costs.
    terminals = [harness.normal(rows, size, dtype).exp_() for size in (vocabulary, math.prod(shape))]
    uniform, lattice = (
        harness.Inputs({"generator": generator, "terminal": terminal, "duration": DURATION})
        for generator, terminal in zip(generators, terminals, strict=True)
    )
    check = correct.Values(dam.backward_kolmogorov, rounding.backward_kolmogorov)
    return [
        harness.Case(
            "backward_kolmogorov, uniform",
            "plain read of the terminal values",
            harness.reading(terminals[0]),
            {
                "dam": uniform.call(dam.backward_kolmogorov, "dam"),
                "closed form in torch": uniform.call(peers.uniform_kolmogorov, "torch", takes=("terminal", "duration")),
            },
            {
                "compiled closed form": uniform.call(
                    peers.compiled(peers.uniform_kolmogorov), "compile", takes=("terminal", "duration")
                )
            },
            reads=(terminals[0],),
            inputs=uniform,
            check=check,
        ),
        harness.Case(
            "backward_kolmogorov, square lattice",
            "plain read of the terminal values",
            harness.reading(terminals[1]),
            {
                "dam": lattice.call(dam.backward_kolmogorov, "dam"),
                "Fourier transforms in torch": lattice.call(peers.lattice_kolmogorov, "torch"),
            },
            reads=(terminals[1],),
            inputs=lattice,
            check=check,
        ),
    ]


def test_backward_kolmogorov(benchmark, function):
    benchmark(function)
