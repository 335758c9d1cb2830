"""Exact answers by enumeration, for masked chains over short sequences: what every fast path is compared with.

A joint distribution over V^N sequences is a float64 tensor with N dimensions of size V. The mask token is V.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.models import Tabular


def random_joint(positions: int, tokens: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn((tokens,) * positions, generator=generator, dtype=torch.float64)
    return logits.flatten().softmax(0).view_as(logits)


def sequences(positions: int, tokens: int) -> Tensor:
    """All of them, int64 [V^N, N], in the order of the flattened joint."""
    return torch.tensor(list(itertools.product(range(tokens), repeat=positions)))


def neighbour_cost(joint: Tensor, seed: int) -> Tensor:
    """g(X) = weighted count of equal neighbours, float64 like joint."""
    weights = 2 * torch.rand(joint.dim() - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = sequences(joint.dim(), joint.shape[0])
    return ((x[:, 1:] == x[:, :-1]) * weights).sum(1).view_as(joint)


def tilted(joint: Tensor, cost: Tensor) -> Tensor:
    """p* proportional to joint exp(-cost)."""
    unnormalised = joint * torch.exp(-cost)
    return unnormalised / unnormalised.sum()


def process(joint: Tensor) -> MaskedCTMC:
    return MaskedCTMC(mask_token=joint.shape[0])


def conditional(joint: Tensor, state: Tensor) -> Tensor:
    """p(v | i, state) for every position, float64 [N, V]; uniform at positions that are filled in."""
    tokens = joint.shape[0]
    fixed = joint[tuple(slice(None) if x == tokens else slice(int(x), int(x) + 1) for x in state)]
    out = torch.full((joint.dim(), tokens), 1.0 / tokens, dtype=torch.float64)
    for i in (state == tokens).nonzero().flatten().tolist():
        marginal = fixed.sum(dim=[d for d in range(joint.dim()) if d != i])
        out[i] = marginal / marginal.sum()
    return out


def table(joint: Tensor) -> Tabular:
    """The model that fills in every state as the joint does; the mask token's logit is 0 and must be excluded."""
    positions, tokens = joint.dim(), joint.shape[0]
    states = sequences(positions, tokens + 1)
    logits = torch.zeros(len(states), positions, tokens + 1, dtype=torch.float64)
    for n, state in enumerate(states):
        if bool((state == tokens).any()):
            logits[n, :, :tokens] = conditional(joint, state).log()
    return Tabular(logits, tokens + 1)


def perturbed(model: Tabular, scale: float, seed: int) -> Tabular:
    noise = torch.randn(model.logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Tabular(model.logits.detach().double() + scale * noise, model._tokens)


def log_conditional(model: Tabular, state: Tensor) -> Tensor:
    """log p(v | i, state) of a table, [N, V], differentiable."""
    return model.logits[model.index(state)][:, :-1].log_softmax(dim=1)


def log_conditionals(model: Tabular, states: Tensor, position: Tensor) -> Tensor:
    """The same of a position of each of many states, [n, V]."""
    return model.logits[model.index(states), position][:, :-1].log_softmax(dim=1)


def inconsistent(positions: int, tokens: int, seed: int, spread: float = 1.0) -> Tabular:
    """A table of random conditionals, which are not those of one joint law, as a network's are not."""
    generator = torch.Generator().manual_seed(seed)
    size = ((tokens + 1) ** positions, positions, tokens + 1)
    return Tabular(spread * torch.randn(size, generator=generator, dtype=torch.float64), tokens + 1)


def path_log_prob(model: Tabular, positions: int, tokens: int) -> Tensor:
    """log p(x | order) of every order of unmasking and outcome, float64 [N!, V^N]."""
    finals = sequences(positions, tokens)
    found = []
    with torch.no_grad():
        for order in itertools.permutations(range(positions)):
            log_prob = torch.zeros(len(finals), dtype=torch.float64)
            states = torch.full_like(finals, tokens)
            for i in order:
                logits = model.logits[model.index(states)][:, i, :-1].double().log_softmax(dim=1)
                log_prob += logits.gather(1, finals[:, i : i + 1])[:, 0]
                states[:, i] = finals[:, i]
            found.append(log_prob)
    return torch.stack(found)


def generated(model: Tabular, positions: int, tokens: int) -> Tensor:
    """Distribution of X_1 when positions are filled in one at a time in uniform order, float64 like a joint."""
    return path_log_prob(model, positions, tokens).exp().mean(dim=0).view((tokens,) * positions)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def chi_square_z(counts: Tensor, probability: Tensor) -> float:
    """The chi-square statistic of counts against cell probabilities, as a standard normal score."""
    expected = counts.sum() * probability
    cells = expected > 0
    assert not bool(counts[~cells].any()), "a cell of probability zero was drawn"
    statistic = float(((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5
