"""Matching of rates by other divergences than the generalised KL of `dam.matching_loss`, of your own among them."""

from dam.divergences.definition import Divergence, define
from dam.divergences.matching import rate_matching_loss

__all__ = ["Divergence", "define", "rate_matching_loss"]
