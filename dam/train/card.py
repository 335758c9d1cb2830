"""The model card of a fine-tuned model: README.md in its folder, as the hub reads it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import dam

_OURS = (
    "<!-- Written with the model, and anew whenever it is saved. Without this line the card is yours, and stays. -->"
)
# Of huggingface_hub's template, which PEFT writes beside an adapter, while nobody has filled it in.
_BLANK = "# Model Card for Model ID"
_TAG = "generated_from_trainer"


class Method(NamedTuple):
    """What a model was trained by.

    Args:
        name: as the literature has it.
        paper: its address.
        aim: what is least, as a clause.
        tags: of a card, that it is found by.
    """

    name: str
    paper: str
    aim: str
    tags: tuple[str, ...]


class Facts(NamedTuple):
    """What a card tells of a run.

    Args:
        title: of the card.
        method: that the model was trained by.
        model: name on the hub or folder that the model was loaded from; "" if it was made otherwise.
        base: the same of the base that the model is kept close to.
        library: that loads what is in the folder, as the hub names it, peft for an adapter; None of a module of
            somebody's own.
        run: arguments and counts that the result depends on, by what they are called.
        figures: names of what the last log of training is told by, the first of which each log has.
        history: the log, `trainer.state.log_history`.
    """

    title: str
    method: Method
    model: str
    base: str
    library: str | None
    run: Mapping[str, str]
    figures: Sequence[str]
    history: Sequence[Mapping[str, Any]]


def name_of(network: Any) -> str:
    """Name or folder that a model was loaded from; "" of one that was made."""
    return str(getattr(getattr(network, "config", None), "_name_or_path", "") or "")


def budget(reward_calls: int, history: Sequence[Mapping[str, Any]]) -> str:
    """Reward calls and training steps of a run, for `Facts.run`."""
    steps = max((int(entry.get("step", 0)) for entry in history), default=0)
    return f"{reward_calls:,} reward calls in {steps:,} training steps"


def is_free(folder: str | os.PathLike[str]) -> bool:
    """Whether there is no card in a folder that somebody wrote: none, one of ours, or a blank one of PEFT's."""
    path = Path(folder) / "README.md"
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8")
    return _OURS in text or _BLANK in text


def write(folder: str | os.PathLike[str], facts: Facts, **metadata: Any) -> None:
    """Writes the card, unless there is one that somebody wrote.

    Args:
        folder: of the saved model.
        facts: what it tells.
        metadata: of `huggingface_hub.ModelCardData`, besides what the run tells: license, language, tags, ...
    """
    if is_free(folder):
        card(facts, **metadata).save(Path(folder) / "README.md")


def card(facts: Facts, **metadata: Any) -> ModelCard:
    """The card itself; `metadata` as in `write`."""
    tags = [*facts.method.tags, _TAG, *metadata.pop("tags", ())]
    known: dict[str, Any] = {} if facts.library is None else {"library_name": facts.library}
    if _is_of_hub(facts.model):
        known["base_model"] = facts.model
    data = ModelCardData(**{**known, **metadata, "tags": tags})
    sections = [_OURS, _head(facts), _table("run", facts.run), *_results(facts), _versions(facts.library == "peft")]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _is_of_hub(name: str) -> bool:
    return bool(name) and not os.path.isdir(name) and name.count("/") <= 1


def _shown(name: str) -> str:
    """Of a folder its last part: where it lies on somebody's machine is nobody's business."""
    if not name:
        return "a model without a name"
    return f"[{name}](https://huggingface.co/{name})" if _is_of_hub(name) else f"`{Path(name).name}`, a local folder"


def _head(facts: Facts) -> str:
    kind = "An adapter of" if facts.library == "peft" else "Fine-tuned from"
    other = "" if facts.base == facts.model else f" The base is {_shown(facts.base)}."
    method = facts.method
    return f"# {facts.title}\n\n{kind} {_shown(facts.model)}, by [{method.name}]({method.paper}): {method.aim}.{other}"


def _results(facts: Facts) -> list[str]:
    """The last log of training, and the last of an evaluation; none of a model that was not trained."""
    tables = []
    for sign, names in ((facts.figures[0], facts.figures), ("eval_reward", None)):
        entry = next((entry for entry in reversed(facts.history) if sign in entry), None)
        if entry is not None:
            shown = names or [name for name in entry if name.startswith("eval_")]
            rows = {f"`{name}`": f"{entry[name]:.4g}" for name in shown if name in entry}
            tables.append(_table(f"{'training' if names else 'evaluation'}, step {entry['step']:,}", rows))
    return tables


def versions(adapter: bool = False) -> dict[str, str]:
    """Of what a run depends on, by name; PEFT's with an adapter."""
    found = {"dam": dam.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if adapter:
        found["peft"] = importlib.metadata.version("peft")
    return {**found, "python": platform.python_version()}


def _versions(adapter: bool) -> str:
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in versions(adapter).items()) + "."


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {title} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
