"""log_prob: log-probability of given destinations, differentiable in the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _gradient, _group, _op, _parallel, _rows
from dam.ops import entropy as _entropy


class LogProb(NamedTuple):
    """Log-probabilities of targets, and the entropy of the distribution that they are of."""

    log_prob: Tensor  # like target
    entropy: Tensor  # [...], in nats


@overload
def log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    entropy: Literal[False] = False,
    group: Any = None,
) -> Tensor: ...
@overload
def log_prob(
    logits: Tensor,
    target: Tensor,
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    entropy: Literal[True],
    group: Any = None,
) -> LogProb: ...
def log_prob(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] or [..., J]
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    group: Any = None,
) -> Tensor | LogProb:
    """Log-probability of the destinations `target` of the next jump, as `jump` draws them.

        log_prob[t, j] = logits[t, target[t, j]] / temperature - logsumexp_v(logits[t, v] / temperature)

    over destinations v that are not excluded.

    Args:
        logits: unnormalised log rates [..., V]; any row stride, unit inner stride.
        target: int64 [...] or [..., J]. -1 stands for no jump: log-probability 0, no gradient.
        exclude: destination left out: an int for all rows or int64 [...]; -1 leaves none out. An excluded
            target has log-probability -inf.
        suppress: destinations that no row has, likewise: a bool mask [V], or ids (a sequence, or int64 [S]).
        temperature: divides the logits; > 0.
        entropy: also give the entropy of each row's distribution, as `dam.entropy`, by the same read of the logits.
        group: process group whose ranks each have some columns of the vocabulary, as for `jump`; without entropy.

    Returns:
        float32 like target (float64 for float64 logits), or LogProb(log_prob, entropy). Rows with NaN or +inf give NaN.
        Gradients, and log_prob beside an entropy, are made of the log escape rate, one float64: of logits / temperature
        beyond 2^40 in size they keep no digit of what tells near ties apart.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Prop. 2.5.
    """
    if _group.is_asked(group, logits):
        if entropy is not False:
            raise ValueError("log_prob: entropy is not given over a group: leave it out")
        call = _parallel.of_rows("log_prob", group, _IMPLEMENTATIONS, logits, exclude, suppress, temperature)
        return over_group(call, target)
    if entropy is False and _excluded.is_nothing(suppress) and _op.at_once(logits, target, exclude):
        found = at_once(logits, target, exclude, temperature)
        if found is not None:
            return found
    logits, lead = _checks.rows("log_prob", "logits", logits, "V")
    targets = _checks.target("log_prob", target, lead, logits)
    excluded = _excluded.checked("log_prob", exclude, suppress, lead, logits.shape[1], logits)
    temperature = _checks.temperature("log_prob", temperature, zero=False)
    _checks.boolean("log_prob", "entropy", entropy)
    if entropy:
        value, of_rows = _entropy.with_targets("log_prob", logits, targets, excluded, temperature)
        return LogProb(value.view(target.shape), _rows.unflattened(of_rows, lead))
    backend = choice.choose("log_prob", _IMPLEMENTATIONS, logits)
    targets, never = _excluded.split(targets, excluded)
    value, log_escape = _log_prob(logits, targets, *excluded, temperature, backend)
    value = _excluded.with_never(value, never, log_escape)
    return value if value.shape == target.shape else value.view(target.shape)  # a view is one more node for autograd


def at_once(logits: Tensor, target: Tensor, exclude: int | Tensor, temperature: float) -> Tensor | None:
    """What `log_prob` returns, by the C++ kernel; None where an argument does not fit."""
    found = cpu.kernels.log_prob(
        logits=logits, exclude=exclude, suppressed=None, temperature=temperature, target=target
    )
    return None if found is None else found[0]


def _torch(logits: Tensor, target: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = outputs(logits, target)
    for part in _rows.chunks(logits.shape[0], logits.shape[1] * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part)).div_(temperature)
        value[part], log_escape[part] = reference_rows(x, target[part])
    return value, log_escape


def reference_rows(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log_prob [T, J] and log escape rate [T] of float64 rows; 0 where target is -1."""
    return _rows.gather_or(_rows.log_softmax(x), target, 0.0), torch.logsumexp(x, dim=1)


def _torch_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor | None = None,
) -> Tensor:
    """The gradient, written to `into`, which may be the logits themselves, if that is given."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    target = _rows.drop_excluded(target, exclude)
    for part in _rows.chunks(logits.shape[0], logits.shape[1] * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part)).div_(temperature)
        out[part] = reference_rows_backward(grad[part], x, target[part], log_escape[part]).div_(temperature)
    return out


def reference_rows_backward(grad: Tensor, x: Tensor, target: Tensor, log_escape: Tensor) -> Tensor:
    """Gradient of `reference_rows` in x: sum_j grad_j (1[v = target_j] - p(v)), float64 [T, V]."""
    upstream = torch.where(target >= 0, grad.double(), 0.0)
    total = upstream.sum(dim=1, keepdim=True)
    # A row that nothing is asked of has gradient 0, whatever it holds.
    gradient = torch.where(total == 0, 0.0, -total * (x - log_escape[:, None]).exp_())
    return gradient.scatter_add_(1, target.clamp(min=0), upstream)


def _cpu(logits: Tensor, target: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = cpu.taken(
        cpu.kernels.log_prob(
            logits=logits,
            exclude=exclude.row,
            suppressed=exclude.suppressed,
            temperature=temperature,
            target=target.contiguous(),
        )
    )
    return value, log_escape


def _cpu_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor | None = None,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    # Held by names: the kernel sees addresses only.
    target, upstream, log_escape = target.contiguous(), grad.double().contiguous(), log_escape.double().contiguous()
    suppressed = address.bits(exclude.suppressed)
    cpu.kernels.log_prob_backward(
        shape=cpu.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        temperature=temperature,
        target=target.data_ptr(),
        targets=target.shape[1],
        upstream=upstream.data_ptr(),
        log_escape=log_escape.data_ptr(),
        gradient=gradient.data_ptr(),
    )
    return gradient


def _cuda(logits: Tensor, target: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = outputs(logits, target)
    summaries = cuda.summaries(logits, cuda.kernels.ROW_SUMMARIES, logits.shape[0])
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.log_prob(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        scale=1.0 / temperature,
        target=address.targets(target),
        summaries=summaries.data_ptr(),
        log_prob=value.data_ptr(),
        log_escape=log_escape.data_ptr(),
        where=cuda.where(logits),
    )
    return value, log_escape


def _cuda_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    log_escape: Tensor,
    exclude: Excluded,
    temperature: float,
    into: Tensor | None = None,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if into is None else into
    log_escape = log_escape.double().contiguous()
    target_gradient = grad.new_empty(grad.shape, dtype=torch.float32)
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.log_prob_backward(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        temperature=temperature,
        scale=1.0 / temperature,
        target=address.targets(target),
        upstream=address.values(grad),
        log_escape=log_escape.data_ptr(),
        target_gradient=target_gradient.data_ptr(),
        gradient=address.matrix(gradient),
        gradient_dtype=address.DTYPE_CODE[gradient.dtype],
        where=cuda.where(logits),
    )
    return gradient


def log_escape_of(backend: str, logits: Tensor, exclude: Excluded, temperature: float) -> Tensor:
    """log_escape float64 [T], of no targets."""
    none = torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    return _IMPLEMENTATIONS[backend](logits, none, exclude, temperature)[1]


@_op.untraced
def over_group(call: _parallel.Call, target: Tensor) -> Tensor:
    """log_prob of the columns that the ranks of a group have, like target."""
    targets = _checks.target(call.op, target, call.lead, call.reference)

    def make(shards: _group.Shards) -> Tensor:
        """[T, 1 + J]: log_escape of these columns, logits of the targets among them."""
        exclude, here = call.left_out.excluded(shards), shards.local(targets)
        found = call.numbers(1 + targets.shape[1])
        found[:, 0] = -torch.inf
        for part, logits, _ in call.source.chunks():
            some = exclude.part(part)
            found[part, 0] = log_escape_of(call.backend, logits, some, call.temperature)
            found[part, 1:] = call.at(logits, here[part], some)
        return found

    def run() -> tuple[Tensor, _group.Shards, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        shards, gathered = call.exchanged(make, targets.shape[1], targets=targets)
        log_escape = torch.logsumexp(gathered[..., 0], dim=0)
        counted = call.left_out.counted(targets)
        x = torch.where(counted, shards.of_owner(gathered[..., 1:], targets), -torch.inf)
        value = torch.where(targets < 0, 0.0, x - log_escape[:, None]).to(call.dtype)

        def asked(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pull = torch.where(counted, grad.double() / -call.temperature, 0.0)
            rate = _gradient.Rate(pull.sum(dim=1), torch.zeros_like(log_escape), log_escape)
            return targets.where(counted, -1), pull, _gradient.shares_of(rate, None, call.temperature)

        return value, shards, asked

    return call.differentiable(run).view(target.shape)


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("log_prob"),
    "cuda": _cuda,
}
_BACKWARD = {
    "torch": _torch_backward,
    "cpu": _cpu_backward,
    "triton": triton.launcher("log_prob", "log_prob_backward"),
    "cuda": _cuda_backward,
}


def outputs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised log_prob [T, J], and log_escape [T] for the backward pass.

    log_escape is float64: an error of a float32 unit at logits of 10^4 would be one of 5e-4 in every probability.
    """
    return (
        logits.new_empty(target.shape, dtype=_rows.accumulator(logits.dtype)),
        logits.new_empty(logits.shape[:1], dtype=torch.float64),
    )


@_op.op("log_prob")
def _log_prob(
    logits: Tensor, target: Tensor, exclude: Tensor | None, suppressed: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    _checks.index_range("log_prob", "target", target, logits.shape[1], backend)
    _checks.index_range("log_prob", "exclude", exclude, logits.shape[1], backend)
    return _IMPLEMENTATIONS[backend](logits, target, Excluded(exclude, suppressed), temperature)


@_log_prob.register_fake
def _(logits, target, exclude, suppressed, temperature, backend):
    return outputs(logits, target)


@_op.op("log_prob_backward")
def _log_prob_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    return _BACKWARD[backend](grad, logits, target, log_escape, Excluded(exclude, suppressed), temperature)


@_log_prob_backward.register_fake
def _(grad, logits, target, log_escape, exclude, suppressed, temperature, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, target, exclude, suppressed, ctx.temperature, ctx.backend = inputs
    _, log_escape = output
    ctx.mark_non_differentiable(log_escape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, log_escape, exclude, suppressed)


def _backward(ctx, grad, _grad_log_escape):
    if grad is None:
        return (None,) * 6
    logits, target, log_escape, exclude, suppressed = ctx.saved_tensors
    gradient = _log_prob_backward(grad, logits, target, log_escape, exclude, suppressed, ctx.temperature, ctx.backend)
    return gradient, None, None, None, None, None


_log_prob.register_autograd(_backward, setup_context=_setup_context)
