"""What the operations are measured against, restated from published formulas or written as a user of torch would."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.generators import Lattice


class Group(NamedTuple):
    """Peers that are chosen by one name."""

    what: str
    package: str = ""  # the module that its functions import
    distribution: str = ""  # what pip installs for it
    on_gpu: bool = False  # its kernels run nowhere else


GROUPS = {
    "torch": Group("what a user of torch would write"),
    "compile": Group("the same by torch.compile, for these very shapes"),
    "llada": Group("LLaDA's sampling step and loop"),
    "cdtm": Group("c-DTM's loss"),
    "liger": Group("Liger's cross entropies", "liger_kernel", "liger-kernel", True),
    "quack": Group("quack's cross entropies", "quack", "quack-kernels", True),
    "cut_cross_entropy": Group("Apple's cut cross entropy", "cut_cross_entropy", "cut-cross-entropy", True),
    "fla": Group("flash-linear-attention's cross entropy", "fla", "fla-core", True),
    "flashinfer": Group("flashinfer's sampler", "flashinfer", "flashinfer-python", True),
    "flash_sampling": Group("FlashSampling's kernel, restated in Triton", "triton", "triton", True),
    "dam": Group("dam's other ways"),
}


def why_unavailable(group: str, device: torch.device) -> str | None:
    """Why none of a group's functions can run on a device here, or None."""
    of = GROUPS[group]
    if of.on_gpu and device.type != "cuda":
        return f"its kernels run on a GPU only, and this would measure on {device.type}"
    if of.package and importlib.util.find_spec(of.package) is None:
        return f"it is not installed here: pip install {of.distribution}"
    if group != "compile":
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton here: pip install triton"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return f"torch.compile needs a C++ compiler, and there is no {' and no '.join(compilers)} on the PATH"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the very shapes of the first call, which compiles."""
    return lambda **arguments: _compiled(function)(**arguments)


# On the first call: the compiler takes seconds to import.
_compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


def llada_step(logits: Tensor) -> tuple[Tensor, Tensor]:
    """LLaDA's sampling step: a float64 Gumbel race, a float64 softmax, and a gather."""
    x = logits.double()
    noise = torch.rand_like(x)
    token = (x.exp() / (-torch.log(noise))).argmax(dim=-1)
    probability = F.softmax(x, dim=-1).gather(-1, token[:, None])[:, 0]
    return token, probability


def softmax_multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)[:, 0]


def gumbel_race(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax of logits plus Gumbel noise in float32, and the log-probability of what it draws."""
    x = logits.float()
    token = (x - torch.log(-torch.log(torch.rand_like(x)))).argmax(dim=-1)
    log_prob = x.gather(-1, token[:, None])[:, 0] - torch.logsumexp(x, dim=-1)
    return token, log_prob


def logsumexp(logits: Tensor) -> Tensor:
    """The log escape rate alone, of a jump that is not drawn."""
    return torch.logsumexp(logits, dim=-1)


def log_prob(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(1, target)


def entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def rate_ratio(logits: Tensor, base_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x, base = logits.float(), base_logits.float()
    log_ratio = base.gather(1, target) - x.gather(1, target)
    return log_ratio, torch.logsumexp(x, dim=-1).exp() - torch.logsumexp(base, dim=-1).exp()


def cdtm_loss(logits: Tensor, target: Tensor, weight: Tensor, base_logits: Tensor, base_weight: Tensor) -> Tensor:
    """The c-DTM loss: softmax, one-hot and log-softmax over V."""
    one_hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    matched = (weight[..., None].to(logits.dtype) * one_hot).sum(dim=1)
    matched = matched + base_weight[:, None].to(logits.dtype) * torch.softmax(base_logits, dim=-1)
    return -(matched * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (weight[:, 0] * F.cross_entropy(logits.float(), target[:, 0], reduction="none")).mean()


def linear_weighted_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return weighted_cross_entropy(hidden @ head_weight.t(), target, weight)


def linear_cdtm_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_head_weight: Tensor,
    base_weight: Tensor,
) -> Tensor:
    return cdtm_loss(hidden @ head_weight.t(), target, weight, base_hidden @ base_head_weight.t(), base_weight)


def adjoint_weights(
    log_ratio: Tensor, terminal_cost: Tensor, escape_gap: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, log_path (without its last column of zeros), log_normalizer and ess."""
    gain = log_ratio if escape_gap is None else log_ratio + escape_gap
    log_path = gain.flip(-1).cumsum(-1).flip(-1)
    log_weight = log_path[..., 0] - terminal_cost
    size = log_weight.shape[1]
    weight = size * torch.softmax(log_weight, dim=1)
    log_normalizer = torch.logsumexp(log_weight, dim=1) - math.log(size)
    return weight, log_path, log_normalizer, weight.sum(dim=1).square() / weight.square().sum(dim=1)


def tilt_to_ess(reward: Tensor, ess: float, max_tilt: float) -> Tensor:
    """Bisection over the tilt, all groups at once, until float64 has no bit left."""
    reward = reward.double()
    low = torch.zeros_like(reward[:, 0])
    high = torch.full_like(low, max_tilt)
    for _ in range(53):
        tilt = (low + high) / 2
        keeps = torch.softmax(tilt[:, None] * reward, dim=1).square().sum(dim=1) * ess <= 1
        low, high = torch.where(keeps, tilt, low), torch.where(keeps, high, tilt)
    return low


def uniform_kolmogorov(terminal: Tensor, duration: float) -> Tensor:
    """exp(duration Q) of a uniform chain: the distance from the mean of the row decays."""
    mean = terminal.mean(dim=1, keepdim=True)
    return mean + math.exp(-duration) * (terminal - mean)


def lattice_kolmogorov(generator: Lattice, terminal: Tensor, duration: float) -> Tensor:
    """exp(duration Q) of a periodic lattice with unit rates to neighbours, by Fourier transforms."""
    shape = tuple(generator.shape)
    dims = tuple(range(1, len(shape) + 1))
    eigenvalue = torch.zeros(shape, device=terminal.device)
    for dim, size in enumerate(shape):
        wave = 2 * torch.cos(2 * math.pi * torch.arange(size, device=terminal.device) / size) - 2
        eigenvalue = eigenvalue + wave.view([-1 if d == dim else 1 for d in range(len(shape))])
    transformed = torch.fft.fftn(terminal.view(-1, *shape), dim=dims) * (duration * eigenvalue).exp()
    return torch.fft.ifftn(transformed, dim=dims).real.reshape(terminal.shape)


def llada_rollout(hidden: Tensor, head: Tensor, steps: int) -> Tensor:
    """Fills positions whose hidden states are [B, L, D]: LLaDA's step at every masked one, keeping the likeliest.

    Returns:
        Tokens, int64 [B, L].
    """
    batch, length, _ = hidden.shape
    tokens = torch.full((batch, length), -1)
    for step in range(steps):
        masked = tokens == -1
        keep = length * (step + 1) // steps - length * step // steps
        token, probability = llada_step(hidden[masked] @ head.t())
        left = probability.view(batch, -1).topk(keep, dim=1).indices
        at = masked.nonzero()[:, 1].view(batch, -1).gather(1, left)
        tokens.scatter_(1, at, token.view(batch, -1).gather(1, left))
    return tokens


# Packages whose kernels run on a GPU. Where one is not installed, calling it raises an ImportError. Their losses are
# means over rows: one target of weight 1 each.


def flashinfer_sample(logits: Tensor) -> Tensor:
    from flashinfer.sampling import sampling_from_logits

    return sampling_from_logits(logits)


def quack_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, target[:, 0], reduction="none")


def quack_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    loss = cross_entropy(logits, target[:, 0], reduction="none")
    # A weight for each row: the upstream gradient of a bare mean or sum is one number with a stride of 0, which the
    # kernel of its backward pass refuses.
    return (loss * torch.full_like(loss, 1 / len(loss))).sum()


def liger_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Overwrites the logits with their gradient."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()(logits, target[:, 0])


def liger_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """What its users get by default: products by the library, row by row kernels between them, CuTe's on Hopper."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(head_weight, hidden, target[:, 0])


def liger_triton_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """The same with its Triton kernels, which were the only ones before release 0.8."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    if not getattr(Function, "supports_inner_impl_dispatch", False):
        return Function.apply(hidden, head_weight, target[:, 0])[0]
    defaults = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False)  # from bias to predictions
    return Function.apply(hidden, head_weight, target[:, 0], *defaults, "nvidia-triton", None)[0]


def liger_hopper_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """Its CuTe kernels for Hopper, GEMMs included, which hold all logits; with a head that is trained."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as sm90

    return sm90.liger_fused_linear_cross_entropy_sm90(hidden, head_weight, target[:, 0])


def liger_cutile_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """Its cuTile kernels beside the library's products."""
    from liger_kernel.ops.cutile.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return Function.apply(hidden, head_weight, target[:, 0])[0]


def torch_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, head_weight, target[:, 0])


def quack_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """Chunks of rows, and the gradient of their logits."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # From release 0.6 on it takes the other form by itself, where that can be had.
    named = inspect.signature(chunked_linear_cross_entropy).parameters
    options = {"use_scaled_exp": False} if "use_scaled_exp" in named else {}
    return chunked_linear_cross_entropy(hidden, head_weight, target[:, 0], **options)


def quack_scaled_exp_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """Logits once, as scaled exponentials in bfloat16, of which no gradient is formed."""
    from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy

    return scaled_exp_linear_cross_entropy(hidden, head_weight, target[:, 0])


def fla_linear_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor) -> Tensor:
    """flash-linear-attention's. What the diffusion models call their own is this with a weight for each row."""
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return fused_linear_cross_entropy_loss(hidden, target[:, 0], head_weight)


def cut_cross_entropy(hidden: Tensor, head_weight: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head_weight, target[:, 0], reduction=reduction)


def flash_sampling(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """No package: restated in `benchmarks.flash_sampling`, which needs Triton."""
    from dam.benchmarks.flash_sampling import sample

    return sample(hidden, head_weight)
