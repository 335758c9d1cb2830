"""README's blocks of Python, and its training block shortened, for whoever runs them: the tests, and a release."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TRAINING, OPERATIONS, CHAINS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# Of the training block, for a rollout of few puzzles.
SHORTER = (
    ("max_steps=200, logging_steps=20", "max_steps=4, logging_steps=2"),
    ("batch_size=64 * 16, num_iterations=8", "batch_size=4 * 16, num_iterations=2"),
    ("replay_batch_size=32, draw_outcomes=192", "replay_batch_size=4, draw_outcomes=16"),
    ("4096", "8"),
    ("held_out_puzzles(blanks=6)", "held_out_puzzles(blanks=6, per_grid=1)"),
)


def short_training():
    """The training block of four steps.

    Raises:
        LookupError: README has no longer what is shortened.
    """
    shortened = TRAINING
    for long, short in SHORTER:
        if shortened.count(long) != 1:
            raise LookupError(f"README's training block has {shortened.count(long)} times {long!r}")
        shortened = shortened.replace(long, short)
    return shortened


def shown_by_operations():
    """What the block of operations prints, by its last line."""
    return OPERATIONS.rstrip().splitlines()[-1].removeprefix("# ")
