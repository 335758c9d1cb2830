"""Values and derivatives of a table of functions, beside central differences, torch's autograd and each other."""

import functools
import inspect
import types

import numpy as np
import pytest
import torch

from dam.derive import DerivativeError, autodiff, grad, source
from tests.derive.functions import CASES

# A central difference of step h has an error of h^2 f''' / 6 and one of rounding, eps f / h; f and f''' are of the
# order of 1 to 100 here.
STEP = 1e-6
NEAR = 1e-6


def fresh(value):
    """A copy that a function may write into."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (tuple, list)):
        return type(value)(fresh(one) for one in value)
    return {k: fresh(v) for k, v in value.items()} if isinstance(value, dict) else value


def flat(value):
    """All numbers of a structure, one after the other."""
    if isinstance(value, (tuple, list)):
        return np.concatenate([flat(one) for one in value])
    if isinstance(value, dict):
        return np.concatenate([flat(one) for one in value.values()])
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    return np.ravel(np.asarray(value, dtype=float))


def like(value, numbers):
    """The structure of a value with other numbers."""
    rest = iter(np.asarray(numbers, dtype=float))

    def made(one):
        if isinstance(one, (tuple, list)):
            return type(one)(made(item) for item in one)
        if isinstance(one, dict):
            return {k: made(v) for k, v in one.items()}
        if isinstance(one, np.ndarray):
            return np.array([next(rest) for _ in range(one.size)]).reshape(one.shape)
        return float(next(rest))

    return made(value)


def central(f, arguments, k, directions, step=STEP):
    """Derivatives of f along directions of argument k."""
    start = flat(arguments[k])
    rows = []
    for direction in directions:
        ends = []
        for sign in (1, -1):
            changed = [fresh(a) for a in arguments]
            changed[k] = like(arguments[k], start + sign * step * direction)
            ends.append(flat(f(*changed)))
        rows.append((ends[0] - ends[1]) / (2 * step))
    return np.array(rows)


def close(found, expected, tolerance):
    np.testing.assert_array_less(np.abs(found - expected), tolerance * (1 + np.abs(expected)))


def arguments_of(name):
    f, arguments, wrt, order, in_torch = CASES[name]
    return f, [fresh(a) for a in arguments], wrt, order, in_torch


@functools.cache
def derived(name):
    f, _, wrt, _, _ = CASES[name]
    return grad(f, wrt, preserve_result=True)


def gradients(name):
    """Gradients in every argument, and the result."""
    *found, value = derived(name)(*arguments_of(name)[1])
    return found, value


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_slopes_and_results_stay(name):
    """Reverse mode beside central differences; forward mode beside reverse to rounding.

    The result is f's to rounding: np.interp and its kin are computed by other operations.
    """
    f, arguments, wrt, _, _ = arguments_of(name)
    found, value = gradients(name)
    close(flat(value), flat(f(*[fresh(a) for a in arguments])), 1e-14)
    for k, gradient in zip(wrt, found, strict=True):
        basis = np.eye(flat(arguments[k]).size)
        close(flat(gradient), central(f, arguments, k, basis)[:, 0], NEAR)
    parameter = list(inspect.signature(f).parameters)[wrt[-1]]
    tangent = autodiff(f, "forward", wrt[-1])
    along = np.cos(np.arange(basis.shape[0]))
    given = {f"d_{parameter}": like(arguments[wrt[-1]], along)}
    close(flat(tangent(*[fresh(a) for a in arguments], **given)), flat(found[-1]) @ along, 1e-10)


class _Torch(types.ModuleType):
    """numpy's names for torch's functions, as far as the table needs them."""

    float64 = torch.float64
    pi = np.pi
    linalg = torch.linalg

    def __getattr__(self, name):
        known = {
            "array": lambda x: torch.as_tensor(x, dtype=torch.float64),
            "concatenate": lambda l, axis=0: torch.cat(tuple(l), axis),
            "expand_dims": torch.unsqueeze,
            "power": torch.pow,
            "dot": torch.matmul,
            "transpose": lambda x: x.T,
            "amin": lambda x, axis=None, keepdims=False: torch.amin(x, axis, keepdims),
            "max": torch.amax,
            "min": torch.amin,
            "ones": lambda n: torch.ones(n, dtype=torch.float64),
            "arange": lambda n: torch.arange(n, dtype=torch.float64),
            "maximum": lambda x, z: torch.maximum(*torch.broadcast_tensors(x, _tensor(z))),
            "minimum": lambda x, z: torch.minimum(*torch.broadcast_tensors(x, _tensor(z))),
            "sum": lambda x, axis=None, keepdims=False: torch.sum(x, axis, keepdims),
            "mean": lambda x, axis=None, keepdims=False: torch.mean(x, axis, keepdims),
            "sqrt": lambda x: torch.sqrt(_tensor(x)),
        }
        found = known.get(name) or getattr(torch, name)
        return lambda *a, **k: found(*a, **k)


def _tensor(x):
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)


def in_torch(f):
    """The same function with torch for numpy."""
    space = {**f.__globals__, "np": _Torch("np")}
    for name, value in f.__globals__.items():
        if isinstance(value, types.FunctionType) and value.__module__ == f.__module__:
            space[name] = types.FunctionType(value.__code__, space, name, value.__defaults__, value.__closure__)
        elif isinstance(value, np.ndarray):
            space[name] = torch.as_tensor(value)
    made = types.FunctionType(f.__code__, space, f.__name__, f.__defaults__, f.__closure__)
    made.__kwdefaults__ = f.__kwdefaults__
    return made


def leaves(value):
    """A structure of tensors that require a gradient."""
    if isinstance(value, (tuple, list)):
        return type(value)(leaves(one) for one in value)
    if isinstance(value, dict):
        return {k: leaves(v) for k, v in value.items()}
    return value if isinstance(value, int) else torch.tensor(value, dtype=torch.float64, requires_grad=True)


def tensors(value):
    if isinstance(value, (tuple, list)):
        return [t for one in value for t in tensors(one)]
    if isinstance(value, dict):
        return [t for one in value.values() for t in tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


IN_TORCH = [name for name, case in CASES.items() if case[4]]


def by_autograd(f, arguments, wrt, second):
    """Gradient by torch, and the gradient of its product with a direction."""
    given = [leaves(a) for a in arguments]
    value = in_torch(f)(*given)
    inputs = [t for k in wrt for t in tensors(given[k])]
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        nothing = np.zeros(sum(t.numel() for t in inputs))
        return nothing, nothing
    first = torch.autograd.grad(value, inputs, create_graph=second, allow_unused=True)
    gradient = [torch.zeros_like(t) if g is None else g for g, t in zip(first, inputs, strict=True)]
    if not second:
        return flat(gradient), None
    along = np.sin(1.0 + np.arange(sum(g.numel() for g in gradient)))
    product = torch.cat([g.reshape(-1) for g in gradient]) @ torch.as_tensor(along)
    if not product.requires_grad:
        return flat(gradient), np.zeros(along.size)
    twice = torch.autograd.grad(product, inputs, allow_unused=True)
    return flat(gradient), flat([torch.zeros_like(t) if g is None else g for g, t in zip(twice, inputs, strict=True)])


@pytest.mark.parametrize("name", IN_TORCH)
def test_gradients_are_those_of_torch(name):
    """Both in float64, so to rounding; 1e-9 for what cancels in between."""
    f, arguments, wrt, _, _ = arguments_of(name)
    expected, _ = by_autograd(f, arguments, wrt, False)
    found, _ = gradients(name)
    close(flat(found), expected, 1e-9)


def second_order(name):
    """The product of the Hessian with a direction, reverse over reverse and forward over reverse."""
    f, arguments, wrt, _, in_torch_too = arguments_of(name)
    k = wrt[0]
    gradient = grad(f, k)
    size = flat(arguments[k]).size
    along = np.sin(1.0 + np.arange(size))
    given = like(arguments[k], along)
    parameter = list(inspect.signature(f).parameters)[k]
    twice = autodiff(gradient, "reverse", k)(*[fresh(a) for a in arguments], init_grad=given)
    over = autodiff(gradient, "forward", k)(*[fresh(a) for a in arguments], **{f"d_{parameter}": given})
    # The Hessian is symmetric.
    close(flat(twice), flat(over), 1e-10)
    expected = central(gradient, arguments, k, [along], step=1e-5)[0]
    close(flat(twice), expected, 1e-5)
    if in_torch_too:
        _, exact = by_autograd(f, arguments, (k,), True)
        close(flat(twice), exact, 1e-9)


TWICE = [name for name, case in CASES.items() if case[3] > 1]
FEW = [
    "call_in_loop", "store_in_loop", "list_append", "dicts", "return_in_loop", "network", "broadcast_rows", "layers",
    "scalar_power", "matvec",
]  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_second_derivatives(name):
    second_order(name)


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in TWICE if n not in FEW])
def test_second_derivatives_of_all(name):
    second_order(name)


def test_third_derivatives():
    """Of polynomials and of exp, which are known."""

    def f(x):
        return x**4 + np.exp(2.0 * x)

    third = grad(grad(grad(f)))
    assert third(0.7) == pytest.approx(24 * 0.7 + 8 * np.exp(1.4), rel=1e-12)


def test_what_is_put_in_the_place_of_no_number_has_no_slope():
    """Nor a share in an adjoint that is infinite, as y's is of y**2."""

    def f(x):
        return np.sum(np.nan_to_num(x) ** 2)

    with np.errstate(over="ignore"):
        found = grad(f)(np.array([np.inf, 1.5, np.nan, -np.inf]))
    np.testing.assert_array_equal(found, [0.0, 3.0, 0.0, 0.0])


def cube_in_array(x):
    y = np.zeros(2)
    y[0] = x
    y[1] = x**2
    return y[0] * y[1]


def cube_in_slice(x):
    y = np.ones(2)
    y[:] = x**2
    return y[0] * y[1] / x


def cube_in_list(x):
    items = [0.0] * 2
    for i in range(2):
        items[i] = x ** (i + 1)
    return items[0] * items[1]


def cube_in_dict(x):
    table = {}
    for key in ("a", "b"):
        table[key] = x**2
    return table["a"] * table["b"] / x


@pytest.mark.parametrize("f", [cube_in_array, cube_in_slice, cube_in_list, cube_in_dict])
def test_reverse_over_forward_of_what_is_stored(f):
    """Tangents are stored too: of x^3, 6 x along 0.5; exact but for some ten roundings."""
    tangent = autodiff(f, "forward")
    assert tangent(1.3, d_x=0.5) == pytest.approx(1.5 * 1.3**2, rel=1e-14)
    assert autodiff(tangent)(1.3, d_x=0.5) == pytest.approx(3 * 1.3, rel=1e-14)


def power_in_loop(x):
    result = 1.0
    for _ in range(4):
        result = result * x
    return result


def power_in_while(x):
    result = x
    while result < 2.0:
        result = result * result
    return result


def power_in_list(x):
    powers = [x]
    for _ in range(3):
        powers.append(powers[-1] * x)
    return powers[-1]


def power_in_array(x):
    powers = np.ones(5)
    for k in range(1, 5):
        powers[k] = powers[k - 1] * x
    return powers[4]


@pytest.mark.parametrize("f", [power_in_loop, power_in_while, power_in_list, power_in_array])
def test_third_derivatives_of_loops(f):
    """Each is x^4 at 1.3; exact but for some ten roundings."""
    assert grad(grad(grad(f)))(1.3) == pytest.approx(24 * 1.3, rel=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_source_alone_gives_the_same_numbers(name, monkeypatch):
    """Executed in an empty namespace, with nothing that could transform again."""
    _, arguments, _, _, _ = arguments_of(name)
    derivative = derived(name)
    expected = flat(derivative(*[fresh(a) for a in arguments]))
    space = {}
    monkeypatch.setattr("dam.derive.module.Module.function", None)
    exec(compile(source(derivative), "round trip", "exec"), space)
    np.testing.assert_array_equal(flat(space[derivative.__name__](*arguments)), expected)


def test_a_sum_that_nobody_reads_is_not_computed():
    def f(x):
        return np.sum(x * x)

    def counted(x):
        return np.sum(np.ones(3, int)) if x[0] > 5 else np.sum(np.arange(3))

    x = np.array([0.5, -2.0])
    gradient = grad(f)
    assert "= np.sum" not in source(gradient) and "= np.sum" in source(grad(f, preserve_result=True))
    with pytest.raises(TypeError, match="axis"):  # numpy's sum takes no tensor
        gradient(torch.tensor(x))
    for given in (x, x.astype(np.float32), np.float64(0.3), np.float32(0.3), 0.3):
        found = gradient(given)
        assert type(found) is type(given) and np.all(np.asarray(found) == 2 * np.asarray(given))
    with pytest.raises(DerivativeError, match="needs a scalar result, and this one is a int64"):
        grad(counted)(x)


def test_what_a_line_computes_twice_is_computed_once():
    """Of a name that gets another value, and of an array that is written to, again."""

    def f(x):
        y = np.exp(-x) * x + np.exp(-x)
        x = x * 2.0
        z = x * np.exp(-x)
        x[0] = 1.0
        return np.sum(y * z * np.exp(-x))

    code = [line.partition("#")[0] for line in source(grad(f)).splitlines()]
    assert sum(line.count("np.exp(") for line in code) == 3


def test_there_are_as_many_functions_as_promised():
    assert len(CASES) >= 140
