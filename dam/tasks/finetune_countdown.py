"""A text model that learns Countdown from rewards: `dam countdown`.

The base writes careless sums (`dam.tasks.countdown_base`). What it is rewarded for is whether its text is right
(`dam.tasks.countdown`), by the path of any language model: a tokenizer, prompts as text, padding on the left, an
end-of-text token, tokens that are never drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.models.families import as_denoiser
from dam.rollout import Trajectories, rollout
from dam.tasks import countdown, countdown_base
from dam.tasks import finetune as front
from dam.tasks.live import Unmasking
from dam.train.rewards import RewardFunction

PROBLEMS = 256  # of the held-out set
SAMPLES = 16  # of each, for pass@16
SHOWN = 3  # problems whose unmasking is shown


def constant(completions: Sequence[str], **_: Any) -> list[float]:
    """The same for all: what a bug in a reward comes to."""
    return [1.0] * len(completions)


REWARDS: dict[str, RewardFunction] = {
    "correct": countdown.TASK.correct,
    "closeness": countdown.TASK.closeness,
    "constant": constant,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What one run is asked to do; a run is resumed with the same options only."""

    problems: str | None = None
    reward_calls: int = 64 * front.Task.calls_per_rollout()
    pretraining_steps: int = countdown_base.STEPS
    estimator: str = "posterior"
    normalizer: str = "group"
    reward: str = "correct"
    seed: int = 0
    null_arm: bool = False


class Countdown(front.Task):
    """Countdown with three numbers: held-out problems, or those of a file, by a model of 290,000 parameters."""

    name, title, headline, options_type = "countdown", "Countdown", "greedy", Options
    of_what, evaluations = "problems", 8
    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        countdown_base.check_torch()
        if options.pretraining_steps < 1:
            raise ValueError(f"pretraining_steps must be at least 1; got {options.pretraining_steps}")
        if options.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}; got {options.reward!r}")
        if options.problems is None:
            held_out = countdown.draw_problems(PROBLEMS, 0, held_out=True)
            given = [(problem.numbers, problem.target) for problem in held_out]
        else:
            given = [(row["numbers"], row["target"]) for row in countdown.TASK.rows(options.problems)]
        self.without = countdown_base.excluded(given)
        self.rows = [_row(numbers, target) for numbers, target in given]
        self.tokenizer = countdown_base.tokenizer()
        self.unmasking = Unmasking(
            lambda model: self._rolled_out(model, self.rows[:SHOWN], temperature=0.0), self.tokenizer
        )
        self.process = MaskedCTMC(mask_token=self.tokenizer.mask_token_id, suppress=tuple(self._suppressed()))

    def _suppressed(self) -> list[int]:
        return [self.tokenizer.pad_token_id, self.tokenizer.unk_token_id]

    def model(self, output: Path) -> Any:
        return countdown_base.pretrained(
            output / "base",
            self.options.seed,
            without=self.without,
            steps=self.options.pretraining_steps,
            show=lambda model, step: self.unmasking.show(model, f"pretraining, step {step}"),
        )

    def processing_class(self) -> Any:
        return self.tokenizer

    def training_rows(self) -> list[dict[str, Any]]:
        count, seed = self.rollouts * self.prompts, self.options.seed
        # Easier ones among them: a first rollout then already solves some of every kind.
        pairs = round(count * countdown_base.PAIRS)
        drawn = [
            *countdown.draw_problems(pairs, seed, size=2, exclude=self.without),
            *countdown.draw_problems(count - pairs, seed, exclude=self.without),
        ]
        return [_row(problem.numbers, problem.target) for problem in drawn]

    def evaluation_rows(self) -> list[dict[str, Any]]:
        return self.rows

    def reward(self) -> RewardFunction:
        return REWARDS[self.options.reward]

    def config(self) -> dict[str, Any]:
        return {
            "max_completion_length": countdown_base.COMPLETION,
            "suppress_tokens": self._suppressed(),
            # A right answer counts max_tilt / beta = 10 nats, the log-weight of a path a hundredth of itself: where no
            # trajectory of a group is right, these weights are all that is left, and pull back to the base.
            "beta": 0.001,
            "max_tilt": 0.01,
            "target_ess": None,
            "full_tilt_from": None,
            "per_device_eval_batch_size": 1024,
            "replay_size": 2 * self.prompts,
            "replay_batch_size": 32,
            "eval_temperature": 0.0,
            "eval_remasking": "confidence",
            "learning_rate": 5e-4,
        }

    def callbacks(self) -> list[Any]:
        return [self.unmasking]

    def fill_in(self, model: Any) -> Tensor:
        return self._rolled_out(model, self.rows, temperature=0.0).final

    def metrics(self, final: Tensor) -> dict[str, float]:
        judged = countdown.TASK.judge(self._texts(final), self.rows)
        return {"greedy": sum(judged.correct) / len(self.rows), "greedy_closeness": judged.figures["closeness"]}

    def sampled_metrics(self, model: Any) -> dict[str, float]:
        """By the sampler that training has, `SAMPLES` of each problem."""
        rows = [row for row in self.rows for _ in range(SAMPLES)]
        texts = self._texts(self._rolled_out(model, rows, temperature=1.0).final)
        grouped = [texts[start : start + SAMPLES] for start in range(0, len(texts), SAMPLES)]
        found = countdown.TASK.metrics(grouped, self.rows)
        return {"sampled": found["exact"], f"pass@{SAMPLES}": found[f"pass@{SAMPLES}"], "answer": found["answer"]}

    def facts(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        texts = [self._texts(before), self._texts(after)]
        examples = zip((row["prompt"] for row in self.rows), *texts, strict=True)
        return {"problems": len(self.rows), "examples": [list(each) for each in examples][:5]}

    def _rolled_out(self, model: Any, rows: Sequence[dict[str, Any]], temperature: float) -> Trajectories:
        encoded = self.tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
        blank = torch.full((len(rows), countdown_base.COMPLETION), self.process.mask_token)
        model.eval()
        return rollout(
            as_denoiser(model),
            torch.cat((encoded["input_ids"], blank), dim=1),
            self.process,
            attention_mask=torch.cat((encoded["attention_mask"], torch.ones_like(blank)), dim=1),
            temperature=temperature,
            order="random" if temperature else "confidence",
            stop_tokens=[self.tokenizer.eos_token_id],
            seed=0,
        )

    def _texts(self, final: Tensor) -> list[str]:
        return list(self.tokenizer.batch_decode(final[:, -countdown_base.COMPLETION :], skip_special_tokens=True))

    @staticmethod
    def report(result: dict[str, Any]) -> str:
        lines = [f"{'':12}{'base':>12}{'fine-tuned':>12}"]
        for name in ("greedy", "sampled", f"pass@{SAMPLES}"):
            lines.append(f"{name:12}{result['base_' + name]:>12.1%}{result[name]:>12.1%}")
        lines.append(
            f"{result['problems']} problems, {result['reward_calls']:,} reward calls, {result['seconds']:.0f} s, "
            f"estimator {result['estimator']} / {result['normalizer']}, seed {result['seed']}"
        )
        lines += ["", f"{'problem':22}{'base':22}{'fine-tuned':22}"]
        lines += [f"{problem:22}{before:22}{after:22}".rstrip() for problem, before, after in result["examples"]]
        return "\n".join(lines)


def _row(numbers: Sequence[int], target: int) -> dict[str, Any]:
    prompt = countdown_base.prompt(numbers, target)
    return {"prompt": prompt, "numbers": list(numbers), "target": target}
