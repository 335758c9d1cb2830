"""The sizes that kernels are launched with, by GPU, op, dtype and size: one table, read at every launch.

A row applies to a launch that fits all it names; where several give the same value, the last one does. So a GPU that
the table does not know gets what the rows without a GPU say. Nothing is timed on a user's call:
`python -m benchmarks gpu --tune` measures candidates and prints rows for this table.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

INTERPRETER = "Triton's interpreter"


class Row(NamedTuple):
    """Values for launches of `op`, and what a launch must be for them to apply."""

    op: str
    values: Mapping[str, Any]
    gpu: str = ""  # a part of the device's name
    element_bytes: tuple[int, ...] = (2, 4)
    rows: float = math.inf  # upper ends of the buckets of T
    columns: float = math.inf  # and of V


# The ops by what they work on: rows of logits, hidden states and a head, or states and trajectories. Whatever else goes
# through all of one kind takes it from here.
ROW_OPS = ("jump", "log_prob", "rate_ratio", "matching_loss", "entropy")
LINEAR_OPS = ("linear_jump", "linear_log_prob", "linear_matching_loss")
STATE_OPS = ("adjoint_weights", "backward_kolmogorov", "tilt_to_ess")
OPS = (*ROW_OPS, *LINEAR_OPS, *STATE_OPS)

# Ops that take what their family's rows say, and then what their own do. The others have rows of their own only.
FAMILY = dict.fromkeys(ROW_OPS, "rows") | dict.fromkeys(LINEAR_OPS, "linear")

# rows: kernels over rows of logits.
#   elements  logits that a program takes in one step: tiles of 1024 side by side, or narrow rows
#   programs  fewer row blocks than this are split among programs along the vocabulary
# linear: kernels that contain the matmul with the head.
#   form      "fused": logits never leave the chip; "chunked": the library's matmul over chunks, and the row kernels
#   frozen_form, trained_form  likewise of a gradient, which fused costs one matmul more, with a frozen or trained head;
#             "once": chunked where each gradient is one product or few, fused where chunk after chunk would be added
#   block_rows, block_columns, block_depth  the logits of a program, and its step along the hidden dimension
#   group     row blocks that run one after another on the same block of the head
#   chunk_mb  logits of a chunk, which should stay in the L2 cache
#   merge_rows  rows of a program that merges what is kept of blocks
# adjoint_weights:
#   elements  steps of trajectories that a program takes at once, at most `steps` of each
#   weights   trajectories of groups that a program weighs at once
# tilt_to_ess:
#   elements  trajectories of groups that a program takes at once
# backward_kolmogorov:
#   elements  states that a program takes in one step
#   programs  fewer blocks of rows than this are split among programs; as many run whatever the rows' size,
#   cache_mb  and more while their rows fit, as each is read twice
#   points, lines, depth, walk_warps  a program's part of a lattice, and its step over the points it reaches
#   chunk_mb  float64 states between dimensions, which should stay in the L2 cache
# formed_gradient:
#   elements  entries of a gradient that a program scales
# softcap:
#   elements  logits that a program caps, or entries of their gradient; few enough for registers
TABLE: tuple[Row, ...] = (
    Row("rows", {"elements": 8192, "programs": 512, "warps": 8, "stages": 1}),
    Row("rows", {"elements": 2048, "warps": 2}, rows=8),
    Row("rows", {"elements": 2**20, "programs": 1}, gpu=INTERPRETER),
    Row("linear", {"form": "chunked", "frozen_form": "chunked", "trained_form": "once"}),
    Row("linear", {"chunk_mb": 32, "merge_rows": 1, "group": 8}),
    Row("linear", {"block_rows": 128, "block_columns": 128, "block_depth": 64, "warps": 8, "stages": 3}),
    Row("linear", {"block_rows": 64, "block_columns": 64, "block_depth": 32}, element_bytes=(4,)),
    Row("linear", {"form": "fused", "block_rows": 64}, rows=64),
    Row("linear", {"warps": 4}, rows=16),
    Row("linear_jump", {"block_rows": 64}),  # a race of more rows would not fit the registers
    Row("linear", {"block_rows": 256, "block_columns": 512, "block_depth": 64, "merge_rows": 256}, gpu=INTERPRETER),
    Row("formed_gradient", {"elements": 16384, "warps": 8}),
    Row("formed_gradient", {"elements": 2**20}, gpu=INTERPRETER),
    Row("softcap", {"elements": 4096, "warps": 8}),
    Row("softcap", {"elements": 2**20}, gpu=INTERPRETER),
    Row("adjoint_weights", {"elements": 1024, "steps": 256, "weights": 512, "warps": 8}),
    Row("adjoint_weights", {"elements": 2**20, "steps": 2**20, "weights": 2**20}, gpu=INTERPRETER),
    Row("tilt_to_ess", {"elements": 512, "warps": 4}, element_bytes=(2, 4, 8)),
    Row("tilt_to_ess", {"elements": 128, "warps": 1}, element_bytes=(2, 4, 8), columns=128),
    Row("tilt_to_ess", {"elements": 2**20}, gpu=INTERPRETER, element_bytes=(2, 4, 8)),
    Row("backward_kolmogorov", {"elements": 4096, "warps": 8, "programs": 132, "cache_mb": 32}),
    Row("backward_kolmogorov", {"elements": 2048, "warps": 4}, rows=64),
    Row("backward_kolmogorov", {"elements": 1024, "warps": 4}, columns=1024),
    Row("backward_kolmogorov", {"points": 64, "lines": 64, "depth": 16, "walk_warps": 8, "chunk_mb": 32}),
    # Products of 16 lines and more become float64 MFMA instructions, which Triton 3.6 fails to compile.
    Row("backward_kolmogorov", {"lines": 8, "walk_warps": 4}, gpu="AMD"),
    Row("backward_kolmogorov", {"elements": 2**20, "programs": 1}, gpu=INTERPRETER),
    Row("backward_kolmogorov", {"points": 256, "lines": 4096, "depth": 256, "chunk_mb": 2**10}, gpu=INTERPRETER),
)

_overrides: list[tuple[str, Mapping[str, Any]]] = []
_device_name: str | None = None


def lookup(op: str, device: torch.device, element_bytes: int, rows: int, columns: int) -> dict[str, Any]:
    """The values of a launch: those of the table, and over them those of `override`."""
    values = dict(_lookup(op, _device_name or device_name(device), element_bytes, rows, columns))
    for name, other in _overrides:
        if name in (op, FAMILY.get(op)):
            values |= other
    return values


@functools.lru_cache(maxsize=4096)
def _lookup(op: str, gpu: str, element_bytes: int, rows: int, columns: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for row in TABLE:
        fits = row.op in (op, FAMILY.get(op)) and row.gpu in gpu and element_bytes in row.element_bytes
        if fits and rows <= row.rows and columns <= row.columns:
            values |= row.values
    if not values:
        raise KeyError(f"the table of kernel sizes has no row for {op}")
    return values


def device_name(device: torch.device) -> str:
    """Name of a GPU, or INTERPRETER for the CPU."""
    return INTERPRETER if device.type == "cpu" else _name_of_gpu(device)


@functools.cache
def _name_of_gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@contextlib.contextmanager
def override(op: str, **values: Any) -> Iterator[None]:
    """Context manager: launches of `op` inside take these values instead of the table's. For tuning and tests."""
    _overrides.append((op, values))
    try:
        yield
    finally:
        _overrides.pop()


@contextlib.contextmanager
def as_if_on(gpu: str) -> Iterator[None]:
    """Context manager: launches inside take the values of a GPU of this name, whatever runs them."""
    global _device_name
    previous, _device_name = _device_name, gpu
    try:
        yield
    finally:
        _device_name = previous
