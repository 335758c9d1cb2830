"""benchmarks.scale: what is calculated is what is counted and measured at small sizes, and is called a calculation."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dam.benchmarks import calculation, scale
from dam.benchmarks.calculation import HEADS, NUMBERS, WAYS, Machines, MiB, Model, Rates, Size, cost, wire_bytes

PAGE = Path(scale.__file__).parent / "README.md"
# Of what is held at the peak: the calculation leaves out small arrays, and what a call holds for a moment.
FACTOR = 1.5


def test_counted_bytes_and_measured_memory_are_the_calculated_ones(monkeypatch):
    """Two processes: bytes exactly, of every collective; memory of each rank within `FACTOR`; the ways agree."""
    monkeypatch.setenv("DAM_WORKSPACE_MB", "4")
    job = {"ops": list(scale.OPS), "rows": [256], "vocabulary": [16384], "hidden": 64, "repeats": 1}
    found = scale.joined(2, scale.start(2, job), job)
    assert [(r["op"], r["way"]) for r in found] == [
        (op, way) for op in scale.OPS for way in (WAYS if scale.takes_group(op) else WAYS[1:])
    ]
    states, head, target = scale.inputs(256, 16384, 64, rank=0, size=1)
    states.requires_grad_()
    chosen = (states @ head.t()).log_softmax(dim=1).gather(1, target)
    gradients = {
        "linear_log_prob": torch.autograd.grad(chosen.sum(), states, retain_graph=True)[0],
        "linear_matching_loss": torch.autograd.grad((torch.linspace(0.5, 1.5, 256)[:, None] * chosen).mean(), states)[
            0
        ],
    }
    for record in found:
        name = record["op"], record["way"]
        assert record["wire bytes"] == record["calculated"]["wire bytes"] > 0, name
        ratio = record["peak bytes"] / record["calculated"]["held bytes"]
        assert 1 / FACTOR < ratio < FACTOR, (name, ratio)
        trained = record["op"] in gradients
        if record["way"] == "dam":  # one collective each way
            assert len(record["collectives"]) == 1 + trained, name
        if trained:
            size = float(torch.linalg.vector_norm(gradients[record["op"]].double()))
            assert record["size of the result"] == pytest.approx(size, rel=1e-4), name


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_collective_whose_bytes_are_not_known_is_not_passed_over(alone):
    with scale.Wire() as wire:
        dist.barrier()
        dist.all_reduce(torch.ones(4))
        with pytest.raises(ValueError, match="bytes of the collective broadcast_ are not known"):
            dist.broadcast(torch.ones(4), 0)
    assert wire.seen == [("allreduce_", 0.0)]


def test_the_table_says_what_is_calculated():
    job = {"hidden": 64}
    of_rank = {
        "rates": Rates(1e9, 1e9, 1e9, 1e-5)._asdict(),
        "cases": [
            {
                "op": "linear_jump",
                "rows": 8,
                "vocabulary": 64,
                "ways": {
                    way: {"collectives": [["a", 1.0]], "peak bytes": MiB, "seconds": times, "size of the result": 1.0}
                    for way, times in (("dam", [0.1, 0.3, 0.2]), ("gathered logits", [0.4, 0.4, 0.1]))
                },
            }
        ],
    }
    slow = {**of_rank, "cases": [{**of_rank["cases"][0]}]}
    found = scale.joined(2, [of_rank, slow], job)
    assert [record["seconds"] for record in found] == [0.2, 0.4]
    assert [record["of dam's time"] for record in found] == [1.0, 2.0]
    head, _, *rows = scale.table(found).splitlines()
    assert "calculated: wire, memory, ms" in head and len(rows) == 2 and "| 2.00 |" in rows[1]


# The calculation by itself


@pytest.mark.parametrize("op", list(NUMBERS))
def test_what_dam_gives_in_the_forward_pass_depends_on_neither_v_nor_d(op):
    first, *others = (
        cost("dam", op, Size(rows=1000, vocabulary=v, hidden=d, ranks=8)).messages[0]
        for v, d in ((2**15, 512), (2**15, 8192), (2**20, 512))
    )
    assert all(other == first for other in others) and first.kind == "all-gather"
    of = [cost("gathered logits", op, Size(1000, v, 512, 8)).messages[0].nbytes for v in (2**15, 2**20)]
    assert of[1] == 32 * of[0]


def test_time_is_work_over_rates_and_collectives_by_rings():
    size = Size(rows=1000, vocabulary=4000, hidden=500, ranks=4)
    slow_link = Rates(flops=math.inf, memory=math.inf, link=1e6, latency=0.01)
    of = cost("vocabulary-parallel in torch", "linear_log_prob", size)
    # 4,000 bytes three times and [1000, 500] in float32 once, each 1.5 times in 6 steps.
    expected = 1.5 * (3 * 4000 + 4 * 500_000) / 1e6 + 4 * 6 * 0.01
    assert calculation.seconds(of, size, slow_link) == pytest.approx(expected)
    slow_product = Rates(flops=1e9, memory=math.inf, link=math.inf, latency=0.0)
    assert calculation.seconds(of, size, slow_product) == pytest.approx(3 * 2 * 1000 * 1000 * 500 / 1e9)
    with pytest.raises(ValueError, match="no way 'by hand'; there are dam, vocabulary-parallel"):
        cost("by hand", "linear_jump", size)


def test_work_memory_bounds_what_dam_holds_and_nothing_bounds_the_others():
    rows, vocabulary = 4096, 2**17
    held = {way: cost(way, "linear_jump", Size(rows, vocabulary, 64, 2), workspace=MiB).held for way in WAYS}
    logits = 4 * rows * vocabulary
    assert held["dam"] < 4 * MiB < logits / 2 < held["vocabulary-parallel in torch"] < held["gathered logits"]


@pytest.mark.parametrize("head", HEADS)
def test_the_largest_model_and_vocabulary_fit_and_larger_ones_do_not(head):
    machines = Machines()
    model = calculation.largest_model(16384, 131072, head, machines)
    larger = Model(model.layers * 1.01, round(128 * model.layers * 1.01), model.vocabulary)
    assert calculation.fits(model._replace(layers=model.layers * 0.999), 16384, head, machines)
    assert not calculation.fits(larger, 16384, head, machines)
    llada = Model(32, 4096, 0)
    most = calculation.largest_vocabulary(llada, 16384, head, machines)
    assert calculation.fits(llada._replace(vocabulary=int(0.99 * most)), 16384, head, machines)
    assert not calculation.fits(llada._replace(vocabulary=int(1.01 * most)), 16384, head, machines)


def test_what_fits_is_the_sum_that_is_stated():
    """LLaDA-8B's size by hand: 8.0 B parameters, 4,096 tokens, eight GPUs."""
    model, tokens = Model(32, 4096, 126464), 4096
    assert model.parameters == pytest.approx(32 * 12 * 4096**2 + 2 * 126464 * 4096) and 7e9 < model.parameters < 8e9
    state, checkpoints = 16 * model.parameters / 8, 2 * tokens * 4096 * 32
    logits = 6 * 126464 * 4096 + 10 * tokens * 126464
    assert calculation.needed(model, tokens, "logits", Machines()) == pytest.approx(state + checkpoints + logits)
    dam_s = 6 * 126464 * 4096 + 1e9 + 4 * tokens * 4096
    assert calculation.needed(model, tokens, "dam", Machines()) == pytest.approx(state + checkpoints + dam_s)
    # A model whose peak is that of its layers needs the same with every head.
    small = Model(1, 8192, 128)
    assert len({calculation.needed(small, 64, head, Machines(), workspace=0) for head in HEADS}) == 1


def test_nothing_fits_where_the_logits_alone_are_too_many():
    machines = Machines()
    assert calculation.largest_model(10**6, 131072, "logits", machines) is None
    assert calculation.largest_vocabulary(Model(32, 4096, 0), 10**7, "logits", machines) == 0


def test_every_figure_says_that_it_is_calculated_and_stands_in_the_readme(capsys):
    for row in (row for table in calculation.tables() for row in table):
        assert row["calculated"] == calculation.TITLE
    scale.main(["--calculate"])
    shown = capsys.readouterr().out
    tables = [block for block in shown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all("calculated" in table.splitlines()[0] for table in tables)
    page = PAGE.read_text(encoding="utf-8")
    for table in tables:
        assert table.strip() in page


def test_wire_bytes_of_one_rank_are_none():
    for way in WAYS:
        for op in NUMBERS:
            assert sum(wire_bytes(m, 1) for m in cost(way, op, Size(8, 64, 16, 1)).messages) == 0
