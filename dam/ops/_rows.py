"""Pieces of the torch reference that several ops share: float64 rows without excluded entries, in bounded chunks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from dam.kernels import environment
from dam.kernels.excluded import Excluded

# Of a card's memory, for linear ops: chunks of rows long enough that a product reads the head in less time than it
# computes. On 80 GB 1.0 GB, 1,024 rows of 126,464 logits, where 256 MiB are 320.
_SHARE_OF_CARD = 0.0125


def workspace_bytes(device: torch.device | None = None) -> int:
    """Bound on an op's extra memory: the environment variable DAM_WORKSPACE_MB, 256 MiB unless set.

    With a device, for the linear ops: unless set, 1.25% of a GPU's memory if that is more.
    """
    text = os.environ.get("DAM_WORKSPACE_MB")
    if not text:
        least = 256 * 2**20
        return least if device is None or device.type != "cuda" else max(least, int(_SHARE_OF_CARD * _card(device)))
    return _bytes(text)


@functools.lru_cache(maxsize=4)
def _bytes(text: str) -> int:
    return int(float(environment.checked("DAM_WORKSPACE_MB", text)) * 2**20)


@functools.cache
def _card(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def part(x: Tensor, rows: slice) -> Tensor:
    """Some rows of x; itself where these are all, as a slice costs a small call a microsecond."""
    return x if rows == slice(0, x.shape[0]) else x[rows]


def chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of rows that together need at most half of `workspace_bytes()`, one row at the least.

    Half, because a linear op's loop has a row-wise op's loop inside it.
    """
    step = max(1, workspace_bytes() // (2 * max(1, bytes_per_row)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


# float64 copies of a row alive at once in the reference's loops, generously counted.
REFERENCE_BYTES = 8 * 8


def allowed(logits: Tensor, exclude: Excluded) -> Tensor:
    """A float64 copy of logits [T, V] with excluded destinations at -inf."""
    x = logits.to(torch.float64, copy=True)
    if exclude.row is not None:
        rows = torch.nonzero(exclude.row >= 0)[:, 0]
        x[rows, exclude.row[rows]] = -torch.inf
    return x if exclude.suppressed is None else x.masked_fill_(exclude.suppressed, -torch.inf)


def unflattened(x: Tensor, lead: torch.Size) -> Tensor:
    """A result [T, ...] with the leading dimensions of the rows in the place of T."""
    return x if len(lead) == 1 else x.view((*lead, *x.shape[1:]))


def unit_inner_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(rows: list[list[float]], device: torch.device) -> Tensor:
    """Rows of numbers as float64 [rows, .], padded with zeros; copied there without waiting for what it does."""
    # An even width keeps each row aligned alike.
    width = max(len(row) for row in rows) + 1 & ~1
    padded = [row + [0.0] * (width - len(row)) for row in rows]
    on_host = torch.tensor(padded, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype in which results over rows are returned: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_or(values: Tensor, index: Tensor, missing: float) -> Tensor:
    """values[t, index[t, j]], and `missing` where index is -1."""
    return torch.where(index >= 0, values.gather(1, index.clamp(min=0)), missing)


def log_softmax(x: Tensor) -> Tensor:
    """Of float64 rows [T, V]: NaN for rows that hold +inf, or nothing but -inf."""
    # Less the largest first: beside large logits the logarithm of the sum is lost. Not torch's own, whose sums in order
    # lose what is small beside one large term.
    below = x - x.amax(dim=1, keepdim=True)
    return below - below.exp().sum(dim=1, keepdim=True).log()


def drop_excluded(target: Tensor, exclude: Excluded) -> Tensor:
    """Targets with the excluded destination of their row replaced by -1."""
    return target if exclude.row is None else torch.where(target == exclude.row[:, None], -1, target)
