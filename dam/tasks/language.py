"""What tasks whose answers are text have in common: rows out of datasets, prompts, and metrics of completions.

The tasks are in `dam.tasks.TASKS`, by name.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dam.tasks.answers import text_of

STYLES = ("d1", "llada")

# Reading of a file by `datasets.load_dataset`.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class Judged(NamedTuple):
    """N completions by a task's checker."""

    correct: list[bool]  # of each; what pass@k counts
    figures: dict[str, float]  # the task's own, over all


class LanguageTask(abc.ABC):
    """A task whose prompts and answers are text: its rows, its rewards and its metrics."""

    name: ClassVar[str]
    dataset: ClassVar[str | None]  # on the hub, what `rows` reads unless told otherwise; "name:subset" where it has any
    reward_weights: ClassVar[tuple[float, ...]]

    @property
    @abc.abstractmethod
    def rewards(self) -> tuple[Any, ...]:
        """Reward functions in the trainer's signature; `reward_weights` makes their sum the published reward."""

    @abc.abstractmethod
    def row(self, record: Mapping[str, Any], *, style: str = "d1") -> dict[str, Any] | None:
        """A row of the trainer's, `prompt` and what rewards and metrics need, of a dataset's; None: not of this task.

        Raises:
            ValueError: it lacks something, or cannot be right.
        """

    @abc.abstractmethod
    def judge(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Judged:
        """Completions by the rows that they are of, one each."""

    def rows(
        self, source: str | None = None, *, split: str = "train", limit: int | None = None, style: str = "d1"
    ) -> list[dict[str, Any]]:
        """Rows for `DAMTrainer` out of a dataset.

        Args:
            source: a file (.jsonl, .json, .parquet, .csv), a folder that `datasets` reads or has saved, or a name on
                the hub, "openai/gsm8k:main" with the subset behind a colon; `dataset` unless given.
            split: of a folder or a dataset of the hub; a file has one.
            limit: the first so many.
            style: of prompts, "d1" (reasoning and answer in tags) or "llada" (plain, answer in a box).

        Raises:
            ValueError: an argument is none of these, or a row cannot be right; names it.
            OSError: there is no such file or dataset, or it cannot be reached.
            ImportError: `datasets` is missing.
        """
        check_style(style)
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1; got {limit}")
        source = source or self.source(split)
        records = self.records(split, limit) if source is None else load(source, split)
        return self._rows_of(records, f"{source or self.name}, {split}", limit, style)

    def source(self, split: str) -> str | None:
        """What `rows` reads unless told otherwise; None: `records`."""
        return self.dataset

    def records(self, split: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
        """What `rows` is of without a source and a `dataset`.

        Raises:
            ValueError: the task makes none, or has no such split.
        """
        raise ValueError(f"{self.name} needs a source: a file, a folder or a name on the hub")

    def _rows_of(
        self, records: Iterable[Mapping[str, Any]], where: str, limit: int | None, style: str
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for number, record in enumerate(records):
            try:
                row = self.row(record, style=style)
            except ValueError as error:
                raise ValueError(f"{where}, row {number}: {error}") from error
            if row is not None:
                rows.append(row)
            if len(rows) == limit:
                break
        if not rows:
            raise ValueError(f"{where}: no rows for {self.name}")
        return rows

    def metrics(self, completions: Sequence[Sequence[Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Of n completions of each row: exact, the mean of correct ones over all; pass@1, pass@2, pass@4, ... up to n
        (`pass_at_k`), means over rows; and the task's own figures.

        Raises:
            ValueError: rows have different numbers of completions, or there are none.
        """
        return self.metrics_by_row(completions, rows)[0]

    def metrics_by_row(
        self, completions: Sequence[Sequence[Any]], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """`metrics`, and of those that are means over rows what each row has."""
        if len(completions) != len(rows) or not rows:
            raise ValueError(
                f"metrics need completions of each row, one or more; got {len(completions)} of {len(rows)}"
            )
        (count, *others) = {len(group) for group in completions}
        if others or count == 0:
            raise ValueError(f"rows must have equally many completions, one or more; got {sorted({count, *others})}")
        texts = [text_of(completion) for group in completions for completion in group]
        judged = self.judge(texts, [row for row in rows for _ in range(count)])
        right = [sum(judged.correct[start : start + count]) for start in range(0, len(texts), count)]
        by_row = {"exact": [c / count for c in right]}
        for k in powers_of_two(count):
            by_row[f"pass@{k}"] = [pass_at_k(count, c, k) for c in right]
        means = {name: sum(values) / len(rows) for name, values in by_row.items()}
        for name in judged.figures:  # a task's own `exact` is another figure than the rows'
            by_row.pop(name, None)
        return {**means, "exact": sum(right) / len(texts), **judged.figures}, by_row


def check_style(style: str) -> None:
    """Raises a ValueError where it is no style of prompts."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, STYLES))}; got {style!r}")


def prompt(question: str, style: str, *, answer: str) -> list[dict[str, str]]:
    r"""A question as messages, one of the user's, as d1 and LLaDA ask.

    "d1": reasoning in <reasoning>, then the answer in <answer>; the format stands in front of the question, in the
    user's message (dllm-reasoning/d1, diffu-grpo/data_utils.py). "llada": the question, then a request to reason step
    by step and to put the answer in \boxed{} (ML-GSAI/LLaDA, its configuration of MATH without examples). Words are
    ours.

    Args:
        question: as text.
        style: of `STYLES`.
        answer: what the answer is to be.
    """
    check_style(style)
    if style == "d1":
        content = (
            f"Answer in this format, your reasoning first, then {answer}:\n"
            f"<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n{question}"
        )
    else:
        content = f"{question}\nReason step by step, and put the final answer, {answer}, in \\boxed{{}}."
    return [{"role": "user", "content": content}]


def texts(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Columns of a dataset's row as text; numbers, which CSV files make of digits, are written out.

    Raises:
        ValueError: one is missing or empty, or is neither text nor a number.
    """
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"needed: {', '.join(names)}; missing: {', '.join(missing)}; found: {', '.join(record)}")
    found = []
    for name in names:
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise ValueError(f"{name} must be text; got {value!r:.100}")
        found.append(str(value))
    return found


def powers_of_two(largest: int) -> Iterator[int]:
    """1, 2, 4, ..., up to `largest`."""
    return (1 << exponent for exponent in range(largest.bit_length()))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n completions, drawn without return, hold one of the c right ones: 1 - C(n - c, k) / C(n, k).

    An unbiased estimate of the chance that one of k is right (Chen et al. 2021, Evaluating Large Language Models
    Trained on Code, equation 1), where 1 - (1 - c/n)^k is biased.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n {n}, c {c}, k {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def load(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a file, a folder or a dataset of the hub, as `LanguageTask.rows` says."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("rows of tasks need datasets: pip install 'discrete-adjoint-matching[tasks]'") from error

    path = Path(source)
    if path.suffix in BUILDERS and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source}")
        return _loaded(source, BUILDERS[path.suffix], data_files={split: str(path)}, split=split)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # by save_to_disk
            saved = datasets.load_from_disk(source)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise ValueError(f"{source} has no split {split!r}; it has {', '.join(saved)}")
                return saved[split]
            return saved
        return _loaded(source, source, split=split)
    name, _, subset = source.partition(":")
    return _loaded(source, name, subset or None, split=split)


def _loaded(source: str, *arguments: Any, **options: Any) -> Iterable[Mapping[str, Any]]:
    """`datasets.load_dataset`; what it raises names the source, and is what `LanguageTask.rows` says."""
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    except OSError as error:
        raise type(error)(f"{source}: {error}") from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error.__context__ or error
        raise ValueError(f"{source} cannot be read as a dataset: {error} ({type(cause).__name__}: {cause})") from error
