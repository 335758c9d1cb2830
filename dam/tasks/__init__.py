"""Tasks: puzzles, rewards, metrics and base models; `TASKS` has those whose prompts and answers are text, by name."""

from dam.tasks import countdown, gsm8k, math, sudoku_text
from dam.tasks.language import LanguageTask

TASKS: dict[str, LanguageTask] = {module.TASK.name: module.TASK for module in (countdown, gsm8k, math, sudoku_text)}
