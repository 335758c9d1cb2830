"""linear_matching_loss: `matching_loss` on the head's logits and its gradients, without a [T, V] array of logits."""

import os

import pytest
import torch
from helpers import assert_close, assert_near, integers, normal, peak_bytes, product_slack, rounding, slow

import dam
from dam.backends import choice, cpu
from dam.kernels import configs, forms
from dam.ops import _head, _linear
from dam.ops import linear_matching_loss as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
FORMS = ("fused", "chunked")


def inputs(rows=30, size=20, columns=1200, targets=3, *, dtype=torch.float32, seed=0, scale=0.4):
    """hidden, head weight and bias, and the arguments that are not differentiated."""
    leaves = (
        normal(rows, size, seed=seed, dtype=dtype, scale=scale),
        normal(columns, size, seed=seed + 1, dtype=dtype),
        normal(columns, seed=seed + 2, dtype=dtype),
    )
    target = integers(-1, columns, rows, targets, seed=seed + 3)
    target[:, 1] = target[:, 0]
    return leaves, target, normal(rows, targets, seed=seed + 4)


def base_of(rows=30, size=12, columns=1200, *, dtype=torch.float32, seed=50):
    return {
        "base_hidden": normal(rows, size, seed=seed, dtype=dtype, scale=0.5),
        "base_head_weight": normal(columns, size, seed=seed + 1, dtype=dtype),
        "base_bias": normal(columns, seed=seed + 2, dtype=dtype),
        "base_weight": normal(rows, seed=seed + 3),
    }


def row_op_in_float64(leaves, target, weight, options):
    """`matching_loss` of float64 logits: loss and gradients, and the gradient of the logits."""
    options = dict(options)
    hidden, head, bias = (x.detach().double().requires_grad_() for x in leaves)
    base = [options.pop(f"base_{name}", None) for name in ("hidden", "head_weight", "bias")]
    if base[0] is not None:
        options["base_logits"] = base[0].double() @ base[1].double().T + base[2].double()
    logits = hidden @ head.T + bias
    logits.retain_grad()
    with dam.backend("torch"):
        loss = dam.matching_loss(logits, target, weight, **options)
    loss.backward()
    return (loss.detach(), hidden.grad, head.grad, bias.grad), logits.grad


def rows_in_float64(leaves, target, weight, options, upstream):
    """The same of the loss of each row, by an upstream gradient of each."""
    row_scale = options.get("row_scale")
    row_scale = upstream.double() if row_scale is None else upstream.double() * row_scale
    expected, grad_logits = row_op_in_float64(leaves, target, weight, {**options, "row_scale": row_scale})
    options = {**options, "reduction": "none"}
    with dam.backend("torch"):
        base = {k: v.double() if "base" in k else v for k, v in options.items()}
        rows = dam.linear_matching_loss(*(x.double() for x in leaves[:2]), target, weight, leaves[2].double(), **base)
    return (rows, *expected[1:]), grad_logits


def linear_op(leaves, target, weight, options, upstream=1.0):
    hidden, head, bias = (x.detach().clone().requires_grad_() for x in leaves)
    loss = dam.linear_matching_loss(hidden, head, target, weight, bias=bias, **options)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, head.grad, bias.grad


def compare(actual, expected, dtype, slack=(0.0, 0.0, 0.0)):
    # Logits near 10 from sums of products in float32, 2^-20 of them, show in exp as 2^-17.
    assert actual[0].dtype == torch.float32
    assert_close(actual[0], expected[0], rtol=2.0**-17, atol=2.0**-18)
    for a, e, more in zip(actual[1:], expected[1:], slack, strict=True):
        assert a.dtype == dtype
        atol = 2.0**-17 * float(e.abs().max()) + 2.0**-24 + more
        assert_near(a, e, rtol=rounding(dtype) + 2.0**-16, atol=atol)


def compare_with_row_op(backend, leaves, target, weight, options):
    dtype = leaves[0].dtype
    expected, grad_logits = row_op_in_float64(leaves, target, weight, options)
    ones = torch.ones(grad_logits.shape[0])
    slack = (
        product_slack(backend, dtype, grad_logits, leaves[1]),
        product_slack(backend, dtype, grad_logits.t(), leaves[0]),
        product_slack(backend, dtype, grad_logits.t(), ones),
    )
    compare(linear_op(leaves, target, weight, options), expected, dtype, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
def test_equals_the_row_op(backend, dtype, normalized, base):
    leaves, target, weight = inputs(dtype=dtype)
    options = base_of(dtype=dtype) if base else {}
    for row_scale in (None, normal(30, seed=9)):
        full = {**options, "row_scale": row_scale, "exclude": integers(-1, 1200, 30, seed=8), "normalized": normalized}
        compare_with_row_op(backend, leaves, target, weight, full)


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
def test_a_temperature_divides_the_logits(backend, normalized, base):
    """The base's too. Higher than 1, so that float32 products keep the accuracy in exp that `compare` allows."""
    leaves, target, weight = inputs(seed=110)
    options = {**(base_of() if base else {}), "exclude": integers(-1, 1200, 30, seed=118), "normalized": normalized}
    compare_with_row_op(backend, leaves, target, weight, {**options, "temperature": 1.7})


@pytest.mark.parametrize("workspace", [None, "0.1"])
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "rates"])
@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
def test_the_loss_of_each_row_and_its_gradients(backend, monkeypatch, normalized, base, workspace):
    """By another upstream gradient in each row, in one chunk of rows and in several."""
    if workspace is not None:
        monkeypatch.setenv("DAM_WORKSPACE_MB", workspace)
    leaves, target, weight = inputs(seed=120)
    options = {**(base_of() if base else {}), "exclude": integers(-1, 1200, 30, seed=128), "normalized": normalized}
    options |= {"row_scale": normal(30, seed=129), "temperature": 1.3}
    upstream = normal(60, seed=127)[::2]
    expected, _ = rows_in_float64(leaves, target, weight, options, upstream)
    xs = [x.clone().requires_grad_() for x in leaves]
    rows = dam.linear_matching_loss(*xs[:2], target, weight, bias=xs[2], **options, reduction="none")
    rows.backward(upstream)
    assert rows.shape == (30,)
    compare((rows.detach(), *(x.grad for x in xs)), expected, torch.float32)


def test_reductions_of_the_same_rows(backend):
    leaves, target, weight = inputs(seed=130)
    row_scale = normal(30, seed=139)
    for options in ({}, {"row_scale": row_scale}):
        results = {
            reduction: linear_op(leaves, target, weight, {**options, "reduction": reduction})
            for reduction in (None, "sum", "mean")
        }
        rows = dam.linear_matching_loss(*leaves[:2], target, weight, bias=leaves[2], **options, reduction="none")
        total, mean, unset = results["sum"], results["mean"], results[None]
        # The rows are rounded one by one.
        slack = 2 * rounding(torch.float32) * float(rows.double().abs().sum())
        assert_close(rows.double().sum(), total[0], rtol=0, atol=slack)
        for a, b in zip(mean, total, strict=True):
            # Sums of float32 products with another scale; where they cancel they keep the accuracy of the largest.
            assert_close(30 * a, b, rtol=2.0**-18, atol=2.0**-18 * float(b.abs().max()))
        assert all(torch.equal(a, b) for a, b in zip(unset, total if options else mean, strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (True, True, True)])
def test_of_each_row_only_what_requires_it_gets_a_gradient(backend, trained, lora):
    """As of a sum with row_scale for the upstream gradient, bit for bit: the same kernels run."""
    leaves, target, weight = inputs(seed=140)
    factors = [normal(5, 20, seed=145, scale=0.3), normal(1200, 5, seed=146, scale=0.3)] if lora else []
    upstream = normal(30, seed=147)

    def gradients(loss_of):
        xs = [x.clone().requires_grad_(need) for x, need in zip(leaves, trained, strict=True)]
        low = [x.clone().requires_grad_() for x in factors]
        options = {"lora": dam.LoRA(*low, 0.7)} if lora else {}
        loss_of(lambda **more: dam.linear_matching_loss(*xs[:2], target, weight, xs[2], **options, **more))
        return [x.grad for x in (*xs, *low)]

    ours = gradients(lambda loss: loss(reduction="none").backward(upstream))
    expected = gradients(lambda loss: loss(reduction="sum", row_scale=upstream.double()).backward())
    assert [x is not None for x in ours] == [*trained, *[True] * len(factors)]
    for a, b in zip(ours, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_backward_passes_of_the_loss_of_each_row(backend):
    """As many as are asked for, as each forms the gradients; none through another."""
    leaves, target, weight = inputs(seed=150)
    hidden = leaves[0].requires_grad_()
    rows = dam.linear_matching_loss(hidden, leaves[1], target, weight, reduction="none")
    with pytest.raises(RuntimeError, match="linear_matching_loss has no double backward"):
        torch.autograd.grad(rows.sum(), hidden, create_graph=True)
    once, twice = (torch.autograd.grad(rows.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_base_may_share_the_head(backend):
    leaves, target, weight = inputs(seed=10)
    options = base_of()
    options |= {"base_hidden": leaves[0].clone(), "base_head_weight": leaves[1], "base_bias": leaves[2]}
    compare_with_row_op(backend, leaves, target, weight, options)


@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
def test_lora_is_the_merged_head(backend, base):
    """Values, and gradients of everything, its factors among them, where the merged weight passes them on."""
    leaves, target, weight = inputs(seed=100)
    options = base_of() if base else {}
    factors = normal(5, 20, seed=105, scale=0.3), normal(1200, 5, seed=106, scale=0.3)
    a, b = (x.clone().requires_grad_() for x in factors)
    hidden, head, bias = (x.clone().requires_grad_() for x in leaves)
    loss = dam.linear_matching_loss(hidden, head, target, weight, bias=bias, lora=dam.LoRA(a, b, 0.7), **options)
    loss.backward()
    merged = leaves[1].double() + 0.7 * factors[1].double() @ factors[0].double()
    expected, grad_logits = row_op_in_float64((leaves[0], merged, leaves[2]), target, weight, options)
    compare((loss.detach(), hidden.grad, head.grad, bias.grad), expected, torch.float32)
    outer = 0.7 * grad_logits.t() @ leaves[0].double()  # of b @ a
    for actual, wanted in ((a.grad, factors[1].double().t() @ outer), (b.grad, outer @ factors[0].double().t())):
        # Sums of 30 x 1200 float32 products, as above.
        assert_near(actual, wanted, rtol=2.0**-16, atol=2.0**-17 * float(wanted.abs().max()))
    frozen = [x.clone().requires_grad_() for x in factors]
    dam.linear_matching_loss(
        *leaves[:2], target, weight, bias=leaves[2], lora=dam.LoRA(*frozen, 0.7), **options
    ).backward()
    for x, wanted in zip(frozen, (a.grad, b.grad), strict=True):
        assert_near(x.grad, wanted, rtol=2.0**-18, atol=2.0**-19 * float(wanted.abs().max()))


@pytest.mark.parametrize("workspace", ["0.001", "0.1"])
def test_small_workspace_changes_nothing(backend, monkeypatch, workspace):
    """One row at a time, or a few; row_scale, unless given, stays 1/T of all rows."""
    leaves, target, weight = inputs(5 if slow(backend) and workspace == "0.001" else 30, seed=20)
    base = base_of(len(target))
    whole = linear_op(leaves, target, weight, base)
    monkeypatch.setenv("DAM_WORKSPACE_MB", workspace)
    compare(linear_op(leaves, target, weight, base), whole, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [False, True], ids=["", "base"])
def test_memory_is_bounded_by_the_workspace(backend, monkeypatch, dtype, base):
    """[T, V] in float32 would be 4 MB."""
    leaves, target, weight = inputs(256, 16, 4096, 2, dtype=dtype, seed=30)
    options = base_of(256, 16, 4096, dtype=dtype) if base else {}
    for x in leaves:
        x.requires_grad_()
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    peak, _ = peak_bytes(lambda: dam.linear_matching_loss(*leaves[:2], target, weight, bias=leaves[2], **options))
    # Besides the workspace: gradients and their float32 accumulators 0.6 MB, float32 copies of head blocks 0.4 MB.
    # On a CPU, which multiplies no bfloat16 into float32, also one of the gradient that the simulated kernels make.
    copied = backend != "torch" and slow(backend) and dtype == torch.bfloat16
    assert peak < (4 if copied else 2) * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "softcap"), [(False, None), (True, 3.0)], ids=["", "base, capped"])
def test_the_gradient_of_all_logits_may_be_held(backend, monkeypatch, dtype, base, softcap):
    """By rows and whole, of several chunks: the same gradients, of the head, its bias and an adapter.

    In bfloat16 in one piece, in float32 in two: 36,000 entries of it, where the head's gradient in float32 has 24,000.
    """
    if os.environ.get("DAM_LINEAR_FORM") == "fused":
        pytest.skip("a form of the library's matmul")
    leaves, target, weight = inputs(dtype=dtype, seed=160)
    options = {**(base_of(dtype=dtype) if base else {}), "exclude": integers(-1, 1200, 30, seed=168)}
    factors = normal(5, 20, seed=165, scale=0.3, dtype=dtype), normal(1200, 5, seed=166, scale=0.3, dtype=dtype)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.05")

    def gradients(form):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        added = count_of_additions(monkeypatch)
        xs = [x.clone().requires_grad_() for x in (*leaves, *factors)]
        lora = dam.LoRA(*xs[3:], 0.7)
        loss = dam.linear_matching_loss(*xs[:2], target, weight, xs[2], lora=lora, softcap=softcap, **options)
        return [loss.detach(), *torch.autograd.grad(loss, xs)], len(added)

    (ours, once), (expected, many) = gradients("whole"), gradients("rows")
    stays = _head.gradient_dtype(_head.Projection(leaves[0], leaves[1]), backend) == torch.bfloat16
    assert once == (1 if stays else 2) < many
    assert_close(ours[0], expected[0], rtol=2.0**-20, atol=2.0**-20)  # summed over other chunks
    for a, b in zip(ours[1:], expected[1:], strict=True):
        # Sums of as many products of the same numbers in float32, in another order, and a rounding to the dtype.
        rtol = 2 * rounding(dtype) + 2.0**-16
        assert_close(a.float(), b.float(), rtol=rtol, atol=(2.0**-17 + rounding(dtype) / 8) * float(b.abs().max()))


def count_of_additions(monkeypatch):
    """A list that gets an entry for every chunk whose gradient is multiplied on."""
    added, add = [], _head.Gradients.add

    def counted(self, *arguments):
        added.append(arguments)
        return add(self, *arguments)

    monkeypatch.setattr(_head.Gradients, "add", counted)
    return added


def test_which_form_the_gradient_of_a_trained_head_takes(monkeypatch):
    """Whole as long as what is held is no more than the head's gradient in float32, or than the workspace."""
    monkeypatch.delenv("DAM_LINEAR_FORM", raising=False)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "256")

    def chosen(rows, columns=126_464, size=4096, *, dtype=torch.bfloat16, trained=True, backend="cuda"):
        hidden, weight = (torch.empty(n, size, dtype=dtype, device="meta") for n in (rows, columns))
        needed = (True, trained, False, False, False)
        return _head.form(_head.Projection(hidden, weight, None), needed, arrays=1, backend=backend)

    assert chosen(8192) == chosen(8192, backend="triton") == "whole"  # T <= 2 D
    assert chosen(32_768) == "whole"  # in four pieces
    assert chosen(8192, trained=False) == "rows"
    assert chosen(256) == "rows"  # one chunk
    assert chosen(4096, 262_144, 256) == "columns"  # 512 rows could be held
    assert chosen(4096, 262_144, 256, backend="triton") == "rows"
    assert chosen(512, 262_144, 256) == "whole"
    # Nothing is added in another dtype: by chunks of many rows, or by columns.
    assert chosen(8192, dtype=torch.float32) == "columns" and chosen(4096, 40_000, 64, dtype=torch.float32) == "rows"
    for form in ("rows", "whole", "columns"):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        assert chosen(8192) == chosen(8192, trained=False) == form


@pytest.mark.skipif(choice.why_unavailable("triton") is not None, reason="Triton kernels cannot run here")
def test_a_trained_head_is_fused_in_triton_only_where_chunks_would_be_added(monkeypatch):
    monkeypatch.delenv("DAM_LINEAR_FORM", raising=False)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "256")

    def fused(rows, *, dtype=torch.bfloat16, trained=True):
        hidden, weight = (torch.empty(n, 512, dtype=dtype, device="meta") for n in (rows, 126_464))
        monkeypatch.setattr(configs, "device_name", lambda device: "a GPU")
        return _linear.fused("linear_matching_loss", _head.Projection(hidden, weight), (True, trained, *[False] * 3))

    assert not fused(100) and not fused(1024)  # one chunk; all held
    assert not fused(8192)  # 1,024 rows held at a time
    assert fused(8192, dtype=torch.float16) and not fused(8192, dtype=torch.float16, trained=False)
    assert not fused(100, dtype=torch.float16)
    monkeypatch.setenv("DAM_LINEAR_FORM", "fused")
    assert fused(100)


def test_a_form_that_a_backend_lacks_leaves_the_choice_to_it(monkeypatch):
    def asked(backend, form):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        return forms.asked(backend)

    for backend in IMPLEMENTATIONS:
        assert [asked(backend, form) for form in ("", "auto", "rows")] == [None, None, "rows"]
        assert asked(backend, "fused") == ("fused" if backend == "triton" else None)
        assert asked(backend, "columns") == ("columns" if backend == "cuda" else None)


def test_wrong_form(backend, monkeypatch):
    monkeypatch.setenv("DAM_LINEAR_FORM", "both")
    leaves, target, weight = inputs()
    message = "DAM_LINEAR_FORM must be one of auto, fused, chunked, rows, whole, columns; got 'both'"
    for call in (
        lambda: dam.linear_matching_loss(*leaves[:2], target, weight),
        lambda: dam.linear_log_prob(*leaves[:2], target),
        lambda: dam.linear_jump(*leaves[:2]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_it_gets_a_gradient(backend, trained):
    leaves, target, weight = inputs(seed=40)
    everything = linear_op(leaves, target, weight, {})
    for x, need in zip(leaves, trained, strict=True):
        x.requires_grad_(need)
    dam.linear_matching_loss(*leaves[:2], target, weight, bias=leaves[2]).backward()
    for x, need, gradient in zip(leaves, trained, everything[1:], strict=True):
        assert (x.grad is not None) == need
        if need:
            # That of hidden states is a sum over parts of the columns, which are others where the head's is wanted
            # too: in another order V terms lose some sqrt(V) roundings. The others are the same to the bit, but for
            # logits that Triton's interpreter forms by numpy, whose products of D terms round by their shape.
            terms = leaves[1].shape[0] if x is leaves[0] else leaves[0].shape[1] if backend == "triton" else 0
            slack = terms**0.5 * rounding(x.dtype) * float(gradient.abs().max())
            assert_close(x.grad, gradient, rtol=0.0, atol=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_no_matmul(backend, dtype, monkeypatch):
    """Products with the head: logits, and the gradient of hidden; the head's own gradient would be a third."""
    made = []
    for name in ("product", "product_hidden", "product_weight"):  # of the C++ backend, which no profiler sees
        whole = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *arguments, whole=whole: made.append(1) or whole(*arguments))
    leaves, target, weight = inputs(seed=41, dtype=dtype)
    leaves[0].requires_grad_()

    def count(head_needs):
        leaves[1].requires_grad_(head_needs)
        made.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            dam.linear_matching_loss(*leaves[:2], target, weight)
        return len(made) + sum(
            e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear") for e in profile.events()
        )

    assert count(False) < count(True)


def test_everything_else_is_detached(backend):
    leaves, target, weight = inputs(seed=42)
    options = {**base_of(), "row_scale": normal(30, seed=46)}
    others = [weight, *options.values()]
    for x in others:
        x.requires_grad_()
    assert not dam.linear_matching_loss(*leaves[:2], target, weight, bias=leaves[2], **options).requires_grad
    leaves[0].requires_grad_()
    dam.linear_matching_loss(*leaves[:2], target, weight, bias=leaves[2], **options).backward()
    assert all(x.grad is None for x in others)


def test_gradient_flows_on_into_the_network(backend):
    leaves, target, weight = inputs(seed=43)
    layer = normal(20, 20, seed=47, scale=0.3).requires_grad_()
    dam.linear_matching_loss(torch.tanh(leaves[0] @ layer), leaves[1], target, weight).backward()
    wide = layer.detach().double().requires_grad_()
    with dam.backend("torch"):
        logits = torch.tanh(leaves[0].double() @ wide) @ leaves[1].double().T
        dam.matching_loss(logits, target, weight).backward()
    assert_close(layer.grad, wide.grad, rtol=2.0**-16, atol=2.0**-17 * float(wide.grad.abs().max()))


def test_upstream_gradient_and_second_backward(backend):
    leaves, target, weight = inputs(seed=44)
    plain, scaled = linear_op(leaves, target, weight, {}), linear_op(leaves, target, weight, {}, upstream=-2.0)
    # A power of two scales exactly.
    assert all(torch.equal(-2.0 * a, b) for a, b in zip(plain[1:], scaled[1:], strict=True))
    hidden = leaves[0].requires_grad_()
    loss = dam.linear_matching_loss(hidden, leaves[1], target, weight)
    with pytest.raises(RuntimeError, match="linear_matching_loss has no double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_matching_loss was differentiated twice"):
        loss.backward()


def test_strides_and_empty(backend):
    wide, head = normal(60, 30, seed=48, scale=0.4), normal(1200, 30, seed=49)
    leaves, target, weight = inputs(seed=45)
    strided, dense = (
        (wide[::2, :20], head[:, :20], leaves[2]),
        (wide[::2, :20].clone(), head[:, :20].clone(), leaves[2]),
    )
    for a, b in zip(linear_op(strided, target, weight, {}), linear_op(dense, target, weight, {}), strict=True):
        assert_close(a, b, rtol=2.0**-18, atol=2.0**-19)
    empty = linear_op((leaves[0][:0], *leaves[1:]), target[:0], weight[:0], {})
    assert empty[0] == 0 and all(bool((g == 0).all()) for g in empty[1:])
    x = leaves[0][:0].clone().requires_grad_()
    rows = dam.linear_matching_loss(x, leaves[1], target[:0], weight[:0], reduction="none")
    rows.backward(torch.ones(0))
    assert rows.shape == (0,) and x.grad.shape == (0, 20)
    no_targets = linear_op(leaves, target[:, :0], weight[:, :0], {})
    assert no_targets[0] == 0 and all(bool((g == 0).all()) for g in no_targets[1:])


@pytest.mark.of_the_op
def test_opcheck(backend):
    leaves, target, weight = inputs(4, 5, 30, seed=60)
    hidden, head, bias = (x.requires_grad_() for x in leaves)
    *base, base_weight = base_of(4, 6, 30).values()
    low = (normal(4, 3, seed=66).requires_grad_(), normal(30, 3, seed=67).requires_grad_())
    # overwrite=False: opcheck calls backward more than once.
    tail = ([True] * 5, backend, False)
    excluding = (torch.tensor([0, -1, 3, 29]), torch.arange(30) % 5 == 2)
    base = (*base, 3.0, base_weight)
    args = (hidden, head, bias, *low, 2.0, target, weight, *base, normal(4, seed=65), *excluding, False, 0.7, *tail)
    torch.library.opcheck(module._linear_matching_loss.overload, args)
    tail = ([True, False, False, False, False], backend, False)
    args = (hidden, head.detach(), *[None] * 4, target, weight, *[None] * 8, True, 1.0, *tail)
    torch.library.opcheck(module._linear_matching_loss.overload, args)


@pytest.mark.of_the_op
def test_opcheck_of_each_row(backend):
    leaves, target, weight = inputs(4, 5, 30, seed=60)
    hidden, head, bias = (x.requires_grad_() for x in leaves)
    *base, base_weight = base_of(4, 6, 30).values()
    low = (normal(4, 3, seed=66).requires_grad_(), normal(30, 3, seed=67).requires_grad_())
    row_scale = normal(4, seed=65)
    excluding = (torch.tensor([0, -1, 3, 29]), torch.arange(30) % 5 == 2)
    base = (*base, 3.0, base_weight)
    args = (hidden, head, bias, *low, 2.0, target, weight, *base, row_scale, *excluding, False, 0.7)
    torch.library.opcheck(module._linear_matching_loss_rows.overload, (*args, backend))
    args = (hidden, head.detach(), *[None] * 4, target, weight, *[None] * 5, row_scale, None, None, True, 1.0)
    torch.library.opcheck(module._linear_matching_loss_rows.overload, (*args, backend))


@pytest.mark.parametrize("reduction", [None, "none"])
@pytest.mark.of_the_op
def test_compiled_equals_eager(backend, reduction):
    leaves, target, weight = inputs(6, 5, 30, seed=70)
    options = {**base_of(6, 4, 30), "exclude": 3, "reduction": reduction, "temperature": 1.5 if reduction else 1.0}
    upstream = normal(6, seed=71) if reduction == "none" else torch.tensor(3.0)

    def step(hidden, head, bias):
        return dam.linear_matching_loss(hidden * 2, head, target, weight, bias=bias, **options)

    torch.compiler.reset()  # it compiles a function for so many cases only
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        xs = [x.clone().requires_grad_() for x in leaves]
        loss = function(*xs)
        loss.backward(upstream)
        results.append([loss.detach(), *(x.grad for x in xs)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=4 * rounding(torch.float32), atol=2.0**-22)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(())}, ValueError, r"hidden must have shape \[..., D\]; got \[\]"),
        ({"head_weight": torch.zeros(5, 3)}, ValueError, r"head_weight must have shape \[V, 4\].*got \[5, 3\]"),
        ({"head_weight": torch.zeros(5, 4).half()}, TypeError, "head_weight must have the dtype.*got torch.float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\]; got \[4\]"),
        ({"target": torch.arange(3)}, ValueError, r"target must have shape \[3, J\]; got \[3\]"),
        ({"target": torch.full((3, 2), 5)}, ValueError, r"target must be -1 or in \[0, 5\); got 5"),
        (
            {"weight": torch.zeros(3, 1)},
            ValueError,
            r"weight must have the shape of target, \[3, 2\]; got \[3, 1\]",
        ),
        ({"row_scale": torch.ones(2)}, ValueError, r"row_scale must have shape \[3\]; got \[2\]"),
        (
            {"base_weight": torch.ones(3)},
            ValueError,
            "base_hidden, base_head_weight and base_weight must be given together",
        ),
        (
            {"base_bias": torch.ones(5)},
            ValueError,
            "base_hidden, base_head_weight and base_weight must be given together",
        ),
        (
            {"base_hidden": torch.zeros(2, 4)},
            ValueError,
            r"base_hidden must have shape \[3, D\] like hidden; got \[2, 4\]",
        ),
        ({"base_head_weight": torch.zeros(6, 4)}, ValueError, r"base_head_weight must have 5 rows.*got \[6, 4\]"),
        (
            {"base_head_weight": torch.zeros(5, 3)},
            ValueError,
            r"base_head_weight must have shape \[V, 4\].*got \[5, 3\]",
        ),
        ({"exclude": torch.tensor([0, 5, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"temperature": -1.0}, ValueError, r"temperature must be in \[1e-30, 1e\+30\]; got -1.0"),
        ({"reduction": True}, ValueError, """reduction must be None, "none", "sum" or "mean"; got True"""),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {
        "hidden": torch.zeros(3, 4),
        "head_weight": torch.zeros(5, 4),
        "target": torch.zeros(3, 2, dtype=torch.int64),
        "weight": torch.ones(3, 2),
    }
    if set(arguments) & {"base_hidden", "base_head_weight"}:
        good |= {"base_hidden": torch.zeros(3, 4), "base_head_weight": torch.zeros(5, 4), "base_weight": torch.ones(3)}
    with pytest.raises(error, match=f"^linear_matching_loss: .*{message}"):
        dam.linear_matching_loss(**{**good, **arguments})
