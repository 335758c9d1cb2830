"""Trajectories drawn in this process, by the model that is trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dam.engines.contract import Prompts
from dam.models.denoiser import Denoiser
from dam.rollout import Trajectories, rollout


class InProcess:
    """`dam.rollout.rollout` as a `RolloutEngine`, in pieces, whose draws are those of the whole.

    Args:
        denoiser: the model.
        batch_size: trajectories for each network call; None is all.
    """

    def __init__(self, denoiser: Denoiser, batch_size: int | None = None):
        self._denoiser, self._batch_size = denoiser, batch_size

    def update(self, parameters: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """The denoiser's weights are the model's own: there is nothing to take."""

    def rollout(self, prompts: Prompts, base: Denoiser | None = None) -> Trajectories:
        """As `RolloutEngine.rollout`; with `base` its log-probabilities too."""
        size = self._batch_size or len(prompts)
        pieces = (prompts[start : start + size] for start in range(0, len(prompts), size))
        return Trajectories.concatenate(
            [
                rollout(
                    self._denoiser,
                    piece.tokens,
                    piece.process,
                    base=base,
                    attention_mask=piece.attention_mask,
                    steps=piece.steps,
                    block_length=piece.block_length,
                    decoding=piece.decoding,
                    stop_tokens=piece.stop_tokens,
                    start=piece.start,
                    seed=piece.seed,
                    row_ids=piece.row_ids,
                )
                for piece in pieces
            ]
        )
