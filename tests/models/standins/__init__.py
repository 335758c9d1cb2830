"""Small models with the interface of published ones whose code is not in transformers.

Written anew from what that code does with its arguments: names of modules, arguments and their shapes, what becomes of
a mask, where logits come from, and the loop that generates. Each file names where that was read.
"""

from tests.models.standins.a2d import A2DLMHeadModel
from tests.models.standins.dream import DreamModel
from tests.models.standins.llada import LLaDAModelLM
from tests.models.standins.llada2 import LLaDA2MoeModelLM
from tests.models.standins.lladamoe import LLaDAMoEModelLM
from tests.models.standins.sdar import SDARForCausalLM

__all__ = [
    "A2DLMHeadModel",
    "DreamModel",
    "LLaDA2MoeModelLM",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "SDARForCausalLM",
]
