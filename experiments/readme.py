"""README's fine-tuning block, run as it stands: what it prints, and what it takes, in a file that README is held to."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, report

README = Path(__file__).parents[1] / "README.md"


def block() -> str:
    """The first block of Python of the page."""
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return found[1]


def study(output: Path) -> str:
    """Runs it in a folder of its own, in one thread, so that its time on the processor is that of the run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, started = io.StringIO(), time.process_time()
    torch.set_num_threads(1)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)
        try:
            exec(compile(block(), "README.md", "exec"), names)
        finally:
            os.chdir(here)
    trainer = names["trainer"]
    figures = {
        **records.versions(),
        "device": report.device(),
        "threads": 1,
        "processor_seconds": time.process_time() - started,
        "reward_calls": trainer.reward_calls,
        "printed": printed.getvalue().splitlines(),
        "log": trainer.state.log_history,
    }
    report.write_json(output / "readme.json", figures)
    return printed.getvalue()
