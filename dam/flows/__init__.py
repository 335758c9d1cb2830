"""Flows and diffusions: processes, their simulation, lean adjoints along paths, Adjoint Matching and VGG-Flow."""

from dam.flows import matching
from dam.flows.adjoint import Adjoint, backwards, cost_gradient, lean_adjoint
from dam.flows.direct import draft_loss, refl_loss
from dam.flows.matching import Targets, adjoint_targets
from dam.flows.mixtures import GaussianMixture
from dam.flows.processes import AnnealedLangevin, FlowProcess, Process
from dam.flows.schedules import Linear, Schedule, Trigonometric, VarianceExploding, VariancePreserving
from dam.flows.simulate import Path, Steps, simulate
from dam.flows.values import (
    boundary_loss,
    consistency_loss,
    forward_looking,
    gradient_of,
    pontryagin_targets,
    value_targets,
)

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
    "boundary_loss",
    "consistency_loss",
    "cost_gradient",
    "draft_loss",
    "forward_looking",
    "gradient_of",
    "lean_adjoint",
    "matching",
    "pontryagin_targets",
    "refl_loss",
    "simulate",
    "value_targets",
]
