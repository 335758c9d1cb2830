"""What dam.engines uses of SGLang 0.5.23, recorded, and as modules for a process that does not have SGLang.

    python -m tests.engines.sglang_interface sglang-0.5.23-*.whl

says where a wheel differs. `SIGNATURES` and `LINES` are facts copied from it (Apache-2.0); the classes are written anew
from what those of the same names do. Where DAM_ENGINE_WHEELS names a folder with the wheel, tests run on its own too.
"""

import ast
import sys
import types
import zipfile

import torch

VERSION = "0.5.23"
ROOT = "sglang/srt/"
# Functions that are overridden, called, or that call what is overridden.
SIGNATURES = {
    "dllm/algorithm/base.py": {
        "DllmAlgorithm.__init__": "self, config: DllmConfig",
        "DllmAlgorithm.init_step_state": "self, forward_batch: ForwardBatch",
        "DllmAlgorithm.validate_request": "cls, req: Req",
        "DllmAlgorithm.prepare_inputs": (
            "self, model_runner: ModelRunner, forward_batch: ForwardBatch, states: List[Any]"
        ),
        "DllmAlgorithm.max_steps": "self, block_size: int",
        "DllmAlgorithm.step": "self, forward_batch: ForwardBatch, full_logits: torch.Tensor, states: List[Any]",
        "DllmAlgorithm.run": (
            "self, model_runner: ModelRunner, forward_batch: ForwardBatch, algo_states: Optional[List[Any]]=None"
        ),
        "DllmAlgorithm._run_sync": "self, model_runner: ModelRunner, forward_batch: ForwardBatch",
        "DllmAlgorithm._run_fdfo": (
            "self, model_runner: ModelRunner, forward_batch: ForwardBatch, algo_states: Optional[List[Any]]"
        ),
    },
    "dllm/algorithm/__init__.py": {"import_algorithms": "", "get_algorithm_cls": "name: str"},
    "dllm/config.py": {"DllmConfig.validate_request": "self, req"},
    "dllm/mixin/scheduler.py": {
        "SchedulerDllmMixin.validate_dllm_request": "self: Scheduler, req: Req",
        "SchedulerDllmMixin.process_batch_result_dllm": (
            "self: Scheduler, batch: ScheduleBatch, result: GenerationBatchResult"
        ),
    },
    "managers/schedule_batch.py": {
        "FINISH_ABORT.__init__": "self, message=None, status_code=None, err_type=None",
        "FINISH_MATCHED_TOKEN.__init__": "self, matched: Union[int, List[int]]",
    },
}
# What is read or relied upon beside them.
LINES = {
    # How a file is found, and by what name.
    "dllm/algorithm/__init__.py": (
        "for _, name, ispkg in pkgutil.iter_modules(package.__path__, package_name + '.'):",
        "algo = module.Algorithm",
        "mapping[algo.__name__] = algo",
    ),
    "dllm/config.py": ("self.block_size = block_size", "self.mask_id = mask_id"),
    # An algorithm is asked before a request is taken; what it makes of a block goes into the request.
    "managers/scheduler.py": ("if (error_msg := self.validate_dllm_request(req)):",),
    "dllm/mixin/scheduler.py": (
        "req.output_ids.extend(next_token_ids)",
        "req.update_finish_state(new_accepted_len=len(next_token_ids))",
        "req.dllm_incomplete_ids = array('q', next_token_ids)",
    ),
    "dllm/mixin/req.py": ("self.dllm_config = dllm_config",),
    "managers/schedule_batch.py": (
        "self.customized_info: Optional[Dict[str, List[Any]]] = None",
        "self.to_finish: Optional[BaseFinishReason] = None",
        "self.finished_reason = self.to_finish",
        "if self.sampling_params.ignore_eos:",
        "self.sampling_params = sampling_params",
    ),
    "model_executor/forward_batch_info.py": (
        "rids: Optional[List[str]] = None",
        "positions: torch.Tensor = None",
        "for block_offset in (req.dllm_block_offset for req in batch.reqs)",
        "rids=[req.rid for req in batch.reqs]",
    ),
    "sampling/sampling_params.py": (
        "custom_params: Optional[Dict[str, CustomParamValue]] = None",
        "ignore_eos: bool = False",
        "top_p: float = 1.0",
        "top_k: int = TOP_K_ALL",
        "TOP_K_ALL = 1 << 30",
        "min_p: float = 0.0",
        "frequency_penalty: float = 0.0",
        "presence_penalty: float = 0.0",
        "repetition_penalty: float = 1.0",
        "min_new_tokens: int = 0",
        "logit_bias: Optional[Dict[str, float]] = None",
        "json_schema: Optional[str] = None",
        "regex: Optional[str] = None",
        "ebnf: Optional[str] = None",
        "structural_tag: Optional[str] = None",
    ),
    # An entry of customized_info for each output token, to the answer's meta_info.
    "managers/scheduler_components/output_streamer.py": (
        "for key, req_values in req.customized_info.items():",
        "values = req_values[send_token_offset:len(output_ids_)]",
    ),
    "managers/tokenizer_manager.py": ("meta_info[key] = accumulated",),
    "utils/weight_versions.py": (
        "meta_info['weight_versions'] = [{'version': span.version, 'start': span.start, 'end': min(span.end, "
        "num_output_tokens)} for span in visible]",
        "meta_info['weight_version'] = visible[-1].version",
    ),
    "managers/io_struct.py": (
        "model_path: str",
        "weight_version: Optional[str] = None",
        "flush_cache: bool = True",
        "sampling_params: Optional[Union[List[Dict[str, Any]], Dict[str, Any]]] = None",
    ),
    "entrypoints/http_server.py": (
        "@app.post('/update_weights_from_disk')",
        "@app.api_route('/generate', methods=['POST', 'PUT'], response_class=SGLangORJSONResponse)",
        "@app.get('/server_info')",
    ),
}


def differences(wheel, root=ROOT, recorded=SIGNATURES, lines=LINES):
    """Where a wheel is not what is recorded, as text."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for path in {**recorded, **lines}:
            tree = ast.parse(archive.read(root + path))
            signatures, text = _signatures(tree), ast.unparse(tree)
            for name, expected in recorded.get(path, {}).items():
                if signatures.get(name) != expected:
                    found.append(f"{path}: {name}({signatures.get(name)}), recorded as ({expected})")
            found += [f"{path}: no {line!r}" for line in lines.get(path, ()) if line not in text]
    return found


def _signatures(tree):
    named = [("", node) for node in tree.body]
    named += [(f"{node.name}.", inner) for node in tree.body if isinstance(node, ast.ClassDef) for inner in node.body]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {prefix + node.name: ast.unparse(node.args) for prefix, node in named if isinstance(node, kinds)}


class DllmConfig:
    def __init__(self, algorithm, algorithm_config, block_size, mask_id, max_running_requests, fdfo=False):
        self.algorithm, self.algorithm_config = algorithm, algorithm_config
        self.block_size, self.mask_id, self.max_running_requests = block_size, mask_id, max_running_requests
        self.first_done_first_out_mode = fdfo


class DllmAlgorithm:
    """Its two loops: a block until it is done (sync), or a network call of blocks wherever they are (fdfo)."""

    def __init__(self, config):
        self.block_size, self.mask_id, self.fdfo = config.block_size, config.mask_id, config.first_done_first_out_mode

    def init_step_state(self, forward_batch):
        return [None] * forward_batch.batch_size

    @classmethod
    def validate_request(cls, req):
        return None

    def prepare_inputs(self, model_runner, forward_batch, states):
        pass

    def max_steps(self, block_size):
        return block_size + 1

    def step(self, forward_batch, full_logits, states):
        raise NotImplementedError

    def run(self, model_runner, forward_batch, algo_states=None):
        shape = forward_batch.batch_size, self.block_size
        if not self.fdfo:
            given = (forward_batch.input_ids.view(shape) != self.mask_id).sum(dim=1).tolist()
            states = self.init_step_state(forward_batch)
            out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            if all(count == self.block_size for count in given):
                return out.logits_output, [], None, None, out.can_run_graph
            for _ in range(self.max_steps(self.block_size)):
                if all(self.step(forward_batch, out.logits_output.full_logits, states)):
                    break
                out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
            rows = forward_batch.input_ids.view(shape)
            new = [row[count:] for row, count in zip(rows, given, strict=True)]
            return out.logits_output, new, None, None, out.can_run_graph
        carried = [None] * len(forward_batch.rids) if algo_states is None else algo_states
        fresh = self.init_step_state(forward_batch) if None in carried else carried
        states = [new if old is None else old for old, new in zip(carried, fresh, strict=True)]
        out = model_runner.forward(forward_batch, pp_proxy_tensors=None)
        done = self.step(forward_batch, out.logits_output.full_logits, states)
        lengths = [self.block_size if is_done else 0 for is_done in done]
        left = [None if is_done else state for is_done, state in zip(done, states, strict=True)]
        return out.logits_output, forward_batch.input_ids.view(shape).tolist(), lengths, left, out.can_run_graph


class FINISH_MATCHED_TOKEN:
    def __init__(self, matched):
        self.matched = matched

    def to_json(self):
        return {"type": "stop", "matched": self.matched}


class FINISH_LENGTH:
    def __init__(self, length):
        self.length = length

    def to_json(self):
        return {"type": "length", "length": self.length}


class FINISH_ABORT:
    def __init__(self, message=None, status_code=None, err_type=None):
        self.message, self.status_code, self.err_type = message or "Aborted", status_code, err_type

    def to_json(self):
        return {"type": "abort", "message": self.message, "status_code": self.status_code, "err_type": self.err_type}


def install(**more):
    """Puts modules of these names into sys.modules: those that dam.engines.sglang_dllm imports, and more."""
    parts = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.dllm": {},
        "sglang.srt.dllm.algorithm": {},
        "sglang.srt.dllm.algorithm.base": {"DllmAlgorithm": DllmAlgorithm},
        "sglang.srt.managers": {},
        "sglang.srt.managers.schedule_batch": {
            "FINISH_ABORT": FINISH_ABORT,
            "FINISH_MATCHED_TOKEN": FINISH_MATCHED_TOKEN,
        },
        **more,
    }
    for name, contents in parts.items():
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
    return parts


class SamplingParams(types.SimpleNamespace):
    """With SGLang's defaults, as a request that has been read has them."""

    def __init__(self, **given):
        values = {
            "max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": 1 << 30, "min_p": 0.0,
            "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0,
            "logit_bias": None, "json_schema": None, "regex": None, "ebnf": None, "structural_tag": None,
            "ignore_eos": False, "custom_params": None,
        }  # fmt: skip
        unknown = given.keys() - values.keys()
        if unknown:
            raise ValueError(f"no sampling parameters: {', '.join(unknown)}")
        super().__init__(**{**values, **given})


class ForwardBatch(types.SimpleNamespace):
    """Of the requests of one network call, a block each."""

    def __init__(self, rids, blocks, positions):
        super().__init__(
            batch_size=len(rids),
            rids=rids,
            input_ids=torch.tensor(blocks).flatten(),
            positions=torch.tensor(positions, dtype=torch.int32).flatten(),
            dllm_prompt_mask=None,
        )


if __name__ == "__main__":
    told = differences(sys.argv[1])
    print("\n".join(told) or f"as recorded of SGLang {VERSION}")
    sys.exit(bool(told))
