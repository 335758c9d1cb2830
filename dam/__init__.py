"""Discrete Adjoint Matching as fused kernels: the public API, re-exported."""

import importlib
from typing import TYPE_CHECKING, Any

from dam import generators
from dam.backends.choice import backend
from dam.backends.deferral import deferred_checks
from dam.ops._head import LoRA
from dam.ops._memory import release_workspace
from dam.ops.adjoint_weights import AdjointWeights, adjoint_weights
from dam.ops.backward_kolmogorov import backward_kolmogorov
from dam.ops.entropy import entropy
from dam.ops.jump import Jump, jump
from dam.ops.linear_jump import linear_jump
from dam.ops.linear_log_prob import linear_log_prob
from dam.ops.linear_matching_loss import linear_matching_loss
from dam.ops.log_prob import LogProb, log_prob
from dam.ops.matching_loss import matching_loss
from dam.ops.rate_ratio import RateRatio, rate_ratio
from dam.ops.tilt_to_ess import tilt_to_ess

if TYPE_CHECKING:
    from dam import adjoint as adjoint
    from dam import canvas as canvas
    from dam import ctmc as ctmc
    from dam import decoding as decoding
    from dam import derive as derive
    from dam import diagnostics as diagnostics
    from dam import divergences as divergences
    from dam import engines as engines
    from dam import flows as flows
    from dam import lm_eval as lm_eval
    from dam import models as models
    from dam import plots as plots
    from dam import rates as rates
    from dam import recipes as recipes
    from dam import rollout as rollout
    from dam import tasks as tasks
    from dam import train as train
    from dam import workers as workers

__version__ = "0.1.0"

# Loaded when they are first asked for: what they need, an extra of some, `import dam` does not.
_SUBMODULES = (
    "adjoint",
    "canvas",
    "ctmc",
    "decoding",
    "derive",
    "diagnostics",
    "divergences",
    "engines",
    "flows",
    "lm_eval",
    "models",
    "plots",
    "rates",
    "recipes",
    "rollout",
    "tasks",
    "train",
    "workers",
)

__all__ = [
    "AdjointWeights",
    "Jump",
    "LoRA",
    "LogProb",
    "RateRatio",
    "adjoint_weights",
    "backend",
    "backward_kolmogorov",
    "deferred_checks",
    "entropy",
    "generators",
    "jump",
    "linear_jump",
    "linear_log_prob",
    "linear_matching_loss",
    "log_prob",
    "matching_loss",
    "rate_ratio",
    "release_workspace",
    "tilt_to_ess",
]


def __getattr__(name: str) -> Any:
    """A submodule.

    Raises:
        ImportError: it needs an extra that is not installed; the message names it.
    """
    if name in _SUBMODULES:
        return importlib.import_module(f"dam.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
