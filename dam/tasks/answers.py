"""Where in a completion its answer is. Linear in a bounded number of characters, whatever a model writes.

Completions are text, or messages as a conversation's are: [{"role": "assistant", "content": text}].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TAIL = 65_536  # characters at the end of a completion that are looked at; an answer is its last word
LONGEST = 2_000  # characters of an answer; nothing longer is one


def text_of(completion: Any) -> str:
    """The text of a completion.

    Raises:
        TypeError: it is neither text nor messages.
    """
    if isinstance(completion, (list, tuple)) and completion and isinstance(completion[-1], Mapping):
        completion = completion[-1].get("content")
    if not isinstance(completion, str):
        raise TypeError(f"a completion must be text or messages with text; got {type(completion).__name__}")
    return completion


def tagged(text: str) -> str | None:
    """What the last closed <answer>...</answer> holds, as d1's reward functions take it; None where there is none."""
    text = text[-TAIL:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len("<answer>") : end].strip()


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, its braces balanced; of one in another, the inner one.

    Without braces, as MATH writes it now and then, `\boxed 5`, what follows up to a $ or the end of the line. None
    where there is no box, and where the last one is not closed: a completion that breaks off has no last word.
    """
    text = text[-TAIL:]
    start = max(text.rfind(name) + len(name) if name in text else -1 for name in (r"\boxed", r"\fbox"))
    if start < 0:
        return None
    inside = text[start : start + LONGEST + 2].lstrip()
    if not inside.startswith("{"):
        return inside.split("$")[0].split("\n")[0].strip() or None
    depth, escaped = 0, False
    for position, character in enumerate(inside):
        if escaped:  # \{ and \} are no braces of TeX's
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return inside[1:position].strip()
    return None


def marks(text: str) -> bool:
    """Whether a completion begins to mark an answer, closed or not."""
    text = text[-TAIL:]
    return "<answer>" in text or r"\boxed" in text or r"\fbox" in text


def marked(text: str) -> str | None:
    """The answer that a completion marks as such, at most `LONGEST` characters; None where there is none.

    What <answer> holds, and of that what \\boxed{} holds if it has a box; else the box. An answer that is not closed
    is none.
    """
    inside = tagged(text)
    if inside is None:
        answer = None if "<answer>" in text[-TAIL:] else boxed(text)
    else:
        answer = boxed(inside) if marks(inside) else inside
    return answer if answer and len(answer) <= LONGEST else None
