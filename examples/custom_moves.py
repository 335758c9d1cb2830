"""A process of one's own: a walker on a graph that carries a parcel, taught where to leave it, against the exact law.

    python examples/custom_moves.py

A state is (where the walker is, where the parcel is). Along an edge the walker goes alone, or takes the parcel along if
it is there. The parcel never moves by itself, which no chain of independent coordinates can say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import dam
from dam.ctmc import Moves, MovesCTMC, enumeration, gillespie, matching

EDGES = torch.tensor([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (1, 4)])  # of a house of five rooms
ROOMS = 5
ALONE, CARRYING = 2.0, 1.0  # rates along an edge
TIMES = [1 - (1 - k / 8) ** 1.5 for k in range(9)]
START = torch.tensor([[0, 0]])


def list_moves(states: Tensor) -> Moves:
    """Two slots for each edge: along it alone, and with the parcel; rate 0 where walker or parcel are elsewhere."""
    walker, parcel = states[:, :1], states[:, 1:]
    first, second = EDGES.t().to(states.device)
    there = torch.where(walker == first, second, first)  # [B, E]
    at_edge = (walker == first) | (walker == second)
    alone = torch.stack((there, parcel.expand_as(there)), dim=2)
    carrying = torch.stack((there, there), dim=2)
    together = at_edge & (walker == parcel)
    rate = torch.cat((ALONE * at_edge.double(), CARRYING * together.double()), dim=1)
    return Moves(torch.cat((alone, carrying), dim=1), rate)


def cost(states: Tensor) -> Tensor:
    """g(X_1): the parcel belongs in room 3, and the walker should be back at 0."""
    return 3.0 * (states[:, 1] != 3).double() + 1.5 * (states[:, 0] != 0).double()


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains, prints how far its exact law is from the optimum, and returns that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1000, help="trajectories of a round, each a call of the cost")
    given = parser.parse_args(arguments)
    process = MovesCTMC(list_moves)
    space = enumeration.MoveSpace(process, START, ROOMS)
    initial = torch.zeros(len(space.states), dtype=torch.float64)
    initial[space.index_of(START[0])] = 1.0
    optimum = space.law(process.base, initial, [0.0, 1.0]) * (-cost(space.states)).exp()
    optimum = optimum / optimum.sum()

    # 25 states are few enough for a table; a network of states, times and neighbours goes in its place.
    values = torch.zeros(len(TIMES) - 1, *space.to.shape, requires_grad=True)
    edges = torch.tensor(TIMES, dtype=torch.float64)

    def model(states: Tensor, time: Tensor, listed: Moves) -> Tensor:
        return values[torch.searchsorted(edges, time) - 1, space.index_of(states)]

    def distance() -> float:
        return float((space.law(model, initial, TIMES) - optimum).abs().sum() / 2)

    print(f"{len(space.states)} states; total variation of base and optimum {distance():.3f}")
    optimizer = torch.optim.Adam([values], lr=0.2, betas=(0.9, 0.99))
    for n in range(given.rounds):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - n / given.rounds)
        path = gillespie(process, model, START.expand(given.batch, -1), times=TIMES, base=process.base, seed=n)
        gain = (path.log_ratio + path.escape_gap)[None]
        weights = dam.adjoint_weights(gain, cost(path.final)[None])
        optimizer.zero_grad()
        targets = matching.path_targets(path, weights.weight)
        matching.loss(process, model, targets, baseline=1.0).backward()
        optimizer.step()
        if (n + 1) % 10 == 0:
            share = float(weights.ess[0]) / given.batch
            print(f"{(n + 1) * given.batch:>7,} calls: ESS {share:.3f}, total variation {distance():.4f}")
    return distance()


if __name__ == "__main__":
    main()
