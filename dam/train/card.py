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
from dam.train.config import DAMConfig

_OURS = (
    "<!-- Written with the model, and anew whenever it is saved. Without this line the card is yours, and stays. -->"
)
# Of huggingface_hub's template, which PEFT writes beside an adapter, while nobody has filled it in.
_BLANK = "# Model Card for Model ID"
_TAGS = ("discrete-adjoint-matching", "masked-diffusion", "generated_from_trainer")
_PAPER = "https://arxiv.org/abs/2602.07132"
_END = ("reward", "reward_std", "ess", "kl_path", "kl_outcome", "order_variance", "tilt")


class Facts(NamedTuple):
    """What a card tells of a run.

    Args:
        model: name on the hub or folder that the model was loaded from; "" if it was made otherwise.
        base: the same of the base that the KL is to.
        adapter: whether the folder holds an adapter of the model (PEFT).
        rewards: weight of each reward function, by name.
        args: of the run.
        reward_calls: completions that were rewarded in training.
        history: the log, `trainer.state.log_history`.
    """

    model: str
    base: str
    adapter: bool
    rewards: Mapping[str, float]
    args: DAMConfig
    reward_calls: int
    history: Sequence[Mapping[str, Any]]


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
    tags = [*_TAGS, *metadata.pop("tags", ())]
    known: dict[str, Any] = {"library_name": "peft" if facts.adapter else "transformers"}
    if _is_of_hub(facts.model):
        known["base_model"] = facts.model
    data = ModelCardData(**{**known, **metadata, "tags": tags})
    sections = [_OURS, _head(facts), _run(facts), *_results(facts.history), _versions(facts.adapter)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _is_of_hub(name: str) -> bool:
    return bool(name) and not os.path.isdir(name) and name.count("/") <= 1


def _shown(name: str) -> str:
    """Of a folder its last part: where it lies on somebody's machine is nobody's business."""
    if not name:
        return "a model without a name"
    return f"[{name}](https://huggingface.co/{name})" if _is_of_hub(name) else f"`{Path(name).name}`, a local folder"


def _head(facts: Facts) -> str:
    kind = "An adapter of" if facts.adapter else "Fine-tuned from"
    other = "" if facts.base == facts.model else f" The base is {_shown(facts.base)}."
    title = Path(str(facts.args.output_dir)).resolve().name
    return (
        f"# {title}\n\n{kind} {_shown(facts.model)}, by [Discrete Adjoint Matching]({_PAPER}): toward a reward, close "
        f"to the base, as min E[-reward] + beta KL(model || base).{other}"
    )


def _run(facts: Facts) -> str:
    args = facts.args
    rewards = ", ".join(f"`{name}` (weight {weight:g})" for name, weight in facts.rewards.items())
    steps = max((int(entry.get("step", 0)) for entry in facts.history), default=0)
    rows = {
        "reward functions": rewards,
        "beta": f"{args.beta:g}",
        "estimator, normalizer": f"{args.estimator}, {args.normalizer}",
        "trajectories per prompt": f"{args.num_generations}",
        "budget": f"{facts.reward_calls:,} reward calls in {steps:,} training steps",
        "seed": f"{args.seed}",
    }
    if args.null_arm:
        rows["null arm"] = "weights permuted within each group: a control, whose gain is not the reward's doing"
    return _table("run", rows)


def _results(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last log of training, and the last of an evaluation; none of a model that was not trained."""
    tables = []
    for sign, names in (("reward", _END), ("eval_reward", None)):
        entry = next((entry for entry in reversed(history) if sign in entry), None)
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
