"""jump: draw the destination of the next jump of a CTMC, with its log-probability and log escape rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, deferral, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _op, _philox, _rows


class Jump(NamedTuple):
    """Destinations and their log-probabilities, and the log escape rate of each row."""

    target: Tensor  # int64 [...], or [..., num_samples] when num_samples > 1
    log_prob: Tensor  # like target, float32 (float64 for float64 logits)
    log_escape: Tensor  # [...], float32 (float64 for float64 logits)


def jump(
    logits: Tensor,  # [..., V]
    *,
    exclude: int | Tensor = -1,
    suppress: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    num_samples: int = 1,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    check: bool = True,
) -> Jump:
    """Draws the destination v ~ exp(logits[v] / temperature) of each row's next jump.

        P(v) = exp(logits[v] / temperature - log_escape),   log_escape = logsumexp_v(logits[v] / temperature)

    over destinations v that are not excluded. Draws are exact also far in the tail, and a destination of
    probability zero is never drawn. A row's draws depend on (seed, row id, sample) and on its logits only:
    not on the batch, the order of rows, the number of threads or the backend (up to floating-point ties).

    Args:
        logits: unnormalised log rates [..., V], of T rows in all; any row stride, unit inner stride. -inf cannot be
            reached.
        exclude: destination to leave out: an int for all rows or int64 [...]; -1 leaves none out.
        suppress: destinations that no row has: a bool mask [V], or ids (a sequence, or int64 [S]).
        temperature: divides the logits. 0 takes the largest logit (the lowest index on ties), with
            log_prob and log_escape at temperature 1.
        num_samples: independent draws per row.
        seed: 64-bit key of the random stream, an int or an int64 scalar tensor; None takes one from
            torch's default generator. Captured in a CUDA graph every replay draws with a new one if it is None (from
            the GPU's generator), with what a tensor on the GPU then holds, and else with the same.
        row_ids: int64 [...], names each row's stream; 0 .. T-1 unless given.
        check: raise if a row has a NaN, a +inf or nothing to reach; on a GPU that waits for the result, or in
            `dam.deferred_checks()` for all calls of a block at its end. With False such a row yields target -1 where
            nothing can be reached, and is unspecified otherwise.

    Returns:
        Jump(target, log_prob, log_escape), with the leading dimensions of logits. Not differentiable: see `log_prob`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or (with check)
            a row cannot be sampled; the message names the first such row.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 1; random stream: `dam.ops._philox`.
    """
    if _op.at_once(logits, exclude, suppress, seed, row_ids):
        seed = random_seed(logits) if seed is None else seed
        found = at_once(logits, exclude, suppress, temperature, num_samples, seed, row_ids, check)
        if found is not None:
            return found
    logits, lead = _checks.rows("jump", "logits", logits, "V")
    excluded = _excluded.checked("jump", exclude, suppress, lead, logits.shape[1], logits)
    _checks.boolean("jump", "check", check)
    temperature, num_samples, seed, row_ids = sampling_arguments(
        "jump", logits, lead, temperature, num_samples, seed, row_ids
    )
    backend = choice.choose("jump", _IMPLEMENTATIONS, logits)
    drawn = _jump(logits.detach(), *excluded, temperature, num_samples, seed, row_ids, check, backend)
    return as_jump(drawn, num_samples, lead)


def sampling_arguments(
    op: str,
    reference: Tensor,
    lead: torch.Size,
    temperature: float,
    num_samples: int,
    seed: int | Tensor | None,
    row_ids: Tensor | None,
) -> tuple[float, int, Tensor, Tensor | None]:
    """Checks the arguments that `jump` and `linear_jump` share and puts the seed into a tensor."""
    temperature = _checks.temperature(op, temperature, zero=True)
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"{op}: num_samples must be an int; got {type(num_samples).__name__}")
    if not 1 <= num_samples < _philox.MAX_SAMPLES:
        raise ValueError(f"{op}: num_samples must be in [1, 2^24); got {num_samples}")
    if row_ids is not None:
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
            raise TypeError(
                f"{op}: row_ids must be an int64 tensor; got {getattr(row_ids, 'dtype', type(row_ids).__name__)}"
            )
        if row_ids.shape != lead:
            raise ValueError(f"{op}: row_ids must have shape {list(lead)}; got {list(row_ids.shape)}")
        _checks.same_device(op, "row_ids", row_ids, reference)
        row_ids = _checks.flat(row_ids)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{op}: a seed tensor must hold one int64; got {seed.dtype} {list(seed.shape)}")
        return temperature, num_samples, seed.reshape(()), row_ids
    if seed is None:
        return temperature, num_samples, random_seed(reference), row_ids
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int, an int64 tensor or None; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must fit in 64 bits; got {seed}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return temperature, num_samples, torch.tensor(signed, dtype=torch.int64, device="cpu"), row_ids


def random_seed(reference: Tensor) -> Tensor:
    """From torch's default generator; in a CUDA graph from the GPU's, as the host's would be one for all replays."""
    where = reference.device if deferral.is_captured(reference) else "cpu"
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=where)


def at_once(
    logits: Tensor,
    exclude: int | Tensor,
    suppress: Tensor | Sequence[int] | None,
    temperature: float,
    num_samples: int,
    seed: int | Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> Jump | None:
    """What `jump` returns, by the C++ kernel; None where an argument does not fit, or a row cannot be sampled."""
    found = cpu.kernels.jump(
        logits=logits,
        exclude=exclude,
        suppressed=suppress,
        row_ids=row_ids,
        temperature=temperature,
        num_samples=num_samples,
        seed=int(seed) if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1 else seed,
    )
    if found is None or not isinstance(check, bool):
        return None
    target, log_prob, log_escape, bad_row = found
    return Jump(target, log_prob, log_escape) if bad_row < 0 or not check else None


def as_jump(drawn: tuple[Tensor, Tensor, Tensor], num_samples: int, lead: torch.Size) -> Jump:
    target, log_prob, log_escape = drawn
    if num_samples == 1:
        target, log_prob = target.squeeze(1), log_prob.squeeze(1)
    return Jump(*(_rows.unflattened(x, lead) for x in (target, log_prob, log_escape)))


def raise_bad_row(op: str, row: int, logits: Tensor, exclude: Excluded) -> None:
    """Raises for a row that cannot be sampled, saying what is wrong with it; logits [1, V]."""
    values = _rows.allowed(logits, exclude)
    if bool(torch.isnan(values).any()):
        problem = "holds a NaN"
    elif bool((values == torch.inf).any()):
        problem = "holds +inf"
    else:
        problem = "has no reachable destination: every allowed logit is -inf"
    raise ValueError(f"{op}: row {row} of the logits {problem} (check=False skips this test)")


def bad_later(op: str) -> Callable[[int], str]:
    """What `raise_bad_row` would say, of a row that is no longer there to be looked at."""
    return lambda row: (
        f"{op}: row {row} of the logits cannot be sampled: it holds a NaN or +inf, or every allowed logit is -inf"
    )


def reference_rows(
    x: Tensor,  # float64 [T, V], excluded entries at -inf; overwritten
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The race in float64: target and log_prob [T, num_samples], log_escape [T]."""
    rows, columns = x.shape
    if temperature == 0.0:
        log_escape = torch.logsumexp(x, dim=1)
        target = x.argmax(dim=1, keepdim=True).expand(rows, num_samples).clone()
    else:
        x = x.div_(temperature)
        log_escape = torch.logsumexp(x, dim=1)
        width = min(columns, _philox.TILE)
        # Less the largest, beside which the noise would be lost to rounding where logits are large.
        top = x.amax(dim=1, keepdim=True)
        below = x - torch.where(top.abs() < torch.inf, top, 0.0)
        tiles = F.pad(below, (0, -columns % width), value=-torch.inf).view(rows, -1, width)
        # Exponential race among tiles: the first arrival, at rate exp(log_mass), is argmax(log_mass - log E).
        log_mass = torch.logsumexp(tiles, dim=2)
        noise = _philox.tile_exponentials(seed, row_ids, num_samples, tiles.shape[1])
        tile = (log_mass[:, None, :] - noise.log()).argmax(dim=2)
        tokens = tiles.gather(1, tile[:, :, None].expand(-1, -1, width))
        token = (tokens - _philox.token_exponentials(seed, row_ids, tile, width).log()).argmax(dim=2)
        target = tile * _philox.TILE + token
    target = torch.where((log_escape == -torch.inf)[:, None], -1, target)
    # Nothing to reach: -inf, not the NaN of -inf - -inf.
    log_prob = _rows.gather_or(_rows.log_softmax(x), target.clamp(max=columns - 1), -torch.inf)
    log_prob = torch.where(target >= 0, log_prob, -torch.inf)
    return target, log_prob, log_escape


def _torch(
    logits: Tensor,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The three outputs and the first row that cannot be sampled, or -1; with check it stops there."""
    rows, columns = logits.shape
    ids = torch.arange(rows, device=logits.device) if row_ids is None else row_ids
    target, log_prob, log_escape = outputs(logits, rows, num_samples)
    for part in _rows.chunks(rows, (columns + num_samples * min(columns, _philox.TILE)) * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part))
        if check:
            bad = ~(x.amax(dim=1).abs() < torch.inf)
            if bool(bad.any()):
                return target, log_prob, log_escape, part.start + int(bad.nonzero()[0])
        target[part], log_prob[part], log_escape[part] = reference_rows(x, temperature, num_samples, seed, ids[part])
    return target, log_prob, log_escape, -1


def outputs(logits: Tensor, rows: int, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised target, log_prob [T, num_samples] and log_escape [T] for logits (or hidden) of this dtype."""
    dtype = _rows.accumulator(logits.dtype)
    return (
        logits.new_empty((rows, num_samples), dtype=torch.int64),
        logits.new_empty((rows, num_samples), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
    )


def _cpu(
    logits: Tensor,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    target, log_prob, log_escape, bad_row = cpu.taken(
        cpu.kernels.jump(
            logits=logits,
            exclude=exclude.row,
            suppressed=exclude.suppressed,
            row_ids=row_ids,
            temperature=temperature,
            num_samples=num_samples,
            seed=int(seed),
        )
    )
    shape = (logits.shape[0], num_samples)
    return target.view(shape), log_prob.view(shape), log_escape, bad_row if check else -1


def cuda_draw(
    logits: Tensor,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: tuple[int, int],
    row_ids: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],  # contiguous
    lowest_bad: Tensor | None,
    first_row: int = 0,
) -> None:
    summaries = cuda.summaries(logits, cuda.kernels.ROW_SUMMARIES, logits.shape[0])
    greedy = temperature == 0.0
    seed_address, seed_value = seed
    target, log_prob, log_escape = out
    suppressed = address.bits(exclude.suppressed)
    cuda.kernels.jump(
        shape=cuda.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        row_ids=address.indices(row_ids),
        scale=1.0 if greedy else 1.0 / temperature,
        greedy=greedy,
        samples=num_samples,
        seed_address=seed_address,
        seed=seed_value,
        summaries=summaries.data_ptr(),
        target=target.data_ptr(),
        log_prob=log_prob.data_ptr(),
        log_escape=log_escape.data_ptr(),
        first_bad=address.of(lowest_bad),
        first_row=first_row,
        where=cuda.where(logits),
    )


def _cuda(
    logits: Tensor,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    out = outputs(logits, logits.shape[0], num_samples)
    lowest_bad = cuda.lowest_bad(logits, logits.shape[0], check)
    cuda_draw(logits, exclude, temperature, num_samples, cuda.seed(seed, logits), row_ids, out, lowest_bad)
    return *out, cuda.unread(lowest_bad)


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("jump"),
    "cuda": _cuda,
}


@_op.op("jump")
def _jump(
    logits: Tensor,
    exclude: Tensor | None,
    suppressed: Tensor | None,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.index_range("jump", "exclude", exclude, logits.shape[1], backend)
    excluded = Excluded(exclude, suppressed)
    target, log_prob, log_escape, bad = _IMPLEMENTATIONS[backend](
        logits, excluded, temperature, num_samples, seed, row_ids, check
    )
    bad = deferral.first_bad(bad, logits.shape[0], bad_later("jump"))
    if bad >= 0:
        one = slice(bad, bad + 1)
        raise_bad_row("jump", bad, logits[one], excluded.part(one))
    return target, log_prob, log_escape


@_jump.register_fake
def _(logits, exclude, suppressed, temperature, num_samples, seed, row_ids, check, backend):
    return outputs(logits, logits.shape[0], num_samples)
