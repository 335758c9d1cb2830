"""linear_log_prob: `log_prob` on the head's logits and its gradients, without a [T, V] array of logits."""

import os

import pytest
import torch
from helpers import (
    assert_close,
    assert_near,
    integers,
    log_softmax,
    normal,
    peak_bytes,
    product_slack,
    rounding,
    slow,
)

import dam
from dam.kernels.excluded import Excluded
from dam.kernels.projection import Projection
from dam.ops import _head
from dam.ops import linear_log_prob as module

IMPLEMENTATIONS = tuple(module._IMPLEMENTATIONS)
FORMS = ("fused", "chunked")


def inputs(rows=30, size=20, columns=1200, targets=2, *, dtype=torch.float32, seed=0):
    hidden, weight = normal(rows, size, seed=seed, dtype=dtype), normal(columns, size, seed=seed + 1, dtype=dtype)
    bias = normal(columns, seed=seed + 2, dtype=dtype)
    return hidden, weight, bias, integers(-1, columns, rows, targets, seed=seed + 3)


def reference(hidden, weight, bias, target, exclude=-1, temperature=1.0):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    value = log_softmax(logits, exclude, temperature).gather(1, target.clamp(min=0))
    return torch.where(target < 0, 0.0, value)


def gradients(function, tensors, upstream):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(backend, dtype, with_bias):
    hidden, weight, bias, target = inputs(dtype=dtype)
    exclude = integers(-1, 1200, 30, seed=9)
    exclude = torch.where((exclude[:, None] == target).any(1), -1, exclude)
    upstream, options = normal(30, 2, seed=10), {"exclude": exclude, "temperature": 0.8}
    tensors = (hidden, weight, bias if with_bias else None)
    actual = gradients(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b, **options), tensors, upstream)
    wide = [None if x is None else x.double() for x in tensors]
    expected = gradients(lambda h, w, b: reference(h, w, b, target, **options), wide, upstream)
    logits = (hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)).requires_grad_()
    reference(logits, torch.eye(1200, dtype=torch.float64), None, target, **options).backward(upstream.double())
    factors = ((logits.grad, weight), (logits.grad.t(), hidden), (logits.grad.t(), torch.ones(30)))
    # Logits near 20 rounded to float32 after sums of 20 products: 2^-19 of them.
    assert actual[0].dtype == torch.float32
    assert_close(actual[0], expected[0], rtol=2.0**-19, atol=2.0**-17)
    for a, e, (grad_logits, factor) in zip(actual[1:], expected[1:], factors, strict=False):
        assert a.dtype == dtype
        slack = product_slack(backend, dtype, grad_logits, factor)
        atol = 2.0**-17 * float(e.abs().max()) + 2.0**-24 + slack
        assert_near(a, e, rtol=rounding(dtype) + 2.0**-16, atol=atol)


def test_equals_the_row_op(backend):
    hidden, weight, bias, target = inputs(seed=20)
    options = {"exclude": integers(-1, 1200, 30, seed=24), "temperature": 1.3}
    logits = hidden @ weight.T + bias
    expected = dam.log_prob(logits, target, **options)
    value = dam.linear_log_prob(hidden, weight, target, bias=bias, **options)
    # The matmul may round otherwise in another shape.
    assert_close(value, expected, rtol=2.0**-20, atol=2.0**-18)
    one = dam.linear_log_prob(hidden, weight, target[:, 0], bias=bias, **options)
    assert one.shape == (30,) and torch.equal(one, value[:, 0])


def test_small_workspace_changes_nothing(backend, monkeypatch):
    """Two rows at a time; gradients of the head then add up over 15 chunks."""
    hidden, weight, bias, target = inputs(seed=30)
    upstream = normal(30, 2, seed=34)

    def run():
        return gradients(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b), (hidden, weight, bias), upstream)

    whole = run()
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.03")
    for a, b in zip(run(), whole, strict=True):
        assert_close(a, b, rtol=2.0**-18, atol=2.0**-19 * float(b.abs().max()))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_few_logits_are_kept_for_the_backward_pass(backend, monkeypatch, softcap):
    """Then they are computed once, and gradients are those of logits that are computed again, any number of times."""
    if backend not in module._KEEPS:
        pytest.skip("computes them again in any case")
    hidden, weight, bias, target = inputs(seed=66)
    upstream, made, logits = normal(*target.shape, seed=67), [], _head._products
    monkeypatch.setattr(_head, "_products", lambda *arguments: made.append(1) or logits(*arguments))

    def run():
        made.clear()
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        value = dam.linear_log_prob(*leaves[:2], target, bias=leaves[2], softcap=softcap)
        both = [torch.autograd.grad(value, leaves, upstream, retain_graph=again) for again in (True, False)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        return value.detach(), *both[0]

    kept = run()
    assert len(made) == 1
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.03")
    again = run()
    assert len(made) > 3
    for a, b in zip(kept, again, strict=True):
        assert_close(a, b, rtol=2.0**-18, atol=2.0**-18 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_all_logits_may_be_held(backend, monkeypatch, dtype):
    """By rows and whole, of several chunks: the same gradients. In float32 in two pieces, of 15 rows and of 14."""
    if os.environ.get("DAM_LINEAR_FORM") == "fused":
        pytest.skip("a form of the library's matmul")
    hidden, weight, bias, target = inputs(29, dtype=dtype, seed=60)
    upstream = normal(*target.shape, seed=64)
    monkeypatch.setenv("DAM_WORKSPACE_MB", "0.03")

    def run(form):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        return gradients(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b), (hidden, weight, bias), upstream)

    for a, b in zip(run("whole"), run("rows"), strict=True):
        # Sums of as many products of the same numbers in float32, in another order, and a rounding to the dtype.
        rtol = 2 * rounding(a.dtype) + 2.0**-18
        assert_close(a, b, rtol=rtol, atol=(2.0**-19 + rounding(a.dtype) / 8) * float(b.abs().max()))


def test_what_is_held_takes_less_than_the_gradient_of_the_head_in_float32(backend, monkeypatch):
    """2 T V bytes, 2 MB, where the head's gradient in float32 would be 8 MB beside its result of 4."""
    if backend != "cuda":
        pytest.skip("a form that is chosen where the gradient of logits stays in bfloat16")
    hidden, weight, bias, target = inputs(256, 512, 4096, 1, dtype=torch.bfloat16, seed=40)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    value = dam.linear_log_prob(hidden, weight, target, bias=bias)
    peaks = {}
    for form in ("auto", "rows"):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        peaks[form], _ = peak_bytes(lambda: torch.autograd.grad(value.sum(), leaves, retain_graph=True))
    # Beside what is held: gradients of 4.3 MB, the workspace, 0.5 MB of dX in float32, copies of blocks of 4. By rows
    # gradient and copies too, 8 MB in float32 and the sums that are added to it.
    assert peaks["auto"] < (2 + 4.3 + 1 + 0.5 + 4) * 2**20
    assert peaks["rows"] > (8 + 4.3) * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_by_the_workspace(backend, monkeypatch, dtype):
    """[T, V] in float32 would be 4 MB."""
    hidden, weight, bias, target = inputs(256, 16, 4096, 1, dtype=dtype, seed=40)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    peak, value = peak_bytes(lambda: dam.linear_log_prob(hidden, weight, target, bias=bias))
    # Besides the workspace: outputs and a float32 copy of a block of the head, 0.4 MB together.
    assert peak < 1.4 * 2**20
    peak, _ = peak_bytes(lambda: torch.autograd.grad(value.sum(), leaves, retain_graph=True))
    # And twice the gradients in float32, 0.6 MB. On a CPU, which multiplies no bfloat16 into float32, also a copy of
    # the logits' gradient that the simulated kernels make.
    copied = backend != "torch" and slow(backend) and dtype == torch.bfloat16
    assert peak < (4 if copied else 2) * 2**20


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_it_gets_a_gradient(backend, trained):
    tensors = inputs(seed=50)
    target = tensors[3]
    leaves = [x.requires_grad_(need) for x, need in zip(tensors[:3], trained, strict=True)]
    everything = gradients(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b), leaves, torch.ones(target.shape))
    dam.linear_log_prob(*leaves[:2], target, bias=leaves[2]).sum().backward()
    for x, need, gradient in zip(leaves, trained, everything[1:], strict=True):
        assert (x.grad is not None) == need
        if need:
            # That of hidden states is a sum over parts of the columns, which are others where the head's is wanted
            # too: in another order V terms lose some sqrt(V) roundings. The others are the same to the bit, but for
            # logits that Triton's interpreter forms by numpy, whose products of D terms round by their shape.
            terms = leaves[1].shape[0] if x is leaves[0] else leaves[0].shape[1] if backend == "triton" else 0
            slack = terms**0.5 * rounding(x.dtype) * float(gradient.abs().max())
            assert_close(x.grad, gradient, rtol=0.0, atol=slack)
    needs = [True, True, True]
    needs[trained.index(True)] = False
    args = (
        torch.ones(target.shape),
        *[x.detach() for x in leaves],
        None,
        None,
        None,
        target,
        torch.zeros(30, dtype=torch.float64),
        torch.zeros(0, 0),
        None,
        None,
        1.0,
    )
    formed = module._linear_log_prob_backward(*args, [*trained, False, False], backend)
    assert [x.numel() > 0 for x in formed] == [*trained, False, False]


def test_upstream_gradients_of_any_stride(backend, monkeypatch):
    hidden, weight, bias, target = inputs(seed=60)
    for upstream in (torch.ones(1, 1).expand(30, 2), normal(2, 30, seed=64).t(), normal(30, 1, seed=65).expand(30, 2)):
        results = [
            gradients(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b), (hidden, weight, bias), g)
            for g in (upstream, upstream.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strides_and_empty(backend):
    hidden, weight, target = normal(20, 30, seed=70), normal(14, 40, seed=71), integers(0, 7, 10, 4, seed=72)
    strided = dam.linear_log_prob(hidden[::2, :24], weight[::2, :24], target[:, ::2])
    dense = dam.linear_log_prob(hidden[::2, :24].clone(), weight[::2, :24].clone(), target[:, ::2].clone())
    assert_close(strided, dense, rtol=2.0**-20, atol=2.0**-20)
    leaf = hidden[:0, :24].clone().requires_grad_()
    value = dam.linear_log_prob(leaf, weight[:, :24], target[:0])
    value.sum().backward()
    assert value.shape == (0, 4) and leaf.grad.shape == (0, 24)
    assert dam.linear_log_prob(hidden[:10, :24], weight[:, :24], target[:, :0]).shape == (10, 0)


def test_an_adapter_needs_no_more_memory(backend, monkeypatch):
    """No second array of logits for its product. [T, V] in float32 would be 4 MB."""
    hidden, weight, _, target = inputs(256, 16, 4096, 1, seed=118)
    lora = dam.LoRA(normal(3, 16, seed=119), normal(4096, 3, seed=120))
    monkeypatch.setenv("DAM_WORKSPACE_MB", "1")
    peak, _ = peak_bytes(lambda: dam.linear_log_prob(hidden, weight, target, lora=lora))
    # As above, and what keeps 256 rows' sums.
    assert peak < 1.4 * 2**20


def test_lora_is_the_merged_head(backend):
    hidden, weight, bias, target = inputs(seed=110)
    a, b = normal(5, 20, seed=115, scale=0.3), normal(1200, 5, seed=116, scale=0.3)
    upstream, options = normal(30, 2, seed=117), {"temperature": 1.3}
    actual = gradients(
        lambda h, w, c, x, y: dam.linear_log_prob(h, w, target, bias=c, lora=dam.LoRA(x, y, -0.7), **options),
        (hidden, weight, bias, a, b),
        upstream,
    )
    expected = gradients(
        lambda h, w, c, x, y: reference(h, w - 0.7 * y @ x, c, target, **options),
        [x.double() for x in (hidden, weight, bias, a, b)],
        upstream,
    )
    for x, e in zip(actual, expected, strict=True):
        # As in test_matches_float64.
        assert_near(x, e, rtol=2.0**-16, atol=2.0**-17 * float(e.abs().max()))


def test_gradcheck():
    hidden, weight, bias, target = inputs(3, 4, 6, seed=80, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"exclude": torch.tensor([-1, 2, 0]), "temperature": 0.9}
    target = torch.tensor([[0, -1], [1, 1], [5, 2]])
    assert torch.autograd.gradcheck(lambda h, w, b: dam.linear_log_prob(h, w, target, bias=b, **options), leaves)


@pytest.mark.of_the_op
def test_opcheck(backend):
    hidden, weight, bias, target = inputs(4, 5, 30, seed=90)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    low = (normal(4, 3, seed=93).requires_grad_(), normal(30, 3, seed=94).requires_grad_())
    torch.library.opcheck(
        module._linear_log_prob.overload, (*leaves, *low, 2.0, target, None, None, 1.0, False, backend)
    )
    excluding = (torch.tensor([0, -1, 3, 29]), torch.arange(30) % 5 == 2)
    torch.library.opcheck(
        module._linear_log_prob.overload, (*leaves[:2], *[None] * 4, target, *excluding, 0.5, True, backend)
    )


@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    hidden, weight, bias, target = inputs(6, 5, 30, seed=100)

    def value(h, w, b):
        return dam.linear_log_prob(h, w, target, bias=b, exclude=3) * 2

    upstream = normal(6, 2, seed=104)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    results = [gradients(f, (hidden, weight, bias), upstream) for f in (value, compiled)]
    for eager, other in zip(*results, strict=True):
        assert_close(other, eager, rtol=4 * rounding(torch.float32), atol=2.0**-22)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(())}, ValueError, r"hidden must have shape \[..., D\]; got \[\]"),
        (
            {"head_weight": torch.zeros(5, 3)},
            ValueError,
            r"head_weight must have shape \[V, 4\] to fit.*got \[5, 3\]",
        ),
        (
            {"head_weight": torch.zeros(5, 4).half()},
            TypeError,
            "head_weight must have the dtype of.*got torch.float16",
        ),
        ({"bias": torch.zeros(5, 1)}, ValueError, r"bias must have shape \[5\]; got \[5, 1\]"),
        ({"target": torch.arange(4)}, ValueError, r"target must have shape \[3\] or \[3, J\]; got \[4\]"),
        ({"target": torch.tensor([0, 5, 0])}, ValueError, r"target must be -1 or in \[0, 5\); got 5"),
        ({"target": torch.arange(3.0)}, TypeError, "target must be int64; got torch.float32"),
        ({"exclude": torch.tensor([0, 5, 0])}, ValueError, r"exclude must be -1 or in \[0, 5\); got 5"),
        ({"temperature": 0.0}, ValueError, "temperature must be .*; got 0.0"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    good = {"hidden": torch.zeros(3, 4), "head_weight": torch.zeros(5, 4), "target": torch.arange(3)}
    with pytest.raises(error, match=f"^linear_log_prob: .*{message}"):
        dam.linear_log_prob(**{**good, **arguments})


def test_parts_that_are_all_rows_are_what_they_are_parts_of():
    """No view is made of them; fewer rows, and columns, are as ever."""
    head = Projection(torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), torch.randn(4, 2), torch.randn(5, 2), 2.0)
    assert head.part(slice(0, 4)) is head
    assert head.part(slice(0, 4), slice(0, 5)) is head
    for rows, columns in ((slice(1, 4), slice(None)), (slice(0, 3), slice(0, 5)), (slice(0, 4), slice(0, 4))):
        part = head.part(rows, columns)
        assert torch.equal(part.hidden, head.hidden[rows]) and torch.equal(part.low_hidden, head.low_hidden[rows])
        for name in ("weight", "bias", "low_weight"):
            assert torch.equal(getattr(part, name), getattr(head, name)[columns])
    excluded = Excluded(torch.tensor([1, -1, 0]), None)
    assert excluded.part(slice(0, 3)) is excluded
    assert excluded.part(slice(1, 3)).row.tolist() == [-1, 0]
