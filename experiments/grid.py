"""Models of two tokens on a grid whose laws are known exactly at every step: of masked chains, and of uniform ones."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor, nn

import dam
from dam.adjoint import MatchingTargets
from dam.ctmc import Geometric, UniformCTMC, enumeration, simulate
from dam.rollout import Trajectories
from experiments.densities import Grid
from experiments.learners import Fit, Learner, Model, Round


class Contexts(nn.Module):
    """Logits of each token given the other or that it is masked, [2, V + 1, V]: an MLP of Fourier features."""

    def __init__(self, size: int, width: int = 256, frequencies: int = 16):
        super().__init__()
        axis = torch.linspace(0, math.pi, size)[:, None] * torch.arange(1, frequencies + 1)
        features = torch.zeros(2, size + 1, 2 * frequencies + 2)
        features[:, :size, : 2 * frequencies] = torch.cat([axis.cos(), axis.sin()], dim=1)
        features[:, size, -2] = 1.0  # the other is masked
        features[1, :, -1] = 1.0
        self.register_buffer("features", features)
        self.layers = nn.Sequential(
            *(nn.Linear(features.shape[2], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)),
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)  # uniform, as the base

    def forward(self) -> Tensor:
        return self.layers(self.features)


def law_of(log_prob: Tensor) -> Tensor:
    """p_u(x_1, x_2) of log p(v | i, other) [2, V + 1, V]: either position is as likely to be filled in first."""
    first, given = log_prob[:, -1].exp(), log_prob[:, :-1].exp()
    return (first[0][:, None] * given[1] + (first[1][:, None] * given[0]).t()) / 2


def divergences(truth: Tensor, law: Tensor) -> dict[str, float]:
    """KL(p* || p_u) and total variation, of float64 laws."""
    return {"kl": float(torch.xlogy(truth, truth / law).sum()), "tv": float((truth - law).abs().sum() / 2)}


class GridModel(Model):
    """All contexts are evaluated at once, so that a step costs the same for any number of trajectories."""

    network: Contexts

    def __init__(self, density: Grid, **options: float):
        super().__init__(Contexts(density.size), density, **options)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        return self.network()

    def sampled(self, initial: Tensor, seed: int) -> Trajectories:
        generator = torch.Generator().manual_seed(seed)
        logits = self._logits()
        masked = self.process.masked(initial)
        count = masked.sum(dim=1)
        order = self.process.jump_times(initial, generator).argsort(dim=1)[:, : int(count.max())]
        call = torch.where(torch.arange(order.shape[1]) < count[:, None], torch.arange(order.shape[1]), -1)
        path = Trajectories(
            initial=initial,
            final=initial.clone(),
            position=torch.where(call >= 0, order, -1),
            token=torch.full_like(order, -1),
            call=call,
            log_prob=torch.zeros(order.shape),
        )
        for s in range(order.shape[1]):
            rows = (count > s).nonzero()[:, 0]
            position = order[rows, s]
            drawn = dam.jump(logits[position, path.final[rows, 1 - position]], seed=seed, row_ids=2 * rows + s)
            path.token[rows, s], path.log_prob[rows, s] = drawn.target, drawn.log_prob
            path.final[rows, position] = drawn.target
        return path

    def path_log_prob(self, path: Trajectories) -> Tensor:
        log_prob = self._logits().log_softmax(dim=2)
        out = torch.zeros_like(path.log_prob)
        for s in range(path.position.shape[1]):
            rows = (path.call[:, s] >= 0).nonzero()[:, 0]
            position = path.position[rows, s]
            other = path.states_before(s)[rows, 1 - position]
            out[rows, s] = log_prob[position, other, path.token[rows, s]]
        return out

    def log_prob(self, states: Tensor) -> Tensor:
        return self._logits().log_softmax(dim=2)[torch.arange(2), states.flip(1)]

    def loss(self, targets: MatchingTargets) -> Tensor:
        size = self.tokens
        other = targets.states[targets.row, 1 - targets.position]
        cell = ((targets.position * (size + 1) + other) * size)[:, None] + targets.target
        used = targets.target >= 0
        asked = torch.zeros(2 * (size + 1) * size, dtype=torch.float64)
        asked.index_add_(0, cell[used], targets.weight[used].double())
        asked = (asked / len(targets.states)).float().view(2, size + 1, size)
        return -(asked * self.network().log_softmax(dim=2)).sum()

    @torch.no_grad()
    def law(self) -> Tensor:
        """That of the averaged weights, float64 [V, V]."""
        return law_of(self.averaged().double().log_softmax(dim=2))


@dataclasses.dataclass
class ValueGuidance(Learner):
    """SVDD: regression of E_base[e^r | state] on outcomes of the base; the sampler draws `proposals` tokens from the
    base at each step and keeps one in proportion to its value, the reward itself at the last step. Nothing is trained
    but the values; each sample costs `proposals` reward calls more.

    The mean over outcomes is the least-squares regression, and the exact soft value in the limit, where the authors
    regress r itself.

    Source: Li et al., Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
    Decoding, arXiv 2408.08252.
    """

    proposals: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.density.tokens
        self._sum, self._count = (torch.zeros(2, size, dtype=torch.float64) for _ in range(2))

    def round(self, model: Model, n: int, progress: float) -> Round:
        final = torch.randint(self.density.tokens, (self.batch, 2), generator=self.generator)
        value = self.density.log_density(final).exp()
        for i in range(2):
            self._sum[i].index_add_(0, final[:, i], value)
            self._count[i] += torch.bincount(final[:, i], minlength=self.density.tokens)
        return Round([], self.batch, 0)

    def law(self) -> Tensor:
        """Exact law of the sampler, float64 [V, V]."""
        overall = self._sum.sum() / self._count.sum()
        value = torch.where(self._count > 0, self._sum / self._count.clamp(min=1), overall)
        return law_of(torch.cat([self._last, kept(value, self.proposals)[:, None]], dim=1).log())

    @functools.cached_property
    def _last(self) -> Tensor:
        """Probabilities of each token at the last step, given the other, [2, V, V]: by rewards, whatever is learned."""
        size = self.density.tokens
        reward = self.density.log_density(enumeration.states(size, 2)).exp().view(size, size)
        return torch.stack([kept(reward.t(), self.proposals), kept(reward, self.proposals)])


def kept(value: Tensor, proposals: int) -> Tensor:
    """Probability [..., V] that v is kept, of `proposals` uniform draws and one of them in proportion to its value.

    M/V w_v E[1 / (w_v + S)], S the sum of M - 1 other values: the integral of E[e^{-s w}]^{M-1} e^{-s w_v} over s > 0.
    """
    value = value / value.amax(dim=-1, keepdim=True)
    s = torch.logspace(-6, 12, 1024, dtype=torch.float64)  # e^{-s w} of values from 1 down to 1e-9
    step = math.log(float(s[1] / s[0]))
    total = torch.zeros_like(value)
    for at in s:
        decay = torch.exp(-at * value)
        total += at * step * decay.mean(dim=-1, keepdim=True) ** (proposals - 1) * decay
    # Below the first s, where the integrand is 1.
    chosen = value * (total + float(s[0]))
    return chosen / chosen.sum(dim=-1, keepdim=True)


# ---- a uniform base


class UniformModel:
    """The reversal of uniform noise whose data are the law p(x_1) p(x_2 | x_1) of a network: consistent at all times.

    Then p(X_1^i = w | x, t) is exact, by Bayes over the joint law, and the path weight against the base depends on X_1
    alone, up to what X_0 tells of it.
    """

    def __init__(self, density: Grid, **options: float):
        self._fit = Fit(Contexts(density.size), **options)
        self.size = density.size
        self.process = UniformCTMC(self.size, Geometric(1e-3))

    def log_joint(self, network: nn.Module | None = None) -> Tensor:
        """float32 [V, V], differentiable."""
        log_prob = (network or self._fit.network)().log_softmax(dim=2)
        return log_prob[0, -1][:, None] + log_prob[1, :-1]

    def prediction(self, log_joint: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """log p(X_1^i = w | x, t) up to a constant, [B, 2, V], for tokens [B, 2] at times [B]."""
        joint = log_joint.exp()
        left = self.process.schedule.alpha(time).to(joint.dtype)[:, None]
        spread = (1 - left) / self.size
        first = left * joint.t()[tokens[:, 1]] + spread * joint.sum(dim=1)
        second = left * joint[tokens[:, 0]] + spread * joint.sum(dim=0)
        here = nn.functional.one_hot(tokens, self.size).to(joint.dtype)
        return torch.stack([first, second], dim=1).log() + (left[..., None] * here + spread[..., None]).log()

    def step(
        self,
        final: Tensor,
        weight: Tensor,
        progress: float,
        generator: torch.Generator,
        *,
        baseline: Tensor | float = 0.0,
        teacher: Tensor | None = None,
    ) -> None:
        """A gradient step on outcomes [B, 2] re-noised to times at which what is left of them is uniform in (0, 1).

        Args:
            final, weight: outcomes, and their weights toward p*.
            progress: share of the run that is over.
            generator: draws times and noise.
            baseline: taken off each weight, and given to `teacher`, the log joint law [V, V] that the outcomes were
                drawn from: in expectation nothing, and all of the noise once the weights are the baseline.
        """
        time = self.process.schedule.inverse(torch.rand(len(final), generator=generator, dtype=torch.float64))
        time = time.clamp(min=0.0)
        states = self.process.noise(final, time, generator)
        log_prob = self.prediction(self.log_joint(), states, time).log_softmax(dim=2)
        told = (weight - baseline)[:, None] * log_prob.gather(2, final[..., None])[..., 0]
        if teacher is not None:
            share = self.prediction(teacher, states, time).softmax(dim=2)
            told = told + torch.as_tensor(baseline)[:, None] * (share * log_prob).sum(dim=2)
        self._fit.step(-told.mean(), progress)

    @torch.no_grad()
    def law(self) -> Tensor:
        """The law that its rates reverse, float64 [V, V]."""
        return self.log_joint(self._fit.averaged).double().exp()

    @torch.no_grad()
    def simulated_law(self, times: list[float]) -> Tensor:
        """That of X at the last of the times from uniform X_0 by the forward equation, float64 [V^2]."""
        log_joint = self.law().log()
        start = torch.full((self.size**2,), 1.0 / self.size**2, dtype=torch.float64)
        return enumeration.law(self.process, lambda x, t: self.prediction(log_joint, x, t), start, self.size, 2, times)

    def trajectories(
        self, log_joint: Tensor, count: int, uniform: int, seed: int, times: list[float]
    ) -> tuple[Tensor, Tensor, int]:
        """Outcomes [B, 2] of the chain of a joint law, the first `uniform` of them of the base, log p_base - log p_u of
        what leads to them, and the states at which the network was evaluated.

        Given X_1, paths have the same law under model and base, noise run backwards, so that the weights of all paths
        to X_1 have the mean p_base(X_1) / p_u(X_1). This model, being a joint law, can tell it; others weigh each path.
        """
        flat = torch.full_like(log_joint, -2 * math.log(self.size))
        generator = torch.Generator().manual_seed(seed + 2**40)  # not the simulator's stream
        finals, calls = [], 0
        for law, number in ((flat, uniform), (log_joint, count - uniform)):
            start = self.process.initial((number, 2), generator)
            path = simulate(
                self.process,
                lambda x, t, law=law: self.prediction(law, x, t),
                start,
                times=times,
                seed=seed + len(finals),
            )
            finals.append(path.final)
            calls += path.network_calls
        final = torch.cat(finals)
        return final, (flat[0, 0] - log_joint[final[:, 0], final[:, 1]]).double(), calls
