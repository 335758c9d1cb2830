"""DAMConfig: the arguments of a Discrete Adjoint Matching run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any

from transformers import TrainingArguments

from dam.adjoint import ESTIMATORS, NORMALIZERS, step_limits
from dam.decoding import ORDERS, Decoding, check_decoding
from dam.train import grpo
from dam.train.arguments import RunConfig, check_counts
from dam.train.releases import fields_of_json, read_json

# Of the fields of `Decoding` those of decoding in evaluation.
_DECODING = {
    "order": "eval_remasking",
    "threshold": "eval_threshold",
    "temperature": "eval_temperature",
    "top_k": "eval_top_k",
    "top_p": "eval_top_p",
    "guidance": "eval_guidance",
}


@dataclasses.dataclass
class DAMConfig(RunConfig):
    """Arguments of `DAMTrainer`, on top of those of `transformers.TrainingArguments`.

    Names that TRL's `GRPOConfig` has mean what they mean there. So batch sizes count completions: a rollout draws
    `per_device_train_batch_size` * `steps_per_generation` of them in each process, num_generations for each prompt, and
    feeds `steps_per_generation` * `num_iterations` forward and backward passes, gradient_accumulation_steps of which
    make a training step. What is trained on in each are groups drawn from the replay buffer, not the newest alone:
    `replay_batch_size`, unless set as many as a pass has completions for.
    """

    # Fields that a command line gives as JSON.
    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *fields_of_json(TrainingArguments),
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    per_device_train_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Completions per forward and backward pass and device, of num_generations for each prompt. None is "
            "8 * num_generations."
        },
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Passed to AutoModelForMaskedLM.from_pretrained where the model is given by name; a dict, or JSON. "
            "dtype is float32 unless it is among them."
        },
    )
    beta: float = field(
        default=0.04, metadata={"help": "Temperature: the objective is E[-reward] + beta KL(model || base)."}
    )
    num_generations: int = field(
        default=16, metadata={"help": "K, trajectories per group. Below 16 the normaliser is unreliable."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Forward and backward passes that a rollout draws completions for. None follows from "
            "generation_batch_size, or is gradient_accumulation_steps, or the least multiple of it that draws whole "
            "groups."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions of a rollout, of all processes: per_device_train_batch_size * steps_per_generation * "
            "processes. In place of steps_per_generation."
        },
    )
    num_iterations: int = field(
        default=4,
        metadata={
            "help": "How often a rollout's completions are trained on, in the mean: it feeds num_iterations * "
            "steps_per_generation passes. With steps_per_generation unset, the training steps per rollout."
        },
    )
    estimator: str = field(default="posterior", metadata={"help": f"One of {', '.join(ESTIMATORS)}."})
    normalizer: str = field(
        default="group",
        metadata={
            "help": 'What K trajectories share: "group", a prompt, with states by re-masking their outcomes; or '
            '"state", a partly filled-in state, drawn by a rollout of its own.'
        },
    )
    target_ess: float | None = field(
        default=4.0,
        metadata={
            "help": "Effective sample size to keep in each group: a step goes only as far toward the optimum as that "
            "allows. None goes all the way at once. Steps that are kept short end elsewhere than at the optimum "
            "(dam.adjoint.tilted_weights says where): full_tilt_from lets go."
        },
    )
    max_tilt: float = field(
        default=1.0,
        metadata={
            "help": "Largest step toward the optimum, in (0, 1]; below 1 damps the path weights' noise. Steps below 1 "
            "end elsewhere than at the optimum, as for target_ess."
        },
    )
    full_tilt_from: float | None = field(
        default=0.5,
        metadata={
            "help": "Fraction of the run from which on steps go all the way: until then max_tilt rises to 1 and "
            "target_ess falls to 1 linearly, so that the run ends at the optimum. None keeps both as they are."
        },
    )
    leave_one_out: bool = field(
        default=True,
        metadata={
            "help": "Normalise each trajectory's weight by the others of its group, which takes away the pull back to "
            "the model that K trajectories have; weights are at most K."
        },
    )
    base_generations: int | None = field(
        default=None,
        metadata={
            "help": "Trajectories of each group that the base draws instead of the model, so that what the model has "
            "lost can come back. None takes num_generations // 8, 0 none; no more sequences go through the networks "
            "than without, but in two batches. Logged rewards and KL are of those that the model draws."
        },
    )
    num_orders: int = field(
        default=1,
        metadata={
            "help": "M, orders of unmasking over which the log-probability of an outcome is averaged, under model and "
            "base. Each beyond the first costs as many network calls as a rollout."
        },
    )
    order_samples: int = field(
        default=1,
        metadata={
            "help": "With num_orders=1: trajectories of each group that are looked at by a second order too, for the "
            "logged order_variance and kl_outcome. Costs order_samples / num_generations of a rollout's network calls."
        },
    )
    centering: float = field(
        default=0.0,
        metadata={
            "help": "How many times its mean is taken from the weights of each group, as DMPO does at 1: less noise, "
            "and outcomes of small weight are pushed away. Right only for a model that drew them and whose "
            "conditionals are of one law: at re-masked outcomes others drift, without a reward too "
            "(dam.adjoint.path_targets)."
        },
    )
    num_replicates: int = field(
        default=1,
        metadata={"help": "States that a training step makes of each trajectory: as many times its network calls."},
    )
    antithetic: bool = field(
        default=False,
        metadata={
            "help": "Half of the num_replicates, an even number, have masks where the others have none, as DMPO does: "
            "each position is trained once in each pair. Of re-masked outcomes, not of states of trajectories."
        },
    )
    clip: float | None = field(default=None, metadata={"help": "Upper bound on log weights; None bounds nothing."})
    null_arm: bool = field(
        default=False,
        metadata={"help": "Control: permute weights within each group. What still improves is not the reward's doing."},
    )
    replay_size: int = field(default=512, metadata={"help": "Groups kept in the replay buffer."})
    replay_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Groups from the replay buffer per forward and backward pass and device, of num_generations "
            "outcomes each. None is per_device_train_batch_size / num_generations."
        },
    )
    draw_outcomes: int | None = field(
        default=None,
        metadata={
            "help": "Train on that many outcomes per step, drawn in proportion to their weights, instead of on all "
            'weighted ones (normalizer "group").'
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Of rollouts in training, and of the model and the base that the objective speaks of."},
    )
    eval_temperature: float = field(
        default=0.0, metadata={"help": "Of rollouts in evaluation; 0 is the likeliest token."}
    )
    diffusion_steps: int | None = field(
        default=64,
        metadata={
            "help": "Network calls per trajectory, at most; with max_completion_length two positions per call, as d1. "
            "Of rows with no more masks than that, and of all with None, one position per call is filled, which "
            "simulates the chain exactly. Of others what is trained is what each call drew at the state that it saw, "
            "as outcomes re-masked at random are states of the exact chain only: they need estimator "
            '"posterior" and normalizer "group".'
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Fill blocks of this many positions from left to right; None is one block, or where the model's "
            "attention has blocks (dam.models.as_denoiser) these. Trains at the states that the network was called "
            "at, as fewer calls than masks do."
        },
    )
    whole_blocks: bool = field(
        default=False,
        metadata={
            "help": "Append as many more masks to a prompt as take it to the end of a block of the model's attention "
            "(SDAR, LLaDA 2), as the model's own generation and serving engines fill the last block whole."
        },
    )
    eval_remasking: str = field(
        default="random",
        metadata={
            "help": f"Order of unmasking in evaluation and predict, one of {', '.join(ORDERS)} (dam.decoding.Decoding)."
        },
    )
    eval_threshold: float | None = field(
        default=None,
        metadata={
            "help": "In evaluation a network call fills all positions of the block whose token has at least this "
            'probability (eval_remasking "confidence") or margin ("margin"), or at most this entropy ("entropy"), and '
            "one at least. diffusion_steps then holds in training only."
        },
    )
    eval_top_k: int | None = field(
        default=None,
        metadata={"help": "In evaluation only the k likeliest tokens are drawn, and what equals the k-th."},
    )
    eval_top_p: float | None = field(
        default=None,
        metadata={
            "help": "In evaluation only the fewest likeliest tokens are drawn, of those that eval_top_k leaves, that "
            "have this probability together."
        },
    )
    eval_guidance: float = field(
        default=0.0,
        metadata={
            "help": "Scale w of classifier-free guidance in evaluation: logits are (w + 1) times the model's less w "
            "times those with masks in the place of the prompt. Two passes a network call; 0 is without."
        },
    )
    max_completion_length: int = field(
        default=128, metadata={"help": "Masks appended to each prompt of a dataset with a `prompt` column."}
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens that end a completion: what follows the first of them is neither decoded nor rewarded, nor "
            "trained on where it is seen to follow. None takes the tokenizer's end-of-text token; an empty list none."
        },
    )
    suppress_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens that are never drawn, in training and evaluation, by the model and the base alike; besides "
            "the mask token and ids beyond the tokenizer (len(processing_class) and more), which never are."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Passed to the tokenizer's apply_chat_template for conversational prompts; a dict, or JSON."},
    )
    mask_token_id: int | None = field(
        default=None, metadata={"help": "Mask token; taken from processing_class or the model's config unless given."}
    )
    rollout_batch_size: int = field(default=1024, metadata={"help": "Trajectories per network call of a rollout."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; all 1 unless given."}
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a reward function may take for a completion. With it, or reward_workers, what goes "
            "wrong at a completion, be it a hang, a crash or an exception, costs that completion only, which is left "
            "out of its group as if it had not been drawn: each function is called for one completion at a time, in "
            "lists of length 1. One that is not async is called in worker processes, min(2, CPUs) unless "
            "reward_workers is set, where what it prints is lost, what it changes is not seen by other calls, and it "
            "may have 2 GiB beyond what it imports (dam.workers.Pool); trainer_state has the numbers and texts of the "
            "run's. An async one is awaited for all completions of a rollout together: one that does not let others "
            "run cannot be timed. Reward models stay as they are. None is no limit, and without reward_workers an "
            "exception ends the run."
        },
    )
    reward_workers: int | None = field(
        default=None,
        metadata={
            "help": "Worker processes that each process of the run calls reward functions in, as for reward_timeout."
        },
    )
    max_reward_failures: float = field(
        default=0.1,
        metadata={
            "help": "With reward_timeout or reward_workers: the fraction of a rollout's completions, of all processes, "
            "above which lost rewards end the run. Its prompts and completions are kept in "
            "output_dir/failed_rollouts.pt."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Show completions of the last rollout whenever metrics are logged: as a table on the terminal (of "
            "rich, where it is installed) and, with report_to wandb, there."
        },
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Completions in the table on the terminal, drawn at random. None is all."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "Show one completion of each prompt, the first, instead of all."}
    )

    def __new__(cls, *_: Any, **given: Any) -> DAMConfig:
        # Here, as the dataclass makes __init__, which would only say that it did not expect the name.
        grpo.refuse(given.keys() - cls.__dataclass_fields__.keys(), grpo.CONFIG, "GRPOConfig", cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = 8 * self.num_generations
        super().__post_init__()
        self.chat_template_kwargs = read_json(self.chat_template_kwargs)
        self.model_init_kwargs = read_json(self.model_init_kwargs)
        for name, allowed in (("estimator", ESTIMATORS), ("normalizer", NORMALIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        check_counts(
            self,
            "num_generations",
            "num_iterations",
            "num_orders",
            "num_replicates",
            "replay_size",
            "rollout_batch_size",
            "per_device_train_batch_size",
            "max_completion_length",
            optional=(
                "diffusion_steps",
                "block_length",
                "replay_batch_size",
                "steps_per_generation",
                "generation_batch_size",
                "num_completions_to_print",
                "reward_workers",
            ),
        )
        if self.block_length is not None:
            self.check_on_paths("block_length goes")
        check_decoding({field: getattr(self, name) for field, name in _DECODING.items()}, _DECODING)
        if self.clip is not None and not math.isfinite(self.clip):
            raise ValueError(f"clip must be a finite number or None; got {self.clip}")
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: weights are normalised over a group")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: a smaller batch would not hold whole groups; lower "
                "per_device_train_batch_size, replay_batch_size or rollout_batch_size"
            )
        self._divide_completions()
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0; got {self.beta}")
        if not 0 < self.max_tilt <= 1:
            raise ValueError(f"max_tilt must be in (0, 1]; got {self.max_tilt}")
        if self.full_tilt_from is not None and not 0 <= self.full_tilt_from <= 1:
            raise ValueError(f"full_tilt_from must be in [0, 1] or None; got {self.full_tilt_from}")
        if self.base_generations is not None and not 0 <= self.base_generations < self.num_generations:
            raise ValueError(f"base_generations must be in [0, num_generations); got {self.base_generations}")
        if not 0 <= self.order_samples <= self.from_model:
            raise ValueError(
                f"order_samples must be in [0, {self.from_model}], as many as the model draws of a group; "
                f"got {self.order_samples}"
            )
        if self.draw_outcomes is not None and (self.draw_outcomes < 1 or self.normalizer == "state"):
            raise ValueError(
                f'draw_outcomes must be at least 1 and goes with normalizer "group"; got {self.draw_outcomes}'
            )
        if not self.centering >= 0:
            raise ValueError(f"centering must be >= 0; got {self.centering}")
        if self.centering and self.draw_outcomes is not None:
            raise ValueError("draw_outcomes draws in proportion to weights, which centering makes negative")
        if self.num_replicates > 1 and (self.normalizer == "state" or self.estimator == "first_jump_one"):
            raise ValueError(
                'num_replicates goes with normalizer "group" and estimators "posterior" and "first_jump": others have '
                "one state for each group"
            )
        if self.antithetic and (self.num_replicates % 2 or self.estimator != "posterior"):
            raise ValueError(
                f'antithetic goes with an even num_replicates and estimator "posterior"; got {self.num_replicates} and '
                f"{self.estimator!r}"
            )
        if self.draw_outcomes is not None and self.estimator == "first_jump_one":
            raise ValueError("first_jump_one draws a trajectory of each group: draw_outcomes does not go with it")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ValueError(f"reward_timeout must be seconds > 0 or None; got {self.reward_timeout}")
        if not 0 <= self.max_reward_failures <= 1:
            raise ValueError(f"max_reward_failures must be in [0, 1]; got {self.max_reward_failures}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 (rollouts in training sample); got {self.temperature}")
        for name in ("chat_template_kwargs", "model_init_kwargs"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise ValueError(f"{name} must be a dict; got {getattr(self, name)!r}")
        for name in ("stop_token_ids", "suppress_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and not all(isinstance(token, int) and token >= 0 for token in tokens):
                raise ValueError(f"{name} must be token ids; got {tokens}")
        if self.target_ess is not None and not 1 <= self.target_ess <= self.num_generations:
            raise ValueError(f"target_ess must be in [1, num_generations]; got {self.target_ess}")

    def _divide_completions(self) -> None:
        """Sets steps_per_generation, generation_batch_size and replay_batch_size by each other.

        Raises:
            ValueError: they do not fit, or a rollout would not hold whole groups or come between two training steps.
        """
        completions, generations = self.per_device_train_batch_size, self.num_generations
        of_a_pass = completions * self.world_size
        if self.steps_per_generation is None:
            drawn = self.generation_batch_size
            if drawn is not None and drawn % of_a_pass != 0:
                raise ValueError(
                    f"generation_batch_size must be a multiple of per_device_train_batch_size times the processes, "
                    f"{of_a_pass}; got {drawn}"
                )
            if drawn is None:
                accumulated = self.gradient_accumulation_steps
                # The fewest that draw whole groups.
                self.steps_per_generation = accumulated * (
                    generations // math.gcd(completions * accumulated, generations)
                )
            else:
                self.steps_per_generation = drawn // of_a_pass
        if self.generation_batch_size not in (None, of_a_pass * self.steps_per_generation):
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} and steps_per_generation "
                f"{self.steps_per_generation} do not fit: the first would be {of_a_pass * self.steps_per_generation}. "
                "Set one of them"
            )
        self.generation_batch_size = of_a_pass * self.steps_per_generation
        if completions * self.steps_per_generation % generations != 0:
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation counts completions, {generations} for each prompt "
                f"(num_generations), and must be a multiple of that: a process draws whole groups. Got {completions} * "
                f"{self.steps_per_generation}"
            )
        if self.steps_per_generation * self.num_iterations % self.gradient_accumulation_steps != 0:
            raise ValueError(
                "steps_per_generation * num_iterations must be a multiple of gradient_accumulation_steps, as a rollout "
                f"comes between two training steps; got {self.steps_per_generation} * {self.num_iterations} and "
                f"{self.gradient_accumulation_steps}"
            )
        if self.replay_batch_size is None:
            if completions % generations != 0:
                raise ValueError(
                    f"a forward and backward pass takes whole groups: per_device_train_batch_size must be a multiple "
                    f"of num_generations, {generations}, unless replay_batch_size is set (1 is {generations} "
                    f"completions); got {completions}"
                )
            self.replay_batch_size = completions // generations

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that each process rolls out at once."""
        return self.train_batch_size * int(self.steps_per_generation or 1) // self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Training steps, updates of the weights, that a rollout feeds."""
        return int(self.steps_per_generation or 1) * self.num_iterations // self.gradient_accumulation_steps

    @property
    def decoding(self) -> Decoding:
        """In evaluation."""
        return Decoding(**{field: getattr(self, name) for field, name in _DECODING.items()})

    @property
    def from_model(self) -> int:
        """Trajectories of each group that the model draws; the base draws the others."""
        drawn_by_base = self.num_generations // 8 if self.base_generations is None else self.base_generations
        return self.num_generations - drawn_by_base

    def check_on_paths(self, what: str) -> None:
        """That estimator and normalizer can train at the states that trajectories went through.

        Args:
            what: asks for it, with its verb, as the message begins.

        Raises:
            ValueError: they cannot.
        """
        if self.estimator != "posterior" or self.normalizer != "group":
            raise ValueError(
                f'{what} with estimator "posterior" and normalizer "group": the others train at states of the exact '
                f"chain, which trajectories do not go through here; got {self.estimator!r} and {self.normalizer!r}"
            )

    def check_steps(self, masks: int) -> None:
        """That rows with so many masks can be trained on in diffusion_steps calls.

        Raises:
            ValueError: they take more, and estimator and normalizer need the exact chain.
        """
        if self.diffusion_steps is not None and masks > self.diffusion_steps:
            self.check_on_paths(
                f"a row with {masks} masks takes more than the {self.diffusion_steps} network calls of diffusion_steps "
                "(None fills one position per call), which goes"
            )

    def step_limits(self, done: float) -> tuple[float | None, float]:
        """The effective sample size to keep (None: no limit) and the largest step, once a fraction of the run is done.

        As full_tilt_from says.
        """
        return step_limits(done, ess=self.target_ess, max_tilt=self.max_tilt, full_tilt_from=self.full_tilt_from)
