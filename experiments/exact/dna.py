"""A surrogate of DNA: a Markov base, and a reward of binding sites whose optimum is known by dynamic programming.

The base is a chain of order 3 with random transitions. A window of six letters is a site with the probability that a
position weight matrix gives it, and the reward is the expected number of sites; a second matrix for the same motif,
which nothing is trained on, is the reward that is held out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dam.models.denoiser import Denoiser
from experiments.exact.automata import Automaton, AutomatonTask, kl, markov
from experiments.exact.networks import Beyond, Windows

ORDER, WIDTH, LETTERS = 3, 6, 4
BEST_OF = 16


def transitions(generator: torch.Generator, concentration: float = 2.0) -> Tensor:
    """p(v | the last three letters), float64 [64, 4], from a Dirichlet law."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torch's Dirichlet takes no generator
        gamma = torch._standard_gamma(torch.full((LETTERS**ORDER, LETTERS), concentration, dtype=torch.float64))
    return gamma / gamma.sum(dim=1, keepdim=True)


def site_probabilities(consensus: Tensor, kept: Sequence[float], threshold: float) -> Tensor:
    """How likely each window is a site, sigmoid(log-odds - threshold), float64 [4^6] in the order of its letters.

    Args:
        consensus: int64 [6], the motif.
        kept: the probability of the consensus letter at each of its positions; the others share the rest.
        threshold: in nats.
    """
    share = torch.tensor(kept, dtype=torch.float64)
    matrix = ((1 - share) / (LETTERS - 1))[:, None].expand(-1, LETTERS).clone()
    matrix[torch.arange(WIDTH), consensus] = share
    score = torch.zeros(1, dtype=torch.float64)
    for letter in (matrix * LETTERS).log():
        score = (score[:, None] + letter).flatten()
    return torch.sigmoid(score - threshold)


@dataclasses.dataclass(frozen=True)
class Sites(AutomatonTask):
    """r(x) = sum over windows of how likely each is a site.

    Args:
        seed: of transitions and motif.
        length: letters of a sequence.
    """

    seed: int
    length: int = 20
    beta: float = 0.15
    tokens = LETTERS
    columns: ClassVar = {
        "reward": ("E[r]", "{:.3f}"),
        "held_out": ("held out", "{:.3f}"),
        "three_mers": ("3-mers, correlation with p*", "{:.4f}"),
        "three_mers_base": ("with the base", "{:.4f}"),
        "log_base": ("log p_base a letter", "{:.3f}"),
    }

    @functools.cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return transitions(generator), torch.randint(LETTERS, (WIDTH,), generator=generator)

    @functools.cached_property
    def base(self) -> Automaton:
        """With the last three letters as states, in float32, as networks ask it."""
        return markov(self._drawn[0].float(), self.length, ORDER)

    @functools.cached_property
    def site(self) -> Tensor:
        return site_probabilities(self._drawn[1], [0.85] * WIDTH, threshold=5.0)

    @functools.cached_property
    def held_out(self) -> Tensor:
        """By another matrix: its ends matter less, and its threshold is lower."""
        return site_probabilities(self._drawn[1], [0.6, 0.8, 0.95, 0.95, 0.8, 0.6], threshold=4.0)

    @functools.cached_property
    def _long(self) -> Automaton:
        """The base with as many letters as states as a window has before its last."""
        return markov(self._drawn[0], self.length, WIDTH - 1)

    def _score(self, window: Tensor) -> Tensor:
        """Of values [4^6] of windows, [L, S, V]: there is a window once there are six letters."""
        score = window.view(1, -1, LETTERS).repeat(self.length, 1, 1)
        score[: WIDTH - 1] = 0
        return score

    @functools.cached_property
    def tilted(self) -> tuple[Automaton, float]:
        """With the last five letters as states."""
        return self._long.tilted(self._score(self.site / self.beta))

    def _windows(self, x: Tensor, width: int) -> Tensor:
        """Numbers of the windows of letters, int64 [B, L - width + 1]."""
        place = LETTERS ** torch.arange(width - 1, -1, -1)
        return (x.unfold(1, width, 1) * place).sum(dim=2)

    def reward(self, x: Tensor) -> Tensor:
        return self.site[self._windows(x, WIDTH)].sum(dim=1)

    def three_mers(self, law: Automaton) -> Tensor:
        """Mean frequencies of the 64 words of three letters in sequences of a law, float64 [64]."""
        occupancy = law.occupancy()[2:].sum(dim=0)
        return occupancy.reshape(-1, LETTERS**3).sum(dim=0) / (self.length - 2)

    def _figures(self, reward: float, held_out: float, three_mers: Tensor, log_base: float) -> dict[str, float]:
        both = torch.stack([three_mers, self.three_mers(self.optimum), self.three_mers(self._long)])
        correlation = torch.corrcoef(both)[0].tolist()
        return {
            "reward": reward,
            "held_out": held_out,
            "three_mers": correlation[1],
            "three_mers_base": correlation[2],
            "log_base": log_base / self.length,
        }

    def figures(self, x: Tensor) -> dict[str, float]:
        words = torch.bincount(self._windows(x, 3).flatten(), minlength=LETTERS**3).double()
        return self._figures(
            float(self.reward(x).mean()),
            float(self.held_out[self._windows(x, WIDTH)].sum(dim=1).mean()),
            words / words.sum(),
            float(self.log_base(x).mean()),
        )

    def of_law(self, law: Automaton) -> dict[str, float]:
        """Exact figures of a law with the last five letters as states."""
        reward, held_out = (law.expectation(self._score(window)) for window in (self.site, self.held_out))
        log_base = law.expectation(self._long.prob.log().expand(self.length, -1, -1))
        return self._figures(reward, held_out, self.three_mers(law), log_base)

    def best_of(self, count: int, samples: int) -> Tensor:
        """The best of so many sequences of the base, int64 [samples, L]."""
        drawn = self.base.sample(count * samples, torch.Generator().manual_seed(self.seed))
        best = self.reward(drawn).view(samples, count).argmax(dim=1)
        return drawn.view(samples, count, -1)[torch.arange(samples), best]

    def references(self, samples: int) -> dict[str, dict[str, float]]:
        return {
            "the base": {**self.of_law(self._long), "kl": kl(self._long, self.optimum)},
            f"best of {BEST_OF} of the base": self.figures(self.best_of(BEST_OF, samples)),
            "p*": self.of_law(self.optimum),
        }

    def denoiser(self) -> Denoiser:
        return Beyond(self.base, Windows(LETTERS))
