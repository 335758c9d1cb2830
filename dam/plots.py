"""Plots of a run (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    path: str | Path, calls: Sequence[int], solved: Sequence[float], *, title: str, what: str = "puzzles"
) -> None:
    """Writes a PNG of the fraction of what is to be solved that is, against the number of reward calls."""
    figure = figure_class()(figsize=(6, 4), layout="constrained")  # no pyplot: no display, no global state
    axes = figure.add_subplot()
    axes.plot(calls, [100 * fraction for fraction in solved], marker="o", markersize=3)
    axes.set_xlabel("reward calls")
    axes.set_ylabel(f"{what} solved (%)")
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def times_and_floor(
    path: str | Path,
    panels: Sequence[tuple[str, Mapping[str, float], str]],  # label, seconds by name, name of the floor
    *,
    title: str,
) -> None:
    """Writes a PNG of bars of times, a panel per comparison, with a line at the floor that none can undercut.

    Times of one magnitude are drawn from zero, others on a logarithmic scale.
    """
    bars = sum(len(seconds) for _, seconds, _ in panels)
    figure = figure_class()(figsize=(8, 0.6 + 0.8 * len(panels) + 0.3 * bars), layout="constrained")
    figure.suptitle(title, fontsize=9)
    heights = [1 + len(seconds) for _, seconds, _ in panels]
    for axes, (label, seconds, floor) in zip(
        figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        drawn = axes.barh(
            list(seconds),
            [1e3 * time for time in seconds.values()],
            color=["0.7" if name == floor else "C0" if name == "dam" else "C1" for name in seconds],
        )
        axes.bar_label(drawn, [f"{time / seconds[floor]:.2f}x" for time in seconds.values()], padding=3, fontsize=8)
        axes.axvline(1e3 * seconds[floor], color="0.4", linewidth=1)
        axes.margins(x=0.15)
        if max(seconds.values()) > 20 * min(seconds.values()):
            axes.set_xscale("log")
            axes.set_xlim(left=1e3 * min(seconds.values()) / 2)
        axes.invert_yaxis()
        axes.set_title(label, loc="left", fontsize=9)
        axes.set_xlabel("ms, and times the floor", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)


def times_over_sizes(
    path: str | Path,
    panels: Sequence[tuple[str, Mapping[int, Mapping[str, float]], str]],  # label, seconds by size and name, floor
    *,
    xlabel: str,
) -> None:
    """Writes a PNG of times against a size, a panel per comparison, both logarithmic, the floor dashed."""
    figure = figure_class()(figsize=(7, 3.5 * len(panels)), layout="constrained")
    for axes, (label, seconds, floor) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        names = dict.fromkeys(name for of_size in seconds.values() for name in of_size)
        for name in sorted(names, key=lambda name: name == floor):  # the floor last, in grey
            points = [(size, 1e3 * of_size[name]) for size, of_size in sorted(seconds.items()) if name in of_size]
            look = {"linestyle": "--", "color": "0.4"} if name == floor else {"marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(xlabel)
        axes.set_ylabel("ms")
        axes.set_title(label, loc="left", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def training(path: str | Path, history: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Writes a PNG of what `DAMTrainer` logged, a panel for each figure, against reward calls.

    Args:
        history: `trainer.state.log_history`, or the lines of metrics.jsonl.

    Raises:
        ValueError: it holds no figure.
    """
    panels = (
        "reward",
        "kl_path",
        "kl_outcome",
        "order_variance",
        "ess",
        "ess_path",
        "tilt",
        "clip_fraction",
        "split_half",
        "loss",
    )
    found = {
        name: [(e["reward_calls"], e[name]) for e in history if name in e and "reward_calls" in e] for name in panels
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        raise ValueError(f"history must hold some of {', '.join(panels)} with reward_calls")
    rows = -(-len(found) // 2)
    figure = figure_class()(figsize=(8, 2.2 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).flatten()
    for axis, (name, points) in zip(axes, found.items(), strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    figure.supxlabel("reward calls")
    figure.savefig(path, dpi=150)


def samples_against_law(path: str | Path, panels: Mapping[str, tuple[Any, Any]], *, title: str = "") -> None:
    """Writes a PNG of samples beside those of the law they should be of: points of the plane, or histograms.

    Args:
        panels: of each panel's name the samples and those of the law, arrays [N, 2] or [N].
    """
    figure = figure_class()(figsize=(4 * len(panels), 3.6), layout="constrained")
    figure.suptitle(title)
    for axis, (name, (samples, law)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axis.set_title(name, fontsize=9)
        if law.ndim == 2:
            axis.scatter(*law.T, s=3, color="0.75", label="the law's")
            axis.scatter(*samples.T, s=3, label="drawn")
        else:
            # What is far off is in the outermost bins: one such sample would leave nothing else to see.
            low, high = min(law), max(law)
            edges = [low + (high - low) * (n / 50 * 1.2 - 0.1) for n in range(51)]
            samples = samples.clip(edges[0], edges[-1])
            axis.hist(law, bins=edges, density=True, color="0.75", label="the law's")
            axis.hist(samples, bins=edges, density=True, histtype="step", label="drawn")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
