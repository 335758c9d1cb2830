"""Continuous-time Markov chains: processes and their schedules."""

from dam.ctmc.masked import MaskedCTMC
from dam.ctmc.schedules import Cosine, Linear, Schedule

__all__ = ["Cosine", "Linear", "MaskedCTMC", "Schedule"]
