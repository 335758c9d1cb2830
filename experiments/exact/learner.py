"""The learner of this study, which steps no further than an effective sample size allows, and its null control."""

from __future__ import annotations

import dataclasses

import torch

from dam.adjoint import group_targets, tilted_weights
from experiments import learners
from experiments.exact.task import Task

STEPPED, NULL = "posterior, steps by ESS", "null control"
# Of the learners that there are those that ask the density alone what p* is, whatever the base.
OTHERS = ("posterior", "weighted denoising", learners.PUBLISHED)
LEARNERS = (STEPPED, *OTHERS, NULL)
DEFAULT = (STEPPED, learners.PUBLISHED, NULL)


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


def learner(name: str, task: Task, *, batch: int, steps: int, replicates: int, seed: int) -> learners.Learner:
    """A learner by its name, one of LEARNERS."""
    options = {"batch": batch, "steps": steps, "replicates": replicates, "seed": seed}
    if name in OTHERS:
        return learners.learner(name, task, **options)
    return Stepped(task, **options, null=name == NULL)
