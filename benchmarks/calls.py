"""What a call of few numbers costs beside torch's own: python -m benchmarks calls [--rows 4] [--vocabulary 8].

CPU time of a call in a loop, of all functions in turn in an order shuffled anew for every repeat; medians, and their
multiples of an operation of one kernel, `softmax`, and of `logsumexp`, which is six.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dam
from dam.backends import cpu
from dam.benchmarks import harness, options, records, report

ONE_KERNEL, SIX_KERNELS = "torch.softmax", "torch.logsumexp"


def functions(rows: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    logits, base = harness.logits(rows, vocabulary, dtype), harness.logits(rows, vocabulary, dtype)
    states, head = harness.normal(rows, hidden, dtype), harness.head(hidden, vocabulary, dtype)
    target, weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1)
    leaf, free = (x.clone().requires_grad_() for x in (logits, states))
    ones = torch.ones(rows, 1)

    def gradient(value: Any, of: Any, upstream: Any = None) -> object:
        return torch.autograd.grad(value, of, upstream)

    return {
        ONE_KERNEL: lambda: torch.softmax(logits, 1),
        SIX_KERNELS: lambda: torch.logsumexp(logits, 1),
        "torch.mm": lambda: torch.mm(states, head.t()),
        "torch, cross entropy with gradient": lambda: gradient(F.cross_entropy(leaf, target[:, 0]), leaf),
        "jump": lambda: dam.jump(logits, seed=1),
        "log_prob": lambda: dam.log_prob(logits, target),
        "entropy": lambda: dam.entropy(logits),
        "rate_ratio": lambda: dam.rate_ratio(logits, base, target),
        "linear_jump": lambda: dam.linear_jump(states, head, seed=1),
        "linear_log_prob": lambda: dam.linear_log_prob(states, head, target),
        "matching_loss": lambda: dam.matching_loss(logits, target, weight),
        "linear_matching_loss": lambda: dam.linear_matching_loss(states, head, target, weight),
        "log_prob with gradient": lambda: gradient(dam.log_prob(leaf, target), leaf, ones),
        "linear_log_prob with gradient": lambda: gradient(dam.linear_log_prob(free, head, target), free, ones),
        "matching_loss with gradient": lambda: gradient(dam.matching_loss(leaf, target, weight), leaf),
        "linear_matching_loss with gradient": lambda: gradient(
            dam.linear_matching_loss(free, head, target, weight), free
        ),
    }


def measure(of: dict[str, Callable[[], object]], repeats: int, loop: int) -> dict[str, float]:
    """Median seconds of the CPU for one call."""
    seconds: dict[str, list[float]] = {name: [] for name in of}
    order, shuffle = list(of), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            function = of[name]
            function()
            start = time.process_time()
            for _ in range(loop):
                function()
            seconds[name].append((time.process_time() - start) / loop)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks calls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"rows": 4, "vocabulary": 8, "hidden": 8, "threads": 1, "repeats": 31, "loop": 200}.items():
        parser.add_argument(f"--{name}", type=options.positive, default=default)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float32")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the medians")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    of = functions(args.rows, args.vocabulary, args.hidden, getattr(torch, args.dtype))
    medians = measure(of, args.repeats, args.loop)
    for name, seconds in medians.items():
        one, six = (seconds / medians[peer] for peer in (ONE_KERNEL, SIX_KERNELS))
        print(f"{name:36}{1e6 * seconds:8.1f} us, {one:6.2f} of softmax, {six:5.2f} of logsumexp")
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        machine = {"cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        report.write_json(args.json, {**setting, **records.versions(), **machine, "median_cpu_seconds": medians})
    return 0


if __name__ == "__main__":
    raise SystemExit("the command is python -m benchmarks calls")
