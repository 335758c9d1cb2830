"""Files that a run leaves: its folder, and who may read them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def next_output(name: str, root: Path = Path("runs")) -> Path:
    """A folder for a new run that does not exist yet: runs/<name>-1, runs/<name>-2, ..."""
    return root / f"{name}-{_last_number(name, root) + 1}"


def last_output(name: str, root: Path = Path("runs")) -> Path:
    """The newest folder that `next_output` gave."""
    if _last_number(name, root) == 0:
        raise ValueError(f"nothing to resume: there is no run in {root}/; name one with --output")
    return root / f"{name}-{_last_number(name, root)}"


def _last_number(name: str, root: Path) -> int:
    names = [path.name.removeprefix(f"{name}-") for path in root.glob(f"{name}-*")]
    return max([int(number) for number in names if number.isdigit()], default=0)


def unused(output: Path) -> Path:
    """A folder that holds nothing yet.

    Raises:
        ValueError: it does.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: continue the run in it with --resume, or name another --output")
    return output


def refuse_changes(earlier: dict[str, Any], asked: dict[str, Any], what: str) -> None:
    """Options, of which those asked for now must be those of before.

    Raises:
        ValueError: lists what differs, of `what` was started earlier.
    """
    changed = [name for name in {**earlier, **asked} if asked.get(name) != earlier.get(name)]
    if changed:
        listed = ", ".join(f"{name} {earlier.get(name)!r} (now {asked.get(name)!r})" for name in changed)
        raise ValueError(f"{what} was started with other options: {listed}")
