"""What the study asks of a task: a base that is one joint law, a reward, and the optimum of both, known exactly."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor

from dam.models.denoiser import Denoiser
from experiments.densities import Density


class Task(Density):
    """p*(x) proportional to p_base(x) e^{r(x) / beta} over L tokens of V values; a reward call is r of one x.

    p_base(x) is the same by every order of unmasking, so that the weight of a path is p_base(X_1) over the probability
    of the path under the model, and learners of `experiments.learners` that use p_base in no other way are right.
    """

    beta: float
    columns: ClassVar[dict[str, tuple[str, str]]]  # figures: their names in a table, and how they are written

    @abc.abstractmethod
    def log_base(self, x: Tensor) -> Tensor:
        """log p_base, float64 [B] for x [B, L]."""

    @abc.abstractmethod
    def reward(self, x: Tensor) -> Tensor:
        """r, float64 [B]."""

    @property
    @abc.abstractmethod
    def log_z(self) -> float:
        """log of the sum of p_base e^{r / beta} over all x, exact."""

    @abc.abstractmethod
    def figures(self, x: Tensor) -> dict[str, float]:
        """Those of samples [B, L], "reward" among them."""

    @abc.abstractmethod
    def references(self, samples: int) -> dict[str, dict[str, float]]:
        """Figures of "the base" and of "p*", both exact, and of methods that learn nothing, by name.

        Those that grow with the number of samples are of so many.
        """

    @abc.abstractmethod
    def denoiser(self) -> Denoiser:
        """A network with the base's p(v | i, x), to be trained."""

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_base(x) + self.reward(x) / self.beta
