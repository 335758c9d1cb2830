"""`suppress`, a set of destinations that no row has: what every op gives is what logits of -inf there would give."""

import math

import numpy as np
import pytest
import torch
from helpers import integers, normal, same

import dam
from dam.backends import address
from tests import calls

INF = math.inf
V = 2 * 1024 + 77  # no multiple of a byte's bits, a word's or a tile
ROWS = 5


def columns_of(*parts):
    """bool [V], True in these slices and at these columns."""
    suppressed = torch.zeros(V, dtype=torch.bool)
    for part in parts:
        suppressed[part] = True
    return suppressed


SETS = {
    "nothing": columns_of(),
    "few": columns_of(0, 7, 8, 1023, 1024, 1300, V - 1),
    "tail": columns_of(slice(V - 77, None)),
    "a tile and more": columns_of(slice(1000, 2048), 3),
    "odd": columns_of(slice(1, None, 2)),
    "all but one": ~columns_of(1500),
}


# Kernels treat a set alike in all dtypes but for the order in which a tile is loaded.
CASES = [
    ("nothing", torch.float32),
    ("few", torch.bfloat16),
    ("tail", torch.float16),
    ("a tile and more", torch.float32),
    ("a tile and more", torch.bfloat16),
    ("odd", torch.float16),
    ("all but one", torch.float32),
    ("all but one", torch.bfloat16),
]


def each(*cases):
    return pytest.mark.parametrize(("name", "dtype"), cases, ids=[f"{name}, {str(dtype)[6:]}" for name, dtype in cases])


def set_of(name):
    return SETS[name].to(torch.get_default_device())


def targets(suppressed):
    """int64 [ROWS, 4], some of them suppressed, one empty; and what each row excludes, some of it suppressed too."""
    target = integers(0, V, ROWS, 4, seed=1)
    inside = suppressed.nonzero()[:, 0]
    if len(inside):
        target[:3, 0] = inside[integers(0, len(inside), 3, seed=2)]
        target[3] = inside[0]
    target[1, 2] = -1
    exclude = integers(-1, V, ROWS, seed=3)
    exclude[0], exclude[2] = target[0, 0], target[2, 1]
    exclude[exclude == 1500] = -1  # what is left of all but one
    return target, exclude


def reaching(x, suppressed):
    """-inf at the suppressed columns: to compare with."""
    return x.detach().masked_fill(suppressed, -INF)


def differentiated(value, *leaves, upstream=None):
    return (value.detach(), *torch.autograd.grad(value, leaves, upstream))


@each(*CASES)
def test_draws(backend, name, dtype):
    suppressed = set_of(name)
    logits = normal(ROWS, V, seed=4, scale=3.0, dtype=dtype)
    _, exclude = targets(suppressed)
    for options in ({"num_samples": 3}, {"temperature": 0}, {"temperature": 0.7, "num_samples": 5}):
        drawn = dam.jump(logits, exclude=exclude, suppress=suppressed, seed=5, **options)
        assert not bool(suppressed[drawn.target].any())
        assert same(drawn, dam.jump(reaching(logits, suppressed), exclude=exclude, seed=5, **options))


@each(*CASES)
def test_log_probabilities_and_entropy(backend, name, dtype):
    suppressed = set_of(name)
    logits = normal(ROWS, V, seed=6, scale=3.0, dtype=dtype)
    (target, exclude), slope = targets(suppressed), normal(ROWS, seed=8)
    never = suppressed[target.clamp(min=0)] & (target >= 0)
    lost = never | (target == exclude[:, None])
    upstream = normal(ROWS, 4, seed=7)
    for temperature in (1.0, 0.8):
        options = {"exclude": exclude, "temperature": temperature}
        x, y = logits.clone().requires_grad_(), reaching(logits, suppressed).requires_grad_()
        value = dam.log_prob(x, target, suppress=suppressed, **options)
        assert torch.equal(value == -INF, lost)
        # Whatever flows back to a target that cannot be reached stops there.
        ours = differentiated(value, x, upstream=upstream)
        kept = dam.log_prob(y, target.where(~never, -1), **options)
        theirs = differentiated(kept, y, upstream=upstream)
        assert torch.equal(ours[0].where(~never, 0.0), theirs[0]) and torch.equal(ours[1], theirs[1])
        assert bool((ours[1][:, suppressed] == 0).all())

        both = dam.log_prob(x, target, suppress=suppressed, entropy=True, **options)
        assert torch.equal(both.log_prob == -INF, lost)
        alone = dam.entropy(y, **options)
        assert torch.equal(both.entropy, alone)
        (ours,) = torch.autograd.grad((both.log_prob, both.entropy), x, (upstream, slope.to(alone.dtype)))
        others = dam.log_prob(y, target.where(~never, -1), entropy=True, **options)
        (theirs,) = torch.autograd.grad((others.log_prob, others.entropy), y, (upstream, slope.to(alone.dtype)))
        assert torch.equal(ours, theirs) and bool((ours[:, suppressed] == 0).all())


@each(*CASES)
def test_rate_ratio(backend, name, dtype):
    suppressed = set_of(name)
    logits, base = normal(ROWS, V, seed=9, dtype=dtype), normal(ROWS, V, seed=10, dtype=dtype)
    target, exclude = targets(suppressed)
    found = dam.rate_ratio(logits, base, target, exclude=exclude, suppress=suppressed)
    expected = dam.rate_ratio(reaching(logits, suppressed), reaching(base, suppressed), target, exclude=exclude)
    assert same(found, expected) and bool(
        found.log_ratio[suppressed[target.clamp(min=0)] & (target >= 0)].isnan().all()
    )


@each(*CASES)
@pytest.mark.parametrize(("normalized", "based"), [(True, True), (False, True), (True, False)])
def test_matching_loss(backend, name, dtype, normalized, based):
    """Weight on a suppressed target is dropped, and none of it goes to others."""
    suppressed = set_of(name)
    logits, base = normal(ROWS, V, seed=11, dtype=dtype), normal(ROWS, V, seed=12, dtype=dtype)
    (target, exclude), weight = targets(suppressed), normal(ROWS, 4, seed=13)
    kept = target.where(~suppressed[target.clamp(min=0)], -1)
    options = {"exclude": exclude, "normalized": normalized, "temperature": 0.9}
    x, y = logits.clone().requires_grad_(), reaching(logits, suppressed).requires_grad_()
    of_x, of_y = {}, {}
    if based:
        of_x = {"base_logits": base, "base_weight": normal(ROWS, seed=14)}
        of_y = {**of_x, "base_logits": reaching(base, suppressed)}
    for reduction in ("mean", "none"):
        upstream = normal(ROWS, seed=15) if reduction == "none" else None
        loss = dam.matching_loss(x, target, weight, suppress=suppressed, reduction=reduction, **of_x, **options)
        ours = differentiated(loss, x, upstream=upstream)
        loss = dam.matching_loss(y, kept, weight, reduction=reduction, **of_y, **options)
        assert same(ours, differentiated(loss, y, upstream=upstream))
        assert bool(ours[0].isfinite().all()) and bool((ours[1][:, suppressed] == 0).all())


@each(("a tile and more", torch.float32), ("few", torch.bfloat16), ("all but one", torch.float32))
def test_linear_ops(backend, monkeypatch, name, dtype):
    """As a bias of -inf, but that nothing flows back to it, nor to rows of the head; in each form."""
    suppressed, with_bias = set_of(name), name != "few"
    (target, exclude), weight = targets(suppressed), normal(ROWS, 4, seed=13)
    never = suppressed[target.clamp(min=0)] & (target >= 0)
    hidden, head = normal(ROWS, 20, seed=16, dtype=dtype), normal(V, 20, seed=17, scale=0.3, dtype=dtype)
    bias = normal(V, seed=18, dtype=dtype) if with_bias else None
    barred = (torch.zeros(V, dtype=dtype) if bias is None else bias).masked_fill(suppressed, -INF)
    adapter = (normal(3, 20, seed=19, dtype=dtype), normal(V, 3, seed=20, dtype=dtype, scale=0.2))
    base = {"base_hidden": hidden.flip(0), "base_head_weight": head, "base_weight": normal(ROWS, seed=21).abs()}

    def results(target, bias, **suppress):
        leaves = [x.clone().requires_grad_() for x in (hidden, head, *adapter)]
        options = {"bias": bias, "lora": dam.LoRA(*leaves[2:], 0.7), "exclude": exclude, **suppress}
        drawn = dam.linear_jump(*leaves[:2], seed=22, num_samples=2, **options)
        value = dam.linear_log_prob(*leaves[:2], target, **options)
        found = [*drawn, *differentiated(value.where(~never, 0.0), *leaves, upstream=weight)]
        for normalized in (True, False):
            options |= {**base, "base_bias": bias, "normalized": normalized}
            found += differentiated(dam.linear_matching_loss(*leaves[:2], target, weight, **options), *leaves)
        return value, found

    for form in ("fused", "chunked") if backend == "triton" else ("auto",):
        monkeypatch.setenv("DAM_LINEAR_FORM", form)
        value, ours = results(target, bias, suppress=suppressed)
        assert not bool(suppressed[ours[0]].any()) and torch.equal(value == -INF, never | (target == exclude[:, None]))
        assert same(ours, results(target.where(~never, -1), barred)[1])


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_flows_back_to_suppressed_rows_of_a_head(backend, trained):
    suppressed = set_of("a tile and more")
    (target, _), weight = targets(suppressed), normal(ROWS, 4, seed=13)
    leaves = [normal(ROWS, 20, seed=23), normal(V, 20, seed=24, scale=0.3), normal(V, seed=25)]
    leaves = [x.requires_grad_(trained or i == 0) for i, x in enumerate(leaves)]
    for loss in (
        dam.linear_matching_loss(leaves[0], leaves[1], target, weight, leaves[2], suppress=suppressed),
        dam.linear_log_prob(leaves[0], leaves[1], target, leaves[2], suppress=suppressed).clamp(min=-99.0).sum(),
    ):
        gradients = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
        assert all(bool(x.isfinite().all()) for x in gradients) and bool((gradients[0] != 0).any())
        for gradient in gradients[1:]:
            assert bool((gradient[suppressed] == 0).all()) and bool((gradient[~suppressed] != 0).any())


def test_a_mask_and_ids_in_any_form_are_the_same_set(backend):
    logits, ids = normal(4, 70, seed=26), [3, 69, 0, 3]
    mask = torch.zeros(70, dtype=torch.bool)
    mask[ids] = True
    expected = dam.jump(logits, suppress=mask, num_samples=4, seed=1)
    for given in (ids, tuple(ids), set(ids), torch.tensor(ids), mask.repeat_interleave(2)[::2]):
        assert same(dam.jump(logits, suppress=given, num_samples=4, seed=1), expected)
    for nothing in ([], None, torch.tensor([], dtype=torch.int64)):
        assert same(dam.jump(logits, suppress=nothing, seed=1), dam.jump(logits, seed=1))


def test_rows_without_a_distribution(backend):
    """A NaN shows unless it is suppressed itself; a row that can reach nothing else is an error."""
    logits, target = normal(3, 1100, seed=27), torch.tensor([[5, 1050]] * 3)
    logits[0, 1050] = logits[1, 3] = math.nan
    logits[2, 3] = INF
    value = dam.log_prob(logits, target, suppress=[1050])
    both = dam.log_prob(logits, target, suppress=[1050], entropy=True)
    for found in (value, both.log_prob):
        assert bool(found[0, 0].isfinite()) and float(found[0, 1]) == -INF and bool(found[1:].isnan().all())
    assert int(dam.jump(logits[:1], suppress=[1050], seed=1).target) != 1050
    with pytest.raises(ValueError, match="row 1 of the logits holds a NaN"):
        dam.jump(logits, suppress=[1050])
    everything = torch.ones(1100, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 0 of the logits has no reachable destination"):
        dam.jump(logits[:1], suppress=everything)
    drawn = dam.jump(logits[:1], suppress=everything, check=False)
    assert int(drawn.target) == -1 and float(drawn.log_escape) == -INF
    assert bool(dam.log_prob(logits[:1], target[:1], suppress=everything).isnan().all())


@pytest.mark.parametrize("columns", [1, 8, 1023, 1024, 1025, 5000])
def test_the_extensions_take_a_set_as_bits(columns):
    mask = (integers(0, 3, columns + 1, seed=30) == 0)[1:]  # a view that starts inside a word
    bits = np.unpackbits(address.bits(mask).cpu().numpy(), bitorder="little")
    assert len(bits) % 1024 == 0 and np.array_equal(bits[:columns], mask.cpu().numpy()) and not bits[columns:].any()


@calls.each("rows", "linear")
@pytest.mark.parametrize(
    ("suppress", "error", "message"),
    [
        ([1, 60], ValueError, r"suppress must hold ids in \[0, 60\); got 60"),
        ([-1], ValueError, r"suppress must hold ids in \[0, 60\); got -1"),
        ([True], TypeError, "suppress must hold ids, ints; got bool"),
        ([1.0], TypeError, "suppress must hold ids, ints; got float"),
        ("3", TypeError, "suppress must be a tensor or a sequence of ids; got str"),
        (3, TypeError, "suppress must be a tensor or a sequence of ids; got int"),
        (torch.zeros(59, dtype=torch.bool), ValueError, r"a mask suppress must have shape \[60\]; got \[59\]"),
        (torch.zeros(2, 60, dtype=torch.bool), ValueError, r"a mask suppress must have shape \[60\]; got \[2, 60\]"),
        (torch.zeros(60), TypeError, "suppress must be a bool mask or int64 ids; got torch.float32"),
        (torch.tensor([[1]]), ValueError, r"suppress must be ids of shape \[S\], the same for all rows; got \[1, 1\]"),
        (torch.tensor([1, 60]), ValueError, r"suppress must hold ids in \[0, 60\); got 60"),
        (torch.tensor([-1]), ValueError, r"suppress must hold ids in \[0, 60\); got -1"),
        (torch.tensor([1], device="meta"), ValueError, "suppress must be on cpu like the other inputs; got meta"),
    ],
)
def test_what_a_user_sees_when_wrong(call, suppress, error, message):
    logits, head = torch.zeros(2, 60), torch.zeros(60, 60)
    target, weight = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    inputs = {
        "jump": (logits,),
        "entropy": (logits,),
        "log_prob": (logits, target),
        "rate_ratio": (logits, logits, target),
        "matching_loss": (logits, target, weight),
        "linear_jump": (logits, head),
        "linear_log_prob": (logits, head, target),
        "linear_matching_loss": (logits, head, target, weight),
    }
    with pytest.raises(error, match=f"^{call.name}: {message}"):
        getattr(dam, call.name)(*inputs[call.name], suppress=suppress)


@pytest.mark.of_the_op
def test_compiled_equals_eager(backend):
    """With a mask, and with ids, whose range is looked at where the op runs."""
    logits, target = normal(4, 70, seed=28), integers(0, 70, 4, 2, seed=29)
    torch.compiler.reset()
    for suppress in (torch.arange(70) % 3 == 1, torch.tensor([2, 5, int(target[0, 0])]), [7, 8]):

        def both(x, suppress=suppress):
            return dam.jump(x, suppress=suppress, seed=1).target, dam.log_prob(x, target, suppress=suppress)

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert same(compiled(logits), both(logits))
