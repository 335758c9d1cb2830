"""Trees of code: what is written here for speed gives what Python's own `ast` and `inspect` give."""

import ast
import inspect
import textwrap

import numpy as np
import pytest

from dam.derive import functions, grad, source, trees
from tests.derive.functions import CASES

EXPRESSIONS = [
    "a - (b - c)", "(a - b) - c", "(-a) ** 2", "-a ** 2", "2 ** -x", "(a ** b) ** c", "-(-a)", "(1).real",
    "1.5.real", "a[1]", "a[-1]", "a[1:2]", "a[1, 2]", "f(x)(y)[2].b", "f(a=1)", "f(*a)", "-(a + b)", "a * b / c",
    "a * (b / c)", "a % b // c", "a @ b", "not a", "a < b", "'x\\n'", "1e400", "1e-300", "f(x for x in y)", "(a, b)",
    "[a]", "(a if b else c) + 1", "(lambda: 0)()", "a + -b", "a ** -b", "-1 ** 2", "None", "True", "2j", "...", "b'a'",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_are_shown_as_ast_shows_them(text):
    node = ast.parse(text, mode="eval").body
    assert trees.shown(node) == ast.unparse(node)


def test_emitted_statements_are_shown_as_ast_shows_them():
    for name in ("network", "store_nested", "layers", "negative_base_in_loop"):
        for node in ast.walk(ast.parse(source(grad(CASES[name][0], CASES[name][2])))):
            if isinstance(node, ast.expr) and not isinstance(node, ast.Slice):
                assert trees.shown(node) == ast.unparse(node)


def test_names_are_renamed_where_they_are_free():
    node = ast.parse("[x + y for x in x] + [(lambda y: y + x)(y)]", mode="eval").body
    before = ast.dump(node)
    new = trees.renamed(node, {"x": "a", "y": "b"})
    assert ast.unparse(new) == "[x + b for x in x] + [(lambda y: y + a)(b)]" and ast.dump(node) == before
    assert trees.loads(node) == {"x", "y"} and trees.loads(new) == {"a", "b"}
    assert trees.renamed(node, {"z": "a"}) is node


def brackets(
    x,
    y=(
        1,
        2,
    ),
):
    """A text
    that begins further left."""
    # and a comment
    return x * sum(
        y
)  # fmt: skip


def test_a_definition_has_the_lines_that_inspect_gives():
    for f in (brackets, *(case[0] for case in CASES.values() if case[0].__name__ != "<lambda>")):
        lines, first, tree = functions._lines(f)
        expected, number = inspect.getsourcelines(f)
        if expected[0].lstrip().startswith("@"):  # inspect shows decorators
            assert (lines, first) == (expected, number)
        assert ast.dump(ast.parse(textwrap.dedent("".join(lines)))) == ast.dump(
            ast.parse(textwrap.dedent("".join(expected)))
        )
        assert first == number
        assert tree is None or ast.dump(tree) == ast.dump(ast.parse(textwrap.dedent("".join(lines))))


def test_what_is_written_to_shares_the_memory_of_no_equal_value():
    def f(x):
        a = np.sin(x)
        y = np.sin(x)
        y[0] = 3.0
        z = np.exp(y * 0.1) + np.exp(y * 0.1)
        return np.sum(a * y * z)

    x = np.array([0.3, 0.7])
    gradient, value = grad(f, preserve_result=True)(x)
    s, step = np.sin(x), 1e-6
    assert value == f(x)
    ends = [f(x + sign * step * np.array([1.0, 0.0])) for sign in (1, -1)]
    assert gradient[0] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert gradient[1] == pytest.approx(2 * np.exp(0.1 * s[1]) * s[1] * np.cos(x[1]) * (2 + 0.1 * s[1]), rel=1e-12)
