"""Whether a function computes what it should: against dam's reference in float64, or the law that draws must have.

Of the very inputs that are timed, some rows at a time, so that what is held in float64 stays small. A head's product is
made a block of its vocabulary at a time for the same reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import dam
from dam.benchmarks import rounding
from dam.benchmarks.harness import Call, Check, tensors
from dam.benchmarks.options import SHORT_DTYPES
from dam.benchmarks.rounding import Allowed, Arithmetic, Part

ENTRIES = 2**23  # of logits in float64 at a time, or of a head
COLUMNS = 4096  # of a larger vocabulary whose gradient in the head is compared: both ends, and at random between them
DRAWS, CALLS = 1024, 16  # draws that are asked for, in so many calls at most
FEWEST = 64  # rows of a set seed: of 8 the likeliest tokens themselves are at a distance of 2, of 64 at 5
# Of the Kolmogorov-Smirnov distance times the root of the number of draws: a right sampler exceeds x in 2 exp(-2 x^2)
# of all runs, here 9e-7.
DISTANCE = 2.7
HEAD = "head_weight"


@dataclasses.dataclass(frozen=True)
class Values:
    """Results, and gradients where the call has them, are those of `reference` in float64, number by number.

    Each number may be off by what rounding explains (`rounding`): of an operation that works in float32, whatever its
    inputs are, and leaves float32 results and gradients in the inputs' dtype. So do dam's. A peer or a user's function
    on 16-bit inputs that does not may be right in its own arithmetic, where each step is rounded to 16 bits: then that
    is what its check says. It tells less, as a row that is wrong by such a rounding is not seen.

    The errors by which functions are compared are relative to the largest number of a result, and those of a gradient
    to the norm of its row.
    """

    reference: Callable[..., Any]  # dam's op on rows of the inputs, by the names they have there
    allowed: Callable[..., Allowed]  # its errors, of `rounding`
    heads: tuple[str, ...] = ()  # prefixes of what is multiplied to logits first: "" and "base_"
    results: Callable[[Any], Sequence[Tensor]] = tensors  # those that are compared, of what a function returns

    def __call__(self, call: Call) -> list[Check]:
        """What differs by how much, of a call.

        Raises:
            ValueError: what it returns has another shape than the reference's result.
        """
        result, gradients = call.with_gradients()
        inputs = _Inputs(call, self.heads)
        found = self._checks(call, result, gradients, inputs, Arithmetic(torch.float32))
        if inputs.dtype == torch.float32 or "dam" in call.groups or all(check.passed for check in found):
            return found
        in_16_bits = self._checks(call, result, gradients, inputs, Arithmetic(inputs.dtype))
        (short,) = (short for short, dtype in SHORT_DTYPES.items() if getattr(torch, dtype) == inputs.dtype)
        return [
            one if one.passed else other._replace(arithmetic=f"{short} arithmetic")
            for one, other in zip(found, in_16_bits, strict=True)
        ]

    def _checks(
        self, call: Call, result: Any, gradients: Sequence[Tensor], inputs: _Inputs, arithmetic: Arithmetic
    ) -> list[Check]:
        """What differs by how much, and by how much more or less than this arithmetic explains."""
        ours = self.results(result)
        parts: list[list[Tensor]] = []  # of the exact results
        errors: list[list[Tensor]] = []  # that are allowed of these
        of_logits, of_logits_allowed = [], []
        gradient = {name: _Worst(inputs.dtype, arithmetic) for name in call.wrt}
        for rows in inputs.parts():
            given, leaf = inputs.of(rows, differentiated=bool(call.wrt))
            with dam.backend("torch"):
                exact = list(self.results(self.reference(**given)))
            # A loss is the mean over all rows; the gradients of results that have rows are those of their sum.
            share = (rows.stop - rows.start) / inputs.rows if exact[0].ndim == 0 else 1.0
            parts.append([share * x.detach() for x in exact])
            with torch.no_grad():
                detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
                part = Part(parts[-1], inputs.rows, inputs.off(rows, arithmetic))
                allowed = self.allowed(arithmetic, part, **detached)
            errors.append([share * x for x in allowed.values])
            if not call.wrt:
                continue
            assert allowed.gradient is not None
            (of_leaf,) = torch.autograd.grad(share * exact[0].sum(), leaf)
            of_leaf_allowed = share * allowed.gradient
            for name, some in zip(call.wrt, gradients, strict=True):
                if name == HEAD:
                    of_logits.append(of_leaf[:, inputs.columns])
                    of_logits_allowed.append(of_leaf_allowed[:, inputs.columns])
                    continue
                theirs, error = of_leaf, of_leaf_allowed
                if name == "hidden":
                    theirs = inputs.of_states(of_leaf)
                    error = inputs.of_states(
                        error + inputs.carried(of_leaf, inputs.vocabulary, arithmetic), absolute=True
                    )
                gradient[name].add(_shaped(some, (inputs.rows, *theirs.shape[1:]))[rows], theirs, error)
        if HEAD in call.wrt:
            states, of_head = call.inputs["hidden"].double(), torch.cat(of_logits)
            error = torch.cat(of_logits_allowed) + inputs.carried(of_head, inputs.rows, arithmetic)
            some = _shaped(gradients[call.wrt.index(HEAD)], call.inputs[HEAD].shape)
            gradient[HEAD].add(some[inputs.columns], of_head.t() @ states, error.t() @ states.abs())
        found = list(_of_values(ours, parts, errors, arithmetic))
        return found + [worst.check(f"gradient in {name}") for name, worst in gradient.items()]


class _Worst:
    """The largest errors of a gradient whose rows come one part after another."""

    def __init__(self, dtype: torch.dtype, arithmetic: Arithmetic):
        self._rounded, self._arithmetic = Arithmetic(dtype), arithmetic
        self._error = self._share = 0.0

    def add(self, ours: Tensor, exact: Tensor, allowed: Tensor) -> None:
        self._error = max(self._error, largest([ours], [exact]))
        # It is rounded to the inputs' dtype in any arithmetic; what it is made of may have been too small for a step's.
        allowed = allowed + self._rounded.of_result(exact) + self._arithmetic.least
        self._share = max(self._share, _share(ours.double() - exact, allowed))

    def check(self, what: str) -> Check:
        return Check(what, self._error, self._share)


def _share(error: Tensor, allowed: Tensor) -> float:
    """The largest of all errors over what is allowed there; of no numbers 0, of what is none infinite."""
    if error.numel() == 0:
        return 0.0
    return float(torch.where(error == 0, 0.0, error.abs() / allowed).nan_to_num(torch.inf).max())


def _of_values(
    ours: Sequence[Tensor],
    parts: Sequence[Sequence[Tensor]],
    errors: Sequence[Sequence[Tensor]],
    arithmetic: Arithmetic,
) -> Iterator[Check]:
    """The check of each result, of the exact ones of some rows after another, or of the shares of a mean."""
    if len(ours) != len(parts[0]):
        raise ValueError(f"must return {len(parts[0])} tensors; got {len(ours)}")
    for n, some in enumerate(ours):
        exact, allowed = (
            torch.stack(of_rows).sum() if of_rows[0].ndim == 0 else torch.cat(of_rows)
            for of_rows in ([part[n] for part in of] for of in (parts, errors))
        )
        off = _shaped(some, exact.shape).double() - exact
        relative = 0.0 if not bool(off.any()) else float((off.abs().max() / exact.abs().max()).nan_to_num(torch.inf))
        what = "value" if len(ours) == 1 else f"value {n + 1} of {len(ours)}"
        yield Check(what, relative, _share(off, allowed + arithmetic.of_result(exact)))


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a call returns first are draws, a token of each row, from the softmax of the row's logits.

    Of a draw k of a row whose probabilities are p the sum of p before k plus a uniform share of p_k is uniform, if the
    draw is from p; by the order of the vocabulary, and from the likeliest token down.
    """

    heads: tuple[str, ...] = ()
    never: int = -1  # a token that has no probability
    fewest: int = FEWEST  # rows, where draws are the same at every call

    def __call__(self, call: Call) -> list[Check]:
        """Both distances from uniform.

        Raises:
            ValueError: no integers [T], or not in the vocabulary; or the same ones at every call, of few rows.
        """
        inputs = _Inputs(call, self.heads)
        drawn = [self._drawn(call, inputs)]
        while len(drawn) < CALLS and len(drawn) * inputs.rows < DRAWS:
            drawn.append(self._drawn(call, inputs))
        if all(torch.equal(drawn[0], other) for other in drawn[1:]):  # of a set seed: one of each row is all there is
            del drawn[1:]
            if inputs.rows < self.fewest:
                raise ValueError(
                    f"returns the same tokens at every call, which {inputs.rows} rows cannot tell from the likeliest; "
                    f"draw anew at every call, or measure {self.fewest} rows or more"
                )
        tokens = torch.stack(drawn, dim=1)  # [T, calls]
        generator = torch.Generator().manual_seed(0)
        uniform: dict[str, list[Tensor]] = {"in order of the vocabulary": [], "from the likeliest down": []}
        for rows in inputs.parts():
            given, _ = inputs.of(rows, differentiated=False)
            logits = given["logits"]
            if self.never >= 0:
                logits[:, self.never] = -torch.inf
            p, at = torch.softmax(logits, dim=1), tokens[rows]
            likely = p.gather(1, at)
            share = torch.rand(at.shape, generator=generator, dtype=torch.float64).to(p.device) * likely
            before = p.cumsum(dim=1).gather(1, at) - likely
            index = torch.arange(p.shape[1], device=p.device)
            for n in range(at.shape[1]):
                one, k = likely[:, n : n + 1], at[:, n : n + 1]
                more = ((p > one) | ((p == one) & (index < k))).double().mul_(p).sum(dim=1)
                uniform["from the likeliest down"].append(more + share[:, n])
            uniform["in order of the vocabulary"].append((before + share).flatten())
        distances = {name: _distance(torch.cat(u)) for name, u in uniform.items()}
        return [Check(f"law of the draws, {name}", far, far / DISTANCE) for name, far in distances.items()]

    def _drawn(self, call: Call, inputs: _Inputs) -> Tensor:
        found = tensors(call())
        if not found or found[0].is_floating_point() or found[0].numel() != inputs.rows:
            got = f"{found[0].dtype} {tuple(found[0].shape)}" if found else "no tensor"
            raise ValueError(f"must return tokens first, integers [{inputs.rows}]; got {got}")
        token = found[0].reshape(-1).long()
        if not bool(((token >= 0) & (token < inputs.vocabulary)).all()):
            raise ValueError(f"must return tokens of 0 to {inputs.vocabulary - 1}; got {token.min()} to {token.max()}")
        return token


def _distance(uniform: Tensor) -> float:
    """The Kolmogorov-Smirnov distance from the uniform law, times the root of the number of values."""
    values, n = uniform.sort().values, len(uniform)
    after = torch.arange(1, n + 1, dtype=values.dtype, device=values.device) / n
    return float(torch.maximum(after - values, values - after + 1 / n).max()) * math.sqrt(n)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a call returns are tokens of a vocabulary, wherever they come from."""

    shape: tuple[int, ...]
    vocabulary: int

    def __call__(self, call: Call) -> list[Check]:
        found = tensors(call())[0]
        outside = math.inf if tuple(found.shape) != self.shape else float(self._outside(found))
        return [Check("tokens outside the vocabulary", outside, math.inf if outside else 0.0)]

    def _outside(self, found: Tensor) -> Tensor:
        return ((found < 0) | (found >= self.vocabulary)).sum()


class _Inputs:
    """The inputs of a call, some rows of them at a time, in float64."""

    def __init__(self, call: Call, heads: tuple[str, ...]):
        self._given, self._heads = call.inputs, heads
        first = next(x for x in self._given.values() if isinstance(x, Tensor) and x.is_floating_point())
        self.dtype, self.rows = first.dtype, len(first)
        head = self._given[HEAD] if heads else None
        self.vocabulary = len(head) if head is not None else first.shape[-1]
        self._of_row = self.vocabulary if head is not None else first[0].numel()
        ends = min(self.vocabulary, COLUMNS) // 8
        middle = torch.randperm(self.vocabulary, generator=torch.Generator().manual_seed(0))[: COLUMNS - 2 * ends]
        last = torch.arange(self.vocabulary - ends, self.vocabulary)
        self.columns = torch.cat([torch.arange(ends), middle, last]).unique().to(first.device)

    def parts(self) -> Iterator[slice]:
        size = max(1, ENTRIES // self._of_row)
        return (slice(n, min(n + size, self.rows)) for n in range(0, self.rows, size))

    def of(self, rows: slice, *, differentiated: bool) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the reference for some rows; the first tensor, which has a gradient if it is asked for."""
        states = [f"{prefix}hidden" for prefix in self._heads]
        given: dict[str, Any] = {}
        for name, x in self._given.items():
            if name.endswith(HEAD):
                continue
            if isinstance(x, Tensor) and x.ndim and len(x) == self.rows:
                x = x[rows].double() if x.is_floating_point() else x[rows]
            if name in states:
                prefix = name.removesuffix("hidden")
                name, x = f"{prefix}logits", self._product(x, self._given[f"{prefix}{HEAD}"])
            given[name] = x
        leaf = next(x for x in given.values() if isinstance(x, Tensor))
        return given, leaf.requires_grad_(differentiated)

    def _blocks(self, head: Tensor) -> Iterator[Tensor]:
        return (block.double() for block in head.split(max(1, ENTRIES // head.shape[1])))

    def _product(self, states: Tensor, head: Tensor) -> Tensor:
        return torch.cat([states @ block.t() for block in self._blocks(head)], dim=1)

    def off(self, rows: slice, arithmetic: Arithmetic) -> dict[str, Tensor]:
        """By how much the logits of some rows are off where they are products."""
        found = {}
        for prefix in self._heads:
            states, head = self._given[f"{prefix}hidden"][rows], self._given[f"{prefix}{HEAD}"]
            of_states, of_head = (x.norm(dim=1, dtype=torch.float64) for x in (states, head))
            found[f"{prefix}logits"] = rounding.of_product(arithmetic, of_states, of_head, head.shape[1])
        return found

    def carried(self, of_logits: Tensor, count: int, arithmetic: Arithmetic) -> Tensor:
        """What the gradient in logits may be off more when it is multiplied on, in sums of so many: it is rounded to
        the dtype of what it is multiplied with, as matrix units have both of one.
        """
        rounded = max(Arithmetic(self.dtype).step, arithmetic.step)
        return (rounded + rounding.of_sum(count)) * of_logits.abs() + arithmetic.least

    def of_states(self, of_logits: Tensor, *, absolute: bool = False) -> Tensor:
        """The gradient in hidden states, of that in their logits; or of sizes, by the sizes of the head."""
        found, first = None, 0
        for block in self._blocks(self._given[HEAD]):
            part = of_logits[:, first : first + len(block)] @ (block.abs() if absolute else block)
            found, first = part if found is None else found + part, first + len(block)
        assert found is not None
        return found


def largest(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of a row, in the Euclidean norm; of rows of zeros 0 if they are so, else infinite."""
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        for some, part in zip(a.split(4096), b.split(4096), strict=True):
            size, error = part.norm(dim=1), (some.double() - part).norm(dim=1)
            ratio = torch.where(error == 0, 0.0, error / size)
            worst = max(worst, float(ratio.max().nan_to_num(torch.inf)))
    return worst


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """[T] for [T, 1] too."""
    if [size for size in x.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"must have a shape of {tuple(shape)} where it has {tuple(x.shape)}")
    return x.detach().reshape(shape)
