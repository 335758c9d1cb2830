"""Rows come with any leading dimensions, as torch.nn.functional.linear takes them, and results have them too."""

import pytest
import torch
from helpers import integers, normal

import dam

LEADS = [(), (5,), (2, 3), (2, 1, 3), (0, 3)]
V, D, J = 1030, 6, 2


def rows_of(lead, seed):
    return normal(*lead, V, seed=seed)


def head_of(dtype=torch.float32):
    return normal(V, D, seed=20, dtype=dtype), normal(V, seed=21, dtype=dtype)


def flat(x, lead):
    """An argument per row as the same op takes it for a matrix of rows."""
    return x.reshape(-1, *x.shape[len(lead) :]) if isinstance(x, torch.Tensor) else x


def jump(lead, of, logits, **options):
    return dam.jump(logits, seed=1, exclude=of(integers(-1, V, *lead, seed=2)), num_samples=2, **options)


def one_jump(lead, of, logits):
    return dam.jump(logits, seed=1, exclude=7, row_ids=of(integers(0, 9, *lead, seed=3)))


def log_prob(lead, of, logits):
    one = dam.log_prob(logits, of(integers(-1, V, *lead, seed=4)), exclude=of(integers(-1, V, *lead, seed=2)))
    return one, dam.log_prob(logits, of(integers(-1, V, *lead, J, seed=5)))


def entropy(lead, of, logits):
    target = of(integers(-1, V, *lead, J, seed=5))
    alone = dam.entropy(logits, exclude=of(integers(-1, V, *lead, seed=2)))
    return alone, *(dam.log_prob(logits, target, entropy=True)[i] for i in range(2))  # each with a graph of its own


def rate_ratio(lead, of, logits):
    base = of(rows_of(lead, 6))
    target = of(integers(-1, V, *lead, J, seed=5))
    return *dam.rate_ratio(logits, base, target), *dam.rate_ratio(logits, base, target[..., 0])


def weighted(lead, of):
    return of(integers(-1, V, *lead, J, seed=5)), of(normal(*lead, J, seed=7))


def per_row(lead, of):
    return {"row_scale": of(normal(*lead, seed=8)), "base_weight": of(normal(*lead, seed=9))}


def matching_loss(lead, of, logits):
    loss = dam.matching_loss(logits, *weighted(lead, of), base_logits=of(rows_of(lead, 6)), **per_row(lead, of))
    rows = dam.matching_loss(logits, *weighted(lead, of), reduction="none")
    return loss, rows, dam.matching_loss(logits, *weighted(lead, of), exclude=of(integers(-1, V, *lead, seed=2)))


def linear_jump(lead, of, hidden):
    return dam.linear_jump(hidden, *head_of(), seed=1, exclude=of(integers(-1, V, *lead, seed=2)))


def linear_log_prob(lead, of, hidden):
    return (dam.linear_log_prob(hidden, head_of()[0], of(integers(-1, V, *lead, J, seed=5)), head_of()[1]),)


def linear_matching_loss(lead, of, hidden):
    weight, bias = head_of()
    base = {"base_hidden": of(normal(*lead, D, seed=10)), "base_head_weight": weight}
    loss = dam.linear_matching_loss(hidden, weight, *weighted(lead, of), bias, **base, **per_row(lead, of))
    return loss, dam.linear_matching_loss(hidden, weight, *weighted(lead, of), bias, reduction="none")


def backward_kolmogorov(lead, of, terminal):
    return (dam.backward_kolmogorov(dam.generators.Uniform(V), terminal, 0.3),)


ROWS = [jump, one_jump, log_prob, entropy, rate_ratio, matching_loss, backward_kolmogorov]
LINEAR = [linear_jump, linear_log_prob, linear_matching_loss]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("op", [*ROWS, *LINEAR], ids=lambda op: op.__name__)
def test_results_and_gradients_are_those_of_a_matrix(backend, op, lead):
    """Bit for bit, as the same kernels run on the same rows."""
    width = D if op in LINEAR else V
    x = normal(*lead, width, seed=11).requires_grad_()
    matrix = x.detach().reshape(-1, width).requires_grad_()
    ours = op(lead, lambda y: y, x)
    expected = op(lead, lambda y: flat(y, lead), matrix)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == (b.shape if b.dim() == 0 else (*lead, *b.shape[1:]))
        assert torch.equal(a, b.view(a.shape))
        if a.requires_grad and x.numel() > 0:
            seen = torch.where(torch.isfinite(a), a, 0.0).sum(), torch.where(torch.isfinite(b), b, 0.0).sum()
            gradient, other = (torch.autograd.grad(y, leaf)[0] for y, leaf in zip(seen, (x, matrix), strict=True))
            assert gradient.shape == x.shape and torch.equal(gradient, other.view(x.shape))


def test_rows_that_no_stride_describes_are_copied(backend):
    """Positions of a batch of sequences but the last: two strides."""
    logits = normal(3, 4, V, seed=1)
    some = logits[:, :-1]
    target = integers(0, V, 3, 3, seed=2)
    assert torch.equal(dam.log_prob(some, target), dam.log_prob(some.reshape(9, V), target.view(9)).view(3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: dam.log_prob(x, i[0]), r"target must have shape \[2, 3\] or \[2, 3, J\]; got \[3\]"),
        (lambda x, i: dam.jump(x, exclude=i[0]), r"exclude must be an int or a tensor of shape \[2, 3\].*\[3\]"),
        (lambda x, i: dam.jump(x, row_ids=i.view(-1)), r"row_ids must have shape \[2, 3\]; got \[6\]"),
        (lambda x, i: dam.matching_loss(x, i, x[..., 0]), r"target must have shape \[2, 3, J\]; got \[2, 3\]"),
        (lambda x, i: dam.rate_ratio(x, x.view(6, 4), i), r"base_logits must have the shape of logits, \[2, 3, 4\]"),
        (
            lambda x, i: dam.matching_loss(x, i[..., None], x[..., :1], row_scale=x[0, :, 0]),
            r"row_scale must have shape \[2, 3\]; got \[3\]",
        ),
    ],
)
def test_arguments_per_row_have_them_too(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))


def test_compiled_calls_take_them():
    hidden, (weight, bias), target = normal(2, 3, D, seed=1), head_of(), integers(0, V, 2, 3, seed=2)

    def function(hidden):
        return dam.linear_log_prob(hidden, weight, target, bias), dam.log_prob(hidden @ weight.t() + bias, target)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden)
    for a, b in zip(compiled, function(hidden), strict=True):
        assert a.shape == (2, 3) and torch.equal(a, b)


# ---- the name of the head


@pytest.mark.parametrize("op", ["linear_jump", "linear_log_prob"])
def test_the_old_name_of_the_head_still_works(op):
    hidden, (weight, _), target = normal(3, D, seed=1), head_of(), integers(0, V, 3, seed=2)
    arguments = {"hidden": hidden} | ({"seed": 1} if op == "linear_jump" else {"target": target})
    function = getattr(dam, op)
    with pytest.warns(FutureWarning, match=f"^{op}: weight is now called head_weight$"):
        old = function(weight=weight, **arguments)
    new = function(head_weight=weight, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    with pytest.raises(TypeError, match=f"{op}: weight is the old name of head_weight; both were given"):
        function(weight=weight, head_weight=weight, **arguments)


def test_the_bias_is_positional_as_in_torch():
    hidden, (weight, bias), target = normal(3, D, seed=1), head_of(), integers(0, V, 3, seed=2)
    assert torch.equal(dam.linear_jump(hidden, weight, bias, seed=1)[2], dam.linear_jump(hidden, weight, bias=bias)[2])
    value = dam.linear_log_prob(hidden, weight, target, bias)
    assert torch.equal(value, dam.linear_log_prob(hidden, weight, target, bias=bias))
    slots = target[:, None], torch.ones(3, 1)
    loss = dam.linear_matching_loss(hidden, weight, *slots, bias)
    assert torch.equal(loss, dam.linear_matching_loss(hidden, weight, *slots, bias=bias))
