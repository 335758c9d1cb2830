"""What several test files share: the choice of backend."""

import pytest
import torch

import dam
from dam.ops import _backend


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
    device = "cuda" if name in ("triton", "cuda") else "cpu"
    with torch.device(device), dam.backend(name):
        yield name
