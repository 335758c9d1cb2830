"""The C++ backend's products of bfloat16 numbers beside torch's: hidden states times a head, and both gradients.

    python -m benchmarks.products                          of 128 and 1,024 rows, one thread
    python -m benchmarks.products --rows 32 --json FILE

Torch's products leave logits, and take their gradient, in bfloat16; the library's in float32. By every instruction that
this machine has for them; gradients by AMX alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from dam.backends import cpu
from dam.benchmarks import harness, records, report

NARROW, WIDE = torch.bfloat16, torch.float32


def cases(rows: int, vocabulary: int, hidden: int) -> list[harness.Case]:
    states, head = harness.normal(rows, hidden, NARROW), harness.head(hidden, vocabulary, NARROW)
    gradient = harness.normal(rows, vocabulary, WIDE)
    narrow, wide_states, wide_head = gradient.to(NARROW), states.float(), head.float()
    logits, narrow_logits = gradient.new_empty(gradient.shape), narrow.new_empty(narrow.shape)
    of_states, of_head = wide_states.new_empty(states.shape), torch.empty_like(head)

    def by(name: str) -> Callable[[], object]:
        return lambda: cpu.product(states, head, logits, name)

    found = [
        harness.Case(
            "logits",
            "torch, bfloat16",
            lambda: torch.mm(states, head.t(), out=narrow_logits),
            {
                "dam": lambda: cpu.product(states, head, logits),
                **{f"by {name}": by(name) for name, _ in cpu.kernels.instructions()[1:]},
                "torch, float32": lambda: torch.mm(wide_states, wide_head.t(), out=logits),
                "torch, converted to float32": lambda: torch.mm(states.float(), head.float().t(), out=logits),
            },
        )
    ]
    if cpu.has_tiles():
        found += [
            harness.Case(
                "gradient of hidden states",
                "torch, bfloat16",
                lambda: torch.mm(narrow, head),
                {"dam": lambda: cpu.product_hidden(gradient, head, of_states)},
            ),
            harness.Case(
                "gradient of the head, into memory that is there",
                "torch, bfloat16",
                lambda: torch.mm(narrow.t(), states, out=of_head),
                {"dam": lambda: cpu.product_weight(gradient, states, of_head)},
            ),
            harness.Case(
                "gradient of the head, into new memory",
                "torch, bfloat16",
                lambda: torch.mm(narrow.t(), states),
                {"dam": lambda: cpu.product_weight(gradient, states, torch.empty_like(head))},
            ),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024])
    for name, default in {"vocabulary": 32_768, "hidden": 1024, "threads": 1, "repeats": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = {}
    for rows in args.rows:
        for case in cases(rows, args.vocabulary, args.hidden):
            seconds = harness.measure(case, args.repeats).median_seconds
            figures[f"{rows} rows, {case.label}"] = seconds
            floor = seconds[case.floor_name]
            print(f"{rows} rows, {case.label}:", end=" ")
            print(", ".join(f"{name} {1e3 * each:.1f} ms ({each / floor:.2f})" for name, each in seconds.items()))
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {"cpu": report.cpu_model(), "bfloat16": cpu.instructions()}
        report.write_json(args.json, {**records.versions(), **machine, **sizes, "median_seconds": figures})


if __name__ == "__main__":
    main()
