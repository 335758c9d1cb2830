"""Expression trees that hypothesis makes: derivatives beside torch's, forward beside reverse."""

import linecache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dam.derive import autodiff, grad

X, Y = np.array([0.7, 1.3, 0.4]), np.array([[0.9], [0.2]])
LEAVES = st.sampled_from(["x", "y", "k", "0.5", "2.0", "x[0]", "y[1]", "x[1:] * 1.0 + k", "x"])
# Bounded, so that no tree overflows, and smooth.
ONE = [
    "m.sin({})",
    "m.cos({})",
    "m.tanh({})",
    "m.exp(-m.square({}))",
    "-({})",
    "m.sqrt(1.0 + m.square({}))",
    "({}) ** 2 * 0.1",
]
TWO = ["({}) + ({})", "({}) - ({})", "({}) * ({})", "({}) / (1.5 + m.cos({}))"]
STATEMENTS = ["{} = {}", "{0} = {1}\n    if m.sum({0}) > 0.3:\n        {0} = {0} * k"]


def grown(children):
    one = st.builds(lambda form, a: form.format(a), st.sampled_from(ONE), children)
    two = st.builds(lambda form, a, b: form.format(a, b), st.sampled_from(TWO), children, children)
    total = st.builds(lambda a: f"m.sum({a})", children)
    return st.one_of(one, two, total)


TREES = st.recursive(LEAVES.filter(lambda leaf: "1:" not in leaf), grown, max_leaves=8)


@st.composite
def programs(draw):
    """Two statements and a result; the second may read the first."""
    first, second, last = draw(TREES), draw(TREES), draw(TREES)
    form = draw(st.sampled_from(STATEMENTS))
    lines = ["def f(x, y, k):", "    " + form.format("a", first), f"    b = a * ({second}) + m.sin(a)"]
    return "\n".join([*lines, f"    return m.sum(b * ({last})) + m.sum(a)"]) + "\n"


def built(text, module):
    file = f"<tree {hash(text)} {module.__name__}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space = {"m": module}
    exec(compile(text, file, "exec"), space)
    return space["f"]


def check(text):
    f = built(text, np)
    found = grad(f, (0, 1, 2))(X, Y, 1.1)
    inputs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (X, Y, 1.1)]
    value = built(text.replace("m.sum(0.5)", "0.5").replace("m.sum(2.0)", "2.0"), _Lenient)(*inputs)
    expected = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else [None] * 3
    along = (np.cos(X), np.sin(Y), 0.3)
    tangent = autodiff(f, "forward", (0, 1, 2))(X, Y, 1.1, d_x=along[0], d_y=along[1], d_k=along[2])
    total = 0.0
    for one, other, d in zip(found, expected, along, strict=True):
        exact = np.zeros(np.shape(one)) if other is None else other.numpy()
        np.testing.assert_allclose(one, exact, rtol=1e-9, atol=1e-9)
        total += np.sum(one * d)
    assert tangent == pytest.approx(total, rel=1e-10, abs=1e-10)


class _Lenient:
    """torch's functions, of Python's numbers too."""


def _of(name):
    return staticmethod(lambda x: getattr(torch, name)(torch.as_tensor(x, dtype=torch.float64)))


for _name in ("sin", "cos", "tanh", "exp", "square", "sqrt", "sum"):
    setattr(_Lenient, _name, _of(_name))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(programs())
def test_expression_trees(text):
    check(text)


@pytest.mark.full
@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(programs())
def test_many_expression_trees(text):
    check(text)
