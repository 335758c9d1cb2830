"""Learners that use outcomes and their rewards again: a reward is asked for once, when an outcome is drawn.

What is kept are outcomes as they were drawn, each as often, with their rewards: not a table of rewards by state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from dam.adjoint import MatchingTargets, group_targets, path_targets
from dam.rollout import Trajectories, path_of
from experiments.densities import Density
from experiments.learners import Learner, Model, Round


@dataclasses.dataclass
class Replay(Learner):
    """`posterior` at re-masked outcomes that are kept, then the log variance of whole paths, whose noise vanishes.

    Until `late`, each of the steps re-masks `states` outcomes, drawn from those kept in proportion to their weights
    toward p*. Weights are p* / p_u of the path by the model that drew it, normalised over its round; a round counts by
    the effective sample size of its weights, as estimates are joined in inverse proportion to their variance.

    From then on

        1/2 Var over paths of  r(x) - log p_u(x | order),      of which the gradient is -E[(l - E[l]) grad log p_u],

    l being what the variance is of: `path_targets` with these weights. It is 0 at p* and there alone, whatever law the
    paths are drawn from, if that has them all, and so is each path's share of the gradient: no noise is left. The paths
    are those of the round, whose log p_u is known from the rollout, and kept outcomes in orders drawn anew, for L
    network calls each and no reward call.

    Args:
        late: share of the run after which the variance takes over, in [0, 1].
        kept: outcomes.
        states: of a step at re-masked outcomes.
        paths: of a step on the variance.
        again: kept outcomes of a round whose variance is taken in other orders, beside the round's own.

    Source: log variance, Richter et al., VarGrad, arXiv 2010.10436, for masked chains MDNS, arXiv 2508.10684, Sec. 3.1;
    weights of rounds: Elvira and Martino, Advances in importance sampling, arXiv 2102.05407, Sec. 4.
    """

    late: float = 0.5
    kept: int = 2**17
    states: int = 512
    paths: int = 128
    again: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.final = torch.zeros(0, self.density.length, dtype=torch.int64)
        self.reward, self.weight = (torch.zeros(0, dtype=torch.float64) for _ in range(2))

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)
        log_weight = reward + self.log_ratio(path).sum(dim=1)
        self._keep(path.final, reward, log_weight)
        length = self.density.length
        if progress < self.late:
            return Round(self._re_masked(model), self.batch, self.batch * length + self.steps * self.states)
        calls = (2 * self.batch + 2 * self.again) * length
        return Round(self._by_variance(model, path, log_weight), self.batch, calls)

    def _keep(self, final: Tensor, reward: Tensor, log_weight: Tensor) -> None:
        share = torch.softmax(log_weight, dim=0)
        ess = 1 / share.square().sum()
        self.final = torch.cat((self.final, final))[-self.kept :]
        self.reward = torch.cat((self.reward, reward))[-self.kept :]
        self.weight = torch.cat((self.weight, share * ess))[-self.kept :]

    def _re_masked(self, model: Model) -> Iterator[MatchingTargets]:
        for _ in range(self.steps):
            chosen = torch.multinomial(self.weight, self.states, True, generator=self.generator)
            final = self.final[chosen][None]
            blank = torch.full_like(final, self.density.tokens)
            states = model.process.remask(blank, final, self.generator, stratified=True)
            yield group_targets("posterior", states, final, torch.ones(final.shape[:2]), model.process)

    def _by_variance(self, model: Model, path: Trajectories, log_weight: Tensor) -> Iterator[MatchingTargets]:
        for rows in torch.randperm(self.batch, generator=self.generator).split(self.paths):
            yield variance_targets(path[rows], log_weight[rows])
        for at in range(0, self.again, self.paths):
            count = min(self.paths, self.again - at)
            chosen = torch.randint(len(self.final), (count,), generator=self.generator)
            other = in_any_order(self.final[chosen], self.density.tokens, self.generator)
            other.log_prob = model.path_log_prob(other)
            yield variance_targets(other, self.reward[chosen] + self.log_ratio(other).sum(dim=1))


def variance_targets(path: Trajectories, log_weight: Tensor) -> MatchingTargets:
    """Targets whose loss has the gradient of 1/(2 L) times the variance of the log weights, at the model that they
    are of.

    Args:
        path: B trajectories of L jumps.
        log_weight: float64 [B], log p* - log p_u of each up to a constant.
    """
    # The mean is of what it is taken from: the expectation is (B - 1) / B of the gradient.
    return path_targets(path, (log_weight - log_weight.mean())[None], every=True)


def in_any_order(final: Tensor, mask: int, generator: torch.Generator) -> Trajectories:
    """Paths to outcomes [B, L] from masks only, in orders drawn uniformly, without their log-probabilities."""
    order = torch.rand(final.shape, generator=generator).argsort(dim=1)
    call = torch.arange(final.shape[1]).expand_as(order)
    return path_of(torch.full_like(final[:1], mask), final[None], order[None], call[None])


def learner(name: str, density: Density, *, batch: int, steps: int, replicates: int, seed: int) -> Learner:
    """A learner by its name, one of LEARNERS; the arguments are those of `learners.learner`."""
    return Replay(density, batch=batch, steps=steps, replicates=replicates, seed=seed, **LEARNERS[name])


LEARNERS: dict[str, dict[str, float]] = {
    "posterior, then variance": {},
    "posterior, replay": {"late": 1.0},
    "variance": {"late": 0.0},
}
