"""FlowConfig: the arguments of fine-tuning a flow or a diffusion toward a differentiable reward."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field

from dam.flows.simulate import METHODS
from dam.train.arguments import RunConfig, check_counts

# What a learner is called, and whether it trains through the paths themselves, so that each pass draws its own.
LEARNERS = {"adjoint_matching": False, "vgg_flow": False, "draft": True, "refl": True}

_MATCHING = ("adjoint_matching", "vgg_flow")
# Of which learners an argument is, where not of all.
_OF = {
    **dict.fromkeys(("beta", "matched_times", "checkpoint_every"), _MATCHING),
    **dict.fromkeys(("draft_steps", "recompute"), ("draft",)),
    **dict.fromkeys(("forward_looking", "value_consistency", "value_boundary"), ("vgg_flow",)),
    "refl_from": ("refl",),
}


@dataclasses.dataclass
class FlowConfig(RunConfig):
    """Arguments of `FlowTrainer`, on top of those of `transformers.TrainingArguments`.

    A rollout draws `generation_batch_size` paths, num_generations for each row of the dataset, and feeds num_iterations
    training steps. Of Adjoint Matching `per_device_train_batch_size` counts targets, states of these paths; of the
    direct learners, "draft" and "refl", it counts paths, and each forward and backward pass draws its own.
    """

    learner: str = field(
        default="adjoint_matching",
        metadata={
            "help": f"One of {', '.join(LEARNERS)}. The second has an objective of its own, an ODE's, whose optimum is "
            "not the tilt. The last two go after the reward alone: nothing but an early end keeps the model near the "
            "base."
        },
    )
    beta: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of Adjoint Matching: the objective is E[-reward] + beta KL(model || base), and its "
            "optimum the base's law times exp(reward / beta). Of VGG-Flow the weight of the kinetic energy of the "
            "difference of the velocities, in place of the KL. The direct learners have none."
        },
    )
    per_device_train_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Targets of a forward and backward pass and device, drawn from those of the rollout; of direct "
            "learners paths. None is 256 targets, or 16 paths."
        },
    )
    generation_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Paths of a rollout, of all processes. None becomes 64; of direct learners it stays, for what "
            "the passes of a step draw, per_device_train_batch_size * gradient_accumulation_steps * processes."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Paths of a rollout for each row of the dataset."})
    num_iterations: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Training steps that a rollout feeds. None is 4; of direct learners it must be 1."},
    )
    diffusion_steps: int = field(default=40, metadata={"help": "K, steps of a path in training."})
    method: str = field(
        default="heun",
        metadata={"help": f"Of paths and adjoints, one of {', '.join(METHODS)}. Heun's has two calls a step."},
    )
    matched_times: int | None = field(
        default=None,
        metadata={
            "help": "Times of each path that targets are made at, drawn anew for each rollout and standing for all. "
            "None is all K."
        },
    )
    rollout_batch_size: int = field(
        default=1024,
        metadata={"help": "Paths in a network call, of rollouts, adjoints and rewards: what memory allows."},
    )
    checkpoint_every: int = field(
        default=1,
        metadata={
            "help": "Where targets are matched every so many-th state of a path is kept, and the others are made "
            "again on the way back, for one more run of the network. Least memory at the root of diffusion_steps."
        },
    )
    draft_steps: int | None = field(
        default=None, metadata={"help": 'The last steps that "draft" goes back through (DRaFT-K). None is all.'}
    )
    recompute: bool = field(
        default=True,
        metadata={"help": 'Whether "draft" computes activations of a step again on the way back, or keeps them all.'},
    )
    refl_from: float = field(
        default=0.75, metadata={"help": 'The time from which on "refl" takes the one-step outcome, below 1.'}
    )
    forward_looking: bool = field(
        default=True,
        metadata={
            "help": 'Whether the value of "vgg_flow" is a residual of the reward gradient at the one-step outcome, '
            "which costs that gradient at each state; by torch.func, which the reward must bear."
        },
    )
    value_consistency: float = field(
        default=1.0, metadata={"help": "Weight of what is left of the HJB equation in the value's loss."}
    )
    value_boundary: float = field(
        default=1.0, metadata={"help": "Weight of the value's distance from the reward gradient at time 1 in its loss."}
    )
    conditions: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the dataset that the model is called with, by name. None is all that are numbers. The "
            "reward is called with all columns."
        },
    )
    eval_diffusion_steps: int | None = field(
        default=None, metadata={"help": "Steps of the ODE in evaluation and predict. None is diffusion_steps."}
    )
    eval_samples: int = field(
        default=256,
        metadata={
            "help": "Samples of an evaluation without a dataset, per_device_eval_batch_size of them in a network call. "
            "With a dataset it is one of each row."
        },
    )

    def __post_init__(self) -> None:
        if self.learner not in LEARNERS:
            raise ValueError(f"learner must be one of {', '.join(LEARNERS)}; got {self.learner!r}")
        direct = self.is_direct
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = 16 if direct else 256
        if self.num_iterations is None:
            self.num_iterations = 1 if direct else 4
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: columns are conditions of the model and the reward")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: a run would not be the same again; lower "
                "per_device_train_batch_size and rollout_batch_size"
            )
        of_a_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if direct and self.num_iterations != 1:
            raise ValueError(
                f"learner {self.learner!r} trains through its paths, which are of one step: num_iterations must be 1; "
                f"got {self.num_iterations}"
            )
        if direct and self.generation_batch_size not in (None, of_a_step):
            raise ValueError(
                f"learner {self.learner!r} draws the paths of each pass: generation_batch_size must be "
                f"per_device_train_batch_size * gradient_accumulation_steps * processes, {of_a_step}, or None; got "
                f"{self.generation_batch_size}"
            )
        if self.generation_batch_size is None and not direct:
            self.generation_batch_size = 64
        check_counts(
            self,
            *("per_device_train_batch_size", "num_generations", "num_iterations"),
            *("diffusion_steps", "rollout_batch_size", "checkpoint_every", "eval_samples"),
            optional=("generation_batch_size", "matched_times", "draft_steps", "eval_diffusion_steps"),
        )
        if self._paths_per_rollout % (self.num_generations * self.world_size):
            raise ValueError(
                f"generation_batch_size counts paths, {self.num_generations} for each row (num_generations) in each of "
                f"{self.world_size} processes, and must be a multiple of both; got {self._paths_per_rollout}"
            )
        for name in ("matched_times", "draft_steps"):
            given = getattr(self, name)
            if given is not None and given > self.diffusion_steps:
                raise ValueError(f"{name} must be at most diffusion_steps, {self.diffusion_steps}; got {given}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be > 0 and finite; got {self.beta}")
        for name in ("value_consistency", "value_boundary"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite; got {getattr(self, name)}")
        if not 0 <= self.refl_from < 1:
            raise ValueError(f"refl_from must be a time in [0, 1); got {self.refl_from}")
        for each in dataclasses.fields(self):
            learners = _OF.get(each.name, (self.learner,))
            if self.learner not in learners and getattr(self, each.name) != each.default:
                raise ValueError(
                    f"{each.name} is of learner {' and '.join(learners)}, and {self.learner} takes no notice of it: "
                    f"leave it out; got {getattr(self, each.name)}"
                )

    @property
    def is_direct(self) -> bool:
        """Whether the learner trains through its paths."""
        return LEARNERS[self.learner]

    @property
    def _paths_per_rollout(self) -> int:
        """Of all processes."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def prompts_per_rollout(self) -> int:
        """Rows that each process draws paths for at once."""
        return self._paths_per_rollout // (self.num_generations * self.world_size)

    @property
    def steps_per_rollout(self) -> int:
        """Training steps, updates of the weights, that a rollout feeds."""
        return self.num_iterations
