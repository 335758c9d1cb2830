"""Which modules an adapter's configuration means, found out before PEFT changes the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

_SHOWN = 8  # modules that a message lists


def check_targets(network: Any, peft_config: Any) -> list[str]:
    """The modules that `target_modules` matches, which must be some, and the output layer only on purpose.

    On purpose is the output layer named where an entry of a list matches it and nothing else ("lm_head"), or where a
    regular expression has the last part of its name, which no other matched module shares. A bare "ff_out" of LLaDA is
    a name of layers in all blocks, and of the output layer too.

    Args:
        network: the model, without an adapter.
        peft_config: of PEFT. One without target_modules, of prompt tuning for one, is not looked at; nor is
            "all-linear", which leaves the output layer out.

    Returns:
        Names of modules; none where nothing was looked at.

    Raises:
        ValueError: no module matches, or the output layer does by accident; lists what was matched, and an expression
            for what could be.
    """
    targets = getattr(peft_config, "target_modules", None)
    if not targets or targets == "all-linear":
        return []
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [name for name, _ in network.named_modules() if name]
    matched = [name for name in names if check_target_module_exists(peft_config, name)]
    shown = repr(targets) if isinstance(targets, str) else repr(sorted(targets))
    if not matched:
        if getattr(peft_config, "target_parameters", None):
            return []  # which PEFT looks for itself
        raise ValueError(
            f"peft_config.target_modules {shown} matches no module of {type(network).__name__}. {would_match(network)}"
        )
    head = _name_of_head(network)
    if head is not None and head in matched and not _on_purpose(targets, head, matched):
        others = [name for name in matched if name != head]
        raise ValueError(
            f"peft_config.target_modules {shown} matches the output layer, {head}, as it matches "
            f"{_listed(others)}: by accident, it seems. {would_match(network)}. To adapt the output layer too, "
            f"give a list of names with {head!r} in it"
        )
    if not isinstance(targets, str):
        idle = [entry for entry in sorted(targets) if not any(_is_named(name, entry) for name in matched)]
        if idle:
            warnings.warn(
                f"peft_config.target_modules: {', '.join(idle)} match no module of {type(network).__name__}, whose "
                f"adapted modules are {_listed(matched)}. {would_match(network)}",
                stacklevel=2,
            )
    return matched


def would_match(network: Any) -> str:
    """Says which expression matches the linear layers below the output layer, and how many these are."""
    expression, count = linear_layers(network)
    if not count:
        return "It has no linear layers below its output layer"
    return f"'{expression}' would match its {count} linear layers below the output layer"


def linear_layers(network: Any) -> tuple[str, int]:
    """A regular expression for the linear layers of a model's blocks, less the output layer, and how many it matches.

    Anchored: it names where blocks are, so that no layer elsewhere is matched. Where no layer is in a numbered block,
    those outside.
    """
    from transformers.pytorch_utils import Conv1D

    head = _name_of_head(network)
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name and name != head
    ]
    numbered = [name for name in found if re.search(r"(^|\.)\d+\.", name)] or found
    inside: dict[str, dict[str, None]] = {}
    for name in numbered:
        pattern = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        first, number, rest = pattern.partition("\\d+\\.")
        if not number:
            first, rest = "", pattern
        inside.setdefault(first + number, {})[rest] = None
    parts = [f"{first}({'|'.join(rests)})" for first, rests in inside.items()]
    return (parts[0] if len(parts) == 1 else "|".join(parts)), len(numbered)


def _name_of_head(network: Any) -> str | None:
    """That of the output layer; None where there is none, or it is no module of the model."""
    get = getattr(network, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return next((name for name, module in network.named_modules() if layer is not None and module is layer), None)


def _is_named(module: str, entry: str) -> bool:
    """As PEFT reads an entry of a list: a name from its end."""
    return module == entry or module.endswith(f".{entry}")


def _on_purpose(targets: str | Iterable[str], head: str, matched: list[str]) -> bool:
    others = [name for name in matched if name != head]
    if isinstance(targets, str):
        last = head.rpartition(".")[2]
        named = re.search(rf"(?<!\w){re.escape(last)}(?!\w)", targets) is not None
        return named and all(name.rpartition(".")[2] != last for name in others)
    naming = [entry for entry in targets if _is_named(head, entry)]
    return any(not any(_is_named(name, entry) for name in others) for entry in naming)


def _listed(names: list[str]) -> str:
    """Names of modules; of many the first ones."""
    if not names:
        return "nothing else"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
