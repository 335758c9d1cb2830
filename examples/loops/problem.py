"""What the loops beside this file share: a tiny masked model, its rollout, and a reward with a known optimum.

Six positions, 12 tokens of three kinds. The base draws every position by itself; the reward counts neighbours of one
kind. So p* ~ p_base exp(reward / beta) is a Markov chain over positions, and what a loop ends at can be compared with
its mean reward and its KL to the base, which `optimum` has exactly.
"""

import argparse
import copy
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dam

LENGTH, TOKENS, KINDS, BETA = 6, 12, 3, 0.7
MASK = TOKENS  # the head has a row for it, which no draw may take: exclude=MASK
PAIRS = LENGTH - 1


class Model(nn.Module):
    """Hidden states of an MLP of all positions; the output layer is asked at the positions that need it only."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS + 1, 16)
        self.body = nn.Sequential(nn.Linear(LENGTH * 16, width), nn.GELU(), nn.Linear(width, LENGTH * 32), nn.GELU())
        self.output = nn.Linear(32, TOKENS + 1)
        nn.init.zeros_(self.output.weight)  # at first only the bias speaks: positions are independent
        nn.init.normal_(self.output.bias, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Input of the output layer, [B, L, D], for tokens int64 [B, L]."""
        return self.body(self.embedding(tokens).flatten(1)).view(*tokens.shape, 32)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        return self.output.weight, self.output.bias


def model_and_base(seed: int = 0) -> tuple[Model, Model]:
    """A model, and the frozen copy of it that it is to stay close to."""
    torch.manual_seed(seed)
    model = Model()
    return model, copy.deepcopy(model).requires_grad_(False)


def reward(tokens: list[int]) -> float:
    """Neighbours of one kind. Plain Python: nothing differentiates it."""
    return float(sum(a % KINDS == b % KINDS for a, b in itertools.pairwise(tokens)))


class Rollout(NamedTuple):
    """B trajectories from masks only, one position a call, in an order of their own."""

    final: Tensor  # int64 [B, L]
    order: Tensor  # int64 [B, L]: the position that each call filled
    log_prob: Tensor  # float32 [B, L]: of the tokens drawn
    base_log_prob: Tensor  # float32 [B, L]: under the base
    reward: Tensor  # float32 [B]

    @property
    def log_ratio(self) -> Tensor:
        """log p_base - log p_model of the jumps: the escape rates are equal, so this is all of the path's weight."""
        return self.base_log_prob - self.log_prob

    def states(self, call: int) -> Tensor:
        """What the trajectories were before a call, int64 [B, L]."""
        filled = torch.zeros_like(self.final, dtype=torch.bool).scatter(1, self.order[:, :call], True)
        return torch.where(filled, self.final, MASK)


@torch.no_grad()
def rollout(model: Model, base: Model, count: int, seed: int) -> Rollout:
    order = torch.rand((count, LENGTH), generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    tokens, rows = torch.full((count, LENGTH), MASK), torch.arange(count)
    log_probs, base_log_probs = [], []
    for call in range(LENGTH):
        position = order[:, call]
        # A row id of its own for every draw: what is drawn then depends on seed, trajectory and call alone.
        row_ids = call * count + rows
        drawn = dam.linear_jump(model(tokens)[rows, position], *model.head, exclude=MASK, seed=seed, row_ids=row_ids)
        weight, bias = base.head
        of_base = dam.linear_log_prob(base(tokens)[rows, position], weight, drawn.target, bias, exclude=MASK)
        log_probs.append(drawn.log_prob)
        base_log_probs.append(of_base)
        tokens[rows, position] = drawn.target
    rewards = torch.tensor([reward(row) for row in tokens.tolist()])
    return Rollout(tokens, order, torch.stack(log_probs, dim=1), torch.stack(base_log_probs, dim=1), rewards)


def remasked(final: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States in which 1 to L positions, each number as often, are masked; and which are, bool [B, L]."""
    count = torch.randint(1, LENGTH + 1, (len(final), 1), generator=generator)
    masked = torch.rand(final.shape, generator=generator).argsort(dim=1).argsort(dim=1) < count
    return torch.where(masked, MASK, final), masked


def optimum(base: Model) -> tuple[float, float]:
    """Mean reward of p*, and KL(p* || p_base), by the transfer matrix between kinds."""
    law = F.softmax(base.output.bias[:TOKENS].double(), dim=0)
    kinds = torch.zeros(KINDS, dtype=torch.float64).index_add_(0, torch.arange(TOKENS) % KINDS, law)
    gain = torch.tensor(1 / BETA, dtype=torch.float64, requires_grad=True)
    transfer = torch.where(torch.eye(KINDS, dtype=torch.bool), gain.exp(), 1.0) * kinds
    log_normalizer = (kinds @ torch.linalg.matrix_power(transfer, PAIRS)).sum().log()
    (mean_reward,) = torch.autograd.grad(log_normalizer, gain)
    return float(mean_reward), float(mean_reward / BETA - log_normalizer.detach())


def options(description: str | None, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="trajectories a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


class Report:
    """Prints a line every 20 steps, and at the end how far the model is from p*."""

    def __init__(self, base: Model, steps: int):
        self._base, self._steps = base, steps

    def step(self, n: int, drawn: Rollout) -> None:
        if n % 20 == 0 or n == self._steps - 1:
            print(f"step {n:4d}  {_line(drawn)}")

    def end(self, model: Model, seed: int) -> dict[str, float]:
        """Of 4,096 trajectories of the model, beside what p* has."""
        drawn = rollout(model, self._base, 4096, seed)
        best_reward, best_kl = optimum(self._base)
        print(
            f"the model  {_line(drawn)}\np*         reward {best_reward:.3f}  KL to the base {best_kl:.3f}  ESS 1.000"
        )
        return {"best_reward": best_reward, "best_kl": best_kl, **_figures(drawn)}


def _figures(drawn: Rollout) -> dict[str, float]:
    weights = dam.adjoint_weights(drawn.log_ratio[None], -drawn.reward[None] / BETA)
    return {
        "reward": float(drawn.reward.mean()),
        "kl": float(-drawn.log_ratio.sum(dim=1).mean()),
        "ess": float(weights.ess[0]) / len(drawn.reward),  # the share of the trajectories that samples of p* are worth
    }


def _line(drawn: Rollout) -> str:
    return "reward {reward:.3f}  KL to the base {kl:.3f}  ESS {ess:.3f}".format(**_figures(drawn))
