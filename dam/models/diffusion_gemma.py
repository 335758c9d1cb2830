"""DiffusionGemma: canvases under uniform noise, behind a prompt that a causal encoder reads once.

Source: modeling_diffusion_gemma.py and generation_diffusion_gemma.py of transformers, for
google/diffusiongemma-26B-A4B-it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dam.models.denoiser import _PADDED, MaskedLM, check_left_padding
from dam.models.padding import evaluating, is_rounding
from dam.models.sharding import tied_to


class DiffusionGemma(MaskedLM):
    """DiffusionGemma as a `dam.models.canvas.CanvasDenoiser`.

    Its encoder goes over the prompt from left to right and leaves keys and values; its decoder, of the same weights,
    sees these and the whole canvas. The time is no input: p(X_1^i | canvas, prompt) is the model's at every time. The
    prediction is that without self-conditioning, as of the first denoising step of its own generation; with it a
    prediction would depend on the steps before, and the canvases be no Markov chain.

    Logits are compared with the model's own, and its soft cap found, as `MaskedLM` says. Prompts may be padded on the
    left: a trial before the first ones tells whether that changes nothing.

    Args:
        model: DiffusionGemmaForBlockDiffusion, or what wraps it.
        adapter: as for `MaskedLM`.

    Raises:
        TypeError, ValueError: as for `MaskedLM`.
    """

    _predicted = "decoder_input_ids"

    def __init__(self, model: nn.Module, *, adapter: bool = True):
        super().__init__(model, adapter=adapter)
        config = self._inner.config
        self.canvas_length: int = config.canvas_length
        self._image_token = getattr(config, "image_token_id", None)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> NoReturn:
        """No masks are filled in by this model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self._inner).__name__} knows no mask token: it undoes uniform noise on a canvas behind a prompt. "
            "Use dam.canvas (rollout, posterior_loss, path_loss) with a UniformCTMC, not what fills in masks"
        )

    def conditioned(self, prompt: Tensor, attention_mask: Tensor | None = None) -> _Conditioned:
        """As `CanvasDenoiser` says. Without gradients the prompt is encoded once, with the first canvas.

        Raises:
            ValueError, TypeError: prompts are no int64 [B, P] with P >= 1, hold images, or are padded behind; or as for
                `MaskedLM`, at its first call.
        """
        self._check(prompt, attention_mask)
        with self._as_asked():
            row, mask = prompt[:1], None if attention_mask is None else attention_mask[:1]
            self._tail(self._output_layer(), row, mask)
            if attention_mask is not None:
                self._try_padding(prompt, attention_mask)
                check_left_padding(self, attention_mask)
        return _Conditioned(self, prompt, attention_mask)

    def _check(self, prompt: Tensor, attention_mask: Tensor | None) -> None:
        name = type(self._inner).__name__
        if prompt.dim() != 2 or prompt.dtype != torch.int64 or prompt.shape[1] < 1:
            raise ValueError(
                f"{name}: prompts must be int64 [B, P], P at least 1; got {prompt.dtype} {list(prompt.shape)}"
            )
        if self._image_token is not None and bool((prompt == self._image_token).any()):
            raise ValueError(
                f"{name}: a prompt holds the image token {self._image_token}, but images are not handed on: only text"
            )
        if attention_mask is None:
            return
        if attention_mask.shape != prompt.shape:
            raise ValueError(
                f"{name}: attention_mask must have shape {list(prompt.shape)} like the prompts; got "
                f"{list(attention_mask.shape)}"
            )
        if bool((attention_mask[:, -1] == 0).any()):
            raise ValueError(f"{name}: prompts are padded behind, where the canvas follows; pad them on the left")

    def _arguments(self, tokens: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        # Of the comparison with the model's own logits, for which any canvas will do.
        return self._behind(tokens, attention_mask, tokens)

    @staticmethod
    def _behind(prompt: Tensor, attention_mask: Tensor | None, canvas: Tensor, cache: Any = None) -> dict[str, Any]:
        """What the model is called with for a canvas behind a prompt, which a cache has already unless it is None."""
        arguments: dict[str, Any] = {"decoder_input_ids": canvas}
        if attention_mask is not None:
            arguments["decoder_attention_mask"] = torch.cat(
                (attention_mask.bool(), torch.ones_like(canvas, dtype=torch.bool)), dim=1
            )
        if cache is not None:
            return {**arguments, "past_key_values": cache}
        return {**arguments, "input_ids": prompt, "attention_mask": attention_mask}

    def _try_padding(self, tokens: Tensor, attention_mask: Tensor) -> None:
        known = _PADDED.setdefault(self._inner, {})
        if (self._way, None) in known:
            return
        model = getattr(self._inner, "_orig_mod", self._inner)
        row = tokens[:1, -4:]
        pad = row.new_full((1, 3), int(tokens[0, 0]))
        mask = torch.cat((torch.zeros_like(pad), torch.ones_like(row)), dim=1)
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            alone, _ = self._last_states(model, self._behind(row, None, row))
            padded, _ = self._last_states(model, self._behind(torch.cat((pad, row), dim=1), mask, row))
        known[self._way, None] = is_rounding(padded, alone)

    def _canvas_states(
        self, prompt: Tensor, attention_mask: Tensor | None, canvas: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Hidden states [B, C, D], and the keys and values of the prompts."""
        with self._as_asked():
            tail = self._tail(self._output_layer(), prompt[:1], None if attention_mask is None else attention_mask[:1])
            arguments = self._behind(prompt, attention_mask, canvas, cache)
            hidden, output = self._last_states(self.model, arguments)
        return tail.hidden_states(tied_to(hidden, output, self.model)), output.past_key_values


class _Conditioned:
    """`dam.models.canvas.Conditioned` of DiffusionGemma."""

    def __init__(self, denoiser: DiffusionGemma, prompt: Tensor, attention_mask: Tensor | None):
        self._denoiser, self._prompt, self._mask = denoiser, prompt, attention_mask
        self._cache: Any = None

    def hidden_states(self, canvas: Tensor, time: Tensor | None = None) -> Tensor:
        """As `Conditioned` says; the time changes nothing."""
        if canvas.dim() != 2 or len(canvas) != len(self._prompt):
            raise ValueError(
                f"canvases must be int64 [{len(self._prompt)}, C], one for each prompt; got {list(canvas.shape)}"
            )
        kept = torch.is_grad_enabled()
        hidden, cache = self._denoiser._canvas_states(self._prompt, self._mask, canvas, None if kept else self._cache)
        # With gradients the encoder is part of the graph, which one backward pass uses up.
        self._cache = None if kept else cache
        return hidden
