"""Functions of numbers as expressions, and expressions as code: what they compute; what is refused with its line."""

import math

import numpy as np
import pytest
import sympy
import torch

from dam.derive import DerivativeError, emit, grad, scalar

U = sympy.Symbol("u", positive=True)
SCALE = 0.3


def helper(v, by=2.0):
    """Called by others, by position and by name."""
    inner = v * by
    return inner, inner + 1


def calls(u):
    a, b = helper(u)
    c, _ = helper(v=b, by=SCALE)
    return a * c


def branches(u, low=0.5, high=2.0):
    if u < low or not u <= 10:
        return u
    if low <= u < high:
        middle = u * u
    else:
        middle = 3 * u
    middle += 1
    return middle if u != 1 else 7.0


def entropy(u):
    return u * math.log(u)


def library_calls(u):
    total = math.exp(-u) + np.log1p(u) + torch.sqrt(u) + pow(u, 1.5) + abs(u - 1) + np.square(u)
    total = total + np.where(u > 1, u, 2.0) + max(u, 0.7) + np.clip(u, 0.5, 1.5) + math.tanh(u) + np.sign(u - 2)
    return (
        total - np.arctan(u) - math.erf(u) * np.sin(u) / np.cos(u / 7) + np.log2(u) + np.expm1(u) - np.logaddexp(u, 1)
    )


def methods(u):
    return u.log() + u.pow(2) - u.clamp(min=1.0).sqrt()


def of_torch(f):
    return lambda u: f(torch.tensor(u, dtype=torch.float64)).item()


@pytest.mark.parametrize("f", [calls, branches, lambda u: 2 ** (u - 1) / u**0.5])
def test_an_expression_is_the_function(f):
    found = scalar.expression(f, U)
    for u in (0.1, 0.5, 0.9, 1.0, 1.3, 2.0, 3.7, 12.0):
        assert math.isclose(float(found.subs(U, u)), f(u), rel_tol=1e-13)


@pytest.mark.parametrize(
    ("f", "by_hand"), [(library_calls, library_calls), (methods, of_torch(methods))], ids=["calls", "methods"]
)
def test_what_functions_of_libraries_mean(f, by_hand, monkeypatch):
    """In the code that is written for torch, which says what each is."""
    x = sympy.Symbol("x", real=True)
    lines = emit.program({"y": scalar.expression(f, sympy.exp(x))}, x)
    monkeypatch.setattr(torch, "sqrt", lambda u: u**0.5)  # library_calls has functions of three libraries for a float
    for at in (-1.0, -0.2, 0.3, 1.1):
        space = {"torch": torch, "x": torch.tensor(at, dtype=torch.float64)}
        for name, k in lines.powers:
            space[name] = (float(k) * space["x"]).exp()
        exec("\n".join(lines.lines(emit.TORCH)), space)
        assert math.isclose(float(space["y"]), by_hand(math.exp(at)), rel_tol=1e-12)


def test_a_derivative_is_followed_too():
    """Its runtime is that of numbers; second derivatives of called functions pass tuples."""
    for f in (calls, entropy, branches):
        slope = grad(f)
        bend = grad(slope)
        for derived in (slope, bend):
            found = scalar.expression(derived, U)
            for u in (0.2, 0.8, 1.7, 3.0):
                assert math.isclose(float(found.subs(U, u)), derived(u), rel_tol=1e-12, abs_tol=1e-12)


def test_decimals_are_what_was_written():
    """So that exponents cancel: the double 0.3 - 1 is -7/10."""
    assert scalar.exact(0.3) == sympy.Rational(3, 10) and scalar.exact(0.3 - 1) == sympy.Rational(-7, 10)
    assert scalar.exact(1 / 3) == sympy.Rational(1, 3) and float(scalar.exact(math.pi)) == math.pi
    for value in (math.nan, math.inf, True):
        with pytest.raises(ValueError, match="is no number"):
            scalar.exact(value)


def test_a_power_is_made_of_another():
    x = sympy.Symbol("x", real=True)
    found = emit.program({"y": sympy.exp(x) + sympy.exp(3 * x) + sympy.exp(-x) + sympy.exp(0.3 * x)}, x)
    powers = dict(found.powers)
    assert found.power_of(powers["u_3"]) == ("u", 3) and found.power_of(powers["u_minus_1"]) == ("u", -1)
    assert found.power_of(powers["u"]) is None


class Settings:
    power = 2

    def __init__(self):
        self.scale = 3.0
        self.read = 0

    @property
    def computed(self):
        self.read += 1
        return 1.0


SETTINGS = Settings()


def of_settings(u):
    return SETTINGS.scale * u**SETTINGS.power


def of_a_property(u):
    return u * SETTINGS.computed


def test_nothing_is_run_for_a_value():
    assert scalar.expression(of_settings, U) == 3 * U**2
    with pytest.raises(DerivativeError, match=r"SETTINGS\.computed is not a value that an object holds"):
        scalar.expression(of_a_property, U)
    assert SETTINGS.read == 0


def root_of_a_square(u):
    return np.sqrt((u - 3) ** 2) + u


def under_two_names(u):
    v = u
    v *= u
    v, w = v + 1, u
    v += w
    return v


def test_what_has_branches_is_written_with_them():
    """Not by sympy's Abs, of which no language here has a name."""
    found = scalar.expression(root_of_a_square, U)
    assert not found.has(sympy.Abs) and [found.subs(U, u) for u in (1, 3, 5)] == [3, 3, 7]


def test_an_augmented_assignment_makes_a_number_anew():
    assert sympy.expand(scalar.expression(grad(under_two_names), U)) == 2 * U + 1


def over_zero(u):
    return u * u / 0


def log_of_zero(u):
    return u + math.log(0)


def complex_root(u):
    return u + math.sqrt(-2)


def array(u):
    return u * np.ones(3)


def with_loop(u):
    while u > 1:
        u = u / 2
    return u


def text(u):
    return u + "a"


def keyword(u):
    return math.log(**{"x": u})


def itself(u):
    return itself(u - 1) + itself(u - 2)


def nothing(u):
    u * 2


@pytest.mark.parametrize(
    ("f", "line", "message"),
    [
        (over_zero, "return u * u / 0", "is no real number"),
        (log_of_zero, "return u + math.log(0)", r"math.log\(0\) is no real number"),
        (complex_root, "return u + math.sqrt(-2)", "is no real number"),
        (array, "return u * np.ones(3)", "np.ones is not a function of numbers"),
        (with_loop, "while u > 1:", "only assignments, if and return"),
        (text, 'return u + "a"', "is no number"),
        (keyword, 'return math.log(**{"x": u})', "with \\* or \\*\\*"),
        (itself, "return itself(u - 1) + itself(u - 2)", "more calls than are followed"),
        (nothing, "def nothing(u):", "must return one number"),
    ],
)
def test_refused_with_its_line(f, line, message):
    with pytest.raises(DerivativeError, match=message) as error:
        scalar.expression(f, U)
    assert error.value.line.text == line
