"""FlashSampling's kernel, restated: a draw for each row of hidden states, whose logits never leave the chip.

Its structure and its sizes on a Hopper chip are those that are published: programs that stay, one for each
multiprocessor, tiles of the head by TMA, 128 tokens by 64 at a time in a pipeline of 4 stages on 8 warps (one of the
four sizes that it tries), and of a tile its largest logit plus Gumbel noise alone; torch takes the row's largest.
Two things are not, as no comparison should rest on them: maxima stay in float32 instead of bfloat16, and noise is of
one counter for each row and token, where the published kernel's seeds are sums of tile numbers, some of them equal. It
has no log-probability and no escape rate to give, and leaves no destination out.

Source: Ruiz et al., FlashSampling, arXiv 2603.15854, Algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dam.kernels.launch import INTERPRETED, launch

# By the number of rows: a program's, at most.
_BLOCK_ROWS = (16, 32, 64)


@triton.jit(do_not_specialize=["seed"])
def flash_sampling_kernel(
    hidden,  # [T, D]
    head,  # [V, D]
    best,  # float32 [blocks of V, T]: the largest logit plus noise of a block
    token,  # int64 [blocks of V, T]: whose it is
    rows,
    columns,
    depth,
    seed,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    states = tl.make_tensor_descriptor(hidden, shape=[rows, depth], strides=[depth, 1], block_shape=[ROWS, DEPTH])
    weights = tl.make_tensor_descriptor(head, shape=[columns, depth], strides=[depth, 1], block_shape=[COLUMNS, DEPTH])
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS, flatten=True):
        # GROUP blocks of the head go by for each block of rows, so that these find them in the cache.
        group = tile // (GROUP * row_blocks) * GROUP
        size = tl.minimum(column_blocks - group, GROUP)
        within = tile % (GROUP * row_blocks)
        column_block, row_block = group + within % size, within // size
        first, first_row = column_block * COLUMNS, row_block * ROWS
        logits = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
        for at in range(0, depth, DEPTH):
            logits = tl.dot(weights.load([first, at]), states.load([first_row, at]).T, acc=logits)
        column = first + tl.arange(0, COLUMNS)
        row = first_row + tl.arange(0, ROWS)
        uniform = tl.rand(seed, row[None, :] * columns + column[:, None])
        raced = tl.where((column < columns)[:, None], logits - tl.log(-tl.log(uniform)), -float("inf"))
        most, at_most = tl.max(raced, axis=0, return_indices=True)
        out = column_block * rows + row
        tl.store(best + out, most, mask=row < rows)
        tl.store(token + out, (first + at_most).to(tl.int64), mask=row < rows)


def sample(hidden: Tensor, head: Tensor, seed: int = 0) -> Tensor:
    """Tokens int64 [T] drawn with probabilities softmax(hidden @ head^T); hidden [T, D], head [V, D], contiguous."""
    (rows, depth), columns = hidden.shape, head.shape[0]
    block_rows = next((size for size in _BLOCK_ROWS if rows <= size), _BLOCK_ROWS[-1])
    block_columns, group = 128, 4
    programs = 4
    if INTERPRETED:
        hidden, head = hidden.float(), head.float()  # of bfloat16 the interpreter's product takes the bits for integers
    else:
        triton.set_allocator(lambda size, align, stream: hidden.new_empty(size, dtype=torch.int8))  # of descriptors
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    blocks = triton.cdiv(columns, block_columns)
    best = hidden.new_empty((blocks, rows), dtype=torch.float32)
    token = hidden.new_empty((blocks, rows), dtype=torch.int64)
    grid = (min(programs, blocks * triton.cdiv(rows, block_rows)),)
    launch(
        flash_sampling_kernel, grid, hidden=hidden, head=head, best=best, token=token, rows=rows, columns=columns,
        depth=depth, seed=seed, PROGRAMS=grid[0], ROWS=block_rows, COLUMNS=block_columns, DEPTH=64, GROUP=group,
        warps=8, stages=4,
    )  # fmt: skip
    return token.gather(0, best.argmax(dim=0, keepdim=True))[0]
