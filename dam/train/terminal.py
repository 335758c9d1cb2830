"""What a run says on the terminal, or into a file or a pipe in its place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_LINE = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def show(text: str) -> None:
    """Prints text, with a replacement for what the terminal's encoding lacks: no reason to end a run."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


class _Lines:
    """A stream on which each state of a bar is a line of its own, rather than one that goes back to its beginning."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(total: int, *, disable: bool = False, **options: Any) -> Any:
    """A tqdm bar on standard error; where that is no terminal a plain line every ten seconds, and one at the end.

    Args:
        total: steps.
        disable: shows nothing.
        options: of tqdm; `desc`, `initial`, ...
    """
    if disable or sys.stderr.isatty():
        return tqdm(total=total, disable=disable, dynamic_ncols=True, **options)
    # As often as it is time, rather than after a number of steps that tqdm guesses.
    pace = {"mininterval": _SECONDS_BETWEEN_LINES, "miniters": 1}
    return tqdm(total=total, file=_Lines(sys.stderr), bar_format=_LINE, **{**options, **pace})


@contextlib.contextmanager
def no_bars_in_pipes() -> Iterator[None]:
    """Context manager: transformers' bars, of every file that is loaded or saved, are on a terminal only."""
    from transformers.utils import logging

    quiet = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()
