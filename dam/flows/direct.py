"""Direct gradients of a cost, by backpropagation through the sampler: the baselines DRaFT and ReFL.

They go after the cost alone: nothing keeps a model near its base but an early end, and what it draws loses diversity.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dam.flows.adjoint import Cost, costs
from dam.flows.processes import FlowProcess, Model, predicted
from dam.flows.simulate import Path
from dam.ops._op import untraced


@untraced
def draft_loss(path: Path, model: Model, cost: Cost, *, last: int | None = None, recompute: bool = True) -> Tensor:
    """The mean of g(X_1) over the rows of a path, differentiable through its last K steps: DRaFT-K.

    The last steps are taken again with the same noise, now with a graph. In front of them no gradient goes.

    Args:
        path: of `dam.flows.simulate`, drawn by this model.
        model: that is trained.
        cost: g = -r, of states [B, ...], [B].
        last: K; all unless given, DRaFT itself.
        recompute: whether activations of a step are computed again on the way back instead of kept.

    Raises:
        ValueError: the path has not as many steps, or the cost another shape than [B].

    Source: Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400.
    """
    count = len(path.steps)
    last = count if last is None else last
    if not 1 <= last <= count:
        raise ValueError(f"draft_loss: last must be in 1 .. {count}, the steps of the path; got {last}")
    state, steps = path.state(count - last).detach(), range(count - last, count)
    for k, noise in zip(steps, path.steps.noises(state, steps), strict=True):
        if recompute:
            state = checkpoint(path.steps.step, model, k, state, noise, use_reentrant=False)
        else:
            state = path.steps.step(model, k, state, noise)
    return costs(cost, state).mean()


def refl_loss(process: FlowProcess, model: Model, state: Tensor, time: Tensor, cost: Cost) -> Tensor:
    """The mean of g at the one-step outcome E[X_1 | X_t] that the model predicts, differentiable in it: ReFL.

    Args:
        process: says what the predictions mean.
        model: that is trained.
        state: X_t, [B, ...], of paths of the model, as `path.state(k)`; no gradient goes through it.
        time: float64 [B] or [], late ones: early on E[X_1 | X_t] is no outcome.
        cost: g = -r, of states [B, ...], [B].

    Source: Xu et al., ImageReward, arXiv 2304.05977, Alg. 1.
    """
    state = state.detach()
    return costs(cost, process.data(predicted(model, state, time), state, time)).mean()
