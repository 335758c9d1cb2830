"""What whoever trains asks of an engine that draws trajectories, and what an answer of it must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.models.denoiser import Denoiser
from dam.rollout import Trajectories


class EngineError(RuntimeError):
    """An engine is gone, answers too late, or answers what it was not asked."""


class StaleWeights(EngineError):
    """An engine drew with other weights than those that were sent to it last."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What B trajectories are to be drawn from, and how; as the arguments of `dam.rollout.rollout`."""

    tokens: Tensor  # int64 [B, L]: X_0, masks where something is to be filled in
    process: MaskedCTMC
    seed: int
    row_ids: Tensor  # int64 [B]: names of the streams: what is drawn depends on (seed, row id, position, states) only
    attention_mask: Tensor | None = None  # [B, L]
    steps: int | None = None
    block_length: int | None = None
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    stop_tokens: tuple[int, ...] = ()
    start: Tensor | None = None  # int64 [B]: position from which on they end a row; its first mask unless given

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """Some of the prompts."""
        given: dict[str, Any] = {name: getattr(self, name) for name in ("tokens", "row_ids", "attention_mask", "start")}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in given.items()}
        return dataclasses.replace(self, **chosen)


class RolloutEngine(Protocol):
    """Draws trajectories of a model, whose weights it is sent."""

    def update(self, parameters: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Takes new weights. What is drawn from here on is drawn with them, or refused.

        Args:
            parameters: all of the model's, by the names that they have in its checkpoint (`served_parameters`); None
                where another process has sent them to the same engine.
            version: names them; no two sets of weights that an engine is sent have the same.

        Raises:
            EngineError: it did not take them.
        """

    def rollout(self, prompts: Prompts, base: Denoiser | None = None) -> Trajectories:
        """Fills in every mask of the prompts, by the law, the streams and the order of `dam.rollout.rollout`.

        So of equal logits the draws are those of any other engine, to the bit, and log-probabilities to rounding.

        Args:
            prompts: what from.
            base: whose log-probabilities of the same jumps are to be recorded too, where the engine has it at hand;
                else `base_log_prob` is None, and `dam.rollout.jump_log_prob` gives them.

        Returns:
            Trajectories: of each jump its position, token, network call, and the log-probability of the token under
            the law that it was drawn from.

        Raises:
            ValueError: the engine cannot draw what is asked for.
            StaleWeights, EngineError: as they say.
        """


def checked(trajectories: Trajectories, prompts: Prompts, engine: str) -> Trajectories:
    """Trajectories that a server has answered with, if they can be ones of these prompts.

    Raises:
        EngineError: a row lacks jumps, or has such as the prompt has no mask for; a token cannot be drawn; calls fall;
            or a log-probability is none. Names the first row.
    """
    masked = prompts.process.masked(prompts.tokens)
    made = trajectories.call >= 0
    count = made.sum(dim=1)
    ended = torch.zeros_like(count, dtype=torch.bool) if trajectories.ended is None else trajectories.ended
    where = torch.zeros_like(prompts.tokens).scatter_add(1, trajectories.position.clamp(min=0), made.long())
    never = torch.tensor([prompts.process.mask_token, *prompts.process.suppress], device=masked.device)
    tokens, known = trajectories.token, prompts.process.vocabulary
    wrong = {
        "jumps where no mask is, or twice at a position": ((where > 1) | (where.bool() & ~masked)).any(dim=1),
        "as many jumps as masks, or an end": (count != masked.sum(dim=1)) & ~ended,
        "network calls that rise": ((trajectories.call.diff(dim=1) < 0) & made[:, 1:]).any(dim=1),
        "a token that can be drawn": (
            made & ((tokens < 0) | torch.isin(tokens, never) | (tokens >= (2**31 if known is None else known)))
        ).any(dim=1),
        # Of rounding above 0.
        "log-probabilities": (made & ~(trajectories.log_prob <= 1e-3)).any(dim=1),
        "sequences without masks": prompts.process.masked(trajectories.final).any(dim=1),
    }
    for what, rows in wrong.items():
        if bool(rows.any()):
            row = int(rows.nonzero()[0])
            found = "it has" if what.startswith("jumps") else "it lacks"
            raise EngineError(f"{engine}: the trajectory of row {row} is none of its prompt: {found} {what}")
    return trajectories


# Nats between a server in bfloat16 and a trainer in float32 that are one model are hundredths, on average.
_FAR = 0.25


def check_same_model(trajectories: Trajectories, log_prob: Tensor) -> None:
    """That an engine drew from the law that is trained: its log-probabilities, beside those of the same jumps here.

    Raises:
        EngineError: they are far from each other.
    """
    made = trajectories.call >= 0
    apart = float((trajectories.log_prob - log_prob)[made].abs().mean())
    if not apart <= _FAR:
        raise EngineError(
            f"log-probabilities of the engine's draws are {apart:.3g} from the model's own, on average of "
            f"{int(made.sum())} tokens: it serves another model, or one with another attention or precision"
        )
