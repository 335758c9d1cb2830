"""Maximum independent set and maximum cut on small random graphs, a node a token of 0 or 1.

The base is uniform. Optima are known twice: by an integer programme, and by enumeration, which also gives p*.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import ClassVar

import networkx
import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from dam.ctmc import enumeration
from dam.models.denoiser import Denoiser
from experiments.exact.task import Task
from experiments.lattice import Network

GRAPHS = ("erdos-renyi", "regular")
ENUMERABLE = 20  # nodes: 2^20 states
HEURISTIC_RUNS = 256


def random_edges(kind: str, nodes: int, degree: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Edges (i, j), i < j, of a random graph.

    Args:
        kind: "erdos-renyi", in which each pair is an edge with probability degree / (nodes - 1), or "regular".

    Raises:
        ValueError: no graph is of that kind; networkx says why there is no regular graph of a degree.
    """
    if kind == "erdos-renyi":
        graph = networkx.gnp_random_graph(nodes, degree / (nodes - 1), seed=seed)
    elif kind == "regular":
        graph = networkx.random_regular_graph(degree, nodes, seed=seed)
    else:
        raise ValueError(f"there are the graphs {', '.join(GRAPHS)}; got {kind!r}")
    return tuple(sorted((min(edge), max(edge)) for edge in graph.edges))


@dataclasses.dataclass(frozen=True)
class Graph(Task):
    """Subsets x of the nodes of a graph.

    Args:
        edges: pairs (i, j), i < j.
        nodes: how many; p* is known for at most ENUMERABLE.
    """

    edges: tuple[tuple[int, int], ...]
    nodes: int
    beta: float = 0.4
    tokens = 2

    @property
    def length(self) -> int:
        return self.nodes

    def log_base(self, x: Tensor) -> Tensor:
        return torch.full(x.shape[:1], -self.nodes * math.log(2), dtype=torch.float64)

    @abc.abstractmethod
    def optimum(self) -> tuple[float, Tensor]:
        """The largest reward and a subset int64 [L] that has it, by an integer programme."""

    @abc.abstractmethod
    def heuristic(self, seed: int) -> Tensor:
        """A subset int64 [L] by a usual algorithm, which draws among ties."""

    def within(self, x: Tensor) -> Tensor:
        """Edges with both ends in x, float32 [B], which has these integers exactly."""
        upper = torch.zeros(self.nodes, self.nodes)
        upper[tuple(torch.tensor(self.edges).t())] = 1
        return (x.float() @ upper * x).sum(dim=1)

    @functools.cached_property
    def rewards(self) -> Tensor:
        """Of all subsets, float64 [2^L] in the order of `enumeration.states`.

        Raises:
            ValueError: there are too many.
        """
        if self.nodes > ENUMERABLE:
            raise ValueError(f"p* is known by enumeration of at most {ENUMERABLE} nodes; got {self.nodes}")
        every = enumeration.states(2, self.nodes)
        return torch.cat([self.reward(part) for part in every.split(2**16)])

    def law(self) -> Tensor:
        return torch.softmax(self.rewards / self.beta, dim=0)

    @functools.cached_property
    def log_z(self) -> float:
        return float((self.rewards / self.beta).logsumexp(dim=0)) - self.nodes * math.log(2)

    def figures(self, x: Tensor) -> dict[str, float]:
        reward, best = self.reward(x), self.rewards.max()
        optimal = reward == best
        found = len(enumeration.index_of(x[optimal], 2).unique())
        return {
            "reward": float(reward.mean()),
            "optimal": float(optimal.double().mean()),
            "found": found / int((self.rewards == best).sum()),
        }

    def of_law(self, law: Tensor, samples: int) -> dict[str, float]:
        """Expected figures of so many samples of a law [2^L]."""
        optimal = self.rewards == self.rewards.max()
        return {
            "reward": float(law @ self.rewards),
            "optimal": float(law[optimal].sum()),
            "found": float((1 - (1 - law[optimal]) ** samples).mean()),
        }

    def references(self, samples: int) -> dict[str, dict[str, float]]:
        uniform = torch.full_like(self.rewards, 1 / len(self.rewards))
        heuristic = torch.stack([self.heuristic(seed) for seed in range(HEURISTIC_RUNS)])
        return {
            "the base": self.of_law(uniform, samples),
            f"{self.heuristic_name}, {HEURISTIC_RUNS} runs": self.figures(heuristic),
            "p*": self.of_law(self.law(), samples),
        }

    def denoiser(self) -> Denoiser:
        return Network(self, width=128)

    def _subset(self, nodes: set[int]) -> Tensor:
        return torch.tensor([int(node in nodes) for node in range(self.nodes)])

    def _graph(self) -> networkx.Graph:
        graph = networkx.Graph(self.edges)
        graph.add_nodes_from(range(self.nodes))
        return graph


def solved(gain: np.ndarray, rows: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The 0-1 vector y of largest gain @ y with rows @ y <= upper, by HiGHS.

    Raises:
        RuntimeError: HiGHS ended without a proof that it is the best.
    """
    constraints = LinearConstraint(rows, -np.inf, upper)
    found = milp(-gain, constraints=constraints, integrality=np.ones_like(gain), bounds=Bounds(0, 1))
    if not found.success:
        raise RuntimeError(f"the integer programme was not solved: {found.message}")
    return np.round(found.x).astype(np.int64)


class IndependentSet(Graph):
    """r(x) = |x| - 2 (edges within x): optima are the maximum independent sets, as to drop an end of an edge pays."""

    columns: ClassVar = {
        "reward": ("E[r]", "{:.3f}"),
        "independent": ("independent", "{:.1%}"),
        "optimal": ("optimal", "{:.1%}"),
        "found": ("optima found", "{:.1%}"),
    }
    heuristic_name = "random maximal sets"
    penalty = 2

    def reward(self, x: Tensor) -> Tensor:
        return (x.sum(dim=1) - self.penalty * self.within(x)).double()

    def figures(self, x: Tensor) -> dict[str, float]:
        return {**super().figures(x), "independent": float((self.within(x) == 0).double().mean())}

    def of_law(self, law: Tensor, samples: int) -> dict[str, float]:
        independent = self.within(enumeration.states(2, self.nodes)) == 0
        return {**super().of_law(law, samples), "independent": float(law[independent].sum())}

    def optimum(self) -> tuple[float, Tensor]:
        rows = np.zeros((len(self.edges), self.nodes))
        for row, edge in enumerate(self.edges):
            rows[row, list(edge)] = 1
        chosen = solved(np.ones(self.nodes), rows, np.ones(len(rows)))
        return float(chosen.sum()), torch.from_numpy(chosen)

    def heuristic(self, seed: int) -> Tensor:
        return self._subset(set(networkx.maximal_independent_set(self._graph(), seed=seed)))


class Cut(Graph):
    """r(x) = edges with one end in x; x and its complement are the same cut."""

    columns: ClassVar = {
        "reward": ("E[r]", "{:.3f}"),
        "optimal": ("optimal", "{:.1%}"),
        "found": ("optima found", "{:.1%}"),
    }
    heuristic_name = "local search from random cuts"

    def reward(self, x: Tensor) -> Tensor:
        degree = torch.bincount(torch.tensor(self.edges).flatten(), minlength=self.nodes)
        return ((x * degree).sum(dim=1) - 2 * self.within(x)).double()

    def optimum(self) -> tuple[float, Tensor]:
        # y_e <= x_i + x_j and y_e <= 2 - x_i - x_j: an edge counts if its ends differ.
        count = len(self.edges)
        rows = np.zeros((2 * count, self.nodes + count))
        for row, edge in enumerate(self.edges):
            rows[row, list(edge)], rows[count + row, list(edge)] = -1, 1
            rows[[row, count + row], self.nodes + row] = 1
        gain = np.concatenate((np.zeros(self.nodes), np.ones(count)))
        chosen = solved(gain, rows, np.concatenate((np.zeros(count), np.full(count, 2))))
        return float(chosen[self.nodes :].sum()), torch.from_numpy(chosen[: self.nodes])

    def heuristic(self, seed: int) -> Tensor:
        start = set(
            torch.randint(2, (self.nodes,), generator=torch.Generator().manual_seed(seed)).nonzero()[:, 0].tolist()
        )
        _, (side, _) = networkx.approximation.one_exchange(self._graph(), initial_cut=start, seed=seed)
        return self._subset(side)
