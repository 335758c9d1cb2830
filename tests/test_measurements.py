"""No figure of a page by itself: each is held to a JSON by test_figures.py or test_tables.py, or it is said why not."""

import dataclasses
from functools import cache

import pytest

from dam import diagnostics
from dam.benchmarks import calculation, harness, tables
from dam.benchmarks.flows import samplers
from dam.ops import _rows
from dam.tasks import TASKS
from dam.tasks import math as math_task
from dam.train import DAMConfig, base, lifelines
from experiments import replay
from tests import measurements, pages, test_elementary, test_figures, test_tables
from tests.measurements import found, outside, text_of

# README, what it leads to, and the two pages that measurements have; the log of the benchmarks is a notebook.
READ = [
    "README.md",
    "benchmarks/README.md",
    "experiments/README.md",
    *(p for p in pages.PAGES if p.startswith("docs/")),
]

# What the code holds to, with its numbers in braces.
OF_CODE = [
    (
        "experiments/README.md",
        "after {}% of the run the variance takes over",
        lambda: [100 * replay.Replay.late],
    ),
    ("docs/learning.md", "`split_half` below {},", lambda: [diagnostics._NOISE]),
    ("docs/learning.md", "`kl_path` above {} nats", lambda: [diagnostics._FAR]),
    ("docs/learning.md", "`kl_path` below {} nats", lambda: [diagnostics._STILL]),
    ("docs/logs.md", "`frac_reward_zero_std` | below {} |", lambda: [diagnostics._MOSTLY]),
    ("docs/logs.md", "all rewards are equal | below {};", lambda: [diagnostics._MOSTLY]),
    ("docs/logs.md", "`split_half` | above {},", lambda: [diagnostics._NOISE]),
    ("docs/logs.md", "ask for | above {};", lambda: [diagnostics._NOISE]),
    ("docs/logs.md", "is over | below {} and nothing moves", lambda: [diagnostics._SHORT]),
    (
        "docs/logs.md",
        "Above {} without reward: steps follow noise. Below {}: stands still",
        lambda: [diagnostics._FAR, diagnostics._STILL],
    ),
    ("docs/training.md", "a fraction of a rollout ({})", lambda: [default("max_reward_failures")]),
    ("docs/grpo.md", "| `beta` | other default | {}; 0 in TRL", lambda: [default("beta")]),
    ("docs/grpo.md", "`num_iterations` = {} times the passes", lambda: [default("num_iterations")]),
    ("docs/processes.md", "of at most {} GiB", lambda: [base.LARGEST_COPY / 2**30]),
    ("docs/processes.md", "interrupted for {} seconds is ended", lambda: [lifelines._END]),
    (
        "docs/tasks.md",
        "ended after {} seconds (`seconds=`) or at {} GiB beyond",
        lambda: [math_task.SECONDS, math_task.MEMORY / 2**30],
    ),
    (
        "docs/security.md",
        "{} s and {} GiB, in processes that are ended",
        lambda: [math_task.SECONDS, math_task.MEMORY / 2**30],
    ),
    ("docs/tasks.md", "| {} `answer` + {} `correct` |", lambda: [w for w in TASKS["countdown"].reward_weights if w]),
    ("docs/tasks.md", "| {} `format` + {} `answer` + {} `correct` |", lambda: TASKS["gsm8k"].reward_weights),
    (
        "docs/tasks.md",
        "lighteval | {} `format` + {} `correct` |",
        lambda: [w for w in TASKS["math"].reward_weights if w],
    ),
    ("docs/derive.md", "within {} units in the last place", lambda: [max(test_elementary.ULP.values())]),
    ("docs/operations/index.md", "256 MiB or {} of the card's memory", lambda: [_rows._SHARE_OF_CARD]),
    ("docs/performance.md", "on a GPU {} of its memory", lambda: [_rows._SHARE_OF_CARD]),
    ("docs/tuning.md", "on a GPU {} of its memory", lambda: [_rows._SHARE_OF_CARD]),
    ("benchmarks/README.md", "takes less than {} s runs once untimed", lambda: [harness.SHORT]),
    (
        "benchmarks/README.md",
        "first call is not done after {} seconds, {} if it compiles",
        lambda: [harness.SLOW, harness.COMPILES],
    ),
]
# Passages whose numbers are no measurements of ours, by why that is.
STATED = {
    "of other people or packages, which are named there": [
        ("experiments/README.md", "publishes an ESS of 0.951 to 0.971 and a KL(p_u, p*) of 0.014 to 0.025"),
        ("experiments/README.md", "an ESS of 0.9644 and a TV of 0.0799, at best 0.9713 and 0.0748"),
        (
            "experiments/README.md",
            "publishes an ESS of 0.962, 0.933 and 0.981 for Ising lattices without a field at beta 0.28, 0.4407 "
            "and 0.6",
        ),
        (
            "experiments/README.md",
            "of 0.983, 0.875 and 0.933 for Potts lattices of three colours at 0.5, 1.005 and 1.2",
        ),
        ("experiments/README.md", "or 50,000 with 256, that is 1.28 million calls each"),
        ("experiments/README.md", "Dirichlet-multinomial, 0.5 | 0.0149, 20,889,600, K = 16; K = 1 and 4 diverged"),
        ("experiments/README.md", "J / tau = 0.5 | 0.0617, 168,960,000, K = 32; K = 16 diverged"),
        ("experiments/README.md", "0.0829, 20,889,600, K = 16 |"),
        ("docs/samplers.md", "Published are a Sinkhorn cost of 0.10 for NAAS and of 0.32 for Adjoint Sampling"),
        ("docs/samplers.md", "so that 0.10 is below"),
        ("docs/samplers.md", "Published for the best learner is 0.43"),
        ("docs/samplers.md", "at an epsilon of 0.05 times the mean squared distance"),
        ("docs/install.md", "lm-eval, 200 MB of packages for metrics"),
        ("docs/recipes.md", "it brings 200 MB of packages for metrics of other tasks"),
        ("docs/tasks.md", "0.1 the right numbers only, 0 | d1's paper, appendix; its code gives 0.1 to anything"),
        ("docs/tasks.md", "0.5 a number, 0.5 in tags or a box | d1, "),
        ("docs/tasks.md", "2 correct, 0.5 in tags or a box | d1"),
        ("docs/porting.md", 'TRL\'s 0.04 under `scale_rewards="group"` corresponds to about 0.04 s'),
        ("docs/grpo.md", "5e-5, of transformers; 1e-6 in TRL"),
        ("docs/models.md", "`is_torch_fx_available`; of 2.1 KeyError"),
        ("docs/models.md", "Before 4.56 the argument `dtype`"),
        ("benchmarks/README.md", "989 TFLOP/s, 3.35 TB/s and NVLink of 450 GB/s one way as in NVIDIA's data sheet"),
    ],
    "a setting of what was measured, or of what may be": [
        ("README.md", "written as a plus with a probability of 0.6"),
        ("docs/rewards.md", "with a probability of 0.4 at each sign"),
        ("experiments/README.md", "of width 96, with the learning rate 5e-3"),
        ("experiments/README.md", "[256,000 calls](results/epyc-avx2-2-cores/potts-1.005-256000.json)"),
        ("experiments/README.md", "[Ising, 0.28](results/epyc-avx2-2-cores/ising-0.28-256000-centred.json)"),
        ("experiments/README.md", "[0.4407](results/epyc-avx2-2-cores/ising-0.4407-128000.json)"),
        ("experiments/README.md", "[0.6](results/epyc-avx2-2-cores/ising-0.6-128000.json), [8 x 8, 0.28]("),
        ("experiments/README.md", "[0.4407](results/epyc-avx2-2-cores/ising-8-0.4407.json)"),
        ("experiments/README.md", "[at 0.4407](results/epyc-avx512-2-cores/ising-0.4407-uniform.json)"),
        ("experiments/README.md", "deviation 2 far from the base, 0.3 where it says perturbed"),
        ("docs/choosing.md", "steps of `max_tilt` / `beta` of 10 nats and more"),
        ("docs/learning.md", "`max_tilt / beta` = 10 nats or more"),
        ("docs/porting.md", "| `temperature` | the same | 1.0: of model and base alike"),
        ("docs/recipes.md", "an interval of 95%: Wilson's where every row has 0 or 1, else 1.96 standard errors"),
        ("docs/tasks.md", "digits of other scripts, code, NUL, 10 MB)"),
    ],
    "how something is measured": [
        ("benchmarks/README.md", "After 450 seconds (`--budget`) it begins nothing more"),
        ("benchmarks/README.md", "a call shorter than 20 ms runs once untimed first"),
        ("benchmarks/README.md", "Of calls shorter than 2 ms three more figures"),
        ("benchmarks/README.md", "a copy of 4 GiB, counting bytes read and bytes written"),
        ("benchmarks/README.md", "its memory against measured ones, within a factor of 1.5"),
        ("docs/bench.md", "A function is called 16 times at most"),
    ],
    "what a calculation assumes or says, which is called one": [
        ("benchmarks/README.md", "what fits 8 x 80 GB: a calculation"),
        ("benchmarks/README.md", "work memory of 1 GiB"),
        ("benchmarks/README.md", "of these 60%, 80% and 80% are taken for reached"),
        ("benchmarks/README.md", "3.5 MiB beside 0.3 at 8 ranks"),
        ("benchmarks/README.md", "8 GPUs of 80 GB, 90% of it for what is counted"),
        ("docs/models.md", "1 GB each at V = 128k and D = 4096"),
        ("docs/models.md", "100 kB at T = 4,096"),
        ("docs/operations/index.md", "so 128 MiB / 4 V rows unless set"),
        ("docs/operations/jump.md", "in float32 that is 32 MB to read"),
        ("docs/tuning.md", "Logits of 8 MB stay in a CPU's cache, and its figures are not those of 300 MB"),
    ],
    "a bound, an aim, or what would be well": [
        ("README.md", "so the second row cannot reach 100%"),
        ("docs/logs.md", "better above 0.3"),
        ("docs/logs.md", "| below 0.1 or so | one trajectory outweighs its group"),
        ("docs/logs.md", "with which it is above 1 | 1 to 1.3 |"),
        ("docs/operations/backward_kolmogorov.md", "in [1e-12, 0.1]"),
        ("docs/operations/index.md", "(32 MiB, in [kernels/configs.py]"),
        ("docs/performance.md", "The aim of 1.08 of the matmuls is not met"),
        ("docs/processes.md", "a machine that is gone, after 25 seconds"),
        ("docs/tuning.md", "On a CPU pieces of 1 MiB and more are kept"),
        ("docs/troubleshooting.md", "| `reward` flat, `kl_path` 0.00 |"),
        ("docs/troubleshooting.md", "| base at 0% |"),
    ],
    "an example of what is read, or a product with nothing": [
        ("docs/tasks.md", "1,234, 1{,}234, 18.00, 18 1/2"),
        ("docs/tasks.md", "so 50% is 50."),
        ("docs/tasks.md", "2 hours 30 minutes"),
        ("docs/tasks.md", "so that 18.00 is not 18 there"),
        ("docs/tasks.md", "0.333333 is \\frac{1}{3}, 0.33 is not; 50\\% is 50 and 0.5;"),
        ("docs/adding_an_operation.md", "0 times -inf"),
    ],
}


def default(name):
    """Of an argument of DAMConfig."""
    (field,) = [field for field in dataclasses.fields(DAMConfig) if field.name == name]
    return field.default


def rows_of(page, heads):
    """Where tables of a page stand in its text, by the first lines of their heads."""
    text, lines = text_of(page), text_of(page).splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for first in heads:
        last = first
        while last < len(lines) and lines[last].startswith("|"):
            last += 1
        yield starts[first], starts[last] if last < len(lines) else len(text)


def compared_tables(page):
    """Lines at which tables begin that a test compares, from 0."""
    text = text_of(page)
    lines = text.splitlines()
    yield from (n for n, line in enumerate(lines) for table in test_tables.MAPPING if line.startswith(table["header"]))
    runs = [test_figures.table_with(*heads) for heads in test_figures.OF_RUNS]
    studies = [*test_figures.FIGURES, *test_figures.OF_LEARNERS, *runs]
    yield from (table.line - 1 for table in studies if table.page == page)
    printed = [
        tables.every_case(tables.RESULTS / test_tables.CPU),
        tables.shared_vocabulary(tables.RESULTS / test_tables.XEON / "scale.json", 32766),
        *test_tables.of_flows(),
        *(samplers.text_of(tables._load(tables.RESULTS / file)) for _, file in test_tables.SAMPLERS),
        *(part for part in calculation.text().split("\n\n") if part.startswith("|")),
    ]
    yield from (text.count("\n", 0, text.index(table)) for table in printed if table in text)


@cache
def asked(page):
    """What looks like a measurement in a page, and no test compares."""
    compared = list(rows_of(page, compared_tables(page)))
    for of, passage, _ in (*test_figures.SENTENCES, *test_tables.SENTENCES, *OF_CODE):
        if of in (page, None):
            compared += [match.span() for name, match in measurements.matches(of, passage) if name == page]
    return outside(found(page, text_of(page)), compared)


def stated(page):
    """Spans of the text of a page whose numbers are said to be something else."""
    for passages in STATED.values():
        for of, passage in passages:
            if of == page:
                yield from (match.span() for _, match in measurements.matches(page, passage))


@pytest.mark.parametrize("page", READ)
def test_every_measurement_is_compared_or_said_to_be_none(page):
    left = outside(asked(page), stated(page))
    assert not left, (
        "figures that no test compares: put the sentence into SENTENCES of test_figures.py or test_tables.py, the "
        f"table into tables.json, or take them away. {'; '.join(map(str, left))}"
    )


@pytest.mark.parametrize(("page", "passage", "values"), OF_CODE, ids=[p[:40] for _, p, _ in OF_CODE])
def test_what_the_code_holds_to_is_what_pages_say(page, passage, values):
    assert not list(measurements.differences(page, passage, values()))


@pytest.mark.parametrize(("page", "passage"), [pair for pairs in STATED.values() for pair in pairs])
def test_what_is_said_to_be_none_is_there_and_would_be_asked_for(page, passage):
    spans = [match.span() for _, match in measurements.matches(page, passage)]
    assert spans, f"{page} has it no more: take it off the list"
    assert len(outside(asked(page), spans)) < len(asked(page)), "no test would ask for it: take it off the list"


# ---- the finder itself

INVENTED = (
    "`jump` takes 0.37 ms.",
    "It takes 12 minutes.",
    "They are 3.1 times\nas fast.",
    "dam is 8x faster.",
    "Of the puzzles 97% are solved.",
    "The ESS is .951 there.",
    "Its KL is 3.2e-05.",
    "Memory is 14 GiB.",
    "It came there in 51,200 reward calls.",
    "The base is a hundred times as slow.",
    "100 samples are worth 93 with it.",
    "That is a factor of 12.",
    "- an item with 1.7 nats",
    "| what | figure |\n| --- | --- |\n| `jump` | 0.5 |",
)
NONE = (
    "See Prop. 2.3 and arXiv 2602.07132.",
    "torch 2.13 and transformers 4.49 or newer, LLaDA 2.0, compute capability 8.0.",
    "91 x 91 points, K = 16 of 64, T = 1,024 at V = 126,464.",
    "At beta 0.28 and `max_tilt` 0.2 it is below 1e-3.",
    "It has `0.5 ms` in code, a [link](https://example.org/0.5%20ms) and <!-- 0.5 ms -->.",
    "```text\n0.5 ms\n```",
)


@pytest.mark.parametrize("page", READ)
def test_invented_figures_are_found_in_every_page(page):
    """Behind what stands there, each in a paragraph of its own."""
    text = text_of(page)
    before, now = list(found(page, text)), list(found(page, "\n\n".join((text, "## More", *INVENTED, ""))))
    assert now[: len(before)] == before and len(now) == len(before) + len(INVENTED)


@pytest.mark.parametrize("text", NONE)
def test_names_settings_and_code_are_no_measurements(text):
    assert not list(found("page", text))


def test_a_figure_beside_one_that_is_compared_is_not_taken_for_it():
    text, passage = text_of("README.md"), "goes on to {} of harder ones"
    ((start, end),) = (match.span() for _, match in measurements.matches("README.md", passage))
    longer = f"{text[:end]}, and 97.2% of the hardest{text[end:]}"
    assert "97.2%" in [one.text for one in outside(found("README.md", longer), [(start, end)])]
