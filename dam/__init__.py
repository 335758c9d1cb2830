"""Discrete Adjoint Matching as fused kernels: the public API, re-exported."""

from dam import generators
from dam.backends.choice import backend
from dam.ops._head import LoRA
from dam.ops.adjoint_weights import AdjointWeights, adjoint_weights
from dam.ops.backward_kolmogorov import backward_kolmogorov
from dam.ops.jump import Jump, jump
from dam.ops.linear_jump import linear_jump
from dam.ops.linear_log_prob import linear_log_prob
from dam.ops.linear_matching_loss import linear_matching_loss
from dam.ops.log_prob import log_prob
from dam.ops.matching_loss import matching_loss
from dam.ops.rate_ratio import RateRatio, rate_ratio
from dam.ops.tilt_to_ess import tilt_to_ess

__version__ = "0.1.0"

__all__ = [
    "AdjointWeights",
    "Jump",
    "LoRA",
    "RateRatio",
    "adjoint_weights",
    "backend",
    "backward_kolmogorov",
    "generators",
    "jump",
    "linear_jump",
    "linear_log_prob",
    "linear_matching_loss",
    "log_prob",
    "matching_loss",
    "rate_ratio",
    "tilt_to_ess",
]
