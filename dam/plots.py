"""Plots of a run (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def figure_class() -> Any:
    """matplotlib's Figure; raises an ImportError that names the extra where there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'discrete-adjoint-matching[plot]'") from error
    return Figure


def solved_against_calls(
    path: str | Path, calls: Sequence[int], solved: Sequence[float], *, title: str, label: str = "solved"
) -> None:
    """Writes a PNG of the fraction of puzzles solved against the number of reward calls."""
    figure = figure_class()(figsize=(6, 4), layout="constrained")  # no pyplot: no display, no global state
    axes = figure.add_subplot()
    axes.plot(calls, [100 * fraction for fraction in solved], marker="o", markersize=3, label=label)
    axes.set_xlabel("reward calls")
    axes.set_ylabel("puzzles solved (%)")
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
