"""What dam.engines uses of vLLM 0.33.0, recorded, and as modules for a process that does not have vLLM.

    python -m tests.engines.vllm_interface vllm-0.33.0-*.whl

says where a wheel differs. `SIGNATURES` and `LINES` are facts copied from it (Apache-2.0); the classes are written anew
from what those of the same names do. Where DAM_ENGINE_WHEELS names a folder with the wheel, tests run on its own too.
"""

import dataclasses
import importlib.util
import pathlib
import sys
import types
import zipfile
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.engines.stubs import Stubs

VERSION = "0.33.0"
ROOT = "vllm/"
_MODEL = "model_executor/models/diffusion_gemma.py"
SIGNATURES = {
    _MODEL: {
        "_concat_logprob_stashes": "parts: list[LogprobsTensors], cu_num_generated_tokens: list[int]",
        "DiffusionSampler.__init__": (
            "self, sampler: Any, diffusion_config: Any, vocab_size: int, diffusion_states: "
            "DiffusionGemmaRequestStates, *, confidence_threshold: float, t_min: float, t_max: float, entropy_bound: "
            "float, embed_weight: torch.Tensor, normalizer: torch.Tensor, sc_vocab_start: int=0, sc_vocab_end: int | "
            "None=None, tp_size: int=1, tp_group_name: str=''"
        ),
        "DiffusionSampler.add_request": "self, req_idx: int, sampling_params: Any",
        "DiffusionSampler._finish_prefills": "self, input_batch: Any, prefill_indices_np: np.ndarray",
        "DiffusionSampler._build_output": (
            "self, input_batch: Any, sampled: torch.Tensor, num_sampled: torch.Tensor, per_req_nlogits_np: np.ndarray, "
            "device: torch.device, logprobs_tensors: LogprobsTensors | None=None"
        ),
        "DiffusionSampler.__call__": (
            "self, logits: torch.Tensor, input_batch: Any, draft_logits: torch.Tensor | None=None"
        ),
        "DiffusionGemmaModelState.custom_sampler": "self, sampler: Any",
    },
    "entrypoints/llm.py": {
        "LLM.collective_rpc": (
            "self, method: str | Callable[..., _R], timeout: float | None=None, args: tuple=(), kwargs: dict[str, "
            "Any] | None=None"
        ),
        "LLM.reset_prefix_cache": "self, reset_running_requests: bool=False, reset_connector: bool=False",
    },
    "v1/worker/gpu/model_runner.py": {
        "GPUModelRunner.reload_weights": (
            "self, weights_iterator: Iterable[tuple[str, torch.Tensor]] | None=None, weights_path: str | None=None, "
            "is_checkpoint_format: bool=True"
        ),
    },
    "v1/worker/gpu_worker.py": {"Worker.reload_weights": "self, *args, **kwargs"},
}
LINES = {
    _MODEL: (
        "return (DiffusionSampler(sampler=sampler,",  # by the name that is replaced
        "self.canvas_length = diffusion_config.canvas_length if diffusion_config is not None else 32",
        "self._sampled = torch.zeros(max_num_reqs, self.canvas_length, dtype=torch.int32, device=device)",
        "self._num_sampled = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)",
        "if input_batch.num_draft_tokens == 0:",
        "slots_np = input_batch.idx_mapping_np[:num_reqs]",
        "per_req_nlogits_np = np.diff(input_batch.cu_num_logits_np[:num_reqs + 1])",
        "all_slots = input_batch.idx_mapping[:num_reqs]",
        "self.req_states.draft_tokens[ps_gpu, :self.canvas_length] = states.canvas[ps_gpu]",
        "emit = is_commit | is_denoise & converged & read_only[decode_slots]",
        "cu_gen.append(flat_offset)",
        "extra.get('diffusion_read_only')",
        "extra.get('diffusion_max_steps')",
        "extra.get('diffusion_canvas_length')",
        "extra.get('diffusion_seed_canvas')",
    ),
    "v1/worker/worker_base.py": (
        "worker_extension_cls = resolve_obj_by_qualname(parallel_config.worker_extension_cls)",
        "worker_class.__bases__ = worker_class.__bases__ + (worker_extension_cls,)",
    ),
    "v1/worker/gpu/model_runner.py": ("custom = self.model_state.custom_sampler(self.sampler)",),
    "logprobs.py": ("request_logprobs.append_fast(token_ids, logprobs, ranks, decoded_tokens)",),
    "sampling_params.py": (
        "flat_logprobs: bool = False",
        "extra_args: dict[str, Any] | None = None",
        "detokenize: bool = True",
    ),
    "v1/outputs.py": (
        "logprob_token_ids: torch.Tensor",
        "logprobs: torch.Tensor",
        "selected_token_ranks: torch.Tensor",
        "cu_num_generated_tokens: list[int] | None = None",
    ),
    "v1/worker/gpu/sample/output.py": ("class SamplerOutput:",),
}


class LogprobsTensors(NamedTuple):
    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor
    cu_num_generated_tokens: list[int] | None = None


@dataclasses.dataclass
class SamplerOutput:
    sampled_token_ids: torch.Tensor
    logprobs_tensors: LogprobsTensors | None
    num_nans: torch.Tensor | None
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor


class RequestStates:
    """Canvases and phases of slots."""

    def __init__(
        self, max_num_reqs, canvas_length, vocab_size, max_denoising_steps, device, hidden_size, stability_threshold
    ):
        self.max_num_reqs, self.canvas_length, self.vocab_size = max_num_reqs, canvas_length, vocab_size
        self.max_denoising_steps, self.device = max_denoising_steps, device
        self.canvas = torch.zeros(max_num_reqs, canvas_length, dtype=torch.int64)
        self.argmax_canvas, self.seed_canvas = self.canvas.clone(), self.canvas.clone()
        self.step = torch.zeros(max_num_reqs, dtype=torch.int32)
        self.canvas_width_np = np.full(max_num_reqs, canvas_length, dtype=np.int32)

    def add_request(self, slot):
        self.canvas[slot] = torch.randint(self.vocab_size, (self.canvas_length,))
        self.step[slot] = 0


class DiffusionSampler:
    """As far as it takes requests, begins canvases and puts out; its own draws are not here."""

    def __init__(self, sampler, diffusion_config, vocab_size, diffusion_states, **_):
        self.req_states, self.vocab_size, self.diffusion_states = sampler.req_states, vocab_size, diffusion_states
        self.canvas_length = diffusion_config.canvas_length
        self._sampled = torch.zeros(diffusion_states.max_num_reqs, self.canvas_length, dtype=torch.int32)
        self._num_sampled = torch.zeros(diffusion_states.max_num_reqs, dtype=torch.int32)

    def add_request(self, req_idx, sampling_params):
        extra, states = sampling_params.extra_args or {}, self.diffusion_states
        width = extra.get("diffusion_canvas_length") or self.canvas_length
        states.canvas_width_np[req_idx] = width
        seed = extra.get("diffusion_seed_canvas")
        if seed is not None:
            states.seed_canvas[req_idx, :width] = torch.tensor(seed)

    def _finish_prefills(self, input_batch, prefill_indices_np):
        slots = input_batch.idx_mapping_np[prefill_indices_np]
        self.diffusion_states.canvas[slots] = self.diffusion_states.seed_canvas[slots]
        self.req_states.draft_tokens[slots] = self.diffusion_states.canvas[slots]

    def _build_output(self, input_batch, sampled, num_sampled, per_req_nlogits_np, device, logprobs_tensors=None):
        return SamplerOutput(sampled, logprobs_tensors, None, num_sampled, torch.zeros_like(num_sampled))

    def __call__(self, logits, input_batch, draft_logits=None):
        if input_batch.num_draft_tokens == 0:
            self._finish_prefills(input_batch, np.arange(input_batch.num_reqs))
        count = input_batch.num_reqs
        nothing = self._num_sampled[:count].zero_()
        return SamplerOutput(self._sampled[:count, :1].zero_(), None, None, nothing, nothing)


def _concat_logprob_stashes(parts, cu_num_generated_tokens):
    width = max(part.logprobs.shape[1] for part in parts)
    padded = [
        [
            torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)
            for x, value in ((part.logprob_token_ids, 0), (part.logprobs, -torch.inf))
        ]
        for part in parts
    ]
    ids, values = (torch.cat(each) for each in zip(*padded, strict=True))
    return LogprobsTensors(ids, values, torch.cat([p.selected_token_ranks for p in parts]), cu_num_generated_tokens)


class SamplingParams(types.SimpleNamespace):
    def __init__(self, *, max_tokens, ignore_eos, detokenize, logprobs, flat_logprobs, extra_args):
        given = dict(locals())
        super().__init__(**{name: given[name] for name in given if name not in ("self", "__class__")})


class _Uva:
    """A buffer of the host that a GPU reads."""

    def __init__(self, size, dtype):
        self.gpu = torch.zeros(size, dtype=dtype)
        self.np = self.gpu.numpy()

    def copy_to_uva(self):
        pass


_GIVEN: dict[str, dict[str, Any]] = {
    "vllm": {"SamplingParams": SamplingParams},
    "vllm.v1.outputs": {"LogprobsTensors": LogprobsTensors},
    "vllm.v1.worker.gpu.sample.output": {"SamplerOutput": SamplerOutput},
    "vllm.v1.worker.gpu.buffer_utils": {"UvaBackedTensor": _Uva},
    "vllm.utils.torch_utils": {
        "async_tensor_h2d": lambda values, device=None, dtype=None: torch.as_tensor(values, dtype=dtype)
    },
    "vllm.v1.worker.gpu.sample.penalties": {"use_penalty": lambda _: False},
    "vllm.logger": {"init_logger": lambda _: types.SimpleNamespace(warning_once=print)},
    "vllm.multimodal": {
        "MULTIMODAL_REGISTRY": types.SimpleNamespace(register_processor=lambda *_, **__: lambda made: made)
    },
    # Its compiled functions as they are written.
    "vllm.platforms": {"current_platform": types.SimpleNamespace(simple_compile_backend="eager")},
}
_OWN = {
    "vllm.model_executor.models.diffusion_gemma": {
        "DiffusionSampler": DiffusionSampler,
        "DiffusionGemmaRequestStates": RequestStates,
        "_concat_logprob_stashes": _concat_logprob_stashes,
    }
}


def install(wheel=None, folder=None):
    """Has modules of vLLM imported as they are here, or the model's own file of a wheel, and all else of nothing.

    Returns:
        The finder that does so, to be taken off sys.meta_path.
    """
    finder = Stubs(("vllm",), _GIVEN if wheel is not None else {**_GIVEN, **_OWN})
    sys.meta_path.append(finder)
    name = "vllm.model_executor.models.diffusion_gemma"
    if wheel is None:
        importlib.import_module(name)  # so that the package has it
    else:
        place = pathlib.Path(folder) / "diffusion_gemma.py"
        with zipfile.ZipFile(wheel) as archive:
            place.write_bytes(archive.read(ROOT + _MODEL))
        models = importlib.import_module("vllm.model_executor.models")
        spec = importlib.util.spec_from_file_location(name, place)
        models.diffusion_gemma = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(models.diffusion_gemma)
    return finder


if __name__ == "__main__":
    from tests.engines.sglang_interface import differences

    told = differences(sys.argv[1], ROOT, SIGNATURES, LINES)
    print("\n".join(told) or f"as recorded of vLLM {VERSION}")
    sys.exit(bool(told))
