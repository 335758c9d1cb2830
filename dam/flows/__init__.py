"""Flows and diffusions: processes, their simulation, lean adjoints along paths, and Adjoint Matching."""

from dam.flows import matching
from dam.flows.adjoint import Adjoint, backwards, cost_gradient, lean_adjoint
from dam.flows.direct import draft_loss, refl_loss
from dam.flows.matching import Targets, adjoint_targets
from dam.flows.mixtures import GaussianMixture
from dam.flows.processes import AnnealedLangevin, FlowProcess, Process
from dam.flows.schedules import Linear, Schedule, Trigonometric, VarianceExploding, VariancePreserving
from dam.flows.simulate import Path, Steps, simulate

__all__ = [
    "Adjoint",
    "AnnealedLangevin",
    "FlowProcess",
    "GaussianMixture",
    "Linear",
    "Path",
    "Process",
    "Schedule",
    "Steps",
    "Targets",
    "Trigonometric",
    "VarianceExploding",
    "VariancePreserving",
    "adjoint_targets",
    "backwards",
    "cost_gradient",
    "draft_loss",
    "lean_adjoint",
    "matching",
    "refl_loss",
    "simulate",
]
