"""How far results on a GPU are from float64, asked before anything is timed: values, gradients, draws of each backend.

Of random logits, and of hidden states and a head of LLaDA's vocabulary, against the reference in float64 on the same
device. Row by row, since a wrong row of a head's gradient would not show beside 126,464 right ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import dam
from dam.benchmarks.correct import largest
from dam.benchmarks.harness import Check
from dam.kernels import forms

# Relative errors of a row. bfloat16 rounds an entry by 2^-8 at most, once where it is a result and once where it is the
# gradient of a logit that is multiplied on; errors of many terms do not add up. Values are of sums in float32.
OF_GRADIENT, OF_VALUE = 2.0**-7, 2.0**-15
# Draws that may differ from the reference's, whose noise is in float64: some 4e-7 of them.
OF_DRAWS = 1e-3


def checks(
    device: torch.device, backends: Sequence[str], *, rows: int = 768, vocabulary: int = 126_464, hidden: int = 256
) -> Iterator[Check]:
    """One after another, so that a run that is cut off has what was found."""
    with torch.device(device):
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)

        target = torch.randint(vocabulary, (rows, 2), generator=generator)
        weight, base_weight = torch.rand(rows, 2, generator=generator), torch.rand(rows, generator=generator)
        logits, base = normal(rows, vocabulary, scale=2.0), normal(rows, vocabulary, scale=2.0)
        states, base_states = normal(rows, hidden, scale=0.3), normal(rows, hidden, scale=0.3)
        head = normal(vocabulary, hidden, scale=0.3)

        def of_rows(x: Tensor, based: bool) -> Tensor:
            more = {"base_logits": base.to(x.dtype), "base_weight": base_weight} if based else {}
            return dam.matching_loss(x, target, weight, **more)

        def of_states(x: Tensor, w: Tensor, based: bool) -> Tensor:
            more = {"base_hidden": base_states.to(x.dtype), "base_head_weight": head.to(x.dtype)} if based else {}
            more |= {"base_weight": base_weight} if based else {}
            return dam.linear_matching_loss(x, w, target, weight, **more)

        def looked_up(x: Tensor, w: Tensor) -> Tensor:
            return (dam.linear_log_prob(x, w, target) * weight).sum()

        cases = [
            ("matching_loss", lambda x: of_rows(x, False), (logits,)),
            ("matching_loss with base", lambda x: of_rows(x, True), (logits,)),
            ("log_prob", lambda x: (dam.log_prob(x, target) * weight).sum(), (logits,)),
            ("linear_matching_loss", lambda x, w: of_states(x, w, False), (states, head)),
            ("linear_matching_loss with base", lambda x, w: of_states(x, w, True), (states, head)),
            ("linear_log_prob", looked_up, (states, head)),
        ]
        for name, function, tensors in cases:
            with dam.backend("torch"):
                exact = _with_gradients(function, [x.double() for x in tensors])
            for backend in backends:
                for form in _forms_of(backend) if name.startswith("linear") else ("",):
                    with dam.backend(backend), _form(form):
                        ours = _with_gradients(function, tensors)
                    what = " ".join(part for part in (name, backend, form) if part)
                    yield _check(f"{what}, value", largest(ours[:1], exact[:1]), OF_VALUE)
                    yield _check(f"{what}, gradients", largest(ours[1:], exact[1:]), OF_GRADIENT)
            del exact
        with dam.backend("torch"):
            drawn = dam.jump(logits, seed=5).target
        for backend in backends:
            with dam.backend(backend):
                differ = (dam.jump(logits, seed=5).target != drawn).double().mean()
            yield _check(f"jump {backend}, share of other draws", float(differ), OF_DRAWS)


def _check(what: str, error: float, bound: float) -> Check:
    return Check(what, error, error / bound)


def _forms_of(backend: str) -> tuple[str, ...]:
    return tuple(form for form in forms.OF_BACKEND[backend] if form != "chunked" or backend == "triton")


@contextlib.contextmanager
def _form(name: str) -> Iterator[None]:
    """A form of a linear op, and so little memory that it takes several chunks, and holds two pieces."""
    if not name:
        yield
        return
    asked = {"DAM_LINEAR_FORM": name, "DAM_WORKSPACE_MB": "64"}
    before = {key: os.environ.get(key) for key in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _with_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    return [value.detach().reshape(1, 1), *torch.autograd.grad(value, leaves)]
