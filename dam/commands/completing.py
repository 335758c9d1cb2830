"""Completions of prompts by a model, in batches, each keyed by its row: what `dam generate` and `dam eval` stand on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.models import as_denoiser
from dam.models.denoiser import MaskedLM
from dam.rollout import outcome_log_prob, rollout
from dam.tasks.finetune import refuse_changes, write_json
from dam.train.data import Collator, NumberedRow, decoded, outcomes, row_name
from dam.train.rows import RowReader
from dam.train.terminal import bar
from dam.train.tokens import limits_of, special_tokens

# A sample of a row is named by row * _SAMPLES + sample, so that more samples keep the first ones as they are.
_SAMPLES = 2**20


@dataclasses.dataclass(frozen=True)
class Law:
    """How completions are drawn; with the model and the prompts all that they depend on.

    Args:
        samples: of each prompt.
        seed: of all draws.
        max_completion_length: masks behind a prompt.
        steps: network calls per completion, at most; None is one for each token. Not with a threshold.
        block_length: blocks are filled from left to right; None is one, or those of the model's attention.
        decoding: order, temperature and what cuts the law (docs/decoding.md).
        mask_token_id, stop_token_ids, suppress_tokens, chat_template_kwargs: as in `DAMConfig`.
        denoiser: options of `dam.models.as_denoiser`.

    Raises:
        ValueError: an argument is out of range, or all samples of a prompt would be the same.
    """

    samples: int = 1
    seed: int = 0
    max_completion_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    mask_token_id: int | None = None
    stop_token_ids: Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    denoiser: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_completion_length", "steps", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.samples >= _SAMPLES:
            raise ValueError(f"samples must be below {_SAMPLES}; got {self.samples}")
        if self.steps is not None and self.decoding.threshold is not None:
            raise ValueError("a threshold tells how many positions a network call fills: leave out steps")
        if self.samples > 1 and self.decoding.temperature == 0 and self.decoding.order != "random":
            raise ValueError(
                f"all {self.samples} samples of a prompt would be the same, at temperature 0 in the order "
                f"{self.decoding.order!r}: set a temperature above 0, or samples to 1"
            )


class Completion(NamedTuple):
    """One sample of one row, as it stands in a file, a JSON object a line."""

    row: int
    sample: int
    prompt: Any
    completion: str
    completion_ids: list[int]

    def as_line(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False) + "\n"


class Completer:
    """Draws completions of rows.

    A completion depends on the law's seed, the number of its row and the number of the sample; not on what else is in
    its batch, up to rounding in the network.

    Args:
        model: a language model, on its device.
        tokenizer: of text and conversations.
        law: how they are drawn.

    Raises:
        ValueError, TypeError: the model or its tokens do not fit.
    """

    def __init__(self, model: Any, tokenizer: Any, law: Law):
        limits = limits_of(model)
        self._denoiser = as_denoiser(model, **(law.denoiser or {}))
        if hasattr(self._denoiser, "canvas_length"):
            raise TypeError(f"{type(model).__name__} undoes uniform noise on a canvas: see dam.canvas (docs/models.md)")
        tokens = special_tokens(
            law.mask_token_id,
            tokenizer,
            getattr(model, "config", None),
            self._denoiser,
            stop=law.stop_token_ids,
            suppress=law.suppress_tokens,
            ids=limits.ids,
        )
        self._process = MaskedCTMC(tokens.mask, suppress=tokens.suppress, vocabulary=tokens.vocabulary)
        self._stop, self._law, self._tokenizer = tokens.stop, law, tokenizer
        self._model = model
        self._reader = RowReader(tokens.mask, law.max_completion_length, tokenizer, limits, law.chat_template_kwargs)
        self._collator = Collator(self._reader, tokens.pad)
        self._device = next(model.parameters()).device
        self._compared = False

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises a ValueError where a row cannot be right, before any is drawn."""
        for number, row in enumerate(rows):
            self._collator([NumberedRow(number, row_name(number, "given"), row)])

    def complete(self, jobs: Sequence[tuple[int, int, Mapping[str, Any]]]) -> list[Completion]:
        """Completions of (row number, sample, row), in one batch."""
        batch = self._collator([NumberedRow(number, row_name(number, "given"), row) for number, _, row in jobs])
        ids = torch.tensor([number * _SAMPLES + sample for number, sample, _ in jobs], dtype=torch.int64)
        final = self._filled_in(batch, ids)
        seen = outcomes(batch, final, 1, self._stop)
        texts = decoded(batch, seen["completion_ids"], self._tokenizer)
        return [
            Completion(number, sample, row.get("prompt"), text if isinstance(text, str) else text[0]["content"], tokens)
            for (number, sample, row), text, tokens in zip(jobs, texts, seen["completion_ids"], strict=True)
        ]

    def front(self) -> list[int]:
        """What the tokenizer puts in front of a text."""
        return self._reader.front()

    def of(self, max_completion_length: int, **decoding: Any) -> Completer:
        """One with another length and other fields of `Decoding`."""
        law = dataclasses.replace(
            self._law,
            max_completion_length=max_completion_length,
            decoding=dataclasses.replace(self._law.decoding, **decoding),
        )
        return Completer(self._model, self._tokenizer, law)

    def log_probs(
        self, pairs: Sequence[tuple[int, Sequence[int], Sequence[int]]], orders: int
    ) -> tuple[Tensor, Tensor]:
        """`dam.rollout.outcome_log_prob` of continuations, float64 [B, orders], in the law's steps and blocks.

        And which of them the model fills in by confidence at temperature 0, bool [B].

        Args:
            pairs: a number, by which the orders are drawn, the context's tokens, and those behind it, one at least.
            orders: M.
        """
        rows = [{"input_ids": [*context, *[self._process.mask_token] * len(behind)]} for _, context, behind in pairs]
        batch = self._collator([NumberedRow(n, row_name(n, "given"), row) for n, row in enumerate(rows)])
        tokens, mask = batch["input_ids"].to(self._device), batch["attention_mask"].to(self._device)
        outcome = tokens.clone()
        for row, (_, _, behind) in zip(outcome, pairs, strict=True):
            row[-len(behind) :] = torch.tensor(list(behind), device=self._device)
        ids = torch.tensor([number for number, _, _ in pairs], dtype=torch.int64, device=self._device)
        found = torch.empty(len(pairs), orders, dtype=torch.float64)
        greedy = torch.empty(len(pairs), dtype=torch.bool)
        steps, block_length, seed = self._law.steps, self._law.block_length, self._law.seed
        for rows_of, cut in self._of_one_kind(tokens, mask):
            of = (self._denoiser, tokens[rows_of, cut:])
            given: dict[str, Any] = {
                "attention_mask": mask[rows_of, cut:],
                "steps": steps,
                "block_length": block_length,
            }
            given |= {"seed": seed, "row_ids": ids[rows_of]}
            wanted = outcome[rows_of, cut:]
            found[rows_of.cpu()] = outcome_log_prob(*of, wanted, self._process, orders=orders, **given).cpu()
            likeliest = rollout(*of, self._process, order="confidence", temperature=0.0, **given).final
            greedy[rows_of.cpu()] = (likeliest == wanted).all(dim=1).cpu()
        return found, greedy

    def _filled_in(self, batch: dict[str, Any], ids: Tensor) -> Tensor:
        law = self._law
        tokens, mask, start, ids = (
            value.to(self._device) for value in (batch["input_ids"], batch["attention_mask"], batch["start"], ids)
        )
        final = tokens.clone()
        for rows, cut in self._of_one_kind(tokens, mask):
            final[rows, cut:] = rollout(
                self._denoiser,
                tokens[rows, cut:],
                self._process,
                attention_mask=mask[rows, cut:],
                steps=law.steps,
                block_length=law.block_length,
                decoding=law.decoding,
                stop_tokens=self._stop,
                start=start[rows] - cut,
                seed=law.seed,
                row_ids=ids[rows],
            ).final
        return final

    @torch.no_grad()
    def _of_one_kind(self, tokens: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Rows that go through the model together, int64 [n], and how many positions in front of them are left out.

        All of them; or, of a model that padding on the left would mislead, those of one length.
        """
        if not self._compared and isinstance(self._denoiser, MaskedLM):
            self._denoiser.compare(tokens, mask)
        self._compared = True
        lengths = mask.sum(dim=1)
        if getattr(self._denoiser, "left_padding", True):
            yield torch.arange(len(tokens), device=tokens.device), tokens.shape[1] - int(lengths.max())
            return
        for length in lengths.unique().tolist():
            yield (lengths == length).nonzero()[:, 0], tokens.shape[1] - length


# A file of completions that can be gone on with


def write_completions(
    completer: Completer,
    rows: Sequence[Mapping[str, Any]],
    law: Law,
    path: Path,
    options: Mapping[str, Any],
    *,
    batch_size: int,
) -> Iterator[int]:
    """Writes a line for each sample of each row, batch by batch; gives the number of lines that are there.

    Goes on behind the last whole line of a file that was made with the same options, which are kept beside it
    (`options_path`). Batches are cut at the same places as in a run that was not interrupted.

    Raises:
        ValueError: the file is of other options, or of something else; or a row cannot be right.
    """
    jobs = [(number, sample, row) for number, row in enumerate(rows) for sample in range(law.samples)]
    claim(path, options)
    done = whole_lines(path, jobs)
    if done < len(jobs):
        completer.check(rows)
    yield done
    for begin in range(done - done % batch_size, len(jobs), batch_size):
        batch = jobs[begin : begin + batch_size]
        made = completer.complete(batch)[max(0, done - begin) :]
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(completion.as_line() for completion in made))
        yield begin + len(batch)


def options_path(path: Path) -> Path:
    return path.with_name(path.name + ".options.json")


def claim(path: Path, options: Mapping[str, Any]) -> None:
    """Puts options beside a file that is begun; of one that is there they must be the same.

    Raises:
        ValueError: they are others, or it has none.
    """
    beside = options_path(path)
    plain = json.loads(json.dumps(options))
    if path.exists() and path.stat().st_size > 0:
        if not beside.exists():
            raise ValueError(
                f"{path} is there already, and was not made by dam ({beside.name} is missing): name another"
            )
        refuse_changes(json.loads(beside.read_text(encoding="utf-8")), plain, f"{path}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, plain)


def whole_lines(path: Path, jobs: Sequence[tuple[int, int, Any]]) -> int:
    """How many lines a file has; what a kill left of one more is cut.

    Raises:
        ValueError: they are not those of the jobs, one after another.
    """
    if not path.exists():
        return 0
    size = count = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            found = json.loads(line)
            if count >= len(jobs) or (found["row"], found["sample"]) != jobs[count][:2]:
                raise ValueError(f"{path}, line {count + 1}: not the sample that belongs there; name another file")
            size, count = size + len(line), count + 1
    os.truncate(path, size)
    return count


def read_completions(path: Path) -> list[Completion]:
    """The lines of a file."""
    with open(path, encoding="utf-8") as file:
        return [Completion(**json.loads(line)) for line in file]


def hash_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """16 hexadecimal digits that tell rows from others."""
    told = hashlib.sha256()
    for row in rows:
        told.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return told.hexdigest()[:16]


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Any]:
    """Context manager: `dam.train.terminal.bar`, whose `to(n)` moves it."""
    with bar(total=total, desc=what, unit="", smoothing=0.1) as shown:

        def to(count: int) -> None:
            shown.update(count - shown.n)

        shown.to = to
        yield shown
