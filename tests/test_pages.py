"""Pages that name things of the code: keys of the log, messages of errors, operations. Each is held to the code."""

import ast
import re
from pathlib import Path

import pytest

from dam.train import DAMTrainer
from tests.calls import public_ops
from tests.train.tiny import rotary_model, tiny_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def first_cells(page: Path, *, sections: str = "") -> list[str]:
    """What stands in code in the first cells of a page's tables, where a heading's text matches `sections`."""
    found, heading = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        cells = line.split(" | ")
        if line.startswith("| ") and re.fullmatch(sections or ".*", heading):
            found += re.findall(r"`([^`]+)`", cells[0])
    return found


# ---- the log


async def judge(completion_ids, **_):
    if completion_ids[0][0] == 5:
        raise ValueError("no verdict")
    return [float(sum(ids)) for ids in completion_ids]


async def brief(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


@pytest.mark.filterwarnings("ignore:reward functions failed")
def test_every_key_of_the_log_is_in_its_page_and_no_other(tmp_path):
    """Of a run with what any figure needs: prompts, an end of text, failures that cost a completion, an evaluation."""
    rows = [{"prompt": [1 + n % 5]} for n in range(8)]
    args = tiny_config(
        tmp_path,
        max_steps=2,
        stop_token_ids=[2],
        reward_timeout=60.0,
        max_reward_failures=1.0,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = DAMTrainer(
        rotary_model(), [judge, brief], args, rows, eval_dataset=rows[:2], compute_metrics=lambda _: {"length": 1.0}
    )
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    listed = first_cells(DOCS / "logs.md", sections="Of training|Of evaluation|At the end")
    assert len(listed) == len(set(listed)), "a key has two rows"
    names = {"<function>": ("judge", "brief"), "<name>": ("length",)}
    for placeholder, those in names.items():
        listed = [key.replace(placeholder, name) for key in listed for name in (those if placeholder in key else [""])]
    assert logged - set(listed) == set(), "keys that docs/logs.md does not explain"
    assert set(listed) - logged == set(), "keys in docs/logs.md that nothing logs"


# ---- messages


def literals(path: Path) -> list[str]:
    """Texts of a module, those in pieces put together, with a line break wherever a value goes in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (piece.value if isinstance(piece, ast.Constant) else "\n" for piece in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def says(text: str, message: str) -> bool:
    """Whether a message, `...` being what differs, is made of this text."""
    at = 0
    for piece in message.split("..."):  # each behind the one before: the first place is as good as any
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md quotes: what is in code in first cells, and longer than a name."""
    return [cell for cell in first_cells(DOCS / "troubleshooting.md") if " " in cell]


# Of the compiler, the system and commands, not of dam.
OTHERS = {"g++: not found", "error: command 'gcc' failed", "Illegal instruction"}


def test_messages_that_troubleshooting_quotes_are_in_the_source():
    modules = [ROOT / "setup.py", *(ROOT / "dam").rglob("*.py")]
    modules += (ROOT / "kernels").glob("*.py")  # dam/kernels is a link, which rglob does not follow
    texts = [text for path in modules for text in literals(path) if len(text) > 8]
    messages = [message for message in quoted() if message not in OTHERS]
    assert len(messages) > 50
    lost = [message for message in messages if not any(says(text, message) for text in texts)]
    assert not lost


def test_a_message_that_is_gone_would_be_found():
    text = "\n: row \n of the logits \n (check=False skips this test)"  # as `literals` gives it
    assert says(text, "...: row ... of the logits ... (check=False skips this test)")
    assert not says(text, "...: row ... of the hidden states ...") and not says(text, "(check=False ... of the logits")


# ---- operations


def test_every_operation_has_a_page():
    index = (DOCS / "operations" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[\w+\]\((\w+\.md)\) \| ([^|]+) \|", index, re.MULTILINE)
    page_of = {op: page for page, ops in rows for op in re.findall(r"`(\w+)`", ops)}
    assert sorted(page_of) == public_ops()
    for op, page in page_of.items():
        text = (DOCS / "operations" / page).read_text(encoding="utf-8")
        assert op in text.splitlines()[0], f"{page} is not headed {op}"
        for part in ("## Contract", "Data flow", "ost", "## Example"):
            assert part in text, f"{page} has no {part}"
