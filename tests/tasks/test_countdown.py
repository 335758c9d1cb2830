"""Countdown: problems of ours, and the graded part of the reward."""

import ast
import itertools
from fractions import Fraction

import pytest

from dam.tasks import countdown
from dam.tasks.countdown import Countdown, check, draw_problems, is_held_out

# The checker's verdicts are in test_verdicts.py and test_hostile.py.


def keys(problems):
    return {(tuple(sorted(problem.numbers)), problem.target) for problem in problems}


@pytest.mark.parametrize(("size", "largest"), [(2, 10), (3, 100), (4, 100), (6, 30)])
def test_problems_are_solved_by_their_solutions(size, largest):
    for numbers, target, solution in draw_problems(300, 0, size=size, largest=largest):
        assert len(numbers) == size and all(1 <= number <= largest for number in (*numbers, target))
        assert check(solution, numbers, target).correct
        assert check(f"{solution}={target}", numbers, target).correct


def test_parentheses_of_solutions_are_all_needed():
    """Without a pair of them it is another tree."""
    seen = 0
    for _, _, solution in draw_problems(300, 1, size=4):
        tree = ast.dump(ast.parse(solution))
        for start in [place for place, character in enumerate(solution) if character == "("]:
            depths = itertools.accumulate((character == "(") - (character == ")") for character in solution[start:])
            end = start + list(depths).index(0)
            assert ast.dump(ast.parse(solution[:start] + solution[start + 1 : end] + solution[end + 1 :])) != tree
            seen += 1
    assert seen > 50


def test_no_problem_is_in_both_sets():
    train, held_out = draw_problems(3000, 0), draw_problems(200, 0, held_out=True)
    assert not keys(train) & keys(held_out)
    assert all(is_held_out(problem.numbers[::-1], problem.target) for problem in held_out)
    # One of 16 is held out: of 5000 others 312 +- 17.
    assert 220 < sum(is_held_out([a, b, 3], c) for a in range(1, 51) for b in range(1, 11) for c in range(10)) < 410


def test_problems_that_are_excluded_are_not_drawn():
    first = draw_problems(200, 0, largest=6)
    excluded = [(problem.numbers[::-1], problem.target) for problem in first[:50]]
    assert not keys(draw_problems(200, 0, largest=6, exclude=excluded)) & keys(first[:50])


def test_a_seed_fixes_problems():
    assert draw_problems(20, 3) == draw_problems(20, 3) == draw_problems(40, 3)[:20]
    assert draw_problems(20, 3) != draw_problems(20, 4)


@pytest.mark.parametrize("options", [{"count": -1}, {"size": 1}, {"size": 17}, {"largest": 0}, {"largest": 10**9}])
def test_problems_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="count must be"):
        draw_problems(**{"count": 1, "seed": 0, **options})


def test_closeness_is_highest_for_the_target_and_falls_with_distance():
    task = Countdown(closeness_scale=4.0)
    answers = ["2*3+4", "2+3*4", "2+3+4", "2*3*4", "2*3", "4/(2-2)+3", ""]
    values = task.closeness([f"<answer>{x}</answer>" for x in answers], [[2, 3, 4]] * 7, [10] * 7)
    # 10, 14, 9 and 24 for 10, by 4 / (4 + distance); a missing number, no value and no answer are worth nothing.
    assert values == pytest.approx([1.0, 4 / 8, 4 / 5, 4 / 18, 0.0, 0.0, 0.0])


def test_values_are_exact():
    verdict = check("<answer>1/3+1/7</answer>", [1, 3, 1, 7], 0)
    assert verdict == countdown.Verdict(True, Fraction(10, 21), True, False)
    product = "*".join(["999999999"] * 16)
    assert check(product, [999_999_999] * 16, 999_999_999**16).correct
    assert not check(product, [999_999_999] * 16, 999_999_999**16 + 1).correct


def test_bounds_leave_room_for_every_problem_that_is_admitted():
    """The longest: all numbers of most digits, in the deepest parentheses, with spaces."""
    numbers = [10**countdown.MAX_DIGITS - 1] * countdown.MAX_NUMBERS
    expression = str(numbers[0])
    for number in numbers[1:]:
        expression = f"({expression}-{number})"
    assert check(expression, numbers, 0).numbers_right


def test_sizes_and_how_often_numbers_are_used():
    records = [{"nums": [1, 2, 3], "target": 6}, {"nums": [1, 2, 3, 4], "target": 10}]
    assert [Countdown(size=3).row(record) is None for record in records] == [False, True]
    exactly, at_most = Countdown(), Countdown(all_numbers=False)
    columns = {"completions": ["<answer>1+2</answer>"], "numbers": [[1, 2, 3]], "target": [3]}
    assert exactly.correct(**columns) == [0.0] and at_most.correct(**columns) == [1.0]
    assert "at most once" in at_most.row(records[0])["prompt"][0]["content"]
    with pytest.raises(ValueError, match="closeness_scale"):
        Countdown(closeness_scale=0.0)


@pytest.mark.parametrize("answer", ["$2+3$.", "$2+3.$", "`2+3`.", "$2+3=5$.", "$ 2+3 $", "2+3."])
def test_a_full_stop_may_stand_on_either_side_of_what_is_around(answer):
    assert check(f"<answer>{answer}</answer>", [2, 3], 5).correct
