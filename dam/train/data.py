"""Rows of a dataset to batches of sequences, and batches with their outcomes to what reward functions see."""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dam.train.rewards import Outcomes, RewardError, refuse_reserved
from dam.train.rows import IGNORED, SEQUENCE_COLUMNS, RowReader, TokenRow, is_conversation

_OUTLINED = 64  # rows of a dataset that processes compare


class PromptSampler(torch.utils.data.Sampler[int]):
    """Prompts, each global batch of them `repeats` times in a row: once per forward and backward pass that it feeds.

    Args:
        num_prompts: of the dataset.
        batch_size: prompts of a rollout, of all processes.
        repeats: of each batch.
        seed: of the order, another one in each epoch; None keeps that of the dataset.
        epoch: gives the number of the pass that begins, each of which has another order. It has no `set_epoch`:
            accelerate 1.4 does not call that on several processes, and later releases set 0 where transformers 4.x
            resumes a run inside an epoch.

    Raises:
        ValueError: they are too few for one rollout.
    """

    def __init__(self, num_prompts: int, batch_size: int, repeats: int, seed: int | None, epoch: Callable[[], int]):
        if num_prompts < batch_size:
            raise ValueError(f"the train dataset has {num_prompts} prompts, fewer than the {batch_size} of one rollout")
        self._num_prompts, self._batch_size, self._repeats, self._seed = num_prompts, batch_size, repeats, seed
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_prompts // self._batch_size * self._batch_size * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self._num_prompts)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self._epoch()]).permutation(order)
        for start in range(0, len(self) // self._repeats, self._batch_size):
            for _ in range(self._repeats):
                yield from order[start : start + self._batch_size].tolist()


class NumberedRow(NamedTuple):
    """A row of a dataset: its number, by which what is drawn for it is keyed, and its name in messages."""

    number: int
    where: str
    row: Any


class NumberedRows(torch.utils.data.Dataset[NumberedRow]):
    """A dataset whose rows know which they are.

    Args:
        rows: has len() and a row for each index.
        name: of the dataset in messages.
    """

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> NumberedRow:
        return NumberedRow(index, row_name(index, self._name), self._rows[index])

    def __getitems__(self, indices: list[int]) -> list[NumberedRow]:
        """A batch at once, where the dataset has a way of its own to read one, as those of `datasets` have."""
        several = getattr(self._rows, "__getitems__", None)
        rows = several(indices) if several else [self._rows[index] for index in indices]
        numbered = zip(indices, rows, strict=True)
        return [NumberedRow(index, row_name(index, self._name), row) for index, row in numbered]


class Stream(torch.utils.data.IterableDataset[NumberedRow]):
    """An iterable dataset, pass after pass, each batch of it `repeats` times in a row: once per step that it feeds.

    Every row is used once per pass: where the last batch of a pass is not full, the next pass fills it. There is no
    end, so that a resumed run finds its place by counting batches.

    Args:
        rows: may have set_epoch, which is called with the number of each pass.
        name: of the dataset in messages.
        batch_size: None reads the rows once, one after another.
        repeats: of each batch.

    Raises:
        ValueError: a pass has no rows.
    """

    def __init__(self, rows: Any, name: str, batch_size: int | None = None, repeats: int = 1):
        self._rows, self._name, self._batch_size, self._repeats = rows, name, batch_size, repeats

    def __iter__(self) -> Iterator[NumberedRow]:
        if self._batch_size is None:
            yield from self._one_pass()
            return
        # Numbered through all passes: two rows of a batch have two numbers.
        rows = (row._replace(number=n) for n, row in enumerate(self._passes()))
        while True:
            batch = list(itertools.islice(rows, self._batch_size))
            for _ in range(self._repeats):
                yield from batch

    def _passes(self) -> Iterator[NumberedRow]:
        for epoch in itertools.count():
            if callable(getattr(self._rows, "set_epoch", None)):
                self._rows.set_epoch(epoch)
            empty = True
            for row in self._one_pass():
                empty = False
                yield row
            if empty:
                again = " any more: an iterable dataset must give its rows in every pass, not be used up by one"
                raise ValueError(f"the {self._name} dataset gives no rows{again if epoch else ''}")

    def _one_pass(self) -> Iterator[NumberedRow]:
        return (NumberedRow(n, row_name(n, self._name), row) for n, row in enumerate(self._rows))


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over."""
    return isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__")


def row_name(index: int, dataset: str) -> str:
    return f"row {index} of the {dataset} dataset"


class Seen(NamedTuple):
    """What a look through a dataset found."""

    lengths_differ: bool = False  # whether sequences given as `input_ids` are not of one length
    masks: int = 0  # the most that a row has, of those looked at


def check_rows(reader: RowReader, dataset: Any, name: str) -> Seen:
    """Looks through a dataset in memory, or one of `datasets` on disk, for rows that would end the run later.

    Texts are tokenised for the first row of each kind only. A million rows take 3 seconds where they are texts, 20 to
    50 with 256 token ids each. A dataset of another kind may take long to give a row, or give others each time: its
    rows are looked at when they come.

    Raises:
        ValueError: names row and column.
    """
    if isinstance(dataset, (list, tuple)):
        rows: Iterable[Any] = dataset
    elif hasattr(dataset, "iter") and hasattr(dataset, "column_names") and not is_stream(dataset):
        rows = _rows_of_table(dataset, name)
    else:
        return Seen()
    kinds: set[type | bool] = set()
    lengths: set[int] = set()
    masks = 0
    for n, row in enumerate(rows):
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        kind = is_conversation(prompt) or type(prompt)
        read = reader.read(row, row_name(n, name), tokenize=kind not in kinds)
        kinds.add(kind)
        masks = max(masks, reader.masks(read))
        if "input_ids" in row:
            lengths.add(len(read.input_ids))
    return Seen(len(lengths) > 1, masks)


def _rows_of_table(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    """Of a `datasets.Dataset`: the columns that sequences are made of, in batches. Not what a transform would make."""
    if dataset.format["type"] == "custom":
        return
    refuse_reserved(dataset.column_names, f"the {name} dataset")
    kept = [column for column in dataset.column_names if column in SEQUENCE_COLUMNS]
    for batch in dataset.select_columns(kept).iter(1000) if kept else ():
        yield from (dict(zip(kept, values, strict=True)) for values in zip(*(batch[c] for c in kept), strict=True))


def outline(dataset: Any) -> str:
    """How many rows, and what the sequences of a few of them are made of: for processes to compare.

    Of a dataset that `check_rows` does not look through, how many.
    """
    if dataset is None:
        return "none"
    if is_stream(dataset):
        return "an iterable dataset"
    count = len(dataset)
    in_memory = isinstance(dataset, (list, tuple)) or (
        hasattr(dataset, "column_names") and dataset.format["type"] != "custom"
    )
    told = []
    for n in sorted({int(n) for n in np.linspace(0, count - 1, _OUTLINED)}) if in_memory and count else ():
        row = dataset[n]
        told.append([row.get(column) for column in SEQUENCE_COLUMNS] if isinstance(row, Mapping) else type(row))
    digest = hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()
    return f"{count} rows" + (f", of digest {digest}" if told else "")


class Collator:
    """Rows with `input_ids` or a `prompt` to a batch of sequences, padded on the left.

    A batch has tensors int64 [B, L] `input_ids`, `attention_mask` and `labels` (-100 where there are none), int64 [B]
    `number` (of the row in its dataset, or else in the batch), `start` (where the completion begins; L where the whole
    sequence is filled in) and `label_kind` (see `LabelKind`), and lists: `prompts` and `openings` of a
    `RowReader`'s sequences, and under `columns` one of each other column, as reward functions see them.

    Args:
        reader: of rows.
        pad: token that fills up shorter sequences, with attention_mask 0.
    """

    def __init__(self, reader: RowReader, pad: int):
        self._reader, self._pad = reader, pad

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        named = [row if isinstance(row, NumberedRow) else NumberedRow(n, f"row {n}", row) for n, row in enumerate(rows)]
        read = [self._reader.read(row, where) for _, where, row in named]
        length = max(len(sequence.input_ids) for sequence in read)

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu")

        def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
            return tensor([[fill] * (length - len(values)) + values for values in lists])

        names = sorted(set().union(*(sequence.columns for sequence in read)))
        return {
            "input_ids": padded((sequence.input_ids for sequence in read), self._pad),
            "attention_mask": padded((sequence.attention_mask for sequence in read), 0),
            "labels": padded((sequence.labels or [] for sequence in read), IGNORED),
            "number": tensor([number for number, _, _ in named]),
            "label_kind": tensor([_label_kind(sequence) for sequence in read]),
            "start": tensor([length - len(sequence.input_ids) + sequence.start for sequence in read]),
            "prompts": [sequence.prompt for sequence in read],
            "openings": [sequence.opening for sequence in read],
            "columns": {name: [sequence.columns.get(name) for sequence in read] for name in names},
        }


class LabelKind(enum.IntEnum):
    """What the `labels` of a row are."""

    MISSING = 0
    TOKENS = 1  # integers, one for each token
    OTHER = 2  # for reward functions only


def _label_kind(sequence: TokenRow) -> LabelKind:
    if sequence.labels is not None:
        return LabelKind.TOKENS
    return LabelKind.MISSING if sequence.columns.get("labels") is None else LabelKind.OTHER


def outcomes(batch: dict[str, Any], final: Tensor, repeats: int, stop: Collection[int] = ()) -> Outcomes:
    """Prompts, completions and columns as reward functions take them, each prompt `repeats` times.

    Args:
        batch: of a `Collator`, B prompts.
        final: int64 [B * repeats, L], the sequences filled in.
        repeats: trajectories of each prompt, one after another.
        stop: tokens that end a completion, which holds the first of them and nothing behind it. A sequence that was
            given as `input_ids` has no end.

    Returns:
        Completions are lists of token ids: see `decoded`.
    """

    def repeated(values: Iterable[Any]) -> list[Any]:
        return [value for value in values for _ in range(repeats)]

    final, length = final.cpu(), final.shape[1]  # at once, not row by row
    seen = batch["attention_mask"].bool().cpu()
    given = zip(batch["prompts"], batch["input_ids"].cpu(), seen, strict=True)
    prompts = [ids[kept].tolist() if prompt is None else prompt for prompt, ids, kept in given]
    completion_ids = []
    for filled, kept, start in zip(final, repeated(seen), repeated(batch["start"].tolist()), strict=True):
        completion_ids.append(filled[kept].tolist() if start == length else ended(filled[start:].tolist(), stop))
    columns = {name: repeated(values) for name, values in batch["columns"].items()}
    return {
        "prompts": repeated(prompts),
        "completions": [list(ids) for ids in completion_ids],
        "completion_ids": completion_ids,
        "columns": columns,
    }


def ended(ids: list[int], stop: Collection[int]) -> list[int]:
    """Up to the first token of `stop`, and with it."""
    end = next((n for n, token in enumerate(ids, 1) if token in stop), len(ids))
    return ids[:end]


def decoded(batch: dict[str, Any], completion_ids: list[list[int]], tokenizer: Any) -> list[Any]:
    """Completions as text; behind a conversation as in TRL, a message [{"role": "assistant", "content": text}].

    Args:
        batch: of a `Collator`, each prompt of which has as many completions.
        completion_ids: of `outcomes`.
        tokenizer: None: they stay token ids.

    Raises:
        RewardError: the tokenizer failed; names the first completion that it fails on.
    """
    if tokenizer is None:
        return completion_ids
    try:
        texts = _texts(tokenizer, completion_ids)
    except Exception as failed:
        for n, ids in enumerate(completion_ids):
            try:
                _texts(tokenizer, [ids])
            except Exception as error:
                raise RewardError(
                    f"completion {n} could not be decoded, {type(error).__name__}: {error}; its token ids are {ids}"
                ) from error
        raise RewardError(f"completions could not be decoded, {type(failed).__name__}: {failed}") from failed
    repeats = len(texts) // len(batch["openings"])
    openings = [opening for opening in batch["openings"] for _ in range(repeats)]
    return [
        text if opening is None else [{"role": "assistant", "content": opening + text}]
        for text, opening in zip(texts, openings, strict=True)
    ]


def _texts(tokenizer: Any, completion_ids: list[list[int]]) -> list[str]:
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if len(texts) != len(completion_ids) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"batch_decode must give a text for each completion, {len(completion_ids)}")
    return texts


def label_ids(labels: list[np.ndarray], kinds: list[np.ndarray]) -> np.ndarray | None:
    """Labels for compute_metrics, a row of -100 where a row has none; None unless all that are there are of tokens."""
    found = set(np.concatenate(kinds).tolist())
    return stacked(labels) if LabelKind.TOKENS in found and LabelKind.OTHER not in found else None


def stacked(batches: list[np.ndarray]) -> np.ndarray:
    """Batches [n, L] of different length, padded on the left with -100 as Trainer does."""
    length = max(batch.shape[1] for batch in batches)
    padded = [np.pad(batch, ((0, 0), (length - batch.shape[1], 0)), constant_values=-100) for batch in batches]
    return np.concatenate(padded)
