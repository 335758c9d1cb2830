"""SGLang's own files from a wheel, in a process that lacks what SGLang needs: its dllm folder, all else stubs.

Real are the loop and the registry of algorithms, their config, what a request does at each block, and how a scheduler
takes a block that is done. Stubs are model runner, memory, metrics and the rest, whose imports need a GPU's libraries.
"""

import array
import importlib
import pathlib
import shutil
import sys
import types
import zipfile

import dam.engines
from tests.engines import sglang_interface as interface
from tests.engines.stubs import Stubs

_FOLDER = "sglang/srt/dllm/"
_GIVEN = {
    "sglang.srt.utils": {"is_npu": lambda: False},
    "sglang.srt.managers.schedule_batch": {
        "FINISH_ABORT": interface.FINISH_ABORT,
        "FINISH_MATCHED_TOKEN": interface.FINISH_MATCHED_TOKEN,
        "FINISH_LENGTH": interface.FINISH_LENGTH,
    },
}


def install(wheel, folder):
    """Unpacks the dllm folder, puts our algorithm's file into it as a user does, and has all of it imported from there.

    Returns:
        What the registry, which is SGLang's, has found: classes by name.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_FOLDER)])
    place = pathlib.Path(folder) / _FOLDER
    shutil.copy(pathlib.Path(dam.engines.__file__).parent / "sglang_dllm.py", place / "algorithm")
    sys.meta_path.append(Stubs(("sglang", "msgspec"), _GIVEN))
    for name in ("sglang", "sglang.srt"):
        importlib.import_module(name)
    dllm = sys.modules["sglang.srt.dllm"] = types.ModuleType("sglang.srt.dllm")
    dllm.__path__ = [str(place)]
    return importlib.import_module("sglang.srt.dllm.algorithm").algo_name_to_cls


def classes():
    """Request and Scheduler of the stand-in, of SGLang's mixins; after `install`."""
    from sglang.srt.dllm.mixin.req import DllmReqPhase, ReqDllmMixin
    from sglang.srt.dllm.mixin.scheduler import SchedulerDllmMixin

    class Request(ReqDllmMixin):
        def __init__(self, rid, input_ids, params, config):
            self.rid, self.origin_input_ids, self.output_ids = rid, array.array("q", input_ids), array.array("q")
            self.sampling_params = interface.SamplingParams(**params)
            self.customized_info = self.to_finish = self.finished_reason = None
            self.full_untruncated_fill_ids, self.prefix_len, self.dllm_initialized = array.array("q"), 0, False
            self.time_stats = types.SimpleNamespace(set_completion_time=lambda: None)
            self.init_diffusion_llm(config)
            self.begin()

        def begin(self):
            """A round: as init_next_round_input and the adder of a block do."""
            self._init_fill_ids_for_dllm()
            self._update_block_offset_for_dllm()
            self.determine_dllm_phase()
            self.extend_end = self.prefix_len + self.dllm_config.block_size

        @property
        def offset(self):
            return self.dllm_block_offset

        @property
        def seqlen(self):
            return len(self.origin_input_ids) + len(self.output_ids)

        @property
        def block(self):
            return self.full_untruncated_fill_ids[self.prefix_len : self.extend_end].tolist()

        @property
        def in_prompt(self):
            return self.dllm_phase in (DllmReqPhase.STAGING_PREFILL, DllmReqPhase.INCOMING_PREFILL)

        def finished(self):
            return self.finished_reason is not None

        def update_finish_state(self, new_accepted_len):
            if self.to_finish is not None:
                self.finished_reason, self.to_finish = self.to_finish, None
            elif len(self.output_ids) >= self.sampling_params.max_new_tokens:
                self.finished_reason = interface.FINISH_LENGTH(self.sampling_params.max_new_tokens)

    class Scheduler(SchedulerDllmMixin):
        def __init__(self, config):
            nothing = types.SimpleNamespace(
                free_group_begin=lambda: None,
                free_group_end=lambda: None,
                stream_output=lambda *_: None,
                report_prefill_stats=lambda **_: None,
                num_generated_tokens=0,
            )
            self.dllm_config, self.tree_cache = config, None
            self.token_to_kv_pool_allocator = self.metrics_reporter = self.output_streamer = nothing
            self.model_config = types.SimpleNamespace(context_len=10**6)

        def take(self, requests, result):
            """What a network call, or a block, has come to."""
            _, new, lengths, states, _ = result
            batch = types.SimpleNamespace(
                reqs=requests,
                batch_size=lambda: len(requests),
                return_logprob=False,
                prefill_stats=None,
                dp_cooperation_info=None,
            )
            given = types.SimpleNamespace(
                copy_done=None,
                next_token_ids=new,
                accept_length_per_req_cpu=lengths,
                dllm_algo_state=states,
                can_run_cuda_graph=False,
            )
            self.process_batch_result_dllm(batch, given)
            for request in requests:
                if not request.dllm_incomplete_ids:  # keys and values of the block are kept
                    request.prefix_len = request.extend_end
                if not request.finished():
                    request.begin()

    return Request, Scheduler
