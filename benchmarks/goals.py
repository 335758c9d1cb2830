"""What the records of a GPU say: figures of a case, the goals of the GPU table, and the summary's tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dam.benchmarks.options import text as sizes_text
from dam.kernels import configs
from dam.ops import _rows

Record = Mapping[str, Any]

FORMS = ("fused", "chunked")
TRITON = "dam, triton"  # Triton's kernels; "dam" are those of the default backend, CUDA's where they are built
FEW, MANY = 64, 1024  # rows; the goals of the linear forms change there
VERY_FEW = 8  # rows, which blocks share
NOISE = 1.02  # a ratio up to it is no difference


class Goal(NamedTuple):
    what: str
    goal: str
    measured: str
    met: bool | None  # None: there is no goal, or no figure


# ---- figures of a record


def fraction(record: Record, bandwidth: Mapping[str, float], seconds: float | None = None) -> float:
    """Bytes that must move per second, by default of dam's median, as a fraction of a large copy's."""
    seconds = record["median_seconds"]["dam"] if seconds is None else seconds
    return record["moved_bytes"] / seconds / bandwidth["copy"]


def judged_name(record: Record, backend: str = "dam") -> str:
    """The function that goals are about: unchecked where there is one, as peers check nothing."""
    unchecked = f"{backend}, check=False"
    return unchecked if unchecked in record["median_seconds"] else backend


def seeded(backend: str) -> str:
    """The function that takes its seed on the GPU, so that a graph need not draw one first."""
    return f"{backend}, check=False, seed on the GPU"


def of_copy_in_graph(record: Record, backend: str = "dam") -> float | None:
    """Time of a copy of as many bytes over that of a call, both of many in one CUDA graph; None where not measured."""
    seconds = record.get("graph", {}).get("seconds", {})
    name = next((name for name in (seeded(backend), judged_name(record, backend)) if name in seconds), None)
    copy = seconds.get(record["floor_name"])
    return None if name is None or copy is None else copy / seconds[name]


def _in_graph(record: Record, backend: str) -> float:
    return of_copy_in_graph(record, backend) or 0.0


def judged(record: Record, backend: str = "dam") -> float:
    """Its seconds."""
    return record["median_seconds"][judged_name(record, backend)]


def of_floor(record: Record) -> float:
    return judged(record) / record["median_seconds"][record["floor_name"]]


def reading_seconds(record: Record, bandwidth: Mapping[str, float]) -> float:
    """Seconds in which what must move is read."""
    return record["moved_bytes"] / bandwidth["read"]


def best_peer(record: Record) -> float | None:
    """Seconds of the fastest that is not dam's and not a floor; None where none was measured."""
    seconds = record["median_seconds"].items()
    others = [t for name, t in seconds if name != record["floor_name"] and not name.startswith("dam")]
    return min(others, default=None)


def of_best_peer(record: Record, backend: str = "dam") -> float:
    """Its seconds, of those of the fastest peer; NaN where none was measured."""
    return judged(record, backend) / (best_peer(record) or math.nan)


def of_reading(record: Record, bandwidth: Mapping[str, float]) -> float:
    return judged(record) / reading_seconds(record, bandwidth)


def rivals(record: Record) -> list[float]:
    """Seconds of linear_jump's fused form in Triton, and of a matmul with any sampler behind it."""
    return [t for name, t in record["median_seconds"].items() if name == "dam, fused" or name.startswith("matmul")]


def extra_bytes(record: Record) -> int | None:
    """Peak memory of a call besides its results."""
    peak = record["peak_bytes"].get("dam")
    return None if peak is None else peak - record["result_bytes"]


def kernel_seconds(record: Record, name: str = "dam") -> float | None:
    """Seconds of the kernels alone, for a short call on a GPU."""
    seconds = record["parts"].get(name, {}).get("kernel_seconds")
    return seconds if isinstance(seconds, float) else None


def figures(record: Record, bandwidth: Mapping[str, float]) -> list[str]:
    """Lines that say how far a case is from its ceilings, and what its short calls are made of."""
    seconds, moved = record["median_seconds"], record["moved_bytes"]
    lines = []
    if record["flops"]:
        rates = [f"{record['flops'] / seconds[name] / 1e12:.0f}" for name in ("dam", record["floor_name"])]
        lines.append(f"{rates[0]} TFLOP/s, the bare matmuls {rates[1]}")
        lines.append(f"{of_reading(record, bandwidth):.2f}x of moving {moved / 1e6:.1f} MB at the bandwidth of reading")
    else:
        lines.append(f"{fraction(record, bandwidth):.1%} of the copy's bandwidth, {moved / 1e6:.1f} MB")
    if (extra := extra_bytes(record)) is not None:
        lines.append(f"{extra / 2**20:.1f} MiB besides its results")
    if graph := record.get("graph"):
        told = [f"{name} {1e3 * t:.4f} ms" for name, t in graph["seconds"].items()]
        told += [f"{name}: {why}" for name, why in graph["absent"].items()]
        lines.append(f"each of {graph['calls']} in one CUDA graph: {', '.join(told)}")
    for name, parts in record["parts"].items():
        words = {"kernel_seconds": "kernels", "replay_seconds": "graph replay", "call_seconds": "a call in a loop"}
        told = [
            f"{word} {1e3 * parts[key]:.4f} ms" if isinstance(parts[key], float) else f"{word}: {parts[key]}"
            for key, word in words.items()
            if key in parts
        ]
        lines.append(f"{name}: " + ", ".join([*told, *(["waits for the GPU"] if parts.get("waits") is True else [])]))
    return lines


# ---- goals


def reached(
    records: Sequence[Record], bandwidth: Mapping[str, float], device: torch.device | None = None
) -> list[Goal]:
    """Every goal, with the figure that is farthest from it; `device` decides the workspace."""

    def of(label: str, least: float = 0, most: float = math.inf) -> list[Record]:
        return [r for r in records if r["label"] == label and least <= r["sizes"].get("rows", 0) <= most]

    def bandwidths(label: str, goal: float | None, text: str, least: float = 0, name: str = "dam") -> Goal:
        return _judged(
            label if name == "dam" else f"{label}, triton", text, having(name, of(label, least)),
            lambda r: fraction(r, bandwidth, judged(r, name)), goal, atmost=False, name=name,
            kernels=lambda r, seconds: fraction(r, bandwidth, seconds),
        )  # fmt: skip

    def having(name: str, found: list[Record]) -> list[Record]:
        return [r for r in found if name in r["median_seconds"]]

    def ratios(what: str, text: str, found: list[Record], value: Callable[[Record], float], goal: float | None) -> Goal:
        return _judged(what, text, found, value, goal, atmost=True)

    copy = f">= 90% of the copy's bandwidth from T = {MANY:,}"
    reading = ("jump", "log_prob, forward", "rate_ratio")
    goals = [bandwidths(label, 0.9, copy, MANY, name) for label in reading for name in ("dam", TRITON)]
    for label in reading:
        for name, suffix in (("dam", ""), (TRITON, ", triton")):
            found = [r for r in having(name, of(label, 0, VERY_FEW)) if best_peer(r) is not None]
            text = f"no slower than the best peer for T <= {VERY_FEW}"
            goals.append(ratios(f"{label}{suffix}", text, found, functools.partial(of_best_peer, backend=name), NOISE))
    for label in reading:
        for name, suffix in (("dam", ""), (TRITON, ", triton")):
            found = [r for r in of(label, FEW, MANY) if of_copy_in_graph(r, name) is not None]
            text = f">= 0.90 of copies of as many bytes, many in one CUDA graph, {FEW} <= T <= {MANY:,}"
            goals.append(
                _judged(f"{label}{suffix}", text, found, functools.partial(_in_graph, backend=name), 0.9, atmost=False)
            )
    both = "forward and backward"
    goals.append(bandwidths(f"log_prob, {both}", None, "of the copy's bandwidth", MANY))
    for label in (f"matching_loss, {both}", f"matching_loss with base, {both}"):
        goals.append(bandwidths(label, 0.9, copy, MANY))
    matmuls, alone = "<= 1.05x of the bare matmuls", "<= 1.03x of the bare matmul"
    goals += [
        ratios("linear_jump", f"{alone} from T = {MANY:,}", of("linear_jump", MANY), of_floor, 1.03),
        ratios(
            "linear_jump", f"<= 1.10x of reading the weight for T <= {FEW}", of("linear_jump", 0, FEW),
            lambda r: of_reading(r, bandwidth), 1.10,
        ),
        ratios(
            "linear_jump", "never behind fused, or matmul and a sampler",
            [r for r in of("linear_jump") if rivals(r)],
            lambda r: judged(r) / min(rivals(r)), NOISE,
        ),
    ]  # fmt: skip
    for head in ("frozen", "trained"):
        for based in ("", ", with base"):
            label = f"linear_matching_loss, {head} head{based}"
            goals.append(ratios(label, matmuls, of(label, MANY), of_floor, 1.05))
            if head == "frozen":
                workspace = _rows.workspace_bytes(device) / 2**20
                goals.append(
                    _judged(
                        label, f"<= {workspace:.0f} MiB besides the gradients (DAM_WORKSPACE_MB)",
                        [r for r in of(label) if extra_bytes(r) is not None],
                        lambda r: (extra_bytes(r) or 0) / 2**20, workspace, atmost=True, unit=" MiB",
                    )
                )  # fmt: skip
    label = "linear_log_prob, forward"
    goals.append(ratios(label, f"{alone} from T = {MANY:,}", of(label, MANY), of_floor, 1.03))
    for label in (f"linear_log_prob, {both}, {head} head" for head in ("frozen", "trained")):
        goals.append(ratios(label, "of the bare matmuls", of(label, MANY), of_floor, None))
    for least, labels in (
        (0.8, ("adjoint_weights", "adjoint_weights with escape_gap")),
        # With half as many bytes again, one more read or write of the state, it could not reach two thirds.
        (2 / 3, ("backward_kolmogorov, uniform",)),
        (0.5, ("backward_kolmogorov, square lattice",)),
    ):
        text = f"one read and one write: >= {least:.2f} of the copy's bandwidth"
        goals += [bandwidths(label, least, text) for label in labels]
    return goals


def _judged(
    what: str,
    goal_text: str,
    records: Sequence[Record],
    value: Callable[[Record], float],
    goal: float | None,
    *,
    atmost: bool,
    unit: str = "",
    kernels: Callable[[Record, float], float] | None = None,
    name: str = "dam",
) -> Goal:
    """A goal that every record must meet, and the farthest figure."""
    if not records:
        return Goal(what, goal_text, "not measured", None)
    values = {n: value(r) for n, r in enumerate(records)}
    farthest = (max if atmost else min)(values, key=values.__getitem__)
    good = {n: goal is None or (v <= goal if atmost else v >= goal) for n, v in values.items()}
    text = f"{values[farthest]:.3g}{unit} at {sizes_text(records[farthest]['sizes'])}"
    if len(records) > 1:
        text += f"; best {(min if atmost else max)(values.values()):.3g}{unit}"
        text += "" if goal is None else f"; {sum(good.values())} of {len(records)} sizes"
    alone = None if kernels is None else kernel_seconds(records[farthest], judged_name(records[farthest], name))
    if alone is not None and kernels is not None:
        text += f"; there its kernels alone {kernels(records[farthest], alone):.3g}"
    return Goal(what, goal_text, text, None if goal is None else all(good.values()))


# ---- tables


def tables(records: Sequence[Record], bandwidth: Mapping[str, float], device: torch.device | None = None) -> list[str]:
    """The tables of the summary, in Markdown."""
    lines = _absent(records) + _peers(records) + _fractions(records, bandwidth) + _graphs(records)
    lines += _linear(records, bandwidth)
    lines += ["## Goals", ""]
    met = {True: "yes", False: "NO", None: "-"}
    rows = [(goal.what, goal.goal, goal.measured, met[goal.met]) for goal in reached(records, bandwidth, device)]
    return [*lines, *markdown(("op", "goal", "measured, farthest from it", "met"), rows)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]


def _absent(records: Sequence[Record]) -> list[str]:
    found: dict[tuple[str, str], int] = {}
    for record in records:
        for name, why in record["absent"].items():
            found[name, why] = found.get((name, why), 0) + 1
    if not found:
        return []
    return ["## Absent", "", *(f"* {name} ({n} cases): {why}" for (name, why), n in found.items()), ""]


def _peers(records: Sequence[Record]) -> list[str]:
    lines = []
    for label in dict.fromkeys(r["label"] for r in records):
        # The size with most to compare, the largest of those.
        record = max(
            (r for r in records if r["label"] == label), key=lambda r: (len(r["median_seconds"]), r["moved_bytes"])
        )
        seconds = record["median_seconds"]
        ours = seconds["dam"]
        others = ", ".join(f"{name} {t / ours:.3g}x" for name, t in seconds.items() if name != "dam")
        lines.append(f"* {label} ({sizes_text(record['sizes'])}): dam {1e3 * ours:.4g} ms; {others}")
    return ["## Times of others, as multiples of dam's", "", *lines, ""]


def _fractions(records: Sequence[Record], bandwidth: Mapping[str, float]) -> list[str]:
    rows = []
    found = {
        (r["label"], r["sizes"]["rows"], r["sizes"]["vocabulary"]): r
        for r in records
        if not r["flops"] and r["op"] not in configs.STATE_OPS
    }
    vocabularies = sorted({v for _, _, v in found})

    def cell(record: Record | None, name: str) -> str:
        if record is None or name not in record["median_seconds"]:
            return ""
        seconds, alone = record["median_seconds"][name], kernel_seconds(record, name)
        text = f"{1e3 * seconds:.3g} ms, {fraction(record, bandwidth, seconds):.2f}"
        return text + ("" if alone is None else f" ({fraction(record, bandwidth, alone):.2f})")

    for label in dict.fromkeys(label for label, _, _ in found):
        for count in sorted({t for name, t, _ in found if name == label}):
            for name in ("dam", "dam, check=False", TRITON, f"{TRITON}, check=False"):
                cells = [cell(found.get((label, count, v)), name) for v in vocabularies]
                if any(cells):
                    rows.append((label, name, f"{count:,}", *cells))
    if not rows:
        return []
    title = "## Fraction of the copy's bandwidth (of its kernels alone)"
    return [title, "", *markdown(("op", "function", "T", *(f"V = {v:,}" for v in vocabularies)), rows)]


def _graphs(records: Sequence[Record]) -> list[str]:
    rows = []
    for r in (r for r in records if r.get("graph")):
        seconds = r["graph"]["seconds"]
        copy = seconds.get(r["floor_name"])
        for name, t in seconds.items():
            cells = (f"{1e3 * t:.4g}", "-" if copy is None else f"{copy / t:.2f}")
            rows.append((r["label"], name, f"{r['sizes']['rows']:,}", *cells))
    if not rows:
        return []
    header = ("op", "function", "T", "ms a call", "time of a copy over it")
    return ["## Many calls in one CUDA graph", "", *markdown(header, rows)]


def _linear(records: Sequence[Record], bandwidth: Mapping[str, float]) -> list[str]:
    rows = []
    order = {label: n for n, label in enumerate(dict.fromkeys(r["label"] for r in records))}
    linear = [r for r in records if r["flops"]]
    for r in sorted(linear, key=lambda r: (order[r["label"]], r["sizes"]["vocabulary"], r["sizes"]["rows"])):
        seconds = r["median_seconds"]
        forms = {form: seconds[f"dam, {form}"] for form in FORMS if f"dam, {form}" in seconds}
        floors = (seconds[r["floor_name"]], reading_seconds(r, bandwidth), seconds["dam"])
        rows.append(
            (
                r["label"].removeprefix("linear_"),
                f"{r['sizes']['vocabulary']:,}",
                f"{r['sizes']['rows']:,}",
                *(f"{1e3 * t:.4g}" for t in floors),
                *(f"{1e3 * forms[form]:.4g}" if form in forms else "-" for form in FORMS),
                f"{1e3 * seconds[TRITON]:.4g}" if TRITON in seconds else "-",
                min(forms, key=forms.__getitem__) if forms else "-",
                str(r["table_form"] or "-"),
            )
        )
    if not rows:
        return []
    forms_of_triton = (*FORMS, "triton", "fastest form", "table's form")
    header = ("linear_", "V", "T", "matmuls", "reading", "dam", *forms_of_triton)
    return ["## Linear ops and their forms in Triton, ms", "", *markdown(header, rows)]
