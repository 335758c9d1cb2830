"""Completions of a rollout with their rewards, to look at: on the terminal, and in wandb."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dam.train.rows import is_conversation


@dataclasses.dataclass(frozen=True)
class Completions:
    """N completions."""

    prompts: list[Any]
    completions: list[Any]
    figures: dict[str, list[float]]  # of each, by name: rewards, and the weight in the loss

    def at(self, places: Sequence[int]) -> Completions:
        """Those at the places."""

        def taken(values: list[Any]) -> list[Any]:
            return [values[place] for place in places]

        return Completions(
            taken(self.prompts), taken(self.completions), {name: taken(each) for name, each in self.figures.items()}
        )

    def of_unique_prompts(self) -> Completions:
        """The first of each prompt."""
        first: dict[str, int] = {}
        for place, prompt in enumerate(self.prompts):
            first.setdefault(repr(prompt), place)
        return self.at(list(first.values()))

    def some(self, number: int | None, seed: Sequence[int]) -> Completions:
        """So many of them, drawn at random, in their order; all with None."""
        count = len(self.prompts)
        if number is None or number >= count:
            return self
        return self.at(sorted(np.random.default_rng(seed).choice(count, number, replace=False).tolist()))

    def as_text(self, title: str) -> str:
        """A table by rich, as wide as the terminal; one completion below the other where rich is not installed."""
        try:
            from rich.console import Console
        except ImportError:
            return self._as_lines(title)
        from rich import box
        from rich.table import Table
        from rich.text import Text

        terminal = sys.stdout
        wide = (getattr(terminal, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
        table = Table(title=title, box=box.SQUARE if wide else box.ASCII, show_lines=True, expand=True)
        for name in ("prompt", "completion"):
            table.add_column(name, overflow="fold")
        for name in self.figures:
            table.add_column(name, justify="right", overflow="fold")
        for prompt, completion, *values in self._rows():
            table.add_row(*map(Text, (_readable(prompt), _readable(completion), *values)))  # Text: [MASK] is no markup
        rendered = io.StringIO()
        width = shutil.get_terminal_size((120, 24)).columns
        colours = getattr(terminal, "isatty", lambda: False)()
        Console(file=rendered, width=width, force_terminal=colours).print(table)
        return rendered.getvalue().rstrip("\n")

    def _as_lines(self, title: str) -> str:
        blocks = [title]
        for prompt, completion, *values in self._rows():
            figures = ", ".join(f"{name} {value}" for name, value in zip(self.figures, values, strict=True))
            blocks.append(f"prompt: {_readable(prompt)}\ncompletion: {_readable(completion)}\n{figures}")
        return "\n\n".join(blocks)

    def _rows(self) -> list[tuple[Any, ...]]:
        figures = [[f"{value:.4g}" for value in values] for values in self.figures.values()]
        return list(zip(self.prompts, self.completions, *figures, strict=True))

    def to_wandb(self, step: int) -> None:
        """As a table, where a run of wandb is open."""
        import wandb  # type: ignore[import-not-found]

        if wandb.run is not None:
            columns = ["step", "prompt", "completion", *self.figures]
            texts = [[_readable(each) for each in given] for given in (self.prompts, self.completions)]
            rows = [[step, *row] for row in zip(*texts, *self.figures.values(), strict=True)]
            wandb.log({"completions": wandb.Table(columns=columns, data=rows)})


def _readable(part: Any) -> str:
    """A prompt or a completion: text, messages, or token ids."""
    if is_conversation(part):
        return "\n".join(f"{message['role']}: {message.get('content')}" for message in part)
    return part if isinstance(part, str) else " ".join(map(str, part))
