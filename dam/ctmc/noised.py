"""Chains that undo noise which was put on each coordinate by itself: the time reversals of CTMCs that noise data."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import warnings

import torch
from torch import Tensor

from dam import generators
from dam.ctmc.schedules import Geometric, Schedule, sampled

PREDICTS = ("data", "ratio")
# Largest total variation between X_0 given X_1 and X_0 alone that passes without a word, and that passes at all.
INDEPENDENT, TOLERATED = 1e-3, 0.05
_NONE = 1e-290  # a probability that is none: one over it still fits float64


@dataclasses.dataclass(frozen=True)
class NoisedCTMC(abc.ABC):
    """The time reversal of a chain that noises each of L coordinates with values 0 .. V-1 by itself.

        u_t(y, x) = beta_t Q[v, x_i] p_t(y) / p_t(x),      beta_t = alpha'(t) / alpha(t)
        p_t(y) / p_t(x) = sum_w p(X_1^i = w | x) K_t[w, v] / K_t[w, x_i],      K_t = exp(-log(alpha(t)) Q)

    for y = x with coordinate i moved to v, Q being the generator of the noise (`generator`): alpha(t) is what is left
    of the data at time t. A reversal forgets where it started: X_0 and X_1 are independent, up to alpha(0), which
    is what Discrete Adjoint Matching asks of a base. (Rates kappa' / (1 - kappa) p(v | i, x) have the same marginals,
    but X_1 depends on X_0 under them.)

    A model maps tokens [B, L] and times [B] to numbers [B, L, V], whose meaning `predicts` says.

    Args:
        size: V.
        schedule: alpha(t), positive at time 0.
        predicts: "data": logits of p(X_1^i = w | x); "ratio": log p_t(y) / p_t(x), 0 for the noise itself.

    Raises:
        ValueError: an argument is out of range, or X_0 and X_1 are far from independent under the chain.

    Source: reversal: Campbell et al., A Continuous Time Framework for Discrete Denoising Models, arXiv 2205.14987,
    Prop. 1; ratios: Lou et al., arXiv 2310.16834; independence: So et al., arXiv 2602.07132, Thm. 2.1.
    """

    size: int
    schedule: Schedule = dataclasses.field(default_factory=Geometric)
    predicts: str = "data"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.size, int) or self.size < 2:
            raise ValueError(f"{name}: size must be an int, at least 2; got {self.size!r}")
        if self.predicts not in PREDICTS:
            raise ValueError(f"{name}: predicts must be one of {', '.join(PREDICTS)}; got {self.predicts!r}")
        left = float(self.schedule.alpha(torch.zeros((), dtype=torch.float64, device="cpu")))
        if not 0 < left < 1:
            raise ValueError(
                f"{name}: alpha(0) must be in (0, 1), as the noise is infinite where nothing is left of the data; "
                f"got {left:g}. Use a Geometric schedule, or one that starts later"
            )
        dependence = self.dependence()
        measured = f"X_0 and X_1 are dependent, by a total variation of {dependence:.2g} for a coordinate"
        if dependence > TOLERATED:
            raise ValueError(
                f"{name}: {measured}, where Discrete Adjoint Matching needs independence; lower alpha(0) = {left:.2g}"
            )
        if dependence > INDEPENDENT:
            warnings.warn(f"{name}: {measured}; a lower alpha(0) than {left:.2g} makes it less", stacklevel=3)

    @property
    @abc.abstractmethod
    def generator(self) -> generators.Generator:
        """Q of the noise on one coordinate; symmetric, so that its stationary law is uniform."""

    @abc.abstractmethod
    def kernel(self, time: Tensor) -> Tensor:
        """K_t[w, v] = P(X_t^i = v | X_1^i = w) for times [...], float64 [..., V, V]."""

    @abc.abstractmethod
    def noise_rates(self, tokens: Tensor) -> Tensor:
        """Q[v, x_i] for every v, 0 at v = x_i, float64 [..., V] for tokens [...]."""

    def noise_left(self, time: Tensor) -> Tensor:
        """sigma(t) = -log alpha(t), the duration of the noise between time t and the data."""
        return -self.schedule.alpha(time.double()).log()

    def noise_speed(self, time: Tensor) -> Tensor:
        """beta_t = alpha'(t) / alpha(t), at which that duration falls."""
        time = time.double()
        return self.schedule.derivative(time) / self.schedule.alpha(time)

    def dependence(self) -> float:
        """Largest total variation between a coordinate of X_0 given X_1 and its stationary law."""
        kernel = self.kernel(torch.zeros((), dtype=torch.float64, device="cpu"))
        return float((kernel - 1.0 / self.size).abs().sum(dim=1).max() / 2)

    def initial(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """X_0 drawn from the stationary law: int64 tokens of that shape."""
        device = None if generator is None else generator.device
        return torch.randint(self.size, shape, generator=generator, device=device)

    def noise(self, final: Tensor, time: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """X_t given X_1 = final [B, L] at times [B]: independent coordinates, v with probability K_t[x_i, v].

        The bridge of the chain, of its optimum p*, and of any model that X_0 and X_1 are independent under.
        """
        rows = self.kernel(time.to(final.device))[torch.arange(len(final), device=final.device)[:, None], final]
        return torch.multinomial(rows.flatten(0, 1), 1, generator=generator).view(final.shape)

    def log_rates(self, prediction: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """log u_t(y, x) of a model's prediction [B, L, V] at tokens [B, L] and times [B], float64 [B, L, V].

        -inf where y = x, and where the noise has no such jump.
        """
        noise = (self.noise_speed(time)[:, None, None] * self.noise_rates(tokens)).log()
        if self.predicts == "ratio":
            return noise + prediction.double()
        return noise + self._log_ratio(prediction.double().log_softmax(dim=2), tokens, time)

    def _log_ratio(self, log_data: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """log sum_w p(w) K[w, v] / K[w, x_i] for log p [B, L, V]."""
        kernel = self.kernel(time)  # [B, V, V]
        at = kernel.transpose(1, 2)[torch.arange(len(tokens), device=tokens.device)[:, None], tokens]  # K[w, x_i]
        # What cannot have become x_i has no probability under a model of the data given x.
        weight = torch.where(at > _NONE, log_data.exp() / at, 0.0)
        return (weight @ kernel).log()

    def escape_bound(self, start: float, end: float, length: int) -> float:
        """What no escape rate of L = `length` coordinates exceeds on [start, end], for models that predict data.

        For schedules whose speed changes by less than 5% within 1/256 of the interval; infinite if no noise is left.

        A coordinate's is beta_t (q + d/d sigma log sum_w p(w) K[w, x_i]) at most, q its escape rate of the noise, and
        that is largest for one w: d/d sigma log K[w, x], which falls with the noise. Bounds at both ends serve for
        what lies between.
        """
        times = torch.tensor([start, end], dtype=torch.float64, device="cpu")
        if float(self.noise_left(times).min()) <= 0:
            return math.inf
        speed = float(self.noise_speed(sampled(start, end)).max())
        kernel = self.kernel(times)
        towards = kernel @ self._rates(times.device)
        ratio = torch.where(kernel > 0, towards / kernel, 0.0)
        return 1.05 * length * speed * float(ratio.max())

    def _rates(self, device: torch.device) -> Tensor:
        """Q[v, x] with a diagonal of 0, float64 [V, V]."""
        return self.noise_rates(torch.arange(self.size, device=device)).t()


@dataclasses.dataclass(frozen=True)
class UniformCTMC(NoisedCTMC):
    """The reversal of uniform noise: at time t a coordinate is the data's with probability alpha(t), else uniform.

        p_t(x_i | X_1^i) = alpha(t) 1[x_i = X_1^i] + (1 - alpha(t)) / V

    the mixture path. Arguments, errors and sources are those of `NoisedCTMC`.
    """

    @property
    def generator(self) -> generators.Uniform:
        return generators.Uniform(self.size)

    def kernel(self, time: Tensor) -> Tensor:
        left = self.schedule.alpha(time.double())[..., None, None]
        eye = torch.eye(self.size, dtype=torch.float64, device=time.device)
        return left * eye + (1 - left) / self.size

    # Of a language model's vocabulary too, so without an array [V, V].

    def dependence(self) -> float:
        return float(self.schedule.alpha(torch.zeros((), dtype=torch.float64, device="cpu"))) * (1 - 1 / self.size)

    def noise(self, final: Tensor, time: Tensor, generator: torch.Generator | None = None) -> Tensor:
        left = self.schedule.alpha(time.to(final.device))[:, None]
        kept = torch.rand(final.shape, generator=generator, dtype=torch.float32, device=final.device) < left
        drawn = torch.randint(self.size, final.shape, generator=generator, device=final.device)
        return torch.where(kept, final, drawn)

    def noise_rates(self, tokens: Tensor) -> Tensor:
        values = torch.arange(self.size, device=tokens.device)
        return (values != tokens[..., None]).double() / self.size

    def _log_ratio(self, log_data: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        # K has two values: sum_w p(w) K[w, v] / K[w, x_i] in closed form, without an array [V, V].
        left = self.schedule.alpha(time.double())[:, None, None]
        other, same = (1 - left) / self.size, left + (1 - left) / self.size
        data = log_data.exp()
        at = data.gather(2, tokens[..., None])  # p(x_i)
        # w = v: K[v, v]; w = x_i: K[x_i, x_i] below the line; every other w: 1.
        ratio = data * (same / other) + at * (other / same) + (1 - data - at).clamp(min=0.0)
        return ratio.log()

    def escape_bound(self, start: float, end: float, length: int) -> float:
        """beta_t (1 / (1 - alpha) - 1 / V) for a coordinate that is wrong for certain; it is largest at an end."""
        times = sampled(start, end)
        left = self.schedule.alpha(times)
        if float(left.max()) >= 1:
            return math.inf
        speed, wrong = self.noise_speed(times).max(), (1 / (1 - left) - 1 / self.size).max()
        return 1.05 * length * float(speed * wrong)


# Largest mean of the Poisson law whose terms make a walk's kernel: a walk has been at every point of a line by then, or
# the line is so long that it has not forgotten where it started.
_SERIES = 128.0


@functools.lru_cache(maxsize=8)
def _walk(size: int, periodic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of a walk's generator Q: powers of I + Q / 2, float64 [K, V, V], eigenvalues [V] and eigenvectors [V, V]."""
    eye = torch.eye(size, dtype=torch.float64, device="cpu")
    rates = LatticeCTMC.neighbours(torch.arange(size, device="cpu"), size, periodic)
    q = rates - torch.diag(rates.sum(dim=1))
    step = eye + q / 2
    powers = [eye]
    # Beyond, the mass of the Poisson law is below 1e-16.
    for _ in range(int(_SERIES + 12 * _SERIES**0.5) + 16):
        powers.append(powers[-1] @ step)
    values, vectors = torch.linalg.eigh(q)
    return torch.stack(powers), values, vectors


@dataclasses.dataclass(frozen=True)
class LatticeCTMC(NoisedCTMC):
    """The reversal of a walk to nearest neighbours: each coordinate is a point of a line of V points, or of a cycle.

    L coordinates are a grid of L dimensions. Models had better predict ratios: at little noise p(X_1^i = w | x) of
    points w that are far from x_i would have to be accurate to many digits.

    Args:
        size, schedule, predicts: as for `NoisedCTMC`. A walk needs a time of the order of V^2 to forget: alpha(0)
            is exp(-that time).
        periodic: whether the ends are neighbours.
    """

    periodic: bool = False

    @property
    def generator(self) -> generators.Lattice:
        return generators.Lattice((self.size,), self.periodic)

    def kernel(self, time: Tensor) -> Tensor:
        duration = self.noise_left(time)
        powers, values, vectors = (x.to(time.device) for x in _walk(self.size, self.periodic))
        # Where little noise is left, sum_k Poisson(k; 2 sigma) P^k with P = I + Q / 2: no term is negative, so entries
        # of 10^-30 are accurate too. Else by eigenvectors, to 1e-16 of entries that are all about 1 / V by then.
        mean = (2 * duration).clamp(max=_SERIES)
        k = torch.arange(len(powers), dtype=torch.float64, device=time.device)
        weight = torch.exp(torch.xlogy(k, mean[..., None]) - mean[..., None] - torch.lgamma(k + 1))
        series = (weight @ powers.flatten(1)).unflatten(-1, (self.size, self.size))
        spectral = (vectors * torch.exp(duration[..., None] * values)[..., None, :]) @ vectors.t()
        return torch.where((2 * duration > _SERIES)[..., None, None], spectral, series)

    def noise_rates(self, tokens: Tensor) -> Tensor:
        return self.neighbours(tokens, self.size, self.periodic)

    @staticmethod
    def neighbours(tokens: Tensor, size: int, periodic: bool) -> Tensor:
        """Rates from points [...] to every point, float64 [..., V]."""
        distance = (torch.arange(size, device=tokens.device) - tokens[..., None]).abs()
        if periodic:
            if size == 2:  # both neighbours are the same point
                return 2.0 * (distance == 1).double()
            distance = torch.minimum(distance, size - distance)
        return (distance == 1).double()
