"""One example call per public op. What every op owes is tested over these calls: a new op adds an entry to CALLS.

A call gives its results by name, gradients among them, for the sets of options that kernels treat in ways of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dam
from tests.ops import helpers
from tests.ops.helpers import integers, normal, rounding

Results = dict[str, Tensor]

WIDTH = 40  # of hidden states
RANK = 3  # of an adapter on the head


@dataclasses.dataclass(frozen=True)
class Call:
    """An op on given inputs, by the name that it has in every room of the house.

    Families differ in what `run` takes beside a seed, which decides all the rest:

        rows:    logits and other logits [T, V], in which destinations may be out of reach
        states:  two arrays of finite numbers [T, V]
        linear:  hidden states [T, D], a head [V, D] and its bias [V]
    """

    name: str
    family: str
    run: Callable[..., Results]
    float64: bool = False  # whether every backend takes it
    # Of results that are differences: how large the numbers are of which float32 has kept the leading digits.
    terms: Callable[..., Results] = lambda *inputs: {}

    def inputs(self, rows: int, columns: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Random inputs, all finite."""
        if self.family != "linear":
            return [normal(rows, columns, seed=seed + n, dtype=dtype) for n in range(2)]
        hidden, bias = normal(rows, WIDTH, seed=seed, dtype=dtype), normal(columns, seed=seed + 1, dtype=dtype)
        return [hidden, normal(columns, WIDTH, seed=seed + 2, dtype=dtype, scale=WIDTH**-0.5), bias]

    def __call__(self, *inputs: Tensor, seed: int = 0) -> Results:
        return self.run(*inputs, seed=seed)


# ---- arguments beside the inputs


def some_targets(scores: Tensor, seed: int) -> Tensor:
    """int64 [T, 4] for scores [T, V]: any, the same again, the best, and any but in every other row none."""
    target = integers(0, scores.shape[1], scores.shape[0], 4, seed=seed)
    target[:, 1] = target[:, 0]
    target[:, 2] = scores.contiguous().argmax(dim=1)
    target[::2, 3] = -1
    return target


def some_excluded(target: Tensor, columns: int, seed: int) -> Tensor:
    """int64 [T]: in turn a target of the row, none, and any."""
    exclude = integers(0, columns, target.shape[0], seed=seed)
    exclude[::3] = target[::3, 0]
    exclude[1::3] = -1
    return exclude


def some_suppressed(target: Tensor, columns: int, seed: int) -> Tensor:
    """bool [V]: one in eight, the targets of the first row, and the second tile."""
    suppressed = integers(0, 8, columns, seed=seed) == 0
    suppressed[target[0, :3]] = True
    suppressed[1024:2048] = True
    return suppressed


def some_adapter(head: Tensor, seed: int) -> dam.LoRA:
    a = normal(RANK, head.shape[1], seed=seed, dtype=head.dtype)
    return dam.LoRA(a, normal(head.shape[0], RANK, seed=seed + 1, dtype=head.dtype, scale=0.1), 0.7)


def named(label: str, results: Any) -> Results:
    """The fields of an op's NamedTuple."""
    return {f"{name}, {label}": x for name, x in results._asdict().items()}


def with_gradients(label: str, value: Tensor, leaves: dict[str, Tensor], upstream: Tensor | None = None) -> Results:
    """A result, and its gradients in leaves by name."""
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream)
    by_name = {f"gradient in {name}, {label}": x for name, x in zip(leaves, gradients, strict=True)}
    return {label: value.detach(), **by_name}


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


# ---- rows of logits


def jump(logits: Tensor, base: Tensor, *, seed: int) -> Results:
    rows, columns = logits.shape
    target = some_targets(logits, seed)
    exclude, suppress = some_excluded(target, columns, seed + 1), some_suppressed(target, columns, seed + 3)
    ids = {"row_ids": integers(-(2**62), 2**62, rows, seed=seed + 2)}
    return {
        **named("one", dam.jump(logits, exclude=exclude, seed=seed)),
        **named("colder", dam.jump(logits, exclude=exclude, temperature=0.8, num_samples=3, seed=seed, **ids)),
        **named("suppressing", dam.jump(logits, exclude=exclude, suppress=suppress, num_samples=2, seed=seed)),
        **named("many", dam.jump(logits, num_samples=9, seed=seed)),
        **named("greedy", dam.jump(logits, suppress=suppress, temperature=0, num_samples=2, seed=seed)),
    }


def log_prob(logits: Tensor, base: Tensor, *, seed: int) -> Results:
    target, leaf = some_targets(logits, seed), leaf_of(logits)
    exclude = some_excluded(target, logits.shape[1], seed + 1)
    options = {"exclude": exclude, "suppress": some_suppressed(target, logits.shape[1], seed + 3)}
    value = dam.log_prob(leaf, target, **options, temperature=0.7)
    # Of destinations out of reach: an upstream gradient of zero.
    upstream = normal(*target.shape, seed=seed + 2).where(value > -torch.inf, 0.0).to(value.dtype)
    return {
        "one each": dam.log_prob(logits, target[:, 2]),
        "plain": dam.log_prob(logits, target),
        **with_gradients("colder", value, {"logits": leaf}, upstream),
    }


def entropy(logits: Tensor, base: Tensor, *, seed: int) -> Results:
    leaf, target = leaf_of(logits), some_targets(logits, seed)
    exclude = some_excluded(target, logits.shape[1], seed + 1)
    suppress = some_suppressed(target, logits.shape[1], seed + 3)
    value = dam.entropy(leaf, exclude=exclude, suppress=suppress, temperature=0.7)
    colder = with_gradients("colder", value, {"logits": leaf}, normal(len(logits), seed=seed + 2).to(value.dtype))
    return {"plain": dam.entropy(logits), **colder}


def rate_ratio(logits: Tensor, base: Tensor, *, seed: int) -> Results:
    target = some_targets(logits, seed)
    exclude = some_excluded(target, logits.shape[1], seed + 1)
    suppress = some_suppressed(target, logits.shape[1], seed + 3)
    return {
        **named("plain", dam.rate_ratio(logits, base, target)),
        **named("excluding", dam.rate_ratio(logits, base, target, exclude=exclude, suppress=suppress)),
    }


def rates(logits: Tensor, base: Tensor) -> Results:
    """Escape rates, whose difference the escape gap is."""
    largest = torch.maximum(*(x.double().exp().sum(dim=1) for x in (logits, base)))
    return {"escape_gap, plain": largest, "escape_gap, excluding": largest}


def matching_loss(logits: Tensor, base: Tensor, *, seed: int) -> Results:
    rows, columns = logits.shape
    target, weight = some_targets(logits, seed), normal(rows, 4, seed=seed + 1)
    exclude, of_base = some_excluded(target, columns, seed + 2), normal(rows, seed=seed + 3)
    suppress = some_suppressed(target, columns, seed + 4)
    # Of a target out of reach the loss is infinite, and so may the gradient of its row be, but not those of others.
    reached = weight.where(logits.gather(1, target.clamp(min=0)) > -torch.inf, 0.0)
    results = {}
    for label, weights, options in (
        ("rates", reached, {"suppress": suppress, "normalized": False}),
        ("excluding one", reached, {"exclude": columns // 2, "row_scale": of_base}),
        ("with base", weight, {"base_logits": base, "base_weight": of_base, "exclude": exclude, "suppress": suppress}),
        ("colder", reached, {"base_logits": logits / 2, "base_weight": of_base, "temperature": 0.7}),
    ):
        leaf = leaf_of(logits)
        loss = dam.matching_loss(leaf, target, weights, **options)
        results |= with_gradients(label, loss, {"logits": leaf})
    leaf = leaf_of(logits)
    losses = dam.matching_loss(leaf, target, reached, temperature=1.4, reduction="none")
    return {**results, **with_gradients("of each row", losses, {"logits": leaf}, of_base.to(losses.dtype))}


# ---- a head


def linear_jump(hidden: Tensor, head: Tensor, bias: Tensor, *, seed: int) -> Results:
    target = some_targets(bias.expand(len(hidden), -1), seed)
    exclude, suppress = some_excluded(target, len(head), seed + 1), some_suppressed(target, len(head), seed + 3)
    options = {"bias": bias, "exclude": exclude, "suppress": suppress, "num_samples": 2}
    adapted = {"bias": bias, "lora": some_adapter(head, seed + 2), "temperature": 0}
    # Not greedy: of many logits near the cap the largest is a matter of rounding.
    capped = {**options, "lora": adapted["lora"], "softcap": 3.0}
    return {
        **named("two", dam.linear_jump(hidden, head, **options, seed=seed)),
        **named("greedy, with adapter", dam.linear_jump(hidden, head, **adapted, seed=seed)),
        **named("capped", dam.linear_jump(hidden, head, **capped, seed=seed)),
    }


def head_leaves(hidden: Tensor, head: Tensor, bias: Tensor, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves by name, and the options that hand all but the first two of them over."""
    a, b, scale = some_adapter(head, seed)
    leaves = {"hidden": hidden, "head": head, "bias": bias, "a": a, "b": b}
    leaves = {name: leaf_of(x) for name, x in leaves.items()}
    return leaves, {"bias": leaves["bias"], "lora": dam.LoRA(leaves["a"], leaves["b"], scale)}


def linear_log_prob(hidden: Tensor, head: Tensor, bias: Tensor, *, seed: int) -> Results:
    target = some_targets(bias.expand(len(hidden), -1), seed)
    exclude = some_excluded(target, len(head), seed + 1)
    leaves, options = head_leaves(hidden, head, bias, seed + 2)
    options |= {"exclude": exclude, "suppress": some_suppressed(target, len(head), seed + 6), "temperature": 0.7}
    value = dam.linear_log_prob(leaves["hidden"], leaves["head"], target, **options)
    capped = dam.linear_log_prob(leaves["hidden"], leaves["head"], target, **options, softcap=3.0)
    upstream = normal(*target.shape, seed=seed + 4).where(value > -torch.inf, 0.0).to(value.dtype)
    return {
        "one each": dam.linear_log_prob(hidden, head, target[:, 2], bias=bias),
        **with_gradients("colder", value, leaves, upstream),
        **with_gradients("capped", capped, leaves, upstream),
    }


def linear_matching_loss(hidden: Tensor, head: Tensor, bias: Tensor, *, seed: int) -> Results:
    rows = len(hidden)
    scores = bias.expand(rows, -1)
    target = some_targets(scores, seed)
    weight = normal(rows, 4, seed=seed + 1).where(scores.gather(1, target.clamp(min=0)) > -torch.inf, 0.0)
    exclude, of_base = some_excluded(target, len(head), seed + 2), normal(rows, seed=seed + 3)
    suppress = some_suppressed(target, len(head), seed + 6)
    base = {"base_hidden": hidden.flip(0), "base_head_weight": head, "base_bias": bias, "base_weight": of_base}
    leaves, options = head_leaves(hidden, head, bias, seed + 4)
    options |= {**base, "exclude": exclude, "suppress": suppress, "row_scale": of_base.abs(), "temperature": 0.7}
    arguments = (leaves["hidden"], leaves["head"], target, weight)
    based = dam.linear_matching_loss(*arguments, **options)
    capped = dam.linear_matching_loss(*arguments, **options, softcap=3.0, base_softcap=2.0)
    leaf, options = leaf_of(hidden), {"bias": bias, "suppress": suppress, "normalized": False}
    frozen = dam.linear_matching_loss(leaf, head, target, weight, **options)
    losses = dam.linear_matching_loss(leaf, head, target, weight, bias=bias, temperature=1.4, reduction="none")
    return {
        **with_gradients("with base", based, leaves),
        **with_gradients("capped, with base", capped, leaves),
        **with_gradients("rates", frozen, {"hidden": leaf}),
        **with_gradients("of each row", losses, {"hidden": leaf}, of_base.to(losses.dtype)),
    }


def pulls(hidden: Tensor, head: Tensor, bias: Tensor) -> Results:
    """Sums over destinations of rate times row of the head, which cancel in the gradient in hidden states."""
    rate = (hidden.double() @ head.double().t() + bias.double()).exp()
    return {"gradient in hidden, rates": rate @ head.double().abs() / len(hidden)}


# ---- states


def adjoint_weights(x: Tensor, y: Tensor, *, seed: int) -> Results:
    """Few groups of at most 70 trajectories of at most 33 steps: [G, K, S] of rows [G, K S]."""
    x, y = x[:4], y[:4]
    steps = min(33, x.shape[1])
    count = min(70, x.shape[1] // steps)
    log_ratio, escape_gap = (z[:, : count * steps].unflatten(1, (count, steps)) for z in (x, y))
    cost = y[:, :count]
    return {
        **named("clipped", dam.adjoint_weights(log_ratio, cost, clip=0.5)),
        **named("with gap", dam.adjoint_weights(log_ratio, cost, escape_gap=escape_gap, clip=0.5)),
    }


def tilt_to_ess(x: Tensor, y: Tensor, *, seed: int) -> Results:
    """Few groups, as a bisection takes some sixty passes over each."""
    reward = x[:4, :300]
    return {"tilt": dam.tilt_to_ess(reward, reward.shape[1] / 10, max_tilt=9.0)}


def backward_kolmogorov(x: Tensor, y: Tensor, *, seed: int) -> Results:
    columns = x.shape[1]
    uniform, absorbing = dam.generators.Uniform(columns), dam.generators.Absorbing(columns, columns // 2)
    lattice = dam.generators.Lattice((20, min(columns // 20, 35)), (True, False))
    leaf = leaf_of(x)
    absorbed = dam.backward_kolmogorov(absorbing, leaf, 0.5)
    return {
        "uniform": dam.backward_kolmogorov(uniform, x, 0.5),
        "lattice": dam.backward_kolmogorov(lattice, x[:, : lattice.size], 2.0),
        **with_gradients("absorbing", absorbed, {"terminal": leaf}, y.to(absorbed.dtype)),
    }


CALLS = [
    Call("jump", "rows", jump),
    Call("log_prob", "rows", log_prob),
    Call("entropy", "rows", entropy),
    Call("rate_ratio", "rows", rate_ratio, terms=rates),
    Call("matching_loss", "rows", matching_loss),
    Call("linear_jump", "linear", linear_jump),
    Call("linear_log_prob", "linear", linear_log_prob),
    Call("linear_matching_loss", "linear", linear_matching_loss, terms=pulls),
    Call("adjoint_weights", "states", adjoint_weights),
    Call("tilt_to_ess", "states", tilt_to_ess, float64=True),
    Call("backward_kolmogorov", "states", backward_kolmogorov),
]


def public_ops() -> list[str]:
    """Names of the ops that users have: what dam exports, but for types, what is of their calls, and a module."""
    return sorted(
        {name for name in dam.__all__ if name[0].islower()}
        - {"backend", "deferred_checks", "generators", "release_workspace"}
    )


def of(*families: str) -> list[Call]:
    """The calls of these families, or all."""
    return [call for call in CALLS if not families or call.family in families]


def each(*families: str) -> pytest.MarkDecorator:
    """Runs a test that takes `call` on each call of these families, or on all."""
    return pytest.mark.parametrize("call", [pytest.param(call, id=call.name) for call in of(*families)])


def same(a: Results, b: Results) -> bool:
    """Whether results are equal bit for bit, NaN included."""
    return a.keys() == b.keys() and helpers.same(a.values(), b.values())


def assert_close(
    actual: Results, expected: Results, terms: Results, *, rtol: float, atol: float = 0.0, of_largest: float = 0.0
) -> None:
    """Compares in float64, with a tolerance for each result; indices, infinities and NaN must match.

    Args:
        terms: as `Call.terms` has them; 2^-23 of them is allowed too.
        rtol: beside the rounding of a result in 16 bits.
        of_largest: what is allowed in proportion to the largest number of each result.
    """
    assert actual.keys() == expected.keys() and terms.keys() <= expected.keys()
    for name, y in expected.items():
        x = actual[name]
        assert x.dtype == y.dtype and x.shape == y.shape, name
        if not y.is_floating_point():
            assert torch.equal(x, y), name
            continue
        x, y, finite = x.double(), y.double(), y.isfinite()
        assert torch.equal(x[~finite].nan_to_num(7.0), y[~finite].nan_to_num(7.0)), f"{name}: other infinities or NaN"
        size = y.abs().where(finite, 0.0)
        relative = rtol + (2 * rounding(actual[name].dtype) if actual[name].dtype.itemsize == 2 else 0.0)
        allowed = relative * size + atol + of_largest * size.max() + 2.0**-23 * terms.get(name, 0.0)
        beyond = ((x - y).abs() - allowed)[finite]
        assert bool((beyond <= 0).all()), f"{name}: {float(beyond.max())} beyond the tolerance"
