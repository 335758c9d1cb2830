"""What `make test` runs of a product: every value, and every pair of values of three parameters or more."""

import itertools

import pytest

from tests import covering


@pytest.mark.parametrize("asked", [None, 1, 2])
@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 3), (3, 3), (2, 2, 2), (2, 5, 3, 2)])
def test_values_and_pairs_occur_in_few_cases(sizes, asked):
    cases = list(itertools.product(*map(range, sizes)))
    kept = [cases[place] for place in sorted(covering.covering(cases, asked))]
    strength = asked or (2 if len(sizes) > 2 else 1)
    for chosen in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        every = {tuple(case[n] for n in chosen) for case in cases}
        assert {tuple(case[n] for n in chosen) for case in kept} == every
    if strength == 1:
        assert len(kept) == max(sizes)
    elif len(sizes) > 2 and len(cases) > 8:
        assert len(kept) < 0.6 * len(cases)


def test_parameters_that_change_together_are_one():
    cases = [(n, n, other) for n in range(4) for other in range(3)]
    assert len(covering.covering(cases)) == 4
    assert covering.covering([()]) == {0}


@pytest.mark.parametrize(("first", "second"), [("abcd", "xy"), ("ab", "xyz")])
def test_pairs_are_all_there_and_few_are_of_make_test(first, second):
    found = covering.pairs(first, second)
    assert [one.values for one in found] == list(itertools.product(first, second))
    kept = [one.values for one in found if not one.marks]
    assert len(kept) == max(len(first), len(second))
    assert {a for a, _ in kept} == set(first) and {b for _, b in kept} == set(second)
