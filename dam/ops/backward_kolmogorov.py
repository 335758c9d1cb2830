"""backward_kolmogorov: expectations of a terminal value from every state at once, the discrete adjoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from dam import generators
from dam.backends import address, choice, cpu, cuda, triton
from dam.ops import _checks, _op, _rows


def backward_kolmogorov(
    generator: generators.Generator,
    terminal: Tensor,  # [..., V]
    duration: float,
    *,
    tol: float = 1e-6,
) -> Tensor:
    """Solves the backward Kolmogorov equation of a chain over all V states, `duration` before the end.

        result[b, x] = sum_y exp(duration Q)[x, y] terminal[b, y] = E[terminal[b, X_1] | X_t = x],    duration = 1 - t

    Terminal values e^{-g} give the discrete adjoint up to the factor e^{g(X_1)}. A schedule that multiplies Q by
    a function of time enters as its integral: pass that as the duration.

    Accuracy: with E = exp(duration Q),

        |result - E terminal| <= tol (E |terminal|) + tol 1e-30 max_y |terminal[b, y]|

    in every entry, so a non-negative terminal has relative error tol in each entry above 1e-30 of its row's
    maximum, however far from the mass it lies. Nothing is ever subtracted: non-negative terminals give
    non-negative results. Besides tol there are the rounding of the result to its dtype, and that of float64:
    below 1e-13 for Uniform and Absorbing and below 1e-11 for Lattice, relative to E |terminal|; for LowRank and
    Dense it grows as 1e-15 duration times the largest escape rate, until the chain has mixed.

    Cost per row: V for Uniform and Absorbing. For Lattice V min(10 + 13 sqrt(duration), length) per dimension,
    about. For LowRank and Dense as many products with Q as there are jumps at the largest escape rate, plus some
    dozens; or, where that is cheaper and V^2 numbers fit DAM_WORKSPACE_MB, exp(duration Q) by repeated squaring.

    Args:
        generator: of `dam.generators`, with V states; its tensors on terminal's device. It is not differentiated.
        terminal: value of each final state [..., V], differentiable; any row stride, unit inner stride. A row with
            an entry that is not finite comes out NaN throughout.
        duration: time left, >= 0 and finite. 0 copies terminal.
        tol: error bound above, in [1e-12, 0.1].

    Returns:
        [..., V], float32 (float64 for float64 terminal). The gradient is exp(duration Q)^T times the upstream one,
        to the same accuracy, in terminal's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, dtype, device or range, or the duration is
            so long that LowRank or Dense would need more than 10^9 products.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Thm 2.2 and Prop. 2.3.
    """
    op = "backward_kolmogorov"
    kind, tensors, sizes = _pieces(generator)
    terminal, lead = _checks.rows(op, "terminal", terminal, "V")
    if terminal.shape[1] != generator.size:
        got = [*lead, terminal.shape[1]]
        raise ValueError(f"{op}: terminal must have shape [..., {generator.size}] to fit the generator; got {got}")
    for tensor in tensors:
        _checks.same_device(op, "generator", tensor, terminal)
    duration = _checks.number(op, "duration", duration, 0.0, _checks.LARGEST)
    tol = _checks.number(op, "tol", tol, 1e-12, 0.1)
    # Products on tensor cores: 8.5 ms where the CUDA kernels take 14.0 (benchmarks/notes.md).
    first = "triton" if kind == "lattice" and triton.why_unavailable() is None else None
    backend = choice.choose(op, _IMPLEMENTATIONS, terminal, first=first)
    result = _backward_kolmogorov(terminal, kind, tensors, sizes, duration, tol, False, backend)
    return _rows.unflattened(result, lead)


def _pieces(generator: generators.Generator) -> tuple[str, list[Tensor], list[int]]:
    """The generator as an operator's schema can carry it: kind, tensors, integers.

    At least one integer: autograd takes an empty list of them for one of tensors.
    """
    if isinstance(generator, generators.Uniform):
        return "uniform", [], [generator.size]
    if isinstance(generator, generators.Absorbing):
        return "absorbing", [], [generator.mask_token]
    if isinstance(generator, generators.Lattice):
        periodic = cast("Sequence[bool]", generator.periodic)  # of a Lattice that was made, always
        return "lattice", [], [*generator.shape, *(int(p) for p in periodic)]
    if isinstance(generator, generators.LowRank):
        return "low_rank", [generator.left.detach(), generator.right.detach()], [generator.size]
    if isinstance(generator, generators.Dense):
        return "dense", [generator.matrix.detach()], [generator.size]
    raise TypeError(
        "backward_kolmogorov: generator must be Uniform, Absorbing, Lattice, LowRank or Dense of dam.generators; "
        f"got {type(generator).__name__}"
    )


# float64 states between the dimensions of a lattice on a GPU, which should stay in the L2 cache.
_LATTICE_CHUNK_BYTES = 32 * 2**20

# Advances float64 rows [n, V] by the whole duration.
Advance = Callable[[Tensor], Tensor]
# Filters each line of float64 [outer, length, inner] along its middle dimension: periodic, taps.
Filter = Callable[[Tensor, bool, list[float]], Tensor]


def _torch(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    return in_float64(terminal, kind, tensors, sizes, duration, tol, transpose, _filter)


def in_float64(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
    filter_lines: Filter,
) -> Tensor:
    """The op in float64, some rows at a time, with a backend's filter for lattices."""
    result = outputs(terminal)
    if duration == 0.0:
        return result.copy_(terminal)
    rows, columns = terminal.shape
    tail = tail_of(tol, columns)
    if kind == "uniform":
        advance = _uniform(duration)
    elif kind == "absorbing":
        advance = _absorbing(sizes[0], duration, transpose)
    elif kind == "lattice":
        advance = _lattice(sizes, duration, tail, filter_lines)
    elif kind == "low_rank":
        advance = _low_rank(tensors[0].double(), tensors[1].double(), duration, tail, transpose, rows)
    else:
        advance = _dense(tensors[0].double(), duration, tail, transpose, rows)
    for part in _rows.chunks(rows, columns * _rows.REFERENCE_BYTES):
        state = terminal[part].double()
        finite = torch.isfinite(state).all(dim=1, keepdim=True)
        result[part] = torch.where(finite, advance(state), torch.nan)
    return result


def _uniform(duration: float) -> Advance:
    # Q has the eigenvalues 0 and -1, so exp(t Q) = e^-t I + (1 - e^-t) 11^T / V.
    stays, moves = math.exp(-duration), -math.expm1(-duration)
    return lambda state: stays * state + moves * state.mean(dim=1, keepdim=True)


def _absorbing(mask_token: int, duration: float, transpose: bool) -> Advance:
    stays, moves = math.exp(-duration), -math.expm1(-duration)

    def advance(state: Tensor) -> Tensor:
        mask = state[:, mask_token].clone()
        if transpose:
            others = state.index_fill(1, torch.tensor([mask_token], device=state.device), 0.0)
            result = stays * state
            result[:, mask_token] = mask + moves * others.sum(dim=1)
        else:
            result = stays * state + moves * mask[:, None]
            result[:, mask_token] = mask
        return result

    return advance


# ---- Lattice: a filter along each dimension


def _lattice(sizes: list[int], duration: float, tail: float, filter_lines: Filter) -> Advance:
    """exp of a sum over dimensions of commuting walks: one walk after the other. Symmetric, so its own transpose."""
    steps = walks(sizes, duration, tail)

    def advance(state: Tensor) -> Tensor:
        rows, columns = state.shape
        for length, inner, wraps, weights in steps:
            lines = state.reshape(rows * columns // (length * inner), length, inner)
            if weights is None:
                state = lines.mean(dim=1, keepdim=True).expand(lines.shape)
            elif len(weights) > 1:
                state = filter_lines(lines, wraps, weights)
            state = state.reshape(rows, columns)
        return state

    return advance


def walks(sizes: list[int], duration: float, tail: float) -> list[tuple[int, int, bool, list[float] | None]]:
    """Of each dimension: its length, the distance of neighbours, whether it is periodic, and the walk's weights."""
    dims = len(sizes) // 2
    inner, result = math.prod(sizes[:dims]), []
    for length, periodic in zip(sizes[:dims], sizes[dims:], strict=True):
        inner //= length
        result.append((length, inner, bool(periodic), _walk_taps(length, bool(periodic), duration, tail / dims)))
    return result


def weighted_walks(
    columns: int, sizes: list[int], duration: float, tol: float
) -> list[tuple[int, int, bool, list[float]]]:
    """What `walks` gives, equal weights written out and walks that stay where they are left out; at least one."""
    result = []
    for length, inner, periodic, weights in walks(sizes, duration, tail_of(tol, columns)):
        if weights is None:  # equal: those of a cycle, whose opposite point is reached from both sides
            periodic, weights = True, [1 / length] * (length // 2 + 1)
            weights[-1] /= 2 - length % 2
        if len(weights) > 1:
            result.append((length, inner, periodic, weights))
    return result or [(columns, 1, False, [1.0])]


def tail_of(tol: float, columns: int) -> float:
    """What is neglected, as a share of the largest entry. The transpose bounds sums rather than entries: hence V."""
    return tol * 1e-30 / columns


def _walk_taps(length: int, periodic: bool, duration: float, tail: float) -> list[float] | None:
    """Weights w[0..radius] of the walk on a line: new[i] = w[0] old[i] + sum_k w[k] (old[i+k] + old[i-k]).

    A line with two ends is a cycle of twice its length, folded: past an end, old is mirrored. On the integers the
    walk's displacement is k with probability e^{-2t} I_k(2t) (a difference of two Poisson variables), on a cycle with
    the sum of that over all k that wrap to the same point. Only weights that sum to less than `tail` are neglected.
    None stands for equal weights: the walk has forgotten where it started.
    """
    cycle = length if periodic else 2 * length
    if length == 1:
        return [1.0]
    # Relative to equal weights the error is at most cycle * e^{-100}.
    if duration * 4 * math.sin(math.pi / cycle) ** 2 > 100:
        return None
    x = 2 * duration

    def chernoff(k: int) -> float:
        return 2 * math.exp(k * (k / (math.hypot(x, k) + x) - math.asinh(k / x)))

    low, high = 0, 1  # P(|displacement| >= high) <= tail
    while chernoff(high) > tail:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chernoff(middle) > tail else (low, middle)
    # I_{k-1}(x) = I_{k+1}(x) + 2k/x I_k(x) downward, where it only adds (Miller); the sum is 1. Its start's error
    # is gone, relative to the weights, a few steps below `high`.
    weights = [0.0] * (high + 2)
    weights[high] = 1e-200
    for k in range(high, 0, -1):
        weights[k - 1] = weights[k + 1] + 2 * k / x * weights[k]
    weights = weights[:high]
    total = weights[0] + 2 * math.fsum(weights[1:])
    weights = [w / total for w in weights]
    radius = min(high - 1, cycle // 2)
    if 2 * (high - 1) >= cycle:
        wrapped = [0.0] * cycle
        for k in range(1 - high, high):
            wrapped[k % cycle] += weights[abs(k)]
        weights = wrapped[: radius + 1]
        if 2 * radius == cycle:
            weights[radius] /= 2  # one point, reached from both sides
    return weights


def _filter(lines: Tensor, periodic: bool, taps: list[float]) -> Tensor:
    length, radius = lines.shape[1], len(taps) - 1
    index = torch.arange(-radius, length + radius, device=lines.device)
    if periodic:
        index = index % length
    else:
        index = index % (2 * length)
        index = torch.minimum(index, 2 * length - 1 - index)
    extended = lines.index_select(1, index)
    result = taps[0] * lines
    for k in range(1, radius + 1):
        both = extended[:, radius + k : radius + k + length] + extended[:, radius - k : radius - k + length]
        result.add_(both, alpha=taps[k])
    return result


# ---- LowRank and Dense: uniformisation
#
# With rate >= every escape rate, P = I + Q / rate is a matrix of probabilities and
# exp(t Q) = sum_k Poisson(k; rate t) P^k: jumps at a constant rate, some of which lead nowhere.


def _low_rank(left: Tensor, right: Tensor, duration: float, tail: float, transpose: bool, rows: int) -> Advance:
    # Jumps from a state to itself are left in: they change nothing, and taking them out would subtract.
    escape = left @ right.sum(dim=1)
    rate = float(escape.max())
    if rate == 0.0:
        return lambda state: state
    left, stays = left / rate, 1.0 - escape / rate
    first, second = (left, right) if transpose else (right.t(), left.t())

    def step(state: Tensor) -> Tensor:
        return torch.addcmul((state @ first) @ second, state, stays)

    def matrix() -> Tensor:
        return torch.diag(stays).addmm_(left, right)

    return _uniformised(step, 2 * left.shape[1], matrix, rate * duration, tail, transpose, rows, left.shape[0])


def _dense(rates: Tensor, duration: float, tail: float, transpose: bool, rows: int) -> Advance:
    jumps = rates.clone().fill_diagonal_(0.0)
    escape = jumps.sum(dim=1)
    rate = float(escape.max())
    if rate == 0.0:
        return lambda state: state
    jumps.div_(rate).diagonal().copy_(1.0 - escape / rate)
    factor = jumps if transpose else jumps.t()
    size = jumps.shape[0]
    return _uniformised(lambda state: state @ factor, size, lambda: jumps, rate * duration, tail, transpose, rows, size)


def _uniformised(
    step: Advance,
    step_cost: int,  # multiplications of one step, per entry of the state
    matrix: Callable[[], Tensor],
    jumps: float,
    tail: float,
    transpose: bool,
    rows: int,
    size: int,
) -> Advance:
    """Sums the Poisson series row by row, or squares exp of a small part of the duration: whichever multiplies less."""
    budget = -math.log(tail)
    terms = jumps + math.sqrt(2 * jumps * budget) + budget  # about where the Poisson tail falls below `tail`
    squarings = max(0, math.ceil(math.log2(jumps)) + 3) if 0.0 < jumps < math.inf else 0
    # 24 products make exp of a part with at most 1/8 of a jump.
    by_squaring = ((24 + squarings) * size + rows) * size * size
    fits = 4 * 8 * size * size <= _rows.workspace_bytes()
    if fits and jumps < math.inf and by_squaring < terms * rows * size * step_cost:
        transition = _squared(matrix(), jumps, squarings, tail)
        factor = transition if transpose else transition.t()
        return lambda state: state @ factor
    if terms > 1e9:
        raise ValueError(
            f"backward_kolmogorov: duration times the largest escape rate must be less than 1e9 for this generator; "
            f"got {jumps:g}. Shorten the duration, or raise DAM_WORKSPACE_MB until 32 V^2 bytes fit"
        )
    first, weights = _poisson(jumps, tail)

    def advance(state: Tensor) -> Tensor:
        result = torch.zeros_like(state)
        for _ in range(first):
            state = step(state)
        result.add_(state, alpha=weights[0])
        for weight in weights[1:]:
            state = step(state)
            result.add_(state, alpha=weight)
        return result

    return advance


def _squared(matrix: Tensor, jumps: float, squarings: int, tail: float) -> Tensor:
    # What the series neglects doubles with every squaring.
    _, weights = _poisson(math.ldexp(jumps, -squarings), max(math.ldexp(tail, -squarings), 1e-200))
    result = torch.zeros_like(matrix)
    for weight in reversed(weights):
        result = result @ matrix
        result.diagonal().add_(weight)
    # Rows that sum to 1 again keep rounding from doubling too, once the chain has mixed.
    result.div_(result.sum(dim=1, keepdim=True))
    for _ in range(squarings):
        result = result @ result
        result.div_(result.sum(dim=1, keepdim=True))
    return result


def _poisson(mean: float, tail: float) -> tuple[int, list[float]]:
    """Poisson probabilities as (first, [p(first), p(first + 1), ...]); at most `tail` is left out on either side.

    From the mode outward by ratios, then normalised: e^-mean underflows, and its logarithm would cost digits.

    Source: Fox and Glynn, Computing Poisson Probabilities, CACM 31 (1988).
    """
    mode = int(mean)
    above, k, weight = [1.0], mode, 1.0
    # The ratios shrink outward, so what is left out is less than a geometric series; the total is at least 1.
    while weight * mean > tail * (k + 1 - mean):
        k += 1
        weight *= mean / k
        above.append(weight)
    below, k, weight = [], mode, 1.0
    while k > 0 and weight * k > tail * (mean - k):
        weight *= k / mean
        k -= 1
        below.append(weight)
    weights = [*reversed(below), *above]
    total = math.fsum(weights)
    return k, [w / total for w in weights]


def _cpu(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    if kind not in ("uniform", "absorbing") or duration == 0.0:
        return in_float64(terminal, kind, tensors, sizes, duration, tol, transpose, _cpu_filter)
    result = outputs(terminal)
    cpu.kernels.closed_form(
        shape=cpu.shape(terminal),
        terminal=address.matrix(terminal),
        mask_token=sizes[0] if kind == "absorbing" else -1,
        stays=math.exp(-duration),
        moves=-math.expm1(-duration),
        transpose=transpose,
        result=result.data_ptr(),
    )
    return result


def _cpu_filter(lines: Tensor, periodic: bool, taps: list[float]) -> Tensor:
    lines = lines.contiguous()
    result = torch.empty_like(lines)
    outer, length, inner = lines.shape
    kept = torch.tensor(taps, dtype=torch.float64, device="cpu")
    cpu.kernels.filter_lines(
        outer=outer,
        length=length,
        inner=inner,
        periodic=periodic,
        taps=kept.data_ptr(),
        radius=len(taps) - 1,
        source=lines.data_ptr(),
        result=result.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return result


def _triton(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    if duration == 0.0 or kind in ("low_rank", "dense"):  # a copy, or the library's matmuls
        return _torch(terminal, kind, tensors, sizes, duration, tol, transpose)
    if kind != "lattice":
        mask_token = sizes[0] if kind == "absorbing" else None
        stays, moves = math.exp(-duration), -math.expm1(-duration)
        return triton.launcher("backward_kolmogorov", "closed_form")(terminal, mask_token, stays, moves, transpose)
    walks = weighted_walks(terminal.shape[1], sizes, duration, tol)
    taps = _rows.on_device([weights for *_, weights in walks], terminal.device)
    walk = triton.launcher("backward_kolmogorov", "Walk")
    steps = [walk(*of_dimension) for of_dimension in walks]
    return triton.launcher("backward_kolmogorov", "lattice")(
        terminal, steps, taps, workspace=_rows.workspace_bytes() // 2
    )


def _cuda(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
) -> Tensor:
    if duration == 0.0 or kind in ("low_rank", "dense"):  # a copy, or the library's matmuls
        return _torch(terminal, kind, tensors, sizes, duration, tol, transpose)
    if kind == "lattice":
        return _cuda_lattice(terminal, weighted_walks(terminal.shape[1], sizes, duration, tol))
    rows, columns = terminal.shape
    result = outputs(terminal)
    totals = terminal.new_empty(cuda.kernels.summary_floats(1, rows, columns), dtype=torch.float64)
    cuda.kernels.closed_form(
        shape=cuda.shape(terminal),
        terminal=address.matrix(terminal),
        mask_token=sizes[0] if kind == "absorbing" else -1,
        stays=math.exp(-duration),
        moves=-math.expm1(-duration),
        transpose=transpose,
        totals=totals.data_ptr(),
        result=result.data_ptr(),
        where=cuda.where(terminal),
    )
    return result


def _cuda_lattice(terminal: Tensor, walks: list[tuple[int, int, bool, list[float]]]) -> Tensor:
    rows, columns = terminal.shape
    result = outputs(terminal)
    # Few go with the launch: a copy to the device could not be part of a CUDA graph, which reads the host when it runs.
    few = all(len(weights) <= cuda.kernels.FEW_TAPS for *_, weights in walks)
    taps = None if few else _rows.on_device([weights for *_, weights in walks], terminal.device)
    not_finite = torch.zeros(rows, dtype=torch.int32, device=terminal.device)
    buffers = min(len(walks) - 1, 2)
    memory = min(_LATTICE_CHUNK_BYTES, _rows.workspace_bytes() // 2)
    step = max(1, memory // (buffers * columns * 8)) if buffers > 0 else max(1, rows)
    states = terminal.new_empty((buffers, min(step, rows), columns), dtype=torch.float64)
    where = cuda.where(terminal)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        source = terminal[part]
        for i, (length, inner, periodic, weights) in enumerate(walks):
            last = i == len(walks) - 1
            target = result[part] if last else states[i % 2][: part.stop - start]
            cuda.kernels.walk(
                rows=part.stop - start,
                columns=columns,
                length=length,
                inner=inner,
                periodic=periodic,
                taps=0 if taps is None else taps[i].data_ptr(),
                few_taps=weights if taps is None else [],
                radius=len(weights) - 1,
                source=address.matrix(source),
                source_dtype=address.DTYPE_CODE[source.dtype],
                result=target.data_ptr(),
                result_is_double=not last,
                not_finite=not_finite[part].data_ptr(),
                where=where,
            )
            source = target
    cuda.kernels.fill_with_nan(
        rows=rows,
        columns=columns,
        marked=not_finite.data_ptr(),
        result=result.data_ptr(),
        where=where,
    )
    return result


_IMPLEMENTATIONS = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}


def outputs(terminal: Tensor) -> Tensor:
    """Uninitialised result [B, V]."""
    return terminal.new_empty(terminal.shape, dtype=_rows.accumulator(terminal.dtype))


@_op.op("backward_kolmogorov")
def _backward_kolmogorov(
    terminal: Tensor,
    kind: str,
    tensors: list[Tensor],
    sizes: list[int],
    duration: float,
    tol: float,
    transpose: bool,
    backend: str,
) -> Tensor:
    return _IMPLEMENTATIONS[backend](terminal, kind, tensors, sizes, duration, tol, transpose)


@_backward_kolmogorov.register_fake
def _(terminal, kind, tensors, sizes, duration, tol, transpose, backend):
    return outputs(terminal)


def _setup_context(ctx, inputs, output):
    terminal, ctx.kind, tensors, ctx.sizes, ctx.duration, ctx.tol, ctx.transpose, ctx.backend = inputs
    ctx.dtype = terminal.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = list(ctx.saved_tensors)
    # An upstream gradient may be expanded, with stride 0.
    gradient = _backward_kolmogorov(
        grad.contiguous(), ctx.kind, tensors, ctx.sizes, ctx.duration, ctx.tol, not ctx.transpose, ctx.backend
    )
    return gradient.to(ctx.dtype), None, [None] * len(tensors), None, None, None, None, None


_backward_kolmogorov.register_autograd(_backward, setup_context=_setup_context)
