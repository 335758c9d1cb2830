"""Models as the rest of the library sees them: hidden states and a head, and what their family's law is."""

from dam.models.a2d import A2D
from dam.models.attention import Blocks
from dam.models.canvas import CanvasDenoiser
from dam.models.denoiser import Denoiser, MaskedLM, Tabular, blocks_of
from dam.models.diffusion_gemma import DiffusionGemma
from dam.models.dream import Dream
from dam.models.families import as_denoiser, register
from dam.models.llada import LLaDA
from dam.models.llada2 import LLaDA2
from dam.models.roberta import PreNormRoberta
from dam.models.sdar import SDAR
from dam.ops._head import Head

__all__ = [
    "A2D",
    "SDAR",
    "Blocks",
    "CanvasDenoiser",
    "Denoiser",
    "DiffusionGemma",
    "Dream",
    "Head",
    "LLaDA",
    "LLaDA2",
    "MaskedLM",
    "PreNormRoberta",
    "Tabular",
    "as_denoiser",
    "blocks_of",
    "register",
]
