"""Chains of which a function of yours lists the moves out of a state: swaps, relabellings, hops, or any other.

What is simulated, weighed and matched is a rate for each listed move, by the operations that do so for the values of a
vocabulary: `dam.jump`, `dam.rate_ratio` and `dam.matching_loss` over M moves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTS = ("multiplier", "rate")


class Moves(NamedTuple):
    """The moves out of B states, in M slots.

    A slot of rate 0 has none, whatever its neighbour, which of the listings below is the state itself.
    """

    neighbours: Tensor  # int64 [B, M, L]: where each move leads
    rate: Tensor  # float [B, M]: the base's rate of each, per unit of time


ListMoves = Callable[[Tensor], Moves]
# Numbers [B, M] for the moves out of states [B, L] at times [B].
MoveModel = Callable[[Tensor, Tensor, Moves], Tensor]


@dataclasses.dataclass(frozen=True)
class MovesCTMC:
    """A chain whose jumps are the moves that a function lists, with the base's rates r(y, x).

        u_t(y, x) = r(y, x) exp(a_t(y, x))       predicts="multiplier"
        u_t(y, x) = exp(a_t(y, x))               predicts="rate"

    A model maps states [B, L], times [B] and their `Moves` to a_t, [B, M]; `base` is the one of the listed rates. What
    it gives for slots without a move is not looked at.

    Discrete Adjoint Matching needs X_0 and X_1 to be independent under the base. A single state to start from always
    is, and then p*(X_1) is in proportion to p_base(X_1 | x_0) exp(-g(X_1)). From an X_0 that is drawn, the optimum also
    tilts its law, to p_base(X_0) exp(-V_0(X_0)), which a model of rates cannot follow, unless the chain has forgotten
    X_0 by time 1.

    Args:
        list_moves: from states int64 [B, L] to `Moves`; of a state the same each time, and of each by itself.
        predicts: what a model's numbers are.
        largest_escape: what no escape rate of a model or the base exceeds, in any state, for `simulate`; `gillespie`
            needs none.
        check: whether each listing is tested for self-moves and duplicates, which costs about what a small network
            does; shapes and rates always are.

    Raises:
        ValueError: an argument is out of range; or, where moves are listed, there are none at all, a rate is NaN,
            infinite or negative, a move leads nowhere else, or two lead to the same state: their rates would be one
            rate, which no model of each by itself could tell. The message names the state.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 1 and 4; swaps: Kawasaki, Diffusion constants
    near the critical point for time-dependent Ising models, 1966.
    """

    list_moves: ListMoves
    predicts: str = "multiplier"
    largest_escape: float | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if not callable(self.list_moves):
            raise ValueError(f"MovesCTMC: list_moves must be a function of states; got {self.list_moves!r}")
        if self.predicts not in PREDICTS:
            raise ValueError(f"MovesCTMC: predicts must be one of {', '.join(PREDICTS)}; got {self.predicts!r}")
        if self.largest_escape is not None and not 0 < self.largest_escape < float("inf"):
            raise ValueError(f"MovesCTMC: largest_escape must be positive and finite; got {self.largest_escape}")

    def moves(self, tokens: Tensor) -> Moves:
        """Those out of states int64 [B, L], checked; rates in float64."""
        moves = self.list_moves(tokens)
        _check_form(tokens, moves)
        moves = Moves(moves.neighbours, moves.rate.double())
        bad = ~((moves.rate >= 0) & (moves.rate < torch.inf))
        _refuse(bad, tokens, moves, "has a rate that is negative or not finite")
        if self.check:
            _check_destinations(tokens, moves)
        return moves

    def jumps(self, tokens: Tensor, time: Tensor) -> MoveJumps:
        return MoveJumps(self, tokens, time, self.moves(tokens))

    def base(self, tokens: Tensor, time: Tensor, moves: Moves) -> Tensor:
        """The model of the listed rates."""
        return torch.zeros_like(moves.rate) if self.predicts == "multiplier" else moves.rate.log()

    def log_rates(self, prediction: Tensor, moves: Moves) -> Tensor:
        """log u_t(y, x) of a model's prediction [B, M], float64 [B, M], -inf where a slot has no move."""
        if prediction.shape != moves.rate.shape:
            raise ValueError(
                f"a model of moves must give a number for each slot, {list(moves.rate.shape)}; "
                f"got {list(prediction.shape)}"
            )
        listed = moves.rate > 0
        log_rates = prediction.double()
        if self.predicts == "multiplier":
            log_rates = log_rates + torch.where(listed, moves.rate, 1.0).log()
        return torch.where(listed, log_rates, -torch.inf)

    def escape_bound(self, start: float, end: float, length: int) -> float:
        if self.largest_escape is None:
            raise ValueError(
                "simulate needs to know what no escape rate exceeds: give MovesCTMC a largest_escape, or use gillespie"
            )
        return self.largest_escape


@dataclasses.dataclass
class MoveJumps:
    """The moves out of B states at their times, as `simulate` and `gillespie` take them."""

    process: MovesCTMC
    tokens: Tensor  # int64 [B, L]
    time: Tensor  # float64 [B]
    moves: Moves

    def log_rates(self, model: MoveModel) -> Tensor:
        """float64 [B, M], differentiable in the model.

        Raises:
            ValueError: a rate is NaN or infinite; the message names the move, the state and the time.
        """
        log_rates = self.process.log_rates(model(self.tokens, self.time, self.moves), self.moves)
        bad = ~(log_rates < torch.inf)
        if bool(bad.any()):
            row, slot = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"the rate of move {slot}, to {self.moves.neighbours[row, slot].tolist()}, is "
                f"{float(log_rates[row, slot].exp())} at state {self.tokens[row].tolist()} and time "
                f"{float(self.time[row]):g}; rates must be finite and not negative"
            )
        return log_rates

    def destination(self, jump: Tensor) -> Tensor:
        there = self.moves.neighbours[torch.arange(len(jump), device=jump.device), jump.clamp(min=0)]
        return torch.where(jump[:, None] < 0, self.tokens, there)

    def named(self, jump: Tensor) -> tuple[Tensor, Tensor]:
        return jump, torch.full_like(jump, -1)


def _check_form(tokens: Tensor, moves: Moves) -> None:
    count, length = tokens.shape
    neighbours, rate = moves
    if neighbours.dim() != 3 or neighbours.dtype != torch.int64 or neighbours.shape[::2] != (count, length):
        raise ValueError(
            f"list_moves must give neighbours int64 [{count}, M, {length}] for states [{count}, {length}]; got "
            f"{neighbours.dtype} {list(neighbours.shape)}"
        )
    if rate.shape != neighbours.shape[:2] or not rate.is_floating_point():
        raise ValueError(
            f"list_moves must give a floating-point rate for each neighbour, {list(neighbours.shape[:2])}; got "
            f"{rate.dtype} {list(rate.shape)}"
        )
    if neighbours.shape[1] == 0:
        raise ValueError("list_moves lists no moves at all: M is 0. A state without moves has slots of rate 0")


def _check_destinations(tokens: Tensor, moves: Moves) -> None:
    listed = moves.rate > 0
    same = (moves.neighbours == tokens[:, None]).all(dim=2)
    _refuse(same & listed, tokens, moves, "leads to the state itself")
    number = state_numbers(moves.neighbours)  # unequal states that share one are told apart below
    number = torch.where(listed, number, torch.arange(listed.shape[1], device=tokens.device))
    order = number.argsort(dim=1, stable=True)
    number, listed = number.gather(1, order), listed.gather(1, order)
    alike = (number.diff(dim=1) == 0) & listed[:, 1:] & listed[:, :-1]
    for row, at in alike.nonzero().tolist():
        one, other = int(order[row, at]), int(order[row, at + 1])
        if torch.equal(moves.neighbours[row, one], moves.neighbours[row, other]):
            raise ValueError(
                f"list_moves: moves {one} and {other} out of state {tokens[row].tolist()} both lead to "
                f"{moves.neighbours[row, one].tolist()}; list each neighbour once, with the sum of the rates"
            )


def state_numbers(tokens: Tensor) -> Tensor:
    """Numbers of states [..., L], int64 [...]: of equal states equal, of unequal ones but for one pair in 2^63."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(-(2**62), 2**62, (tokens.shape[-1],), generator=generator).to(tokens.device)
    return (tokens * factor).sum(dim=-1)


def _refuse(bad: Tensor, tokens: Tensor, moves: Moves, what: str) -> None:
    if bool(bad.any()):
        row, slot = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"list_moves: move {slot} out of state {tokens[row].tolist()}, to {moves.neighbours[row, slot].tolist()} "
            f"at rate {float(moves.rate[row, slot]):g}, {what}"
        )


# ---- listings


def swap(rate: float = 1.0, pairs: Sequence[tuple[int, int]] | Tensor | None = None) -> ListMoves:
    """Kawasaki moves: two sites with different tokens exchange them, so that the composition stays.

    Slot p is pair p of the sites.

    Args:
        rate: of each exchange.
        pairs: the sites that can, [P, 2]; all of them, in the order of itertools.combinations, unless given.
    """
    _positive("swap", rate)

    def list_moves(tokens: Tensor) -> Moves:
        first, second = _pairs("swap", pairs, tokens, itertools.combinations)
        neighbours = tokens[:, None].repeat(1, len(first), 1)
        slot = torch.arange(len(first), device=tokens.device)
        neighbours[:, slot, first], neighbours[:, slot, second] = tokens[:, second], tokens[:, first]
        return Moves(neighbours, rate * (tokens[:, first] != tokens[:, second]).double())

    return list_moves


def relabel(size: int, rate: float = 1.0) -> ListMoves:
    """Single-site moves: a site gets another of the tokens 0 .. size - 1. Slot i size + v sets site i to v.

    Args:
        size: number of tokens.
        rate: of each.
    """
    _positive("relabel", rate)

    def list_moves(tokens: Tensor) -> Moves:
        if bool(((tokens < 0) | (tokens >= size)).any()):
            least, most = int(tokens.min()), int(tokens.max())
            raise ValueError(f"relabel: tokens must be in 0 .. {size - 1}; got {least} to {most}")
        length = tokens.shape[1]
        site = torch.arange(length, device=tokens.device).repeat_interleave(size)
        token = torch.arange(size, device=tokens.device).repeat(length)
        neighbours = tokens[:, None].repeat(1, length * size, 1)
        neighbours[:, torch.arange(length * size, device=tokens.device), site] = token
        return Moves(neighbours, rate * (tokens[:, site] != token).double())

    return list_moves


def hop(rate: float = 1.0, pairs: Sequence[tuple[int, int]] | Tensor | None = None) -> ListMoves:
    """Moves of one of the particles at a site to another: states are numbers of particles at L sites.

    Slot p is pair p, from its first site to its second.

    Args:
        rate: of each particle for each pair, so that a site with n particles is left at n times it.
        pairs: from where to where, [P, 2]; all, in the order of itertools.permutations, unless given.
    """
    _positive("hop", rate)

    def list_moves(tokens: Tensor) -> Moves:
        if bool((tokens < 0).any()):
            raise ValueError(f"hop: numbers of particles must not be negative; got {int(tokens.min())}")
        source, target = _pairs("hop", pairs, tokens, itertools.permutations)
        neighbours = tokens[:, None].repeat(1, len(source), 1)
        slot = torch.arange(len(source), device=tokens.device)
        occupied = (tokens[:, source] > 0).long()
        neighbours[:, slot, source] -= occupied
        neighbours[:, slot, target] += occupied
        return Moves(neighbours, rate * tokens[:, source].double())

    return list_moves


def joined(*listings: ListMoves) -> ListMoves:
    """The moves of several listings, in their order; no two of them may list the same neighbour."""

    def list_moves(tokens: Tensor) -> Moves:
        parts = [listing(tokens) for listing in listings]
        return Moves(torch.cat([p.neighbours for p in parts], dim=1), torch.cat([p.rate for p in parts], dim=1))

    return list_moves


def _positive(listing: str, rate: float) -> None:
    if not 0 < rate < float("inf"):
        raise ValueError(f"{listing}: rate must be positive and finite; got {rate}")


def _pairs(
    listing: str,
    pairs: Sequence[tuple[int, int]] | Tensor | None,
    tokens: Tensor,
    every: Callable[[range, int], Iterable[tuple[int, ...]]],
) -> tuple[Tensor, Tensor]:
    """First and second site of each pair, int64 [P]."""
    length = tokens.shape[1]
    if length < 2:
        raise ValueError(f"{listing}: states must have two sites or more; got {list(tokens.shape)}")
    of = torch.as_tensor(list(every(range(length), 2)) if pairs is None else pairs, device=tokens.device)
    if of.dim() != 2 or of.shape[1] != 2 or of.dtype != torch.int64:
        raise ValueError(f"{listing}: pairs must be two sites each, int64 [P, 2]; got {of.dtype} {list(of.shape)}")
    if bool(((of < 0) | (of >= length)).any()):
        raise ValueError(f"{listing}: pairs must name sites 0 .. {length - 1} of states [B, {length}]")
    return of[:, 0], of[:, 1]
