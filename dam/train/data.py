"""Rows of a dataset to batches of sequences, and batches with their outcomes to what reward functions see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SEQUENCES = ("input_ids", "attention_mask", "labels")


class SpecialTokens(NamedTuple):
    """Of a run's sequences."""

    mask: int  # stands wherever something is to be filled in
    pad: int  # fills up shorter sequences, with attention_mask 0


def special_tokens(mask_token: int | None, tokenizer: Any, config: Any) -> SpecialTokens:
    """The mask token given, or that of the tokenizer or of the model's config, and a token to pad with.

    Raises:
        ValueError: nobody knows the mask token.
    """
    sources = (tokenizer, config)
    for source in sources:
        if mask_token is None:
            mask_token = getattr(source, "mask_token_id", None)
    if mask_token is None:
        raise ValueError("the mask token is not known: set mask_token_id in DAMConfig")
    # Padding must not look like something to fill in; any other token does, attention_mask being 0 there.
    pad_token = int(mask_token == 0)
    for source in reversed(sources):
        known = getattr(source, "pad_token_id", None)
        if known is not None and known != mask_token:
            pad_token = known
    return SpecialTokens(mask_token, pad_token)


class PromptSampler(torch.utils.data.Sampler[int]):
    """Shuffled prompts, each global batch of them `repeats` times in a row: once per training step it feeds."""

    def __init__(self, num_prompts: int, batch_size: int, repeats: int, seed: int):
        if num_prompts < batch_size:
            raise ValueError(f"the train dataset has {num_prompts} prompts, fewer than the {batch_size} of one rollout")
        self._num_prompts, self._batch_size, self._repeats, self._seed = num_prompts, batch_size, repeats, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_prompts // self._batch_size * self._batch_size * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._num_prompts)
        for start in range(0, len(self) // self._repeats, self._batch_size):
            for _ in range(self._repeats):
                yield from order[start : start + self._batch_size].tolist()


class NumberedRow(NamedTuple):
    """A row of a dataset, and which it is: what is drawn for a prompt is keyed by that."""

    number: int
    row: Any


class NumberedRows(torch.utils.data.Dataset[NumberedRow]):
    """A dataset whose rows know which they are.

    Args:
        rows: has len() and a row for each index.
    """

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(index, self._rows[index])

    def __getitems__(self, indices: list[int]) -> list[NumberedRow]:
        """A batch at once, where the dataset has a way of its own to read one, as those of `datasets` have."""
        several = getattr(self._rows, "__getitems__", None)
        rows = several(indices) if several else [self._rows[index] for index in indices]
        return [NumberedRow(index, row) for index, row in zip(indices, rows, strict=True)]


class Collator:
    """Rows with `input_ids` or a `prompt` to a batch of sequences, padded on the left.

    A batch has tensors int64 [B, L] `input_ids`, `attention_mask` and (where every row has them) `labels`, int64 [B]
    `index`, which row of the dataset each is (of the batch, for rows that are not numbered), and under `columns` a list
    of each other column, as reward functions see them.

    Args:
        tokens: mask and padding.
        max_completion_length: masks appended to a prompt.
        tokenizer: of string prompts; None where there are none.
    """

    def __init__(self, tokens: SpecialTokens, max_completion_length: int, tokenizer: Any = None):
        self._tokens, self._max_completion_length, self._tokenizer = tokens, max_completion_length, tokenizer

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        numbered = [row if isinstance(row, NumberedRow) else NumberedRow(n, row) for n, row in enumerate(rows)]
        prepared = [self._prepared(row) for _, row in numbered]
        length = max(len(row["input_ids"]) for row in prepared)
        fill = {"input_ids": self._tokens.pad, "attention_mask": 0, "labels": -100}
        batch: dict[str, Any] = {"index": torch.tensor([index for index, _ in numbered], device="cpu")}
        for name in _SEQUENCES:
            if all(name in row for row in prepared):
                batch[name] = torch.tensor(
                    [[fill[name]] * (length - len(row[name])) + list(map(int, row[name])) for row in prepared],
                    device="cpu",
                )
        names = set().union(*(row.keys() for row in prepared)) - {"input_ids", "attention_mask"}
        batch["columns"] = {name: [row.get(name) for row in prepared] for name in sorted(names)}
        return batch

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)
        if "input_ids" not in row:
            if "prompt" not in row:
                raise ValueError(f"a dataset row needs input_ids or prompt; this one has {sorted(row)}")
            prompt = row["prompt"]
            if isinstance(prompt, str):
                if self._tokenizer is None:
                    raise ValueError("string prompts need a tokenizer: pass processing_class")
                prompt = self._tokenizer(prompt)["input_ids"]
            row["input_ids"] = [*prompt, *[self._tokens.mask] * self._max_completion_length]
            row["prompt_length"] = len(prompt)
        row["attention_mask"] = [1] * len(row["input_ids"])
        return row


def outcomes(batch: dict[str, Any], final: Tensor, repeats: int, tokenizer: Any = None) -> dict[str, Any]:
    """Prompts, completions and columns as reward functions take them, each prompt `repeats` times.

    Args:
        batch: of a `Collator`, B prompts.
        final: int64 [B * repeats, L], the sequences filled in.
        repeats: trajectories of each prompt, one after another.
        tokenizer: decodes completions; without one they are lists of token ids.
    """
    columns = {name: [v for v in values for _ in range(repeats)] for name, values in batch["columns"].items()}
    mask = batch["attention_mask"].repeat_interleave(repeats, dim=0)
    initial = batch["input_ids"].repeat_interleave(repeats, dim=0)
    lengths = columns.pop("prompt_length", [None] * len(final))
    given = columns.pop("prompt", [None] * len(final))
    prompts, completion_ids = [], []
    for row, (length, prompt) in enumerate(zip(lengths, given, strict=True)):
        start = int((mask[row] == 0).sum())
        kept = final[row, start:].tolist()
        completion_ids.append(kept if length is None else kept[length:])
        prompts.append(initial[row, start:].tolist() if prompt is None else prompt)
    completions: list[Any] = completion_ids
    if tokenizer is not None:
        completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}


def stacked(batches: list[np.ndarray]) -> np.ndarray:
    """Batches [n, L] of different length, padded on the left with -100 as Trainer does."""
    length = max(batch.shape[1] for batch in batches)
    padded = [np.pad(batch, ((0, 0), (length - batch.shape[1], 0)), constant_values=-100) for batch in batches]
    return np.concatenate(padded)
