"""A soft cap found by what came out of it: y = cap * tanh((scale * x + bias) / cap) + any number a row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_COLUMNS = 1024  # by which cap and scale are found
# Above this ratio of scale to cap, which makes tanh(4) of a 1, too little is left of the curve to tell it.
_STEEPEST = 4.0


def capped(x: Tensor, bias: Tensor, cap: float, scale: float) -> Tensor:
    return cap * torch.tanh((scale * x + bias) / cap)


def centred(y: Tensor) -> Tensor:
    """Less the mean of each row, a number that log-probabilities do not depend on: a model may return these."""
    return y - y.mean(dim=1, keepdim=True)


def candidates(
    y: Tensor,  # float64 [rows, V]
    x: Tensor,  # float64 [rows, V]
    bias: Tensor,  # float64 [V]
    size: Tensor,  # [rows, 1]
    eps: float,
) -> Iterator[tuple[float, float]]:
    """Pairs of cap and scale, the likeliest first; whether one explains y is for the caller to see, on all columns.

    The best in the sum of squares, each number of them in as few decimal digits as come within 5 standard errors of
    it: a model's own numbers have few, and are then found exactly.

    Args:
        x: numbers of which those of some row are small beside the cap, and those of another are not.
        size: what of each row may be rounding; rows of zeros, whose rounding is nothing, count in the comparison only.
        eps: of the dtype in which y was computed.
    """
    rows, columns = size[:, 0] > 0.0, slice(None, None, max(1, y.shape[1] // _COLUMNS))
    fit = _Fit(*(z.cpu() for z in (y[rows, columns], x[rows, columns], bias[columns], 1.0 / size[rows].double())))
    cap, scale, errors = fit.refined(*fit.start(), both=True)
    if not fit.is_near(cap, scale) or abs(scale) > _STEEPEST * cap:
        return
    rounding = eps / 2 + torch.finfo(torch.float32).eps  # of the cap as the model multiplied by it, and its quotients
    for some_cap in _short(cap, rounding + 5.0 * errors[0]):
        _, best, errors = fit.refined(some_cap, scale, both=False)
        inverse = [1.0 / z for z in _short(1.0 / best, rounding + 5.0 * errors[0])]
        for some_scale in (*_short(best, rounding + 5.0 * errors[0])[:-1], *inverse):
            yield some_cap, some_scale


class _Fit:
    """Least squares in rounding units of each row."""

    def __init__(self, y: Tensor, x: Tensor, bias: Tensor, per: Tensor):
        self._y, self._x, self._bias, self._per = centred(y) * per, x, bias, per

    def _rest(self, cap: float, scale: float) -> Tensor:
        return self._y - centred(capped(self._x, self._bias, cap, scale)) * self._per

    def is_near(self, cap: float, scale: float) -> bool:
        """Whether a refinement may end well; what is not finite is not near."""
        return bool((self._rest(cap, scale).abs() <= 64.0).all())

    def start(self) -> tuple[float, float]:
        """The best of some ratios of scale to cap, each with its best cap."""
        sign = math.copysign(1.0, float((centred(self._x) * self._y).sum()))
        best = (math.inf, 1.0, 1.0)
        for steepness in (2.0 ** (n / 2) for n in range(-48, 2 * int(math.log2(_STEEPEST)) + 2)):
            cap = math.inf
            for _ in range(4):  # as the bias counts by its ratio to the cap, which is not known yet
                shape = centred(torch.tanh(sign * steepness * self._x + self._bias / cap)) * self._per
                cap = max(float((shape * self._y).sum() / shape.square().sum()), 1e-30)
            best = min(best, (float((self._y - cap * shape).square().sum()), cap, sign * steepness * cap))
        return best[1:]

    def refined(self, cap: float, scale: float, *, both: bool) -> tuple[float, float, list[float]]:
        """By Gauss and Newton in the logarithms of both or of the scale alone, with the standard errors of these."""
        for _ in range(30):
            z = scale * self._x + self._bias
            slope = torch.cosh(z / cap) ** -2
            directions = [cap * torch.tanh(z / cap) - slope * z] if both else []
            directions.append(slope * scale * self._x)
            matrix = torch.stack([(centred(d) * self._per).flatten() for d in directions], dim=1)
            norms = matrix.norm(dim=0).clamp(min=1e-300)
            rest, inverse = self._rest(cap, scale).flatten(), torch.linalg.pinv(matrix / norms)
            step = (inverse @ rest / norms).nan_to_num(nan=0.0).clamp(-1.0, 1.0).tolist()
            cap, scale = cap * math.exp(step[0]) if both else cap, scale * math.exp(step[-1])
            if max(map(abs, step)) < 1e-15:
                break
        error = rest.norm() / math.sqrt(max(1, len(rest) - len(directions)))
        return cap, scale, (inverse.norm(dim=1) / norms * error).tolist()


def _short(value: float, error: float) -> list[float]:
    """Numbers within a relative error of one, fewest decimal digits first, and it itself last."""
    rounded = [float(f"{value:.{digits}e}") for digits in range(7)]
    return [*dict.fromkeys(z for z in rounded if abs(z - value) <= error * abs(value)), value]
