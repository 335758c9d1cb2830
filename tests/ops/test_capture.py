"""Calls that a CUDA graph can hold: nothing is read from the device, and nothing copied to it or from it.

Tensors of the meta device stand for a GPU's, so that what crosses over is seen without one; kernels are not run.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dam
from dam.backends import choice, cuda, deferral
from dam.kernels import configs
from dam.kernels.launch import recording
from dam.ops import _op

GPU = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Names of operations that read a GPU's numbers, or copy between it and the host and wait for that."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split("::")[1]
        devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select") or "unique" in name
        copies = name in ("_to_copy", "copy_") and len(devices) > 1 and not kwargs.get("non_blocking")
        if GPU.type in devices and (reads or copies):
            self.found.append(name)
        # What is read is a large number: a seed, or no row that is bad.
        return 2**40 if name == "_local_scalar_dense" else function(*args, **kwargs)


class Kernels:
    """In the place of the extension: takes every launch."""

    def __init__(self):
        self.launched = []

    def __getattr__(self, name):
        if name.isupper():
            return getattr(cuda_emulated, name)
        if name == "summary_floats":
            return cuda_emulated.summary_floats
        return lambda **arguments: self.launched.append(name)


cuda_emulated = cuda.kernels


@pytest.fixture(params=["triton", "cuda"])
def gpu(request, monkeypatch):
    """A GPU's tensors for one of its backends, and the list of what crosses over."""
    if cuda_emulated is None:
        pytest.skip("needs the emulator of CUDA")
    kernels = Kernels()
    monkeypatch.setattr(cuda, "kernels", kernels)
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(cuda, "where", lambda x: (0, 0))
    monkeypatch.setattr(choice, "DEVICE_TYPE", dict.fromkeys(choice.DEVICE_TYPE, GPU.type))
    monkeypatch.setattr(choice, "_requested", request.param)
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "256")
    monkeypatch.setattr(deferral, "GPU", GPU.type)
    monkeypatch.setattr(_op.Op, "__call__", lambda op, *arguments: op.function(*arguments))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with (
        Crossings() as crossings,
        configs.as_if_on("NVIDIA H100"),
        recording(lambda launch: kernels.launched.append(launch.kernel)),
    ):
        yield crossings.found
        assert kernels.launched


@contextlib.contextmanager
def capturing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def logits(dtype=torch.bfloat16):
    return torch.empty(64, 5000, dtype=dtype, device=GPU)


def test_what_crosses_over_is_seen():
    with Crossings() as crossings:
        x = logits()
        x + 1
        torch.zeros(5000)[0].item()  # the host's own
        assert crossings.found == []
        with pytest.raises(NotImplementedError):
            x.cpu()  # of this device
        x[0].copy_(torch.zeros(5000))
        x[0, 0].item()
    assert crossings.found == ["_to_copy", "copy_", "_local_scalar_dense"]


@pytest.mark.parametrize("seed", [None, 5, "on the device"])
def test_an_unchecked_jump_leaves_the_device_alone(gpu, seed, monkeypatch):
    x = logits()
    seed = torch.zeros((), dtype=torch.int64, device=GPU) if seed == "on the device" else seed
    suppress = torch.zeros(5000, dtype=torch.bool, device=GPU)
    with capturing(monkeypatch):
        for options in ({}, {"exclude": 3}, {"suppress": suppress}, {"num_samples": 3}, {"temperature": 0.0}):
            dam.jump(x, seed=seed, check=False, **options)
            dam.linear_jump(x[:, :8], torch.empty(5000, 8, dtype=x.dtype, device=GPU), seed=seed, check=False)
    assert gpu == []


def test_under_capture_a_check_reads_nothing(gpu, monkeypatch):
    def checked():
        dam.jump(logits(), seed=1)
        dam.adjoint_weights(torch.empty(4, 8, 16, device=GPU), torch.empty(4, 8, device=GPU))
        dam.tilt_to_ess(torch.empty(4, 8, device=GPU), 2.0, max_tilt=1.0)

    with capturing(monkeypatch):
        checked()
    assert gpu == []
    checked()
    assert gpu == 3 * ["_local_scalar_dense"]


def test_the_other_operations_leave_the_device_alone(gpu, monkeypatch):
    x, base, head = logits(), logits(), torch.empty(5000, 8, dtype=torch.bfloat16, device=GPU)
    target, weight = torch.zeros(64, 1, dtype=torch.int64, device=GPU), torch.ones(64, 1, device=GPU)
    with capturing(monkeypatch):
        dam.log_prob(x, target)
        dam.entropy(x)
        dam.rate_ratio(x, base, target)
        dam.matching_loss(x, target, weight, base_logits=base, base_weight=weight[:, 0])
        dam.linear_log_prob(x[:, :8], head, target)
        dam.linear_matching_loss(x[:, :8], head, target, weight)
    assert gpu == []


def test_a_seed_of_a_captured_call_is_drawn_where_the_graph_runs(gpu, monkeypatch):
    """On the host it would be drawn once, and every replay be the same."""
    drawn, randint = [], torch.randint

    def noted(*arguments, device, **options):
        drawn.append(torch.device(device).type)
        return randint(*arguments, device=device, **options)

    monkeypatch.setattr(torch, "randint", noted)
    dam.jump(logits(), check=False)
    with capturing(monkeypatch):
        dam.jump(logits(), check=False)
    assert drawn == ["cpu", GPU.type]


def test_ids_of_the_host_are_sent_without_waiting_and_not_in_a_graph(gpu, monkeypatch):
    pinned = []  # from other memory a copy is one that is waited for
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    dam.jump(logits(), suppress=[3, 7], check=False)
    assert gpu == [] and len(pinned) == 1
    named = "jump: suppress is ids of the host.*a tensor on the GPU"
    with capturing(monkeypatch), pytest.raises(ValueError, match=named):
        dam.jump(logits(), suppress=[3, 7], check=False)
