"""What a model writes, shown as it is unmasked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dam.rollout import Trajectories
from dam.train.terminal import show

_HIDDEN = "▒"  # of a position that is not filled in yet
_FRAME_SECONDS = 0.12


def frames(trajectories: Trajectories, tokenizer: Any) -> Iterator[list[str]]:
    """Texts of each trajectory, one behind another network call, from nothing filled in to all.

    Args:
        trajectories: B of them.
        tokenizer: names tokens; what it takes for special is left out.
    """
    special = {*tokenizer.all_special_ids} - {tokenizer.mask_token_id}
    calls = trajectories.network_calls
    for call in range(calls + 1):
        # Behind the last one also what follows the end of a text, which no call filled in.
        tokens = trajectories.states_before(call) if call < calls else trajectories.final
        yield [
            " ".join(
                _HIDDEN if token == tokenizer.mask_token_id else tokenizer.decode([token])
                for token in row
                if token not in special
            )
            for row in tokens.tolist()
        ]


class Unmasking(TrainerCallback):
    """At each evaluation, how some prompts are filled in: on a terminal frame by frame, elsewhere what came out.

    Args:
        roll_out: trajectories of the model.
        tokenizer: of `frames`.
    """

    def __init__(self, roll_out: Callable[[Any], Trajectories], tokenizer: Any):
        self._roll_out, self._tokenizer = roll_out, tokenizer

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.show(model, f"step {state.global_step}")

    def show(self, model: Any, title: str) -> None:
        """The prompts filled in by a model, under a line that says which."""
        pictures = list(frames(self._roll_out(model), self._tokenizer))
        with tqdm.external_write_mode(file=sys.stdout):
            show(title)
            if not sys.stdout.isatty():
                show("\n".join(pictures[-1]))
                return
            width = max(len(line) for picture in pictures for line in picture)
            for number, picture in enumerate(pictures):
                if number:
                    sys.stdout.write(f"\x1b[{len(picture)}A")
                show("\n".join(line.ljust(width) for line in picture))
                sys.stdout.flush()
                time.sleep(_FRAME_SECONDS)
