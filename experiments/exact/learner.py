"""The learners of this study, which tilt in steps that an effective sample size allows, and their null control."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dam.adjoint import group_targets, tilted_weights
from experiments import learners
from experiments.exact.task import Task
from experiments.replay import Replay

KEPT, STEPPED, NULL = "outcomes kept, steps by ESS", "posterior, steps by ESS", "null control"
# Of the learners that there are those that ask the density alone what p* is, whatever the base.
OTHERS = ("posterior", "weighted denoising", learners.PUBLISHED)
LEARNERS = (KEPT, STEPPED, *OTHERS, NULL)
DEFAULT = (KEPT, STEPPED, learners.PUBLISHED, NULL)


@dataclasses.dataclass
class Stepped(learners.Learner):
    """The posterior at re-masked outcomes, each round tilted from the model toward p* as far as its weights keep an
    effective sample size, as `dam.train.DAMTrainer` does with `target_ess`.

    Args:
        ess: what is kept, as a share of the batch. The base is one joint law, so p* is the fixed point all the same.
        draw: of how many outcomes a step is made at most; they are drawn by their weights where the batch is larger.
        null: permute the weights among the trajectories, so that they say nothing of the outcomes.
    """

    ess: float = 0.25
    draw: int = 128
    null: bool = False

    def round(self, model: learners.Model, n: int, progress: float) -> learners.Round:
        path = model.sampled(model.blank(self.batch), self.seed_of(n))
        reward = self.density.log_density(path.final)[None]
        weights, _ = tilted_weights(self.log_ratio(path)[None], reward, beta=1.0, ess=self.ess * self.batch)
        weight = weights.weight
        if self.null:
            weight = weight[:, torch.randperm(self.batch, generator=self.generator)]
        final, blank = path.final[None], path.initial[None]
        draw = self.draw if self.draw < self.batch else None
        steps = []
        for _ in range(self.steps):
            states = model.process.remask(blank, final, self.generator, stratified=True)
            steps.append(
                group_targets("posterior", states, final, weight, model.process, draw=draw, generator=self.generator)
            )
        return self.done(steps, self.batch, path)


@dataclasses.dataclass
class Kept(Replay):
    """`experiments.replay.Replay` with a base that is a law of its own, from which the tilt leads to p*."""

    density: Task
    ess: float = 0.25

    def log_base(self, final: Tensor) -> Tensor:
        return self.density.log_base(final)

    def gain(self, final: Tensor) -> Tensor:
        return self.density.reward(final) / self.density.beta


def learner(name: str, task: Task, *, batch: int, steps: int, replicates: int, seed: int) -> learners.Learner:
    """A learner by its name, one of LEARNERS."""
    options = {"batch": batch, "steps": steps, "replicates": replicates, "seed": seed}
    if name in OTHERS:
        return learners.learner(name, task, **options)
    return Kept(task, **options) if name == KEPT else Stepped(task, **options, null=name == NULL)
