"""Passes over one block at a time, with the keys and values of what is before it, which no longer change."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dam.models.attention import Blocks, padding, positions
from dam.models.padding import is_rounding

# Hidden states [b, W, D] of tokens [b, W] by a mask [b, 1, W, C + W], positions [b, W] and a cache of C earlier ones.
Run = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


class Passes(Protocol):
    """Passes over the blocks of B rows."""

    def hidden_states(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Hidden states of each row's block [b, W, D]: at j those of column begin + j, of no meaning from its end on.

        Args:
            rows: int64 [b], rising: which of the B rows.
            tokens: int64 [b, L], their states. In front of `begin` they are final.
            begin, end: int64 [b], columns of the block that each row is at, without padding on the left. It is never
                one in front of an earlier one.
        """


class Prefix:
    """The blocks of B rows, gone through from left to right: a pass costs a block, not the sequence.

    Keys and values in front of a block depend neither on it nor on what is behind it. They are kept from the first pass
    that sees them filled in: a row's first pass at a block runs what is not kept, which is the block before, along.
    Rows may be padded on the left and be at different blocks. At most two passes of the network are made at a time: of
    rows that have nothing but their block to run, and of those that have more. Padding on the left is not run.

    Kept are keys and values of one sequence for each row and layer, by column.

    Args:
        run: the network.
        tokens, attention_mask: [B, L], of the rows; which tokens they are comes with each call.
        blocks: of its attention.
        shift: 1 where hidden states predict the position behind, as `MaskedLM` has it.
    """

    def __init__(self, run: Run, tokens: Tensor, attention_mask: Tensor | None, blocks: Blocks, shift: int = 0):
        self._run, self._shift = run, shift
        self._number, self._position = blocks.numbers(tokens, attention_mask), positions(tokens, attention_mask)
        self._shown = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # Columns of each row that need not be run: padding is hidden, whatever is kept of it.
        self._kept = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        if attention_mask is not None:
            self._kept += padding(attention_mask)
        self._begun = False
        self._store = Store(*tokens.shape)
        self._last: Tensor | None = None  # [B, D]: hidden states at the last column kept

    @torch.no_grad()
    def hidden_states(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """As `Passes` says."""
        behind = begin - self._kept[rows]
        length = int((end - begin).max())
        more = end - self._kept[rows] > length
        if not self._begun or not bool(more.any()) or bool(more.all()):
            self._begun = True
            return columns(self._pass(rows, tokens, begin, end), behind, length)
        out: Tensor | None = None
        for chosen in (~more, more):
            given = (part[chosen] for part in (rows, tokens, begin, end))
            hidden = columns(self._pass(*given), behind[chosen], length)
            out = hidden.new_zeros(len(rows), *hidden.shape[1:]) if out is None else out
            out[chosen] = hidden
        assert out is not None
        return out

    def _pass(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Hidden states [b, W, D] of what is not kept up to the block's end; keeps what is in front of the block."""
        first = self._kept[rows]
        kept, width = int(first.max()), int((end - first).max())
        index = torch.arange(max(kept, width), device=tokens.device)
        column = first[:, None] + index[:width]
        shown = column < end[:, None]
        column = column.clamp(max=tokens.shape[1] - 1)
        shown &= self._shown[rows].gather(1, column)
        number, position = self._number[rows].gather(1, column), self._position[rows].gather(1, column)
        before = (index[:kept] < first[:, None]) & self._shown[rows, :kept]
        # As `allowed`, of which these are the rows that are run: what is hidden sees itself.
        itself = torch.eye(width, dtype=torch.bool, device=tokens.device)
        new = (number[:, None, :] <= number[:, :, None]) & shown[:, None, :] & shown[:, :, None] | itself
        seen = torch.cat((before[:, None, :] & shown[:, :, None], new), dim=2)[:, None]
        cache = self._store.begin(rows, kept)
        hidden = self._run(tokens.gather(1, column), seen, position, cache)
        self._store.keep(first, begin - first)
        self._kept[rows] = begin
        return self._shifted(hidden, rows, position, begin - first) if self._shift else hidden

    def _shifted(self, hidden: Tensor, rows: Tensor, position: Tensor, kept: Tensor) -> Tensor:
        """Hidden states at the positions that they predict; keeps those of the last column that is."""
        if self._last is None:
            self._last = hidden.new_zeros(len(self._kept), hidden.shape[2])
        before = torch.cat((self._last[rows, None], hidden[:, :-1]), dim=1)
        some = kept > 0
        self._last[rows[some]] = hidden[some, kept[some] - 1]
        return torch.where((position == 0)[..., None], hidden, before)


def columns(hidden: Tensor, first: Tensor, length: int) -> Tensor:
    """The `length` columns from `first` [b] on of each row of hidden states [b, W, D], the last again where none is."""
    at = first[:, None] + torch.arange(length, device=hidden.device)
    return hidden.take_along_dim(at.clamp(0, hidden.shape[1] - 1)[..., None], dim=1)


class Store:
    """Keys and values [B, H, columns, d] of each layer. In a pass those of its own stand behind them."""

    def __init__(self, batch: int, length: int):
        self._batch, self._length = batch, length
        self._whole: dict[tuple[int, int], Tensor] = {}  # by layer, and 0 for keys, 1 for values
        self._new: dict[tuple[int, int], Tensor] = {}
        self._rows, self._kept = torch.empty(0, dtype=torch.int64), 0

    def begin(self, rows: Tensor, kept: int) -> Any:
        """The cache that a network is given in a pass of `rows`, of which so many columns are kept at most."""
        self._rows, self._kept = rows, kept
        self._new.clear()
        return _cache_class()(self._update, kept)

    def _update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._with((layer, 0), keys), self._with((layer, 1), values)

    def _with(self, place: tuple[int, int], new: Tensor) -> Tensor:
        """What is kept of the rows, and `new` [b, H, W, d] behind it."""
        self._new[place] = new
        stop = self._kept + new.shape[2]
        whole = self._whole.get(place)
        if whole is None or whole.shape[2] < stop:
            # Zeros, as what is hidden is multiplied by a weight of 0.
            grown = new.new_zeros(self._batch, new.shape[1], max(stop, self._length), new.shape[3])
            if whole is not None:
                grown[:, :, : whole.shape[2]] = whole
            self._whole[place] = whole = grown
        if len(self._rows) < self._batch:
            return torch.cat((whole[:, :, : self._kept][self._rows.to(new.device)], new), dim=2)
        whole[:, :, self._kept : stop] = new
        return whole[:, :, :stop]

    def keep(self, first: Tensor, count: Tensor) -> None:
        """Keeps the first `count` [b] columns of the pass, as columns from `first` [b] on."""
        in_place = len(self._rows) == self._batch and bool((first == self._kept).all())
        if not in_place and bool((count > 0).any()):
            row, at = torch.nonzero(torch.arange(int(count.max()), device=count.device) < count[:, None], as_tuple=True)
            to, column = self._rows[row], first[row] + at
            for place, new in self._new.items():
                there = (index.to(new.device) for index in (to, column, row, at))
                to_row, to_column, from_row, from_column = there
                self._whole[place][to_row, :, to_column] = new[from_row, :, from_column]
        self._new.clear()


@functools.cache
def _cache_class() -> Any:
    from transformers import DynamicCache

    class Cache(DynamicCache):
        """What a network updates: the store has the numbers."""

        def __init__(self, update: Callable[..., tuple[Tensor, Tensor]], length: int):
            super().__init__()
            self._update, self._length = update, length

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            return self._update(layer_idx, key_states, value_states)

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return self._length

        def get_mask_sizes(self, query_length: Any, *_: Any, **__: Any) -> tuple[int, int]:
            """For as many queries; releases up to 5.0 and beyond tell their positions instead."""
            length = len(query_length) if isinstance(query_length, Tensor) else query_length
            return self._length + length, 0

    return Cache


def has_caches() -> bool:
    """Whether the package is there whose caches networks take."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def is_exact(
    whole: Callable[[Tensor], Tensor],
    begin: Callable[[Tensor], Passes],
    row: Tensor,
    blocks: Blocks,
) -> bool:
    """Whether hidden states of the last of three blocks are the same in one pass and block by block.

    Args:
        whole: [1, L, D] of tokens [1, L].
        begin: the passes over blocks of such tokens.
        row: int64 [1, n], tokens to repeat.
        blocks: of the attention.
    """
    length = 3 * blocks.length
    tokens = row.repeat(1, -(-length // row.shape[1]))[:, :length]
    expected, passes = whole(tokens), begin(tokens)
    only = torch.zeros(1, dtype=torch.int64, device=row.device)
    # The last twice: at first it is run with the block before it, and then from what is kept of both.
    for end in (blocks.length, 2 * blocks.length, length, length):
        found = passes.hidden_states(only, tokens, only + end - blocks.length, only + end)
    return is_rounding(found, expected[:, -blocks.length :])
