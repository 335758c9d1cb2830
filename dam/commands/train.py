"""`dam train`: one run of a recipe into a folder, or two steps of it with a small random model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_callback import PrinterCallback

from dam import files
from dam.models import as_denoiser, blocks_of
from dam.recipes.characters import characters_tokenizer
from dam.recipes.recipe import ModelSection, Recipe, RecipeError, parsed, read
from dam.recipes.small import random_model, small_config
from dam.tasks import TASKS, finetune
from dam.tasks.language import LanguageTask
from dam.train import DAMConfig, DAMTrainer, last_checkpoint
from dam.train.callbacks import MetricsFile, StopOnSignal
from dam.train.data import ended
from dam.train.pretrained import Source, has_tokenizer
from dam.train.processes import in_step, together
from dam.train.tokens import stop_tokens

RECORD = "recipe.yaml"
# Arguments of `DAMConfig` that a run may be resumed with others of: they change neither draws nor steps.
FREE = (
    "rollout_batch_size",
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "log_completions",
    "disable_tqdm",
)
_DRY_ROWS = 8
_DRY_GROUP = 4  # trajectories of a prompt
_DRY_LENGTH = 16  # tokens of a completion


def train(
    recipe: Recipe, output: Path | None, *, name: str = "train", resume: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Runs a recipe; what came out of it, which is also in output/metrics.json.

    All processes of `accelerate launch` call it alike.

    Args:
        recipe: of `dam.recipes.recipe.load`.
        output: folder of the run; None takes the recipe's, or a new one in runs/, or with resume the newest one there.
        name: of new folders in runs/.
        resume: goes on with the run in `output`.
        dry_run: a small model of the same class, with random weights, does two steps; into no folder unless
            `output` names one; the recipe's is that of its run.

    Raises:
        RecipeError, ValueError, OSError, ImportError: the recipe cannot be run here, or `output` holds something else;
            before the first rollout.
        RewardError: see `DAMTrainer`.
        Stopped: on Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    start = time.monotonic()
    task = task_of(recipe.task.name)
    recipe.training_config("unused")  # all arguments are right, and the processes know each other
    if dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            return _dry_run(recipe, task, files.unused(output) if output else Path(temporary))
    given = str(output or recipe.output or "")
    folder = Path(given or together(lambda: str(_folder(name, resume)))[0])
    in_step(lambda: _claim(recipe, folder, resume) if PartialState().is_main_process else None)
    if (folder / "metrics.json").exists():
        done: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return done

    stop = StopOnSignal()
    parts = _parts(recipe, task)
    trainer = _trainer(recipe, task, parts, recipe.training_config(str(folder)), [stop])
    if not resume:
        in_step(lambda: _record(recipe, folder) if PartialState().is_main_process else None)
    trainer.train(resume_from_checkpoint=last_checkpoint(str(folder)) if resume else None)
    state = trainer.state
    if stop.stopped and state.global_step < state.max_steps:
        raise finetune.Stopped(f"stopped after step {state.global_step} of {state.max_steps}; checkpoint saved")
    trainer.save_model(str(folder))
    result: dict[str, Any] = {"task": task.name, "steps": state.global_step, "reward_calls": trainer.reward_calls}
    if parts.eval_rows:
        result |= trainer.evaluate()
    result |= {"seconds": round(time.monotonic() - start, 1), "output": str(folder)}
    if PartialState().is_main_process:
        finetune.write_json(folder / "metrics.json", result)
    return result


def task_of(name: str) -> LanguageTask:
    """Raises a RecipeError where there is no such task."""
    if name not in TASKS:
        raise RecipeError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


# The folder


def _folder(name: str, resume: bool) -> Path:
    return files.last_output(name) if resume else files.next_output(name)


def recorded(output: Path) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        ValueError: there is none.
    """
    if not (output / RECORD).is_file():
        raise ValueError(f"nothing to resume: {output} holds no run of dam train")
    return read(parsed((output / RECORD).read_text(encoding="utf-8"), str(output / RECORD)))


def _claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """Makes sure that `output` can be written and holds this run or none."""
    if resume:
        files.refuse_changes(_fixed(recorded(output)), _fixed(recipe), f"the run in {output}")
        return
    files.unused(output).mkdir(parents=True, exist_ok=True)


def _record(recipe: Recipe, output: Path) -> None:
    """Once model and rows are there: what cannot begin leaves an empty folder, which its mended recipe takes."""
    (output / RECORD).write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False), encoding="utf-8")


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run must have as before, by key."""
    flat: dict[str, Any] = {}
    for section, values in recipe.as_dict().items():
        inside = values if isinstance(values, Mapping) else {"": values}
        flat |= {f"{section}.{key}".removesuffix("."): value for key, value in inside.items()}
    return {key: value for key, value in flat.items() if key not in ("output", *(f"config.{name}" for name in FREE))}


# The parts of a run


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a recipe names, loaded."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]  # each as often as it is sampled


def _parts(recipe: Recipe, task: LanguageTask) -> _Parts:
    section, given = recipe.model, recipe.task
    rows = task.rows(given.source, split=given.split, limit=given.limit, style=given.style)
    evaluated: list[dict[str, Any]] = []
    if recipe.eval is not None:
        wanted = recipe.eval
        source = wanted.source or given.source
        evaluated = task.rows(source, split=wanted.split, limit=wanted.limit, style=given.style)
    tokenizer = _tokenizer(recipe, section.source() if section.name is not None else None)
    if section.name is None:
        model = _random(section, _native_config(section, tokenizer))
    else:
        _check_type(section, section.source().config())
        model = section.source().model(trainable=True)  # of an adapter: it is trained on
    return _Parts(model, tokenizer, rows, _repeated(recipe, evaluated))


def _repeated(recipe: Recipe, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    samples = 1 if recipe.eval is None else recipe.eval.samples
    return [row for row in rows for _ in range(samples)]


def _check_type(section: ModelSection, config: Any) -> None:
    if section.type not in (None, config.model_type):
        raise RecipeError(f"model.type is {section.type!r}, but {section.name} is of type {config.model_type!r}")


def _tokenizer(recipe: Recipe, source: Source | None) -> Any:
    given = recipe.tokenizer
    if given.characters:
        tokenizer = characters_tokenizer()
    elif given.name is not None:
        tokenizer = Source(given.name, trust_remote_code=recipe.model.trust_remote_code).tokenizer()
    else:
        assert source is not None
        tokenizer = source.tokenizer()
    if given.chat_template is not None:
        tokenizer.chat_template = given.chat_template
    known = tokenizer.get_vocab()
    for name in ("mask_token", "pad_token", "eos_token"):
        token = getattr(given, name)
        if token is not None:
            if token not in known:
                raise RecipeError(f"tokenizer.{name}: the tokenizer has no token {token!r}")
            setattr(tokenizer, name, token)
    return tokenizer


def _native_config(section: ModelSection, tokenizer: Any) -> Any:
    """The config of a model of random weights, whose class is in transformers."""
    if section.type is None or section.type not in CONFIG_MAPPING:
        raise RecipeError(f"model.type {section.type!r}: transformers has no such model; give model.name")
    default = AutoConfig.for_model(section.type).to_dict()
    unknown = [name for name in section.config if name not in default]
    if unknown:
        raise RecipeError(f"model.config: a config of type {section.type!r} has no {', '.join(unknown)}")
    tokens = {name: getattr(tokenizer, name, None) for name in default if name.endswith("_token_id")}
    return AutoConfig.for_model(section.type, **{"vocab_size": len(tokenizer), **tokens, **section.config})


def _random(section: ModelSection, config: Any) -> Any:
    return random_model(
        config,
        auto_class=section.auto_class,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
        attn=section.attn,
    )


def _trainer(
    recipe: Recipe, task: LanguageTask, parts: _Parts, config: DAMConfig, callbacks: Sequence[Any]
) -> DAMTrainer:
    peft_config = None
    if recipe.peft is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(**recipe.peft)
    if config.reward_weights is None:
        config.reward_weights = list(task.reward_weights)
    samples = 1 if recipe.eval is None else recipe.eval.samples
    return DAMTrainer(
        model=parts.model,
        reward_funcs=list(task.rewards),
        args=config,
        train_dataset=parts.rows,
        eval_dataset=parts.eval_rows or None,
        processing_class=parts.tokenizer,
        callbacks=[*callbacks, MetricsFile(str(Path(str(config.output_dir)) / "metrics.jsonl"))],
        peft_config=peft_config,
        compute_metrics=functools.partial(_metrics, task, parts, config, samples) if parts.eval_rows else None,
        denoiser=functools.partial(as_denoiser, **recipe.model.denoiser),
    )


def _metrics(task: LanguageTask, parts: _Parts, config: DAMConfig, samples: int, prediction: Any) -> dict[str, float]:
    """The task's metrics of evaluation rows that were filled in, `samples` of each one after another."""
    filled_in = np.asarray(prediction.predictions)
    starts = (np.asarray(prediction.inputs) != filled_in).argmax(axis=1)  # of completions: masks are never drawn
    behind = [ids[start:].tolist() for ids, start in zip(filled_in, starts, strict=True)]
    stop = stop_tokens(config.stop_token_ids, parts.tokenizer, config.mask_token_id)
    # With the token that ends it, as reward functions see it.
    texts = parts.tokenizer.batch_decode([ended(ids, stop) for ids in behind], skip_special_tokens=True)
    groups = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    return task.metrics(groups, parts.eval_rows[::samples])


# A dry run


def _dry_run(recipe: Recipe, task: LanguageTask, output: Path) -> dict[str, Any]:
    """Two steps of a small random model of the recipe's class, on a few rows; what it found."""
    config = recipe.training_config(str(output))
    parts, own_tokens = _dry_parts(recipe, task, PartialState().num_processes)
    blocks = blocks_of(as_denoiser(parts.model, **recipe.model.denoiser))
    block_length = config.block_length
    if blocks is None and block_length is not None:  # chosen, not the attention's
        block_length = min(block_length, _DRY_LENGTH // 2)
    length = min(config.max_completion_length, _DRY_LENGTH)
    steps, group = config.diffusion_steps, min(config.num_generations, _DRY_GROUP)
    changes: dict[str, Any] = {
        "max_steps": 2,
        "max_completion_length": length,
        "block_length": block_length,
        "diffusion_steps": None if steps is None else max(1, steps * length // config.max_completion_length),
        "num_generations": group,
        "target_ess": None if config.target_ess is None else min(config.target_ess, group),
        "base_generations": None if config.base_generations is None else min(config.base_generations, group // 2),
        "order_samples": min(config.order_samples, group // 2),
        "draw_outcomes": None if config.draw_outcomes is None else min(config.draw_outcomes, group),
        "per_device_train_batch_size": group,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": None,
        "generation_batch_size": None,
        "replay_batch_size": None,
        "replay_size": 4,
        "num_iterations": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    if not own_tokens:
        changes |= {"mask_token_id": None, "stop_token_ids": None, "suppress_tokens": None}
    trainer = _trainer(recipe, task, parts, recipe.training_config(str(output), **changes), [])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    result: dict[str, Any] = {
        "task": task.name,
        "steps": trainer.state.global_step,
        "reward_calls": trainer.reward_calls,
        "model": type(parts.model).__name__,
        "model_type": parts.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trained": sorted({re.sub(r"\d+", "N", name) for name in trained}),
        "rewards": [entry["reward"] for entry in logs],
        "loss": [entry["loss"] for entry in logs],
    }
    return result | (trainer.evaluate() if parts.eval_rows else {})


def _dry_parts(recipe: Recipe, task: LanguageTask, processes: int) -> tuple[_Parts, bool]:
    """A small model, a tokenizer and a few rows, of files that are here; and whether the tokenizer is the model's own.

    A class that is not in transformers comes with the model, from where the recipe names it.
    """
    section = recipe.model
    here = section.name is not None and Path(section.name).is_dir()
    native = section.name is None or (not here and section.type in CONFIG_MAPPING)
    own_tokens = not native and (not here or has_tokenizer(str(section.name)) or recipe.tokenizer.name is not None)
    if native:
        tokenizer = characters_tokenizer()
        config = small_config(_native_config(section, tokenizer), tokenizer)
    else:
        found = section.source().config()
        _check_type(section, found)
        tokenizer = _tokenizer(recipe, section.source()) if own_tokens else characters_tokenizer()
        config = small_config(found, None if own_tokens else tokenizer)
    few = _DRY_ROWS * processes
    rows = task.rows(_dry_source(task, recipe.task.source), split="train", limit=few, style=recipe.task.style)
    rows = [rows[n % len(rows)] for n in range(few)]
    evaluated = [] if recipe.eval is None else rows[:2]
    return _Parts(_random(section, config), tokenizer, rows, _repeated(recipe, evaluated)), own_tokens


def _dry_source(task: LanguageTask, source: str | None) -> str:
    """The recipe's rows where they are a file or a folder, else the few that come with dam."""
    if source is not None and Path(source).exists():
        return source
    return str(Path(__file__).parents[1] / "recipes" / "examples" / f"{task.name}.jsonl")


def report(result: Mapping[str, Any]) -> str:
    """A result as lines on the terminal."""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list):
            return ", ".join(map(shown, value))
        return str(value)

    wide = max(map(len, result))
    return "\n".join(f"{name:{wide}}  {shown(value)}" for name, value in result.items())
