"""Continuous-time Markov chains: processes, their schedules, simulation, and exact laws by enumeration."""

from dam.ctmc import enumeration, matching, moves, schedules
from dam.ctmc.masked import MaskedCTMC
from dam.ctmc.moves import Moves, MovesCTMC
from dam.ctmc.noised import LatticeCTMC, NoisedCTMC, UniformCTMC
from dam.ctmc.schedules import Cosine, Geometric, Linear, Schedule, UserSchedule
from dam.ctmc.simulate import Jumps, Path, Process, ProcessOfJumps, gillespie, simulate, tau_leap

__all__ = [
    "Cosine",
    "Geometric",
    "Jumps",
    "LatticeCTMC",
    "Linear",
    "MaskedCTMC",
    "Moves",
    "MovesCTMC",
    "NoisedCTMC",
    "Path",
    "Process",
    "ProcessOfJumps",
    "Schedule",
    "UniformCTMC",
    "UserSchedule",
    "enumeration",
    "gillespie",
    "matching",
    "moves",
    "schedules",
    "simulate",
    "tau_leap",
]
