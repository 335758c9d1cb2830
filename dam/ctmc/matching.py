"""Matching of the rates of moves at the states of trajectories, to targets from the weights of their paths.

Of trajectories of a chain u with weights w = p*/p_u, of mean 1, the cross-entropy of paths is

    E_p*[-log p_v] = E_u[ w ( sum over events of  exposure Lambda_v(x)  -  sum over jumps of  log v(y, x) ) ]

up to what does not depend on v, and least at the optimum's rates, at every state and time that trajectories come to:
the generalised KL of `dam.matching_loss(normalized=False)` whose targets are the jumps, with all trajectories, all
events and no state that is simulated from anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dam.ctmc.moves import MoveModel, MovesCTMC
from dam.ctmc.simulate import Path
from dam.ops.matching_loss import matching_loss


class MoveTargets(NamedTuple):
    """What to match where: R events, each a state and the move that was made out of it, if any.

    The loss is the sum over events, each times its `scale`.
    """

    states: Tensor  # int64 [R, L]
    time: Tensor  # float64 [R]
    exposure: Tensor  # float64 [R]: time that the event stands for
    move: Tensor  # int64 [R], -1 for none
    weight: Tensor  # float64 [R]: of its trajectory
    scale: Tensor  # float64 [R]

    def drawn(self, count: int, generator: torch.Generator | None = None) -> MoveTargets:
        """`count` of the events, drawn uniformly with replacement: the same loss in expectation, for less of a network.

        Raises:
            ValueError: there are no events to draw from.
        """
        number = len(self.move)
        if number == 0:
            raise ValueError("there are no events to draw from")
        device = None if generator is None else generator.device
        at = torch.randint(number, (count,), generator=generator, device=device).to(self.move.device)
        part = MoveTargets(*(value[at] for value in self))
        return part._replace(scale=part.scale * (number / count))


def path_targets(
    path: Path,
    weight: Tensor,  # [G, K], or [B]
    *,
    first_jump: bool = False,
) -> MoveTargets:
    """Targets at the states that trajectories went through: every event, so every jump, of all of them.

    Weights less a baseline may go into `matching`, see there. Of K trajectories from one state each, `first_jump` is
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
    return MoveTargets(
        path.state[row, event],
        path.time[row, event],
        path.exposure[row, event],
        path.position[row, event],
        weight.detach().flatten().double()[row],
        path.time.new_full((len(row),), 1 / count),
    )


def matching(
    process: MovesCTMC,
    model: MoveModel,
    targets: MoveTargets,
    *,
    baseline: float = 0.0,
    teacher: MoveModel | None = None,
) -> Tensor:
    """The matching loss of a model's rates v at targets, a mean over trajectories:

        sum over events of scale ( (weight - b) (exposure Lambda_v - 1[jump] log v)
                                   + b exposure (Lambda_v - sum_y u(y) log v(y)) )

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
        raise ValueError("matching: a teacher says what the baseline's share of the weights is; give a baseline too")
    jumps = process.jumps(targets.states, targets.time)
    log_rates = jumps.log_rates(model).float()
    move = targets.move[:, None]
    # exposure Lambda_v - log v(move), as exposure times the loss of a target of weight 1 / exposure.
    loss = matching_loss(
        log_rates,
        move,
        1 / targets.exposure[:, None],
        row_scale=targets.scale * (targets.weight - baseline) * targets.exposure,
        normalized=False,
    )
    if teacher is None:
        return loss
    with torch.no_grad():
        drew = jumps.log_rates(teacher).float()
    none = torch.full_like(move, -1)
    ones = torch.ones_like(targets.exposure)
    return loss + matching_loss(
        log_rates,
        none,
        ones[:, None],
        base_logits=drew,
        base_weight=ones,
        row_scale=targets.scale * baseline * targets.exposure,
        normalized=False,
    )
