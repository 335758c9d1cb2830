"""What a result may not depend on: how a launch divides rows, the order in which threads run, where rows lie in memory.

And what a GPU alone can show: streams, CUDA graphs, errors of launches, a second device.
"""

import math

import pytest
import torch

import dam
from dam.backends import address, choice, cuda
from dam.kernels.excluded import Excluded
from dam.ops import _formed_gradient
from dam.ops import jump as jump_op
from dam.ops import log_prob as log_prob_op
from dam.ops import matching_loss as matching_loss_op
from tests import calls
from tests.ops.helpers import assert_close, far, integers, normal, same

if choice.why_unavailable("cuda") is not None:
    pytest.skip(choice.why_unavailable("cuda"), allow_module_level=True)

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="a chip is what it is")
on_gpu = pytest.mark.skipif(cuda.EMULATED, reason="needs a GPU")

# Chips of the emulator: rows to a block each, or two, to clusters of 2 to 8, to blocks of two launches, to a warp each.
CHIPS = [
    {"multiprocessors": 1, "clusters": True},
    {"multiprocessors": 5, "clusters": True},
    {"multiprocessors": 132, "clusters": True},
    {"multiprocessors": 5, "clusters": False},
    {"multiprocessors": 108, "clusters": False},
    {"multiprocessors": 4, "clusters": True, "l2_bytes": 2**16},
    {"multiprocessors": 1, "clusters": True, "l2_bytes": 2**16},  # with a base, the sums in a launch of their own
]


@pytest.fixture(autouse=True)
def on_cuda():
    with torch.device(choice.DEVICE_TYPE["cuda"]), dam.backend("cuda"):
        yield
    if cuda.EMULATED:
        cuda.kernels.pretend()


@emulated
@calls.each("rows", "states")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_chip(dtype, call):
    """Sums over tiles are in the order of threads of a block, which is the same for all of its kinds but not for a warp
    of its own: hence no comparison with those, whose rows are short."""
    x, other = normal(6, 40 * 1024 + 77, seed=1, scale=3.0, dtype=dtype), normal(6, 40 * 1024 + 77, seed=2)
    if call.family == "rows":
        x[2, 1024:4096] = -INF
    results = []
    for chip in CHIPS:
        cuda.kernels.pretend(**chip)
        results.append(call(x, other.to(dtype)))
    assert all(calls.same(result, results[0]) for result in results[1:])


@emulated
@calls.each("rows", "states")
@pytest.mark.parametrize("chip", [CHIPS[1], CHIPS[3], {"multiprocessors": 1}])
def test_results_do_not_depend_on_the_order_of_threads(chip, call):
    """What one thread writes and another reads lies on two sides of a barrier."""
    for rows, columns in ((40, 700), (3, 20_000), (40, 3000)):
        inputs = call.inputs(rows, columns, seed=3)
        results = []
        for order in (0, 1, 2, 3):
            cuda.kernels.pretend(**chip, order=order)
            results.append(call(*inputs))
        assert all(calls.same(result, results[0]) for result in results[1:])


@calls.each("rows", "states")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2048, 5000, 12_289])
def test_results_do_not_depend_on_alignment(dtype, columns, call):
    """Whole loads of 16 bytes where rows are aligned, single ones elsewhere: the same numbers in the same lanes."""
    inputs = call.inputs(2, columns, dtype=dtype, seed=9)
    expected = call(*inputs)
    for shift in (1, 8):
        moved = [torch.zeros(2, columns + 9, dtype=dtype)[:, shift : shift + columns].copy_(x) for x in inputs]
        assert calls.same(call(*moved), expected)


@pytest.mark.parametrize("rows", [1, 7, 600])
def test_short_rows_equal_the_reference(rows):
    """A warp to each; from one column to a tile and one more."""
    for columns in (1, 2, 31, 512, 513, 1024, 1025):
        logits = normal(rows, columns, seed=columns, scale=2.0)
        ours = dam.jump(logits, seed=5)
        with dam.backend("torch"):
            expected = dam.jump(logits, seed=5)
        assert torch.equal(ours.target, expected.target)
        assert_close(ours.log_prob, expected.log_prob, rtol=2.0**-20, atol=2.0**-20)


def test_a_gradient_may_take_the_place_of_the_logits():
    """Of rows that blocks share, with targets in every part; and it may be bfloat16 beside float32 logits."""
    target, grad = integers(-1, 20_000, 3, 40, seed=16), normal(3, 40, seed=17)
    logits, base = normal(3, 20_000, seed=15), normal(3, 20_000, seed=18)
    target[:, 1] = target[:, 0]
    of_loss = (target, grad, base, grad[:, 0], None, Excluded(), True, 0.7, True)
    chips = (
        [{**chip, "order": order} for chip in (*CHIPS[:4], CHIPS[6]) for order in (0, 1)] if cuda.EMULATED else [None]
    )
    for chip in chips:
        if chip is not None:
            cuda.kernels.pretend(**chip)
        _, log_escape = log_prob_op._cuda(logits, target, Excluded(), 1.0)
        expected = log_prob_op._cuda_backward(grad, logits, target, log_escape, Excluded(), 1.0)
        x = logits.clone()
        assert torch.equal(log_prob_op._cuda_backward(grad, x, target, log_escape, Excluded(), 1.0, x), expected)
        half = torch.empty_like(logits, dtype=torch.bfloat16)
        log_prob_op._cuda_backward(grad, logits, target, log_escape, Excluded(), 1.0, half)
        assert torch.equal(half, expected.to(torch.bfloat16))
        expected = matching_loss_op._cuda(logits, *of_loss)
        x = logits.clone()
        assert same(matching_loss_op._cuda(x, *of_loss, x), expected)
        assert torch.equal(matching_loss_op._cuda(logits, *of_loss, half)[1], expected[1].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("based", [False, True], ids=["", "base"])
@pytest.mark.parametrize("normalized", [False, True], ids=["rates", ""])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "capped"])
def test_gradients_by_columns_are_those_by_rows(monkeypatch, dtype, based, normalized, softcap):
    """Of a head in chunks of 1024 columns, the last one short, with targets, repeated and excluded ones, in each."""
    rows, columns = 40, 3000
    tensors = [normal(rows, 24, seed=1), normal(columns, 24, seed=2, scale=0.2), normal(columns, seed=3)]
    tensors = [x.to(dtype) for x in tensors]
    lora = [normal(3, 24, seed=4, dtype=dtype), normal(columns, 3, seed=5, dtype=dtype, scale=0.1)]
    target, weight = integers(-1, columns, rows, 5, seed=6), normal(rows, 5, seed=7)
    target[:, 1], exclude = target[:, 0], integers(-1, columns, rows, seed=8)
    exclude[::2] = target[::2, 2]
    suppress = integers(0, 8, columns, seed=13) == 0
    suppress[1024:2000] = True
    options = {"exclude": exclude, "suppress": suppress, "row_scale": normal(rows, seed=9)}
    if based:
        base = [normal(rows, 16, seed=10, dtype=dtype), normal(columns, 16, seed=11, scale=0.2, dtype=dtype)]
        options |= {"base_hidden": base[0], "base_head_weight": base[1], "base_weight": normal(rows, seed=12)}
        options |= {"base_softcap": softcap}
    monkeypatch.setenv("DAM_WORKSPACE_MB", str(1100 * rows * (12 if based else 8) / 2**20))

    def results(form):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        leaves = [x.clone().requires_grad_() for x in (*tensors, *lora)]
        head = {"bias": leaves[2], "lora": dam.LoRA(*leaves[3:], 0.7), "softcap": softcap}
        of_loss = {**options, "normalized": normalized, "temperature": 1.0 if normalized else 1.4}
        loss = dam.linear_matching_loss(*leaves[:2], target, weight, **head, **of_loss)
        value = dam.linear_log_prob(*leaves[:2], target, **head, exclude=exclude, suppress=suppress, temperature=0.7)
        value = (value.clamp(min=-99.0) * weight).sum()
        return loss.detach(), *(x for y in (loss, value) for x in torch.autograd.grad(y, leaves))

    for a, b in zip(results("columns"), results("rows"), strict=True):
        # Sums of as many float32 products in another order; and a rounding to the inputs' dtype.
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[a.dtype]
        assert a.shape == b.shape
        assert_close(
            a.float(), b.float(), rtol=2.0**-16 + rounding, atol=(2.0**-17 + rounding / 16) * float(b.abs().max())
        )


def test_numbers_of_rows_may_have_any_dtype_and_stride():
    """Weights, scales and costs are read as they are; the reference converts them."""
    logits, base = normal(5, 300, seed=20), normal(5, 300, seed=21)
    target = integers(-1, 300, 5, 4, seed=22)[:, ::2]
    cost = normal(6, 5, seed=25).t()
    for dtype in (*DTYPES, torch.float64):
        weight = normal(2, 5, seed=23, dtype=dtype).t()
        scale = normal(10, seed=24, dtype=dtype)[::2]

        def results(weight=weight, scale=scale, dtype=dtype):
            leaf = logits.detach().requires_grad_()
            options = {"base_logits": base, "base_weight": scale, "row_scale": scale}
            loss = dam.matching_loss(leaf, target, weight, **options)
            weights = dam.adjoint_weights(normal(7, 5, 6, seed=26).transpose(0, 2)[:5, :, :6].mT, cost.to(dtype)[:, :6])
            return loss.detach(), torch.autograd.grad(loss, leaf)[0], *weights

        ours = results()
        with dam.backend("torch"):
            expected = results()
        for a, b in zip(ours, expected, strict=True):
            # float32 sums of 300 terms at most, and one rounding.
            assert_close(a, b, rtol=2.0**-19, atol=2.0**-19)


def test_numbers_beyond_float32_may_cancel():
    """Rates of e^90, and an upstream gradient times 1 / temperature of 10^40: what is left fits float32."""
    x = torch.tensor([[90.0, 1.0], [90.0, 2.0]])

    def results():
        leaf = x.detach().requires_grad_()
        weight = torch.tensor([[2 * math.exp(90.0)], [0.999 * math.exp(90.0)]], dtype=torch.float64)
        options = {"base_logits": x, "base_weight": torch.ones(2), "normalized": False}
        pulled = dam.matching_loss(leaf, torch.zeros(2, 1, dtype=torch.int64), weight, normalized=False)
        based = dam.matching_loss(leaf, torch.full((2, 1), -1), weight, **options)
        gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (pulled, based)]
        many = torch.zeros(1, 1000, requires_grad=True)
        cold = dam.log_prob(many, torch.zeros(1, 1, dtype=torch.int64), temperature=1e-30)
        gradients += [torch.autograd.grad(cold, many, torch.full_like(cold, 1e10))[0][:, 1:]]  # of the target: infinite
        peaked = torch.tensor([[0.0, -10.0]], requires_grad=True)
        repeated = dam.log_prob(peaked, torch.zeros(1, 4, dtype=torch.int64))
        return *gradients, torch.autograd.grad(repeated, peaked, torch.full_like(repeated, 3e38))[0]

    ours = results()
    with dam.backend("torch"):
        expected = results()
    for a, b in zip(ours, expected, strict=True):
        # float32 exponentials of numbers near 90.
        torch.testing.assert_close(a.double(), b.double(), rtol=2.0**-17, atol=2.0**-17)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
def test_a_formed_gradient_is_scaled_in_place(dtype, factor):
    """Of any length; what lies behind it stays."""
    for count in (1, 1023, 40_000):
        memory = normal(count + 8, seed=81, dtype=dtype)
        expected = memory.clone()
        expected[:count] = (expected[:count].double() * factor).to(dtype)
        assert _formed_gradient._cuda_scaled(memory[:count], torch.tensor(factor)).data_ptr() == memory.data_ptr()
        assert torch.equal(memory, expected)


def test_numbers_of_a_row_in_eight_bits():
    """A dtype that kernels do not read is converted."""
    scale = torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn)
    arguments = (normal(2, 20, seed=80), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert torch.equal(
        dam.matching_loss(*arguments, row_scale=scale), dam.matching_loss(*arguments, row_scale=scale.float())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_beyond_2_31_elements(dtype):
    """tests/ops/test_large.py has such inputs; here what is written lies as far apart."""
    logits, base, out = far(4, 2000, dtype), far(4, 2000, dtype), far(4, 2000, dtype)
    logits.copy_(normal(4, 2000, seed=30))
    base.copy_(normal(4, 2000, seed=31))
    near, near_base = logits.contiguous(), base.contiguous()
    target, grad = integers(-1, 2000, 4, 2, seed=32), normal(4, 2, seed=33)
    _, log_escape = log_prob_op._cuda(near, target, Excluded(), 1.0)
    assert same(log_prob_op._cuda(logits, target, Excluded(), 1.0), log_prob_op._cuda(near, target, Excluded(), 1.0))
    expected = log_prob_op._cuda_backward(grad, near, target, log_escape, Excluded(), 1.0)
    assert torch.equal(log_prob_op._cuda_backward(grad, logits, target, log_escape, Excluded(), 1.0, out), expected)
    of_loss = (grad[:, 0], None, Excluded(), True, 1.0, True)
    expected = matching_loss_op._cuda(near, target, grad, near_base, *of_loss)
    assert same(matching_loss_op._cuda(logits, target, grad, base, *of_loss, out), expected)


@emulated
def test_an_index_out_of_range_is_not_read():
    """From the bridge, as the ops look at indices on a CPU themselves; on a GPU it ends the process's use of it."""
    logits = normal(2, 50, seed=50)
    for bad in (50, -2):
        with pytest.raises(IndexError, match="target must be -1 or in"):
            log_prob_op._cuda(logits, torch.tensor([[1], [bad]]), Excluded(), 1.0)
        with pytest.raises(IndexError, match="exclude must be -1 or in"):
            jump_op._cuda(logits, Excluded(torch.tensor([3, bad])), 1.0, 1, torch.tensor(1), None, False)


def walked(x, length, inner, periodic, weights, *, few):
    """One walk of float64 rows along lines of so many points, with weights that go with the launch or lie in memory."""
    result, not_finite = torch.empty_like(x), torch.zeros(len(x), dtype=torch.int32)
    taps = torch.tensor(weights, dtype=torch.float64)
    cuda.kernels.walk(
        rows=len(x),
        columns=x.shape[1],
        length=length,
        inner=inner,
        periodic=periodic,
        taps=0 if few else taps.data_ptr(),
        few_taps=weights if few else [],
        radius=len(weights) - 1,
        source=address.matrix(x),
        source_dtype=address.DTYPE_CODE[x.dtype],
        result=result.data_ptr(),
        result_is_double=True,
        not_finite=not_finite.data_ptr(),
        where=cuda.where(x),
    )
    return result, not_finite


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 33, 130, 300])
def test_a_walk_on_tensor_cores_is_that_of_the_ordinary_units(length, inner, periodic):
    """Weights in memory are the latter's. Up to the radii that go round, and with more sources than fit at a time."""
    most = (length - 1) // 2 if periodic else (2 * length - 1) // 2
    for radius in sorted({0, min(1, most), min(9, most), min(100, most), most}):
        weights = (torch.arange(radius + 1, dtype=torch.float64, device="cpu") / -5).exp().tolist()
        x = normal(3, 2 * length * inner, seed=70, dtype=torch.float64).abs() + 1e-3
        found, expected = (walked(x, length, inner, periodic, weights, few=few)[0] for few in (True, False))
        # Non-negative numbers, each sum of at most 2 radius + 1 roundings.
        assert_close(found, expected, rtol=(2 * radius + 2) * 2.0**-52)


@pytest.mark.parametrize("inner", [1, 40])
def test_a_walk_on_tensor_cores_marks_the_rows_that_are_not_finite(inner):
    x = normal(4, 50 * inner, seed=71, dtype=torch.float64)
    x[1, 7], x[3, -1] = math.nan, INF
    assert walked(x, 50, inner, True, [0.5, 0.25], few=True)[1].tolist() == [0, 1, 0, 1]


# ---- on a GPU


@on_gpu
def test_calls_are_part_of_a_graph():
    """Captured once, replayed on new numbers: the same as calls on those."""
    logits, base = normal(8, 40_000, seed=60, dtype=torch.bfloat16), normal(8, 40_000, seed=61, dtype=torch.bfloat16)
    target, weight, seed = integers(0, 40_000, 8, 2, seed=62), normal(8, 2, seed=63), torch.tensor(5)
    log_ratio, cost = normal(4, 8, 16, seed=64), normal(4, 8, seed=65)
    lattice = dam.generators.Lattice((200, 200), (True, False))

    def results():
        drawn = dam.jump(logits, seed=seed, check=False)
        loss, gradient = matching_loss_op._cuda(
            logits, target, weight, base, weight[:, 0], None, Excluded(), True, 1.0, True
        )
        value, log_escape = log_prob_op._cuda(logits, target, Excluded(), 1.0)
        slope = log_prob_op._cuda_backward(weight, logits, target, log_escape, Excluded(), 1.0)
        weights = dam.adjoint_weights(log_ratio, cost)
        expected = dam.backward_kolmogorov(dam.generators.Uniform(40_000), logits, 0.5)
        walked = dam.backward_kolmogorov(lattice, logits.float(), 0.5)
        return *drawn, loss, gradient, value, slope, *dam.rate_ratio(logits, base, target), *weights, expected, walked

    results()  # what torch and the driver load at first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for trial in (66, 67):
        logits.copy_(normal(8, 40_000, seed=trial))
        cost.copy_(normal(4, 8, seed=trial))
        seed.fill_(trial)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, results())


@on_gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_replay_of_a_captured_jump_draws_anew(name):
    logits, head = torch.zeros(512, 5000), torch.zeros(5000, 16)
    graph = torch.cuda.CUDAGraph()
    with dam.backend(name):
        calls = lambda: (dam.jump(logits), dam.linear_jump(logits[:, :16], head))  # noqa: E731
        calls()  # what torch and the driver load at first use
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = calls()
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append([x.target.clone() for x in captured])
    assert all(float((a == b).float().mean()) < 0.1 for a, b in zip(*drawn, strict=True))


@on_gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unchecked_call_does_not_wait(name):
    logits = torch.zeros(64, 5000)
    with dam.backend(name):
        for mode in ("default", "error"):  # the first loads
            torch.cuda.set_sync_debug_mode(mode)
            try:
                dam.jump(logits, suppress=[3, 7], exclude=5, check=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_calls_run_on_the_current_stream():
    """Behind what that stream is at: a slow fill of the logits."""
    logits = torch.zeros(64, 100_000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        logits.fill_(-INF)
        logits[:, 7] = 1.0
        drawn = dam.jump(logits, seed=1, check=False)
    stream.synchronize()
    assert bool((drawn.target == 7).all())


@on_gpu
def test_a_launch_that_fails_says_so():
    """A device that does not exist, and a stream of none."""
    x, index = torch.zeros(2, 10), torch.zeros(2, 1, dtype=torch.int64)
    names = ("summaries", "log_prob", "log_escape")
    out = {name: torch.empty(64) for name in names}
    with pytest.raises(RuntimeError, match="dam: choosing the device"):
        cuda.kernels.log_prob(
            shape=cuda.shape(x),
            logits=address.matrix(x),
            exclude=address.indices(None),
            suppressed=address.of(None),
            scale=1.0,
            target=address.targets(index),
            where=(63, 0),
            **{name: array.data_ptr() for name, array in out.items()},
        )
    assert_close(dam.log_prob(x, index), torch.full((2, 1), -math.log(10)), rtol=2.0**-20)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    logits = normal(4, 5000, seed=70)
    expected = dam.jump(logits, seed=1)
    assert same([x.to("cuda:0") for x in dam.jump(logits.to("cuda:1"), seed=1)], expected)
    assert torch.cuda.current_device() == 0
