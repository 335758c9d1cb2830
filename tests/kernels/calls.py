"""Calls of the kernels' host functions whose launches cover what users need: dtypes, shapes, options.

Made on CPU tensors while launches are recorded, so nothing runs and only what is allocated costs.
"""

import torch

from dam.kernels import jump, log_prob, matching_loss, rate_ratio

SEED = torch.tensor(1)
DTYPES = (torch.bfloat16, torch.float32)
LLADA = 126_464


def rows_of(count, columns, dtype):
    return torch.empty(1, columns, dtype=dtype).expand(count, columns)


def indices(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def jumps():
    exclude, ids = indices(1024), torch.arange(1024)
    for dtype in DTYPES:
        for count in (1, 1024):
            jump.jump(rows_of(count, LLADA, dtype), None, 1.0, 1, SEED, None, False)
        x = rows_of(1024, LLADA, dtype)
        jump.jump(x, exclude, 0.7, 1, SEED, ids, True)
        jump.jump(x, exclude, 1.0, 16, SEED, ids, True)
    jump.jump(rows_of(1024, LLADA, torch.float16), exclude, 0.0, 1, SEED, None, True)
    jump.jump(rows_of(1024, 20, torch.float32), None, 1.0, 1, SEED, None, True)


def log_probs():
    for dtype in DTYPES:
        for count, exclude, temperature in ((1, None, 1.0), (1024, indices(1024), 0.7)):
            x, target = rows_of(count, LLADA, dtype), indices(count, 1)
            _, log_escape = log_prob.log_prob(x, target, exclude, temperature)
            log_prob.log_prob_backward(torch.empty(count, 1), x, target, log_escape, exclude, temperature)
    log_prob.log_prob(rows_of(1024, LLADA, torch.bfloat16), indices(1024, 16), None, 1.0)


def rate_ratios():
    for dtype in DTYPES:
        for count in (1, 1024):
            x = rows_of(count, LLADA, dtype)
            rate_ratio.rate_ratio(x, x, indices(count, 1), indices(count))


def matching_losses():
    for dtype in DTYPES:
        for count, normalized in ((1, True), (1024, True), (1024, False)):
            x, target, weight = rows_of(count, LLADA, dtype), indices(count, 16), torch.empty(count, 16)
            scale = torch.empty(count)
            matching_loss.matching_loss(x, target, weight, None, None, None, None, normalized, True)
            matching_loss.matching_loss(x, target, weight, x, scale, scale, indices(count), normalized, True)
            matching_loss.matching_loss(x, target, weight, x, scale, scale, None, normalized, False)


CALLS = [jumps, log_probs, rate_ratios, matching_losses]
