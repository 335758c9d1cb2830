"""Gradient calls of dam.derive beside torch's autograd and the package `autograd`: python -m benchmarks.derive.

Three cases, in one run and one process, each candidate's calls interleaved with the others': an iterated power of 1,000
steps, a function of small arrays, and the transformation of a function of 50 lines. `autograd` is left out, and the
output says so, where it is not installed: `pip install autograd`.
"""

from __future__ import annotations

import argparse
import linecache
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dam.benchmarks import records, report
from dam.derive import grad

STEPS = 1000
W = np.linspace(-1.0, 1.0, 32).reshape(4, 8)
X = np.linspace(0.1, 0.9, 8)


def iterated_power(x, n):
    result = 1.0
    for _ in range(n):
        result = result * x
    return result


def small_array(w, x):
    h = np.tanh(np.dot(w, x))
    return np.sum(np.log(1.0 + np.exp(h)) * h)


def small_array_torch(w, x):
    h = torch.tanh(torch.mv(w, x))
    return torch.sum(torch.log(1.0 + torch.exp(h)) * h)


def fifty_lines() -> str:
    """A function of 50 lines with loops, branches and stores, as text."""
    lines = [
        "def f(x):",
        "    y = np.zeros(3)",
        "    s = x[0] * x[1]",
        "    for i in range(3):",
        "        y[i] = np.sin(x[i]) * s",
    ]
    lines += ["        if y[i] > 0.5:", "            s = s * y[i]"]
    k = 0
    while len(lines) < 49:
        lines.append(f"    a{k} = np.exp(-s) * y[{k % 3}] + {f'a{k - 1}' if k else 's'} * 0.5")
        k += 1
    return "\n".join([*lines, f"    return np.sum(y) * a{k - 1}"]) + "\n"


def by_torch(f: Callable[..., Any], arguments: tuple[Any, ...], rest: tuple[Any, ...]) -> Callable[[], Any]:
    def call() -> Any:
        given = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
        return torch.autograd.grad(f(*given, *rest), given)

    return call


def cases() -> dict[str, dict[str, Callable[[], Any]]]:
    power, array = grad(iterated_power), grad(small_array, (0, 1))
    found: dict[str, dict[str, Callable[[], Any]]] = {
        "iterated power, 1,000 steps": {
            "dam.derive": lambda: power(1.001, STEPS),
            "torch autograd": by_torch(iterated_power, (1.001,), (STEPS,)),
        },
        "small arrays": {
            "dam.derive": lambda: array(W, X),
            "torch autograd": by_torch(small_array_torch, (W, X), ()),
        },
    }
    try:
        import autograd
        import autograd.numpy as anp
    except ImportError:
        return found

    def small_array_autograd(w: Any, x: Any) -> Any:
        h = anp.tanh(anp.dot(w, x))
        return anp.sum(anp.log(1.0 + anp.exp(h)) * h)

    of_power = autograd.grad(iterated_power)
    of_array = autograd.grad(small_array_autograd, (0, 1))
    found["iterated power, 1,000 steps"]["autograd"] = lambda: of_power(1.001, STEPS)
    found["small arrays"]["autograd"] = lambda: of_array(W, X)
    return found


def median_times(candidates: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """CPU seconds of a call, the median over rounds in which each candidate has its turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            repeat = calls if name == "dam.derive" else max(1, calls // 10)
            start = time.process_time()
            for _ in range(repeat):
                call()
            times[name].append((time.process_time() - start) / repeat)
    return {name: float(np.median(all_)) for name, all_ in times.items()}


def transformation(rounds: int) -> float:
    """CPU seconds of grad on a function of 50 lines."""
    text = fifty_lines()
    space: dict[str, Any] = {"np": np}
    linecache.cache["<fifty lines>"] = (len(text), None, text.splitlines(keepends=True), "<fifty lines>")
    exec(compile(text, "<fifty lines>", "exec"), space)
    grad(space["f"])
    times = []
    for _ in range(rounds):
        start = time.process_time()
        grad(space["f"])
        times.append(time.process_time() - start)
    return float(np.median(times))


def _release(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.derive", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        **records.versions(),
        "command": "python -m benchmarks.derive --json FILE",
        "cpu": report.cpu_model(),
        "numpy": np.__version__,
        "autograd": _release("autograd"),
        "budget": {"rounds": options.rounds, "threads": 1, "steps": STEPS},
        "cases": {},
    }
    for name, candidates in cases().items():
        found = median_times(candidates, options.rounds, 20)
        own = found["dam.derive"]
        record["cases"][name] = {
            "microseconds": {k: 1e6 * v for k, v in found.items()},
            "times": {k: v / own for k, v in found.items() if k != "dam.derive"},
        }
        print(
            name, {k: f"{1e6 * v:.0f} us" for k, v in found.items()}, {k: f"{v / own:.1f}x" for k, v in found.items()}
        )
        if "autograd" not in candidates:
            print("autograd is not installed and is left out")
    record["transformation_ms"] = 1e3 * transformation(options.rounds)
    print(f"transformation of 50 lines: {record['transformation_ms']:.1f} ms")
    if options.json:
        report.write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
