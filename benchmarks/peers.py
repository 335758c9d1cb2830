"""What the operations are measured against, restated from published formulas or written as a user of torch would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def llada_step(logits: Tensor) -> tuple[Tensor, Tensor]:
    """LLaDA's sampling step: a float64 Gumbel race, a float64 softmax, and a gather."""
    x = logits.double()
    noise = torch.rand_like(x)
    token = (x.exp() / (-torch.log(noise))).argmax(dim=-1)
    probability = F.softmax(x, dim=-1).gather(-1, token[:, None])[:, 0]
    return token, probability


def softmax_multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)


def logsumexp(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1)


def log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """log_softmax and gather, forward and backward; returns the gradient."""
    x = logits.detach().requires_grad_()
    torch.log_softmax(x, dim=-1).gather(1, target).sum().backward()
    return x.grad


def cdtm_loss(logits: Tensor, target: Tensor, weight: Tensor, base_logits: Tensor, base_weight: Tensor) -> Tensor:
    """The c-DTM loss, softmax, one-hot and log-softmax over V, forward and backward; returns the gradient."""
    x = logits.detach().requires_grad_()
    one_hot = F.one_hot(target, x.shape[1]).to(x.dtype)
    matched = (weight[..., None].to(x.dtype) * one_hot).sum(dim=1)
    matched = matched + base_weight[:, None].to(x.dtype) * torch.softmax(base_logits, dim=-1)
    (-(matched * torch.log_softmax(x, dim=-1)).sum(dim=-1).mean()).backward()
    return x.grad
