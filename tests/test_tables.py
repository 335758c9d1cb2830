"""Figures in the pages are those of the JSON that is committed, and tables with every case leave none out."""

import json

import pytest

from dam.benchmarks import checkout, report, tables

MAPPING = json.loads((tables.RESULTS / "tables.json").read_text(encoding="utf-8"))
PAGES = tables.pages(checkout.ROOT)


def test_every_number_of_a_table_is_that_of_its_record():
    assert list(tables.differences(PAGES)) == []


def test_tables_with_every_case_stand_as_they_are_printed():
    page = PAGES["benchmarks/README.md"]
    assert tables.every_case(tables.RESULTS / "epyc-avx512-2-cores") in page
    assert tables.shared_vocabulary(tables.RESULTS / "xeon-avx512-2-cores" / "scale.json", 32766) in page


def test_what_the_page_of_dam_bench_shows_was_measured():
    (first, _) = json.loads((tables.RESULTS / "epyc-avx2-2-cores" / "against.json").read_text())["results"]
    assert report.table(first).strip() in PAGES["docs/bench.md"]


def test_every_case_of_the_json_has_a_row():
    """Those in which others are ahead too."""
    folder = tables.RESULTS / "epyc-avx512-2-cores"
    rows = {row.split(" | ")[0].strip("| "): row for row in tables.every_case(folder).splitlines()[2:]}
    labels = [case["label"] for f in folder.glob("*-float32.json") for case in json.loads(f.read_text())["cases"]]
    assert sorted(rows) == sorted(labels) and len(set(labels)) == len(labels)
    assert "0.69x" in rows["linear_log_prob, forward and backward, frozen head"]
    assert rows["linear_matching_loss, trained head, with base"].endswith("| 627.8 | matmul, c-DTM 565.5 |")


@pytest.mark.parametrize("table", MAPPING, ids=lambda table: table["header"])
def test_a_number_that_is_another_is_found(table):
    """Each number of the table in turn, with another last digit; what is said names the row."""
    ((page, rows),) = [(page, rows) for page, text in PAGES.items() for rows in tables._tables(text, table["header"])]
    for row, mapped in tables._paired(rows, table["rows"]):
        first, cells = row.split("|", 2)[1:]
        for match in tables.NUMBER.finditer(cells):
            last = match.end() - 1
            # Up by two, or down from the top, is beyond what rounding allows.
            digit = int(cells[last])
            changed = cells[:last] + str(digit + 2 if digit < 8 else digit - 2) + cells[last + 1 :]
            found = list(tables._of_row(f"|{first}|{changed}", mapped))
            assert len(found) == 1 and match.group()[:-1] in found[0], (page, row, found)


def test_a_row_or_a_table_that_is_missing_is_found():
    (header,) = (table["header"] for table in MAPPING if table["header"].startswith("| rows of logits, ms"))
    page = PAGES["benchmarks/README.md"]
    (row,) = (line for line in page.splitlines() if line.startswith("| `rate_ratio` | 0.012"))
    without = {**PAGES, "benchmarks/README.md": page.replace(row + "\n", "")}
    assert ["lacks the row `rate_ratio`" in line for line in tables.differences(without)] == [True]
    more = {**PAGES, "benchmarks/README.md": page.replace(row, row + "\n| `jmup` | 1 |")}
    assert ["has a row that tables.json lacks: | `jmup` | 1 |" in line for line in tables.differences(more)] == [True]
    gone = {**PAGES, "benchmarks/README.md": page.replace(header, "| other")}
    assert [line.endswith("stands 0 times in the pages, not once") for line in tables.differences(gone)] == [True]
    twice = {**PAGES, "docs/copy.md": page[page.index(header) :].split("\n\n")[0]}
    assert [line.endswith("stands 2 times in the pages, not once") for line in tables.differences(twice)] == [True]


@pytest.mark.parametrize(
    ("value", "number", "good"),
    [
        (92.516, "93", True),
        (92.516, "92", False),
        (0.705, ".7", True),
        (8192.0, "8,192", True),
        (3749.55, "3,750", True),
        (0.35, "0.4", True),
        (0.449, "0.5", False),
        (12.6, "12", False),
    ],
)
def test_rounding(value, number, good):
    assert tables.rounds_to(value, number) == good


def test_which_numbers_a_row_has():
    row = " LLaDA's step 141x, torch.logsumexp 5.3x | 1,024 at float32, 31 MiB (93); sm_90 .5 and 0.84. | 12.0%, 7"
    assert tables.NUMBER.findall(row) == ["141", "5.3", "1,024", "31", "93", ".5", "0.84", "12.0", "7"]


def test_json_of_tables_says_where_and_with_what_it_was_measured():
    """The device, releases, and how often: what another would need to repeat it."""
    rows = [row for table in MAPPING for row in table["rows"]]
    files = {row["file"] for row in rows if "file" in row}
    files |= {figure[2]["file"] for row in rows for figure in row["figures"] if len(figure) > 2 and "file" in figure[2]}
    assert len(files) > 40
    for name in sorted(files):
        result = json.loads((tables.RESULTS / name).read_text(encoding="utf-8"))
        assert {"dam", "torch", "python"} <= result.keys(), name
        assert result.keys() & {"cpu", "gpu"} or name == "xeon-avx512-2-cores/side_by_side.json", name
        assert result.keys() & {"repeats", "calls"}, name
