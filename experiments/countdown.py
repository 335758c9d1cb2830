"""When DAM does not learn: fine-tuning one base on Countdown with one setting after another changed for the worse.

Each case changes settings of `SETTINGS` and is told by greedy and sampled shares of right answers, pass@16, and what
`dam.diagnostics.findings` says of its log.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM
from transformers.trainer_callback import PrinterCallback

from dam import diagnostics
from dam.tasks import countdown_base, finetune
from dam.tasks.finetune_countdown import Countdown, Options
from dam.train import DAMTrainer

LOGS = 16  # of a case

# Of prompts, trajectories and iterations, and of the reward, as well as of DAMConfig.
SETTINGS = "as in dam countdown"
PUBLISHED = {"beta": 0.01, "max_tilt": 0.2, "target_ess": 4.0}
CASES: dict[str, dict[str, Any]] = {
    SETTINGS: {},
    "learning_rate x 4": {"learning_rate": 2e-3},
    "learning_rate / 20": {"learning_rate": 2.5e-5},
    "8 groups a step, not 32": {"replay_batch_size": 8},
    "32 steps a rollout, not 8": {"iterations": 32},
    "beta 0.01, max_tilt 0.2": PUBLISHED,
    "beta 0.01, max_tilt 1": {**PUBLISHED, "max_tilt": 1.0},
    "beta 0.1, max_tilt 1": {"beta": 0.1, "max_tilt": 1.0},
    "K = 4": {"generations": 4, "prompts": 256, "replay_batch_size": 256},
    "nothing drawn by the base": {"base_generations": 0},
    "centering 1": {"centering": 1.0},
    "antithetic": {"num_replicates": 2, "antithetic": True},
    "closeness for a reward": {"reward": "closeness"},
    "constant reward": {"reward": "constant"},
    "null arm": {"null_arm": True},
    "full_tilt_from 0.5, as by default": {**PUBLISHED, "full_tilt_from": 0.5},
}


def base(folder: Path, seed: int) -> Path:
    """The base of all cases, made there unless it is there."""
    countdown_base.pretrained(folder, seed, without=Countdown(Options(seed=seed)).without)
    return folder


def task_of(case: str, calls: int, seed: int) -> Countdown:
    """`dam countdown` with a case's settings."""
    changed = dict(CASES[case])
    sizes = {name: changed.pop(name) for name in ("prompts", "generations", "iterations") if name in changed}
    options = Options(
        reward_calls=calls,
        seed=seed,
        reward=changed.pop("reward", Options.reward),
        null_arm=changed.pop("null_arm", False),
    )

    class Case(Countdown):
        def config(self) -> dict[str, Any]:
            logging = max(1, self.rollouts * self.iterations // LOGS)
            quiet = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": logging}
            return {**super().config(), **quiet, **changed}

    for name, value in sizes.items():
        setattr(Case, name, value)
    return Case(options)


def run(case: str, folder: Path, calls: int, seed: int) -> dict[str, Any]:
    """Figures of a case before and after, and of its log."""
    task = task_of(case, calls, seed)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    before = {**task.metrics(task.fill_in(model)), **task.sampled_metrics(model)}
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
    after = {**task.metrics(task.fill_in(model)), **task.sampled_metrics(model)}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = ("step", "reward", "ess", "ess_path", "tilt", "kl_path", "split_half", "frac_reward_zero_std", "grad_norm")
    return {
        "case": case,
        "settings": {name: value for name, value in CASES[case].items()},
        "base": before,
        **after,
        "findings": [finding._asdict() for finding in diagnostics.findings(logged)],
        "log": [{name: entry[name] for name in kept if name in entry} for entry in logged],
    }
