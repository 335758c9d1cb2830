"""Generators Q of continuous-time Markov chains on the states 0..V-1: Q[x, y] is the rate x -> y, rows sum to zero."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """At rate 1 the state is redrawn uniformly from all V, itself included: Q = 11^T / V - I.

    Args:
        size: V, the number of states.

    Raises:
        ValueError, TypeError: size is not a positive int.

    Source: Campbell et al., A Continuous Time Framework for Discrete Denoising Models, arXiv 2205.14987.
    """

    size: int

    def __post_init__(self) -> None:
        _integer("Uniform", "size", self.size, 1)


@dataclasses.dataclass(frozen=True)
class Absorbing:
    """Every state jumps to `mask_token` at rate 1 and stays there: Q[x, mask_token] = 1, Q[x, x] = -1 elsewhere.

    Args:
        size: V, the number of states, the mask token among them.
        mask_token: the absorbing state, in [0, V).

    Raises:
        ValueError, TypeError: an argument is not an int or out of range.

    Source: Campbell et al., A Continuous Time Framework for Discrete Denoising Models, arXiv 2205.14987.
    """

    size: int
    mask_token: int

    def __post_init__(self) -> None:
        _integer("Absorbing", "size", self.size, 1)
        _integer("Absorbing", "mask_token", self.mask_token, 0, self.size)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """A jump at unit rate to each nearest neighbour on a grid.

    Q is the sum over dimensions of a walk along that dimension, and symmetric. At an end that is not periodic the
    jump outward does not happen. In a periodic dimension of size 2 both neighbours are the same state, reached at
    rate 2; a dimension of size 1 has no jumps.

    Args:
        shape: points along each dimension; states are numbered with the last dimension fastest.
        periodic: whether the ends of a dimension are neighbours: one bool for all dimensions or one for each.

    Raises:
        ValueError, TypeError: shape holds no positive ints, or periodic does not fit it.
    """

    shape: Sequence[int]
    periodic: bool | Sequence[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.shape, (str, bytes)) or not isinstance(self.shape, Sequence):
            raise TypeError(f"Lattice: shape must be a sequence of ints; got {type(self.shape).__name__}")
        if not self.shape:
            raise ValueError("Lattice: shape must have at least one dimension; got ()")
        for i, length in enumerate(self.shape):
            _integer("Lattice", f"shape[{i}]", length, 1)
        periodic = self.periodic
        if isinstance(periodic, bool):
            periodic = (periodic,) * len(self.shape)
        if not isinstance(periodic, Sequence) or not all(isinstance(p, bool) for p in periodic):
            raise TypeError(f"Lattice: periodic must be a bool or one per dimension; got {periodic!r}")
        if len(periodic) != len(self.shape):
            raise ValueError(
                f"Lattice: periodic must be a bool or have {len(self.shape)} entries like shape; got {len(periodic)}"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "periodic", tuple(periodic))

    @property
    def size(self) -> int:
        """V, the number of points of the grid."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """Rates with a low-rank factorisation: Q[x, y] = sum_r left[x, r] right[r, y] for y != x.

    Q[x, x] is whatever makes row x sum to zero. The factors are kept as they are, not copied.

    Args:
        left: factor [V, R], non-negative and finite.
        right: factor [R, V] of the dtype and device of left, non-negative and finite.

    Raises:
        ValueError, TypeError: a factor has the wrong shape, dtype or device, or an entry that is negative or not
            finite; an escape rate is beyond float64.
    """

    left: Tensor  # [V, R]
    right: Tensor  # [R, V]

    def __post_init__(self) -> None:
        _matrix("LowRank", "left", self.left, "[V, R]")
        _matrix("LowRank", "right", self.right, "[R, V]")
        if self.right.shape != self.left.shape[::-1]:
            raise ValueError(
                f"LowRank: right must have shape {list(self.left.shape[::-1])} to fit left "
                f"{list(self.left.shape)}; got {list(self.right.shape)}"
            )
        if self.right.dtype != self.left.dtype:
            raise TypeError(f"LowRank: right must have the dtype of left, {self.left.dtype}; got {self.right.dtype}")
        if self.right.device != self.left.device:
            raise ValueError(f"LowRank: right must be on {self.left.device} like left; got {self.right.device}")
        _finite("LowRank", "left", self.left)
        _finite("LowRank", "right", self.right)
        for name, factor in (("left", self.left), ("right", self.right)):
            _first_bad("LowRank", f"{name} must be non-negative", factor, factor < 0)
        escape = self.left.detach().double() @ self.right.detach().double().sum(dim=1)
        if not bool(torch.isfinite(escape).all()):
            row = int((~torch.isfinite(escape)).nonzero()[0])
            raise ValueError(f"LowRank: left @ right must have finite row sums; got {float(escape[row])} in row {row}")

    @property
    def size(self) -> int:
        """V, the number of states."""
        return self.left.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """Any generator, as a matrix. It is kept as it is, not copied.

    Args:
        matrix: Q [V, V]: finite, non-negative off the diagonal; each row sums to zero within
            (8 + sqrt(V)) epsilons of the matrix's dtype times its escape rate. Ops take the escape rate from the
            entries off the diagonal, which makes the sum exact.

    Raises:
        ValueError, TypeError: matrix has the wrong shape or dtype, an entry that is not finite, a negative rate, or
            a row that does not sum to zero.
    """

    matrix: Tensor  # [V, V]

    def __post_init__(self) -> None:
        _matrix("Dense", "matrix", self.matrix, "[V, V]")
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"Dense: matrix must have shape [V, V]; got {list(self.matrix.shape)}")
        _finite("Dense", "matrix", self.matrix)
        rates = self.matrix.detach().double().clone()
        diagonal = rates.diagonal().clone()
        rates.fill_diagonal_(0.0)
        _first_bad("Dense", "matrix must be non-negative off the diagonal", self.matrix, rates < 0)
        escape = rates.sum(dim=1)
        if not bool(torch.isfinite(escape).all()):
            row = int((~torch.isfinite(escape)).nonzero()[0])
            raise ValueError(f"Dense: matrix must have finite escape rates; got {float(escape[row])} in row {row}")
        tolerance = torch.finfo(self.matrix.dtype).eps * (8 + math.sqrt(self.size)) * escape
        bad = (escape + diagonal).abs() > tolerance
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            total = float(escape[row] + diagonal[row])
            raise ValueError(f"Dense: matrix must have rows that sum to zero; got {total:g} in row {row}")

    @property
    def size(self) -> int:
        """V, the number of states."""
        return self.matrix.shape[0]


Generator = Uniform | Absorbing | Lattice | LowRank | Dense


def _integer(owner: str, name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int; got {type(value).__name__}")
    if value < low or (high is not None and value >= high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{owner}: {name} must be {allowed}; got {value}")


def _matrix(owner: str, name: str, value: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{owner}: {name} must be float32, bfloat16, float16 or float64; got {value.dtype}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{owner}: {name} must have shape {shape} with no empty dimension; got {list(value.shape)}")


def _finite(owner: str, name: str, value: Tensor) -> None:
    _first_bad(owner, f"{name} must be finite", value, ~torch.isfinite(value))


def _first_bad(owner: str, needs: str, value: Tensor, bad: Tensor) -> None:
    if bool(bad.any()):
        i, j = (int(k) for k in bad.nonzero()[0])
        raise ValueError(f"{owner}: {needs}; got {float(value[i, j])} at [{i}, {j}]")
