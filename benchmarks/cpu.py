"""Ratios of the C++ backend to its peers: python -m benchmarks.cpu [--dtype bfloat16] [--threads 1] [--json FILE].

Every function is called in turn, `repeats` times over, and medians are compared, so that a machine which is slow for a
while is slow for all of them. A ratio above 1 says that dam is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import dam
from benchmarks import peers
from dam.ops import _cpu


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called alternately after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def cases(rows: int, columns: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """For each op: "dam" and its peers, on fresh random input."""
    logits, base = ((3 * torch.randn(rows, columns)).to(dtype) for _ in range(2))
    target, weight, base_weight = torch.randint(columns, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor | None:
        x = logits.detach().requires_grad_()
        loss(x).backward()
        return x.grad

    return {
        "jump": {
            "dam": lambda: dam.jump(logits, seed=1),
            "LLaDA's step": lambda: peers.llada_step(logits),
            "softmax + multinomial": lambda: peers.softmax_multinomial(logits),
            "torch.logsumexp": lambda: peers.logsumexp(logits),
        },
        "log_prob, forward and backward": {
            "dam": lambda: gradient(lambda x: dam.log_prob(x, target).sum()),
            "log_softmax + gather": lambda: peers.log_prob(logits, target),
        },
        "matching_loss with base, forward and backward": {
            "dam": lambda: gradient(
                lambda x: dam.matching_loss(x, target, weight, base_logits=base, base_weight=base_weight)
            ),
            "c-DTM's formula": lambda: peers.cdtm_loss(logits, target, weight, base, base_weight),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the medians, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"T = {options.rows}, V = {options.vocabulary}, {options.dtype}, {options.threads} threads")
    measured = {}
    for op, functions in cases(options.rows, options.vocabulary, getattr(torch, options.dtype)).items():
        measured[op] = times = medians(functions, options.repeats)
        print(f"\n{op}: {1e3 * times['dam']:.2f} ms")
        for name, seconds in times.items():
            if name != "dam":
                print(f"    {name:24}{seconds / times['dam']:8.2f} x")
    if options.json:
        setting = {name: value for name, value in vars(options).items() if name != "json"}
        versions = {"torch": torch.__version__, "instruction_set": _cpu.isa()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**setting, **versions, "median_seconds": measured}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
