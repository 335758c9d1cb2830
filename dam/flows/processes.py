"""Stochastic differential equations whose drift a model predicts: flows and diffusions, and annealed Langevin dynamics.

A model is a function of states [B, ...] and times [B] that gives numbers [B, ...]; a process says what drift they mean.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dam.flows.schedules import Linear, Schedule
from dam.ops import _philox
from dam.ops._philox import Use

Model = Callable[..., Tensor]
PREDICTS = ("velocity", "score", "noise", "data")


class Process(abc.ABC):
    """dX = b_t(X) dt + sigma(t) dW on [0, 1], with a drift that is affine in what the model predicts:

        b_t(x) = reference_t(x) + gain(t) model(x, t)

    So a model against a base is a control u_t(x) = gain / sigma (model - base), and b = b_base + sigma u. Where the
    base is None it is the reference alone, a model that predicts 0.
    """

    @abc.abstractmethod
    def reference(self, state: Tensor, time: Tensor) -> Tensor:
        """The drift without a model, [B, ...], for float64 times [B], or one [] for all."""

    @abc.abstractmethod
    def gain(self, time: Tensor) -> Tensor:
        """What multiplies the prediction, float64, of the times' shape."""

    @abc.abstractmethod
    def diffusion(self, time: Tensor) -> Tensor:
        """sigma(t), float64, of the times' shape."""

    def finite(self, time: Tensor) -> Tensor:
        """At which times all coefficients are finite, bool, of the times' shape."""
        return self.gain(time).isfinite() & self.diffusion(time).isfinite()

    def why_not_matched(self) -> str | None:
        """Why matching to adjoints would not end in the tilt of the base, and what to do; None where it does."""
        return None

    def drift(self, model: Model | None, state: Tensor, time: Tensor) -> Tensor:
        """b_t(x) of a model, [B, ...], at float64 times [B], or one [] for all."""
        return self.drift_and_prediction(model, state, time)[0]

    def drift_and_prediction(self, model: Model | None, state: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """b_t(x) and what the model predicted, both [B, ...]."""
        drift = self.reference(state, time)
        if model is None:
            return drift, torch.zeros_like(state)
        prediction = predicted(model, state, time).to(state.dtype)  # states keep theirs
        return drift + over(self.gain(time), state) * prediction, prediction

    def times(self, steps: int) -> Tensor:
        """An even grid of `steps` steps to time 1, float64 [steps + 1].

        It begins at time 0, or a step later, at 1 / (steps + 1), where coefficients are infinite at 0.
        """
        if steps < 1:
            raise ValueError(f"times: steps must be at least 1; got {steps}")
        later = int(not bool(self.finite(torch.zeros((), dtype=torch.float64, device="cpu"))))
        return torch.linspace(0, 1, steps + 1 + later, dtype=torch.float64, device="cpu")[later:]


def over(coefficient: Tensor, state: Tensor) -> Tensor:
    """A coefficient [B] or [] as what multiplies states [B, ...].

    One for all stays on the CPU and in float64: torch takes it for a number, which no GPU waits for.
    """
    if not coefficient.dim():
        return coefficient
    return coefficient.to(state).view(-1, *[1] * (state.dim() - 1))


def for_each(time: Tensor, state: Tensor) -> Tensor:
    """Times [B] or [] as models take them: one for each of states [B, ...], in their dtype."""
    return time.to(state) if time.dim() else state.new_full((len(state),), float(time))


def predicted(model: Model, state: Tensor, time: Tensor) -> Tensor:
    """What a model says at states [B, ...] and float64 times [B] or [], which it is given as [B] in the states' dtype.

    Raises:
        ValueError: it has another shape.
    """
    prediction = model(state, for_each(time, state))
    if prediction.shape != state.shape:
        raise ValueError(
            f"a model must predict the shape of its states, {list(state.shape)}; got {list(prediction.shape)}"
        )
    return prediction


@dataclasses.dataclass(frozen=True)
class FlowProcess(Process):
    """From noise to data by X_t = alpha X_1 + beta eps: flow matching and diffusions, as SDE or as ODE.

    With the velocity v_t(x) = E[alpha' X_1 + beta' eps | X_t = x], the score s = (v - kappa x) / eta and rho = `noise`

        dX = (v_t(X) + rho eta(t) s_t(X)) dt + sqrt(2 rho eta(t)) dW

    has at every rho the marginals of alpha X_1 + beta eps: the ODE of flow matching at rho = 0, and at rho = 1 the
    memoryless SDE, dX = (2 v - kappa X) dt + sqrt(2 eta) dW. That is the reversal of a linear SDE, so that (X_t, X_1)
    have the joint law of alpha X_1 + beta eps and X_1: X_0 and X_1 are independent, up to alpha(0). Adjoint Matching
    needs it, and what it learns may then be sampled at any rho.

    Args:
        schedule: alpha and beta.
        predicts: what the model says of x at t: "velocity", v; "score", s; "noise", E[eps | x]; "data", E[X_1 | x].
        noise: rho, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Source: Domingo-Enrich et al., arXiv 2409.08861, Sec. 4; Albergo et al., Stochastic Interpolants, arXiv 2303.08797.
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    predicts: str = "velocity"
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.predicts not in PREDICTS:
            raise ValueError(f"FlowProcess: predicts must be one of {', '.join(PREDICTS)}; got {self.predicts!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"FlowProcess: noise must be finite and at least 0; got {self.noise}")

    def ode(self) -> FlowProcess:
        """The same marginals without noise."""
        return dataclasses.replace(self, noise=0.0)

    def reference(self, state: Tensor, time: Tensor) -> Tensor:
        return over(self._pull(time), state) * state

    def _pull(self, time: Tensor) -> Tensor:
        """What multiplies the state in the drift, next to the prediction."""
        if self.predicts in ("score", "noise"):
            return self.schedule.kappa(time)
        # kappa may be infinite where the ODE, which has none of it, is not.
        pull = -self.noise * self.schedule.kappa(time) if self.noise else torch.zeros_like(time)
        if self.predicts == "data":
            pull = pull + (1 + self.noise) * self.schedule.beta_derivative(time) / self.schedule.beta(time)
        return pull

    def gain(self, time: Tensor) -> Tensor:
        schedule, both = self.schedule, 1 + self.noise
        if self.predicts == "velocity":
            return torch.full_like(time, both)
        if self.predicts == "score":
            return both * schedule.eta(time)
        if self.predicts == "noise":
            return -both * schedule.eta(time) / schedule.beta(time)
        slope = schedule.beta_derivative(time) / schedule.beta(time)
        return both * (schedule.alpha_derivative(time) - schedule.alpha(time) * slope)

    def diffusion(self, time: Tensor) -> Tensor:
        return (2 * self.noise * self.schedule.eta(time)).sqrt() if self.noise else torch.zeros_like(time)

    def finite(self, time: Tensor) -> Tensor:
        return super().finite(time) & self._pull(time).isfinite()

    def why_not_matched(self) -> str | None:
        if self.noise == 1:
            return None
        return (
            f"with noise={self.noise:g} a velocity that is matched to adjoints is not that of the tilted law; draw "
            "paths and match with noise=1, and sample what was learned at any noise"
        )

    def data(self, prediction: Tensor, state: Tensor, time: Tensor) -> Tensor:
        """E[X_1 | X_t = x] by what the model predicted at states [B, ...] and times [B] or []: the one-step outcome."""
        alpha, beta = (over(f(time), state) for f in (self.schedule.alpha, self.schedule.beta))
        if self.predicts == "data":
            return prediction
        if self.predicts == "noise":
            return (state - beta * prediction) / alpha
        if self.predicts == "score":
            return (state + beta.square() * prediction) / alpha
        slopes = (self.schedule.alpha_derivative, self.schedule.beta_derivative)
        alpha_slope, beta_slope = (over(f(time), state) for f in slopes)
        # Both sides divided by the slope where it is large: it may be infinite where beta is 0.
        beta, beta_slope = beta / beta_slope.abs().clamp(min=1), beta_slope.clamp(-1, 1)
        return (beta * prediction - beta_slope * state) / (beta * alpha_slope - alpha * beta_slope)

    def noised(self, data: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """alpha X_1 + beta eps for data and noise [B, ...]: X_t given X_1, under the base, its tilts and any model."""
        return over(self.schedule.alpha(time), data) * data + over(self.schedule.beta(time), data) * noise

    def dependence(self, start: float = 0.0) -> float:
        """alpha / beta at the time trajectories start: by how many standard deviations of X a unit of X_1 moves it."""
        time = torch.tensor(start, dtype=torch.float64, device="cpu")
        return float(self.schedule.alpha(time) / self.schedule.beta(time))

    def initial(
        self,
        shape: tuple[int, ...],
        *,
        start: float = 0.0,
        seed: int,
        row_ids: Tensor | None = None,  # [B]
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The noise that trajectories start with, beta(start) eps, of shape [B, ...].

        What alpha(start) adds to it is left out: the memoryless SDE forgets by time 1 all but alpha(start) of that, so
        that the error in X_1 is of order alpha(start)^2.

        Args:
            shape: [B, ...].
            start: the first of the times.
            seed, row_ids: a row depends on (seed, row id) only; ids are 0 .. B-1 unless given.
            dtype, device: torch's defaults unless given.
        """
        like = torch.empty(0, dtype=dtype, device=device)
        ids = _philox.row_ids_of(torch.Size(shape[:1]), like.device, row_ids)
        drawn = _philox.normals(seed, Use.START, ids, math.prod(shape[1:]), range(1))[0]
        beta = self.schedule.beta(torch.tensor(start, dtype=torch.float64, device=like.device))
        return (beta * drawn).to(like.dtype).view(shape)


@dataclasses.dataclass(frozen=True)
class AnnealedLangevin(Process):
    """Langevin dynamics on densities pi_t that change with time, and a model that predicts its control u:

        dX = (sigma^2 / 2 grad log pi_t(X) + sigma u_t(X)) dt + sigma dW

    Without a control the law of X_t lags behind pi_t. With X_0 from pi_0, the running cost -d/dt log pi_t
    (`running` of `dam.flows.lean_adjoint`) and no terminal one, paths that are tilted by e^(-cost) end in pi_1:
    Jarzynski's equality. Their X_0 is no longer from pi_0, so its law has to be learned too.

    Args:
        log_density: log pi_t(x) up to a constant, a function of states [B, ...] and times [B] that torch.func can
            differentiate, [B].
        sigma: of the noise, > 0.

    Source: Choi et al., Non-equilibrium Annealed Adjoint Sampler, arXiv 2506.18165.
    """

    log_density: Callable[[Tensor, Tensor], Tensor]
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"AnnealedLangevin: sigma must be > 0 and finite; got {self.sigma}")

    def reference(self, state: Tensor, time: Tensor) -> Tensor:
        when = for_each(time, state)
        slope = torch.func.grad(lambda x: self.log_density(x, when).sum())(state)
        return self.sigma**2 / 2 * slope

    def gain(self, time: Tensor) -> Tensor:
        return torch.full_like(time, self.sigma)

    def diffusion(self, time: Tensor) -> Tensor:
        return torch.full_like(time, self.sigma)
