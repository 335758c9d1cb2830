"""Functions of numpy and their arguments: what the tests of dam.derive go through."""

import math

import numpy as np

SCALE = 1.7
WEIGHTS = np.array([0.5, -1.2, 0.8])
A = np.array([[0.3, -0.7, 1.1], [0.9, 0.4, -0.2]])
B = np.array([[0.5, 0.1], [-0.4, 0.8], [1.2, -0.3]])
S = np.array([[2.0, 0.3, -0.1], [0.4, 1.7, 0.2], [0.1, -0.5, 1.4]])
V = np.array([0.4, -0.9, 1.3])
P = np.array([0.6, 1.4, 0.9])
U = np.array([1.1, 0.2, -0.6])
C = np.arange(24.0).reshape(2, 3, 4) / 10 - 1.05

CASES = {}


def case(*arguments, wrt=None, order=2, torch=True):
    """Registers a function; wrt all its float arguments unless given. order: to how high an order it is checked."""

    def register(f):
        assert f.__name__ not in CASES, f.__name__
        where = wrt if wrt is not None else tuple(k for k, a in enumerate(arguments) if not isinstance(a, int))
        CASES[f.__name__] = (f, arguments, where, order, torch)
        return f

    return register


# ---- scalars


@case(1.3)
def polynomial(x):
    return 3.0 * x**3 - 2 * x**2 + x - 5


@case(1.3, 0.7)
def scalar_arithmetic(x, y):
    return (x + y) * (x - y) / (x * y) - -x


@case(1.3, 2.4)
def scalar_power(x, y):
    return x**y + 2.0**x + y**-1.5


@case(0.7, torch=False)
def scalar_math(x):
    return math.sin(x) * math.exp(x) + math.log(x) * math.sqrt(x) + math.atan2(x, 2.0) + math.tanh(x)


@case(2.3, 0.7)
def scalar_modulo(x, y):
    return (x % y) * x


@case(-1.3)
def scalar_abs(x):
    return abs(x) ** 3 + abs(x) * x


@case(1.3, 0.4)
def scalar_extremes(x, y):
    return max(x, y) * min(x, y) + max(x, 2.0) + min(3.0, y)


@case(1.3)
def constant_result(x):
    return 2.0


@case(1.3, 0.4, wrt=(0,))
def second_unused(x, y):
    return x * x


@case(1.3, 5)
def iterated_power(x, n):
    result = 1.0
    for _ in range(n):
        result = result * x
    return result


@case(1.3)
def global_constant(x):
    return SCALE * x**2


@case(1.3, torch=False)
def augmented(x):
    y = x
    y += 2.0 * x
    y *= x
    y -= 1.0
    y /= x + 3.0
    y **= 2
    return y


@case(1.3)
def chained_assignment(x):
    a = b = x * x
    return a * b


@case(1.3, 0.4)
def swapped(x, y):
    x, y = y, x
    x, y = y * x, x
    return x - 2.0 * y


@case(1.3)
def annotated(x: float) -> float:
    y: float = x * 2.0
    return y * y


@case(1.3)
def overwritten(x):
    y = x * x
    z = y * x
    y = math.pi * z
    z = y * y
    y = z + y
    return y * z


# ---- control flow


@case(1.3)
def branch_taken(x):
    if x > 1.0:
        y = x * x
    else:
        y = -x
    return y * x


@case(0.3)
def branch_not_taken(x):
    if x > 1.0:
        y = x * x
    else:
        y = -x
    return y * x


@case(1.3)
def branch_overwrites(x):
    y = x * x
    if x > 1.0:
        y = y * y
    return y


@case(1.3)
def branch_nested(x):
    y = x
    if x > 0:
        y = y * x
        if x > 1:
            y = y + x**3
        elif x > 2:
            y = y * 2.0
        else:
            y = -y
    return y * y


@case(0.3)
def early_return(x):
    if x > 1:
        return x * x
    y = x * 3.0
    if x < 0.5:
        return y**3
    return y


@case(1.7)
def early_return_else(x):
    if x > 2:
        y = x
    elif x > 1:
        return x**4
    else:
        return -x
    return y * y


@case(1.1)
def return_in_loop(x):
    y = x
    for i in range(10):
        y = y * x
        if y > 2.0:
            return y * x + i
    return y


@case(1.1)
def return_in_nested_loop(x):
    y = x
    for i in range(4):
        for j in range(3):
            y = y * x
            if y > 2.0:
                return y * x * (i + 1) + j
        y = y + 0.1 * x
    return y


@case(1.1)
def break_in_loop(x):
    y = x
    for i in range(10):
        if i == 4:
            break
        y = y * x + i
    return y


@case(1.1)
def continue_in_loop(x):
    y = x
    for i in range(6):
        if i % 2:
            continue
        y = y * x + i
    return y


@case(1.1)
def loop_else(x):
    y = x
    for i in range(3):  # noqa: B007
        if y > 100.0:
            break
        y = y * x
    else:
        y = y * y
    return y


@case(1.4)
def while_loop(x):
    y = x
    while y < 10.0:
        y = y * x + 0.5
    return y


@case(1.4)
def while_break(x):
    y = x
    n = 0
    while True:
        y = y * x
        n += 1
        if n >= 4:
            break
    return y


@case(1.4)
def while_continue(x):
    y, n = x, 0
    while n < 5:
        n += 1
        if n == 2:
            continue
        y = y * x
    return y


@case(0.8)
def nested_loops(x):
    total = 0.0
    for i in range(3):
        inner = x
        for j in range(i + 1):
            inner = inner * x + j
        total = total + inner * inner
    return total


@case(0.8)
def loop_two_carried(x):
    a, b = 0.0, x
    for _ in range(6):
        a, b = b, a + b * x
    return a * b


@case(0.8)
def branch_in_loop(x):
    y = x
    for i in range(5):
        if i % 2 == 0:
            t = y * x
            y = t * t + 0.1
        else:
            y = y + x
    return y


@case(0.8)
def loop_index_used(x):
    y = 0.0
    for i in range(1, 8, 2):
        y += x**i / i
    return y


@case(0.8)
def loop_backwards(x):
    y = 1.0
    for i in range(5, 0, -1):
        y = y * x + i
    return y


@case(0.8)
def loop_no_iterations(x):
    y = x * x
    for _ in range(0):
        y = y * x
    return y


@case(0.8)
def loop_variable_after(x):
    y = x
    for i in range(4):  # noqa: B007
        y = y * x
    return y * i


@case(0.8)
def loop_over_constants(x):
    y = 0.0
    for c in [0.5, 1.5, -0.7]:
        y = y * x + c
    return y


@case(0.8)
def loop_over_pairs(x):
    y = 0.0
    for c, p in [(0.5, 1), (1.5, 2)]:
        y = y + c * x**p
    return y


@case(1.4)
def conditional_expression(x):
    return (x * x if x > 1 else -x) * (x if x < 0 else 2.0)


@case(1.4)
def newton(x):
    y = x
    for _ in range(6):
        y = y - (y * y - x) / (2.0 * y)
    return y


@case(1.2)
def flags(x):
    y, done = x, False
    while not done:
        y = y * x
        if y > 3.0:
            done = True
    return y


@case(0.9)
def assertion(x):
    assert x > 0, "positive"
    if x > 5:
        raise ValueError("too large")
    return x**3


# ---- calls


def helper(a, b=2.0):
    return a * b + np.sin(a)


def helper_pair(a, b):
    return a * b, a - b


def helper_loop(a, n):
    for _ in range(n):
        a = a * a * 0.5
    return a


def factorial_like(x, n):
    if n <= 0:
        return 1.0
    return x * n * factorial_like(x, n - 1)


def helper_unused(a, b):
    return a * 3.0


@case(1.4)
def call_user(x):
    return helper(x) * helper(x, 3.0) + helper(x, b=x)


@case(1.4, 0.3)
def call_pair(x, y):
    p, m = helper_pair(x, y)
    return p * m


@case(1.4)
def call_same_argument_twice(x):
    p, m = helper_pair(x, x)
    return p + m * x


@case(1.4)
def call_in_loop(x):
    y = x
    for i in range(3):
        y = helper(y, 0.3) + helper_loop(x, i)
    return y


@case(1.4)
def call_recursive(x):
    return factorial_like(x, 4)


@case(1.4)
def call_nested_calls(x):
    return helper(helper(x, 0.2), helper_loop(x, 2))


@case(1.4, 0.2)
def call_unused_argument(x, y):
    return helper_unused(x, y) * y


@case(1.4)
def default_argument(x, k=3.0, *, shift=0.5):
    return x**2 * k + shift * x


@case(0.6)
def nested_function(x):
    def square(u):
        return u * u

    return square(x) + square(x * 2.0)


@case(0.6)
def nested_captures(x):
    scale = x * 3.0

    def scaled(u, power=2):
        return scale * u**power

    return scaled(x) + scaled(2.0, 3)


@case(0.6)
def nested_in_nested(x):
    k = x + 1.0

    def outer(u):
        def inner(v):
            return v * k

        return inner(u) * inner(2.0)

    return outer(x)


@case(0.6)
def nested_lambda(x):
    cube = lambda u: u**3  # noqa: E731
    return cube(x) + cube(x + 1.0)


@case(0.6)
def nested_after_change(x):
    s = x

    def times(u):
        return u * s

    a = times(x)
    s = s * s
    return a + times(x)


def closure(scale, array):
    def inside(x):
        return np.sum(x * array) * scale

    return inside


CASES["closure"] = (closure(1.5, WEIGHTS), (V,), (0,), 2, False)
CASES["lambda_case"] = (lambda x: np.sum(x**2) * 3.0, (V,), (0,), 2, True)

# ---- arrays


@case(V)
def elementwise(x):
    return np.sum(np.sin(x) * np.cos(x) + np.tanh(x) ** 2 + np.exp(-x))


@case(P)
def elementwise_positive(x):
    return np.sum(np.log(x) + np.sqrt(x) + 1.0 / x + np.log1p(x) + x**2.5)


@case(P)
def elementwise_more(x):
    return np.sum(np.expm1(x) + np.square(x) + np.reciprocal(x) + np.log2(x) + np.log10(x) + np.exp2(x))


@case(P * 0.5)
def inverse_functions(x):
    return np.sum(np.arcsin(x) * np.arccos(x) + np.arctan(x) + np.arctanh(x) + np.arcsinh(x) + np.arccosh(x + 2))


@case(P)
def hyperbolic(x):
    return np.sum(np.sinh(x) - np.cosh(x) * x + np.tan(x * 0.4))


@case(V)
def absolute(x):
    return np.sum(np.abs(x) * x + np.negative(x) + np.absolute(x))


@case(V, U)
def two_arrays(x, y):
    return np.sum(np.multiply(x, y) + np.subtract(x, y) ** 2 + np.add(x, 2.0) * np.divide(y, x))


@case(P, U)
def power_arrays(x, y):
    return np.sum(x**y + np.power(x, 2.0))


@case(V, U)
def extremes(x, y):
    return np.sum(np.maximum(x, y) * np.minimum(x, 0.3) + np.maximum(x, 0.0))


@case(V, U)
def angles(x, y):
    return np.sum(np.arctan2(x, y) + np.hypot(x, y) + np.logaddexp(x, y))


@case(V)
def clipped(x):
    return np.sum(np.clip(x, -0.5, 1.0) * x)


@case(V, U)
def where_case(x, y):
    return np.sum(np.where(x > 0, x * y, y**2))


@case(V, torch=False)
def sign_floor(x):
    return np.sum(np.sign(x) * x + np.floor(x) * x + (x > 0) * x)


@case(V, 0.6)
def broadcast_scalar(x, k):
    return np.sum((x + k) * (x * k - k) / k)


@case(A, U)
def broadcast_rows(x, y):
    return np.sum((x + y) * np.sin(x * y) - y)


@case(A, np.array([[0.5], [1.5]]))
def broadcast_columns(x, y):
    return np.sum(x * y + y**2 - x / y)


@case(np.array([[0.3], [0.8]]), U)
def broadcast_outer(x, y):
    return np.sum(np.exp(x * y) - x)


@case(A)
def sum_axis(x):
    return np.sum(np.sum(x, axis=0) ** 2) + np.sum(np.sum(x**2, axis=1, keepdims=True) * x)


@case(C)
def sum_axes(x):
    return np.sum(np.sum(x**2, axis=(0, 2)) ** 2) + np.sum(x.sum(-1) ** 3)


@case(A)
def mean_case(x):
    return np.mean(x**2) + np.sum(np.mean(x, axis=1) ** 2) + np.sum(x.mean(axis=0, keepdims=True) * x)


@case(A, order=1, torch=False)
def max_min(x):
    return np.max(x) * np.min(x) + np.sum(np.max(x, axis=0) ** 2) + np.sum(np.amin(x, axis=1, keepdims=True) * x)


@case(A)
def prod_case(x):
    return np.prod(x) + np.sum(np.prod(x, axis=1) ** 2)


@case(np.array([0.0, 2.0, 3.0]), order=1)
def prod_zero(x):
    return np.prod(x)


@case(A, torch=False)
def var_std(x):
    return np.var(x) + np.std(x) + np.sum(np.var(x, axis=0)) + np.sum(np.std(x, axis=1, ddof=1)) + x.std()


@case(V)
def cumsum_case(x):
    return np.sum(np.cumsum(x, 0) ** 2)


@case(V, torch=False)
def cumprod_case(x):
    return np.sum(np.cumprod(x))


@case(A, torch=False)
def norms(x):
    return np.linalg.norm(x) + np.sum(np.linalg.norm(x, axis=1)) + np.linalg.norm(x[0], 1)


@case(P)
def logsumexp_case(x):
    m = np.max(x)
    return m + np.log(np.sum(np.exp(x - m)))


@case(A)
def softmax_case(x):
    e = np.exp(x - np.max(x, axis=1, keepdims=True)) if False else np.exp(x)
    p = e / np.sum(e, axis=1, keepdims=True)
    return np.sum(p * np.log(p))


@case(S)
def linear_algebra(x):
    return np.trace(np.linalg.inv(x)) + np.linalg.det(x)


@case(S, V)
def solve_case(a, b):
    return np.sum(np.linalg.solve(a, b) ** 2)


@case(A, B)
def matmul_case(x, y):
    return np.sum(np.matmul(x, y) ** 2) + np.sum(x @ y)


@case(A, V)
def matvec(x, v):
    return np.sum((x @ v) ** 2) + np.sum(np.dot(x, v))


@case(V, B)
def vecmat(v, y):
    return np.sum((v @ y) ** 3)


@case(V, U)
def vecvec(x, y):
    return (x @ y) * np.dot(x, x) + np.inner(x, y)


@case(C, np.arange(20.0).reshape(4, 5) / 10)
def batched_matmul(x, y):
    return np.sum(np.sin(x @ y))


@case(C, C.transpose(0, 2, 1) * 0.5)
def batched_both(x, y):
    return np.sum((x @ y) ** 2)


@case(A, B, torch=False)
def dot_matrices(x, y):
    return np.sum(np.dot(x, y) * x.dot(y))


@case(C, B, torch=False)
def dot_many(x, y):
    return np.sum(np.dot(np.transpose(x, (0, 2, 1)), y) ** 2)


@case(V, U)
def outer_case(x, y):
    return np.sum(np.outer(x, y) ** 2 * np.outer(x, x))


@case(C, np.arange(12.0).reshape(3, 4) / 7, torch=False)
def tensordot_case(x, y):
    return np.sum(np.tensordot(x, y, 2) ** 2) + np.sum(np.tensordot(x, y, ([1], [0])) ** 2)


@case(A, B, torch=False)
def einsum_case(x, y):
    return np.sum(np.einsum("ij,jk->ik", x, y) ** 2) + np.einsum("ij->", x) + np.sum(np.einsum("ij,ji->j", x, y) ** 2)


@case(A, B, torch=False)
def kron_case(x, y):
    return np.sum(np.kron(x, y) ** 2)


@case(V, U, torch=False)
def cross_case(x, y):
    return np.sum(np.cross(x, y) ** 2)


@case(V, torch=False)
def diff_case(x):
    return np.sum(np.diff(x) ** 2)


@case(A)
def reshaped(x):
    return (
        np.sum(np.reshape(x, (3, 2)) ** 2 @ np.ones(2)) + np.sum(x.reshape(-1)[1:4] ** 3) + np.sum(np.ravel(x)[2] * x)
    )


@case(A)
def transposed(x):
    return np.sum(x.T @ x) + np.sum(np.transpose(x)[0] ** 2)


@case(C, torch=False)
def transposed_axes(x):
    return np.sum(np.transpose(x, (2, 0, 1))[1] ** 2) + np.sum(x.transpose(1, 0, 2)[0] ** 3)


@case(C)
def axes_moved(x):
    return np.sum(np.swapaxes(x, 0, 2)[1] ** 2) + np.sum(np.moveaxis(x, 0, -1)[1] ** 3)


@case(V)
def expanded(x):
    return np.sum(np.expand_dims(x, 0) * x[:, None] ** 2) + np.sum(np.squeeze(x[None, :, None]) ** 2)


@case(V)
def broadcast_to_case(x):
    return np.sum(np.broadcast_to(x, (2, 3)) ** 2)


@case(V, U)
def concatenated(x, y):
    return (
        np.sum(np.concatenate([x, y * 2.0, x]) ** 2 * np.arange(9.0))
        if False
        else np.sum(np.concatenate([x, y * 2.0, x]) ** 3)
    )


@case(A, A * 2.0)
def concatenated_axis(x, y):
    return np.sum(np.concatenate((x, y), axis=1)[:, 2:5] ** 2)


@case(V, U)
def stacked(x, y):
    return np.sum(np.stack([x, y, x * y]) ** 2) + np.sum(np.stack((x, y), axis=1)[1] ** 3)


@case(V, U, torch=False)
def stacks_more(x, y):
    return np.sum(np.vstack([x, y]) ** 2) + np.sum(np.hstack([x, y]) ** 3) + np.sum(np.column_stack([x, y])[1] ** 2)


@case(1.2, 0.7, torch=False)
def array_of_scalars(x, y):
    a = np.array([x, y, x * y])
    b = np.array([[x, 1.0], [y, x]])
    return np.sum(a**2) + np.sum(b @ b)


@case(V, torch=False)
def tiled(x):
    return (
        np.sum(np.tile(x, 2)[1:5] ** 2)
        + np.sum(np.tile(x, (2, 2)) ** 3)
        + np.sum(np.repeat(x, 2) ** 2 * np.arange(6.0))
    )


@case(V, torch=False)
def sorted_case(x):
    return np.sum(np.sort(x) * np.arange(3.0)) + np.sum(np.sort(x) ** 2)


@case(A, torch=False)
def flipped(x):
    return np.sum(np.flip(x, 1)[0] ** 2) + np.sum(np.roll(x, 1, axis=1)[1] ** 3) + np.sum(np.fliplr(x)[0] * x[1])


@case(S)
def triangles(x):
    return np.sum(np.tril(x) @ np.triu(x)) + np.sum(np.diag(x) ** 2)


@case(V)
def diag_made(x):
    return np.sum(np.diag(x) @ np.diag(x))


@case(A, torch=False)
def methods(x):
    return x.sum() * x.mean() + (x**2).sum(axis=1).prod() + x.T.dot(x).trace()


@case(V, torch=False)
def average_case(x):
    return np.average(x * x, weights=np.array([1.0, 2.0, 3.0]))


@case(V, torch=False)
def interpolated(x):
    return np.sum(np.interp(x, np.array([-2.0, 0.0, 2.0]), np.array([0.0, 1.0, -1.0])) * x)


# ---- subscripts and stores


@case(V)
def subscripts(x):
    return x[0] * x[1] + x[-1] ** 2


@case(A)
def subscripts_two(x):
    return x[0, 1] * x[1][2] + np.sum(x[:, 1:] ** 2) + np.sum(x[1, ::2])


@case(V)
def subscripts_advanced(x):
    return np.sum(x[[0, 0, 2]] ** 2) + np.sum(x[x > 0] ** 3)


@case(C)
def subscripts_ellipsis(x):
    return np.sum(x[..., 1] ** 2) + np.sum(x[:, None, 0] ** 3)


@case(V)
def loop_over_index(x):
    total = 0.0
    for i in range(len(x)):
        total += x[i] ** 2 * (i + 1)
    return total


@case(A)
def loop_over_rows(x):
    total = 0.0
    for row in x:
        total = total + np.sum(row) ** 2
    return total


@case(V, U)
def loop_zip(x, y):
    total = 1.0
    for a, b in zip(x, y):  # noqa: B905
        total = total * a + b
    return total


@case(V)
def loop_enumerate(x):
    total = 0.0
    for i, a in enumerate(x):
        total += a**2 * i
    return total


@case(V)
def loop_reversed(x):
    total = 0.0
    for a in reversed(x):
        total = total * 0.5 + a * a
    return total


@case(V, torch=False)
def stores(x):
    y = np.zeros(3)
    y[0] = x[1] * 2.0
    y[1:] = x[:2] ** 2
    return np.sum(y**3)


@case(V, torch=False)
def store_overwrites(x):
    y = np.sin(x)
    z = y * y
    y[1] = x[0] * z[2]
    y[1] = y[1] * y[0]
    return np.sum(y * z)


@case(V, torch=False)
def store_in_loop(x):
    y = np.zeros(4)
    y[0] = x[0]
    for i in range(3):
        y[i + 1] = y[i] * x[i] + 1.0
    return np.sum(y**2)


@case(V, torch=False)
def store_augmented(x):
    y = np.ones(3)
    y[0] += x[1]
    y[1:] *= x[:2]
    y[2] -= x[2] * y[0]
    return np.prod(y)


@case(V, torch=False)
def store_into_argument(x):
    y = x.copy()
    y[0] = y[1] * y[2]
    y[1] = y[0] * y[0]
    return np.sum(y)


@case(A, torch=False)
def store_rows(x):
    y = np.zeros((2, 3))
    for i in range(2):
        y[i] = x[i] ** 2
        y[i, 0] = x[i, 1] * y[i, 2]
    return np.sum(y**2)


@case(A, torch=False)
def store_nested(x):
    y = np.zeros((2, 3))
    y[0][1] = x[0, 0] ** 2
    y[1][0] += x[1, 1] * y[0][1]
    return np.sum(y * y)


@case(V, torch=False)
def store_masked(x):
    y = x * 2.0
    y[x < 0] = 0.0
    return np.sum(y**2)


@case(V, torch=False)
def store_branch(x):
    y = x * x
    for i in range(3):
        if x[i] > 0:
            y[i] = y[i] * x[i]
        else:
            y[i] = 0.5
    return np.sum(y**2)


@case(V, torch=False)
def cumulative(x):
    y = np.zeros_like(x)
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i]
        y[i] = total**2
    return np.sum(y)


@case(S, torch=False)
def elimination(x):
    a = x.copy()
    for k in range(3):
        for i in range(k + 1, 3):
            a[i] = a[i] - a[k] * (a[i, k] / a[k, k])
    return a[0, 0] * a[1, 1] * a[2, 2]


@case(V, torch=False)
def augmented_array(x):
    y = np.zeros(3)
    for i in range(3):
        y += x * (i + 1)
        y *= x
    return np.sum(y)


# ---- structures


@case(1.2, 0.7)
def tuples(x, y):
    pair = (x * y, x + y)
    a, b = pair
    return a * b + pair[0]


@case(1.2, 0.7)
def lists(x, y):
    items = [x, y, x * y]
    items[1] = items[0] * items[2]
    return items[0] + items[1] ** 2 + items[-1]


@case(1.2)
def list_append(x):
    items = []
    for i in range(4):
        items.append(x**i)
    return items[1] * items[3] + sum(items)


@case(1.2)
def list_append_used(x):
    items = [x]
    for i in range(3):
        items.append(items[i] * items[-1] + x)
    return items[3] * items[2]


@case(1.2)
def list_pop(x):
    items = [x, x * x, x**3]
    a = items.pop()
    b = items.pop()
    items.append(a * b)
    return items[0] * items[1]


@case(1.2, 0.7)
def dicts(x, y):
    d = {"a": x, "b": x * y}
    d["c"] = d["a"] * d["b"]
    d["a"] = y
    return d["a"] * d["c"] + d["b"]


@case(1.2)
def dict_made(x):
    d = dict(a=x, b=x * x)
    total = 0.0
    for key, value in d.items():
        total += value * (2.0 if key == "a" else 3.0)
    return total * d["a"]


@case({"w": V, "b": 0.3})
def dict_argument(p):
    return np.sum(p["w"] ** 2) * p["b"]


@case([1.2, 0.7, -0.4])
def list_argument(items):
    total = 0.0
    for one in items:
        total = total + one**2 * items[0]
    return total


@case((V, (0.5, U)))
def nested_argument(t):
    v, (k, u) = t
    return np.sum(v * u) * k + t[1][0] ** 2


@case(V)
def comprehension(x):
    squares = [a**2 for a in x]
    return squares[0] * squares[1] + sum(squares)


@case(V)
def comprehension_condition(x):
    return sum([a * i for i, a in enumerate(x) if i != 1]) * x[0]


@case(A, torch=False)
def comprehension_stack(x):
    return np.sum(np.stack([row * i for i, row in enumerate(x)]) ** 2)


@case(1.2)
def comprehension_dict(x):
    d = {i: x**i for i in range(4)}
    return d[2] * d[3]


@case(1.2)
def generator_sum(x):
    return sum(x**i for i in range(4)) * x


@case(1.2)
def comprehension_nested(x):
    rows = [[x * (i + j) for j in range(2)] for i in range(3)]
    return rows[1][1] * rows[2][0]


@case(V, torch=False)
def list_to_array(x):
    items = []
    for a in x:
        items.append(a * a)
    return np.sum(np.array(items) * x)


@case([(A, V), (B.T[:, :2] * 0.5, V[:2])], torch=False)
def layers(parameters):
    h = np.array([0.3, -0.2, 0.9])
    for w, b in parameters:
        h = np.tanh(w @ h) + b[0]
    return np.sum(h**2)


@case(1.2)
def list_pop_first(x):
    items = [x, x * x, x**3, 2.0 * x]
    a = items.pop(0)
    b = items.pop(1)
    items.append(a * b)
    return items[0] * items[2] + items[1] * b


@case(0.7)
def queue(x):
    waiting, total = [x, 2.0 * x], 0.0
    while waiting:
        first = waiting.pop(0)
        total = total + first * first
        if total < 2.0 and len(waiting) < 3:
            waiting.append(first * 1.5)
    return total


@case([1.2, 0.4, 0.9], torch=False)
def queue_of_an_argument(q):
    q.pop(0)
    q.append(q[0] * q[1])
    middle = q.pop(1)
    return q[0] ** 2 * middle + q[-1]


@case(V)
def list_extended(x):
    items = [x[0]]
    items.extend([x[1] * x[1], 2.0])
    for k in range(2):
        items.extend([v * k for v in x])
    items += [x[2], 1.5]
    items = items + [x[0] * x[1]]  # noqa: RUF005
    return items[0] * items[1] * items[-1] + sum(items) + items[8] * items[-3]


@case(0.7, 1.3)
def filled_by_what_it_had(x, y):
    items = [x, y]
    items.extend([items[0] * 2.0, sum(items), len(items) * x])
    items += [sum(items)]
    d = {"a": x, "b": y}
    d.update({"a": d["b"] * x, "b": d["a"]}, c=d["a"])
    return items[3] * items[4] * items[5] + d["a"] * d["b"] ** 2 * d["c"]


@case(0.7)
def list_joined(x):
    a = [x, x * x] + [2.0 * x]  # noqa: RUF005
    b = a[1:] + [x**3]  # noqa: RUF005
    b += a
    return sum([p * q for p, q in zip(a, b)]) + b[5]  # noqa: B905


@case(0.7)
def list_starred(x):
    items = [x, x * x]
    both = [*items, x**3, *items]
    return both[0] * both[2] + both[3] * both[4] * items[0]


@case(V, 0.7)
def unpacked_with_star(x, s):
    a, *rest = [s, s * s, s**3]
    first, *between, final = x * s
    *_, end = x
    return a * rest[0] + rest[1] * first + between[0] * final**2 + end


@case(V)
def slices_in_a_loop(x):
    total = 0.0
    for i in range(2):
        first, *rest = x[i:]
        total = total + first * rest[0] + np.sum(x[i : i + 2] ** 2)
    return total


@case(1.2, 0.7)
def dict_with_defaults(x, y):
    d = {"a": x, "b": y * x}
    d.update({"c": x * x}, e=y)
    d.update(f=x + y)
    return d.get("a") * d.get("b", 1.0) + d.get("z", y * y) * d["c"] + d["e"] * d["f"]


@case(V)
def dict_walked(x):
    d = {k: x[k] ** 2 for k in range(3)}
    total = sum(d.values())
    for k in d:
        total += d[k] * d[0] * k
    return total


@case(0.7)
def keys_of_text(x):
    d = {}
    for k in range(3):
        d[f"w{k}"] = x**k * (k + 1)
    assert x > 0, f"x is {x:.3f}"
    if x > 5:
        raise ValueError(f"too large: {x}")
    return d["w0"] * d["w2"] + d[f"w{1}"]


@case(V)
def extremes_of_three(x):
    return max(x[0], x[1], x[2]) * min(x[2], x[1], 0.3, x[0]) + sum([x[0], x[1]], x[2] * x[2])


@case(V, torch=False)
def swaps_in_turn(x):
    y = x * 1.0
    y[0], y[1] = y[1], y[0]
    y[1], y[2] = y[2], y[1]
    for i in range(2):
        y[i], y[i + 1] = y[i + 1], y[i]
    y[0], y[1], y[2] = y[2], y[0], y[1]
    return y[0] * y[1] ** 2 * y[2] ** 3


@case(A, torch=False)
def converted_and_split(x):
    a, b, c = np.split(x.astype(np.float64), 3, axis=1)
    head, rest = np.split(x, [1])
    return np.sum(a * b + c.astype(float) ** 2) + np.sum(head * rest)


@case(V, P, torch=False)
def pieces(x, p):
    filled = np.full_like(x, p[0])
    chosen = np.select([x < 0, x > 1], [x**2, x**3], p * x)
    return np.sum(np.fmod(x, 0.7) * filled) + np.sum(chosen) + np.trapezoid(x**2, p) + np.trapezoid(p)


@case(V, P, torch=False)
def appended_arrays(x, p):
    gaps = np.where(x > 1.0, np.nan, x)
    joined = np.append(x, p**2)
    return np.sum(joined[2:5] ** 2) + np.nansum(gaps) * p[0] + np.sum(np.polyval([p[0], 2.0, p[1]], x))


@case([0.4, 0.7], torch=False)
def lengthened_by_a_slice(q):
    q[1:] = [q[0] * 2.0, q[1] * 3.0, q[0] * q[1]]
    return q[1] * q[2] * q[3]


@case(V, torch=False)
def whole_of_a_number(x):
    z = np.sum(x * x)
    z += 1.0
    return z[()] * z + z[...] * x[0]


def positional_only(a, b=2.0, /, c=1.0):
    return a * b + c


@case(0.7, torch=False)
def called_with_positional_only(x, /):
    def inner(a, /, b):
        return a * b * x

    return positional_only(x, x * 2.0) * inner(x, b=3.0) + positional_only(2.0, c=3.0) * positional_only(x)


# ---- larger ones


@case(A, V, np.array([0.2, -0.4]))
def network(w, x, b):
    h = np.tanh(np.dot(w, x) + b)
    return np.sum(np.log(1.0 + np.exp(h)))


@case(0.4, 1.3)
def euler(y, k):
    h = 0.1
    for _ in range(10):
        y = y + h * (k * y - y**2)
    return y


@case(P, np.array([0.1, 0.2, 0.3]))
def gaussian(x, m):
    s = np.exp(-0.5 * np.sum((x - m) ** 2))
    return s / np.sqrt(2.0 * np.pi) ** 3


@case(P)
def kl(p):
    q = p / np.sum(p)
    return np.sum(q * np.log(q / np.array([0.2, 0.5, 0.3])))


@case(V)
def rosenbrock(x):
    return np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


@case(P, 3)
def power_iteration(x, n):
    for _ in range(n):
        x = np.dot(np.diag(x) + 0.1, x)
        x = x / np.sqrt(np.sum(x * x))
    return x[0]


@case(V, torch=False)
def convolution(x):
    k = np.array([0.5, -1.0])
    y = np.zeros(2)
    for i in range(2):
        for j in range(2):
            y[i] += x[i + j] * k[j]
    return np.sum(y**2)


@case(P)
def logistic(x):
    p = 1.0 / (1.0 + np.exp(-x))
    return -np.sum(np.log(p) * np.array([1.0, 0.0, 1.0]) + np.log(1.0 - p) * np.array([0.0, 1.0, 0.0]))


@case(1.3)
def memo(x):
    cache = {}
    for i in range(4):
        if i < 2:
            cache[i] = x * (i + 1)
        else:
            cache[i] = cache[i - 1] * cache[i - 2]
    return cache[3]


@case(V, torch=False)
def copied_and_written(x):
    y = x.copy()
    z = x + 1.0
    for i in range(1, 3):
        y[i] += y[i - 1] * 0.5
        z[i] = y[i] * x[0]
    return np.sum(y[::-1] * x) + np.sum(z * z * x)


@case(V)
def enumerated_pairs(x):
    total = 0.0
    for i, (a, b) in enumerate(zip(x, x[1:])):  # noqa: B905, RUF007
        total += (i + 1) * a * b
    return total


@case(V)
def loop_rebinds_what_it_goes_over(x):
    total = 0.0
    for i, v in enumerate(x):
        x = x * v + i
        total += x[0]
    return total


@case(V)
def loop_rebinds_plain(x):
    total = 0.0
    for v in x:
        x = x * v
        total = total + x[1]
    return total


@case(V, P)
def loop_rebinds_zipped(x, y):
    total = 0.0
    for a, b in zip(x, y):  # noqa: B905
        x = y * a
        y = x + b
        total += y[0] * x[2]
    return total


@case(V)
def loop_rebinds_reversed(x):
    total = 0.0
    for v in reversed(x):
        x = x * v + 1.0
        total += x[0]
    return total


@case({"a": 1.3, "b": 0.4})
def loop_rebinds_items(d):
    total = 0.0
    for _, v in d.items():
        d = {"a": v * 2.0, "b": v * v}
        total += d["a"] * d["b"]
    return total


@case([1.3, 0.4, 0.7])
def loop_shortens_what_it_goes_over(q):
    total = 0.0
    for a in q:
        q = q[1:]
        total += a * sum(q)
    return total


@case(V)
def loop_target_of_its_own_name(x):
    total = 0.0
    for x in x:  # noqa: B020
        total += x * x
    return total


@case(V, 0.7, wrt=(1,), torch=False)
def written_into_what_is_not_asked_for(x, s):
    x[0] = s * s
    x[x < 0.0] = s
    return np.sum(x**2)


@case([1.3, 0.4], {"a": 1.1}, 0.7, wrt=(2,))
def appended_to_what_is_not_asked_for(q, d, s):
    q.append(s * s)
    q[0] = s
    d["b"] = s
    return q[0] * q[2] + d["b"] * d["a"]


@case(0.7, torch=False)
def rows_of_a_constant(s):
    total = 0.0
    for row in np.ones((2, 3)):
        row[0] = s * s
        total += np.sum(row**2)
    return total


@case([1.3, 0.4], V, torch=False)
def augmented_items(q, x):
    y = x * 2.0
    table = {"a": x[0], "b": 1.0}
    q[0] += q[1] * x[0]
    y[1] *= q[0]
    table["b"] += table["a"] * q[1]
    return np.sum(x * y) + table["b"] * q[0]


@case(V, 0.7)
def augmented_items_of_arrays(x, s):
    pair = [x * s, [x * x, s * 1.5]]
    pair[0] += x
    pair[1][0] *= s
    pair[1][1] += 1.0
    return np.sum(pair[0] * pair[1][0]) * pair[1][1]


@case(V, torch=False)
def swapped_items(x):
    x[0], x[1] = x[1], x[0]
    t = x[1]
    x[1] = x[2]
    x[2] = t
    return np.sum(x**2 * np.array([1.0, 2.0, 3.0]))


@case([1.3, 0.4, 0.7], torch=False)
def swapped_items_of_a_list(q):
    q[0], q[1] = q[1], q[0]
    return q[0] * 3.0 + q[1] ** 2 * q[2]


@case(V, torch=False)
def bubble_sorted(x):
    for i in range(3):
        for j in range(2 - i):
            if x[j] > x[j + 1]:
                t = x[j]
                x[j] = x[j + 1]
                x[j + 1] = t * t
    return np.sum(x * np.array([1.0, 2.0, 3.0]))


@case(0.7, torch=False)
def grid_of_an_array(s):
    d = np.zeros((2, 2))
    for i in range(2):
        for j in range(2):
            d[i][j] = s * i + j
    return np.sum(d**2)


@case(0.7, torch=False)
def grid_of_lists(s):
    g = [[0.0] * 2 for _ in range(2)]
    for i in range(2):
        g[i][i] = s**3
        for j in range(i + 1):
            g[i][j] += s * s * i + j
    return g[1][1] * g[1][0] + g[0][0]


# ---- orders, axes, conversions, lists in the place of arrays


@case(A, torch=False)
def flattened_in_order(x):
    along = np.arange(6.0)
    return (
        np.sum(x.flatten("F") * along) ** 2
        + np.sum(x.ravel(order="F") ** 2 * along)
        + np.sum(np.reshape(x, (3, 2), "F") * B * np.reshape(np.ravel(x, "F"), (3, 2)))
    )


@case(C, torch=False)
def contracted_in_other_orders(x):
    y = np.reshape(x, (3, 2, 4))
    one = np.tensordot(x, y, ([1, 2], [0, 2]))
    other = np.tensordot(x, y, ([2, 0], [2, 1]))
    cube = x[:, :2, :2]
    return np.sum(one**2) + np.sum(other**2 * S) + np.sum(np.tensordot(cube, cube, ([1, 2], [2, 0])) ** 2)


@case(0.4, 1.7, torch=False)
def between_two_numbers(x, y):
    return np.sum(np.linspace(x, y, 5) ** 2) + np.sum(np.linspace(0.0, x, 4, endpoint=False) * y)


@case(0.4, V, torch=False)
def filled_and_counted(s, x):
    return np.sum(np.full((2, 3), s) * x) ** 2 + np.sum(np.bincount(np.array([0, 2, 0]), weights=x * s) ** 2)


@case(V, torch=False)
def lists_as_arrays(x):
    total = np.sum([v**2 for v in x]) * np.mean([x[0], x[2] ** 2]) + np.max([x[0], x[1]])
    return total + np.dot([x[0], x[1]], [x[1], x[2]]) * np.dot([1.0, 2.0, 3.0], x) + np.linalg.norm([x[0], x[1]])


@case(V, torch=False)
def named_lists_as_arrays(x):
    items = [x[0] * x[1], x[2], x[0] ** 2]
    return np.sum(items) * np.mean(items) + np.dot(items, x) ** 2 + np.sum(np.outer(items, x) ** 2)


@case(V, torch=False)
def lists_joined(x):
    return np.sum(np.concatenate([[x[0] * x[1]], x[1:]]) ** 2 * x) + np.sum(np.stack([[x[0], x[1]], x[1:]]) ** 3)


@case(0.7, torch=False)
def numbers_as_arrays(s):
    return np.sum(np.outer(s, s) + np.tile(s, 2) ** 2 + np.repeat(s, 2)) * s


@case(0.7, V, torch=False)
def numbers_in_other_shapes(s, x):
    y = np.reshape(s, (1, 1)) + np.expand_dims(s, 0) * np.atleast_1d(s)
    return np.sum(y * x) + np.sum(np.stack([s, s**2]) ** 2) + np.sum(np.outer(x, 2.0) * s) + np.prod(s) * s


@case(C, torch=False)
def product_over_axes(x):
    return np.sum(np.prod(x[:, :2, :2], axis=(0, 2)) ** 2) + np.sum(np.sort(x, axis=None) ** 2 * np.arange(24.0))


@case((np.array([0.4, 0.9, 1.3]), np.array([0.0, 2.0, 0.0])), torch=False)
def power_at_exponent_zero(p):
    x, y = p
    return np.sum(x**y * x)


@case(0.0, torch=False)
def power_of_itself_at_zero(s):
    return (s + 1.0) ** s


@case((-1.3, 0.7), torch=False)
def negative_base_in_loop(p):
    exponents = [2, 3]
    d = {"v": p[0], "n": 3}
    total = p[1]
    for i in range(3):
        total = total * p[0] ** i + p[0] ** exponents[i % 2]
    return total * d["v"] ** d["n"]


@case(-1.3, torch=False)
def negative_base_in_structure(s):
    p = (s, 2)
    return p[0] ** p[1] * s


@case((0.4, 0.7), 1.3)
def display_of_a_parameter_s_name(p, s):
    first = p[0] * p[1]
    p = (s, 2.0)
    return first * p[0] ** p[1]


@case(-1.3, torch=False)
def negative_base_and_float_exponents(s):
    pair = (s, 2.0)
    table = {"v": s * s, "n": 3.0, "m": -1.0}
    items = [s, 2.0]
    return pair[0] ** pair[1] * table["v"] ** table["n"] + pair[0] ** table["m"] * s ** items[1]


@case(np.diag([1.3, 0.8, 0.0]) + 0.0 * S, order=1, torch=False)
def singular_determinant(x):
    return np.linalg.det(x)


@case(V, torch=False)
def own_memory_of_conversions(x):
    y = np.ascontiguousarray(x * 1.0)
    y[0] = y[1] ** 2
    return np.sum(y * x)


@case(V, torch=False)
def heaviside_of_both(x):
    return np.sum(np.heaviside(np.array([0.0, 1.0, -1.0]), x) * x)


@case((0.7, 1.3), torch=False)
def comprehension_of_its_own_name(x):
    squares = sum(x * x for x in x)
    x = [x * 2 for x in x]
    table = {"a": x[0], "b": x[1] ** 2}
    table = {k: table * 2 for k, table in table.items()}
    products = [x * v for v in [x[1], squares] for x in [1.0, 2.0]]
    return products[3] * table["a"] * table["b"]


@case(0.7, torch=False)
def constant_comprehension_of_its_own_name(x):
    n = [1.0, 2.0]
    for _ in range(2):
        n = [n * 2 for n in n]
        x = x * n[1]
    m = [n_1 + 1.0 for n_1 in n]
    return x * m[0]


@case(0.7, torch=False)
def repeated_lists(x):
    items = 3 * [x * 2.0, x]
    items[0] = x**3
    joined = np.concatenate([np.array([x, 1.0])] * 2)
    return items[0] * items[4] + joined[2] ** 2


@case(np.array([[0.3], [0.8]]), torch=False)
def clip_by_wider_bounds(x):
    low = np.array([-1.0, 0.5, 2.0])
    return np.sum(np.clip(x * 2.0, low, 3.0) ** 2) + np.sum(x.clip(low, None) ** 3)


@case(A[:1], B, V, U[:1])
def einsum_of_axes_of_one(x, z, v, u):
    return np.sum(np.einsum("ij,kj->ik", x, np.array([[0.5], [-0.4]])) ** 2) + np.einsum("i,i->", v, u) * np.sum(z)


@case(V, torch=False)
def enumerate_from_a_start(x):
    total = sum([v**i for i, v in enumerate(x, start=1)])
    for i, v in enumerate(x, start=2):
        total = total + v * i
    return total


@case(V, torch=False)
def extremes_beside_no_number(x):
    nothing = np.array([np.nan, 0.2, 5.0])
    return np.sum(np.fmax(x, nothing) ** 2) + np.sum(np.fmin(nothing, x) ** 3)


@case(0.7, torch=False)
def array_without_axes(x):
    z = np.zeros(())
    z[()] = x * x
    return z * x + z[()] ** 2


@case(np.array(0.7), torch=False)
def item_without_index(x):
    y = np.zeros(2)
    y[0] = x[()]
    y[1] = x[()] ** 2
    return y[0] * y[1]


@case(V, torch=False)
def select_of_numbers(x):
    return np.sum(np.select([x > 1.0, x > 0.0], [x**2, 1.0], SCALE * x) * x)


@case(0.7, torch=False)
def extended_by_itself(x):
    n = [1.0, 2.0]
    n.extend(n)
    n += n
    return x**2 * len(n)


@case(0.7, torch=False)
def recursion_in_an_arm(x):
    def product(m):
        return 1 if m == 0 else m * product(m - 1)

    return x**2 * product(4)


@case(1.5, torch=False)
def item_written_in_its_loop(x):
    items = [x, x * 2, x * 3]
    total = 0.0
    for v in items:
        items[2] = v * 2.0
        total = total + v**2
    return total


@case(V, torch=False)
def turned_by_swaps(x):
    y = x * 1.0
    n, last = len(y), y.shape[0] - 1
    for i in range(n - 1):
        y[i], y[i + 1] = y[i + 1], y[i]
    return y[0] ** 2 * y[last] + y[n - 2] ** 3


@case(V, torch=False)
def copies_of_a_buffer(x):
    rows = []
    row = np.zeros(3)
    for k in range(3):
        row[k] = x[k] ** 2
        rows.append(row.copy())
    return np.sum(rows[0] * rows[2]) + rows[1][1] * x[0]


@case(V)
def equal_values_of_names_that_change(x):
    s = x * 2.0
    first = np.exp(-s) * s + np.exp(-s)
    s = s + x
    return np.sum(first * (np.exp(-s) * s) + np.exp(-s) * np.exp(-s))


@case(V, torch=False)
def equal_values_around_writes(x):
    y = x * 1.0
    first = np.sin(y[0] * 2.0) * np.sum(np.sin(y))
    y[0] = first * y[1]
    second = np.sin(y[0] * 2.0) * np.sum(np.sin(y))
    for _ in range(2):
        second = second * y[0] + np.sin(y[0] * 2.0)
        y[0] = y[0] * 0.5 + np.sin(y[0] * 2.0)
    return first * second + np.sin(y[0] * 2.0)


@case(1.3)
def equal_values_in_branches(x):
    a = np.exp(x) * x
    if x > 1.0:
        x = x * x
        b = np.exp(x) * x
    else:
        b = np.exp(x) + x
    return a * b + np.exp(x) * np.exp(x)


@case(V, torch=False)
def equal_items_of_a_list_that_is_written_to(x):
    parts = [x * 2.0, x * 2.0]
    total = np.sum(x * 2.0 * (x * 2.0))
    parts[0][1] = 3.0
    return total * np.sum(parts[0] * parts[1] * (x * 2.0))


@case(V, torch=False)
def turned_with_arithmetic(x):
    y = x * 1.0
    y[0], y[1] = y[1] * y[2], y[0] * 2.0
    y[2], y[1] = y[1], y[2] / y[0]
    for i in range(2):
        y[i], y[i + 1] = y[i + 1], y[i] * y[0] + 1.0
    return np.sum(y**2 * np.arange(1.0, 4.0))


@case(np.outer(V, P), torch=False)
def rows_turned_with_arithmetic(x):
    y = x * 1.0
    y[0], y[1] = y[1] * x[2], y[0] * 2.0
    return np.sum(y**2 * x)


@case(V, A, torch=False)
def padded(x, a):
    ends = np.pad(x, (1, 2)) * np.arange(1.0, 7.0)
    around = np.pad(a, ((1, 0), (0, 2)), constant_values=2.0)
    return np.sum(ends**2) * np.sum(np.pad(a, 1) ** 3) + np.sum(around**2 * np.arange(15.0).reshape(3, 5))


@case(0.7, torch=False)
def results_of_a_function_defined_inside(x):
    def pair(v):
        return [1.0, v * 2.0]

    n = len(pair(2.0)) + max(pair(3.0)[1], 1.0)
    parts = [pair(1.0)[1], *pair(4.0), {"a": pair(x)[1]}["a"]]
    if 0.0 < parts[1:][len(pair(0.0)) :][0] and x > 0.0:
        return x**2 * n * parts[2]
    return x


@case(1.3)
def ended_by_a_loop(x):
    s = x * 2.0
    for _ in range(3):
        s = 0.5
    n, t = 0, x * 3.0
    while n < 2:
        t, n = 2.0, n + 1
    for k in range(2):
        if k > 0:
            t = 1.5
    return s * s * x + t * x * x


@case(1.3)
def ended_and_begun_by_loops(x):
    s, total = x * 2.0, 0.0
    for _ in range(2):
        s = 0.5
        for k in range(2):
            s = 0.25 if k == 0 else s * x
        total = total + s * x
    return total * s


@case(V, torch=False)
def turned_with_products(x):
    y = x * x
    y[0], y[1] = y[1], y[0] * y[2]
    y[2], y[1] = y[1] + y[2], y[0]
    return np.sum(y * np.arange(1.0, 4.0))


def larger_by_one(n):
    n += 1
    return n


def of_its_own(c):
    c = c * 2.0
    c += 1.0
    c[0] = np.exp(c)[1]
    parts = [c, *c]
    parts.append(3.0)
    parts[0] = 4.0
    return c


@case(V, torch=False)
def constants_of_functions_that_write_into_their_own(x):
    c = np.ones(3)
    n = larger_by_one(2) + larger_by_one(c[0])
    a = np.sum(x * c)
    d = of_its_own(c)
    return a * np.sum(x * c * d) * n
