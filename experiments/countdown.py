"""Figures of finished `dam countdown` runs; and when DAM does not learn: runs with one setting after another changed.

Each such case starts from the same base, and is told by greedy and sampled shares of right answers, pass@16, and what
`dam.diagnostics.findings` says of its log. Bases are kept in runs/, as making one takes longer than a case.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM
from transformers.trainer_callback import PrinterCallback

from dam import diagnostics
from dam.tasks import countdown_base, finetune
from dam.tasks.finetune_countdown import Countdown, Options
from dam.train import DAMTrainer

LOGS = 16  # of a case
SHOWN = ("greedy", "sampled", "pass@16")

# Arguments of DAMConfig and, as they are the task's, of prompts, generations, iterations, reward and null_arm.
UNCHANGED = "as dam countdown"
LONGER_STEPS = {"beta": 0.01, "max_tilt": 0.2, "target_ess": 4.0}
CASES: dict[str, dict[str, Any]] = {
    UNCHANGED: {},
    "learning_rate x 4": {"learning_rate": 2e-3},
    "learning_rate / 20": {"learning_rate": 2.5e-5},
    "8 groups a step, not 32": {"replay_batch_size": 8},
    "32 steps a rollout, not 8": {"iterations": 32},
    "beta 0.01, max_tilt 0.2, target_ess 4": LONGER_STEPS,
    "..., learning_rate x 4": {**LONGER_STEPS, "learning_rate": 2e-3},
    "..., full_tilt_from 0.5": {**LONGER_STEPS, "full_tilt_from": 0.5},
    "beta 0.1, max_tilt 1": {"beta": 0.1, "max_tilt": 1.0},
    "K = 4": {"generations": 4, "prompts": 256, "replay_batch_size": 128},
    "centering 1": {"centering": 1.0},
    "antithetic": {"num_replicates": 2, "antithetic": True},
    "closeness for a reward": {"reward": "closeness"},
    "constant reward": {"reward": "constant"},
    "null arm": {"null_arm": True},
}


def figures(runs: Sequence[Path], problems: str | None) -> list[dict[str, Any]]:
    """Of finished `dam countdown` runs, and how model and base do on other problems: a file's, or the held-out ones."""
    task = Countdown(Options(problems=problems))
    results = []
    for run in runs:
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        del result["examples"]
        result["null_arm"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]["null_arm"]
        others = {name: evaluated(task, loaded(folder)) for name, folder in (("base", run / "base"), ("tuned", run))}
        results.append({**result, "other_problems": {"problems": len(task.rows), **others}})
    return results


def evaluated(task: Countdown, model: Any) -> dict[str, float]:
    return {**task.metrics(task.fill_in(model)), **task.sampled_metrics(model)}


def loaded(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")


def base(seed: int) -> Any:
    """The base of all cases, made unless it is there."""
    task = Countdown(Options(seed=seed))
    return countdown_base.pretrained(Path("runs") / f"countdown-base-{seed}", seed, without=task.without)


def task_of(name: str, calls: int, seed: int) -> Countdown:
    """`dam countdown` with a case's settings."""
    changed = dict(CASES[name])
    sizes = {size: changed.pop(size) for size in ("prompts", "generations", "iterations") if size in changed}
    asked = {option: changed.pop(option) for option in ("reward", "null_arm") if option in changed}

    class Case(Countdown):
        def config(self) -> dict[str, Any]:
            logging = max(1, self.rollouts * self.iterations // LOGS)
            quiet = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": logging}
            return {**super().config(), **quiet, **changed}

    for size, value in sizes.items():
        setattr(Case, size, value)
    return Case(Options(reward_calls=calls, seed=seed, **asked))


def run(calls: int, name: str, seed: int) -> dict[str, Any]:
    """Figures of a case and of its base, and of its log."""
    task, model = task_of(name, calls, seed), base(seed)
    before = evaluated(task, model)
    with tempfile.TemporaryDirectory() as output:
        trainer = DAMTrainer(
            model,
            task.reward(),
            finetune.config(task, Path(output)),
            train_dataset=task.training_rows(),
            processing_class=task.processing_class(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    kept = ("step", "reward", "ess", "ess_path", "tilt", "kl_path", "split_half", "frac_reward_zero_std", "grad_norm")
    return {
        "settings": CASES[name],
        "base": before,
        **evaluated(task, model),
        "findings": [finding._asdict() for finding in diagnostics.findings(logged)],
        "log": [{figure: entry[figure] for figure in kept if figure in entry} for entry in logged],
    }
