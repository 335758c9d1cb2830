"""Hidden states and head out of a model, one way, so that the head runs only where it is needed."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dam.models.attention import Blocks, additive, allowed, padding, positions
from dam.models.equal_rows import may_run_once, takes_any_rows
from dam.models.output_layer import head_of
from dam.models.padding import evaluating, takes_left_padding
from dam.models.prefix import Passes, Prefix, has_caches, is_exact
from dam.models.sharding import (
    check_sharding,
    here,
    is_divided,
    is_shared_by_rows,
    settle,
    shape_of,
    tied_to,
    waits_for_others,
)
from dam.models.stale import StaleCache
from dam.models.tail import Tail, check_calls, found_tail
from dam.ops._head import Head


class Denoiser(Protocol):
    """What rollouts and losses need of a model that predicts p(v | position, tokens).

    The two methods are all that is required. A denoiser may have these besides, by which rollouts and the trainer keep
    to the law that it has:

        blocks          `Blocks` that its attention imposes: what is behind a position's block is not seen from it.
                        None, or no such attribute: it sees everything.
        left_padding    False: rows padded on the left get other predictions than alone, and are refused. Else True.
        mask_token_id   the mask token, where neither the trainer's arguments nor tokenizer nor config have one.
        prefix_cache    with `blocks`: `prefix_cache(tokens, attention_mask)` begins to go through the blocks of rows
                        from left to right, with the keys and values of what is before them. It gives an object with
                        `hidden_states(rows, tokens, begin, end)`, `dam.models.prefix.Passes`, or None where
                        such passes are not to be had. Without it each call is of whole sequences, to the same result.
        equal_rows      `equal_rows(tokens, attention_mask)`, of rows some of which are equal, tells whether those of a
                        row depend on it alone: not on chance, the rows beside it, or its place among them.
                        Rollouts and the loss then run one of rows that are equal. Without it each is run.
        hidden_at       `hidden_at(tokens, attention_mask, row, position)`: hidden states [n, D] at positions [n] of
                        rows [n], those of hidden_states to rounding. Rollouts and the loss then ask for the
                        positions that they read, elsewhere a last layer need not run. Without it: hidden_states.
        beside          of a base: `beside(denoiser)` gives a denoiser whose hidden states are those of that model and
                        of this base, [B, L, 2 D], or None. So what both have in common is run once.
        approximate_cache  with `prefix_cache`: not None where its passes give another law than hidden_states. Rollouts
                        that cannot go by them are then refused.

    The hidden states at a position are those that predict the token there, and logits are head and hidden states: a
    shift or a scale that a family has is inside.
    """

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input of the head [B, L, D] for tokens int64 [B, L]."""

    def head(self) -> Head:
        """The head that maps hidden states to logits."""


def blocks_of(denoiser: Any) -> Blocks | None:
    """The blocks that a denoiser's attention imposes, if it says so."""
    return getattr(denoiser, "blocks", None)


def equal_rows(denoiser: Any, tokens: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether one of equal rows may be run for all of them, if the denoiser says so."""
    tell = getattr(denoiser, "equal_rows", None)
    return tell is not None and tell(tokens, attention_mask)


def hidden_at(
    denoiser: Denoiser, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor
) -> Tensor:
    """Hidden states [n, D] at positions of rows, int64 [n] each, as the denoiser offers them."""
    offered = getattr(denoiser, "hidden_at", None)
    if offered is None:
        return denoiser.hidden_states(tokens, attention_mask)[row, position]
    found: Tensor = offered(tokens, attention_mask, row, position)
    return found


def check_left_padding(denoiser: Any, attention_mask: Tensor | None) -> None:
    """That no row is padded on the left, where a denoiser says that it does not take such rows.

    Raises:
        ValueError: one is.
    """
    if getattr(denoiser, "left_padding", True) or attention_mask is None:
        return
    if bool((attention_mask[:, 0] == 0).any()):
        name = type(getattr(denoiser, "model", denoiser)).__name__
        raise ValueError(
            f"{name} predicts other tokens for a row that is padded on the left than for the row alone: its positions "
            "are absolute and counted over padding, or it does not heed attention_mask. Give it sequences of one "
            "length (input_ids as long as each other, or prompts as long as each other)"
        )


# Of models, by their output layer and whether their adapter is on: what they do to logits after that layer.
_TAILS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
# Of models, by how they are called: whether they give a row that is padded on the left what they give it alone.
_PADDED: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()
# Of models, likewise: whether block by block, with a cache, they give what they give in one pass.
_CACHED: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()
# Of models, likewise: whether a row gets what it gets whatever rows are beside it.
_ONCE: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()

ATTENTIONS = ("own", "full", "block-causal")


class MaskedLM:
    """A Hugging Face masked language model (or any module like it) as a `Denoiser`.

    The model must have `get_output_embeddings()`, a linear layer over the vocabulary. A hook hands
    that layer no positions at all and keeps what it would have been given, so a forward pass costs no
    logits; this works where a model returns logits only.

    Before a model's first call one forward pass of one row compares hidden states and head with the model's own
    logits: with what the output layer gives, and with what becomes of numbers put in its place. Found that way and
    followed are a bias outside the layer (ESM), a scale (Cohere, Granite), logits of the position before, and a soft
    cap of all that (Gemma 2). Anything else is an error. Where the model returns no logits there is nothing to compare.

    That comparison cannot see which positions a model lets see which, nor that its logits are meant for the position
    behind: `as_denoiser` knows both of families of models, and options say it of others. Before its first call with an
    attention mask, a pass of three short rows tells whether padding on the left changes its predictions, as it does
    where positions are absolute (BERT's): rows that are padded so are then refused.

    Of a model with "block-causal" attention that takes `past_key_values`, rollouts run only the block that they are at
    (`prefix_cache`), if a trial before the first shows that it gives the same. Not in training mode, nor where FSDP2 or
    ZeRO-3 divides the model, whose processes must run alike. With `approximate_cache` so do those of a model with full
    attention, or are refused: by another law than the model's (`dam.models.stale.StaleCache`).

    Rows of a rollout that are equal are run once (`equal_rows`), if a trial before the first such rollout shows that
    none gets anything else beside others. Not in training mode, nor where the model is compiled, or FSDP2 or ZeRO-3
    divides it.

    A head that FSDP2 or DeepSpeed's ZeRO-3 has divided is gathered each time it is asked for. One that tensor
    parallelism divides by rows of the vocabulary stays where it is: a DTensor, which the operations take.

    Args:
        model: takes `input_ids` and `attention_mask`; and `position_ids`, `use_cache` and a mask [B, 1, L, L] for
            attention that is not its own.
        adapter: False evaluates a PEFT model with its adapters switched off.
        attention: "own": the model's, which is given attention_mask as it is. "full": every position sees every other,
            by a mask [B, 1, L, L] (of 0 and the least number) that is handed in. "block-causal": by such a mask
            likewise, what is not behind a position's block. None: "block-causal" with block_length, else "own".
        block_length: of the attention's blocks; with "own" attention those that the model has without being told.
        block_origin: where they are counted from (`Blocks`).
        shift: 1 where logits at a position are of the token behind it; the first position is its own.
        mask_token_id: see `Denoiser`.
        approximate_cache: length of the blocks, counted from the sequence's end, that rollouts of a model with full
            attention fill one after another, with keys and values of all else as they were when the block began.

    Raises:
        TypeError: the model has no such layer.
        ValueError: attention and blocks, or a cache, do not go together.
        ValueError, TypeError: at the first call: hidden states and head would give other logits than the model's. The
            message says by how much, and what to do.
    """

    _predicted = "input_ids"  # the argument at whose positions the output layer runs

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: bool = True,
        attention: str | None = None,
        block_length: int | None = None,
        block_origin: str = "sequence",
        shift: int = 0,
        mask_token_id: int | None = None,
        approximate_cache: int | None = None,
    ):
        if attention is None:
            attention = "own" if block_length is None else "block-causal"
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}")
        if (attention == "full" and block_length is not None) or (attention == "block-causal" and block_length is None):
            raise ValueError(f"attention {attention!r} with block_length {block_length}: blocks go with block-causal")
        if shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1; got {shift}")
        if approximate_cache is not None and block_length is not None:
            raise ValueError("approximate_cache is for full attention; in blocks that attention has, a cache is exact")
        self.blocks = None if block_length is None else Blocks(block_length, block_origin)
        self.approximate_cache = approximate_cache
        if approximate_cache is not None:
            self.blocks = Blocks(approximate_cache, "completion")
        self.mask_token_id = mask_token_id
        self._attention, self._shift = attention, shift
        self.model: Any = model
        # DistributedDataParallel and its like keep the model in .module; the forward pass must go through them.
        # DeepSpeed's engine hands on the model's methods besides.
        inner = getattr(model, "module", None)
        wrapped = not hasattr(type(model), "get_output_embeddings") and hasattr(inner, "get_output_embeddings")
        self._inner: Any = inner if wrapped else model
        if not callable(getattr(self._inner, "get_output_embeddings", None)):
            raise TypeError(f"model must have get_output_embeddings(); {type(model).__name__} has none")
        self._adapter = adapter

    def _output_layer(self) -> Any:
        layer = self._inner.get_output_embeddings()
        if layer is None:
            raise TypeError(f"get_output_embeddings() of {type(self._inner).__name__} gives no linear layer")
        check_sharding(layer, self._inner)
        settle(self._inner)
        return layer

    @contextlib.contextmanager
    def _as_asked(self) -> Iterator[None]:
        if self._adapter:
            yield
            return
        # PEFT makes an adapter trainable when it switches it on again, one that was frozen too.
        trainable = [(parameter, parameter.requires_grad) for parameter in self._inner.parameters()]
        try:
            with self._inner.disable_adapter():
                yield
        finally:
            for parameter, before in trainable:
                parameter.requires_grad_(before)

    def _tail(self, layer: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tail:
        known = self._known_tails(layer)
        if self._adapter not in known:
            # As it is without torch.compile, which would trace hooks that run once.
            model = getattr(self._inner, "_orig_mod", self._inner)
            with torch.no_grad():
                head = self._head_of(layer)
            known[self._adapter] = found_tail(model, layer, head, tokens, self._arguments(tokens, attention_mask))
        return known[self._adapter]

    def _known_tails(self, layer: nn.Module) -> dict[bool, Tail]:
        return _TAILS.setdefault(self._inner, weakref.WeakKeyDictionary()).setdefault(layer, {})

    def _head_of(self, layer: nn.Module) -> Head:
        return head_of(layer, in_place=is_shared_by_rows(layer, self._inner))

    def _arguments(self, tokens: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """What the model is called with."""
        if self._attention == "own":
            return {"input_ids": tokens, "attention_mask": attention_mask}
        seen = allowed(tokens, attention_mask, self.blocks if self.approximate_cache is None else None)
        return {
            "input_ids": tokens,
            # Never [B, L]: models that take a mask from their caller make a causal one of that.
            "attention_mask": self._mask(seen).expand(len(tokens), -1, -1, -1),
            "position_ids": positions(tokens, attention_mask),
            "use_cache": False,
        }

    def _mask(self, seen: Tensor) -> Tensor:
        """What the model takes for a boolean mask [B or 1, 1, L, L]."""
        return additive(seen, self._inner.get_input_embeddings().weight.dtype)

    @property
    def left_padding(self) -> bool:
        known = _PADDED.get(self._inner, {})
        return all(takes for (way, _), takes in known.items() if way == self._way)

    @property
    def _way(self) -> tuple[Any, ...]:
        """By what the model is called differently."""
        return type(self), self._attention, self._shift, self.blocks, self.approximate_cache

    def _try_padding(self, tokens: Tensor, attention_mask: Tensor) -> None:
        """Finds out `left_padding`, once for each token that rows are padded with.

        In all processes alike, as FSDP's must all run: that of the config is tried where no row is padded.
        """
        known = _PADDED.setdefault(self._inner, {})
        ids = shape_of(self._inner.get_input_embeddings().weight)[0]
        pad = getattr(getattr(self._inner, "config", None), "pad_token_id", None)
        if pad is None or not 0 <= pad < ids:  # some say -1 where there is none
            pad = 0
        hidden = tokens[:, 0][attention_mask[:, 0] == 0]
        model = getattr(self._inner, "_orig_mod", self._inner)
        # A model may count positions by its own pad token (RoBERTa's do), and rows be padded with another.
        for token in dict.fromkeys([pad, *hidden[:1].tolist()]):
            if (self._way, token) in known:
                continue
            known[self._way, token] = takes_left_padding(
                lambda tokens, mask: self._shifted(self._last_states(model, self._arguments(tokens, mask))[0], mask),
                model,
                tokens,
                pad=token,
                other=(token + 1) % ids,
                multiple=1 if self.blocks is None else self.blocks.length,
            )

    def compare(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        """Compares with the model's own logits anew, as at the start of a run: a setting may have changed since.

        Args:
            tokens: int64 [B, L], of which the first row is used.
            attention_mask: [B, L].

        Raises:
            ValueError, TypeError: hidden states and head would give other logits.
        """
        _TAILS.pop(self._inner, None)
        _PADDED.pop(self._inner, None)
        _CACHED.pop(self._inner, None)
        _ONCE.pop(self._inner, None)
        with self._as_asked():
            self._tail(self._output_layer(), tokens[:1], None if attention_mask is None else attention_mask[:1])
            if attention_mask is not None:
                self._try_padding(tokens, attention_mask)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with self._as_asked():
            layer = self._output_layer()
            tail = self._tail(layer, tokens[:1], None if attention_mask is None else attention_mask[:1])
            if attention_mask is not None:
                self._try_padding(tokens, attention_mask)
                check_left_padding(self, attention_mask)
            hidden, output = self._last_states(self.model, self._arguments(tokens, attention_mask))
        return self._shifted(tail.hidden_states(tied_to(hidden, output, self.model)), attention_mask)

    def _shifted(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states at the positions that they predict; a row's first token is predicted where it is."""
        if not self._shift:
            return hidden
        before = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
        if attention_mask is None:
            return before
        first = positions(hidden[..., 0], attention_mask) == 0
        return torch.where(first[..., None], hidden, before)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        """As `Denoiser` says; found out once, by a call of these rows and one of those of them that are distinct."""
        if not takes_any_rows(self._inner) or not hasattr(self._inner, "get_input_embeddings"):
            return False
        known, way = _ONCE.setdefault(self._inner, {}), (self._way, self._adapter)
        if way not in known:
            with self._as_asked():
                known[way] = may_run_once(
                    lambda tokens, mask: self._last_states(self._inner, self._arguments(tokens, mask))[0],
                    self._inner,
                    tokens,
                    attention_mask,
                    shape_of(self._inner.get_input_embeddings().weight)[0],
                )
        return known[way]

    @torch.no_grad()
    def prefix_cache(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Passes | None:
        """Begins passes over the blocks of rows with the keys and values of what is around them, as `Denoiser` says.

        Raises:
            ValueError: there is no approximate cache of the model, and it is asked for.
        """
        why_not = self._takes_no_cache()
        if why_not is None:
            with self._as_asked():
                layer, mask = self._output_layer(), None if attention_mask is None else attention_mask[:1]
                tail = self._tail(layer, tokens[:1], mask)
                if attention_mask is not None:
                    self._try_padding(tokens, attention_mask)
                    check_left_padding(self, attention_mask)
                if tail.shift:
                    why_not = "its logits are of the position before"
                elif not self._try_cache(tokens, attention_mask):
                    why_not = "passes over blocks with a cache fail (see the warning)"
        if why_not is None:
            return self._passes(self.model, tokens, attention_mask, tail, self._shift)
        if self.approximate_cache is not None:
            raise ValueError(f"{type(self._inner).__name__} has no approximate_cache: {why_not}; leave it out")
        return None

    def _takes_no_cache(self) -> str | None:
        """Why passes over blocks with a cache are not to be had of the model, as far as is seen without a trial."""
        if self._attention != "block-causal" and self.approximate_cache is None:
            return "its attention has no blocks"
        if self._inner.training:
            return "it is in training mode"
        if not has_caches():
            return "transformers is missing"
        if waits_for_others(self._inner):
            return "FSDP2 or ZeRO-3 divides it, and its processes must run alike"
        model = getattr(self._inner, "_orig_mod", self._inner)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            return "it takes no past_key_values"
        return None

    def _passes(self, model: Any, tokens: Tensor, mask: Tensor | None, tail: Tail, shift: int) -> Passes:
        def run(tokens: Tensor, seen: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
            with self._as_asked():
                hidden, _ = self._last_states(model, self._cached_arguments(tokens, seen, position_ids, cache))
            return tail.hidden_states(hidden)

        assert self.blocks is not None
        if self.approximate_cache is not None:
            return StaleCache(run, tokens, mask, shift)
        return Prefix(run, tokens, mask, self.blocks, shift)

    def _cached_arguments(self, tokens: Tensor, seen: Tensor, position_ids: Tensor, cache: Any) -> dict[str, Any]:
        """What the model is called with for tokens behind those in a cache, which is to take these up."""
        return {
            "input_ids": tokens,
            "attention_mask": self._mask(seen),
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }

    def _try_cache(self, tokens: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether passes over blocks give what one pass does, found out once."""
        known = _CACHED.setdefault(self._inner, {})
        if self._way not in known:
            assert self.blocks is not None
            model = getattr(self._inner, "_orig_mod", self._inner)
            start = 0 if attention_mask is None else int(padding(attention_mask[:1]))
            devices = [tokens.device] if tokens.device.type == "cuda" else []
            why = "they give other hidden states than one pass over all"
            with evaluating(model), torch.random.fork_rng(devices):
                try:
                    known[self._way] = is_exact(
                        lambda tokens: self._last_states(model, self._arguments(tokens, None))[0],
                        lambda tokens: self._passes(model, tokens, None, Tail(), 0),
                        tokens[:1, start:],
                        self.blocks,
                    )
                except Exception as error:  # code of others, that may take caches of another release
                    known[self._way], why = False, f"{type(error).__name__}: {error}"
            if not known[self._way]:
                name = type(self._inner).__name__
                warnings.warn(
                    f"{name}: rollouts cannot run blocks alone, as passes over blocks with a cache fail: {why}",
                    stacklevel=2,
                )
        return known[self._way]

    def _last_states(self, model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        """What the output layer is given, [B, L, D], and what the model returns for none of it."""
        given: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given.append(args[0])
            # Of no positions DTensor knows no product.
            return (args[0][:1, :1] if is_divided(args[0]) else args[0][:, :0], *args[1:])

        handle = self._output_layer().register_forward_pre_hook(keep)
        try:
            output = model(**arguments)
        finally:
            handle.remove()
        check_calls(self._inner, given, arguments[self._predicted])
        return here(given[0]), output

    def head(self) -> Head:
        with self._as_asked():
            layer = self._output_layer()
            head = self._head_of(layer)
            tail = self._tail(layer, torch.full((1, 1), self._some_token(head), device=head.weight.device))
            return tail.head(head, self._inner)

    def _some_token(self, head: Head) -> int:
        """One to call the model with where none were seen yet, alone, which a model of any length takes.

        Special ones, of which alone a model may make nothing, are not in the middle of a vocabulary. A head may have
        more rows than there are tokens.
        """
        rows = head.weight.shape[0]
        if hasattr(self._inner, "get_input_embeddings"):
            return min(rows, shape_of(self._inner.get_input_embeddings().weight)[0]) // 2
        return min(rows, 8) // 2


class Tabular(nn.Module):
    """A table of logits for every state of a short sequence, as a `Denoiser`: exact, for tests and studies.

    Args:
        logits: [(tokens)^L, L, V], a row per state; state x has index sum_i x_i (tokens)^(L-1-i).
        tokens: number of distinct tokens of a state, the mask included.
    """

    def __init__(self, logits: Tensor, tokens: int):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self._tokens = tokens

    def index(self, tokens: Tensor) -> Tensor:
        """Row of the table for each state [..., L]."""
        length = tokens.shape[-1]
        powers = self._tokens ** torch.arange(length - 1, -1, -1, device=tokens.device)
        return (tokens * powers).sum(dim=-1)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits[self.index(tokens)]

    def head(self) -> Head:
        size = self.logits.shape[-1]
        return Head(torch.eye(size, dtype=self.logits.dtype, device=self.logits.device), None)
