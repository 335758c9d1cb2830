"""Where trajectories are drawn: in this process, or by a server that people run already (docs/engines.md).

`sglang_dllm` and `vllm_canvas` run inside of these servers, and are imported there only.
"""

from dam.engines.contract import EngineError, Prompts, RolloutEngine, StaleWeights
from dam.engines.in_process import InProcess
from dam.engines.sglang_client import SGLangEngine
from dam.engines.vllm_client import VLLMCanvasEngine
from dam.engines.weights import served_parameters

__all__ = [
    "EngineError",
    "InProcess",
    "Prompts",
    "RolloutEngine",
    "SGLangEngine",
    "StaleWeights",
    "VLLMCanvasEngine",
    "served_parameters",
]
