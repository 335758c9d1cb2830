"""Every kernel, as shipped, compiles without a GPU for each kind of GPU, and fits it.

Compiled in processes of their own: this one may have Triton interpret kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import covering
from tests.calls import public_ops

pytest.importorskip("triton")

CHECKOUT = Path(__file__).parents[2]
# Shared memory that a program may have at most, of the chip.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# Bytes per thread that may be spilled: none but a few scalars of a prologue. Kernels with a matmul have an epilogue
# that meets the accumulators once, outside the loop.
SPILLS = 16
# The kernel of a defined divergence has a second way, in float64, for tiles that are rare.
SPILLS_OF_EPILOGUE = {"summary_kernel": 256, "gradient_kernel": 256, "defined_kernel": 256}


def reports(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gate", *arguments],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "few"), [("sm_90", ["few"]), *(covering.full(target, []) for target in SHARED)])
def test_every_kernel_compiles_and_fits(target, few):
    """Each with every type, constant and option that a user's calls give it; in all their combinations when `full`."""
    found = reports(target, *few)
    assert {report["kernel"] for report in found} == kernels()
    for report in found:
        assert report["spills"] <= SPILLS_OF_EPILOGUE.get(report["kernel"], SPILLS), report
        assert report["shared"] <= SHARED[target], report
    blocks = [report for report in found if "warps_of_blocks" in report]
    assert blocks and all(report["warps_of_blocks"] for report in blocks)
    for report in blocks if target.startswith("sm") else ():  # AMD's warps of 64 own two tiles at once
        # A warp owns whole tiles: sums over tiles that warps share go through shared memory, 40 times slower.
        assert all(pieces == width == 1 for pieces, _, width in report["warps_of_blocks"]), report


def test_every_op_has_launches():
    from dam.kernels import configs, launch
    from tests.kernels.calls import OPS

    missing = set(public_ops()) - OPS.keys()
    assert not missing, f"OPS of tests/kernels/calls.py has no launches of {', '.join(sorted(missing))}"
    for name, calls in OPS.items():
        found = []
        with configs.as_if_on("NVIDIA H100"), launch.recording(found.append):
            calls()
        assert found, f"the calls of {name} in tests/kernels/calls.py launch nothing"


def kernels():
    """Names of all functions in kernels/ that are launched."""
    names = set()
    for path in (CHECKOUT / "kernels").glob("*.py"):
        names |= {
            word for word in path.read_text(encoding="utf-8").replace("(", " ").split() if word.endswith("_kernel")
        }
    return names
