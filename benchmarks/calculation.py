"""A calculation, not a measurement: bytes on the wire, time and memory of a vocabulary that ranks share, and what fits.

Nothing here was timed. Rates are stated (`H100`, or those that `benchmarks.scale` finds on the machine at hand); what
moves and what is held is counted by formula. tests/test_scale.py holds the bytes on the wire against counted ones,
exactly, and the memory against measured ones, at small sizes; `benchmarks.scale` prints the calculated time beside the
measured one.

What every figure takes for granted:

* products, passes over memory and collectives follow one another; none runs beside another;
* a product of [T, D] and [D, V_r] takes 2 T D V_r / flops, or what reading its operands takes, if that is more;
* collectives are rings: an all-gather of m bytes from each rank brings (R - 1) m to each, in R - 1 steps; an all-reduce
  of m bytes sends 2 (R - 1) / R m, in 2 (R - 1) steps; a step costs the latency besides. NCCL has trees for short
  messages, with fewer steps: these are what a ring takes;
* one rate for all links of a ring, that of the slowest: beyond a node that of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

MiB, GiB = 2**20, 2**30


class Rates(NamedTuple):
    """What a rank does."""

    flops: float  # of products, a second
    memory: float  # bytes read or written, a second
    link: float  # bytes that it gets from its neighbour in a ring, a second
    latency: float  # seconds of a step of a ring


# Of NVIDIA's data sheets: 989 TFLOP/s of bfloat16 without sparsity, 3.35 TB/s, NVLink 900 GB/s both ways together; a
# network of 400 Gb/s a GPU. Assumed: 60%, 80% and 80% of them, and the latencies.
H100 = Rates(flops=0.6 * 989e12, memory=0.8 * 3.35e12, link=0.8 * 450e9, latency=3e-6)
H100_NETWORK = H100._replace(link=0.8 * 50e9, latency=1e-5)
NODE = 8  # GPUs that NVLink joins


class Size(NamedTuple):
    """Of a call."""

    rows: int  # T
    vocabulary: int  # V, shared evenly
    hidden: int  # D
    ranks: int  # R
    slots: int = 1  # J targets of a row, or samples
    item: int = 4  # bytes of a number of hidden states and head

    @property
    def columns(self) -> int:
        return -(-self.vocabulary // self.ranks)  # the most that a rank has


class Message(NamedTuple):
    """A collective: what each rank gives."""

    kind: str  # "all-gather" or "all-reduce"
    nbytes: int


def wire_bytes(message: Message, ranks: int) -> float:
    """Bytes that a rank gets from the others."""
    if message.kind == "all-gather":
        return (ranks - 1) * message.nbytes
    return 2 * (ranks - 1) / ranks * message.nbytes


def seconds_of(message: Message, ranks: int, rates: Rates) -> float:
    steps = (ranks - 1) * (1 if message.kind == "all-gather" else 2)
    return wire_bytes(message, ranks) / rates.link + steps * rates.latency


class Cost(NamedTuple):
    """Of a call on each rank, beside hidden states and head, which are there."""

    messages: tuple[Message, ...]
    products: int  # of [T, D] and [D, V_r], or of the same size
    moved: float  # bytes read or written, beside the products' operands
    head_reads: int  # times that the head's rows are read
    held: float  # bytes, at the peak, results included


def seconds(cost: Cost, size: Size, rates: Rates) -> float:
    """Of a call, by the assumptions above."""
    multiplied = 2.0 * size.rows * size.columns * size.hidden * cost.products / rates.flops
    read = cost.head_reads * size.columns * size.hidden * size.item / rates.memory
    wire = sum(seconds_of(message, size.ranks, rates) for message in cost.messages)
    return max(multiplied, read) + cost.moved / rates.memory + wire


# Of dam's exchange: numbers of 8 bytes, a header and so many of each row (dam.ops._group).
HEADER = 61
NUMBERS: dict[str, Callable[[int], int]] = {
    "linear_log_prob": lambda slots: 1 + slots,  # log escape rate, logits of the targets
    "linear_matching_loss": lambda slots: 3 + slots,  # and two of the base's
    "linear_jump": lambda samples: 1 + 12 * samples,  # log escape rate, three candidates of four numbers
}
WAYS = ("dam", "vocabulary-parallel in torch", "gathered logits")


def cost(way: str, op: str, size: Size, *, workspace: int = 256 * MiB) -> Cost:
    """What a way costs: for linear_jump, or for another op with its backward pass, head trained.

    Args:
        way: "dam", with group=; "vocabulary-parallel in torch", logits [T, V_r] on each rank and three all-reduces, as
            Megatron's cross-entropy; "gathered logits", all-gathered to [T, V] on each rank.
        op: of `NUMBERS`, without a base.
        size: of the call.
        workspace: bytes of dam's work memory, DAM_WORKSPACE_MB.
    """
    rows, columns, hidden, slots = size.rows, size.columns, size.hidden, size.slots
    here, whole = 4.0 * rows * columns, 4.0 * rows * columns * size.ranks  # logits in float32
    trained = op != "linear_jump"
    states, weights = 4 * rows * hidden, columns * hidden
    # Gradients: of hidden states in float32, which the ranks sum, of the head in its dtype.
    results = (states + weights * size.item if trained else 0) + 16 * rows * slots
    summed = (Message("all-reduce", states),) if trained else ()
    if way == "dam":
        words = HEADER + rows * NUMBERS[op](slots)
        at_once = min(here, workspace / 2)  # dam.ops._rows.chunks: half, as other arrays come to these
        chunks = max(1, math.ceil(here / at_once))
        passes = 2 if trained else 1  # the backward pass computes the logits again
        exchanged = 8.0 * words * (size.ranks + 1)
        # With two numbers by which a rank tells a call's backward pass from others.
        summed = (Message("all-reduce", states + 8),) if trained else ()
        return Cost(
            (Message("all-gather", 8 * words), *summed),
            products=4 if trained else 1,
            moved=passes * 2 * here + (2 * here if trained else 0),
            head_reads=passes * chunks,
            held=at_once + exchanged + results,
        )
    if way == "vocabulary-parallel in torch":
        if trained:
            reduced = (Message("all-reduce", 4 * rows),) * 2 + (Message("all-reduce", 4 * rows * slots),)
            # Logits; less the largest; exponentials; and their gradient.
            return Cost(
                (*reduced, *summed), products=3, moved=8 * here, head_reads=3, held=max(2 * here, here + results)
            )
        gathered = (Message("all-gather", 16 * rows * slots), Message("all-gather", 8 * rows))
        return Cost(gathered, products=1, moved=6 * here, head_reads=1, held=(1 + 2 * slots) * here + results)
    if way == "gathered logits":
        gathered = (Message("all-gather", 4 * rows * columns),)
        held = (3 if trained else 1 + 2 * slots) * whole
        if trained:
            # Of ranks and side by side; their log-softmax; its gradient and that of the logits.
            held = max(held, here + results)
            return Cost((*gathered, *summed), products=3, moved=here + 8 * whole, head_reads=3, held=held)
        return Cost(gathered, products=1, moved=here + 6 * whole, head_reads=1, held=held)
    raise ValueError(f"no way {way!r}; there are {', '.join(WAYS)}")


# What fits


class Machines(NamedTuple):
    """GPUs that train one model under FSDP2 or ZeRO-3."""

    count: int = 8
    nbytes: float = 80e9  # each
    left: float = 0.9  # of it, for what is counted here: the rest is the CUDA context, NCCL's buffers and fragments


class Model(NamedTuple):
    """A transformer of equal layers, its output layer apart from its embedding, all of it trained by Adam."""

    layers: float
    hidden: int
    vocabulary: int

    @property
    def of_layer(self) -> float:
        """Parameters of a layer: attention's four matrices and a gated MLP of 8/3 D."""
        return 12.0 * self.hidden**2

    @property
    def of_head(self) -> float:
        return float(self.vocabulary) * self.hidden

    @property
    def parameters(self) -> float:
        return self.layers * self.of_layer + 2 * self.of_head


HEADS = ("logits", "dam", "dam, group")
ADAM = (
    16  # bytes a parameter: float32 weight, its gradient, and Adam's two, as FSDP2 has them with MixedPrecisionPolicy
)
# Bytes a token and hidden number that a layer's backward pass holds with fused attention: of Korthikanti et al., arXiv
# 2205.05198, Eq. 1, without the attention scores.
LAYER_ACTIVATIONS = 34


def needed(model: Model, tokens: int, head: str, machines: Machines, *, workspace: float | None = None) -> float:
    """Bytes that each GPU holds at the peak of a training step of `tokens` tokens a GPU, all of them scored.

        parameters, gradients, Adam     16 P / N, divided evenly
        a unit gathered                 bfloat16 weights of two layers (one is fetched ahead), and a layer's gradient in
                                        float32; or the head's weights, and their gradient in float32
        checkpoints                     2 T D for each layer, and 34 T D for the one that is computed again
        the head's rows, "logits"       [T, V]: bfloat16, in float32, and the gradient in float32: 10 T V
                     "dam"              work memory, 1.25% of the GPU's unless given; gradient of hidden states 4 T D
                     "dam, group"       the same, rows of all GPUs: hidden states and their gradient 6 N T D; the head's
                                        part in place of the gathered head

    The peak is that of the layers or of the head, whichever is more.
    """
    gpus, hidden = machines.count, model.hidden
    state = ADAM * model.parameters / gpus
    checkpoints = 2.0 * tokens * hidden * model.layers
    of_layers = (2 * 2 + 4) * model.of_layer + LAYER_ACTIVATIONS * tokens * hidden
    gathered = (2 + 4) * model.of_head
    work = 0.0125 * machines.nbytes if workspace is None else workspace
    of_head = {
        "logits": gathered + 10.0 * tokens * model.vocabulary,
        "dam": gathered + work + 4.0 * tokens * hidden,
        "dam, group": gathered / gpus + work + 6.0 * gpus * tokens * hidden,
    }[head]
    return state + checkpoints + max(of_layers, of_head)


def fits(model: Model, tokens: int, head: str, machines: Machines) -> bool:
    return needed(model, tokens, head, machines) <= machines.left * machines.nbytes


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """The largest number up to `most` that holds, of what holds for all smaller ones; 0 where none from 1 on does."""
    low, high = 0.0, most
    if not holds(1.0):
        return 0.0
    while high - low > max(1e-3, 1e-6 * high):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(max(1.0, middle)) else (low, middle)
    return low


def largest_model(tokens: int, vocabulary: int, head: str, machines: Machines) -> Model | None:
    """Of models as deep as D / 128 layers, as Llama's are, the largest that fits; None where none of a layer does."""

    def model(layers: float) -> Model:
        return Model(layers, round(128 * layers), vocabulary)

    layers = _largest(lambda n: fits(model(n), tokens, head, machines), 1e3)
    return model(layers) if layers else None


def largest_vocabulary(model: Model, tokens: int, head: str, machines: Machines) -> int:
    """V that fits with the layers of a model; 0 where nothing does."""
    return int(_largest(lambda v: fits(model._replace(vocabulary=int(v)), tokens, head, machines), 1e9))


# Tables

TITLE = "A calculation, not a measurement"


def of_ranks(rows: int, vocabulary: int, hidden: int, ranks: tuple[int, ...]) -> list[dict[str, float | str | int]]:
    """For each number of GPUs and each way: bytes on the wire, seconds and bytes held, calculated."""
    found: list[dict[str, float | str | int]] = []
    for count in ranks:
        rates, size = (H100 if count <= NODE else H100_NETWORK), Size(rows, vocabulary, hidden, count, item=2)
        for op in ("linear_matching_loss", "linear_jump"):
            for way in WAYS:
                of = cost(way, op, size, workspace=GiB)
                found.append(
                    {
                        "calculated": TITLE,
                        "ranks": count,
                        "op": op,
                        "way": way,
                        "wire bytes": sum(wire_bytes(message, count) for message in of.messages),
                        "wire bytes, forward": wire_bytes(of.messages[0], count)
                        if way != "vocabulary-parallel in torch"
                        else sum(wire_bytes(m, count) for m in of.messages[: 2 if op == "linear_jump" else 3]),
                        "seconds": seconds(of, size, rates),
                        "held bytes": of.held,
                    }
                )
    return found


def of_machines(machines: Machines, tokens: tuple[int, ...], vocabulary: int) -> list[dict[str, float | str | int]]:
    """The largest model, and the largest vocabulary of LLaDA-8B's layers, that fit, calculated."""
    found: list[dict[str, float | str | int]] = []
    for count in tokens:
        for head in HEADS:
            model = largest_model(count, vocabulary, head, machines)
            found.append(
                {
                    "calculated": TITLE,
                    "tokens": count,
                    "head": head,
                    "parameters": 0.0 if model is None else model.parameters,
                    "largest vocabulary": largest_vocabulary(Model(32, 4096, vocabulary), count, head, machines),
                }
            )
    return found


def tables() -> tuple[list[dict[str, float | str | int]], list[dict[str, float | str | int]]]:
    """Both, at the sizes that benchmarks/README.md shows."""
    ranks = of_ranks(16384, 131072, 4096, (8, 64, 256, 1024))
    return ranks, of_machines(Machines(), (4096, 16384, 65536), 131072)


def text() -> str:
    """The tables, for a terminal; their headings say what is calculated."""
    ranks, machines = tables()
    lines = [f"{TITLE}: 16,384 rows, V = 131,072, D = 4096, bfloat16; rates of an H100 as stated in", __name__, ""]
    lines += ["| GPUs | op | way | on the wire, forward | and backward | calculated time | calculated memory |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in ranks:
        forward, wire = float(row["wire bytes, forward"]), float(row["wire bytes"])
        held, took = float(row["held bytes"]) / GiB, 1e3 * float(row["seconds"])
        wires = f"{forward / MiB:,.1f} MiB | {(wire - forward) / MiB:,.1f} MiB"
        lines.append(f"| {row['ranks']} | {row['op']} | {row['way']} | {wires} | {took:,.2f} ms | {held:,.2f} GiB |")
    lines += ["", f"{TITLE}: what fits 8 x 80 GB, V = 131,072; and V of LLaDA-8B's layers", ""]
    lines += [
        "| tokens a GPU | head | largest model, calculated | largest V, calculated |",
        "| --- | --- | --- | --- |",
    ]
    for row in machines:
        parameters, vocabulary = float(row["parameters"]), int(row["largest vocabulary"])
        model = f"{parameters / 1e9:.1f} B" if parameters else "none"
        lines.append(f"| {row['tokens']:,} | {row['head']} | {model} | {f'{vocabulary:,}' if vocabulary else 'none'} |")
    return "\n".join(lines)
