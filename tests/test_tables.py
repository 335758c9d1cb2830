"""Figures in the pages are those of the JSON that is committed, and tables with every case leave none out."""

import json
import re
import statistics

import pytest

from dam.benchmarks import calculation, checkout, report, tables
from dam.benchmarks.flows import __main__ as studies
from dam.benchmarks.flows import samplers
from tests import provenance
from tests.measurements import differences

MAPPING = json.loads((tables.RESULTS / "tables.json").read_text(encoding="utf-8"))
PAGES = tables.pages(checkout.ROOT)


def test_every_number_of_a_table_is_that_of_its_record():
    assert list(tables.differences(PAGES)) == []


def test_tables_with_every_case_stand_as_they_are_printed():
    page = PAGES["benchmarks/README.md"]
    assert tables.every_case(tables.RESULTS / "epyc-avx512-2-cores") in page
    assert tables.shared_vocabulary(tables.RESULTS / "xeon-avx512-2-cores" / "scale.json", 32766) in page

    for other, file in SAMPLERS:
        assert samplers.text_of(tables._load(tables.RESULTS / file)) in PAGES[other]
    for part in calculation.text().split("\n\n"):
        assert not part.startswith("|") or part in page


def of_flows():
    """Tables of the studies of flows, as they are printed."""
    for name in studies.STUDIES:
        path = tables.RESULTS / "epyc-avx2-2-cores" / f"flows-{name}.json"
        if path.exists():  # a study whose figures stand elsewhere has a file of another name
            yield from studies.of(name).text_of(json.loads(path.read_text(encoding="utf-8"))).split("\n\n")


def test_tables_of_the_studies_of_flows_stand_as_they_are_printed():
    found = list(of_flows())
    assert len(found) >= 3
    for table in found:
        assert table in PAGES["docs/flows.md"]


def test_what_the_page_of_dam_bench_shows_was_measured():
    (first, _) = json.loads((tables.RESULTS / "epyc-avx2-2-cores" / "against.json").read_text())["results"]
    assert report.table(first).strip() in PAGES["docs/bench.md"]


def test_what_the_page_of_dam_bench_shows_of_pytest_benchmark_was_measured():
    """Medians in us, and how often; of the run that was saved, and of the one that was compared with it."""
    line = re.compile(r"^(test_.+-dam\]) \((NOW|0001_before)\) +([\d.,]+) \([\d.]+\) +(\d+)$", flags=re.MULTILINE)
    shown = line.findall(PAGES["docs/bench.md"])
    assert len(shown) == 4
    for name, run, median, rounds in shown:
        file = tables.RESULTS / "epyc-avx2-2-cores" / f"pytest-benchmark-{'now' if run == 'NOW' else 'before'}.json"
        stats = {one["name"]: one["stats"] for one in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]}[name]
        assert tables.rounds_to(1e6 * stats["median"], median) and int(rounds) == stats["rounds"]


# Tables of samplers, by the JSON that they are printed of.
SAMPLERS = [
    ("docs/samplers.md", f"epyc-avx2-2-cores/samplers-{name}.json")
    for name in (
        "many-well-5",
        "many-well-5-adjoint-sampling",
        "dw-4",
        "gmm-40",
        "gmm-40-adjoint-sampling",
        "many-well-50",
        "many-well-50-adjoint-matching",
        "many-well-50-adjoint-matching-wide",
    )
]


# ---- sentences

CPU, GPU, XEON = "epyc-avx512-2-cores", "nvidia-h100-80gb-hbm3", "xeon-avx512-2-cores"
POSITIONS, SIZES = "epyc-avx2-2-cores/positions.json", "epyc-avx2-2-cores/sizes.json"
GiB = 2**30


def of(figure, file, case=None, **row):
    """One figure of a record, as tables.json names them."""
    return tables._value(figure, {"file": file, "case": case, **row})


def of_samplers(learner, figure, target="many-well-5"):
    """The mean over seeds."""
    return statistics.mean(each_of_samplers(learner, figure, target))


def each_of_samplers(learner, figure, target):
    found = tables._load(tables.RESULTS / f"epyc-avx2-2-cores/samplers-{target}.json")["results"]
    return [figure(run) if callable(figure) else run[figure] for run in found if run["learner"] == learner]


# Adjoint Sampling by the settings that replaced those of the first table.
AFTER = "many-well-5-adjoint-sampling"


def rates(key):
    """Of defined divergences of rates, in the run that has normalised ones too."""
    sizes = tables._load(tables.RESULTS / "epyc-avx2-2-cores/defined-normalised.json")["sizes"]
    return [value for size, found in sizes.items() if "normalised" not in size for value in found[key].values()]


def spread(values):
    return max(values) - min(values)


def last_cut(run):
    """The share of gradients that were cut in the last round."""
    return run["curve"][-1]["cut"]


def unchecked(op, rows):
    return of(["ms", "dam, check=False"], f"{GPU}/{op}.json", op, sizes={"rows": rows, "vocabulary": 126464})


def of_products(op, rows, case, peer):
    """In bfloat16, of the bare products' time, and how many times as long the formula on logits takes."""
    sizes = "" if rows == 128 and op != "linear_jump" else f"-rows-{rows}"
    hidden = "-hidden-1024" if op == "linear_jump" else ""
    file = f"{XEON}/{op}-bfloat16{sizes}-vocabulary-32768{hidden}-threads-1.json"
    return of(["of", ""], file, case), of(["times", peer], file, case)


def in_bfloat16(op, case, peer):
    """At T = 8 and 128, first what is of the products."""
    small, large = (of_products(op, rows, case, peer) for rows in (8, 128))
    return [small[0], large[0], small[1], large[1]]


def side_by_side(row, key):
    return tables.at(f"{XEON}/side_by_side.json", f"rows/{row}/{key}")


def call_at_positions():
    """Of the time of the whole model's, least and most over numbers of rows."""
    figures = tables._load(tables.RESULTS / POSITIONS)["figures"]
    found = [1 / value for name, value in figures.items() if re.fullmatch(r"rollout, \d+ rows: ratio", name)]
    return [min(found), max(found)]


def of_mixtures(learner, beta, figure):
    """Median over seeds."""
    runs = flows_mixtures()["results"]
    return statistics.median(run[figure] for run in runs if (run["learner"], run["beta"]) == (learner, beta))


def at_beta(of, beta, figure):
    """Of the base or the tilt."""
    (found,) = [one[figure] for one in flows_mixtures()[of] if one["beta"] == beta]
    return found


def flows_mixtures():
    return tables._load(tables.RESULTS / "epyc-avx2-2-cores" / "flows-mixtures.json")


SENTENCES = [
    (
        "docs/flows.md",
        "calls the reward's gradient {} times;",
        lambda: [flows_mixtures()["calls"]],
    ),
    (
        "docs/flows.md",
        "in {} minutes of a core",
        lambda: [flows_mixtures()["processor_seconds"] / 60],
    ),
    (
        "docs/flows.md",
        "at a KL of at most {} in all runs.",
        lambda: [max(run["kl"] for run in flows_mixtures()["results"] if run["learner"] == "Adjoint Matching")],
    ),
    (
        "docs/flows.md",
        "at beta 1 a KL of {}, {} times that of the base, with an entropy of {} where p* has {}.",
        lambda: [
            of_mixtures("VGG-Flow-PMP", 1.0, "kl"),
            of_mixtures("VGG-Flow-PMP", 1.0, "kl") / at_beta("base", 1.0, "kl"),
            of_mixtures("VGG-Flow-PMP", 1.0, "entropy"),
            at_beta("tilt", 1.0, "entropy"),
        ],
    ),
    (
        "docs/flows.md",
        "DRaFT ends with {} mode and an entropy of {}, ReFL with {} and {}.",
        lambda: [of_mixtures(name, 1.0, figure) for name in ("DRaFT", "ReFL") for figure in ("modes", "entropy")],
    ),
    (
        "docs/derive.md",
        "in which rates took {} to {} of the hand-written kernel's time and were {} to {} times as fast",
        lambda: [of(rates(key)) for key in ("of_hand_written", "torch_compile") for of in (min, max)],
    ),
    (
        "docs/samplers.md",
        "gradients that are cut early, {}% of them, it stays small",
        lambda: [100 * of_samplers("naas", last_cut)],
    ),
    (
        "docs/samplers.md",
        "which the energies say; {}% of its gradients are cut",
        lambda: [100 * of_samplers("adjoint-sampling", last_cut)],
    ),
    (
        "docs/samplers.md",
        "the effective sample size is {} times what it was, for {} times the energy calls",
        lambda: [
            of_samplers("adjoint-sampling", figure, AFTER) / of_samplers("adjoint-sampling", figure)
            for figure in ("ess", "energy_calls")
        ],
    ),
    (
        "docs/samplers.md",
        "below it here by either, in {} minutes of a core",
        lambda: [of_samplers("adjoint-sampling", "processor_seconds", "dw-4") / 60],
    ),
    (
        "docs/samplers.md",
        "agree on log Z to within {}.",
        lambda: [spread(each_of_samplers("adjoint-sampling", "log_z", "dw-4"))],
    ),
    (
        "docs/samplers.md",
        "By it exact samples have {}.",
        lambda: [of_samplers(samplers.EXACT, "sinkhorn_divergence")],
    ),
    (
        "docs/samplers.md",
        "samples it is {}, where the squared distance that it would converge to is {},",
        lambda: [of_samplers(samplers.EXACT, "sinkhorn"), of_samplers(samplers.EXACT, "w2") ** 2],
    ),
    (
        "README.md",
        "`jump` takes {} ms and softmax + multinomial {} times as long; `linear_log_prob` with a gradient {} s, and "
        "matmul, log_softmax and gather {} times as long",
        lambda: [
            of(["ms", "dam"], f"{CPU}/jump-float32.json", "jump"),
            of(["times", "softmax + multinomial"], f"{CPU}/jump-float32.json", "jump"),
            *[
                of(figure, f"{CPU}/linear_log_prob-float32.json", "linear_log_prob, forward and backward, frozen head")
                for figure in (["s", "dam"], ["times", "matmul, log_softmax + gather"])
            ],
        ],
    ),
    (
        "README.md",
        "then all of this is {} GiB, {} of it torch",
        lambda: [tables.at(SIZES, f"bytes/{name}") / GiB for name in ("with the extras train, plot", "torch")],
    ),
    (
        "README.md",
        "a rollout with its steps in {} of the time",
        lambda: [1 / tables.at(POSITIONS, "figures/dam sudoku, a rollout: ratio")],
    ),
    ("docs/models.md", "{} to {} of a call's time at three layers", call_at_positions),
    ("docs/performance.md", "most of the memory is its own gradient, {} MiB", lambda: [126464 * 1024 * 4 / tables.MiB]),
    (
        "docs/performance.md",
        "T = 8 and 128 `linear_jump` {} and {} of its matmul, softmax + multinomial {}x and {}x; `linear_log_prob` {} "
        "and {}, log_softmax + gather {}x and {}x; `linear_matching_loss` {} and {} with a frozen head, cross entropy "
        "{}x and {}x, {} and {} with a trained one, cross entropy {}x and {}x",
        lambda: [
            *in_bfloat16("linear_jump", "linear_jump", "matmul, softmax + multinomial"),
            *in_bfloat16("linear_log_prob", "linear_log_prob, forward", "matmul, log_softmax + gather"),
            *in_bfloat16("linear_matching_loss", "linear_matching_loss, frozen head", "matmul, cross entropy"),
            *in_bfloat16("linear_matching_loss", "linear_matching_loss, trained head", "matmul, cross entropy"),
        ],
    ),
    (
        "docs/performance.md",
        "A rollout in {} calls takes {} s of CPU and {} MiB, LLaDA's and d1's loop {} times as long and {} GiB ({} of "
        "its calls, multiplied); a training step {} s and {} GiB, d1's {} times and {} GiB, c-DTM's {} times and {}.",
        lambda: [
            tables.at(f"{XEON}/side_by_side.json", "steps"),
            side_by_side(0, "seconds"),
            side_by_side(0, "bytes") / tables.MiB,
            side_by_side(1, "of_ours"),
            side_by_side(1, "bytes") / GiB,
            tables.at(f"{XEON}/side_by_side.json", "calls"),
            side_by_side(2, "seconds"),
            side_by_side(2, "bytes") / GiB,
            side_by_side(3, "of_ours"),
            side_by_side(3, "bytes") / GiB,
            side_by_side(4, "of_ours"),
            side_by_side(4, "bytes") / GiB,
        ],
    ),
    (
        "docs/tuning.md",
        "`jump` {} ms at T = 1,024 and {} at 8,192, `linear_jump` {}, {} and {} ms at T = 1, 64 and 1,024",
        lambda: [
            *[unchecked("jump", rows) for rows in (1024, 8192)],
            *[unchecked("linear_jump", rows) for rows in (1, 64, 1024)],
        ],
    ),
    (
        "docs/tuning.md",
        "`jump` at T = 1 takes {} us checked and {} us unchecked",
        lambda: [
            1e3 * of(["ms", name], f"{GPU}/jump.json", "jump", sizes={"rows": 1, "vocabulary": 126464})
            for name in ("dam", "dam, check=False")
        ],
    ),
    (
        "docs/tuning.md",
        "{} us for `jump` of 4 x 8 logits on a quiet core of a Xeon, `torch.logsumexp` being {}",
        lambda: [
            1e6 * tables.at(f"{XEON}/calls-quiet.json", f"median_cpu_seconds/{name}")
            for name in ("jump", "torch.logsumexp")
        ],
    ),
    (
        "benchmarks/README.md",
        "a copy moves {} TB/s",
        lambda: [tables.at(f"{GPU}/jump.json", "bandwidth/copy") / 1e12],
    ),
]


@pytest.mark.parametrize(("page", "passage", "values"), SENTENCES, ids=[p[:40] for _, p, _ in SENTENCES])
def test_figures_of_sentences_are_those_of_their_json(page, passage, values):
    assert not list(differences(page, passage, values()))


# ---- what is found


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


MEASURED = sorted(path for path in tables.RESULTS.rglob("*.json") if path.parent != tables.RESULTS)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: str(path.relative_to(tables.RESULTS).with_suffix("")))
def test_json_says_where_with_what_and_how_often_it_was_measured(path):
    """What another would need to repeat it, of each record."""
    device = tables.RESULTS / path.relative_to(tables.RESULTS).parts[0] / path.name
    assert re.fullmatch(provenance.FOLDERS, device.parent.name)
    for part in provenance.parts(json.loads(path.read_text(encoding="utf-8"))):
        assert not provenance.lacking(device, part) and not provenance.misattributed(device, part)


def test_a_figure_that_a_page_shows_is_of_a_file_that_is_there():
    rows = [row for table in MAPPING for row in table["rows"]]
    files = {row["file"] for row in rows if "file" in row}
    files |= {figure[2]["file"] for row in rows for figure in row["figures"] if len(figure) > 2 and "file" in figure[2]}
    told = "".join(text for page, text in PAGES.items() if page != "benchmarks/notes.md")
    linked = set(re.findall(r"\]\((?:\.\./)?(?:benchmarks/)?results/(\S+\.json)\)", told))
    assert len(files) > 40 and len(linked) > 8
    assert {tables.RESULTS / name for name in files | linked} <= set(MEASURED)
