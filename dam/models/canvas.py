"""What rollouts and losses under uniform noise need of a model: predictions of a whole canvas behind a prompt."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dam.ops._head import Head


class Conditioned(Protocol):
    """A model behind B prompts, which it need not go through again for each canvas."""

    def hidden_states(self, canvas: Tensor, time: Tensor) -> Tensor:
        """Input of the head [B, C, D] for canvases int64 [B, C] at times float64 [B], of the process that noised them.

        The hidden states at a position are those that predict the token of the data there.
        """


class CanvasDenoiser(Protocol):
    """A model that predicts p(X_1^i = v | canvas, prompt) of canvases that uniform noise is on.

    No token stands for what is not known yet: any token of a canvas may be noise, and any may still change.
    """

    canvas_length: int
    """C of the canvases that it was trained on."""

    def conditioned(self, prompt: Tensor, attention_mask: Tensor | None = None) -> Conditioned:
        """The model behind prompts int64 [B, P], rows of which attention_mask [B, P] may say to be padded on the left.

        As the model is now: made anew once its parameters have changed.
        """

    def head(self) -> Head:
        """The head that maps hidden states to logits."""
