"""Matching of the rates of moves at the states of trajectories, to targets from the weights of their paths.

Of trajectories of a chain u with weights w = p*/p_u, of mean 1, the cross-entropy of paths is

    E_p*[-log p_v] = E_u[ w ( sum over events of  exposure Lambda_v(x)  -  sum over jumps of  log v(y, x) ) ]

up to what does not depend on v, and least at the optimum's rates, at every state and time that trajectories come to:
the generalised KL of `dam.matching_loss(normalized=False)` whose targets are the jumps, with all trajectories, all
events and no state that is simulated from anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.ctmc.moves import MoveModel, MovesCTMC, state_numbers
from dam.ctmc.simulate import Path
from dam.ops.matching_loss import matching_loss


class MoveTargets(NamedTuple):
    """What to match where: R states with J moves out of each, that trajectories spent time in and made.

    Everything is a sum over events, over the number of trajectories; what is weighted has each event's trajectory's
    weight in it. Of `path_targets` a row is an event, and J is 1; `merged` rows have several.
    """

    states: Tensor  # int64 [R, L]
    time: Tensor  # float64 [R]
    exposure: Tensor  # float64 [R]: time that was spent
    weighted_exposure: Tensor  # float64 [R]
    move: Tensor  # int64 [R, J], -1 for none
    jumps: Tensor  # float64 [R, J]: that were made
    weighted_jumps: Tensor  # float64 [R, J]

    def drawn(self, count: int, generator: torch.Generator | None = None) -> MoveTargets:
        """`count` of the rows, drawn uniformly with replacement: the same loss in expectation, for less of a network.

        Raises:
            ValueError: there are no rows to draw from.
        """
        number = len(self.move)
        if number == 0:
            raise ValueError("there are no events to draw from")
        device = None if generator is None else generator.device
        at = torch.randint(number, (count,), generator=generator, device=device).to(self.move.device)
        states, time, exposure, weighted, move, *jumps = (value[at] for value in self)
        more = number / count
        return MoveTargets(states, time, more * exposure, more * weighted, move, *(more * value for value in jumps))

    def merged(self) -> MoveTargets:
        """Rows of equal states and times as one: the same loss, with a network call for each that is distinct."""
        key = state_numbers(self.states) ^ self.time.view(torch.int64)
        _, row = key.unique(return_inverse=True)
        count = int(row.max()) + 1 if len(row) else 0
        slots = max(int(self.move.max()) + 1, 1) if self.move.numel() else 1  # one, of -1, where nothing jumped
        first = row.new_zeros(count).scatter_(0, row, torch.arange(len(row), device=row.device))  # one of each
        at = (row[:, None] * (slots + 1) + self.move % (slots + 1)).flatten()  # -1 goes to a slot of its own

        def summed(value: Tensor, index: Tensor, size: int) -> Tensor:
            return value.new_zeros(size).index_add_(0, index, value.flatten())

        jumps, weighted = (
            summed(value, at, count * (slots + 1)).view(count, slots + 1)[:, :slots]
            for value in (self.jumps, self.weighted_jumps)
        )
        return MoveTargets(
            self.states[first],
            self.time[first],
            summed(self.exposure, row, count),
            summed(self.weighted_exposure, row, count),
            torch.where(jumps > 0, torch.arange(slots, device=row.device), -1),
            jumps,
            weighted,
        )


def path_targets(
    path: Path,
    weight: Tensor,  # [G, K], or [B]
    *,
    first_jump: bool = False,
) -> MoveTargets:
    """Targets at the states that trajectories went through: every event, so every jump, of all of them.

    Weights less a baseline may go into `loss`, see there. Of K trajectories from one state each, `first_jump` is
    what Discrete Adjoint Matching as published matches: with the normaliser "state", the weights being normalised over
    the K of each state, and all weights but one trajectory's 0, times K.

    Args:
        path: of `gillespie` or `simulate`, of B trajectories of a `MovesCTMC`.
        weight: any number for each of the B = G K trajectories, from `dam.adjoint_weights` or
            `dam.adjoint.tilted_weights`.
        first_jump: only the events up to each trajectory's first jump, all of them out of the state that it started
            from.

    Raises:
        ValueError: the weights are not one for each trajectory, or the path is not one of moves.

    Source: So et al., arXiv 2602.07132, Alg. 1 and Eq. 14; the cross-entropy of paths: Zhu et al., MDNS,
    arXiv 2508.10684.
    """
    if path.state is None:
        raise ValueError("path_targets: the path must be of moves, of gillespie or simulate with a MovesCTMC")
    count = len(path.final)
    if weight.numel() != count:
        raise ValueError(f"path_targets: weight must have an element per trajectory, {count}; got {list(weight.shape)}")
    used = path.exposure > 0
    if first_jump:
        jumped = path.position >= 0
        used &= jumped.cumsum(dim=1) - jumped.long() == 0
    row, event = used.nonzero(as_tuple=True)
    exposure = path.exposure[row, event] / count
    move = path.position[row, event][:, None]
    jumps = (move >= 0).double() / count
    of = weight.detach().flatten().double()[row]
    return MoveTargets(
        path.state[row, event],
        path.time[row, event],
        exposure,
        of * exposure,
        move,
        jumps,
        of[:, None] * jumps,
    )


def loss(
    process: MovesCTMC,
    model: MoveModel,
    targets: MoveTargets,
    *,
    baseline: float = 0.0,
    teacher: MoveModel | None = None,
) -> Tensor:
    """The matching loss of a model's rates v at targets, a mean over trajectories:

        sum over events of (weight - b) (exposure Lambda_v - 1[jump] log v)
                           + b exposure (Lambda_v - sum_y u(y) log v(y))

    with the baseline b and the teacher u, the model that drew the trajectories. Its expectation does not depend on b:
    jumps arrive at the rates u. With b = 1, the mean of the weights, its noise vanishes as the model comes to p*, where
    the weights of `gillespie` are all 1 (up to what constant rates in an interval leave); with b = 0 the noise of the
    jumps stays. Without a teacher the second term, whose gradient is 0 at the model that drew, is left out: right for
    one step on a batch, while with several the first alone would drive the model away.

    Args:
        process: names the moves.
        model: whose rates are matched; differentiated.
        targets: of `path_targets`.
        baseline: b.
        teacher: u, not differentiated; needed only with a baseline.

    Returns:
        A scalar in the dtype that the model's rates have, at least float32.

    Raises:
        ValueError: rates are NaN or infinite, or a teacher is given without a baseline.
    """
    if teacher is not None and baseline == 0:
        raise ValueError("loss: a teacher says what the baseline's share of the weights is; give a baseline too")
    jumps = process.jumps(targets.states, targets.time)
    log_rates = jumps.log_rates(model).float()
    drew: dict[str, Any] = {}
    if teacher is not None:
        with torch.no_grad():
            share = torch.full_like(targets.exposure, baseline)
            drew = {"base_logits": jumps.log_rates(teacher).float(), "base_weight": share}
    # What is matched is rates, jumps over time spent; the rest of the weighted time counts the escape rate alone.
    asked = targets.weighted_jumps - baseline * targets.jumps
    rest = targets.weighted_exposure - (1 if drew else 1 + baseline) * targets.exposure
    matched = matching_loss(
        log_rates,
        targets.move,
        asked / targets.exposure[:, None],
        row_scale=targets.exposure,
        normalized=False,
        **drew,
    )
    none = torch.full_like(targets.move[:, :1], -1)
    return matched + matching_loss(log_rates, none, torch.zeros_like(rest)[:, None], row_scale=rest, normalized=False)


def log_ratio(process: MovesCTMC, model: MoveModel, path: Path, rows: Tensor | None = None) -> Tensor:
    """log p_base - log p_v of trajectories, by a model that need not have drawn them.

        sum over events of  exposure (Lambda_v - Lambda_base) + 1[jump] (log u_base - log v)

    Less g(X_1) it is constant at the optimum, on trajectories of any law, so that its variance over them is a loss: the
    log-variance divergence, whose noise vanishes there. On the model's own trajectories nothing finds a mode that the
    model has lost, so begin with `loss`.

    Args:
        process: names the moves, and the base's rates.
        model: differentiated; called once, at all events.
        path: of `gillespie`, of B trajectories of the process.
        rows: int64 [N], of which trajectories; all unless given.

    Returns:
        float64 [B], or [N].

    Raises:
        ValueError: rates are NaN or infinite; or the path is not one of moves, or was thinned, so that the time that
            its trajectories spent in a state is not known.

    Source: Richter et al., VarGrad, 2020; of chains Zhu et al., MDNS, arXiv 2508.10684.
    """
    if path.state is None:
        raise ValueError("log_ratio: the path must be of moves, of gillespie with a MovesCTMC")
    if path.thinned:
        raise ValueError(
            "log_ratio: of a path of simulate only the mean of the time in a state is known, not the time, so that "
            "another model's weights would be wrong; draw with gillespie"
        )
    rows = torch.arange(len(path.final), device=path.final.device) if rows is None else rows
    exposure, position = path.exposure[rows], path.position[rows]
    row, event = (exposure > 0).nonzero(as_tuple=True)
    jumps = process.jumps(path.state[rows[row], event], path.time[rows[row], event])
    log_rates, base_rates = jumps.log_rates(model), jumps.log_rates(process.base)
    gap = (log_rates.exp().sum(dim=1) - base_rates.exp().sum(dim=1)) * exposure[row, event]
    jumped = (position[row, event] >= 0).nonzero()[:, 0]
    move = position[row, event][jumped]
    ratio = base_rates[jumped, move] - log_rates[jumped, move]
    total = torch.zeros(len(rows), dtype=gap.dtype, device=gap.device)
    return total.index_add(0, row, gap).index_add(0, row[jumped], ratio)
