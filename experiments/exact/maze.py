"""Ways through a maze: plans are moves, the base walks at random, and the optimum is known by dynamic programming.

A plan is a number of moves, each to a neighbour or none. The base knows where walls are and nothing of the goal, where
it stays. The reward is how many moves are left at the goal, less how far away a plan ends as the crow flies in a city
of blocks; of neither does it tell which move was good.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import networkx
import torch
from torch import Tensor

from dam.models.denoiser import Denoiser
from experiments.exact.automata import Automaton, AutomatonTask, kl
from experiments.exact.networks import Along, States

MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))  # to stay, and to each neighbour
Cell = tuple[int, int]


def blocks(cell: Cell, other: Cell) -> int:
    """Moves between cells if there were no walls."""
    return abs(cell[0] - other[0]) + abs(cell[1] - other[1])


def random_maze(side: int, loops: int, seed: int) -> networkx.Graph:
    """Cells (row, column) of a square, edges where there is no wall: a random spanning tree and some edges more.

    Args:
        loops: edges beside the tree's, of those with the least weights: without them there is one way only.

    Raises:
        ValueError: there are not so many.
    """
    grid = networkx.grid_2d_graph(side, side)
    weights = torch.rand(grid.number_of_edges(), generator=torch.Generator().manual_seed(seed)).tolist()
    for edge, weight in zip(sorted(grid.edges), weights, strict=True):
        grid.edges[edge]["weight"] = weight
    maze = networkx.minimum_spanning_tree(grid)
    walls = sorted((grid.edges[edge]["weight"], edge) for edge in grid.edges if not maze.has_edge(*edge))
    if not 0 <= loops <= len(walls):
        raise ValueError(f"of {side} x {side} cells a tree leaves {len(walls)} walls; got {loops} loops")
    maze.add_edges_from(edge for _, edge in walls[:loops])
    return maze


@dataclasses.dataclass(frozen=True)
class Maze(AutomatonTask):
    """From a corner to the cell that is most moves away, the first of these; r(x) = moves left when it is reached
    - |rows| - |columns| from it at the end. A plan that is there after its last move has one left.

    Args:
        seed: of the maze.
        side: cells of a side.
        loops: of `random_maze`.
        length: moves of a plan.
    """

    seed: int
    side: int = 4
    loops: int = 3
    length: int = 12
    beta: float = 0.5
    tokens = len(MOVES)
    columns: ClassVar = {
        "reward": ("E[r]", "{:.3f}"),
        "success": ("at the goal", "{:.1%}"),
        "shortest": ("shortest", "{:.1%}"),
        "found": ("shortest found", "{:.1%}"),
    }

    @functools.cached_property
    def maze(self) -> networkx.Graph:
        return random_maze(self.side, self.loops, self.seed)

    @property
    def start(self) -> Cell:
        return 0, 0

    @functools.cached_property
    def goal(self) -> Cell:
        moves = networkx.single_source_shortest_path_length(self.maze, self.start)
        return min(self.maze, key=lambda cell: (-moves[cell], cell))

    @functools.cached_property
    def base(self) -> Automaton:
        """With cells as states: at each, every move that no wall is in the way of is as likely, in float32."""
        count = self.side**2
        to, prob = torch.zeros(count, self.tokens, dtype=torch.int64), torch.zeros(count, self.tokens)
        for cell in self.maze:
            for token, (down, right) in enumerate(MOVES):
                next_cell = cell[0] + down, cell[1] + right
                free = token == 0 or (cell != self.goal and self.maze.has_edge(cell, next_cell))
                to[self.number(cell), token] = self.number(next_cell if free else cell)
                prob[self.number(cell), token] = float(free)
        return Automaton(self.number(self.start), to, (prob / prob.sum(dim=1, keepdim=True))[None], self.length)

    def number(self, cell: Cell) -> int:
        return cell[0] * self.side + cell[1]

    @functools.cached_property
    def score(self) -> Tensor:
        """What the reward is a sum of, by state and move at each time, float64 [L, S, V]."""
        there = (self.base.to == self.number(self.goal)).double().repeat(self.length, 1, 1)
        cells = [(row, column) for row in range(self.side) for column in range(self.side)]
        there[-1] -= torch.tensor([blocks(cell, self.goal) for cell in cells])[self.base.to]
        return there

    @functools.cached_property
    def tilted(self) -> tuple[Automaton, float]:
        """With cells as states."""
        return self.base.tilted(self.score / self.beta)

    def reward(self, x: Tensor) -> Tensor:
        states = self.base.states(x)[:, :-1]
        return self.score[torch.arange(self.length), states, x].sum(dim=1)

    def plan(self, cells: list[Cell]) -> Tensor:
        """The moves along neighbours from the start on, and none after that, int64 [L]."""
        moves = [MOVES.index((b[0] - a[0], b[1] - a[1])) for a, b in itertools.pairwise(cells)]
        return torch.tensor(moves + [0] * (self.length - len(moves)))

    @functools.cached_property
    def shortest(self) -> Tensor:
        """All plans that reach the goal in the fewest moves, by breadth-first search, int64 [N, L].

        Raises:
            ValueError: a plan is too short for that.
        """
        found = list(networkx.all_shortest_paths(self.maze, self.start, self.goal))
        if len(found[0]) - 1 > self.length:
            raise ValueError(f"the goal is {len(found[0]) - 1} moves away, and a plan has {self.length}")
        return torch.stack([self.plan(cells) for cells in found])

    def a_star(self) -> Tensor:
        """A plan that reaches the goal in the fewest moves, int64 [L]."""
        return self.plan(networkx.astar_path(self.maze, self.start, self.goal, blocks))

    def figures(self, x: Tensor) -> dict[str, float]:
        reward = self.reward(x)
        best = self.shortest
        same = (x[:, None] == best).all(dim=2)
        return {
            "reward": float(reward.mean()),
            "success": float((self.base.states(x)[:, -1] == self.number(self.goal)).double().mean()),
            "shortest": float(same.any(dim=1).double().mean()),
            "found": float(same.any(dim=0).double().mean()),
        }

    def of_law(self, law: Automaton, samples: int) -> dict[str, float]:
        """Expected figures of so many samples of a law with cells as states."""
        each = law.log_prob(self.shortest).exp()
        return {
            "reward": law.expectation(self.score),
            "success": float(law.occupancy()[-1][self.base.to == self.number(self.goal)].sum()),
            "shortest": float(each.sum()),
            "found": float((1 - (1 - each) ** samples).mean()),
        }

    def references(self, samples: int) -> dict[str, dict[str, float]]:
        return {
            "the base": {**self.of_law(self.base, samples), "kl": kl(self.base, self.optimum)},
            "A*, its one plan": self.figures(self.a_star()[None]),
            "breadth-first search, all plans": self.figures(self.shortest),
            "p*": self.of_law(self.optimum, samples),
        }

    def denoiser(self) -> Denoiser:
        return Along(self.base, States(self.tokens, self.side**2, self.length, reach=self.length - 1))
