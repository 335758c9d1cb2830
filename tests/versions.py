"""Runs tests on other releases of torch, transformers and peft than those that constraints.txt pins.

    make test-versions          or   python -m tests.versions [--wheel FILE]
    python -m tests.versions --table        the table of what was run, of docs/versions.json

A wheel of dam is built once, without torch, or is the one that `make release` left in dist/; it is installed beside
each release in an environment of its own, which takes 6 GB as .venv-torch-* or the like and is removed afterwards. The
tests run from a copy, so that they import the wheel: those of what is another thing in another release (`TESTS`), with
another torch, on the reference and the C++ backend; with another transformers, and the accelerate and peft of its
time; or with another peft. What came out is written to docs/versions.json, where a release has its newest run. Without
the CUDA kernels, which know nothing of torch, and without Triton, which every torch brings in a release of its own.

Environment variables:
    TORCH_VERSIONS         releases, like "2.6.0 2.14.1"; by default the oldest that pyproject.toml admits and the
                           newest that pip finds
    TRANSFORMERS_VERSIONS  releases, like "4.49.0 4.57.6"; by default the oldest that pyproject.toml admits and those
                           that docs/models.md tells to install
    PEFT_VERSIONS          releases; by default the oldest that pyproject.toml admits
Where one of them is given, only what is given is tried.
"""

import argparse
import datetime
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
RECORDS = CHECKOUT / "docs" / "versions.json"
# Of what is another thing in another release. What dam computes by itself is the same under all of them: kernels,
# chains, estimators, replay.
TESTS = {
    # Operators, dispatch, autograd, autocast, tensors that are read in C++, products in other dtypes, DTensor, and
    # every operation once; hooks; optimisers, checkpoints.
    "torch": (
        *(f"tests/ops/test_{name}.py" for name in ("op", "at_once", "backend", "surroundings", "accuracy", "group")),
        *(f"tests/models/test_{name}.py" for name in ("denoiser", "tail", "sharding")),
        *(f"tests/train/test_{name}.py" for name in ("trainer", "resume", "fsdp")),
    ),
    # Classes of models, their output layers, masks and caches; the Trainer's methods, arguments, files and logs.
    "transformers": (
        *(f"tests/models/test_{name}.py" for name in ("denoiser", "masked_lm_classes", "families", "tail", "prefix")),
        *(f"tests/train/test_{name}.py" for name in ("releases", "config", "trainer", "resume", "card")),
    ),
    "peft": ("tests/models/test_output_layer.py", "tests/train/test_adapters.py", "tests/train/test_base.py"),
}
# accelerate and peft of a release's time; another release takes those of the one before it. The oldest is what
# pyproject.toml admits of all three.
OF_ITS_TIME = {
    "4.49.0": ("1.4.0", "0.15.0"),
    "4.53.3": ("1.8.1", "0.16.0"),
    "4.57.6": ("1.11.0", "0.18.0"),
    "5.0.0": ("1.12.0", "0.18.1"),
}
TORCH_PINS = ("triton", "sympy")  # what some torch asks for by ==; 2.6.0 for both
RECOMMENDED = ("4.53.3", "4.57.6")  # in docs/models.md, for the published code of models
# What is marked slow or full would take hours.
SELECTION = ("-m", "not slow and not full", "-k", "not triton and not cuda")

# Run where the tests are, in a folder without dam: the wheel is what is imported, and its C++ kernels run: their tests
# would be skipped otherwise.
FOUND = """
import importlib.metadata, json, dam
with dam.backend("cpu"):
    names = ("torch", "numpy", "transformers", "accelerate", "peft")
    print(json.dumps([dam.__file__, *(importlib.metadata.version(name) for name in names)]))
"""


class Result(NamedTuple):
    """What a release was tried with and how: counts of tests, or why there are none."""

    torch: str = ""
    numpy: str = ""
    transformers: str = ""
    accelerate: str = ""
    peft: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self):
        return self.passed > 0 and self.failed == 0 and not self.trouble


def oldest(pyproject, package="torch"):
    """The lowest release of a package that the text of pyproject.toml admits."""
    (found,) = set(re.findall(rf'"{package}>=([\d.]+)"', pyproject))
    return found


def pins_of(package, version):
    """Releases that are tried together: a torch or a peft alone, a transformers with those of its time."""
    if package != "transformers":
        return {package: version}
    before = [release for release in OF_ITS_TIME if numbers(release) <= numbers(version)]
    accelerate, peft = OF_ITS_TIME[max(before, key=numbers, default=min(OF_ITS_TIME, key=numbers))]
    return {"transformers": version, "accelerate": accelerate, "peft": peft}


def asked_for(pyproject):
    """(package, release) to try, by the environment variables."""
    asked = {package: os.environ.get(f"{package.upper()}_VERSIONS", "").split() for package in TESTS}
    if not any(asked.values()):
        asked = {
            "torch": [oldest(pyproject), newest()],
            "transformers": [min(OF_ITS_TIME), *RECOMMENDED],
            "peft": [oldest(pyproject, "peft")],
        }
    return [(package, version) for package, versions in asked.items() for version in versions]


def newest():
    """The highest torch that pip would install."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", "torch"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], stdout=subprocess.PIPE, text=True, check=True)
    (package,) = json.loads(done.stdout)["install"]
    return package["metadata"]["version"]


def other_constraints(constraints, pins):
    """constraints.txt with other releases of some packages, and without what another torch pins itself."""
    replaced = {*pins, *(TORCH_PINS if "torch" in pins else ())}
    kept = [line for line in constraints.splitlines() if line.partition("==")[0] not in replaced]
    return "".join(f"{line}\n" for line in (*kept, *(f"{name}=={release}" for name, release in pins.items())))


def copy_sources(folder):
    """Path of a copy in `folder` of what is packed: a build leaves its files there and none in the checkout."""
    source = folder / "source"
    source.mkdir()
    manifest = (CHECKOUT / "MANIFEST.in").read_text(encoding="utf-8")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("dam", *re.findall(r"^graft (\S+)$", manifest, flags=re.MULTILINE)):
        shutil.copytree(CHECKOUT / name, source / name, symlinks=True, ignore=ignore)
    (included,) = re.findall(r"^include (.+)$", manifest, flags=re.MULTILINE)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", *included.split()):
        shutil.copy(CHECKOUT / name, source / name)
    return source


def build_wheel(folder):
    """Path of a wheel of this checkout, built in `folder`, for every release of torch."""
    source = copy_sources(folder)
    environment = {**os.environ, "DAM_BUILD_CUDA": "0", "DAM_EMULATE_CUDA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel):
    """That a wheel has the kernels of this checkout, where they belong.

    Raises:
        SystemExit: it has not.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {f"dam/kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")} - names
    if missing or any(name.startswith("kernels/") for name in names):
        raise SystemExit(f"the wheel lacks {sorted(missing)}, or installs a package `kernels`")


def try_release(package, version, wheel, folder):
    """Result of the tests on a release of torch or transformers; its environment is removed."""
    environment, pins = CHECKOUT / f".venv-{package}-{version}", pins_of(package, version)
    nothing = Result(**pins)
    python = str(environment / "bin" / "python")
    constraints, report = folder / "constraints.txt", folder / f"{version}.xml"
    constraints.write_text(other_constraints((CHECKOUT / "constraints.txt").read_text(encoding="utf-8"), pins))
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and key[:4] != "DAM_"}
    variables |= {"OMP_NUM_THREADS": "1", "DAM_EMULATE_CUDA": "0", "TRITON_INTERPRET": "0"}
    # What these tests import; of the rest no bytecode is made.
    needed = (f"{wheel}[train,peft]", "pytest", "pytest-xdist")
    install = ("--quiet", "--no-cache-dir", "--no-compile", "--constraint", str(constraints), *needed)
    tests = ("-q", "-n", "auto", "-p", "no:cacheprovider", f"--junitxml={report}", *SELECTION, *TESTS[package])
    start = time.monotonic()
    shutil.rmtree(environment, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        if subprocess.run([python, "-m", "pip", "install", *install]).returncode != 0:
            return nothing._replace(trouble="not installed")
        done = subprocess.run(
            [python, "-c", FOUND], env=variables, cwd=folder, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            return nothing._replace(trouble="dam does not import, or its C++ backend does not run")
        path, *found = json.loads(done.stdout)
        if environment not in Path(path).parents:
            return nothing._replace(trouble=f"{path} was imported instead of the wheel")
        done = subprocess.run([python, "-m", "pytest", *tests], env=variables, cwd=folder)
        failed, passed, skipped = counts(report.read_text(encoding="utf-8")) if report.exists() else (0, 0, 0)
        trouble = "" if done.returncode == 0 or failed else f"pytest ended with {done.returncode}"
        return Result(*found, passed, failed, skipped, time.monotonic() - start, trouble)
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def counts(report):
    """Tests that failed, passed and were skipped, by pytest's XML."""
    suite = ElementTree.fromstring(report).find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    return failures + errors, tests - failures - errors - skipped, skipped


def table(results):
    """Text of a table, a line per release."""
    rows = [(*Result._fields[:-1], "")]
    rows += [
        (*map(str, result[:8]), f"{result.seconds:.0f}", result.trouble or ("" if result.good else "failed"))
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def record(path, package, result, today):
    """Writes a result to the file of records, in the place of an earlier one of that release on this Python.

    Args:
        package: of which another release was tried.
        today: a date, as ISO 8601 has it.
    """
    python = ".".join(map(str, sys.version_info[:2]))
    entry = {"package": package, "python": python, "date": today, "tests": list(TESTS[package]), **result._asdict()}
    entry |= {"seconds": round(result.seconds), "good": result.good}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    same = ("package", package, "python")  # the release, by the name of its package
    kept = [each for each in kept if any(each[key] != entry[key] for key in same)]
    records = sorted(
        [*kept, entry], key=lambda each: (list(TESTS).index(each["package"]), numbers(each[each["package"]]))
    )
    path.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def numbers(version):
    """What sorts releases: 2.14.1 behind 2.6.0."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def markdown(records):
    """A table of records for the documentation: what was tried with what, when, and how many tests passed."""
    names = ("torch", "transformers", "accelerate", "peft")
    lines = [f"| {' | '.join(names)} | Python | tried | tests |", "| --- " * (len(names) + 3) + "|"]
    for each in records:
        shown = [f"**{each[name]}**" if name == each["package"] else each[name] for name in names]
        outcome = f"{each['passed']} passed, {each['failed']} failed" if not each["trouble"] else each["trouble"]
        lines.append(f"| {' | '.join(shown)} | {each['python']} | {each['date']} | {outcome} |")
    return "\n".join(lines)


def main(arguments=()):
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="Tests on other releases.")
    parser.add_argument("--table", action="store_true", help="only prints the table of what was run")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of dam, for this Python (default: one is built)")
    given = parser.parse_args(arguments)
    if given.table:
        print(markdown(json.loads(RECORDS.read_text(encoding="utf-8"))))
        return 0
    releases = asked_for((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel = given.wheel.resolve() if given.wheel else build_wheel(folder)
        check_wheel(wheel)
        shutil.copytree(CHECKOUT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CHECKOUT / "pyproject.toml", folder)
        results = []
        for package, version in releases:  # each is kept, whatever becomes of the next
            results.append(try_release(package, version, wheel, folder))
            record(RECORDS, package, results[-1], datetime.date.today().isoformat())
    print(f"\nPython {sys.version.split()[0]}\n{table(results)}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
