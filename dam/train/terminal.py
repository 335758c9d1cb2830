"""What a run says on the terminal."""

from __future__ import annotations

import sys


def show(text: str) -> None:
    """Prints text, with a replacement for what the terminal's encoding lacks: no reason to end a run."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))
