"""Learners of other papers whose gradient is that of log-likelihoods, each weighed by what its outcome is worth.

Of the likelihood of a path: log-variance, trajectory balance. Of bounds on that of an outcome, or of an approximation:
DMPO, SPG, ESPO, d1. The temperature is 1 and the base uniform, so that what all of them are compared with is
p* proportional to exp(r). Losses are divided by the number of positions, as those of the library's estimators are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dam.adjoint import MatchingTargets, group_targets, path_targets
from experiments.interface import Learner, Model, Round, evaluated


@dataclasses.dataclass
class LogVariance(Learner):
    """LV of MDNS: the variance over paths of l = r + log p_base - log p_theta, its gradient

        -2 mean[(l - mean l) grad log p_theta(path)]

    whatever law the paths are of. At p* l is log Z on every path, so that nothing is left of the gradient, its noise
    included. Each step asks the model for log p_theta anew, at the states that its loss is at: paths are used for
    several steps as the authors' are from a buffer.

    Source: Zhu et al., MDNS, arXiv 2508.10684; Richter et al., VarGrad, arXiv 2010.10436.
    """

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)

        def steps() -> Iterator[MatchingTargets]:
            for step in range(self.steps):
                seen = dataclasses.replace(path, log_prob=model.path_log_prob(path)) if step else path
                log_weight = reward + self.log_ratio(seen).sum(dim=1)
                yield path_targets(path, self.centered(log_weight)[None], every=True)

        return Round(steps(), self.batch, evaluated(path) * (1 + self.steps))

    def centered(self, log_weight: Tensor) -> Tensor:
        """l less what it is to be on every path, [B]."""
        return log_weight - log_weight.mean()


@dataclasses.dataclass
class TrajectoryBalance(LogVariance):
    """Trajectory balance: (log Z + log p_theta(path) - log p_base(path) - r)^2, log Z learned beside the model.

    The same as the log-variance but for log Z, which lags behind the mean of l. The backward policy is the base's
    order of masking, uniform. Z learns faster than the network, as the authors let it.

    Args:
        rate: share of the way to the mean of l that log Z goes in a step.

    Source: Malkin et al., Trajectory balance, arXiv 2201.13259, Eq. 14.
    """

    rate: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log_z = 0.0

    def centered(self, log_weight: Tensor) -> Tensor:
        residual = log_weight - self.log_z
        self.log_z += self.rate * float(residual.mean())
        return residual


@dataclasses.dataclass
class DistributionMatching(Learner):
    """DMPO: the weighted denoising cross-entropy with centred weights, each outcome re-masked four times, in two pairs
    whose masks complete each other.

        sum_k (w_k - c_k) (1 / m) sum_i -log p_theta(x_i | i, state),    w = softmax_k(log p_base - log p_u + r)

    "mean": c_k = 1 / K, whose fixed point is p*. "negative": c = softmax_k(log p_base - log p_u - r), the default of
    the authors' code. Then the gradient is that of E_p*[ELBO] - E_p-[ELBO] with p- proportional to p_base exp(-r), not
    0 at p* but at no law at all: outcomes that are likelier under p- than under p* are pushed to probability 0.

    Source: Zhu et al., Distribution Matching Policy Optimization, arXiv 2510.08233, and the code they publish with it.
    """

    centering: str = "negative"
    masks: int = 4

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward, log_ratio = self.density.log_density(path.final), self.log_ratio(path).sum(dim=1)
        centre = torch.full_like(reward, 1 / self.batch)
        if self.centering == "negative":
            centre = torch.softmax(log_ratio - reward, dim=0)
        weight = self.batch * (torch.softmax(log_ratio + reward, dim=0) - centre)
        final = path.final[:, None].expand(-1, self.masks, -1)
        # Of every L + 1 pairs' states one has no masks, and no part in the loss.
        weight = weight[:, None].expand(-1, self.masks) * (1 + 1 / self.density.length)
        steps = []
        for _ in range(self.steps):
            blank = torch.full_like(final, self.density.tokens)
            states = model.process.remask(blank, final, self.generator, antithetic=True)
            steps.append(group_targets("posterior", states, final, weight, model.process))
        return self.done(steps, self.batch, path)


class Remasked(NamedTuple):
    """Outcomes re-masked M times each, and how much of its ELBO each masked position is.

    ELBO(x) / L is the mean over M of sum_i share log p(x_i | i, state), in expectation.
    """

    final: Tensor  # int64 [B, M, L]
    states: Tensor  # int64 [B, M, L]
    masked: Tensor  # bool [B, M, L]
    share: Tensor  # float64 [B, M, L], 0 where nothing is masked

    @staticmethod
    def of(learner: Learner, model: Model, final: Tensor, masks: int, *, antithetic: bool) -> Remasked:
        """Drawn by the learner's generator; in pairs whose masks complete each other if antithetic."""
        final = final[:, None].expand(-1, masks, -1).contiguous()
        blank = torch.full_like(final, model.tokens)
        states = model.process.remask(blank, final, learner.generator, antithetic=antithetic)
        masked = model.process.masked(states)
        share = masked.double() / masked.sum(dim=2, keepdim=True).clamp(min=1)
        # Antithetic states have 0 to L masks, the others 1 to L.
        return Remasked(final, states, masked, share * (1 + 1 / model.length) if antithetic else share)

    def log_prob(self, model: Model) -> Tensor:
        """log p(x_i | i, state) of the model, float64 [B, M, L], 0 where nothing is masked."""
        found = model.log_prob(self.states.flatten(0, 1)).double().view(*self.states.shape, -1)
        return torch.where(self.masked, found.gather(3, self.final[..., None])[..., 0], 0.0)

    def bound(self, log_prob: Tensor) -> Tensor:
        """The estimate of ELBO / L, [B]."""
        return (self.share * log_prob).sum(dim=2).mean(dim=1)

    def targets(self, weight: Tensor) -> MatchingTargets:
        """Of weights [B, M, L] whose sum is that of each outcome, in a mean over outcomes."""
        states, masked = self.states.flatten(0, 1), self.masked.flatten(0, 1)
        row, position = masked.nonzero(as_tuple=True)
        asked = self.states.shape[1] * weight.flatten(0, 1)[row, position]
        target = self.final.flatten(0, 1)[row, position]
        return MatchingTargets(
            states, torch.zeros(len(states), dtype=torch.int64), row, position, target[:, None], asked[:, None]
        )


@dataclasses.dataclass
class SandwichedPolicyGradient(Learner):
    """SPG: advantages A = r - mean r of a group, of a lower bound of the log-likelihood where A is positive and of a
    mixture with an upper one where it is not,

        ELBO = E[(L / m) sum_i log p(x_i | i, state)],     EUBO = (1 / b) sum_i log E[(L / m) 1_i p(x_i | i, state)^b]

    1_i: position i is masked. Estimated from M = 2 states of each outcome, each bound divided by how many positions it
    is of. As published there is no KL to the base, so that its fixed point is not p*: the more it trains, the more of
    the law is the outcome of largest reward. "SPG, KL" has it in the reward, r + log p_base - log p_u of the path that
    was drawn: then A is 0 at p* for every outcome. Masks are over the whole outcome, not a block of it.

    Args:
        masks, power, mixture: M, b and the share of the upper bound, as in its mathematical tasks.
        kl: with the KL in the reward.

    Source: Wang et al., SPG, arXiv 2510.09541, and the code they publish with it.
    """

    masks: int = 2
    power: float = 1.5
    mixture: float = 0.5
    kl: bool = False

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)
        if self.kl:
            reward = reward + self.log_ratio(path).sum(dim=1)
        advantage = reward - reward.mean()

        def steps() -> Iterator[MatchingTargets]:
            for _ in range(self.steps):
                remasked = Remasked.of(self, model, path.final, self.masks, antithetic=False)
                yield remasked.targets(advantage[:, None, None] * self.gradient(remasked, model, advantage < 0))

        # The loss is at the states that the upper bound's shares are of.
        return Round(steps(), self.batch, evaluated(path) + self.steps * self.batch * self.masks)

    def gradient(self, remasked: Remasked, model: Model, negative: Tensor) -> Tensor:
        """What each log p(x_i | i, state) counts for in the bound of its outcome, [B, M, L]."""
        lower = remasked.share / self.masks
        count = remasked.masked.double().sum(dim=2, keepdim=True)
        score = self.power * remasked.log_prob(model) - count.clamp(min=1).log()
        among = torch.softmax(torch.where(remasked.masked, score, -torch.inf), dim=1)
        seen = remasked.masked.any(dim=1, keepdim=True)
        upper = torch.where(seen, among, 0.0) / seen.sum(dim=2, keepdim=True)
        return torch.where(negative[:, None, None], self.mixture * upper + (1 - self.mixture) * lower, lower)


@dataclasses.dataclass
class SequencePolicy(Learner):
    """ESPO: the ratio of an outcome's likelihoods by their ELBOs, clipped, and the k2 estimate of the KL to the base,

        min(s A, clip(s) A) - (ELBO - ELBO_base)^2 / 2 L,    s = exp((ELBO - ELBO_old) / L),    A = r - mean r

    of M = 2 states whose masks complete each other, the same for all ELBOs of a step. The gradient of k2 on samples of
    the model is that of the KL, so that p* would be the fixed point; but the estimates of the ELBO and of its gradient
    are of the same states, and their covariance, of order 1 / M, leads away from it. A is not divided by its deviation,
    which would be another temperature.

    Source: Ou et al., ESPO, arXiv 2512.03759, and the code they publish with it.
    """

    masks: int = 2
    clip: float = 0.2

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)
        advantage = reward - reward.mean()
        drawn = [Remasked.of(self, model, path.final, self.masks, antithetic=True) for _ in range(self.steps)]
        old = [remasked.bound(remasked.log_prob(model)) for remasked in drawn]

        def steps() -> Iterator[MatchingTargets]:
            for remasked, before in zip(drawn, old, strict=True):
                bound = remasked.bound(remasked.log_prob(model))
                base = -math.log(self.density.tokens) * remasked.share.sum(dim=2).mean(dim=1)
                ratio = (bound - before).exp()
                clipped = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
                asked = torch.where(clipped, 0.0, ratio * advantage) - self.density.length * (bound - base)
                yield remasked.targets(asked[:, None, None] * remasked.share / self.masks)

        # The model that drew and the one that learns are the same at the first step.
        calls = self.batch * self.masks * (2 * self.steps - 1)
        return Round(steps(), self.batch, evaluated(path) + calls)


@dataclasses.dataclass
class DiffuGRPO(Learner):
    """diffu-GRPO of d1: advantages r - mean(r) of a group, and the mean-field likelihood of one network call that sees
    masks only, with the k3 estimate of KL to the base. One step on each batch, so that no ratio is clipped. Its fixed
    point is not p*: the likelihood is that of independent tokens, and the gradient of k3 that of KL(base || model).

    Source: Zhao et al., d1, arXiv 2504.12216, Sec. 3.2 and Alg. 1.
    """

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)
        log_prob = model.log_prob(model.blank(1))[0].double()  # [L, V]
        position = torch.arange(self.density.length).repeat(self.batch)
        token = path.final.flatten()
        toward_base = torch.exp(-math.log(self.density.tokens) - log_prob[position, token]) - 1
        weight = (reward - reward.mean()).repeat_interleave(self.density.length) + toward_base
        row = torch.arange(self.batch).repeat_interleave(self.density.length)
        group = torch.zeros(self.batch, dtype=torch.int64)
        weight = weight / self.density.length
        targets = MatchingTargets(path.initial, group, row, position, token[:, None], weight[:, None])
        return self.done([targets], self.batch, path)


LEARNERS: dict[str, tuple[type[Learner], dict[str, object]]] = {
    "log-variance": (LogVariance, {}),
    "trajectory balance": (TrajectoryBalance, {}),
    "DMPO, mean": (DistributionMatching, {"centering": "mean"}),
    "DMPO": (DistributionMatching, {}),
    "SPG, KL": (SandwichedPolicyGradient, {"kl": True}),
    "SPG": (SandwichedPolicyGradient, {}),
    "ESPO": (SequencePolicy, {}),
    "d1": (DiffuGRPO, {}),
}
# Those whose gradient is not 0 at p*.
ELSEWHERE = ("DMPO", "SPG", "ESPO", "d1")
