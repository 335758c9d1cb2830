"""Which backend runs, and what asking for one that cannot run says."""

import functools
import importlib
import re
import types

import pytest
import torch

import dam
from dam.backends import choice, cpu, cuda, triton
from tests import calls, fresh

UNAVAILABLE = [name for name in choice.BACKENDS if choice.why_unavailable(name) is not None]


def chosen(dtype=torch.float32):
    return choice.choose("op", dict.fromkeys(choice.BACKENDS), torch.zeros(1, dtype=dtype))


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch):
    monkeypatch.setattr(choice, "_requested", None)


def test_the_cpp_backend_is_built():
    """setup.py always builds it: tests that would be skipped without it must not hide that it is missing."""
    assert choice.why_unavailable("cpu") is None


def test_default_picks_by_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(dtype) == "cpu"
    assert chosen(torch.float64) == "torch"
    assert choice.choose("op", {"torch": None}, torch.zeros(1)) == "torch"


def test_default_picks_by_device(monkeypatch):
    """CUDA on a GPU, where it was built, else Triton; the emulator and the interpreter never unasked."""
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    assert choice.choose("op", dict.fromkeys(choice.BACKENDS), on_gpu) == "cuda"
    monkeypatch.setattr(triton, "why_unavailable", lambda: None)
    assert choice.choose("op", dict.fromkeys(choice.BACKENDS), on_gpu, first="triton") == "triton"
    assert choice.choose("op", dict.fromkeys(("torch", "cuda")), on_gpu, first="triton") == "cuda"
    assert chosen() == "cpu"
    on_gpu.dtype = torch.float64
    assert choice.choose("op", dict.fromkeys(choice.BACKENDS), on_gpu) == "torch"
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "not built")
    monkeypatch.setattr(triton, "why_unavailable", lambda: None)
    on_gpu.dtype = torch.float32
    assert choice.choose("op", dict.fromkeys(choice.BACKENDS), on_gpu) == "triton"
    monkeypatch.setattr(triton, "why_unavailable", lambda: "no such package")
    with pytest.warns(RuntimeWarning, match="not built; no such package;.*'torch' runs instead of 'cuda' or 'triton'"):
        assert choice.choose("op", dict.fromkeys(choice.BACKENDS), on_gpu) == "torch"


@pytest.mark.parametrize(
    ("missing", "variable", "message"),
    [
        ("sys.modules['triton'] = None", "1", "Triton is not installed: pip install"),
        ("import torch; torch.cuda.is_available = lambda: False", "0", "torch sees no GPU, and TRITON_INTERPRET=1"),
    ],
)
def test_what_triton_lacks_is_named(missing, variable, message):
    code = f"import sys; {missing}; import dam; dam.backend('triton').__enter__()"
    done = fresh.run(code, TRITON_INTERPRET=variable)
    assert done.returncode != 0
    assert re.search(f"backend 'triton' is not available: {message}", done.stderr.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("missing", "variable", "message"),
    [
        ("sys.modules['dam._cuda'] = None", "0", r"dam._cuda does not import \(.*installed where nvcc is found"),
        ("sys.modules['dam._cuda_emulated'] = None", "1", r"dam._cuda_emulated does not.*with DAM_EMULATE_CUDA=1"),
        (
            "sys.modules['dam._cuda'] = sys; import torch; torch.cuda.is_available = lambda: False",
            "0",
            "torch sees no GPU",
        ),
        (
            "sys.modules['dam._cuda'] = sys; import torch; torch.version.hip = '6.4'",
            "0",
            "this torch is built for ROCm",
        ),
    ],
)
def test_what_cuda_lacks_is_named(missing, variable, message):
    done = fresh.run(f"import sys; {missing}; import dam; dam.backend('cuda').__enter__()", DAM_EMULATE_CUDA=variable)
    assert done.returncode != 0
    assert re.search(f"backend 'cuda' is not available: {message}", done.stderr.splitlines()[-1]), done.stderr


def test_default_falls_back_with_a_warning(monkeypatch):
    """Without the extension the reference runs, and says so."""
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "no such file")
    with pytest.warns(RuntimeWarning, match=r"dam._cpu does not import: no such file.*'torch' runs"):
        assert chosen() == "torch"
    with pytest.raises(RuntimeError, match=r"'cpu' is not available.*no such file"), dam.backend("cpu"):
        pass


def test_context_nests_and_survives_exceptions():
    with dam.backend("torch"):
        assert chosen() == "torch"
        with dam.backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "torch"
        with pytest.raises(KeyError), dam.backend("cpu"):
            raise KeyError
        assert chosen() == "torch"
        for name in UNAVAILABLE:
            with pytest.raises(RuntimeError), dam.backend(name):
                pass
        assert chosen() == "torch"
    assert chosen() == "cpu"


def test_context_serves_as_decorator():
    calls = []
    dam.backend("torch")(lambda: calls.append(chosen()))()
    assert calls == ["torch"] and choice._requested is None


def test_unknown_and_unavailable_backends(monkeypatch):
    unknown = "backend must be one of torch, cpu, triton, cuda; got 'gpu'"
    with pytest.raises(ValueError, match=unknown), dam.backend("gpu"):
        pass
    # As DAM_BACKEND=gpu sets it.
    monkeypatch.setattr(choice, "_requested", "gpu")
    with pytest.raises(ValueError, match=unknown):
        dam.jump(torch.zeros(2, 3))
    for name in UNAVAILABLE:
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: ."), dam.backend(name):
            pass


@calls.each()
def test_cpu_refuses_what_it_cannot_run(call):
    inputs = call.inputs(2, 60, dtype=torch.float64)
    with dam.backend("torch"):
        expected = call(*inputs)
    with dam.backend("cpu"):
        if call.float64:
            # Exponentials of float64, and what a bisection leaves of them.
            calls.assert_close(call(*inputs), expected, call.terms(*inputs), rtol=1e-9)
            return
        with pytest.raises(RuntimeError, match=f"^{call.name}: backend 'cpu' cannot run this call: .*float64"):
            call(*inputs)


def test_cpu_refuses_tensors_of_another_device():
    message = "it runs on CPU tensors; got a tensor on meta"
    with dam.backend("cpu"), pytest.raises(RuntimeError, match=message):
        dam.jump(torch.zeros(2, 3, device="meta"))


def implementations(call):
    return importlib.import_module(f"dam.ops.{call.name}")._IMPLEMENTATIONS


@calls.each()
def test_ops_without_an_implementation_refuse(monkeypatch, call):
    """As every op does on a backend that has some of them only."""
    monkeypatch.delitem(implementations(call), "cpu")
    inputs = call.inputs(2, 60)
    call(*inputs)
    message = rf"{call.name} has no cpu implementation yet \(it has: torch, triton, cuda\)"
    with dam.backend("cpu"), pytest.raises(RuntimeError, match=message):
        call(*inputs)


@calls.each()
def test_every_op_runs_on_what_was_asked_for(backend, monkeypatch, call):
    """The implementation that is called is the requested one, and so are those it calls of other ops."""
    ran = []

    def recorded(implementation, *arguments):
        ran.append(implementation)
        return implementation(*arguments)

    def refused(name, other, *arguments):
        pytest.fail(f"{name} ran on {other}")

    for every in calls.CALLS:
        for name in implementations(every).keys() - {backend}:
            monkeypatch.setitem(implementations(every), name, functools.partial(refused, every.name, name))
    own = implementations(call)[backend]
    monkeypatch.setitem(implementations(call), backend, functools.partial(recorded, own))
    call(*call.inputs(2, 60))
    assert own in ran


def test_environment_variable():
    code = "import torch, dam; from dam.backends import choice; print(choice._requested); dam.jump(torch.zeros(2, 3))"
    done = fresh.run(code, DAM_BACKEND="torch")
    assert done.returncode == 0 and done.stdout.strip() == "torch", done.stderr
    for name in UNAVAILABLE[:1]:
        done = fresh.run(code, DAM_BACKEND=name)
        assert done.returncode != 0 and f"backend '{name}' cannot run" in done.stderr.splitlines()[-1]


def test_compiled_code_follows_the_choice():
    """A change of backend recompiles rather than reuses."""
    ran = []
    compiled = torch.compile(
        lambda x: dam.jump(x, seed=1).target, fullgraph=True, backend=lambda graph, _: record(graph)
    )

    def record(graph):
        ran.append([node.args[-1] for node in graph.graph.nodes if "dam" in str(node.target)])
        return graph

    x = torch.zeros(2, 3)
    for name in ("torch", "cpu", "torch"):
        with dam.backend(name):
            compiled(x)
    assert ran == [["torch"], ["cpu"]]
