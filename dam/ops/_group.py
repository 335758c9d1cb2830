"""Vocabularies whose columns the ranks of a process group share, and the one exchange of a call over them.

Every rank calls an op with its own columns and the same rows, and gets the same result. What it needs of the others
fits a few numbers a row, which one all-gather brings; sums of hidden states' gradients take one all-reduce. Before the
numbers comes a header, by which ranks that made different calls are told apart: they all raise, and say what differs.
"""

from __future__ import annotations

import itertools
import sys
import weakref
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKETS = 8  # sums of hidden states that are compared
# Of a bucket's root sum of squares: rounding to bfloat16 moves a sum by less than a hundredth, other states by about 1.
_TOLERANCE = 0.05
_ROOM = 2**22  # words of another rank beyond those expected that are still read
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch before 2.13


class Shards(NamedTuple):
    """Which columns of a vocabulary each rank of a group has: rank r those in [starts[r], starts[r + 1])."""

    group: Any
    rank: int
    starts: tuple[int, ...]
    is_known: bool = False  # else thought, until the ranks compare

    @property
    def size(self) -> int:
        return len(self.starts) - 1

    @property
    def first(self) -> int:
        return self.starts[self.rank]

    @property
    def columns(self) -> int:
        return self.starts[self.rank + 1] - self.first

    @property
    def vocabulary(self) -> int:
        return self.starts[-1]

    def local(self, column: Tensor) -> Tensor:
        """Columns of the vocabulary, or -1, as this rank's, -1 for those of other ranks."""
        here = (column >= self.first) & (column < self.first + self.columns)
        return (column - self.first).where(here, -1)

    def of_owner(self, gathered: Tensor, column: Tensor) -> Tensor:
        """gathered [ranks, T, J] of the rank that has each column of the vocabulary [T, J]; of any for -1."""
        ends = torch.tensor(self.starts[1:], device=column.device)
        owner = torch.searchsorted(ends, column.clamp(min=0), right=True).clamp(max=self.size - 1)
        return gathered.gather(0, owner[None]).squeeze(0)


def is_asked(group: Any, tensor: object) -> bool:
    """Whether an op is to be made over a group: one of several ranks is given, or what has columns is a DTensor."""
    if isinstance(group, dist.ProcessGroup) and group.size() == 1:
        group = None
    return group is not None or is_dtensor(tensor)


def is_dtensor(tensor: object) -> bool:
    """Whether it is one, without importing torch.distributed.tensor."""
    # Nothing is imported for tensors of the usual kinds, and looking at them costs a small call little.
    if type(tensor) in (Tensor, nn.Parameter) or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_of(op: str, name: str, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """What this rank has of an argument: of a DTensor its part, differentiably; of others they themselves.

    Args:
        dim: the vocabulary's dimension, along which a DTensor must be divided; None for one that no rank has a part of.

    Raises:
        ValueError: the DTensor lies otherwise.
    """
    if tensor is None or not is_dtensor(tensor):
        return tensor
    _sharded_dim(op, name, tensor, dim)
    return tensor.to_local()  # type: ignore[attr-defined]


def _sharded_dim(op: str, name: str, tensor: Any, dim: int | None) -> int | None:
    """The mesh dimension along which a DTensor is divided, None where it is whole on every rank."""
    from torch.distributed.tensor import Replicate, Shard

    wanted = None if dim is None else dim % max(tensor.dim(), 1)
    found = []
    for i, placement in enumerate(tensor.placements):
        if type(placement) is Shard and placement.dim == wanted:
            found.append(i)
        elif not (isinstance(placement, Replicate) or tensor.device_mesh.size(i) == 1):
            found += [i, i]
    if len(found) == (wanted is not None):
        return found[0] if found else None
    how = (
        "replicated" if wanted is None else f"sharded along dimension {wanted}, the vocabulary's, by one mesh dimension"
    )
    raise ValueError(f"{op}: a DTensor {name} must be {how}; got placements {tensor.placements}")


# What the ranks of a group last turned out to have, by how many columns are here.
_agreed: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def shards_of(op: str, name: str, tensor: Tensor, dim: int, group: Any) -> Shards:
    """The columns of each rank: as a DTensor says, else as they were last, else as many as here, until ranks compare.

    Raises:
        TypeError, ValueError: group is no process group that this rank is in, or is not the DTensor's.
    """
    if is_dtensor(tensor):
        mesh_dim = _sharded_dim(op, name, tensor, dim)
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        of_mesh = mesh.get_group(mesh_dim)
        if group is not None and group is not of_mesh:
            raise ValueError(f"{op}: {name} is a DTensor, which has a group of its own: leave group out")
        size, total = mesh.size(mesh_dim), tensor.shape[dim]
        each = -(-total // size)  # as torch.chunk divides
        starts = tuple(min(rank * each, total) for rank in range(size + 1))
        return Shards(of_mesh, dist.get_rank(of_mesh), starts, is_known=True)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed process group; got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: this process is not in group")
    columns = tensor.shape[dim]
    size = dist.get_world_size(group)
    starts = _agreed.get(group, {}).get(columns) or tuple(columns * r for r in range(size + 1))
    return Shards(group, rank, starts)


class Call(NamedTuple):
    """What all ranks of a group must agree on in a call, besides the columns that each has."""

    op: str
    rows: int
    slots: int  # targets or samples of a row
    settings: tuple[Any, ...]  # numbers and names
    indices: tuple[Tensor | None, ...]  # integers that are the same
    states: tuple[Tensor, ...] = ()  # hidden states, the same up to rounding


# Of a header: integers, and then of each of two kinds of hidden states `_BUCKETS` sums and their size.
_FIELDS = ("op", "rows", "targets or samples of a row", "columns", "shard map", "settings", "indices, seed or row_ids")
_COLUMNS, _MAP = _FIELDS.index("columns"), _FIELDS.index("shard map")
_HASHED = ("op", "settings", "indices, seed or row_ids")
_STATES = 2 * (_BUCKETS + 1)


def exchanged(call: Call, shards: Shards, make: Callable[[Shards], Tensor]) -> tuple[Shards, Tensor]:
    """The columns of each rank, and what `make` made of them on every rank, float64 [ranks, ...].

    One collective. Where ranks turn out to have other columns than was thought, which happens once for a way to divide
    a vocabulary, all make their numbers again; how many these are does not depend on the columns.

    Raises:
        ValueError: the ranks made different calls; says what differs.
        RuntimeError: another rank is gone, or made a call of another size.
    """
    while True:
        numbers = make(shards)
        gathered = _gathered(call, shards, torch.cat((_header(call, shards, numbers.device), _as_words(numbers))))
        header, body = gathered[:, : len(_FIELDS) + _STATES], gathered[:, len(_FIELDS) + _STATES :]
        found = body.contiguous().view(torch.float64).view(shards.size, *numbers.shape)
        if shards.is_known and numbers.is_cuda:
            # Not read by the host, which would wait.
            torch._assert_async(_are_alike(header).all(), f"{call.op}: the ranks of the group made different calls")
            return shards, found
        rows = header[:, : len(_FIELDS)].tolist()
        _compare(call, rows, header)
        starts = tuple(itertools.accumulate((row[_COLUMNS] for row in rows), initial=0))
        if all(row[_MAP] == _checksum(starts) for row in rows):
            return shards, found
        if shards.is_known:
            raise ValueError(
                f"{call.op}: the ranks of the group made different calls: their DTensors tell different "
                f"columns of each rank; these are {[row[_COLUMNS] for row in rows]}"
            )
        _agreed.setdefault(shards.group, {})[shards.columns] = starts
        shards = shards._replace(starts=starts)


def _as_words(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(-1).view(torch.int64)


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _header(call: Call, shards: Shards, device: torch.device) -> Tensor:
    """int64 [.]; what is on a GPU stays there."""
    numbers = [
        _checksum(call.op),
        call.rows,
        call.slots,
        shards.columns,
        _checksum(shards.starts),
        _checksum((shards.is_known, call.settings)),
    ]
    fields = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    mixed = fields.new_zeros(1)
    for n, x in enumerate(call.indices):
        if x is not None:
            # Sums of int64 wrap, which is as good a checksum; of an index that all rows share one is enough.
            words = (x[:1] if x.dim() == 1 and x.stride(0) == 0 else x).reshape(-1).to(device, torch.int64)
            places = torch.arange(words.shape[0], device=device)
            mixed = mixed * 1_000_003 + ((words + n + 1) * (2 * places + 1)).sum()
    states = [_sums_of(x) for x in call.states]
    states += [torch.zeros(_BUCKETS + 1, dtype=torch.float64, device=device)] * (2 - len(states))
    return torch.cat((fields, mixed, _as_words(torch.cat(states))))


def _sums_of(states: Tensor) -> Tensor:
    """Sums over parts of hidden states [T, D], float64 [_BUCKETS], and the size of what such a sum is of."""
    rows, width = states.shape
    states = states.detach()
    # In the order of rows, too.
    weights = torch.arange(rows, device=states.device) % 7 + 1
    sums = (weights.to(states.dtype) @ states).double() if rows else states.new_zeros(width, dtype=torch.float64)
    sums = torch.nn.functional.pad(sums, (0, -width % _BUCKETS)).view(-1, _BUCKETS).sum(dim=0)
    size = torch.linalg.vector_norm(states, dtype=torch.float64 if states.dtype == torch.float64 else torch.float32)
    return torch.cat((sums, size.double().view(1) * (20 / _BUCKETS) ** 0.5))  # 20: the mean of the squared weights


def _gathered(call: Call, shards: Shards, words: Tensor) -> Tensor:
    """The words of every rank, int64 [ranks, .]."""
    size, length = shards.size, words.shape[0]
    try:
        if words.is_cuda:
            out = words.new_empty(size * length)
            _all_gather(out, words, group=shards.group)
            return out.view(size, length)
        # gloo ends the process that gets a longer message than it waits for, before anyone can be told why; with room
        # for more, ranks that made another call are found by the header. What nothing is written to takes no memory.
        room, rank = 2 * length + _ROOM, shards.rank
        received, sent = ([n * (other != rank) for other in range(size)] for n in (room, length))
        out = words.new_empty((size - 1) * room)
        dist.all_to_all_single(out, words.repeat(size - 1), received, sent, group=shards.group)
        others = out.view(size - 1, room)[:, :length]
        return torch.cat((others[:rank], words[None], others[rank:]))
    except RuntimeError as error:
        raise _failed(call, shards, error) from error


def _failed(call: Call, shards: Shards, error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"{call.op}: the exchange with the other ranks of the group failed on rank {shards.rank}, which has columns "
        f"[{shards.first}, {shards.first + shards.columns}) and called it with {call.rows} rows and {call.slots} "
        f"targets or samples each: a rank is gone, or made another call ({error})"
    )


def _are_alike(header: Tensor) -> Tensor:
    """Whether ranks agree with the first on each field but their columns, bool [ranks, .]."""
    fields = [i for i in range(len(_FIELDS)) if i not in (_COLUMNS, _MAP)]
    states = header[:, len(_FIELDS) :].contiguous().view(torch.float64).view(header.shape[0], 2, -1)
    sums, size = states[..., :_BUCKETS], states[..., _BUCKETS:]
    # False for NaN: what is not a number is left to the op.
    apart = (sums - sums[:1]).abs() > _TOLERANCE * torch.maximum(size, size[:1])
    return torch.cat((header[:, fields] == header[:1, fields], ~apart.flatten(1)), dim=1)


def _compare(call: Call, rows: list[list[int]], header: Tensor) -> None:
    """Raises where ranks made different calls."""
    for i, field in enumerate(_FIELDS):
        values = [row[i] for row in rows]
        if field in ("columns", "shard map") or len(set(values)) == 1:
            continue
        told = "differ" if field in _HASHED else "; ".join(f"{x} on rank {rank}" for rank, x in enumerate(values))
        raise ValueError(f"{call.op}: the ranks of the group made different calls: {field}: {told}")
    if not bool(_are_alike(header).all()):
        raise ValueError(
            f"{call.op}: the ranks of the group made different calls: hidden differs. Each rank must have the same "
            "rows and other columns of the head; of data that is divided among ranks each needs the whole head"
        )


def summed(op: str, shards: Shards, partial: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place.

    Raises:
        RuntimeError: another rank is gone, or made another call.
    """
    try:
        dist.all_reduce(partial, group=shards.group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the sum of hidden states' gradients over the ranks of the group failed on rank {shards.rank}: a "
            f"rank is gone, or made another call ({error})"
        ) from error
    return partial
