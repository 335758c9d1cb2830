"""The kernels of csrc/cpu on Arm: compiled for it by a cross-compiler, run by an emulator, against this machine's."""

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CHECKOUT = Path(__file__).parents[2]
ROWS = 7  # of every array of rows that kernels_run.cpp shows
COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
# float32 has 24 bits, and a product that is fused with a sum is rounded once less: that is the difference.
EPSILON = 2.0**-23

pytestmark = pytest.mark.skipif(
    platform.machine().lower() in ("aarch64", "arm64"), reason="on Arm every other test of the C++ backend runs them"
)


def build(compiler, level, folder):
    """kernels_run with every kernel of the set `plain`, which on Arm is NEON."""
    spec = importlib.util.spec_from_file_location("dam_setup", CHECKOUT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    folder.mkdir()
    kernels = folder / "kernels.cpp"  # in one, so that the compiler reads the headers once
    kernels.write_text("".join(f'#include "{CHECKOUT / kernel}"\n' for kernel in setup.KERNELS))
    objects = []
    for source, optimised in ((kernels, level), (Path(__file__).with_name("kernels_run.cpp"), "-O0")):
        objects.append(str(folder / f"{source.stem}.o"))
        # The last of several levels of optimisation counts.
        command = [compiler, *setup.CPU_FLAGS, "-Werror", "-DDAM_ISA=plain", optimised, "-c", str(source), "-o"]
        subprocess.run([*command, objects[-1]], check=True)
    program = folder / "kernels_run"
    subprocess.run([compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def arrays_of(command):
    """What kernels_run shows, by name; bfloat16 as float32, and the dtypes' names."""
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    arrays, kinds, at = {}, {}, 0
    while at < len(done.stdout):
        end = done.stdout.index(b"\n", at)
        name, kind, count = done.stdout[at:end].decode().split()
        dtype = np.dtype(np.uint16 if kind == "bfloat16" else kind)
        x = np.frombuffer(done.stdout, dtype, int(count), end + 1)
        at = end + 1 + x.nbytes
        assert name not in arrays
        arrays[name] = (x.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else x
        kinds[name] = kind
    return arrays, kinds


def tolerance(name, kind, expected):
    """How far the two may lie apart: a relative and an absolute error, numbers or arrays."""
    op, last = name.split("/")[0], name.split("/")[-1]
    if kind in ("int64", "uint32") or last == "logits" or "/product/" in name:
        # Draws and indices. And products of 16-bit numbers are exact, so that fusing them with a sum changes nothing.
        return 0.0, 0.0
    if "widened" in name or "narrowed" in name:
        return 0.0, 0.0
    if op == "exponential":
        return 2e-14, 0.0  # what csrc/core/math.h says, twice
    if op in ("filter_lines", "tilt_to_ess"):
        return 1e-12, 1e-15  # doubles, of terms that add up to about 1
    if "/adjoint_weights" in name or "/closed_form" in name:
        return EPSILON, 0.0  # of doubles, rounded once
    # Of exp(-d), csrc/core/math.h: 2^-22 (1 + d) where products are not fused, 2^-22.4 where they are.
    if op == "exp":
        with np.errstate(divide="ignore"):
            distance = np.where(expected > 0, -np.log(expected, where=expected > 0, out=np.zeros_like(expected)), 0)
        return 2 * EPSILON * (2 + distance), 0.0
    # What is left of terms of the row's size, which may cancel.
    row = np.abs(np.nan_to_num(expected.reshape(ROWS, -1), nan=0.0, posinf=0.0, neginf=0.0)).max(1, keepdims=True)
    size = np.broadcast_to(row, (ROWS, expected.size // ROWS)).reshape(-1)
    if last == "gradient":
        spacing = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(kind, 0.0)
        smallest = 2.0**-24 if kind == "float16" else 0.0
        # exp down to e^-87; where rounding to 16 bits falls the other way, a unit of the last place.
        return 2 * EPSILON * 90 + spacing, 4 * EPSILON * size + smallest
    if last == "escape_gap":
        return 50 * EPSILON, 0.0  # a difference of two rates, which may be this much larger
    return 8 * EPSILON, 8 * EPSILON  # sums of positive terms, their logarithms and those times a weight


def differences(expected, kinds, actual):
    """Lines on the arrays that differ by more than their tolerance."""
    found = []
    for name, x in expected.items():
        y, kind = actual[name], kinds[name]
        if kind in ("int64", "uint32"):
            if not np.array_equal(x, y):
                found.append(f"{name}: {np.count_nonzero(x != y)} of {x.size} integers differ")
            continue
        with np.errstate(invalid="ignore"):  # signalling NaNs, and inf - inf
            x, y = x.astype(np.float64), y.astype(np.float64)
            rtol, atol = tolerance(name, kind, x)
            same = (x == y) | (np.isnan(x) & np.isnan(y)) | (np.abs(x - y) <= rtol * np.abs(x) + atol)
        if not same.all():
            i = int(np.argmin(same))
            found.append(f"{name}: {np.count_nonzero(~same)} of {x.size} differ, first [{i}] {x[i]!r}, {y[i]!r}")
    return found


@pytest.mark.slow
def test_kernels_on_arm_are_those_of_this_machine(tmp_path):
    """Draws and indices are the same, other numbers as close as rounding leaves them. With no emulator it compiles."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}; in Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    program = build(COMPILER, "-O3", tmp_path / "arm")
    emulator = next((found for name in EMULATORS if (found := shutil.which(name))), None)
    if emulator is None:
        pytest.skip("compiled for Arm, not run: no emulator; in Debian: apt-get install qemu-user-static")
    actual, _ = arrays_of([emulator, str(program)])
    # Without optimisation: half the time to compile, and nothing but what the source says.
    expected, kinds = arrays_of([str(build("g++", "-O0", tmp_path / "here"))])
    assert list(actual) == list(expected)
    found = differences(expected, kinds, actual)
    assert not found, "\n".join(found)
