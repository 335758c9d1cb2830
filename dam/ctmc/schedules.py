"""Schedules alpha(t): what is left of the data, from noise at time 0 to all of it at time 1; or what is unmasked."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Schedule(abc.ABC):
    """An increasing function alpha on [0, 1] with alpha(1) = 1; alpha(0) = 0 but where a schedule says otherwise."""

    @abc.abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """Expected unmasked fraction at `time`."""

    @abc.abstractmethod
    def derivative(self, time: Tensor) -> Tensor:
        """d alpha / dt at `time`."""

    @abc.abstractmethod
    def inverse(self, alpha: Tensor) -> Tensor:
        """The time at which the unmasked fraction is `alpha`."""

    def unmasking_rate(self, time: Tensor) -> Tensor:
        """Rate at which one masked position unmasks, alpha' / (1 - alpha)."""
        return self.derivative(time) / (1 - self.alpha(time))


def sampled(start: float, end: float) -> Tensor:
    """Times at which bounds on an interval look at a schedule, float64 [257]."""
    return torch.linspace(start, end, 257, dtype=torch.float64, device="cpu")


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """alpha(t) = t."""

    def alpha(self, time: Tensor) -> Tensor:
        return time

    def derivative(self, time: Tensor) -> Tensor:
        return torch.ones_like(time)

    def inverse(self, alpha: Tensor) -> Tensor:
        return alpha


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha(t) = 1 - cos(pi t / 2): slow while little is known, fast at the end."""

    def alpha(self, time: Tensor) -> Tensor:
        return 1 - torch.cos(time * math.pi / 2)

    def derivative(self, time: Tensor) -> Tensor:
        return torch.sin(time * math.pi / 2) * math.pi / 2

    def inverse(self, alpha: Tensor) -> Tensor:
        return torch.acos(1 - alpha) * 2 / math.pi


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """alpha(t) = least^(1 - t): noise at a constant rate, log(1 / least), and alpha(0) = least.

    Source: Campbell et al., A Continuous Time Framework for Discrete Denoising Models, arXiv 2205.14987.
    """

    least: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise ValueError(f"Geometric: least must be in (0, 1); got {self.least}")

    def alpha(self, time: Tensor) -> Tensor:
        return torch.exp((1 - time) * math.log(self.least))

    def derivative(self, time: Tensor) -> Tensor:
        return -math.log(self.least) * self.alpha(time)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - alpha.log() / math.log(self.least)


@dataclasses.dataclass(frozen=True)
class UserSchedule(Schedule):
    """A schedule from a function of yours; its inverse by Newton's method, safeguarded by bisection, in float64.

    Args:
        function: alpha, an increasing function of a tensor of times.
        slope: its derivative, of a tensor too; by autograd, which must be able to follow alpha, unless given.

    Raises:
        ValueError: alpha does not increase from at least 0 at time 0 to 1 at time 1, jumps, or has values that are
            none; its value at one time depends on what other times the tensor has; or the slope is not its derivative.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        called = f"{type(self).__name__}: {getattr(self.function, '__name__', self.function)}"
        times = torch.linspace(0, 1, 129, dtype=torch.float64, device="cpu")
        try:
            values = self.function(times)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{called} takes no tensor of times ({error}); write it in torch's functions") from error
        if not isinstance(values, Tensor) or values.shape != times.shape:
            given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{called} must give a value for each time of a tensor [129]; got {given}")
        if bool(values.isnan().any()):
            raise ValueError(f"{called} is not a number at time {float(times[values.isnan()][0]):g}")
        if not bool((values.diff() > 0).all()) or abs(float(values[-1]) - 1) > 1e-6 or float(values[0]) < 0:
            raise ValueError(
                f"{called} is no schedule: alpha must increase on [0, 1], from at least 0 at time 0 to 1 at time 1; "
                f"got {float(values[0]):g} at 0, {float(values[-1]):g} at 1, least step {float(values.diff().min()):g}"
            )
        alone = torch.cat([self.function(one) for one in times.split(1)])
        # Vectors round as numbers do, or nearly.
        if not all(torch.allclose(v, values, 0.0, 1e-9) for v in (alone, self.function(times.flip(0)).flip(0))):
            raise ValueError(f"{called} must be of each time alone; what it gives depends on the tensor's other times")
        self._check_slope(called, times)

    def _check_slope(self, called: str, times: Tensor) -> None:
        """That the slope is nowhere negative and adds up to alpha: Gauss' rule, on halves where it does not suffice."""
        nodes, weights = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(5))
        low, high, missing = times[:-1], times[1:], 0.0
        while len(low):
            middle = (low + high) / 2
            inside = middle[:, None] + (high - low)[:, None] * nodes
            slopes = self.derivative(inside.reshape(-1)).reshape(inside.shape)
            # Of numbers next to each other what is between is one of them, where the slope need not be finite.
            whole = (middle > low) & (middle < high)
            wrong = ~(slopes >= -1e-9) & whole[:, None]
            if bool(wrong.any()):
                at, slope = float(inside[wrong][0]), float(slopes[wrong][0])
                raise ValueError(f"{called} is no schedule: its slope at time {at:g} is {slope:g}; alpha must increase")
            gap = (self.function(high) - self.function(low) - (high - low) * (slopes * weights).sum(1)).abs()
            gap = torch.where(gap.isfinite(), gap, self.function(high) - self.function(low))
            rough = (gap > 1e-5) & whole
            missing += float(gap[~rough].sum())
            if missing > 1e-3:
                at, most = float(middle[~rough][gap[~rough].argmax()]), float(gap[~rough].max())
                raise ValueError(
                    f"{called} is no schedule: near time {at:g} alpha changes by {most:g} more than its slope says; it "
                    "jumps, or the slope is not its derivative"
                )
            low, high = (
                torch.cat([low[rough], middle[rough]]),
                torch.cat([middle[rough], high[rough]]),
            )

    def alpha(self, time: Tensor) -> Tensor:
        return self.function(time).clamp(max=1.0)  # rounding of the function must not make probabilities negative

    def derivative(self, time: Tensor) -> Tensor:
        if self.slope is not None:
            return self.slope(time)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = time.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return slope

    def unmasking_rate(self, time: Tensor) -> Tensor:
        alpha = self.alpha(time)
        # At alpha = 1 the limit, also of a slope of 0 there.
        return torch.where(alpha == 1, torch.inf, self.derivative(time) / (1 - alpha))

    def inverse(self, alpha: Tensor) -> Tensor:
        wanted, eps = alpha.double(), torch.finfo(torch.float64).eps
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        time, last, quick = (low + high) / 2, high - low, torch.zeros_like(wanted, dtype=torch.bool)
        for _ in range(128):
            missing = self.function(time) - wanted
            low, high = torch.where(missing < 0, time, low), torch.where(missing < 0, high, time)
            newton = missing / self.derivative(time)
            slower = ~(newton.abs() <= last.abs() / 2)  # also where it is no number
            # Newton's steps that are small and do not become smaller are of the function's rounding.
            settled = (
                missing.isnan()
                | (missing == 0)
                | (newton.abs() <= eps / 2 * time)
                | (quick & slower & (last.abs() <= 1e-8 * time))
            )
            if bool(settled.all()):
                break
            quick = ~(slower | (time - newton < low) | (time - newton > high)) | settled
            # Bounds of other sizes are halved in their logarithm: 1e-30 is a time of alpha = t^0.1 as any other.
            wide = torch.where(low > 0, low.sqrt() * high.sqrt(), torch.minimum(high * high, high / 2))
            middle = torch.where(high > 4 * low, wide, (low + high) / 2)
            following = torch.where(settled, time, torch.where(quick, time - newton, middle))
            last, time = time - following, following
        return torch.where(wanted.isnan(), wanted, time).to(alpha.dtype)


class Slope:
    """The derivative of a function of times, written by `dam.derive` from the function's source.

    Args:
        function: a function of one tensor of times.

    Attributes:
        source: the derivative's text, which says in its first line what it is the derivative of.

    Raises:
        ValueError: the function takes something else; or (a `DerivativeError`, with the line) its source cannot be got
            or has no derivative.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        from dam import derive  # not before it is needed

        self.function = function
        self._tangent = derive.autodiff(function, "forward")
        _, *tangents = inspect.signature(self._tangent).parameters
        if (given := len(inspect.signature(function).parameters)) != 1:
            raise ValueError(f"define: {function.__name__} must be of the time alone; it has {given} parameters")
        self._direction = tangents[0]
        code = function.__code__
        self.source = f"# {function.__name__}, {code.co_filename}:{code.co_firstlineno}\n{derive.source(self._tangent)}"

    def __call__(self, time: Tensor) -> Tensor:
        return self._tangent(time, **{self._direction: torch.ones_like(time)})

    def __reduce__(self) -> tuple[type[Slope], tuple[Callable[[Tensor], Tensor]]]:
        return Slope, (self.function,)  # written again where it is loaded


def define(alpha: Callable[[Tensor], Tensor]) -> UserSchedule:
    """A schedule from a function alpha(t) of a few lines, whose derivative is written from its source.

        smooth = define(lambda t: t**2 * (3 - 2 * t))
        process = MaskedCTMC(mask_token, smooth)
        print(smooth.slope.source)

    The hazard alpha' / (1 - alpha) is the schedule's `unmasking_rate`.

    Args:
        alpha: a function of one tensor of times, of arithmetic and torch's functions; torch.where for branches.

    Raises:
        ValueError: it is no schedule, as for `UserSchedule`, or has no derivative that can be written, as for `Slope`.
    """
    return UserSchedule(alpha, Slope(alpha))
