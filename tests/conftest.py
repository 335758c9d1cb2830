"""What several test files share: the choice of backend."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dam
from dam.ops import _backend


def device_of(name):
    """Type of the device whose tensors a backend takes, "cpu" for the reference."""
    return _backend.DEVICE_TYPE.get(name, "cpu")


@pytest.fixture(params=_backend.BACKENDS)
def backend(request):
    """Runs the test on each backend that can run here; a test module lists what its op has in IMPLEMENTATIONS."""
    name = request.param
    reason = _backend.why_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    implementations = getattr(request.module, "IMPLEMENTATIONS", (name,))
    if name not in implementations:
        pytest.skip(f"no {name} implementation of this op yet (it has: {', '.join(implementations)})")
    with torch.device(device_of(name)), dam.backend(name):
        yield name
