"""One row of a dataset to a sequence; where a row holds what it must not, a message that names row and column."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dam.train.rewards import refuse_reserved
from dam.train.tokens import Limits

SEQUENCE_COLUMNS = ("input_ids", "attention_mask", "prompt", "labels")  # what a sequence is made of
IGNORED = -100  # a label that is none, as in transformers


class TokenRow(NamedTuple):
    """A row as a model and reward functions take it, L positions."""

    input_ids: list[int]  # [L]
    attention_mask: list[int]  # [L], 0 or 1
    start: int  # where the completion begins; L where there is none, the whole sequence being filled in
    labels: list[int] | None  # [L], IGNORED where there is none; None where `labels` are no token ids
    prompt: Any  # as reward functions see it; None: the token ids
    opening: str | None  # what a message of the model begins with; None: its completion is no message
    columns: dict[str, Any]  # everything else


class RowReader:
    """Rows with `input_ids` or a `prompt` to sequences.

    Args:
        mask_token: stands wherever something is to be filled in.
        max_completion_length: masks appended to a prompt.
        tokenizer: of text and conversations; None where there are none.
        limits: ids and length that the model takes.
        chat_template_kwargs: passed to the tokenizer's apply_chat_template.
        multiple: of which prompt and masks are one together, by more masks; without what is hidden on the left.
    """

    def __init__(
        self,
        mask_token: int,
        max_completion_length: int,
        tokenizer: Any = None,
        limits: Limits | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        multiple: int = 1,
    ):
        self._mask_token, self._max_completion_length, self._tokenizer = mask_token, max_completion_length, tokenizer
        self._limits, self._multiple = limits or Limits(), multiple
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def read(self, row: Any, where: str, *, tokenize: bool = True) -> TokenRow:
        """The sequence of a row.

        Args:
            row: columns by name.
            where: names the row in messages, "row 3 of the training dataset".
            tokenize: False leaves out what takes long, the tokens of texts: to look whether a row is right.

        Raises:
            ValueError: names row and column, what is wrong there and what to do.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a dict of columns; got {type(row).__name__}")
        columns = {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
        refuse_reserved(columns, where)
        prompt, opening = columns.pop("prompt", None), None
        if "input_ids" in row:
            ids = self._token_ids(row["input_ids"], where, "input_ids")
            mask = self._attention_mask(row, ids, where, "input_ids")
            start = len(ids)
            if self._mask_token not in ids:
                raise _fault(where, "input_ids", f"has no mask token (id {self._mask_token}), so nothing to fill in")
        elif "prompt" in row:
            prompt, opening, ids = self._prompt(prompt, where, tokenize)
            if self._mask_token in ids:
                raise _fault(
                    where,
                    "prompt",
                    f"holds the mask token (id {self._mask_token}), which would be filled in like the completion: "
                    "take it out, or give the whole sequence with its masks as input_ids",
                )
            mask = self._attention_mask(row, ids, where, "prompt")
            start = len(ids)
            hidden = mask.index(1) if 1 in mask else len(mask)
            count = self._max_completion_length
            count += -(len(ids) - hidden + count) % self._multiple
            ids, mask = [*ids, *[self._mask_token] * count], [*mask, *[1] * count]
        else:
            raise ValueError(f"{where} needs input_ids or prompt; this one has {sorted(map(str, row))}")
        if self._limits.positions is not None and len(ids) > self._limits.positions:
            raise _fault(
                where,
                "input_ids" if "input_ids" in row else "prompt",
                f"makes a sequence of {len(ids)} tokens, more than the {self._limits.positions} positions of the model"
                + ("" if "input_ids" in row else f" (max_completion_length is {self._max_completion_length})"),
            )
        labels = None
        if tokenize or "input_ids" in row:
            labels = self._labels(columns.get("labels"), len(ids), start, where)
        return TokenRow(ids, mask, start, labels, prompt, opening, columns)

    def masks(self, row: TokenRow) -> int:
        """How many positions of a row are to be filled in."""
        return row.input_ids.count(self._mask_token)

    def _token_ids(self, value: Any, where: str, column: str) -> list[int]:
        ids = _integers(value)
        if ids is None or ids.size == 0:
            raise _fault(where, column, f"must be a list of token ids{_why_not(value)}")
        return self._in_range(ids.tolist(), where, column)

    def _in_range(self, ids: list[int], where: str, column: str) -> list[int]:
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or (self._limits.ids is not None and high >= self._limits.ids):
            bad = low if low < 0 else high
            allowed = "0 or more" if self._limits.ids is None else f"in [0, {self._limits.ids}), which the model takes"
            raise _fault(where, column, f"token ids must be {allowed}; got {bad} at position {ids.index(bad)}")
        return ids

    def _attention_mask(self, row: Mapping[str, Any], ids: list[int], where: str, of: str) -> list[int]:
        """The row's own, or ones."""
        if "attention_mask" not in row:
            return [1] * len(ids)
        if of == "prompt" and _integers(row["prompt"]) is None:
            raise _fault(
                where,
                "attention_mask",
                "goes with token ids, but the prompt is text: remove the column (dataset.remove_columns), or give "
                "input_ids",
            )
        value = row["attention_mask"]
        array = _integers(value, boolean=True)
        mask = [] if array is None else array.tolist()
        if len(mask) != len(ids) or not set(mask) <= {0, 1}:
            got = _why_not(value) if array is None else f"; got {len(mask)} numbers, {_short(mask)}"
            raise _fault(where, "attention_mask", f"must be 0 or 1 for each of the {len(ids)} tokens of {of}{got}")
        for i, (token, seen) in enumerate(zip(ids, mask, strict=True)):
            if token == self._mask_token and not seen:
                raise _fault(
                    where,
                    "attention_mask",
                    f"is 0 at position {i}, which holds the mask token (id {token}) and would be filled in: pad with "
                    "another token",
                )
        return mask

    # Prompts

    def _prompt(self, value: Any, where: str, tokenize: bool) -> tuple[Any, str | None, list[int]]:
        """A prompt as reward functions see it, what the model's message begins with, and its token ids."""
        if isinstance(value, str):
            self._need_tokenizer(where, "string prompts need a tokenizer")
            return value, None, self._text_ids(value, where) if tokenize or self._may_hold_mask(value) else []
        if is_conversation(value):
            self._need_tokenizer(where, "conversational prompts need a tokenizer")
            prompt, opening, continues = _conversation(value, where)
            return prompt, opening, self._chat_ids(value, where, continues) if tokenize else []
        if isinstance(value, (list, tuple)) and not value:
            return [], None, []  # nothing given: all is drawn
        if _integers(value) is None:
            raise _fault(where, "prompt", f"must be text, token ids or a list of messages{_why_not(value)}")
        ids = self._token_ids(value, where, "prompt")
        return ids, None, ids

    def _need_tokenizer(self, where: str, why: str) -> None:
        if self._tokenizer is None:
            raise _fault(where, "prompt", f"{why}: pass processing_class")

    def _may_hold_mask(self, text: str) -> bool:
        name = getattr(self._tokenizer, "mask_token", None)
        return isinstance(name, str) and name in text

    def _text_ids(self, text: str, where: str) -> list[int]:
        """Without what the tokenizer puts behind a text, [SEP] or an end of text: the completion goes on from here."""
        ids = [*self.front(), *self._plain_ids(text)]
        if text and list(self._tokenizer(text)["input_ids"])[: len(ids)] != ids:
            raise _fault(
                where,
                "prompt",
                "has other tokens with the tokenizer's special tokens than without, so that what it puts behind a "
                "prompt cannot be told from the prompt: give token ids",
            )
        return self._in_range(ids, where, "prompt")

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def front(self) -> list[int]:
        """What the tokenizer puts in front of a text: of a plain one, as a text of special tokens would not tell."""
        ids, plain = list(self._tokenizer("a")["input_ids"]), self._plain_ids("a")
        starts = range(len(ids) - len(plain) + 1)
        return ids[: next((start for start in starts if ids[start : start + len(plain)] == plain), 0)]

    def _chat_ids(self, messages: Any, where: str, continues: bool) -> list[int]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self._chat_template_kwargs,
            )
        except Exception as error:  # a template is a program of its author's
            raise _fault(
                where,
                "prompt",
                f"could not be put into the tokenizer's chat template ({type(error).__name__}: {error}); set "
                "processing_class.chat_template, or give text",
            ) from error
        return self._in_range(list(encoded["input_ids"]), where, "prompt")

    # Labels

    def _labels(self, value: Any, length: int, start: int, where: str) -> list[int] | None:
        """Integer labels where they belong: at all positions or, behind a prompt, from the completion's first on."""
        labels = _integers(value)
        if labels is None:
            return None
        given = labels.tolist()
        if len(given) == length:
            return given
        if start < length and len(given) <= length - start:
            return [*[IGNORED] * start, *given, *[IGNORED] * (length - start - len(given))]
        fits = f"{length}, one for each token of input_ids"
        if start < length:
            fits = f"at most {length - start} for the completion, or {length} with those of the prompt"
        raise _fault(
            where,
            "labels",
            f"must have {fits}; got {len(given)}. Integers that are no labels of tokens go to reward functions under "
            "another name (dataset.rename_column)",
        )


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, dicts such as {"role": "user", "content": ...}."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _conversation(messages: Any, where: str) -> tuple[Any, str, bool]:
    """Messages as reward functions see them, what the model's begins with, and whether it was begun for it.

    As in TRL: a last message of the assistant is one that the model continues, and becomes part of its completion.
    """
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _fault(where, "prompt", f'message {n} must have a "role" and a "content"; got {_short(message)}')
    last = messages[-1]
    if last["role"] != "assistant":
        return list(messages), "", False
    if not isinstance(last.get("content"), str):
        raise _fault(where, "prompt", f"the assistant's message at its end must have text; got {_short(last)}")
    return list(messages[:-1]), last["content"], True


def _fault(where: str, column: str, what: str) -> ValueError:
    return ValueError(f"{where}, column {column!r}: {what}")


def _integers(value: Any, *, boolean: bool = False) -> np.ndarray | None:
    """A sequence of integers [n], of whatever type, or of truth values, as an array; None: it is something else."""
    if isinstance(value, Tensor):
        value = None if value.is_floating_point() or value.is_complex() else value.detach().cpu().numpy()
    if value is None or isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):  # ragged
        return None
    if array.ndim != 1 or (array.dtype.kind not in ("iub" if boolean else "iu") and array.size > 0):
        return None
    return array.astype(np.int64)


def _why_not(value: Any) -> str:
    """What a value is that was to be a list of integers."""
    if isinstance(value, (list, tuple)):
        bad = next(_strangers(value), None)
        if bad is not None:
            return f"; got {_short(bad[1])} at position {bad[0]}"
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) != 1:
        return f"; got shape {list(shape)}"
    return f"; got {_short(value)}"


def _strangers(values: Any) -> Iterator[tuple[int, Any]]:
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            yield i, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
