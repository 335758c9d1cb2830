"""What entries of the tables say of themselves: which results may share memory, and what has no slope."""

import ast
import itertools

import numpy as np
import pytest
import torch

from dam.derive import primitives, tables

pytestmark = pytest.mark.filterwarnings("ignore")  # of divisions by zero, and of what is not yet refused

X, Z, SQUARE = np.array([0.4, 0.9, 0.3]), np.array([0.7, 0.2, 0.6]), np.array([[0.5, 0.2], [0.1, 0.8]])
# What the parameters of an entry may be besides arrays.
OTHERS = {
    "to": [float],
    "axes": [(1, 0)],
    "shape": [(3,), (2, 2)],
    "reps": [1, (1,)],
    "axis": [None, 0, (0,)],
    "min": [0.2],
    "max": [0.7],
    "a_min": [0.2],
    "a_max": [0.7],
}
ARRAYS = {"x", "z", "l", "c", "weights"}


def candidates(signature, arrays):
    """Arguments for the required parameters, and for those that are arrays: some will do."""
    choices = []
    for name, parameter in signature.parameters.items():
        if name in ARRAYS and (parameter.default is parameter.empty or name == "weights"):
            choices.append(arrays)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            choices.append([(), (0,), (1, 0), (-1,)])
        elif parameter.default is parameter.empty or (name in OTHERS and len(choices) < 3):
            choices.append(OTHERS.get(name, [0, 1, (0,)]))
    for found in itertools.product(*choices):
        rest = found[-1] if choices and isinstance(found[-1], tuple) and _starred(signature) else ()
        yield [*(found[:-1] if _starred(signature) else found), *rest]


def _starred(signature):
    return any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())


def function_of(entry):
    found = tables.MODULES.get(entry.name.partition(".")[0])
    for part in entry.name.split(".")[1:]:
        found = getattr(found, part)
    return found if found is not None else {"abs": abs, "float": float, "max": max, "min": min, "pow": pow}[entry.name]


def _shares(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.shares_memory(a, b)


def sharing(call, signature, arrays):
    """Whether a result of any call that goes through shares memory with an argument; None where none goes through."""
    seen = None
    for arguments in candidates(signature, arrays):
        try:
            y = call(*arguments)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, np.linalg.LinAlgError):
            continue
        seen = seen or any(_shares(y, a) for a in arguments)
    return seen


NUMPY = [np.array(0.5), np.array([0.5]), X, X[:2], SQUARE, SQUARE[None], X > 0.35, np.array([0, 2, 1])]
TORCH = [torch.as_tensor(a) for a in NUMPY]
FUNCTIONS = {
    f"{entry.name} {k}": entry
    for k, entry in enumerate(primitives.FUNCTIONS.values())
    if entry.rule is None and entry.module != "rt" and entry.name != "sum" and not entry.name.startswith("math.")
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_whose_result_shares_memory_says_so(name):
    entry = FUNCTIONS[name]
    function = function_of(entry)
    arrays = TORCH if entry.module == "torch" else NUMPY
    if "l" in entry.signature.parameters:
        arrays = [[a] for a in arrays] + [[a, a] for a in arrays]
        shared = [_shares(function(l), l[0]) for l in arrays if l[0].ndim]
        assert entry.view or not any(shared)
        return
    shares = sharing(function, entry.signature, arrays)
    assert shares is not None and (entry.view or not shares)


METHODS = [
    *(n for n in primitives.METHODS if hasattr(np.ndarray, n) or hasattr(torch.Tensor, n)),
    *(f".{n}" for n in primitives.ATTRIBUTES),
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_or_attribute_whose_result_shares_memory_says_so(name):
    attribute = name.startswith(".")
    entry = primitives.ATTRIBUTES[name[1:]] if attribute else primitives.METHODS[name]

    def call(x, *rest):
        found = getattr(x, name.lstrip("."))
        return found if attribute else found(*rest)

    found = [sharing(call, entry.signature, arrays) for arrays in (NUMPY, TORCH)]
    assert found != [None, None] and (entry.view or not any(found))


@pytest.mark.parametrize("operator", primitives.OPERATORS, ids=lambda o: o.__name__)
def test_an_operator_whose_result_shares_memory_says_so(operator):
    entry = primitives.OPERATORS[operator]
    names = [ast.Name(n, ast.Load()) for n in entry.signature.parameters]
    node = ast.UnaryOp(operator(), *names) if len(names) == 1 else ast.BinOp(names[0], operator(), names[1])
    tree = ast.fix_missing_locations(ast.Expression(node))

    def call(*arguments):
        return eval(compile(tree, "operator", "eval"), dict(zip(entry.signature.parameters, arguments, strict=True)))

    for arrays in (NUMPY, TORCH):
        shares = sharing(call, entry.signature, arrays)
        assert shares is not None and (entry.view or not shares)


# What is to be a constant, whatever is in memory, effects, and what derived source takes the length or the items of.
EXEMPT = {"stop_gradient", "empty", "empty_like", "id", "print", "part", "keys", "sequence"}


def test_what_has_no_slope_is_piecewise_constant():
    """A change of 1e-9 in the last argument changes nothing; most of the entries take one of these calls."""
    calls = [(X,), (X, Z), (0.4,), (0.4, 0.7), (3, 0.7), (0.4, 0.7, 3), (np.array([0, 1, 1]), Z), (X, 1)]
    tried = 0
    for function in primitives.WITHOUT_SLOPE:
        if getattr(function, "__name__", "") in EXEMPT:
            continue
        for library in (np.array, torch.tensor):  # copies: a second argument may be the place of the result
            for arguments in calls:
                plain = [library(a) if isinstance(a, np.ndarray) else a for a in arguments]
                for k, one in enumerate(plain):
                    if isinstance(one, int) or "int" in str(getattr(one, "dtype", "")):
                        continue
                    changed = [a + 1e-9 if j == k else a for j, a in enumerate(plain)]
                    try:
                        before, after = function(*plain), function(*changed)
                    except Exception:
                        break  # other arguments than these
                    tried += 1
                    assert _same(before, after), (function, plain)
    assert tried > 150


def _same(a, b):
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, (np.ndarray, torch.Tensor, float)):
        return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
    return True
