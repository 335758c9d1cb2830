"""The learners of the studies: the library's estimators and those of other papers, behind one interface."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import nn

from dam.adjoint import MatchingTargets, group_targets, path_targets, state_targets, tilted_weights
from experiments import policy
from experiments.densities import Density
from experiments.interface import DenoiserModel as DenoiserModel
from experiments.interface import Fit as Fit
from experiments.interface import Learner, Model, Round
from experiments.interface import rounds_within as rounds_within


@dataclasses.dataclass
class Group(Learner):
    """The library's estimators with normaliser "group": re-masked outcomes, weighed among `size` of one prompt."""

    estimator: str = "posterior"
    size: int | None = None  # K; None: the batch

    @property
    def together(self) -> int:
        return self.size or 1

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        shape = (self.batch // (self.size or self.batch), self.size or self.batch)
        reward = self.density.log_density(path.final).view(shape)
        weights, _ = tilted_weights(self.log_ratio(path).view(*shape, -1), reward, beta=1.0)
        steps = []
        final = path.final.view(*shape, -1).repeat(1, self.replicates, 1)
        for _ in range(self.steps):
            states = model.process.remask(torch.full_like(final, self.density.tokens), final, self.generator)
            weight = weights.weight.repeat(1, self.replicates)
            steps.append(group_targets(self.estimator, states, final, weight, model.process, generator=self.generator))
        return self.done(steps, self.batch, path)


@dataclasses.dataclass
class State(Learner):
    """The library's estimators with normaliser "state": K trajectories from each state of a trajectory of the model.

    With "first_jump_one" it is Discrete Adjoint Matching as published (So et al., arXiv 2602.07132, Alg. 1).
    """

    estimator: str = "first_jump_one"
    size: int = 16  # K

    @property
    def together(self) -> int:
        return self.size

    def round(self, model: Model, n: int, progress: float) -> Round:
        groups = self.batch // self.size
        before = model.sampled(model.blank(groups), self.seed_of(n))
        states = model.process.remask(before.initial, before.final, self.generator)
        path = model.sampled(states.repeat_interleave(self.size, dim=0), self.seed_of(n) + 1)
        shape = (groups, self.size)
        reward = self.density.log_density(path.final).view(shape)
        weights, _ = tilted_weights(self.log_ratio(path).view(*shape, -1), reward, beta=1.0)
        targets = state_targets(
            self.estimator,
            states,
            path.final.view(*shape, -1),
            path.position[:, 0].view(shape),
            weights.weight,
            model.process,
            generator=self.generator,
        )
        return self.done([targets], self.batch, before, path)


@dataclasses.dataclass
class Path(Learner):
    """`path_targets` with weights less their mean, and a share of the trajectories from the base."""

    explore: float = 0.1
    baseline: bool = True

    def round(self, model: Model, n: int, progress: float) -> Round:
        uniform = int(self.explore * self.batch)
        path = model.explored(self.batch, uniform, self.seed_of(n))
        # Both kinds together are draws from the mixture of the two laws of paths.
        share, log_prob = uniform / self.batch, path.log_prob.double().sum(dim=1)
        log_base = -self.density.length * math.log(self.density.tokens)
        log_mixture = log_prob + math.log1p(-share)
        if uniform:
            log_mixture = torch.logaddexp(log_mixture, torch.tensor(log_base + math.log(share), dtype=torch.float64))
        weight = torch.softmax(self.density.log_density(path.final) - log_mixture, dim=0) * self.batch
        if self.baseline:
            weight = weight - (log_prob - log_mixture).exp()
        every = self.steps == 1  # else a jump of each trajectory for every step
        steps = [path_targets(path, weight[None], every=every, generator=self.generator) for _ in range(self.steps)]
        return self.done(steps, self.batch, path)


@dataclasses.dataclass
class WeightedDenoising(Learner):
    """Weighted denoising cross-entropy of MDNS: weights by a softmax over the batch, each token masked with
    probability lambda, uniform in (0, 1), and the cross-entropies of what is masked divided by lambda.

    Source: Zhu et al., MDNS: Masked Diffusion Neural Sampler, arXiv 2508.10684, Eq. 13.
    """

    def round(self, model: Model, n: int, progress: float) -> Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        log_weight = self.density.log_density(path.final) + self.log_ratio(path).sum(dim=1)
        weight = (torch.softmax(log_weight, dim=0) * self.batch).repeat(self.replicates)
        final = path.final.repeat(self.replicates, 1)
        steps = []
        for _ in range(self.steps):
            level = torch.rand((len(final), 1), generator=self.generator)
            masked = torch.rand(final.shape, generator=self.generator) < level
            row, position = masked.nonzero(as_tuple=True)
            share = weight[row] / (level[row, 0] * self.density.length)
            states = torch.where(masked, self.density.tokens, final)
            group = torch.zeros(len(states), dtype=torch.int64)
            target = final[row, position][:, None]
            steps.append(MatchingTargets(states, group, row, position, target, share[:, None]))
        return self.done(steps, self.batch, path)


@dataclasses.dataclass
class TiltMatching(Learner):
    """c-DTM: the tilt goes to 1 in stages; each stage's teacher is the model that the last one ended with.

    (e^{h r} - c) CE(X_1) + c CE(teacher) at re-masked outcomes X_1 of the teacher; r less its mean over the batch. The
    number of stages is ours.

    Source: Discrete Tilt Matching, arXiv 2604.18739.
    """

    stages: int = 16
    constant: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._teacher: tuple[int, nn.Module] | None = None

    def round(self, model: Model, n: int, progress: float) -> Round:
        stage = int(progress * self.stages)
        if self._teacher is None or self._teacher[0] != stage:
            self._teacher = (stage, copy.deepcopy(model.network))
        student, model.network = model.network, self._teacher[1]
        try:
            path = model.sampled(model.blank(self.batch), self.seed_of(n))
            reward = self.density.log_density(path.final)
            weight = ((reward - reward.mean()) / self.stages).exp().repeat(self.replicates)
            final = path.final.repeat(self.replicates, 1)
            steps = []
            for _ in range(self.steps):
                states = model.process.remask(torch.full_like(final, self.density.tokens), final, self.generator)
                masked = model.process.masked(states)
                row, position = masked.nonzero(as_tuple=True)
                teacher = model.log_prob(states)[row, position].double().exp()  # [R, V]
                every = torch.arange(self.density.tokens).expand(len(row), -1)
                target = torch.cat([final[row, position][:, None], every], dim=1)
                pulled = torch.cat([(weight - self.constant)[row, None], self.constant * teacher], dim=1)
                group = torch.zeros(len(states), dtype=torch.int64)
                pulled = pulled / masked.sum(dim=1)[row, None]
                steps.append(MatchingTargets(states, group, row, position, target, pulled))
        finally:
            model.network = student
        done = self.done(steps, self.batch, path)
        return done._replace(network_calls=done.network_calls + sum(len(t.states) for t in steps))


@dataclasses.dataclass
class AnalyticAdjoint(Learner):
    """The adjoint of Prop. 2.3 at a jump y of the base: e^{-r(X_1)} E_base[e^{r(X_1')} | X' = y], the expectation by
    `draws` trajectories of the base, X_1 drawn from the model. The ablation of So et al., arXiv 2602.07132.
    """

    draws: int = 7

    @property
    def together(self) -> int:
        return self.draws + 1

    def round(self, model: Model, n: int, progress: float) -> Round:
        count, tokens = self.batch // self.together, self.density.tokens
        before = model.sampled(model.blank(count), self.seed_of(n))
        states = model.process.remask(before.initial, before.final, self.generator)
        path = model.sampled(states, self.seed_of(n) + 1)
        row = torch.arange(count)
        position = path.position[:, 0]  # of the next jump, which the base draws alike
        token = torch.randint(tokens, (count,), generator=self.generator)
        jumped = states.clone()
        jumped[row, position] = token
        completed = jumped.repeat_interleave(self.draws, dim=0)
        drawn = torch.randint(tokens, completed.shape, generator=self.generator)
        completed = torch.where(model.process.masked(completed), drawn, completed)
        value = torch.logsumexp(self.density.log_density(completed).view(count, self.draws), dim=1)
        weight = torch.softmax(value - self.density.log_density(path.final), dim=0) * count
        targets = MatchingTargets(
            states, torch.zeros(count, dtype=torch.int64), row, position, token[:, None], weight[:, None]
        )
        return self.done([targets], self.batch, before, path)


def learner(
    name: str,
    density: Density,
    *,
    batch: int,
    steps: int = 1,
    replicates: int = 1,
    size: int | None = None,
    seed: int,
) -> Learner:
    """A learner by its name, one of LEARNERS.

    Args:
        batch, steps, replicates: as for `Learner`. Learners with normaliser "state", "analytic adjoint" and "d1" take
            one step a round, and `path` takes all jumps in one step, or one jump of each trajectory in each of several;
            "DMPO", "SPG" and "ESPO" have a number of replicates of their own.
        size: K of the group normaliser; None weighs the whole batch together.

    Raises:
        ValueError: the batch is no multiple of what the learner needs together.
    """
    made, options = LEARNERS[name]
    if made is Group:
        options = {**options, "size": size}
    found = made(density, batch=batch, steps=steps, replicates=replicates, seed=seed, **options)
    if batch < found.together or batch % found.together:
        raise ValueError(f"{name}: the batch must be a multiple of {found.together}; got {batch}")
    return found


LEARNERS: dict[str, tuple[type[Learner], dict[str, object]]] = {
    "path, baseline": (Path, {}),
    "path, baseline, no base": (Path, {"explore": 0.0}),
    "path": (Path, {"baseline": False}),
    "posterior": (Group, {"estimator": "posterior"}),
    "first_jump": (Group, {"estimator": "first_jump"}),
    "posterior, state": (State, {"estimator": "posterior"}),
    "first_jump, state": (State, {"estimator": "first_jump"}),
    "first_jump_one, state": (State, {"estimator": "first_jump_one"}),
    "weighted denoising": (WeightedDenoising, {}),
    "c-DTM": (TiltMatching, {}),
    "analytic adjoint": (AnalyticAdjoint, {}),
    **policy.LEARNERS,
}
PUBLISHED = "first_jump_one, state"
# Of a study if they are named.
ON_REQUEST = ("path, baseline, no base", "path", *(name for name in policy.LEARNERS if name != "d1"))
