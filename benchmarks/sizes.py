"""What dam takes on the disk, and what comes with it: python -m benchmarks.sizes [--json FILE].

Of the environment that runs it: the extension modules, some packages, all that an installation with the extras of
README brings, and the whole environment. Blocks that files take, as `du` counts them, of what pip recorded; an install
that has another torch has another size.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dam
from dam.benchmarks import records, report

DISTRIBUTION = "discrete-adjoint-matching"
EXTRAS = ("train", "plot")  # README's
SHOWN = ("torch", "transformers", "triton")
BLOCK = 512  # bytes, of st_blocks whatever the file system
MiB = 2**20


def taken(paths: Iterable[Path]) -> int:
    """Bytes of the blocks of files, each counted once whatever leads to it."""
    found = {}
    for path in paths:
        if path.is_file():
            stat = path.stat()
            found[stat.st_dev, stat.st_ino] = stat.st_blocks * BLOCK
    return sum(found.values())


def files_of(name: str) -> list[Path]:
    """What pip recorded of a distribution."""
    return [Path(str(metadata.distribution(name).locate_file(file))) for file in metadata.files(name) or ()]


def needed(name: str, extras: Iterable[str]) -> list[str]:
    """The distributions that one with some extras rests on, those of these included; of what is installed."""
    found: set[str] = set()
    left = [(name, extra) for extra in ("", *extras)]
    seen = set(left)
    while left:
        of, extra = left.pop()
        for line in metadata.requires(of) or ():
            one = Requirement(line)
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            found.add(canonicalize_name(one.name))
            further = {(canonicalize_name(one.name), wanted) for wanted in ("", *one.extras)} - seen
            seen |= further
            left += further
    return sorted(found - {name})


def measured() -> dict[str, Any]:
    """Sizes in bytes, and the release of each package that they are of."""
    package = Path(dam.__file__).parent
    built = {path.name.split(".")[0]: path for path in package.glob("_*.so")}
    # Sources and the kernels of this CPU: CUDA's are built where nvcc is, the emulator's for tests alone.
    own = [path for path in package.rglob("*") if path.suffix not in (".so", ".pyc")] + [built["_cpu"]]
    names = needed(DISTRIBUTION, EXTRAS)
    with_extras = [path for name in names for path in files_of(name)] + own
    sizes = {
        **{f"dam.{name}": taken([path]) for name, path in sorted(built.items())},
        **{name: taken(files_of(name)) for name in SHOWN},
        f"with the extras {', '.join(EXTRAS)}": taken(with_extras),
        "environment": taken(Path(sys.prefix).rglob("*")),
    }
    return {
        **records.versions(),
        "cpu": report.cpu_model(),
        "machine": platform.machine(),
        "extras": EXTRAS,
        "packages": {name: metadata.version(name) for name in names},
        "bytes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured()
    for name, size in found["bytes"].items():
        print(f"{name}: {size / MiB:,.0f} MiB")
    if args.json:
        report.write_json(args.json, found)


if __name__ == "__main__":
    main()
