"""The hook of vLLM's DiffusionGemma runner: canvases drawn by the chain of `dam.canvas.rollout`.

Not run on a GPU, nor in a whole vLLM: none was to be had. What was run: this file on vLLM 0.33.0's own sampler and its
states, with a small DiffusionGemma of transformers giving the logits (tests/engines). What it uses of vLLM is recorded
in tests/engines/vllm_interface.py, which checks itself against a wheel.

    from vllm import LLM
    from dam.engines import VLLMCanvasEngine

    llm = LLM("google/diffusiongemma-26B-A4B-it", worker_extension_cls="dam.engines.vllm_canvas.WorkerExtension",
              max_logprobs=64)
    engine = VLLMCanvasEngine(llm, weights="/shared/weights")

Each worker imports this module before it makes its sampler, which is then `CanvasSampler`. A request of the engine says
in `extra_args` how it is drawn; its answer has, as log-probabilities of its tokens, the canvases on the way and log P
of each step. While such requests run, no others can.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models import diffusion_gemma
from vllm.v1.outputs import LogprobsTensors

from dam.canvas import step
from dam.ctmc import UniformCTMC
from dam.engines.canvas_requests import CanvasRequest


@dataclasses.dataclass
class _Row:
    """A request on its way."""

    request: CanvasRequest
    canvases: list[Tensor] = dataclasses.field(default_factory=list)  # int64 [C], X at the times before the last
    log_probs: list[Tensor] = dataclasses.field(default_factory=list)  # float64 [C], of each step


class CanvasSampler(diffusion_gemma.DiffusionSampler):  # type: ignore[misc]
    """vLLM's sampler of canvases, which draws requests of ours by `dam.canvas.step`; without self-conditioning."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rows: dict[int, _Row] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """As `DiffusionSampler.add_request`.

        Raises:
            ValueError: a request of ours asks for what this server's model does not have.
        """
        super().add_request(req_idx, sampling_params)
        self._rows.pop(req_idx, None)
        request = CanvasRequest.of_parameters(getattr(sampling_params, "extra_args", None) or {})
        if request is None:
            return
        states = self.diffusion_states
        if request.steps > states.max_denoising_steps:
            raise ValueError(
                f"{request.steps} steps are asked for, and the server makes at most {states.max_denoising_steps}: set "
                "max_denoising_steps in its diffusion_config"
            )
        if request.size != self.vocab_size:
            raise ValueError(f"the process has {request.size} values, and the server's model {self.vocab_size} tokens")
        self._rows[req_idx] = _Row(request)

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None) -> Any:
        """As `DiffusionSampler.__call__`: a step of every canvas of the batch.

        Raises:
            RuntimeError: requests of ours and others are in one batch.
        """
        count = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:count]
        widths = np.diff(input_batch.cu_num_logits_np[: count + 1])
        ours = [n for n in range(count) if widths[n] > 0 and int(slots[n]) in self._rows]
        if input_batch.num_draft_tokens == 0 or not ours:
            return super().__call__(logits, input_batch, draft_logits)
        if len(ours) < int((widths > 0).sum()):
            raise RuntimeError("requests of dam.engines and others are in one batch: give each a server")
        if len(ours) < count:
            self._finish_prefills(input_batch, np.flatnonzero(widths == 0))
        return self._stepped(logits, input_batch, ours, slots, widths)

    def _stepped(self, logits: Tensor, input_batch: Any, ours: list[int], slots: Any, widths: Any) -> Any:
        count, starts = input_batch.num_reqs, np.cumsum(widths) - widths
        sampled, num_sampled = self._sampled[:count].zero_(), self._num_sampled[:count].zero_()
        alike: dict[Any, list[int]] = {}
        for n in ours:
            row = self._rows[int(slots[n])]
            alike.setdefault((row.request.law, len(row.canvases), int(widths[n])), []).append(n)
        told: dict[int, LogprobsTensors] = {}
        for ((seed, steps, temperature), number, width), members in alike.items():
            if number >= steps:  # one that is done, and was scheduled once more
                continue
            rows = [self._rows[int(slots[n])] for n in members]
            where = torch.as_tensor([int(slots[n]) for n in members], device=logits.device)
            made = step(
                _rows_of(logits, [int(starts[n]) for n in members], width),
                before := self.diffusion_states.canvas[where, :width],
                UniformCTMC(self.vocab_size),
                number,
                steps=steps,
                temperature=temperature,
                seed=seed,
                row_ids=torch.as_tensor([row.request.row_id for row in rows], device=logits.device),
            )
            self._put(where, width, made.canvas)
            for k, (n, row) in enumerate(zip(members, rows, strict=True)):
                row.canvases.append(before[k])
                row.log_probs.append(made.log_prob[k])
                if number + 1 == steps:
                    sampled[n, :width], num_sampled[n] = made.canvas[k].to(sampled.dtype), width
                    told[n] = _path(row, made.canvas[k])
        everyone = input_batch.idx_mapping[:count]
        self.req_states.draft_tokens[everyone, : self.canvas_length] = self.diffusion_states.canvas[everyone]
        return self._build_output(
            input_batch, sampled, num_sampled, widths, logits.device, logprobs_tensors=_joined(told, count)
        )

    def _put(self, slots: Tensor, width: int, canvas: Tensor) -> None:
        states = self.diffusion_states
        states.canvas[slots, :width] = canvas
        states.argmax_canvas[slots, :width] = canvas
        states.step[slots] += 1


def _rows_of(logits: Tensor, starts: list[int], width: int) -> Tensor:
    """Logits [n, width, V] of requests, whose rows of [rows, V] begin at `starts`; a view where they are in a row."""
    if starts == list(range(starts[0], starts[0] + len(starts) * width, width)):
        return logits[starts[0] : starts[0] + len(starts) * width].unflatten(0, (len(starts), width))
    return torch.stack([logits[start : start + width] for start in starts])


def _path(row: _Row, final: Tensor) -> LogprobsTensors:
    """[C, N + 1] of the outcome and the canvases before it; log P of a position's whole path, and of its steps."""
    log_probs = torch.stack(row.log_probs, dim=1)
    return LogprobsTensors(
        logprob_token_ids=torch.stack((final, *row.canvases), dim=1).to(torch.int32),
        logprobs=torch.cat((log_probs.sum(dim=1, keepdim=True), log_probs), dim=1).float(),
        selected_token_ranks=torch.ones_like(final),
    )


def _joined(told: dict[int, LogprobsTensors], count: int) -> LogprobsTensors | None:
    """Of the requests that end in this step, by their place in the batch; narrower ones padded as vLLM's are."""
    if not told:
        return None
    ends, offset = [], 0
    for n in range(count):
        ends.append(offset)
        offset += len(told[n].logprobs) if n in told else 0
    return diffusion_gemma._concat_logprob_stashes([told[n] for n in sorted(told)], ends)


class WorkerExtension:
    """What `VLLMCanvasEngine` calls in each worker."""

    _dam_version: int | None = None

    def dam_load(self, folder: str, version: int) -> None:
        """Takes the weights of a folder."""
        self._dam_version = None
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        self._dam_version = version

    def dam_weights(self) -> int | None:
        """The version of the weights that it has."""
        return self._dam_version


diffusion_gemma.DiffusionSampler = CanvasSampler  # the name by which a model's state makes its sampler
