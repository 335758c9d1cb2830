"""Canvases drawn by vLLM's DiffusionGemma, whose sampler is that of `dam.engines.vllm_canvas`.

Not run against vLLM on a GPU: none was to be had. What was run is in `vllm_canvas`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dam.canvas import CanvasPaths, check_process, first_canvas, step_times
from dam.ctmc import UniformCTMC
from dam.engines.canvas_requests import CanvasRequest
from dam.engines.contract import EngineError, StaleWeights
from dam.engines.weights import write_weights
from dam.ops import _philox


class VLLMCanvasEngine:
    """`dam.canvas.rollout` by a vLLM that this process has made, as a `RolloutEngine` of canvases.

    `update` is that of `RolloutEngine`; `rollout` gives `CanvasPaths`, without the base's log-probabilities, for which
    `dam.canvas.path_log_prob` is. The draws are those of `dam.canvas.rollout` from equal logits.

    Args:
        llm: `vllm.LLM`, made with worker_extension_cls="dam.engines.vllm_canvas.WorkerExtension" and max_logprobs of at
            least the steps of a rollout.
        weights: a folder that its workers read too.
        dtype: that weights are sent in; each parameter's own unless given.
    """

    def __init__(self, llm: Any, weights: str | os.PathLike[str], *, dtype: torch.dtype | None = None):
        self._llm, self._weights, self._dtype = llm, os.path.abspath(weights), dtype
        self._version: int | None = None

    def update(self, parameters: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """As `RolloutEngine.update`; needs `safetensors` (extra `train`)."""
        self._version = None
        if parameters is not None:
            folder = write_weights(parameters, self._weights, version, self._dtype)
            self._llm.collective_rpc("dam_load", args=(folder, version))
            # Keys and values of prompts are of the weights before.
            if self._llm.reset_prefix_cache() is False:
                raise EngineError("vLLM did not drop what it keeps of prompts: are other requests running?")
        self._version = version

    def rollout(
        self,
        prompt: Tensor,  # [B, P]
        process: UniformCTMC,
        *,
        steps: int,
        canvas_length: int,
        attention_mask: Tensor | None = None,  # [B, P]
        temperature: float = 1.0,
        seed: int,
        row_ids: Tensor | None = None,  # [B]
    ) -> CanvasPaths:
        """Arguments are those of `dam.canvas.rollout`; canvas_length is that of the server's model or less.

        Raises:
            ValueError, TypeError: the process is none of a canvas, or an argument is out of range.
            StaleWeights, EngineError: the weights are others; an answer is none.
        """
        check_process(process)
        times = step_times(process, steps)
        if process.schedule != UniformCTMC(process.size).schedule:
            raise ValueError("a server draws by the schedule that UniformCTMC has unless given another")
        ids = _philox.row_ids_of(prompt.shape[:1], prompt.device, row_ids)
        first = first_canvas(process, canvas_length, seed=seed, row_ids=ids)
        shown = torch.ones_like(prompt, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [{"prompt_token_ids": row[mask].tolist()} for row, mask in zip(prompt, shown, strict=True)]
        asked = [
            CanvasRequest(seed, row_id, steps, float(temperature), process.size).as_parameters()
            | {
                "diffusion_seed_canvas": canvas,
                "diffusion_canvas_length": canvas_length,
                "diffusion_max_steps": steps,
                "diffusion_read_only": 1,
            }
            for row_id, canvas in zip(ids.tolist(), first.tolist(), strict=True)
        ]
        self._check_weights()
        answers = self._llm.generate(rows, [_sampling_params(extra, canvas_length, steps) for extra in asked])
        self._check_weights()
        if len(answers) != len(rows):
            raise EngineError(f"vLLM was asked for {len(rows)} canvases and gave {len(answers)}")
        paths = [_path(n, answer.outputs[0], canvas_length, steps) for n, answer in enumerate(answers)]
        canvas, log_prob = (torch.stack(parts).to(prompt.device) for parts in zip(*paths, strict=True))
        if not torch.equal(canvas[:, 0], first):
            raise EngineError("vLLM began with other canvases than it was given: its sampler is not dam's")
        return CanvasPaths(times.to(prompt.device), canvas, log_prob)

    def _check_weights(self) -> None:
        if self._version is None:
            raise EngineError("vLLM has been sent no weights, or did not take them: call update() first")
        found = set(self._llm.collective_rpc("dam_weights"))
        if found != {self._version}:
            raise StaleWeights(f"vLLM's workers have weights {found}, and {self._version} were sent last")


def _sampling_params(extra: dict[str, Any], length: int, steps: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        logprobs=steps,  # a column of an answer for each
        flat_logprobs=True,  # else equal tokens of a position would be one
        extra_args=extra,
    )


def _path(row: int, output: Any, length: int, steps: int) -> tuple[Tensor, Tensor]:
    """Canvases int64 [N + 1, C] and log P of each step float64 [N], of the columns that the sampler told.

    Raises:
        EngineError: they are others.
    """
    told, wanted = output.logprobs, [steps + 1] * length
    begins, ends = ([], []) if told is None else (told.start_indices, told.end_indices)
    if [end - begin for begin, end in zip(begins, ends, strict=True)] != wanted or len(output.token_ids) != length:
        raise EngineError(
            f"vLLM gave {len(output.token_ids)} tokens and {len(begins)} rows of log-probabilities for row {row}, not "
            f"{length} and as many with {steps + 1} columns: is worker_extension_cls that of dam.engines.vllm_canvas?"
        )
    tokens = torch.tensor(told.token_ids, device="cpu").view(length, steps + 1)
    log_probs = torch.tensor(told.logprobs, dtype=torch.float64, device="cpu").view(length, steps + 1)
    if tokens[:, 0].tolist() != list(output.token_ids) or not bool((log_probs <= 1e-3).all()):
        raise EngineError(f"vLLM's path of row {row} ends in other tokens than it gave, or lacks log-probabilities")
    return torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1).T, log_probs[:, 1:].sum(dim=0)
