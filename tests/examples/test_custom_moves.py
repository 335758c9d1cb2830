"""Moves of one's own, as the page and the example show them."""

import re
from pathlib import Path

from examples import custom_moves

PAGE = Path(__file__).parent.parent.parent / "docs" / "moves.md"


def test_the_blocks_of_the_page():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, names)


def test_the_example_approaches_the_optimum(capsys):
    found = custom_moves.main(["--rounds", "14", "--batch", "200"])
    before = float(re.search(r"optimum (\d\.\d+)", capsys.readouterr().out)[1])
    # 2800 trajectories, of 60,000 that the example itself draws.
    assert before > 0.4 and found < before / 2
