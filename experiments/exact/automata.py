"""Laws of sequences by an automaton: a Markov chain of order k, a walk on a grid. All that is asked of them is exact.

In state s the next token is v with probability p_t(v | s), and leads to the state to(s, v). Conditionals given any
tokens are by messages forward and backward, in time linear in the length (Rabiner, A tutorial on hidden Markov models,
1989), and a tilt by scores of (state, token) is again such a law, with another p_t.
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.exact.task import Task


@dataclasses.dataclass(frozen=True)
class Automaton:
    """A law of sequences of L tokens below V.

    Args:
        start: the first state.
        to: int64 [S, V], the state that a token leads to.
        prob: floating point [T, S, V], p_t(v | s), T being L, or 1 for the same at all times. Zeros forbid.
        length: L.
    """

    start: int
    to: Tensor
    prob: Tensor
    length: int

    def at(self, t: int) -> Tensor:
        """p_t(v | s), [S, V]."""
        return self.prob[t if len(self.prob) > 1 else 0]

    def states(self, x: Tensor) -> Tensor:
        """The states that tokens [B, L] go through, the first included, int64 [B, L + 1]."""
        found = [torch.full_like(x[:, 0], self.start)]
        for t in range(self.length):
            found.append(self.to[found[-1], x[:, t]])
        return torch.stack(found, dim=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), float64 [B] for x [B, L]; -inf where it is forbidden."""
        states = self.states(x)
        each = [self.at(t)[states[:, t], x[:, t]] for t in range(self.length)]
        return torch.stack(each, dim=1).double().log().sum(dim=1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """int64 [B, L]."""
        state, tokens = torch.full((count,), self.start), []
        for t in range(self.length):
            tokens.append(torch.multinomial(self.at(t)[state], 1, generator=generator)[:, 0])
            state = self.to[state, tokens[-1]]
        return torch.stack(tokens, dim=1)

    @functools.cached_property
    def _into(self) -> Tensor:
        """Numbers s V + v of what leads to each state, int64 [S, most]; S V where there is no more."""
        count, order = self.to.flatten().bincount(minlength=len(self.to)), self.to.flatten().argsort(stable=True)
        into = torch.full((len(self.to), int(count.max())), self.to.numel())
        column = torch.arange(len(order)) - (count.cumsum(0) - count).repeat_interleave(count)
        into[self.to.flatten()[order], column] = order
        return into

    def _led_to(self, weight: Tensor) -> Tensor:
        """Sums of weights [S, V, B] by the state they lead to, [S, B]."""
        flat = weight.flatten(0, 1)
        if int(self._into.max()) == len(flat):  # states that fewer tokens lead to than to others
            flat = F.pad(flat, (0, 0, 0, 1))
        return flat[self._into].sum(dim=1)

    def log_conditionals(self, tokens: Tensor) -> Tensor:
        """log p(v | i, x) given all tokens of x but the i-th, masked (token V) where not known, [B, L, V].

        -inf for what is forbidden. Rows whose tokens are impossible together give NaN.
        """
        return self.given(tokens)[0]

    def given(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`log_conditionals`, and the law of the state in front of each token given all tokens but that one, and of the
        last state given all, [B, L + 1, S].
        """
        S, V = self.to.shape
        # Rows are the last dimension, along which sums over states and tokens run at full width.
        masked = (tokens.t() == V)[:, None]
        allowed = (F.one_hot(tokens.t(), V + 1)[..., :V].transpose(1, 2).bool() | masked).to(self.prob)  # [L, V, B]
        # p_t(v | s) and how likely what is known behind is from there, [S, V, B], the last token's first.
        ahead = [self.at(self.length - 1)[..., None].expand(-1, -1, len(tokens))]
        for t in range(self.length - 1, 0, -1):
            value = (ahead[-1] * allowed[t]).sum(dim=1)
            ahead.append(self.at(t - 1)[..., None] * (value / value.amax(dim=0))[self.to])
        state = self.prob.new_zeros((S, len(tokens)))
        state[self.start] = 1
        found, states = [], []
        for t in range(self.length):
            both = state[:, None] * ahead.pop()
            found.append(both.sum(dim=0))
            states.append(both.sum(dim=1) / found[-1].sum(dim=0))
            state = self._led_to(state[:, None] * self.at(t)[..., None] * allowed[t])
            state = state / state.sum(dim=0)
        log_prob = torch.stack(found).log().log_softmax(dim=1)
        return log_prob.permute(2, 0, 1), torch.stack([*states, state]).permute(2, 0, 1)

    def tilted(self, score: Tensor) -> tuple[Automaton, float]:
        """The law p(x) e^{sum_t score_t(s_t, x_t)} / Z as an automaton, and log Z.

        Args:
            score: float64 [L, S, V].
        """
        value, log_z = torch.ones(len(self.to), dtype=torch.float64), 0.0
        prob = torch.zeros((self.length, *self.to.shape), dtype=torch.float64)
        for t in range(self.length - 1, -1, -1):
            weight = self.at(t).double() * score[t].exp() * value[self.to]
            total = weight.sum(dim=1)
            prob[t] = torch.where(total[:, None] > 0, weight / total[:, None], 0.0)
            value = total / total.max()
            log_z += float(total.max().log())
        return Automaton(self.start, self.to, prob, self.length), log_z + float(value[self.start].log())

    def occupancy(self) -> Tensor:
        """Probabilities of (state, token) at each time, float64 [L, S, V]."""
        state = torch.zeros(len(self.to), dtype=torch.float64)
        state[self.start] = 1
        found = []
        for t in range(self.length):
            found.append(state[:, None] * self.at(t).double())
            state = self._led_to(found[-1][..., None])[:, 0]
        return torch.stack(found)

    def expectation(self, score: Tensor) -> float:
        """E[sum_t score_t(s_t, x_t)], for scores [L, S, V]."""
        return float((self.occupancy() * score).sum())


def kl(p: Automaton, q: Automaton) -> float:
    """KL(p || q) of laws with the same states."""
    log_ratio = torch.stack([p.at(t).double().log() - q.at(t).double().log() for t in range(p.length)])
    occupancy = p.occupancy()
    return float(torch.where(occupancy > 0, occupancy * log_ratio, 0.0).sum())


@dataclasses.dataclass(frozen=True)
class Markov(Automaton):
    """An automaton whose state is the last m tokens, s = (s V + v) mod V^m after token v, alike at all times.

    States that differ in the oldest token alone lead to the same ones, so that sums over states and tokens are small
    products, one for all that states share: conditionals take a fifth of the time, of 64 states and 4 tokens.
    """

    def __post_init__(self) -> None:
        S, V = self.to.shape
        state = torch.arange(S)[:, None] * V + torch.arange(V)
        if S % V or len(self.prob) != 1 or not torch.equal(self.to, state % S):
            raise ValueError(
                "Markov: token v must lead from state s to (s V + v) mod V^m, by one p(v | s) at all times"
            )

    @functools.cached_property
    def _shared(self) -> Tensor:
        """p(v | s) by all but the oldest token of s, v, and the oldest, [S / V, V, V]."""
        S, V = self.to.shape
        return self.prob[0].view(V, S // V, V).permute(1, 2, 0).contiguous()

    def log_conditionals(self, tokens: Tensor) -> Tensor:
        (S, V), B = self.to.shape, len(tokens)
        masked = (tokens.t() == V)[:, None]
        allowed = (F.one_hot(tokens.t(), V + 1)[..., :V].transpose(1, 2).bool() | masked).to(self.prob)  # [L, V, B]
        back = self._shared.transpose(1, 2).contiguous()
        # How likely what is known is behind each state, [S / V, V, B] with the last token second, the last time first.
        behind = [self.prob.new_ones((S // V, V, B))]
        for t in range(self.length - 1, 0, -1):
            value = torch.bmm(back, behind[-1] * allowed[t])
            if t % 4 == 0:  # often enough for float32
                value = value / value.amax(dim=(0, 1))
            behind.append(value.transpose(0, 1).reshape(S // V, V, B))
        state = self.prob.new_zeros((S, B))
        state[self.start] = 1
        found = []
        for t in range(self.length):
            led = torch.bmm(self._shared, state.view(V, S // V, B).transpose(0, 1))  # [S / V, V, B]
            found.append((led * behind.pop()).sum(dim=0))
            state = (led * allowed[t]).view(S, B)
            if t % 4 == 0:
                state = state / state.sum(dim=0)
        return torch.stack(found).log().log_softmax(dim=1).permute(2, 0, 1)


def markov(prob: Tensor, length: int, memory: int) -> Markov:
    """A Markov chain of order k, as an automaton whose state is the last `memory` >= k tokens; it begins after zeros.

    Args:
        prob: [V^k, V], p(v | the last k tokens), the last of them fastest.
    """
    contexts, V = prob.shape
    state = torch.arange(V**memory)
    to = (state[:, None] * V + torch.arange(V)) % V**memory
    return Markov(0, to, prob[state % contexts][None], length)


class AutomatonTask(Task):
    """A task whose base and optimum are laws of automata."""

    @property
    @abc.abstractmethod
    def base(self) -> Automaton: ...

    @property
    @abc.abstractmethod
    def tilted(self) -> tuple[Automaton, float]:
        """p* and log Z."""

    @property
    def optimum(self) -> Automaton:
        """p*."""
        return self.tilted[0]

    @property
    def log_z(self) -> float:
        return self.tilted[1]

    def log_base(self, x: Tensor) -> Tensor:
        return self.base.log_prob(x)
