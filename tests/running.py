"""Python of a page, run from top to bottom; of what pages take for granted, or take long for, something small.

A page with nothing here is run as it stands. A block that cannot be run says "notest: why" behind its language, or
"notest" where REASONS has why for all of its page.

What a block prints is shown by a block of text right below it, in which numbers may be as far off as it says: "within
5%", or "within 5% or 0.01" for what may be as much off whatever its size; else it is the same to the letter.

    python -m tests.running docs/tour.md    writes what blocks print into the blocks of text below them
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

from tests import pages

# Source that is run in front of a page's blocks.
BEFORE = {
    "docs/engines.md": """
import functools
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dam.engines.contract import Prompts
from dam.models import Denoiser
from dam.rollout import Trajectories
from tests.models.standins.sdar import SDARConfig, SDARForCausalLM
from tests.models.standins.trunk import MASK
from tests.train.tiny import sum_reward as reward

model = SDARForCausalLM(SDARConfig(mask_token_id=MASK)).eval()
rows = [{"prompt": [1, 2, 3]}] * 8
""",
    "docs/grpo.md": """
from transformers import ModernBertConfig, ModernBertForMaskedLM

from dam.recipes.characters import characters_tokenizer

tokenizer = characters_tokenizer()
ModernBertForMaskedLM(
    ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )
).save_pretrained("answerdotai/ModernBERT-base")
dataset = [{"prompt": "2 + 2 = ", "answer": "4"}] * 8


def correct(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def brief(completions, **_):
    return [-len(text) / 100 for text in completions]
""",
    "docs/models.md": """
import torch
from tests.models.standins.trunk import MASK
from dam.train import DAMConfig, DAMTrainer

prompts = [{"prompt": "2 + 2 = "}] * 8


def reward(completions, **_):
    return [0.0 for _ in completions]
""",
    "docs/scale.md": """
from pathlib import Path

import torch
import torch.distributed

import dam

torch.distributed.init_process_group("gloo", init_method=Path("store").absolute().as_uri(), rank=0, world_size=1)
group, step = torch.distributed.group.WORLD, 0
hidden, head, bias = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.zeros(50)
start, end = 0, 50
target, weight = torch.randint(50, (4, 1)), torch.ones(4, 1)
""",
    "docs/tasks.md": """
open("problems.jsonl", "w").write('{"numbers": [2, 3, 4], "target": 10}')
""",
}

# Why nothing that is marked so is run of a page.
REASONS = {"docs/porting.md": "calls of other libraries, shown before those that take their place"}
# What packages print when they are first imported, by a page or by what was run before it.
OF_OTHERS = re.compile(r"^\[[\d :,-]+\] \[\w+\] \[real_accelerator\.py.*\n", flags=re.MULTILINE)

# Passages of a page's Python that are run with others in their places, each once: a long run, shortened.
CHANGED: dict[str, list[tuple[str, str]]] = {}


def _small_llada2():
    """Models and tokenizers of the hub, by their names, are small ones of their class."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dam.recipes.characters import characters_tokenizer
    from tests.models.standins.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM

    tokenizer = characters_tokenizer()

    def model(name, **_):
        torch.manual_seed(0)
        return LLaDA2MoeModelLM(LLaDA2MoeConfig(vocab_size=len(tokenizer))).eval()

    return [
        mock.patch.object(AutoModelForCausalLM, "from_pretrained", model),
        mock.patch.object(AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer),
    ]


def _small_canvases():
    import transformers

    from tests.models.test_diffusion_gemma import small_model

    found = transformers.DiffusionGemmaForBlockDiffusion
    return [mock.patch.object(found, "from_pretrained", lambda name, **_: small_model())]


def _one_process():
    """A process group that the preamble makes is gone afterwards."""
    import torch.distributed

    @contextlib.contextmanager
    def ended():
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    return [ended()]


# Context managers that a page is run in.
AROUND = {
    "docs/models.md": lambda: [*_small_llada2(), *_small_canvases()],
    "docs/scale.md": _one_process,
}


def left_out(block: pages.Block) -> str | None:
    """Why a block of Python is not run here, or None; empty where nobody says why."""
    match = re.fullmatch(r"notest(?:: *(.*))?", block.options)
    return None if match is None else match[1] or REASONS.get(block.page, "")


def printed(page: str) -> Iterator[tuple[pages.Block, str]]:
    """The blocks of Python of a page, in one namespace, in the current folder, and what each of them printed.

    Raises:
        LookupError: CHANGED has a passage that the page does not.
    """
    names = {"__name__": "__main__"}
    exec(BEFORE.get(page, ""), names)
    changes = dict(CHANGED.get(page, ()))
    with contextlib.ExitStack() as stack:
        for manager in AROUND.get(page, list)():
            stack.enter_context(manager)
        for block in pages.blocks(page):
            if block.language != "python" or left_out(block) is not None:
                continue
            source = block.text
            for long in [long for long in changes if long in source]:
                source = source.replace(long, changes.pop(long))
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                # As many lines in front as the page has, so that a traceback names those of the page.
                exec(compile("\n" * (block.line - 1) + source, page, "exec"), names)
            yield block, OF_OTHERS.sub("", told.getvalue())
    if changes:
        raise LookupError(f"{page} has no {sorted(changes)}")


def output_of(block: pages.Block) -> pages.Block | None:
    """The block of text right below another, which shows what it prints."""
    after = next((other for other in pages.blocks(block.page) if other.line > block.line), None)
    if after is None or after.language != "text":
        return None
    end = block.line + len(block.text.splitlines())  # the line that closes it
    between = (pages.ROOT / block.page).read_text(encoding="utf-8").splitlines()[end : after.line - 2]
    return None if any(line.strip() for line in between) else after


def write(page: str) -> None:
    """What blocks print into the page."""
    path = pages.ROOT / page
    lines = path.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            found = [(output_of(block), told) for block, told in printed(page)]
        finally:
            os.chdir(here)
    for shown, told in reversed(found):
        if shown is not None:
            first = shown.line - 1
            lines[first : first + len(shown.text.splitlines())] = told.rstrip("\n").splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
