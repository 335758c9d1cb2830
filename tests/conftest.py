"""What several test files share: the choice of backend, and a thread for what is to be the same to the bit."""

import collections
import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, and the CUDA kernels in the emulator of csrc/emulator.
# Both look when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DAM_EMULATE_CUDA", "1")

# One cache of generated kernels for all tests and their processes; a name there stands for all that a file is made of.
os.environ.setdefault("DAM_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "generated"))

import dam
from dam.backends import choice, triton
from tests import covering, interpreted

if triton.INTERPRETED:
    interpreted.hurry()


def device_of(name):
    """Type of the device whose tensors a backend takes, "cpu" for the reference."""
    return choice.DEVICE_TYPE.get(name, "cpu")


def pytest_generate_tests(metafunc):
    """Runs a test that takes `backend` on each of them; a module whose ops have forms lists these in FORMS."""
    if "backend" in metafunc.fixturenames:
        params = []
        for name in choice.BACKENDS:
            forms = getattr(metafunc.module, "FORMS", ()) if name == "triton" else ()
            params += [pytest.param((name, form), id=f"{name}-{form}") for form in forms] or [
                pytest.param((name, None), id=name)
            ]
        metafunc.parametrize("backend", params, indirect=True)


# Files of twenty seconds of a core and more. They begin first: at the end a process has short files to fill up with.
LONGEST = {
    f"test_{name}.py"
    for name in (
        *("backward_kolmogorov", "linear_matching_loss", "compile", "tiling", "gpu_bench", "bench", "estimators"),
        *("cli", "finetune_countdown", "recipes", "docs", "families", "draws", "forked", "resume", "trainer"),
    )
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Simulated kernels, which take up to a second a case, run what shows something new; the rest is `full`.

    What holds of an op whatever its backend, `of_the_op`, is shown on the reference and the C++ backend: how torch
    calls it, and the law of draws that are the same everywhere (test_backends_agree).

    Of float16 Triton's interpreter repeats what it shows of bfloat16: both widen when read and round when written. What
    depends on the type itself is for test_accuracy.py.

    Of the cases of a test it runs some in which each value of each parameter occurs, and each pair of values where
    there are three parameters or more; the other backends run all. So do tests of launches, in tests/kernels and
    tests/cuda: those of what kernels compute are in tests/ops.

    The longest files come first.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    cases = collections.defaultdict(list)
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        params, module = item.callspec.params, item.module.__name__
        if item.get_closest_marker("of_the_op") and params["backend"][0] in ("triton", "cuda"):
            item.add_marker(pytest.mark.full)
        of_triton = isinstance(params.get("backend"), tuple) and params["backend"][0] == "triton"
        if of_triton and any(value is torch.float16 for value in params.values()):
            if module != "tests.ops.test_accuracy":
                item.add_marker(pytest.mark.full)
        of_launches = module.startswith(("tests.kernels.", "tests.cuda."))
        if (of_triton or of_launches) and item.get_closest_marker("full") is None:
            cases[module, item.originalname, params.get("backend")].append(item)
    for same in cases.values():
        names = sorted(same[0].callspec.params.keys() - {"backend"})
        # In a product a value is the same object in all of its cases.
        columns = [[id(item.callspec.params[name]) for item in same] for name in names]
        kept = covering.covering([[column.index(column[n]) for column in columns] for n in range(len(same))])
        for place in set(range(len(same))) - kept:
            same[place].add_marker(pytest.mark.full)


def pytest_collection_finish():
    """What is there when tests begin stays: a training run ends with a collection of garbage by accelerate, which would
    look through all modules and tests again, for as long as the run itself."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or extensions say that their objects are left when the process ends


@pytest.fixture
def backend(request, monkeypatch):
    """Runs the test on a backend, if it can run here; a test module lists what its op has in IMPLEMENTATIONS."""
    name, form = request.param
    reason = choice.why_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    implementations = getattr(request.module, "IMPLEMENTATIONS", (name,))
    if name not in implementations:
        pytest.skip(f"no {name} implementation of this op yet (it has: {', '.join(implementations)})")
    if form is not None:
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
    with torch.device(device_of(name)), dam.backend(name):
        yield name


@pytest.fixture
def one_thread():
    """Sums in another order would be other sums in a process with other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def setup():
    """The module setup.py, which does nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("dam_setup", Path(__file__).parent.parent / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
