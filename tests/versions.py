"""Runs tests on other releases of torch than the one that constraints.txt pins.

    make test-versions          or   python -m tests.versions

A wheel of dam is built once, without torch, and installed beside each release in an environment of its own, which takes
6 GB as .venv-torch-* and is removed afterwards. The tests run from a copy, so that they import the wheel: those of the
operations on the reference and on the C++ backend, of the chains, the models and the trainer. Without the CUDA kernels,
which know nothing of torch, and without Triton, which every torch brings in a release of its own.

Environment variables:
    TORCH_VERSIONS  releases, like "2.6.0 2.14.1"; by default the oldest that pyproject.toml admits and the newest that
                    pip finds
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]
TESTS = ("tests/ops", "tests/ctmc", "tests/models", "tests/train")
# test_rooms.py is about the checkout.
SELECTION = ("-m", "not slow", "-k", "not triton and not cuda", "--ignore", "tests/ops/test_rooms.py")

# Run where the tests are, in a folder without dam: the wheel is what is imported, and its C++ kernels run: their tests
# would be skipped otherwise.
FOUND = """
import importlib.metadata, json, dam
with dam.backend("cpu"):
    names = ("torch", "numpy", "transformers")
    print(json.dumps([dam.__file__, *(importlib.metadata.version(name) for name in names)]))
"""


class Result(NamedTuple):
    """What a release of torch was tried with and how: counts of tests, or why there are none."""

    torch: str
    numpy: str = ""
    transformers: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self):
        return self.passed > 0 and self.failed == 0 and not self.trouble


def oldest(pyproject):
    """The lowest torch that the text of pyproject.toml admits."""
    (found,) = re.findall(r'"torch>=([\d.]+)"', pyproject)
    return found


def newest():
    """The highest torch that pip would install."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", "torch"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], stdout=subprocess.PIPE, text=True, check=True)
    (package,) = json.loads(done.stdout)["install"]
    return package["metadata"]["version"]


def other_constraints(constraints):
    """The lines of constraints.txt but those of torch and of Triton, which torch pins itself."""
    return "".join(line for line in constraints.splitlines(True) if not re.match(r"(torch|triton)==", line))


def copy_sources(folder):
    """Path of a copy in `folder` of what is packed: a build leaves its files there and none in the checkout."""
    source = folder / "source"
    source.mkdir()
    for name in ("csrc", "dam", "kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    return source


def build_wheel(folder):
    """Path of a wheel of this checkout, built in `folder`, for every release of torch."""
    source = copy_sources(folder)
    environment = {**os.environ, "DAM_BUILD_CUDA": "0", "DAM_EMULATE_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {f"dam/kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")} - names
    if missing or any(name.startswith("kernels/") for name in names):
        raise SystemExit(f"the wheel lacks {sorted(missing)}, or installs a package `kernels`")
    return wheel


def try_release(version, wheel, folder):
    """Result of the tests on a release of torch; its environment is removed."""
    environment = CHECKOUT / f".venv-torch-{version}"
    python = str(environment / "bin" / "python")
    constraints, report = folder / "constraints.txt", folder / f"{version}.xml"
    constraints.write_text(other_constraints((CHECKOUT / "constraints.txt").read_text(encoding="utf-8")))
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and key[:4] != "DAM_"}
    variables |= {"OMP_NUM_THREADS": "1", "DAM_EMULATE_CUDA": "0", "TRITON_INTERPRET": "0"}
    install = ("--quiet", "--no-cache-dir", "--constraint", str(constraints), f"torch=={version}", f"{wheel}[test]")
    tests = ("-q", "-n", "auto", "-p", "no:cacheprovider", f"--junitxml={report}", *SELECTION, *TESTS)
    start = time.monotonic()
    shutil.rmtree(environment, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        if subprocess.run([python, "-m", "pip", "install", *install]).returncode != 0:
            return Result(version, trouble="not installed")
        done = subprocess.run(
            [python, "-c", FOUND], env=variables, cwd=folder, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            return Result(version, trouble="dam does not import, or its C++ backend does not run")
        path, torch, numpy, transformers = json.loads(done.stdout)
        if environment not in Path(path).parents:
            return Result(version, trouble=f"{path} was imported instead of the wheel")
        done = subprocess.run([python, "-m", "pytest", *tests], env=variables, cwd=folder)
        failed, passed, skipped = counts(report.read_text(encoding="utf-8")) if report.exists() else (0, 0, 0)
        trouble = "" if done.returncode == 0 or failed else f"pytest ended with {done.returncode}"
        return Result(torch, numpy, transformers, passed, failed, skipped, time.monotonic() - start, trouble)
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def counts(report):
    """Tests that failed, passed and were skipped, by pytest's XML."""
    suite = ElementTree.fromstring(report).find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    return failures + errors, tests - failures - errors - skipped, skipped


def table(results):
    """Text of a table, a line per release."""
    rows = [("torch", "numpy", "transformers", "passed", "failed", "skipped", "seconds", "")]
    rows += [
        (*map(str, result[:6]), f"{result.seconds:.0f}", result.trouble or ("" if result.good else "failed"))
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main():
    asked = os.environ.get("TORCH_VERSIONS", "").split()
    versions = asked or [oldest((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")), newest()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = build_wheel(folder)
        shutil.copytree(CHECKOUT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CHECKOUT / "pyproject.toml", folder)
        results = [try_release(version, wheel, folder) for version in versions]
    print(f"\nPython {sys.version.split()[0]}\n{table(results)}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
