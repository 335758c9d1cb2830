"""softcap of linear ops: logits = softcap * tanh(x / softcap), x = hidden @ head_weight^T + bias, before all else."""

import math

import pytest
import torch
from helpers import assert_close, assert_near, integers, normal, peak_bytes, product_slack, rounding, slow, threads

import dam
from dam.backends import choice
from dam.models import Head
from dam.ops import _softcap
from dam.ops import linear_matching_loss as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
FORMS = ("fused", "chunked")
INF = math.inf
ROWS, WIDTH, V, RANK = 24, 20, 1200, 3
SOFTCAP, BASE_SOFTCAP = 5.0, 3.0
# Standard deviation of x, of which the largest is four times as much: few are capped, most, or all but a few.
SPREADS = {"small": 1.0, "capped": 8.0, "saturated": 200.0}
NAMES = ("hidden", "head", "bias", "a", "b")


def leaves_of(spread, dtype=torch.float32, *, lora=True, seed=0):
    """hidden, head, bias and the factors of an adapter."""
    hidden = normal(ROWS, WIDTH, seed=seed, dtype=dtype, scale=SPREADS[spread] / WIDTH**0.5)
    head, bias = normal(V, WIDTH, seed=seed + 1, dtype=dtype), normal(V, seed=seed + 2, dtype=dtype)
    if not lora:
        return hidden, head, bias
    a = normal(RANK, WIDTH, seed=seed + 3, dtype=dtype, scale=0.3)
    return hidden, head, bias, a, normal(V, RANK, seed=seed + 4, dtype=dtype, scale=0.3)


def left_out(target):
    """Of each row one destination, and of all of them some; targets that are neither."""
    suppress = integers(0, 8, V, seed=10) == 0
    exclude = integers(-1, V, ROWS, seed=11)
    never = suppressed_or_excluded(suppress, exclude).gather(1, target.clamp(min=0))
    return {"exclude": exclude, "suppress": suppress}, target.where(~never, -1)


def suppressed_or_excluded(suppress, exclude):
    return suppress | (torch.arange(V)[None] == exclude[:, None])


class Dense:
    """The model's logits in float64 by autograd, where they exist; the bias comes before the cap, all else after."""

    def __init__(self, leaves, softcap=SOFTCAP):
        self.leaves = [x.detach().double().requires_grad_() for x in leaves]
        hidden, head, bias, *low = self.leaves
        self.x = hidden @ head.T + bias
        if low:
            self.x = self.x + 0.7 * (hidden @ low[0].T) @ low[1].T
        self.z = softcap * torch.tanh(self.x / softcap)
        self.x.retain_grad()
        self.z.retain_grad()

    def gradients(self, value, upstream):
        value.backward(upstream.to(value.dtype))
        return [x.grad for x in self.leaves]

    def slack(self, backend, dtype, form):
        """What each gradient may lose in the cap, of products with the gradient of logits; after `gradients`.

        2^-20 of the gradient before the cap: 3 roundings that the derivative 1 - (z / c)^2 leaves near saturation, and
        the 20 float32 products of x, of which f(u) u <= 1/2 shows in the derivative. In bfloat16 on a GPU the logits'
        gradient is rounded before it is multiplied on, and chunked also before the cap.
        """
        hidden, head, _, *low = (x.detach() for x in self.leaves)
        roundings = 1.0 if form == "fused" else 2.0
        factors = [(False, head), (True, hidden), (True, torch.ones(ROWS, dtype=torch.float64))]
        if low:
            factors[0] = (False, head + 0.7 * low[1] @ low[0])
        found = []
        for transposed, factor in factors:
            x, z = (g.t() if transposed else g for g in (self.x.grad, self.z.grad))
            # An entry was rounded as large as it is before the cap or after it.
            found.append(roundings * product_slack(backend, dtype, x, factor) + 2.0**-20 * z.abs() @ factor.abs())
        if low:
            of_product = 0.7 * found_of_product(self, backend, dtype, roundings)
            found += [low[1].abs().T @ of_product, of_product @ low[0].abs().T]
        return found


def found_of_product(dense, backend, dtype, roundings):
    """The same of the gradient in b @ a, [V, D]."""
    hidden, x, z = dense.leaves[0].detach(), dense.x.grad.t(), dense.z.grad.t()
    return roundings * product_slack(backend, dtype, x, hidden) + 2.0**-20 * z.abs() @ hidden.abs()


def compare(actual, dense, expected, backend, dtype, form):
    for name, a, e, more in zip(NAMES, actual, expected, dense.slack(backend, dtype, form), strict=False):
        assert a.dtype == dtype, name
        # As in test_linear_log_prob.py: the exponentials of logits of float32 products.
        assert_near(a, e, rtol=rounding(dtype) + 2.0**-16, atol=2.0**-17 * float(e.abs().max()) + 2.0**-24 + more)


@pytest.fixture
def form(request, backend):
    return request.node.callspec.params["backend"][1]


@pytest.fixture(params=[None, "0.05"], ids=["", "chunks"])
def workspace(request, monkeypatch):
    """All in one chunk, or a few rows (or columns) at a time."""
    if request.param is not None:
        monkeypatch.setenv("DAM_WORKSPACE_MB", request.param)


CASES = pytest.mark.parametrize(
    ("spread", "dtype", "lora"),
    [
        ("small", torch.float32, True),
        ("capped", torch.float32, True),
        ("saturated", torch.float32, False),
        ("capped", torch.bfloat16, False),  # an adapter's part of hidden states would be rounded to 16 bits
        ("capped", torch.float16, False),
    ],
)


def applied(leaves):
    """Leaves of an op, and the options that hand all but the first two over."""
    xs = [x.clone().requires_grad_() for x in leaves]
    return xs, {"bias": xs[2], **({"lora": dam.LoRA(*xs[3:], 0.7)} if len(xs) > 3 else {}), "softcap": SOFTCAP}


@CASES
def test_log_prob_and_its_gradients(backend, form, workspace, spread, dtype, lora):
    leaves = leaves_of(spread, dtype, lora=lora)
    options, target = left_out(integers(-1, V, ROWS, 3, seed=12))
    dense, upstream = Dense(leaves), normal(ROWS, 3, seed=13)
    never = suppressed_or_excluded(options["suppress"], options["exclude"])
    expected = (dense.z / 0.8).masked_fill(never, -INF).log_softmax(1).gather(1, target.clamp(min=0))
    expected = torch.where(target < 0, 0.0, expected)
    xs, head = applied(leaves)
    value = dam.linear_log_prob(*xs[:2], target, **head, **options, temperature=0.8)
    # Logits of at most 5 in float32, divided by the temperature; where x is large its products' rounding is capped too.
    assert_close(value.detach(), expected.detach(), rtol=2.0**-18, atol=2.0**-17)
    value.backward(upstream)
    compare([x.grad for x in xs], dense, dense.gradients(expected, upstream), backend, dtype, form)


def base_of(dtype):
    base = normal(ROWS, 12, seed=20, dtype=dtype, scale=2.0), normal(V, 12, seed=21, dtype=dtype)
    bias, weight = normal(V, seed=22, dtype=dtype), normal(ROWS, seed=23)
    names = ("base_hidden", "base_head_weight", "base_bias", "base_weight")
    return dict(zip(names, (*base, bias, weight), strict=True))


def matching_loss(z, base, target, weight, options, temperature, normalized):
    """Loss of each row [T], by the formula of `matching_loss`, of float64 logits."""
    never = suppressed_or_excluded(options["suppress"], options["exclude"])
    x = (z / temperature).masked_fill(never, -INF)
    w = torch.zeros(ROWS, V, dtype=torch.float64).scatter_add(
        1, target.clamp(min=0), weight.double().where(target >= 0, 0.0)
    )
    if base is not None:
        y = base["base_hidden"].double() @ base["base_head_weight"].double().T + base["base_bias"].double()
        y = (BASE_SOFTCAP * torch.tanh(y / BASE_SOFTCAP) / temperature).masked_fill(never, -INF)
        w = w + base["base_weight"].double()[:, None] * (y.softmax(1) if normalized else y.exp())
    log_rate = x.log_softmax(1) if normalized else x
    loss = -(w * log_rate.where(~never, 0.0)).sum(1)
    return loss if normalized else loss + x.exp().sum(1)


@CASES
@pytest.mark.parametrize("based", [False, True], ids=["", "base"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_matching_loss_and_its_gradients(backend, form, workspace, spread, dtype, lora, based, reduction):
    normalized = lora  # of either form some cases
    leaves = leaves_of(spread, dtype, lora=lora)
    options, target = left_out(integers(-1, V, ROWS, 3, seed=12))
    target[:, 1] = target[:, 0]
    weight, row_scale = normal(ROWS, 3, seed=14), normal(ROWS, seed=15)
    dense, base = Dense(leaves), base_of(dtype) if based else None
    upstream = normal(ROWS, seed=16) if reduction == "none" else torch.tensor(1.0)
    expected = row_scale.double() * matching_loss(dense.z, base, target, weight, options, 1.3, normalized)
    expected = expected if reduction == "none" else expected.sum()
    if based:
        options |= {**base, "base_softcap": BASE_SOFTCAP}
    options |= {"row_scale": row_scale, "reduction": reduction, "normalized": normalized, "temperature": 1.3}
    xs, head = applied(leaves)
    loss = dam.linear_matching_loss(*xs[:2], target, weight, **head, **options)
    # As in test_linear_matching_loss.py; of rows of either sign.
    assert_close(loss.detach(), expected.detach(), rtol=2.0**-17, atol=2.0**-15)
    loss.backward(upstream)
    compare([x.grad for x in xs], dense, dense.gradients(expected, upstream), backend, dtype, form)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_draws_are_those_of_capped_logits(backend, workspace, spread, temperature):
    leaves = leaves_of(spread, seed=30)
    options, _ = left_out(integers(0, V, ROWS, 1, seed=31))
    xs, head = applied(leaves)
    options |= {"temperature": temperature, "num_samples": 3, "seed": 5}
    out = dam.linear_jump(*xs[:2], **head, **options)
    with dam.backend("torch"):
        expected = dam.jump(Dense(leaves).z.detach(), **options)
    if temperature > 0 or spread == "small":  # else several logits may be the cap to the last digit
        # 72 draws, each of which a rounding of a logit of at most 5 turns with probability about 1e-6.
        assert torch.equal(out.target, expected.target)
    assert_close(out.log_prob, expected.log_prob, rtol=2.0**-18, atol=2.0**-17)
    assert_close(out.log_escape, expected.log_escape, rtol=2.0**-19)


def test_what_no_cap_reaches_is_as_without(backend):
    """Logits below 2^-14 of the cap: their cubes are beyond float32."""
    hidden, head, bias, a, b = leaves_of("small", seed=40)
    target, weight = integers(0, V, ROWS, 2, seed=45), normal(ROWS, 2, seed=46)

    def results(softcap):
        xs = [x.clone().requires_grad_() for x in (hidden, head, bias, a, b)]
        options = {"bias": xs[2], "lora": dam.LoRA(*xs[3:], 0.7), "softcap": softcap}
        loss = dam.linear_matching_loss(*xs[:2], target, weight, **options)
        return loss.detach(), *torch.autograd.grad(loss, xs)

    for x, y in zip(results(2.0**17), results(None), strict=True):
        # The cap's own roundings: its quotient and product are exact for a power of 2, tanh is not.
        assert_near(x, y, rtol=2.0**-18, atol=2.0**-18 * float(y.abs().max()))


def test_a_bias_of_minus_infinity_is_a_logit_of_minus_the_cap(backend):
    """As in the model itself; its gradient is 0, and every other one finite."""
    hidden, head, bias = leaves_of("small", lora=False, seed=50)
    bias[:5] = -INF
    target, weight = integers(0, 8, ROWS, 2, seed=55), normal(ROWS, 2, seed=56)
    xs, options = applied((hidden, head, bias))
    value = dam.linear_log_prob(*xs[:2], target, **options)
    expected = Dense((hidden, head, bias)).z.detach().log_softmax(1).gather(1, target)
    assert_close(value.detach(), expected, rtol=2.0**-18, atol=2.0**-17)
    loss = dam.linear_matching_loss(*xs[:2], target, weight, **options)
    for y in (value.sum(), loss):
        gradients = torch.autograd.grad(y, xs)
        assert all(bool(x.isfinite().all()) for x in gradients) and bool((gradients[2][:5] == 0).all())


def test_a_bad_row_is_named(backend):
    hidden, head, bias = leaves_of("small", lora=False, seed=57)
    hidden[13] = math.nan
    with pytest.raises(ValueError, match="linear_jump: row 13 of the logits holds a NaN"):
        dam.linear_jump(hidden, head, bias, softcap=SOFTCAP, seed=1)


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_of_a_chunk_change_nothing(backend, monkeypatch, count):
    """On a CPU the row ops meet a few rows of a chunk at a time, as many as its threads take."""
    hidden, head, bias = leaves_of("capped", lora=False, seed=64)
    target, weight = integers(-1, V, ROWS, 2, seed=65), normal(ROWS, 2, seed=66)

    def results():
        xs, options = applied((hidden, head, bias))
        losses = dam.linear_matching_loss(
            *xs[:2], target, weight, **options, **base_of(torch.float32), reduction="none"
        )
        loss = dam.linear_matching_loss(*xs[:2], target, weight, **options, row_scale=weight[:, 0])
        value = dam.linear_log_prob(*xs[:2], target, **options)
        return losses, loss, *(x for y in (losses.sum(), loss, value.sum()) for x in torch.autograd.grad(y, xs))

    with threads(count):
        whole = results()
        monkeypatch.setattr(_softcap, "_BLOCK_BYTES", 4 * V * 5)  # five rows for each thread
        assert all(torch.equal(x, y) for x, y in zip(results(), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("based", [False, True], ids=["", "base"])
def test_memory_is_bounded_by_the_workspace(backend, monkeypatch, dtype, based):
    """[T, V] in float32 would be 4 MB; on a GPU a cap takes one more array of a chunk. Bounds as in the ops' tests."""
    hidden, head, bias = normal(256, 16, seed=60, dtype=dtype), normal(4096, 16, seed=61, dtype=dtype), None
    leaves = [x.requires_grad_() for x in (hidden, head)]
    target, weight = integers(0, 4096, 256, 2, seed=62), normal(256, 2, seed=63)
    base = {"base_hidden": hidden.detach(), "base_head_weight": head.detach(), "base_weight": weight[:, 0]}
    options = {**base, "base_softcap": 2.0} if based else {}
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    copied = backend != "torch" and slow(backend) and dtype == torch.bfloat16
    run = lambda: dam.linear_matching_loss(*leaves, target, weight, bias, softcap=SOFTCAP, **options)  # noqa: E731
    peak, _ = peak_bytes(run)
    assert peak < (4 if copied else 2) * 2**20
    peak, value = peak_bytes(lambda: dam.linear_log_prob(*leaves, target, bias, softcap=SOFTCAP))
    assert peak < 1.4 * 2**20
    peak, _ = peak_bytes(lambda: torch.autograd.grad(value.sum(), leaves, retain_graph=True))
    assert peak < (4 if copied else 2) * 2**20


def test_gradcheck():
    hidden, head, bias = normal(3, 4, seed=70), normal(6, 4, seed=71), normal(6, seed=72)
    a, b = normal(2, 4, seed=73), normal(6, 2, seed=74)
    leaves = [x.double().requires_grad_() for x in (hidden, head, bias, a, b)]
    target, weight = torch.tensor([[0, -1], [1, 1], [5, 2]]), normal(3, 2, seed=75)

    def value(h, w, c, a, b):
        options = {"lora": dam.LoRA(a, b, 0.7), "softcap": 1.5, "exclude": torch.tensor([-1, 2, 0]), "temperature": 0.9}
        return dam.linear_log_prob(h, w, target, c, **options)

    def loss(h, w, c, a, b):
        options = {"lora": dam.LoRA(a, b, 0.7), "softcap": 1.5, "normalized": False, "reduction": "none"}
        return dam.linear_matching_loss(h, w, target, weight, c, **options)

    assert torch.autograd.gradcheck(value, leaves) and torch.autograd.gradcheck(loss, leaves)


@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    hidden, head, bias, a, b = leaves_of("capped", seed=80)
    target, weight = integers(0, V, ROWS, 2, seed=85), normal(ROWS, 2, seed=86)

    def both(h, w):
        options = {"lora": dam.LoRA(a, b, 0.7), "softcap": SOFTCAP}
        return (
            dam.linear_log_prob(h * 2, w, target, bias, **options).sum()
            + dam.linear_matching_loss(h * 2, w, target, weight, bias, **options)
            + dam.linear_jump(h, w, bias, seed=3, **options).log_prob.sum()
        )

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        xs = [x.clone().requires_grad_() for x in (hidden, head)]
        value = function(*xs)
        results.append([value.detach(), *torch.autograd.grad(value, xs)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=4 * rounding(torch.float32), atol=2.0**-20 * float(eager.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_near_saturation(dtype):
    """1 - (z / c)^2 cancels: an error of 3 * 2^-24 of the gradient before the cap, whatever is left of it."""
    eps, softcap = torch.finfo(dtype).eps, 30.0
    x = torch.linspace(-15.0, 15.0, 200_001, dtype=dtype) * softcap
    z = _softcap.capped(x.clone(), softcap)
    u = x.double() / softcap
    # The quotient, tanh (two units in the last place of its vectorised form) and the product; in float64 the formula
    # here is rounded too.
    assert_close(z, softcap * torch.tanh(u), rtol=(2 if dtype == torch.float32 else 4) * eps)
    found = _softcap.differentiated(torch.full_like(x, -2.0), z.clone(), softcap)
    block = x.clone()
    ratio = _softcap.capped_and_ratio(block, softcap, torch.empty_like(x))
    assert torch.equal(block, z)
    for y in (found, _softcap.differentiated_by_ratio(torch.full_like(x, -2.0), ratio)):
        assert_close(y, -2.0 / torch.cosh(u) ** 2, rtol=4 * eps, atol=2.0 * 1.5 * eps)


def test_a_head_has_its_cap(backend):
    leaves = leaves_of("capped", seed=90)
    head = Head(*leaves[1:3], dam.LoRA(*leaves[3:], 0.7), SOFTCAP)
    assert head.to(torch.float64).softcap == SOFTCAP and head.arguments(torch.float32)["softcap"] == SOFTCAP
    logits = head.logits(leaves[0])
    assert_close(logits, Dense(leaves).z.detach(), rtol=2.0**-18, atol=2.0**-18)
    drawn, expected = dam.linear_jump(leaves[0], **head.arguments(torch.float32), seed=1), dam.jump(logits, seed=1)
    assert torch.equal(drawn.target, expected.target)


@pytest.mark.parametrize("name", ["softcap", "base_softcap"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, r"must be in \[1e-15, 1e\+15\]; got 0.0"),
        (-30.0, ValueError, r"must be in \[1e-15, 1e\+15\]; got -30.0"),
        (INF, ValueError, r"must be in \[1e-15, 1e\+15\]; got inf"),
        (math.nan, ValueError, r"must be in \[1e-15, 1e\+15\]; got nan"),
        (torch.tensor(30.0), TypeError, "must be a number; got Tensor"),
        (True, TypeError, "must be a number; got bool"),
    ],
)
def test_wrong_caps(name, value, error, message):
    hidden, head = torch.zeros(3, 4), torch.zeros(5, 4)
    slots = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    base = {"base_hidden": hidden, "base_head_weight": head, "base_weight": torch.ones(3)}
    calls = {"linear_matching_loss": lambda: dam.linear_matching_loss(hidden, head, *slots, **base, **{name: value})}
    if name == "softcap":
        calls["linear_jump"] = lambda: dam.linear_jump(hidden, head, softcap=value)
        calls["linear_log_prob"] = lambda: dam.linear_log_prob(hidden, head, slots[0], softcap=value)
    for op, call in calls.items():
        with pytest.raises(error, match=f"^{op}: {name} {message}"):
            call()


def test_the_base_s_cap_needs_a_base():
    with pytest.raises(ValueError, match="base_hidden, base_head_weight and base_weight must be given together"):
        dam.linear_matching_loss(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 1).long(), torch.ones(3, 1), base_softcap=2.0
        )


@pytest.mark.skipif(choice.why_unavailable("triton") is not None, reason="Triton kernels cannot run here")
@pytest.mark.parametrize("softcap", [30.0, 1.7, 1e-15, 1e15])
def test_kernels_over_a_chunk(softcap):
    """What a GPU runs between a library's product and the row ops."""
    from dam.kernels import softcap as kernels

    device = choice.DEVICE_TYPE["triton"]
    u = torch.cat((torch.linspace(-12.0, 12.0, 100_001), torch.linspace(-0.7, 0.7, 9_999)))
    x = (u * softcap).to(device)
    exact = torch.tanh(x.double() / softcap)
    z = kernels.cap(x.clone(), softcap)
    # Of exponentials and quotients that a GPU rounds to 2 units.
    assert_close(z / softcap, exact, rtol=2.0**-21)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gradient = torch.full_like(x, -2.0, dtype=dtype)
        kernels.differentiate(gradient, z, softcap)
        expected = -2.0 / torch.cosh(x.double() / softcap) ** 2
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert_close(gradient, expected, rtol=rounding(dtype) + 2.0**-21, atol=2.0 * 2.0**-21 + least)
    ends = torch.tensor([INF, -INF, math.nan, 0.0], device=device)
    assert kernels.cap(ends, softcap)[:2].tolist() == [torch.tensor(softcap).item(), -torch.tensor(softcap).item()]
    assert bool(ends[2].isnan()) and float(ends[3]) == 0.0
