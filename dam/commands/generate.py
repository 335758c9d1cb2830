"""`dam generate`: completions of prompts, a JSON object a line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dam.commands.completing import Completer, Law, hash_of, progress, write_completions
from dam.commands.train import task_of
from dam.decoding import Decoding
from dam.train.pretrained import Source, fingerprint

DECODING = tuple(field.name for field in dataclasses.fields(Decoding))


def source_of(arguments: argparse.Namespace) -> Source:
    """The model that a command line names."""
    return Source(
        arguments.model,
        arguments.model_class,
        arguments.dtype,
        arguments.trust_remote_code,
        arguments.attn,
        arguments.revision,
    )


def law_of(arguments: argparse.Namespace) -> Law:
    """How a command line has completions drawn."""
    return Law(
        samples=arguments.samples,
        seed=arguments.seed,
        max_completion_length=arguments.max_completion_length,
        steps=arguments.steps,
        block_length=arguments.block_length,
        decoding=Decoding(**{name: getattr(arguments, name) for name in DECODING}),
        mask_token_id=arguments.mask_token_id,
        stop_token_ids=arguments.stop_token_ids,
        suppress_tokens=arguments.suppress_tokens,
        chat_template_kwargs=arguments.chat_template_kwargs,
        denoiser=arguments.denoiser,
    )


def prompts_of(text: str, where: str) -> list[dict[str, Any]]:
    """Rows of a file: JSON objects with `prompt`, one a line, if the first line is one; else a prompt a line.

    Raises:
        ValueError: names the line that is no such object; or there is no prompt.
    """
    # Not by splitlines, which also cuts at what may stand in a text, U+2028 for one.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{where}: no prompts")
    if _is_json_list(text):
        raise ValueError(f"{where} is one JSON list: JSON objects, one a line, please")
    if not lines[0][1].lstrip().startswith("{"):
        return [{"prompt": line} for _, line in lines]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {number}: no JSON object, as the first line is: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), (str, list)):
            raise ValueError(f'{where}, line {number}: a JSON object with "prompt", text or messages, please')
        rows.append({"prompt": row["prompt"]})
    return rows


def _is_json_list(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except json.JSONDecodeError:
        return False


def rows_of(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of the prompts or of the task that a command line names."""
    if arguments.task is not None:
        task = task_of(arguments.task)
        return task.rows(arguments.source, split=arguments.split, limit=arguments.limit, style=arguments.style)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit must be at least 1; got {arguments.limit}")
    if arguments.prompts == "-":
        rows = prompts_of(sys.stdin.read(), "standard input")
    else:
        rows = prompts_of(Path(arguments.prompts).read_text(encoding="utf-8-sig"), arguments.prompts)
    chat = arguments.chat
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        rows = [_as_messages(row) for row in rows]
    return rows[: arguments.limit]


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    return {"prompt": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else row


def loaded(source: Source, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, the former on a device, the first GPU unless named if there is one.

    Raises:
        ValueError: there is no such device, or as `Source.model`.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises either where it is built without that device
        raise ValueError(f"there is no device {chosen!r} here: {error}") from error
    tokenizer = source.tokenizer()
    return source.model().to(chosen), tokenizer


def options_of(model: Any, source: Source, law: Law, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the completions of a file depend on."""
    return {
        "model": dataclasses.asdict(source),
        "weights": fingerprint(model),
        "law": dataclasses.asdict(law),
        "rows": len(rows),
        "prompts": hash_of(rows),
    }


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes arguments.out; says how many lines it has.

    Raises:
        ValueError, OSError, ImportError: an argument, a file, the model or a row cannot be right; before any is drawn.
    """
    if (arguments.prompts is None) == (arguments.task is None):
        raise ValueError("give --prompts or --task, one of them")
    law, source, out = law_of(arguments), source_of(arguments), Path(arguments.out)
    model, tokenizer = loaded(source, arguments.device)
    rows = rows_of(arguments, tokenizer)
    completer = Completer(model, tokenizer, law)
    options = options_of(model, source, law, rows)
    total = len(rows) * law.samples
    with progress(total, "completions") as bar:
        for done in write_completions(completer, rows, law, out, options, batch_size=arguments.batch_size):
            bar.to(done)
    return {"completions": total, "out": str(out)}
