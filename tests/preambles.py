"""What stands before the blocks of a page when they are run: of names that a page takes for granted, small ones.

A page with nothing here is run as it stands. A block that cannot be run says so itself: "notest: why" behind its
language.
"""

import contextlib
from unittest import mock

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


@contextlib.contextmanager
def around(page):
    with contextlib.ExitStack() as stack:
        for manager in AROUND.get(page, list)():
            stack.enter_context(manager)
        yield
