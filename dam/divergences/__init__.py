"""Matching of rates by other divergences than the generalised KL of `dam.matching_loss`, of your own among them."""

from dam.divergences.definition import Divergence, define
from dam.divergences.matching import rate_matching_loss
from dam.divergences.texts import Range

__all__ = ["Divergence", "Range", "define", "rate_matching_loss"]
