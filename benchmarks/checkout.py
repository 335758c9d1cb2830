"""This checkout: its commit, and its installation. Needs nothing of dam, which may not be installed yet."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STARTED = "DAM_BENCHMARKS_STARTED"  # environment variable: seconds of the monotonic clock


def is_one() -> bool:
    """Whether this is a checkout, and no installation without the tests and the figures that are committed."""
    return (ROOT / "setup.py").is_file() and (ROOT / "benchmarks" / "results").is_dir()


def started() -> float:
    """When the command began, by the monotonic clock, whether or not it was started anew since."""
    return float(os.environ.get(_STARTED) or time.monotonic())


def commit() -> str | None:
    """Its commit, marked if files differ from it; None where git does not say, or this is no checkout.

    An installation, or an unpacked source distribution, may lie within another project's repository.
    """
    if not is_one():
        return None

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def digest() -> str:
    """Of the code that is measured and that measures; a copy may be without git, and a commit says no changes."""
    found = hashlib.sha256()
    for folder in ("dam", "kernels", "csrc", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cpp", ".h", ".def"):
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def why_not_installed() -> str | None:
    """Why `import dam` and its kernels would not be those of this checkout, or None."""
    code = "import dam, dam.kernels, dam._cpu; print(dam.__file__, dam.kernels.__file__, dam._cpu.__file__, sep='\\n')"
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["the import failed"])[-1]
    outside = [path for path in done.stdout.splitlines() if ROOT not in Path(path).resolve().parents]
    return f"{outside[0]} is not of this checkout" if outside else None


def install() -> None:
    """Builds the extensions and installs this checkout in place, without network.

    Raises:
        RuntimeError: it failed; the message holds pip's last lines.
    """
    options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--editable", str(ROOT))
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-20:]))


def install_wheels(folder: Path) -> list[str]:
    """Installs every wheel of a folder, without network and without what they need; why some could not be."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return [f"no wheels in {folder}"]
    failed = []
    for wheel in wheels:  # one by one: a wheel that does not fit this Python must not keep the others out
        options = ("--no-index", "--no-deps", "--disable-pip-version-check", str(wheel))
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
        if done.returncode != 0:
            failed.append(f"{wheel.name}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    importlib.invalidate_caches()
    return failed


def ensure_installed(module: str, arguments: Sequence[str]) -> str | None:
    """Installs this checkout where it is not, and then starts `python -m module` anew in the place of this process.

    Returns:
        Why it is not installed all the same; None where nothing was to be done.
    """
    began = started()
    reason = why_not_installed()
    if reason is None:
        return None
    print(f"Installing this checkout: {reason}", flush=True)
    try:
        install()
    except RuntimeError as error:
        return f"this checkout could not be installed:\n{error}"
    if (reason := why_not_installed()) is not None:
        return f"the installed package does not import: {reason}"
    # Anew, since this process has looked for the package before it was there.
    os.environ[_STARTED] = str(began)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
