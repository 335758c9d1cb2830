"""Learners that use outcomes and their rewards again: a reward is asked for once, when an outcome is drawn.

What is kept are outcomes as they were drawn, each as often, with their rewards: not a table of rewards by state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dam.adjoint import MatchingTargets, group_targets, path_targets
from dam.rollout import Trajectories
from experiments.densities import Density
from experiments.learners import Learner, Model, Round


@dataclasses.dataclass
class Replay(Learner):
    """`posterior` at re-masked outcomes that are kept, then the log variance of whole paths, whose noise vanishes.

    Until `late`, each of the steps re-masks outcomes that are drawn from those kept in proportion to their weights
    toward p*. Weights are p* / p_u of the path by the model that drew it, normalised over its round; a round counts by
    the effective sample size of its weights, as estimates are joined in inverse proportion to their variance.

    From then on

        1/2 Var over paths of  log p_base(x) + r(x) - log p_u(x | order),      of which the gradient is
        -E[(l - E[l]) grad log p_u],

    l being what the variance is of: `path_targets` with these weights. It is 0 at p* and there alone, whatever law the
    paths are drawn from, if that has them all, and so is each path's share of the gradient: no noise is left. The paths
    are those of the round, and l is of the model as it is at the step: by the l that they were drawn with, the steps
    after the first would push on when what they are to reach is reached, and a model of a Potts lattice diverged.

    With `ess` the reward is a r in all of this, and p* is p_a, proportional to p_base exp(a r). In each round a goes as
    far toward 1 as leaves its paths that effective sample size, and never back: a ladder of temperatures without a
    schedule, whose outcomes are weighed anew at every rung.

    Args:
        late: share of the run after which the variance takes over, in [0, 1].
        kept: rounds.
        positions: that a step at re-masked outcomes reads, in expectation; one on the variance has half as many jumps.
        bound: of how far from the mean of its step a path's l counts, as in Huber's loss.
        ess: share of a round's paths; 0 is a = 1 from the start.

    Source: log variance, Richter et al., VarGrad, arXiv 2010.10436, for masked chains MDNS, arXiv 2508.10684, Sec. 3.1;
    weights of rounds: Elvira and Martino, Advances in importance sampling, arXiv 2102.05407, Sec. 4; temperatures by
    ESS: Del Moral et al., Sequential Monte Carlo samplers, 2006, and Jasra et al., Inference for Levy-driven stochastic
    volatility models via adaptive sequential Monte Carlo, 2011.
    """

    late: float = 0.6
    kept: int = 128
    positions: int = 2048
    bound: float = 1.0
    ess: float = 0.0
    tilt: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tilt = 0.0 if self.ess else 1.0
        self.final = torch.zeros(0, self.batch, self.density.length, dtype=torch.int16)
        self.reward, self.log_ratios = (torch.zeros(0, self.batch, dtype=torch.float64) for _ in range(2))

    @property
    def states(self) -> int:
        """Of a step at re-masked outcomes, half of whose positions are masked."""
        return max(1, 2 * self.positions // (self.density.length + 1))

    @property
    def paths(self) -> int:
        """Of a step on the variance."""
        return max(2, self.positions // (2 * self.density.length))

    def log_base(self, final: Tensor) -> Tensor:
        """log p_base of outcomes, float64 [B], up to a constant: here all are equally likely."""
        return torch.zeros(len(final), dtype=torch.float64)

    def gain(self, final: Tensor) -> Tensor:
        """r of outcomes, float64 [B]: a reward call each."""
        return self.density.log_density(final)

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        log_base, reward = self.log_base(path.final), self.gain(path.final)
        log_ratio = log_base - path.log_prob.double().sum(dim=1)
        self._keep(path.final, reward, log_ratio)
        if self.ess:
            self.tilt = furthest_tilt(log_ratio, reward, self.ess * self.batch, self.tilt)
        length = self.density.length
        if progress < self.late:
            return Round(self._re_masked(model), self.batch, self.batch * length + self.steps * self.states)
        # In the rollout, for the weights of a step, and in its loss.
        calls = 3 * self.batch * length
        return Round(self._by_variance(model, path, log_base + self.tilt * reward), self.batch, calls)

    def _keep(self, *values: Tensor) -> None:
        for name, value in zip(("final", "reward", "log_ratios"), values, strict=True):
            before = getattr(self, name)
            setattr(self, name, torch.cat((before, value[None].to(before.dtype)))[-self.kept :])

    def weights(self) -> Tensor:
        """Of kept outcomes toward p_a, [rounds, batch]."""
        share = torch.softmax(self.log_ratios + self.tilt * self.reward, dim=1)
        return share / share.square().sum(dim=1, keepdim=True)

    def _re_masked(self, model: Model) -> Iterator[MatchingTargets]:
        weight, outcomes = self.weights().flatten(), self.final.flatten(0, 1)
        for _ in range(self.steps):
            chosen = torch.multinomial(weight, self.states, True, generator=self.generator)
            final = outcomes[chosen][None].long()
            blank = torch.full_like(final, self.density.tokens)
            states = model.process.remask(blank, final, self.generator, stratified=True)
            yield group_targets("posterior", states, final, torch.ones(final.shape[:2]), model.process)

    def _by_variance(self, model: Model, path: Trajectories, log_law: Tensor) -> Iterator[MatchingTargets]:
        for rows in torch.randperm(self.batch, generator=self.generator).split(self.paths):
            yield variance_targets(model, path[rows], log_law[rows], self.bound)


def furthest_tilt(log_ratio: Tensor, reward: Tensor, ess: float, tilt: float) -> float:
    """The largest a in [tilt, 1], by bisection, at which weights exp(log_ratio + a reward), [B] each, have an effective
    sample size of at least ess; `tilt` where they have it at none.
    """

    def keeps(a: float) -> bool:
        return float(1 / torch.softmax(log_ratio + a * reward, dim=0).square().sum()) >= ess

    if keeps(1.0):
        return 1.0
    low, high = tilt, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def variance_targets(model: Model, path: Trajectories, log_weight: Tensor, bound: float = math.inf) -> MatchingTargets:
    """Targets whose loss has the gradient of 1/(2 L) times the variance of log_weight - log p_u over paths.

    Args:
        model: whose p_u it is, as it is now: not the one that drew the paths, or not any more.
        path: B trajectories of L jumps.
        log_weight: float64 [B], log of what p_u is to be proportional to.
        bound: of how far from the mean a path counts.
    """
    targets = path_targets(path, torch.ones(1, len(log_weight), dtype=torch.float64), every=True)
    of = (path.call >= 0).nonzero()[:, 0]
    with torch.no_grad():
        jumps = model.target_log_prob(targets).double()
    off = log_weight - torch.zeros_like(log_weight).index_add_(0, of, jumps)
    # The mean is of what it is taken from: the expectation is (B - 1) / B of the gradient.
    weight = (off - off.mean()).clamp(-bound, bound)
    return targets._replace(weight=targets.weight * weight[of, None])


def learner(name: str, density: Density, *, batch: int, steps: int, replicates: int, seed: int) -> Learner:
    """A learner by its name, one of LEARNERS; the arguments are those of `learners.learner`."""
    return Replay(density, batch=batch, steps=steps, replicates=replicates, seed=seed, **LEARNERS[name])


LEARNERS: dict[str, dict[str, Any]] = {
    "posterior, then variance": {},
    "posterior, replay": {"late": 1.0},
    "variance": {"late": 0.0},
    "tilted posterior, then variance": {"ess": 0.25},
}
