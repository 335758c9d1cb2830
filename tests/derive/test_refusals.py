"""What has no derivative is refused by name, with its line; what only shows when it runs, then."""

import functools
import importlib

import numpy as np
import pytest
import torch

from dam.derive import DerivativeError, adjoint, autodiff, grad, insert_grad_of, source, stop_gradient

GLOBAL = np.ones(3)
V = np.array([0.4, -0.9, 1.3])
A = np.array([[0.3, -0.7, 1.1], [0.9, 0.4, -0.2]])


def has_try(x):
    try:
        return x * x
    except ValueError:
        return x


def has_yield(x):
    yield x


def has_global(x):
    global GLOBAL
    GLOBAL = x
    return x


def has_class(x):
    class Inner:
        pass

    return x


def has_walrus(x):
    return (y := x * x) + y


def has_import(x):
    import math

    return math.sin(x)


def has_with(x):
    with np.errstate(all="ignore"):
        return x * x


def has_varargs(*x):
    return x[0]


def has_match(x):
    match x:
        case 1:
            return x
    return x * x


def starred_call(x):
    return np.arctan2(*[x, x])


def starred_tuple(x):
    return (1.0, *x)[1]


def pops_a_key(x):
    table = {0: x, 1: x * x}
    first = table.pop(0)
    return first * table[1]


def extends_by_itself(x):
    items = [x]
    items += items
    return items[0] * items[1]


def pops_where_it_is_told(x, k):
    items = [x, x * x]
    return items.pop(k)


def repeats_a_tuple(x):
    return ((x,) * 3)[1]


def repeats_in_place(x):
    items = [x]
    items *= 3
    return items[2]


def joins_dicts(x):
    a, b = {0: x}, {1: x * x}
    return (a | b)[1]


def joins_dicts_in_place(x):
    a = {0: x}
    a |= {1: x * x}
    return a[1]


def sums_lists(x):
    return sum([[x], [x * x]], [])[1]  # noqa: RUF017


def counts_otherwise(x):
    return sum([v**i for i, v in enumerate(iterable=x)])


def calls_in_a_part(x, n):
    def positive(m):
        return m > 0

    both = n > 0 and positive(n)
    return x if both else x * x


def unknown_c_function(x):
    return np.sum(np.fft.fft(x).real)


def unknown_method(x):
    return x.searching(3.0)


def unknown_keyword(x):
    return np.sum(x, where=x > 0)


def unknown_parameter(x, g):
    return g(x)


def writes_global(x):
    GLOBAL[0] = x[0]
    return np.sum(GLOBAL)


def writes_global_alias(x):
    y = GLOBAL
    y[0] = x[0]
    return np.sum(y)


def writes_view(x):
    y = x * 1.0
    z = y[0:2]
    z[0] = x[1] * 2.0
    return np.sum(y)


def writes_alias(x):
    y = x * 1.0
    z = y
    y[0] = 3.0
    return np.sum(z * x)


def writes_transposed(x):
    y = np.reshape(x * 1.0, (3, 1))
    z = y.T
    y[0] = 2.0
    return np.sum(z**2)


def writes_in_list(x):
    y = x * 1.0
    items = [y]
    y[0] = 2.0
    return np.sum(items[0] ** 2)


def shared_in_loop(x):
    rows, row = [], np.zeros(3)
    for i in range(2):
        row[i] = x[i]
        rows.append(row)
    return np.sum(rows[0] * rows[1])


def appends_to_what_it_goes_over(x):
    items, total = [x, x * x], 0.0
    for v in items:
        total += v * v
        if len(items) < 4:
            items.append(v)
    return total


def overwrite(u, v):
    u[0] = v
    return u


def callee_writes(x):
    y = x * 1.0
    overwrite(y, x[1] * 2.0)
    z = overwrite(y, x[1])
    return np.sum(z)


def writes_attribute(x, o):
    o.value = x
    return x


def mutates_list(x):
    items = [x, x * x]
    items.insert(0, x)
    return items[0]


def computed_axis(x, y):
    return np.sum(np.where(x, x, y))


def array_range(x):
    return np.sum(np.einsum("ii->i", x))


def decorated(f):
    @functools.wraps(f)
    def wrapper(*a):
        return f(*a)

    return wrapper


@decorated
def wrapped(x):
    return x


class Holder:
    def method(self, x):
        return x


REFUSED = [
    (has_try, "try has no derivative"),
    (has_yield, "generators have no derivative"),
    (has_global, "assigns globals"),
    (has_class, "a class inside"),
    (has_walrus, "assignment inside of an expression"),
    (has_import, "an import inside"),
    (has_with, "insert_grad_of"),
    (has_varargs, r"\*args"),
    (has_match, "match is not supported"),
    (starred_call, r"a call with \*"),
    (starred_tuple, r"\* within a tuple"),
    (pops_a_key, "pop of a key of a dict"),
    (extends_by_itself, "changes its length while a loop goes over it"),
    (pops_where_it_is_told, r"pop\(k\) has a derivative"),
    (repeats_a_tuple, "a tuple that is repeated"),
    (repeats_in_place, "a list that is repeated in place"),
    (joins_dicts, r"the operator in a \| b"),
    (joins_dicts_in_place, "the operator in a"),
    (sums_lists, "a sum of lists"),
    (counts_otherwise, "enumerate has a derivative as"),
    (calls_in_a_part, "that may not be evaluated"),
    (unknown_c_function, "np.fft.fft has no known derivative"),
    (unknown_method, r"the method .searching\(\) has no derivative"),
    (unknown_keyword, "unexpected keyword argument 'where'"),
    (unknown_parameter, "g is not known when"),
    (writes_global, "GLOBAL is not a variable of the function"),
    (writes_global_alias, "GLOBAL of the surroundings, which is written to"),
    (writes_view, "z is written to while y, which may share its memory"),
    (writes_alias, "y is written to while z"),
    (writes_transposed, "y is written to while z"),
    (writes_in_list, "y is written to while items"),
    (shared_in_loop, "row is written to while rows"),
    (appends_to_what_it_goes_over, "changes its length while a loop goes over it"),
    (callee_writes, "called for an effect|writes into its argument"),
    (writes_attribute, "an assignment to o.value"),
    (mutates_list, r".insert\(\) changes items"),
    (array_range, "an index twice in one operand"),
]


@pytest.mark.parametrize(("f", "message"), REFUSED, ids=[f.__name__ for f, _ in REFUSED])
def test_what_is_refused_says_why_and_shows_its_line(f, message):
    with pytest.raises(DerivativeError, match=message) as caught:
        grad(f)
    line = caught.value.line
    assert line.file == __file__ and f"{__file__}:{line.number}: {line.text}" in str(caught.value)
    with open(__file__, encoding="utf-8") as file:
        assert file.read().splitlines()[line.number - 1].strip() == line.text


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (np.sin, "no Python source"),
        (len, "no Python source"),
        (Holder().method, "is a method"),
        (wrapped, "is decorated"),
        (functools.partial(has_try, 1.0), "no Python source"),
        (eval("lambda x: x"), "cannot be got"),
    ],
    ids=["ufunc", "builtin", "method", "wrapper", "partial", "text"],
)
def test_what_has_no_source_says_so(f, message):
    with pytest.raises(DerivativeError, match=message):
        grad(f)


def test_one_of_two_equal_lambdas_is_found_by_what_it_computes():
    one, other = lambda x: x * x + x, lambda x: x * x * x
    assert grad(one)(2.0) == 5.0 and grad(other)(2.0) == 12.0


def test_parameters_that_are_not_there():
    with pytest.raises(DerivativeError, match="no parameter 'z'"):
        grad(stores_twice, "z")
    with pytest.raises(DerivativeError, match="each once"):
        grad(stores_twice, (0, 0))
    with pytest.raises(ValueError, match="'reverse' or 'forward'"):
        autodiff(stores_twice, "backward")
    with pytest.raises(DerivativeError, match="was not derived"):
        source(stores_twice)


# ---- what shows when it runs


def square(x):
    return x * x


def stores_twice(x):
    y = np.zeros(3)
    y[[0, 0]] = x[:2]
    return np.sum(y)


def stores_in_integers(x):
    y = np.array([1, 2, 3])
    y[0] = x[0]
    return np.sum(y * x)


def writes_into_both(x, y):
    x[0] = y[1]
    return np.sum(x * y)


def adds_in_place(x):
    y = x
    y += 1.0
    return np.sum(x * y)


def adds_to_an_item(x):
    items = [x, x * 2.0]
    items[0] += 1.0
    return np.sum(x * items[0])


def adds_to_an_entry(x):
    table = {"a": x}
    table["a"] *= 2.0
    return np.sum(x * table["a"])


def adds_to_a_row(x):
    rows = [row for row in x]
    rows[0] += 1.0
    return np.sum(x * x)


def adds_to_an_item_of_two_lists(x):
    one, other = [x], [x]
    one[0] += 1.0
    return np.sum(other[0] * x[0])


def adds_to_an_item_that_is_two(x):
    items = [x for _ in range(2)]
    items[0] += 1.0
    return np.sum(items[0] * items[1])


def adds_to_a_constant(x):
    c = np.ones(3)
    items = [c]
    items[0] *= 3.0
    return np.sum(x * c)


def adds_to_a_repeated_constant(x):
    items = [np.zeros(3)] * 3
    items[0] += 1.0
    return np.sum(x * items[1])


def adds_to_a_constant_in_a_loop(x):
    c = np.ones(3)
    items = [c]
    for _ in range(2):
        items[0] += 1.0
    return np.sum(x * c)


def adds_to_items_of_a_repeated_constant(x):
    c = np.ones(3)
    items = [c] * 2
    items[0] *= 3.0
    return np.sum(x * c)


def writes_into_one_row_twice(x):
    row = [x[0], 1.0]
    table = {"p": row, "q": row}
    table["p"][0] = x[1] ** 2
    return table["q"][0] * 2.0


def repeats_an_item(x):
    table = {"a": [x, 2 * x]}
    return (table["a"] * 2)[3] ** 2


def repeats_a_result(x):
    def pair(y):
        return [y, y * y]

    return (pair(x) * 2)[3] ** 2


def slice_of_another_length(x):
    items = [x, x]
    items[1:] = [x * 2, x * 3]
    return items[2] * items[0]


def slice_of_a_parameter(items):
    copies = items[:]
    copies[1:2] = items
    return copies[0] * copies[2]


def counted_norm(x):
    return np.linalg.norm(x, 0, axis=0)[0]


def norm_over_two_axes(x):
    return np.linalg.norm(x, 1, axis=(0, 1))


def writes_into_a_repeated_array(x):
    items = [x * 1.0] * 2
    items[0][0] = x[1]
    return np.sum(items[1] ** 2)


def writes_into_a_repeated_list(x):
    grid = [[0.0] * 2] * 2
    grid[0][0] = x[1]
    return grid[1][0] * 3.0


def writes_into_what_is_deeper_too(x):
    row = [x[0], 1.0]
    grid = [row, [2.0, [row]]]
    grid[0][0] = x[1] ** 2
    return grid[1][1][0][0] * 2.0


def writes_into_an_item(x):
    x[0][0] = x[1][1]
    return np.sum(x[0] * x[1])


def swaps_rows(x):
    x[0], x[1] = x[1], x[0]
    return np.sum(x[0] ** 2)


def writes_into_copy(x):
    y = np.zeros((2, 3))
    y[[0, 1]][0] = x
    return np.sum(y * y)


def joins_lists(x):
    return sum(x + x)


def adds_to_an_alias(x):
    y = x * 1.0
    v = y
    a = np.sum(np.exp(y))
    v *= 2.0
    return a * np.sum(np.exp(y))  # which is not what it was


def scaled(c):
    c *= 2.0
    return c


def scales_a_constant_elsewhere(x):
    c = np.ones(3)
    a = np.sum(x * c)
    d = scaled(c)
    return a * np.sum(x * c) * np.sum(d)


def scales_elsewhere_for_nothing(x):
    y = x * 1.0
    z = scaled(y)  # noqa: F841
    return np.sum(y * y)


def writes_into_a_joined_item(x, z):
    both = x + z
    x[0][0] = 3.0
    return np.sum(both[0])


def pads_by_less(x):
    return np.sum(np.pad(x, -1))


def pads_by_axis(x):
    return np.sum(np.pad(x, {0: (1, 2)}))


def pads_as_read(x, widths):
    return np.sum(np.pad(x, widths))


@pytest.mark.parametrize(
    ("f", "arguments", "message"),
    [
        (square, (3,), "no derivative in x, a int"),
        (square, (np.arange(3),), "whose dtype is int64"),
        (square, (1j,), "a complex"),
        (square, (V,), "needs a scalar result"),
        (square, (torch.arange(3),), "torch.int64"),
        (stores_twice, (V,), "names a place twice"),
        (stores_in_integers, (V,), "whose dtype is int64"),
        (writes_into_both, (V, V), "share memory"),
        (adds_in_place, (V.copy(),), "changes y and x in place"),
        (adds_to_an_item, (V,), "an item of items and x in place"),
        (adds_to_an_entry, (V,), "an item of table and x in place"),
        (adds_to_a_row, (np.ones((2, 3)),), "an item of rows and x in place"),
        (adds_to_an_item_of_two_lists, (V,), "an item of one and other in place"),
        (adds_to_an_item_that_is_two, (V,), "shares memory with item 1"),
        (adds_to_a_constant, (V,), "an item of items and c in place"),
        (adds_to_a_repeated_constant, (V,), "shares memory with item 1"),
        (adds_to_a_constant_in_a_loop, (V,), "an item of items and c in place"),
        (adds_to_items_of_a_repeated_constant, (V,), "shares memory with item 1"),
        (writes_into_one_row_twice, (V,), "shares memory with item 'q'"),
        (writes_into_a_repeated_array, (V,), "shares memory with item 1"),
        (writes_into_a_repeated_list, (V,), "shares memory with item 1"),
        (writes_into_what_is_deeper_too, (V,), "shares memory with item 1"),
        (writes_into_an_item, ([V, V],), "x and x share memory"),
        (
            swaps_rows,
            (np.ones((2, 3)),),
            r"x is written to \(x\[0\], x\[1\] = x\[1\], x\[0\]\) while x\[0\], a part of it",
        ),
        (writes_into_copy, (V,), "changes a copy"),
        (joins_lists, ([1.0, 2.0],), "arithmetic on a list|its value a list"),
        (repeats_an_item, (0.7,), "what repeats a list"),
        (repeats_a_result, (0.7,), "arithmetic on a list"),
        (slice_of_another_length, (0.7,), r"items\[1:\] = \[x \* 2, x \* 3\] changes the length"),
        (slice_of_a_parameter, ([0.7, 1.3],), "what repeats a list or changes its length"),
        (counted_norm, (A,), "a norm that counts"),
        (norm_over_two_axes, (A,), "norm of a matrix"),
        (adds_to_an_alias, (V,), "changes v and y in place"),
        (scales_a_constant_elsewhere, (V,), r"scaled writes into c \(c \*= 2.0\)"),
        (scales_elsewhere_for_nothing, (V,), "changes c and its argument in place"),
        (writes_into_a_joined_item, ([V.copy()], [V.copy()]), "an item of x is written to .* while both, a part of it"),
        (pads_by_less, (V,), "pad_width of integers, 0 or more"),
        (pads_by_axis, (V,), "pad_width of integers, 0 or more"),
        (pads_as_read, (np.ones(1), (-1, 1)), "pad_width of integers, 0 or more"),
    ],
)
def test_what_is_wrong_with_arguments_is_refused_when_it_runs(f, arguments, message):
    with pytest.raises(DerivativeError, match=message):
        grad(f)(*arguments)


def test_adjoints_and_tangents_have_the_shape_of_their_values():
    with pytest.raises(DerivativeError, match="the adjoint given"):
        autodiff(square)(V, init_grad=np.ones(2))
    with pytest.raises(DerivativeError, match="the tangent given"):
        autodiff(square, "forward")(V, d_x=np.ones(2))


def test_augmented_assignment_of_numbers_under_two_names_is_right():
    def f(x):
        y = x
        y += 1.0
        return x * y

    assert grad(f)(2.0) == 5.0


def test_arguments_stay_as_they_were_where_the_function_would_change_them():
    def f(x):
        y = x * 2.0
        y[0] = x[1] * y[0]
        return np.sum(y * y)

    x = V.copy()
    grad(f)(x)
    np.testing.assert_array_equal(x, V)


# ---- surgery and registration


def test_an_adjoint_can_be_looked_at_changed_and_replaced():
    seen = []

    def looked(x):
        y = x * 3.0
        with insert_grad_of(y) as dy:
            seen.append(dy)
        return y * y

    def clipped(x):
        y = x * 3.0
        with insert_grad_of(y) as dy:
            dy = np.clip(dy, -1.0, 1.0)
        return y * y

    def written(x):
        y = x * 1.0
        with insert_grad_of(y) as dy:
            dy[0] = 0.0
        return np.sum(y * x)

    assert grad(looked)(2.0) == 36.0 and seen == [12.0]
    assert grad(clipped)(2.0) == 3.0 and clipped(2.0) == 36.0
    np.testing.assert_array_equal(grad(written)(V), [V[0], 2 * V[1], 2 * V[2]])
    with pytest.raises(DerivativeError, match="forward mode has none"):
        autodiff(clipped, "forward")


def test_stop_gradient_makes_a_constant():
    def f(x):
        return stop_gradient(x * x) * x

    assert grad(f)(3.0) == 9.0 and f(3.0) == 27.0


def opaque(x, scale):
    return float(np.frompyfunc(lambda v: v * v, 1, 1)(x)) * scale


def test_a_registered_derivative_is_used_and_differentiated_again():
    @adjoint(opaque)
    def rule(g, y, x, scale):
        return g * 2.0 * x * scale, g * x * x

    def f(x, scale):
        return opaque(x, scale) * x

    assert grad(f, (0, 1))(3.0, 2.0) == (54.0, 27.0)
    assert grad(grad(f))(3.0, 2.0) == pytest.approx(36.0)
    with pytest.raises(DerivativeError, match="for the backward pass only"):
        autodiff(f, "forward")


def test_tracebacks_show_derived_lines():
    import traceback

    def f(x):
        return np.log(x["missing"])

    try:
        grad(f)({"a": 1.0})
    except KeyError as error:
        shown = "".join(traceback.format_exception(error))
    assert "x['missing']" in shown and "<derived df" in shown


# ---- what would lose a derivative, or give one of something else


def range_of_numbers(s):
    return np.sum(np.arange(s, 3.0) ** 2)


def through_text(s):
    return float(f"{s}") * s


def through_formatted_key(s):
    return {f"{s}": s}[f"{s}"]


def through_string(s):
    return float(str(s)) * s


def through_evaluation(s):
    return eval("s * 2") * s


def through_python_numbers(x):
    return sum(x.tolist())


def dtype_by_position(x):
    return np.sum(np.sum(x, 1, np.float64) ** 2)


def dtype_of_method(x):
    return np.sum(x.mean(1, float) ** 2)


def dtype_of_variance(x):
    return np.sum(np.var(x, 0, float))


def torch_extreme_of_axis(x):
    return torch.sum(torch.max(x, 0)[0])


def view_of_another_dtype(x):
    return torch.sum(x.view(torch.float32))


def biased_variance(x):
    return torch.var(x, False)


def biased_variance_of_method(x):
    return x.var(False)


def sign_into_another(x):
    y = x * 2.0
    s = np.sign(x, y)
    return np.sum(y * x) + s[0]


def floor_for_its_effect(x):
    y = np.zeros(3)
    np.floor(x, out=y)
    return np.sum(y * x)


def rounded_into_another(x):
    y = np.zeros(3)
    np.round(x, 1, y)
    return np.sum(y * x)


def extreme_into_another(x):
    y = np.zeros(1, int)
    k = x[:, None].argmax(0, y)
    return np.sum(y * x) + k[0]


def begun_anew(v):
    w = v.reshape(-1)
    for _ in range(1):
        w[0] = 0.0
    return 1.0


def changes_a_constant_elsewhere(x):
    c = np.ones(3)
    a = np.sum(x * c)
    z = begun_anew(c)
    return a * np.sum(x * c) * z


def puts_into_a_constant(x):
    c = np.ones(3)
    a = np.sum(x * c)
    z = np.put(c, 0, 9.0)
    return a * np.sum(x * c) if z is None else a


def sets_an_item_by_name(x):
    c = np.ones(3)
    a = np.sum(x * c)
    z = c.__setitem__(0, 9.0)
    return a * np.sum(x * c) if z is None else a


def adds_by_method(x):
    c = torch.ones(3)
    a = torch.sum(x * c)
    d = c.add_(1.0)
    return a * torch.sum(x * c * d)


def tripled_at_first(v):
    v[0] = v[0] * 3.0
    return v[0]


def fills_elsewhere_for_nothing(x):
    y = x * 1.0
    z = [tripled_at_first(y)]  # noqa: F841
    return np.sum(y * y)


def fills_elsewhere_in_a_condition(x):
    y = x * 1.0
    if begun_anew(y[1:]) > 0.0:
        return np.sum(y)
    return np.sum(y * y)


def fills_rows_elsewhere(x):
    c = np.ones((3, 3))
    a = np.sum(x * c)
    z = [begun_anew(row) for row in c]
    return a * np.sum(x * c) * len(z)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (view_of_another_dtype, "is of a dtype"),
        (biased_variance, "an axis is no bool"),
        (biased_variance_of_method, "an axis is no bool"),
        (sign_into_another, "writes into an argument"),
        (floor_for_its_effect, "writes into an argument"),
        (rounded_into_another, "writes into an argument"),
        (extreme_into_another, "writes into an argument"),
        (range_of_numbers, "np.arange has no known derivative"),
        (through_text, "JoinedStr"),
        (through_string, "str has no known derivative"),
        (through_evaluation, "eval reads variables by their names"),
        (through_python_numbers, r".tolist\(\) has no derivative"),
        (dtype_by_position, "too many positional arguments"),
        (dtype_of_method, "the place of keepdims"),
        (dtype_of_variance, "var takes 2 arguments"),
        (torch_extreme_of_axis, "too many positional arguments"),
        (changes_a_constant_elsewhere, r"begun_anew writes into c \(w\[0\] = 0.0\)"),
        (puts_into_a_constant, "np.put writes into c, which"),
        (sets_an_item_by_name, r".__setitem__\(\) within an expression changes"),
        (adds_by_method, r".add_\(\) within an expression changes"),
        (fills_elsewhere_for_nothing, "a function that is called writes into its argument v"),
        (fills_elsewhere_in_a_condition, r"begun_anew writes into y\[1:\]"),
        (fills_rows_elsewhere, "begun_anew writes into row"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_no_derivative_is_lost_without_a_word(f, message, mode):
    with pytest.raises(DerivativeError, match=message) as caught:
        autodiff(f, mode)
    assert caught.value.line is not None and caught.value.line.file == __file__


def in_memory_order(x):
    return np.sum(x.ravel("K") * np.arange(3.0))


def to_integers(x):
    return np.sum(np.array(x, dtype=int) * x)


def extreme_of_named_list(x):
    items = [x[0], x[1]]
    return np.max(items)


def real_part(x):
    return np.sum(np.real(x * 1j))


def real_attribute(x):
    return np.sum((x * 1j).real)


def modulus(x):
    return np.sum(np.abs(x + 1j))


def of_matrix_norm(x):
    return np.linalg.norm(np.outer(x, x), 2)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (in_memory_order, "order='K'"),
        (to_integers, "converted to"),
        (extreme_of_named_list, "a list is taken for an array"),
        (real_part, "complex numbers have no derivative"),
        (real_attribute, "complex numbers have no derivative"),
        (modulus, "complex numbers have no derivative"),
        (of_matrix_norm, "norm of a matrix"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_what_values_show_is_refused_in_both_modes(f, message, mode):
    tangent = {"d_x": np.ones(3)} if mode == "forward" else {}
    with pytest.raises(DerivativeError, match=message):
        autodiff(f, mode)(V, **tangent)


def test_views_are_seen_as_such():
    """Without, the write to y would be lost in x."""

    def contiguous(x):
        y = np.ascontiguousarray(x)
        y[0] = y[1] ** 2
        return np.sum(x * x)

    def real(x):
        y = np.real(x)
        y[0] = y[1] ** 2
        return np.sum(x * x)

    def positive(x):
        y = +x
        y[0] = y[1] ** 2
        return torch.sum(x * x)

    for f in (contiguous, real, positive):
        with pytest.raises(DerivativeError, match="y is written to while x"):
            grad(f)


def test_gradients_have_the_dtype_of_their_arguments():
    def f(x, s):
        return np.sum(x * np.arange(3.0)) * s

    x = V.astype(np.float32)
    gradient, slope = grad(f, (0, 1))(x, np.float32(1.5))
    assert gradient.dtype == np.float32 and type(slope) is np.float32
    tangent = autodiff(grad(f), "forward")(x, np.float32(1.5), d_x=np.ones(3))
    assert tangent.shape == (3,)


def test_a_flag_in_the_place_of_an_axis_is_refused_when_it_runs():
    """Without, torch's biased variance would get the gradient of the unbiased one."""

    def f(x, unbiased):
        return x.var(unbiased)

    with pytest.raises(DerivativeError, match="False is in the place of an axis"):
        grad(f)(torch.tensor(V), False)


def test_what_is_too_short_to_be_unpacked_is_the_error_that_it_is_in_python():
    def f(x):
        a, *_, b = x
        return a * b

    assert grad(f)([2.0, 3.0]) == [3.0, 2.0]
    for call in (f, grad(f)):
        with pytest.raises(ValueError, match="expected at least 2, got 1"):
            call([2.0])


def test_keys_of_a_dict_are_not_popped():
    def f(d):
        first = d.pop(0)
        return first * d[1]

    with pytest.raises(DerivativeError, match="pop of a key of a dict"):
        grad(f)({0: 2.0, 1: 3.0})


def test_a_file_that_has_changed(tmp_path, monkeypatch):
    """What runs is what was imported, so a derivative of what the file says now would be another function's."""
    path = tmp_path / "of_a_file.py"
    path.write_text("def cube(x):\n    return x * x * x\n\n\ndef outer(x):\n    return cube(x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("of_a_file")
    assert grad(module.outer)(2.0) == 12.0
    for changed in ("x * x + 0", "x * x * y", "x * x * x * 1.0", "x * abs(x) * x"):
        path.write_text(path.read_text().replace("x * x * x", changed, 1))
        for f in (module.cube, module.outer):
            with pytest.raises(DerivativeError, match="another function's; has the file changed"):
                grad(f)
        path.write_text(path.read_text().replace(changed, "x * x * x", 1))
    path.write_text('def cube(x):\n    """With comments now."""\n    # more\n    return x * x * x\n')
    assert grad(module.cube)(2.0) == 12.0


def test_a_function_within_another_is_known_by_its_code():
    power, label = 2, "a"

    def f(x, *, by=lambda v: v):
        def inner(v):
            return v**power if label == "a" else f(v)

        return inner(x) + sum(inner(v) for v in [x, x])

    assert grad(f)(3.0) == 18.0


def test_a_call_that_python_may_not_make():
    def f(x):
        def double(v):
            return v * 2.0

        if 0.0 < double(x) < double(3.0):
            return x * x
        return x

    with pytest.raises(DerivativeError, match=r"double.3.0.:\n.*may not be evaluated; write an if"):
        grad(f)


def test_lambdas_of_heads():
    """A lambda in a statement's head is taken; of one that cannot be told from another the line is shown."""
    found = []
    for one in [lambda x: x * x]:
        found.append(one)
    if len(found) == 1 and (cube := lambda x: x**3):
        found.append(cube)
    assert [grad(one)(2.0) for one in found] == [4.0, 12.0]
    for one in (lambda x: x * 2.0, lambda x: x * (1.0 + 1.0)):  # which are compiled to the same
        with pytest.raises(DerivativeError, match=r"test_refusals.py:\d+: for one in(.|\n)*more than one lambda"):
            grad(one)


def test_pads_with_a_derivative():
    def by_edge(x):
        return np.sum(np.pad(x, 1, mode="edge"))

    def by_two(x):
        return np.sum(np.pad(x, 1, constant_values=(1.0, 2.0)))

    for f in (by_edge, by_two):
        with pytest.raises(DerivativeError, match="pad is of mode='constant'"):
            grad(f)(V)


def test_a_tangent_stays_as_it_was():
    """A function that writes into its argument writes into the tangent too, and the caller keeps his own."""

    def f(x):
        x[0] = x[1] * 2.0
        return np.sum(x * x)

    tangent = np.array([1.0, 2.0, 3.0])
    along = autodiff(f, "forward")(V.copy(), d_x=tangent)
    assert along == pytest.approx(grad(f)(V.copy()) @ tangent, rel=1e-14)  # rounding of three products
    assert tangent.tolist() == [1.0, 2.0, 3.0]


def test_a_function_that_moved_in_its_file(tmp_path, monkeypatch):
    path = tmp_path / "of_a_moved.py"
    path.write_text("def cube(x):\n    return x * x * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("of_a_moved")
    path.write_text("def other(x):\n    return x\n\n\n" + path.read_text())
    with pytest.raises(DerivativeError, match=r"no 'def cube' .* has its file changed"):
        grad(module.cube)

    async def later(x):
        return x

    with pytest.raises(DerivativeError, match="later is a coroutine"):
        grad(later)
