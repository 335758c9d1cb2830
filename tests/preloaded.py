"""What a server of forks loads: libraries that take seconds of a core to import, and nothing that runs.

Where one is not installed, what asks for it says so itself.
"""

import atexit
import contextlib
import gc
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed looks for when it is imported

import torch
import torch.distributed.run
import torch.distributed.tensor.parallel

from dam.backends import triton
from tests import interpreted

torch.set_num_threads(1)

# accelerate imports DeepSpeed where it is installed; transformers imports a model's module when first asked for it.
for name in (
    "accelerate.commands.launch",
    "deepspeed",
    "peft",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert",
    "transformers.models.modernbert.modeling_modernbert",
    "transformers.trainer",
    "dam.train",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

if triton.INTERPRETED:
    interpreted.hurry()
gc.freeze()  # each fork would copy the pages of what its collections of garbage look through
atexit.register(gc.unfreeze)  # or extensions say that their objects are left when the server ends
