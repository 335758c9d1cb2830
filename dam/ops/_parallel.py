"""What the ops share over vocabularies whose columns the ranks of a process group have: see `dam.ops._group`.

Each op has three parts. What a rank makes of its own columns, by the kernels of the backend in use; what all ranks make
of everybody's numbers, the same on each; and the gradient of a rank's own columns, which needs no more than those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.backends import choice
from dam.kernels.excluded import Excluded
from dam.ops import _checks, _excluded, _gradient, _group, _head, _op, _rows

# Fills a gradient: rows, their logits, the base's, and where it goes.
_Fill = Callable[[slice, Tensor, "Tensor | None", Tensor], None]
_Asked = tuple[Tensor, Tensor, Tensor]  # targets that count, pull and shares, as `dam.ops._gradient` has them
_ANY = 2**62  # columns of a vocabulary of which nothing is known yet


class _Rows(NamedTuple):
    """Logits of this rank's columns, as they are given."""

    logits: Tensor  # [T, columns here]
    base: Tensor | None
    backend: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that have a gradient."""
        return (self.logits,)

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """All of them, as a backward pass needs them."""
        return (self.logits, self.base)

    def holding(self, kept: Sequence[Any]) -> _Rows:
        logits, base = kept
        return self._replace(logits=logits, base=base)

    @property
    def settings(self) -> tuple[bool, ...]:
        return (self.base is not None,)

    @property
    def states(self) -> tuple[tuple[str, Tensor | None], ...]:
        return ()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Rows, their logits [., columns here] and the base's."""
        if self.logits.shape[1] > 0:
            yield slice(0, self.logits.shape[0]), self.logits, self.base

    def gradients(
        self, fill: _Fill, needed: Sequence[bool], summed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor | None, ...]:
        gradient = torch.empty_like(self.logits, memory_format=torch.contiguous_format)
        for part, logits, base in self.chunks():
            fill(part, logits, base, gradient)
        return (gradient,)


class _OfHead(NamedTuple):
    """Logits of hidden states and of this rank's rows of a head, in chunks, as the linear ops make them."""

    head: _head.Projection
    base: _head.Projection | None
    backend: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.head.tensors

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        return (*self.head.tensors, *(() if self.base is None else self.base.tensors[:3]))

    def holding(self, kept: Sequence[Any]) -> _OfHead:
        hidden, weight, bias, low_hidden, low_weight = kept[:5]
        head = _head.Projection(hidden, weight, bias, low_hidden, low_weight, self.head.softcap)
        base = self.base
        if base is not None:
            hidden, weight, bias = kept[5:]
            base = base._replace(hidden=hidden, weight=weight, bias=bias)
        return self._replace(head=head, base=base)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What every rank must have alike."""
        return tuple(
            None if part is None else (part.softcap, *(x is not None for x in part.tensors))
            for part in (self.head, self.base)
        )

    @property
    def states(self) -> tuple[tuple[str, Tensor | None], ...]:
        """The same, up to rounding."""
        base = None if self.base is None else self.base.hidden
        return ("hidden", self.head.hidden), ("lora.a, or lora.scale,", self.head.low_hidden), ("base_hidden", base)

    @property
    def _arrays(self) -> int:
        return 1 if self.base is None else 2

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        if self.head.weight.shape[0] == 0:
            return
        for part, memory in _head.chunks(self.head, arrays=self._arrays, backend=self.backend):
            base = None if self.base is None else _head.logits(self.base.part(part), memory[1])
            yield part, _head.logits(self.head.part(part), memory[0]), base

    def gradients(
        self, fill: _Fill, needed: Sequence[bool], summed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Those of the head's tensors are of this rank's rows, those of hidden states of all ranks' columns."""
        head, arrays, backend = self.head, self._arrays, self.backend
        a, b, c, d, e = needed
        here, wanted = head.weight.shape[0] > 0, (a, b, c, d, e)
        held = _head.held_for(head, wanted, arrays=arrays, backend=backend) if here else None
        gradients = _head.Gradients(head, wanted, held, partial=True)
        dtype = _head.gradient_dtype(head, backend)
        chunks = _head.chunks(head, arrays=arrays, backend=backend, gradient=dtype, held=held) if here else ()
        for part, memory in chunks:
            base = None if self.base is None else _head.logits(self.base.part(part), memory[1])
            into = memory[arrays] if len(memory) > arrays else memory[0]
            for some, logits, gradient in _head.blocks(head, part, memory[0], into):
                assert gradient is not None
                of_base = None if base is None else base[some.start - part.start : some.stop - part.start]
                fill(some, logits, of_base, gradient)
            gradients.add_rows(part, into)
        found = [x if need else None for x, need in zip(gradients.finish(), needed, strict=True)]
        # One sum over ranks, of what hidden states get through the head and through an adapter's first factor.
        parts = [(i, x) for i in (0, 3) if (x := found[i]) is not None]
        if parts:
            total = summed(parts[0][1] if len(parts) == 1 else torch.cat([x for _, x in parts], dim=1))
            for (i, _), x in zip(parts, total.split([x.shape[1] for _, x in parts], dim=1), strict=True):
                found[i] = x.to(head.hidden.dtype)
        return tuple(found)


class _LeftOut(NamedTuple):
    """What an op leaves out: columns of the vocabulary, whose size is not certain before the ranks compared."""

    row: Tensor | None  # int64 [T]
    mask: Tensor | None  # bool [V]
    ids: Tensor | None  # int64 [S]

    def counted(self, column: Tensor) -> Tensor:
        """Which of columns [T, J], or -1, are neither -1 nor left out."""
        found = column >= 0
        if self.row is not None:
            found = found & (column != self.row[:, None])
        if self.mask is not None:
            return found & ~self.mask[column.clamp(0, self.mask.shape[0] - 1)]
        return found if self.ids is None else found & ~torch.isin(column, self.ids)

    def among(self, first: int, columns: int) -> Tensor | None:
        """bool [columns]: those of so many columns from `first` on that no row has."""
        if self.mask is not None:
            found = self.mask.new_zeros(columns)
            part = self.mask[first : first + columns]
            found[: part.shape[0]] = part
            return found
        if self.ids is None:
            return None
        at = self.ids - first
        at = at.where((at >= 0) & (at < columns), columns)  # one more, for those elsewhere
        return torch.zeros(columns + 1, dtype=torch.bool, device=at.device).index_fill_(0, at, True)[:-1]

    def excluded(self, shards: _group.Shards) -> Excluded:
        """The same among this rank's columns."""
        return Excluded(None if self.row is None else shards.local(self.row), self.among(shards.first, shards.columns))


class Call(NamedTuple):
    """A call of an op over a group: the arguments that all ops have, once they fit."""

    op: str
    source: _Rows | _OfHead
    shards: _group.Shards
    left_out: _LeftOut
    lead: torch.Size
    temperature: float
    needed: tuple[bool, ...]  # whether each of the source's tensors gets a gradient

    @property
    def backend(self) -> str:
        return self.source.backend

    @property
    def rows(self) -> int:
        return self.reference.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of results."""
        return _rows.accumulator(self.reference.dtype)

    @property
    def reference(self) -> Tensor:
        like = self.source.tensors[0]
        assert like is not None
        return like

    def numbers(self, count: int, fill: float = 0.0) -> Tensor:
        """float64 [T, count]: what a rank without columns says."""
        return torch.full((self.rows, count), fill, dtype=torch.float64, device=self.reference.device)

    def exchanged(
        self,
        make: Callable[[_group.Shards], Tensor],
        slots: int,
        settings: tuple[Any, ...] = (),
        targets: Tensor | None = None,
        more: tuple[Tensor | None, ...] = (),
        weights: tuple[tuple[str, Tensor | None], ...] = (),  # of rows, [T] or [T, J], with their names
    ) -> tuple[_group.Shards, Tensor]:
        """`_group.exchanged`; what depends on the size of the vocabulary is checked here, once it is certain."""
        row, mask, ids = self.left_out
        call = _group.Call(
            self.op,
            self.rows,
            slots,
            (self.temperature, str(self.reference.dtype), self.needed, self.source.settings, *settings),
            (targets, row, mask, ids, *more),
            (*self.source.states, *((name, x if x is None or x.dim() == 2 else x[:, None]) for name, x in weights)),
        )
        shards, gathered = _group.exchanged(call, self.shards, make)
        columns = shards.vocabulary
        for name, value, low in (("target", targets, -1), ("exclude", row, -1), ("suppress", ids, 0)):
            if value is None:
                continue
            if value.is_cuda:  # a device-side assertion, as in torch's ops
                _op.assert_async(((value >= low) & (value < columns)).all(), f"{self.op}: {name} out of range")
            elif low == 0 and value.numel() > 0 and int(value.min()) < 0:
                raise ValueError(f"{self.op}: {name} must hold ids in [0, {columns}); got {int(value.min())}")
            else:
                _checks.index_range(self.op, name, value, columns, "torch")
        if mask is not None and mask.shape != (columns,):
            raise ValueError(
                f"{self.op}: a mask suppress must have shape [{columns}], of all ranks' columns; got {list(mask.shape)}"
            )
        return shards, gathered

    def at(self, logits: Tensor, column: Tensor, exclude: Excluded) -> Tensor:
        """float64 [., J]: logits / temperature at columns of these, -inf at what is left out; 0 for -1, elsewhere."""
        at = column.clamp(min=0)
        x = logits.gather(1, at).double() / (self.temperature or 1.0)
        if exclude.row is not None:
            x = torch.where(column == exclude.row[:, None], -torch.inf, x)
        if exclude.suppressed is not None:
            x = torch.where(exclude.suppressed[at], -torch.inf, x)
        return torch.where(column < 0, 0.0, x)

    def differentiable(self, run: Callable[[], tuple[Tensor, _group.Shards, Callable[[Tensor], _Asked]]]) -> Tensor:
        """The value that `run` returns, with a gradient: `run` also returns what makes that of the value's gradient."""
        return _Differentiable.apply(self, run, *self.source.tensors)

    def gradients(
        self,
        shards: _group.Shards,
        number: int,
        target: Tensor,
        pull: Tensor,
        shares: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        row, suppressed = self.left_out.row, self.left_out.among(shards.first, shards.columns)

        def fill(part: slice, logits: Tensor, base: Tensor | None, into: Tensor) -> None:
            _gradient.IMPLEMENTATIONS[self.backend](
                logits,
                base,
                shards.first,
                shards.vocabulary,
                _rows.part(target, part),
                _rows.part(pull, part),
                _rows.part(shares, part),
                Excluded(row, suppressed).part(part),
                self.temperature,
                into,
            )

        return self.source.gradients(fill, needed, lambda partial: _group.summed(self.op, shards, number, partial))


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, run, *tensors):
        value, ctx.shards, ctx.asked = run()
        ctx.number = _group.numbered(ctx.shards)
        # Tensors are kept where torch frees them, or puts them elsewhere, and nowhere else.
        kept = call.source.kept
        ctx.call = call._replace(source=call.source.holding((None,) * len(kept)))
        ctx.save_for_backward(*kept)
        return value

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        call = ctx.call._replace(source=ctx.call.source.holding(kept))
        with torch.no_grad():
            found = call.gradients(ctx.shards, ctx.number, *ctx.asked(grad), ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            found = tuple(None if x is None else _Once.apply(call.op, x, grad, *kept) for x in found)
        return None, None, *found


class _Once(torch.autograd.Function):
    """A gradient that has none, of what it depends on."""

    @staticmethod
    def forward(ctx, op, gradient, *depends_on):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op}: over a group its gradient has no gradient")


def log_escape_of(gathered: Tensor) -> Tensor:
    """log_escape of the vocabulary, float64 [T], of those of each rank's columns [ranks, T].

    NaN for +inf: a rate beside which every other one would count 0 has no distribution, as on one rank.
    """
    found = torch.logsumexp(gathered, dim=0)
    return torch.where(found == torch.inf, torch.nan, found)


def of_rows(
    op: str,
    group: Any,
    implementations: dict[str, Any],
    logits: Tensor,
    exclude: int | Tensor,
    suppress: Any,
    temperature: float,
    base_logits: Tensor | None = None,
) -> Call:
    """The arguments of an op over rows of logits, of which each rank has some columns.

    Raises:
        ValueError, TypeError: one does not fit, whatever the other ranks have.
    """
    _checks.floating(op, "logits", logits)
    here = _group.local_of(op, "logits", logits, -1)
    assert here is not None
    x, lead = _checks.rows(op, "logits", here, "V", least=0)
    shards = _group.shards_of(op, "logits", logits, -1, group)
    base = _same_kind(op, "base_logits", base_logits, "logits", logits, -1)
    if base is not None:
        _checks.like(op, "base_logits", base, "logits", here)
        base = _checks.rows(op, "base_logits", base, "V", least=0)[0].detach()
    return _call(op, _Rows(x, base, _backend(op, implementations, x)), shards, exclude, suppress, lead, temperature, x)


def of_head(
    op: str,
    group: Any,
    implementations: dict[str, Any],
    hidden: Tensor,
    head: _head.Head,
    exclude: int | Tensor,
    suppress: Any,
    temperature: float,
    base_hidden: Tensor | None = None,
    base: _head.Head | None = None,
) -> Call:
    """The arguments of an op over hidden states and a head, of which each rank has some rows.

    Raises:
        ValueError, TypeError: one does not fit, whatever the other ranks have.
    """
    _checks.floating(op, "head_weight", head.weight)
    local = _group.local_of(op, "hidden", hidden, None)
    assert local is not None
    x, lead = _checks.rows(op, "hidden", local, "D")
    projection = _projection(op, x, head, head.weight, ("hidden", "head_weight", "bias", "softcap"))
    shards = _group.shards_of(op, "head_weight", head.weight, 0, group)
    of_base = None
    if base is not None and base_hidden is not None:
        local = _group.local_of(op, "base_hidden", base_hidden, None)
        assert local is not None
        _checks.like(op, "base_hidden", local, "hidden", x, shape=False)
        states, base_lead = _checks.rows(op, "base_hidden", local, "D")
        if base_lead != lead:
            raise ValueError(f"{op}: base_hidden must have the rows of hidden, {list(lead)}; got {list(base_lead)}")
        names = ("base_hidden", "base_head_weight", "base_bias", "base_softcap")
        of_base = _projection(op, states.detach(), base, head.weight, names)
        if of_base.weight.shape[0] != projection.weight.shape[0]:
            raise ValueError(
                f"{op}: base_head_weight must have as many rows as head_weight, {projection.weight.shape[0]}; got "
                f"{of_base.weight.shape[0]}"
            )
        of_base = of_base._replace(
            weight=of_base.weight.detach(), bias=None if of_base.bias is None else of_base.bias.detach()
        )
    source = _OfHead(projection, of_base, _backend(op, implementations, x))
    return _call(op, source, shards, exclude, suppress, lead, temperature, x)


def _projection(
    op: str, hidden: Tensor, head: _head.Head, like: Tensor, names: tuple[str, str, str, str]
) -> _head.Projection:
    weight = _same_kind(op, names[1], head.weight, "head_weight", like, 0)
    bias = _same_kind(op, names[2], head.bias, "head_weight", like, 0)
    lora = head.lora
    if lora is not None and isinstance(lora, _head.LoRA):
        a, b = _group.local_of(op, "lora.a", lora.a, None), _same_kind(op, "lora.b", lora.b, "head_weight", like, 0)
        lora = _head.LoRA(a, b, lora.scale)  # type: ignore[arg-type]
    assert weight is not None
    return _head.checked(op, hidden, weight, bias, lora, head.softcap, names, least=0)


def _same_kind(op: str, name: str, tensor: Tensor | None, other_name: str, other: Tensor, dim: int) -> Tensor | None:
    """This rank's part of an argument that is divided as another one."""
    if tensor is None:
        return None
    if _group.is_dtensor(tensor) != _group.is_dtensor(other):
        raise ValueError(
            f"{op}: {name} and {other_name} must both be DTensors, divided alike, or both what this rank has"
        )
    if _group.is_dtensor(tensor):
        alike = tensor.device_mesh == other.device_mesh and (  # type: ignore[attr-defined]
            _group.sharded_dim(op, name, tensor, dim) == _group.sharded_dim(op, other_name, other, dim)
        )
        if not alike or tensor.shape[dim] != other.shape[dim]:
            raise ValueError(f"{op}: {name} must be divided as {other_name} is, on the same mesh")
    return _group.local_of(op, name, tensor, dim)


def _backend(op: str, implementations: dict[str, Any], x: Tensor) -> str:
    return choice.choose(op, implementations, x)


def _call(
    op: str,
    source: _Rows | _OfHead,
    shards: _group.Shards,
    exclude: int | Tensor,
    suppress: Any,
    lead: torch.Size,
    temperature: float,
    reference: Tensor,
) -> Call:
    row = _checks.exclude(op, exclude, lead, _ANY, reference)
    mask, ids = _excluded.given(op, suppress, reference)
    needed = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in source.tensors)
    return Call(op, source, shards, _LeftOut(row, mask, ids), lead, temperature, needed)
