"""The learners of this study, which tilt in steps that an effective sample size allows, and their null control."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from dam.adjoint import MatchingTargets, group_targets, tilted_weights
from dam.rollout import Trajectories
from experiments import learners
from experiments.exact.task import Task
from experiments.interface import evaluated
from experiments.replay import in_any_order, variance_targets

KEPT, STEPPED, NULL = "outcomes kept, steps by ESS", "posterior, steps by ESS", "null control"
# Of the learners that there are those that ask the density alone what p* is, whatever the base.
OTHERS = ("posterior", "weighted denoising", learners.PUBLISHED)
LEARNERS = (KEPT, STEPPED, *OTHERS, NULL)
DEFAULT = (KEPT, STEPPED, learners.PUBLISHED, NULL)


@dataclasses.dataclass
class Stepped(learners.Learner):
    """The posterior at re-masked outcomes, each round tilted from the model toward p* as far as its weights keep an
    effective sample size, as `dam.train.DAMTrainer` does with `target_ess`.

    Args:
        ess: what is kept, as a share of the batch. The base is one joint law, so p* is the fixed point all the same.
        draw: of how many outcomes a step is made at most; they are drawn by their weights where the batch is larger.
        null: permute the weights among the trajectories, so that they say nothing of the outcomes.
    """

    ess: float = 0.25
    draw: int = 128
    null: bool = False

    def round(self, model: learners.Model, n: int, progress: float) -> learners.Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)[None]
        weights, _ = tilted_weights(self.log_ratio(path)[None], reward, beta=1.0, ess=self.ess * self.batch)
        weight = weights.weight
        if self.null:
            weight = weight[:, torch.randperm(self.batch, generator=self.generator)]
        final, blank = path.final[None], path.initial[None]
        draw = self.draw if self.draw < self.batch else None
        steps = []
        for _ in range(self.steps):
            states = model.process.remask(blank, final, self.generator, stratified=True)
            steps.append(
                group_targets("posterior", states, final, weight, model.process, draw=draw, generator=self.generator)
            )
        return self.done(steps, self.batch, path)


@dataclasses.dataclass
class Kept(learners.Learner):
    """The posterior at re-masked outcomes of all rounds so far, then the log variance of whole paths, toward laws that
    go from the base's to p*:

        p_a(x) proportional to p_base(x) exp(a r(x) / beta),      a from 0 to 1.

    The tilt a rises as far as the weights of a round's paths toward p_a keep an effective sample size, and no slower
    than to be 1 when the variance takes over. A reward is asked for once; what is kept with an outcome is enough to
    weigh it toward any p_a. Weights are normalised over the round, which counts by their effective sample size less
    the one that any weights have: rounds of models that p_a has left behind fade by themselves.

    Args:
        ess: what the tilt leaves of a round, as a share of the batch.
        late: share of the run after which the variance takes over, in (0, 1].
        states: outcomes of a step, drawn by their weights.
        paths: of a step on the variance.
        again: kept outcomes, drawn by their weights, whose variance a round takes in orders drawn anew, beside that of
            its own paths. These know only what the model still draws.

    Source: as `experiments.replay.Replay`; laws in between: Neal, Annealed importance sampling, Statistics and
    Computing 11 (2001).
    """

    density: Task
    ess: float = 0.25
    late: float = 0.5
    states: int = 256
    paths: int = 32
    again: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tilt = 0.0
        self.final = torch.zeros(0, self.density.length, dtype=torch.int64)
        # Of the outcomes of each round [rounds, B]: log p_base, that less log p_u of the path, and r / beta.
        self.log_base, self.log_ratios, self.gain = (torch.zeros(0, self.batch, dtype=torch.float64) for _ in range(3))

    def round(self, model: learners.Model, n: int, progress: float) -> learners.Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        log_base, gain = self.density.log_base(path.final), self.density.reward(path.final) / self.density.beta
        log_ratio = log_base - path.log_prob.double().sum(dim=1)
        self.final = torch.cat((self.final, path.final))
        self.log_base, self.log_ratios, self.gain = (
            torch.cat((kept, new[None]))
            for kept, new in ((self.log_base, log_base), (self.log_ratios, log_ratio), (self.gain, gain))
        )
        self.tilt = max(self.allowed(log_ratio, gain), min(1.0, progress / self.late))
        calls, length = evaluated(path), self.density.length
        if progress < self.late:
            return learners.Round(self._re_masked(model), self.batch, calls + self.steps * self.states)
        calls += (self.batch + 2 * self.again) * length
        return learners.Round(self._by_variance(model, path, log_ratio + self.tilt * gain), self.batch, calls)

    def allowed(self, log_ratio: Tensor, gain: Tensor) -> float:
        """The largest tilt, from today's to 1, up to which the weights of a round keep their effective sample size;
        today's where they do not keep it there.
        """

        def keeps(tilt: float) -> bool:
            return float(1 / torch.softmax(log_ratio + tilt * gain, dim=0).square().sum()) >= self.ess * len(gain)

        low, high = self.tilt, 1.0
        if not keeps(low) or keeps(high):
            return high if keeps(low) else low
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def weight(self) -> Tensor:
        """Of all kept outcomes toward p_a, float64 [N]."""
        share = torch.softmax(self.log_ratios + self.tilt * self.gain, dim=1)
        counts = (1 / share.square().sum(dim=1, keepdim=True) - 1).clamp(min=1e-9)
        return (share * counts).flatten()

    def drawn(self, count: int) -> Tensor:
        """Kept outcomes by their weights, int64 [count]."""
        return torch.multinomial(self.weight(), count, replacement=True, generator=self.generator)

    def _re_masked(self, model: learners.Model) -> Iterator[MatchingTargets]:
        for _ in range(self.steps):
            final = self.final[self.drawn(self.states)][None]
            blank = torch.full_like(final, self.density.tokens)
            states = model.process.remask(blank, final, self.generator, stratified=True)
            yield group_targets("posterior", states, final, torch.ones(final.shape[:2]), model.process)

    def _by_variance(self, model: learners.Model, path: Trajectories, log_weight: Tensor) -> Iterator[MatchingTargets]:
        for rows in torch.randperm(self.batch, generator=self.generator).split(self.paths):
            yield variance_targets(path[rows], log_weight[rows])
        for chosen in self.drawn(self.again).split(self.paths):
            other = in_any_order(self.final[chosen], self.density.tokens, self.generator)
            other.log_prob = model.path_log_prob(other)
            log_law = self.log_base.flatten()[chosen] + self.tilt * self.gain.flatten()[chosen]
            yield variance_targets(other, log_law - other.log_prob.double().sum(dim=1))


def learner(name: str, task: Task, *, batch: int, steps: int, replicates: int, seed: int) -> learners.Learner:
    """A learner by its name, one of LEARNERS."""
    options = {"batch": batch, "steps": steps, "replicates": replicates, "seed": seed}
    if name in OTHERS:
        return learners.learner(name, task, **options)
    return Kept(task, **options) if name == KEPT else Stepped(task, **options, null=name == NULL)
