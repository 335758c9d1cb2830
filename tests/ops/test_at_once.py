"""Calls that nobody watches go past checks and dispatcher: to the same results, and only where nothing is lost."""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import profiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ExecutionTraceObserver, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dam
from dam.backends import choice, cpu
from dam.ops import _checks, _op
from tests import calls

pytestmark = pytest.mark.skipif(choice.why_unavailable("cpu") is not None, reason="of the C++ backend")

ROWS = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
HIDDEN, HEAD = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 9))
BASE, TARGET = ROWS + 1, torch.tensor([3, -1, 8, 0])

# Each op that has such calls, of keyword arguments that may be left out.
OPS = {
    "jump": lambda x=ROWS, **options: dam.jump(x, **{"seed": 1, **options}),
    "log_prob": lambda x=ROWS, **options: dam.log_prob(x, **{"target": TARGET, **options}),
    "entropy": lambda x=ROWS, **options: dam.entropy(x, **options),
    "rate_ratio": lambda x=ROWS, **options: dam.rate_ratio(x, **{"base_logits": BASE, "target": TARGET, **options}),
    "linear_jump": lambda x=HIDDEN, **options: dam.linear_jump(x, **{"head_weight": HEAD, "seed": 1, **options}),
    "linear_log_prob": lambda x=HIDDEN, **options: dam.linear_log_prob(
        x, **{"head_weight": HEAD, "target": TARGET, **options}
    ),
}
INPUT = {name: HIDDEN if name.startswith("linear") else ROWS for name in OPS}
every_op = pytest.mark.parametrize("name", OPS)


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def same(results, others):
    pairs = list(zip(tensors(results), tensors(others), strict=True))
    return all(torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride() for x, y in pairs)


@contextlib.contextmanager
def seen(monkeypatch):
    """Names of the ops whose arguments are checked, and which then are called, by dispatcher or not."""
    found, whole = [], _op.Op.__call__

    def recorded(op, *args):
        found.append(op.name)
        return whole(op, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_op.Op, "__call__", recorded)
        yield found


def options_of(name):
    """Those in which an op's calls differ, all of which fit."""
    rows = INPUT[name].shape[0]
    found = [{}, {"exclude": 2}, {"exclude": torch.arange(rows) - 1}, {"suppress": []}]
    if name not in ("rate_ratio",):
        found += [{"temperature": 0.7}, {"temperature": 2}]
    if name in ("jump", "linear_jump"):
        mask = torch.arange(9) % 2 == 0
        found += [{"suppress": [1, 4]}, {"suppress": mask}, {"temperature": 0}, {"num_samples": 3}, {"check": False}]
        found += [{"seed": -1}, {"seed": 2**64 - 1}, {"seed": torch.tensor(5)}, {"row_ids": torch.arange(rows) * 7 - 9}]
    if name == "entropy":
        found += [{"suppress": (1, 4)}]
    if "log_prob" in name or name == "rate_ratio":
        found += [{"target": torch.tensor([[1, -1, 2]] * rows)}, {"target": torch.zeros(rows, 0, dtype=torch.int64)}]
    if name.startswith("linear"):
        found += [{"bias": torch.linspace(-1, 1, 9)}]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_op
def test_the_results_are_those_of_checked_calls(name, dtype, monkeypatch):
    """Bit for bit, whether the dispatcher calls the op or not, in every option; and what fits is not checked."""
    x = INPUT[name].to(dtype)
    others = {"head_weight": HEAD.to(dtype)} if name.startswith("linear") else {}
    others |= {"base_logits": ROWS.to(dtype) - 1} if name == "rate_ratio" else {}
    for options in options_of(name):
        options = others | {key: y.to(dtype) if key == "bias" else y for key, y in options.items()}
        with seen(monkeypatch) as found:
            result = OPS[name](x, **options)
        assert not found, options
        with dam.backend("cpu"):
            assert same(result, OPS[name](x, **options)), options
            with profile():
                assert same(result, OPS[name](x, **options)), options


@pytest.mark.parametrize("name", ["jump", "log_prob", "entropy", "rate_ratio"])
def test_leading_dimensions(name, monkeypatch):
    x = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1))
    target, exclude = torch.arange(24).view(2, 3, 4) % 9, torch.arange(24).view(2, 3, 4) % 5 - 1
    options = {"exclude": exclude, **({"target": target} if name in ("log_prob", "rate_ratio") else {})}
    options |= {"base_logits": x + 1} if name == "rate_ratio" else {}
    one = {key: y[0, 0, 0] for key, y in options.items()}
    for logits, given in ((x, options), (x[0, 0, 0], one)):
        with seen(monkeypatch) as found:
            result = OPS[name](logits, **given)
        assert not found
        with dam.backend("cpu"):
            assert same(result, OPS[name](logits, **given))
    # Rows at no one distance from each other are for the checks to copy.
    apart = torch.randn(2, 5, 9)[:, :4]
    options = {key: y[:, 0] for key, y in options.items()}
    with seen(monkeypatch) as found:
        result = OPS[name](apart, **(options | ({"base_logits": apart} if "base_logits" in options else {})))
    assert found
    with dam.backend("cpu"):
        assert same(
            result, OPS[name](apart, **(options | ({"base_logits": apart} if "base_logits" in options else {})))
        )


def test_nothing_is_checked_twice(monkeypatch):
    monkeypatch.setattr(_checks, "rows", lambda *_: pytest.fail("checked"))
    for call in OPS.values():
        call()


@calls.each()
def test_every_op_is_the_same_without_the_dispatcher(call):
    inputs = call.inputs(3, 60)
    with profile():
        expected = call(*inputs)
    assert calls.same(call(*inputs), expected)


# ---- What watches calls sees the ops


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@every_op
def test_modes_are_told_of_the_op(name):
    for mode in (Dispatched(), Functions()):
        with mode:
            OPS[name]()
        assert f"dam.{name}.default" in mode.names


@every_op
def test_counters_fakes_and_graphs_hold_the_op(name):
    with FlopCounterMode(display=False) as counter:
        OPS[name]()
    assert counter.get_total_flops() == 0  # the op's: it has no formula, and its products are not counted as others'
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (ROWS, HIDDEN, HEAD, TARGET)]
        options = {"head_weight": fakes[2]} if name.startswith("linear") else {}
        options |= {"target": fakes[3]} if "log_prob" in name or name == "rate_ratio" else {}
        options |= {"base_logits": fakes[0]} if name == "rate_ratio" else {}
        found = tensors(OPS[name](fakes[1] if name.startswith("linear") else fakes[0], **options))
    assert [x.shape for x in found] == [x.shape for x in tensors(OPS[name]())]
    for pre_dispatch in (False, True):
        graph = make_fx(lambda x: OPS[name](x), pre_dispatch=pre_dispatch)(INPUT[name])
        assert f"dam.{name}.default" in {str(node.target) for node in graph.graph.nodes}


@pytest.mark.parametrize("watching", [profile, profiler.profile, profiler.emit_itt], ids=lambda x: x.__qualname__)
def test_profilers_are_told_of_the_op(watching, monkeypatch):
    for name, call in OPS.items():
        with contextlib.suppress(RuntimeError):  # of a build without ITT
            with watching(), seen(monkeypatch) as found:
                call()
            assert f"dam::{name}" in found
            with watching():
                assert _op.ordinary(ROWS) == 0
    assert _op.ordinary(ROWS) == 1


def test_an_execution_trace_of_a_profiler_holds_the_op(tmp_path):
    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    with profile(execution_trace_observer=observer):
        dam.jump(ROWS, seed=1)
    assert "dam::jump" in (tmp_path / "trace.json").read_text()


# ---- Tensors with which torch does more than hand them on


class Dispatching(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("kind", [Dispatching, Named])
def test_subclasses_are_not_ordinary(kind):
    assert _op.ordinary(ROWS) == 1 and _op.ordinary(ROWS.as_subclass(kind)) == 0
    assert _op.ordinary(torch.nn.Parameter(ROWS, requires_grad=False)) == 1


def test_a_view_to_be_negated_is_negated():
    z = torch.complex(torch.zeros(4, 9), -ROWS).conj()
    assert z.imag.is_neg() and torch.equal(z.imag, ROWS)
    assert same(dam.jump(z.imag.contiguous(), seed=1), dam.jump(ROWS, seed=1)) and _op.ordinary(z.imag) == 0


@pytest.mark.parametrize(
    "x",
    [
        torch._efficientzerotensor(4, 9),
        torch._to_functional_tensor(ROWS),
        ROWS.to("meta"),
        ROWS.to_sparse(),
        torch.nested.nested_tensor([ROWS, ROWS]),
        ROWS.to(torch.complex64).conj(),
        np.zeros((4, 9)),
        np.float64(1.0),
        [ROWS],
    ],
    ids=["zero", "functional", "meta", "sparse", "nested", "conjugate", "numpy", "numpy scalar", "list"],
)
def test_what_the_dispatcher_or_the_checks_must_see_is_not_ordinary(x):
    assert _op.ordinary(x) == 0 and _op.ordinary(ROWS, x) == 0


def test_gradients_are_recorded_where_they_are_wanted():
    leaf = ROWS.clone().requires_grad_()
    assert _op.ordinary(leaf) == 2 and dam.log_prob(leaf, TARGET).requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert _op.ordinary(leaf) == 1
            found = dam.log_prob(leaf, TARGET)
        assert not found.requires_grad and torch.equal(found, dam.log_prob(ROWS, TARGET))
    with torch.inference_mode():
        found = dam.jump(ROWS.clone(), seed=1)
        assert all(x.is_inference() for x in found) and same(found, dam.jump(ROWS, seed=1))


def test_a_default_device_or_dtype_is_left_alone():
    with torch.device("meta"):
        assert _op.ordinary(ROWS) == 0 and dam.jump(ROWS, seed=1).target.device.type == "cpu"


# ---- Errors are those of the checks


def error_of(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    return type(caught.value), str(caught.value)


def spoilt(value, row=2):
    """All of a row, or one of its entries."""
    x = ROWS.clone()
    x[row, slice(None) if value == -torch.inf else 5] = value
    return x


TWO, MASK = torch.zeros(2, dtype=torch.int64), torch.zeros(8, dtype=torch.bool)
DRAWS = [
    *({"num_samples": value} for value in (0, True, 1.0, 2**24)),
    *({"seed": value} for value in (True, 1.5, 2**64, -(2**63) - 1, TWO, torch.zeros(()))),
    *({"row_ids": value} for value in (torch.arange(3), torch.zeros(4), 1)),
    *({"check": value} for value in (1, None)),
    *({"suppress": value} for value in ([9], [-1], [True], "ab", torch.zeros(9), MASK, list(range(9)))),
]
COMMON = [{"exclude": value} for value in (9, -2, True, 0.5, torch.arange(3), torch.full((4,), 9), torch.zeros(4))]
SCALED = [{"temperature": value} for value in (-1.0, float("nan"), 1e31, True, "1", None, 10**40)]
TARGETS = [
    {"target": value}
    for value in (torch.full((4,), 9), torch.full((4, 2), -2), torch.zeros(4), torch.zeros(3, dtype=torch.int64), 0)
]
WRONG = [
    *(("jump", wrong) for wrong in COMMON + SCALED + DRAWS),
    *(("log_prob", wrong) for wrong in [*COMMON, *SCALED, *TARGETS, {"temperature": 0}, {"entropy": 1}]),
    *(("entropy", wrong) for wrong in [*COMMON, *SCALED, {"temperature": 0}, {"suppress": [9]}]),
    *(("rate_ratio", wrong) for wrong in COMMON + TARGETS),
    *(("rate_ratio", {"base_logits": wrong}) for wrong in (ROWS.bfloat16(), ROWS[:3], ROWS[:, :8])),
    *(("linear_jump", wrong) for wrong in COMMON + SCALED + DRAWS),
    *(("linear_log_prob", wrong) for wrong in COMMON + SCALED + TARGETS),
    *(
        (name, wrong)
        for name in ("linear_jump", "linear_log_prob")
        for wrong in (
            {"head_weight": HEAD.bfloat16()},
            {"head_weight": HEAD[:, :4]},
            {"head_weight": HEAD.t().contiguous().t()},
            {"head_weight": HEAD[:0]},
            {"bias": torch.zeros(8)},
            {"bias": torch.zeros(9, dtype=torch.float64)},
            {"softcap": -1.0},
            {"lora": 1},
        )
    ),
    *(("jump", {"x": x}) for x in (spoilt(torch.nan), spoilt(torch.inf), spoilt(-torch.inf))),
    *((name, {"x": x}) for name in OPS for x in (INPUT[name].long(), INPUT[name].t(), INPUT[name][:, :0], None)),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_errors_are_those_of_the_checks(name, wrong):
    found = error_of(lambda: OPS[name](**wrong))
    with dam.backend("cpu"):
        expected = error_of(lambda: OPS[name](**wrong))
    assert found == expected and found[1].startswith(f"{name}: ")


def test_a_row_that_cannot_be_sampled_is_not_looked_at_without_check():
    target, log_prob, log_escape = dam.jump(spoilt(-torch.inf), seed=1, check=False)
    assert target[2] == -1 and log_prob[2] == -torch.inf and log_escape[2] == -torch.inf


def test_a_wrong_form_is_an_error_of_the_first_call(monkeypatch):
    monkeypatch.setenv("DAM_LINEAR_FORM", "sideways")
    with pytest.raises(ValueError, match="DAM_LINEAR_FORM must be one of"):
        dam.linear_jump(HIDDEN, HEAD, seed=1)


def test_one_seed_is_drawn_for_a_call_whatever_way_it_goes():
    for x in (ROWS, ROWS.double(), ROWS[:, None].expand(4, 2, 9)):
        torch.manual_seed(3)
        found = dam.jump(x)
        after = torch.randint(2**60, ())
        torch.manual_seed(3)
        assert same(found, dam.jump(x, seed=torch.randint(-(2**63), 2**63 - 1, ())))
        assert torch.equal(after, torch.randint(2**60, ()))


def test_backends_asked_for_by_name_are_taken(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_IMPORT_ERROR", "no such file")
        with pytest.warns(RuntimeWarning, match="no such file"):
            dam.jump(ROWS, seed=1)
    with dam.backend("torch"), seen(monkeypatch) as found:
        dam.jump(ROWS, seed=1)
    assert found == ["dam::jump"]


def test_few_rows_in_little_work_memory_are_chunked_as_ever(monkeypatch):
    whole = dam.linear_jump(HIDDEN, HEAD, seed=1)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.00001")
    with seen(monkeypatch) as found:
        parts = dam.linear_jump(HIDDEN, HEAD, seed=1)
    assert found == ["dam::linear_jump"] and torch.equal(whole.target, parts.target)
