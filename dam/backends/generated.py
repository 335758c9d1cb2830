"""Kernels that are generated while a program runs: the folder they are kept in, their compilation, their loading.

Code is loaded from that folder, so it and what lies in it must belong to this user, and nobody else may write there.
A file's name has the hash of all that it is made of, so what has changed has another name. A file that is there is used
if it is whole and as it was written, else written again. Files are written under a name of their own and moved to their
place, so that processes may make one at a time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import types
import warnings
from pathlib import Path
from typing import NamedTuple

from dam.backends import choice, cpu
from dam.kernels import environment

HEADERS = Path(__file__).parents[1] / "csrc"  # a link in a checkout
_COMPILERS = ("c++", "g++", "clang++")


def folder() -> Path:
    """The cache: DAM_CACHE_DIR, else dam in XDG_CACHE_HOME, else ~/.cache/dam; made where it is not there.

    Raises:
        OSError: it cannot be made, is another user's, or others may write there.
    """
    asked = environment.value("DAM_CACHE_DIR")
    path = Path(asked or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dam")
    try:
        path = path.expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: {error}; name a folder for generated kernels in DAM_CACHE_DIR") from error
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _trusted(path)
    return path


def _trusted(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(
            f"{path}: code is loaded from there, so it must be yours and writable by you alone (chmod 700); or name "
            "another folder in DAM_CACHE_DIR"
        )


class NoCompiler(RuntimeError):
    """A kernel cannot be compiled here; the message says why."""


class Compiler(NamedTuple):
    """A command, and what tells it from another of that name."""

    command: tuple[str, ...]
    identity: str


def compiler() -> Compiler:
    """The compiler that built dam._cpu, or another of C++ that is here: CXX, c++, g++ or clang++.

    Raises:
        NoCompiler: there is none.
    """
    # The builder's command comes with flags of its own, which are not those of dam's sources.
    candidates = [tuple(itertools.takewhile(lambda word: not word.startswith("-"), _build()["compiler"]))]
    candidates += [tuple(os.environ["CXX"].split())] if os.environ.get("CXX", "").split() else []
    for command in [*candidates, *((name,) for name in _COMPILERS)]:
        found = shutil.which(command[0]) if command else None
        if found is not None:
            path = Path(found).resolve()
            about = path.stat()
            return Compiler((found, *command[1:]), f"{path} {about.st_size} {about.st_mtime_ns}")
    raise NoCompiler(f"there is no C++ compiler here ({', '.join(' '.join(c) for c in candidates)}, c++, g++, clang++)")


@functools.cache
def _build() -> dict:
    """How dam._cpu was built: compiler, flags, and those of each instruction set."""
    if not hasattr(cpu.kernels, "BUILD"):
        raise NoCompiler("dam._cpu is of an older dam and does not say how it was built: install this one again")
    return json.loads(cpu.kernels.BUILD)


@functools.cache
def _headers() -> bytes:
    """All that a generated file may include."""
    paths = sorted(p for part in ("core", "cpu") for p in (HEADERS / part).iterdir() if p.suffix in (".h", ".def"))
    return b"".join(path.name.encode() + b"\n" + path.read_bytes() for path in paths)


def _stem(name: str, *parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)} ".encode() + data)
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', name)[:40]}_{digest.hexdigest()[:24]}"


def written(path: Path, data: bytes) -> Path:
    """A file with that content, which appears whole; one that is there with another is written again."""
    if not path.exists() or path.read_bytes() != data:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=path.suffix)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)  # before it has its name, or a crash leaves that with nothing beneath
            os.chmod(name, 0o700 if path.suffix == ".so" else 0o600)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    _trusted(path)
    return path


def library(name: str, text: str) -> ctypes.CDLL:
    """The library of a C++ source, for the instruction set in use; compiled once.

    Calls of its functions release the interpreter's lock.

    Raises:
        NoCompiler: there is no compiler, or it does not take the source; the message has what it says.
        PermissionError: the cache is not this user's alone.
    """
    build, isa, by = _build(), cpu.isa(), compiler()
    flags = [*build["flags"], *build["isa_flags"][isa], f"-DDAM_ISA={isa}", "-fPIC", "-shared"]
    stem = _stem(name, text, _headers(), by.identity, " ".join(flags))
    target = folder() / f"{stem}.so"
    if target in _REFUSED:
        raise NoCompiler(_REFUSED[target])
    if not _is_whole(target):
        source = written(target.with_suffix(".cpp"), text.encode())
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{stem}.") as scratch:
            made = Path(scratch) / target.name
            command = [*by.command, *flags, f"-I{HEADERS}", str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode != 0:
                _REFUSED[target] = f"{' '.join(command)}: {done.stderr.strip()[-2000:]}"
                raise NoCompiler(_REFUSED[target])
            content = made.read_bytes()
        written(target, content + hashlib.sha256(content).digest())
    _trusted(target)
    return ctypes.CDLL(str(target))


_REFUSED: dict[Path, str] = {}  # what did not compile in this process, and why: it would not at the next call


def _is_whole(path: Path) -> bool:
    """Whether a library ends with the hash of what is before it; the loader does not look there, and one that is cut
    would end the process."""
    if not path.exists():
        return False
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def module(name: str, text: str) -> types.ModuleType:
    """The Python module of a source, in a file of its own: Triton reads its kernels' text there.

    Raises:
        PermissionError: the cache is not this user's alone.
    """
    path = written(folder() / f"{_stem(name, text)}.py", text.encode())
    found = types.ModuleType(f"dam_generated.{path.stem}")
    found.__file__ = str(path)
    exec(compile(text, str(path), "exec"), vars(found))  # not what a compiled copy beside it would say
    return found


def without(op: str, backend: str, reason: str) -> None:
    """That the reference runs in a backend's place: says so once, or is an error where the backend is asked for.

    Raises:
        RuntimeError: it is.
    """
    if choice.is_asked_for(backend):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    warn_once(f"dam: {reason}; the slower reference backend 'torch' runs instead of {backend!r}.")


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
