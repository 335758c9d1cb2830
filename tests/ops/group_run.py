"""One rank of tests/ops/test_group.py: `tests.ranks` starts it with a folder and the name of a function below."""

import contextlib
import functools
import gc
import os
import signal
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dam
from dam.backends import choice
from dam.ops import _group
from tests import ranks
from tests.ops.helpers import integers, normal

WIDTH, RANK = 16, 3  # of hidden states, of an adapter
# Ends of ranks' columns: inside tiles, right behind a tile's end, at one, and several in one tile.
CUTS = {
    2: [(1030, 2300), (1024, 2048), (5, 300), (2049, 2100)],
    3: [(700, 1029, 2300), (3, 7, 300), (1024, 1025, 3072)],
}


def shard(ends, rank):
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def targets_at(ends, rows):
    """Targets [T, 4]: on both sides of each rank's end, the last column, none, and any."""
    columns = ends[-1]
    near = [end + step for end in ends for step in (-1, 0)]
    fixed = torch.tensor([min(v, columns - 1) for v in near] + [0, columns - 1, -1])
    target = integers(-1, columns, rows, 4, seed=3)
    target[:, :3] = fixed[torch.arange(rows * 3) % len(fixed)].view(rows, 3)
    return target


class Inputs:
    """Of a vocabulary, from a seed: the same on every rank."""

    def __init__(self, ends, rows, dtype=torch.float32):
        columns = ends[-1]
        self.hidden, self.base_hidden = (normal(rows, WIDTH, seed=n, dtype=dtype) for n in (0, 1))
        self.head, self.base_head = (normal(columns, WIDTH, seed=n, dtype=dtype, scale=0.4) for n in (2, 3))
        self.bias = normal(columns, seed=4, dtype=dtype)
        self.a, self.b = normal(RANK, WIDTH, seed=5, dtype=dtype), normal(columns, RANK, seed=6, dtype=dtype, scale=0.3)
        self.target = targets_at(ends, rows)
        self.weight = normal(rows, 4, seed=7)
        self.weight[:, 1] = 0.0
        self.base_weight, self.row_scale = normal(rows, seed=8).abs(), normal(rows, seed=9).abs()
        # Weights that add up to nothing on one destination, which the ops over rows make unreachable.
        self.target[1, 2:], self.weight[1, 2:] = ends[-1] - 2, torch.tensor([0.5, -0.5])
        self.base_weight[1] = 0.0
        exclude = integers(-1, columns, rows, seed=10)
        exclude[0] = self.target[0, 0]
        suppress = [0, ends[0], columns - 1, int(self.target[-1, 0].clamp(min=0))]
        mask = torch.zeros(columns, dtype=torch.bool)
        mask[suppress] = True
        self.options = {
            "plain": {},
            "left out": {"exclude": exclude, "suppress": suppress, "temperature": 0.7},
            "mask": {"exclude": 1, "suppress": mask, "temperature": 1.3},
        }


def leaves(inputs, part):
    tensors = (inputs.hidden, inputs.head[part], inputs.bias[part], inputs.a, inputs.b[part])
    return [x.clone().requires_grad_() for x in tensors]


def linear_results(inputs, part, options, adapts, **over):
    """Values and gradients of the linear ops, of a head's rows `part`; values are of all rows on every rank."""
    hidden, head, bias, a, b = leaf = leaves(inputs, part)
    common = {**options, **over}
    common["lora"] = dam.LoRA(a, b, 0.5) if adapts else None
    softcap = {"softcap": 6.0} if "suppress" in options and isinstance(options["suppress"], list) else {}
    values, total = [], 0.0
    log_prob = dam.linear_log_prob(hidden, head, inputs.target, bias, **common, **softcap)
    finite = torch.where(log_prob.isfinite(), log_prob, 0.0)
    values.append(log_prob)
    total = (finite * inputs.weight.to(finite.dtype)).sum()
    for normalized in (True, False):
        for based in (True, False):
            of_base = {}
            if based:
                of_base = {"base_hidden": inputs.base_hidden, "base_head_weight": inputs.base_head[part]}
                of_base |= {"base_weight": inputs.base_weight}
                of_base |= {"base_softcap": 5.0} if softcap else {}
            for reduction in (None, "none"):
                loss = dam.linear_matching_loss(
                    hidden,
                    head,
                    inputs.target,
                    inputs.weight,
                    bias,
                    row_scale=inputs.row_scale,
                    normalized=normalized,
                    reduction=reduction,
                    **of_base,
                    **common,
                    **softcap,
                )
                values.append(loss)
                upstream = torch.arange(1.0, loss.numel() + 1.0).view(loss.shape)
                # Rates are large beside probabilities.
                total = total + (loss * upstream.to(loss.dtype)).sum() * (1.0 if normalized else 1e-2)
    total.backward()
    return [x.detach() for x in values], [x.grad for x in leaf]


def row_results(inputs, part, options, **over):
    """The same of the ops over rows of logits."""
    logits = inputs.hidden @ inputs.head.t() + inputs.bias
    logits[1, inputs.target[1, 2]] = -torch.inf
    logits = logits[:, part].clone().requires_grad_()
    base = (inputs.base_hidden @ inputs.base_head.t())[:, part]
    common = {**options, **over}
    log_prob = dam.log_prob(logits, inputs.target, **common)
    total = (torch.where(log_prob.isfinite(), log_prob, 0.0) * inputs.weight.to(log_prob.dtype)).sum()
    values = [log_prob]
    for normalized in (True, False):
        for of_base in ({"base_logits": base, "base_weight": inputs.base_weight}, {}):
            loss = dam.matching_loss(logits, inputs.target, inputs.weight, normalized=normalized, **of_base, **common)
            values.append(loss)
            total = total + loss * (1.0 if normalized else 1e-2)
    total.backward()
    without = {name: value for name, value in common.items() if name != "temperature"}
    values += dam.rate_ratio(logits, base, inputs.target, **without)
    return [x.detach() for x in values], [logits.grad]


def draws(inputs, part, options, samples, **over):
    """Of jump and linear_jump, at the temperature of the options and at 0."""
    found = []
    logits = (inputs.hidden @ inputs.head.t() + inputs.bias)[:, part]
    common = {**options, **over, "seed": 5, "num_samples": samples}
    row_ids = torch.arange(inputs.hidden.shape[0]) * 7 - 3
    for temperature in (common.pop("temperature", 1.0), 0.0):
        found += [
            dam.jump(logits, temperature=temperature, row_ids=row_ids, **common),
            dam.linear_jump(
                inputs.hidden, inputs.head[part], inputs.bias[part], temperature=temperature, row_ids=row_ids, **common
            ),
        ]
    return found


def assert_near(found, expected, tolerance, what):
    """Beside the largest numbers: sums of other columns first are rounded otherwise."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    size = float(expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * max(size, 1e-6), equal_nan=True, msg=what
    )


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-11}


def compare(rank, ends, rows, dtype, samples, names=("plain", "left out", "mask")):
    """One rank against all of them."""
    inputs, part, group = Inputs(ends, rows, dtype), shard(ends, rank), dist.group.WORLD
    whole = slice(0, ends[-1])
    for name in names:
        options, what = inputs.options[name], f"{name}, {ends}, {dtype}"
        for adapts in {"plain": (False,), "mask": (False, True)}.get(name, (True,)):
            expected, of_one = linear_results(inputs, whole, options, adapts)
            values, gradients = linear_results(inputs, part, options, adapts, group=group)
            for n, (x, y) in enumerate(zip(values, expected, strict=True)):
                assert_near(x, y, min(TOLERANCE[dtype], 2e-5), f"value {n} of {what}")
            for n, (x, y) in enumerate(zip(gradients, of_one, strict=True)):
                if y is None:
                    assert x is None
                else:
                    assert_near(x, y[part] if n in (1, 2, 4) else y, TOLERANCE[dtype], f"gradient {n} of {what}")
        if dtype == torch.bfloat16:
            continue  # logits of a product of the library would differ by columns
        expected, of_one = row_results(inputs, whole, options)
        values, gradients = row_results(inputs, part, options, group=group)
        for n, (x, y) in enumerate(zip(values, expected, strict=True)):
            assert_near(x, y, TOLERANCE[dtype], f"row value {n} of {what}")
        assert_near(gradients[0], of_one[0][:, part], TOLERANCE[dtype], f"row gradient of {what}")
        for mine, one in zip(
            draws(inputs, part, options, samples, group=group), draws(inputs, whole, options, samples), strict=True
        ):
            assert torch.equal(mine.target, one.target), f"draws of {what}"
            assert_near(mine.log_prob, one.log_prob, TOLERANCE[dtype], f"log_prob of draws, {what}")
            assert_near(mine.log_escape, one.log_escape, TOLERANCE[dtype], f"log_escape of draws, {what}")


def equal(folder, rank, count):
    """Every op in C++ in every way to divide columns, and on the torch reference."""
    for ends in CUTS[count]:
        with dam.backend("cpu"):
            compare(rank, ends, 5, torch.float32, 100)
    with dam.backend("torch"):
        compare(rank, CUTS[count][0], 3, torch.float32, 20, ("left out",))
        compare(rank, CUTS[count][1], 3, torch.float64, 8)
    with dam.backend("cpu"):
        compare(rank, CUTS[count][0], 3, torch.bfloat16, 20, ("left out",))


def rounded_once(folder, rank, count):
    """Gradients of bfloat16 hidden states: the sum over ranks is rounded, and not what each rank adds to it."""
    ends = CUTS[count][0]
    inputs, part = Inputs(ends, 6, torch.bfloat16), shard(ends, rank)
    target = inputs.target.clamp(min=0)
    exact = inputs.hidden.double().requires_grad_()
    with dam.backend("torch"):
        dam.linear_log_prob(exact, inputs.head.double(), target).sum().backward()
    hidden = inputs.hidden.clone().requires_grad_()
    dam.linear_log_prob(hidden, inputs.head[part], target, group=dist.group.WORLD).sum().backward()
    error = (hidden.grad.double() - exact.grad).abs()
    # Half a unit of the last place, and float32's sums.
    assert (error <= 2.0**-8 * exact.grad.abs() + 1e-6 * exact.grad.abs().max()).all(), error.max()


def equal_cuda(folder, rank, count):
    with torch.device(choice.DEVICE_TYPE["cuda"]), dam.backend("cuda"):
        compare(rank, CUTS[count][0], 2, torch.float32, 12)


def equal_triton(folder, rank, count):
    with torch.device(choice.DEVICE_TYPE["triton"]), dam.backend("triton"):
        compare(rank, (1030, 1100), 2, torch.float32, 6, ("left out",))


def many_draws(folder, rank, count):
    """10^5 of each op, bit-equal, with logits that products of small whole numbers make without rounding."""
    ends = {2: (1400, 2603), 3: (800, 2049, 2603)}[count]
    part, whole, rows = shard(ends, rank), slice(0, ends[-1]), 100
    hidden, head = integers(-3, 4, rows, 8, seed=1) / 4, integers(-3, 4, ends[-1], 8, seed=2) / 2
    logits = hidden @ head.t()
    with dam.backend("cpu"):
        for draw in (
            lambda columns, **over: dam.jump(logits[:, columns], seed=11, num_samples=1000, **over),
            lambda columns, **over: dam.linear_jump(hidden, head[columns], seed=12, num_samples=1000, **over),
        ):
            mine, one = draw(part, group=dist.group.WORLD), draw(whole)
            assert mine.target.numel() == 10**5 and torch.equal(mine.target, one.target)
            assert len(mine.target.unique()) > 1000
            torch.testing.assert_close(mine.log_prob, one.log_prob, rtol=0.0, atol=2e-6)


def dtensors(folder, rank, count):
    """Heads and logits that are DTensors; of 4 columns on 3 ranks the last has none."""
    mesh = init_device_mesh("cpu", (count,))
    for columns in (2300, 4):
        ends = [min(-(-columns // count) * (r + 1), columns) for r in range(count)]
        inputs, part = Inputs(ends, 4), shard(ends, rank)
        whole = slice(0, columns)

        def divided(x, dim=0):
            local = x.narrow(dim, part.start, part.stop - part.start).contiguous()  # noqa: B023
            return DTensor.from_local(local, mesh, [Shard(dim)], shape=x.shape, stride=x.stride(), run_check=False)

        hidden = DTensor.from_local(inputs.hidden.clone(), mesh, [Replicate()], run_check=False).requires_grad_()
        head, bias = divided(inputs.head).requires_grad_(), divided(inputs.bias).requires_grad_()
        loss = dam.linear_matching_loss(hidden, head, inputs.target, inputs.weight, bias)
        loss.backward()
        plain = [x.clone().requires_grad_() for x in (inputs.hidden, inputs.head, inputs.bias)]
        expected = dam.linear_matching_loss(plain[0], plain[1], inputs.target, inputs.weight, plain[2])
        expected.backward()
        assert_near(loss.detach(), expected.detach(), 1e-5, "loss of DTensors")
        assert_near(hidden.grad.to_local(), plain[0].grad, 1e-5, "gradient of hidden")
        assert isinstance(head.grad, DTensor) and head.grad.placements == (Shard(0),)
        assert_near(head.grad.to_local(), plain[1].grad[part], 1e-5, "gradient of a head")
        assert_near(bias.grad.to_local(), plain[2].grad[part], 1e-5, "gradient of a bias")
        logits = inputs.hidden @ inputs.head.t()
        mine, one = dam.jump(divided(logits, 1), seed=1, num_samples=50), dam.jump(logits, seed=1, num_samples=50)
        assert torch.equal(mine.target, one.target)
        ratio = dam.rate_ratio(divided(logits, 1), divided(logits * 0.5, 1), inputs.target)
        assert_near(ratio.escape_gap, dam.rate_ratio(logits, logits * 0.5, inputs.target).escape_gap, 1e-5, "rates")
        with refuses(ValueError, "bias and head_weight must both be DTensors"):
            dam.linear_log_prob(inputs.hidden, head, inputs.target, inputs.bias)
        with refuses(ValueError, "DTensor head_weight must be sharded along dimension 0"):
            dam.linear_log_prob(hidden, divided(inputs.head, 0).redistribute(placements=[Replicate()]), inputs.target)
        if count == 2:
            square = init_device_mesh("cpu", (2, 1))
            a, b = (
                DTensor.from_local(x[part], square, [Shard(0), Replicate()], shape=x.shape, stride=x.stride())
                for x in (inputs.head, inputs.bias)
            )
            loss = dam.linear_matching_loss(inputs.hidden, a, inputs.target, inputs.weight, b)
            assert_near(loss, expected.detach(), 1e-5, "loss on a mesh of two dimensions")
            b = DTensor.from_local(inputs.bias, square, [Replicate(), Shard(0)])
            with refuses(ValueError, "bias must be divided as head_weight is, on the same mesh"):
                dam.linear_log_prob(inputs.hidden, a, inputs.target, b)
        del whole


def other_maps(folder, rank, count):
    """A DTensor that says something else on one rank."""
    mesh = init_device_mesh("cpu", (count,))
    columns = 8 + 2 * count * (rank == 1)
    each = -(-columns // count)
    head = DTensor.from_local(
        torch.ones(min(each, columns - each * rank), 2),
        mesh,
        [Shard(0)],
        shape=torch.Size((columns, 2)),
        stride=(2, 1),
        run_check=False,
    )
    with refuses(ValueError, "shard map|tell different columns|columns"):
        dam.linear_log_prob(torch.ones(1, 2), head, torch.zeros(1, dtype=torch.int64))
    # One whose parts are other than it says, and one that knows ranks by other numbers.
    local = torch.ones(2 + (rank == 0) - (rank == 1), 2)
    head = DTensor.from_local(local, mesh, [Shard(0)], shape=(2 * count, 2), stride=(2, 1), run_check=False)
    if rank <= 1:
        with refuses(ValueError, "must be divided as torch.chunk divides"):
            dam.linear_log_prob(torch.ones(1, 2), head, torch.zeros(1, dtype=torch.int64))
    turned = DeviceMesh("cpu", torch.arange(count).flip(0))
    head = DTensor.from_local(torch.ones(2, 2), turned, [Shard(0)], run_check=False)
    with refuses(ValueError, "must have ranks in the order of their group's"):
        dam.linear_log_prob(torch.ones(1, 2), head, torch.zeros(1, dtype=torch.int64))


def wrapped(folder, rank, count):
    """Tensors whose own memory does not hold their numbers, as tensor-parallel layers hand them on."""
    whole = normal(4, 3 * count, seed=1)
    part, target, group = whole[:, 3 * rank : 3 * rank + 3].contiguous(), integers(0, 3 * count, 4, 2), dist.group.WORLD
    expected = dam.log_prob(whole, target)
    waits = functional.AsyncCollectiveTensor(part.clone().requires_grad_())
    negated = torch._neg_view(-part)
    for logits in (waits, negated):
        torch.testing.assert_close(dam.log_prob(logits, target, group=group), expected)
        assert torch.equal(dam.jump(logits, seed=1, group=group).target, dam.jump(whole, seed=1).target)
    dam.log_prob(waits, target, group=group).sum().backward()
    plain = whole.requires_grad_()
    dam.log_prob(plain, target).sum().backward()
    torch.testing.assert_close(waits.grad, plain.grad[:, 3 * rank : 3 * rank + 3])
    with refuses(TypeError, "logits must be a plain tensor or a DTensor; got TwoTensor"):
        dam.log_prob(TwoTensor(part, part), target, group=group)


def kept(folder, rank, count):
    """What a backward pass needs is kept where torch frees it, and its gradient has none."""
    logits, target = normal(4, 5, seed=rank).requires_grad_(), integers(0, 5 * count, 4, 1)
    hidden, head = normal(4, 8, seed=1).requires_grad_(), normal(5, 8, seed=rank)
    weight, of_row, over = torch.ones(4, 1), torch.ones(4), {"group": dist.group.WORLD}

    def loss_of(logits, hidden, base):
        of_base = {"base_logits": base[:, :5], "base_weight": of_row}
        of_states = {"base_hidden": base, "base_head_weight": head, "base_weight": of_row}
        return (
            dam.log_prob(logits, target, **over).sum()
            + dam.matching_loss(logits, target, weight, **of_base, **over)
            + dam.linear_log_prob(hidden, head, target, **over).sum()
            + dam.linear_matching_loss(hidden, head, target, weight, **of_states, **over)
        )

    def moved(x):
        return x.detach().clone()

    tensors = [logits * 2, hidden * 2, normal(4, 8, seed=3)]
    alive = [weakref.ref(x) for x in tensors]
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda x: x):
        loss = loss_of(*tensors)
    del tensors
    gc.collect()
    assert [x() for x in alive] == [None] * 3
    loss.backward()
    expected, logits.grad = logits.grad, None
    loss_of(logits * 2, hidden * 2, normal(4, 8, seed=3)).backward()
    assert torch.equal(logits.grad, expected)
    (gradient,) = torch.autograd.grad(dam.log_prob(logits, target, **over).sum(), logits, create_graph=True)
    with refuses(RuntimeError, "log_prob: over a group its gradient has no gradient"):
        gradient.square().sum().backward()


def edges(folder, rank, count):
    """No rows at all; rows with +inf, which have no distribution; log-probabilities that sums over ranks round up."""
    group, target = dist.group.WORLD, integers(0, 4 * count, 3, 2)
    logits = normal(3, 4, seed=rank)
    if rank == 0:
        logits[1, 2] = torch.inf
    logits.requires_grad_()
    for backend in ("torch", "cpu"):
        with dam.backend(backend):
            none = dam.jump(logits[:0], seed=1, num_samples=2, group=group)
            assert [list(x.shape) for x in none] == [[0, 2], [0, 2], [0]]
            found = dam.log_prob(logits, target, group=group)
            assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
            loss = dam.matching_loss(logits, target, torch.ones(3, 2), reduction="none", group=group)
            assert loss.isnan().tolist() == [False, True, False]
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()
            nothing = torch.full((1, 4), -torch.inf)  # a weight there costs infinitely much, as on one rank
            assert dam.matching_loss(nothing, target[:1], torch.ones(1, 2), group=group) == torch.inf
            # Of one that can be reached, among ranks that round its share otherwise.
            only = torch.full((200, 4), -torch.inf)
            only[:, 0] = torch.linspace(-40.0, 40.0, 200) - 60.0 * rank
            drawn = dam.jump(only, seed=1, temperature=0.7, group=group)
            assert (drawn.log_prob <= 0.0).all() and drawn.target.tolist() == [0] * 200
            assert (dam.log_prob(only, torch.zeros(200, 1, dtype=torch.int64), group=group) <= 0.0).all()


@contextlib.contextmanager
def refuses(kind, message):
    import re

    try:
        yield
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"no {kind.__name__}: {message}")


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all_single", "all_reduce")
OTHERS = ("broadcast", "reduce", "scatter", "gather", "reduce_scatter_tensor", "send", "recv", "all_gather_object")


@contextlib.contextmanager
def counted():
    """The collectives that are called inside, and the bytes that this rank hands to each."""
    found, before = [], {}
    for name in (*COLLECTIVES, *OTHERS):
        function = getattr(dist, name, None)
        if function is None:
            continue

        def count(*arguments, function=function, name=name, **options):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            found.append((name, tensors[-1].numel() * tensors[-1].element_size()))
            return function(*arguments, **options)

        before[name] = function
        setattr(dist, name, count)
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


class Allocations(TorchDispatchMode):
    """The most elements of a tensor that an operation inside has made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def calls_of(rows, width, columns, rank, count):
    """Every op over a group, on logits or a head of so many columns: by name."""
    each = columns // count
    hidden, head = normal(rows, width, seed=1), normal(each, width, seed=2 + rank)
    logits, base = normal(rows, each, seed=20 + rank), normal(rows, each, seed=40 + rank)
    target = integers(0, columns, rows, 2, seed=5)
    weight, base_weight = normal(rows, 2, seed=6), normal(rows, seed=7)
    over = {"group": dist.group.WORLD}
    hidden.requires_grad_(), head.requires_grad_(), logits.requires_grad_()
    of_base = {"base_logits": base, "base_weight": base_weight}
    of_head = {"base_hidden": hidden.detach(), "base_head_weight": head.detach(), "base_weight": base_weight}
    return {
        "jump": lambda: dam.jump(logits, seed=1, **over).log_prob,
        "linear_jump": lambda: dam.linear_jump(hidden, head, seed=1, **over).log_prob,
        "log_prob": lambda: dam.log_prob(logits, target, **over),
        "linear_log_prob": lambda: dam.linear_log_prob(hidden, head, target, **over),
        "rate_ratio": lambda: dam.rate_ratio(logits, base, target, **over).log_ratio,
        "matching_loss": lambda: dam.matching_loss(logits, target, weight, **of_base, **over),
        "linear_matching_loss": lambda: dam.linear_matching_loss(hidden, head, target, weight, **of_head, **over),
    }


def wire(folder, rank, count):
    """One collective forward, of as many bytes whatever V and D are; one of [T, D] backward, of linear ops alone."""
    rows, seen = 6, {}
    for width, columns in ((8, 1200), (8, 4800), (64, 1200)):
        for name, call in calls_of(rows, width, columns, rank, count).items():
            with counted() as forward:
                value = call()
            backward = []
            if value.requires_grad:
                with counted() as backward:
                    value.sum().backward()
            assert len(forward) == 1, (name, forward)
            seen.setdefault(name, set()).add(forward[0][1])
            of_states = (
                [("all_reduce", (rows * width + 2) * 4)] if name.startswith("linear_") and value.requires_grad else []
            )
            assert backward == of_states, (name, backward)
    assert all(len(sizes) == 1 for sizes in seen.values()), seen
    assert set(seen) == {"jump", "linear_jump", "log_prob", "linear_log_prob", "rate_ratio", "matching_loss",
                         "linear_matching_loss"}  # fmt: skip


def shares(folder, rank, count):
    """No array is larger than this rank's part of the head, and than a chunk of rows of its columns."""
    rows, width, columns = 8, 64, 60_000
    _group._ROOM = 2**10  # of which nothing is written to, so that it takes no memory
    for name, call in calls_of(rows, width, columns, rank, count).items():
        with Allocations() as mode:
            value = call()
            if value.requires_grad:
                value.sum().backward()
        share = max(rows, width) * columns // count
        assert mode.largest <= share, (name, mode.largest, share)


def disagree(folder, rank, count):
    """Every rank says what differs; then they agree again."""
    rows = 4
    logits, hidden, head = normal(rows, 50, seed=rank), normal(rows, 8, seed=1), normal(50, 8, seed=rank)
    target, over, odd = integers(0, 100, rows, 2), {"group": dist.group.WORLD}, rank == count - 1
    told = "the ranks of the group made different calls: "
    more = slice(0, rows - odd)
    lora = dam.LoRA(normal(2, 8, seed=2), normal(50, 2, seed=rank), 1.0)
    weight, of_row = torch.ones(rows, 2), torch.ones(rows)
    of_base = {"base_logits": logits, "base_weight": of_row}
    cases = {
        "rows: .*3 on rank": lambda: dam.log_prob(logits[more], target[more], **over),
        "rows: 1 on rank 0; 1 on rank 1; 20000 on rank 2": lambda: dam.log_prob(
            torch.zeros(20_000 if odd else 1, 2), torch.zeros(20_000 if odd else 1, 2, dtype=torch.int64), **over
        ),
        "targets or samples of a row": lambda: dam.log_prob(logits, target[:, : 2 - odd], **over),
        "op": lambda: (dam.jump if odd else functools.partial(dam.log_prob, target=target))(
            logits, **({"seed": 1, "num_samples": 1} if odd else {}), **over
        ),
        "settings": lambda: dam.log_prob(logits, target, temperature=1.0 + odd, **over),
        "indices, seed or row_ids": lambda: dam.log_prob(logits, target + odd, **over),
        "settings.*": lambda: dam.jump(logits, seed=1 + odd, **over),
        "indices": lambda: dam.jump(logits, seed=1, row_ids=torch.arange(rows) + odd, **over),
        "hidden differs. Each rank must have the same rows": lambda: dam.linear_log_prob(
            hidden + odd, head, target, **over
        ),
        "indices, seed": lambda: dam.log_prob(logits[:1], torch.tensor([[3, 2] if odd else [0, 3]]), **over),
        "indices, seed or": lambda: dam.log_prob(
            logits, target, suppress=torch.arange(50 * count) % 7 == (3 if odd else 4), **over
        ),
        "settings: differ.*": lambda: dam.linear_log_prob(hidden, head, target, softcap=5.0 + odd, **over),
        "settings: .*": lambda: dam.linear_log_prob(hidden, head, target, lora=None if odd else lora, **over),
        "lora.a, or lora.scale, differs": lambda: dam.linear_log_prob(
            hidden, head, target, lora=lora._replace(a=lora.a + odd), **over
        ),
        "lora.a, or lora.scale, dif": lambda: dam.linear_log_prob(
            hidden, head, target, lora=lora._replace(scale=1.0 + odd), **over
        ),
        "setting": lambda: dam.matching_loss(logits, target, weight, **({} if odd else of_base), **over),
        "weight differs": lambda: dam.matching_loss(logits, target, weight + odd, **over),
        "base_weight differs": lambda: dam.matching_loss(
            logits, target, weight, **{**of_base, "base_weight": of_row + odd}, **over
        ),
        "row_scale differs": lambda: dam.matching_loss(logits, target, weight, row_scale=of_row + odd, **over),
        "row_scale dif": lambda: dam.matching_loss(logits, target, weight, row_scale=of_row if odd else None, **over),
        "hidden differs": lambda: dam.linear_log_prob(hidden.flip(0) if odd else hidden, head, target, **over),
        "settings: differ": lambda: dam.log_prob(logits.clone().requires_grad_(odd), target, **over),
    }
    for message, call in cases.items():
        with refuses(ValueError, told + message):
            call()
    dam.linear_log_prob(hidden, head, target, **over)


def backward_passes(folder, rank, count):
    """Of two calls in turn, in the same order on every rank or not."""
    hidden, head = normal(4, 8, seed=1).requires_grad_(), normal(50, 8, seed=rank)
    target, over = integers(0, 100, 4, 2), {"group": dist.group.WORLD}
    for other in (False, True):
        losses = [dam.linear_log_prob(hidden, head, target + n, **over).sum() for n in range(2)]
        order = losses[::-1] if other and rank == count - 1 else losses
        if other:
            with refuses(RuntimeError, "run other backward passes: of calls in turn"):
                order[0].backward()
        else:
            for loss in order:
                loss.backward()


def argues(folder, rank, count):
    """What every rank refuses alike."""
    logits, group = torch.zeros(3, 4), dist.group.WORLD
    target = torch.zeros(3, 1, dtype=torch.int64)
    with refuses(ValueError, "jump: over a group seed must be given"):
        dam.jump(logits, group=group)
    with refuses(ValueError, "entropy is not given over a group"):
        dam.log_prob(logits, target, entropy=True, group=group)
    with refuses(ValueError, "log_prob: temperature must be in"):
        dam.log_prob(logits, target, temperature=0, group=group)
    with refuses(TypeError, "group must be a torch.distributed process group; got str"):
        dam.log_prob(logits, target, group="tensor")
    with refuses(ValueError, f"target must be -1 or in .0, {4 * count}.; got {4 * count}"):
        dam.log_prob(logits, target + 4 * count, group=group)
    with refuses(ValueError, "exclude must be -1 or in"):
        dam.log_prob(logits, target, exclude=4 * count, group=group)
    with refuses(ValueError, "suppress must be -1 or in"):
        dam.log_prob(logits, target, suppress=[4 * count], group=group)
    with refuses(ValueError, "suppress must have shape .*, of all ranks' columns"):
        dam.log_prob(logits, target, suppress=torch.zeros(4, dtype=torch.bool), group=group)
    # Of what no rank can reach, or one rank has no number for.
    nothing = torch.full((3, 4), -torch.inf)
    logits[0] = nothing[0]
    if rank == 0:
        nothing[2, 0] = torch.nan
    with refuses(ValueError, "jump: row 0 of the logits cannot be sampled"):
        dam.jump(nothing, seed=1, group=group)
    found = dam.jump(nothing, seed=1, group=group, check=False)
    assert found.target[:2].tolist() == [-1, -1] and found.log_prob[:2].tolist() == [-torch.inf] * 2
    assert dam.log_prob(nothing, target, group=group)[2].isnan().all()


def compiled(folder, rank, count):
    inputs, part = Inputs((60, 100), 4), shard((60, 100), rank)

    def loss(hidden, head):
        value = dam.linear_log_prob(hidden.tanh(), head, inputs.target, group=dist.group.WORLD)
        return (2 * torch.where(value.isfinite(), value, 0.0)).sum()

    found = []
    for function in (loss, torch.compile(loss, backend="eager")):
        hidden, head = inputs.hidden.clone().requires_grad_(), inputs.head[part].clone().requires_grad_()
        value = function(hidden, head)
        value.backward()
        found.append((value.detach(), hidden.grad, head.grad))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def killed(folder, rank, count):
    """The last rank is killed between two calls."""
    logits, target = normal(3, 4, seed=rank), torch.zeros(3, 1, dtype=torch.int64)
    dam.log_prob(logits, target, group=dist.group.WORLD)
    if rank == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dam.log_prob(logits, target, group=dist.group.WORLD)


def raises(folder, rank, count):
    """The last rank's logits do not fit."""
    logits, target = normal(3, 4, seed=rank), torch.zeros(3, 1, dtype=torch.int64)
    dam.log_prob(logits, target, group=dist.group.WORLD)
    dam.log_prob(logits[0, 0] if rank == count - 1 else logits, target, group=dist.group.WORLD)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    me = ranks.joined(place)
    for case in sys.argv[2:]:
        globals()[case](place, *me)
