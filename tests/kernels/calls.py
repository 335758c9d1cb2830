"""Calls of the kernels' host functions whose launches cover what users need: dtypes, shapes, options.

Made on CPU tensors while launches are recorded, so nothing runs and only what is allocated costs. Sizes and strides of
1, which Triton compiles in as constants, are among them.
"""

import torch

from dam import divergences, rates
from dam.backends import generated
from dam.kernels import (
    adjoint_weights,
    backward_kolmogorov,
    configs,
    core,
    defined,
    defined_rate,
    entropy,
    formed_gradient,
    gradient,
    head,
    jump,
    linear_jump,
    linear_log_prob,
    linear_matching_loss,
    log_prob,
    matching_loss,
    rate_ratio,
    softcap,
    tilt_to_ess,
)
from dam.kernels.excluded import Excluded
from dam.kernels.projection import Projection

SEED = torch.tensor(1)
DTYPES = (torch.bfloat16, torch.float32)
LLADA, WIDTH = 126_464, 4096
WORKSPACE = 256 * 2**20
ONE, INDEX = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
NOTHING, SUPPRESSED = Excluded(), torch.zeros(LLADA, dtype=torch.bool)


def rows_of(count, columns, dtype):
    return torch.empty(1, columns, dtype=dtype).expand(count, columns)


def indices(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def jumps():
    exclude, ids = Excluded(indices(1024), SUPPRESSED), torch.arange(1024)
    for dtype in DTYPES:
        for count in (1, 1024):
            jump.jump(rows_of(count, LLADA, dtype), NOTHING, 1.0, 1, SEED, None, False)
        x = rows_of(1024, LLADA, dtype)
        jump.jump(x, exclude, 0.7, 1, SEED, ids, True)
        jump.jump(x, exclude, 1.0, 16, SEED, ids, True)
    jump.jump(rows_of(1024, LLADA, torch.float16), exclude, 0.0, 1, SEED, None, True)
    jump.jump(rows_of(1024, 20, torch.float32), NOTHING, 1.0, 1, SEED, None, True)
    jump.jump(ONE, Excluded(INDEX[0]), 1.0, 1, SEED, INDEX[0], True)


def jump_parts():
    ids = torch.arange(1024)
    for dtype in DTYPES:
        x = rows_of(1024, 15_808, dtype)
        jump.jump_part(x, 15, Excluded(indices(1024), SUPPRESSED[:15_808]), 0.7, 1, SEED, ids)
        jump.jump_part(x, 0, NOTHING, 1.0, 16, SEED, ids)
    jump.jump_part(rows_of(1024, 15_808, torch.float16), 0, NOTHING, 0.0, 1, SEED, ids)
    jump.jump_part(ONE, 1, Excluded(INDEX[0]), 1.0, 1, SEED, INDEX[0])


def gradients():
    for dtype in DTYPES:
        for count, exclude in ((1, NOTHING), (1024, Excluded(indices(1024), SUPPRESSED[:15_808]))):
            x, target, pull = rows_of(count, 15_808, dtype), indices(count, 2), torch.empty(count, 2).double()
            for base in (None, x):
                shares = torch.empty(count, 4).double()
                gradient.gradient(x, base, 15_808, LLADA, target, pull, shares, exclude, 0.7, x)
    shares = torch.empty(1, 4).double()
    gradient.gradient(ONE, None, 1, 2, INDEX, ONE.double(), shares, Excluded(INDEX[0]), 1.0, ONE)


def log_probs():
    for dtype in DTYPES:
        for count, exclude, temperature in ((1, NOTHING, 1.0), (1024, Excluded(indices(1024), SUPPRESSED), 0.7)):
            x, target = rows_of(count, LLADA, dtype), indices(count, 1)
            _, log_escape = log_prob.log_prob(x, target, exclude, temperature)
            log_prob.log_prob_backward(torch.empty(count, 1), x, target, log_escape, exclude, temperature)
    log_prob.log_prob(rows_of(1024, LLADA, torch.bfloat16), indices(1024, 16), NOTHING, 1.0)
    _, log_escape = log_prob.log_prob(ONE, INDEX, Excluded(INDEX[0]), 1.0)
    log_prob.log_prob_backward(ONE, ONE, INDEX, log_escape, Excluded(INDEX[0]), 2.0)


def rate_ratios():
    for dtype in DTYPES:
        for count in (1, 1024):
            x = rows_of(count, LLADA, dtype)
            rate_ratio.rate_ratio(x, x, indices(count, 1), Excluded(indices(count), SUPPRESSED))
    rate_ratio.rate_ratio(ONE, ONE, INDEX, NOTHING)


def matching_losses():
    for dtype in DTYPES:
        for count, normalized in ((1, True), (1024, True), (1024, False)):
            x, target, weight = rows_of(count, LLADA, dtype), indices(count, 16), torch.empty(count, 16)
            scale = torch.empty(count)
            matching_loss.matching_loss(x, target, weight, None, None, None, NOTHING, normalized, 1.0, True)
            exclude = Excluded(indices(count), SUPPRESSED)
            matching_loss.matching_loss(x, target, weight, x, scale, scale, exclude, normalized, 0.5, True)
            matching_loss.matching_loss(x, target, weight, x, scale, scale, NOTHING, normalized, 1.0, False)
    matching_loss.matching_loss(ONE, INDEX, ONE, ONE, ONE[0], None, Excluded(INDEX[0]), True, 1.0, True)


def heads(rows, dtype, low=None):
    """Tensors of a head, with a LoRA adapter of rank `low`."""
    tensors = (rows_of(rows, WIDTH, dtype), rows_of(LLADA, WIDTH, dtype), torch.empty(LLADA, dtype=dtype))
    low_tensors = () if low is None else (rows_of(rows, low, dtype), rows_of(LLADA, low, dtype))
    return Projection(*tensors, *low_tensors)


ONES_OF_A_HEAD = Projection(ONE, ONE, ONE[0], ONE, ONE)
CAPPED_ONES_OF_A_HEAD = ONES_OF_A_HEAD._replace(softcap=1.0)


def nothing(rows, columns, out):
    """A library that leaves the logits as they are."""


def linear_jumps():
    for form in ("fused", "chunked"):
        with configs.override("linear_jump", form=form):
            for dtype in DTYPES:
                # Of the buckets of rows: 16, 64, and more.
                for rows in (1, 64, 1024):
                    arguments = (NOTHING, 1.0, 1, SEED, None, False)
                    for of in (heads(rows, dtype), heads(rows, dtype)._replace(softcap=30.0)):
                        linear_jump.linear_jump(of, *arguments, library=nothing, workspace=WORKSPACE)
            arguments = (Excluded(indices(64), SUPPRESSED), 0.7, 4, SEED, torch.arange(64), True)
            linear_jump.linear_jump(heads(64, torch.bfloat16, 128), *arguments, library=nothing, workspace=WORKSPACE)
    with configs.override("linear_jump", form="fused"):
        arguments = (NOTHING, 1.0, 1, SEED, None, True)
        for of in (ONES_OF_A_HEAD, CAPPED_ONES_OF_A_HEAD):
            linear_jump.linear_jump(of, *arguments, library=None, workspace=WORKSPACE)


def gradients_of(op, of, base, rows, count):
    out = torch.empty(count, LLADA, dtype=of[0].dtype)
    head.gradient(op, of, base, rows, core.scale_of(1.0), slice(0, count), slice(0, LLADA), out)


def linear_log_probs():
    for dtype in DTYPES:
        for rows, low, cap, form in (
            (64, None, None, "fused"),
            (512, 128, None, "fused"),
            (512, None, None, "chunked"),
            (512, 128, 30.0, "fused"),
        ):
            of, target = heads(rows, dtype, low)._replace(softcap=cap), indices(rows, 1)
            exclude = NOTHING if low is None else Excluded(None, SUPPRESSED)
            with configs.override("linear_log_prob", form=form):
                _, log_escape = linear_log_prob.linear_log_prob(
                    of, target, exclude, 1.0, library=nothing, workspace=WORKSPACE
                )
            of_rows = linear_log_prob.rows_of(torch.zeros(rows, 1), target, log_escape, exclude, 1.0)
            gradients_of("linear_log_prob", of, None, of_rows, rows)


def linear_matching_losses():
    for dtype in DTYPES:
        for rows, low, based, cap in (
            (512, None, False, None),
            (512, None, True, None),
            (512, 128, True, None),
            (512, 128, True, 30.0),
        ):
            of, target, weight = heads(rows, dtype, low)._replace(softcap=cap), indices(rows, 16), torch.zeros(rows, 16)
            exclude = NOTHING if low is None else Excluded(None, SUPPRESSED)
            base, base_weight = (heads(rows, dtype)._replace(softcap=cap), torch.zeros(rows)) if based else (None, None)
            _, of_rows = linear_matching_loss.linear_matching_loss(
                of, target, weight, base, base_weight, torch.zeros(rows), exclude, True, 1.0, workspace=WORKSPACE
            )
            gradients_of("linear_matching_loss", of, base, of_rows, rows)
    scale, one = ONE[0], slice(0, 1)
    for of in (ONES_OF_A_HEAD, CAPPED_ONES_OF_A_HEAD):
        _, of_rows = linear_matching_loss.linear_matching_loss(
            of, INDEX, ONE, of, scale, scale, NOTHING, True, 2.0, workspace=WORKSPACE
        )
        head.gradient("linear_matching_loss", of, of, of_rows, core.scale_of(1.0), one, one, torch.zeros(1, 1))


def formed_gradients():
    for dtype in DTYPES:
        formed_gradient.scale(torch.empty(64, LLADA, dtype=dtype), torch.ones(()))


def softcaps():
    for logits in (torch.empty(64, LLADA), ONE):
        softcap.cap(logits, 30.0)
        for dtype in (*DTYPES, torch.float16):
            softcap.differentiate(torch.empty_like(logits, dtype=dtype), logits, 30.0)


def adjoint_weights_of_groups():
    for dtype in DTYPES:
        for steps in (1, 256):
            gain, cost = torch.empty(64, 16, steps, dtype=dtype), torch.empty(64, 16)
            adjoint_weights.adjoint_weights(gain, cost, None, None, True)
            adjoint_weights.adjoint_weights(gain, cost, gain, 2.0, True)
    adjoint_weights.adjoint_weights(ONE[None], ONE, None, None, False)


def tilts():
    for dtype, size in ((torch.float32, 16), (torch.float64, 16), (torch.float32, 1024)):
        tilt_to_ess.tilt_to_ess(torch.empty(64, size, dtype=dtype), 4.0, 1.0, True)
    tilt_to_ess.tilt_to_ess(ONE, 1.0, 1.0, False)


def backward_kolmogorovs():
    for dtype in DTYPES:
        for count in (1, 64, 1024):
            x = rows_of(count, LLADA, dtype)
            backward_kolmogorov.closed_form(x, None, 0.5, 0.5, False)
            backward_kolmogorov.closed_form(x, 3, 0.5, 0.5, True)
        backward_kolmogorov.closed_form(rows_of(64, 100, dtype), None, 0.5, 0.5, False)
        for periodic in (False, True):
            walks = [backward_kolmogorov.Walk(91, 91, periodic, [0.1] * 20)]
            walks.append(backward_kolmogorov.Walk(91, 1, periodic, [0.1] * 20))
            taps = torch.zeros(2, 20, dtype=torch.float64)
            backward_kolmogorov.lattice(rows_of(64, 91 * 91, dtype), walks, taps, workspace=WORKSPACE)
    backward_kolmogorov.closed_form(ONE, None, 0.5, 0.5, False)


def entropies():
    for dtype in DTYPES:
        for count, exclude, temperature in ((1, NOTHING, 1.0), (1024, Excluded(indices(1024), SUPPRESSED), 0.7)):
            x, number = rows_of(count, LLADA, dtype), torch.empty(count, dtype=torch.float64)
            entropy.entropy(x, exclude, temperature)
            entropy.entropy_backward(x, number, number, number, number, exclude, temperature)
    entropy.entropy(ONE, NOTHING, 1.0)


def convex(u):
    return u * torch.log(u) - (1 + u) * torch.log(1 + u)


def defined_losses():
    """Of one divergence: the others differ in what they compute of a logit."""
    divergence = divergences.define(convex)
    module = generated.module("convex", divergence.triton)
    x, excluding = rows_of(1024, LLADA, torch.bfloat16), Excluded(indices(1024), SUPPRESSED)
    numbers = torch.empty(1024, dtype=torch.float64)
    arguments = (indices(1024, 16), torch.empty(1024, 16), numbers)
    for log_total in (None, numbers):
        defined.rate_matching_loss(module, x, *arguments, excluding, log_total, True)
    defined.rate_matching_loss(module, ONE, INDEX, ONE, ONE[0], NOTHING, None, False)


def of_numbers(z, y, x):
    return torch.exp(z - (y - x) ** 2)


def defined_rates():
    module = generated.module("of_numbers", rates.define(of_numbers).triton)
    x, excluding = rows_of(1024, LLADA, torch.bfloat16), Excluded(indices(1024), SUPPRESSED)
    defined_rate.rate_ratio(module, x, x, indices(1024, 16), indices(1024), excluding)
    defined_rate.rate_ratio(module, ONE, ONE, INDEX, None, NOTHING)


OPS = {
    "entropy": entropies,
    "adjoint_weights": adjoint_weights_of_groups,
    "tilt_to_ess": tilts,
    "backward_kolmogorov": backward_kolmogorovs,
    "jump": jumps,
    "jump_part": jump_parts,
    "gradient": gradients,
    "log_prob": log_probs,
    "rate_ratio": rate_ratios,
    "matching_loss": matching_losses,
    "linear_jump": linear_jumps,
    "linear_log_prob": linear_log_probs,
    "linear_matching_loss": linear_matching_losses,
}
CALLS = [formed_gradients, softcaps, defined_losses, defined_rates, *OPS.values()]
