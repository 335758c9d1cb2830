"""A vocabulary that ranks share: bytes on the wire, time and peak memory of 1, 2 and 3 processes; and a calculation.

    python -m benchmarks.scale                                  measures, on this machine's CPUs
    python -m benchmarks.scale --ranks 1 2 --vocabulary 32768   ... some of it
    ... --json FILE                                             its figures, and the sizes that they are of
    python -m benchmarks.scale --calculate                      8 to 1,024 GPUs, and what fits 8 x 80 GB: calculated

Each number of ranks is a set of gloo processes of one thread, which start together. Every rank has the same rows and
V / R columns of the head, V rounded down to a multiple of every R. Beside `group=` of dam's operations stand two ways
that are usual: logits [T, V_r] on each rank and all-reduces, as Megatron's cross-entropy has it, and logits that are
gathered to [T, V]. Ways take turns in an order shuffled anew for every repeat; a time is the slowest rank's, from a
barrier on, and medians are reported. Ranks that share a core wait for each other: look at ratios within a row.

`benchmarks.calculation` says what each should cost. What is measured stands beside it, times by the rates that are
found on this machine first (`rates`), which no GPU has anything to do with.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dam
from dam.backends import cpu
from dam.benchmarks import calculation, harness, memory, records, report
from dam.benchmarks.calculation import MiB, Size

OPS = ("linear_log_prob", "linear_jump", "linear_matching_loss")


# What goes over the wire


class Wire(TorchDispatchMode):
    """Counts the collectives that this process makes within it: name and bytes that it gets from the others.

    All of torch.distributed's go through operators of the namespace c10d, under whatever name they are called. An
    all-reduce, by whatever algorithm, sends 2 (R - 1) / R of its bytes at least.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float]] = []

    @property
    def nbytes(self) -> float:
        return sum(nbytes for _, nbytes in self.seen)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            self._count(operator.name().removeprefix("c10d::"), args)
        return operator(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        size, rank = dist.get_world_size(), dist.get_rank()
        if name in ("_allgather_base_", "allgather_"):  # the output first
            nbytes = records.nbytes(harness.tensors(args[0])) * (size - 1) / size
        elif name == "alltoall_base_":  # output, input, group, sizes of both, of the first dimension
            splits = args[4] or [args[1].shape[0] // size] * size
            nbytes = (sum(splits) - splits[rank]) * args[1].nbytes / max(1, args[1].shape[0])
        elif name == "allreduce_":
            nbytes = 2 * (size - 1) / size * records.nbytes(args[0])
        elif name == "barrier":
            return
        else:
            raise ValueError(f"bytes of the collective {name} are not known: add it to benchmarks.scale.Wire")
        self.seen.append((name, nbytes))


# The usual ways


class _Gathered(torch.autograd.Function):
    """Logits [T, V_r] of each rank as [T, V] on all; what comes back are the rank's own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.columns = logits.shape[1]
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, logits)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.columns
        return grads[0][:, first : first + ctx.columns]


class _Summed(torch.autograd.Function):
    """Hidden states, whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad


class _VocabularyParallel(torch.autograd.Function):
    """Log-probabilities [T, J] of targets of the whole vocabulary, of logits [T, V_r]: three all-reduces.

    As the cross-entropy of Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3, has it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        first, columns = dist.get_rank() * logits.shape[1], logits.shape[1]
        high = logits.amax(dim=1)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        shifted = logits - high[:, None]
        here = (target >= first) & (target < first + columns)
        at = (target - first).clamp(0, columns - 1)
        own = torch.where(here, shifted.gather(1, at), 0.0)
        dist.all_reduce(own)
        shares = shifted.exp_()
        total = shares.sum(dim=1)
        dist.all_reduce(total)
        ctx.save_for_backward(shares.div_(total[:, None]), here, at)
        return own - total.log()[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shares, here, at = ctx.saved_tensors
        gradient = shares * -grads[0].sum(dim=1, keepdim=True)
        return gradient.scatter_add_(1, at, torch.where(here, grads[0], 0.0)), None


def log_prob_of(way: str, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities [T, J] by one of the usual ways."""
    logits = (_Summed.apply(hidden) @ head.t()).float()
    if way == "gathered logits":
        return _Gathered.apply(logits).log_softmax(dim=1).gather(1, target)
    return _VocabularyParallel.apply(logits, target)


def drawn_by(way: str, hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [T] by one of the usual ways, of noise from a generator; not those of another number of ranks."""
    logits = (hidden @ head.t()).float()
    first = 0
    if way == "gathered logits":
        logits = _Gathered.apply(logits)
    else:
        first = dist.get_rank() * logits.shape[1]
    noisy = logits - torch.empty_like(logits).exponential_(generator=generator).log_()
    best, token = noisy.max(dim=1)
    if way == "gathered logits":
        return token
    mine = torch.stack((best.double(), (token + first).double()), dim=1)
    all_best = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_best, mine)
    # log of the normaliser, which a path weight needs
    escape = torch.logsumexp(logits, dim=1).double()
    of_all = [torch.empty_like(escape) for _ in all_best]
    dist.all_gather(of_all, escape)
    winner = torch.stack(all_best)
    return winner[..., 1].gather(0, winner[..., 0].argmax(dim=0)[None])[0].long()


# A case


def inputs(rows: int, vocabulary: int, hidden: int, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a rank's rows of the head, and targets: of one seed, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator)
    target = torch.randint(vocabulary, (rows, 1), generator=generator)
    # Row by row the same, and no rank has the whole head: it would count as memory.
    begin, end = rank * vocabulary // size, (rank + 1) * vocabulary // size
    head = torch.empty(end - begin, hidden)
    for first in range(0, vocabulary, 1024):
        block = torch.randn(min(1024, vocabulary - first), hidden, generator=generator)
        low, high = max(first, begin), min(first + len(block), end)
        if low < high:
            head[low - begin : high - begin] = block[low - first : high - first]
    return states, head.mul_(3.0 / hidden**0.5), target


def functions(op: str, rows: int, vocabulary: int, hidden: int) -> dict[str, Callable[[], Any]]:
    """The ways to compute an op; those that are trained with their backward pass, the head's too."""
    states, head, target = inputs(rows, vocabulary, hidden, dist.get_rank(), dist.get_world_size())
    leaves = (states.requires_grad_(), head.requires_grad_()) if op != "linear_jump" else (states, head)
    group, usual = dist.group.WORLD, calculation.WAYS[1:]
    weight = torch.linspace(0.5, 1.5, rows)[:, None]
    by_dam: Any = getattr(dam, op)

    def gradients(loss: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves)

    if op == "linear_jump":
        generator = torch.Generator().manual_seed(1)
        found = {way: lambda way=way: drawn_by(way, states, head, generator) for way in usual}
        dams: Callable[[], Any] = lambda: by_dam(states, head, seed=1, group=group)  # noqa: E731
    elif op == "linear_log_prob":
        found = {way: lambda way=way: gradients(log_prob_of(way, *leaves, target).sum()) for way in usual}
        dams = lambda: gradients(by_dam(*leaves, target, group=group).sum())  # noqa: E731
    else:
        found = {
            way: lambda way=way: gradients(-(weight * log_prob_of(way, *leaves, target)).mean(dim=0).sum())
            for way in usual
        }
        dams = lambda: gradients(by_dam(*leaves, target, weight, group=group))  # noqa: E731
    return {"dam": dams, **found} if takes_group(op) else found


def takes_group(op: str) -> bool:
    """Whether dam's operation is one over a group, in this commit."""
    return "group" in inspect.signature(getattr(dam, op)).parameters


def counted(function: Callable[[], Any]) -> list[tuple[str, float]]:
    """The collectives of a call, the second: in the first ranks may have to find out who has which columns."""
    function()
    with Wire() as wire:
        function()
    return wire.seen


def peak_bytes(function: Callable[[], Any]) -> int:
    """By how much a call grows the resident set, work memory that dam keeps included."""
    dam.release_workspace()
    with memory.Peak() as peak:
        result = function()
    del result
    return peak.grown


def seconds(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Of each way this rank's, from a barrier on; the order is the same on all ranks."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            ways[name]()
            found[name].append(time.perf_counter() - start)
    return found


def rates(repeats: int) -> calculation.Rates:
    """What this machine's ranks do, all at once: a product, a copy, a long all-gather and a short one."""

    def median(function: Callable[[], Any]) -> float:
        function()
        return statistics.median(seconds({"": function}, repeats)[""])

    a, b = torch.randn(512, 512), torch.randn(512, 2048)
    product = torch.empty(512, 2048)
    source, target = torch.randn(8 * MiB), torch.empty(8 * MiB)
    size = dist.get_world_size()
    long, short = ([torch.empty(n) for _ in range(size)] for n in (4 * MiB, 1))
    took = {
        "product": median(lambda: torch.mm(a, b, out=product)),
        "copy": median(lambda: target.copy_(source)),
        "long": median(lambda: dist.all_gather(long, long[0].clone())),
        "short": median(lambda: dist.all_gather(short, short[0].clone())),
    }
    latency = took["short"] / max(1, size - 1)
    return calculation.Rates(
        flops=2.0 * 512 * 512 * 2048 / took["product"],
        memory=2.0 * source.nbytes / took["copy"],
        link=(size - 1) * long[0].nbytes / max(1e-9, took["long"] - took["short"]) if size > 1 else float("inf"),
        latency=latency,
    )


# The ranks


def rank_main(job: dict[str, Any], output: str) -> None:
    """A rank's part of a job: its figures go to a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"rates": rates(job["repeats"])._asdict(), "cases": []}
    for op in job["ops"]:
        for rows in job["rows"]:
            for vocabulary in job["vocabulary"]:
                case: dict[str, Any] = {"op": op, "rows": rows, "vocabulary": vocabulary, "ways": {}}
                ways = functions(op, rows, vocabulary, job["hidden"])
                for name, function in ways.items():
                    dist.barrier()
                    case["ways"][name] = {
                        "collectives": counted(function),
                        "peak bytes": peak_bytes(function),
                        "size of the result": float(torch.linalg.vector_norm(harness.tensors(function())[0].double())),
                    }
                for name, times in seconds(ways, job["repeats"]).items():
                    case["ways"][name]["seconds"] = times
                found["cases"].append(case)
                del ways
    report.write_json(Path(output) / f"{dist.get_rank()}.json", found)
    dist.destroy_process_group()


def start(ranks: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of so many ranks found.

    Raises:
        RuntimeError: one failed; the message has the end of what they wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = subprocess.run(
            [*command, "-m", "benchmarks.scale", "--rank-of", json.dumps(job), folder],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**memory.environment(), "OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            raise RuntimeError(f"{ranks} ranks: {done.stderr[-2000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def joined(ranks: int, found: list[dict[str, Any]], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a job: of all ranks the most bytes, and the time of the slowest; beside what is calculated."""
    mean = calculation.Rates(
        *(statistics.mean(each["rates"][name] for each in found) for name in calculation.Rates._fields)
    )
    result = []
    for n, case in enumerate(found[0]["cases"]):
        size = Size(case["rows"], case["vocabulary"], job["hidden"], ranks)
        medians: dict[str, float] = {}
        for way in case["ways"]:
            of_ranks = [each["cases"][n]["ways"][way] for each in found]
            slowest = [max(times) for times in zip(*(each["seconds"] for each in of_ranks), strict=True)]
            medians[way] = statistics.median(slowest)
            record = {
                "op": case["op"],
                "way": way,
                "ranks": ranks,
                "sizes": {"rows": size.rows, "vocabulary": size.vocabulary, "hidden": size.hidden},
                "collectives": of_ranks[0]["collectives"],
                "wire bytes": max(sum(nbytes for _, nbytes in each["collectives"]) for each in of_ranks),
                "peak bytes": max(each["peak bytes"] for each in of_ranks),
                "seconds": medians[way],
                "size of the result": of_ranks[0]["size of the result"],
            }
            if case["op"] in calculation.NUMBERS:
                workspace = int(os.environ.get("DAM_WORKSPACE_MB", "256")) * MiB
                cost = calculation.cost(way, case["op"], size, workspace=workspace)
                record["calculated"] = {
                    "wire bytes": sum(calculation.wire_bytes(message, ranks) for message in cost.messages),
                    "held bytes": cost.held,
                    "seconds": calculation.seconds(cost, size, mean),
                }
            result.append(record)
        for record in result[-len(medians) :]:
            record["of dam's time"] = record["seconds"] / medians["dam"] if "dam" in medians else None
    return result


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | op | T | V | way | collectives | on the wire | peak memory | ms | of dam's | calculated: "
        "wire, memory, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        of, c = r["of dam's time"], r.get("calculated")
        told = (
            ""
            if c is None
            else (f"{c['wire bytes'] / MiB:.3f} MiB, {c['held bytes'] / MiB:.1f} MiB, {1e3 * c['seconds']:.1f}")
        )
        lines.append(
            f"| {r['ranks']} | {r['op']} | {r['sizes']['rows']} | {r['sizes']['vocabulary']:,} | {r['way']} | "
            f"{len(r['collectives'])} | {r['wire bytes'] / MiB:.3f} MiB | {r['peak bytes'] / MiB:.1f} MiB | "
            f"{1e3 * r['seconds']:.1f} | {'' if of is None else f'{of:.2f}'} | {told} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--rank-of"]:
        rank_main(json.loads(given[1]), given[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calculate", action="store_true", help="print the calculation, measure nothing")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    for name, default in {"ranks": [1, 2, 3], "vocabulary": [8192, 32768, 131072], "rows": [128]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    for name, default in {"hidden": 256, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    if args.calculate:
        print(calculation.text())
        if args.json:
            ranks, machines = calculation.tables()
            report.write_json(args.json, {"calculated": calculation.TITLE, "ranks": ranks, "machines": machines})
        return
    # The usual ways gather equal parts.
    args.vocabulary = [vocabulary - vocabulary % math.lcm(*args.ranks) for vocabulary in args.vocabulary]
    job = {name: getattr(args, name) for name in ("ops", "rows", "vocabulary", "hidden", "repeats")}
    if not all(map(takes_group, args.ops)):
        print("dam's operations here take no group=: the usual ways alone are measured", file=sys.stderr)
    found: list[dict[str, Any]] = []
    measured_rates = {}
    for ranks in args.ranks:
        of_ranks = start(ranks, job)
        measured_rates[str(ranks)] = [each["rates"] for each in of_ranks]
        found += joined(ranks, of_ranks, job)
    print(table(found))
    if args.json:
        machine = {
            "cpu": report.cpu_model(),
            "instruction_set": cpu.isa(),
            "command": ["python", "-m", "benchmarks.scale", *given],
        }
        report.write_json(
            args.json, {**records.versions(), **machine, **job, "rates": measured_rates, "records": found}
        )


if __name__ == "__main__":
    main()
