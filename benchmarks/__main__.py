"""The one entry of the benchmarks: python -m benchmarks [op ...] | gpu | builds | calls [--help].

With the names of operations, or none for all, it measures them on the CPU against their floors and their peers, as
`dam bench` does; gpu measures them on a GPU, builds two builds of the C++ kernels, or two releases of torch, beside
each other, and calls what a call of few numbers costs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import torch

# By the name that this folder was found by, benchmarks or dam.benchmarks: dam may not be installed yet.
checkout = importlib.import_module(f"{__package__}.checkout")

PROG = "python -m benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0] if arguments else ""), arguments[1:]
    if command in ("gpu", "builds", "tables") and not checkout.is_one():
        print(f"{PROG} {command}: this needs a checkout of dam's source repository", file=sys.stderr)
        return 1
    # What is asked for is imported where it is: the GPU's part may find that dam has to be installed first.
    if command == "gpu":
        if torch.cuda.is_available() and (reason := checkout.ensure_installed("benchmarks", arguments)) is not None:
            print(f"{PROG} gpu: nothing was measured: {reason}", file=sys.stderr)
            return 1
        from dam.benchmarks import gpu

        return gpu.main(rest)
    if command == "builds":
        from dam.benchmarks import builds

        return builds.main(rest)
    if command == "tables":
        from dam.benchmarks import tables

        return tables.main(rest, f"{PROG} tables")
    if command == "calls":
        from dam.benchmarks import calls

        return calls.main(rest)
    from dam.benchmarks import report

    return report.main(arguments, PROG)


if __name__ == "__main__":
    sys.exit(main())
