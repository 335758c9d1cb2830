"""entropy: of the distribution of a row's next jump, in one read of it; with log-probabilities of targets besides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _op, _rows

_SUMMARIES = 3  # numbers that the CUDA kernel keeps of each tile


def entropy(
    logits: Tensor,  # [..., V]
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropy of the destination of the next jump, as `dam.jump` draws it, in nats.

        entropy = - sum_v p(v) log p(v),   p = softmax(logits / temperature)

    over destinations v that are not excluded. With log-probabilities at the same time: `log_prob(..., entropy=True)`.

    Args:
        logits: unnormalised log rates [..., V]; any row stride, unit inner stride. -inf cannot be reached.
        exclude: destination left out: an int for all rows or int64 [...]; -1 leaves none out.
        suppress: destinations that no row has: a bool mask [V], or ids (a sequence, or int64 [S]).
        temperature: divides the logits; > 0.

    Returns:
        float32 [...] (float64 for float64 logits), differentiable in logits. NaN for a row that holds a NaN or +inf, or
        reaches nothing.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range.

    Source: Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    if _op.at_once(logits, exclude, suppress):
        found = cpu.kernels.entropy(logits=logits, exclude=exclude, suppressed=suppress, temperature=temperature)
        if found is not None:
            return found[0]
    x, lead = _checks.rows("entropy", "logits", logits, "V")
    excluded = _excluded.checked("entropy", exclude, suppress, lead, x.shape[1], x)
    temperature = _checks.temperature("entropy", temperature, zero=False)
    nothing = torch.empty((x.shape[0], 0), dtype=torch.int64, device=x.device)
    _, value = with_targets("entropy", x, nothing, excluded, temperature)
    return _rows.unflattened(value, lead)


def with_targets(
    op: str, logits: Tensor, target: Tensor, exclude: Excluded, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets [T, J], as those of `dam.log_prob`, and entropies [T], by one read of the logits."""
    backend = choice.choose(op, _IMPLEMENTATIONS, logits)
    target, never = _excluded.split(target, exclude)
    log_prob, value, log_escape = _entropy(logits, target, *exclude, temperature, backend)
    return _excluded.with_never(log_prob, never, log_escape), value


def _torch(logits: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = outputs(logits)
    for part in _rows.chunks(logits.shape[0], logits.shape[1] * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part)).div_(temperature)
        log_p = _rows.log_softmax(x)
        rate = torch.logsumexp(x, dim=1)
        log_escape[part] = torch.where(rate == torch.inf, torch.nan, rate)
        value[part] = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(dim=1)
    return value, log_escape


def _torch_backward(
    logits: Tensor,
    value: Tensor,
    log_escape: Tensor,
    total: Tensor,
    slope: Tensor,
    exclude: Excluded,
    temperature: float,
) -> Tensor:
    """-p (total + slope (entropy + log p)) / temperature, of float64 numbers [T]."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in _rows.chunks(logits.shape[0], logits.shape[1] * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part)).div_(temperature)
        log_p = x - log_escape[part, None]
        pull = total[part, None] + slope[part, None] * (value[part, None] + log_p)
        out[part] = torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * pull).div_(temperature)
    return out


def _cpu(logits: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = cpu.taken(
        cpu.kernels.entropy(logits=logits, exclude=exclude.row, suppressed=exclude.suppressed, temperature=temperature)
    )
    return value, log_escape


def _cpu_backward(
    logits: Tensor,
    value: Tensor,
    log_escape: Tensor,
    total: Tensor,
    slope: Tensor,
    exclude: Excluded,
    temperature: float,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    suppressed = address.bits(exclude.suppressed)
    cpu.kernels.entropy_backward(
        shape=cpu.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        temperature=temperature,
        entropy=value.data_ptr(),
        log_escape=log_escape.data_ptr(),
        total=total.data_ptr(),
        slope=slope.data_ptr(),
        gradient=gradient.data_ptr(),
    )
    return gradient


def _cuda(logits: Tensor, exclude: Excluded, temperature: float) -> tuple[Tensor, Tensor]:
    value, log_escape = outputs(logits)
    summaries = cuda.summaries(logits, _SUMMARIES, logits.shape[0])
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.entropy(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        scale=1.0 / temperature,
        summaries=summaries.data_ptr(),
        entropy=value.data_ptr(),
        log_escape=log_escape.data_ptr(),
        where=cuda.where(logits),
    )
    return value, log_escape


def _cuda_backward(
    logits: Tensor,
    value: Tensor,
    log_escape: Tensor,
    total: Tensor,
    slope: Tensor,
    exclude: Excluded,
    temperature: float,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.entropy_backward(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        scale=1.0 / temperature,
        entropy=value.data_ptr(),
        log_escape=log_escape.data_ptr(),
        total=total.data_ptr(),
        slope=slope.data_ptr(),
        gradient=address.matrix(gradient),
        where=cuda.where(logits),
    )
    return gradient


_IMPLEMENTATIONS = {"torch": _torch, "cpu": _cpu, "triton": triton.launcher("entropy"), "cuda": _cuda}
_BACKWARD = {
    "torch": _torch_backward,
    "cpu": _cpu_backward,
    "triton": triton.launcher("entropy", "entropy_backward"),
    "cuda": _cuda_backward,
}


def outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised entropy [T], and log_escape [T], float64 as that of `log_prob`."""
    shape = logits.shape[:1]
    return (
        logits.new_empty(shape, dtype=_rows.accumulator(logits.dtype)),
        logits.new_empty(shape, dtype=torch.float64),
    )


@_op.op("entropy")
def _entropy(
    logits: Tensor, target: Tensor, exclude: Tensor | None, suppressed: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.index_range("log_prob", "target", target, logits.shape[1], backend)
    _checks.index_range("entropy", "exclude", exclude, logits.shape[1], backend)
    excluded = Excluded(exclude, suppressed)
    value, log_escape = _IMPLEMENTATIONS[backend](logits, excluded, temperature)
    log_prob = _log_probs(logits, target, log_escape, excluded, temperature)
    return log_prob.to(value.dtype), value, log_escape


def _log_probs(logits: Tensor, target: Tensor, log_escape: Tensor, exclude: Excluded, temperature: float) -> Tensor:
    """float64 [T, J], out of the log escape rate, which is float64 so that nothing cancels."""
    x = logits.gather(1, target.clamp(min=0)).double() / temperature
    log_prob = x - log_escape[:, None]
    if exclude.row is not None:
        log_prob = torch.where(target == exclude.row[:, None], -torch.inf, log_prob)
    if exclude.suppressed is not None:
        log_prob = torch.where(exclude.suppressed[target.clamp(min=0)], -torch.inf, log_prob)
    return torch.where(target >= 0, log_prob, 0.0)


@_entropy.register_fake
def _(logits, target, exclude, suppressed, temperature, backend):
    value, log_escape = outputs(logits)
    return logits.new_empty(target.shape, dtype=value.dtype), value, log_escape


@_op.op("entropy_backward")
def _entropy_backward(
    grad: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    target: Tensor,
    value: Tensor,
    log_escape: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    excluded = Excluded(exclude, suppressed)
    counted = _rows.drop_excluded(target, excluded)
    upstream = torch.where(counted >= 0, grad_log_prob.double(), 0.0)
    total, slope, value = upstream.sum(dim=1), grad.double().contiguous(), value.double()
    gradient = _BACKWARD[backend](logits, value, log_escape, total, slope, excluded, temperature)
    # What the targets get is made whole, not added: a likely one's share nearly cancels it. An empty slot makes what
    # column 0 gets in any case.
    at = counted.clamp(min=0)
    log_p = _log_probs(logits, at, log_escape, excluded, temperature)
    pull = torch.where(log_p == -torch.inf, 0.0, total[:, None] + slope[:, None] * (value[:, None] + log_p))
    pulled = torch.where(at[:, :, None] == counted[:, None, :], upstream[:, None, :], 0.0).sum(dim=2)
    entry = (pulled - log_p.exp() * pull) / temperature
    return gradient.scatter_(1, at, entry.to(gradient.dtype))


@_entropy_backward.register_fake
def _(grad, grad_log_prob, logits, target, value, log_escape, exclude, suppressed, temperature, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    logits, target, exclude, suppressed, ctx.temperature, ctx.backend = inputs
    _, value, log_escape = output
    ctx.mark_non_differentiable(log_escape)
    ctx.save_for_backward(logits, target, value, log_escape, exclude, suppressed)


def _backward(ctx, grad_log_prob, grad, _grad_log_escape):
    logits, target, value, log_escape, exclude, suppressed = ctx.saved_tensors
    gradient = _entropy_backward(
        grad, grad_log_prob, logits, target, value, log_escape, exclude, suppressed, ctx.temperature, ctx.backend
    )
    return gradient, None, None, None, None, None


_entropy.register_autograd(_backward, setup_context=_setup_context)
