"""Models as the rest of the library sees them: hidden states and a head."""

from dam.models.denoiser import Denoiser, Head, MaskedLM, Tabular

__all__ = ["Denoiser", "Head", "MaskedLM", "Tabular"]
