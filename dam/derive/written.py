"""Functions of numpy and torch in terms of others: their derivatives are those of this source, of any order."""

from __future__ import annotations

import numpy as np
import torch

from dam.derive import runtime as rt
from dam.derive.errors import DerivativeError


def var(x, axis=None, *, ddof=0, keepdims=False):
    centred = x - np.mean(x, axis=axis, keepdims=True)
    return np.sum(centred * centred, axis=axis, keepdims=keepdims) / (rt.count(x, axis) - ddof)


def std(x, axis=None, *, ddof=0, keepdims=False):
    return np.sqrt(var(x, axis=axis, ddof=ddof, keepdims=keepdims))


def torch_var(x, dim=None, correction=1, keepdim=False):
    centred = x - torch.mean(x, dim=dim, keepdim=True)
    return rt.total(centred * centred, dim, keepdim) / (rt.count(x, dim) - correction)


def torch_std(x, dim=None, correction=1, keepdim=False):
    return torch.sqrt(torch_var(x, dim=dim, correction=correction, keepdim=keepdim))


def var_by_method(x, axis=None, *, ddof=None, keepdims=False):
    freedom = (1 if isinstance(x, torch.Tensor) else 0) if ddof is None else ddof
    centred = x - rt.expand(rt.total(x, axis, True), x, axis, True) / rt.count(x, axis)
    return rt.total(centred * centred, axis, keepdims) / (rt.count(x, axis) - freedom)


def std_by_method(x, axis=None, *, ddof=None, keepdims=False):
    return var_by_method(x, axis=axis, ddof=ddof, keepdims=keepdims) ** 0.5


def norm(x, ord=None, axis=None, keepdims=False):
    if ord is None or ord == "fro":
        return rt.total(x * x, axis, keepdims) ** 0.5
    if (axis is None and x.ndim > 1) or (isinstance(axis, (tuple, list)) and len(axis) > 1):
        raise DerivativeError("no derivative of this norm of a matrix; give one axis, or no ord for Frobenius' norm")
    if ord == 2:
        return rt.total(x * x, axis, keepdims) ** 0.5
    if ord == 0:
        raise DerivativeError("a norm that counts what is not 0 has no derivative here")
    if ord == 1:
        return rt.total(abs(x), axis, keepdims)
    if ord == np.inf or ord == -np.inf:
        raise DerivativeError("no derivative of this norm; write np.max(np.abs(x))")
    return rt.total(abs(x) ** ord, axis, keepdims) ** (1.0 / ord)


def vstack(arrays):
    return np.concatenate([np.atleast_2d(one) for one in arrays], axis=0)


def hstack(arrays):
    raised = [np.atleast_1d(one) for one in arrays]
    if raised[0].ndim == 1:
        return np.concatenate(raised, axis=0)
    return np.concatenate(raised, axis=1)


def dstack(arrays):
    return np.concatenate([np.atleast_3d(one) for one in arrays], axis=2)


def column_stack(arrays):
    return np.concatenate([np.transpose(np.atleast_2d(one)) if np.ndim(one) < 2 else one for one in arrays], axis=1)


def diff(x, n=1, axis=-1):
    at = axis % x.ndim
    before = (slice(None),) * at + (slice(None, -1),)
    after = (slice(None),) * at + (slice(1, None),)
    for _ in range(n):
        x = x[after] - x[before]
    return x


def average(x, axis=None, weights=None):
    if weights is None:
        return np.mean(x, axis=axis)
    if np.ndim(weights) != np.ndim(x):
        raise DerivativeError("no derivative of an average with weights of another shape; broadcast them first")
    return np.sum(x * weights, axis=axis) / np.sum(weights, axis=axis)


def kron(x, z):
    if x.ndim == 1 and z.ndim == 1:
        return np.reshape(np.outer(x, z), (-1,))
    if x.ndim != 2 or z.ndim != 2:
        raise DerivativeError("a derivative of kron is of two vectors or two matrices")
    blocks = x[:, None, :, None] * z[None, :, None, :]
    return np.reshape(blocks, (x.shape[0] * z.shape[0], x.shape[1] * z.shape[1]))


def cross(x, z):
    if x.shape[-1] != 3 or z.shape[-1] != 3:
        raise DerivativeError("a derivative of cross is of vectors of 3 in the last axis")
    first = x[..., 1] * z[..., 2] - x[..., 2] * z[..., 1]
    second = x[..., 2] * z[..., 0] - x[..., 0] * z[..., 2]
    third = x[..., 0] * z[..., 1] - x[..., 1] * z[..., 0]
    return np.stack([first, second, third], axis=-1)


def ptp(x, axis=None, *, keepdims=False):
    return np.max(x, axis=axis, keepdims=keepdims) - np.min(x, axis=axis, keepdims=keepdims)


def pad(x, pad_width, mode="constant", *, constant_values=0.0):
    if mode != "constant" or np.ndim(constant_values) > 0:
        raise DerivativeError("a derivative of pad is of mode='constant', with one constant")
    given = np.asarray(pad_width)
    if given.dtype.kind not in "iu" or np.min(given) < 0:
        raise DerivativeError("a derivative of pad is of a pad_width of integers, 0 or more: one, or pairs of them")
    widths = np.broadcast_to(given, (x.ndim, 2)).tolist()
    shape = [before + n + after for n, (before, after) in zip(x.shape, widths, strict=True)]
    padded = np.full(shape, constant_values, x.dtype)
    padded[tuple([slice(before, before + n) for n, (before, _) in zip(x.shape, widths, strict=True)])] = x
    return padded


def cumprod(x, axis=None):
    if axis is not None and x.ndim != 1:
        raise DerivativeError("a derivative of cumprod is of a vector, or without an axis")
    flat = np.ravel(x)
    products = []
    so_far = 1.0
    for k in range(flat.shape[0]):
        so_far = so_far * flat[k]
        products.append(so_far)
    return np.stack(products)


def sinc(x):
    at = np.pi * np.where(x == 0, 1e-20, x)
    return np.sin(at) / at


def nansum(x, axis=None, *, keepdims=False):
    return np.sum(np.where(np.isnan(x), 0.0, x), axis=axis, keepdims=keepdims)


def polyval(p, x):
    total = 0.0 * x
    for k in range(len(p)):
        total = total * x + p[k]
    return total


def append(arr, values, axis=None):
    if axis is None:
        return np.concatenate([np.ravel(arr), np.ravel(values)], axis=0)
    return np.concatenate([arr, values], axis=axis)


def select(condlist, choicelist, default=0.0):
    chosen = default
    for k in range(len(condlist) - 1, -1, -1):
        chosen = np.where(condlist[k], choicelist[k], chosen)
    return chosen


def split(ary, indices_or_sections, axis=0):
    at, size = axis % ary.ndim, ary.shape[axis]
    if isinstance(indices_or_sections, int):
        if size % indices_or_sections != 0:
            raise ValueError("array split does not result in an equal division")
        ends = [(k + 1) * (size // indices_or_sections) for k in range(indices_or_sections)]
    else:
        ends = [*indices_or_sections, size]
    parts = []
    for k in range(len(ends)):
        start = 0 if k == 0 else ends[k - 1]
        place = (slice(None),) * at + (slice(start, ends[k]),)
        parts.append(ary[place])
    return parts


def trapezoid(y, x=None, dx=1.0):
    steps = dx if x is None else diff(x)
    return np.sum(steps * (y[..., 1:] + y[..., :-1]) / 2.0, axis=-1)


def full_like(a, fill_value):
    return np.full(np.shape(a), fill_value, a.dtype)


def interp(x, xp, fp):
    """Piecewise linear, constant beyond the ends; its slope in xp is none of the supported ones."""
    xp = rt.stop_gradient(xp)
    k = np.clip(np.searchsorted(rt.stop_gradient(xp), rt.stop_gradient(x)) - 1, 0, len(xp) - 2)
    inside = np.clip(x, xp[0], xp[-1])
    share = (inside - xp[k]) / (xp[k + 1] - xp[k])
    return fp[k] * (1.0 - share) + fp[k + 1] * share


def linspace(start, stop, num=50, endpoint=True):
    if np.ndim(start) > 0 or np.ndim(stop) > 0:
        raise DerivativeError("a derivative of linspace is between two numbers")
    share = np.linspace(0.0, 1.0, num, endpoint)
    return start * (1.0 - share) + stop * share


def solve(a, b):
    return rt.matmul(rt.swapped(rt.inverse_transposed(a)), b)


def softplus(x):
    return torch.logaddexp(x, 0.0 * x)


def logsumexp(x, dim, keepdim=False):
    top = rt.stop_gradient(torch.amax(x, dim=dim, keepdim=True))
    found = torch.log(torch.sum(torch.exp(x - top), dim=dim, keepdim=True)) + top
    return found if keepdim else torch.squeeze(found, dim)


def softmax(x, dim):
    risen = torch.exp(x - rt.stop_gradient(torch.amax(x, dim=dim, keepdim=True)))
    return risen / torch.sum(risen, dim=dim, keepdim=True)


def log_softmax(x, dim):
    return x - logsumexp(x, dim, keepdim=True)


def power_slope(x, n):
    # Where n is 0 the slope is, but not its own slope in n, which is 1 / x.
    both = rt.within(x, 0.0, 0.0) * rt.within(n, 0.0, 0.0)
    return n * (x + both) ** (n - 1)


def power_log(x, n):
    if rt.integral(n):
        return 0.0 * x
    at_zero = rt.within(x, 0.0, 0.0) * rt.larger(n, 0.0)
    safe = x + at_zero
    return (1.0 - at_zero) * safe**n * rt.log(safe)
