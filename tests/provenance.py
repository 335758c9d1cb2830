"""What a JSON of results says of itself: where it was measured, under which releases, and from how much."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dam.benchmarks import report
from tests import pages

RELEASES = ("dam", "torch", "python")
# What another would have to spend: calls, rounds, samples, repeats of what is timed, a command that has all of it, or
# nothing, where files are weighed.
BUDGETS = ("rounds", "calls", "steps", "repeats", "samples", "positions", "reward_calls", "budget", "command", "bytes")
FOLDERS = r"[a-z0-9-]+-(avx512|avx2|plain)-\d+-cores|nvidia-[a-z0-9-]+"
# Where a field that is older than its study's habit of writing it was found: a file of a commit, and the text that
# says so there.
AT = {"constraints.txt": "{name}=={value}", "dam/__init__.py": '__version__ = "{value}"'}
AT["pyproject.toml"] = 'requires-{name} = "{value}"'
FOLDER = "folder"


def parts(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The records of a file that name by themselves what they are of: itself, but for a list of such."""
    if "machine_info" in result:  # pytest-benchmark's own format
        model = {"cpu": result["machine_info"]["cpu"]["brand_raw"]}
        for one in result["benchmarks"]:
            yield {**one["extra_info"]["versions"], **model, "rounds": one["stats"]["rounds"]}
    elif result.keys() == {"results"}:
        yield from result["results"]
    else:
        yield result


def lacking(path: Path, result: Mapping[str, Any]) -> list[str]:
    """What a record does not name, or names otherwise than the folder of the file `path` does."""
    folder = path.parent.name
    missing = [name for name in RELEASES if not result.get(name)]
    if not any(result.get(name) for name in BUDGETS):
        missing.append("a budget")
    if "gpu" in result:
        missing += [] if report.slug(result["gpu"]) == folder else [f"gpu: {result['gpu']}"]
    elif "cpu" in result:
        missing += [] if folder.startswith(f"{report.slug(result['cpu'])}-") else [f"cpu: {result['cpu']}"]
    elif result.get("device") != folder:
        missing.append(f"device: {result.get('device')}")
    return missing


def misattributed(path: Path, result: Mapping[str, Any]) -> list[str]:
    """Fields that `added` says to be taken from elsewhere, which does not have them.

    What is taken from a commit is looked up where git has it.
    """
    wrong = []
    for name, source in result.get("added", {}).items():
        at = re.fullmatch(r"(\S+) at ([0-9a-f]{40})", source)
        if source == FOLDER:
            good = result[name] == path.parent.name
        elif at is None or at[1] not in AT:
            good = False
        else:
            stated, text = AT[at[1]].format(name=name, value=result[name]), of_commit(at[2], at[1])
            good = text is None or stated in text.splitlines()
        if not good:
            wrong.append(f"{name}: {result.get(name)}, from {source}")
    return wrong


def of_commit(commit: str, file: str) -> str | None:
    """The text of a file in a commit; None where there is no such commit, as in a source distribution."""
    command = ("git", "-C", str(pages.ROOT), "show", f"{commit}:{file}")
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
