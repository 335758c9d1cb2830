"""`dam eval`: a task's metrics of a model's completions."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dam.commands.completing import Completer, progress, read_completions, write_completions
from dam.commands.generate import law_of, loaded, options_of, source_of
from dam.commands.train import task_of
from dam.tasks.finetune import write_json

Z = 1.959963984540054  # two-sided 95%


def wilson(right: int, of: int) -> tuple[float, float]:
    """The interval of 95% for a probability, of `of` independent outcomes with `right` right ones.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    p, z = right / of, Z
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of 95% for a mean over rows: Wilson's where all are 0 or 1, else by the standard error.

    None of a single row, or of rows that are all alike but not 0 or 1.
    """
    count = len(values)
    if set(values) <= {0.0, 1.0}:
        return wilson(round(sum(values)), count)
    if count < 2:
        return None
    mean = sum(values) / count
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return (mean - Z * error, mean + Z * error) if error > 0 else None


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Completions into the folder arguments.out, and metrics of them, which are also in its metrics.json.

    Raises:
        ValueError, OSError, ImportError: as `generate`.
    """
    task, law, source = task_of(arguments.task), law_of(arguments), source_of(arguments)
    folder = Path(arguments.out)
    rows = task.rows(arguments.source, split=arguments.split, limit=arguments.limit, style=arguments.style)
    model, tokenizer = loaded(source, arguments.device)
    completer = Completer(model, tokenizer, law)
    options = {**options_of(model, source, law, rows), "task": task.name}
    path = folder / "completions.jsonl"
    with progress(len(rows) * law.samples, task.name) as bar:
        for done in write_completions(completer, rows, law, path, options, batch_size=arguments.batch_size):
            bar.to(done)
    texts = [completion.completion for completion in read_completions(path)]
    groups = [texts[start : start + law.samples] for start in range(0, len(texts), law.samples)]
    metrics, by_row = task.metrics_by_row(groups, rows)
    result = {
        "task": task.name,
        "model": dataclasses.asdict(source),
        "rows": len(rows),
        "samples": law.samples,
        "metrics": {
            name: {"value": value, "interval": interval(by_row[name]) if name in by_row else None}
            for name, value in metrics.items()
        },
    }
    write_json(folder / "metrics.json", result)
    return result


def table(result: dict[str, Any]) -> str:
    """A result for the terminal."""
    samples = f", {result['samples']} samples each" if result["samples"] > 1 else ""
    lines = [f"{result['task']}, {result['rows']} rows{samples}; intervals of 95% over rows"]
    wide = max(map(len, result["metrics"]))
    for name, found in result["metrics"].items():
        line = f"{name:{wide}}  {found['value']:8.4f}"
        if found["interval"] is not None:
            line += "  [{:.4f}, {:.4f}]".format(*found["interval"])
        lines.append(line)
    return "\n".join(lines)
