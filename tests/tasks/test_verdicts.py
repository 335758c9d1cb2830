"""Checkers agree with verdicts that were reasoned by hand."""

import pytest

from dam.tasks import countdown, gsm8k, sudoku, sudoku_text
from tests.tasks import verdicts


def cases(table):
    return [(numbers, *line) for numbers, lines in table.items() for line in lines]


def word_of(verdict):
    if not verdict.format:
        assert verdict == countdown.NO_ANSWER
        return "none"
    if not verdict.numbers_right:
        assert not verdict.correct
        return "numbers"
    return "right" if verdict.correct else "value"


@pytest.mark.parametrize(("table", "all_numbers"), [("COUNTDOWN", True), ("AT_MOST_ONCE", False)])
def test_countdown(table, all_numbers):
    wrong = []
    for numbers, completion, target, word in cases(getattr(verdicts, table)):
        found = word_of(countdown.check(completion, numbers, target, all_numbers=all_numbers))
        if found != word:
            wrong.append((completion, numbers, target, word, found))
    assert wrong == []


def test_gsm8k():
    wrong = []
    for completion, answer, word in verdicts.GSM8K:
        verdict = gsm8k.check(completion, answer)
        found = "none" if verdict.value is None else "right" if verdict.correct else "wrong"
        if found != word:
            wrong.append((completion, answer, word, verdict))
    assert wrong == []


def test_sudoku():
    puzzle, solution = verdicts.SUDOKU_PUZZLE, verdicts.SUDOKU_SOLUTION
    sudoku.read_pair(puzzle, solution, sudoku.all_grids())
    wrong = []
    for completion, is_grid, cells, units in verdicts.SUDOKU:
        columns = {"completions": [completion], "puzzle": [puzzle], "solution": [solution]}
        task = sudoku_text.TASK
        (found_cells,), (found_units,), (correct,) = (f(**columns) for f in (task.cells, task.units, task.correct))
        found = (sudoku_text.grid_of(completion) is not None, round(8 * found_cells), round(12 * found_units))
        if found != (is_grid, cells, units) or correct != (units == 12):
            wrong.append((completion, (is_grid, cells, units), found))
    assert wrong == []


def test_there_are_five_hundred():
    lines = [*cases(verdicts.COUNTDOWN), *cases(verdicts.AT_MOST_ONCE)]
    assert len({*lines, *verdicts.GSM8K, *verdicts.MATH, *verdicts.SUDOKU}) >= 500


@pytest.mark.parametrize("unit", ["m^2", r"\text{ cm}^2", "ft^{2}", r"\text{ m}^{3}", "m²", r"\mathrm{km}^2"])
def test_the_exponent_of_a_unit_is_no_number(unit):
    assert gsm8k.check(f"<answer>18 {unit}</answer>", "18").correct
    assert not gsm8k.check(f"<answer>2 {unit}</answer>", "18").correct
    assert gsm8k.check(f"That makes 18 {unit}", "18").correct


@pytest.mark.parametrize("power", ["10^2", "{10}^2", "(5+5)^2", "10^{2}"])
def test_a_power_of_a_number_is_none(power):
    assert gsm8k.value_of(f"<answer>{power}</answer>") is None
