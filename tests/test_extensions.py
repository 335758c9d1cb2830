"""How the extensions are called: an op takes exactly the named arguments that its entry in ops.def lists."""

import re
from pathlib import Path

import pytest
import torch

from dam.backends import address, choice, cpu, cuda

CSRC = Path(__file__).parent.parent / "csrc"


def rate_ratio(backend):
    """The arguments of a small call."""
    x, target = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    if backend is cpu:
        return {"logits": x, "exclude": -1, "suppressed": None, "base": x, "target": target}, ()
    results, summaries = (torch.empty(2, 1), torch.empty(2)), cuda.summaries(x, 2 * cuda.kernels.ROW_SUMMARIES, 2)
    arguments = {
        "shape": cuda.shape(x),
        "logits": address.matrix(x),
        "base": address.matrix(x),
        "exclude": address.indices(None),
        "suppressed": address.of(None),
        "target": address.targets(target),
        "summaries": summaries.data_ptr(),
        "log_ratio": results[0].data_ptr(),
        "escape_gap": results[1].data_ptr(),
        "where": cuda.where(x),
    }
    return arguments, (x, target, summaries, *results)


def entropy_backward(backend):
    """Those of a call that both take as addresses."""
    x, numbers, gradient = torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64), torch.empty(2, 3)
    arguments = {
        "shape": backend.shape(x),
        "logits": address.matrix(x),
        "exclude": address.indices(None),
        "suppressed": address.of(None),
        **dict.fromkeys(("entropy", "log_escape", "total", "slope"), numbers.data_ptr()),
    }
    if backend is cpu:
        return arguments | {"temperature": 1.0, "gradient": gradient.data_ptr()}, (x, numbers, gradient)
    others = {"scale": 1.0, "gradient": address.matrix(gradient), "where": cuda.where(x)}
    return arguments | others, (x, numbers, gradient)


@pytest.fixture(params=["cpu", "cuda"])
def extension(request):
    if (reason := choice.why_unavailable(request.param)) is not None:
        pytest.skip(reason)
    with torch.device(choice.DEVICE_TYPE[request.param]):
        yield {"cpu": cpu, "cuda": cuda}[request.param]


def test_every_entry_is_a_function(extension):
    table = CSRC / ("cpu" if extension is cpu else "cuda") / "ops.def"
    names = re.findall(r"^OP\((\w+),", table.read_text(), re.MULTILINE)
    assert {"jump", "rate_ratio", "adjoint_weights"} <= set(names)
    assert all(callable(getattr(extension.kernels, name)) for name in names)


def test_a_missing_or_unknown_argument_is_named(extension):
    arguments, _held = rate_ratio(extension)
    extension.kernels.rate_ratio(**arguments)
    for name in arguments:
        rest = {key: value for key, value in arguments.items() if key != name}
        with pytest.raises(TypeError, match=rf"^rate_ratio\(\) is missing the argument {name}$"):
            extension.kernels.rate_ratio(**rest)
    with pytest.raises(TypeError, match=r"^rate_ratio\(\) has no argument temperature$"):
        extension.kernels.rate_ratio(**arguments, temperature=1.0)
    with pytest.raises(TypeError):
        extension.kernels.rate_ratio(*arguments.values())


def test_taps_that_do_not_fit_their_radius_are_refused():
    """They go with the launch, and a kernel would read what is not there."""
    if (reason := choice.why_unavailable("cuda")) is not None:
        pytest.skip(reason)
    with torch.device(choice.DEVICE_TYPE["cuda"]):
        x, result, bad = torch.zeros(2, 12), torch.empty(2, 12), torch.zeros(2, dtype=torch.int32)
    walk = {
        "rows": 2,
        "columns": 12,
        "length": 4,
        "inner": 3,
        "periodic": False,
        "taps": 0,
        "source": address.matrix(x),
        "source_dtype": address.DTYPE_CODE[x.dtype],
        "result": result.data_ptr(),
        "result_is_double": False,
        "not_finite": bad.data_ptr(),
        "where": cuda.where(x),
    }
    cuda.kernels.walk(**walk, few_taps=[0.5, 0.25], radius=1)
    for taps, radius in (([0.5], 1), ([0.5, 0.25], 0), ([], 0)):
        with pytest.raises(ValueError, match=r"a walk needs radius \+ 1 taps"):
            cuda.kernels.walk(**walk, few_taps=taps, radius=radius)
    with pytest.raises(ValueError, match="too many taps for a launch"):
        cuda.kernels.walk(**walk, few_taps=[0.0] * (cuda.kernels.FEW_TAPS + 1), radius=cuda.kernels.FEW_TAPS)


def test_an_argument_of_another_kind_is_refused(extension):
    arguments, _held = entropy_backward(extension)
    extension.kernels.entropy_backward(**arguments)
    with pytest.raises(TypeError, match="must be a tuple of 2 integers"):
        extension.kernels.entropy_backward(**{**arguments, "logits": arguments["slope"]})
    with pytest.raises(TypeError):
        extension.kernels.entropy_backward(**{**arguments, "slope": 0.5})


@pytest.mark.parametrize(
    "wrong",
    [
        {"logits": torch.zeros(2, 3, dtype=torch.float64)},
        {"logits": torch.zeros(3, 2).t()},
        {"logits": torch.zeros(2, 0)},
        {"logits": 7},
        {"base": torch.zeros(2, 4)},
        {"base": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"base": None},
        {"exclude": 3},
        {"exclude": -2},
        {"exclude": True},
        {"exclude": torch.tensor([0, 3])},
        {"exclude": torch.zeros(3, dtype=torch.int64)},
        {"exclude": torch.zeros(2, dtype=torch.int32)},
        {"suppressed": [3]},
        {"suppressed": [False]},
        {"suppressed": torch.zeros(2, dtype=torch.bool)},
        {"target": torch.zeros(2, 1)},
        {"target": torch.zeros(3, 1, dtype=torch.int64)},
        {"target": torch.full((2, 1), 3)},
        {"target": torch.full((2, 1), -2)},
        {"target": torch.zeros(2, 2, dtype=torch.int64).t()},
    ],
    ids=str,
)
def test_a_kernel_that_looks_does_nothing_with_what_does_not_fit(wrong):
    if (reason := choice.why_unavailable("cpu")) is not None:
        pytest.skip(reason)
    arguments, _ = rate_ratio(cpu)
    assert [tuple(x.shape) for x in cpu.kernels.rate_ratio(**arguments)] == [(2, 1), (2,)]
    assert cpu.kernels.rate_ratio(**{**arguments, **wrong}) is None
