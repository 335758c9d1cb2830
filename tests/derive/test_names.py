"""What a derivative calls by a name is what the function meant by it, whatever names its author chose.

The functions are polynomials of small integers, so that every number here is exact in float64.
"""

import numpy as np
import pytest

from dam.derive import DerivativeError, autodiff, grad

d_x, init_grad = 3.0, 5.0
WEIGHTS = np.array([1.0, 2.0, 3.0])
a = WEIGHTS


def squared(x):
    return x * x


other_name = squared


def weighted(a):
    return a * WEIGHTS


def test_variables_around_a_function_may_be_called_as_a_derivatives_own_parameters():
    assert autodiff(lambda x: x * x * d_x, "forward")(2.0, d_x=1.0) == 12.0
    assert autodiff(lambda x: x * x * init_grad)(2.0, init_grad=10.0) == 200.0


def test_parameters_and_variables_of_a_function_may_be_too():
    def f(x, d_x, init_grad):
        d_y = x * d_x
        return d_y * x * init_grad

    assert autodiff(f, "forward", (0, 1))(2.0, 3.0, 5.0, d_x_2=1.0, d_d_x=1.0) == 80.0
    assert autodiff(f, "reverse")(2.0, 3.0, 5.0, init_grad_2=10.0) == 600.0


def test_a_value_that_a_called_functions_parameter_hides_has_another_name_there():
    """`a` of the module is the very array WEIGHTS, and `a` in weighted is its parameter."""
    np.testing.assert_array_equal(grad(lambda x: np.sum(weighted(x) * a))(np.ones(3)), WEIGHTS**2)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_called_function_that_a_parameter_hides(mode):
    def f(x, squared):
        size = other_name(x)
        return x * squared if size > 1.0 else x

    given = {"d_x": 1.0} if mode == "forward" else {}
    assert autodiff(f, mode)(2.0, 5.0, **given) == 5.0


def test_derivatives_of_derivatives_number_what_they_take():
    def cube(x):
        return x * x * x

    of_adjoint = autodiff(autodiff(cube, "reverse"), "reverse")
    assert of_adjoint(2.0, init_grad=5.0, init_grad_2=7.0) == 6 * 2.0 * 5.0 * 7.0
    of_tangent = autodiff(autodiff(cube, "forward"), "forward")
    assert of_tangent(2.0, d_x=5.0, d_x_2=7.0) == 6 * 2.0 * 5.0 * 7.0
    third = autodiff(of_tangent, "forward")
    assert third(2.0, d_x=5.0, d_x_2=7.0, d_x_3=11.0) == 6 * 5.0 * 7.0 * 11.0


def test_a_tangent_has_no_default():
    with pytest.raises(DerivativeError, match="give one for each parameter"):
        autodiff(squared, "forward")(2.0)


def test_names_that_derived_source_calls():
    def counted(x, len):
        return x * len

    def ranged(x):
        range = x * 2.0
        return x * range

    def shortest(x, y):
        total, min = 0.0, 1.0
        for v, w in zip(x, y):  # noqa: B905
            total = total + v * w * min
        return total

    for f, called in ((counted, "len"), (ranged, "range"), (shortest, "min")):
        with pytest.raises(DerivativeError, match=f"may not be called {called}"):
            grad(f)
