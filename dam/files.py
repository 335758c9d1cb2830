"""Files that a run leaves, and who may read them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_PRIVATE = stat.S_IRUSR | stat.S_IWUSR


@contextlib.contextmanager
def usual_modes(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: weights that are written to a folder inside may be read by whom the umask says.

    safetensors from 0.8 on writes a temporary file, which is private whatever the umask is, and renames it (its issue
    782). So nobody else, a serving engine of another user for one, could read a model beside a config.json that it can.

    Args:
        folder: may be made inside. Files in it that were there before and are not written anew stay as they are.
    """
    before = _weights(folder)
    yield
    new = [path for path, number in _weights(folder).items() if before.get(path) != number]
    private = [path for path in new if stat.S_IMODE(path.stat().st_mode) == _PRIVATE]
    if private:
        mode = _usual_mode(folder)
        for path in private:
            path.chmod(mode)


def _weights(folder: str | os.PathLike[str]) -> dict[Path, int]:
    """Inodes of the files of weights in a folder: one that is written by renaming has another."""
    return {path: path.stat().st_ino for path in Path(folder).glob("*.safetensors")}


def _usual_mode(folder: str | os.PathLike[str]) -> int:
    """Of a file made there in the ordinary way: the umask can only be read by setting it, which all threads see."""
    probe = Path(folder) / f".mode-{os.getpid()}"
    with open(probe, "x", encoding="utf-8") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode
