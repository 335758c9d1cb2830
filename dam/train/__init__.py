"""Training: DAMTrainer and DAMConfig, FlowTrainer and FlowConfig (extra `train`)."""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"dam.train needs {error.name}: pip install 'discrete-adjoint-matching[train]'") from error

from dam.train.config import DAMConfig
from dam.train.flow_config import FlowConfig
from dam.train.flow_trainer import FlowTrainer
from dam.train.progress import last_checkpoint
from dam.train.replay import ReplayBuffer
from dam.train.rewards import RewardError
from dam.train.trainer import DAMTrainer

__all__ = ["DAMConfig", "DAMTrainer", "FlowConfig", "FlowTrainer", "ReplayBuffer", "RewardError", "last_checkpoint"]
