"""Everything that learns p* proportional to p_base exp(r) on a masked chain from rewards, behind one interface.

A `Learner` plays rounds: it draws trajectories, asks for rewards, and says what the model is to match. A `Model` is a
network with its optimizer, the same for all. The base is the chain that fills in every position uniformly.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dam.adjoint import (
    MatchingTargets,
    estimator_loss,
    group_targets,
    path_targets,
    state_targets,
    tilted_weights,
)
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import Denoiser
from dam.rollout import Trajectories, jump_log_prob, rollout
from experiments.densities import Density


class Fit:
    """Adam on a network, and the average of its weights, which figures are of.

    Args:
        learning_rate: falls to 0 with `power` over the run.
        average: exponent of the average's weights: the n-th step counts as n^average.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, power: float = 1.0, average: float = 16.0):
        self.network, self.averaged = network, copy.deepcopy(network)
        self._rate, self._power, self._average, self._steps = learning_rate, power, average, 0
        self._optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))

    def step(self, loss: Tensor, progress: float) -> None:
        """A gradient step; progress is the share of the run that is over, in [0, 1)."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * (1 - progress) ** self._power
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._steps += 1
        share = (self._average + 1) / (self._steps + self._average)
        with torch.no_grad():
            for mean, now in zip(self.averaged.parameters(), self._optimizer.param_groups[0]["params"], strict=True):
                mean.lerp_(now, share)


class Model(abc.ABC):
    """A network that predicts p(v | i, x), and what it is fitted with.

    Args:
        network: made anew; Adam keeps fitting it, whatever `network` is set to for a while.
        density: names tokens and length; token V is the mask.
        options: of `Fit`.
    """

    def __init__(self, network: nn.Module, density: Density, **options: float):
        self._fit = Fit(network, **options)
        self.network, self.averaged = network, self._fit.averaged
        self.tokens, self.length = density.tokens, density.length
        self.process = MaskedCTMC(self.tokens)

    @abc.abstractmethod
    def sampled(self, initial: Tensor, seed: int) -> Trajectories:
        """Trajectories of the network from states int64 [B, L], one position a call."""

    @abc.abstractmethod
    def path_log_prob(self, path: Trajectories) -> Tensor:
        """Log-probabilities [B, S] of the jumps of trajectories under the network."""

    @abc.abstractmethod
    def log_prob(self, states: Tensor) -> Tensor:
        """log p(v | i, x) of the network, float32 [B, L, V]."""

    @abc.abstractmethod
    def loss(self, targets: MatchingTargets) -> Tensor:
        """The matching loss of the targets, differentiable in the network."""

    def step(self, targets: MatchingTargets, progress: float) -> None:
        self._fit.step(self.loss(targets), progress)

    def blank(self, count: int) -> Tensor:
        return torch.full((count, self.length), self.tokens)

    def explored(self, count: int, uniform: int, seed: int) -> Trajectories:
        """Trajectories from masks only, the first `uniform` of them with the base's tokens instead of the network's."""
        path = self.sampled(self.blank(count), seed)
        if uniform:
            generator = torch.Generator().manual_seed(seed + 1)
            path.final[:uniform] = torch.randint(self.tokens, (uniform, self.length), generator=generator)
            path.token[:uniform] = path.final[:uniform].gather(1, path.position[:uniform])
            path.log_prob = self.path_log_prob(path)
        return path


class DenoiserModel(Model):
    """A `Denoiser`, by the library's own rollouts and losses."""

    network: Denoiser

    def sampled(self, initial: Tensor, seed: int) -> Trajectories:
        return rollout(self.network, initial, self.process, seed=seed)

    def path_log_prob(self, path: Trajectories) -> Tensor:
        return jump_log_prob(self.network, path, self.process)

    @torch.no_grad()
    def log_prob(self, states: Tensor) -> Tensor:
        logits = self.network.head().logits(self.network.hidden_states(states))
        return logits[..., : self.tokens].log_softmax(dim=2)

    def loss(self, targets: MatchingTargets) -> Tensor:
        return estimator_loss(self.network, targets, self.process)


class Round(NamedTuple):
    """What a learner asks of the model, and what it cost."""

    steps: list[MatchingTargets]  # one gradient step each
    reward_calls: int
    network_calls: int  # states that the network was evaluated at, in rollouts and in gradient steps


@dataclasses.dataclass
class Learner(abc.ABC):
    """A way to learn; `batch` reward calls a round, spent on `steps` gradient steps.

    Learners that re-mask outcomes do so `replicates` times for every step.
    """

    density: Density
    batch: int = 2048
    steps: int = 1
    replicates: int = 1
    seed: int = 0
    generator: torch.Generator = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @abc.abstractmethod
    def round(self, model: Model, n: int, progress: float) -> Round:
        """The n-th round."""

    @property
    def together(self) -> int:
        """Reward calls that cannot be divided."""
        return 1

    def seed_of(self, n: int) -> int:
        return (self.seed * 10**6 + n) * 4

    def done(self, steps: list[MatchingTargets], reward_calls: int, *paths: Trajectories) -> Round:
        evaluated = sum(int((path.call >= 0).sum()) for path in paths) + sum(len(t.states) for t in steps)
        return Round(steps, reward_calls, evaluated)

    def log_ratio(self, path: Trajectories) -> Tensor:
        """log p_base - log p_u at every jump, float64 [B, S]."""
        return torch.where(path.call >= 0, -math.log(self.density.tokens) - path.log_prob.double(), 0.0)


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


@dataclasses.dataclass
class PolicyGradient(Learner):
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
            one step a round, and `path` takes all jumps in one step, or one jump of each trajectory in each of several.
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
    "d1": (PolicyGradient, {}),
}
PUBLISHED = "first_jump_one, state"
ABLATIONS = ("path, baseline, no base", "path")
