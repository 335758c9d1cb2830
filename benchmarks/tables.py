"""Tables of figures in Markdown, out of the JSON that is committed: python -m benchmarks tables [FOLDER].

Those that have a row for every case are printed by this command, and stand in a page as they are printed. Of tables
that are put together by hand `results/tables.json` says which figure of which record each of their numbers is, wherever
the table stands; `differences` compares the two.

    {"header": "| operation | time |",                 how the table's first line begins
     "rows": [{"first": "`jump`",                      its first cell
               "file": "epyc-avx512-2-cores/jump-float32.json", "case": "jump",
               "sizes": {"rows": 64},                  of a file with several
               "ours": "dam",                          what ratios are to
               "figures": [["ms", "dam"], ["times", "LLaDA's step"], "64"]}]}

Figures stand in the order of the numbers in the row behind its first cell: kind, name, and what is of this figure
alone, as another case. A string is a number that is no measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from dam.benchmarks import checkout, goals, options
from dam.benchmarks.goals import markdown

RESULTS = checkout.ROOT / "benchmarks" / "results"
MiB = 2**20
# 1,024 or .5 or 8.2x, but nothing within a name as float32.
NUMBER = re.compile(r"(?<![\w.])(?:\d[\d,]*)?(?:\d|\.\d+)(?=x\b|[^\w.]|\.\W|\.?$)")

Record = Mapping[str, Any]


def main(arguments: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Prints a device's figures, a row for every case.")
    folders = [path.name for path in sorted(RESULTS.iterdir()) if path.is_dir()]
    parser.add_argument("folder", nargs="?", default="epyc-avx512-2-cores", help=f"of {', '.join(folders)}")
    given = parser.parse_args(arguments)
    print(every_case(RESULTS / given.folder))
    for line in (found := list(differences(pages(checkout.ROOT)))):
        print(f"{prog}: {line}", file=sys.stderr)
    return 1 if found else 0


def pages(root: Path) -> dict[str, str]:
    """Where tables may stand, by their paths."""
    found = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "benchmarks").glob("*.md")]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in found}


# ---- tables with every row


def every_case(folder: Path) -> str:
    """A row for every case that was measured in float32 at the op's own sizes, whoever is ahead."""
    rows = []
    for path in sorted(folder.glob("*-float32.json")):
        for record in _load(path)["cases"]:
            seconds, peaks = record["median_seconds"], record.get("peak_bytes", {})
            ours, floor = seconds["dam"], seconds[record["floor_name"]]
            others = [name for name in seconds if name not in ("dam", record["floor_name"])]
            memory = [f"{name} {_mib(peaks[name])}" for name in others if name in peaks]
            rows.append(
                (
                    record["label"],
                    f"{ours:.3g} s" if ours >= 1 else f"{1e3 * ours:.3g} ms",
                    f"{ours / floor:.2f} of {record['floor_name']}",
                    ", ".join(f"{name} {seconds[name] / ours:.2f}x" for name in others),
                    _mib(peaks["dam"]) if "dam" in peaks else "-",
                    ", ".join(memory) or "-",
                )
            )
    header = ("case", "dam", "of the floor", "others, of dam's time", "dam's memory, MiB", "others', MiB")
    return "\n".join(markdown(header, rows)).strip()


def shared_vocabulary(path: Path, vocabulary: int) -> str:
    """What `benchmarks.scale` measured at one size of the vocabulary, a row for every op, number of ranks and way."""
    rows = [
        (
            r["op"],
            str(r["ranks"]),
            r["way"],
            str(len(r["collectives"])),
            f"{r['wire bytes'] / MiB:.2f} MiB",
            f"{r['peak bytes'] / MiB:.1f} MiB",
            f"{r[OF_DAM]:.1f}",
        )
        for r in _load(path)["records"]
        if r["sizes"]["vocabulary"] == vocabulary
    ]
    header = ("op", "ranks", "way", "collectives", "on the wire", "peak memory", "of dam's time")
    return "\n".join(markdown(header, rows)).strip()


OF_DAM = "of dam's time"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MiB:.1f}"


# ---- tables that are put together by hand


def differences(found: Mapping[str, str], mapping: Sequence[Mapping[str, Any]] | None = None) -> Iterator[str]:
    """Every number of the mapped tables that the JSON does not give, and every row that is missing, as a sentence."""
    for table in _load(RESULTS / "tables.json") if mapping is None else mapping:
        header = table["header"]
        places = [(page, rows) for page, text in found.items() for rows in _tables(text, header)]
        if len(places) != 1:
            yield f"the table {header!r} stands {len(places)} times in the pages, not once"
            continue
        ((page, rows),) = places
        for printed, row in _paired(rows, table["rows"]):
            if printed is None or row is None:
                told = (
                    f"has a row that tables.json lacks: {printed}" if row is None else f"lacks the row {row['first']}"
                )
                yield f"{page}: the table {header!r} {told}"
                continue
            yield from (f"{page}: {row['first']}: {line}" for line in _of_row(printed, row))


def _tables(text: str, header: str) -> Iterator[list[str]]:
    """The rows of the tables whose first line begins so."""
    lines = text.splitlines()
    for n, line in enumerate(lines):
        if line.startswith(header):
            rows = []
            for row in lines[n + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append(row)
            yield rows


def _paired(rows: Iterable[str], mapped: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Rows and their mapping by the first cell, of which several may be the same: in order."""
    left = list(mapped)
    for row in rows:
        first = row.split("|")[1].strip()
        match = next((one for one in left if one["first"] == first), None)
        if match is not None:
            left.remove(match)
        yield row, match
    yield from ((None, one) for one in left)


def _of_row(printed: str, row: Mapping[str, Any]) -> Iterator[str]:
    numbers = NUMBER.findall(printed.split("|", 2)[2])
    if len(numbers) != len(row["figures"]):
        yield f"has {len(numbers)} numbers, {', '.join(numbers)}, and tables.json {len(row['figures'])}"
        return
    for number, figure in zip(numbers, row["figures"], strict=True):
        if isinstance(figure, str):
            if number != figure:
                yield f"{number} where tables.json has {figure}"
            continue
        value = _value(figure, row)
        if not rounds_to(value, number):
            yield f"{number} where {' '.join(map(str, figure))} is {value:.5g}"


def rounds_to(value: float, number: str) -> bool:
    """Whether a number is what a value is when it is rounded to as many decimals."""
    plain = Decimal(number.replace(",", ""))
    half = Decimal(5).scaleb(-1 + int(plain.as_tuple().exponent))
    return abs(Decimal(value) - plain) <= half * (1 + Decimal("1e-9"))


def _value(figure: Sequence[Any], row: Mapping[str, Any]) -> float:
    """Of kind, name, and what is of this figure alone: another case, file, sizes or `ours`."""
    kind, name, *own = figure
    row = {**row, **(own[0] if own else {})}
    if kind == "at":  # anywhere in a file
        return at(row["file"], name) / row.get("unit", 1)
    if kind == "over":  # of two places in a file
        return at(row["file"], name[0]) / at(row["file"], name[1])
    record, bandwidth = _record(row["file"], row["case"], json.dumps(row.get("sizes", {})))
    seconds, ours = record["median_seconds"], row.get("ours", "dam")
    if kind == "ms":
        return 1e3 * seconds[name]
    if kind == "s":
        return seconds[name]
    if kind == "times":
        return seconds[name] / seconds[ours]
    if kind == "of":
        return seconds[ours] / seconds[name or record["floor_name"]]
    if kind == "MiB":
        return record["peak_bytes"][name] / MiB
    if kind == "beside":  # results, which any function must make
        return (record["peak_bytes"][name] - record["result_bytes"]) / MiB
    if kind == "copy":
        return goals.fraction(record, bandwidth, seconds[name])
    if kind == "kernels":  # alone, of a copy
        return goals.fraction(record, bandwidth, goals.kernel_seconds(record, name))
    if kind == "reading":
        return seconds[name] / goals.reading_seconds(record, bandwidth)
    raise ValueError(
        f"tables.json: no figure {kind!r}; there are ms, s, times, of, MiB, beside, copy, kernels, reading, at, over"
    )


def at(file: str, path: str) -> float:
    """What stands somewhere in a file of results, by the keys to it."""
    return functools.reduce(_within, path.split("/"), _load(RESULTS / file))


def _within(found: Any, key: str) -> Any:
    return found[int(key)] if isinstance(found, list) else found[key]


@functools.cache
def _record(file: str, case: str, sizes: str) -> tuple[Record, Mapping[str, float]]:
    result, asked = _load(RESULTS / file), json.loads(sizes)
    if "cases" not in result:  # of products.py
        return {"median_seconds": result["median_seconds"][case]}, {}
    found = [
        record
        for record in result["cases"]
        if record["label"] == case and asked.items() <= record.get("sizes", result.get("sizes", {})).items()
    ]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} records of {case} {options.text(asked)}")
    return found[0], result.get("bandwidth", {})


@functools.cache
def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
