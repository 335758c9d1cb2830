"""4x4 Sudoku: grids, puzzles, rewards, metrics, puzzle files and the base model."""

import functools
import itertools

import pytest
import torch

from dam.ctmc import MaskedCTMC
from dam.models import MaskedLM
from dam.rollout import rollout
from dam.tasks import sudoku

#       1 2 | 3 4
#       3 4 | 1 2
#       ----+----
#       2 1 | 4 3
#       4 3 | 2 1
SOLUTION = "1234341221434321"
PUZZLE = "1204301221034301"


@pytest.fixture(autouse=True, scope="module")
def grids_once():
    """They take a second to find; most tests need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sudoku, "all_grids", functools.cache(sudoku.all_grids))
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid(text):
    return torch.tensor([int(character) for character in text])


# Grids and puzzles


def test_there_are_288_grids():
    grids = sudoku.all_grids()
    assert grids.shape == (288, 16)
    assert len(grids.unique(dim=0)) == 288
    for cells in grids.tolist():
        units = [cells[4 * r : 4 * r + 4] for r in range(4)] + [cells[c::4] for c in range(4)]
        units += [cells[s : s + 2] + cells[s + 4 : s + 6] for s in (0, 2, 8, 10)]
        assert all(sorted(unit) == [1, 2, 3, 4] for unit in units)


def test_no_grid_is_in_both_splits():
    train, test = sudoku.split_grids()
    assert (len(train), len(test)) == (200, 88)
    assert len(torch.cat([train, test]).unique(dim=0)) == 288
    again = sudoku.split_grids()
    assert torch.equal(train, again[0]) and torch.equal(test, again[1])


def test_units_satisfied_by_hand():
    assert sudoku.satisfied(grid(SOLUTION)).all()
    # 2 3 in the first row swapped: the row still holds 1, 2, 3, 4; two columns and two boxes do not.
    spoilt = sudoku.satisfied(grid("1324341221434321"))
    rows, columns, boxes = spoilt.split(4)
    assert rows.all()
    assert columns.tolist() == [True, False, False, True]
    assert boxes.tolist() == [False, False, True, True]
    # A blank satisfies nothing, although 0 to 3 are four different tokens.
    assert not sudoku.satisfied(grid("0123" * 4))[:4].any()


def test_held_out_puzzles_have_the_stated_blanks_and_unseen_grids():
    _, test = sudoku.split_grids()
    for blanks in (1, 8, 16):
        puzzles = sudoku.held_out_puzzles(blanks)
        assert puzzles.puzzle.shape == (264, 16)
        assert ((puzzles.puzzle == 0).sum(dim=1) == blanks).all()
        assert ((puzzles.puzzle == puzzles.solution) | (puzzles.puzzle == 0)).all()
        assert {tuple(s) for s in puzzles.solution.tolist()} == {tuple(g) for g in test.tolist()}
    assert torch.equal(sudoku.held_out_puzzles(8).puzzle, sudoku.held_out_puzzles(8).puzzle)


@pytest.mark.parametrize("blanks", [0, -1, 17])
def test_a_puzzle_has_1_to_16_blanks(blanks):
    with pytest.raises(ValueError, match="blanks"):
        sudoku.held_out_puzzles(blanks)
    with pytest.raises(ValueError, match="blanks"):
        sudoku.draw_puzzles(sudoku.all_grids(), 4, (blanks, blanks), seed=0)


def test_drawn_puzzles_come_from_their_grids_with_blanks_in_range():
    train, _ = sudoku.split_grids()
    puzzles = sudoku.draw_puzzles(train, 500, (3, 6), seed=1)
    assert {tuple(s) for s in puzzles.solution.tolist()} <= {tuple(g) for g in train.tolist()}
    assert ((puzzles.puzzle == puzzles.solution) | (puzzles.puzzle == 0)).all()
    # Each of four numbers is missed by 500 draws with probability 0.75^500.
    assert set((puzzles.puzzle == 0).sum(dim=1).tolist()) == {3, 4, 5, 6}
    assert torch.equal(puzzles.puzzle, sudoku.draw_puzzles(train, 500, (3, 6), seed=1).puzzle)
    assert not torch.equal(puzzles.puzzle, sudoku.draw_puzzles(train, 500, (3, 6), seed=2).puzzle)


# Rewards and metrics


def test_units_reward_by_hand():
    completions = [grid(text).tolist() for text in (SOLUTION, "1324341221434321", "1" * 16)]
    assert sudoku.units_reward(completions, prompts=None) == [1.0, pytest.approx(8 / 12), 0.0]


def test_cell_reward_by_hand():
    labels = [grid(SOLUTION).tolist()] * 3
    prompts = [grid(PUZZLE).tolist()] * 3  # blanks at 2, 5, 10, 14 (from 0); the solution holds 3, 4, 4, 2 there
    half = grid(SOLUTION).clone()
    half[[2, 14]] = 1
    clue = grid(SOLUTION).clone()
    clue[0] = 2  # clues do not count
    rewards = sudoku.cell_reward(prompts, [labels[0], half.tolist(), clue.tolist()], labels)
    assert rewards == [1.0, 0.5, 1.0]


def test_metrics_by_hand():
    def measured(puzzle, filled, solution=SOLUTION):
        return sudoku.metrics(grid(puzzle)[None], grid(filled)[None], grid(solution)[None])

    assert measured(PUZZLE, SOLUTION) == {"solved": 1.0, "exact": 1.0, "cells": 1.0}
    # A wrong cell.
    wrong = SOLUTION[:14] + "1" + SOLUTION[15:]
    assert measured(PUZZLE, wrong) == {"solved": 0.0, "exact": 0.0, "cells": 0.75}
    # Several solutions: 1 2 swapped everywhere is another completion of a puzzle with no 1 and 2.
    swapped = SOLUTION.translate(str.maketrans("12", "21"))
    several = SOLUTION.translate(str.maketrans("12", "00"))
    assert measured(several, swapped) == {"solved": 1.0, "exact": 0.0, "cells": 0.0}
    # The same grid does not solve a puzzle whose clues it overwrites.
    assert measured(PUZZLE, swapped)["solved"] == 0.0


def test_cells_are_pooled_over_puzzles():
    solution = grid(SOLUTION).repeat(2, 1)
    puzzle = torch.stack([grid(PUZZLE), torch.zeros(16, dtype=torch.int64)])
    filled = torch.stack([grid(SOLUTION), torch.ones(16, dtype=torch.int64)])
    # 4 of 4 blanks and the four ones of 16.
    assert sudoku.metrics(puzzle, filled, solution)["cells"] == pytest.approx(8 / 20)


def test_a_grid_as_text():
    assert sudoku.as_text(grid(PUZZLE).tolist()) == [" 1  2  .  4 ", " 3  .  1  2 ", " 2  1  .  3 ", " 4  3  .  1 "]
    assert sudoku.as_text(grid(SOLUTION).tolist(), grid(PUZZLE).tolist())[0] == " 1  2 [3] 4 "


# Puzzle files

GOOD = f"{PUZZLE},{SOLUTION}"


def written(tmp_path, content):
    path = tmp_path / "puzzles.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"Puzzle,Solution\n{GOOD}\n{GOOD}\n",
        f"Puzzle,Solution\n{GOOD}\n{GOOD}",
        f"Puzzle,Solution\r\n{GOOD}\r\n{GOOD}\r\n",
        f"\ufeffPuzzle,Solution\n{GOOD}\n{GOOD}\n",
        f"Puzzle,Solution\n\n{GOOD}\n\n\n{GOOD}\n\n",
        f"id,Solution,Puzzle,note\n7,{SOLUTION},{PUZZLE},easy\n8,{SOLUTION},{PUZZLE},hard,more\n",
        f'"Puzzle","Solution"\n"{PUZZLE}","{SOLUTION}"\n"{PUZZLE}","{SOLUTION}"\n',
        f"Puzzle,Solution\n{PUZZLE}, {SOLUTION} \n{GOOD}\n",
    ],
    ids=["plain", "no newline at the end", "CRLF", "BOM", "blank lines", "extra columns", "quoted", "spaces"],
)
def test_a_good_file_is_read(tmp_path, content):
    puzzles = sudoku.read_puzzles(written(tmp_path, content))
    assert torch.equal(puzzles.puzzle, grid(PUZZLE).repeat(2, 1))
    assert torch.equal(puzzles.solution, grid(SOLUTION).repeat(2, 1))


def test_a_puzzle_that_starts_with_blanks_keeps_them(tmp_path):
    path = written(tmp_path, f"Puzzle,Solution\n0000{SOLUTION[4:]},{SOLUTION}\n")
    assert sudoku.read_puzzles(path).puzzle[0, :5].tolist() == [0, 0, 0, 0, 3]


def test_what_is_written_is_read(tmp_path):
    puzzles = sudoku.held_out_puzzles(9)
    lines = [
        "".join(map(str, p)) + "," + "".join(map(str, s))
        for p, s in zip(*map(torch.Tensor.tolist, puzzles), strict=True)
    ]
    read = sudoku.read_puzzles(written(tmp_path, "\n".join(["Puzzle,Solution", *lines])))
    assert torch.equal(read.puzzle, puzzles.puzzle) and torch.equal(read.solution, puzzles.solution)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{PUZZLE[:15]},{SOLUTION}", "Puzzle must have 16 characters; got 15: '120430122103430'"),
        (f"{PUZZLE}0,{SOLUTION}", "Puzzle must have 16 characters; got 17"),
        (f"{PUZZLE},{SOLUTION[:12]}", "Solution must have 16 characters; got 12"),
        (PUZZLE, "Solution must have 16 characters; got 0"),
        (f",{SOLUTION}", "Puzzle must have 16 characters; got 0"),
        (f"12a4{PUZZLE[4:]},{SOLUTION}", "Puzzle may hold only 0 to 4; got 'a' at character 3"),
        (f"12.4{PUZZLE[4:]},{SOLUTION}", "Puzzle may hold only 0 to 4; got '.' at character 3"),
        (f"5{PUZZLE[1:]},{SOLUTION}", "Puzzle may hold only 0 to 4; got '5' at character 1"),
        (f"\u0661{PUZZLE[1:]},{SOLUTION}", "Puzzle may hold only 0 to 4; got '\u0661' at character 1"),
        (f"{PUZZLE},{PUZZLE}", "Solution may hold only 1 to 4; got '0' at character 3"),
        (f"{SOLUTION},{SOLUTION}", "Puzzle has no blank"),
        # Two 1 in the first row; and each number is taken for the first cell.
        (f"1100{'0' * 12},{SOLUTION}", "Puzzle has no valid completion"),
        (f"0230400010000000,{SOLUTION}", "Puzzle has no valid completion"),
        (f"{PUZZLE},1234341221434312", "Solution is not a valid grid"),
        (f"2{'0' * 15},{SOLUTION}", "Solution contradicts the clues of Puzzle"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message, newline):
    # After the header, a good row and a blank line.
    path = written(tmp_path, newline.join(["Puzzle,Solution", GOOD, "", row, GOOD]))
    with pytest.raises(ValueError) as error:
        sudoku.read_puzzles(path)
    assert str(error.value).startswith(f"{path}, line 4: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: column Puzzle and Solution missing; .* an empty file"),
        (f"Puzzle,Answer\n{GOOD}\n", "line 1: column Solution missing; .* found: Puzzle,Answer"),
        (f"{GOOD}\n{GOOD}\n", "line 1: column Puzzle and Solution missing"),
        (f"Puzzle;Solution\n{PUZZLE};{SOLUTION}\n", "line 1: column Puzzle and Solution missing"),
        ("Puzzle,Solution\n", "no puzzles below the header"),
        ("Puzzle,Solution\n\n\n", "no puzzles below the header"),
        (b"Puzzle,Solution\n\xff\xfe," + SOLUTION.encode(), "UTF-8"),
        ("Puzzle,Solution\n" + "0" * 200_000, "line 2"),
        (f'Puzzle,Solution\n"{PUZZLE},{SOLUTION}\n{GOOD}\n', "Puzzle must have 16 characters"),
    ],
    ids=[
        "empty",
        "other column",
        "no header",
        "semicolons",
        "header only",
        "blank lines",
        "UTF-16",
        "huge",
        "open quote",
    ],
)
def test_a_bad_file_is_an_error(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"(?s)^{path}.*{message}"):
        sudoku.read_puzzles(path)


def test_blank_lines_above_the_header_do_not_matter_or_are_named(tmp_path):
    path = written(tmp_path, f"\nPuzzle,Solution\n{GOOD}\n")
    try:
        assert len(sudoku.read_puzzles(path).puzzle) == 1
    except ValueError as error:
        assert "empty file" not in str(error)  # it is not


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(OSError):
            sudoku.read_puzzles(path)


# The base model


def test_the_shipped_base_is_small():
    assert sum(file.stat().st_size for file in sudoku.BASE_MODEL.iterdir()) < 2_000_000


@pytest.mark.slow
def test_the_shipped_base_knows_rows_and_nothing_else():
    model = sudoku.base_model().eval()
    blank = torch.zeros(500, 16, dtype=torch.int64)
    filled = rollout(MaskedLM(model), blank, MaskedCTMC(mask_token=sudoku.BLANK), seed=0).final
    rows, columns, boxes = (part.double() for part in sudoku.satisfied(filled).split(4, dim=1))
    assert float(rows.mean()) >= 0.95
    # Four independent draws are all different with probability 4!/4^4 = 0.094 in a column; a box is two halves of
    # rows: 0.167. 2000 units: five standard errors are 0.033 and 0.042, and the rows that are wrong, 0.6%, add as much.
    assert float(columns.mean()) == pytest.approx(24 / 256, abs=0.04)
    assert float(boxes.mean()) == pytest.approx(1 / 6, abs=0.05)
    puzzles = sudoku.held_out_puzzles(8)
    filled = rollout(MaskedLM(model), puzzles.puzzle, MaskedCTMC(mask_token=sudoku.BLANK), seed=0).final
    assert sudoku.metrics(puzzles.puzzle, filled, puzzles.solution)["solved"] < 0.10


def test_pretraining_is_deterministic_for_a_seed():
    before = torch.random.get_rng_state()
    first, second, other = (sudoku.pretrain_base(seed, steps=3, batch_size=8, progress=False) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is left alone
    states = [list(itertools.chain(model.state_dict().values())) for model in (first, second, other)]
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))
