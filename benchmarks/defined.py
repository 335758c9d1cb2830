"""Kernels of divergences that are defined, beside the hand-written generalised KL and torch.compile of the formulas.

    python -m benchmarks.defined [--json FILE] [--rounds 15] [--only rates | normalised]

Loss and gradient of float32 rows, of rates and of normalised ones, in one process and on one thread, each candidate's
calls interleaved with those of the others. torch.compile is given the formulas as they are once simplified by hand, and
its compilation is not timed. Times are of the process' CPU, so that other work on the machine shows less.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dam
from dam.backends import cpu
from dam.benchmarks import records, report
from dam.divergences import define, rate_matching_loss

SIZES = ((64, 32_768), (16, 126_464))
SLOTS = 4
CALLS = 3  # in a turn
NORMALIZED = ", normalised"  # of the rows


def generalised_kl(u):
    return u * torch.log(u) - u


def squared_hellinger(u):
    return (torch.sqrt(u) - 1) ** 2


def alpha_divergence(u, a=0.3):
    return (u**a - a * u + a - 1) / (a * (a - 1))


def nearby(z, y, x):
    """A rate, which docs/derive.md shows: the farther a destination, the rarer."""
    return torch.exp(z) / (1 + (y - x) ** 2)


# phi'(u) u - phi(u) and phi'(u), of x = log u, by hand.
BY_HAND: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "generalised_kl": lambda x: (x.exp(), x),
    "squared_hellinger": lambda x: ((x / 2).exp() - 1, 1 - (-x / 2).exp()),
    "alpha_divergence": lambda x: (((0.3 * x).exp() - 1) / 0.3, ((-0.7 * x).exp() - 1) / -0.7),
}


def formula(name: str, normalized: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    terms = BY_HAND[name]

    def loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        x = x.log_softmax(dim=1) if normalized else x
        pull, _ = terms(x)
        _, slope = terms(x.gather(1, target))
        return (pull.sum(dim=1) - (weight * slope).sum(dim=1)).mean()

    return loss


def candidates(rows: int, columns: int, normalized: bool) -> dict[str, Callable[[], Any]]:
    # For these shapes alone, and not as one more case of a function, of which torch.compile takes eight and gives up.
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).requires_grad_()
    target = torch.randint(columns, (rows, SLOTS), generator=generator)
    weight = torch.rand(rows, SLOTS, generator=generator)

    def with_gradient(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), x)

    found = {
        "hand-written": with_gradient(lambda: dam.matching_loss(x, target, weight, normalized=normalized)),
    }
    for phi in (generalised_kl, squared_hellinger, alpha_divergence):
        divergence, compiled = define(phi), torch.compile(formula(phi.__name__, normalized))
        found[f"{phi.__name__}, defined"] = with_gradient(
            lambda d=divergence: rate_matching_loss(x, target, weight, divergence=d, normalized=normalized)  # type: ignore[misc]
        )
        found[f"{phi.__name__}, torch.compile"] = with_gradient(lambda c=compiled: c(x, target, weight))  # type: ignore[misc]
    return found


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of a call, the median over rounds in which each has its turn: a call that is not timed, since memory
    that the one before gave back is mapped anew, and then some.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.process_time()
            for _ in range(CALLS):
                call()
            times[name].append((time.process_time() - start) / CALLS)
    return {name: statistics.median(all_) for name, all_ in times.items()}


def table(record: dict[str, Any], rows_are: str = "rows") -> str:
    """Times of the kernels, as parts of the hand-written one's and of torch.compile's, as docs/derive.md shows them."""
    lines = [
        f"| {rows_are} | divergence | ms | of the hand-written | ahead of torch.compile |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rows, found in record["sizes"].items():
        for name, times in found["of_hand_written"].items():
            took = found["milliseconds"][f"{name}, defined"]
            lines.append(f"| {rows} | `{name}` | {took:.1f} | {times:.2f} | {found['torch_compile'][name]:.1f}x |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defined", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("rates", "normalised"), help="of the two forms")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        **records.versions(),
        "command": "python -m benchmarks.defined --json FILE" + (f" --only {options.only}" if options.only else ""),
        "cpu": report.cpu_model(),
        "isa": cpu.isa(),
        "budget": {"rounds": options.rounds, "calls": CALLS, "threads": 1, "dtype": "float32", "targets": SLOTS},
        "sizes": {},
    }
    forms = [normalized for normalized in (False, True) if options.only in (None, ("rates", "normalised")[normalized])]
    for (rows, columns), normalized in itertools.product(SIZES, forms):
        found = medians(candidates(rows, columns, normalized), options.rounds)
        by_hand = found["hand-written"]
        of = {name.removesuffix(", defined"): took for name, took in found.items() if name.endswith(", defined")}
        record["sizes"][f"{rows} x {columns:,}{NORMALIZED if normalized else ''}"] = {
            "milliseconds": {name: 1e3 * took for name, took in found.items()},
            "of_hand_written": {name: took / by_hand for name, took in of.items()},
            "torch_compile": {name: found[f"{name}, torch.compile"] / took for name, took in of.items()},
        }
    print(table(record))
    if options.json:
        report.write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
