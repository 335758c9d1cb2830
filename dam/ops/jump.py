"""jump: draw the destination of the next jump of a CTMC, with its log-probability and log escape rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.backends import address, choice, cpu, cuda, deferral, triton
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _group, _op, _parallel, _philox, _rows


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
    group: Any = None,
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
        group: torch.distributed process group whose ranks each have some columns of the vocabulary, in the order of
            ranks and as many as may be: logits then are those of this rank, and everything else, on every rank alike,
            is of the whole vocabulary, the draws too. These are those of one rank. One collective brings a few numbers
            a row. A DTensor that is sharded along the vocabulary says all that by itself. seed must be given. Ranks
            compare float64 numbers: of logits / temperature beyond 2^40 in size these keep no digit of what tells near
            ties apart, and draws are not always those of one rank.

    Returns:
        Jump(target, log_prob, log_escape), with the leading dimensions of logits. Not differentiable: see `log_prob`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or (with check)
            a row cannot be sampled; the message names the first such row.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 1; random stream: `dam.ops._philox`.
    """
    if _group.is_asked(group, logits):
        temperature = _checks.temperature("jump", temperature, zero=True)
        call = _parallel.of_rows("jump", group, _IMPLEMENTATIONS, logits, exclude, suppress, temperature)
        return over_group(call, num_samples, seed, row_ids, check)
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
    columns = x.shape[1]
    x = x if temperature == 0.0 else x.div_(temperature)
    target, _ = _raced(x, temperature == 0.0, num_samples, seed, row_ids)
    log_escape = torch.logsumexp(x, dim=1)
    # Nothing to reach: -inf, not the NaN of -inf - -inf.
    log_prob = _rows.gather_or(_rows.log_softmax(x), target.clamp(max=columns - 1), -torch.inf)
    log_prob = torch.where(target >= 0, log_prob, -torch.inf)
    return target, log_prob, log_escape


def _raced(
    x: Tensor,  # float64 [T, V]
    greedy: bool,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,
    first_tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """target [T, num_samples], -1 for none, and the logarithms of when its tile and it arrived, [T, num_samples, 2]."""
    rows, columns = x.shape
    top = x.amax(dim=1, keepdim=True)
    unreachable = top == -torch.inf
    if greedy:
        target = x.argmax(dim=1, keepdim=True).expand(rows, num_samples).clone()
        arrival = -top[:, :, None].expand(rows, num_samples, 2)
    else:
        width = min(columns, _philox.TILE)
        # Less the largest, beside which the noise would be lost to rounding where logits are large.
        top = torch.where(top.abs() < torch.inf, top, 0.0)
        tiles = F.pad(x - top, (0, -columns % width), value=-torch.inf).view(rows, -1, width)
        # Exponential race among tiles: the first arrival, at rate exp(log_mass), is argmin(log E - log_mass).
        log_mass = torch.logsumexp(tiles, dim=2)
        noise = _philox.tile_exponentials(seed, row_ids, num_samples, tiles.shape[1], first_tile)
        tile_time, tile = (noise.log() - log_mass[:, None, :]).min(dim=2)
        tokens = tiles.gather(1, tile[:, :, None].expand(-1, -1, width))
        noise = _philox.token_exponentials(seed, row_ids, first_tile + tile, width)
        token_time, token = (noise.log() - tokens).min(dim=2)
        target = tile * _philox.TILE + token
        arrival = torch.stack((tile_time, token_time), dim=2) - top[:, :, None]
    target = torch.where(unreachable, -1, target)
    return target, torch.where(unreachable[:, :, None], torch.inf, arrival)


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
    first_tile: int = 0,
    exact: tuple[Tensor, Tensor] | None = None,  # arrival [T, num_samples, 2] and log_escape [T], both float64
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
        first_tile=first_tile,
        arrival=0 if exact is None else exact[0].data_ptr(),
        exact_log_escape=0 if exact is None else exact[1].data_ptr(),
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


@_op.untraced
def over_group(
    call: _parallel.Call, num_samples: int, seed: int | Tensor | None, row_ids: Tensor | None, check: bool
) -> Jump:
    """jump among the columns that the ranks of a group have: the draws of one rank that has them all."""
    op, reference = call.op, call.reference
    _checks.boolean(op, "check", check)
    if seed is None:
        raise ValueError(f"{op}: over a group seed must be given, the same on all ranks")
    temperature, num_samples, seed, row_ids = sampling_arguments(
        op, reference, call.lead, call.temperature, num_samples, seed, row_ids
    )
    ids = torch.arange(call.rows, device=reference.device) if row_ids is None else row_ids
    key = seed

    def make(shards: _group.Shards) -> Tensor:
        """[T, 1 + 4 candidates num_samples]: log_escape of these columns; of each candidate how `_chosen` takes it."""
        found = call.numbers(1 + 4 * _CANDIDATES * num_samples)
        found[:, 0] = -torch.inf
        candidates = found[:, 1:].view(call.rows, _CANDIDATES, num_samples, 4)
        candidates[..., :2], candidates[..., 2] = torch.inf, -1
        left_out = call.left_out
        for part, logits, _ in call.source.chunks():
            for slot, first_tile, offset, piece in _pieces(shards, logits, greedy=temperature == 0.0):
                of_piece = Excluded(left_out.row, left_out.among(offset, piece.shape[1]))
                exclude = of_piece.shifted(offset, piece.shape[1]).part(part)
                target, arrival, log_escape = PART[call.backend](
                    piece, first_tile, exclude, temperature, num_samples, key, ids[part]
                )
                found[part, 0] = torch.logaddexp(found[part, 0], log_escape)
                target = torch.where(target < 0, -1, target + offset)
                candidates[part, slot, :, :2], candidates[part, slot, :, 2] = arrival, target.double()
                candidates[part, slot, :, 3] = call.at(logits, shards.local(target), Excluded())
        return found

    with torch.no_grad():
        settings = (num_samples, key.device.type == "cpu" and int(key), check)
        indices = (ids, None if key.device.type == "cpu" else key)
        shards, gathered = call.exchanged(make, num_samples, settings, more=indices)
        log_escape = torch.logsumexp(gathered[..., 0], dim=0)
        candidates = gathered[..., 1:].view(shards.size, call.rows, _CANDIDATES, num_samples, 4).transpose(1, 2)
        chosen = _chosen(shards, candidates.flatten(0, 1), greedy=temperature == 0.0)
        target = chosen[..., 2].long()
        log_prob = torch.where(target < 0, -torch.inf, (chosen[..., 3] - log_escape[:, None]).clamp(max=0.0))
        drawn = (target, log_prob.to(call.dtype), log_escape.to(call.dtype))
        if check:
            bad = ~(log_escape.abs() < torch.inf)
            entries = torch.arange(call.rows, device=bad.device)
            lowest = torch.cat((entries.where(bad, call.rows), entries.new_full((1,), call.rows))).amin()
            row = deferral.first_bad(lowest if bad.is_cuda else int(lowest), call.rows, bad_later(op))
            if 0 <= row < call.rows:
                raise ValueError(f"{bad_later(op)(row)} (check=False skips this test)")
    return as_jump(drawn, num_samples, call.lead)


# Of a rank: among the tiles that it has whole, and in the one that it shares with ranks before it and after it.
_CANDIDATES = 3


def _pieces(shards: _group.Shards, logits: Tensor, *, greedy: bool) -> Iterator[tuple[int, int, int, Tensor]]:
    """A candidate's number, the tile that its logits begin at, the column that they do, and they themselves.

    At temperature 0 there is no noise, whose tiles would matter: then one piece is all.
    """
    first, last, tile = shards.first, shards.first + shards.columns, _philox.TILE
    if greedy:
        yield 0, 0, first, logits
        return
    begin, end = -(-first // tile) * tile, last if last == shards.vocabulary else last // tile * tile
    if begin < end:
        yield 0, begin // tile, begin, logits[:, begin - first : end - first]
    if first < begin:
        # Behind columns of a rank before, which cannot be reached here.
        piece = F.pad(logits[:, : min(begin, last) - first], (first % tile, 0), value=-torch.inf)
        yield 1, first // tile, first // tile * tile, piece
    if (at := max(begin, end)) < last:
        yield 2, at // tile, at, logits[:, at - first :]


def _chosen(shards: _group.Shards, candidates: Tensor, *, greedy: bool) -> Tensor:
    """The draws [T, num_samples, 4] among candidates [ranks * _CANDIDATES, T, num_samples, 4].

    Of each the logarithms of when its tile and it arrived, itself and its logit. The pieces of a tile, which several
    ranks have, arrive as one: at the sum of their rates.
    """
    tiles: dict[tuple[int, int], list[int]] = {}
    for rank, (first, last) in enumerate(itertools.pairwise(shards.starts)):
        at = rank * _CANDIDATES
        tiles.setdefault((-(-first // _philox.TILE), 1), []).append(at)
        tiles.setdefault((first // _philox.TILE, 0), []).append(at + 1)
        tiles.setdefault(((last - 1) // _philox.TILE, 0), []).append(at + 2)
    if greedy:  # which makes one piece of a rank
        tiles = {(rank, 0): [rank * _CANDIDATES] for rank in range(shards.size)}
    width = max(len(found) for found in tiles.values())
    # Tiles in the order of columns, so that of equal arrivals the first is taken, as on one rank.
    missing = candidates.shape[0]
    members = [found + [missing] * (width - len(found)) for _, found in sorted(tiles.items())]
    nothing = torch.tensor([torch.inf, torch.inf, -1.0, 0.0], dtype=candidates.dtype, device=candidates.device)
    padded = torch.cat((candidates, nothing.expand(1, *candidates.shape[1:])))
    of_tiles = padded[torch.tensor(members, device=candidates.device)]  # [tiles, width, T, num_samples, 4]
    time = -torch.logsumexp(-of_tiles[..., 0], dim=1)
    first_tile = time.argmin(dim=0)
    within = of_tiles.gather(0, first_tile[None, None, :, :, None].expand(1, width, -1, -1, 4)).squeeze(0)
    token = within[..., 1].argmin(dim=0)
    return within.gather(0, token[None, :, :, None].expand(1, -1, -1, 4)).squeeze(0)


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": triton.launcher("jump"),
    "cuda": _cuda,
}


# ---- of rows whose other tiles are elsewhere: see dam.ops._parallel


def _torch_part(
    logits: Tensor,
    first_tile: int,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    target, arrival, log_escape = _part_outputs(logits, num_samples)
    for part in _rows.chunks(rows, (columns + num_samples * min(columns, _philox.TILE)) * _rows.REFERENCE_BYTES):
        x = _rows.allowed(logits[part], exclude.part(part)).div_(temperature or 1.0)
        target[part], arrival[part] = _raced(x, temperature == 0.0, num_samples, seed, row_ids[part], first_tile)
        log_escape[part] = torch.logsumexp(x, dim=1)
    return target, arrival, log_escape


def _part_outputs(logits: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((rows, num_samples), dtype=torch.int64),
        logits.new_empty((rows, num_samples, 2), dtype=torch.float64),
        logits.new_empty((rows,), dtype=torch.float64),
    )


def _cpu_part(
    logits: Tensor,
    first_tile: int,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    target, arrival, log_escape = _part_outputs(logits, num_samples)
    suppressed = address.bits(exclude.suppressed)
    cpu.kernels.jump_part(
        shape=cpu.shape(logits),
        logits=address.matrix(logits),
        exclude=address.indices(exclude.row),
        suppressed=address.of(suppressed),
        row_ids=address.indices(row_ids),
        temperature=temperature,
        num_samples=num_samples,
        seed=int(seed) % 2**64,
        first_tile=first_tile,
        target=target.data_ptr(),
        arrival=arrival.data_ptr(),
        log_escape=log_escape.data_ptr(),
    )
    return target, arrival, log_escape


def _cuda_part(
    logits: Tensor,
    first_tile: int,
    exclude: Excluded,
    temperature: float,
    num_samples: int,
    seed: Tensor,
    row_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    target, arrival, log_escape = _part_outputs(logits, num_samples)
    _, log_prob, rounded = outputs(logits, logits.shape[0], num_samples)
    out, exact, key = (target, log_prob, rounded), (arrival, log_escape), cuda.seed(seed, logits)
    cuda_draw(logits, exclude, temperature, num_samples, key, row_ids, out, None, 0, first_tile, exact)
    return target, arrival, log_escape


# Of logits [T, .] of the tiles from first_tile on, and what is left out of these: the draws among them, int64
# [T, num_samples], -1 where nothing can be reached; the logarithms of when their tiles and they arrived, float64
# [T, num_samples, 2]; and log_escape of these columns, float64 [T].
PART: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "torch": _torch_part,
    "cpu": _cpu_part,
    "triton": triton.launcher("jump", "jump_part"),
    "cuda": _cuda_part,
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
