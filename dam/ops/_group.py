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

from dam.ops import _op, _rows

_BUCKETS = 8  # sums of hidden states, or of other numbers of rows, that are compared
# Of a bucket's root sum of squares: rounding to bfloat16 moves a sum by two hundredths at most, other data by about 1.
_TOLERANCE = 0.05
_KINDS = 6  # of such numbers, at most
# Of splitmix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014), as int64.
_PLACE, _MIX = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
_ROOM = 2**22  # words of another rank beyond those expected that are still read


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


def _is_group(group: object) -> bool:
    kind: Any = getattr(dist, "ProcessGroup", None)  # None where torch was built without distributed
    return kind is not None and isinstance(group, kind)


def is_asked(group: Any, tensor: object) -> bool:
    """Whether an op is to be made over a group: one of several ranks is given, or what has columns is a DTensor."""
    if group is None:
        return is_dtensor(tensor)
    return is_dtensor(tensor) or not (_is_group(group) and group.size() == 1)


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
    if tensor is None:
        return None
    if not is_dtensor(tensor):
        return _plain(op, name, tensor)
    mesh_dim = sharded_dim(op, name, tensor, dim)
    local = tensor.to_local()  # type: ignore[attr-defined]
    if mesh_dim is not None and dim is not None:
        starts = _chunks(tensor, dim, mesh_dim)
        rank = tensor.device_mesh.get_coordinate()[mesh_dim]  # type: ignore[attr-defined]
        if local.shape[dim] != starts[rank + 1] - starts[rank]:
            raise ValueError(
                f"{op}: a DTensor {name} must be divided as torch.chunk divides: of {tensor.shape[dim]} this rank must "
                f"have {starts[rank + 1] - starts[rank]}; got {local.shape[dim]}. Give other parts as plain tensors, "
                "with group"
            )
    return _plain(op, name, local)


def _chunks(tensor: Any, dim: int, mesh_dim: int) -> tuple[int, ...]:
    """Where the parts of a DTensor begin along a dimension, and their end."""
    size, total = tensor.device_mesh.size(mesh_dim), tensor.shape[dim]
    each = -(-total // size)  # as torch.chunk divides
    return tuple(min(rank * each, total) for rank in range(size + 1))


def _plain(op: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its numbers, as kernels read it, which see no more than an address.

    Raises:
        TypeError: it is a wrapper around other tensors, of no kind that is known.
    """
    if _op.is_wrapper(tensor):
        # What a collective that still runs returns; torch has no public name for its class.
        if not hasattr(tensor, "trigger_wait"):
            raise TypeError(f"{op}: {name} must be a plain tensor or a DTensor; got {type(tensor).__name__}")
        tensor = _Waited.apply(tensor)
    return tensor.resolve_neg()


class _Waited(torch.autograd.Function):
    """What a collective brings, once it is there. Views of it would be as it is, still to come."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.trigger_wait().detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def sharded_dim(op: str, name: str, tensor: Any, dim: int | None) -> int | None:
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
        mesh_dim = sharded_dim(op, name, tensor, dim)
        assert mesh_dim is not None
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        of_mesh = mesh.get_group(mesh_dim)
        if group is not None and group is not of_mesh:
            raise ValueError(f"{op}: {name} is a DTensor, which has a group of its own: leave group out")
        place: list[Any] = list(mesh.get_coordinate())
        rank, place[mesh_dim] = place[mesh_dim], slice(None)
        if mesh.mesh[tuple(place)].tolist() != dist.get_process_group_ranks(of_mesh):
            raise ValueError(f"{op}: the mesh of a DTensor {name} must have ranks in the order of their group's")
        return Shards(of_mesh, rank, _chunks(tensor, dim, mesh_dim), is_known=True)
    if not _is_group(group):
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
    numbers: tuple[tuple[str, Tensor | None], ...] = ()  # of rows [T, .], the same up to rounding, with their names


# Of a header: integers, and then of each kind of numbers of rows `_BUCKETS` sums and their size.
_FIELDS = ("op", "rows", "targets or samples of a row", "columns", "shard map", "settings", "indices, seed or row_ids")
_COLUMNS, _MAP = _FIELDS.index("columns"), _FIELDS.index("shard map")
_HASHED = ("op", "settings", "indices, seed or row_ids")
_SUMS = _KINDS * (_BUCKETS + 1)


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
        header, body = gathered.split([len(_FIELDS) + _SUMS, gathered.shape[1] - len(_FIELDS) - _SUMS], dim=1)
        found = body.contiguous().view(torch.float64).view(shards.size, *numbers.shape)
        if shards.is_known and numbers.is_cuda:
            # Not read by the host, which would wait.
            same = _are_alike(header).all() & (header[:, _MAP] == header[0, _MAP]).all()
            _op.assert_async(same, f"{call.op}: the ranks of the group made different calls")
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
            words = words + torch.arange(1, words.shape[0] + 1, device=device) * _PLACE
            words = (words ^ words >> 30) * _MIX
            mixed = mixed * 1_000_003 + (words ^ words >> 27).sum() + n + 1
    sums = torch.zeros((_KINDS, _BUCKETS + 1), dtype=torch.float64, device=device)
    for n, (_, numbers_of_rows) in enumerate(call.numbers):
        if numbers_of_rows is not None:
            sums[n] = _sums_of(numbers_of_rows)
    return torch.cat((fields, mixed, _as_words(sums)))


def _sums_of(states: Tensor) -> Tensor:
    """Sums over parts of numbers of rows [T, D], float64 [_BUCKETS], and the size of what such a sum is of."""
    rows, width = states.shape
    states, dtype = states.detach(), _rows.accumulator(states.dtype)
    # In the order of rows, too. Not in 16 bits, in which sums of many rows overflow, or are rounded by more than those
    # of ranks may differ.
    weights = (torch.arange(rows, device=states.device) % 7 + 1).to(dtype)
    sums = torch.zeros(width, dtype=torch.float64, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for part in _rows.chunks(rows, width * dtype.itemsize):
            sums += weights[part] @ states[part].to(dtype)
    sums = torch.nn.functional.pad(sums, (0, -width % _BUCKETS)).view(-1, _BUCKETS).sum(dim=0)
    size = torch.linalg.vector_norm(states, dtype=dtype)
    return torch.cat((sums, size.double().view(1) * (20 / _BUCKETS) ** 0.5))  # 20: the mean of the squared weights


def _gathered(call: Call, shards: Shards, words: Tensor) -> Tensor:
    """The words of every rank, int64 [ranks, .]."""
    size, length = shards.size, words.shape[0]
    try:
        if words.is_cuda:
            out = words.new_empty(size * length)
            gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch before 2.13
            gather(out, words, group=shards.group)
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
    """Whether ranks agree with the first on each field but their columns, and kind of numbers; bool [ranks, .]."""
    fields = [i for i in range(len(_FIELDS)) if i not in (_COLUMNS, _MAP)]
    kinds = header[:, len(_FIELDS) :].contiguous().view(torch.float64).view(header.shape[0], _KINDS, -1)
    sums, size = kinds[..., :_BUCKETS], kinds[..., _BUCKETS:]
    # False for NaN: what is not a number is left to the op.
    apart = (sums - sums[:1]).abs() > _TOLERANCE * torch.maximum(size, size[:1])
    return torch.cat((header[:, fields] == header[:1, fields], ~apart.any(dim=2)), dim=1)


def _compare(call: Call, rows: list[list[int]], header: Tensor) -> None:
    """Raises where ranks made different calls."""
    for i, field in enumerate(_FIELDS):
        values = [row[i] for row in rows]
        if field in ("columns", "shard map") or len(set(values)) == 1:
            continue
        told = "differ" if field in _HASHED else "; ".join(f"{x} on rank {rank}" for rank, x in enumerate(values))
        raise ValueError(f"{call.op}: the ranks of the group made different calls: {field}: {told}")
    alike = _are_alike(header)[:, -_KINDS:].all(dim=0).tolist()
    for (name, _), is_alike in zip(call.numbers, alike, strict=False):
        if not is_alike:
            raise ValueError(
                f"{call.op}: the ranks of the group made different calls: {name} differs. Each rank must have the same "
                "rows and other columns of the head; of data that is divided among ranks each needs the whole head"
            )


# How many differentiable calls a group has seen: a backward pass tells its own from others.
_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_NUMBERS = 512  # so that squares of numbers are exact in float32, and their sums over 64 ranks


def numbered(shards: Shards) -> int:
    """The number of a call that has a backward pass; the same on all ranks, which have just compared calls."""
    number = _made.get(shards.group, 0) + 1
    _made[shards.group] = number % _NUMBERS
    return number


def summed(op: str, shards: Shards, number: int, partial: Tensor) -> Tensor:
    """The sum of all ranks' tensors, of the call of that number.

    Raises:
        RuntimeError: another rank is gone, or runs another backward pass; on a GPU that is an assertion there.
    """
    marks = partial.new_tensor([number, number * number])
    both = torch.cat((partial.reshape(-1), marks))
    try:
        dist.all_reduce(both, group=shards.group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the sum of hidden states' gradients over the ranks of the group failed on rank {shards.rank}: a "
            f"rank is gone, or made another call ({error})"
        ) from error
    # By Cauchy and Schwarz, equal where all numbers are.
    first, second = both[-2:].double()
    alike, message = first * first == shards.size * second, f"{op}: the ranks of the group run other backward passes"
    if both.is_cuda:
        _op.assert_async(alike, message)
    elif not bool(alike):
        raise RuntimeError(f"{message}: of calls in turn they must be in the same order on every rank")
    return both[:-2].view(partial.shape)
