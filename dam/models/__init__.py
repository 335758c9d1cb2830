"""Models as the rest of the library sees them: hidden states and a head."""

from dam.models.denoiser import Denoiser, MaskedLM, Tabular, denoiser_of
from dam.ops._head import Head

__all__ = ["Denoiser", "Head", "MaskedLM", "Tabular", "denoiser_of"]
