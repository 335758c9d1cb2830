"""FlowTrainer: Adjoint Matching and the learners beside it on `transformers.Trainer`."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput, speed_metrics

from dam.flows import matching
from dam.flows.adjoint import linearised
from dam.flows.direct import draft_loss, refl_loss
from dam.flows.matching import Targets, adjoint_targets
from dam.flows.processes import FlowProcess, Model, predicted
from dam.flows.simulate import Path, simulate
from dam.flows.values import pontryagin_targets, value_targets
from dam.train import card
from dam.train.base import InitialParameters, with_base
from dam.train.data import NumberedRow, is_stream, row_name
from dam.train.flow_config import FlowConfig
from dam.train.flow_figures import path_figures
from dam.train.flow_rewards import DifferentiableReward, Judge, check_takes
from dam.train.flow_rows import Column, Columns, Rows, Unconditioned, rows_of, shown
from dam.train.flow_targets import TargetBuffer, check_readable, check_told
from dam.train.flow_values import ValueLearner, check_value
from dam.train.networks import check_apart, check_dtype, evaluating, without_dropout, without_training
from dam.train.processes import in_step, together
from dam.train.progress import Progress
from dam.train.replay import Group
from dam.train.resumable import ResumableTrainer

Call = Callable[..., Tensor]  # a module, states [B, ...], times [B] and conditions by name, to predictions [B, ...]
FlowMetrics = Callable[[Tensor, list[Mapping[str, Any]]], dict[str, float]]

PARTS = ("rollout", "reward", "adjoint", "evaluation", "training")  # of time
_TILTED = "toward a reward, close to the base, as min E[-reward] + beta KL(model || base)"
_ALONE = "toward a reward alone, which nothing but an early end keeps close to the base"
_METHODS = {
    name: card.Method(said, f"https://arxiv.org/abs/{paper}", aim, (tag, "flow-matching"))
    for name, said, paper, aim, tag in (
        ("adjoint_matching", "Adjoint Matching", "2409.08861", _TILTED, "adjoint-matching"),
        (
            "vgg_flow",
            "VGG-Flow",
            "2512.05116",
            "toward a reward, close to the base, as min E[-reward] + beta / 2 E integral |v - v_base|^2 dt",
            "vgg-flow",
        ),
        ("draft", "DRaFT", "2309.17400", _ALONE, "draft"),
        ("refl", "ReFL", "2304.05977", _ALONE, "refl"),
    )
}
_OF_CARD = ("reward", "reward_std", "kl_path", "control_energy", "adjoint_norm")  # what is logged
_FIGURES_AT = 4  # times of a path at which control and adjoint are looked at for the log


class _Draw(enum.IntEnum):
    """What a step draws at random; each has a stream of its own."""

    ROLLOUT = 0
    TIMES = 1
    TARGETS = 2
    DROPOUT = 3
    FIGURES = 4
    LATE = 5  # times of one-step outcomes
    EVALUATION = 6
    ENDS = 7


class FlowTrainer(ResumableTrainer):
    """Fine-tunes a flow or a diffusion toward a reward that is differentiated, staying close to a base.

        min over the model of  E[-reward(X_1)] + beta KL(model || base)

    whose optimum is p*(x) ~ p_base(x) exp(reward(x) / beta). A training step of Adjoint Matching: paths of the
    memoryless SDE -> the reward's gradient -> lean adjoints of the base -> targets -> a regression of the model on some
    of them, several steps from one rollout (`dam.flows`, docs/flows.md). Beside it are VGG-Flow, of an ODE and with an
    objective of its own, and the direct learners DRaFT and ReFL, which go after the reward alone: users compare with
    them.

    Where model and reward have conditions, a class, a prompt or its embedding, a dataset has them: each row is a
    mapping from names of columns. The model is called as model(states, times, **conditions) with the columns that are
    numbers, or those that `FlowConfig.conditions` names, the reward as reward(states, **columns) with all. Which are
    numbers, and in which dtype, is decided once for all rows (`dam.train.flow_rows.Columns`). Without a dataset both
    are called with states alone, and max_steps says how long a run is.

    Logged: reward and reward_std, of the paths' ends, of "refl" of one-step outcomes; kl_path, KL(model || base) of
    paths, 1/2 E integral |u|^2 dt, estimated at a few times, of an ODE control_energy in its place; adjoint_norm, the
    mean of |a_t|; reward_calls, states that the reward's gradient was taken at, of all processes; loss, grad_norm. Of
    time (`dam.train.timing.Timing`): time/rollout_share, time/reward_share, time/adjoint_share, time/evaluation_share
    and time/training_share of the time since the last log, which add up to 1, paths_per_second, and time/eta_seconds.
    The loss of Adjoint Matching does not go to zero: it ends as the variance of the adjoints given their states.

    Adjoints are not clipped, which would move the optimum: a reward with gradients that are too large to follow is one
    to be made smooth, or met by a larger beta. max_grad_norm bounds what a step does.

    What is drawn for a path depends on (args.seed, step, row of the dataset, number of the path among its row's) only:
    not on rollout_batch_size or the number of processes. A resumed run goes on to the same result, with as many
    processes. The first loss that it logs is the mean since it went on.

    Args:
        model: a module that predicts what `process` says, called at states [B, ...] and times [B].
        reward: of states [B, ...], which are a copy, [B], in a graph; a module is frozen and moved. A
            state's own reward must not depend on the others of a batch.
        args: a `FlowConfig`.
        train_dataset, eval_dataset: rows of conditions; none for a model without.
        shape: of one state.
        process: what the model predicts and on which schedule, with noise=1 for Adjoint Matching:
            `FlowProcess()`, velocities of straight lines, unless given.
        call: how the module is called, call(module, states, times, **conditions), where that is not
            module(states, times, **conditions). Of several processes the module may be DistributedDataParallel.
        value: of learner "vgg_flow" a module for the value's gradient, called as value(states, times, **conditions) and
            trained with the model: a residual of the reward gradient at the one-step outcome, or with
            forward_looking=False all of it. Torch.func is to differentiate it in states and times. A checkpoint has it,
            `save_model` leaves it out; load_best_model_at_end loads it too. Unless given, lean adjoints take its place
            (VGG-Flow-PMP).
        ref_model: the base. Unless given it is the model as it is now: a frozen copy, or of a PEFT model the model
            itself with a copy of its trainable parameters.
        peft_config: trains an adapter (extra `peft`).
        compute_metrics: called with samples [N, ...] and their rows, on the CPU; gives figures by name.
        callbacks, optimizers: as for `transformers.Trainer`.

    Raises:
        ValueError, TypeError: bad arguments, before any work: a reward without a gradient, a column that nothing takes,
            a process that is not memoryless, parameters that two modules share, a norm in the base of an adapter
            that follows batches; or a step that diverges: paths, adjoints or a loss that are not finite.
        RewardError: the reward raised, or it or its gradient is not finite. The states are kept in
            output_dir/failed_rollouts.pt.

    Before this or any other error (not KeyboardInterrupt) ends a run that has begun, a checkpoint is saved of where its
    step began; not where one of several processes fails alone, as each has its own targets.

    Source: Domingo-Enrich et al., Adjoint Matching, arXiv 2409.08861, Alg. 1; the learners' own in `dam.flows`.
    """

    args: FlowConfig
    progress: Progress[TargetBuffer]

    def __init__(
        self,
        model: nn.Module,
        reward: DifferentiableReward,
        args: FlowConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        shape: tuple[int, ...],
        process: FlowProcess | None = None,
        call: Call | None = None,
        value: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        compute_metrics: FlowMetrics | None = None,
    ):
        args = FlowConfig(output_dir="flow_output") if args is None else args
        if not isinstance(args, FlowConfig):
            raise TypeError(f"args must be a FlowConfig; got {type(args).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model must be a torch module, whose parameters are trained; got {type(model).__name__}"
            )
        self.process = FlowProcess() if process is None else process
        if not isinstance(self.process, FlowProcess):
            raise TypeError(
                f"process must be a FlowProcess, from noise to data; got {type(self.process).__name__}. Samplers of a "
                "density are trained in a loop of your own (docs/flows.md)"
            )
        refusal = self.process.why_not_matched()
        if refusal is not None and args.learner == "adjoint_matching":
            raise ValueError(f"process: {refusal}")
        if not isinstance(shape, (tuple, list)) or not shape or min(shape) < 1:
            raise ValueError(f"shape must be that of one state, at least (1,); got {shape}")
        if args.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"gradient_checkpointing=True goes with a model that has gradient_checkpointing_enable(), which "
                f"{type(model).__name__} has not: checkpoint inside its forward (torch.utils.checkpoint)"
            )
        if args.learner == "draft" and args.world_size > 1:
            raise ValueError(
                'learner "draft" goes back through many calls of the model, which DistributedDataParallel does not '
                'sum over processes: run it in one, or take "adjoint_matching" or "refl"'
            )
        self._trained_by = self.process.ode() if args.learner == "vgg_flow" else self.process
        self.value = value
        self._value = None if value is None else _value_learner(value, self._trained_by, args, optimizers)
        self._shape = tuple(shape)
        self._times = self._trained_by.times(args.diffusion_steps)
        self._late = [k for k in range(1, len(self._times) - 1) if float(self._times[k]) >= args.refl_from]
        if args.learner == "refl" and not self._late:
            raise ValueError(
                f"a path of {args.diffusion_steps} steps has no time in [refl_from, 1) behind its first: lower "
                f"refl_from, {args.refl_from}, or raise diffusion_steps"
            )
        self._call: Call = _called if call is None else call
        self._own_call = call is not None
        if train_dataset is None:
            rows_of_a_step = args.prompts_per_rollout * args.world_size
            if args.max_steps < 1:
                raise ValueError("without a train_dataset max_steps must say how long a run is")
            # As many as the run uses: an epoch is no more than a pass over conditions.
            train_dataset = Unconditioned(rows_of_a_step * -(-args.max_steps // args.steps_per_rollout))
            eval_dataset = Unconditioned(args.eval_samples) if eval_dataset is None else eval_dataset
        names = (card.name_of(model), card.name_of(model if ref_model is None else ref_model))
        network, self._base = with_base(model, ref_model, peft_config)
        if value is not None:
            check_apart(value, "value", network, effect="both would train")
        if isinstance(reward, nn.Module):
            check_apart(reward, "the reward", network)
            if value is not None:
                check_apart(reward, "the reward", value, of="value")
        self._judge = Judge(reward, str(args.output_dir))
        if args.disable_dropout:
            without_dropout(network)
        check_dtype(network)
        self._dtype = _dtype_of_states(network)
        self._checked = False
        self._columns = Columns(args.conditions)
        self._metrics = compute_metrics
        super().__init__(
            network,
            args,
            Progress(TargetBuffer(args.process_index, args.world_size)),
            parts=PARTS,
            drawn="paths",
            names=names,
            data_collator=self._columns,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self._value is not None:
            self._value.to(self.args.device)
            self.add_callback(self._value)
        self._base.to(self.args.device)
        self._judge.to(self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, for processes that have all of the model.

        Raises:
            ValueError: FSDP or DeepSpeed are to divide it.
        """
        super().create_accelerator_and_postprocess()
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or asked or self.args.fsdp:
            raise ValueError(
                "FlowTrainer does not divide a model: the base's vector-Jacobian products need all of it in each "
                "process. Run without FSDP and DeepSpeed, with an adapter (peft_config) where memory is short"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, of the value's network too."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self._value is not None and self.value is not None:
            self._value.add_to(optimizer, self.get_decay_parameter_names(self.value))
        return optimizer

    # The model and its base

    def _model(self, module: nn.Module, conditions: dict[str, Column]) -> Model:
        """As `dam.flows` calls models, with the conditions of the rows."""
        return lambda state, when: _tensor_of(self._call(module, state, when, **conditions))

    def _base_model(self, conditions: dict[str, Column]) -> Model:
        def base(state: Tensor, when: Tensor) -> Tensor:
            with self._base.module(self.model) as module, without_training(module), self._precision():
                return _tensor_of(self._call(module, state, when, **conditions))

        return base

    def _conditions(self, columns: dict[str, Column]) -> dict[str, Column]:
        """What the model is called with.

        Raises:
            ValueError: `conditions` names a column that is none.
        """
        wanted = self.args.conditions
        if wanted is None:
            return {name: column for name, column in columns.items() if isinstance(column, Tensor)}
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise ValueError(
                f"conditions names {', '.join(missing)}, and the dataset has {', '.join(columns) or 'none'}"
            )
        return {name: columns[name] for name in wanted}

    def _rows(self, batch: dict[str, Any], repeats: int) -> Rows:
        return rows_of(self._prepare_inputs(batch), repeats, self._dtype)

    def _pieces(self, rows: int) -> Iterator[slice]:
        size = self.args.rollout_batch_size
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def _path(self, process: FlowProcess, times: Tensor, rows: Rows, seed: int, checkpoint_every: int) -> Path:
        """Paths of the model, one for each row."""
        start = process.initial(
            (len(rows), *self._shape),
            start=float(times[0]),
            seed=seed,
            row_ids=rows.row_id,
            dtype=self._dtype,
            device=self.args.device,
        )
        with evaluating(self.model, self._precision()):
            return simulate(
                process,
                self._model(self.model, self._conditions(rows.columns)),
                start,
                times=times,
                method=self.args.method,
                checkpoint_every=checkpoint_every,
                seed=seed,
                row_ids=rows.row_id,
            )

    # Training

    def _check_run(self, checkpoint: str | None) -> None:
        given: Any = self.eval_dataset
        rows: Any = self.train_dataset
        self._columns.clear()
        self._columns.look(rows, "training")
        for name, dataset in given.items() if isinstance(given, dict) else [("", given)]:
            if dataset is not None:
                self._columns.look(dataset, f"evaluation {name!r}" if name else "evaluation")
        self._checked = False
        if not is_stream(rows):
            self._check_calls(self._rows(self._columns([NumberedRow(0, row_name(0, "training"), rows[0])]), 1))

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """As a `ResumableTrainer`'s, of a dataset whose columns are known."""
        self._columns.meet(dataset, description.lower())
        return super()._get_dataloader(dataset, description, *args, **options)

    def _check_calls(self, rows: Rows) -> None:
        """Once a run: that model, base and reward can be called as they will be.

        Raises:
            ValueError: they cannot; says with what they are called.
        """
        if self._checked:
            return
        rows = rows[torch.zeros(2, dtype=torch.int64, device="cpu")]  # two, that one may be seen to depend on the other
        conditions = self._conditions(rows.columns)
        module = self.accelerator.unwrap_model(self.model)
        called, tensors = (self._call, 3) if self._own_call else (module, 2)
        try:
            check_takes(called, "call" if self._own_call else type(module).__name__, tensors, conditions)
        except ValueError as error:
            raise ValueError(f"{error}. The columns that the model is called with are named by `conditions`") from None
        start = self.process.initial(
            (2, *self._shape), start=float(self._times[0]), seed=0, dtype=self._dtype, device=self.args.device
        )
        base = self._base_model(conditions)
        with self._told_apart(module, start, conditions):
            with evaluating(self.model, self._precision()):
                predicted(self._model(self.model, conditions), start, self._times[0])
            self._check_pull(base, start)
        self._judge.check(start, rows)
        if self._is_kept:
            check_readable(self._kept_of(rows).columns)
        if self._value is not None:
            base, gradient = self._gradient(self._value, rows)
            time_of_start = self._times[:1].to(start.device).repeat(2)
            with self._judge.keeping(self.state.global_step):
                self._value.check(base, gradient, Targets(start, time_of_start, start, torch.ones_like(time_of_start)))
            self._judge.taken()
        self._checked = True

    @contextlib.contextmanager
    def _told_apart(self, module: nn.Module, state: Tensor, conditions: dict[str, Column]) -> Iterator[None]:
        """Context manager: what model and base raise is told with what they are called with."""
        try:
            yield
        except ValueError:
            raise
        except Exception as error:
            narrow = {each.dtype for each in module.parameters() if each.is_floating_point() and each.itemsize == 2}
            cure = "The columns that the model is called with are named by `conditions`"
            if narrow and not (self.args.bf16 or self.args.fp16):
                cure = f"Its weights are in {' and '.join(map(str, narrow))}: set bf16=True, or load it in float32"
            first_line = str(error).partition("\n")[0].removesuffix(".")
            raise ValueError(
                f"{type(module).__name__} raised {type(error).__name__} at {shown(state, conditions)}: {first_line}. "
                f"{cure}"
            ) from error

    def _check_pull(self, base: Model, state: Tensor) -> None:
        """That a vector can be pulled back through the base, which is the model with other parameters for a call only.

        Raises:
            ValueError: the model is called again for that, by when it has its own.
        """
        with torch.no_grad():
            pull = linearised(self._trained_by, base, state, self._times[0])[0]
        again: list[nn.Module] = []
        modules = self.model.modules() if isinstance(self._base, InitialParameters) else ()
        hooks = [each.register_forward_pre_hook(lambda module, _: again.append(module)) for each in modules]
        try:
            pull(state)
        except CheckpointError:
            if not again:
                raise
        finally:
            for hook in hooks:
                hook.remove()
        if again:
            raise ValueError(
                f"the model computes activations of {type(again[0]).__name__} again on the way back "
                "(torch.utils.checkpoint). Of an adapter the base is the model with its first parameters, which it no "
                "longer has by then: checkpoint where module.training is True alone, as the base never is, or train "
                "without an adapter"
            )

    @property
    def _is_kept(self) -> bool:
        """Whether checkpoints are to hold targets."""
        return not self.args.is_direct and self.args.steps_per_rollout > 1

    def _kept_of(self, rows: Rows) -> Rows:
        """With the columns that passes ask for: of a value the reward is called in them."""
        return rows if self._value is not None else Rows(rows.row_id, self._conditions(rows.columns))

    def _made_with(self) -> dict[str, Any]:
        """What targets are of, in numbers and texts."""
        schedule, some = self.process.schedule, torch.linspace(0.1, 0.9, 5, dtype=torch.float64, device="cpu")
        return {
            "learner": self.args.learner,
            "beta": self.args.beta,
            "predicts": self.process.predicts,
            "schedule": [*schedule.alpha(some).tolist(), *schedule.beta(some).tolist()],
        }

    def _what_runs(self, checkpoint: str | bool | None) -> dict[str, Any]:
        return {**super()._what_runs(checkpoint), "reward": self._judge.name, "shape": self._shape}

    def _load_best_model(self) -> None:
        """As the Trainer's, with the value of that step."""
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if self._value is not None and best is not None:
            self._value.load(best)

    def _load_beside(self, checkpoint: str) -> None:
        check_value(checkpoint, self._value is not None)
        if self._value is not None:
            self._value.load(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._value is not None and self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._value.save(os.path.join(self._get_output_dir(trial=trial), name))
        super()._save_checkpoint(model, trial)

    def _facts(self) -> card.Facts:
        args = self.args
        run = {
            "reward": f"`{self._judge.name}`",
            "process": f"predicts {self.process.predicts}, {type(self.process.schedule).__name__}",
            "steps of a path": f"{args.diffusion_steps}, {args.method}",
            "budget": card.budget(self.reward_calls, self.state.log_history),
            "seed": f"{args.seed}",
        }
        if not args.is_direct:
            run = {"beta": f"{args.beta:g}", **run}
        return self._facts_with(_METHODS[args.learner], run, _OF_CARD)

    def _check_kept(self, groups: list[Group], checkpoint: str) -> None:
        for group in groups:
            shape = tuple(group["state"].shape[1:]) if "state" in group else None
            if shape != self._shape:
                raise ValueError(
                    f"{checkpoint!r} has no targets for states of shape {self._shape}: it is of another model, or no "
                    "checkpoint of a FlowTrainer; begin a new run from its weights"
                )
            check_told(group, self._made_with(), checkpoint)

    def _drawn_times(self) -> list[int]:
        """Numbers of the times that targets are made at, the same for all paths of a rollout."""
        count = self.args.diffusion_steps
        wanted = self.args.matched_times or count
        return sorted(torch.randperm(count, generator=self._generator(_Draw.TIMES))[:wanted].tolist())

    def _figures_at(self, of: list[int]) -> list[int]:
        order = torch.randperm(len(of), generator=self._generator(_Draw.FIGURES))[:_FIGURES_AT]
        return [of[n] for n in order.tolist()]

    def _refill(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Draws paths, and puts their targets into the buffer; figures of each path, on the CPU."""
        args, step = self.args, self.state.global_step
        rows = self._rows(batch, args.num_generations)
        self._check_calls(rows)
        at, seed = self._drawn_times(), self._seed(_Draw.ROLLOUT)
        found: list[Targets] = []
        ends: list[Targets] = []
        figures: list[dict[str, Tensor]] = []
        for part in self._pieces(len(rows)):
            piece = rows[part]
            conditions = self._conditions(piece.columns)
            with self._timing.part("rollout"):
                path = self._path(self._trained_by, self._times, piece, seed, args.checkpoint_every)
            with self._timing.part("reward"):
                slope, reward = self._judge.slopes(path.final, piece, args.beta, step)
            with self._timing.part("adjoint"), evaluating(self.model, self._precision()):
                model, base = self._model(self.model, conditions), self._base_model(conditions)
                targets = self._targets(base, path, slope, at)
                of_adjoint = targets if self._value is None else None
                told = path_figures(self._trained_by, model, base, path, self._figures_at(at), of_adjoint)
            # The mean over the paths of the piece, as a part of that over all.
            weight = targets.weight * (len(piece) / len(rows))
            found.append(Targets(*(value.cpu() for value in targets._replace(weight=weight))))
            one = torch.ones(len(piece), dtype=torch.float64, device=slope.device)  # the time, too
            ends.append(Targets(path.final, one, slope, one / len(rows)))
            figures.append({"reward": reward, **told})
        row, kept = torch.arange(len(rows), device="cpu").repeat(len(at)), self._kept_of(rows)
        if self._is_kept:
            check_readable(kept.columns)
        of_ends = None if self._value is None else _one(ends, 1)
        self.progress.replay.fill(_one(found, len(at)), row, kept, of_ends, self._made_with())
        return _joined(figures)

    def _targets(self, base: Model, path: Path, slope: Tensor, at: list[int]) -> Targets:
        """Of a learner that matches; with a value what the base predicts, which each pass moves by its own."""
        if self._value is not None:
            return value_targets(self._trained_by, base, lambda state, _: torch.zeros_like(state), path, at=at)
        if self.args.learner == "vgg_flow":
            return pontryagin_targets(self._trained_by, base, path, slope, at=at)
        return adjoint_targets(self._trained_by, base, path, slope, at=at)

    def _matching_loss(self, model: nn.Module, batch: dict[str, Any], due: bool) -> Tensor:
        """Of Adjoint Matching and VGG-Flow."""
        args, buffer = self.args, self.progress.replay
        if due:
            self._tell(together(functools.partial(self._refill, batch)))
        step, passes = self.state.global_step, args.gradient_accumulation_steps
        begun = step - step % args.steps_per_rollout
        number = (step - begun) * passes + self.progress.micro_step
        seed = self._seed(_Draw.TARGETS, args.process_index, step=begun)
        targets, rows = buffer.batch(number, args.per_device_train_batch_size, seed, args.device)
        with self._dropout(_Draw.DROPOUT):
            trained = self._model(model, self._conditions(rows.columns))
            if self._value is None:
                loss = matching.loss(trained, targets)
            else:
                loss = self._loss_with(self._value, trained, targets, rows, number)
        if number + 1 == args.steps_per_rollout * passes:
            buffer.clear()  # used up: a checkpoint of here need not hold it
        return loss

    def _loss_with(self, value: ValueLearner, model: Model, targets: Targets, rows: Rows, number: int) -> Tensor:
        """Of the flow, matched to a value's gradient, and of that; neither has a gradient in the other."""
        if self.progress.micro_step == 0:
            value.begin_step()
        base, gradient = self._gradient(value, rows)
        args, step = self.args, self.state.global_step
        seed = self._seed(_Draw.ENDS, args.process_index, step=step - step % args.steps_per_rollout)
        ends, of_ends = self.progress.replay.ends(number, args.per_device_train_batch_size, seed, args.device)
        with self._judge.keeping(step):
            matched = matching.loss(model, value.matched(targets, gradient))
            if args.forward_looking and not bool(matched.detach().isfinite()):
                outcome = self._trained_by.data(predicted(base, *targets[:2]), *targets[:2])
                self._judge.slopes(outcome.detach(), rows, args.beta, step)  # raises where it is the reward's gradient
            learned = value.loss(base, gradient, targets) + value.end_loss(self._gradient(value, of_ends)[1], ends)
        self.progress.reward_calls += self._judge.taken()
        return matched + learned

    def _gradient(self, value: ValueLearner, rows: Rows) -> tuple[Model, Model]:
        """The base and the value's gradient, of these rows."""
        conditions = self._conditions(rows.columns)
        base = self._base_model(conditions)
        return base, value.gradient(base, self._judge.within(rows, self.args.beta), conditions)

    def _direct_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Of DRaFT and ReFL, on paths of this pass."""
        args, step = self.args, self.state.global_step
        every = self._rows(batch, args.num_generations)
        self._check_calls(every)
        size, number = args.per_device_train_batch_size, self.progress.micro_step
        rows = every[number * size : (number + 1) * size]
        conditions = self._conditions(rows.columns)
        with self._timing.part("rollout"):
            # All states: dropout, which the loss has, would not make them again.
            path = self._path(self.process, self._times, rows, self._seed(_Draw.ROLLOUT), checkpoint_every=1)
        with self._timing.part("adjoint"), evaluating(self.model, self._precision()):
            frozen, base = self._model(self.model, conditions), self._base_model(conditions)
            told = path_figures(self.process, frozen, base, path, self._figures_at(list(range(len(path.steps)))))
        rewards: list[Tensor] = []
        cost = self._judge.cost(rows, step, rewards)
        with self._dropout(_Draw.DROPOUT):
            trained = self._model(model, conditions)
            if args.learner == "draft":
                loss = draft_loss(path, trained, cost, last=args.draft_steps, recompute=args.recompute)
            else:
                chosen = torch.randint(len(self._late), (), generator=self._generator(_Draw.LATE))
                k = self._late[int(chosen)]
                loss = refl_loss(self.process, trained, path.state(k), path.times[k], cost)
        self._tell(together(lambda: _joined([{"reward": rewards[0], **told}])))
        return loss

    def _tell(self, of_processes: list[dict[str, Tensor]]) -> None:
        """Into the log: figures of each path, of all processes."""
        figures = {name: torch.cat([each[name] for each in of_processes]) for name in of_processes[0]}
        reward = figures["reward"]
        self.progress.reward_calls += len(reward)
        self._timing.drew(len(reward))
        spread = {"reward_std": float(reward.std())} if len(reward) > 1 else {}
        self.progress.record(**{name: float(value.mean()) for name, value in figures.items()}, **spread)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The learner's loss, after a rollout where one is due.

        Raises:
            ValueError: it is not finite.
        """
        if return_outputs:
            raise ValueError("FlowTrainer.compute_loss has no outputs to return")
        due = self._begin_pass()
        if self.args.is_direct:
            loss = self._direct_loss(model, inputs)
        else:
            loss = self._matching_loss(model, inputs, due)
        self.progress.micro_step += 1
        in_step(lambda: self._check_loss(float(loss.detach())))
        return loss

    def _check_loss(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step} is {loss}: the run has diverged. Go on from an earlier "
                "checkpoint with a smaller learning_rate or max_grad_norm, or a larger beta"
            )

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples by the ODE, one of each row or eval_samples; logs and returns the mean and spread of their reward.

        And `compute_metrics` of them. With ema_decay they are of the averaged weights. Each evaluation draws the same,
        unless eval_redraw is set; its rewards are not counted in reward_calls.
        """
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As `evaluate`, and returns the samples; logs nothing.

        Returns:
            PredictionOutput(predictions [N, ...], label_ids None, metrics).
        """
        dataset: Any = self.eval_dataset if test_dataset is None else test_dataset
        if dataset is None or isinstance(dataset, dict):
            got = "none" if dataset is None else f"those of {', '.join(dataset)}"
            raise ValueError(f"predict draws for one dataset, test_dataset or the trainer's eval_dataset; got {got}")
        metrics, samples = self._sampled(self.get_test_dataloader(dataset), metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=samples.numpy(), label_ids=None, metrics=metrics)

    def _evaluated(self, loader: Any, prefix: str) -> dict[str, float]:
        return self._sampled(loader, prefix)[0]

    def _sampled(self, loader: Any, prefix: str) -> tuple[dict[str, float], Tensor]:
        """Metrics, and a sample for each row, [N, ...], on the CPU."""
        begun, args = time.time(), self.args
        process = self.process.ode()
        times = process.times(args.eval_diffusion_steps or args.diffusion_steps)
        seed = self._seed(_Draw.EVALUATION, step=None if args.eval_redraw else 0)

        def drawn() -> list[tuple[int, Tensor, float, dict[str, Any]]]:
            return [each for batch in loader for each in self._samples_of(batch, process, times, seed)]

        with self._averaged():
            # By number, as processes draw a row twice where there are not as many for each.
            found = {number: (one, reward, row) for part in together(drawn) for number, one, reward, row in part}
        if not found:
            raise ValueError("there are no rows to draw samples for: the dataset is empty")
        samples = torch.stack([found[number][0] for number in sorted(found)])
        rewards = torch.tensor([found[number][1] for number in sorted(found)], dtype=torch.float64, device="cpu")
        metrics = {f"{prefix}_reward": float(rewards.mean())}
        if len(rewards) > 1:
            metrics[f"{prefix}_reward_std"] = float(rewards.std())
        if self._metrics is not None:
            rows: list[Mapping[str, Any]] = [found[number][2] for number in sorted(found)]
            told = in_step(functools.partial(self._metrics, samples, rows))
            metrics.update({f"{prefix}_{name}": value for name, value in told.items()})
        metrics.update(speed_metrics(prefix, begun, num_samples=len(samples)))
        return metrics, samples

    def _samples_of(
        self, batch: dict[str, Any], process: FlowProcess, times: Tensor, seed: int
    ) -> list[tuple[int, Tensor, float, dict[str, Any]]]:
        """Number, sample, reward and columns of each row of a batch."""
        every, found = self._rows(batch, 1), []
        for part in self._pieces(len(every)):
            rows = every[part]
            final = self._path(process, times, rows, seed, checkpoint_every=len(times)).final
            with self._timing.part("reward"), torch.no_grad():
                reward = self._judge.rewards(final, rows, self.state.global_step)
            columns = {n: c.cpu() if isinstance(c, Tensor) else c for n, c in rows.columns.items()}
            of_each = zip(rows.row_id.tolist(), final.cpu(), reward.tolist(), strict=True)
            for n, (number, one, value) in enumerate(of_each):
                found.append((number, one, value, {name: column[n] for name, column in columns.items()}))
        return found


def _called(module: nn.Module, state: Tensor, when: Tensor, **conditions: Any) -> Tensor:
    return module(state, when, **conditions)


def _dtype_of_states(network: nn.Module) -> torch.dtype:
    """Float64 of a model in float64, else float32: paths need more than 16 bits."""
    dtypes = {each.dtype for each in network.parameters() if each.is_floating_point()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _tensor_of(prediction: Any) -> Tensor:
    if not isinstance(prediction, Tensor):
        raise ValueError(
            f"the model gives {type(prediction).__name__}, no tensor: say which of it is the prediction, "
            "call=lambda model, x, t, **c: model(x, t, **c)[0] for one"
        )
    return prediction


def _one(parts: list[Targets], times: int) -> Targets:
    """Of all paths, of each time in a row, whatever pieces they were drawn in."""
    of_each = ([value.unflatten(0, (times, -1)) for value in values] for values in zip(*parts, strict=True))
    return Targets(*(torch.cat(values, dim=1).flatten(0, 1) for values in of_each))


def _value_learner(value: Any, process: FlowProcess, args: FlowConfig, optimizers: tuple[Any, Any]) -> ValueLearner:
    """Of a network for the value's gradient.

    Raises:
        ValueError, TypeError: the run has no use for it, or cannot train it.
    """
    if args.learner != "vgg_flow":
        raise ValueError(f'value goes with learner "vgg_flow"; got {args.learner!r}')
    if not isinstance(value, nn.Module):
        raise TypeError(f"value must be a torch module, which is trained; got {type(value).__name__}")
    if not any(each.requires_grad for each in value.parameters()):
        raise ValueError("no parameter of value is trainable")
    if args.world_size > 1:
        raise ValueError(
            "value is trained in one process, as its derivatives go around DistributedDataParallel: run without "
            "others, or without value, by the lean adjoints of paths"
        )
    if args.fp16:
        raise ValueError("value is trained without a scale of its gradients: use bf16=True in place of fp16=True")
    if any(each is not None for each in optimizers):
        raise ValueError("with value leave optimizers out: the run's own has the value's parameters as a group")
    return ValueLearner(value, process, args)


def _joined(figures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of pieces those of all paths, float64 on the CPU."""
    return {name: torch.cat([each[name].double() for each in figures]).cpu() for name in figures[0]}
