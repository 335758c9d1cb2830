"""Learners of samplers of densities e^(-E): Adjoint Sampling, and the non-equilibrium annealed adjoint sampler (NAAS).

Each simulates its own paths, keeps outcomes with gradients, and matches its control to what it keeps. Everything a run
goes on from is in `state_dict`: networks, optimizer, what is kept, counts and the generator.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dam.flows import matching
from dam.flows.adjoint import Cost, cost_gradient
from dam.flows.annealed import Annealing, clipped
from dam.flows.brownian import Brownian, projected_targets
from dam.flows.matching import Targets, adjoint_targets
from dam.flows.simulate import Path, simulate


class EnergyError(ValueError):
    """An energy is no number somewhere."""


class Counted:
    """An energy whose evaluations are counted, one for each state, with its gradient or without.

    Args:
        energy: E of states [B, ...], [B].

    Raises:
        EnergyError: when called, where an energy is not finite: it names the row, and says what may be done.
    """

    def __init__(self, energy: Cost):
        self.energy = energy
        self.calls = 0

    def __call__(self, state: Tensor) -> Tensor:
        self.calls += len(state)
        value = self.energy(state)
        finite = value.detach().isfinite()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise EnergyError(
                f"the energy of row {row} is {float(value.detach()[row]):g}: an energy must be finite wherever paths "
                "go. If states are not what they should be, steps are too long or the noise is too strong"
            )
        return value


class Buffer:
    """The last `capacity` rows of what goes together, as tensors of one length.

    Args:
        capacity: rows.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"Buffer: capacity must be at least 1 row; got {capacity}")
        self.capacity = capacity
        self.rows: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def add(self, *rows: Tensor) -> None:
        joined = rows if not self.rows else [torch.cat(pair) for pair in zip(self.rows, rows, strict=True)]
        self.rows = tuple(part[-self.capacity :].clone() for part in joined)

    def drawn(self, count: int, generator: torch.Generator, shares: Tensor | None = None) -> tuple[Tensor, ...]:
        """`count` rows with replacement, uniformly or in proportion to `shares` of the rows, [len(self)]."""
        if not len(self):
            raise ValueError("Buffer: there are no rows to draw from")
        if shares is None:
            at = torch.randint(len(self), (count,), generator=generator)
        else:
            at = torch.multinomial(shares.cpu(), count, replacement=True, generator=generator)
        at = at.to(self.rows[0].device)
        return tuple(part[at] for part in self.rows)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sampler is trained.

    Args:
        paths: B, of each round; the first has `kept` times as many.
        updates: steps of the optimizer in each round, each on
        batch: rows of what is kept.
        kept: rounds whose outcomes are kept.
        steps: K of the process; NAAS has two, of K steps each.
        deviation: of the Gaussian that it starts from: of X_1 under the Brownian reference, of X_0 for NAAS.
        ratio: of the Brownian reference's first noise to its last.
        sigma, power: of NAAS's Langevin dynamics and of its annealing.
        grid: times of NAAS's second stage are 1 - (1 - s)^grid of even s: above 1 steps are short near the end, where
            the density is narrow and long ones would leave it too wide.
        learning_rate: of Adam, which falls to a twentieth along a cosine over the rounds.
        largest_slope: norm that gradients of a row are cut to.
        reweighted: of Adjoint Sampling, the share of outcomes that are drawn in proportion to their paths' weights, the
            others alike: see `AdjointSampling`. Above 0 it takes one more energy call for each path.
        mode_width: of Adjoint Sampling, the deviation of a mode, which gradients are balanced by: see
            `projected_targets`. 0 is the gradient alone.
        rounds: of the whole run.
        seed: of everything that is drawn.

    Raises:
        ValueError: a number is out of range.
    """

    rounds: int = 100
    paths: int = 512
    updates: int = 50
    batch: int = 1024
    kept: int = 10
    steps: int = 100
    deviation: float = 1.0
    ratio: float = 1.0
    sigma: float = 1.0
    power: float = 1.0
    grid: float = 1.0
    learning_rate: float = 1e-3
    largest_slope: float = math.inf
    reweighted: float = 0.0
    mode_width: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "paths", "updates", "batch", "kept", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Settings: {name} must be at least 1; got {getattr(self, name)}")
        for name in ("deviation", "sigma", "learning_rate", "largest_slope"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Settings: {name} must be > 0; got {getattr(self, name)}")
        for name in ("ratio", "grid"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"Settings: {name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.reweighted <= 1:
            raise ValueError(f"Settings: reweighted must be in [0, 1]; got {self.reweighted}")
        if not 0 <= self.mode_width < self.deviation:
            raise ValueError(
                f"Settings: mode_width must be at least 0 and below deviation, {self.deviation}; got {self.mode_width}"
            )


class Samples(NamedTuple):
    """What a sampler draws."""

    final: Tensor  # [N, D]
    log_weight: Tensor  # float64 [N]: the mean of its exponential is Z, exactly


class Sampler(abc.ABC):
    """A control that is trained until its paths end in e^(-E) / Z.

    Args:
        energy: E of states [B, D], [B], differentiable by torch.func. One that is `Counted` already counts for networks
            that evaluate it too.
        dim: D.
        models: networks, of states [B, D] and times [B].
        settings: see there.
    """

    def __init__(self, energy: Cost, dim: int, models: dict[str, nn.Module], settings: Settings):
        self.energy = energy if isinstance(energy, Counted) else Counted(energy)
        self.dim, self.settings = dim, settings
        self.models = nn.ModuleDict(models)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.Adam(self.models.parameters(), lr=settings.learning_rate)
        self.round_number = 0

    @abc.abstractmethod
    def _draw(self, count: int, seed: int) -> tuple[Path, ...]:
        """Paths of the current model, one after another in time."""

    @abc.abstractmethod
    def _log_weights(self, paths: tuple[Path, ...]) -> Tensor:
        """See `Samples.log_weight`."""

    @abc.abstractmethod
    def _keep(self, paths: tuple[Path, ...]) -> float:
        """Puts what paths teach into buffers; the share of gradients that were cut."""

    @abc.abstractmethod
    def _losses(self) -> dict[str, Tensor]:
        """The loss of each model, on rows of the buffers."""

    @property
    @abc.abstractmethod
    def _buffers(self) -> dict[str, Buffer]: ...

    def round(self) -> dict[str, float]:
        """Paths, buffers, and steps of the optimizer; what there is to log of them.

        Raises:
            EnergyError, ValueError: an energy is no number, or paths have diverged: as they were before the round are
                networks, buffers and counts of rounds then.
        """
        settings = self.settings
        # The first round fills what is kept: a control that is fitted to the noise of few gradients prefers modes by
        # chance, and gradients, which know nothing of how much mass a mode has, do not bring the others back.
        paths = settings.paths * (settings.kept if self.round_number == 0 else 1)
        seed = settings.seed * 1_000_003 + self.round_number
        cut = self._keep(self._draw(paths, seed))
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: dict[str, float] = {}
        for _ in range(settings.updates):
            losses = self._losses()
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(self.models.parameters(), 10.0)
            self.optimizer.step()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + float(loss.detach()) / settings.updates
        self.round_number += 1
        logged = {"round": self.round_number, "energy_calls": self.energy.calls, "learning_rate": rate, "cut": cut}
        return {**logged, **{f"loss_{name}": value for name, value in total.items()}}

    def _learning_rate(self) -> float:
        done = min(1.0, self.round_number / self.settings.rounds)
        return self.settings.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def sample(self, count: int, seed: int) -> Samples:
        """Draws of the current model, with weights. They are not counted among the energy calls of training."""
        calls = self.energy.calls
        paths = self._draw(count, seed)
        weights = self._log_weights(paths)
        self.energy.calls = calls
        return Samples(paths[-1].final, weights)

    def state_dict(self) -> dict[str, Any]:
        return {
            "models": self.models.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "buffers": {name: list(buffer.rows) for name, buffer in self._buffers.items()},
            "round": self.round_number,
            "energy_calls": self.energy.calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.models.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name, buffer in self._buffers.items():
            buffer.rows = tuple(state["buffers"][name])
        self.round_number, self.energy.calls = state["round"], state["energy_calls"]


class AdjointSampling(Sampler):
    """Adjoint Sampling: a Brownian reference, of outcomes their gradients only, one energy call for each path.

    What is matched is right where outcomes have the law of the target, which they have at the end only. Each path has a
    weight that makes up for what its control lacked. A share `settings.reweighted` of outcomes is drawn by it, cut
    where it is above N^(1/2) times the mean of the N that are kept: right for any control but for the cut, so that a
    mode whose mass is off is mended by more than gradients, which do not know of mass. Paths that went astray have no
    weight: only outcomes that are drawn alike teach the control to bring them back.

    Source: Havens et al., arXiv 2504.11713, Alg. 1; of weights, Phillips et al., Particle Denoising Diffusion Sampler,
    arXiv 2402.06320; of their cut, Ionides, Truncated Importance Sampling, 2008.
    """

    def __init__(self, energy: Cost, dim: int, model: nn.Module, settings: Settings):
        super().__init__(energy, dim, {"model": model}, settings)
        self.process = Brownian.reaching(settings.deviation, settings.ratio, settings.steps)
        self.times = self.process.times(settings.steps)
        self.cost = self.process.terminal_cost(self.energy, self.times)
        self.outcomes = Buffer(settings.paths * settings.kept)

    @property
    def _buffers(self) -> dict[str, Buffer]:
        return {"outcomes": self.outcomes}

    def _draw(self, count: int, seed: int) -> tuple[Path, ...]:
        return (_from_zero(self.process, self.models["model"], self.times, (count, self.dim), seed),)

    def _log_weights(self, paths: tuple[Path, ...]) -> Tensor:
        (path,) = paths
        assert path.log_ratio is not None
        with torch.no_grad():
            return path.log_ratio.sum(dim=1) - self.cost(path.final).double()

    def _keep(self, paths: tuple[Path, ...]) -> float:
        final = paths[0].final
        slope, cut = clipped(cost_gradient(self.cost, final), self.settings.largest_slope)
        weight = (self._log_weights(paths),) if self.settings.reweighted else ()
        self.outcomes.add(final, slope, *weight)
        return cut

    def _shares(self) -> Tensor | None:
        """Of each outcome, how often it is drawn, float64 [N]; None is alike."""
        if not self.settings.reweighted:
            return None
        share = self.outcomes.rows[2].softmax(dim=0)
        share = share.clamp_max(len(share) ** -0.5)
        return self.settings.reweighted * share / share.sum() + (1 - self.settings.reweighted) / len(share)

    def _losses(self) -> dict[str, Tensor]:
        final, slope = self.outcomes.drawn(self.settings.batch, self.generator, self._shares())[:2]
        targets = projected_targets(
            self.process,
            self.times,
            final,
            slope,
            mode_width=self.settings.mode_width,
            generator=self.generator,
        )
        return {"model": matching.loss(self.models["model"], _even(targets))}


class AdjointMatching(AdjointSampling):
    """Adjoint Matching of the same control problem, alone: matched along the paths of its last round, nothing is kept.

    Against Adjoint Sampling states are those that the control itself went through, not drawn anew from bridges, and a
    mode that its paths do not reach is never heard of again.

    Raises:
        ValueError: `settings.kept` is not 1, or settings are of what is drawn from outcomes.

    Source: Domingo-Enrich et al., arXiv 2409.08861, with the reference of arXiv 2504.11713.
    """

    def __init__(self, energy: Cost, dim: int, model: nn.Module, settings: Settings):
        if settings.kept != 1:
            raise ValueError(
                f"AdjointMatching: kept must be 1, as paths of earlier controls are not its own; got {settings.kept}. "
                "AdjointSampling keeps outcomes"
            )
        if settings.reweighted or settings.mode_width:
            raise ValueError(
                "AdjointMatching: reweighted and mode_width are of outcomes that are kept, and it keeps none: leave "
                "them out. AdjointSampling has both"
            )
        super().__init__(energy, dim, model, settings)
        self.states = Buffer(settings.paths * settings.steps)

    @property
    def _buffers(self) -> dict[str, Buffer]:
        return {"states": self.states}

    def _keep(self, paths: tuple[Path, ...]) -> float:
        (path,) = paths
        slope, cut = clipped(cost_gradient(self.cost, path.final), self.settings.largest_slope)
        targets = adjoint_targets(self.process, None, path, slope)
        self.states.add(targets.state, targets.time, targets.prediction)
        return cut

    def _losses(self) -> dict[str, Tensor]:
        state, time, prediction = self.states.drawn(self.settings.batch, self.generator)
        return {"model": matching.loss(self.models["model"], _even(Targets(state, time, prediction, time)))}


class AnnealedSampling(Sampler):
    """NAAS: a Brownian reference to X_0, annealed Langevin dynamics from there, both controlled.

    The second stage is matched to lean adjoints along its paths, with the running cost; the first, by reciprocal
    projection, to the adjoint at X_0, whose mean is the gradient of V_0.

    Source: Choi et al., arXiv 2506.18165.
    """

    def __init__(self, energy: Cost, dim: int, start: nn.Module, model: nn.Module, settings: Settings):
        super().__init__(energy, dim, {"start": start, "model": model}, settings)
        self.annealing = Annealing(self.energy, settings.deviation, settings.sigma, settings.power)
        self.process = self.annealing.process
        self.times = 1 - (1 - self.process.times(settings.steps)) ** settings.grid
        self.first = Brownian.reaching(settings.deviation, settings.ratio, settings.steps)
        self.first_times = self.first.times(settings.steps)
        self.starts = Buffer(settings.paths * settings.kept)
        self.states = Buffer(settings.paths * settings.kept * settings.steps)

    @property
    def _buffers(self) -> dict[str, Buffer]:
        return {"starts": self.starts, "states": self.states}

    def _draw(self, count: int, seed: int) -> tuple[Path, ...]:
        first = _from_zero(self.first, self.models["start"], self.first_times, (count, self.dim), seed)
        # Ids of their own: a row's increments in both stages are independent.
        ids = torch.arange(count) + 2**32
        second = simulate(
            self.process,
            self.models["model"],
            first.final,
            times=self.times,
            method="euler",
            seed=seed,
            row_ids=ids.to(first.final.device),
        )
        return first, second

    def _log_weights(self, paths: tuple[Path, ...]) -> Tensor:
        first, second = paths
        assert first.log_ratio is not None
        return first.log_ratio.sum(dim=1) + self.annealing.log_weights(second)

    def _keep(self, paths: tuple[Path, ...]) -> float:
        path = paths[1]
        targets = adjoint_targets(
            self.process, None, path, torch.zeros_like(path.final), running=self.annealing.running
        )
        sigma = self.settings.sigma
        prediction, cut = clipped(targets.prediction, sigma * self.settings.largest_slope)
        self.states.add(targets.state, targets.time, prediction)
        at_start = targets.time == 0
        self.starts.add(targets.state[at_start], prediction[at_start] / -sigma)
        return cut

    def _losses(self) -> dict[str, Tensor]:
        settings = self.settings
        state, time, prediction = self.states.drawn(settings.batch, self.generator)
        weight = torch.full((settings.batch,), 1 / (2 * settings.batch), dtype=torch.float64)
        second = matching.loss(self.models["model"], Targets(state, time, prediction, weight.to(state.device)))
        start, slope = self.starts.drawn(settings.batch, self.generator)
        targets = projected_targets(self.first, self.first_times, start, slope, generator=self.generator)
        return {"start": matching.loss(self.models["start"], _even(targets)), "model": second}


def _even(targets: Targets) -> Targets:
    """The same at every time: late ones, of little noise, would count for too little beside what a network can tell."""
    return targets._replace(weight=torch.full_like(targets.weight, 1 / (2 * len(targets.weight))))


def _from_zero(process: Brownian, model: nn.Module, times: Tensor, shape: tuple[int, int], seed: int) -> Path:
    parameter = next(model.parameters())
    zero = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    return simulate(process, model, zero, times=times, weights=True, method="euler", seed=seed)
