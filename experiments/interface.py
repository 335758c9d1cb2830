"""What learns p* proportional to p_base exp(r) on a masked chain from rewards, and what it plays with.

A `Learner` plays rounds: it draws trajectories, asks for rewards, and says what the model is to match. A `Model` is a
network with its optimizer, the same for all. The base is the chain that fills in every position uniformly.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dam.adjoint import MatchingTargets, estimator_loss
from dam.ctmc import MaskedCTMC
from dam.models.denoiser import Denoiser, hidden_at
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

    def target_log_prob(self, targets: MatchingTargets) -> Tensor:
        """log p(v | i, x) of the network at each row's state, position and first target, [R]."""
        return self.log_prob(targets.states)[targets.row, targets.position, targets.target[:, 0]]

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

    @torch.no_grad()
    def path_log_prob(self, path: Trajectories) -> Tensor:
        return jump_log_prob(self.network, path, self.process)

    @torch.no_grad()
    def log_prob(self, states: Tensor) -> Tensor:
        logits = self.network.head().logits(self.network.hidden_states(states))
        return logits[..., : self.tokens].log_softmax(dim=2)

    @torch.no_grad()
    def target_log_prob(self, targets: MatchingTargets) -> Tensor:
        hidden = hidden_at(self.network, targets.states, None, targets.row, targets.position)
        logits = self.network.head().logits(hidden)[:, : self.tokens]
        return logits.log_softmax(dim=1).gather(1, targets.target)[:, 0]

    def loss(self, targets: MatchingTargets) -> Tensor:
        return estimator_loss(self.network, targets, self.process)


class Round(NamedTuple):
    """What a learner asks of the model, and what it cost."""

    steps: Iterable[MatchingTargets]  # one gradient step each; made between them, where they ask the model as it is
    reward_calls: int
    network_calls: int  # states that the network was evaluated at, in rollouts and in gradient steps


def evaluated(*paths: Trajectories) -> int:
    """States that the network saw to draw trajectories."""
    return sum(int((path.call >= 0).sum()) for path in paths)


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
        return Round(steps, reward_calls, evaluated(*paths) + sum(len(t.states) for t in steps))

    def log_ratio(self, path: Trajectories) -> Tensor:
        """log p_base - log p_u at every jump, float64 [B, S]."""
        return torch.where(path.call >= 0, -math.log(self.density.tokens) - path.log_prob.double(), 0.0)


def rounds_within(network_calls: int, learner: Learner, model: Model) -> int:
    """Rounds that a learner can play until the network has seen so many states, by the cost of the first.

    Others cost the same, but of learners whose trajectories begin at re-masked states, of which it varies.

    Raises:
        ValueError: it asks no network, or not one round is to be had.
    """
    cost = copy.deepcopy(learner).round(model, 0, 0.0).network_calls
    name = type(learner).__name__
    if not cost:
        raise ValueError(f"{name} asks no network: give it rounds, not network calls")
    if cost > network_calls:
        raise ValueError(f"network_calls must be at least {cost}, a round of {name}; got {network_calls}")
    return network_calls // cost
