"""What of a long run is done, in a file: a second call goes on with what the first had no time for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dam.benchmarks import report


class Agenda:
    """Steps by name, and what each found. Of another key, another code or machine, nothing counts as done."""

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path, self._key, self._found = path, key, {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] == key:
                self._found = content["found"]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __len__(self) -> int:
        return len(self._found)

    def add(self, name: str, found: Any) -> None:
        """Writes at once, for a run that is killed."""
        self._found[name] = found
        written = self.path.with_suffix(".new")  # whole before it takes the file's place
        report.write_json(written, {"key": self._key, "found": self._found})
        written.replace(self.path)
