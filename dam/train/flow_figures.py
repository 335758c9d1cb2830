"""How far a flow has gone from its base, and how large its adjoints are: figures for a log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dam.flows.matching import Targets
from dam.flows.processes import Model, Process, predicted
from dam.flows.simulate import Path


@torch.no_grad()
def path_figures(
    process: Process,
    model: Model,
    base: Model,
    path: Path,
    at: Sequence[int],
    targets: Targets | None = None,
) -> dict[str, Tensor]:
    """Figures of B paths, at some times that stand for all: a call of model and base for each.

    Args:
        process: of the paths.
        model, base: u = gain / sigma (model - base); of an ODE with 1 for sigma.
        path: of the model.
        at: numbers of times, drawn uniformly of 0 .. K - 1.
        targets: of `dam.flows.adjoint_targets` or `pontryagin_targets` on the same paths, made at these times.

    Returns:
        Float64 [B] each: an estimate of 1/2 integral |u_t|^2 dt, as kl_path, since its mean over paths is KL(paths of
        the model || of the base), or of an ODE as control_energy; of targets adjoint_norm, the mean of |a_t|.
    """
    gain, sigma = (f(path.times[:-1]).tolist() for f in (process.gain, process.diffusion))
    name = "kl_path" if any(sigma) else "control_energy"
    sigma = [each or 1.0 for each in sigma]
    energy = torch.zeros(len(path.final), dtype=torch.float64, device=path.final.device)
    norm = torch.zeros_like(energy)
    for k in at:
        state = path.state(k)
        of_base = predicted(base, state, path.times[k])
        apart = (predicted(model, state, path.times[k]) - of_base).double().flatten(1).square().sum(dim=1)
        share = path.steps.length[k] * len(path.steps) / len(at)
        energy += share * (gain[k] / sigma[k]) ** 2 * apart / 2
        if targets is not None:
            moved = (of_base - targets.prediction[targets.time == float(path.times[k])]).double()
            norm += (abs(gain[k]) / sigma[k] ** 2) * moved.flatten(1).norm(dim=1) / len(at)
    return {name: energy} if targets is None else {name: energy, "adjoint_norm": norm}
