"""The tokens that mean something to a run: mask, padding, end of text; and how many ids and positions a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class SpecialTokens(NamedTuple):
    """Of a run's sequences."""

    mask: int  # stands wherever something is to be filled in
    pad: int  # fills up shorter sequences, with attention_mask 0
    stop: tuple[int, ...] = ()  # what follows the first of these is no part of a completion
    suppress: tuple[int, ...] = ()  # are never drawn
    vocabulary: int | None = None  # ids from this one on are no tokens, so never drawn either; None: not known


def special_tokens(
    mask_token: int | None,
    tokenizer: Any,
    config: Any,
    denoiser: Any = None,
    *,
    stop: Sequence[int] | None = None,
    suppress: Sequence[int] | None = None,
    ids: int | None = None,
) -> SpecialTokens:
    """The mask token given, or that of the tokenizer, of the model's config or of its family, a token to pad with, and
    those that end a text or are never drawn.

    Args:
        mask_token: None looks for it.
        tokenizer, config, denoiser: any may be None.
        stop: tokens that end a completion; None takes the tokenizer's end-of-text token, if it has one.
        suppress: tokens that are never drawn, besides ids that the tokenizer does not have.
        ids: the model takes ids below this; None where that is not known.

    Raises:
        ValueError: nobody knows the mask token, the model does not take it or one to suppress, or a token that ends a
            completion is never drawn.
    """
    sources = (tokenizer, config)
    for source in (*sources, denoiser):
        if mask_token is None:
            mask_token = getattr(source, "mask_token_id", None)
    if mask_token is None:
        raise ValueError("the mask token is not known: set mask_token_id in DAMConfig")
    if mask_token < 0 or (ids is not None and mask_token >= ids):
        raise ValueError(
            f"the mask token must be an id that the model takes, {_range(ids)}; got {mask_token}: set mask_token_id in "
            "DAMConfig, or make the model's embedding larger (resize_token_embeddings)"
        )
    # Padding must not look like something to fill in; any other token does, attention_mask being 0 there.
    pad_token = int(mask_token == 0)
    for source in sources:  # the config's where it has one: a model may count positions by it
        known = getattr(source, "pad_token_id", None)
        # Some configs say -1 where there is none.
        if known is not None and known != mask_token and 0 <= known < (known + 1 if ids is None else ids):
            pad_token = known
    stop = stop_tokens(stop, tokenizer, mask_token)
    vocabulary = _vocabulary(tokenizer)
    for token in suppress or ():
        if ids is not None and token >= ids:
            raise ValueError(f"suppress_tokens must be ids that the model takes, {_range(ids)}; got {token}")
    for token in stop:
        if token == mask_token:
            raise ValueError(f"stop_token_ids has {token}, the mask token, which is never drawn: take it out")
        if token in (suppress or ()):
            raise ValueError(
                f"token {token} ends completions but is in suppress_tokens, so it would never be drawn: take it out, "
                "or set stop_token_ids without it"
            )
        if vocabulary is not None and token >= vocabulary:
            raise ValueError(
                f"stop_token_ids has {token}, which is never drawn: the tokenizer's ids are below {vocabulary}"
            )
    return SpecialTokens(mask_token, pad_token, tuple(stop), tuple(suppress or ()), vocabulary)


def stop_tokens(given: Sequence[int] | None, tokenizer: Any, mask_token: int | None) -> Sequence[int]:
    """Those that end a completion: given, or the tokenizer's end-of-text token."""
    if given is not None:
        return given
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None or end == mask_token else (end,)  # some have one token for both


def _vocabulary(tokenizer: Any) -> int | None:
    """A tokenizer's ids are below this, which is its length unless some are missing; None where it has no length."""
    if not hasattr(tokenizer, "__len__"):
        return None
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(len(tokenizer), 1 + max(known.values(), default=-1))


def _range(ids: int | None) -> str:
    return "0 or more" if ids is None else f"in [0, {ids})"


class Limits(NamedTuple):
    """What a model takes; None where it does not tell."""

    ids: int | None = None  # token ids below this
    positions: int | None = None  # sequences up to this long


def limits_of(model: Any) -> Limits:
    """Rows of a model's token embedding, and of its table of absolute positions if it has one."""
    return Limits(_ids(model), _positions(model))


def _ids(model: Any) -> int | None:
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # not a model of transformers, or one without a single table
        return None
    return None if weight.dim() != 2 else int(weight.shape[0])


def _positions(model: Any) -> int | None:
    """A rotary model has no table, and a length that its config states is no bound: it was only not trained beyond."""
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(stated, int) or not isinstance(model, nn.Module):
        return None
    bounds = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            # RoBERTa and its like count positions from behind the padding token's id.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            if 0 <= module.num_embeddings - stated <= 2:  # not the table of another part, of images
                bounds.append(module.num_embeddings - offset)
    return min(bounds, default=None)
